// Quadratic attention through sums over features of the keys, chunk by chunk.
#pragma once

#include "quadratic/native/cpu.hpp"

namespace linattn::LINATTN_ISA {

void chunked_forward(const quadratic::ForwardCall& call);
void chunked_backward(const quadratic::BackwardCall& call);

// The state after all keys of a call, whatever form computed its output.
void final_state(const quadratic::ForwardCall& call);

}  // namespace linattn::LINATTN_ISA

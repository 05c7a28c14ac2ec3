// Quadratic attention through sums over features of the keys, chunk by chunk.
#pragma once

#include "quadratic/native/quadratic.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::BackwardCall;
using linattn::quadratic::ForwardCall;

void chunked_forward(const ForwardCall& call);
void chunked_backward(const BackwardCall& call);

// The state after all keys of a call, whatever form computed its output.
void final_state(const ForwardCall& call);

}  // namespace linattn::LINATTN_ISA::quadratic

// Quadratic attention through sums over features of the keys, in bf16 by AMX tiles.
#pragma once

#include "quadratic/native/cpu.hpp"

namespace linattn::LINATTN_ISA {

void chunked_forward(const quadratic::ForwardCall& call);
void chunked_backward(const quadratic::BackwardCall& call);

}  // namespace linattn::LINATTN_ISA

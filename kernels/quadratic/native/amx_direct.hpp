// Quadratic attention from scores, in bf16 by AMX tiles.
#pragma once

#include "quadratic/native/cpu.hpp"

namespace linattn::LINATTN_ISA {

void direct_forward(const quadratic::ForwardCall& call);
void direct_backward(const quadratic::BackwardCall& call);

}  // namespace linattn::LINATTN_ISA

// Quadratic attention through sums over features of the keys, in bf16 by AMX tiles.
#pragma once

#include "quadratic/native/quadratic.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::BackwardCall;
using linattn::quadratic::ForwardCall;

void chunked_forward(const ForwardCall& call);
void chunked_backward(const BackwardCall& call);

}  // namespace linattn::LINATTN_ISA::quadratic

// Quadratic attention from scores, in tiles of keys.
#pragma once

#include "quadratic/native/quadratic.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::BackwardCall;
using linattn::quadratic::ForwardCall;

void direct_forward(const ForwardCall& call);
void direct_backward(const BackwardCall& call);

}  // namespace linattn::LINATTN_ISA::quadratic

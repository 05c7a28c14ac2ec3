// Quadratic attention in bf16 by AMX tiles: the calls that they compute faster than vectors do.
#pragma once

#include "quadratic/native/quadratic.hpp"

namespace linattn::isa_amx::quadratic {

using linattn::quadratic::BackwardCall;
using linattn::quadratic::ForwardCall;

bool supports(const ForwardCall& call);
bool supports(const BackwardCall& call);

// Only for calls that `supports` accepts, on a machine with Isa::amx.
void forward(const ForwardCall& call);
void backward(const BackwardCall& call);

}  // namespace linattn::isa_amx::quadratic

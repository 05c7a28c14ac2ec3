// Quadratic attention in bf16 by AMX tiles: the calls that they compute faster than vectors do.
#pragma once

#include "quadratic/native/cpu.hpp"

namespace linattn::isa_amx {

bool takes(const quadratic::ForwardCall& call);
bool takes(const quadratic::BackwardCall& call);

// Only for calls that `takes` accepts, on a machine with Capability::amx.
void forward(const quadratic::ForwardCall& call);
void backward(const quadratic::BackwardCall& call);

}  // namespace linattn::isa_amx

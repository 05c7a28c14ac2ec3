// Few new tokens beside a state: what a step of decoding is.
#pragma once

#include "quadratic/native/quadratic.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::ForwardCall;

// Every sequence has at most 16 keys and 128 queries for each key head, and there is a state.
bool is_decoding(const ForwardCall& call);

// One pass over the state, in its canonical layout: each line is read for all queries and written back with the new
// keys added while it is in the cache. New keys are read through their scores, so that queries with few keys need no
// care of their own.
void decode(const ForwardCall& call);

}  // namespace linattn::LINATTN_ISA::quadratic

// What an op with a state is called with: Options and State are the op's own, the rest is the same for all.
#pragma once

#include "problem.hpp"

namespace linattn {

template <class Options, class State>
struct CallOf : Options {
    Problem problem;
    Rows out;                       // [B, H, Tq, M]; read by the backward pass
    float* l = nullptr;             // [B, H, Tq] dense; read by the backward pass
    const State* before = nullptr;  // or null
};

template <class Options, class State>
struct ForwardCallOf : CallOf<Options, State> {
    const State* after = nullptr;  // null: nobody asked for it
};

template <class Options, class State>
struct BackwardCallOf : CallOf<Options, State> {
    Rows dout;
    Rows dq, dk, dv;                 // no data: not wanted
    const State* dafter = nullptr;   // n is null; null: no gradient comes that way
    const State* dbefore = nullptr;  // n is null; null: not wanted
};

}  // namespace linattn

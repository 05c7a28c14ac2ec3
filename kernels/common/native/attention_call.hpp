// The arguments of an op with a state: Options and State are the op's own, the rest is the same for all.
#pragma once

#include "attention_problem.hpp"

namespace linattn {

template <class Options, class State>
struct AttentionCall : Options {
    AttentionProblem problem;
    TensorView out;                 // [B, H, Tq, M]; read by the backward pass
    float* l = nullptr;             // [B, H, Tq] dense; read by the backward pass
    const State* before = nullptr;  // or null
};

template <class Options, class State>
struct AttentionForwardCall : AttentionCall<Options, State> {
    const State* after = nullptr;  // null: not asked for
};

template <class Options, class State>
struct AttentionBackwardCall : AttentionCall<Options, State> {
    TensorView dout;
    TensorView dq, dk, dv;           // no data: not asked for
    const State* dafter = nullptr;   // n is null; null: no gradient to it
    const State* dbefore = nullptr;  // n is null; null: not asked for
};

}  // namespace linattn

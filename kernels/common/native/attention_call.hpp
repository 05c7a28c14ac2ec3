// The arguments of an op with a state: Options and State are the op's own, the rest is the same for all.
#pragma once

#include "common/native/attention_problem.hpp"

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

// Preconditions, checked where a call enters: in <op>.cpp, which is compiled once.

inline void check(const AttentionProblem& p) {
    LINATTN_ASSERT(p.H >= 1 && p.Hkv >= 1 && p.H % p.Hkv == 0 && p.D >= 1 && p.M >= 1 && p.threads >= 1);
    LINATTN_ASSERT(p.q.data != nullptr && p.k.data != nullptr && p.v.data != nullptr);
    LINATTN_ASSERT(p.cu_seqlens == nullptr ? p.sequences == p.B : p.B == 1 && p.Tq == p.Tk);
    for (Index s = 0; p.cu_seqlens != nullptr && s < p.sequences; ++s)
        LINATTN_ASSERT(0 <= p.cu_seqlens[s] && p.cu_seqlens[s] <= p.cu_seqlens[s + 1] && p.cu_seqlens[s + 1] <= p.Tk);
}

template <class Options, class State>
void check(const AttentionForwardCall<Options, State>& call) {
    check(call.problem);
    LINATTN_ASSERT(call.out.data != nullptr && call.l != nullptr && call.chunk >= 0);
}

template <class Options, class State>
void check(const AttentionBackwardCall<Options, State>& call) {
    check(call.problem);
    LINATTN_ASSERT(call.out.data != nullptr && call.l != nullptr && call.dout.data != nullptr && call.chunk >= 0);
}

}  // namespace linattn

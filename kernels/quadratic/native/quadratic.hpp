// Quadratic-kernel attention on the CPU: the arguments of a call, and the entry points. No torch, no Python.
//
//     out_i = sum_j p(s_ij) v_j / l_i,   l_i = sum_j p(s_ij),   p(s) = c0 + c1 s + c2 s^2,   s_ij = scale * q_i.k_j
//
// Rows with l <= 0 are 0, as are their gradients. Derivations: README.md.
#pragma once

#include "common/native/attention_call.hpp"

namespace linattn::quadratic {

// Sums over keys in the canonical layout (linattn/states.py): dense fp32, leading sizes [sequences, Hkv]; n is
// [sequences].
struct State {
    Index* n = nullptr;
    float* k_sum = nullptr;  // [D]
    float* kk = nullptr;     // [D, D]
    float* v_sum = nullptr;  // [M]
    float* kv = nullptr;     // [D, M]
    float* kkv = nullptr;    // [D (D + 1) / 2, M], k_a k_b v for a >= b at a (a + 1) / 2 + b
};

enum class Form : int { direct, chunked, recurrent };

struct Options {
    double c0 = 1, c1 = 2, c2 = 1;
    Form form = Form::direct;
    Index chunk = 0;  // keys of a chunk; 0: the kernel chooses
};

// Queries that have seen fewer keys are ill-conditioned through sums over features (README.md): every form computes
// them from their scores. The reference's twin is DIRECT_KEYS.
constexpr Index direct_keys = 16;

using Call = AttentionCall<Options, State>;
using ForwardCall = AttentionForwardCall<Options, State>;
using BackwardCall = AttentionBackwardCall<Options, State>;

// Run on the selected instruction set, by dtype and sizes. `problem.threads` threads; the same bits for the same number
// of them.
void forward(const ForwardCall& call);
void backward(const BackwardCall& call);

}  // namespace linattn::quadratic

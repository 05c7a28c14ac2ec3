// Quadratic-kernel attention on the CPU: what a call is, and who computes it. No torch, no Python.
//
//     out_i = sum_j p(s_ij) v_j / l_i,   l_i = sum_j p(s_ij),   p(s) = c0 + c1 s + c2 s^2,   s_ij = scale * q_i.k_j
//
// Rows with l <= 0 are 0, as are their gradients. Derivations: README.md.
#pragma once

#include "common/native/problem.hpp"

namespace linattn::quadratic {

// Sums over keys in the canonical layout (linattn/state.py): dense fp32, leading sizes [sequences, Hkv]; n is [sequences].
struct State {
    Index* n = nullptr;
    float* k_sum = nullptr;  // [D]
    float* kk = nullptr;     // [D, D]
    float* v_sum = nullptr;  // [M]
    float* kv = nullptr;     // [D, M]
    float* kkv = nullptr;    // [D (D + 1) / 2, M], k_a k_b v for a >= b at a (a + 1) / 2 + b
};

enum class Form : int { direct, chunked, recurrent };

struct Call {
    Problem problem;
    double c0 = 1, c1 = 2, c2 = 1;
    Form form = Form::direct;
    Index chunk = 0;                // rows of a chunk; 0: the kernel chooses
    Rows out;                       // [B, H, Tq, M]; read by the backward pass
    float* l = nullptr;             // [B, H, Tq] dense; read by the backward pass
    const State* before = nullptr;  // or null
};

struct ForwardCall : Call {
    const State* after = nullptr;  // null: nobody asked for it
};

struct BackwardCall : Call {
    Rows dout;
    Rows dq, dk, dv;                // no data: not wanted
    const State* dafter = nullptr;  // n is null; null: no gradient comes that way
    const State* dbefore = nullptr; // n is null; null: not wanted
};

// Chooses by capability, dtype and sizes. `problem.threads` threads; the same bits for the same number of them.
void forward(const ForwardCall& call);
void backward(const BackwardCall& call);

}  // namespace linattn::quadratic

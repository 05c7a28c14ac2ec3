// Feature-map attention on the CPU: what a call is, and who computes it. No torch, no Python.
//
//     out_i = sum_j p_ij v_j / l_i,   l_i = sum_j p_ij,   p_ij = scale * phi(q_i).phi(k_j)
//
// Rows with l <= 0 are 0, as are their gradients. Derivations: README.md.
#pragma once

#include "common/native/problem.hpp"

namespace linattn::feature_map {

// In the order of MAPS in cpu.py.
enum class Map : int { identity, elu_plus_one, relu, relu_squared, exp };

// Sums over keys in the canonical layout (linattn/state.py): dense fp32, leading sizes [sequences, Hkv]; n is [sequences].
struct State {
    Index* n = nullptr;
    float* f_sum = nullptr;  // [D]
    float* fv = nullptr;     // [D, M]
};

struct Call {
    Problem problem;
    Map map = Map::identity;
    Index chunk = 0;                // keys of a chunk, at most 64; 0: the kernel chooses
    Rows out;                       // [B, H, Tq, M]; read by the backward pass
    float* l = nullptr;             // [B, H, Tq] dense; read by the backward pass
    const State* before = nullptr;  // or null
};

struct ForwardCall : Call {
    const State* after = nullptr;  // null: nobody asked for it
};

struct BackwardCall : Call {
    Rows dout;
    Rows dq, dk, dv;                 // no data: not wanted
    const State* dafter = nullptr;   // n is null; null: no gradient comes that way
    const State* dbefore = nullptr;  // n is null; null: not wanted
};

// Chooses by capability. `problem.threads` threads; the same bits for the same number of them.
void forward(const ForwardCall& call);
void backward(const BackwardCall& call);

}  // namespace linattn::feature_map

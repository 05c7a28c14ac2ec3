// Feature-map attention on the CPU: the arguments of a call, and the entry points. No torch, no Python.
//
//     out_i = sum_j p_ij v_j / l_i,   l_i = sum_j p_ij,   p_ij = scale * phi(q_i).phi(k_j)
//
// Rows with l <= 0 are 0, as are their gradients. Derivations: README.md.
#pragma once

#include "common/native/attention_call.hpp"
#include "feature_map/native/maps.hpp"

namespace linattn::feature_map {

// Sums over keys in the canonical layout (linattn/states.py): dense fp32, leading sizes [sequences, Hkv]; n is
// [sequences].
struct State {
    Index* n = nullptr;
    float* f_sum = nullptr;  // [D]
    float* fv = nullptr;     // [D, M]
};

struct Options {
    Map map = Map::identity;
    Index chunk = 0;  // keys of a chunk, at most 64; 0: the kernel chooses
};

using Call = AttentionCall<Options, State>;
using ForwardCall = AttentionForwardCall<Options, State>;
using BackwardCall = AttentionBackwardCall<Options, State>;

// Run on the selected instruction set. `problem.threads` threads; the same bits for the same number of them.
void forward(const ForwardCall& call);
void backward(const BackwardCall& call);

}  // namespace linattn::feature_map

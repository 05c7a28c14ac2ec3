// The arguments that all attention kernels share: raw pointers, no torch, no Python.
#pragma once

#include <cstdint>

#include "common/native/macros.hpp"

namespace linattn {

using Index = std::int64_t;

enum class Dtype : int { fp32, bf16, fp16 };

// A tensor [B, H, T, width] whose last stride is 1; strides in elements.
struct TensorView {
    void* data = nullptr;
    Index stride_b = 0, stride_h = 0, stride_t = 0;
};

// The inputs that all ops share. Query head h sees key head h / (H / Hkv). Packed: B = 1, sequence s is the rows
// cu_seqlens[s] to cu_seqlens[s + 1], which partition [0, T); else every batch element is a sequence.
struct AttentionProblem {
    Dtype dtype = Dtype::fp32;  // of q, k, v, out and of their gradients; row sums and states are fp32
    Index B = 0, H = 0, Hkv = 0, Tq = 0, Tk = 0, D = 0, M = 0;
    TensorView q, k, v;
    const bool* key_mask = nullptr;     // [B, Tk] dense, true for keys that count; or null
    const Index* cu_seqlens = nullptr;  // [sequences + 1]; or null
    Index sequences = 0;                // B unless packed
    bool is_causal = false;
    Index q_offset = 0;  // causal: query i sees keys j <= i + q_offset
    float scale = 1;
    bool normalize = true;
    int threads = 1;
};

// One sequence of one batch element: where its rows begin and how many there are.
struct Sequence {
    Index batch, first_query, first_key, queries, keys;
};

LINATTN_INLINE Sequence sequence(const AttentionProblem& p, Index s) {
    if (p.cu_seqlens == nullptr) return {s, 0, 0, p.Tq, p.Tk};
    const Index start = p.cu_seqlens[s], length = p.cu_seqlens[s + 1] - start;
    return {0, start, start, length, length};
}

}  // namespace linattn

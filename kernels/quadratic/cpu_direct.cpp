#include "quadratic/cpu_direct.hpp"

#include <atomic>

#include "common/native/matmul.hpp"
#include "common/native/packing.hpp"
#include "common/native/threads.hpp"
#include "quadratic/cpu_tiles.hpp"

namespace linattn::LINATTN_ISA {

using namespace quadratic;

namespace {

// Packed keys and values that one parallel region works on: beyond this, further heads wait for the next region.
constexpr Index region_bytes = Index{32} << 20;

// The keys of one head in one sequence, packed: for each block K^T [D][key_block], what counts [key_block], V
// [key_block][padded(M)].
struct PackedKeys {
    Index D, M;
    float* data;

    Index block_size() const { return (D + 1 + padded(M)) * key_block; }

    void pack(const Problem& p, const Sequence& s, Index head, Index block, float* to) const {
        const Index first = s.first_key + block * key_block, count = least<Index>(key_block, s.keys - block * key_block);
        const bool* keep = p.key_mask == nullptr ? nullptr : p.key_mask + s.batch * p.Tk + first;
        pack_transposed(head_rows(p.k, p.dtype, s.batch, head, first), count, D, 1, keep, to);
        mark_seen(keep, count, reinterpret_cast<std::int32_t*>(to + D * key_block));
        pack_rows(head_rows(p.v, p.dtype, s.batch, head, first), count, M, 1, keep, count, to + (D + 1) * key_block);
    }

    KeyBlock block(const float* at, const Sequence& s, Index index) const {
        return {at, reinterpret_cast<const std::int32_t*>(at + D * key_block), at + (D + 1) * key_block, padded(M),
                static_cast<int>(least<Index>(key_block, s.keys - index * key_block))};
    }
};

}  // namespace

void direct_forward(const ForwardCall&) { __builtin_trap(); }
void direct_backward(const BackwardCall&) { __builtin_trap(); }

}  // namespace linattn::LINATTN_ISA

// How the AMX kernels cut a head into chunks.
#pragma once

#include "quadratic/native/amx/score_tile.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::direct_keys;

using linattn::quadratic::Call;

constexpr Index default_chunk = 512;

// One sequence of one key head.
struct KeyHead {
    Sequence sequence;
    Index kv_head;
    const bool* key_mask;  // of the sequence, or null
};

inline KeyHead head(const AttentionProblem& p, Index number) {
    const Sequence one = sequence(p, number / p.Hkv);
    return {one, number % p.Hkv, p.key_mask == nullptr ? nullptr : p.key_mask + one.batch * p.Tk + one.first_key};
}

inline Index chunk_length(const Call& call) { return call.chunk == 0 ? default_chunk : (call.chunk + 63) / 64 * 64; }

// The first chunk is longer where a mask leaves too few keys in it: its queries are computed from scores.
struct FirstChunk {
    Index end;
    bool enough;  // keys in it for later queries to use the state

    FirstChunk(const KeyHead& one, Index chunk) : end(min(chunk, one.sequence.keys)) {
        Index alive = 0;
        for (Index j = 0; j < one.sequence.keys; j += 32) {
            alive += __builtin_popcount(rows_alive(one.key_mask, j, one.sequence.keys));
            end = max(end, min((j / 64 + 1) * 64, one.sequence.keys));
            if (alive >= direct_keys) break;
        }
        enough = alive >= direct_keys;
    }
};

}  // namespace linattn::LINATTN_ISA::quadratic

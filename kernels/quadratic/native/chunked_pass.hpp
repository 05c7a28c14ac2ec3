// The scan that all of the chunked form is made of. Readers meet writers: a tile of readers adds up what it gets from
// the writers of its own chunk through scores and from all earlier ones through sums; then the chunk's writers are
// folded in.
//
//     sweep     readers          writers          order      what readers collect
//     state     none             keys (k, v)      forwards
//     forward   rows (x)         keys (k, v)      forwards   out and row sums
//     queries   rows (x, O')     keys (k, v)      forwards   dq
//     keys      keys (k, v)      rows (x, O')     backwards  dk, dv: the sums are the gradients to those over keys
#pragma once

#include "quadratic/native/chunk_schedule.hpp"
#include "quadratic/native/chunk_state.hpp"
#include "quadratic/native/quadratic.hpp"
#include "quadratic/native/score_tile.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::BackwardCall;
using linattn::quadratic::Call;
using linattn::quadratic::State;

enum class Sweep { state, forward, queries, keys };

constexpr int batch_tiles = 4;  // readers that meet a block of sums while it is in the cache

// Up to 64 rows or keys, packed, and what a reader collects.
struct Tile {
    int rows;
    Index head, first;             // query head (of rows), and the first row or key
    std::int32_t* order;           // [tile_width]: a reader sees the writers of lower order
    std::int32_t lowest, highest;  // of them
    float *x, *x_rows;             // [D + 1][tile_width] x' = [1, x]; [tile_width][round_up<width>(D)]
    float *v, *vt;                 // values or O': [tile_width][round_up<width>(M)], [M][tile_width]
    float* delta;                  // [tile_width], 0 for keys
    float* moment_x;               // StateUpdate's
    float *acc, *l, *dx;           // [tile_width][round_up<width>(M)], [tile_width], [D + 1][tile_width]
};

// One sweep over one sequence and key head, by the members of a team.
class ChunkedPass {
public:
    // `after`: for the first two sweeps; `backward`: for the other two.
    ChunkedPass(Sweep sweep, const Call& call, const State* after, const BackwardCall* backward, Index sequence,
                Index kv_head, Team& team);

    void run();

private:
    bool reads_rows() const { return sweep_ != Sweep::keys; }
    Index tiles(const ChunkSpan& step, bool of_rows) const;
    Tile make_tile(bool reader);
    void load_tile(const ChunkSpan& step, Index index, bool as_row, Tile& tile);
    void load_rows(const ChunkSpan& step, Tile& tile);
    void load_row_gradients(Tile& tile);
    void load_keys(const ChunkSpan& step, Tile& tile);
    void load_writer(const ChunkSpan& step, Index index, Tile& tile);
    void load_reader(const ChunkSpan& step, Index index, Tile& tile);
    void add_scores(Tile& reader, const Tile& writer);
    template <bool masked>
    void weigh(Tile& reader, const Tile& writer);
    void read_sums(Index part, Tile& reader);
    void fold(Index part, Index writers);
    void take(const ChunkSpan& step, Index writers, bool fold_too);
    void finish(const Tile& tile);
    void finish_masked_keys();
    void store_lanes(const Tile& tile, const TensorView& to, Index head, Index first, float factor);
    Index key_row(const Tile& tile, Index r) const { return visible_.position(tile.first + r); }

    Scratch scratch_;
    const Sweep sweep_;
    const Call& call_;
    const State* after_;
    const BackwardCall* backward_;
    const AttentionProblem& p_;
    const Index index_, kv_head_, group_;  // index: of the sequence
    const Sequence sequence_;
    Team& team_;
    const VisibleKeys visible_;
    const Index past_;  // keys in the state before
    const ChunkSchedule steps_;
    const ScorePolynomial similarity_;
    const FeatureWeights weights_;
    const bool values_, gradients_;  // what readers collect: acc and l, dx
    ChunkState sums_;
    bool any_ = false;  // whether there is anything in the sums
    Tile* writers_ = nullptr;
    Tile readers_[batch_tiles];
    float *scores_, *dscores_;  // [tile_width of writers][tile_width of readers]
};

// Rows of a chunk, where the caller leaves it to the kernel.
Index default_chunk(const Call& call);

}  // namespace linattn::LINATTN_ISA::quadratic

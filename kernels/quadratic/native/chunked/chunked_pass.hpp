// One pass over the chunks of a sequence, for one key head: what all of the chunked form is made of. A tile of targets
// adds up what it gets from the sources of its own chunk through scores, and from all earlier ones through the state;
// then the chunk's sources are added to the state.
//
//     pass                 targets            sources            order      what targets collect
//     QueryPass, state     none               keys (k, v)        forwards
//     QueryPass, output    queries (x)        keys (k, v)        forwards   out and row sums
//     QueryPass, gradient  queries (x, dO')   keys (k, v)        forwards   dq
//     KeyPass              keys (k, v)        queries (x, dO')   backwards  dk, dv
//
// In a KeyPass the state is the gradient to the state over keys.
#pragma once

#include "quadratic/native/chunked/chunk_schedule.hpp"
#include "quadratic/native/chunked/chunk_state.hpp"
#include "quadratic/native/quadratic.hpp"
#include "quadratic/native/score_tile.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::BackwardCall;
using linattn::quadratic::Call;
using linattn::quadratic::ForwardCall;
using linattn::quadratic::State;

constexpr int batch_tiles = 4;  // targets that meet a block of the state while it is in the cache

// Up to 64 queries or keys, packed, and what a target collects.
struct Tile {
    int rows;
    Index head, first;             // query head (of queries), and the first query or key
    std::int32_t* order;           // [tile_width]: a target sees the sources of lower order
    std::int32_t lowest, highest;  // of them
    float *x, *x_rows;             // [D + 1][tile_width] x' = [1, x]; [tile_width][round_up<width>(D)]
    float *v, *vt;                 // values or dO': [tile_width][round_up<width>(M)], [M][tile_width]
    float* delta;                  // [tile_width], 0 for keys
    float* moment_x;               // StateUpdate's
    float *acc, *l, *dx;           // [tile_width][round_up<width>(M)], [tile_width], [D + 1][tile_width]
};

// What targets collect: values (acc), gradients (dx).
struct Collects {
    bool values, gradients;
};

// The frame that both passes share, by the members of a team.
class ChunkedPass {
public:
    void run();

protected:
    enum class Direction { forwards, backwards };

    // `backward`: null in a forward pass. `sequence_index`: of `sequence`, whose queries a pass may leave out.
    ChunkedPass(Direction direction, const Call& call, const BackwardCall* backward, Index sequence_index,
                const Sequence& sequence, Index kv_head, Index chunk, Collects collects, Team& team);
    ~ChunkedPass() = default;
    ChunkedPass(const ChunkedPass&) = delete;
    ChunkedPass& operator=(const ChunkedPass&) = delete;

    // The state that the pass begins with, and where the one that it ends with goes; null: none.
    virtual const State* state_before() const = 0;
    virtual const State* state_after() const = 0;
    virtual Index target_tiles(const ChunkSpan& span) const = 0;
    virtual Index source_tiles(const ChunkSpan& span) const = 0;
    virtual void load_target(const ChunkSpan& span, Index index, Tile& tile) = 0;
    virtual void load_source(const ChunkSpan& span, Index index, Tile& tile) = 0;
    // What a target gets from one part of the state.
    virtual void read_state(Index part, Tile& target) const = 0;
    virtual const FeatureWeights& update_weights() const = 0;
    virtual void store_target(const Tile& target) = 0;
    // Once, by the first member.
    virtual void finish() = 0;

    // Tiles of a span's queries (those that share the key head come one head after the other), and of its keys.
    Index query_tiles(const ChunkSpan& span) const { return group_ * ceil_div(span.i1 - span.i0, tile_width); }
    Index key_tiles(const ChunkSpan& span) const { return ceil_div(span.j1 - span.j0, tile_width); }
    void load_query_tile(const ChunkSpan& span, Index index, Tile& tile);
    void load_key_tile(const ChunkSpan& span, Index index, Tile& tile);
    Index key_position(const Tile& tile, Index r) const { return visible_.position(tile.first + r); }
    // The rows of `to` whose numbers are row(0), row(1), ... = factor * the lanes of dx.
    template <class Row>
    void store_lanes(const Tile& tile, const TensorView& to, Index head, Index first, float factor, const Row& row);

    Scratch scratch_;
    const Direction direction_;
    const Call& call_;
    const BackwardCall* backward_;
    const AttentionProblem& p_;
    const Index sequence_index_, kv_head_, group_;
    const Sequence sequence_;
    Team& team_;
    const VisibleKeys visible_;
    const Index past_;  // keys in the state before
    const ChunkSchedule schedule_;
    const ScorePolynomial polynomial_;
    const FeatureWeights weights_;
    const Collects collects_;
    ChunkState state_;

private:
    Tile make_tile(bool target);
    void place_tile(Index start, Index length, Index index, Tile& tile) const;
    void finish_loading(Tile& tile) const;
    void prepare();
    void process_span(const ChunkSpan& span, Index sources, bool update);
    void accumulate_scores(Tile& target, const Tile& source);
    template <bool masked>
    void weigh_scores(Tile& target, const Tile& source);
    void update_state(Index part, Index sources);

    bool any_ = false;  // whether there is anything in the state
    Index last_read_ = -1;
    Tile* sources_ = nullptr;
    Tile targets_[batch_tiles];
    float *scores_, *dscores_;  // [tile_width of sources][tile_width of targets]
};

// The passes over chunks of keys, first to last.
class QueryPass final : public ChunkedPass {
public:
    enum class Kind { state, output, gradient };

    // `after`: null if the state is not asked for. `backward`: of the call whose gradient this is, else null.
    QueryPass(Kind kind, const Call& call, const State* after, const BackwardCall* backward, Index sequence_index,
              Index kv_head, Team& team);

private:
    const State* state_before() const override { return call_.before; }
    const State* state_after() const override { return after_; }
    Index target_tiles(const ChunkSpan& span) const override { return query_tiles(span); }
    Index source_tiles(const ChunkSpan& span) const override { return key_tiles(span); }
    void load_target(const ChunkSpan& span, Index index, Tile& tile) override { load_query_tile(span, index, tile); }
    void load_source(const ChunkSpan& span, Index index, Tile& tile) override { load_key_tile(span, index, tile); }
    void read_state(Index part, Tile& target) const override;
    const FeatureWeights& update_weights() const override { return unweighted; }
    void store_target(const Tile& target) override;
    void finish() override;

    const Kind kind_;
    const State* after_;
};

// The pass over chunks of queries, last to first.
class KeyPass final : public ChunkedPass {
public:
    KeyPass(const BackwardCall& call, Index sequence_index, Index kv_head, Team& team);

private:
    const State* state_before() const override { return backward_->dafter; }
    const State* state_after() const override { return backward_->dbefore; }
    Index target_tiles(const ChunkSpan& span) const override { return key_tiles(span); }
    Index source_tiles(const ChunkSpan& span) const override { return query_tiles(span); }
    void load_target(const ChunkSpan& span, Index index, Tile& tile) override { load_key_tile(span, index, tile); }
    void load_source(const ChunkSpan& span, Index index, Tile& tile) override;
    void read_state(Index part, Tile& target) const override;
    const FeatureWeights& update_weights() const override { return weights_; }
    void store_target(const Tile& target) override;
    void finish() override;
};

template <class Row>
void ChunkedPass::store_lanes(const Tile& tile, const TensorView& to, Index head, Index first, float factor,
                              const Row& row) {
    Scratch scratch;
    float* rows = scratch.allocate<float>(tile_width * tile_width);
    for (Index d = 0; d < p_.D; d += tile_width) {
        const Index count = min<Index>(tile_width, p_.D - d);
        const float* lanes = tile.dx + (d + 1) * tile_width;
        pack_transposed(row_view(lanes, tile_width), count, tile_width, 1, nullptr, rows);
        TensorView columns = to;
        columns.data = static_cast<char*>(to.data) + d * element_size(p_.dtype);
        const RowView target = row_view(columns, p_.dtype, sequence_.batch, head, first);
        for (int r = 0; r < tile.rows; ++r) store_row(rows + r * tile_width, count, factor, target, row(r));
    }
}

}  // namespace linattn::LINATTN_ISA::quadratic

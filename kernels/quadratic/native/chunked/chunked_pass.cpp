#include "quadratic/native/chunked/chunked_pass.hpp"

#include <cstdint>

#include "common/native/bwd_preprocess.hpp"
#include "common/native/matmul.hpp"

namespace linattn::LINATTN_ISA::quadratic {
namespace {

float* allocate_shared(Team& team, Scratch& scratch, Index size) {
    return static_cast<float*>(team.broadcast(team.member == 0 ? scratch.allocate<float>(size) : nullptr));
}

void fill(float* to, Index n, Vec x) {
    for (Index i = 0; i < n; i += width) store(to + i, x);
}

FeatureWeights feature_weights(const Call& call) {
    const float c1 = static_cast<float>(call.c1), c2 = static_cast<float>(call.c2);
    return {static_cast<float>(call.c0), c1, c2, 2 * c2};
}

}  // namespace

ChunkedPass::ChunkedPass(Direction direction, const Call& call, const BackwardCall* backward, Index sequence_index,
                         const Sequence& sequence, Index kv_head, Index chunk, Collects collects, Team& team)
    : direction_(direction), call_(call), backward_(backward), p_(call.problem), sequence_index_(sequence_index),
      kv_head_(kv_head), group_(p_.H / p_.Hkv), sequence_(sequence), team_(team), visible_(p_, sequence_, scratch_),
      past_(call.before == nullptr ? 0 : call.before->n[sequence_index]),
      schedule_(visible_, sequence_.queries, p_.is_causal, chunk, past_ > 0), polynomial_(score_polynomial(call)),
      weights_(feature_weights(call)), collects_(collects),
      state_(p_.D, p_.M, allocate_shared(team, scratch_, ChunkState::size(p_.D, p_.M))) {
    scores_ = scratch_.allocate<float>(tile_width * tile_width);
    dscores_ = scratch_.allocate<float>(tile_width * tile_width);
}

Tile ChunkedPass::make_tile(bool target) {
    const Index D = round_up<4>(p_.D) + 4, M = round_up<width>(p_.M);
    Tile tile{};
    tile.order = scratch_.allocate<std::int32_t>(tile_width);
    tile.x = scratch_.allocate<float>(D * tile_width);
    tile.x_rows = scratch_.allocate<float>(round_up<width>(p_.D) * tile_width);
    tile.v = scratch_.allocate<float>(M * tile_width);
    tile.vt = scratch_.allocate<float>(round_up<4>(p_.M) * tile_width);
    tile.delta = scratch_.allocate<float>(tile_width);
    const bool same_moments = target || direction_ == Direction::forwards;
    tile.moment_x = same_moments ? tile.x : scratch_.allocate<float>(D * tile_width);
    if (target) {
        tile.acc = scratch_.allocate<float>(M * tile_width);
        tile.l = scratch_.allocate<float>(tile_width);
        tile.dx = scratch_.allocate<float>(D * tile_width);
    }
    return tile;
}

// ---- Packing --------------------------------------------------------------------------------------------------------

// Tile `index` of what lies from `start` on, `length` long, for each query head of the group.
void ChunkedPass::place_tile(Index start, Index length, Index index, Tile& tile) const {
    const Index each = ceil_div(length, tile_width), first = index % each * tile_width;
    tile.head = kv_head_ * group_ + index / each;
    tile.first = start + first;
    tile.rows = static_cast<int>(min<Index>(tile_width, length - first));
}

// From rows to lanes.
void ChunkedPass::finish_loading(Tile& tile) const {
    pack_transposed(row_view(tile.x_rows, round_up<width>(p_.D)), tile.rows, p_.D, 1, nullptr, tile.x + tile_width);
    for (int r = 0; r < tile_width; ++r) tile.x[r] = r < tile.rows ? 1.0f : 0.0f;
    if (backward_ != nullptr)
        pack_transposed(row_view(tile.v, round_up<width>(p_.M)), tile.rows, p_.M, 1, nullptr, tile.vt);
    tile.lowest = tile.highest = tile.order[0];
    for (int r = 1; r < tile.rows; ++r) {
        tile.lowest = min(tile.lowest, tile.order[r]);
        tile.highest = max(tile.highest, tile.order[r]);
    }
}

// Order is counted from the span's first key, so that it fits 32 bits, and negated backwards, where keys are the
// targets and see the queries that see them.
void ChunkedPass::load_query_tile(const ChunkSpan& span, Index index, Tile& tile) {
    place_tile(span.i0, span.i1 - span.i0, index, tile);
    const Index b = sequence_.batch, first = sequence_.first_query + tile.first;
    const auto view = [&](const TensorView& t) { return row_view(t, p_.dtype, b, tile.head, first); };
    pack_rows(view(p_.q), tile.rows, p_.D, p_.scale, nullptr, tile_width, tile.x_rows);
    for (int r = 0; r < tile_width; ++r) {
        const Index seen = max<Index>(visible_.seen(min(tile.first + r, sequence_.queries - 1)) - span.j0, 0);
        const auto order = static_cast<std::int32_t>(min<Index>(seen, INT32_MAX));
        tile.order[r] = direction_ == Direction::forwards ? order : -order;
    }
    if (backward_ != nullptr)
        bwd_preprocess(view(backward_->dout), view(call_.out), call_.l + (b * p_.H + tile.head) * p_.Tq + first,
                       p_.normalize, tile.rows, p_.M, tile_width, round_up<width>(p_.M), tile.v, tile.delta);
    finish_loading(tile);
}

void ChunkedPass::load_key_tile(const ChunkSpan& span, Index index, Tile& tile) {
    place_tile(span.j0, span.j1 - span.j0, index, tile);
    const Index b = sequence_.batch, D = round_up<width>(p_.D), M = round_up<width>(p_.M);
    const auto load = [&](Index position, Index count, Index r, Index rows) {
        const Index at = sequence_.first_key + position;
        pack_rows(row_view(p_.k, p_.dtype, b, kv_head_, at), count, p_.D, 1, nullptr, rows, tile.x_rows + r * D);
        pack_rows(row_view(p_.v, p_.dtype, b, kv_head_, at), count, p_.M, 1, nullptr, rows, tile.v + r * M);
    };
    if (visible_.contiguous()) {
        load(tile.first, tile.rows, 0, tile_width);
    } else {
        for (int r = 0; r < tile_width; ++r) load(r < tile.rows ? key_position(tile, r) : 0, r < tile.rows, r, 1);
    }
    fill(tile.delta, tile_width, Vec{});
    for (int r = 0; r < tile_width; ++r) {
        const auto order = static_cast<std::int32_t>(min<Index>(tile.first + r - span.j0, INT32_MAX - 1));
        tile.order[r] = direction_ == Direction::forwards ? order : -order;
    }
    finish_loading(tile);
}

// ---- Scores ---------------------------------------------------------------------------------------------------------

void ChunkedPass::accumulate_scores(Tile& target, const Tile& source) {
    if (target.highest <= source.lowest) return;
    const int D = static_cast<int>(p_.D), M = static_cast<int>(p_.M);
    const int sources = round_up<4>(source.rows), targets = round_up<4>(target.rows);
    fill(scores_, sources * tile_width, splat(polynomial_.start));
    add_product<1, tile_width>(source.x + tile_width, target.x + tile_width, tile_width, D, D, sources, scores_,
                               tile_width, tile_width);
    if (collects_.gradients) {
        for (int i = 0; i < sources; ++i)
            for (int c = 0; c < tile_width; c += width)
                store(dscores_ + i * tile_width + c, -load(target.delta + c) - source.delta[i]);
        add_product<1, tile_width>(source.vt, target.vt, tile_width, M, M, sources, dscores_, tile_width, tile_width);
    }
    target.lowest <= source.highest ? weigh_scores<true>(target, source) : weigh_scores<false>(target, source);
    if (collects_.values)
        add_product<1, tile_width>(scores_, source.v, round_up<width>(p_.M), source.rows, source.rows, targets,
                                   target.acc, round_up<width>(p_.M), round_up<width>(p_.M));
    if (collects_.gradients)
        add_product<tile_width, 1>(source.x + tile_width, dscores_, tile_width, source.rows, source.rows,
                                   round_up<4>(D), target.dx + tile_width, tile_width, tile_width);
}

// From scores to similarities, and from gradients to similarities to those to scores.
template <bool masked>
void ChunkedPass::weigh_scores(Tile& target, const Tile& source) {
    const ScorePolynomial f = polynomial_;
    for (int i = 0; i < source.rows; ++i) {
        for (int c = 0; c < tile_width; c += width) {
            float *at = scores_ + i * tile_width + c, *dat = dscores_ + i * tile_width + c;
            Lanes visible;
            __builtin_memcpy(&visible, target.order + c, sizeof visible);
            visible = visible > source.order[i];
            const auto mask = [&](Vec x) { return masked ? select(x, visible) : x; };
            const Vec t = load(at), p = mask((f.a2 * t + f.a1) * t + f.a0);
            store(at, p);
            store(target.l + c, load(target.l + c) + p);
            if (collects_.gradients) store(dat, mask((2 * f.a2 * t + f.a1) * load(dat)));
        }
    }
}

// ---- The state ------------------------------------------------------------------------------------------------------

void ChunkedPass::update_state(Index part, Index sources) {
    for (Index t = 0; t < sources; ++t) {
        const Tile& s = sources_[t];
        state_.update(part, {s.x, s.v, s.moment_x, s.x_rows, s.rows}, update_weights());
    }
}

// The member's targets of a span, and, alone in its team, the update: block by block, so that the state is touched
// once.
void ChunkedPass::process_span(const ChunkSpan& span, Index sources, bool update) {
    const Index targets = target_tiles(span), begin = team_.begin(targets), end = team_.end(targets);
    const float c0 = weights_.one;
    bool updated = false;
    for (Index t = begin; t < end; t += batch_tiles) {
        const Index count = min<Index>(batch_tiles, end - t);
        updated = team_.size == 1 && update && t + batch_tiles >= end;
        for (Index i = 0; i < count; ++i) {
            Tile& target = targets_[i];
            load_target(span, t + i, target);
            if (collects_.values) clear(target.acc, tile_width * round_up<width>(p_.M));
            fill(target.l, tile_width, Vec{});
            if (collects_.gradients) clear(target.dx, tile_width * (p_.D + 1));
            for (Index s = 0; s < sources; ++s) accumulate_scores(target, sources_[s]);
        }
        for (Index part = 0; part < state_.parts() && (any_ || updated); ++part) {
            for (Index i = 0; i < count && any_; ++i) read_state(part, targets_[i]);
            if (updated) update_state(part, sources);
        }
        const float keys = any_ ? static_cast<float>(past_ + span.j0) : 0;
        for (Index i = 0; i < count; ++i) {
            for (int r = 0; r < tile_width; ++r) targets_[i].l[r] += c0 * keys;
            store_target(targets_[i]);
        }
    }
    team_.wait();
    if (update && !updated)
        for (Index part = team_.member; part < state_.parts(); part += team_.size) update_state(part, sources);
    team_.wait();
}

// Allocates the tiles and loads the state before.
void ChunkedPass::prepare() {
    const State* before = state_before();
    any_ = before != nullptr;
    Index max_sources = 0;
    for (Index s = 0; s < schedule_.count(); ++s) {
        const ChunkSpan span = schedule_.span(s);
        max_sources = max(max_sources, source_tiles(span));
        if (span.i1 > span.i0) last_read_ = s;
    }
    for (Tile& target : targets_) target = make_tile(true);
    Tile* mine = scratch_.allocate<Tile>(max_sources);
    if (team_.member == 0)
        for (Index t = 0; t < max_sources; ++t) mine[t] = make_tile(false);
    sources_ = static_cast<Tile*>(team_.broadcast(mine));
    const Index head = sequence_index_ * p_.Hkv + kv_head_;
    for (Index part = team_.member; part < state_.parts(); part += team_.size)
        before != nullptr ? state_.load_state(part, *before, head) : state_.reset(part);
}

void ChunkedPass::run() {
    prepare();
    const State* after = state_after();
    const bool forwards = direction_ == Direction::forwards;
    for (Index s = 0; s < schedule_.count(); ++s) {
        const Index turn = forwards ? s : schedule_.count() - 1 - s;
        const ChunkSpan span = schedule_.span(turn);
        const Index sources = source_tiles(span);
        const bool read_later = forwards ? turn < last_read_ : turn > 0;
        const bool update = sources > 0 && (after != nullptr || read_later);
        for (Index t = team_.member; t < sources; t += team_.size) load_source(span, t, sources_[t]);
        team_.wait();
        process_span(span, sources, update);
        any_ = any_ || update;
    }
    const Index head = sequence_index_ * p_.Hkv + kv_head_;
    if (after != nullptr)
        for (Index part = team_.member; part < state_.parts(); part += team_.size)
            state_.store_state(part, *after, head, state_before());
    if (team_.member == 0) finish();
    team_.wait();
}

}  // namespace linattn::LINATTN_ISA::quadratic

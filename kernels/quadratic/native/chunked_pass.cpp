#include "quadratic/native/chunked_pass.hpp"

#include <cstdint>

#include "common/native/matmul.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using namespace linattn::quadratic;

namespace {

float* shared_memory(Team& team, Scratch& scratch, Index size) {
    return static_cast<float*>(team.broadcast(team.member == 0 ? scratch.allocate<float>(size) : nullptr));
}

void fill(float* to, Index n, Vec x) {
    for (Index i = 0; i < n; i += width) store(to + i, x);
}

LINATTN_INLINE Vec where(Vec x, Lanes visible) { return reinterpret_cast<Vec>(reinterpret_cast<Lanes>(x) & visible); }

// A state needs no rows.
Sequence sequence_for(Sweep sweep, const AttentionProblem& p, Index index) {
    Sequence s = sequence(p, index);
    if (sweep == Sweep::state) s.queries = 0;
    return s;
}

FeatureWeights weights(const Call& call) {
    const float c1 = static_cast<float>(call.c1), c2 = static_cast<float>(call.c2);
    return {static_cast<float>(call.c0), c1, c2, 2 * c2};
}

Index chunk(const Call& call, Sweep sweep) {
    if (call.form == Form::direct && sweep != Sweep::state) return 0;
    if (call.form == Form::recurrent && sweep == Sweep::forward) return direct_keys;
    return call.chunk > 0 ? call.chunk : default_chunk(call);
}

}  // namespace

Index default_chunk(const Call& call) {
    const AttentionProblem& p = call.problem;
    const Index longest = p.D <= 16 ? 64 : p.D <= 32 ? 128 : 256;
    return max<Index>(tile_width, longest / (p.H / p.Hkv) / tile_width * tile_width);
}

ChunkedPass::ChunkedPass(Sweep sweep, const Call& call, const State* after, const BackwardCall* backward,
                         Index sequence_index, Index kv_head, Team& team)
    : sweep_(sweep), call_(call), after_(after), backward_(backward), p_(call.problem), index_(sequence_index),
      kv_head_(kv_head), group_(p_.H / p_.Hkv), sequence_(sequence_for(sweep, p_, sequence_index)), team_(team),
      visible_(p_, sequence_, scratch_), past_(call.before == nullptr ? 0 : call.before->n[index_]),
      steps_(visible_, sequence_.queries, p_.is_causal, chunk(call, sweep), past_ > 0),
      similarity_(score_polynomial(call)), weights_(weights(call)),
      values_(sweep == Sweep::forward || (sweep == Sweep::keys && backward->dv.data != nullptr)),
      gradients_(sweep == Sweep::queries || (sweep == Sweep::keys && backward->dk.data != nullptr)),
      sums_(p_.D, p_.M, shared_memory(team, scratch_, ChunkState::size(p_.D, p_.M))) {
    scores_ = scratch_.allocate<float>(tile_width * tile_width);
    dscores_ = scratch_.allocate<float>(tile_width * tile_width);
}

// How many tiles of rows or keys a step has; rows that share the key head come one head after the other.
Index ChunkedPass::tiles(const ChunkSpan& step, bool of_rows) const {
    return of_rows ? group_ * ceil_div(step.i1 - step.i0, tile_width) : ceil_div(step.j1 - step.j0, tile_width);
}

Tile ChunkedPass::make_tile(bool reader) {
    const Index D = round_up<4>(p_.D) + 4, M = round_up<width>(p_.M);
    Tile tile{};
    tile.order = scratch_.allocate<std::int32_t>(tile_width);
    tile.x = scratch_.allocate<float>(D * tile_width);
    tile.x_rows = scratch_.allocate<float>(round_up<width>(p_.D) * tile_width);
    tile.v = scratch_.allocate<float>(M * tile_width);
    tile.vt = scratch_.allocate<float>(round_up<4>(p_.M) * tile_width);
    tile.delta = scratch_.allocate<float>(tile_width);
    tile.moment_x = reader || reads_rows() ? tile.x : scratch_.allocate<float>(D * tile_width);
    if (reader) {
        tile.acc = scratch_.allocate<float>(M * tile_width);
        tile.l = scratch_.allocate<float>(tile_width);
        tile.dx = scratch_.allocate<float>(D * tile_width);
    }
    return tile;
}

// ---- Packing --------------------------------------------------------------------------------------------------------

// Everything is counted from the step's first key, so that it fits 32 bits. Backwards, keys read what later rows wrote.
void ChunkedPass::load_tile(const ChunkSpan& step, Index index, bool as_row, Tile& tile) {
    const Index start = as_row ? step.i0 : step.j0, length = (as_row ? step.i1 : step.j1) - start;
    const Index each = ceil_div(length, tile_width), first = index % each * tile_width;
    tile.head = kv_head_ * group_ + index / each;
    tile.first = start + first;
    tile.rows = static_cast<int>(min<Index>(tile_width, length - first));
    as_row ? load_rows(step, tile) : load_keys(step, tile);

    const RowView packed{tile.x_rows, round_up<width>(p_.D), Dtype::fp32};
    pack_transposed(packed, tile.rows, p_.D, 1, nullptr, tile.x + tile_width);
    for (int r = 0; r < tile_width; ++r) tile.x[r] = r < tile.rows;
    if (backward_ != nullptr)
        pack_transposed({tile.v, round_up<width>(p_.M), Dtype::fp32}, tile.rows, p_.M, 1, nullptr, tile.vt);
    tile.lowest = tile.highest = tile.order[0];
    for (int r = 1; r < tile.rows; ++r) {
        tile.lowest = min(tile.lowest, tile.order[r]);
        tile.highest = max(tile.highest, tile.order[r]);
    }
}

void ChunkedPass::load_rows(const ChunkSpan& step, Tile& tile) {
    const auto [b, first_query, first_key, queries, keys] = sequence_;
    pack_rows(row_view(p_.q, p_.dtype, b, tile.head, first_query + tile.first), tile.rows, p_.D, p_.scale, nullptr,
              tile_width, tile.x_rows);
    for (int r = 0; r < tile_width; ++r) {
        const Index seen = max<Index>(visible_.seen(min(tile.first + r, queries - 1)) - step.j0, 0);
        const auto order = static_cast<std::int32_t>(min<Index>(seen, INT32_MAX));
        tile.order[r] = reads_rows() ? order : -order;
    }
    if (backward_ != nullptr) load_row_gradients(tile);
}

// O' = dO / l, 0 where l <= 0, and delta = O'.out.
void ChunkedPass::load_row_gradients(Tile& tile) {
    const Index M = round_up<width>(p_.M), first = sequence_.first_query + tile.first;
    pack_rows(row_view(backward_->dout, p_.dtype, sequence_.batch, tile.head, first), tile.rows, p_.M, 1, nullptr,
              tile_width, tile.v);
    fill(tile.delta, tile_width, Vec{});
    if (!p_.normalize) return;
    Scratch scratch;
    float* out = scratch.allocate<float>(M * tile_width);
    pack_rows(row_view(call_.out, p_.dtype, sequence_.batch, tile.head, first), tile.rows, p_.M, 1, nullptr, tile.rows,
              out);
    const float* l = call_.l + (sequence_.batch * p_.H + tile.head) * p_.Tq + first;
    for (int r = 0; r < tile.rows; ++r) {
        const float divisor = l[r] <= 0 ? __builtin_inff() : l[r];
        Vec delta{};
        for (Index m = 0; m < M; m += width) {
            const Vec o = load(tile.v + r * M + m) / divisor;
            store(tile.v + r * M + m, o);
            delta += o * load(out + r * M + m);
        }
        tile.delta[r] = sum(delta);
    }
}

void ChunkedPass::load_keys(const ChunkSpan& step, Tile& tile) {
    const Index b = sequence_.batch, first = sequence_.first_key, D = round_up<width>(p_.D), M = round_up<width>(p_.M);
    if (visible_.contiguous()) {
        pack_rows(row_view(p_.k, p_.dtype, b, kv_head_, first + tile.first), tile.rows, p_.D, 1, nullptr, tile_width,
                  tile.x_rows);
        pack_rows(row_view(p_.v, p_.dtype, b, kv_head_, first + tile.first), tile.rows, p_.M, 1, nullptr, tile_width,
                  tile.v);
    } else {
        for (int r = 0; r < tile_width; ++r) {
            const Index row = first + (r < tile.rows ? key_row(tile, r) : 0), count = r < tile.rows;
            pack_rows(row_view(p_.k, p_.dtype, b, kv_head_, row), count, p_.D, 1, nullptr, 1, tile.x_rows + r * D);
            pack_rows(row_view(p_.v, p_.dtype, b, kv_head_, row), count, p_.M, 1, nullptr, 1, tile.v + r * M);
        }
    }
    fill(tile.delta, tile_width, Vec{});
    for (int r = 0; r < tile_width; ++r) {
        const auto order = static_cast<std::int32_t>(min<Index>(tile.first + r - step.j0, INT32_MAX - 1));
        tile.order[r] = reads_rows() ? order : -order;
    }
}

void ChunkedPass::load_writer(const ChunkSpan& step, Index index, Tile& tile) {
    load_tile(step, index, !reads_rows(), tile);
    if (reads_rows()) return;
    // What rows add to the gradients of k_sum and kk: -delta (c1 x) and -delta (c2 x x^T).
    for (Index a = 0; a <= p_.D; ++a) {
        const float weight = a == 0 ? weights_.linear : weights_.square;
        for (int c = 0; c < tile_width; c += width)
            store(tile.moment_x + a * tile_width + c, weight * load(tile.x + a * tile_width + c));
    }
    for (int r = 0; r < tile.rows; ++r)
        for (Index d = 0; d < p_.D; d += width) {
            float* x = tile.x_rows + r * round_up<width>(p_.D) + d;
            store(x, -tile.delta[r] * load(x));
        }
}

void ChunkedPass::load_reader(const ChunkSpan& step, Index index, Tile& tile) {
    load_tile(step, index, reads_rows(), tile);
    if (values_) clear(tile.acc, tile_width * round_up<width>(p_.M));
    fill(tile.l, tile_width, Vec{});
    if (gradients_) clear(tile.dx, tile_width * (p_.D + 1));
}

// ---- Scores ---------------------------------------------------------------------------------------------------------

void ChunkedPass::add_scores(Tile& reader, const Tile& writer) {
    if (reader.highest <= writer.lowest) return;
    const int D = static_cast<int>(p_.D), M = static_cast<int>(p_.M);
    const int writers = static_cast<int>(round_up<4>(writer.rows));
    const int readers = static_cast<int>(round_up<4>(reader.rows));
    fill(scores_, writers * tile_width, splat(similarity_.start));
    add_product<1, tile_width>(writer.x + tile_width, reader.x + tile_width, tile_width, D, D, writers, scores_,
                               tile_width, tile_width);
    if (gradients_) {
        for (int i = 0; i < writers; ++i)
            for (int c = 0; c < tile_width; c += width)
                store(dscores_ + i * tile_width + c, -load(reader.delta + c) - writer.delta[i]);
        add_product<1, tile_width>(writer.vt, reader.vt, tile_width, M, M, writers, dscores_, tile_width, tile_width);
    }
    reader.lowest <= writer.highest ? weigh<true>(reader, writer) : weigh<false>(reader, writer);
    if (values_)
        add_product<1, tile_width>(scores_, writer.v, round_up<width>(p_.M), writer.rows, writer.rows, readers,
                                   reader.acc, round_up<width>(p_.M), round_up<width>(p_.M));
    if (gradients_)
        add_product<tile_width, 1>(writer.x + tile_width, dscores_, tile_width, writer.rows, writer.rows,
                                   static_cast<int>(round_up<4>(D)), reader.dx + tile_width, tile_width, tile_width);
}

// From scores to similarities, and from gradients to similarities to those to scores.
template <bool masked>
void ChunkedPass::weigh(Tile& reader, const Tile& writer) {
    const ScorePolynomial f = similarity_;
    for (int i = 0; i < writer.rows; ++i) {
        for (int c = 0; c < tile_width; c += width) {
            float *at = scores_ + i * tile_width + c, *dat = dscores_ + i * tile_width + c;
            Lanes visible;
            __builtin_memcpy(&visible, reader.order + c, sizeof visible);
            visible = visible > writer.order[i];
            const auto kept = [&](Vec x) { return masked ? where(x, visible) : x; };
            const Vec t = load(at), p = kept((f.a2 * t + f.a1) * t + f.a0);
            store(at, p);
            store(reader.l + c, load(reader.l + c) + p);
            if (gradients_) store(dat, kept((2 * f.a2 * t + f.a1) * load(dat)));
        }
    }
}

// ---- Sums
// -----------------------------------------------------------------------------------------------------------

void ChunkedPass::read_sums(Index part, Tile& reader) {
    const FeatureWeights& read = reads_rows() ? weights_ : unweighted;
    if (part + 1 < sums_.parts()) {
        if (values_) sums_.read(part, reader.x, reader.rows, read, reader.acc);
        if (gradients_) sums_.add_gradient(part, reader.x, reader.vt, read, reader.dx);
    } else if (sweep_ == Sweep::forward) {
        sums_.read_moments(reader.x, read, reader.l);
    } else if (gradients_) {
        alignas(64) float factor[tile_width];
        for (int c = 0; c < tile_width; c += width)
            store(factor + c, reads_rows() ? -load(reader.delta + c) : splat(1));
        sums_.add_moment_gradient(reader.x, factor, read, reader.dx);
    }
}

void ChunkedPass::fold(Index part, Index writers) {
    const FeatureWeights& weights = reads_rows() ? unweighted : weights_;
    for (Index t = 0; t < writers; ++t) {
        const Tile& w = writers_[t];
        sums_.add(part, {w.x, w.v, w.moment_x, w.x_rows, w.rows}, weights);
    }
}

// The member's readers of a step, and, alone in its team, the fold: block by block, so that the sums are touched once.
void ChunkedPass::take(const ChunkSpan& step, Index writers, bool fold_too) {
    const bool alone = team_.size == 1;
    const Index readers = tiles(step, reads_rows());
    const Index begin = readers * team_.member / team_.size, end = readers * (team_.member + 1) / team_.size;
    const float c0 = weights_.one;
    bool folded = false;
    for (Index t = begin; t < end; t += batch_tiles) {
        const Index count = min<Index>(batch_tiles, end - t);
        folded = alone && fold_too && t + batch_tiles >= end;
        for (Index i = 0; i < count; ++i) {
            load_reader(step, t + i, readers_[i]);
            for (Index w = 0; w < writers; ++w) add_scores(readers_[i], writers_[w]);
        }
        for (Index part = 0; part < sums_.parts() && (any_ || folded); ++part) {
            for (Index i = 0; i < count && any_; ++i) read_sums(part, readers_[i]);
            if (folded) fold(part, writers);
        }
        const float keys = any_ ? static_cast<float>(past_ + step.j0) : 0;
        for (Index i = 0; i < count; ++i) {
            for (int r = 0; r < tile_width; ++r) readers_[i].l[r] += c0 * keys;
            finish(readers_[i]);
        }
    }
    team_.wait();
    if (fold_too && !folded)
        for (Index part = team_.member; part < sums_.parts(); part += team_.size) fold(part, writers);
    team_.wait();
}

void ChunkedPass::run() {
    const State* before = sweep_ == Sweep::keys ? backward_->dafter : call_.before;
    const State* after = sweep_ == Sweep::keys ? backward_->dbefore : after_;
    const Index head = index_ * p_.Hkv + kv_head_;
    any_ = before != nullptr;
    Index most_writers = 0, last_read = -1;
    for (Index s = 0; s < steps_.count(); ++s) {
        const ChunkSpan step = steps_.step(s);
        most_writers = max(most_writers, tiles(step, !reads_rows()));
        if (step.i1 > step.i0) last_read = s;
    }
    for (Tile& reader : readers_) reader = make_tile(true);
    Tile* mine = scratch_.allocate<Tile>(most_writers);
    if (team_.member == 0)
        for (Index t = 0; t < most_writers; ++t) mine[t] = make_tile(false);
    writers_ = static_cast<Tile*>(team_.broadcast(mine));
    for (Index part = team_.member; part < sums_.parts(); part += team_.size)
        before != nullptr ? sums_.load_state(part, *before, head) : sums_.reset(part);

    for (Index s = 0; s < steps_.count(); ++s) {
        const Index turn = reads_rows() ? s : steps_.count() - 1 - s;
        const ChunkSpan step = steps_.step(turn);
        const Index writers = tiles(step, !reads_rows());
        const bool fold = writers > 0 && (after != nullptr || (reads_rows() ? turn < last_read : turn > 0));
        for (Index t = team_.member; t < writers; t += team_.size) load_writer(step, t, writers_[t]);
        team_.wait();
        take(step, writers, fold);
        any_ = any_ || fold;
    }
    if (after != nullptr) {
        for (Index part = team_.member; part < sums_.parts(); part += team_.size)
            sums_.store_state(part, *after, head, before);
        if (reads_rows() && kv_head_ == 0 && team_.member == 0) after->n[index_] = past_ + visible_.keys();
    }
    if (sweep_ == Sweep::keys && team_.member == 0) finish_masked_keys();
    team_.wait();
}

// ---- Storing --------------------------------------------------------------------------------------------------------

void ChunkedPass::finish(const Tile& tile) {
    const Index b = sequence_.batch, M = round_up<width>(p_.M);
    if (sweep_ == Sweep::forward) {
        const Index first = sequence_.first_query + tile.first;
        const RowView out = row_view(call_.out, p_.dtype, b, tile.head, first);
        for (int r = 0; r < tile.rows; ++r) {
            call_.l[(b * p_.H + tile.head) * p_.Tq + first + r] = tile.l[r];
            if (p_.normalize)
                store_quotient(tile.acc + r * M, p_.M, tile.l[r], out, r);
            else
                store_row(tile.acc + r * M, p_.M, 1, out, r);
        }
    } else if (sweep_ == Sweep::queries) {
        store_lanes(tile, backward_->dq, tile.head, sequence_.first_query, p_.scale);
    } else {
        if (gradients_) store_lanes(tile, backward_->dk, kv_head_, sequence_.first_key, 1);
        if (!values_) return;
        const RowView dv = row_view(backward_->dv, p_.dtype, b, kv_head_, sequence_.first_key);
        for (int r = 0; r < tile.rows; ++r) store_row(tile.acc + r * M, p_.M, 1, dv, key_row(tile, r));
    }
}

// to's rows = factor * the lanes of dx.
void ChunkedPass::store_lanes(const Tile& tile, const TensorView& to, Index head, Index first, float factor) {
    Scratch scratch;
    float* rows = scratch.allocate<float>(tile_width * tile_width);
    for (Index d = 0; d < p_.D; d += tile_width) {
        const Index count = min<Index>(tile_width, p_.D - d);
        const float* lanes = tile.dx + (d + 1) * tile_width;
        pack_transposed({const_cast<float*>(lanes), tile_width, Dtype::fp32}, count, tile_width, 1, nullptr, rows);
        TensorView columns = to;
        columns.data = static_cast<char*>(to.data) + d * (p_.dtype == Dtype::fp32 ? 4 : 2);
        const RowView target = row_view(columns, p_.dtype, sequence_.batch, head, first);
        for (int r = 0; r < tile.rows; ++r) {
            const Index row = reads_rows() ? tile.first + r : key_row(tile, r);
            store_row(rows + r * tile_width, count, factor, target, row);
        }
    }
}

// Keys that do not count have no gradient.
void ChunkedPass::finish_masked_keys() {
    if (visible_.contiguous()) return;
    Scratch scratch;
    float* zeros = scratch.allocate<float>(round_up<width>(max(p_.D, p_.M)));
    clear(zeros, round_up<width>(max(p_.D, p_.M)));
    const Index b = sequence_.batch, first = sequence_.first_key;
    for (Index j = 0, counted = 0; j < sequence_.keys; ++j) {
        if (counted < visible_.keys() && visible_.position(counted) == j) {
            ++counted;
            continue;
        }
        if (gradients_) store_row(zeros, p_.D, 1, row_view(backward_->dk, p_.dtype, b, kv_head_, first), j);
        if (values_) store_row(zeros, p_.M, 1, row_view(backward_->dv, p_.dtype, b, kv_head_, first), j);
    }
}

}  // namespace linattn::LINATTN_ISA::quadratic

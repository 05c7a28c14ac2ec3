#include "quadratic/native/scan.hpp"

#include <cstdint>

#include "common/native/matmul.hpp"

namespace linattn::LINATTN_ISA {

using namespace quadratic;

namespace {

Index whole_fours(Index n) { return blocks(n, 4) * 4; }

float* shared_memory(Team& team, Scratch& scratch, Index size) {
    return static_cast<float*>(team.shared(team.member == 0 ? scratch.take<float>(size) : nullptr));
}

void fill(float* to, Index n, Vec x) {
    for (Index i = 0; i < n; i += width) store(to + i, x);
}

LINATTN_INLINE Vec where(Vec x, Lanes visible) { return reinterpret_cast<Vec>(reinterpret_cast<Lanes>(x) & visible); }

// A state needs no rows.
Sequence sequence_for(Sweep sweep, const Problem& p, Index index) {
    Sequence s = sequence(p, index);
    if (sweep == Sweep::state) s.queries = 0;
    return s;
}

Weights weights(const Call& call) {
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
    const Problem& p = call.problem;
    const Index longest = p.D <= 16 ? 64 : p.D <= 32 ? 128 : 256;
    return most<Index>(tile_rows, longest / (p.H / p.Hkv) / tile_rows * tile_rows);
}

Scan::Scan(Sweep sweep, const Call& call, const State* after, const BackwardCall* backward, Index sequence_index,
           Index kv_head, Team& team)
    : sweep_(sweep), call_(call), after_(after), backward_(backward), p_(call.problem), index_(sequence_index),
      kv_head_(kv_head), group_(p_.H / p_.Hkv), sequence_(sequence_for(sweep, p_, sequence_index)), team_(team),
      visible_(p_, sequence_, scratch_), past_(call.before == nullptr ? 0 : call.before->n[index_]),
      steps_(visible_, sequence_.queries, p_.is_causal, chunk(call, sweep), past_ > 0),
      similarity_(similarity(call)), weights_(weights(call)),
      values_(sweep == Sweep::forward || (sweep == Sweep::keys && backward->dv.data != nullptr)),
      gradients_(sweep == Sweep::queries || (sweep == Sweep::keys && backward->dk.data != nullptr)),
      sums_(p_.D, p_.M, shared_memory(team, scratch_, Sums::size(p_.D, p_.M))) {
    scores_ = scratch_.take<float>(tile_rows * tile_rows);
    dscores_ = scratch_.take<float>(tile_rows * tile_rows);
}

// How many tiles of rows or keys a step has; rows that share the key head come one head after the other.
Index Scan::tiles(const Step& step, bool of_rows) const {
    return of_rows ? group_ * blocks(step.i1 - step.i0, tile_rows) : blocks(step.j1 - step.j0, tile_rows);
}

Tile Scan::make_tile(bool reader) {
    const Index D = whole_fours(p_.D) + 4, M = padded(p_.M);
    Tile tile{};
    tile.order = scratch_.take<std::int32_t>(tile_rows);
    tile.x = scratch_.take<float>(D * tile_rows);
    tile.x_rows = scratch_.take<float>(padded(p_.D) * tile_rows);
    tile.v = scratch_.take<float>(M * tile_rows);
    tile.vt = scratch_.take<float>(whole_fours(p_.M) * tile_rows);
    tile.delta = scratch_.take<float>(tile_rows);
    tile.moment_x = reader || reads_rows() ? tile.x : scratch_.take<float>(D * tile_rows);
    if (reader) {
        tile.acc = scratch_.take<float>(M * tile_rows);
        tile.l = scratch_.take<float>(tile_rows);
        tile.dx = scratch_.take<float>(D * tile_rows);
    }
    return tile;
}

// ---- Packing --------------------------------------------------------------------------------------------------------

// Everything is counted from the step's first key, so that it fits 32 bits. Backwards, keys read what later rows wrote.
void Scan::load_tile(const Step& step, Index index, bool as_row, Tile& tile) {
    const Index start = as_row ? step.i0 : step.j0, length = (as_row ? step.i1 : step.j1) - start;
    const Index each = blocks(length, tile_rows), first = index % each * tile_rows;
    tile.head = kv_head_ * group_ + index / each;
    tile.first = start + first;
    tile.rows = static_cast<int>(least<Index>(tile_rows, length - first));
    as_row ? load_rows(step, tile) : load_keys(step, tile);

    const HeadRows packed{tile.x_rows, padded(p_.D), Dtype::fp32};
    pack_transposed(packed, tile.rows, p_.D, 1, nullptr, tile.x + tile_rows);
    for (int r = 0; r < tile_rows; ++r) tile.x[r] = r < tile.rows;
    if (backward_ != nullptr)
        pack_transposed({tile.v, padded(p_.M), Dtype::fp32}, tile.rows, p_.M, 1, nullptr, tile.vt);
    tile.lowest = tile.highest = tile.order[0];
    for (int r = 1; r < tile.rows; ++r) {
        tile.lowest = least(tile.lowest, tile.order[r]);
        tile.highest = most(tile.highest, tile.order[r]);
    }
}

void Scan::load_rows(const Step& step, Tile& tile) {
    const auto [b, first_query, first_key, queries, keys] = sequence_;
    pack_rows(head_rows(p_.q, p_.dtype, b, tile.head, first_query + tile.first), tile.rows, p_.D, p_.scale, nullptr,
              tile_rows, tile.x_rows);
    for (int r = 0; r < tile_rows; ++r) {
        const Index seen = most<Index>(visible_.seen(least(tile.first + r, queries - 1)) - step.j0, 0);
        const auto order = static_cast<std::int32_t>(least<Index>(seen, INT32_MAX));
        tile.order[r] = reads_rows() ? order : -order;
    }
    if (backward_ != nullptr) load_row_gradients(tile);
}

// O' = dO / l, 0 where l <= 0, and delta = O'.out.
void Scan::load_row_gradients(Tile& tile) {
    const Index M = padded(p_.M), first = sequence_.first_query + tile.first;
    pack_rows(head_rows(backward_->dout, p_.dtype, sequence_.batch, tile.head, first), tile.rows, p_.M, 1, nullptr,
              tile_rows, tile.v);
    fill(tile.delta, tile_rows, Vec{});
    if (!p_.normalize) return;
    Scratch scratch;
    float* out = scratch.take<float>(M * tile_rows);
    pack_rows(head_rows(call_.out, p_.dtype, sequence_.batch, tile.head, first), tile.rows, p_.M, 1, nullptr, tile.rows,
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

void Scan::load_keys(const Step& step, Tile& tile) {
    const Index b = sequence_.batch, first = sequence_.first_key, D = padded(p_.D), M = padded(p_.M);
    if (visible_.contiguous()) {
        pack_rows(head_rows(p_.k, p_.dtype, b, kv_head_, first + tile.first), tile.rows, p_.D, 1, nullptr, tile_rows,
                  tile.x_rows);
        pack_rows(head_rows(p_.v, p_.dtype, b, kv_head_, first + tile.first), tile.rows, p_.M, 1, nullptr, tile_rows,
                  tile.v);
    } else {
        for (int r = 0; r < tile_rows; ++r) {
            const Index row = first + (r < tile.rows ? key_row(tile, r) : 0), count = r < tile.rows;
            pack_rows(head_rows(p_.k, p_.dtype, b, kv_head_, row), count, p_.D, 1, nullptr, 1, tile.x_rows + r * D);
            pack_rows(head_rows(p_.v, p_.dtype, b, kv_head_, row), count, p_.M, 1, nullptr, 1, tile.v + r * M);
        }
    }
    fill(tile.delta, tile_rows, Vec{});
    for (int r = 0; r < tile_rows; ++r) {
        const auto order = static_cast<std::int32_t>(least<Index>(tile.first + r - step.j0, INT32_MAX - 1));
        tile.order[r] = reads_rows() ? order : -order;
    }
}

void Scan::load_writer(const Step& step, Index index, Tile& tile) {
    load_tile(step, index, !reads_rows(), tile);
    if (reads_rows()) return;
    // What rows add to the gradients of k_sum and kk: -delta (c1 x) and -delta (c2 x x^T).
    for (Index a = 0; a <= p_.D; ++a) {
        const float weight = a == 0 ? weights_.linear : weights_.square;
        for (int c = 0; c < tile_rows; c += width)
            store(tile.moment_x + a * tile_rows + c, weight * load(tile.x + a * tile_rows + c));
    }
    for (int r = 0; r < tile.rows; ++r)
        for (Index d = 0; d < p_.D; d += width) {
            float* x = tile.x_rows + r * padded(p_.D) + d;
            store(x, -tile.delta[r] * load(x));
        }
}

void Scan::load_reader(const Step& step, Index index, Tile& tile) {
    load_tile(step, index, reads_rows(), tile);
    if (values_) clear(tile.acc, tile_rows * padded(p_.M));
    fill(tile.l, tile_rows, Vec{});
    if (gradients_) clear(tile.dx, tile_rows * (p_.D + 1));
}

// ---- Scores ---------------------------------------------------------------------------------------------------------

void Scan::add_scores(Tile& reader, const Tile& writer) {
    if (reader.highest <= writer.lowest) return;
    const int D = static_cast<int>(p_.D), M = static_cast<int>(p_.M);
    const int writers = static_cast<int>(whole_fours(writer.rows));
    const int readers = static_cast<int>(whole_fours(reader.rows));
    fill(scores_, writers * tile_rows, splat(similarity_.start));
    add_product<1, tile_rows>(writer.x + tile_rows, reader.x + tile_rows, tile_rows, D, D, writers, scores_, tile_rows,
                              tile_rows);
    if (gradients_) {
        for (int i = 0; i < writers; ++i)
            for (int c = 0; c < tile_rows; c += width)
                store(dscores_ + i * tile_rows + c, -load(reader.delta + c) - writer.delta[i]);
        add_product<1, tile_rows>(writer.vt, reader.vt, tile_rows, M, M, writers, dscores_, tile_rows, tile_rows);
    }
    reader.lowest <= writer.highest ? weigh<true>(reader, writer) : weigh<false>(reader, writer);
    if (values_)
        add_product<1, tile_rows>(scores_, writer.v, padded(p_.M), writer.rows, writer.rows, readers, reader.acc,
                                  padded(p_.M), padded(p_.M));
    if (gradients_)
        add_product<tile_rows, 1>(writer.x + tile_rows, dscores_, tile_rows, writer.rows, writer.rows,
                                  static_cast<int>(whole_fours(D)), reader.dx + tile_rows, tile_rows, tile_rows);
}

// From scores to similarities, and from gradients to similarities to those to scores.
template <bool masked>
void Scan::weigh(Tile& reader, const Tile& writer) {
    const Similarity f = similarity_;
    for (int i = 0; i < writer.rows; ++i) {
        for (int c = 0; c < tile_rows; c += width) {
            float *at = scores_ + i * tile_rows + c, *dat = dscores_ + i * tile_rows + c;
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

// ---- Sums -----------------------------------------------------------------------------------------------------------

void Scan::read_sums(Index part, Tile& reader) {
    const Weights& read = reads_rows() ? weights_ : unweighted;
    if (part + 1 < sums_.parts()) {
        if (values_) sums_.read(part, reader.x, reader.rows, read, reader.acc);
        if (gradients_) sums_.add_gradient(part, reader.x, reader.vt, read, reader.dx);
    } else if (sweep_ == Sweep::forward) {
        sums_.read_moments(reader.x, read, reader.l);
    } else if (gradients_) {
        alignas(64) float factor[tile_rows];
        for (int c = 0; c < tile_rows; c += width) store(factor + c, reads_rows() ? -load(reader.delta + c) : splat(1));
        sums_.add_moment_gradient(reader.x, factor, read, reader.dx);
    }
}

void Scan::fold(Index part, Index writers) {
    const Weights& weights = reads_rows() ? unweighted : weights_;
    for (Index t = 0; t < writers; ++t) {
        const Tile& w = writers_[t];
        sums_.add(part, {w.x, w.v, w.moment_x, w.x_rows, w.rows}, weights);
    }
}

// The member's readers of a step, and, alone in its team, the fold: block by block, so that the sums are touched once.
void Scan::take(const Step& step, Index writers, bool fold_too) {
    const bool alone = team_.size == 1;
    const Index readers = tiles(step, reads_rows());
    const Index begin = readers * team_.member / team_.size, end = readers * (team_.member + 1) / team_.size;
    const float c0 = weights_.one;
    bool folded = false;
    for (Index t = begin; t < end; t += batch_tiles) {
        const Index count = least<Index>(batch_tiles, end - t);
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
            for (int r = 0; r < tile_rows; ++r) readers_[i].l[r] += c0 * keys;
            finish(readers_[i]);
        }
    }
    team_.wait();
    if (fold_too && !folded)
        for (Index part = team_.member; part < sums_.parts(); part += team_.size) fold(part, writers);
    team_.wait();
}

void Scan::run() {
    const State* before = sweep_ == Sweep::keys ? backward_->dafter : call_.before;
    const State* after = sweep_ == Sweep::keys ? backward_->dbefore : after_;
    const Index head = index_ * p_.Hkv + kv_head_;
    any_ = before != nullptr;
    Index most_writers = 0, last_read = -1;
    for (Index s = 0; s < steps_.count(); ++s) {
        const Step step = steps_.step(s);
        most_writers = most(most_writers, tiles(step, !reads_rows()));
        if (step.i1 > step.i0) last_read = s;
    }
    for (Tile& reader : readers_) reader = make_tile(true);
    Tile* mine = scratch_.take<Tile>(most_writers);
    if (team_.member == 0)
        for (Index t = 0; t < most_writers; ++t) mine[t] = make_tile(false);
    writers_ = static_cast<Tile*>(team_.shared(mine));
    for (Index part = team_.member; part < sums_.parts(); part += team_.size)
        before != nullptr ? sums_.load_state(part, *before, head) : sums_.reset(part);

    for (Index s = 0; s < steps_.count(); ++s) {
        const Index turn = reads_rows() ? s : steps_.count() - 1 - s;
        const Step step = steps_.step(turn);
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
        if (reads_rows() && kv_head_ == 0 && team_.member == 0)
            after->n[index_] = past_ + visible_.keys();
    }
    if (sweep_ == Sweep::keys && team_.member == 0) finish_masked_keys();
    team_.wait();
}

// ---- Storing --------------------------------------------------------------------------------------------------------

void Scan::finish(const Tile& tile) {
    const Index b = sequence_.batch, M = padded(p_.M);
    if (sweep_ == Sweep::forward) {
        const Index first = sequence_.first_query + tile.first;
        const HeadRows out = head_rows(call_.out, p_.dtype, b, tile.head, first);
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
        const HeadRows dv = head_rows(backward_->dv, p_.dtype, b, kv_head_, sequence_.first_key);
        for (int r = 0; r < tile.rows; ++r) store_row(tile.acc + r * M, p_.M, 1, dv, key_row(tile, r));
    }
}

// to's rows = factor * the lanes of dx.
void Scan::store_lanes(const Tile& tile, const Rows& to, Index head, Index first, float factor) {
    Scratch scratch;
    float* rows = scratch.take<float>(tile_rows * tile_rows);
    for (Index d = 0; d < p_.D; d += tile_rows) {
        const Index count = least<Index>(tile_rows, p_.D - d);
        const float* lanes = tile.dx + (d + 1) * tile_rows;
        pack_transposed({const_cast<float*>(lanes), tile_rows, Dtype::fp32}, count, tile_rows, 1, nullptr, rows);
        Rows columns = to;
        columns.data = static_cast<char*>(to.data) + d * (p_.dtype == Dtype::fp32 ? 4 : 2);
        const HeadRows target = head_rows(columns, p_.dtype, sequence_.batch, head, first);
        for (int r = 0; r < tile.rows; ++r) {
            const Index row = reads_rows() ? tile.first + r : key_row(tile, r);
            store_row(rows + r * tile_rows, count, factor, target, row);
        }
    }
}

// Keys that do not count have no gradient.
void Scan::finish_masked_keys() {
    if (visible_.contiguous()) return;
    Scratch scratch;
    float* zeros = scratch.take<float>(padded(most(p_.D, p_.M)));
    clear(zeros, padded(most(p_.D, p_.M)));
    const Index b = sequence_.batch, first = sequence_.first_key;
    for (Index j = 0, counted = 0; j < sequence_.keys; ++j) {
        if (counted < visible_.keys() && visible_.position(counted) == j) {
            ++counted;
            continue;
        }
        if (gradients_) store_row(zeros, p_.D, 1, head_rows(backward_->dk, p_.dtype, b, kv_head_, first), j);
        if (values_) store_row(zeros, p_.M, 1, head_rows(backward_->dv, p_.dtype, b, kv_head_, first), j);
    }
}

}  // namespace linattn::LINATTN_ISA

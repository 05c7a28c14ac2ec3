#include "quadratic/native/chunked/chunked_pass.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::Form;

KeyPass::KeyPass(const BackwardCall& call, Index sequence_index, Index kv_head, Team& team)
    : ChunkedPass(Direction::backwards, call, &call, sequence_index, sequence(call.problem, sequence_index), kv_head,
                  call.form == Form::direct ? whole_sequence : chunk_length(call),
                  {call.dv.data != nullptr, call.dk.data != nullptr}, team) {}

// Beside the products with dO', queries add to the gradients of k_sum and kk: -delta (c1 x) and -delta (c2 x x^T).
void KeyPass::load_source(const ChunkSpan& span, Index index, Tile& tile) {
    load_query_tile(span, index, tile);
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

void KeyPass::read_state(Index part, Tile& target) const {
    if (part + 1 < state_.parts()) {
        if (collects_.values) state_.accumulate_out(part, target.x, target.rows, unweighted, target.acc);
        if (collects_.gradients) state_.accumulate_dx(part, target.x, target.vt, unweighted, target.dx);
    } else if (collects_.gradients) {
        alignas(64) float one[tile_width];
        for (int c = 0; c < tile_width; c += width) store(one + c, splat(1));
        state_.accumulate_moments_dx(target.x, one, unweighted, target.dx);
    }
}

void KeyPass::store_target(const Tile& target) {
    const Index b = sequence_.batch, first = sequence_.first_key, M = round_up<width>(p_.M);
    if (collects_.gradients)
        store_lanes(target, backward_->dk, kv_head_, first, 1, [&](int r) { return key_position(target, r); });
    if (!collects_.values) return;
    const RowView dv = row_view(backward_->dv, p_.dtype, b, kv_head_, first);
    for (int r = 0; r < target.rows; ++r) store_row(target.acc + r * M, p_.M, 1, dv, key_position(target, r));
}

// Masked keys have no gradient.
void KeyPass::finish() {
    if (visible_.contiguous()) return;
    Scratch scratch;
    const Index widest_row = round_up<width>(max(p_.D, p_.M));
    float* zeros = scratch.allocate<float>(widest_row);
    clear(zeros, widest_row);
    const Index b = sequence_.batch, first = sequence_.first_key;
    for (Index j = 0, counted = 0; j < sequence_.keys; ++j) {
        if (counted < visible_.keys() && visible_.position(counted) == j) {
            ++counted;
            continue;
        }
        if (collects_.gradients) store_row(zeros, p_.D, 1, row_view(backward_->dk, p_.dtype, b, kv_head_, first), j);
        if (collects_.values) store_row(zeros, p_.M, 1, row_view(backward_->dv, p_.dtype, b, kv_head_, first), j);
    }
}

}  // namespace linattn::LINATTN_ISA::quadratic

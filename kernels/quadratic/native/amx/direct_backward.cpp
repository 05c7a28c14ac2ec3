#include "quadratic/native/amx/direct.hpp"
#include "quadratic/native/amx/score_gradients.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::BackwardCall;

namespace {

// One key head of one sequence, or every `segments`-th block of its keys.
template <bool Completed>
void backward_head(const PackedQueries& queries, const ScorePolynomial& w, float* dq, Index s, Index kv_head,
                   Index segment, Index segments) {
    Scratch scratch;
    BlockGradients<Completed> blocks(queries, w, dq, scratch);
    const AttentionProblem& p = queries.call.problem;
    const Sequence one = sequence(p, s);
    const Index group = p.H / p.Hkv, strips = (one.queries + 31) / 32, D = queries.size.D;
    for (Index h = kv_head * group; dq != nullptr && h < (kv_head + 1) * group; ++h)
        std::memset(dq + queries.first(s, h) * 32 * D, 0, strips * 32 * D * sizeof(float));
    constexpr Index keys_of_block = 32 * block_strips;
    for (Index j = segment * keys_of_block; j < one.keys; j += segments * keys_of_block) {
        blocks.load_keys(one, kv_head, j);
        for (Index h = kv_head * group; h < (kv_head + 1) * group; ++h)
            for (Index i = 0; i < strips; i += block_strips)
                blocks.process_block(queries.first(s, h), i, min<Index>(block_strips, strips - i));
        blocks.store_keys(one, kv_head);
    }
}

// How many tasks share a head's keys, each with sums of its own for dQ: enough for threads to have equal work.
Index count_segments(Index heads, int threads) {
    const Index least_needed = (threads + heads - 1) / heads;
    if (heads % threads == 0 || heads >= 4 * threads) return 1;
    return threads % heads == 0 ? least_needed : max<Index>(least_needed, 4);
}

}  // namespace

void direct_backward(const BackwardCall& call) {
    const AttentionProblem& p = call.problem;
    Scratch scratch;
    const PackedQueries queries(call, scratch);
    const ScorePolynomial w(call);
    const int D = queries.size.D;
    const bool want_dq = call.dq.data != nullptr;
    const Index heads = p.sequences * p.Hkv, segments = count_segments(heads, usable_threads(p.threads));
    const Index dq_stride = queries.count() * 32 * D;
    float* dq = want_dq ? scratch.allocate<float>(segments * dq_stride) : nullptr;
    const auto work = w.completed ? backward_head<true> : backward_head<false>;
    compute_score_gradients(queries, w, dq, segments, dq_stride, heads * segments, [&](Index task) {
        const Index head = task / segments, segment = task % segments;
        work(queries, w, want_dq ? dq + segment * dq_stride : nullptr, head / p.Hkv, head % p.Hkv, segment, segments);
    });
}

}  // namespace linattn::LINATTN_ISA::quadratic

#include "common/native/threads.hpp"
#include "quadratic/native/amx/direct.hpp"
#include "quadratic/native/amx/score_tile.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::ForwardCall;

namespace {

constexpr Index queries_at_once = 512;  // share a stretch of keys while that lies in the nearer caches

// Keys and values of a whole call, each sequence in strips of its own.
struct PackedCall {
    const ForwardCall& call;
    TileSizes size;
    Index* first_strip;  // [sequences + 1]
    PackedKeys all;      // head-major: [Hkv][strips]

    PackedCall(const ForwardCall& call_, Scratch& scratch)
        : call(call_), size{pad_to_tile(call_.problem.D), pad_to_tile(call_.problem.M)} {
        const AttentionProblem& p = call.problem;
        first_strip = scratch.allocate<Index>(p.sequences + 1);
        first_strip[0] = 0;
        for (Index s = 0; s < p.sequences; ++s)
            first_strip[s + 1] = first_strip[s] + (sequence(p, s).keys + 63) / 64 * 2;
        const Index strips = p.Hkv * first_strip[p.sequences];
        all = {scratch.allocate<Bf16>(strips * 32 * size.D), scratch.allocate<Bf16>(strips * 32 * size.M),
               scratch.allocate<std::uint32_t>(strips)};
    }

    // The strips of one head are one after another.
    Index first(Index s, Index kv_head) const { return kv_head * first_strip[call.problem.sequences] + first_strip[s]; }

    PackedKeys head(Index s, Index kv_head) const { return from(first(s, kv_head)); }

    PackedKeys from(Index strip) const {
        return {all.k + strip * 32 * size.D, all.v + strip * 32 * size.M, all.alive + strip};
    }

    // Packs every strip whose number is `thread` modulo `threads`.
    void pack(int thread, int threads) const {
        const AttentionProblem& p = call.problem;
        for (Index h = 0; h < p.Hkv; ++h)
            for (Index s = 0; s < p.sequences; ++s) {
                const Sequence one = sequence(p, s);
                const Index base = first(s, h), strips = first_strip[s + 1] - first_strip[s];
                const bool* mask = p.key_mask == nullptr ? nullptr : p.key_mask + one.batch * p.Tk + one.first_key;
                for (Index i = (thread + threads - base % threads) % threads; i < strips; i += threads) {
                    const PackedKeys to = from(base + i);
                    const StripView k = strip_view(p.k, one.batch, h, one.first_key, 32 * i, one.keys, p.D, mask);
                    const StripView v = strip_view(p.v, one.batch, h, one.first_key, 32 * i, one.keys, p.M, mask);
                    pack_transposed(k, size.D, to.k);
                    pack_pairs(v, size.M, to.v);
                    *to.alive = k.alive;
                }
            }
    }
};

struct DirectTask {
    Index sequence, head, first_query;
};

// Tasks of about the same length come together, the longest first.
Index list_tasks(const AttentionProblem& p, DirectTask* tasks) {
    Index count = 0;
    for (Index s = 0; s < p.sequences; ++s)
        for (Index block = (sequence(p, s).queries + queries_at_once - 1) / queries_at_once; block-- > 0;)
            for (Index h = 0; h < p.H; ++h) tasks[count++] = {s, h, block * queries_at_once};
    return count;
}

template <bool Completed>
void run_task(const PackedCall& packed, const ScorePolynomial& w, const DirectTask& task) {
    const ForwardCall& call = packed.call;
    const AttentionProblem& p = call.problem;
    const TileSizes& size = packed.size;
    const Sequence one = sequence(p, task.sequence);
    const PackedKeys keys = packed.head(task.sequence, task.head / (p.H / p.Hkv));
    const Index strips = (min(queries_at_once, one.queries - task.first_query) + 31) / 32;

    Scratch scratch;
    Bf16* q = scratch.allocate<Bf16>(strips * 32 * size.D);
    float* acc = scratch.allocate<float>(strips * 32 * size.M);
    float* sums = scratch.allocate<float>(strips * 32 * 16);
    std::memset(acc, 0, strips * 32 * size.M * sizeof(float));
    std::memset(sums, 0, strips * 32 * 16 * sizeof(float));
    for (Index i = 0; i < strips; ++i)
        pack_rows(strip_view(p.q, one.batch, task.head, one.first_query, task.first_query + 32 * i, one.queries, p.D),
                  size.D, q + i * 32 * size.D);

    for (Index j = 0; j < one.keys; j += keys_at_once) {
        const PackedKeys some = {keys.k + j * size.D, keys.v + j * size.M, keys.alive + j / 32};
        for (Index i = 0; i < strips; ++i) {
            const Index seen = p.is_causal ? task.first_query + 32 * i + p.q_offset + 1 - j : everything;
            attend<Completed>(w, size, q + i * 32 * size.D, some, min<Index>(keys_at_once, one.keys - j), seen,
                              acc + i * 32 * size.M, sums + i * 32 * 16);
        }
    }
    for (Index i = 0; i < strips; ++i) {
        const Index row = task.first_query + 32 * i;
        finish(w, p.normalize, size.M, acc + i * 32 * size.M, sums + i * 32 * 16,
               strip_target(call.out, one.batch, task.head, one.first_query, row, one.queries, p.M),
               call.l + (one.batch * p.H + task.head) * p.Tq + one.first_query + row);
    }
}

}  // namespace

void direct_forward(const ForwardCall& call) {
    const AttentionProblem& p = call.problem;
    Scratch scratch;
    const PackedCall packed(call, scratch);
    DirectTask* tasks = scratch.allocate<DirectTask>((p.Tq / queries_at_once + 1) * p.H * p.sequences);
    const Index count = list_tasks(p, tasks);
    const ScorePolynomial w(call);
    Queue queue;
    run_parallel(p.threads, [&](int thread, int threads) {
        const TileConfiguration tiles;
        packed.pack(thread, threads);
        if (threads > 1) barrier();
        for (Index i = queue.pop(); i < count; i = queue.pop())
            w.completed ? run_task<true>(packed, w, tasks[i]) : run_task<false>(packed, w, tasks[i]);
    });
}

}  // namespace linattn::LINATTN_ISA::quadratic

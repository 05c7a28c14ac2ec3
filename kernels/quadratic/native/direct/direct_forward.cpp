#include "quadratic/native/direct/direct.hpp"

#include "common/native/packing.hpp"
#include "common/native/threads.hpp"
#include "quadratic/native/score_tile.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using namespace linattn::quadratic;

namespace {

// Keys packed for one parallel region; heads beyond that wait for the next one.
constexpr Index max_region_bytes = Index{32} << 20;

// How many leading keys of a sequence the queries before `end` see at most.
LINATTN_INLINE Index visible_keys(const AttentionProblem& p, const Sequence& s, Index end) {
    return p.is_causal ? min(max<Index>(end + p.q_offset, 0), s.keys) : s.keys;
}

LINATTN_INLINE Index key_blocks(const AttentionProblem& p, const Sequence& s, Index end) {
    return ceil_div(visible_keys(p, s, end), key_block);
}

// A block of packed keys: K^T [D][key_block], which keys count [key_block], V [key_block][round_up<width>(M)].
LINATTN_INLINE Index packed_size(const AttentionProblem& p) { return (p.D + 1 + round_up<width>(p.M)) * key_block; }

void pack_keys(const AttentionProblem& p, const Sequence& s, Index head, Index block, float* to) {
    const Index first = s.first_key + block * key_block, count = min<Index>(key_block, s.keys - block * key_block);
    const bool* keep = p.key_mask == nullptr ? nullptr : p.key_mask + s.batch * p.Tk + first;
    pack_transposed(row_view(p.k, p.dtype, s.batch, head, first), count, p.D, 1, keep, to);
    load_key_mask(keep, count, reinterpret_cast<std::int32_t*>(to + p.D * key_block));
    pack_rows(row_view(p.v, p.dtype, s.batch, head, first), count, p.M, 1, keep, count, to + (p.D + 1) * key_block);
}

KeyBlock key_block_at(const AttentionProblem& p, const Sequence& s, Index block, const float* at) {
    return {at, reinterpret_cast<const std::int32_t*>(at + p.D * key_block), at + (p.D + 1) * key_block,
            round_up<width>(p.M), static_cast<int>(min<Index>(key_block, s.keys - block * key_block))};
}

// Queries `first` to `end` of one head, the work of one thread. `keys`: null: the task packs its own.
struct DirectTask {
    Sequence s;
    Index head, first, end;
    const float* keys;
};

// As many as keep queries and accumulators in the second-level cache, and fewer if that would leave threads idle.
Index queries_per_task(const AttentionProblem& p) {
    Index rows = 192;
    const Index all = p.cu_seqlens == nullptr ? p.B * p.Tq : p.Tq;
    while (rows / 2 % strip_rows == 0 && p.H * all < 4 * p.threads * rows) rows /= 2;
    return rows;
}

// A thread's queries x, sums of p v followed by those of p, and totals of these.
struct RowAccumulator {
    float *x, *acc, *totals;
};

// Sums over more keys than this are put together from sums over as many: a float that grows by one key at a
// time loses digits.
constexpr Index blocks_of_partial_sum = 64;

void run_task(const ForwardCall& call, const ScorePolynomial& f, const DirectTask& task, const RowAccumulator& sums,
              float* own_keys) {
    const AttentionProblem& p = call.problem;
    const Index M = round_up<width>(p.M), count = task.end - task.first, row = task.s.first_query + task.first;
    const Index rows = round_up<strip_rows>(count);
    pack_rows(row_view(p.q, p.dtype, task.s.batch, task.head, row), count, p.D, p.scale, nullptr, rows, sums.x);
    const Index size = rows * (M + width), visible = key_blocks(p, task.s, task.end);
    const bool two_levels = visible > blocks_of_partial_sum;
    clear(sums.acc, size);
    if (two_levels) clear(sums.totals, size);
    float* const l_lanes = sums.acc + rows * M;
    for (Index block = 0; block < visible; ++block) {
        const float* keys = task.keys == nullptr ? own_keys : task.keys + block * packed_size(p);
        if (task.keys == nullptr) pack_keys(p, task.s, task.head / (p.H / p.Hkv), block, own_keys);
        const Index last = p.is_causal ? task.first + p.q_offset - block * key_block : key_block;
        accumulate_out(f, sums.x, p.D, p.M, key_block_at(p, task.s, block, keys), last, static_cast<int>(rows),
                       sums.acc, l_lanes);
        if (two_levels && ((block + 1) % blocks_of_partial_sum == 0 || block + 1 == visible)) {
            for (Index i = 0; i < size; i += width) store(sums.totals + i, load(sums.totals + i) + load(sums.acc + i));
            clear(sums.acc, size);
        }
    }
    const float *const acc = two_levels ? sums.totals : sums.acc, *const lanes = acc + rows * M;
    const RowView out = row_view(call.out, p.dtype, task.s.batch, task.head, row);
    float* const l = call.l + (task.s.batch * p.H + task.head) * p.Tq + row;
    for (Index r = 0; r < count; ++r) {
        l[r] = sum(load(lanes + r * width));
        if (p.normalize)
            store_quotient(acc + r * M, p.M, l[r], out, r);
        else
            store_row(acc + r * M, p.M, 1, out, r);
    }
}

}  // namespace

// Heads by heads, as many as fit `max_region_bytes`: all threads pack keys, then pop blocks of queries from a queue.
void direct_forward(const ForwardCall& call) {
    const AttentionProblem& p = call.problem;
    const ScorePolynomial f = score_polynomial(call);
    const Index units = p.sequences * p.Hkv, group = p.H / p.Hkv, rows = queries_per_task(p);
    const Index own_size = rows * (round_up<width>(p.D) + 2 * (round_up<width>(p.M) + width)) + packed_size(p);
    const auto row_blocks = [&](Index unit) { return group * ceil_div(sequence(p, unit / p.Hkv).queries, rows); };
    // What a unit's keys take when they are packed for all its tasks; a single task packs its own.
    const auto packed_blocks = [&](Index unit) -> Index {
        const Sequence s = sequence(p, unit / p.Hkv);
        return row_blocks(unit) > 1 ? key_blocks(p, s, s.queries) : 0;
    };
    for (Index first = 0, last = 0; first < units; first = last) {
        Index packed = 0, count = 0;
        while (last < units &&
               (last == first || (packed + packed_blocks(last)) * packed_size(p) * 4 <= max_region_bytes)) {
            packed += packed_blocks(last);
            count += row_blocks(last++);
        }
        Scratch scratch;
        float* const keys = scratch.allocate<float>(packed * packed_size(p));
        float* const own = scratch.allocate<float>(p.threads * own_size);
        DirectTask* const tasks = scratch.allocate<DirectTask>(count);
        DirectTask* next = tasks;
        const float* of_unit = keys;
        for (Index unit = first; unit < last; ++unit) {
            const Sequence s = sequence(p, unit / p.Hkv);
            for (Index g = 0; g < group; ++g)
                for (Index block = ceil_div(s.queries, rows) - 1; block >= 0;
                     --block)  // those with the most keys first
                    *next++ = {s, unit % p.Hkv * group + g, block * rows, min((block + 1) * rows, s.queries),
                               packed_blocks(unit) > 0 ? of_unit : nullptr};
            of_unit += packed_blocks(unit) * packed_size(p);
        }
        Queue queue;
        run_parallel(p.threads, [&](int thread, int threads) {
            Index index = 0;
            for (Index unit = first; unit < last; ++unit)
                for (Index block = 0; block < packed_blocks(unit); ++block, ++index)
                    if (index % threads == thread)
                        pack_keys(p, sequence(p, unit / p.Hkv), unit % p.Hkv, block, keys + index * packed_size(p));
            if (threads > 1) barrier();
            float* const x = own + thread * own_size;
            float* const acc = x + rows * round_up<width>(p.D);
            float* const totals = acc + rows * (round_up<width>(p.M) + width);
            float* const own_keys = totals + rows * (round_up<width>(p.M) + width);
            for (Index i = queue.pop(); i < count; i = queue.pop())
                run_task(call, f, tasks[i], {x, acc, totals}, own_keys);
        });
    }
}

}  // namespace linattn::LINATTN_ISA::quadratic

#include "quadratic/cpu_direct.hpp"

#include "common/native/packing.hpp"
#include "common/native/threads.hpp"
#include "quadratic/cpu_tiles.hpp"

namespace linattn::LINATTN_ISA {

using namespace quadratic;

namespace {

// Keys packed for one parallel region; heads beyond that wait for the next one.
constexpr Index region_bytes = Index{32} << 20;

// How many leading keys of a sequence the rows before `end` see at most.
LINATTN_INLINE Index visible_keys(const Problem& p, const Sequence& s, Index end) {
    return p.is_causal ? least(most<Index>(end + p.q_offset, 0), s.keys) : s.keys;
}

LINATTN_INLINE Index key_blocks(const Problem& p, const Sequence& s, Index end) {
    return blocks(visible_keys(p, s, end), key_block);
}

// A block of packed keys: K^T [D][key_block], which keys count [key_block], V [key_block][padded(M)].
LINATTN_INLINE Index packed_size(const Problem& p) { return (p.D + 1 + padded(p.M)) * key_block; }

void pack_keys(const Problem& p, const Sequence& s, Index head, Index block, float* to) {
    const Index first = s.first_key + block * key_block, count = least<Index>(key_block, s.keys - block * key_block);
    const bool* keep = p.key_mask == nullptr ? nullptr : p.key_mask + s.batch * p.Tk + first;
    pack_transposed(head_rows(p.k, p.dtype, s.batch, head, first), count, p.D, 1, keep, to);
    mark_seen(keep, count, reinterpret_cast<std::int32_t*>(to + p.D * key_block));
    pack_rows(head_rows(p.v, p.dtype, s.batch, head, first), count, p.M, 1, keep, count, to + (p.D + 1) * key_block);
}

KeyBlock unpacked(const Problem& p, const Sequence& s, Index block, const float* at) {
    return {at, reinterpret_cast<const std::int32_t*>(at + p.D * key_block), at + (p.D + 1) * key_block, padded(p.M),
            static_cast<int>(least<Index>(key_block, s.keys - block * key_block))};
}

// Rows `first` to `end` of one query head, the work of one thread. `keys`: null if nobody else needs them packed.
struct Task {
    Sequence s;
    Index head, first, end;
    const float* keys;
};

// As many rows as keep queries and sums in the second-level cache, and fewer if that would leave threads idle.
Index rows_of_task(const Problem& p) {
    Index rows = 192;
    const Index all = p.cu_seqlens == nullptr ? p.B * p.Tq : p.Tq;
    while (rows / 2 % strip_rows == 0 && p.H * all < 4 * p.threads * rows) rows /= 2;
    return rows;
}

// A thread's rows: queries, and sums of p v followed by those of p.
struct Sums {
    float *x, *acc, *totals;
};

// Sums over more keys than this are put together from sums over as many: a float that grows by one key at a time loses
// digits.
constexpr Index blocks_of_sum = 64;

void compute(const ForwardCall& call, const Similarity& f, const Task& task, const Sums& sums, float* own_keys) {
    const Problem& p = call.problem;
    const Index M = padded(p.M), count = task.end - task.first, row = task.s.first_query + task.first;
    const Index rows = blocks(count, strip_rows) * strip_rows;
    pack_rows(head_rows(p.q, p.dtype, task.s.batch, task.head, row), count, p.D, p.scale, nullptr, rows, sums.x);
    const Index size = rows * (M + width), visible = key_blocks(p, task.s, task.end);
    const bool many = visible > blocks_of_sum;
    clear(sums.acc, size);
    if (many) clear(sums.totals, size);
    float* const l_lanes = sums.acc + rows * M;
    for (Index block = 0; block < visible; ++block) {
        const float* keys = task.keys == nullptr ? own_keys : task.keys + block * packed_size(p);
        if (task.keys == nullptr) pack_keys(p, task.s, task.head / (p.H / p.Hkv), block, own_keys);
        const Index last = p.is_causal ? task.first + p.q_offset - block * key_block : key_block;
        add_keys(f, sums.x, p.D, p.M, unpacked(p, task.s, block, keys), last, static_cast<int>(rows), sums.acc, l_lanes);
        if (many && ((block + 1) % blocks_of_sum == 0 || block + 1 == visible)) {
            for (Index i = 0; i < size; i += width) store(sums.totals + i, load(sums.totals + i) + load(sums.acc + i));
            clear(sums.acc, size);
        }
    }
    const float *const acc = many ? sums.totals : sums.acc, *const lanes = acc + rows * M;
    const HeadRows out = head_rows(call.out, p.dtype, task.s.batch, task.head, row);
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

// Heads by heads, as many as fit `region_bytes`: all threads pack keys, then take row blocks from a queue.
void direct_forward(const ForwardCall& call) {
    const Problem& p = call.problem;
    const Similarity f = similarity(call);
    const Index units = p.sequences * p.Hkv, group = p.H / p.Hkv, rows = rows_of_task(p);
    const Index own_size = rows * (padded(p.D) + 2 * (padded(p.M) + width)) + packed_size(p);
    const auto row_blocks = [&](Index unit) { return group * blocks(sequence(p, unit / p.Hkv).queries, rows); };
    // What a unit's keys take when they are packed for all its tasks; a single task packs its own.
    const auto packed_blocks = [&](Index unit) -> Index {
        const Sequence s = sequence(p, unit / p.Hkv);
        return row_blocks(unit) > 1 ? key_blocks(p, s, s.queries) : 0;
    };
    for (Index first = 0, last = 0; first < units; first = last) {
        Index packed = 0, count = 0;
        while (last < units && (last == first || (packed + packed_blocks(last)) * packed_size(p) * 4 <= region_bytes)) {
            packed += packed_blocks(last);
            count += row_blocks(last++);
        }
        Scratch scratch;
        float* const keys = scratch.take<float>(packed * packed_size(p));
        float* const own = scratch.take<float>(p.threads * own_size);
        Task* const tasks = scratch.take<Task>(count);
        Task* next = tasks;
        const float* of_unit = keys;
        for (Index unit = first; unit < last; ++unit) {
            const Sequence s = sequence(p, unit / p.Hkv);
            for (Index g = 0; g < group; ++g)
                for (Index block = blocks(s.queries, rows) - 1; block >= 0; --block)  // those with the most keys first
                    *next++ = {s, unit % p.Hkv * group + g, block * rows, least((block + 1) * rows, s.queries),
                               packed_blocks(unit) > 0 ? of_unit : nullptr};
            of_unit += packed_blocks(unit) * packed_size(p);
        }
        Queue queue;
        in_parallel(p.threads, [&](int thread, int threads) {
            Index index = 0;
            for (Index unit = first; unit < last; ++unit)
                for (Index block = 0; block < packed_blocks(unit); ++block, ++index)
                    if (index % threads == thread)
                        pack_keys(p, sequence(p, unit / p.Hkv), unit % p.Hkv, block, keys + index * packed_size(p));
            if (threads > 1) barrier();
            float* const x = own + thread * own_size;
            float* const acc = x + rows * padded(p.D);
            float* const totals = acc + rows * (padded(p.M) + width);
            float* const own_keys = totals + rows * (padded(p.M) + width);
            for (Index i = queue.take(); i < count; i = queue.take()) compute(call, f, tasks[i], {x, acc, totals}, own_keys);
        });
    }
}

namespace {

// How the work of a backward pass is split: each key head's queries into `slices` of their heads, its keys into `parts`.
struct Split {
    Index slices, parts;
};

// One task for each key head if that keeps all threads busy, else more.
Split split(const Problem& p) {
    const Index units = p.sequences * p.Hkv, group = p.H / p.Hkv;
    const auto busy = [&](Index tasks) { return tasks % p.threads == 0 || tasks >= 4 * p.threads; };
    Split split{1, 1};
    while (split.slices < group && !busy(units * split.slices)) ++split.slices;
    while (!busy(units * split.slices * split.parts)) ++split.parts;
    return split;
}

// Where tasks that share a row of a gradient leave their shares, one after another in memory: those of part (or slice)
// i at i * size. They are added in that order.
struct Shares {
    float* dq = nullptr;   // [parts][B, H, Tq, padded(D)]
    float* dkv = nullptr;  // [slices][B, Hkv, Tk, padded(D) + padded(M)]
    Index dq_size = 0, dkv_size = 0;
};

// What a thread works with.
struct Workspace {
    float *x, *dout, *delta, *dq;  // all rows of a query head
    float *dk, *dv;                // all keys of a key head if several query heads share it, else one block of them
    float *k, *v, *k_rows;         // a block of keys
    std::int32_t* seen;
};

class Backward {
public:
    explicit Backward(const BackwardCall& call)
        : call_(call),
          p_(call.problem),
          f_(similarity(call)),
          group_(p_.H / p_.Hkv),
          D_(padded(p_.D)),
          M_(padded(p_.M)),
          split_(split(p_)) {}

    void run() {
        Scratch scratch;
        if (split_.parts > 1 && call_.dq.data != nullptr) {
            shares_.dq_size = p_.B * p_.H * p_.Tq * D_;
            shares_.dq = scratch.take<float>(split_.parts * shares_.dq_size);
        }
        if (split_.slices > 1) {
            shares_.dkv_size = p_.B * p_.Hkv * p_.Tk * (D_ + M_);
            shares_.dkv = scratch.take<float>(split_.slices * shares_.dkv_size);
        }
        const Index size = workspace(nullptr, nullptr);
        float* const own = scratch.take<float>(p_.threads * size);
        Queue queue;
        in_parallel(p_.threads, [&](int thread, int threads) {
            Workspace mine;
            workspace(own + thread * size, &mine);
            const Index tasks = p_.sequences * p_.Hkv * split_.slices * split_.parts;
            for (Index i = queue.take(); i < tasks; i = queue.take()) compute(i, mine);
            if (threads > 1) barrier();
            add_shares(thread, threads, mine.x);
        });
    }

private:
    // Lay out a workspace at `at`, if any, and return its size.
    Index workspace(float* at, Workspace* to) const {
        Index longest = 0, keys = 0;
        for (Index i = 0; i < p_.sequences; ++i) {
            longest = most(longest, sequence(p_, i).queries);
            keys = most(keys, sequence(p_, i).keys);
        }
        const Index rows = blocks(longest, gradient_rows) * gradient_rows;
        const Index kept = group_ > split_.slices ? blocks(keys, key_block) * key_block : key_block;
        const Index sizes[] = {rows * D_, rows * M_, blocks(rows, width) * width, rows * D_, kept * D_, kept * M_,
                               p_.D * key_block, p_.M * key_block, key_block * D_, key_block};
        float* places[10];
        Index used = 0;
        for (int i = 0; i < 10; ++i) {
            places[i] = at + used;
            used += blocks(sizes[i], 16) * 16;
        }
        if (to != nullptr)
            *to = {places[0], places[1], places[2], places[3], places[4], places[5], places[6], places[7], places[8],
                   reinterpret_cast<std::int32_t*>(places[9])};
        return used;
    }

    void compute(Index task, const Workspace& w) const {
        const Index part = task % split_.parts, slice = task / split_.parts % split_.slices;
        const Index unit = task / (split_.parts * split_.slices), key_head = unit % p_.Hkv;
        const Sequence s = sequence(p_, unit / p_.Hkv);
        const Index first = group_ * slice / split_.slices, last = group_ * (slice + 1) / split_.slices;
        for (Index g = first; g < last; ++g) {
            const Index head = key_head * group_ + g;
            load_rows(s, head, w);
            for (Index block = part; block < blocks(s.keys, key_block); block += split_.parts) {
                const Index kept = last - first > 1 ? block * key_block : 0;
                float *const dk = w.dk + kept * D_, *const dv = w.dv + kept * M_;
                if (g == first) {
                    clear(dk, key_block * D_);
                    clear(dv, key_block * M_);
                }
                add_block(s, key_head, block, w, dk, dv);
                if (g + 1 == last) store_keys(s, key_head, block, slice, dk, dv);
            }
            store_queries(s, head, part, w.dq);
        }
    }

    // x, dO' and delta of all rows of a query head; dq starts at 0.
    void load_rows(const Sequence& s, Index head, const Workspace& w) const {
        const Index rows = blocks(s.queries, gradient_rows) * gradient_rows;
        const auto whole = [&](const Rows& t) { return head_rows(t, p_.dtype, s.batch, head, s.first_query); };
        pack_rows(whole(p_.q), s.queries, p_.D, p_.scale, nullptr, rows, w.x);
        pack_rows(whole(call_.dout), s.queries, p_.M, 1, nullptr, rows, w.dout);
        clear(w.delta, rows);
        clear(w.dq, rows * D_);
        if (!p_.normalize) return;
        const float* const l = call_.l + (s.batch * p_.H + head) * p_.Tq + s.first_query;
        const HeadRows out = whole(call_.out);
        for (Index r = 0; r < s.queries; ++r) w.delta[r] = normalized(w.dout + r * M_, l[r], out, r);
    }

    // Turn dO into dO / l, which is 0 where l <= 0, and return its product with the output.
    float normalized(float* dout, float l, const HeadRows& out, Index r) const {
        if (l <= 0) {
            clear(dout, M_);
            return 0;
        }
        Vec total = {};
        with_element(out.dtype, [&]<class T>(T) {
            const T* row = static_cast<const T*>(out.data) + r * out.stride;
            for (Index m = 0; m < M_; m += width) {
                const Vec quotient = load(dout + m) / l;
                store(dout + m, quotient);
                total += quotient * (m + width <= p_.M ? load(row + m) : load_first(row + m, static_cast<int>(p_.M - m)));
            }
        });
        return sum(total);
    }

    // All rows of a query head against one block of keys.
    void add_block(const Sequence& s, Index head, Index block, const Workspace& w, float* dk, float* dv) const {
        const Index first = s.first_key + block * key_block;
        const Index count = least<Index>(key_block, s.keys - block * key_block);
        const bool* keep = p_.key_mask == nullptr ? nullptr : p_.key_mask + s.batch * p_.Tk + first;
        const HeadRows k = head_rows(p_.k, p_.dtype, s.batch, head, first);
        pack_transposed(k, count, p_.D, 1, keep, w.k);
        pack_transposed(head_rows(p_.v, p_.dtype, s.batch, head, first), count, p_.M, 1, keep, w.v);
        pack_rows(k, count, p_.D, 1, keep, count, w.k_rows);
        mark_seen(keep, count, w.seen);
        const KeyBlockGradients keys{w.k, w.v, w.seen, w.k_rows, static_cast<int>(count),
                                     call_.dk.data == nullptr ? nullptr : dk, call_.dv.data == nullptr ? nullptr : dv};
        const Index distance = p_.is_causal ? p_.q_offset - block * key_block : key_block;
        const Index seeing = p_.is_causal ? most<Index>(-distance, 0) / gradient_rows * gradient_rows : 0;
        for (Index r = seeing; r < s.queries; r += gradient_rows) {
            const RowGradients rows{w.x + r * D_, w.dout + r * M_, w.delta + r,
                                    call_.dq.data == nullptr ? nullptr : w.dq + r * D_};
            const Index left = blocks(least<Index>(s.queries - r, gradient_rows), strip_rows) * strip_rows;
            add_gradients(f_, rows, static_cast<int>(left), p_.D, p_.M, keys, distance + (p_.is_causal ? r : 0));
        }
    }

    void store_keys(const Sequence& s, Index head, Index block, Index slice, const float* dk, const float* dv) const {
        const Index first = s.first_key + block * key_block;
        const Index count = least<Index>(key_block, s.keys - block * key_block);
        if (shares_.dkv == nullptr) {
            store_rows(dk, D_, count, p_.D, 1, call_.dk, s.batch, head, first);
            store_rows(dv, M_, count, p_.M, 1, call_.dv, s.batch, head, first);
            return;
        }
        float* to = shares_.dkv + slice * shares_.dkv_size + ((s.batch * p_.Hkv + head) * p_.Tk + first) * (D_ + M_);
        for (Index c = 0; c < count; ++c, to += D_ + M_) {
            __builtin_memcpy(to, dk + c * D_, D_ * sizeof(float));
            __builtin_memcpy(to + D_, dv + c * M_, M_ * sizeof(float));
        }
    }

    void store_queries(const Sequence& s, Index head, Index part, const float* dq) const {
        if (shares_.dq == nullptr) {
            store_rows(dq, D_, s.queries, p_.D, p_.scale, call_.dq, s.batch, head, s.first_query);
            return;
        }
        const Index row = (s.batch * p_.H + head) * p_.Tq + s.first_query;
        __builtin_memcpy(shares_.dq + part * shares_.dq_size + row * D_, dq, s.queries * D_ * sizeof(float));
    }

    void store_rows(const float* from, Index stride, Index count, Index n, float factor, const Rows& to, Index b,
                    Index head, Index first) const {
        if (to.data == nullptr) return;
        const HeadRows rows = head_rows(to, p_.dtype, b, head, first);
        for (Index r = 0; r < count; ++r) store_row(from + r * stride, n, factor, rows, r);
    }

    // The gradients that several tasks have shares in, row by row.
    void add_shares(int thread, int threads, float* total) const {
        const auto add = [&](const float* from, Index count, Index size, Index n) {
            for (Index i = 0; i < n; i += width) {
                Vec t = load(from + i);
                for (Index share = 1; share < count; ++share) t += load(from + share * size + i);
                store(total + i, t);
            }
        };
        if (shares_.dq != nullptr)
            for (Index row = thread; row < p_.B * p_.H * p_.Tq; row += threads) {
                add(shares_.dq + row * D_, split_.parts, shares_.dq_size, D_);
                store_rows(total, D_, 1, p_.D, p_.scale, call_.dq, row / p_.Tq / p_.H, row / p_.Tq % p_.H, row % p_.Tq);
            }
        if (shares_.dkv != nullptr)
            for (Index row = thread; row < p_.B * p_.Hkv * p_.Tk; row += threads) {
                const Index b = row / p_.Tk / p_.Hkv, head = row / p_.Tk % p_.Hkv, t = row % p_.Tk;
                add(shares_.dkv + row * (D_ + M_), split_.slices, shares_.dkv_size, D_ + M_);
                store_rows(total, D_, 1, p_.D, 1, call_.dk, b, head, t);
                store_rows(total + D_, M_, 1, p_.M, 1, call_.dv, b, head, t);
            }
    }

    const BackwardCall& call_;
    const Problem& p_;
    Similarity f_;
    Index group_, D_, M_;  // D_, M_: padded
    Split split_;
    Shares shares_;
};

}  // namespace

void direct_backward(const BackwardCall& call) { Backward(call).run(); }

}  // namespace linattn::LINATTN_ISA

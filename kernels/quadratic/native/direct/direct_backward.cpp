#include "quadratic/native/direct/direct.hpp"

#include "common/native/bwd_preprocess.hpp"
#include "common/native/packing.hpp"
#include "common/native/threads.hpp"
#include "quadratic/native/score_tile.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using namespace linattn::quadratic;

namespace {

// How the work of a backward pass is split: each key head's queries into `slices` of their heads, its keys into
// `parts`.
struct TaskSplit {
    Index slices, parts;
};

// One task for each key head if that keeps all threads busy, else more.
TaskSplit split_tasks(const AttentionProblem& p) {
    const Index units = p.sequences * p.Hkv, group = p.H / p.Hkv;
    const auto busy = [&](Index tasks) { return tasks % p.threads == 0 || tasks >= 4 * p.threads; };
    TaskSplit split{1, 1};
    while (split.slices < group && !busy(units * split.slices)) ++split.slices;
    while (!busy(units * split.slices * split.parts)) ++split.parts;
    return split;
}

// Gradients of tasks that share a row of the result, one after another in memory: those of part (or slice)
// i at i * size. They are added in that order.
struct PartialGradients {
    float* dq = nullptr;   // [parts][B, H, Tq, round_up<width>(D)]
    float* dkv = nullptr;  // [slices][B, Hkv, Tk, round_up<width>(D) + round_up<width>(M)]
    Index dq_size = 0, dkv_size = 0;
};

// The memory of a thread.
struct GradientWorkspace {
    float *x, *dout_scaled, *delta, *dq;  // all queries of a head
    float *dk, *dv;         // all keys of a key head if several query heads share it, else one block of them
    float *k, *v, *k_rows;  // a block of keys
    std::int32_t* key_mask;
};

class DirectBackward {
public:
    explicit DirectBackward(const BackwardCall& call)
        : call_(call), p_(call.problem), f_(score_polynomial(call)), group_(p_.H / p_.Hkv), D_(round_up<width>(p_.D)),
          M_(round_up<width>(p_.M)), split_(split_tasks(p_)) {}

    void run() {
        Scratch scratch;
        if (split_.parts > 1 && call_.dq.data != nullptr) {
            partials_.dq_size = p_.B * p_.H * p_.Tq * D_;
            partials_.dq = scratch.allocate<float>(split_.parts * partials_.dq_size);
        }
        if (split_.slices > 1) {
            partials_.dkv_size = p_.B * p_.Hkv * p_.Tk * (D_ + M_);
            partials_.dkv = scratch.allocate<float>(split_.slices * partials_.dkv_size);
        }
        const Index size = workspace(nullptr, nullptr);
        float* const own = scratch.allocate<float>(p_.threads * size);
        Queue queue;
        run_parallel(p_.threads, [&](int thread, int threads) {
            GradientWorkspace own_workspace;
            workspace(own + thread * size, &own_workspace);
            const Index tasks = p_.sequences * p_.Hkv * split_.slices * split_.parts;
            for (Index i = queue.pop(); i < tasks; i = queue.pop()) run_task(i, own_workspace);
            if (threads > 1) barrier();
            add_partials(thread, threads, own_workspace.x);
        });
    }

private:
    // Lay out a workspace at `at`, if any, and return its size.
    Index workspace(float* at, GradientWorkspace* to) const {
        Index longest = 0, keys = 0;
        for (Index i = 0; i < p_.sequences; ++i) {
            longest = max(longest, sequence(p_, i).queries);
            keys = max(keys, sequence(p_, i).keys);
        }
        const Index rows = round_up<gradient_rows>(longest);
        const Index kv_rows = group_ > split_.slices ? round_up<key_block>(keys) : key_block;
        const Index sizes[] = {rows * D_,    rows * M_,        round_up<width>(rows), rows * D_,      kv_rows * D_,
                               kv_rows * M_, p_.D * key_block, p_.M * key_block,      key_block * D_, key_block};
        float* places[10];
        Index used = 0;
        for (int i = 0; i < 10; ++i) {
            places[i] = at + used;
            used += round_up<16>(sizes[i]);
        }
        if (to != nullptr)
            *to = {places[0], places[1], places[2], places[3], places[4],
                   places[5], places[6], places[7], places[8], reinterpret_cast<std::int32_t*>(places[9])};
        return used;
    }

    void run_task(Index task, const GradientWorkspace& w) const {
        const Index part = task % split_.parts, slice = task / split_.parts % split_.slices;
        const Index unit = task / (split_.parts * split_.slices), key_head = unit % p_.Hkv;
        const Sequence s = sequence(p_, unit / p_.Hkv);
        const Index first = group_ * slice / split_.slices, last = group_ * (slice + 1) / split_.slices;
        for (Index g = first; g < last; ++g) {
            const Index head = key_head * group_ + g;
            load_queries(s, head, w);
            for (Index block = part; block < ceil_div(s.keys, key_block); block += split_.parts) {
                const Index row = last - first > 1 ? block * key_block : 0;
                float *const dk = w.dk + row * D_, *const dv = w.dv + row * M_;
                if (g == first) {
                    clear(dk, key_block * D_);
                    clear(dv, key_block * M_);
                }
                process_key_block(s, key_head, block, w, dk, dv);
                if (g + 1 == last) store_keys(s, key_head, block, slice, dk, dv);
            }
            store_queries(s, head, part, w.dq);
        }
    }

    // x, dO' and delta of all queries of a head; dq starts at 0.
    void load_queries(const Sequence& s, Index head, const GradientWorkspace& w) const {
        const Index rows = round_up<gradient_rows>(s.queries);
        const auto view = [&](const TensorView& t) { return row_view(t, p_.dtype, s.batch, head, s.first_query); };
        pack_rows(view(p_.q), s.queries, p_.D, p_.scale, nullptr, rows, w.x);
        const float* const l = call_.l + (s.batch * p_.H + head) * p_.Tq + s.first_query;
        bwd_preprocess(view(call_.dout), view(call_.out), l, p_.normalize, s.queries, p_.M, rows, M_, w.dout_scaled,
                       w.delta);
        clear(w.dq, rows * D_);
    }

    // All queries of a head against one block of keys.
    void process_key_block(const Sequence& s, Index head, Index block, const GradientWorkspace& w, float* dk,
                           float* dv) const {
        const Index first = s.first_key + block * key_block;
        const Index count = min<Index>(key_block, s.keys - block * key_block);
        const bool* keep = p_.key_mask == nullptr ? nullptr : p_.key_mask + s.batch * p_.Tk + first;
        const RowView k = row_view(p_.k, p_.dtype, s.batch, head, first);
        pack_transposed(k, count, p_.D, 1, keep, w.k);
        pack_transposed(row_view(p_.v, p_.dtype, s.batch, head, first), count, p_.M, 1, keep, w.v);
        pack_rows(k, count, p_.D, 1, keep, count, w.k_rows);
        load_key_mask(keep, count, w.key_mask);
        const KeyGradientBlock keys{w.k,
                                    w.v,
                                    w.key_mask,
                                    w.k_rows,
                                    static_cast<int>(count),
                                    call_.dk.data == nullptr ? nullptr : dk,
                                    call_.dv.data == nullptr ? nullptr : dv};
        const Index distance = p_.is_causal ? p_.q_offset - block * key_block : key_block;
        const Index first_seeing = p_.is_causal ? max<Index>(-distance, 0) / gradient_rows * gradient_rows : 0;
        for (Index r = first_seeing; r < s.queries; r += gradient_rows) {
            const QueryTile rows{w.x + r * D_, w.dout_scaled + r * M_, w.delta + r,
                                 call_.dq.data == nullptr ? nullptr : w.dq + r * D_};
            const Index left = round_up<strip_rows>(min<Index>(s.queries - r, gradient_rows));
            accumulate_gradients(f_, rows, static_cast<int>(left), p_.D, p_.M, keys, distance + (p_.is_causal ? r : 0));
        }
    }

    void store_keys(const Sequence& s, Index head, Index block, Index slice, const float* dk, const float* dv) const {
        const Index first = s.first_key + block * key_block;
        const Index count = min<Index>(key_block, s.keys - block * key_block);
        if (partials_.dkv == nullptr) {
            store_rows(dk, D_, count, p_.D, 1, call_.dk, s.batch, head, first);
            store_rows(dv, M_, count, p_.M, 1, call_.dv, s.batch, head, first);
            return;
        }
        float* to =
            partials_.dkv + slice * partials_.dkv_size + ((s.batch * p_.Hkv + head) * p_.Tk + first) * (D_ + M_);
        for (Index c = 0; c < count; ++c, to += D_ + M_) {
            __builtin_memcpy(to, dk + c * D_, D_ * sizeof(float));
            __builtin_memcpy(to + D_, dv + c * M_, M_ * sizeof(float));
        }
    }

    void store_queries(const Sequence& s, Index head, Index part, const float* dq) const {
        if (partials_.dq == nullptr) {
            store_rows(dq, D_, s.queries, p_.D, p_.scale, call_.dq, s.batch, head, s.first_query);
            return;
        }
        const Index row = (s.batch * p_.H + head) * p_.Tq + s.first_query;
        __builtin_memcpy(partials_.dq + part * partials_.dq_size + row * D_, dq, s.queries * D_ * sizeof(float));
    }

    void store_rows(const float* from, Index stride, Index count, Index n, float factor, const TensorView& to, Index b,
                    Index head, Index first) const {
        if (to.data == nullptr) return;
        const RowView rows = row_view(to, p_.dtype, b, head, first);
        for (Index r = 0; r < count; ++r) store_row(from + r * stride, n, factor, rows, r);
    }

    // Sums the gradients of tasks that share a row, row by row.
    void add_partials(int thread, int threads, float* total) const {
        const auto add = [&](const float* from, Index count, Index size, Index n) {
            for (Index i = 0; i < n; i += width) {
                Vec t = load(from + i);
                for (Index task = 1; task < count; ++task) t += load(from + task * size + i);
                store(total + i, t);
            }
        };
        if (partials_.dq != nullptr)
            for (Index row = thread; row < p_.B * p_.H * p_.Tq; row += threads) {
                add(partials_.dq + row * D_, split_.parts, partials_.dq_size, D_);
                store_rows(total, D_, 1, p_.D, p_.scale, call_.dq, row / p_.Tq / p_.H, row / p_.Tq % p_.H, row % p_.Tq);
            }
        if (partials_.dkv != nullptr)
            for (Index row = thread; row < p_.B * p_.Hkv * p_.Tk; row += threads) {
                const Index b = row / p_.Tk / p_.Hkv, head = row / p_.Tk % p_.Hkv, t = row % p_.Tk;
                add(partials_.dkv + row * (D_ + M_), split_.slices, partials_.dkv_size, D_ + M_);
                store_rows(total, D_, 1, p_.D, 1, call_.dk, b, head, t);
                store_rows(total + D_, M_, 1, p_.M, 1, call_.dv, b, head, t);
            }
    }

    const BackwardCall& call_;
    const AttentionProblem& p_;
    ScorePolynomial f_;
    Index group_, D_, M_;  // D_, M_: padded
    TaskSplit split_;
    PartialGradients partials_;
};

}  // namespace

void direct_backward(const BackwardCall& call) { DirectBackward(call).run(); }

}  // namespace linattn::LINATTN_ISA::quadratic

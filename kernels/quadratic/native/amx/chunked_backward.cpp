#include "quadratic/native/amx/chunk_output.hpp"
#include "quadratic/native/amx/chunk_schedule.hpp"
#include "quadratic/native/amx/chunked.hpp"
#include "quadratic/native/amx/score_gradients.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::BackwardCall;

namespace {

constexpr Index strips_at_once = 16;  // that are added to the state together

// One key head of one sequence. The query pass goes forwards: dq comes from the state over the keys before a
// chunk. The key pass goes backwards: dk and dv come from the gradient to that state, which has the same form with
// queries instead of keys, dO' instead of values.
template <bool Completed>
class ChunkedBackward {
public:
    // dq: [H][strips][D][32] as in BlockGradients, or null: not asked for.
    ChunkedBackward(const PackedQueries& queries, const ScorePolynomial& w, const FeatureTable& f, float* dq,
                    Index sequence_number, const KeyHead& head, Scratch& scratch)
        : queries_(queries), call_(queries.call), p_(call_.problem), size_(queries.size), w_(w), f_(f), dq_(dq),
          sequence_number_(sequence_number), head_(head), chunk_(chunk_length(call_)), first_(head, chunk_),
          unit_(w.factor / slope_factor(w)), blocks_(queries, w, dq, scratch), state_(f, size_, true, true, scratch),
          update_(size_.D, 32 * strips_at_once, scratch), output_(size_, scratch), dx_(size_, scratch) {
        values_ = scratch.allocate<Bf16>(32 * strips_at_once * size_.M);
        phi_ = scratch.allocate<Bf16>(2 * 32 * rows_of_a_product);
        k_ = scratch.allocate<Bf16>(32 * size_.D);
        v_ = scratch.allocate<Bf16>(32 * size_.M);
        for (float& x : one_) x = 1;
    }

    void run() {
        if (dq_ != nullptr) query_pass();
        if (call_.dk.data != nullptr || call_.dv.data != nullptr || dq_ != nullptr) key_pass();
    }

private:
    // Chunk c: keys [begin(c), begin(c + 1)), and the strips of queries whose last key is among them.
    bool in_chunks() const { return p_.is_causal && first_.enough; }
    Index chunks() const { return in_chunks() ? 1 + (head_.sequence.keys - first_.end + chunk_ - 1) / chunk_ : 1; }
    Index begin(Index c) const {
        const Index keys = head_.sequence.keys;
        return c == 0 ? 0 : in_chunks() ? min(first_.end + (c - 1) * chunk_, keys) : keys;
    }
    Index strips() const { return (head_.sequence.queries + 31) / 32; }
    Index first_strip(Index c) const {
        if (c == 0) return 0;
        if (c == chunks()) return strips();
        return max<Index>(0, min((begin(c) - p_.q_offset) / 32, strips()));
    }
    // Whether queries get everything from the state, also the keys of their own chunk, there being no order.
    bool sees_whole_state() const { return !p_.is_causal && first_.enough; }

    template <class Work>
    void each_query_strip(Index from, Index to, const Work& work) const {
        const Index group = p_.H / p_.Hkv;
        for (Index h = head_.kv_head * group; h < (head_.kv_head + 1) * group; ++h)
            for (Index i = from; i < to; ++i) work(queries_.first(sequence_number_, h) + i);
    }

    void clear() {
        state_.clear_steps(0, f_.steps, size_.M);
        state_.clear_moments(size_);
        any_ = false;
    }

    void update_state(Index strips, bool read_next) {
        update_.strips = strips;
        update_vector_sums(state_, update_, size_);
        for (int i = 0; i < size_.D; i += 32) update_moments(state_, update_, size_.D, i);
        update_products(f_, state_, update_, size_.M, 0, f_.steps, read_next, phi_);
        any_ = true;
    }

    // ---- the query pass ----

    void query_pass() {
        clear();
        if (sees_whole_state()) {
            update_with_keys(0, head_.sequence.keys);
            each_query_strip(0, strips(), [&](Index n) { store_chunk_dq(n); });
            return;
        }
        for (Index c = 0; c < chunks(); ++c) {
            each_query_strip(first_strip(c), first_strip(c + 1), [&](Index n) {
                if (c == 0)
                    std::memset(dq_ + n * 32 * size_.D, 0, 32 * size_.D * sizeof(float));
                else
                    store_chunk_dq(n);
            });
            if (c + 1 < chunks()) update_with_keys(begin(c), begin(c + 1));
        }
    }

    StripView keys(const TensorView& x, Index width, Index j, Index end) const {
        const Sequence& one = head_.sequence;
        return strip_view(x, one.batch, head_.kv_head, one.first_key, j, end, width, head_.key_mask);
    }

    void update_with_keys(Index j, Index end) {
        update_.y_pairs = values_;
        while (j < end) {
            Index i = 0;
            for (; i < strips_at_once && j < end; ++i, j += 32) {
                Bf16* pairs = update_.z_pairs + i * 32 * size_.D;
                pack_pairs(keys(p_.k, p_.D, j, end), size_.D, pairs);
                pack_pairs(keys(p_.v, p_.M, j, end), size_.M, values_ + i * 32 * size_.M);
                update_.transpose_strip(size_.D, i, pairs);
            }
            update_state(i, j >= end);
        }
    }

    // dQ of strip n from the state.
    void store_chunk_dq(Index n) {
        const QueryStrip q = queries_.at(n);
        dx_.read(w_, f_, state_, size_, q.q_transposed, q.dout_transposed, q.minus_delta);
        float* to = dq_ + n * 32 * size_.D;
        for (int d = 0; d < size_.D; ++d, to += 32) {
            const Vec left = unit_ * load(dx_.dx + d * 32);
            const Vec right = unit_ * load(dx_.dx + d * 32 + 16);
            store(to, _mm512_shuffle_f32x4(left, right, 0x88));  // the order of `query_of_column`
            store(to + 16, _mm512_shuffle_f32x4(left, right, 0xdd));
        }
    }

    // ---- the key pass ----

    void key_pass() {
        clear();
        if (sees_whole_state()) {
            update_with_queries(0, strips());
            process_keys(0, head_.sequence.keys, 0, 0);
            return;
        }
        for (Index c = chunks(); c-- > 0;) {
            process_keys(begin(c), begin(c + 1), first_strip(c), first_strip(c + 1));
            if (c > 0) update_with_queries(first_strip(c), first_strip(c + 1));
        }
    }

    // x = q, y = dO', z = -delta q.
    void update_with_queries(Index from, Index to) {
        const Index group = p_.H / p_.Hkv;
        for (Index g = 0; g < group; ++g)
            for (Index i = from; i < to; i += strips_at_once) {
                const Index count = min(strips_at_once, to - i);
                const Index n = queries_.first(sequence_number_, head_.kv_head * group + g) + i;
                update_.y_pairs = queries_.at(n).dout_pairs;
                for (Index s = 0; s < count; ++s) {
                    const QueryStrip q = queries_.at(n + s);
                    update_.transpose_strip(size_.D, s, q.q_pairs);
                    scale_pairs(q.q_pairs, q.minus_delta, update_.z_pairs + s * 32 * size_.D);
                }
                update_state(count, g + 1 == group && i + strips_at_once >= to);
            }
    }

    // Rows that were packed as pairs, each times its factor.
    void scale_pairs(const Bf16* from, const float* factors, Bf16* to) const {
        for (int d = 0; d < size_.D; d += 16)
            for (int r = 0; r < 32; r += 2, from += 32, to += 32) {
                const __m512i both = load_words(from);
                const Vec even = reinterpret_cast<Vec>(_mm512_slli_epi32(both, 16));
                const Vec odd = reinterpret_cast<Vec>(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
                store_words(to, interleave_halves(round_to_bf16(even * factors[r], odd * factors[r + 1])));
            }
    }

    // Gradients to keys j to `end`: from the gradient to the state, and from the strips of their own chunk.
    void process_keys(Index j, Index end, Index from, Index to) {
        const Index group = p_.H / p_.Hkv;
        for (; j < end; j += 32 * block_strips) {
            blocks_.load_keys(head_.sequence, head_.kv_head, j);
            KeyBlock& block = blocks_.keys();
            for (Index a = 0; any_ && a < block.strips; ++a)
                add_chunk_dkv(j + 32 * a, end, block.dk + a * 32 * size_.D, block.dv + a * 32 * size_.M);
            for (Index h = head_.kv_head * group; h < (head_.kv_head + 1) * group; ++h)
                for (Index i = from; i < to; i += block_strips)
                    blocks_.process_block(queries_.first(sequence_number_, h), i, min<Index>(block_strips, to - i));
            blocks_.store_keys(head_.sequence, head_.kv_head);
        }
    }

    void add_chunk_dkv(Index j, Index end, float* dk, float* dv) {
        pack_transposed(keys(p_.k, p_.D, j, end), size_.D, k_);
        if (call_.dv.data != nullptr) {
            output_.spread(k_, size_.D);
            output_.products(f_, state_, w_.a0 / w_.factor, size_.M);
            add_transposed(output_.out, size_.M, 1, dv);
        }
        if (call_.dk.data != nullptr) {
            pack_transposed(keys(p_.v, p_.M, j, end), size_.M, v_);
            dx_.read(w_, f_, state_, size_, k_, v_, one_);
            add_transposed(dx_.dx, size_.D, unit_, dk);
        }
    }

    const PackedQueries& queries_;
    const BackwardCall& call_;
    const AttentionProblem& p_;
    const TileSizes size_;
    const ScorePolynomial& w_;
    const FeatureTable& f_;
    float* dq_;
    const Index sequence_number_;
    const KeyHead& head_;
    const Index chunk_;
    const FirstChunk first_;
    const float unit_;  // what a product counts in a state whose scores leave `slope_factor` to the end
    BlockGradients<Completed> blocks_;
    ChunkState state_;
    StateUpdate update_;
    ChunkOutput output_;
    ChunkDx dx_;
    Bf16 *values_, *phi_, *k_, *v_;
    float one_[32];
    bool any_ = false;  // in the state
};

template <bool Completed>
void backward_head(const PackedQueries& queries, const ScorePolynomial& w, const FeatureTable& f, float* dq,
                   Index number) {
    Scratch scratch;
    const AttentionProblem& p = queries.call.problem;
    const KeyHead one = head(p, number);
    ChunkedBackward<Completed>(queries, w, f, dq, number / p.Hkv, one, scratch).run();
}

}  // namespace

void chunked_backward(const BackwardCall& call) {
    const AttentionProblem& p = call.problem;
    Scratch scratch;
    const PackedQueries queries(call, scratch);
    const ScorePolynomial w(call);
    const FeatureTable f(w, queries.size.D, scratch);
    float* dq = call.dq.data == nullptr ? nullptr : scratch.allocate<float>(queries.count() * 32 * queries.size.D);
    const auto work = w.completed ? backward_head<true> : backward_head<false>;
    compute_score_gradients(queries, w, dq, 1, 0, p.sequences * p.Hkv,
                            [&](Index head) { work(queries, w, f, dq, head); });
}

}  // namespace linattn::LINATTN_ISA::quadratic

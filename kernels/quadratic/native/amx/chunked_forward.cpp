#include "quadratic/native/amx/chunked.hpp"

#include "common/native/threads.hpp"
#include "quadratic/native/amx/chunk_output.hpp"
#include "quadratic/native/amx/chunk_schedule.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::ForwardCall;

namespace {

// A stretch of keys of one head: packed for scores and for the update of the state. Strips come in pairs.
struct KeyChunk {
    PackedKeys packed;
    StateUpdate update;

    KeyChunk(const TileSizes& size, Index keys, Scratch& scratch) : update(size.D, keys, scratch) {
        packed = {scratch.allocate<Bf16>(update.capacity * size.D), scratch.allocate<Bf16>(update.capacity * size.M),
                  scratch.allocate<std::uint32_t>(update.capacity / 32)};
        update.y_pairs = packed.v;
    }

    void pack_strip(const TileSizes& size, Index i, const StripView& k, const StripView& v) {
        pack_transposed(k, size.D, packed.k + i * 32 * size.D);
        pack_pairs(v, size.M, packed.v + i * 32 * size.M);
        packed.alive[i] = k.alive;
        Bf16* pairs = update.z_pairs + i * 32 * size.D;
        pack_pairs(k, size.D, pairs);
        update.transpose_strip(size.D, i, pairs);
    }
};

// What a head needs that its team shares.
struct TeamMemory {
    KeyChunk keys;
    ChunkState sums;
};

// A head by its team.
class ChunkedForward {
public:
    ChunkedForward(const ForwardCall& call, const ScorePolynomial& w, const FeatureTable& f, const TileSizes& size,
                   TeamMemory& shared, const KeyHead& head, Team& team, Scratch& scratch)
        : call_(call), p_(call.problem), w_(w), f_(f), size_(size), keys_(shared.keys), state_(shared.sums),
          head_(head), team_(team), output_(size, scratch) {
        q_rows_ = scratch.allocate<Bf16>(32 * size.D);
        q_transposed_ = scratch.allocate<Bf16>(32 * size.D);
        phi_ = scratch.allocate<Bf16>(2 * 32 * rows_of_a_product);
        acc_ = scratch.allocate<float>(32 * size.M);
        row_sum_parts_ = scratch.allocate<float>(32 * 16);
    }

    void run() {
        const Index chunk = chunk_length(call_), keys = head_.sequence.keys, queries = head_.sequence.queries;
        const FirstChunk first(head_, chunk);
        clear();
        if (p_.is_causal || !first.enough) {
            for (Index j0 = 0, j1 = first.end; j0 < keys || j0 == 0; j0 = j1, j1 = min(j1 + chunk, keys)) {
                const bool last = j1 == keys;
                pack(j0, j1);
                attend_queries(j0 == 0 ? 0 : first_query_seeing(j0), last ? queries : first_query_seeing(j1), j0);
                if (last) break;
                update_state(true);
            }
        } else {
            for (Index j0 = 0; j0 < keys; j0 += chunk) {
                pack(j0, min(j0 + chunk, keys));
                update_state(j0 + chunk >= keys);
            }
            keys_count_ = 0;
            attend_queries(0, queries, keys);
        }
        team_.wait();
    }

private:
    // The first query that sees key j.
    Index first_query_seeing(Index j) const { return max<Index>(0, min(j - p_.q_offset, head_.sequence.queries)); }

    void clear() {
        state_.clear_steps(team_.begin(f_.steps), team_.end(f_.steps), size_.M);
        if (team_.member == 0) state_.clear_moments(size_);
        updated_ = false;
    }

    void pack(Index j0, Index j1) {
        const Sequence& one = head_.sequence;
        if (team_.member == 0) keys_.update.strips = (j1 - j0 + 31) / 32;
        keys_count_ = j1 - j0;
        for (Index i = team_.member; i < (j1 - j0 + 63) / 64 * 2; i += team_.size) {
            const StripView k =
                strip_view(p_.k, one.batch, head_.kv_head, one.first_key, j0 + 32 * i, j1, p_.D, head_.key_mask);
            const StripView v =
                strip_view(p_.v, one.batch, head_.kv_head, one.first_key, j0 + 32 * i, j1, p_.M, head_.key_mask);
            keys_.pack_strip(size_, i, k, v);
        }
        team_.wait();
    }

    // Adds the packed keys to the state. The team meets before and after: nobody reads it, or packs others, meanwhile.
    void update_state(bool read_next) {
        team_.wait();
        const int D = size_.D;
        const StateUpdate& x = keys_.update;
        if (team_.member == 0) {
            update_vector_sums(state_, x, size_);
            for (Index i = 0; i < x.strips; ++i) state_.n += __builtin_popcount(keys_.packed.alive[i]);
        }
        for (int i = team_.begin(D / 32); i < team_.end(D / 32); ++i) update_moments(state_, x, D, 32 * i);
        update_products(f_, state_, x, size_.M, team_.begin(f_.steps), team_.end(f_.steps), read_next, phi_);
        updated_ = true;
        team_.wait();
    }

    // Queries i0 to i1 of every head: from the state, and from the packed keys, the first of which is key j0.
    void attend_queries(Index i0, Index i1, Index j0) {
        const Index group = p_.H / p_.Hkv, strips = (i1 - i0 + 31) / 32;
        for (Index i = team_.member; i < group * strips; i += team_.size)
            attend_strip(head_.kv_head * group + i / strips, i0 + i % strips * 32, i1, j0);
    }

    void attend_strip(Index h, Index i, Index i1, Index j0) {
        const Sequence& one = head_.sequence;
        const StripView q = strip_view(p_.q, one.batch, h, one.first_query, i, i1, p_.D);
        std::memset(acc_, 0, 32 * size_.M * sizeof(float));
        std::memset(row_sum_parts_, 0, 32 * 16 * sizeof(float));
        if (keys_count_ > 0) {
            pack_rows(q, size_.D, q_rows_);
            for (Index j = 0; j < keys_count_; j += keys_at_once) {
                const PackedKeys some = {keys_.packed.k + j * size_.D, keys_.packed.v + j * size_.M,
                                         keys_.packed.alive + j / 32};
                const Index count = min<Index>(keys_at_once, keys_count_ - j);
                const Index seen = p_.is_causal ? i + p_.q_offset + 1 - j0 - j : everything;
                if (w_.completed)
                    attend<true>(w_, size_, q_rows_, some, count, seen, acc_, row_sum_parts_);
                else
                    attend<false>(w_, size_, q_rows_, some, count, seen, acc_, row_sum_parts_);
            }
        }
        if (updated_) {
            pack_transposed(q, size_.D, q_transposed_);
            output_.read(w_, f_, state_, size_, q_transposed_, acc_, row_sum_parts_);
        }
        finish(w_, p_.normalize, size_.M, acc_, row_sum_parts_,
               strip_target(call_.out, one.batch, h, one.first_query, i, i1, p_.M),
               call_.l + (one.batch * p_.H + h) * p_.Tq + one.first_query + i);
    }

    const ForwardCall& call_;
    const AttentionProblem& p_;
    const ScorePolynomial& w_;
    const FeatureTable& f_;
    const TileSizes& size_;
    KeyChunk& keys_;
    ChunkState& state_;
    const KeyHead& head_;
    Team& team_;
    ChunkOutput output_;
    Bf16 *q_rows_, *q_transposed_, *phi_;
    float *acc_, *row_sum_parts_;
    Index keys_count_ = 0;
    bool updated_ = false;
};

}  // namespace

// As many heads as threads at a time, each by one thread; what is left over, by all threads together.
void chunked_forward(const ForwardCall& call) {
    const AttentionProblem& p = call.problem;
    const ScorePolynomial w(call);
    const TileSizes size = {pad_to_tile(p.D), pad_to_tile(p.M)};
    const Index heads = p.sequences * p.Hkv;
    Scratch scratch;
    const FeatureTable f(w, size.D, scratch);
    Index longest = 0;
    for (Index n = 0; n < heads; n += p.Hkv) longest = max(longest, FirstChunk(head(p, n), chunk_length(call)).end);
    const auto run_head = [&](Index n, TeamMemory& memory, Team& team) {
        Scratch own;
        const KeyHead one = head(p, n);
        ChunkedForward(call, w, f, size, memory, one, team, own).run();
    };
    const int threads = usable_threads(p.threads);
    const Index together = threads == 1 ? 0 : heads % threads;
    TeamMemory shared = {KeyChunk(size, together == 0 ? 0 : longest, scratch),
                         ChunkState(f, size, true, false, scratch)};
    Queue queue;
    run_in_one_team(threads, [&](Team& everyone) {
        const TileConfiguration tiles;
        {
            Scratch own;
            TeamMemory mine = {KeyChunk(size, longest, own), ChunkState(f, size, true, false, own)};
            Team alone(nullptr, 0, 1);
            for (Index n = queue.pop(); n < heads - together; n = queue.pop()) run_head(n, mine, alone);
        }
        for (Index n = heads - together; n < heads; ++n) {
            everyone.wait();
            run_head(n, shared, everyone);
        }
    });
}

}  // namespace linattn::LINATTN_ISA::quadratic

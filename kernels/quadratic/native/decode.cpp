#include "quadratic/native/decode.hpp"

#include "common/native/matmul.hpp"
#include "common/native/packing.hpp"
#include "common/native/threads.hpp"
#include "quadratic/native/chunked/chunk_schedule.hpp"
#include "quadratic/native/score_tile.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using namespace linattn::quadratic;

namespace {

constexpr Index max_keys = direct_keys, max_queries = 128;
constexpr int block_lines =
    64;  // lines of a state that lie in the first-level cache while all queries and keys use them

// A part of one head's state: for each product of `degree` entries of a key a line of `columns` sums.
struct StateLines {
    int degree;
    Index count, columns;
    const float* before;
    float* after;         // or null
    float weight;         // of a line for queries; twice that where the entries are different ones
    const float* addend;  // [keys][round_up<width>(columns)]: what a key's products are multiplied with
    float* acc;           // [queries][round_up<width>(columns)]: what queries collect
};

// to[f - f0] = weight * product f of the entries of x, f0 <= f < f1: 1, x_f, or x_a x_b with a >= b at
// a (a + 1) / 2 + b, where `off_diagonal` is the weight for a > b.
void make_products(const float* x, int degree, Index f0, Index f1, float weight, float off_diagonal, float* to) {
    if (degree == 0) {
        to[0] = weight;
    } else if (degree == 1) {
        for (Index f = f0; f < f1; ++f) to[f - f0] = weight * x[f];
    } else {
        Index a = 0, f = f0;
        while ((a + 1) * (a + 2) / 2 <= f0) ++a;
        for (; f < f1; ++a) {
            const Index first = a * (a + 1) / 2, end = min(first + a, f1);
            const float left = off_diagonal * x[a];
            for (; f < end; ++f) to[f - f0] = left * x[f - first];
            if (f < f1) to[f++ - f0] = weight * x[a] * x[a];
        }
    }
}

// The step of one sequence and key head, by the members of a team.
class Decoder {
public:
    Decoder(const ForwardCall& call, Index index, Index kv_head, Team& team);

    void run();

private:
    void load_queries();
    void load_keys();
    StateLines lines(int degree, float* State::* field, bool of_values, double weight) const;
    void process_lines(const StateLines& part, Index f0, Index f1);
    void update_lines(const StateLines& part, const float* sums, int count, float* after) const;
    void finish();
    float accumulate_new_keys(Index query, float* acc) const;

    Scratch scratch_;
    const ForwardCall& call_;
    const AttentionProblem& p_;
    const Index sequence_index_, kv_head_, group_;  // index: of the sequence
    const Sequence sequence_;
    Team& team_;
    const VisibleKeys visible_;
    const Index queries_, keys_, D_, M_;  // queries of all heads, one head after the other; D, M: padded
    float *x_, *k_, *v_;                  // [queries, an even number][D], [keys][D], [keys][M]
    float *team_acc_, *acc_, *moments_;   // of all members, and the member's: [queries][M]; [queries][D], c1 z + c2 Z x
    float *products_, *block_;            // [queries or keys][block_lines], [block_lines][columns]
};

Decoder::Decoder(const ForwardCall& call, Index index, Index kv_head, Team& team)
    : call_(call), p_(call.problem), sequence_index_(index), kv_head_(kv_head), group_(p_.H / p_.Hkv),
      sequence_(sequence(p_, index)), team_(team), visible_(p_, sequence_, scratch_),
      queries_(group_ * sequence_.queries), keys_(visible_.keys()), D_(round_up<width>(p_.D)),
      M_(round_up<width>(p_.M)) {
    const Index rows = round_up<2>(queries_), each = rows * (D_ + M_);
    x_ = scratch_.allocate<float>(rows * D_);
    k_ = scratch_.allocate<float>(keys_ * D_);
    v_ = scratch_.allocate<float>(keys_ * M_);
    products_ = scratch_.allocate<float>(max(rows, keys_) * block_lines);
    block_ = scratch_.allocate<float>(block_lines * max(D_, M_));
    team_acc_ =
        static_cast<float*>(team.broadcast(team.member == 0 ? scratch_.allocate<float>(team.size * each) : nullptr));
    acc_ = team_acc_ + team.member * each;
    moments_ = acc_ + rows * M_;
    clear(acc_, each);
    load_queries();
    load_keys();
}

void Decoder::load_queries() {
    const Index queries = sequence_.queries;
    for (Index g = 0; g < group_; ++g)
        pack_rows(row_view(p_.q, p_.dtype, sequence_.batch, kv_head_ * group_ + g, sequence_.first_query), queries,
                  p_.D, p_.scale, nullptr, queries, x_ + g * queries * D_);
    clear(x_ + queries_ * D_, (round_up<2>(queries_) - queries_) * D_);
}

void Decoder::load_keys() {
    for (Index j = 0; j < keys_; ++j) {
        const Index key = sequence_.first_key + visible_.position(j);
        pack_rows(row_view(p_.k, p_.dtype, sequence_.batch, kv_head_, key), 1, p_.D, 1, nullptr, 1, k_ + j * D_);
        pack_rows(row_view(p_.v, p_.dtype, sequence_.batch, kv_head_, key), 1, p_.M, 1, nullptr, 1, v_ + j * M_);
    }
}

StateLines Decoder::lines(int degree, float* State::* field, bool of_values, double weight) const {
    const Index count = degree == 0 ? 1 : degree == 1 ? p_.D : p_.D * (p_.D + 1) / 2;
    const Index columns = of_values ? p_.M : p_.D, at = (sequence_index_ * p_.Hkv + kv_head_) * count * columns;
    return {degree,
            count,
            columns,
            call_.before->*field + at,
            call_.after ? call_.after->*field + at : nullptr,
            static_cast<float>(weight),
            of_values ? v_ : k_,
            of_values ? acc_ : moments_};
}

// Lines f0 to f1 of a part. Products read whole vectors: lines of other lengths are copied and padded first.
void Decoder::process_lines(const StateLines& part, Index f0, Index f1) {
    const Index columns = part.columns, stride = round_up<width>(columns);
    const int count = static_cast<int>(f1 - f0), rows = static_cast<int>(round_up<2>(queries_));
    const float* sums = part.before + f0 * columns;
    if (stride != columns) {
        pack_rows(row_view(sums, columns), count, columns, 1, nullptr, count, block_);
        sums = block_;
    }
    for (Index r = 0; r < rows; ++r)
        make_products(x_ + r * D_, part.degree, f0, f1, part.weight, 2 * part.weight, products_ + r * block_lines);
    add_product<block_lines, 1>(products_, sums, stride, count, count, rows, part.acc, stride, stride);
    if (part.after == nullptr) return;
    for (Index j = 0; j < keys_; ++j)
        make_products(k_ + j * D_, part.degree, f0, f1, 1, 1, products_ + j * block_lines);
    update_lines(part, sums, count, part.after + f0 * columns);
}

// after = sums + what the new keys add to them.
void Decoder::update_lines(const StateLines& part, const float* sums, int count, float* after) const {
    const Index columns = part.columns, stride = round_up<width>(columns);
    for (int f = 0; f < count; ++f)
        for (Index m = 0; m < columns; m += width) {
            Vec total = load(sums + f * stride + m);
            for (Index j = 0; j < keys_; ++j)
                total += products_[j * block_lines + f] * load(part.addend + j * stride + m);
            float* to = after + f * columns + m;
            m + width <= columns ? store(to, total) : store_first(to, total, static_cast<int>(columns - m));
        }
}

void Decoder::run() {
    const StateLines parts[] = {
        lines(0, &State::k_sum, false, call_.c1), lines(1, &State::kk, false, call_.c2),
        lines(0, &State::v_sum, true, call_.c0),  lines(1, &State::kv, true, call_.c1),
        lines(2, &State::kkv, true, call_.c2),
    };
    Index turn = 0;
    for (const StateLines& part : parts)
        for (Index f0 = 0; f0 < part.count; f0 += block_lines, ++turn)
            if (turn % team_.size == team_.member) process_lines(part, f0, min(f0 + block_lines, part.count));
    team_.wait();
    if (team_.member == 0) finish();
}

void Decoder::finish() {
    const Index each = round_up<2>(queries_) * (D_ + M_), queries = sequence_.queries;
    for (int other = 1; other < team_.size; ++other)
        for (Index i = 0; i < each; i += width)
            store(team_acc_ + i, load(team_acc_ + i) + load(team_acc_ + other * each + i));
    const float past = static_cast<float>(call_.before->n[sequence_index_]);
    for (Index r = 0; r < queries_; ++r) {
        const Index head = kv_head_ * group_ + r / queries, query = sequence_.first_query + r % queries;
        float* acc = acc_ + r * M_;
        Vec product{};
        for (Index d = 0; d < D_; d += width) product += load(x_ + r * D_ + d) * load(moments_ + r * D_ + d);
        const float l = accumulate_new_keys(r, acc) + sum(product) + static_cast<float>(call_.c0) * past;
        call_.l[(sequence_.batch * p_.H + head) * p_.Tq + query] = l;
        const RowView out = row_view(call_.out, p_.dtype, sequence_.batch, head, query);
        p_.normalize ? store_quotient(acc, p_.M, l, out, 0) : store_row(acc, p_.M, 1, out, 0);
    }
    if (call_.after != nullptr && kv_head_ == 0)
        call_.after->n[sequence_index_] = call_.before->n[sequence_index_] + keys_;
}

// acc += p(s) v over the new keys that a query sees; returns the sum of p(s).
float Decoder::accumulate_new_keys(Index query, float* acc) const {
    const ScorePolynomial f = score_polynomial(call_);
    float total = 0;
    for (Index j = 0; j < visible_.seen(query % sequence_.queries); ++j) {
        Vec multiply_panel{};
        for (Index d = 0; d < D_; d += width) multiply_panel += load(x_ + query * D_ + d) * load(k_ + j * D_ + d);
        const float t = sum(multiply_panel) + f.start, p = (f.a2 * t + f.a1) * t + f.a0;
        total += p;
        for (Index m = 0; m < M_; m += width) store(acc + m, load(acc + m) + p * load(v_ + j * M_ + m));
    }
    return total;
}

}  // namespace

bool is_decoding(const ForwardCall& call) {
    const AttentionProblem& p = call.problem;
    if (call.before == nullptr) return false;
    for (Index s = 0; s < p.sequences; ++s) {
        const Sequence one = sequence(p, s);
        if (one.keys > max_keys || one.queries * (p.H / p.Hkv) > max_queries) return false;
    }
    return true;
}

void decode(const ForwardCall& call) {
    const AttentionProblem& p = call.problem;
    run_in_teams(p.threads, p.sequences * p.Hkv,
                 [&](Index task, Team& team) { Decoder(call, task / p.Hkv, task % p.Hkv, team).run(); });
}

}  // namespace linattn::LINATTN_ISA::quadratic

// What a call must give: the definition and its derivatives, in plain loops in double.
#pragma once

#include <string>

#include "calls.hpp"
#include "feature_map/native/feature_map.hpp"

namespace test {

// A similarity p(t) of two mapped vectors, t = scale phi(x).phi(y), and the sums over keys that stand for it.
struct Similarity {
    double c0, c1, c2;
    linattn::feature_map::Map map;

    double value(double t) const { return c0 + c1 * t + c2 * t * t; }
    double derivative(double t) const { return c1 + 2 * c2 * t; }
    double phi(double x) const {
        using linattn::feature_map::Map;
        return map == Map::elu_plus_one ? (x > 0 ? x + 1 : std::exp(x)) : map == Map::exp ? std::exp(x) : x;
    }
    double slope(double x) const {
        using linattn::feature_map::Map;
        return map == Map::elu_plus_one ? (x > 0 ? 1 : std::exp(x)) : map == Map::exp ? std::exp(x) : 1;
    }

    bool quadratic() const { return c2 != 0; }
    // Of a state's fields after n (linattn/states.py).
    std::vector<Index> sizes(Index D, Index M) const {
        if (quadratic()) return {D, D * D, M, D * M, D * (D + 1) / 2 * M};
        return {D, D * M};
    }
    // What a key adds to the fields, one after another.
    Doubles sums(const Doubles& k, const Doubles& v) const { return products(k, 1, v, 1, 1, 1, 1); }
    // The gradient to the fields of a row whose weighted sum has the gradient g and whose row sum has -delta.
    Doubles read(const Doubles& q, double delta, const Doubles& g, double scale) const {
        return products(q, -delta, g, c0, c1 * scale, c2 * scale * scale, 2);
    }

private:
    // twice: what the product of two different entries counts for beside v, where it stands only once.
    Doubles products(const Doubles& x, double one, const Doubles& y, double f0, double f1, double f2,
                     double twice) const {
        Doubles all;
        for (const double a : x) all.push_back(f1 * one * phi(a));
        if (quadratic()) {
            for (const double a : x)
                for (const double b : x) all.push_back(f2 * one * a * b);
            for (const double m : y) all.push_back(f0 * m);
        }
        for (const double a : x)
            for (const double m : y) all.push_back(f1 * phi(a) * m);
        for (std::size_t a = 0; quadratic() && a < x.size(); ++a)
            for (std::size_t b = 0; b <= a; ++b)
                for (const double m : y) all.push_back((a == b ? f2 : twice * f2) * x[a] * x[b] * m);
        return all;
    }
};

inline double dot(const Doubles& a, const Doubles& b) {
    double total = 0;
    for (std::size_t i = 0; i < a.size(); ++i) total += a[i] * b[i];
    return total;
}
inline void add(double factor, const Doubles& from, Doubles& to) {
    for (std::size_t i = 0; i < from.size(); ++i) to[i] += factor * from[i];
}

// What a call read and wrote beside the problem itself. States: without fields if the call had none.
struct Results {
    TensorView out, dout, dq, dk, dv;
    StateMemory before, after, dafter, dbefore;
};

// |mine - true| / |true| over a tensor, and whether it is within the limit.
struct Comparison {
    double difference = 0, size = 0;
    void add(double mine, double truth) {
        difference += std::isfinite(mine) ? (mine - truth) * (mine - truth) : std::numeric_limits<double>::infinity();
        size += truth * truth;
    }
    void add(const Doubles& mine, const Doubles& truth) {
        for (std::size_t i = 0; i < truth.size(); ++i) add(mine[i], truth[i]);
    }
    void add(StateMemory& mine, Index head, const Doubles& truth) {
        mine.each(head, [&](float x, Index i) { add(x, truth[static_cast<std::size_t>(i)]); });
    }
    bool within(double limit, double floor) const { return std::sqrt(difference) <= limit * std::sqrt(size + floor); }
};

class Truth {
public:
    Truth(const Case& c, const Similarity& sim, Results& mine) : c_(c), p_(c.p), sim_(sim), mine_(mine) {}

    // What is wrong among the numbers that the call wrote; empty if nothing is.
    std::string errors() {
        for (Index n = 0; n < p_.sequences; ++n)
            for (Index hk = 0; hk < p_.Hkv; ++hk) compare_head(n, hk);
        const bool exact = p_.dtype == Dtype::fp32;
        // Where a row sees few keys its gradient nearly cancels, and out, from which it is made, has been rounded:
        // compared on the scale of the largest one.
        const double limit = exact ? 2e-4 : 2e-2, floor = (exact ? 1e-4 : 0.1) * (dq_.size + dk_.size + dv_.size);
        std::string why;
        if (!out_.within(exact ? 2e-5 : 1e-2, 0)) why += " out";
        if (!dq_.within(limit, floor)) why += " dq";
        if (!dk_.within(limit, floor)) why += " dk";
        if (!dv_.within(limit, floor)) why += " dv";
        if (!after_.within(2e-5, 0)) why += " state";
        if (!dbefore_.within(limit, floor)) why += " dstate";
        return why;
    }

private:
    struct Head {
        Sequence s;
        Index kv, number;           // number: among the heads of all states
        std::vector<Doubles> k, v;  // those of the state before first
        std::vector<Doubles> dk, dv;
        Doubles dstate;
    };

    void compare_head(Index n, Index kv) {
        Head head{sequence(p_, n), kv, n * p_.Hkv + kv, {}, {}, {}, {}, {}};
        const Index b = head.s.batch;
        for (Index j = 0; j < c_.past; ++j) {
            const Doubles &k = c_.past_k[head.number], &v = c_.past_v[head.number];
            head.k.emplace_back(k.begin() + j * p_.D, k.begin() + (j + 1) * p_.D);
            head.v.emplace_back(v.begin() + j * p_.M, v.begin() + (j + 1) * p_.M);
        }
        for (Index j = 0; j < head.s.keys; ++j) {
            head.k.push_back(c_.row(p_.k, b, kv, head.s.first_key + j, p_.D));
            head.v.push_back(c_.row(p_.v, b, kv, head.s.first_key + j, p_.M));
        }
        head.dk.assign(head.k.size(), Doubles(p_.D));
        head.dv.assign(head.k.size(), Doubles(p_.M));
        if (c_.with_state) compare_state(head, n);
        const Index group = p_.H / p_.Hkv;
        for (Index h = kv * group; h < (kv + 1) * group; ++h)
            for (Index i = 0; i < head.s.queries; ++i) compare_row(head, h, i);
        for (Index j = 0; j < head.s.keys; ++j) {
            const Index t = head.s.first_key + j;
            dk_.add(c_.row(mine_.dk, b, kv, t, p_.D), head.dk[c_.past + j]);
            dv_.add(c_.row(mine_.dv, b, kv, t, p_.M), head.dv[c_.past + j]);
        }
        if (c_.with_state) dbefore_.add(mine_.dbefore, head.number, head.dstate);
    }

    // The state after all keys, and what its gradient gives to them and to the state before.
    void compare_state(Head& head, Index n) {
        Doubles after(sim_.sums(Doubles(p_.D), Doubles(p_.M)).size());
        head.dstate.resize(after.size());
        mine_.dafter.each(head.number, [&](float x, Index i) { head.dstate[static_cast<std::size_t>(i)] = x; });
        std::fill(after.begin(), after.end(), 0.0);
        Index keys = c_.past;
        for (Index j = 0; j < static_cast<Index>(head.k.size()); ++j) {
            const bool counts = j < c_.past || c_.counts(head.s, j - c_.past);
            if (!counts) continue;
            if (j >= c_.past) {
                ++keys;
                differentiate(head.dstate, head.k[j], head.v[j], head.k[j], head.dk[j]);
                differentiate(head.dstate, head.k[j], head.v[j], head.v[j], head.dv[j]);
            }
            add(1, sim_.sums(head.k[j], head.v[j]), after);
        }
        after_.add(mine_.after, head.number, after);
        after_.add(static_cast<double>(mine_.after.n[static_cast<std::size_t>(n)]), static_cast<double>(keys));
    }

    // to += the gradient of dstate . sums(k, v) with respect to x, which is k or v; exact for a quadratic function.
    void differentiate(const Doubles& dstate, const Doubles& k, const Doubles& v, Doubles& x, Doubles& to) const {
        constexpr double h = 1e-4;
        for (std::size_t i = 0; i < x.size(); ++i) {
            const double middle = x[i];
            x[i] = middle + h;
            const double above = dot(dstate, sim_.sums(k, v));
            x[i] = middle - h;
            to[i] += (above - dot(dstate, sim_.sums(k, v))) / (2 * h);
            x[i] = middle;
        }
    }

    void compare_row(Head& head, Index h, Index i) {
        const Index b = head.s.batch, t = head.s.first_query + i, count = static_cast<Index>(head.k.size());
        const Doubles q = c_.row(p_.q, b, h, t, p_.D);
        Doubles weights(count), slopes(count), out(p_.M), dq(p_.D);
        double l = 0;
        for (Index j = 0; j < count; ++j) {
            if (j >= c_.past && !c_.sees(head.s, i, j - c_.past)) continue;
            double score = 0;
            for (Index d = 0; d < p_.D; ++d) score += sim_.phi(q[d]) * sim_.phi(head.k[j][d]);
            weights[j] = sim_.value(p_.scale * score);
            slopes[j] = sim_.derivative(p_.scale * score) * p_.scale;
            l += weights[j];
            add(weights[j], head.v[j], out);
        }
        const double divisor = p_.normalize ? (l > 0 ? l : INFINITY) : 1;
        for (double& x : out) x /= divisor;
        out_.add(c_.row(mine_.out, b, h, t, p_.M), out);
        Doubles g = c_.row(mine_.dout, b, h, t, p_.M);
        for (double& x : g) x /= divisor;
        const double delta = p_.normalize ? dot(g, out) : 0;
        for (Index j = 0; j < count; ++j) {
            add(weights[j], g, head.dv[j]);
            const double ds = slopes[j] * (dot(g, head.v[j]) - delta);
            for (Index d = 0; d < p_.D; ++d) {
                dq[d] += ds * sim_.phi(head.k[j][d]) * sim_.slope(q[d]);
                head.dk[j][d] += ds * sim_.phi(q[d]) * sim_.slope(head.k[j][d]);
            }
        }
        dq_.add(c_.row(mine_.dq, b, h, t, p_.D), dq);
        if (c_.with_state) add(1, sim_.read(q, delta, g, p_.scale), head.dstate);
    }

    const Case& c_;
    const AttentionProblem& p_;
    const Similarity& sim_;
    Results& mine_;
    Comparison out_, dq_, dk_, dv_, after_, dbefore_;
};

}  // namespace test

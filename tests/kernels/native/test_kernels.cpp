// The native kernels against plain loops in double, without Python: random calls from a fixed seed. Built and run with
// AddressSanitizer and UndefinedBehaviorSanitizer by `cmake --workflow --preset sanitize`. Every tensor is a heap block
// of its own that ends with its last element, so that reading or writing past it is caught; results start as NaN.
//
//     test_kernels [calls] [first seed]          LINATTN_CPU_CAPABILITY names the instruction set
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/native/capability.hpp"
#include "feature_map/cpu.hpp"
#include "quadratic/cpu.hpp"

namespace {

using linattn::Dtype;
using linattn::Index;
using linattn::Problem;
using linattn::Rows;
using linattn::Sequence;

using Doubles = std::vector<double>;

constexpr float nan = std::numeric_limits<float>::quiet_NaN();

struct Random {
    std::mt19937 engine;
    explicit Random(unsigned seed) : engine(seed) {}
    Index between(Index low, Index high) { return std::uniform_int_distribution<Index>(low, high)(engine); }
    bool maybe() { return between(0, 1) == 1; }
    float normal() { return std::normal_distribution<float>()(engine); }
    template <class T>
    T one_of(std::initializer_list<T> values) {
        return *(values.begin() + between(0, static_cast<Index>(values.size()) - 1));
    }
};

// fp32 [B, H, T, width] in a block that is no longer than its last element, with T or H next to the last dimension.
struct Tensor {
    std::vector<float> data;
    Rows rows;

    Tensor(Random& random, Index B, Index H, Index T, Index width, float fill) {
        const Index pad = random.between(0, 3);
        const bool heads_inside = random.maybe();
        const Index row = width + pad;
        rows = heads_inside ? Rows{nullptr, T * H * row, row, H * row} : Rows{nullptr, H * T * row, T * row, row};
        data.assign(static_cast<std::size_t>(B * H * T * row - pad), fill);
        rows.data = data.data();
    }
    float& at(Index b, Index h, Index t, Index i) {
        return data.at(static_cast<std::size_t>(b * rows.stride_b + h * rows.stride_h + t * rows.stride_t + i));
    }
};

struct Case {
    Random random;
    Problem p;
    std::vector<Index> bounds;
    // Not vector<bool>: kernels read bytes.
    std::vector<unsigned char> mask;
    std::vector<Tensor> tensors;

    explicit Case(unsigned seed) : random(seed) {
        p.H = random.between(1, 3);
        p.Hkv = random.maybe() ? p.H : 1;
        p.D = random.one_of<Index>({1, 3, 16, 17, 32, 64, 70});
        p.M = random.one_of<Index>({1, 5, 16, 32, 64, 65});
        p.Tq = p.Tk = random.between(1, random.maybe() ? 40 : 300);
        p.is_causal = random.maybe();
        p.normalize = random.maybe();
        p.scale = 0.5f / std::sqrt(static_cast<float>(p.D));
        p.threads = static_cast<int>(random.between(1, 3));
        const Index kind = random.between(0, 2);
        p.B = kind == 0 ? 1 : random.between(1, 2);
        if (kind == 0) {
            const Index a = random.between(0, p.Tk), b = random.between(a, p.Tk);
            bounds = {0, a, b, p.Tk};
            p.cu_seqlens = bounds.data();
            p.sequences = 3;
        } else {
            p.sequences = p.B;
            if (kind == 1) p.Tq = random.between(1, 100);
        }
        if (p.is_causal) p.q_offset = random.one_of<Index>({0, 0, -3, 20});
        if (random.maybe()) {
            mask.resize(static_cast<std::size_t>(p.B * p.Tk));
            for (unsigned char& one : mask) one = random.between(0, 3) > 0;
            p.key_mask = reinterpret_cast<const bool*>(mask.data());
        }
        tensors.reserve(8);
        p.q = filled(p.H, p.Tq, p.D);
        p.k = filled(p.Hkv, p.Tk, p.D);
        p.v = filled(p.Hkv, p.Tk, p.M);
    }

    Rows filled(Index H, Index T, Index width) {
        Tensor& t = tensors.emplace_back(random, p.B, H, T, width, 0.0f);
        for (float& x : t.data) x = random.normal();
        return t.rows;
    }
    Rows empty(Index H, Index T, Index width) { return tensors.emplace_back(random, p.B, H, T, width, nan).rows; }

    bool sees(const Sequence& s, Index i, Index j) const {
        if (p.is_causal && j > i + p.q_offset) return false;
        return p.key_mask == nullptr || p.key_mask[s.batch * p.Tk + s.first_key + j];
    }
};

double at(const Rows& rows, Index b, Index h, Index t, Index i) {
    return static_cast<const float*>(rows.data)[b * rows.stride_b + h * rows.stride_h + t * rows.stride_t + i];
}

// |mine - true| / |true| over a tensor, and whether it is within the limit.
struct Comparison {
    double difference = 0, size = 0;
    void add(double mine, double truth) {
        difference += std::isfinite(mine) ? (mine - truth) * (mine - truth) : std::numeric_limits<double>::infinity();
        size += truth * truth;
    }
    bool within(double limit, double floor) const { return std::sqrt(difference) <= limit * std::sqrt(size + floor); }
};

// A similarity of two mapped vectors with its slope, and the map with its.
struct Similarity {
    double c0, c1, c2;
    linattn::feature_map::Map map;

    double phi(double x) const {
        using linattn::feature_map::Map;
        return map == Map::elu_plus_one ? (x > 0 ? x + 1 : std::exp(x)) : map == Map::exp ? std::exp(x) : x;
    }
    double slope(double x) const {
        using linattn::feature_map::Map;
        return map == Map::elu_plus_one ? (x > 0 ? 1 : std::exp(x)) : map == Map::exp ? std::exp(x) : 1;
    }
};

struct Results {
    Rows out, dout, dq, dk, dv;
};

// Every number that a call wrote, against the definition and its derivative.
bool agrees(Case& c, const Similarity& sim, const Results& mine, std::string& why) {
    const Problem& p = c.p;
    const Index group = p.H / p.Hkv;
    Comparison out, dq, dk, dv;
    for (Index n = 0; n < p.sequences; ++n) {
        const Sequence s = sequence(p, n);
        const Index b = s.batch, q0 = s.first_query, k0 = s.first_key;
        for (Index hk = 0; hk < p.Hkv; ++hk) {
            Doubles true_dk(s.keys * p.D), true_dv(s.keys * p.M);
            for (Index h = hk * group; h < (hk + 1) * group; ++h)
                for (Index i = 0; i < s.queries; ++i) {
                    Doubles weights(s.keys), slopes(s.keys), o(p.M), true_dq(p.D);
                    double l = 0;
                    for (Index j = 0; j < s.keys; ++j) {
                        if (!c.sees(s, i, j)) continue;
                        double t = 0;
                        for (Index d = 0; d < p.D; ++d)
                            t += sim.phi(at(p.q, b, h, q0 + i, d)) * sim.phi(at(p.k, b, hk, k0 + j, d));
                        t *= p.scale;
                        weights[j] = sim.c0 + sim.c1 * t + sim.c2 * t * t;
                        slopes[j] = sim.c1 + 2 * sim.c2 * t;
                        l += weights[j];
                        for (Index m = 0; m < p.M; ++m) o[m] += weights[j] * at(p.v, b, hk, k0 + j, m);
                    }
                    const double divisor = p.normalize ? (l > 0 ? l : INFINITY) : 1;
                    double delta = 0;
                    for (Index m = 0; m < p.M; ++m) {
                        out.add(at(mine.out, b, h, q0 + i, m), o[m] / divisor);
                        delta += p.normalize ? at(mine.dout, b, h, q0 + i, m) / divisor * o[m] / divisor : 0;
                    }
                    for (Index j = 0; j < s.keys; ++j) {
                        if (!c.sees(s, i, j)) continue;
                        double ds = -delta;
                        for (Index m = 0; m < p.M; ++m) {
                            const double g = at(mine.dout, b, h, q0 + i, m) / divisor;
                            ds += g * at(p.v, b, hk, k0 + j, m);
                            true_dv[j * p.M + m] += weights[j] * g;
                        }
                        ds *= slopes[j] * p.scale;
                        for (Index d = 0; d < p.D; ++d) {
                            const double x = at(p.q, b, h, q0 + i, d), y = at(p.k, b, hk, k0 + j, d);
                            true_dq[d] += ds * sim.phi(y) * sim.slope(x);
                            true_dk[j * p.D + d] += ds * sim.phi(x) * sim.slope(y);
                        }
                    }
                    for (Index d = 0; d < p.D; ++d) dq.add(at(mine.dq, b, h, q0 + i, d), true_dq[d]);
                }
            for (Index j = 0; j < s.keys; ++j) {
                for (Index d = 0; d < p.D; ++d) dk.add(at(mine.dk, b, hk, k0 + j, d), true_dk[j * p.D + d]);
                for (Index m = 0; m < p.M; ++m) dv.add(at(mine.dv, b, hk, k0 + j, m), true_dv[j * p.M + m]);
            }
        }
    }
    // Where a row sees few keys its gradient nearly cancels: compared on the scale of the largest one.
    const double floor = 1e-4 * (dq.size + dk.size + dv.size);
    if (!out.within(2e-5, 0)) why += " out";
    if (!dq.within(2e-4, floor)) why += " dq";
    if (!dk.within(2e-4, floor)) why += " dk";
    if (!dv.within(2e-4, floor)) why += " dv";
    return why.empty();
}

template <class Forward, class Backward, class Set>
std::string run(Case& c, const Similarity& sim, const Set& set, void (*forward)(const Forward&),
                void (*backward)(const Backward&)) {
    const Problem& p = c.p;
    std::vector<float> l(static_cast<std::size_t>(p.B * p.H * p.Tq), nan);
    Results r;
    r.out = c.empty(p.H, p.Tq, p.M);
    Forward ahead;
    ahead.problem = p, ahead.out = r.out, ahead.l = l.data();
    set(ahead);
    forward(ahead);
    r.dout = c.filled(p.H, p.Tq, p.M);
    r.dq = c.empty(p.H, p.Tq, p.D), r.dk = c.empty(p.Hkv, p.Tk, p.D), r.dv = c.empty(p.Hkv, p.Tk, p.M);
    Backward back;
    back.problem = p, back.out = r.out, back.l = l.data();
    set(back);
    back.dout = r.dout, back.dq = r.dq, back.dk = r.dk, back.dv = r.dv;
    backward(back);
    std::string why;
    agrees(c, sim, r, why);
    return why;
}

std::string quadratic_call(Case& c) {
    using namespace linattn::quadratic;
    const bool taylor = c.random.maybe();  // never below 1/2: well conditioned
    const Similarity sim{1, taylor ? 1.0 : 0.5, taylor ? 0.5 : 1.0, linattn::feature_map::Map::identity};
    const Form form = c.random.maybe() ? Form::direct : Form::chunked;
    const Index chunk = c.random.one_of<Index>({0, 0, 16, 50});
    const auto set = [&](Call& call) {
        call.c0 = static_cast<float>(sim.c0), call.c1 = static_cast<float>(sim.c1);
        call.c2 = static_cast<float>(sim.c2), call.form = form, call.chunk = chunk;
    };
    return run<ForwardCall, BackwardCall>(c, sim, set, forward, backward);
}

std::string feature_map_call(Case& c) {
    using namespace linattn::feature_map;
    const Map map = c.random.maybe() ? Map::elu_plus_one : Map::exp;
    const Index chunk = c.random.one_of<Index>({0, 0, 1, 7, 64});
    const auto set = [&](Call& call) { call.map = map, call.chunk = chunk; };
    return run<ForwardCall, BackwardCall>(c, {0, 1, 0, map}, set, forward, backward);
}

}  // namespace

int main(int count, char** words) {
    const unsigned calls = count > 1 ? static_cast<unsigned>(std::atoi(words[1])) : 60;
    const unsigned first = count > 2 ? static_cast<unsigned>(std::atoi(words[2])) : 0;
    int failures = 0;
    for (unsigned seed = first; seed < first + calls; ++seed) {
        for (const bool quadratic : {true, false}) {
            Case c(seed);
            const std::string why = quadratic ? quadratic_call(c) : feature_map_call(c);
            if (why.empty()) continue;
            ++failures;
            std::printf("seed %u, %s: wrong:%s\n", seed, quadratic ? "quadratic" : "feature map", why.c_str());
        }
    }
    std::printf("%s: %u calls of each op, %d wrong\n", linattn::name(linattn::capability()), calls, failures);
    return failures == 0 ? 0 : 1;
}

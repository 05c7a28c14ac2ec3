// The native kernels against plain loops in double, without Python: random calls from a fixed seed, in fp32 and bf16,
// with and without states. Built and run with AddressSanitizer and UndefinedBehaviorSanitizer by
// `cmake --workflow --preset sanitize`.
//
//     test_kernels [calls] [first seed]          LINATTN_CPU_CAPABILITY names the instruction set
#include <cstdio>
#include <string>

#include "common/native/isa/isa.hpp"
#include "feature_map/native/feature_map.hpp"
#include "program.hpp"
#include "quadratic/native/quadratic.hpp"
#include "truth.hpp"

namespace {

using namespace test;

linattn::quadratic::State pointers(StateMemory& m, const linattn::quadratic::Options&) {
    auto& f = m.fields;
    return {m.n.data(), f[0].data(), f[1].data(), f[2].data(), f[3].data(), f[4].data()};
}

linattn::feature_map::State pointers(StateMemory& m, const linattn::feature_map::Options&) {
    return {m.n.data(), m.fields[0].data(), m.fields[1].data()};
}

// Forward and backward. Returns what is wrong.
template <class Options, class State>
std::string run(Case& c, const Similarity& sim, const Options& options,
                void (*forward)(const linattn::AttentionForwardCall<Options, State>&),
                void (*backward)(const linattn::AttentionBackwardCall<Options, State>&)) {
    const AttentionProblem& p = c.p;
    std::vector<float> l(static_cast<std::size_t>(p.B * p.H * p.Tq), poison);
    Results r;
    State before, after, dafter, dbefore;
    if (c.with_state) {
        const auto sizes = sim.sizes(p.D, p.M);
        for (StateMemory* m : {&r.before, &r.after, &r.dafter, &r.dbefore})
            *m = StateMemory(p.sequences, p.Hkv, sizes, poison);
        for (Index head = 0; head < p.sequences * p.Hkv; ++head) {
            Doubles sums = sim.sums(Doubles(p.D), Doubles(p.M));
            std::fill(sums.begin(), sums.end(), 0.0);
            for (Index j = 0; j < c.past; ++j) {
                const double *k = c.past_k[head].data() + j * p.D, *v = c.past_v[head].data() + j * p.M;
                add(1, sim.sums(Doubles(k, k + p.D), Doubles(v, v + p.M)), sums);
            }
            r.before.each(head, [&](float& x, Index i) { x = static_cast<float>(sums[static_cast<std::size_t>(i)]); });
            r.dafter.each(head, [&](float& x, Index) { x = 0.01f * c.random.normal(); });
        }
        std::fill(r.before.n.begin(), r.before.n.end(), c.past);
        before = pointers(r.before, options), after = pointers(r.after, options);
        dafter = pointers(r.dafter, options), dbefore = pointers(r.dbefore, options);
        dafter.n = dbefore.n = nullptr;
    }
    const auto given = [&](const State& state) { return c.with_state ? &state : nullptr; };
    r.out = c.empty(p.H, p.Tq, p.M);
    forward({{options, p, r.out, l.data(), given(before)}, given(after)});
    r.dout = c.filled(p.H, p.Tq, p.M);
    r.dq = c.empty(p.H, p.Tq, p.D), r.dk = c.empty(p.Hkv, p.Tk, p.D), r.dv = c.empty(p.Hkv, p.Tk, p.M);
    backward({{options, p, r.out, l.data(), given(before)}, r.dout, r.dq, r.dk, r.dv, given(dafter), given(dbefore)});
    return Truth(c, sim, r).errors();
}

std::string quadratic_call(Case& c) {
    using namespace linattn::quadratic;
    const bool taylor = c.random.maybe();  // never below 1/2: well conditioned
    const Options options{1, taylor ? 1.0 : 0.5, taylor ? 0.5 : 1.0, c.random.maybe() ? Form::direct : Form::chunked,
                          c.random.one_of<Index>({0, 0, 16, 50})};
    const Similarity sim{options.c0, options.c1, options.c2, linattn::feature_map::Map::identity};
    return run(c, sim, options, forward, backward);
}

std::string feature_map_call(Case& c) {
    using namespace linattn::feature_map;
    const Options options{c.random.maybe() ? Map::elu_plus_one : Map::exp, c.random.one_of<Index>({0, 0, 1, 7, 64})};
    return run(c, {0, 1, 0, options.map}, options, forward, backward);
}

// How many calls are wrong.
int count_wrong(unsigned calls, unsigned first) {
    int wrong = 0;
    for (unsigned seed = first; seed < first + calls; ++seed) {
        for (const bool quadratic : {true, false}) {
            test::Case c(seed);
            const std::string why = quadratic ? quadratic_call(c) : feature_map_call(c);
            if (why.empty()) continue;
            ++wrong;
            std::printf("seed %u, %s: wrong:%s\n", seed, quadratic ? "quadratic" : "feature map", why.c_str());
        }
    }
    std::printf("%s: %u calls of each op, %d wrong\n", linattn::isa_name(linattn::selected_isa()), calls, wrong);
    return wrong;
}

}  // namespace

int main(int count, char** words) {
    const unsigned calls = test::argument(count, words, 1, 60);
    const unsigned first = test::argument(count, words, 2, 0);
    return test::exit_status([&] { return count_wrong(calls, first); });
}

// The recurrent kernels against plain loops in double, without Python: random calls from a fixed seed. Built and run
// with AddressSanitizer and UndefinedBehaviorSanitizer by `cmake --workflow --preset sanitize`. Every tensor is a heap
// block of its own, so that reading or writing past it is caught; results start as NaN.
//
//     test_recurrent [calls]          LINATTN_CPU_CAPABILITY names the instruction set
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "common/native/isa/isa.hpp"
#include "program.hpp"
#include "recurrent/native/recurrent.hpp"

namespace {

using linattn::Index;
using linattn::recurrent::BackwardCall;
using linattn::recurrent::Cell;
using linattn::recurrent::ForwardCall;

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

struct Random {
    std::mt19937 engine;
    Index between(Index low, Index high) { return std::uniform_int_distribution<Index>(low, high)(engine); }
    Floats normal(Index count, double scale = 1) {
        Floats x(static_cast<std::size_t>(count));
        for (float& one : x) one = static_cast<float>(scale) * std::normal_distribution<float>()(engine);
        return x;
    }
};

Floats poisoned(Index count) {
    return Floats(static_cast<std::size_t>(count), std::numeric_limits<float>::quiet_NaN());
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// One sequence in double: states 0 .. steps, and for an LSTM the gates; then backward.
struct Truth {
    Index H, G;
    Cell cell;
    const float* W;
    std::vector<Doubles> h, c, gate;

    void forward(const float* p, Index steps, const float* h0, const float* c0) {
        h = {Doubles(h0, h0 + H)};
        c = {cell == Cell::lstm ? Doubles(c0, c0 + H) : Doubles()};
        for (Index t = 0; t < steps; ++t) {
            Doubles z(p + t * G * H, p + (t + 1) * G * H), hidden(H), cells(H);
            for (Index j = 0; j < G * H; ++j)
                for (Index i = 0; i < H; ++i) z[j] += double{W[j * H + i]} * h[t][i];
            for (Index j = 0; j < H; ++j) {
                if (cell == Cell::lstm) {
                    for (Index g : {0, 1, 3}) z[g * H + j] = sigmoid(z[g * H + j]);
                    z[2 * H + j] = std::tanh(z[2 * H + j]);
                    cells[j] = z[H + j] * c[t][j] + z[j] * z[2 * H + j];
                    hidden[j] = z[3 * H + j] * std::tanh(cells[j]);
                } else {
                    hidden[j] = cell == Cell::tanh ? std::tanh(z[j]) : cell == Cell::relu && z[j] < 0 ? 0 : z[j];
                }
            }
            h.push_back(hidden), c.push_back(cells), gate.push_back(z);
        }
    }

    // dh and dc come as gradients to the last state and leave as those to the first. dz is [steps][G H].
    std::vector<Doubles> backward(const float* dall, Index steps, Doubles& dh, Doubles& dc) const {
        std::vector<Doubles> dz(steps, Doubles(G * H));
        for (Index t = steps - 1; t >= 0; --t) {
            Doubles before(H);
            for (Index j = 0; j < H; ++j) {
                const double d = dh[j] + dall[t * H + j], out = h[t + 1][j];
                if (cell == Cell::lstm) {
                    const double i = gate[t][j], f = gate[t][H + j], g = gate[t][2 * H + j], o = gate[t][3 * H + j];
                    const double squashed = std::tanh(c[t + 1][j]), e = dc[j] + d * o * (1 - squashed * squashed);
                    dz[t][j] = e * g * i * (1 - i);
                    dz[t][H + j] = e * c[t][j] * f * (1 - f);
                    dz[t][2 * H + j] = e * i * (1 - g * g);
                    dz[t][3 * H + j] = d * squashed * o * (1 - o);
                    dc[j] = e * f;
                } else {
                    dz[t][j] = d * (cell == Cell::tanh ? 1 - out * out : cell == Cell::relu ? out > 0 : 1);
                }
            }
            for (Index j = 0; j < G * H; ++j)
                for (Index i = 0; i < H; ++i) before[i] += W[j * H + i] * dz[t][j];
            dh = before;
        }
        return dz;
    }
};

bool wrong(double found, double expected) { return !(std::fabs(found - expected) <= 2e-4 * (1 + std::fabs(expected))); }

int failures_of(unsigned seed) {
    Random random{std::mt19937(seed)};
    const Cell cell = static_cast<Cell>(random.between(0, 3));
    const Index G = gates(cell), B = random.between(1, 30), T = random.between(1, 6), H = random.between(1, 40);
    const bool lstm = cell == Cell::lstm, saves = random.between(0, 3) > 0, padded = random.between(0, 1) == 1;
    const Floats W = random.normal(G * H * H, 1 / std::sqrt(static_cast<double>(H))), p = random.normal(B * T * G * H),
                 h0 = random.normal(B * H), c0 = random.normal(B * H), dall = random.normal(B * T * H),
                 dlast_h = random.normal(B * H), dlast_c = random.normal(B * H);
    std::vector<Index> lengths(static_cast<std::size_t>(B), T);
    if (padded)
        for (Index& length : lengths) length = random.between(1, T);
    Floats all_h = poisoned(B * T * H), last_h = poisoned(B * H), last_c = poisoned(B * H), cells = poisoned(B * T * H),
           activations = poisoned(B * T * 4 * H), dp = poisoned(B * T * G * H), dh0 = poisoned(B * H),
           dc0 = poisoned(B * H);

    ForwardCall forward_call;
    forward_call.cell = cell, forward_call.B = B, forward_call.T = T, forward_call.H = H;
    forward_call.weight = W.data(), forward_call.h0 = h0.data(), forward_call.all_h = all_h.data();
    forward_call.lengths = padded ? lengths.data() : nullptr;
    forward_call.threads = static_cast<int>(random.between(1, 3));
    if (lstm) forward_call.c0 = c0.data(), forward_call.last_c = last_c.data();
    if (lstm && saves) forward_call.cells = cells.data(), forward_call.activations = activations.data();
    BackwardCall backward_call{static_cast<linattn::recurrent::Call&>(forward_call)};
    forward_call.projected = p.data(), forward_call.stride_b = T * G * H, forward_call.stride_t = G * H;
    forward_call.last_h = last_h.data();
    linattn::recurrent::forward(forward_call);
    backward_call.dall_h = dall.data(), backward_call.dlast_h = dlast_h.data();
    backward_call.dprojected = dp.data(), backward_call.dh0 = dh0.data();
    if (lstm) backward_call.dlast_c = dlast_c.data(), backward_call.dc0 = dc0.data();
    const bool goes_back = saves || !lstm;
    if (goes_back) linattn::recurrent::backward(backward_call);

    int failures = 0;
    for (Index b = 0; b < B; ++b) {
        const Index steps = lengths[b];
        Truth truth{H, G, cell, W.data(), {}, {}, {}};
        truth.forward(p.data() + b * T * G * H, steps, h0.data() + b * H, c0.data() + b * H);
        Doubles dh(dlast_h.begin() + b * H, dlast_h.begin() + (b + 1) * H),
            dc(dlast_c.begin() + b * H, dlast_c.begin() + (b + 1) * H);
        const auto dz = truth.backward(dall.data() + b * T * H, steps, dh, dc);
        for (Index j = 0; j < H; ++j) {
            for (Index t = 0; t < T; ++t)
                failures += wrong(all_h[(b * T + t) * H + j], t < steps ? truth.h[t + 1][j] : 0);
            failures += wrong(last_h[b * H + j], truth.h[steps][j]);
            if (lstm) failures += wrong(last_c[b * H + j], truth.c[steps][j]);
            if (!goes_back) continue;
            failures += wrong(dh0[b * H + j], dh[j]);
            if (lstm) failures += wrong(dc0[b * H + j], dc[j]);
        }
        for (Index t = 0; t < T && goes_back; ++t)
            for (Index j = 0; j < G * H; ++j) failures += wrong(dp[(b * T + t) * G * H + j], t < steps ? dz[t][j] : 0);
    }
    if (failures > 0)
        std::printf("seed %u, cell %d, B %ld T %ld H %ld: %d numbers wrong\n", seed, static_cast<int>(cell), long(B),
                    long(T), long(H), failures);
    return failures;
}

// How many calls are wrong.
int count_wrong(unsigned calls) {
    int wrong = 0;
    for (unsigned seed = 0; seed < calls; ++seed) wrong += failures_of(seed) > 0;
    std::printf("%s: %u calls, %d wrong\n", linattn::isa_name(linattn::selected_isa()), calls, wrong);
    return wrong;
}

}  // namespace

int main(int count, char** words) {
    const unsigned calls = test::argument(count, words, 1, 60);
    return test::exit_status([&] { return count_wrong(calls); });
}

// The kernels of one instruction set; the build compiles this file once for each (CMakeLists.txt).
//
// A task is a block of batch rows, which goes through time by itself: all T steps are one loop, with the state in
// cache and the weights packed once a thread. A step is one product, h W_h^T or dz W_h, and the functions of the cell.
#include "common/native/matmul.hpp"
#include "common/native/packing.hpp"
#include "common/native/threads.hpp"
#include "recurrent/native/recurrent.hpp"

namespace linattn::LINATTN_ISA::recurrent {

using linattn::recurrent::BackwardCall;
using linattn::recurrent::Call;
using linattn::recurrent::Cell;
using linattn::recurrent::ForwardCall;
using linattn::recurrent::gates;

namespace {

constexpr Index block_rows = 24;         // batch rows that share a load of the weights
constexpr Index depth = 128;             // of a panel of weights, which then stays in L1
constexpr double least_flops = 1 << 19;  // of a thread's work: less is done sooner than a thread is woken

// ---- the functions of a cell ----

LINATTN_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

// Relative error below 3e-7. By a polynomial near 0, where 1 - 2 / (exp(2x) + 1) would lose its digits.
LINATTN_INLINE Vec tanh(Vec x) {
    const Vec magnitude = x < 0.0f ? -x : x, square = x * x;
    Vec p = splat(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const Vec far = 1.0f - 2.0f / (exp(2.0f * magnitude) + 1.0f);
    return magnitude < 0.625f ? x + x * square * p : x < 0.0f ? -far : far;
}

template <Cell cell>
LINATTN_INLINE Vec activation(Vec z) {
    if constexpr (cell == Cell::tanh) return tanh(z);
    if constexpr (cell == Cell::relu) return z < 0.0f ? Vec{} : z;
    return z;
}

// Its derivative, from what it gave.
template <Cell cell>
LINATTN_INLINE Vec derivative(Vec h) {
    if constexpr (cell == Cell::tanh) return 1.0f - h * h;
    if constexpr (cell == Cell::relu) return h > 0.0f ? splat(1.0f) : Vec{};
    return splat(1.0f);
}

// ---- the product of a step ----

// Rows r, r + R, ... as long as R are left. Returns the first row that is not done.
template <int R, int W>
LINATTN_INLINE int multiply_rows(const float* a, Index a_stride, int r, int rows, const float* b, Index b_stride, int n,
                                 float* c, Index c_stride) {
    for (; r + R <= rows; r += R) {
        Vec acc[R][W];
        float* to = c + r * c_stride;
#pragma GCC unroll 32
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
            for (int w = 0; w < W; ++w) acc[i][w] = load(to + i * c_stride + w * width);
        multiply_add(acc, a + r * a_stride, a_stride, 1, b, b_stride, n);
#pragma GCC unroll 32
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
            for (int w = 0; w < W; ++w) store(to + i * c_stride + w * width, acc[i][w]);
    }
    return r;
}

template <int W>
void multiply_columns(const float* a, Index a_stride, int rows, const float* b, Index b_stride, Index n, float* c,
                      Index c_stride) {
    for (Index i = 0; i < n; i += depth) {
        const int terms = static_cast<int>(min(depth, n - i));
        const float* left = a + i;
        const float* right = b + i * b_stride;
        int r = multiply_rows<panel_rows<W>, W>(left, a_stride, 0, rows, right, b_stride, terms, c, c_stride);
        r = multiply_rows<4, W>(left, a_stride, r, rows, right, b_stride, terms, c, c_stride);
        r = multiply_rows<2, W>(left, a_stride, r, rows, right, b_stride, terms, c, c_stride);
        multiply_rows<1, W>(left, a_stride, r, rows, right, b_stride, terms, c, c_stride);
    }
}

// c [rows][columns] += a [rows][n] b [n][columns]; columns is a multiple of width.
void add_step_product(const float* a, Index a_stride, int rows, const float* b, Index n, Index columns, float* c,
                      Index c_stride) {
    Index j = 0;
    for (; j + widest * width <= columns; j += widest * width)
        multiply_columns<widest>(a, a_stride, rows, b + j, columns, n, c + j, c_stride);
    for (; j < columns; j += width) multiply_columns<1>(a, a_stride, rows, b + j, columns, n, c + j, c_stride);
}

// ---- a block of rows ----

// Rows first .. first + rows of the batch; scratch rows have Hp = round_up<width>(H) numbers a gate, zeros behind
// H.
struct BatchBlock {
    const Call& call;
    const Index G, H, Hp, first;
    const int rows;

    bool is_running(int r, Index t) const { return call.lengths == nullptr || t < call.lengths[first + r]; }
    Index last_step() const {
        if (call.lengths == nullptr) return call.T;
        Index steps = 0;
        for (int r = 0; r < rows; ++r) steps = max(steps, min(call.T, call.lengths[first + r]));
        return steps;
    }
    Index at(int r, Index t) const { return ((first + r) * call.T + t) * H; }
    // Call body(j, n) for every vector of a row: n <= width of its numbers are real.
    template <class Body>
    LINATTN_INLINE void for_units(const Body& body) const {
        Index j = 0;
        for (; j + width <= H; j += width) body(j, width);
        if (j < H) body(j, static_cast<int>(H - j));
    }
};

// to [rows][Hp] = the block's rows of a [B, H] tensor, 0 if there is none.
void load_state(const BatchBlock& block, const float* from, float* to) {
    clear(to, block.rows * block.Hp);
    if (from != nullptr)
        for (int r = 0; r < block.rows; ++r)
            load_row(from + (block.first + r) * block.H, block.H, 1, to + r * block.Hp);
}

// What goes from step to step, padded: the state and the sums of the gates, or the gradients of both.
struct CarriedState {
    float *h, *c, *z;
};

CarriedState load_carried_state(const BatchBlock& block, Scratch& scratch, const float* h, const float* c) {
    const CarriedState made{scratch.allocate<float>(block.rows * block.Hp),
                            scratch.allocate<float>(block.rows * block.Hp),
                            scratch.allocate<float>(block.rows * block.G * block.Hp)};
    load_state(block, h, made.h);
    load_state(block, c, made.c);
    return made;
}

void store_state(const BatchBlock& block, const float* from, float* to) {
    for (int r = 0; r < block.rows; ++r)
        __builtin_memcpy(to + (block.first + r) * block.H, from + r * block.Hp, sizeof(float) * block.H);
}

// ---- forward ----

// W_h^T: to [H][G][Hp].
void pack_forward(const Call& call, Index Hp, float* to) {
    const Index G = gates(call.cell), H = call.H;
    clear(to, H * G * Hp);
    for (Index g = 0; g < G; ++g)
        for (Index j = 0; j < H; ++j)
            for (Index i = 0; i < H; ++i) to[(i * G + g) * Hp + j] = call.weight[(g * H + j) * H + i];
}

template <Cell cell>
void elman_row(const BatchBlock& block, int r, Index t, const float* z, float* h) {
    float* all_h = block.call.all_h + block.at(r, t);
    block.for_units([&](Index j, int n) {
        const Vec value = first_lanes(activation<cell>(load(z + j)), n);
        store(h + j, value);
        store_some(all_h + j, value, n);
    });
}

void lstm_row(const BatchBlock& block, int r, Index t, const float* z, float* h, float* c) {
    const Call& call = block.call;
    const Index Hp = block.Hp, H = block.H, at = block.at(r, t);
    block.for_units([&](Index j, int n) {
        const Vec i = sigmoid(load(z + j)), f = sigmoid(load(z + Hp + j)), g = tanh(load(z + 2 * Hp + j)),
                  o = sigmoid(load(z + 3 * Hp + j));
        const Vec cell = first_lanes(f * load(c + j) + i * g, n), hidden = first_lanes(o * tanh(cell), n);
        store(c + j, cell);
        store(h + j, hidden);
        store_some(call.all_h + at + j, hidden, n);
        if (call.cells == nullptr) return;
        store_some(call.cells + at + j, cell, n);
        float* saved = call.activations + 4 * at + j;
        store_some(saved, i, n);
        store_some(saved + H, f, n);
        store_some(saved + 2 * H, g, n);
        store_some(saved + 3 * H, o, n);
    });
}

// What a sequence gives from step `from` to step `to`, behind its end.
void clear_outputs(const BatchBlock& block, int r, Index from, Index to) {
    const Call& call = block.call;
    const Index at = block.at(r, from), n = (to - from) * block.H;
    clear(call.all_h + at, n);
    if (call.cells != nullptr) clear(call.cells + at, n);
    if (call.activations != nullptr) clear(call.activations + 4 * at, 4 * n);
}

template <Cell cell>
void forward_block(const ForwardCall& call, const BatchBlock& block, const float* packed) {
    Scratch scratch;
    const Index G = block.G, H = block.H, Hp = block.Hp, wide = G * Hp;
    const auto [h, c, z] = load_carried_state(block, scratch, call.h0, call.c0);
    const Index steps = block.last_step();
    for (Index t = 0; t < steps; ++t) {
        for (int r = 0; r < block.rows; ++r) {
            const float* row = call.projected + (block.first + r) * call.stride_b + t * call.stride_t;
            if (!block.is_running(r, t))
                clear(z + r * wide, wide);
            else
                for (Index g = 0; g < G; ++g) load_row(row + g * H, H, 1, z + r * wide + g * Hp);
        }
        add_step_product(h, Hp, block.rows, packed, H, wide, z, wide);
        for (int r = 0; r < block.rows; ++r) {
            if (!block.is_running(r, t))
                clear_outputs(block, r, t, t + 1);
            else if constexpr (cell == Cell::lstm)
                lstm_row(block, r, t, z + r * wide, h + r * Hp, c + r * Hp);
            else
                elman_row<cell>(block, r, t, z + r * wide, h + r * Hp);
        }
    }
    for (int r = 0; r < block.rows; ++r) clear_outputs(block, r, steps, call.T);
    store_state(block, h, call.last_h);
    if (cell == Cell::lstm) store_state(block, c, call.last_c);
}

// ---- backward ----

// W_h: to [G][Hp][Hp].
void pack_backward(const Call& call, Index Hp, float* to) {
    const Index G = gates(call.cell), H = call.H;
    clear(to, G * Hp * Hp);
    for (Index g = 0; g < G; ++g)
        for (Index j = 0; j < H; ++j) load_row(call.weight + (g * H + j) * H, H, 1, to + (g * Hp + j) * Hp);
}

LINATTN_INLINE Vec load_dhidden(const BackwardCall& call, Index at, int n) {
    return call.dall_h == nullptr ? Vec{} : load_some(call.dall_h + at, n);
}

// dz of one row; dh is taken over, and 0 afterwards: the product adds what goes on to the step before.
template <Cell cell>
void elman_gradient(const BackwardCall& call, const BatchBlock& block, int r, Index t, float* dh, float* dz) {
    const Index at = block.at(r, t);
    block.for_units([&](Index j, int n) {
        const Vec dhidden = load(dh + j) + load_dhidden(call, at + j, n);
        const Vec value = dhidden * derivative<cell>(load_some(call.all_h + at + j, n));
        store(dh + j, Vec{});
        store(dz + j, value);
        store_some(call.dprojected + at + j, value, n);
    });
}

void lstm_gradient(const BackwardCall& call, const BatchBlock& block, int r, Index t, float* dh, float* dc, float* dz) {
    const Index H = block.H, Hp = block.Hp, at = block.at(r, t);
    const float* before = t > 0 ? call.cells + at - H : call.c0 == nullptr ? nullptr : call.c0 + (block.first + r) * H;
    block.for_units([&](Index j, int n) {
        const float* saved = call.activations + 4 * at + j;
        const Vec i = load_some(saved, n), f = load_some(saved + H, n), g = load_some(saved + 2 * H, n),
                  o = load_some(saved + 3 * H, n);
        const Vec c_before = before == nullptr ? Vec{} : load_some(before + j, n);
        const Vec tanh_c = tanh(load_some(call.cells + at + j, n));
        const Vec dhidden = load(dh + j) + load_dhidden(call, at + j, n);
        const Vec dcell = load(dc + j) + dhidden * o * (1.0f - tanh_c * tanh_c);
        store(dh + j, Vec{});
        store(dc + j, dcell * f);
        const Vec gradients[4] = {dcell * g * i * (1.0f - i), dcell * c_before * f * (1.0f - f),
                                  dcell * i * (1.0f - g * g), dhidden * tanh_c * o * (1.0f - o)};
        float* out = call.dprojected + 4 * at + j;
        for (Index gate = 0; gate < 4; ++gate) {
            store(dz + gate * Hp + j, gradients[gate]);
            store_some(out + gate * H, gradients[gate], n);
        }
    });
}

template <Cell cell>
void backward_block(const BackwardCall& call, const BatchBlock& block, const float* packed) {
    Scratch scratch;
    const Index G = block.G, H = block.H, Hp = block.Hp, wide = G * Hp;
    const auto [dh, dc, dz] = load_carried_state(block, scratch, call.dlast_h, call.dlast_c);
    const Index steps = block.last_step();
    for (int r = 0; r < block.rows; ++r) clear(call.dprojected + G * block.at(r, steps), (call.T - steps) * G * H);
    for (Index t = steps - 1; t >= 0; --t) {
        for (int r = 0; r < block.rows; ++r) {
            if (!block.is_running(r, t)) {  // the state went through unchanged, and so does its gradient
                clear(dz + r * wide, wide);
                clear(call.dprojected + G * block.at(r, t), G * H);
            } else if constexpr (cell == Cell::lstm) {
                lstm_gradient(call, block, r, t, dh + r * Hp, dc + r * Hp, dz + r * wide);
            } else {
                elman_gradient<cell>(call, block, r, t, dh + r * Hp, dz + r * wide);
            }
        }
        for (Index g = 0; g < G; ++g)
            add_step_product(dz + g * Hp, wide, block.rows, packed + g * Hp * Hp, H, Hp, dh, Hp);
    }
    store_state(block, dh, call.dh0);
    if (cell == Cell::lstm) store_state(block, dc, call.dc0);
}

// ---- all blocks ----

template <class AnyCall, class Pack, class Run>
void run_in_blocks(const AnyCall& call, const Pack& pack, const Run& run) {
    const Index G = gates(call.cell), H = call.H, Hp = round_up<width>(H);
    const double flops = 2.0 * static_cast<double>(call.B * call.T * G * H * H);
    const Index useful = max<Index>(1, static_cast<Index>(flops / least_flops));
    const int asked = static_cast<int>(min<Index>(call.threads, min(useful, call.B)));
    run_parallel(asked, [&](int thread, int threads) {
        Scratch scratch;
        float* packed = scratch.allocate<float>(G * Hp * Hp);
        pack(call, Hp, packed);  // by every thread for itself, into its own cache
        const Index begin = call.B * thread / threads, end = call.B * (thread + 1) / threads;
        const Index count = ceil_div(end - begin, block_rows);
        for (Index b = 0; b < count; ++b) {
            const Index from = begin + (end - begin) * b / count, to = begin + (end - begin) * (b + 1) / count;
            run(call, BatchBlock{call, G, H, Hp, from, static_cast<int>(to - from)}, packed);
        }
    });
}

}  // namespace

void forward(const ForwardCall& call) {
    switch (call.cell) {
        case Cell::tanh: return run_in_blocks(call, pack_forward, forward_block<Cell::tanh>);
        case Cell::relu: return run_in_blocks(call, pack_forward, forward_block<Cell::relu>);
        case Cell::identity: return run_in_blocks(call, pack_forward, forward_block<Cell::identity>);
        case Cell::lstm: return run_in_blocks(call, pack_forward, forward_block<Cell::lstm>);
    }
}

void backward(const BackwardCall& call) {
    switch (call.cell) {
        case Cell::tanh: return run_in_blocks(call, pack_backward, backward_block<Cell::tanh>);
        case Cell::relu: return run_in_blocks(call, pack_backward, backward_block<Cell::relu>);
        case Cell::identity: return run_in_blocks(call, pack_backward, backward_block<Cell::identity>);
        case Cell::lstm: return run_in_blocks(call, pack_backward, backward_block<Cell::lstm>);
    }
}

}  // namespace linattn::LINATTN_ISA::recurrent

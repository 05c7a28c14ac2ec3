// Random attention calls whose every tensor is a heap block of its own that ends with its last element, so that reading
// or writing past it is caught. Results start as NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "common/native/attention_problem.hpp"

namespace test {

using linattn::AttentionProblem;
using linattn::Dtype;
using linattn::Index;
using linattn::Sequence;
using linattn::TensorView;

using Doubles = std::vector<double>;

constexpr float poison = std::numeric_limits<float>::quiet_NaN();

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

// [B, H, T, width] with T or H next to the last dimension. Short numbers are bf16.
struct Tensor {
    std::vector<float> floats;
    std::vector<std::uint16_t> shorts;
    TensorView rows;

    // What `value` gives for every element, padding included.
    template <class Value>
    Tensor(Random& random, Dtype dtype, Index B, Index H, Index T, Index width, const Value& value) {
        const Index pad = random.between(0, 3), row = width + pad;
        rows = random.maybe() ? TensorView{nullptr, T * H * row, row, H * row}
                              : TensorView{nullptr, H * T * row, T * row, row};
        const auto size = static_cast<std::size_t>(B * H * T * row - pad);
        if (dtype == Dtype::fp32) {
            for (std::size_t i = 0; i < size; ++i) floats.push_back(value());
            floats.shrink_to_fit();
            rows.data = floats.data();
        } else {
            for (std::size_t i = 0; i < size; ++i) shorts.push_back(bf16(value()));
            shorts.shrink_to_fit();
            rows.data = shorts.data();
        }
    }

    // Rounded to nearest.
    static std::uint16_t bf16(float x) {
        std::uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        return static_cast<std::uint16_t>((std::isnan(x) ? bits : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
};

// A state's tensors but n, fp32, a block each: [sequences, Hkv, size].
struct StateMemory {
    std::vector<Index> n;
    std::vector<std::vector<float>> fields;
    std::vector<Index> sizes;

    StateMemory() = default;
    StateMemory(Index sequences, Index Hkv, const std::vector<Index>& sizes_, float fill)
        : n(static_cast<std::size_t>(sequences)), sizes(sizes_) {
        for (const Index size : sizes) fields.emplace_back(static_cast<std::size_t>(sequences * Hkv * size), fill);
    }
    bool any() const { return !fields.empty(); }
    // All fields of one head, one after another.
    template <class Visit>
    void each(Index head, const Visit& visit) {
        Index i = 0;
        for (std::size_t f = 0; f < fields.size(); ++f)
            for (Index j = 0; j < sizes[f]; ++j) visit(fields[f][static_cast<std::size_t>(head * sizes[f] + j)], i++);
    }
};

struct Case {
    Random random;
    AttentionProblem p;
    std::vector<Index> bounds;
    // Not vector<bool>: kernels read bytes.
    std::vector<unsigned char> mask;
    std::vector<Tensor> tensors;
    bool with_state;
    Index past = 0;                       // keys in the state before
    std::vector<Doubles> past_k, past_v;  // of each head of each sequence: [past][D], [past][M]

    explicit Case(unsigned seed) : random(seed), with_state(random.between(0, 2) == 0) {
        p.dtype = random.maybe() ? Dtype::fp32 : Dtype::bf16;
        p.H = random.between(1, 3);
        p.Hkv = random.maybe() ? p.H : 1;
        p.is_causal = random.maybe();
        p.normalize = random.maybe();
        p.threads = static_cast<int>(random.between(1, 3));
        choose_sizes();
        p.scale = 0.5f / std::sqrt(static_cast<float>(p.D));
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
        if (with_state) past = random.one_of<Index>({0, 1, 30});
        for (Index head = 0; head < p.sequences * p.Hkv; ++head) {
            past_k.push_back(normals(past * p.D));
            past_v.push_back(normals(past * p.M));
        }
    }

    // Small ones beside a state, whose truth is slow; often so few tokens that they are a step of decoding.
    void choose_sizes() {
        p.D = with_state ? random.one_of<Index>({1, 3, 16, 17, 33}) : random.one_of<Index>({1, 3, 16, 17, 32, 64, 70});
        p.M = with_state ? random.one_of<Index>({1, 5, 16, 33}) : random.one_of<Index>({1, 5, 16, 32, 64, 65});
        const Index few = with_state ? 16 : 40, many = with_state ? 70 : 300;
        p.Tq = p.Tk = random.between(1, random.maybe() ? few : many);
        const Index kind = random.between(0, 2);
        p.B = p.sequences = kind == 0 ? 1 : random.between(1, 2);
        if (kind == 0) {
            const Index a = random.between(0, p.Tk), b = random.between(a, p.Tk);
            bounds = {0, a, b, p.Tk};
            p.cu_seqlens = bounds.data();
            p.sequences = 3;
        } else if (kind == 1) {
            p.Tq = random.between(1, with_state ? 20 : 100);
        }
    }

    TensorView filled(Index H, Index T, Index width) {
        return tensors.emplace_back(random, p.dtype, p.B, H, T, width, [&] { return random.normal(); }).rows;
    }
    TensorView empty(Index H, Index T, Index width) {
        return tensors.emplace_back(random, p.dtype, p.B, H, T, width, [] { return poison; }).rows;
    }
    Doubles normals(Index count) {
        Doubles x(static_cast<std::size_t>(count));
        for (double& one : x) one = random.normal();
        return x;
    }

    bool counts(const Sequence& s, Index j) const {
        return p.key_mask == nullptr || p.key_mask[s.batch * p.Tk + s.first_key + j];
    }
    bool sees(const Sequence& s, Index i, Index j) const {
        return (!p.is_causal || j <= i + p.q_offset) && counts(s, j);
    }
    Doubles row(const TensorView& rows, Index b, Index h, Index t, Index width) const {
        Doubles x(static_cast<std::size_t>(width));
        const Index at = b * rows.stride_b + h * rows.stride_h + t * rows.stride_t;
        for (Index i = 0; i < width; ++i) {
            if (p.dtype == Dtype::fp32) {
                x[i] = static_cast<const float*>(rows.data)[at + i];
            } else {
                const std::uint32_t bits = std::uint32_t{static_cast<const std::uint16_t*>(rows.data)[at + i]} << 16;
                float value;
                std::memcpy(&value, &bits, sizeof value);
                x[i] = value;
            }
        }
        return x;
    }
};

}  // namespace test

// Vectors of floats by compiler extensions: the same source for every instruction set.
//
// Only for sources that are compiled once for each instruction set. The build defines for them
//   LINATTN_ISA           the namespace that holds everything they define
//   LINATTN_WIDTH         floats in a vector
//   LINATTN_ACCUMULATORS  vectors that a matrix product may keep in registers
// Whatever such a source calls must be in that namespace (or be a builtin): an inline function shared between
// translation units, std::min included, may be linked from the one with the larger instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/native/attention_problem.hpp"
#include "common/native/macros.hpp"

#if !defined(LINATTN_ISA) || !defined(LINATTN_WIDTH) || !defined(LINATTN_ACCUMULATORS)
#error "simd.hpp is for sources that are compiled once for each instruction set"
#endif

namespace linattn::LINATTN_ISA {

constexpr int width = LINATTN_WIDTH;
constexpr int accumulators = LINATTN_ACCUMULATORS;

using Vec = float __attribute__((vector_size(4 * LINATTN_WIDTH)));
using Lanes = std::int32_t __attribute__((vector_size(4 * LINATTN_WIDTH)));
using Words = std::uint32_t __attribute__((vector_size(4 * LINATTN_WIDTH)));
using Halves = std::uint16_t __attribute__((vector_size(2 * LINATTN_WIDTH)));

struct Bf16 {
    std::uint16_t bits;
};
struct Fp16 {
    std::uint16_t bits;
};

template <class T>
LINATTN_INLINE T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
LINATTN_INLINE T max(T a, T b) {
    return a < b ? b : a;
}

template <class T>
LINATTN_INLINE T clamp(T x, T low, T high) {
    return max(low, min(x, high));
}

LINATTN_INLINE Index ceil_div(Index n, Index size) { return (n + size - 1) / size; }
template <int multiple, class T>
LINATTN_INLINE T round_up(T n) {
    return (n + multiple - 1) / multiple * multiple;
}

LINATTN_INLINE Vec splat(float x) { return Vec{} + x; }

LINATTN_INLINE Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
LINATTN_INLINE Vec load(const Bf16* p) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return reinterpret_cast<Vec>(__builtin_convertvector(h, Words) << 16);
}
LINATTN_INLINE Vec load(const Fp16* p) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
    const Words all = __builtin_convertvector(h, Words), magnitude = (all & 0x7fff) << 13;
    // The exponent's bias grows by 112; a product makes subnormal numbers normal on the way. The largest exponent is
    // that of infinity and NaN.
    const Words finite = reinterpret_cast<Words>(reinterpret_cast<Vec>(magnitude) * 0x1p112f);
    const Words special = reinterpret_cast<Words>(magnitude >= 0x0f800000) & 0x7f800000;
    return reinterpret_cast<Vec>(finite | special | (all & 0x8000) << 16);
}

LINATTN_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
LINATTN_INLINE void store(Bf16* p, Vec v) {
    const Words bits = reinterpret_cast<Words>(v);
    const Words nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words nan = reinterpret_cast<Words>(v != v);
    const Halves h = __builtin_convertvector((nearest_even & ~nan) | (nan & 0x7fc0), Halves);
    std::memcpy(p, &h, sizeof h);
}
LINATTN_INLINE void store(Fp16* p, Vec v) {
    const Words bits = reinterpret_cast<Words>(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    const Words normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // Below 2^-14, 0.5 has a subnormal's last place as its own: the sum rounds to it.
    const Words subnormal = reinterpret_cast<Words>(reinterpret_cast<Vec>(magnitude) + 0.5f) - 0x3f000000;
    const Words infinity = Words{} + 0x7c00, nan = Words{} + 0x7e00;
    Words h = magnitude < 0x38800000 ? subnormal : normal;
    h = magnitude >= 0x477ff000 ? infinity : h;  // from 65520 on
    h = magnitude > 0x7f800000 ? nan : h;
    const Halves halves = __builtin_convertvector(h | sign, Halves);
    std::memcpy(p, &halves, sizeof halves);
}

// The first 0 <= n <= width elements; the other lanes are 0.
template <class T>
LINATTN_INLINE Vec load_first(const T* p, int n) {
    T padded[width] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load(padded);
}
template <class T>
LINATTN_INLINE void store_first(T* p, Vec v, int n) {
    T whole[width];
    store(whole, v);
    std::memcpy(p, whole, n * sizeof(T));
}

// n elements, at most `width`.
template <class T>
LINATTN_INLINE Vec load_some(const T* p, int n) {
    return n == width ? load(p) : load_first(p, n);
}
template <class T>
LINATTN_INLINE void store_some(T* p, Vec v, int n) {
    n == width ? store(p, v) : store_first(p, v, n);
}

LINATTN_INLINE Lanes lane_numbers() {
    Lanes lanes;
    for (int i = 0; i < width; ++i) lanes[i] = i;
    return lanes;
}

// v where `where` is -1, 0 where it is 0.
LINATTN_INLINE Vec select(Vec v, Lanes where) { return reinterpret_cast<Vec>(reinterpret_cast<Lanes>(v) & where); }

// v in lanes below n, 0 in the others, whatever they hold.
LINATTN_INLINE Vec first_lanes(Vec v, int n) { return select(v, lane_numbers() < n); }

// By halves: as many steps as the width has binary digits.
LINATTN_INLINE float sum(Vec v) {
    float lanes[width];
    store(lanes, v);
#pragma GCC unroll 4
    for (int half = width / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// exp(x), relative error below 2e-7; 0 below -87, infinity above 88.8, NaN for NaN.
LINATTN_INLINE Vec exp(Vec x) {
    const Vec capped = x > 89.0f ? splat(89.0f) : x;
    const Vec bounded = capped < -87.0f ? splat(-87.0f) : capped;
    constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const Vec n = (bounded * 1.44269504f + shift) - shift;
    // ln 2 in two parts, so that the reduced argument is exact to the last place.
    const Vec r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec e = splat(1.9875691500e-4f);
    e = e * r + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * r * r + r + 1.0f;
    // 2^n as 2 * 2^(n - 1): 2^128 is no float.
    const Vec power = reinterpret_cast<Vec>((__builtin_convertvector(n, Lanes) + 126) << 23);
    return x < -87.0f ? Vec{} : e * power * 2.0f;
}

}  // namespace linattn::LINATTN_ISA

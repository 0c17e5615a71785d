// Vectors of floats for the pooling of chosen rows: sums over lanes of many vectors at once, and an exponential.

#pragma once

#include "vectors.hpp"

#include <cstdint>
#include <utility>

namespace {

typedef int32_t Integers __attribute__((vector_size(LANES * 4)));

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(one, other, ...) __builtin_shufflevector(one, other, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE  // GCC before 12
#define SHUFFLE(one, other, ...) __builtin_shuffle(one, other, Integers{__VA_ARGS__})
#endif

// Lanes whose number has no bit `BIT`: one[i] + one[i + BIT]; the other lanes: other[i - BIT] + other[i].
template <int BIT, int... I>
inline Vector added(Vector one, Vector other, std::integer_sequence<int, I...>) {
    return SHUFFLE(one, other, (I & BIT ? LANES + I : I)...) +
           SHUFFLE(one, other, (I & BIT ? LANES + (I ^ BIT) : I ^ BIT)...);
}

// Lane i of the result is the sum over the lanes of vectors[i]: a third of the steps of one sum after another.
template <int BIT = 1>
inline Vector sums(Vector* vectors) {
    if constexpr (BIT == LANES) {
        return vectors[0];
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < LANES / BIT; i += 2)
            vectors[i / 2] = added<BIT>(vectors[i], vectors[i + 1], std::make_integer_sequence<int, LANES>());
        return sums<2 * BIT>(vectors);
    }
}

// e^x for x <= 0, to 2 units in the last place; 0 below -87, where float32 has no normal numbers left; nan of nan.
inline Vector exponential(Vector x) {
    const float to_integer = 12582912.0f;  // 1.5 * 2^23: a float this large has no fraction
    const Vector clamped = x < -87.0f ? Vector{} - 87.0f : x;
    const Vector shifted = clamped * 1.44269504f + to_integer;
    const Vector power = shifted - to_integer;
    const Vector rest = (clamped - power * 0.693359375f) + power * 2.12194440e-4f;
    Vector sum = Vector{} + 1.9875691500e-4f;  // Cephes' polynomial of expf
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    const Vector scale = (Vector)(((Integers)shifted << 23) + (127 << 23));
    return x < -87.0f ? Vector{} : sum * scale;
}

}  // namespace

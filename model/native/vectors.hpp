// Vectors of floats as wide as the processor's, at any address.

#pragma once

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4)));

// In every lane. Less nothing, which the compiler leaves out; plus nothing it would have to add, for that makes +0 of -0.
inline Vector all(float value) { return value - Vector{}; }
inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }

// For a slope from 0 to 1.
inline Vector leaky(Vector z, float slope) {
    const Vector scaled = z * slope;
    return z > scaled ? z : scaled;
}

}  // namespace

// The rows of the largest scores, among thousands, with every score read twice and hardly any of them moved.
//
// The scores are dealt to GROUPS groups. The count-th largest of the groups' maxima is at most the count-th largest of
// all scores, and close to it: of 10,000 random ones 56 are as large, for a count of 50. Those few are collected and
// put in order. torch's top-k takes 5 to 8 times as long.
//
// A key holds a score and its row: ordered as the scores are, the lower row first of equals, and no two are equal.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace {

constexpr int64_t LANES = 16, GROUP_VECTORS = 16, GROUPS = LANES * GROUP_VECTORS;
constexpr int64_t BLOCK_VECTORS = 32, BLOCK = LANES * BLOCK_VECTORS;  // one bit of an int32 for each vector

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef float UnalignedFloats __attribute__((vector_size(LANES * 4), aligned(4)));

inline Floats load(const float* from) { return *reinterpret_cast<const UnalignedFloats*>(from); }
inline void store(float* to, Floats value) { *reinterpret_cast<UnalignedFloats*>(to) = value; }

inline int32_t sum(Ints values) {
    int32_t total = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) total += values[lane];
    return total;
}

// A float's bits as an integer, ordered as the floats are, and back: a negative one's are the wrong way round.
inline int32_t turned(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
inline Ints turned(Ints bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

inline int64_t key_of(float score, int64_t row) {
    int32_t bits;
    __builtin_memcpy(&bits, &score, sizeof bits);
    return int64_t(uint64_t(uint32_t(turned(bits))) << 32 | (0xffffffffu - uint32_t(row)));
}
inline int64_t row_of(int64_t key) { return 0xffffffffu - uint32_t(key); }

inline int64_t padded(int64_t rows) { return (rows + BLOCK - 1) / BLOCK * BLOCK; }

// masked = scores + penalties (0, or -inf for a row that may not be chosen), then -inf up to a whole block. Where ALL may
// be chosen there are no penalties, and only a block that is not whole is masked: the scores are read and not copied.
// Returns a score that is finite and at most the count-th largest.
template <bool ALL>
float bound(const float* scores, const float* penalties, int64_t rows, int64_t count, float* masked) {
    const float never = -std::numeric_limits<float>::infinity();
    Floats maxima[GROUP_VECTORS];
    for (Floats& each : maxima) each = Floats{} + never;
    int64_t row = 0;
    for (; row + GROUPS <= rows; row += GROUPS) {
#pragma GCC unroll 16
        for (int64_t v = 0; v < GROUP_VECTORS; ++v) {
            const int64_t at = row + v * LANES;
            Floats value = load(scores + at);
            if constexpr (!ALL) {
                value += load(penalties + at);
                store(masked + at, value);
            }
            maxima[v] = value > maxima[v] ? value : maxima[v];
        }
    }
    const int64_t whole = row;
    if constexpr (ALL) row = rows / BLOCK * BLOCK;
    for (; row < rows; ++row) masked[row] = ALL ? scores[row] : scores[row] + penalties[row];
    for (; row < padded(rows); ++row) masked[row] = never;
    for (int64_t at = whole; at < rows; at += LANES) {  // padding is there to read
        Floats& group = maxima[(at - whole) / LANES];
        const Floats value = load(masked + at);
        group = value > group ? value : group;
    }
    // By halving what is between: the largest integer that at least `count` of the maxima reach.
    Ints ordered[GROUP_VECTORS];
    for (int64_t v = 0; v < GROUP_VECTORS; ++v) ordered[v] = turned((Ints)maxima[v]);
    const float lowest = std::numeric_limits<float>::lowest(), highest = std::numeric_limits<float>::infinity();
    int64_t low = key_of(lowest, 0) >> 32, high = (key_of(highest, 0) >> 32) + 1;
    while (high - low > 1) {
        const int64_t middle = (low + high) >> 1;
        Ints reached = {};
        for (int64_t v = 0; v < GROUP_VECTORS; ++v) reached -= ordered[v] >= int32_t(middle);
        const int32_t found = sum(reached);
        (found >= count ? low : high) = middle;
        if (found == count) break;
    }
    const int32_t bits = turned(int32_t(low));
    float least;
    __builtin_memcpy(&least, &bits, sizeof least);
    return least;
}

// Keys of all rows whose score is at least `least`, in any order. Returns how many; `keys` has room for all rows.
// scores are read in whole blocks, and `last` in the block that is not whole.
int64_t collect(const float* scores, const float* last, int64_t rows, float least, int64_t* keys) {
    int64_t found = 0;
    for (int64_t begin = 0; begin < rows; begin += BLOCK) {
        const float* from = begin + BLOCK <= rows ? scores : last;
        Ints passed = {};  // bit v of a lane: whether its row of vector v passes
        for (int64_t v = 0; v < BLOCK_VECTORS; ++v)
            passed |= (load(from + begin + v * LANES) >= least) & int32_t(1u << v);
        for (int64_t lane = 0; lane < LANES; ++lane)
            for (uint32_t bits = uint32_t(passed[lane]); bits; bits &= bits - 1) {
                const int64_t row = begin + __builtin_ctz(bits) * LANES + lane;
                keys[found++] = key_of(from[row] + 0.0f, row);  // + 0 makes 0 of -0, which equals it
            }
    }
    return found;
}

// Keys of at least the `count` best rows that may be chosen, and of all of them where they are fewer, in any order.
// penalties: null where all may be chosen.
inline int64_t collect_best(const float* scores, const float* penalties, int64_t rows, int64_t count, float* masked,
                            int64_t* keys) {
    if (penalties == nullptr) return collect(scores, masked, rows, bound<true>(scores, nullptr, rows, count, masked), keys);
    return collect(masked, masked, rows, bound<false>(scores, penalties, rows, count, masked), keys);
}

}  // namespace

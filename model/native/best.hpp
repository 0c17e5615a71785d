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
#include <functional>
#include <limits>

namespace {

constexpr int64_t LANES = 16, GROUP_VECTORS = 16, GROUPS = LANES * GROUP_VECTORS;
constexpr int64_t BLOCK_VECTORS = 32, BLOCK = LANES * BLOCK_VECTORS;  // one bit of an int32 for each vector

constexpr int64_t KEY_LANES = 8, COUNTED_AT_ONCE = 4, COUNTED = 256;  // keys

typedef int64_t Keys __attribute__((vector_size(KEY_LANES * 8)));
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
        int64_t lanes[LANES], some = 0;  // in which any passes: of most none does, and which those are no branch predicts
        for (int64_t lane = 0; lane < LANES; ++lane) {
            lanes[some] = lane;
            some += passed[lane] != 0;
        }
        for (int64_t each = 0; each < some; ++each)
            for (uint32_t bits = uint32_t(passed[lanes[each]]); bits; bits &= bits - 1) {
                const int64_t row = begin + __builtin_ctz(bits) * LANES + lanes[each];
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

// The largest key first: of at least `best` of them, or all. Returns of how many.
// Of few, each one's place is how many are larger, counted: a sort mispredicts every other branch, and takes five times
// as long. Many are there where many scores are equal.
inline int64_t put_in_order(int64_t* keys, int64_t count, int64_t best) {
    if (count > COUNTED) {
        if (count > best) std::nth_element(keys, keys + best, keys + count, std::greater<int64_t>());
        std::sort(keys, keys + std::min(count, best), std::greater<int64_t>());
        return std::min(count, best);
    }
    Keys all[COUNTED / KEY_LANES];
    int64_t* const flat = reinterpret_cast<int64_t*>(all);
    std::copy(keys, keys + count, flat);
    std::fill(flat + count, flat + COUNTED, std::numeric_limits<int64_t>::min());
    for (int64_t begin = 0; begin < count; begin += COUNTED_AT_ONCE * KEY_LANES) {
        const Keys* const mine = all + begin / KEY_LANES;
        Keys larger[COUNTED_AT_ONCE] = {};
        for (int64_t other = 0; other < count; ++other) {
            const Keys its = Keys{} + flat[other];
#pragma GCC unroll 4
            for (int64_t v = 0; v < COUNTED_AT_ONCE; ++v) larger[v] -= its > mine[v];
        }
        const int64_t* const places = reinterpret_cast<const int64_t*>(larger);
        for (int64_t each = begin; each < std::min(count, begin + COUNTED_AT_ONCE * KEY_LANES); ++each)
            keys[places[each - begin]] = flat[each];
    }
    return count;
}

}  // namespace

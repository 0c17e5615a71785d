// Scores of every candidate against every key of one user, and the sum of the values that they weigh, in one pass:
//
//     s[b, k] = LeakyReLU(x_b (W1 + diag(key_k) W3) + key_k W2) . w_out        out_b = sum_k s[b, k] value_k
//
// The hidden layer of B candidates, n keys and h units lives in registers and never in memory. Candidates lie in the
// lanes of a vector, so that the sum over h needs no shuffle; a key's folded weights (W1 + diag(key) W3) are made once
// for a block of candidates and stay in the first-level cache.
//
// Plain C++ with GCC's vector types and no header of torch's: it compiles in a second (model/native/library.py).
// Letters: B candidates, n keys, d width, h hidden units, padded to a multiple of UNITS by the caller with zeros.

#pragma once

#include "vectors.hpp"

#include <cstdint>

namespace {

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int UNITS = 4;  // 12 of 16 registers accumulate
#else
constexpr int UNITS = 8;  // 3 vectors of candidates x 8 units: 24 of 32, on ARM too
#endif
constexpr int MOST_VECTORS = 3;
constexpr int TILE = MOST_VECTORS * LANES;  // candidates
constexpr int BLOCK = 8 * TILE;             // candidates per making of a key's weights
constexpr int KEYS = 16;                    // whose scores are kept until the values are added

struct Scorer {
    const float *candidate, *key, *product;  // W1, W2, W3, each [d, h]
    const float* out;                        // [h]
    int64_t width, units;
    float slope;
};

// One key folded into the weights: [d, h] and the bias [h].
void fold(const Scorer& scorer, const float* key, float* weights, float* bias) {
    const int64_t units = scorer.units;
    for (int64_t j = 0; j < units; ++j) bias[j] = 0;
    for (int64_t i = 0; i < scorer.width; ++i) {
        const float value = key[i];
        const float *w1 = scorer.candidate + i * units, *w2 = scorer.key + i * units, *w3 = scorer.product + i * units;
        float* to = weights + i * units;
        for (int64_t j = 0; j < units; ++j) {
            to[j] = w1[j] + value * w3[j];
            bias[j] += value * w2[j];
        }
    }
}

// Scores of N vectors of candidates against one key. x: [d, N * LANES], transposed.
template <int N>
void score(const Scorer& scorer, const float* x, const float* weights, const float* bias, float* scores) {
    Vector sum[N] = {};
    for (int64_t first = 0; first < scorer.units; first += UNITS) {
        Vector z[UNITS][N];
        for (int j = 0; j < UNITS; ++j)
            for (int v = 0; v < N; ++v) z[j][v] = all(bias[first + j]);
        const float* row = weights + first;
        const float* column = x;
        for (int64_t i = 0; i < scorer.width; ++i, row += scorer.units, column += N * LANES) {
            Vector value[N];
            for (int v = 0; v < N; ++v) value[v] = load(column + v * LANES);
#pragma GCC unroll 8
            for (int j = 0; j < UNITS; ++j) {
                const Vector weight = all(row[j]);
#pragma GCC unroll 3
                for (int v = 0; v < N; ++v) z[j][v] += weight * value[v];
            }
        }
        for (int j = 0; j < UNITS; ++j)
            for (int v = 0; v < N; ++v) sum[v] += leaky(z[j][v], scorer.slope) * scorer.out[first + j];
    }
    for (int v = 0; v < N; ++v) store(scores + v * LANES, sum[v]);
}

// out[d, N * LANES] += values[keys, d] weighed by scores[keys, N * LANES].
template <int N>
void weigh(const float* values, const float* scores, int64_t keys, int64_t width, float* out) {
    for (int64_t i = 0; i < width; ++i) {
        Vector sum[N];
        for (int v = 0; v < N; ++v) sum[v] = load(out + (i * N + v) * LANES);
        for (int64_t k = 0; k < keys; ++k)
            for (int v = 0; v < N; ++v) sum[v] += load(scores + k * TILE + v * LANES) * values[k * width + i];
        for (int v = 0; v < N; ++v) store(out + (i * N + v) * LANES, sum[v]);
    }
}

int vectors_of(int64_t rows) { return rows >= TILE ? MOST_VECTORS : int((rows + LANES - 1) / LANES); }

// Keys and values of one user, each [count, d].
struct Slots {
    const float *keys, *values;
    int64_t count;
};

// A block of at most BLOCK candidates lies in tiles of [d, lanes], the last one with as many vectors as it needs.
inline int lanes_of(int64_t rows, int64_t tile) { return vectors_of(rows - tile) * LANES; }

int64_t block_floats(int64_t width) { return width * BLOCK; }

// Floats of working memory that `attend_block` wants.
int64_t work_floats(int64_t width, int64_t units) { return width * units + units + int64_t(KEYS) * BLOCK; }

// Candidate `row` of a block into its tile.
inline void put(float* columns, int64_t width, int64_t rows, int64_t row, const float* vector) {
    const int64_t tile = row / TILE * TILE;
    const int lanes = lanes_of(rows, tile);
    float* to = columns + tile * width + (row - tile);
    for (int64_t i = 0; i < width; ++i) to[i * lanes] = vector[i];
}

// Zeros where a tile's last vector has no candidate.
void pad(float* columns, int64_t width, int64_t rows) {
    const int64_t tile = (rows - 1) / TILE * TILE;
    const int lanes = lanes_of(rows, tile);
    float* to = columns + tile * width;
    for (int64_t i = 0; i < width; ++i)
        for (int64_t lane = rows - tile; lane < lanes; ++lane) to[i * lanes + lane] = 0.0f;
}

// Candidate `row` of a block out of its tile.
inline void take(const float* columns, int64_t width, int64_t rows, int64_t row, float* vector) {
    const int64_t tile = row / TILE * TILE;
    const int lanes = lanes_of(rows, tile);
    const float* from = columns + tile * width + (row - tile);
    for (int64_t i = 0; i < width; ++i) vector[i] = from[i * lanes];
}

// sums = the values weighed by the scores of every candidate of a block. columns, sums: [d, lanes] per tile.
void attend_block(const Scorer& scorer, const Slots& slots, const float* columns, int64_t rows, float* sums,
                  float* work) {
    const int64_t width = scorer.width;
    float* weights = work;
    float* bias = weights + width * scorer.units;
    float* scores = bias + scorer.units;  // of tiles: [KEYS, TILE] each
    for (int64_t i = 0; i < block_floats(width); ++i) sums[i] = 0.0f;
    for (int64_t group = 0; group < slots.count; group += KEYS) {
        const int64_t in_group = slots.count - group < KEYS ? slots.count - group : KEYS;
        for (int64_t k = 0; k < in_group; ++k) {
            fold(scorer, slots.keys + (group + k) * width, weights, bias);
            for (int64_t tile = 0; tile < rows; tile += TILE) {
                const float* from = columns + tile * width;
                float* to = scores + tile * KEYS + k * TILE;
                switch (vectors_of(rows - tile)) {
                    case 3: score<3>(scorer, from, weights, bias, to); break;
                    case 2: score<2>(scorer, from, weights, bias, to); break;
                    default: score<1>(scorer, from, weights, bias, to);
                }
            }
        }
        for (int64_t tile = 0; tile < rows; tile += TILE) {
            const float *from = scores + tile * KEYS, *value = slots.values + group * width;
            float* to = sums + tile * width;
            switch (vectors_of(rows - tile)) {
                case 3: weigh<3>(value, from, in_group, width, to); break;
                case 2: weigh<2>(value, from, in_group, width, to); break;
                default: weigh<1>(value, from, in_group, width, to);
            }
        }
    }
}

}  // namespace

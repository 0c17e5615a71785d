// Multi-head attention over the rows that each candidate has chosen from a history (model/attention/multi_head.py):
//
//     weights_a = softmax_k(query_a . row_k) over the rows that were found        out_a = sum_k weights_a[k] row_k
//
// The rows are read where the history has them and never gathered; scores and weights stay in the first-level cache.
// Letters: A heads, k chosen rows, w width of a row.

#include "pool.hpp"

#include <algorithm>
#include <limits>

namespace {

constexpr int MOST_HEADS = 4;  // at a time

int64_t vectors_of(int64_t floats) { return (floats + LANES - 1) / LANES; }
int64_t padded(int64_t count) { return vectors_of(count) * LANES; }

// A row's last vector ends where the row ends and overlaps the one before: nothing beyond a row is read or written.
int64_t place_of(int64_t vector, int64_t width) { return std::min<int64_t>(vector * LANES, width - LANES); }

// A query with zeros where its last vector overlaps the one before, so that no product counts twice.
void put_query(const float* query, int64_t width, float* to) {
    for (int64_t v = 0; v < vectors_of(width); ++v)
        for (int64_t lane = 0; lane < LANES; ++lane) {
            const int64_t at = place_of(v, width) + lane;
            to[v * LANES + lane] = at < v * LANES ? 0 : query[at];
        }
}

// scores[k] = query . rows[k], for `count` rows padded to whole vectors with any row.
void score(const float* const* rows, int64_t count, int64_t width, const float* query, float* scores) {
    for (int64_t first = 0; first < count; first += LANES) {
        Vector products[LANES] = {};
        for (int64_t v = 0; v < vectors_of(width); ++v) {
            const Vector part = load(query + v * LANES);
            const int64_t place = place_of(v, width);
#pragma GCC unroll 16
            for (int k = 0; k < LANES; ++k) products[k] += part * load(rows[first + k] + place);
        }
        store(scores + first, sums(products));
    }
}

// In place, with 0 from `count` to the end of the last vector.
void softmax(float* scores, int64_t count) {
    float largest = -std::numeric_limits<float>::infinity();
    for (int64_t k = 0; k < count; ++k) largest = scores[k] > largest ? scores[k] : largest;
    std::fill(scores + count, scores + padded(count), -std::numeric_limits<float>::infinity());
    Vector total = {};
    for (int64_t k = 0; k < count; k += LANES) {
        const Vector weight = exponential(load(scores + k) - largest);
        store(scores + k, weight);
        total += weight;
    }
    float sum = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) sum += total[lane];
    for (int64_t k = 0; k < count; k += LANES) store(scores + k, load(scores + k) / sum);
}

// out[a] = sum_k weights[a][k] rows[k]; weights: `stride` apart.
template <int HEADS>
void weigh(const float* const* rows, int64_t count, int64_t width, const float* weights, int64_t stride, float* out) {
    for (int64_t v = 0; v < vectors_of(width); ++v) {
        const int64_t place = place_of(v, width);
        Vector even[HEADS] = {}, odd[HEADS] = {};  // two of each, or every sum waits for the one before
        int64_t k = 0;
        for (; k + 2 <= count; k += 2) {
            const Vector one = load(rows[k] + place), other = load(rows[k + 1] + place);
#pragma GCC unroll 4
            for (int a = 0; a < HEADS; ++a) {
                even[a] += one * weights[a * stride + k];
                odd[a] += other * weights[a * stride + k + 1];
            }
        }
        for (int a = 0; a < HEADS; ++a) {
            if (k < count) even[a] += load(rows[k] + place) * weights[a * stride + k];
            store(out + a * width + place, even[a] + odd[a]);
        }
    }
}

void weigh_all(const float* const* rows, int64_t count, int64_t width, int64_t heads, const float* weights,
               int64_t stride, float* out) {
    for (int64_t a = 0; a < heads; a += MOST_HEADS) {
        const float* from = weights + a * stride;
        float* to = out + a * width;
        switch (heads - a) {
            case 1: weigh<1>(rows, count, width, from, stride, to); break;
            case 2: weigh<2>(rows, count, width, from, stride, to); break;
            case 3: weigh<3>(rows, count, width, from, stride, to); break;
            default: weigh<4>(rows, count, width, from, stride, to);
        }
    }
}

}  // namespace

extern "C" {

// Bytes of scratch memory: where the found rows are, a query, and the weights of every head.
int64_t lrea_pool_scratch(int64_t width, int64_t chosen, int64_t heads) {
    return padded(chosen) * 8 + (padded(width) + heads * padded(chosen)) * 4;
}

// The narrowest row that `lrea_pool` can read.
int64_t lrea_pool_least_width() { return LANES; }

// Candidates `begin` to `end` of all. queries, out: [all, heads, width]; rows: [all / share, length, width], each
// history for `share` candidates in a row; index, found: [all, chosen]. An index means nothing where nothing is found.
// Returns 0 at a found row beyond the history, with part of `out` written.
int64_t lrea_pool(const float* queries, const float* rows, const int64_t* index, const uint8_t* found, int64_t begin,
                  int64_t end, int64_t share, int64_t length, int64_t width, int64_t chosen, int64_t heads, float* out,
                  void* scratch) {
    const float** there = static_cast<const float**>(scratch);
    float* query = reinterpret_cast<float*>(there + padded(chosen));
    float* weights = query + padded(width);
    const int64_t stride = padded(chosen);
    for (int64_t each = begin; each < end; ++each) {
        const float* history = rows + each / share * length * width;
        float* to = out + each * heads * width;
        int64_t count = 0;
        for (int64_t k = each * chosen; k < (each + 1) * chosen; ++k) {
            if (!found[k]) continue;
            if (static_cast<uint64_t>(index[k]) >= static_cast<uint64_t>(length)) return 0;
            there[count++] = history + index[k] * width;
        }
        if (count == 0) {
            std::fill(to, to + heads * width, 0.0f);
            continue;
        }
        std::fill(there + count, there + padded(count), there[0]);
        for (int64_t a = 0; a < heads; ++a) {
            put_query(queries + (each * heads + a) * width, width, query);
            score(there, count, width, query, weights + a * stride);
            softmax(weights + a * stride, count);
        }
        weigh_all(there, count, width, heads, weights, stride, to);
    }
    return 1;
}
}

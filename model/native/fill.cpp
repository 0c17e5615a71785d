// One request's rows of the MLP's first product, in one pass over blocks of candidates: the item's vector, each
// attention's interest and its product with the vector, and the match features, written where they are read.
//
// Step by step, each of these reads the candidates anew from wherever the caches have put them by then, and every row of
// the result is fetched once per step: for 100 candidates that took longer than the arithmetic.

#include "attend.hpp"
#include "match.hpp"

namespace {

constexpr int64_t AHEAD = 8;  // rows of the table that are on their way while one is copied

bool are_within(const int64_t* rows, int64_t count, int64_t end) {
    bool within = true;
    for (int64_t i = 0; i < count; ++i) within &= static_cast<uint64_t>(rows[i]) < static_cast<uint64_t>(end);
    return within;
}

}  // namespace

extern "C" {

struct Attention {
    Slots slots;
    Scorer scorer;
};

// Whether codes [count, columns] are those that a table [items, columns] has at these rows; not for a row beyond it.
int64_t lrea_codes_are(const int64_t* table, int64_t items, const int64_t* rows, int64_t count, int64_t columns,
                       const int64_t* codes) {
    if (!are_within(rows, count, items)) return 0;
    bool equal = true;
    for (int64_t row = 0; row < count; ++row)
        for (int64_t i = 0; i < columns; ++i) equal &= codes[row * columns + i] == table[rows[row] * columns + i];
    return equal;
}

// table: [items, width]; rows, hashes: [count], [count, columns]; matches: null where there are none.
// scratch: as `lrea_attend` wants.
// out: [count, width (1 + 2 attentions) + 2 FEATURES columns], out_stride floats apart.
// Returns 0, and does nothing, if a row is beyond the table.
int64_t lrea_fill(const float* table, int64_t items, const int64_t* rows, const int64_t* hashes, int64_t count, int64_t width,
               const Attention* attentions, int64_t attention_count, const Matches* matches, float* out,
               int64_t out_stride, float* scratch) {
    if (!are_within(rows, count, items)) return 0;
    float* columns = scratch;
    float* sums = columns + block_floats(width);
    float* work = sums + block_floats(width);
    for (int64_t begin = 0; begin < count; begin += BLOCK) {
        const int64_t here = count - begin < BLOCK ? count - begin : BLOCK;
        float* block = out + begin * out_stride;
        for (int64_t row = 0; row < here; ++row) {
            if (begin + row + AHEAD < count) {
                const char* next = reinterpret_cast<const char*>(table + rows[begin + row + AHEAD] * width);
                for (int64_t byte = 0; byte < width * 4; byte += 64) __builtin_prefetch(next + byte);
            }
            const float* vector = table + rows[begin + row] * width;
            put(columns, width, here, row, vector);
            for (int64_t i = 0; i < width; ++i) block[row * out_stride + i] = vector[i];
        }
        pad(columns, width, here);
        for (int64_t a = 0; a < attention_count; ++a) {
            attend_block(attentions[a].scorer, attentions[a].slots, columns, here, sums, work);
            for (int64_t row = 0; row < here; ++row) {
                const float* vector = block + row * out_stride;
                float* interest = block + row * out_stride + (1 + 2 * a) * width;
                take(sums, width, here, row, interest);
                for (int64_t i = 0; i < width; ++i) interest[width + i] = interest[i] * vector[i];
            }
        }
        if (matches == nullptr) continue;
        float* features = block + (1 + 2 * attention_count) * width;
        for (int64_t row = 0; row < here; ++row)
            match(*matches, hashes + (begin + row) * matches->columns, features + row * out_stride);
    }
    return 1;
}
}

// Match features of a request's candidates: exact ones from the short window, hashed ones from the match sketch.
//
// The formulas stand in model/match_sketch.py, which also makes the tables that are read here: this file looks up.
// A hash of 0 is a missing value and matches nothing.

#include <cstdint>

namespace {

constexpr int FEATURES = 3;  // of a column and source: log(1 + count), seen, recency
constexpr uint8_t COUNT_BITS = 0xF0, AGE_BITS = 0x0F;

// Positions are in the newest-first window, so the first match is the newest.
void match_window(int64_t hash, const int64_t* window, int64_t rows, const float* log_counts, const float* recency,
                  float* out) {
    int64_t count = 0, first = rows;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t equal = window[row] == hash;
        const int64_t place = equal ? row : rows;
        count += equal;
        first = place < first ? place : first;
    }
    if (hash == 0) count = 0;
    out[0] = log_counts[count];
    out[1] = count ? 1.0f : 0.0f;
    out[2] = count ? recency[first] : 0.0f;
}

// The lesser count and the older age of the two cells: a collision can only raise a count and only lower an age.
void read_cells(int64_t hash, const uint8_t* tables, int64_t cells, const float* features_of_byte, float* out) {
    uint8_t read = 0;
    if (hash != 0) {
        const uint64_t bits = static_cast<uint64_t>(hash);
        const uint8_t one = tables[bits & (cells - 1)], other = tables[cells + ((bits >> 32) & (cells - 1))];
        const uint8_t count = (one < other ? one : other) & COUNT_BITS;
        const uint8_t one_age = one & AGE_BITS, other_age = other & AGE_BITS;
        read = count | (one_age > other_age ? one_age : other_age);
    }
    for (int feature = 0; feature < FEATURES; ++feature) out[feature] = features_of_byte[read * FEATURES + feature];
}

}  // namespace

extern "C" {

// hashes: [rows, columns]; window: [columns, window_rows], newest first; sketch: of each column two tables of
// cells[column] bytes; out: [rows, 2 * FEATURES * columns], out_stride floats apart: the window's features of every
// column, then the sketch's.
void lrea_match(const int64_t* hashes, int64_t rows, int64_t columns, const int64_t* window, int64_t window_rows,
                const float* log_counts, const float* recency, const uint8_t* sketch, const int64_t* cells,
                const float* features_of_byte, float* out, int64_t out_stride) {
    for (int64_t column = 0; column < columns; ++column) {
        float* from_window = out + FEATURES * column;
        float* from_sketch = from_window + FEATURES * columns;
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t hash = hashes[row * columns + column], at = row * out_stride;
            match_window(hash, window + column * window_rows, window_rows, log_counts, recency, from_window + at);
            read_cells(hash, sketch, cells[column], features_of_byte, from_sketch + at);
        }
        sketch += 2 * cells[column];
    }
}
}

// Match features of a request's candidates: exact ones from the short window, hashed ones from the match sketch.
//
// The formulas stand in model/match_sketch.py, which also makes the tables that are read here: this file looks up.
// A hash of 0 is a missing value and matches nothing.

#pragma once

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

// What a request's candidates are matched against.
struct Matches {
    const int64_t* window;  // [columns, window_rows], newest first, where `match` reads it
    int64_t window_rows, columns;
    const float *log_counts, *recency;  // by count, and by position
    const uint8_t* sketch;              // of each column two tables of cells[column] bytes
    const int64_t* cells;
    const float* features_of_byte;  // [256, FEATURES]
};

// Match features of one candidate with hashes [columns]: the window's of every column, then the sketch's.
inline void match(const Matches& with, const int64_t* hashes, float* out) {
    const uint8_t* tables = with.sketch;
    for (int64_t column = 0; column < with.columns; ++column) {
        const int64_t* window = with.window + column * with.window_rows;
        float* to = out + FEATURES * column;
        match_window(hashes[column], window, with.window_rows, with.log_counts, with.recency, to);
        read_cells(hashes[column], tables, with.cells[column], with.features_of_byte, to + FEATURES * with.columns);
        tables += 2 * with.cells[column];
    }
}

}  // namespace

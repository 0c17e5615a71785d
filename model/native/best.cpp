// The best rows of a history for every candidate, best first, the newer (first) of equals: `best.hpp`.

#include "best.hpp"

extern "C" {

// Bytes of scratch memory for one history after another of `rows` rows: a row of scores, and keys.
int64_t lrea_best_scratch(int64_t rows) { return padded(rows) * 4 + rows * 8; }

// Candidates `begin` to `end` of all. scores: [all, rows]; penalties: [all / share, rows], 0 or -inf, each for `share`
// candidates in a row, or null where all rows may be chosen. index and found: [all, count]; index is 0 where nothing is found.
void lrea_best(const float* scores, const float* penalties, int64_t begin, int64_t end, int64_t share, int64_t rows,
               int64_t count, int64_t* index, uint8_t* found, void* scratch) {
    int64_t* keys = static_cast<int64_t*>(scratch);
    float* masked = reinterpret_cast<float*>(keys + rows);
    for (int64_t each = begin; each < end; ++each) {
        const float* penalty = penalties == nullptr ? nullptr : penalties + each / share * rows;
        const int64_t collected = collect_best(scores + each * rows, penalty, rows, count, masked, keys);
        const int64_t there = std::min(count, put_in_order(keys, collected, count));
        for (int64_t place = 0; place < count; ++place) {
            index[each * count + place] = place < there ? row_of(keys[place]) : 0;
            found[each * count + place] = place < there;
        }
    }
}
}

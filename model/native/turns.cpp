// Rows that several heads choose in turns: each head's best, then each head's second best, and so on, a row counting
// once. A head's ranking is a heap, since it is walked to about count / heads places and rarely further.

#include "best.hpp"

extern "C" {

// Bytes of scratch memory: of each head keys and how many are left, by whom a row was taken last, a row of scores.
int64_t lrea_turns_scratch(int64_t rows, int64_t heads) { return (heads * (rows + 1) + rows) * 8 + padded(rows) * 4; }

// Candidates `begin` to `end` of all. scores: [all, heads, rows]; penalties: [all / share, rows], 0 or -inf, each for
// `share` candidates in a row, or null where all rows may be chosen. index and found: [all, count] in the order of
// taking; index is 0 where nothing is found.
void lrea_turns(const float* scores, const float* penalties, int64_t begin, int64_t end, int64_t share, int64_t heads,
                int64_t rows, int64_t count, int64_t* index, uint8_t* found, void* scratch) {
    int64_t* keys = static_cast<int64_t*>(scratch);  // [heads, rows]
    int64_t* left = keys + heads * rows;
    int64_t* taken_by = left + heads;
    float* masked = reinterpret_cast<float*>(taken_by + rows);
    std::fill(taken_by, taken_by + rows, -1);
    for (int64_t each = begin; each < end; ++each) {
        const float* penalty = penalties == nullptr ? nullptr : penalties + each / share * rows;
        int64_t in_all = 0;
        for (int64_t head = 0; head < heads; ++head) {
            int64_t* heap = keys + head * rows;
            left[head] = collect_best(scores + (each * heads + head) * rows, penalty, rows, count, masked, heap);
            std::make_heap(heap, heap + left[head]);
            in_all += left[head];
        }
        int64_t taken = 0;
        for (int64_t head = 0; in_all && taken < count; head = (head + 1) % heads) {
            if (!left[head]) continue;
            int64_t* heap = keys + head * rows;
            const int64_t row = row_of(heap[0]);
            std::pop_heap(heap, heap + left[head]--);
            --in_all;
            if (taken_by[row] == each) continue;
            taken_by[row] = each;
            index[each * count + taken++] = row;
        }
        std::fill(index + each * count + taken, index + (each + 1) * count, 0);
        std::fill_n(found + each * count, taken, 1);
        std::fill(found + each * count + taken, found + (each + 1) * count, 0);
    }
}
}

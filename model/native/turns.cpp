// Rows that several heads choose in turns: each head's best, then each head's second best, and so on, a row counting
// once. A head's ranking is walked to count / heads places where the heads disagree, and to `count` where they agree. So
// it is made about as long as those before were walked, and longer where it ends.

#include "best.hpp"

namespace {

// One head's ranking of the rows, best first.
struct Ranking {
    const float* scores;
    const float* penalty;
    int64_t rows, most;  // rows that are there, and that may be asked for
    int64_t* keys;
    float* masked;
    int64_t asked, length = 0, walked = 0;  // at least `asked` are in it, if there are so many

    void make() {
        length = put_in_order(keys, collect_best(scores, penalty, rows, asked, masked, keys), asked);
    }

    // -1 after the last one.
    int64_t next() {
        while (walked == length && asked < most) {
            asked = std::min(most, 2 * std::max(asked, length));  // of more equals than asked for, all may have come
            make();
        }
        return walked < length ? row_of(keys[walked++]) : -1;
    }
};

}  // namespace

extern "C" {

// Bytes of scratch memory: of each head keys and a ranking, by whom a row was taken last, a row of scores.
int64_t lrea_turns_scratch(int64_t rows, int64_t heads) {
    return (heads + 1) * rows * 8 + heads * int64_t(sizeof(Ranking)) + padded(rows) * 4;
}

// Candidates `begin` to `end` of all. scores: [all, heads, rows]; penalties: [all / share, rows], 0 or -inf, each for
// `share` candidates in a row, or null where all rows may be chosen. index and found: [all, count] in the order of
// taking; index is 0 where nothing is found.
void lrea_turns(const float* scores, const float* penalties, int64_t begin, int64_t end, int64_t share, int64_t heads,
                int64_t rows, int64_t count, int64_t* index, uint8_t* found, void* scratch) {
    int64_t* keys = static_cast<int64_t*>(scratch);  // [heads, rows]
    int64_t* taken_by = keys + heads * rows;
    Ranking* rankings = reinterpret_cast<Ranking*>(taken_by + rows);
    float* masked = reinterpret_cast<float*>(rankings + heads);
    std::fill(taken_by, taken_by + rows, -1);
    int64_t few = count / heads + 1;
    for (int64_t each = begin; each < end; ++each) {
        const float* penalty = penalties == nullptr ? nullptr : penalties + each / share * rows;
        for (int64_t head = 0; head < heads; ++head) {
            const float* of_head = scores + (each * heads + head) * rows;
            rankings[head] = {of_head, penalty, rows, count, keys + head * rows, masked, std::min(count, few)};
            rankings[head].make();
        }
        int64_t taken = 0, ended = 0;
        for (int64_t head = 0; taken < count && ended < heads; head = head + 1 < heads ? head + 1 : 0) {
            const int64_t row = rankings[head].next();
            ended = row < 0 ? ended + 1 : 0;
            if (row < 0 || taken_by[row] == each) continue;
            taken_by[row] = each;
            index[each * count + taken++] = row;
        }
        few -= few / 16;
        for (int64_t head = 0; head < heads; ++head) few = std::max(few, rankings[head].walked + 1);
        std::fill(index + each * count + taken, index + (each + 1) * count, 0);
        std::fill_n(found + each * count, taken, 1);
        std::fill(found + each * count + taken, found + (each + 1) * count, 0);
    }
}
}

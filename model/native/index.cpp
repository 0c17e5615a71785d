// From ids to rows of a vocabulary: an open hash table of 64-bit keys, each beside its row, so that a look-up is one
// cache line. A binary search through 20,000 ids took 57 us for 100 candidates between two forwards, most of it misses.
//
// A row of 0 is an empty slot: known values have rows from 2 on (model/vocabulary.py).

#include <cstdint>

namespace {

struct Slot {
    int64_t key, row;
};

inline uint64_t place_of(int64_t key, int64_t mask) {
    const uint64_t mixed = static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15ull;
    return (mixed ^ (mixed >> 32)) & static_cast<uint64_t>(mask);
}

}  // namespace

extern "C" {

// slots: mask + 1 zeroed pairs, a power of two above count; keys[i] gets the row first_row + i.
void lrea_index_build(const int64_t* keys, int64_t count, int64_t first_row, int64_t* slots, int64_t mask) {
    Slot* table = reinterpret_cast<Slot*>(slots);
    for (int64_t i = 0; i < count; ++i) {
        uint64_t place = place_of(keys[i], mask);
        while (table[place].row) place = (place + 1) & static_cast<uint64_t>(mask);
        table[place] = {keys[i], first_row + i};
    }
}

// rows[i]: the row of keys[i], or `unknown`. Returns how many are unknown.
int64_t lrea_index_find(const int64_t* keys, int64_t count, const int64_t* slots, int64_t mask, int64_t unknown,
                        int64_t* rows) {
    const Slot* table = reinterpret_cast<const Slot*>(slots);
    int64_t missed = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint64_t place = place_of(keys[i], mask);
        while (table[place].row && table[place].key != keys[i]) place = (place + 1) & static_cast<uint64_t>(mask);
        rows[i] = table[place].row ? table[place].row : unknown;
        missed += !table[place].row;
    }
    return missed;
}

// Beside that, what two tables [., width] have at those rows.
int64_t lrea_index_encode(const int64_t* keys, int64_t count, const int64_t* slots, int64_t mask, int64_t unknown,
                          const int64_t* first, int64_t first_width, const int64_t* second, int64_t second_width,
                          int64_t* rows, int64_t* first_out, int64_t* second_out) {
    const int64_t missed = lrea_index_find(keys, count, slots, mask, unknown, rows);
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < first_width; ++j) first_out[i * first_width + j] = first[rows[i] * first_width + j];
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < second_width; ++j)
            second_out[i * second_width + j] = second[rows[i] * second_width + j];
    return missed;
}
}

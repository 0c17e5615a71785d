// The rows of the MLP's first product for all candidates of a batch, in one pass over blocks of a request's candidates: the
// item's vector, each attention's interest and its product with the vector, and the match features, written where they
// are read.
//
// Step by step, each of these reads the candidates anew from wherever the caches have put them by then, and every row of
// the result is fetched once per step: for 100 candidates that took longer than the arithmetic. And request by request,
// the scoring thread would give the interpreter away and ask for it again each time, beside a busy event loop.

#include "attend.hpp"
#include "match.hpp"

namespace {

constexpr int64_t AHEAD = 8;  // rows of the table that are on their way while one is copied
constexpr int64_t MOST_ATTENTIONS = 4;

bool are_within(const int64_t* rows, int64_t count, int64_t end) {
    bool within = true;
    for (int64_t i = 0; i < count; ++i) within &= static_cast<uint64_t>(rows[i]) < static_cast<uint64_t>(end);
    return within;
}

// Slots that are given as they are, or as rows of a table [items, width], which is where `slots.keys` points then.
struct Attention {
    Slots slots;
    const int64_t* rows;  // [slots.count]; null: as they are
    int64_t items;
    Scorer scorer;
};

struct Request {
    const float* table;  // [items, width]
    int64_t items;
    const int64_t *rows, *hashes;  // [count], [count, columns]
    int64_t count;
    const Attention* attentions;
    int64_t attention_count;
    const Matches* matches;  // its window is [window_rows, columns]; null where there are none
};

bool can_be_read(const Request& request, int64_t begin, int64_t end) {
    bool within = request.attention_count <= MOST_ATTENTIONS && are_within(request.rows + begin, end - begin, request.items);
    for (int64_t a = 0; within && a < request.attention_count; ++a) {
        const Attention& attention = request.attentions[a];
        within = attention.rows == nullptr || are_within(attention.rows, attention.slots.count, attention.items);
    }
    return within;
}

// `window` by columns, newest first, as `match` reads it.
Matches by_columns(const Matches& matches, int64_t* window) {
    for (int64_t row = 0; row < matches.window_rows; ++row)
        for (int64_t column = 0; column < matches.columns; ++column)
            window[column * matches.window_rows + row] = matches.window[row * matches.columns + column];
    Matches found = matches;
    found.window = window;
    return found;
}

// The rows as slots that are keys and values at once.
Slots gathered(const Attention& attention, int64_t width, float* to) {
    for (int64_t row = 0; row < attention.slots.count; ++row) {
        const float* vector = attention.slots.keys + attention.rows[row] * width;
        for (int64_t i = 0; i < width; ++i) to[row * width + i] = vector[i];
    }
    return {to, to, attention.slots.count};
}

// Candidates `begin` to `end` of one request, the first of them to `out`.
void fill(const Request& request, int64_t begin, int64_t end, int64_t width, float* out, int64_t out_stride,
          int64_t* window, float* scratch) {
    Slots slots[MOST_ATTENTIONS];
    for (int64_t a = 0; a < request.attention_count; ++a) {
        const Attention& attention = request.attentions[a];
        slots[a] = attention.rows == nullptr ? attention.slots : gathered(attention, width, scratch);
        if (attention.rows != nullptr) scratch += slots[a].count * width;
    }
    Matches matches;
    if (request.matches != nullptr) matches = by_columns(*request.matches, window);
    float* columns = scratch;
    float* sums = columns + block_floats(width);
    float* work = sums + block_floats(width);
    for (; begin < end; begin += BLOCK, out += BLOCK * out_stride) {
        const int64_t here = end - begin < BLOCK ? end - begin : BLOCK;
        const int64_t* rows = request.rows + begin;
        for (int64_t row = 0; row < here; ++row) {
            if (begin + row + AHEAD < end) {
                const char* next = reinterpret_cast<const char*>(request.table + rows[row + AHEAD] * width);
                for (int64_t byte = 0; byte < width * 4; byte += 64) __builtin_prefetch(next + byte);
            }
            const float* vector = request.table + rows[row] * width;
            put(columns, width, here, row, vector);
            for (int64_t i = 0; i < width; ++i) out[row * out_stride + i] = vector[i];
        }
        pad(columns, width, here);
        for (int64_t a = 0; a < request.attention_count; ++a) {
            attend_block(request.attentions[a].scorer, slots[a], columns, here, sums, work);
            for (int64_t row = 0; row < here; ++row) {
                const float* vector = out + row * out_stride;
                float* interest = out + row * out_stride + (1 + 2 * a) * width;
                take(sums, width, here, row, interest);
                for (int64_t i = 0; i < width; ++i) interest[width + i] = interest[i] * vector[i];
            }
        }
        if (request.matches == nullptr) continue;
        float* features = out + (1 + 2 * request.attention_count) * width;
        for (int64_t row = 0; row < here; ++row)
            match(matches, request.hashes + (begin + row) * matches.columns, features + row * out_stride);
    }
}

}  // namespace

extern "C" {

// Whether codes [count, columns] are those that a table [items, columns] has at these rows; not for a row beyond it.
int64_t lrea_codes_are(const int64_t* table, int64_t items, const int64_t* rows, int64_t count, int64_t columns,
                       const int64_t* codes) {
    if (!are_within(rows, count, items)) return 0;
    bool equal = true;
    for (int64_t row = 0; row < count; ++row)
        for (int64_t i = 0; i < columns; ++i) equal &= codes[row * columns + i] == table[rows[row] * columns + i];
    return equal;
}

// Floats of scratch memory that `lrea_fill` wants: hashes, those of the largest window; rows, those that a request's
// attentions have as rows of a table.
int64_t lrea_fill_scratch(int64_t width, int64_t units, int64_t hashes, int64_t rows) {
    return 2 * hashes + rows * width + 2 * block_floats(width) + work_floats(width, units);
}

// Candidates `begin` to `end` of those of all requests together.
// out: [end - begin, width (1 + 2 attentions) + 2 FEATURES columns], out_stride floats apart. hashes: as given to
// `lrea_fill_scratch`. scratch: for int64, too.
// Returns 0, and does nothing, if a row is beyond its table.
int64_t lrea_fill(const Request* requests, int64_t count, int64_t begin, int64_t end, int64_t width, float* out,
                  int64_t out_stride, int64_t hashes, float* scratch) {
    // The part of each request that is asked for here.
    const auto parts = [=](auto step) {
        int64_t first = 0;
        for (int64_t i = 0; i < count && first < end; first += requests[i++].count) {
            const int64_t from = begin > first ? begin - first : 0;
            const int64_t to = end - first < requests[i].count ? end - first : requests[i].count;
            if (from < to) step(requests[i], from, to, first + from - begin);
        }
    };
    bool readable = true;
    parts([&](const Request& request, int64_t from, int64_t to, int64_t) { readable &= can_be_read(request, from, to); });
    if (!readable) return 0;
    parts([=](const Request& request, int64_t from, int64_t to, int64_t at) {
        fill(request, from, to, width, out + at * out_stride, out_stride, reinterpret_cast<int64_t*>(scratch),
             scratch + 2 * hashes);
    });
    return 1;
}
}

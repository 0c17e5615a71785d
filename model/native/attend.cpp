// One user's attention over his keys, for every candidate: what `attend.hpp` computes, a block at a time.

#include "attend.hpp"

extern "C" {

// Floats of scratch memory that `lrea_attend` wants.
int64_t lrea_scratch(int64_t width, int64_t units) { return 2 * block_floats(width) + work_floats(width, units); }

// x: [rows, width] with rows x_stride floats apart; keys, values: [count, width]; out: [rows, width], likewise spaced.
void lrea_attend(const float* x, int64_t x_stride, int64_t rows, const float* keys, const float* values, int64_t count,
                 const float* candidate, const float* key, const float* product, const float* out_weights,
                 int64_t width, int64_t units, float slope, float* out, int64_t out_stride, float* scratch) {
    const Scorer scorer{candidate, key, product, out_weights, width, units, slope};
    const Slots slots{keys, values, count};
    float* columns = scratch;
    float* sums = columns + block_floats(width);
    float* work = sums + block_floats(width);
    for (int64_t begin = 0; begin < rows; begin += BLOCK) {
        const int64_t here = rows - begin < BLOCK ? rows - begin : BLOCK;
        for (int64_t row = 0; row < here; ++row) put(columns, width, here, row, x + (begin + row) * x_stride);
        pad(columns, width, here);
        attend_block(scorer, slots, columns, here, sums, work);
        for (int64_t row = 0; row < here; ++row) take(sums, width, here, row, out + (begin + row) * out_stride);
    }
}
}

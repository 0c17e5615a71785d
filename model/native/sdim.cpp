// SDIM's two sums (model/attention/sdim.py) by what they need: a row's vector added to the sums that its hash names, and
// the 16 buckets that a candidate's hash names added up.
//
// As products with one-hot matrices they are 128 multiplications for 16 additions, and what makes those matrices (bits,
// codes, comparisons, floats) is passes over tensors larger than the history: 3 to 4 times the products' own time.
//
// A code comes from three products with the projection, made by the caller: bit i of it is whether the i-th is above 0.

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t SIGNATURES = 16, BITS = 3, BUCKETS = 1 << BITS;
constexpr int64_t TABLE = SIGNATURES * BUCKETS;  // sums or buckets of one user
// A history's rows are first added up by pairs of signatures: half the additions (250 µs for 10,000 rows became 140),
// and the 64 KB of sums at d = 32 stay in the second-level cache.
constexpr int64_t PAIRS = SIGNATURES / 2, CORNERS = BUCKETS * BUCKETS;
constexpr int64_t HASHED = 128;  // rows at a time, so that their codes stay in the first-level cache
constexpr int64_t ADDED = 256;   // rows added up apart: 10,000 equal terms in a row are off by 1e-4, and so by 4e-6

typedef float Vector __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;

template <class T> inline T load(const float* from) {
    T value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}
template <class T> inline void store(float* to, T value) { __builtin_memcpy(to, &value, sizeof value); }

// `step` at every LANES-th column with a vector of zeros, and at those left over with one zero.
template <class Step> inline void along(int64_t width, Step step) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) step(Vector{}, i);
    for (; i < width; ++i) step(0.0f, i);
}

void hash(const float* products, int64_t rows, int32_t* codes) {
    for (int64_t i = 0; i < rows * SIGNATURES; ++i) {
        const float* of = products + i * BITS;
        codes[i] = int32_t(of[0] > 0) | int32_t(of[1] > 0) << 1 | int32_t(of[2] > 0) << 2;
    }
}

// Of at most HASHED rows those that are present, each to the sum of each pair of its codes.
void add(const float* products, const float* vectors, const uint8_t* present, int64_t rows, int64_t width,
         float* sums) {
    int32_t codes[HASHED * SIGNATURES], begins[HASHED * PAIRS];
    hash(products, rows, codes);
    for (int64_t i = 0; i < rows * PAIRS; ++i) {
        const int32_t corner = codes[2 * i] * int32_t(BUCKETS) + codes[2 * i + 1];
        begins[i] = (int32_t(i % PAIRS * CORNERS) + corner) * int32_t(width);
    }
    for (int64_t row = 0; row < rows; ++row) {
        if (!present[row]) continue;
        const float* vector = vectors + row * width;
        const int32_t* begin = begins + row * PAIRS;
        along(width, [=](auto zero, int64_t i) {
            const auto value = load<decltype(zero)>(vector + i);
            for (int64_t p = 0; p < PAIRS; ++p) {
                float* sum = sums + begin[p] + i;
                store(sum, load<decltype(zero)>(sum) + value);
            }
        });
    }
}

// What is summed by pairs to the sums of both signatures, leaving zeros.
void unpair(float* sums, int64_t width, float* out) {
    for (int64_t p = 0; p < PAIRS; ++p) {
        float* of_pair = sums + p * CORNERS * width;
        float *first = out + 2 * p * BUCKETS * width, *second = first + BUCKETS * width;
        along(width, [=](auto zero, int64_t i) {
            using T = decltype(zero);
            T of_second[BUCKETS] = {};
            for (int64_t a = 0; a < BUCKETS; ++a) {
                T of_first = zero;
#pragma GCC unroll 8
                for (int64_t b = 0; b < BUCKETS; ++b) {
                    float* sum = of_pair + (a * BUCKETS + b) * width + i;
                    const T value = load<T>(sum);
                    of_first += value;
                    of_second[b] += value;
                    store(sum, zero);
                }
                store(first + a * width + i, load<T>(first + a * width + i) + of_first);
            }
            for (int64_t b = 0; b < BUCKETS; ++b)
                store(second + b * width + i, load<T>(second + b * width + i) + of_second[b]);
        });
    }
}

void mean(const float* buckets, const int32_t* codes, int64_t width, float* out) {
    int64_t begin[SIGNATURES];
    for (int64_t g = 0; g < SIGNATURES; ++g) begin[g] = (g * BUCKETS + codes[g]) * width;
    along(width, [&](auto sum, int64_t i) {
        for (int64_t g = 0; g < SIGNATURES; ++g) sum += load<decltype(sum)>(buckets + begin[g] + i);
        store(out + i, sum / float(SIGNATURES));
    });
}

}  // namespace

extern "C" {

// Floats of scratch memory that `lrea_sdim_sums` wants, all zero.
int64_t lrea_sdim_scratch(int64_t width) { return PAIRS * CORNERS * width; }

// Users `begin` to `end`. products: [users, rows, 48]; vectors: [users, rows, width]; present: [users, rows];
// sums: [users, 128, width], zeros. All contiguous.
void lrea_sdim_sums(const float* products, const float* vectors, const uint8_t* present, int64_t begin, int64_t end,
                    int64_t rows, int64_t width, float* sums, float* scratch) {
    for (int64_t user = begin; user < end; ++user)
        for (int64_t first = 0; first < rows; first += ADDED) {
            const int64_t last = std::min(first + ADDED, rows);
            for (int64_t row = first; row < last; row += HASHED) {
                const int64_t at = user * rows + row;
                add(products + at * SIGNATURES * BITS, vectors + at * width, present + at, std::min(HASHED, last - row),
                    width, scratch);
            }
            unpair(scratch, width, sums + user * TABLE * width);
        }
}

// Candidates `begin` to `end` of all users. products: [users * candidates, 48]; buckets: [users, 128, width];
// out: [users * candidates, width]. All contiguous.
void lrea_sdim_means(const float* products, const float* buckets, int64_t begin, int64_t end, int64_t candidates,
                     int64_t width, float* out) {
    int32_t codes[HASHED * SIGNATURES];
    for (int64_t first = begin; first < end; first += HASHED) {
        const int64_t last = std::min(first + HASHED, end);
        hash(products + first * SIGNATURES * BITS, last - first, codes);
        for (int64_t each = first; each < last; ++each)
            mean(buckets + each / candidates * TABLE * width, codes + (each - first) * SIGNATURES, width,
                 out + each * width);
    }
}
}

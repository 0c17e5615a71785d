// SDIM's two sums (model/attention/sdim.py) by what they need: of each row's hash 16 additions of its vector, and of each
// candidate's hash 16 rows of its user's buckets.
//
// As products with one-hot matrices they are 128 multiplications for 16 additions, and what makes those matrices (bits,
// codes, comparisons, floats) is passes over tensors larger than the history: 3 to 4 times the products' own time.
//
// A code comes from three products with the projection, made by the caller: bit i of it is whether the i-th is above 0.

#include <cstdint>

namespace {

constexpr int64_t SIGNATURES = 16, BITS = 3, BUCKETS = 1 << BITS;
constexpr int64_t TABLE = SIGNATURES * BUCKETS;  // sums or buckets of one user
constexpr int64_t BLOCK = 128;  // rows added up apart: a sum of 10,000 equal terms would be off by 1e-4, and is by 1e-6

typedef float Vector __attribute__((vector_size(64)));
typedef float Unaligned __attribute__((vector_size(64), aligned(4)));
constexpr int64_t LANES = 16;

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }

// Where in a user's table the bucket of each signature begins.
inline void places(const float* products, int32_t width, int32_t* begin) {
    for (int32_t g = 0; g < SIGNATURES; ++g) {
        const float* of = products + g * BITS;
        begin[g] = (g * int32_t(BUCKETS) + (of[0] > 0) + 2 * (of[1] > 0) + 4 * (of[2] > 0)) * width;
    }
}

void add(float* sums, const int32_t* begin, const float* vector, int64_t width) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        const Vector value = load(vector + i);
        for (int64_t g = 0; g < SIGNATURES; ++g) store(sums + begin[g] + i, load(sums + begin[g] + i) + value);
    }
    for (; i < width; ++i)
        for (int64_t g = 0; g < SIGNATURES; ++g) sums[begin[g] + i] += vector[i];
}

void mean(const float* buckets, const int32_t* begin, float* out, int64_t width) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        Vector sum = {};
        for (int64_t g = 0; g < SIGNATURES; ++g) sum += load(buckets + begin[g] + i);
        store(out + i, sum / float(SIGNATURES));
    }
    for (; i < width; ++i) {
        float sum = 0.0f;
        for (int64_t g = 0; g < SIGNATURES; ++g) sum += buckets[begin[g] + i];
        out[i] = sum / float(SIGNATURES);
    }
}

}  // namespace

extern "C" {

// Users `begin` to `end`. products: [users, rows, 48]; vectors: [users, rows, width]; present: [users, rows];
// sums: [users, 128, width], zeros; scratch: 128 * width floats. All contiguous.
void lrea_sdim_sums(const float* products, const float* vectors, const uint8_t* present, int64_t begin, int64_t end,
                    int64_t rows, int64_t width, float* sums, float* scratch) {
    int32_t at[SIGNATURES];
    for (int64_t user = begin; user < end; ++user) {
        float* total = sums + user * TABLE * width;
        for (int64_t first = 0; first < rows; first += BLOCK) {
            const int64_t last = first + BLOCK < rows ? first + BLOCK : rows;
            for (int64_t i = 0; i < TABLE * width; ++i) scratch[i] = 0.0f;
            for (int64_t row = user * rows + first; row < user * rows + last; ++row) {
                if (!present[row]) continue;
                places(products + row * SIGNATURES * BITS, int32_t(width), at);
                add(scratch, at, vectors + row * width, width);
            }
            for (int64_t i = 0; i < TABLE * width; ++i) total[i] += scratch[i];
        }
    }
}

// Candidates `begin` to `end` of all users. products: [users * candidates, 48]; buckets: [users, 128, width];
// out: [users * candidates, width]. All contiguous.
void lrea_sdim_means(const float* products, const float* buckets, int64_t begin, int64_t end, int64_t candidates,
                     int64_t width, float* out) {
    int32_t at[SIGNATURES];
    for (int64_t each = begin; each < end; ++each) {
        places(products + each * SIGNATURES * BITS, int32_t(width), at);
        mean(buckets + each / candidates * TABLE * width, at, out + each * width, width);
    }
}
}

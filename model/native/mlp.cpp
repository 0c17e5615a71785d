// The MLP of all candidates of a batch, float32: every layer of a chunk of rows before the next chunk, so that what lies
// between two layers stays in the second-level cache, and biases and LeakyReLU are applied to sums in registers.
//
//     h = LeakyReLU(x W + b)  for each layer, the first b being that of the row's user        out = h . w + c
//
// By MKL, the products alone take a tenth longer, and around them a dozen of torch's operations for each 256 rows.
//
// A layer's weights lie in panels [inputs, PANEL], zeros where it has fewer units.

#include "vectors.hpp"

#include <cstdint>
#include <utility>

namespace {

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int ROWS = 6;  // x 2 vectors: 12 of 16 registers accumulate
#else
constexpr int ROWS = 12;  // x 2 vectors: 24 of 32, on ARM too
#endif
constexpr int VECTORS = 2;
constexpr int64_t PANEL = VECTORS * LANES;
constexpr int64_t CHUNK = 10 * ROWS;  // the most rows whose hidden units are kept at a time
constexpr int64_t SKEW = 2 * LANES;   // floats: without them every row of a power of two would begin in the same cache set

int64_t padded(int64_t units) { return (units + PANEL - 1) / PANEL * PANEL; }
int64_t stride_of(int64_t units) { return padded(units) + SKEW; }

struct Layer {
    const float *panels, *bias;  // [padded / PANEL, inputs, PANEL]; [padded], the first one's null
    int64_t inputs, units;
};

// M rows by one panel. biases: of each row, at the panel's first unit.
template <int M>
void tile(const float* x, int64_t x_stride, int64_t inputs, const float* panel, const float* const* biases,
          int64_t first, float slope, float* out, int64_t out_stride) {
    Vector sum[M][VECTORS];
    for (int r = 0; r < M; ++r)
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = load(biases[r] + first + v * LANES);
    for (int64_t i = 0; i < inputs; ++i, panel += PANEL) {
        Vector weight[VECTORS];
        for (int v = 0; v < VECTORS; ++v) weight[v] = load(panel + v * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < M; ++r) {
            const Vector value = all(x[r * x_stride + i]);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) sum[r][v] += value * weight[v];
        }
    }
    for (int r = 0; r < M; ++r)
        for (int v = 0; v < VECTORS; ++v) store(out + r * out_stride + first + v * LANES, leaky(sum[r][v], slope));
}

using Tile = decltype(&tile<1>);

template <int... M>
constexpr Tile tile_of(int rows, std::integer_sequence<int, M...>) {
    constexpr Tile tiles[] = {tile<M + 1>...};
    return tiles[rows - 1];
}

// Tiles as equal as can be: one of two rows would wait for its weights.
void layer(const Layer& of, const float* x, int64_t x_stride, int64_t rows, const float* const* biases, float slope,
           float* out, int64_t out_stride) {
    const int64_t tiles = (rows + ROWS - 1) / ROWS;
    for (int64_t first = 0; first < of.units; first += PANEL)
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles;
            const Tile compute = tile_of(int(end - begin), std::make_integer_sequence<int, ROWS>{});
            compute(x + begin * x_stride, x_stride, of.inputs, of.panels + first * of.inputs, biases + begin, first, slope,
                    out + begin * out_stride, out_stride);
        }
}

float dot(const float* x, const float* weights, int64_t count) {
    Vector sum{};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sum += load(x + i) * load(weights + i);
    float total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += sum[lane];
    for (; i < count; ++i) total += x[i] * weights[i];
    return total;
}

}  // namespace

extern "C" {

// Units come in multiples of this.
int64_t lrea_mlp_panel() { return PANEL; }

// Floats of scratch memory that `lrea_mlp` wants, for the widest of its layers.
int64_t lrea_mlp_scratch(int64_t units) { return 2 * CHUNK * stride_of(units); }

// x: [rows, inputs of the first layer], x_stride floats apart. first_biases: [users, padded units of the first layer];
// ends: where each user's rows end, among `begin` to `begin + rows`. layers: at least one; last: [units of the last one].
// out: [rows].
void lrea_mlp(const float* x, int64_t x_stride, int64_t begin, int64_t rows, const float* first_biases,
              const int64_t* ends, const Layer* layers, int64_t count, const float* last, float last_bias, float slope,
              float* out, float* scratch) {
    int64_t widest = 0, user = 0;
    for (int64_t i = 0; i < count; ++i) widest = layers[i].units > widest ? layers[i].units : widest;
    const float* biases[CHUNK];
    // As equal as can be, for the same reason.
    const int64_t chunks = (rows + CHUNK - 1) / CHUNK;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t done = rows * chunk / chunks, here = rows * (chunk + 1) / chunks - done;
        for (int64_t row = 0; row < here; ++row) {
            while (begin + done + row >= ends[user]) ++user;
            biases[row] = first_biases + user * padded(layers[0].units);
        }
        const float* from = x + done * x_stride;
        int64_t from_stride = x_stride;
        for (int64_t i = 0; i < count; ++i) {
            if (i > 0)
                for (int64_t row = 0; row < here; ++row) biases[row] = layers[i].bias;
            float* to = scratch + i % 2 * CHUNK * stride_of(widest);
            layer(layers[i], from, from_stride, here, biases, slope, to, stride_of(layers[i].units));
            from = to, from_stride = stride_of(layers[i].units);
        }
        for (int64_t row = 0; row < here; ++row)
            out[done + row] = dot(from + row * from_stride, last, layers[count - 1].units) + last_bias;
    }
}
}

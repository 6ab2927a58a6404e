// Matrix products with a fixed order of reduction. See linear.py for the contract and tile.h for the micro-kernel.
#include "linear.h"
#include <omp.h>
#include <vector>

using namespace tandem;

namespace {

// Rows of W[N, K] become columns: panels [ceil(N/64)][depth/PAIR][64][PAIR].
template <typename E>
void pack_weight(const E* weight, E* packed, int64_t n, int64_t k) {
    const int64_t depth = padded_depth<E>(k), panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        const E* rows[PANEL];
        const int64_t count = std::min<int64_t>(PANEL, n - p * PANEL);
        for (int64_t c = 0; c < count; c++) rows[c] = weight + (p * PANEL + c) * k;
        pack_columns<E>(rows, count, k, packed + p * depth * PANEL);
    }
}

// What pack_weight made, back as weight[N, K].
template <typename E>
void unpack_weight(const E* packed, E* weight, int64_t n, int64_t k) {
    constexpr int64_t pair = pair_of<E>();
    const int64_t depth = padded_depth<E>(k);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; row++) {
        const E* panel = packed + row / PANEL * depth * PANEL + row % PANEL * pair;
        E* target = weight + row * k;
        int64_t i = 0;
        for (; i + pair <= k; i += pair) std::memcpy((void*)(target + i), (const void*)(panel + i * PANEL), pair * sizeof(E));
        if (i < k) target[i] = panel[i * PANEL];
    }
}

// Rows of X[T, N] become the depth: panels [ceil(N/64)][padded T/PAIR][64][PAIR].
template <typename E>
void pack_transposed(const E* x, int64_t stride, E* packed, int64_t t, int64_t n) {
    const int64_t depth = padded_depth<E>(t), panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        const int64_t width = std::min<int64_t>(PANEL, n - p * PANEL);
        const E* rows[PANEL];
        for (int64_t i = 0; i < t; i += PANEL) {
            const int64_t count = std::min<int64_t>(PANEL, t - i);
            for (int64_t c = 0; c < count; c++) rows[c] = x + (i + c) * stride + p * PANEL;
            pack_depth<E>(rows, count, width, packed + p * depth * PANEL + i * PANEL);
        }
    }
}

// Work is the grid of panels x row tiles, cut into equal runs, one a thread: a panel stays in its thread's cache.
template <typename Body>
void over_tiles(int64_t panels, int64_t tiles, Body body) {
    const int64_t total = panels * tiles;
#pragma omp parallel
    {
        const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        for (int64_t t = total * me / threads; t < total * (me + 1) / threads; t++) body(t / tiles, t % tiles);
    }
}

template <typename E, typename O>
void linear(const E* x, int64_t x_stride, const E* packed, const float* bias, const E* residual, O* y, int64_t m_rows,
            int64_t n_cols, int64_t depth) {
    const Product<E> product{x, x_stride, packed, m_rows, n_cols, depth, bias, residual};
    with_team([&](const Team& team) { linear_share<E, O>(product, y, team); });
}

// grad[N, K] += dy[T, N]^T x[T, K], both packed by pack_transposed.
template <typename E>
void accumulate(const E* dy, const E* x, float* grad, int64_t t, int64_t n_rows, int64_t k_cols) {
    const int64_t depth = padded_depth<E>(t);
    over_tiles((k_cols + PANEL - 1) / PANEL, (n_rows + ROWS - 1) / ROWS, [&](int64_t p, int64_t tile_index) {
        const int64_t n = tile_index * ROWS;
        const int count = int(std::min<int64_t>(ROWS, n_rows - n)), width = int(std::min<int64_t>(PANEL, k_cols - p * PANEL));
        const E* rows[ROWS];
        for (int r = 0; r < count; r++)
            rows[r] = dy + (n + r) / PANEL * depth * PANEL + (n + r) % PANEL * pair_of<E>();
        float out[ROWS * PANEL];
        tile<E>(count, rows, pair_of<E>() * PANEL, x + p * depth * PANEL, depth, out, PANEL, false);
        for (int r = 0; r < count; r++)
            for (int c = 0; c < width; c++) grad[(n + r) * k_cols + p * PANEL + c] += out[r * PANEL + c];
    });
}

}  // namespace

extern "C" {

void pack_weight_bf16(const bf16* weight, bf16* packed, int64_t n, int64_t k) { pack_weight(weight, packed, n, k); }
void pack_weight_fp32(const float* weight, float* packed, int64_t n, int64_t k) { pack_weight(weight, packed, n, k); }
void unpack_weight_bf16(const bf16* packed, bf16* weight, int64_t n, int64_t k) { unpack_weight(packed, weight, n, k); }
void unpack_weight_fp32(const float* packed, float* weight, int64_t n, int64_t k) { unpack_weight(packed, weight, n, k); }
void pack_transposed_bf16(const bf16* x, int64_t stride, bf16* packed, int64_t t, int64_t n) { pack_transposed(x, stride, packed, t, n); }
void pack_transposed_fp32(const float* x, int64_t stride, float* packed, int64_t t, int64_t n) { pack_transposed(x, stride, packed, t, n); }

void linear_bf16(const bf16* x, int64_t x_stride, const bf16* packed, const float* bias, const bf16* residual, bf16* y,
                 int64_t m, int64_t n, int64_t depth) {
    linear(x, x_stride, packed, bias, residual, y, m, n, depth);
}
void linear_bf16_fp32(const bf16* x, int64_t x_stride, const bf16* packed, const float* bias, const bf16* residual,
                      float* y, int64_t m, int64_t n, int64_t depth) {
    linear(x, x_stride, packed, bias, residual, y, m, n, depth);
}
void linear_fp32(const float* x, int64_t x_stride, const float* packed, const float* bias, const float* residual, float* y,
                 int64_t m, int64_t n, int64_t depth) {
    linear(x, x_stride, packed, bias, residual, y, m, n, depth);
}
void accumulate_bf16(const bf16* dy, const bf16* x, float* grad, int64_t t, int64_t n, int64_t k) { accumulate(dy, x, grad, t, n, k); }
void accumulate_fp32(const float* dy, const float* x, float* grad, int64_t t, int64_t n, int64_t k) { accumulate(dy, x, grad, t, n, k); }
}

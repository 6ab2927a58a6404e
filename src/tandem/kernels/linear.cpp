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

template <typename E, typename O>
void linear(const E* x, int64_t x_stride, const E* packed, const float* bias, const E* residual, O* y, int64_t m_rows,
            int64_t n_cols, int64_t depth) {
    const Product<E> product{x, x_stride, packed, m_rows, n_cols, depth, bias, residual};
    with_team([&](const Team& team) { linear_share<E, O>(product, y, team); });
}

}  // namespace

extern "C" {

void pack_weight_bf16(const bf16* weight, bf16* packed, int64_t n, int64_t k) { pack_weight(weight, packed, n, k); }
void pack_weight_fp32(const float* weight, float* packed, int64_t n, int64_t k) { pack_weight(weight, packed, n, k); }
void unpack_weight_bf16(const bf16* packed, bf16* weight, int64_t n, int64_t k) { unpack_weight(packed, weight, n, k); }
void unpack_weight_fp32(const float* packed, float* weight, int64_t n, int64_t k) { unpack_weight(packed, weight, n, k); }

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
}

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
    constexpr int64_t pair = pair_of<E>(), words = 64 / sizeof(E);  // elements of one register
    const int64_t depth = padded_depth<E>(k), panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        const E* panel = packed + p * depth * PANEL;
        E* rows = weight + p * PANEL * k;
        const int64_t count = std::min<int64_t>(PANEL, n - p * PANEL);
        int64_t first = 0;
#ifdef TANDEM_AVX512
        for (; first + words <= k; first += words)
            for (int64_t c = 0; c < count; c += 16) {
                __m512i r[16];
                for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(panel + (first + i * pair) * PANEL + c * pair);
                transpose16(r);
                for (int i = 0; i < 16 && c + i < count; i++) _mm512_storeu_si512(rows + (c + i) * k + first, r[i]);
            }
#endif
        for (int64_t i = first; i < k; i++)
            for (int64_t c = 0; c < count; c++) rows[c * k + i] = panel[i / pair * pair * PANEL + c * pair + i % pair];
    }
}

template <typename E, typename O>
void linear(const E* x, int64_t x_stride, const E* packed, const float* bias, const E* residual, const float* factor, O* y,
            int64_t m_rows, int64_t n_cols, int64_t depth) {
    const Product<E> product{x, x_stride, packed, m_rows, n_cols, depth, bias, residual, factor};
    with_team([&](const Team& team) { linear_share<E, O>(product, y, team); });
}

}  // namespace

extern "C" {

void pack_weight_bf16(const bf16* weight, bf16* packed, int64_t n, int64_t k) { pack_weight(weight, packed, n, k); }
void pack_weight_fp32(const float* weight, float* packed, int64_t n, int64_t k) { pack_weight(weight, packed, n, k); }
void unpack_weight_bf16(const bf16* packed, bf16* weight, int64_t n, int64_t k) { unpack_weight(packed, weight, n, k); }
void unpack_weight_fp32(const float* packed, float* weight, int64_t n, int64_t k) { unpack_weight(packed, weight, n, k); }

void linear_bf16(const bf16* x, int64_t x_stride, const bf16* packed, const float* bias, const bf16* residual, const float* factor,
                 bf16* y, int64_t m, int64_t n, int64_t depth) {
    linear(x, x_stride, packed, bias, residual, factor, y, m, n, depth);
}
void linear_bf16_fp32(const bf16* x, int64_t x_stride, const bf16* packed, const float* bias, const bf16* residual,
                      const float* factor, float* y, int64_t m, int64_t n, int64_t depth) {
    linear(x, x_stride, packed, bias, residual, factor, y, m, n, depth);
}
void linear_fp32(const float* x, int64_t x_stride, const float* packed, const float* bias, const float* residual, const float* factor,
                 float* y, int64_t m, int64_t n, int64_t depth) {
    linear(x, x_stride, packed, bias, residual, factor, y, m, n, depth);
}
}

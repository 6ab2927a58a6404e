// y = (x W^T) (+ bias) (+ residual) of integers of 8 bits on both sides: a team's share of it. Contract in eights.py.
//
// Sums of products of integers are exact, so neither the order of reduction, nor the instruction set, nor the rows that ride along enter:
// a row's bits are a function of its codes and the matrix alone. Codes of rows are kept with 128 added, as vpdpbusd multiplies them; what
// that adds to a sum, 128 times the sum of a column's codes, is known and taken off.
#pragma once
#include "integers.h"
#include "linear.h"
#if !defined(TANDEM_PORTABLE) && defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define TANDEM_VNNI 1
#endif

namespace tandem {

constexpr int QUAD = 4;  // inputs of a 32-bit word

struct Eights {
    const int8_t* packed;  // [ceil(columns / 64)][depth / 4][64][4], zeros beyond the matrix
    const float* scales;   // of each column, to whole panels
    const int32_t* sums;   // 128 times the sum of a column's codes
    int64_t columns, depth;  // inputs, a multiple of 4

    int64_t panels() const { return (columns + PANEL - 1) / PANEL; }
    int64_t panel_bytes() const { return depth * PANEL; }
};

// Rows of codes with 128 added, [rows, depth], and a scale each.
struct EightRows {
    uint8_t* codes;
    float* scales;
    int64_t depth;
};

// numerics.quantise.to_int8 of `count` numbers, 128 added; what lies behind them up to `depth` is 128, a zero.
template <typename E>
inline void eight_row(const E* x, int64_t count, int64_t depth, uint8_t* codes, float* scale) {
    const float amax = largest_size(x, count);
    if (!(amax < INF)) {
        std::memset(codes, 128, depth);
        *scale = std::numeric_limits<float>::quiet_NaN();
        return;
    }
    *scale = amax / 127.0f;
    const float divisor = *scale > 0 ? *scale : INF;
    int64_t i = 0;
#ifdef TANDEM_AVX512
    const __m512 wide = _mm512_set1_ps(divisor);
    const __m512i most = _mm512_set1_epi32(127), least = _mm512_set1_epi32(-127), half = _mm512_set1_epi32(128);
    for (; i + 16 <= count; i += 16) {
        const __m512i code = _mm512_cvtps_epi32(_mm512_div_ps(widen(x + i), wide));
        const __m512i inside = _mm512_add_epi32(_mm512_max_epi32(least, _mm512_min_epi32(most, code)), half);
        _mm_storeu_si128((__m128i*)(codes + i), _mm512_cvtepi32_epi8(inside));
    }
#endif
    for (; i < count; i++) codes[i] = uint8_t(int32_t(std::max(-127.0f, std::min(127.0f, std::nearbyint(to_float(x[i]) / divisor)))) + 128);
    for (; i < depth; i++) codes[i] = 128;
}

#ifdef TANDEM_VNNI
// A zero of which the compiler knows nothing: where all sums begin as one constant, gcc 12 keeps them in memory (half as fast).
inline __m512i no_sum() {
    __m512i zero = _mm512_setzero_si512();
    __asm__("" : "+v"(zero));
    return zero;
}

template <int R>
__attribute__((noipa)) void eight_rows(const uint8_t* const* rows, const int8_t* panel, int64_t depth, int32_t* out, Ahead ahead) {
    __m512i acc[R][4];
    const uint8_t* x[R];
    TANDEM_UNROLL
    for (int r = 0; r < R; r++) {
        x[r] = rows[r];
        TANDEM_UNROLL
        for (int c = 0; c < 4; c++) acc[r][c] = no_sum();
    }
    int64_t wait = ahead.next ? 1 : -1;
    for (int64_t k = 0; k < depth; k += QUAD, panel += QUAD * PANEL) {
        if (--wait == 0) _mm_prefetch(ahead.next, _MM_HINT_T1), ahead.next += 64, wait = ahead.every;
        __m512i b[4];
        TANDEM_UNROLL
        for (int c = 0; c < 4; c++) b[c] = _mm512_loadu_si512(panel + 64 * c);
        TANDEM_UNROLL
        for (int r = 0; r < R; r++) {
            int32_t four;
            std::memcpy(&four, x[r] + k, 4);
            const __m512i a = _mm512_set1_epi32(four);
            TANDEM_UNROLL
            for (int c = 0; c < 4; c++) acc[r][c] = _mm512_dpbusd_epi32(acc[r][c], a, b[c]);
        }
    }
    TANDEM_UNROLL
    for (int r = 0; r < R; r++)
        TANDEM_UNROLL
        for (int c = 0; c < 4; c++) _mm512_storeu_si512(out + r * PANEL + 16 * c, acc[r][c]);
}
#else
template <int R>
inline void eight_rows(const uint8_t* const* rows, const int8_t* panel, int64_t depth, int32_t* out, Ahead) {
    int32_t acc[R][PANEL] = {};
    for (int64_t k = 0; k < depth; k += QUAD, panel += QUAD * PANEL)
        for (int r = 0; r < R; r++) {
            const int32_t a0 = rows[r][k], a1 = rows[r][k + 1], a2 = rows[r][k + 2], a3 = rows[r][k + 3];
            for (int c = 0; c < PANEL; c++) {
                const int8_t* b = panel + QUAD * c;
                acc[r][c] += a0 * b[0] + a1 * b[1] + a2 * b[2] + a3 * b[3];
            }
        }
    std::memcpy(out, acc, sizeof acc);
}
#endif

// out[r * 64 + (0..63)]: the sums of a panel for `count` <= LANE_ROWS rows.
inline void eight_tile(int count, const uint8_t* const* rows, const int8_t* panel, int64_t depth, int32_t* out, Ahead ahead) {
    switch (count) {
        case 1: return eight_rows<1>(rows, panel, depth, out, ahead);
        case 2: return eight_rows<2>(rows, panel, depth, out, ahead);
        case 3: return eight_rows<3>(rows, panel, depth, out, ahead);
        case 4: return eight_rows<4>(rows, panel, depth, out, ahead);
        case 5: return eight_rows<5>(rows, panel, depth, out, ahead);
        default: return eight_rows<6>(rows, panel, depth, out, ahead);
    }
}

// A row of sums as fp32: sum (scale of the row x scale of the column), each product rounded.
inline void eight_values(const int32_t* sums, const Eights& w, int64_t first, float scale, float* out) {
    int64_t c = 0;
#ifdef TANDEM_AVX512
    const __m512 own = _mm512_set1_ps(scale);
    for (; c < PANEL; c += 16) {
        const __m512i exact = _mm512_sub_epi32(_mm512_loadu_si512(sums + c), _mm512_loadu_si512(w.sums + first + c));
        _mm512_storeu_ps(out + c, _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_mul_ps(own, _mm512_loadu_ps(w.scales + first + c))));
    }
#endif
    for (; c < PANEL; c++) out[c] = float(sums[c] - w.sums[first + c]) * (scale * w.scales[first + c]);
}

// Where this thread's share of a product with the first `columns` begins.
inline const int8_t* first_eights(const Eights& w, int64_t rows, int64_t columns, const Team& team) {
    const int64_t tiles = std::max<int64_t>(1, (rows + LANE_ROWS - 1) / LANE_ROWS);
    int64_t t, last;
    team.share((columns + PANEL - 1) / PANEL * tiles, t, last);
    return w.packed + t / tiles * w.panel_bytes();
}

// Panel p of the tile of rows [tile * LANE_ROWS, ...): out[r * 64 + (0..63)]; returns the number of rows. What lies at `next` (a panel's worth)
// comes from memory meanwhile: its lines are dealt out over this panel's tiles.
inline int eights_tile(const EightRows& x, int64_t all_rows, const Eights& w, int64_t p, int64_t tile_index, int64_t tiles, const int8_t* next, float* out) {
    const int64_t m = tile_index * LANE_ROWS, lines = w.panel_bytes() / 64;
    const int count = int(std::min<int64_t>(LANE_ROWS, all_rows - m));
    const uint8_t* rows[LANE_ROWS];
    for (int r = 0; r < count; r++) rows[r] = x.codes + (m + r) * x.depth;
    const Ahead ahead{next ? (const char*)next + lines * tile_index / tiles * 64 : nullptr, std::max<int64_t>(1, tiles / 4)};
    alignas(64) int32_t sums[LANE_ROWS * PANEL];
    eight_tile(count, rows, w.packed + p * w.panel_bytes(), w.depth, sums, ahead);
    for (int r = 0; r < count; r++) eight_values(sums + r * PANEL, w, p * PANEL, x.scales[m + r], out + r * PANEL);
    return count;
}

// As linear_share, of rows that are codes; `a.x` and `a.packed` are not read. `after`: what this thread reads next.
template <typename E, typename O>
void eights_share(const Product<E>& a, const EightRows& x, const Eights& w, O* y, const Team& team, const int8_t* after = nullptr) {
    const int64_t tiles = (a.rows + LANE_ROWS - 1) / LANE_ROWS;
    int64_t t, last;
    team.share(w.panels() * tiles, t, last);
    for (; t < last; t++) {
        const int64_t p = t / tiles, first = p * PANEL;
        const int width = int(std::min<int64_t>(PANEL, a.columns - first));
        alignas(64) float out[LANE_ROWS * PANEL];
        const int count = eights_tile(x, a.rows, w, p, t % tiles, tiles, (p + 1) * tiles < last ? w.packed + (p + 1) * w.panel_bytes() : after, out);
        for (int r = 0; r < count; r++) {
            const int64_t row = t % tiles * LANE_ROWS + r, at = row * a.columns + first;
            store_row<E, O>(out + r * PANEL, y + at, a.bias ? a.bias + first : nullptr, a.residual ? a.residual + at : nullptr, width, a.factor_at(row, first));
        }
    }
}

}  // namespace tandem

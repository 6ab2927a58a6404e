// The one matrix micro-kernel: R rows x 64 columns, reduced over k in order, accumulated in fp32.
//
// Every output element is a function of its own row and the packed columns alone: the order of reduction does not
// depend on how many rows ride along, so products are batch-invariant by construction.
//
// Packed columns ("panel"): 64 columns, [depth / PAIR][64][PAIR]; PAIR = 2 for bf16 (vdpbf16ps), 1 for fp32.
#pragma once
#include <cstdint>
#include <cstring>
#include <cmath>
#include <algorithm>
#include "vector.h"
#if !defined(TANDEM_PORTABLE) && defined(__AVX512F__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define TANDEM_AVX512 1
#endif

namespace tandem {

constexpr int PANEL = 64;
constexpr int ROWS = 6;  // 6 x 4 accumulators + 4 columns + 1 broadcast = 29 of 32 registers

using bf16 = uint16_t;

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) {
    uint32_t bits = uint32_t(v) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
template <typename E> inline E from_float(float v);
template <> inline float from_float<float>(float v) { return v; }
template <> inline bf16 from_float<bf16>(float v) {  // round to nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16((bits >> 16) | 0x40);
    return bf16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Memory to bring into the cache while a tile computes: one line every `every` steps of the reduction.
struct Ahead {
    const char* next = nullptr;
    int64_t every = 1;
};

template <typename E> constexpr int pair_of() { return sizeof(E) == 2 ? 2 : 1; }
template <typename E> constexpr int64_t padded_depth(int64_t depth) { return (depth + pair_of<E>() - 1) / pair_of<E>() * pair_of<E>(); }

#ifdef TANDEM_AVX512

inline __m512 widen(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)); }
inline __m512 widen(const float* p) { return _mm512_loadu_ps(p); }
inline void narrow(bf16* p, __m512 v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }
inline void narrow(float* p, __m512 v) { _mm512_storeu_ps(p, v); }

template <int R>
inline void tile_rows(const bf16* const* rows, int64_t step, const bf16* panel, int64_t depth, float* out, int64_t stride, bool add, Ahead ahead) {
    __m512 acc[R][4];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < 4; c++) acc[r][c] = add ? _mm512_loadu_ps(out + r * stride + 16 * c) : _mm512_setzero_ps();
    const int64_t pairs = depth / 2;
    int64_t wait = ahead.next ? 1 : -1;
    for (int64_t k = 0; k < pairs; k++, panel += 2 * PANEL) {
        if (--wait == 0) _mm_prefetch(ahead.next, _MM_HINT_T1), ahead.next += 64, wait = ahead.every;
        __m512bh b[4];
        for (int c = 0; c < 4; c++) b[c] = (__m512bh)_mm512_loadu_si512(panel + 32 * c);
        for (int r = 0; r < R; r++) {
            int32_t two;
            std::memcpy(&two, rows[r] + step * k, 4);
            const __m512bh a = (__m512bh)_mm512_set1_epi32(two);
            for (int c = 0; c < 4; c++) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], a, b[c]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < 4; c++) _mm512_storeu_ps(out + r * stride + 16 * c, acc[r][c]);
}

template <int R>
inline void tile_rows(const float* const* rows, int64_t step, const float* panel, int64_t depth, float* out, int64_t stride, bool add, Ahead ahead) {
    __m512 acc[R][4];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < 4; c++) acc[r][c] = add ? _mm512_loadu_ps(out + r * stride + 16 * c) : _mm512_setzero_ps();
    int64_t wait = ahead.next ? 1 : -1;
    for (int64_t k = 0; k < depth; k++, panel += PANEL) {
        if (--wait == 0) _mm_prefetch(ahead.next, _MM_HINT_T1), ahead.next += 64, wait = ahead.every;
        __m512 b[4];
        for (int c = 0; c < 4; c++) b[c] = _mm512_loadu_ps(panel + 16 * c);
        for (int r = 0; r < R; r++) {
            const __m512 a = _mm512_set1_ps(rows[r][step * k]);
            for (int c = 0; c < 4; c++) acc[r][c] = _mm512_fmadd_ps(a, b[c], acc[r][c]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < 4; c++) _mm512_storeu_ps(out + r * stride + 16 * c, acc[r][c]);
}

#else

template <int R, typename E>
inline void tile_rows(const E* const* rows, int64_t step, const E* panel, int64_t depth, float* out, int64_t stride, bool add, Ahead) {
    constexpr int pair = pair_of<E>();
    float acc[R][PANEL];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < PANEL; c++) acc[r][c] = add ? out[r * stride + c] : 0.0f;
    for (int64_t k = 0; k < depth; k += pair, panel += pair * PANEL)
        for (int r = 0; r < R; r++)
            for (int j = 0; j < pair; j++) {
                const float a = to_float(rows[r][k / pair * step + j]);
                for (int c = 0; c < PANEL; c++) acc[r][c] += a * to_float(panel[c * pair + j]);
            }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < PANEL; c++) out[r * stride + c] = acc[r][c];
}

#endif

// out[r][0..63] (+)= sum over k of rows[r][k] * panel[k][.], for `count` <= ROWS rows; depth a multiple of PAIR.
// Consecutive pairs of a row lie `step` elements apart: PAIR for a plain row, PAIR * 64 for a column of a panel.
template <typename E>
inline void tile(int count, const E* const* rows, int64_t step, const E* panel, int64_t depth, float* out, int64_t stride, bool add, Ahead ahead = {}) {
    switch (count) {
        case 1: return tile_rows<1>(rows, step, panel, depth, out, stride, add, ahead);
        case 2: return tile_rows<2>(rows, step, panel, depth, out, stride, add, ahead);
        case 3: return tile_rows<3>(rows, step, panel, depth, out, stride, add, ahead);
        case 4: return tile_rows<4>(rows, step, panel, depth, out, stride, add, ahead);
        case 5: return tile_rows<5>(rows, step, panel, depth, out, stride, add, ahead);
        default: return tile_rows<6>(rows, step, panel, depth, out, stride, add, ahead);
    }
}

#ifdef TANDEM_AVX512
// 16 x 16 block of 32-bit words: rows become columns.
inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
#endif

// `count` <= 64 rows of `width` elements at rows[i] become the columns of a panel: panel[k / PAIR][i][k % PAIR].
// Missing rows and the padding of width are zero.
template <typename E>
inline void pack_columns(const E* const* rows, int64_t count, int64_t width, E* panel) {
    constexpr int pair = pair_of<E>();
    constexpr int words = 64 / sizeof(E);  // elements of one register
    int64_t k = 0;
#ifdef TANDEM_AVX512
    for (; k + words <= width; k += words)
        for (int c = 0; c < PANEL; c += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = c + i < count ? _mm512_loadu_si512(rows[c + i] + k) : _mm512_setzero_si512();
            transpose16(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(panel + (k + i * pair) * PANEL + c * pair, r[i]);
        }
#endif
    for (; k < width; k += pair)
        for (int c = 0; c < PANEL; c++)
            for (int j = 0; j < pair; j++)
                panel[k * PANEL + c * pair + j] = (c < count && k + j < width) ? rows[c][k + j] : E(0);
}

// `count` rows of `width` <= 64 elements at rows[i] become the depth of a panel: panel[i / PAIR][c][i % PAIR].
template <typename E>
inline void pack_depth(const E* const* rows, int64_t count, int64_t width, E* panel) {
    constexpr int pair = pair_of<E>();
    int64_t i = 0;
#ifdef TANDEM_AVX512
    if (width == PANEL) {
        if constexpr (pair == 2) {
            const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
            const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
            for (; i < count; i += 2)
                for (int c = 0; c < PANEL; c += 32) {
                    const __m512i a = _mm512_loadu_si512(rows[i] + c);
                    const __m512i b = i + 1 < count ? _mm512_loadu_si512(rows[i + 1] + c) : _mm512_setzero_si512();
                    _mm512_storeu_si512(panel + i * PANEL + 2 * c, _mm512_permutex2var_epi16(a, low, b));
                    _mm512_storeu_si512(panel + i * PANEL + 2 * c + 32, _mm512_permutex2var_epi16(a, high, b));
                }
        } else {
            for (; i < count; i++) std::memcpy(panel + i * PANEL, rows[i], PANEL * sizeof(E));
        }
    }
#endif
    for (; i < count; i += pair)
        for (int c = 0; c < PANEL; c++)
            for (int j = 0; j < pair; j++)
                panel[i * PANEL + c * pair + j] = (c < width && i + j < count) ? rows[i + j][c] : E(0);
}

// 64 values rounded to E.
template <typename E>
inline void narrow_panel(const float* source, E* target) {
#ifdef TANDEM_AVX512
    for (int c = 0; c < PANEL; c += 16) narrow(target + c, _mm512_loadu_ps(source + c));
#else
    for (int c = 0; c < PANEL; c++) target[c] = from_float<E>(source[c]);
#endif
}

// In place: e^x of one value, or of 64.
inline float exp_one(float x) {
    float v[LANES];
    store(v, exp(splat(x)));
    return v[0];
}
inline void exp_panel(float* x) {
    for (int c = 0; c < PANEL; c += LANES) store(x + c, exp(load(x + c)));
}

}  // namespace tandem

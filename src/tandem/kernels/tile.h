// The one matrix micro-kernel: R rows x 64 columns, reduced over k in order, accumulated in fp32.
//
// Every output element is a function of its own row and the packed columns alone: the order of reduction does not
// depend on how many rows ride along, so products are batch-invariant by construction.
//
// Packed columns ("panel"): 64 columns, [depth / PAIR][64][PAIR]; PAIR = 2 for bf16, 1 for fp32.
//
// bf16 is multiplied by one of three: AMX (amx.h); AVX-512 BF16 (vdpbf16ps); or the lanes of vector.h, widened to fp32, with the bits of
// vdpbf16ps where no number is denormal. AMX reduces in another order: its bits are others.
#pragma once
#include <cstdint>
#include <cstring>
#include <cmath>
#include <algorithm>
#include "amx.h"
#include "vector.h"
#if !defined(TANDEM_PORTABLE) && defined(__AVX512F__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define TANDEM_AVX512 1
#endif

namespace tandem {

// Loops over what registers hold. Unrolled late, as gcc 12 does by itself, they leave the sums in memory.
#define TANDEM_UNROLL _Pragma("GCC unroll 8")

constexpr int PANEL = 64;
constexpr int LANE_ROWS = 6;  // 6 x 4 accumulators + 4 columns + 1 broadcast = 29 of 32 registers
#ifdef TANDEM_AMX
constexpr int ROWS = 2 * TILE_ROWS;
#else
constexpr int ROWS = LANE_ROWS;
#endif

using bf16 = uint16_t;

inline uint32_t bits_of(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return bits;
}

inline float of_bits(uint32_t bits) {
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return of_bits(uint32_t(v) << 16); }
template <typename E> inline E from_float(float v);
template <> inline float from_float<float>(float v) { return v; }
template <> inline bf16 from_float<bf16>(float v) {  // round to nearest even; NaN stays NaN
    const uint32_t bits = bits_of(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16((bits >> 16) | 0x40);
    return bf16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Memory to bring into the cache while a tile computes: one line every `every` steps of the reduction; and as many from `also`.
struct Ahead {
    const char* next = nullptr;
    int64_t every = 1;
    const char* also = nullptr;
};

template <typename E> constexpr int pair_of() { return sizeof(E) == 2 ? 2 : 1; }
template <typename E> constexpr int64_t padded_depth(int64_t depth) { return (depth + pair_of<E>() - 1) / pair_of<E>() * pair_of<E>(); }

#ifdef TANDEM_AVX512

inline __m512 widen(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)); }
inline __m512 widen(const float* p) { return _mm512_loadu_ps(p); }
inline void narrow(bf16* p, __m512 v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }
inline void narrow(float* p, __m512 v) { _mm512_storeu_ps(p, v); }

// Rounded to E and back, as from_float and to_float do: cvtneps_pbh flushes what is denormal.
template <typename E> inline __m512 rounded(__m512 v) {
    if constexpr (sizeof(E) == 4) return v;
    const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i kept = _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
    return _mm512_castsi512_ps(_mm512_and_si512(kept, _mm512_set1_epi32(int(0xffff0000u))));
}

template <int R, int C, int PITCH = PANEL>
inline void tile_rows(const bf16* const* rows, int64_t step, const bf16* panel, int64_t depth, float* out, int64_t stride, bool add, Ahead ahead) {
    __m512 acc[R][C];
    TANDEM_UNROLL
    for (int r = 0; r < R; r++)
        TANDEM_UNROLL
        for (int c = 0; c < C; c++) acc[r][c] = add ? _mm512_loadu_ps(out + r * stride + 16 * c) : _mm512_setzero_ps();
    const int64_t pairs = depth / 2;
    int64_t wait = ahead.next ? 1 : -1;
    for (int64_t k = 0; k < pairs; k++, panel += 2 * PITCH) {
        if (--wait == 0) {
            _mm_prefetch(ahead.next, _MM_HINT_T1), ahead.next += 64, wait = ahead.every;
            if (ahead.also) _mm_prefetch(ahead.also, _MM_HINT_T1), ahead.also += 64;
        }
        __m512bh b[C];
        TANDEM_UNROLL
        for (int c = 0; c < C; c++) b[c] = (__m512bh)_mm512_loadu_si512(panel + 32 * c);
        TANDEM_UNROLL
        for (int r = 0; r < R; r++) {
            int32_t two;
            std::memcpy(&two, rows[r] + step * k, 4);
            const __m512bh a = (__m512bh)_mm512_set1_epi32(two);
            TANDEM_UNROLL
            for (int c = 0; c < C; c++) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], a, b[c]);
        }
    }
    TANDEM_UNROLL
    for (int r = 0; r < R; r++)
        TANDEM_UNROLL
        for (int c = 0; c < C; c++) _mm512_storeu_ps(out + r * stride + 16 * c, acc[r][c]);
}

template <int R, int C, int PITCH = PANEL>
inline void tile_rows(const float* const* rows, int64_t step, const float* panel, int64_t depth, float* out, int64_t stride, bool add, Ahead ahead) {
    __m512 acc[R][C];
    TANDEM_UNROLL
    for (int r = 0; r < R; r++)
        TANDEM_UNROLL
        for (int c = 0; c < C; c++) acc[r][c] = add ? _mm512_loadu_ps(out + r * stride + 16 * c) : _mm512_setzero_ps();
    int64_t wait = ahead.next ? 1 : -1;
    for (int64_t k = 0; k < depth; k++, panel += PITCH) {
        if (--wait == 0) {
            _mm_prefetch(ahead.next, _MM_HINT_T1), ahead.next += 64, wait = ahead.every;
            if (ahead.also) _mm_prefetch(ahead.also, _MM_HINT_T1), ahead.also += 64;
        }
        __m512 b[C];
        TANDEM_UNROLL
        for (int c = 0; c < C; c++) b[c] = _mm512_loadu_ps(panel + 16 * c);
        TANDEM_UNROLL
        for (int r = 0; r < R; r++) {
            const __m512 a = _mm512_set1_ps(rows[r][step * k]);
            TANDEM_UNROLL
            for (int c = 0; c < C; c++) acc[r][c] = _mm512_fmadd_ps(a, b[c], acc[r][c]);
        }
    }
    TANDEM_UNROLL
    for (int r = 0; r < R; r++)
        TANDEM_UNROLL
        for (int c = 0; c < C; c++) _mm512_storeu_ps(out + r * stride + 16 * c, acc[r][c]);
}

#elif defined(TANDEM_LANES_AVX512) || defined(TANDEM_LANES_AVX2)

// C strips of 16 columns of R rows, `panel` and `out` at the first one. An odd input comes before its even one, as in vdpbf16ps; products
// of bf16 are exact, so a fused sum rounds as two steps would.
template <int R, int C, int PITCH>
inline void tile_strips(const bf16* const* rows, int64_t step, const bf16* panel, int64_t depth, float* out, int64_t stride, bool add) {
    Lanes acc[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) acc[r][c] = add ? load(out + r * stride + 16 * c) : splat(0.0f);
    for (int64_t k = 0; k < depth / 2; k++, panel += 2 * PITCH) {
        Words b[C];
        for (int c = 0; c < C; c++) b[c] = load((const uint32_t*)panel + 16 * c);
        for (int odd = 1; odd >= 0; odd--)
            for (int r = 0; r < R; r++) {
                const Lanes a = splat(to_float(rows[r][step * k + odd]));
                for (int c = 0; c < C; c++) acc[r][c] = fma(a, from_bits(odd ? b[c] & splat(0xffff0000u) : shift_left<16>(b[c])), acc[r][c]);
            }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out + r * stride + 16 * c, acc[r][c]);
}

template <int R, int C, int PITCH>
inline void tile_strips(const float* const* rows, int64_t step, const float* panel, int64_t depth, float* out, int64_t stride, bool add) {
    Lanes acc[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) acc[r][c] = add ? load(out + r * stride + 16 * c) : splat(0.0f);
    for (int64_t k = 0; k < depth; k++, panel += PITCH)
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) acc[r][c] = fma(splat(rows[r][step * k]), load(panel + 16 * c), acc[r][c]);
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out + r * stride + 16 * c, acc[r][c]);
}

// As many strips at once as leave the sums in registers: 24 of 32 (AVX-512), 12 of 16 (AVX2).
template <int R, int STRIPS, int PITCH = PANEL, typename E>
inline void tile_rows(const E* const* rows, int64_t step, const E* panel, int64_t depth, float* out, int64_t stride, bool add, Ahead) {
#ifdef TANDEM_LANES_AVX512
    constexpr int C = STRIPS;
#else
    constexpr int most = R == 1 ? 4 : R <= 3 ? 2 : 1, C = STRIPS % most ? 1 : most;
#endif
    for (int c = 0; c < STRIPS; c += C) tile_strips<R, C, PITCH>(rows, step, panel + c * 16 * pair_of<E>(), depth, out + 16 * c, stride, add);
}

#else

// The [PAIR][PITCH] values of one step: where they are, or as made in `target`.
template <int PITCH>
inline const float* widen_step(const float* panel, float*) { return panel; }
template <int PITCH>
inline const float* widen_step(const bf16* panel, float* target) {
    for (int j = 0; j < 2; j++) {
        uint32_t words[PITCH];
        std::memcpy(words, panel, sizeof words);
        for (int c = 0; c < PITCH; c++) words[c] = j ? words[c] & 0xffff0000u : words[c] << 16;
        std::memcpy(target + j * PITCH, words, sizeof words);
    }
    return target;
}

// Loops that the compiler makes vectors of, all strips; bf16 in the order of vdpbf16ps.
template <int R, int STRIPS, int PITCH = PANEL, typename E>
inline void tile_rows(const E* const* rows, int64_t step, const E* panel, int64_t depth, float* out, int64_t stride, bool add, Ahead) {
    constexpr int pair = pair_of<E>();
    float acc[R][PITCH], target[pair * PITCH];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < PITCH; c++) acc[r][c] = add ? out[r * stride + c] : 0.0f;
    for (int64_t k = 0; k < depth / pair; k++, panel += pair * PITCH) {
        const float* wide = widen_step<PITCH>(panel, target);
        for (int r = 0; r < R; r++)
            for (int j = pair - 1; j >= 0; j--) {
                const float a = to_float(rows[r][k * step + j]);
                for (int c = 0; c < PITCH; c++) acc[r][c] += a * wide[j * PITCH + c];
            }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < PITCH; c++) out[r * stride + c] = acc[r][c];
}

#endif

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

#ifdef TANDEM_AMX

constexpr int64_t TILE_DEPTH = TILE_BYTES / 2;  // inputs of one instruction
constexpr int64_t GATHERED = 16;                // steps of TILE_DEPTH whose rows are brought together at a time

// Up to 16 rows as tiles: that of step s at `at` + s * `advance`, `bytes` from row to row.
struct TileRows {
    const bf16* at;
    int64_t bytes, advance;
};

// `depth` <= GATHERED * TILE_DEPTH inputs from pair `first` on, beyond them zeros. Rows beyond `count` are not written: no output that
// is kept depends on them.
inline TileRows gather_tiles(int count, const bf16* const* rows, int64_t step, int64_t first, int64_t depth, bf16* target) {
    const int64_t steps = (depth + TILE_DEPTH - 1) / TILE_DEPTH, tile_size = TILE_ROWS * TILE_DEPTH;
    if (depth % TILE_DEPTH) std::memset((void*)(target + (steps - 1) * tile_size), 0, TILE_ROWS * TILE_BYTES);
    int64_t s = 0;
#ifdef TANDEM_AVX512
    bool neighbours = count == TILE_ROWS && step != 2;  // rows are columns of a panel, side by side
    for (int r = 1; r < count; r++) neighbours = neighbours && rows[r] == rows[0] + 2 * r;
    for (; neighbours && (s + 1) * TILE_DEPTH <= depth; s++) {
        __m512i words[TILE_ROWS];
        for (int j = 0; j < 16; j++) words[j] = _mm512_loadu_si512(rows[0] + step * (first + s * 16 + j));
        transpose16(words);
        for (int r = 0; r < 16; r++) _mm512_store_si512(target + s * tile_size + r * TILE_DEPTH, words[r]);
    }
#endif
    for (; s < steps; s++) {
        const int64_t pairs = std::min(TILE_DEPTH, depth - s * TILE_DEPTH) / 2;
        for (int r = 0; r < count; r++) {
            const bf16* source = rows[r] + step * (first + s * 16);
            bf16* row = target + s * tile_size + r * TILE_DEPTH;
            if (step == 2) std::memcpy((void*)row, (const void*)source, pairs * 4);
            else
                for (int64_t j = 0; j < pairs; j++) std::memcpy((void*)(row + 2 * j), (const void*)(source + step * j), 4);
        }
    }
    return {target, TILE_BYTES, tile_size};
}

// Sixteen outputs' rows: where tiles are loaded from and stored to.
struct TileSums {
    float* at;
    int64_t bytes;
};

// Step s of the panel is 16 pairs x 64 columns; the last one may be `tail`, filled up with zeros.
struct TilePanel {
    const bf16 *panel, *tail;
    int64_t whole, steps;
    const bf16* at(int64_t s) const { return s < whole ? panel + s * TILE_DEPTH * PANEL : tail; }
};

constexpr int64_t PANEL_BYTES = PANEL * 4;  // from pair to pair of a panel

struct AheadLines {  // one line every `every` pairs
    Ahead ahead;
    int64_t wait = ahead.next ? 0 : INT64_MAX / 2;
    void step() {
        for (wait -= TILE_DEPTH / 2; wait <= 0; wait += ahead.every, ahead.next += 64) {
            __builtin_prefetch(ahead.next, 0, 2);
            if (ahead.also) __builtin_prefetch(ahead.also, 0, 2), ahead.also += 64;
        }
    }
};

// 16 rows x 64 columns: four tiles of sums.
inline void tiles_one(TileRows a, TilePanel b, TileSums c, bool add, AheadLines& ahead) {
    if (add) {
        TILE_LOAD(0, c.at, c.bytes);
        TILE_LOAD(1, c.at + 16, c.bytes);
        TILE_LOAD(2, c.at + 32, c.bytes);
        TILE_LOAD(3, c.at + 48, c.bytes);
    } else {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    }
    for (int64_t s = 0; s < b.steps; s++) {
        const bf16 *x = a.at + s * a.advance, *w = b.at(s);
        ahead.step();
        TILE_LOAD(4, x, a.bytes);
        TILE_LOAD(5, w, PANEL_BYTES);
        TILE_LOAD(6, w + 32, PANEL_BYTES);
        TILE_MULTIPLY(0, 4, 5);
        TILE_MULTIPLY(1, 4, 6);
        TILE_LOAD(5, w + 64, PANEL_BYTES);
        TILE_LOAD(6, w + 96, PANEL_BYTES);
        TILE_MULTIPLY(2, 4, 5);
        TILE_MULTIPLY(3, 4, 6);
    }
    TILE_STORE(0, c.at, c.bytes);
    TILE_STORE(1, c.at + 16, c.bytes);
    TILE_STORE(2, c.at + 32, c.bytes);
    TILE_STORE(3, c.at + 48, c.bytes);
}

// 2 x 16 rows x 32 columns from column `first` on: four tiles of sums, as many loads as products.
inline void tiles_two(const TileRows* a, TilePanel b, const TileSums* c, int first, bool add, AheadLines& ahead) {
    float *top = c[0].at + first, *low = c[1].at + first;
    if (add) {
        TILE_LOAD(0, top, c[0].bytes);
        TILE_LOAD(1, top + 16, c[0].bytes);
        TILE_LOAD(2, low, c[1].bytes);
        TILE_LOAD(3, low + 16, c[1].bytes);
    } else {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    }
    for (int64_t s = 0; s < b.steps; s++) {
        const bf16* w = b.at(s) + 2 * first;
        ahead.step();
        TILE_LOAD(4, a[0].at + s * a[0].advance, a[0].bytes);
        TILE_LOAD(6, w, PANEL_BYTES);
        TILE_LOAD(7, w + 32, PANEL_BYTES);
        TILE_MULTIPLY(0, 4, 6);
        TILE_MULTIPLY(1, 4, 7);
        TILE_LOAD(5, a[1].at + s * a[1].advance, a[1].bytes);
        TILE_MULTIPLY(2, 5, 6);
        TILE_MULTIPLY(3, 5, 7);
    }
    TILE_STORE(0, top, c[0].bytes);
    TILE_STORE(1, top + 16, c[0].bytes);
    TILE_STORE(2, low, c[1].bytes);
    TILE_STORE(3, low + 16, c[1].bytes);
}

// Every element is reduced 32 inputs at a time from the first one, whatever `count` is; where sums pass through memory they keep their
// bits. Not inlined: the compiler takes tile instructions to touch no memory, and only sees the fences in this frame.
__attribute__((noinline)) static void tile_amx(int count, const bf16* const* rows, int64_t step, const bf16* panel, int64_t depth, float* out,
                                               int64_t stride, bool add, Ahead lines) {
    const Tiles configured;
    alignas(64) bf16 gathered[2][GATHERED * TILE_ROWS * TILE_DEPTH], tail[TILE_DEPTH * PANEL];
    alignas(64) float partial[TILE_ROWS * PANEL];
    const int halves = count > TILE_ROWS ? 2 : 1, last = count - (halves - 1) * TILE_ROWS;
    AheadLines ahead{lines}, nothing{};
    TileSums c[2];
    for (int h = 0; h < halves; h++) c[h] = {out + h * TILE_ROWS * stride, stride * 4};
    if (last < TILE_ROWS) {
        c[halves - 1] = {partial, PANEL * 4};
        for (int r = 0; add && r < last; r++) std::memcpy(partial + r * PANEL, out + ((halves - 1) * TILE_ROWS + r) * stride, PANEL * 4);
    }
    for (int64_t k = 0; k == 0 || k < depth; k += GATHERED * TILE_DEPTH) {
        const int64_t some = std::min(GATHERED * TILE_DEPTH, depth - k), whole = some / TILE_DEPTH;
        const TilePanel b{panel + k * PANEL, tail, whole, (some + TILE_DEPTH - 1) / TILE_DEPTH};
        if (b.steps > whole) {
            const int64_t size = some % TILE_DEPTH * PANEL;
            std::memcpy((void*)tail, (const void*)(b.panel + whole * TILE_DEPTH * PANEL), size * 2);
            std::memset((void*)(tail + size), 0, sizeof tail - size * 2);
        }
        TileRows a[2];
        for (int h = 0; h < halves; h++) {
            const bf16* const* own = rows + h * TILE_ROWS;
            const int rows_here = h + 1 < halves ? TILE_ROWS : last;
            bool even = rows_here == TILE_ROWS && step == 2 && b.steps == whole;
            for (int r = 2; even && r < TILE_ROWS; r++) even = own[r] - own[r - 1] == own[1] - own[0];
            if (even) a[h] = {own[0] + k, (own[1] - own[0]) * 2, TILE_DEPTH};
            else a[h] = gather_tiles(rows_here, own, step, k / 2, some, gathered[h]);
        }
        __asm__ volatile("" ::"r"(gathered), "r"(tail), "r"(partial), "r"(panel), "r"(out), "r"(rows) : "memory");
        if (halves == 1) tiles_one(a[0], b, c[0], add || k > 0, ahead);
        else tiles_two(a, b, c, 0, add || k > 0, ahead), tiles_two(a, b, c, 32, add || k > 0, nothing);
        __asm__ volatile("" ::: "memory");
    }
    for (int r = 0; last < TILE_ROWS && r < last; r++)
        std::memcpy(out + ((halves - 1) * TILE_ROWS + r) * stride, partial + r * PANEL, PANEL * 4);
}

#endif

template <int STRIPS, typename E>
inline void tile_of(int count, const E* const* rows, int64_t step, const E* panel, int64_t depth, float* out, int64_t stride, bool add, Ahead ahead) {
    switch (count) {
        case 1: return tile_rows<1, STRIPS>(rows, step, panel, depth, out, stride, add, ahead);
        case 2: return tile_rows<2, STRIPS>(rows, step, panel, depth, out, stride, add, ahead);
        case 3: return tile_rows<3, STRIPS>(rows, step, panel, depth, out, stride, add, ahead);
        case 4: return tile_rows<4, STRIPS>(rows, step, panel, depth, out, stride, add, ahead);
        case 5: return tile_rows<5, STRIPS>(rows, step, panel, depth, out, stride, add, ahead);
        default: return tile_rows<6, STRIPS>(rows, step, panel, depth, out, stride, add, ahead);
    }
}

// out[r][0..63] (+)= sum over k of rows[r][k] * panel[k][.], for `count` <= ROWS rows; depth a multiple of PAIR.
// Consecutive pairs of a row lie `step` elements apart: PAIR for a plain row, PAIR * 64 for a column of a panel.
// Of the columns from `width` on nothing is promised: an adapter's ranks take a strip or two of the four.
template <typename E>
inline void tile(int count, const E* const* rows, int64_t step, const E* panel, int64_t depth, float* out, int64_t stride, bool add, Ahead ahead = {}, int64_t width = PANEL) {
#ifdef TANDEM_AMX
    if constexpr (pair_of<E>() == 2)
        if (AMX_READY) return tile_amx(count, rows, step, panel, depth, out, stride, add, ahead);
    for (; count > LANE_ROWS; count -= LANE_ROWS, rows += LANE_ROWS, out += LANE_ROWS * stride, ahead = {})
        tile_rows<LANE_ROWS, 4>(rows, step, panel, depth, out, stride, add, ahead);
#endif
    if (width <= 16) return tile_of<1>(count, rows, step, panel, depth, out, stride, add, ahead);
    if (width <= 32) return tile_of<2>(count, rows, step, panel, depth, out, stride, add, ahead);
    tile_of<4>(count, rows, step, panel, depth, out, stride, add, ahead);
}

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

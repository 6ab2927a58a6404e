// y = x W^T (+ bias) (+ residual) over columns kept as codes of 4 or 8 bits: a team's share of it, and the panels one at a time.
//
// A value is bf16(fp32(scale) * code + fp32(minimum)), the product and the sum rounded to fp32 each, and the products are those of
// linear.h with these values, bit for bit: a value depends on nothing but its code, and the order of reduction is tile.h's.
// Few rows take the values from codes in registers; more rows, and the matrix unit, share panels of values in a thread's own scratch.
//
// Panels of 64 columns follow one another. In a panel, for each group of inputs: 64 scales, 64 minima where there are any, then for
// every 8 inputs 4 strips of 16 columns. 4 bits: 16 words of 32 bits, whose nibble 2 p + h of word 2 c + j is column 8 h + c,
// input 2 p + j; it stands for itself where there is a minimum, else for itself - 8. 8 bits: [4 pairs p][16 columns][2 inputs j].
#pragma once
#include <vector>
#include "linear.h"
#if defined(TANDEM_AVX512) && !defined(TANDEM_AMX)
#define TANDEM_FEW_ROWS 1  // where few rows' products are vdpbf16ps's
#endif

namespace tandem {

struct Codes {
    const uint8_t* packed;
    int64_t columns, depth, group;  // depth and group are multiples of 8; the last group may be shorter
    int64_t bits;                   // 4 or 8
    int64_t half;                   // scales and minima are fp16, so that scale * code is exact in fp32; else fp32
    int64_t minimum;                // with minima; only in fp16 and 4 bits
    int64_t normal;                 // no value is subnormal, infinite or NaN, so vector instructions round it as from_float does

    int64_t scale_bytes() const { return PANEL * (half ? 2 : 4); }
    int64_t header_bytes() const { return scale_bytes() * (minimum ? 2 : 1); }
    int64_t panel_bytes() const { return (depth + group - 1) / group * header_bytes() + depth * PANEL * bits / 8; }
    int64_t panels() const { return (columns + PANEL - 1) / PANEL; }
};

inline float half_to_float(uint16_t v) {
    const uint32_t sign = uint32_t(v & 0x8000) << 16, exponent = v >> 10 & 31, fraction = v & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(fraction) * 0x1p-24f;
    const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline float scale_at(const Codes& w, const uint8_t* scales, int64_t column) {
    if (w.half) {
        uint16_t v;
        std::memcpy(&v, scales + 2 * column, 2);
        return half_to_float(v);
    }
    float v;
    std::memcpy(&v, scales + 4 * column, 4);
    return v;
}

// Byte and shift of the code of (column of the panel, input of the group) among the group's codes.
inline int64_t code_byte(const Codes& w, int64_t column, int64_t input, int& shift) {
    const int64_t strip = column / 16, c = column % 16, p = input % 8 / 2, j = input % 2;
    shift = 0;
    if (w.bits == 8) return (input / 8 * 4 + strip) * 128 + p * 32 + c * 2 + j;
    const int64_t nibble = 2 * p + c / 8;
    shift = int(nibble % 2 * 4);
    return (input / 8 * 4 + strip) * 64 + (c % 8 * 2 + j) * 4 + nibble / 2;
}

constexpr uint64_t EIGHT_MORE = 0x0808080808080808;  // what nibbles of codes without minima have more

// 8 inputs of columns c and c + 8 of a strip as two words; codes of 4 bits, symmetric ones moved up by 8.
inline void pack_nibbles(const int8_t* low, const int8_t* high, uint64_t offset, uint8_t* words) {
    uint64_t a = 0, b = 0;
    if (low) std::memcpy(&a, low, 8);
    if (high) std::memcpy(&b, high, 8);
    constexpr uint64_t NIBBLES = 0x0f0f0f0f0f0f0f0f;
    const uint64_t both = ((a ^ offset) & NIBBLES) | ((b ^ offset) & NIBBLES) << 4;
    for (int p = 0; p < 4; p++)
        for (int j = 0; j < 2; j++) words[4 * j + p] = uint8_t(both >> (16 * p + 8 * j));
}

// A group's codes of a panel: `column(c)` is where those of column c lie, or null.
template <typename Column>
inline void pack_fours(Column column, int64_t inputs, uint64_t offset, uint8_t* at) {
    for (int64_t k = 0; k < inputs; k += 8)
        for (int64_t strip = 0; strip < 4; strip++)
            for (int64_t c = 16 * strip; c < 16 * strip + 8; c++, at += 8) {
                const int8_t *low = column(c), *high = column(c + 8);
                pack_nibbles(low ? low + k : low, high ? high + k : high, offset, at);
            }
}

inline float value_at(const Codes& w, const uint8_t* scales, int64_t column, int64_t input) {
    int shift;
    const uint8_t byte = scales[w.header_bytes() + code_byte(w, column, input, shift)];
    const int code = w.bits == 8 ? int8_t(byte) : (byte >> shift & 15) - (w.minimum ? 0 : 8);
    const float product = scale_at(w, scales, column) * float(code);
    return w.minimum ? product + scale_at(w, scales + w.scale_bytes(), column) : product;
}

#ifdef TANDEM_AVX512

template <int BITS, bool HALF, bool MINIMUM> struct Form {};

// Every value of C strips of a panel, in order of inputs: use(input, strip, 32 values [16 columns][2 inputs]). `strips` is the
// panel, at its first strip's scales; the line `ahead` bytes on is fetched with each line of codes.
template <int C, int BITS, bool HALF, bool MINIMUM, typename Use>
inline __attribute__((always_inline)) void each_value(Form<BITS, HALF, MINIMUM>, const uint8_t* panel, int64_t first, int64_t depth, int64_t group, int64_t ahead, Use use) {
    constexpr int64_t SCALE = HALF ? 2 : 4, HEADER = PANEL * SCALE * (MINIMUM ? 2 : 1), STRIP = 16 * BITS;
    const __m512i twice_low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i twice_high = _mm512_add_epi32(twice_low, _mm512_set1_epi32(8));
    const __m512 zero_to_15 = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 numbers = MINIMUM ? zero_to_15 : _mm512_sub_ps(zero_to_15, _mm512_set1_ps(8));
    const auto scales = [](const uint8_t* p) {
        if constexpr (HALF) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
        else return _mm512_loadu_ps((const float*)p);
    };
    for (int64_t g = 0; g < depth; g += group) {
        const int64_t count = std::min(group, depth - g);
        __m512 scale[C][2], minimum[C][2];
        for (int c = 0; c < C; c++) {
            const uint8_t* at = panel + (first + c) * 16 * SCALE;
            _mm_prefetch((const char*)at + ahead, _MM_HINT_T0);
            if constexpr (MINIMUM) _mm_prefetch((const char*)at + PANEL * SCALE + ahead, _MM_HINT_T0);
            const __m512 s = scales(at);
            scale[c][0] = _mm512_permutexvar_ps(twice_low, s), scale[c][1] = _mm512_permutexvar_ps(twice_high, s);
            if constexpr (MINIMUM) {
                const __m512 m = scales(at + PANEL * SCALE);
                minimum[c][0] = _mm512_permutexvar_ps(twice_low, m), minimum[c][1] = _mm512_permutexvar_ps(twice_high, m);
            }
        }
        panel += HEADER;
        for (int64_t k = 0; k < count; k += 8, panel += 4 * STRIP) {
            const uint8_t* codes = panel + first * STRIP;
            __m512i words[C];
            for (int c = 0; c < C; c++) {
                for (int line = 0; line < STRIP; line += 64) _mm_prefetch((const char*)codes + c * STRIP + line + ahead, _MM_HINT_T0);
                if constexpr (BITS == 4) words[c] = _mm512_loadu_si512(codes + c * STRIP);
            }
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++)
#pragma GCC unroll 4
                for (int c = 0; c < C; c++) {
                    __m512 v[2];
#pragma GCC unroll 2
                    for (int h = 0; h < 2; h++) {
                        if constexpr (BITS == 4) {
                            v[h] = _mm512_permutexvar_ps(_mm512_srli_epi32(words[c], 8 * p + 4 * h), numbers);
                        } else {
                            v[h] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(codes + c * STRIP + p * 32 + h * 16))));
                        }
                        // The product is exact, so the fused form rounds as often as the two steps.
                        v[h] = MINIMUM ? _mm512_fmadd_ps(v[h], scale[c][h], minimum[c][h]) : _mm512_mul_ps(v[h], scale[c][h]);
                    }
                    use(g + k + 2 * p, c, _mm512_cvtne2ps_pbh(v[1], v[0]));
                }
        }
    }
}

#ifdef TANDEM_FEW_ROWS

// out[r][0 .. 16 C) = the products of R rows with C strips.
template <int R, int C, typename F>
inline void strips_of_rows(F form, const Codes& w, const bf16* const* rows, const uint8_t* panel, int64_t first, int64_t ahead, float* out, int64_t stride) {
    __m512 acc[R][C];
    __m512bh x[R];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) acc[r][c] = _mm512_setzero_ps();
    each_value<C>(form, panel, first, w.depth, w.group, ahead, [&](int64_t k, int c, __m512bh values) __attribute__((always_inline)) {
        for (int r = 0; r < R; r++) {
            if (c == 0) {
                int32_t two;
                std::memcpy(&two, rows[r] + k, 4);
                x[r] = (__m512bh)_mm512_set1_epi32(two);
            }
            acc[r][c] = _mm512_dpbf16_ps(acc[r][c], x[r], values);
        }
    });
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) _mm512_storeu_ps(out + r * stride + 16 * c, acc[r][c]);
}

// Four strips at once, or two where their sums would leave no registers for scales (measured: from 5 rows).
template <int R, typename F>
inline void few_rows(F form, const Codes& w, const bf16* const* rows, const uint8_t* panel, int64_t first, int strips, int64_t ahead, float* out, int64_t stride) {
    if constexpr (R <= 4)
        if (strips == 4) return strips_of_rows<R, 4>(form, w, rows, panel, first, ahead, out, stride);
    for (int s = 0; s < strips; s += 2) strips_of_rows<R, 2>(form, w, rows, panel, first + s, ahead, out + 16 * s, stride);
}

#endif

template <typename Call>
inline void with_form(const Codes& w, Call call) {
    if (w.bits == 8) return w.half ? call(Form<8, true, false>{}) : call(Form<8, false, false>{});
    if (w.minimum) return call(Form<4, true, true>{});
    return w.half ? call(Form<4, true, false>{}) : call(Form<4, false, false>{});
}

#endif

// The values of a panel as tile.h packs them: [depth / 2][64][2]. `next` as in codes_tile.
inline void dequantise_panel(const Codes& w, int64_t p, bf16* values, const uint8_t* next = nullptr) {
    const uint8_t* group = w.packed + p * w.panel_bytes();
    (void)next;
#ifdef TANDEM_AVX512
    if (w.normal)
        return with_form(w, [&](auto form) {
            each_value<4>(form, group, 0, w.depth, w.group, next ? next - group : 0, [&](int64_t k, int c, __m512bh v) __attribute__((always_inline)) {
                _mm512_storeu_si512(values + k * PANEL + 32 * c, (__m512i)v);
            });
        });
#endif
    for (int64_t g = 0; g < w.depth; g += w.group) {
        const int64_t count = std::min(w.group, w.depth - g);
        for (int64_t k = 0; k < count; k++)
            for (int64_t c = 0; c < PANEL; c++) values[((g + k) / 2 * PANEL + c) * 2 + k % 2] = from_float<bf16>(value_at(w, group, c, k));
        group += w.header_bytes() + count * PANEL * w.bits / 8;
    }
}

// Whether the products of so many rows take values in registers: beyond LANE_ROWS a value would be made more than once.
inline bool takes_few(const Codes& w, int64_t rows) {
#ifdef TANDEM_FEW_ROWS
    return w.normal && rows > 0 && rows <= LANE_ROWS;
#else
    return (void)w, (void)rows, false;
#endif
}

// Where takes_few: out[r * stride + (0 .. 16 strips)] for every row and 2 or 4 strips of panel p, the first one 0 or 2. With `next`, the
// panel there comes from memory meanwhile.
inline void codes_tile(const Product<bf16>& a, const Codes& w, int64_t p, int first, int strips, const uint8_t* next, float* out, int64_t stride = PANEL) {
#ifdef TANDEM_FEW_ROWS
    const bf16* rows[LANE_ROWS];
    for (int r = 0; r < a.rows; r++) rows[r] = a.x + r * a.stride;
    const uint8_t* panel = w.packed + p * w.panel_bytes();
    const int64_t ahead = next ? next - panel : 0;
    with_form(w, [&](auto form) {
        switch (a.rows) {
            case 1: return few_rows<1>(form, w, rows, panel, first, strips, ahead, out, stride);
            case 2: return few_rows<2>(form, w, rows, panel, first, strips, ahead, out, stride);
            case 3: return few_rows<3>(form, w, rows, panel, first, strips, ahead, out, stride);
            case 4: return few_rows<4>(form, w, rows, panel, first, strips, ahead, out, stride);
            case 5: return few_rows<5>(form, w, rows, panel, first, strips, ahead, out, stride);
            default: return few_rows<6>(form, w, rows, panel, first, strips, ahead, out, stride);
        }
    });
#else
    (void)a, (void)w, (void)p, (void)first, (void)strips, (void)next, (void)out, (void)stride;
#endif
}

// Where this thread's share of a product begins: what to bring into the cache before it.
inline const uint8_t* first_codes(const Codes& w, int64_t rows, const Team& team) {
    const bool few = takes_few(w, rows);
    const int64_t parts = few ? 2 : std::max<int64_t>(1, (rows + ROWS - 1) / ROWS);
    int64_t t, last;
    team.share(few ? (w.columns + 31) / 32 : w.panels() * parts, t, last);
    return w.packed + t / parts * w.panel_bytes();
}

// As linear_share; `a.packed` is not read. `after`: what this thread reads next.
template <typename O>
void codes_share(const Product<bf16>& a, const Codes& w, O* y, const Team& team, const uint8_t* after = nullptr) {
    const auto store = [&](float* out, int64_t row, int64_t first, int64_t width) {
        const int64_t at = row * a.columns + first;
        store_row<bf16, O>(out, y + at, a.bias ? a.bias + first : nullptr, a.residual ? a.residual + at : nullptr, int(width), a.factor_at(row, first));
    };
    if (takes_few(w, a.rows)) {  // halves of panels, so that few panels are shared evenly
        int64_t h, last;
        team.share((a.columns + 31) / 32, h, last);
        while (h < last) {
            const int64_t p = h / 2, first = h * 32;
            const int halves = h % 2 == 0 && h + 1 < last ? 2 : 1;
            float out[LANE_ROWS * PANEL];
            codes_tile(a, w, p, int(h % 2 * 2), 2 * halves, h + halves < last ? w.packed + (p + 1) * w.panel_bytes() : after, out);
            for (int64_t r = 0; r < a.rows; r++) store(out + r * PANEL, r, first, std::min<int64_t>(32 * halves, a.columns - first));
            h += halves;
        }
        return;
    }
    const int64_t tiles = (a.rows + ROWS - 1) / ROWS;
    thread_local std::vector<bf16> values;
    values.resize(std::max<size_t>(values.size(), w.depth * PANEL));
    Product<bf16> one = a;
    one.packed = values.data();
    one.columns = PANEL;
    int64_t t, last;
    team.share(w.panels() * tiles, t, last);
    const Tiles configured;
    for (int64_t have = -1; t < last; t++) {
        const int64_t p = t / tiles, first = p * PANEL;
        if (p != have) dequantise_panel(w, have = p, values.data(), (p + 1) * tiles < last ? w.packed + (p + 1) * w.panel_bytes() : after);
        float out[ROWS * PANEL];
        const int count = product_tile<bf16>(one, 0, t % tiles, tiles, nullptr, out);
        for (int r = 0; r < count; r++) store(out + r * PANEL, t % tiles * ROWS + r, first, std::min<int64_t>(PANEL, a.columns - first));
    }
}

}  // namespace tandem

// y = (x W^T) (+ bias) (+ residual) of codes of 4 bits in groups and rows of 8 bits: a team's share of it. Contract in fours.py.
//
// W lies as codes.h packs it: by 32-bit words, the low nibbles of a strip are inputs j, j + 2, j + 4, j + 6 of its columns 0 to 7 (word
// 2 c + j), the high ones those of columns 8 to 15. So rows keep each 8 inputs in the order 0 2 4 6 1 3 5 7, and vpdpbusd multiplies the
// nibbles as they are by 64 bits of a row. Where there is no minimum a nibble is a code + 8: sums begin at -8 times the row's own sum.
//
// Sums of products within a group are exact; groups are added in order, by fp32 products and sums that are rounded one by one.
#pragma once
#include "codes.h"
#include "eights.h"

namespace tandem {

constexpr int64_t OCTET = 8;  // inputs of a word of nibbles

// Rows of codes in the order above, [rows, depth]; a scale each; and of each row and group what sums begin at (a word, and 0), or with minima fp32(sum of codes).
struct FourRows {
    uint8_t* codes;
    float* scales;
    int32_t* starts;  // [rows, groups, 2]
    int64_t depth, groups;
};

inline int64_t groups_of(const Codes& w) { return (w.depth + w.group - 1) / w.group; }

// numerics.quantise.to_int8 of `count` numbers, of whose group sums are made; what lies behind them up to the depth is 0.
template <typename E>
inline void four_row(const E* x, int64_t count, const Codes& w, uint8_t* codes, float* scale, int32_t* starts) {
    eight_row(x, count, w.depth, codes, scale);
    for (int64_t g = 0; g < w.depth; g += w.group, starts += 2) {
        const int64_t end = std::min(w.depth, g + w.group);
        int64_t sum = -128 * (end - g), k = g;
#ifdef TANDEM_VNNI
        const __m512i order = _mm512_set_epi64(0x0f0d0b090e0c0a08, 0x0705030106040200, 0x0f0d0b090e0c0a08, 0x0705030106040200, 0x0f0d0b090e0c0a08,
                                               0x0705030106040200, 0x0f0d0b090e0c0a08, 0x0705030106040200);
        __m512i total = _mm512_setzero_si512();
        for (; k < end; k += 64) {
            const __mmask64 inside = end - k < 64 ? (uint64_t(1) << (end - k)) - 1 : ~uint64_t(0);
            const __m512i own = _mm512_maskz_loadu_epi8(inside, codes + k);
            total = _mm512_add_epi64(total, _mm512_sad_epu8(own, _mm512_setzero_si512()));
            _mm512_mask_storeu_epi8(codes + k, inside, _mm512_shuffle_epi8(_mm512_xor_si512(own, _mm512_set1_epi8(int8_t(0x80))), order));
        }
        sum += _mm512_reduce_add_epi64(total);
#endif
        for (; k < end; k += OCTET) {
            uint8_t own[OCTET];
            std::memcpy(own, codes + k, OCTET);
            for (int i = 0; i < OCTET; i++) sum += own[i], codes[k + i % 2 * 4 + i / 2] = own[i] ^ 0x80;
        }
        const float wide = float(sum);
        starts[0] = int32_t(-8 * sum), starts[1] = 0;
        if (w.minimum) std::memcpy(starts, &wide, 4);
    }
}

// R rows of a tile: what they are, and how much is fetched in each group.
struct FourTile {
    const uint8_t* rows[LANE_ROWS];
    const int32_t* starts[LANE_ROWS];
    float scales[LANE_ROWS];
    const char* next;  // may be null
    int64_t lines;
};

#ifdef TANDEM_VNNI
// out[r * 64 + (0 .. 16 C)]: the products of R rows with strips [first, first + C) of a panel.
template <int R, int C, bool HALF, bool MINIMUM>
__attribute__((noipa)) void four_strips(const FourTile& t, const uint8_t* panel, int first, int64_t depth, int64_t group, float* out) {
    constexpr int64_t SCALE = HALF ? 2 : 4, SCALES = PANEL * SCALE, HEADER = SCALES * (MINIMUM ? 2 : 1), STRIP = 64;
    const __m512i nibble = _mm512_set1_epi8(15);
    // Pairs of lanes become the sums of columns 0 1 8 9, 2 3 10 11, ...
    const __m512i columns = _mm512_set_epi32(15, 14, 7, 6, 13, 12, 5, 4, 11, 10, 3, 2, 9, 8, 1, 0);
    const __m512i places = _mm512_set_epi32(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0);
    const auto of_columns = [&](const uint8_t* p) __attribute__((always_inline)) {
        if constexpr (HALF) return _mm512_permutexvar_ps(columns, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
        else return _mm512_permutexvar_ps(columns, _mm512_loadu_ps((const float*)p));
    };
    const uint8_t* x[R];
    TANDEM_UNROLL
    for (int r = 0; r < R; r++) {
        x[r] = t.rows[r];
        TANDEM_UNROLL
        for (int c = 0; c < C; c++) _mm512_storeu_ps(out + r * PANEL + 16 * c, _mm512_setzero_ps());
    }
    const char* next = t.next;
    for (int64_t g = 0, number = 0; g < depth; g += group, number++) {
        __asm__ volatile("" : : : "memory");  // totals stay in memory: gcc 12 would keep them there and in registers
        const int64_t end = std::min(depth, g + group);
        const uint8_t* header = panel + first * 16 * SCALE;
        if (next)
            for (int64_t line = 0; line < t.lines; line++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
        __m512i acc[R][C][2];
        TANDEM_UNROLL
        for (int r = 0; r < R; r++) {
            int64_t two = 0;
            if constexpr (!MINIMUM) std::memcpy(&two, t.starts[r] + 2 * number, 8);
            TANDEM_UNROLL
            for (int c = 0; c < C; c++)
                TANDEM_UNROLL
                for (int h = 0; h < 2; h++) acc[r][c][h] = MINIMUM ? no_sum() : _mm512_set1_epi64(two);
        }
        const uint8_t* codes = panel + HEADER + first * STRIP;
        for (int64_t k = g; k < end; k += OCTET, codes += 4 * STRIP) {
            __m512i w[C][2];
            TANDEM_UNROLL
            for (int c = 0; c < C; c++) {
                const __m512i both = _mm512_loadu_si512(codes + c * STRIP);
                w[c][0] = _mm512_and_si512(both, nibble), w[c][1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
            }
            TANDEM_UNROLL
            for (int r = 0; r < R; r++) {
                int64_t eight;
                std::memcpy(&eight, x[r] + k, 8);
                const __m512i own = _mm512_set1_epi64(eight);
                TANDEM_UNROLL
                for (int c = 0; c < C; c++)
                    TANDEM_UNROLL
                    for (int h = 0; h < 2; h++) acc[r][c][h] = _mm512_dpbusd_epi32(acc[r][c][h], w[c][h], own);
            }
        }
        panel += HEADER + (end - g) * (4 * STRIP / OCTET);
        TANDEM_UNROLL
        for (int c = 0; c < C; c++) {
            const __m512 scale = of_columns(header + c * 16 * SCALE), minimum = MINIMUM ? of_columns(header + SCALES + c * 16 * SCALE) : scale;
            TANDEM_UNROLL
            for (int r = 0; r < R; r++) {
                const __m512 low = _mm512_castsi512_ps(acc[r][c][0]), high = _mm512_castsi512_ps(acc[r][c][1]);
                const __m512i even = _mm512_castps_si512(_mm512_shuffle_ps(low, high, 0x88)), odd = _mm512_castps_si512(_mm512_shuffle_ps(low, high, 0xdd));
                const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)), scale);
                float* at = out + r * PANEL + 16 * c;
                __m512 total = _mm512_add_ps(_mm512_loadu_ps(at), sum);
                if constexpr (MINIMUM) {
                    float wide;
                    std::memcpy(&wide, t.starts[r] + 2 * number, 4);
                    total = _mm512_add_ps(total, _mm512_mul_ps(_mm512_set1_ps(wide), minimum));
                }
                _mm512_storeu_ps(at, total);
            }
        }
    }
    TANDEM_UNROLL
    for (int r = 0; r < R; r++)
        TANDEM_UNROLL
        for (int c = 0; c < C; c++) {
            float* at = out + r * PANEL + 16 * c;
            _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_permutexvar_ps(places, _mm512_loadu_ps(at)), _mm512_set1_ps(t.scales[r])));
        }
}

template <bool HALF, bool MINIMUM>
inline void four_form(int count, const FourTile& t, const Codes& w, const uint8_t* panel, int first, int strips, float* out) {
    if (strips == 4 && count == 1) return four_strips<1, 4, HALF, MINIMUM>(t, panel, 0, w.depth, w.group, out);
    if (strips == 4 && count == 2) return four_strips<2, 4, HALF, MINIMUM>(t, panel, 0, w.depth, w.group, out);
    FourTile half = t;
    for (int s = 0; s < strips; s += 2, out += 32) {
        switch (count) {
            case 1: four_strips<1, 2, HALF, MINIMUM>(half, panel, first + s, w.depth, w.group, out); break;
            case 2: four_strips<2, 2, HALF, MINIMUM>(half, panel, first + s, w.depth, w.group, out); break;
            case 3: four_strips<3, 2, HALF, MINIMUM>(half, panel, first + s, w.depth, w.group, out); break;
            case 4: four_strips<4, 2, HALF, MINIMUM>(half, panel, first + s, w.depth, w.group, out); break;
            case 5: four_strips<5, 2, HALF, MINIMUM>(half, panel, first + s, w.depth, w.group, out); break;
            default: four_strips<6, 2, HALF, MINIMUM>(half, panel, first + s, w.depth, w.group, out);
        }
        if (half.next) half.next += half.lines * groups_of(w) * 64;
    }
}
#endif

// out[r * 64 + (0 .. 16 strips)]: the products of `count` <= LANE_ROWS rows with 2 or 4 strips of a panel, the first one 0 or 2.
inline void four_tile(int count, const FourTile& t, const Codes& w, const uint8_t* panel, int first, int strips, float* out) {
#ifdef TANDEM_VNNI
    if (w.minimum) return four_form<true, true>(count, t, w, panel, first, strips, out);
    return w.half ? four_form<true, false>(count, t, w, panel, first, strips, out) : four_form<false, false>(count, t, w, panel, first, strips, out);
#else
    const int64_t wide = 16 * strips;
    for (int r = 0; r < count; r++) std::memset(out + r * PANEL, 0, wide * sizeof(float));
    for (int64_t g = 0, number = 0; g < w.depth; g += w.group, number++) {
        const int64_t end = std::min(w.depth, g + w.group);
        const uint8_t *scales = panel + first * 16 * (w.half ? 2 : 4), *codes = panel + w.header_bytes();
        int32_t acc[LANE_ROWS][PANEL];
        for (int r = 0; r < count; r++)
            for (int64_t c = 0; c < wide; c++) acc[r][c] = w.minimum ? 0 : t.starts[r][2 * number];
        for (int64_t k = g; k < end; k += OCTET, codes += 4 * 64) {
            uint8_t nibbles[OCTET][PANEL];
            for (int64_t s = 0; s < strips; s++)
                for (int word = 0; word < 16; word++)
                    for (int p = 0; p < 4; p++) {
                        const uint8_t both = codes[(first + s) * 64 + word * 4 + p];
                        nibbles[word % 2 * 4 + p][s * 16 + word / 2] = both & 15, nibbles[word % 2 * 4 + p][s * 16 + 8 + word / 2] = both >> 4;
                    }
            for (int r = 0; r < count; r++)
                for (int i = 0; i < OCTET; i++) {
                    const int32_t own = int8_t(t.rows[r][k + i]);
                    for (int64_t c = 0; c < wide; c++) acc[r][c] += own * nibbles[i][c];
                }
        }
        panel += w.header_bytes() + (end - g) * PANEL / 2;
        for (int r = 0; r < count; r++)
            for (int64_t c = 0; c < wide; c++) {
                float total = out[r * PANEL + c] + float(acc[r][c]) * scale_at(w, scales, c), own;
                std::memcpy(&own, t.starts[r] + 2 * number, 4);
                if (w.minimum) total = total + own * scale_at(w, scales + w.scale_bytes(), c);
                out[r * PANEL + c] = total;
            }
    }
    for (int r = 0; r < count; r++)
        for (int64_t c = 0; c < wide; c++) out[r * PANEL + c] *= t.scales[r];
#endif
}

// Of tile `tile_index` of the rows with `strips` strips of panel p, the first one 0 or 2: out[r * 64 + ...]; returns the number of rows. What lies at
// `next` (a panel's worth) comes from memory meanwhile, dealt out over this panel's tiles.
inline int fours_tile(const FourRows& x, int64_t all_rows, const Codes& w, int64_t p, int64_t tile_index, int64_t tiles, const uint8_t* next, float* out,
                      int first = 0, int strips = 4) {
    const int64_t m = tile_index * LANE_ROWS, lines = (w.panel_bytes() + 63) / 64, passes = groups_of(w) * (strips == 4 && all_rows > 2 ? 2 : 1);
    const int count = int(std::min<int64_t>(LANE_ROWS, all_rows - m));
    FourTile t;
    for (int r = 0; r < count; r++) t.rows[r] = x.codes + (m + r) * x.depth, t.starts[r] = x.starts + (m + r) * x.groups * 2, t.scales[r] = x.scales[m + r];
    t.next = next ? (const char*)next + lines * tile_index / tiles * 64 : nullptr;
    t.lines = (lines + tiles * passes - 1) / (tiles * passes);
    four_tile(count, t, w, w.packed + p * w.panel_bytes(), first, strips, out);
    return count;
}

// Where this thread's share of a product begins: what to bring into the cache before it.
inline const uint8_t* first_fours(const Codes& w, int64_t rows, int64_t columns, const Team& team) {
    const bool few = rows <= LANE_ROWS;
    const int64_t parts = few ? 2 : (rows + LANE_ROWS - 1) / LANE_ROWS;
    int64_t t, last;
    team.share(few ? (columns + 31) / 32 : (columns + PANEL - 1) / PANEL * parts, t, last);
    return w.packed + t / parts * w.panel_bytes();
}

// As linear_share, of rows that are codes; `a.x` and `a.packed` are not read. `after`: what this thread reads next.
template <typename E, typename O>
void fours_share(const Product<E>& a, const FourRows& x, const Codes& w, O* y, const Team& team, const uint8_t* after = nullptr) {
    const auto store = [&](float* out, int64_t row, int64_t first, int64_t width) {
        const int64_t at = row * a.columns + first;
        store_row<E, O>(out, y + at, a.bias ? a.bias + first : nullptr, a.residual ? a.residual + at : nullptr, int(width), a.factor_at(row, first));
    };
    alignas(64) float out[LANE_ROWS * PANEL];
    int64_t t, last;
    if (a.rows <= LANE_ROWS) {  // halves of panels, so that few panels are shared evenly
        team.share(a.rows ? (a.columns + 31) / 32 : 0, t, last);
        while (t < last) {
            const int64_t p = t / 2, first = t * 32, halves = t % 2 == 0 && t + 1 < last ? 2 : 1;
            const uint8_t* next = t + halves < last ? w.packed + (p + 1) * w.panel_bytes() : after;
            fours_tile(x, a.rows, w, p, 0, 1, next, out, int(t % 2 * 2), int(2 * halves));
            for (int64_t r = 0; r < a.rows; r++) store(out + r * PANEL, r, first, std::min<int64_t>(32 * halves, a.columns - first));
            t += halves;
        }
        return;
    }
    const int64_t tiles = (a.rows + LANE_ROWS - 1) / LANE_ROWS;
    team.share(w.panels() * tiles, t, last);
    for (; t < last; t++) {
        const int64_t p = t / tiles, first = p * PANEL;
        const uint8_t* next = (p + 1) * tiles < last ? w.packed + (p + 1) * w.panel_bytes() : after;
        const int count = fours_tile(x, a.rows, w, p, t % tiles, tiles, next, out);
        for (int r = 0; r < count; r++) store(out + r * PANEL, t % tiles * LANE_ROWS + r, first, std::min<int64_t>(PANEL, a.columns - first));
    }
}

}  // namespace tandem

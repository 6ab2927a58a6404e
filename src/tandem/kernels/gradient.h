// Shares of a team in the products of the backward pass. Contract in gradient.py.
//
// A weight's gradient dy^T x reduces over rows: the rows of x become the depth of panels, and columns of dy are turned into rows, as the
// micro-kernel (and a matrix unit) reads them, a group at a time, which stays in the second-level cache while all panels pass. Read column
// by column out of panels, dy costs a cache line a step.
#pragma once
#include <memory>
#include "linear.h"

namespace tandem {

constexpr int64_t STRIP = 32;          // rows or columns that are turned at a time
constexpr int64_t GROUP = 96;          // rows of a group: whole tiles, whole strips
constexpr int64_t DEPTH_CHUNK = 1024;  // of the reduction while a group is held: 198 KiB of it, 128 KiB of a panel
constexpr int64_t GROUP_STRIDE = DEPTH_CHUNK + STRIP;  // so that equal places of its rows do not share a set of the cache
static_assert(GROUP % ROWS == 0 && GROUP % STRIP == 0 && DEPTH_CHUNK % STRIP == 0, "groups are whole tiles");

template <typename E> std::unique_ptr<E[]> scratch(int64_t count) { return std::unique_ptr<E[]>(new E[count]); }

// Rows of X[rows, columns], from an even one of `begin` to `end`, become the depth of the panels: [ceil(columns / 64)][depth / PAIR][64][PAIR].
template <typename E>
inline void depth_panel(const E* x, int64_t stride, int64_t columns, int64_t depth, int64_t p, int64_t begin, int64_t end, E* packed) {
    const int64_t width = std::min<int64_t>(PANEL, columns - p * PANEL);
    const E* rows[PANEL];
    for (int64_t i = begin; i < end; i += PANEL) {
        const int64_t count = std::min<int64_t>(PANEL, end - i);
        for (int64_t c = 0; c < count; c++) rows[c] = x + (i + c) * stride + p * PANEL;
        pack_depth<E>(rows, count, width, packed + p * depth * PANEL + i * PANEL);
    }
}

template <typename E>
void depth_panels_share(const E* x, int64_t stride, E* packed, int64_t rows, int64_t columns, const Team& team) {
    constexpr int64_t PIECE = 4 * PANEL;
    const int64_t depth = padded_depth<E>(rows), panels = (columns + PANEL - 1) / PANEL, pieces = (rows + PIECE - 1) / PIECE;
    int64_t u, last;
    team.share(panels * pieces, u, last);
    for (; u < last; u++) {
        const int64_t begin = u % pieces * PIECE;
        depth_panel<E>(x, stride, columns, depth, u / pieces, begin, std::min(rows, begin + PIECE), packed);
    }
}

// `count` <= STRIP rows of `width` elements become columns: out[c * GROUP_STRIDE + i], zeros up to i = STRIP.
template <typename E>
inline void turn_strip(const E* x, int64_t stride, int64_t count, int64_t width, E* out) {
    int64_t c = 0;
#ifdef TANDEM_AVX512
    for (; c + STRIP <= width; c += STRIP) {
        __m512i words[2][16];
        if constexpr (pair_of<E>() == 2) {  // columns 0..15 and 16..31
            const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
            const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
            for (int i = 0; i < 16; i++) {
                const __m512i a = 2 * i < count ? _mm512_loadu_si512(x + 2 * i * stride + c) : _mm512_setzero_si512();
                const __m512i b = 2 * i + 1 < count ? _mm512_loadu_si512(x + (2 * i + 1) * stride + c) : _mm512_setzero_si512();
                words[0][i] = _mm512_permutex2var_epi16(a, low, b);
                words[1][i] = _mm512_permutex2var_epi16(a, high, b);
            }
            for (int half = 0; half < 2; half++) {
                transpose16(words[half]);
                for (int j = 0; j < 16; j++) _mm512_storeu_si512(out + (c + 16 * half + j) * GROUP_STRIDE, words[half][j]);
            }
        } else {
            for (int64_t at = c; at < c + STRIP; at += 16)
                for (int half = 0; half < 2; half++) {
                    for (int i = 0; i < 16; i++) words[0][i] = 16 * half + i < count ? _mm512_loadu_si512(x + (16 * half + i) * stride + at) : _mm512_setzero_si512();
                    transpose16(words[0]);
                    for (int j = 0; j < 16; j++) _mm512_storeu_si512(out + (at + j) * GROUP_STRIDE + 16 * half, words[0][j]);
                }
        }
    }
#endif
    for (; c < width; c++)
        for (int64_t i = 0; i < STRIP; i++) out[c * GROUP_STRIDE + i] = i < count ? x[i * stride + c] : E(0);
}

// sum[n, c] += row n of a . column c of the panels, over `depth`. fill(first, count, k, some, out) writes a's rows [first, first + count) and
// inputs [k, k + some) to out[row * GROUP_STRIDE + input], with zeros up to a whole PAIR.
template <typename E, typename Fill>
void add_share(const E* packed, int64_t depth, float* sum, int64_t rows, int64_t columns, const Team& team, Fill fill) {
    const int64_t groups = (rows + GROUP - 1) / GROUP, panels = (columns + PANEL - 1) / PANEL;
    const auto group = scratch<E>(GROUP * GROUP_STRIDE);
    const Tiles configured;
    int64_t u, last, end;
    team.share(groups * panels, u, last);
    for (; u < last; u = end) {  // a group's run of panels
        const int64_t g = u / panels * GROUP, held = std::min(GROUP, rows - g), tiles = (held + ROWS - 1) / ROWS;
        end = std::min(last, (u / panels + 1) * panels);
        for (int64_t k = 0; k < depth; k += DEPTH_CHUNK) {
            const int64_t some = std::min(DEPTH_CHUNK, depth - k);
            fill(g, held, k, some, group.get());
            for (int64_t p = u % panels; p < u % panels + end - u; p++) {
                const E* panel = packed + (p * depth + k) * PANEL;
                const int64_t width = std::min<int64_t>(PANEL, columns - p * PANEL), lines = some * PANEL * int64_t(sizeof(E)) / 64;
                for (int64_t i = 0; i < tiles; i++) {
                    const int count = int(std::min<int64_t>(ROWS, held - i * ROWS));
                    float *out = sum + (g + i * ROWS) * columns + p * PANEL, part[ROWS * PANEL];
                    const E* row[ROWS];
                    for (int r = 0; r < count; r++) row[r] = group.get() + (i * ROWS + r) * GROUP_STRIDE;
                    for (int64_t r = ROWS; r < std::min<int64_t>(2 * ROWS, held - i * ROWS); r++)  // the next tile's sums
                        for (int64_t c = 0; c < width; c += 16) __builtin_prefetch(out + r * columns + c, 1);
                    const E* next = p + 1 < panels ? panel + depth * PANEL : nullptr;
                    const Ahead ahead{next ? (const char*)next + lines * i / tiles * 64 : nullptr, std::max<int64_t>(1, tiles / 4)};
                    if (width == PANEL) {
                        tile<E>(count, row, pair_of<E>(), panel, some, out, columns, true, ahead);
                        continue;
                    }
                    tile<E>(count, row, pair_of<E>(), panel, some, part, PANEL, false, ahead, width);
                    for (int r = 0; r < count; r++)
                        for (int64_t c = 0; c < width; c++) out[r * columns + c] += part[r * PANEL + c];
                }
            }
        }
    }
}

}  // namespace tandem

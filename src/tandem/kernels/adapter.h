// What adapters add to a product's rows, a team's share of it: y += f ((s x A^T) B^T), A and B of each row its own adapter's.
// Contract in adapter.py.
//
// Two passes with a wait between them: the first writes (s x A^T) of every row, rounded, to scratch; the second, behind the wait for
// the matrix's own product, adds to y. A tile is of rows of one adapter, wherever they lie: a row's bits hang on its adapter and itself.
#pragma once
#include "linear.h"

namespace tandem {

struct AdapterPiece {
    const void* up;       // B, packed: [columns, rank]
    const float* factor;  // [columns] of the piece, or null
    int64_t first, columns, start, rank;  // of y's columns; of the ranks. `rank` as packed: with bf16 even
};

struct AdapterMatrix {
    const void* down;     // A of all pieces, [ranks, inputs], in strips (lower_tile); null: nothing is added to this matrix
    const float* scales;  // [ranks]
    const AdapterPiece* pieces;
    const float* factor;  // [columns of the matrix] of its own product, or null
    int64_t num_pieces, ranks;
};

struct AdapterRows {  // of a step, that one adapter serves
    const AdapterMatrix* matrix;
    const int64_t* rows;
    int64_t count;
    int64_t tiles(int64_t height) const { return (count + height - 1) / height; }
};

template <typename E>
struct AdapterProduct {
    const E* x;  // [rows, depth], `x_stride` elements between rows
    int64_t x_stride, depth;
    E* lowered;  // [rows, lowered_stride]
    int64_t lowered_stride;
    E* y;
    int64_t y_stride;
};

// The units [first, last) of this thread among those of all parts: visit(part, unit of the part).
template <typename Units, typename Visit>
inline void each_unit(const AdapterRows* parts, int64_t num_parts, const Team& team, Units units, Visit visit) {
    int64_t total = 0, t, last;
    for (int64_t s = 0; s < num_parts; s++) total += units(parts[s]);
    team.share(total, t, last);
    for (int64_t s = 0, base = 0; s < num_parts && base < last; base += units(parts[s]), s++)
        for (int64_t u = std::max<int64_t>(0, t - base); u < std::min(units(parts[s]), last - base); u++) visit(parts[s], u);
}

// Strips of 16 columns in the panel that begins at `first`: the last panel is as wide as its ranks are, so that few ranks are few bytes.
inline int strips_of(int64_t ranks, int64_t first) { return int((std::min<int64_t>(PANEL, ranks - first) + 15) / 16); }
constexpr int64_t LOWER_ROWS = 8;  // of a tile: 8 x 3 sums, or 6 x 4, stay in registers
inline int64_t lower_height(int64_t ranks) { return ranks > 48 ? LANE_ROWS : LOWER_ROWS; }

template <int C, typename E>
inline void lower_rows(int count, const E* const* rows, const E* panel, int64_t depth, float* out) {
    constexpr int64_t step = pair_of<E>();
    switch (count) {
        case 1: return tile_rows<1, C, 16 * C>(rows, step, panel, depth, out, PANEL, false, Ahead());
        case 2: return tile_rows<2, C, 16 * C>(rows, step, panel, depth, out, PANEL, false, Ahead());
        case 3: return tile_rows<3, C, 16 * C>(rows, step, panel, depth, out, PANEL, false, Ahead());
        case 4: return tile_rows<4, C, 16 * C>(rows, step, panel, depth, out, PANEL, false, Ahead());
        case 5: return tile_rows<5, C, 16 * C>(rows, step, panel, depth, out, PANEL, false, Ahead());
        case 6: return tile_rows<6, C, 16 * C>(rows, step, panel, depth, out, PANEL, false, Ahead());
    }
    if constexpr (C < 4) {
        if (count == 7) return tile_rows<7, C, 16 * C>(rows, step, panel, depth, out, PANEL, false, Ahead());
        tile_rows<8, C, 16 * C>(rows, step, panel, depth, out, PANEL, false, Ahead());
    }
}

// Of `count` rows, 6 at most where there are 4 strips: the panel is [depth / PAIR][16 strips][PAIR].
template <typename E>
inline void lower_tile(int strips, int count, const E* const* rows, const E* panel, int64_t depth, float* out) {
    switch (strips) {
        case 1: return lower_rows<1>(count, rows, panel, depth, out);
        case 2: return lower_rows<2>(count, rows, panel, depth, out);
        case 3: return lower_rows<3>(count, rows, panel, depth, out);
        default: return lower_rows<4>(count, rows, panel, depth, out);
    }
}

template <typename E>
void lower_share(const AdapterRows* parts, int64_t num_parts, const AdapterProduct<E>& a, const Team& team) {
    const auto units = [](const AdapterRows& part) {
        return part.tiles(lower_height(part.matrix->ranks)) * ((part.matrix->ranks + PANEL - 1) / PANEL);
    };
    each_unit(parts, num_parts, team, units, [&](const AdapterRows& part, int64_t u) {
        const AdapterMatrix& matrix = *part.matrix;
        const int64_t height = lower_height(matrix.ranks), tiles = part.tiles(height), m = u % tiles * height, first = u / tiles * PANEL;
        const int count = int(std::min(height, part.count - m)), width = int(std::min<int64_t>(PANEL, matrix.ranks - first));
        const E* rows[LOWER_ROWS];
        for (int r = 0; r < count; r++) rows[r] = a.x + part.rows[m + r] * a.x_stride;
        float out[LOWER_ROWS * PANEL];
        lower_tile<E>(strips_of(matrix.ranks, first), count, rows, (const E*)matrix.down + first * a.depth, a.depth, out);
        for (int r = 0; r < count; r++) {
            E* target = a.lowered + part.rows[m + r] * a.lowered_stride + first;
            for (int c = 0; c < width; c++) target[c] = from_float<E>(out[r * PANEL + c] * matrix.scales[first + c]);
        }
    });
}

template <typename E>
void raise_share(const AdapterRows* parts, int64_t num_parts, const AdapterProduct<E>& a, const Team& team) {
    const Tiles configured;
    const auto panels = [](const AdapterPiece& piece) { return (piece.columns + PANEL - 1) / PANEL; };
    const auto units = [&](const AdapterRows& part) {
        int64_t total = 0;
        for (int64_t i = 0; i < part.matrix->num_pieces; i++) total += panels(part.matrix->pieces[i]);
        return total * part.tiles(ROWS);
    };
    each_unit(parts, num_parts, team, units, [&](const AdapterRows& part, int64_t u) {
        const AdapterPiece* piece = part.matrix->pieces;
        const int64_t tiles = part.tiles(ROWS);
        int64_t p = u / tiles;
        for (; p >= panels(*piece); piece++) p -= panels(*piece);
        const int64_t m = u % tiles * ROWS, first = p * PANEL;
        const int count = int(std::min<int64_t>(ROWS, part.count - m)), width = int(std::min<int64_t>(PANEL, piece->columns - first));
        const E* rows[ROWS];
        for (int r = 0; r < count; r++) rows[r] = a.lowered + part.rows[m + r] * a.lowered_stride + piece->start;
        float out[ROWS * PANEL];
        tile<E>(count, rows, pair_of<E>(), (const E*)piece->up + first * piece->rank, piece->rank, out, PANEL, false);
        for (int r = 0; r < count; r++) {
            E* target = a.y + part.rows[m + r] * a.y_stride + piece->first + first;
            store_row<E, E>(out + r * PANEL, target, nullptr, target, width, piece->factor ? piece->factor + first : nullptr);
        }
    });
}

}  // namespace tandem

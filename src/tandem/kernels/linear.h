// y = x W^T (+ bias) (+ residual) over packed columns, a team's share of it. Contract in linear.py.
#pragma once
#include <vector>
#include "team.h"
#include "tile.h"

namespace tandem {

// One row of a tile, times `factor`, rounded to O; the product is rounded to E first, as if stored, where a residual is added.
template <typename E, typename O>
inline void store_row(float* source, O* target, const float* bias, const E* residual, int width, const float* factor = nullptr) {
#ifdef TANDEM_AVX512
    if (width == PANEL) {
        for (int c = 0; c < PANEL; c += 16) {
            __m512 v = _mm512_loadu_ps(source + c);
            if (factor) v = _mm512_mul_ps(v, _mm512_loadu_ps(factor + c));
            if (bias) v = _mm512_add_ps(v, _mm512_loadu_ps(bias + c));
            if (residual) v = _mm512_add_ps(rounded<E>(v), widen(residual + c));
            narrow(target + c, v);
        }
        return;
    }
#endif
    if (factor)
        for (int c = 0; c < width; c++) source[c] *= factor[c];
    if (bias)
        for (int c = 0; c < width; c++) source[c] += bias[c];
    if (residual)
        for (int c = 0; c < width; c++) source[c] = to_float(from_float<E>(source[c])) + to_float(residual[c]);
    if (width == PANEL) return narrow_panel<O>(source, target);
    for (int c = 0; c < width; c++) target[c] = from_float<O>(source[c]);
}

template <typename E>
struct Product {
    const E* x;  // [rows, depth], `stride` elements between rows
    int64_t stride;
    const E* packed;  // [ceil(columns / 64)][depth / PAIR][64][PAIR]
    int64_t rows, columns, depth;
    const float* bias = nullptr;   // [columns]
    const E* residual = nullptr;  // [rows, columns]
    const float* factor = nullptr;              // [columns], that products are multiplied by
    const float* const* row_factors = nullptr;  // [rows], in its place: of each row, or null
    const Product* more = nullptr;              // of as many rows and columns, added before anything is rounded
    bool narrow = false;                        // of logits: they are rounded to bf16 (head.h)
    const float* factor_at(int64_t row, int64_t first) const {
        const float* own = row_factors ? row_factors[row] : factor;
        return own ? own + first : nullptr;
    }
};

// Runs of memory that are read behind a product, and come into the cache with its tiles.
class Fetch {
public:
    void clear() { runs_.clear(), next_ = 0, left_ = 0; }
    void add(const void* at, int64_t bytes) { runs_.push_back({(const char*)at, bytes}), left_ += bytes; }
    int64_t left() const { return left_; }
    // The next `bytes`, or what is left of a run; null behind the last.
    const char* take(int64_t bytes) {
        if (next_ == runs_.size()) return nullptr;
        Run& run = runs_[next_];
        const char* found = run.at;
        left_ -= std::min(bytes, run.bytes);
        run.at += bytes, run.bytes -= bytes;
        if (run.bytes <= 0) next_++;
        return found;
    }

private:
    struct Run {
        const char* at;
        int64_t bytes;
    };
    std::vector<Run> runs_;
    size_t next_ = 0;
    int64_t left_ = 0;
};

// What a tile has time to bring besides the next panel, in bytes.
template <typename E>
inline int64_t fetched(int64_t depth, int64_t tiles) { return depth / pair_of<E>() / std::max<int64_t>(1, tiles / 4) * 64; }

// The tile of rows [tile * ROWS, ...) and the first `width` columns of panel p: out[r * out_stride + (0..63)]. What lies at `next` (a panel's worth) comes
// from memory meanwhile: its lines are dealt out over this panel's tiles.
template <typename E>
inline int product_tile(const Product<E>& a, int64_t p, int64_t tile_index, int64_t tiles, const E* next, float* out, int64_t out_stride = PANEL, int64_t width = PANEL, Fetch* also = nullptr) {
    const int64_t m = tile_index * ROWS;
    const int count = int(std::min<int64_t>(ROWS, a.rows - m));
    const E* rows[ROWS];
    for (int r = 0; r < count; r++) rows[r] = a.x + (m + r) * a.stride;
    const int64_t lines = a.depth * PANEL * sizeof(E) / 64, first_line = lines * tile_index / tiles;
    const int64_t every = std::max<int64_t>(1, tiles / 4);
    const Ahead ahead{next ? (const char*)next + first_line * 64 : nullptr, every, next && also ? also->take(fetched<E>(a.depth, tiles)) : nullptr};
    tile<E>(count, rows, pair_of<E>(), a.packed + p * a.depth * PANEL, a.depth, out, out_stride, false, ahead, width);
    if (a.more) {
        for (int r = 0; r < count; r++) rows[r] = a.more->x + (m + r) * a.more->stride;
        tile<E>(count, rows, pair_of<E>(), a.more->packed + p * a.more->depth * PANEL, a.more->depth, out, out_stride, true, Ahead(), width);
    }
    return count;
}

// The grid of panels x row tiles, cut into equal runs: a panel stays in its thread's cache. `after`: what this thread reads next; `also`:
// and what else.
template <typename E, typename O>
void linear_share(const Product<E>& a, O* y, const Team& team, const E* after = nullptr, Fetch* also = nullptr) {
    const int64_t panels = (a.columns + PANEL - 1) / PANEL, tiles = (a.rows + ROWS - 1) / ROWS;
    int64_t t, last;
    team.share(panels * tiles, t, last);
    const Tiles configured;
    for (; t < last; t++) {
        const int64_t p = t / tiles, first = p * PANEL;
        const E* next = (p + 1) * tiles < last ? a.packed + (p + 1) * a.depth * PANEL : after;
        float out[ROWS * PANEL];
        const int width = int(std::min<int64_t>(PANEL, a.columns - first));
        const bool due = also && (last - t - 1) * fetched<E>(a.depth, tiles) <= also->left();  // earlier, and panels would drive it out again
        const int count = product_tile(a, p, t % tiles, tiles, next, out, PANEL, width, due ? also : nullptr);
        for (int r = 0; r < count; r++) {
            const int64_t row = t % tiles * ROWS + r, at = row * a.columns + first;
            store_row<E, O>(out + r * PANEL, y + at, a.bias ? a.bias + first : nullptr, a.residual ? a.residual + at : nullptr, width, a.factor_at(row, first));
        }
    }
}

// Where this thread's share of a product begins: what to bring into the cache before it.
template <typename E>
const E* first_panel(const E* packed, int64_t rows, int64_t columns, int64_t depth, const Team& team) {
    const int64_t panels = (columns + PANEL - 1) / PANEL, tiles = std::max<int64_t>(1, (rows + ROWS - 1) / ROWS);
    int64_t t, last;
    team.share(panels * tiles, t, last);
    return packed + t / tiles * depth * PANEL;
}

}  // namespace tandem

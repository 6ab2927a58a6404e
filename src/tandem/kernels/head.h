// Logits of the output head a block of the vocabulary at a time, with the block's maximum and sum of exponentials.
#pragma once
#include <algorithm>
#include <vector>
#include "codes.h"
#include "linear.h"
#include "sample.h"

namespace tandem {

constexpr int64_t BLOCK_PANELS = BLOCK_TOKENS / PANEL;

// The logits of a tile of rows with a block's panels, from packed columns or from codes: out[r * BLOCK_TOKENS + token of the block].
template <typename E>
class HeadBlock {
public:
    // `codes` in place of head.packed, in bf16, or null.
    HeadBlock(const Product<E>& head, const Codes* codes) : head_(head), codes_(codes), few_(codes && takes_few(*codes, head.rows)), panels_((head.columns + PANEL - 1) / PANEL) {
        if (codes && !few_) values_.resize(BLOCK_PANELS * panel());
    }

    // `more`: another block follows in this thread.
    void open(int64_t block, bool more) {
        first_ = block * BLOCK_PANELS, count_ = std::min(BLOCK_PANELS, panels_ - first_);
        if constexpr (sizeof(E) == 2)
            for (int64_t i = 0; codes_ && !few_ && i < count_; i++) dequantise_panel(*codes_, first_ + i, values_.data() + i * panel(), following(i + 1 < count_ || more, first_ + i));
    }

    // Returns the number of rows.
    int multiply(int64_t tile_index, int64_t tiles, bool more, float* out) const {
        int rows = 0;
        for (int64_t i = 0; i < count_; i++, out += PANEL) {
            const int64_t p = first_ + i, next = p + BLOCK_PANELS;
            if constexpr (sizeof(E) == 2)
                if (few_) {
                    codes_tile(head_, *codes_, p, 0, 4, following(i + 1 < count_ || more, p), out, BLOCK_TOKENS);
                    rows = int(head_.rows);
                    continue;
                }
            Product<E> a = head_;
            if (codes_) a.packed = values_.data();
            rows = product_tile<E>(a, codes_ ? i : p, tile_index, tiles, more && !codes_ && next < panels_ ? head_.packed + next * panel() : nullptr, out, BLOCK_TOKENS);
        }
        return rows;
    }

private:
    int64_t panel() const { return head_.depth * PANEL; }
    const uint8_t* following(bool more, int64_t p) const { return more ? codes_->packed + (p + 1) * codes_->panel_bytes() : nullptr; }
    const Product<E>& head_;
    const Codes* codes_;
    const bool few_;
    const int64_t panels_;
    int64_t first_ = 0, count_ = 0;
    std::vector<E> values_;
};

// To bf16 and back.
inline void narrow_logits(float* logits, int64_t count) {
    int64_t i = 0;
#ifdef TANDEM_AVX512
    for (; i + LANES <= count; i += LANES) _mm512_storeu_ps(logits + i, rounded<bf16>(_mm512_loadu_ps(logits + i)));
#endif
    for (; i < count; i++) logits[i] = to_float(from_float<bf16>(logits[i]));
}

// This thread's blocks, in order: each(row, x, terms, stats, first token) for every row, x = logits / temperature (a temperature of
// 0 counts as 1), terms and stats as of block_stats. The logits of a block live in the cache only.
template <typename E, typename Each>
void each_block(const Product<E>& head, const Codes* codes, const float* temperature, const Team& team, Each each) {
    const int64_t tiles = (head.rows + ROWS - 1) / ROWS;
    HeadBlock<E> block(head, codes);
    int64_t b, last;
    team.share(num_blocks(head.columns), b, last);
    const Tiles configured;
    alignas(64) float logits[ROWS * BLOCK_TOKENS], scaled[BLOCK_TOKENS], terms[BLOCK_TOKENS];
    for (; b < last; b++) {
        const int64_t first = b * BLOCK_TOKENS, count = std::min(BLOCK_TOKENS, head.columns - first);
        block.open(b, b + 1 < last);
        for (int64_t tile_index = 0; tile_index < tiles; tile_index++) {
            const int rows = block.multiply(tile_index, tiles, b + 1 < last, logits);
            if (head.narrow) narrow_logits(logits, rows * BLOCK_TOKENS);
            for (int r = 0; r < rows; r++) {
                const int64_t row = tile_index * ROWS + r;
                const float t = temperature[row] == 0.0f ? 1.0f : temperature[row];
                const float* x = block_of(logits + r * BLOCK_TOKENS, count, t, scaled);
                each(row, x, terms, block_stats(x, terms), first);
            }
        }
    }
}

}  // namespace tandem

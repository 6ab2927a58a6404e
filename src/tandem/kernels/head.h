// Logits of the output head a block of the vocabulary at a time, with the block's maximum and sum of exponentials.
#pragma once
#include <algorithm>
#include <vector>
#include "linear.h"
#include "sample.h"

namespace tandem {

constexpr int64_t BLOCK_PANELS = BLOCK_TOKENS / PANEL;

// This thread's blocks, in order: each(row, x, terms, stats, first token) for every row, x = logits / temperature (a temperature of
// 0 counts as 1), terms and stats as of block_stats. The logits of a block live in the cache only.
template <typename E, typename Each>
void each_block(const Product<E>& head, const float* temperature, const Team& team, Each each) {
    const int64_t panels = (head.columns + PANEL - 1) / PANEL, tiles = (head.rows + ROWS - 1) / ROWS;
    int64_t b, last;
    team.share(num_blocks(head.columns), b, last);
    alignas(64) float logits[ROWS * BLOCK_TOKENS], scaled[BLOCK_TOKENS], terms[BLOCK_TOKENS];
    for (; b < last; b++) {
        const int64_t first = b * BLOCK_TOKENS, count = std::min(BLOCK_TOKENS, head.columns - first);
        for (int64_t tile_index = 0; tile_index < tiles; tile_index++) {
            int rows = 0;
            for (int64_t p = b * BLOCK_PANELS; p < std::min(panels, (b + 1) * BLOCK_PANELS); p++)
                rows = product_tile(head, p, tile_index, tiles, b + 1 < last && p + BLOCK_PANELS < panels ? head.packed + (p + BLOCK_PANELS) * head.depth * PANEL : nullptr,
                                    logits + (p - b * BLOCK_PANELS) * PANEL, BLOCK_TOKENS);
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

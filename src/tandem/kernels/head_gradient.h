// The backward products of the output head, from gradients of the logits that are written a few at a time and never as a whole in fp32.
#pragma once
#include "gradient.h"
#include "sample.h"

namespace tandem {

// dhidden[N, M] += dlogits W and, where dweight is given, dweight[V, M] += dlogits^T hidden.
// dlogits.prepare(team) comes first; dlogits.write(row, first token, count, out) gives a part of one block, with zeros beyond V.
template <typename E, typename Gradient>
void head_backward(Gradient& dlogits, const E* hidden, const E* weight, float* dhidden, float* dweight, int64_t n, int64_t vocab, int64_t width) {
    const int64_t depth = padded_depth<E>(n), panels = (width + PANEL - 1) / PANEL;
    const auto hidden_panels = scratch<E>(dweight ? panels * PANEL * depth : 0), weight_panels = scratch<E>(panels * PANEL * DEPTH_CHUNK);
    with_team([&](const Team& team) {
        dlogits.prepare(team);
        if (dweight) depth_panels_share(hidden, width, hidden_panels.get(), n, width, team);
        for (int64_t first = 0; first < vocab; first += DEPTH_CHUNK) {
            const int64_t tokens = std::min(DEPTH_CHUNK, vocab - first);
            depth_panels_share(weight + first * width, width, weight_panels.get(), tokens, width, team);
            team.wait();
            add_share(weight_panels.get(), padded_depth<E>(tokens), dhidden, n, width, team, [&](int64_t row, int64_t count, int64_t, int64_t some, E* out) {
                for (int64_t r = 0; r < count; r++)
                    for (int64_t v = 0; v < some; v += BLOCK_TOKENS) dlogits.write(row + r, first + v, BLOCK_TOKENS, out + r * GROUP_STRIDE + v);
            });
            team.wait();
        }
        if (!dweight) return;
        add_share(hidden_panels.get(), depth, dweight, vocab, width, team, [&](int64_t token, int64_t count, int64_t begin, int64_t some, E* out) {
            E strip[STRIP * STRIP];
            for (int64_t i = 0; i < some; i += STRIP)
                for (int64_t v = 0; v < count; v += STRIP) {
                    const int64_t rows = std::min(STRIP, n - begin - i);
                    for (int64_t r = 0; r < rows; r++) dlogits.write(begin + i + r, token + v, STRIP, strip + r * STRIP);
                    turn_strip<E>(strip, STRIP, rows, STRIP, out + v * GROUP_STRIDE + i);
                }
        });
    });
}

}  // namespace tandem

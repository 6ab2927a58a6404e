// The output head and the sampler in one pass: a block of the vocabulary is multiplied, reduced and offered its noise while it is
// in the cache. Contract in head.py; order of reduction and noise in sample.h.
#include "head.h"

using namespace tandem;

namespace {

// `bad`: the first row whose logits are not finite, or -1.
template <typename E>
void draw(const Product<E>& head, const Codes* codes, const float* temperature, const uint64_t* seeds, const uint32_t* positions, uint32_t stream,
             int64_t* tokens, float* logprobs, int64_t* bad) {
    const int64_t blocks = num_blocks(head.columns);
    std::vector<float> maxima(head.rows * blocks), sums(head.rows * blocks);
    std::vector<Best> best(head.rows * omp_get_max_threads());
    int64_t threads = 1;
    with_team([&](const Team& team) {
        if (team.me == 0) threads = team.threads;
        Best* mine = best.data() + team.me * head.rows;
        each_block(head, codes, temperature, team, [&](int64_t row, const float* x, const float* terms, BlockStats stats, int64_t first) {
            maxima[row * blocks + first / BLOCK_TOKENS] = stats.max;
            sums[row * blocks + first / BLOCK_TOKENS] = stats.sum;
            if (temperature[row] == 0.0f) {  // greedy: blocks of a thread come in order, so the lowest id stays
                if (stats.max > mine[row].logit) mine[row] = {stats.max, first + (std::find(x, x + BLOCK_TOKENS, stats.max) - x), stats.max};
            } else {
                block_noise(x, terms, stats.max, first, {seeds[row], positions[row], stream}, mine[row]);
            }
        });
    });
    *bad = -1;
    for (int64_t s = head.rows - 1; s >= 0; s--) {
        Best top = best[s];
        for (int64_t t = 1; t < threads; t++) {
            const Best& other = best[t * head.rows + s];
            if (other.score > top.score || (other.score == top.score && other.token >= 0 && other.token < top.token)) top = other;
        }
        const RowStats row = finish(maxima.data() + s * blocks, sums.data() + s * blocks, blocks);
        tokens[s] = top.token;
        logprobs[s] = temperature[s] == 0.0f ? 0.0f : top.logit - log_sum_exp(row);
        if (!(row.sum < INF && top.token >= 0)) *bad = s;
    }
}

}  // namespace

#define TANDEM_DRAW(NAME, E)                                                                                                        \
    void draw_##NAME(const E* hidden, int64_t stride, const E* packed, const Codes* codes, int64_t rows, int64_t vocab, int64_t depth, const float* temperature, \
                     const uint64_t* seeds, const uint32_t* positions, int64_t stream, int64_t* tokens, float* logprobs, int64_t* bad, int64_t narrow) { \
        Product<E> head{hidden, stride, packed, rows, vocab, depth};                                                                 \
        head.narrow = narrow != 0;                                                                                                   \
        draw(head, codes, temperature, seeds, positions, uint32_t(stream), tokens, logprobs, bad); \
    }

extern "C" {
TANDEM_DRAW(bf16, bf16)
TANDEM_DRAW(fp32, float)
}

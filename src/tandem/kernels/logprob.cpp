// Log-probs, entropies and their gradients, a block of the vocabulary at a time. Contract in logprob.py; order of reduction in sample.h.
#include "head.h"
#include "head_gradient.h"
#include "layer.h"

using namespace tandem;

namespace {

// What the backward pass needs of the forward's: e^(x - m) of every row and token, m the block's maximum, rounded to E.
// [blocks][rows][BLOCK_TOKENS] and [blocks][rows].
template <typename E>
struct Terms {
    E* terms;  // null: not kept
    float* maxima;
};

// The ids that a row keeps: ids[starts[row] .. starts[row + 1]), ascending; none: all.
// A row whose number is not negative has that mask instead, of `words` words, a bit a token.
struct Kept {
    const int64_t* starts;  // null: every row keeps all
    const int32_t *ids, *numbers;
    const uint32_t* masks;
    int64_t words;
    // -infinity outside the row's set. x begins at token `first`; x itself where the row keeps all.
    const float* restrict_block(const float* x, int64_t row, int64_t first, float* out) const {
        if (!starts) return x;
        if (numbers[row] >= 0) {
            const uint32_t* mask = masks + numbers[row] * words;
            for (int64_t i = 0; i < BLOCK_TOKENS; i++) {
                const int64_t token = first + i;
                out[i] = token / 32 < words && mask[token / 32] >> (token % 32) & 1 ? x[i] : -INF;
            }
            return out;
        }
        if (starts[row] == starts[row + 1]) return x;
        for (int64_t i = 0; i < BLOCK_TOKENS; i++) out[i] = -INF;
        const int32_t* end = ids + starts[row + 1];
        for (const int32_t* id = std::lower_bound(ids + starts[row], end, int32_t(first)); id < end && *id < first + BLOCK_TOKENS; id++) out[*id - first] = x[*id - first];
        return out;
    }
};

template <typename E>
void forward(const Product<E>& head, const Codes* codes, const float* temperature, const int64_t* targets, Kept kept, Terms<E> out, float* logprobs, float* entropies, float* lse) {
    const int64_t blocks = num_blocks(head.columns), n = head.rows;
    std::vector<float> sums(blocks * n), weighted(blocks * n), hit(n);
    with_team([&](const Team& team) {
        each_block(head, codes, temperature, team, [&](int64_t row, const float* x, float* terms, BlockStats stats, int64_t first) {
            alignas(64) float restricted[BLOCK_TOKENS];
            const float* chosen = kept.restrict_block(x, row, first, restricted);
            if (chosen != x) stats = block_stats(chosen, terms);
            const int64_t at = first / BLOCK_TOKENS * n + row, target = targets[row] - first;
            out.maxima[at] = stats.max, sums[at] = stats.sum, weighted[at] = block_weighted(chosen, terms, stats.max);
            if (target >= 0 && target < BLOCK_TOKENS) hit[row] = chosen[target];
            if (out.terms)
                for (int64_t c = 0; c < BLOCK_TOKENS; c += PANEL) narrow_panel<E>(terms + c, out.terms + at * BLOCK_TOKENS + c);
        });
        team.wait();
        int64_t row, last;
        team.share(n, row, last);
        std::vector<float> m(blocks), s(blocks), w(blocks);
        for (; row < last; row++) {
            for (int64_t b = 0; b < blocks; b++) m[b] = out.maxima[b * n + row], s[b] = sums[b * n + row], w[b] = weighted[b * n + row];
            const RowStats stats = finish(m.data(), s.data(), blocks);
            lse[row] = log_sum_exp(stats);
            logprobs[row] = hit[row] - lse[row];
            entropies[row] = entropy(stats, m.data(), s.data(), w.data(), blocks);
        }
    });
}

struct Chosen {
    const int64_t* targets;
    const float *logprobs, *lse, *grad;  // grad: of the log-probs
    float temperature;
};

// dlogits[n][v] = grad[n] / temperature * (1 where v is the target, minus the probability), rounded to E.
template <typename E>
class LogitGradient {
public:
    LogitGradient(const Terms<E>& kept, const Chosen& chosen, int64_t rows, int64_t vocab) : kept_(kept), chosen_(chosen), rows_(rows), factors_(num_blocks(vocab) * rows) {}
    void prepare(const Team& team) {
        int64_t i, last;
        team.share(int64_t(factors_.size()), i, last);
        for (; i < last; i++) {
            const int64_t row = i % rows_;
            factors_[i] = -chosen_.grad[row] / chosen_.temperature * exp_one(kept_.maxima[i] - chosen_.lse[row]);
        }
    }
    // Tokens [first, first + count) of a row, within one block.
    void write(int64_t row, int64_t first, int64_t count, E* out) const {
        const int64_t at = first / BLOCK_TOKENS * rows_ + row, target = chosen_.targets[row] - first;
        const E* terms = kept_.terms + at * BLOCK_TOKENS + first % BLOCK_TOKENS;
        const Lanes factor = splat(factors_[at]);
        for (int64_t c = 0; c < count; c += LANES) store_narrow(out + c, load_wide(terms + c) * factor);
        if (target >= 0 && target < count)
            out[target] = from_float<E>(chosen_.grad[row] / chosen_.temperature * (1.0f - exp_one(chosen_.logprobs[row])));
    }

private:
    const Terms<E> kept_;
    const Chosen chosen_;
    const int64_t rows_;
    std::vector<float> factors_;
};

}  // namespace

#define TANDEM_LOGPROB(NAME, E)                                                                                                                      \
    void logprob_##NAME(const E* hidden, int64_t stride, const E* packed, const Codes* codes, int64_t n, int64_t vocab, int64_t depth, const float* temperature, \
                        const int64_t* targets, const int64_t* kept_starts, const int32_t* kept_ids, const int32_t* mask_numbers, const uint32_t* masks,      \
                        int64_t mask_words, E* terms, float* maxima, float* logprobs, float* entropies, float* lse, int64_t narrow) {                               \
        const Kept kept{kept_starts, kept_ids, mask_numbers, masks, mask_words};                                                                    \
        Product<E> head{hidden, stride, packed, n, vocab, depth};                                                                                    \
        head.narrow = narrow != 0;                                                                                                                   \
        forward(head, codes, temperature, targets, kept, Terms<E>{terms, maxima}, logprobs, entropies, lse); \
    }                                                                                                                                                \
    void logprob_backward_##NAME(E* terms, float* maxima, const int64_t* targets, const float* logprobs, const float* lse, const float* grad, const E* hidden,   \
                                 const E* weight, float* dhidden, float* dweight, int64_t n, int64_t vocab, int64_t width, float temperature) {      \
        LogitGradient<E> dlogits(Terms<E>{terms, maxima}, {targets, logprobs, lse, grad, temperature}, n, vocab);                                    \
        head_backward(dlogits, hidden, weight, dhidden, dweight, n, vocab, width);                                                                   \
    }

extern "C" {
TANDEM_LOGPROB(bf16, bf16)
TANDEM_LOGPROB(fp32, float)
}

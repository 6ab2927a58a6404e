// The inner routines of sampling and of the log-sum-exp, over blocks of the vocabulary. See sample.py for the contract.
//
// Order of reduction, the same for every batch, thread count and caller: a row is cut into blocks of BLOCK_TOKENS, the
// last padded with -infinity; block b gives its maximum m_b and s_b = sum of exp(x - m_b), sixteen partial sums in
// vocabulary order, then sum_lanes; `finish` weighs the s_b by exp(m_b - max m), again sixteen partial sums in block
// order, then sum_lanes. Blocks may be computed in any order, by any thread, or as the output head yields them.
//
// The best noisy score is exact in any order too: ties go to the lower id, and a token is left out only where its noise,
// bounded from its Philox word alone, cannot reach the best so far.
#pragma once
#include "vector.h"

namespace tandem {

constexpr int64_t BLOCK_TOKENS = 256;
constexpr double GUMBEL_MAX = 22.8739;  // above 33 log 2 = 22.873857, the noise of the largest word: see numerics/random.py

inline int64_t num_blocks(int64_t vocab) { return (vocab + BLOCK_TOKENS - 1) / BLOCK_TOKENS; }

struct Noise {
    uint64_t seed;
    uint32_t position;
    uint32_t stream;
};

struct Best {
    double score = -std::numeric_limits<double>::infinity();
    int64_t token = -1;
    float logit = -INF;  // of `token`, without noise
};

struct BlockStats {
    float max;
    float sum;
};

// Philox4x32-10 words of the 64 tokens from `first` (a multiple of 64): w[i] lane l belongs to token first + 16 i + l.
inline void philox64(const Noise& noise, int64_t first, Words* w) {
    static constexpr uint32_t order[LANES] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    uint32_t key0 = uint32_t(noise.seed), key1 = uint32_t(noise.seed >> 32);
    Words c0 = load(order) + splat(uint32_t(first / 4)), c1 = splat(noise.position), c2 = splat(noise.stream), c3 = splat(0u);
    for (int turn = 0; turn < 10; turn++) {
        Words high0, low0, high1, low1;
        multiply(c0, 0xD2511F53u, high0, low0);
        multiply(c2, 0xCD9E8D57u, high1, low1);
        c0 = high1 ^ c1 ^ splat(key0);
        c1 = low1;
        c2 = high0 ^ c3 ^ splat(key1);
        c3 = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    w[0] = c0;
    w[1] = c1;
    w[2] = c2;
    w[3] = c3;
    transpose_words(w);
}

// -log(-log u), u = (word + 1/2) 2^-32, evaluated in fp64 and rounded to fp32.
inline float gumbel(uint32_t word) { return float(-std::log(-std::log((double(word) + 0.5) * 0x1p-32))); }

// The noisy score is an fp64 sum, so that large logits keep their noise and ties are rare.
inline void offer(Best& best, float x, int64_t token, uint32_t word) {
    const double score = double(x) + double(gumbel(word));
    if (score > best.score || (score == best.score && token < best.token)) best = {score, token, x};
}

// x = logits / temperature for `count` tokens, then -infinity up to BLOCK_TOKENS. Returns x, or the logits where they are x.
inline const float* block_of(const float* logits, int64_t count, float temperature, float* x) {
    if (temperature == 1.0f && count == BLOCK_TOKENS) return logits;
    const Lanes divisor = splat(temperature);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(x + i, load(logits + i) / divisor);
    for (; i < count; i++) x[i] = logits[i] / temperature;
    for (; i < BLOCK_TOKENS; i++) x[i] = -INF;
    return x;
}

// Maximum and sum of exponentials of x[0, BLOCK_TOKENS); exp(x - max) is left in `terms`.
inline BlockStats block_stats(const float* x, float* terms) {
    Lanes top = load(x);
    for (int64_t i = LANES; i < BLOCK_TOKENS; i += LANES) top = larger(top, load(x + i));
    const float max = max_lanes(top);
    const Lanes shift = splat(max == -INF ? 0.0f : max);
    Lanes sum = splat(0.0f);
    for (int64_t i = 0; i < BLOCK_TOKENS; i += LANES) {
        const Lanes e = exp(load(x + i) - shift);
        store(terms + i, e);
        sum = sum + e;
    }
    return {max, sum_lanes(sum)};
}

// Adds the noise of tokens [first, first + BLOCK_TOKENS) to x and keeps the best. `terms` and `max` are block_stats'.
//
// With v = 1 - u >= 2^-33 the noise is -log(-log1p(-v)) <= -log v, so a score can reach the best only where
// v <= exp(x - best). exp(x - max) is at hand; `reach` is exp(max - best), enlarged by e^0.001, which covers the
// roundings of v, of the terms (2^-23 each) and of the noise (2^-20). Where the clamp at e^60 binds, or a term is flushed
// to 0, the token lies 60 - 22.9 or more below the best token of its own block and cannot win.
inline void block_noise(const float* x, const float* terms, float max, int64_t first, const Noise& noise, Best& best) {
    constexpr double MARGIN = 1e-3, CLAMP = 60.0;
    if (max == -INF || double(max) + GUMBEL_MAX + MARGIN < best.score) return;
    auto reach_now = [&] { return float(std::exp(std::fmin(double(max) - best.score + MARGIN, CLAMP))) * 0x1p32f; };
    float reach = reach_now();
    for (int64_t group = 0; group < BLOCK_TOKENS; group += 4 * LANES) {
        Words w[4];
        philox64(noise, first + group, w);
        for (int i = 0; i < 4; i++) {
            const int64_t start = group + i * LANES;
            const uint32_t open = lanes_of(less(to_float(~w[i]), load(terms + start) * splat(reach)));
            if (!open) continue;
            uint32_t words[LANES];
            store(words, w[i]);
            for (int lane = 0; lane < LANES; lane++)
                if (open >> lane & 1) offer(best, x[start + lane], first + start + lane, words[lane]);
            reach = reach_now();
        }
    }
}

struct RowStats {
    float max;
    float sum;  // NaN where the row held a NaN, +infinity, or nothing but -infinity
};

// `maxima` and `sums` of all blocks of a row, in block order.
inline RowStats finish(const float* maxima, const float* sums, int64_t blocks) {
    float max = -INF;
    for (int64_t b = 0; b < blocks; b++) max = maxima[b] > max ? maxima[b] : max;
    Lanes total = splat(0.0f);
    for (int64_t b = 0; b < blocks; b += LANES) {
        float m[LANES], s[LANES];
        for (int64_t i = 0; i < LANES; i++) {
            m[i] = b + i < blocks ? maxima[b + i] : -INF;
            s[i] = b + i < blocks ? sums[b + i] : 0.0f;
        }
        total = fma(exp(load(m) - splat(max)), load(s), total);
    }
    return {max, sum_lanes(total)};
}

// Sum of e^(x - m) (x - m) over a block, m its maximum.
inline float block_weighted(const float* x, const float* terms, float max) {
    if (max == -INF) return 0.0f;
    Lanes sum = splat(0.0f);
    for (int64_t i = 0; i < BLOCK_TOKENS; i += LANES)  // below -87 the term is 0
        sum = fma(load(terms + i), larger(splat(-88.0f), load(x + i) - splat(max)), sum);
    return sum_lanes(sum);
}

// H = log sum - (sum of e^(x - m) (x - m)) / sum, m the row's maximum, of what all blocks of a row gave, in block order.
inline float entropy(const RowStats& row, const float* maxima, const float* sums, const float* weighted, int64_t blocks) {
    double total = 0.0;
    for (int64_t b = 0; b < blocks; b++) {
        const double gap = double(maxima[b]) - double(row.max);
        if (gap > -87.0) total += std::exp(gap) * (double(weighted[b]) + gap * double(sums[b]));
    }
    return float(std::log(double(row.sum)) - total / double(row.sum));
}

inline float log_sum_exp(const RowStats& row) { return float(double(row.max) + std::log(double(row.sum))); }

}  // namespace tandem

// Sampling and log-sum-exp over rows of logits. See sample.py for the contract and sample.h for the order of reduction.
#include "sample.h"
#include <omp.h>
#include <algorithm>
#include <vector>

using namespace tandem;

namespace {

struct Filter {
    int32_t top_k;  // 0: all
    double top_p;   // 1: all
    double min_p;   // 0: all
    bool any() const { return top_k > 0 || top_p < 1.0 || min_p > 0.0; }
};

struct Scratch {
    std::vector<float> maxima, sums, row, tops, allowed;
    std::vector<uint64_t> keys;
    std::vector<int64_t> masses;
    void reserve(int64_t blocks) {
        maxima.resize(blocks);
        sums.resize(blocks);
    }
};

template <typename EachBlock>
RowStats row_stats(const float* logits, int64_t vocab, float temperature, Scratch& scratch, EachBlock each) {
    const int64_t blocks = num_blocks(vocab);
    scratch.reserve(blocks);
    alignas(64) float buffer[BLOCK_TOKENS], terms[BLOCK_TOKENS];
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t first = b * BLOCK_TOKENS;
        const float* x = block_of(logits + first, std::min(BLOCK_TOKENS, vocab - first), temperature, buffer);
        const BlockStats stats = block_stats(x, terms);
        scratch.maxima[b] = stats.max;
        scratch.sums[b] = stats.sum;
        each(x, terms, stats, first);
    }
    return finish(scratch.maxima.data(), scratch.sums.data(), blocks);
}

// Lowest id of the largest logit; false where there is none or the row holds a NaN or +infinity.
bool greedy(const float* logits, int64_t vocab, int64_t& token) {
    Lanes top = splat(-INF);
    LaneMask bad = is_nan(splat(0.0f));
    int64_t i = 0;
    for (; i + LANES <= vocab; i += LANES) {
        const Lanes x = load(logits + i);
        top = larger(top, x);
        bad = bad | is_nan(x);
    }
    float max = lanes_of(bad) ? INF : max_lanes(top);
    for (; i < vocab; i++) {
        if (logits[i] != logits[i]) return false;
        max = logits[i] > max ? logits[i] : max;
    }
    if (!(max < INF && max > -INF)) return false;
    token = std::find(logits, logits + vocab, max) - logits;
    return true;
}

// Larger logit first, then lower id: descending keys are the order in which tokens are kept. -0 counts as 0.
inline uint64_t key_of(float x, int64_t token) {
    const float canonical = x + 0.0f;
    uint32_t b;
    std::memcpy(&b, &canonical, 4);
    b = (b & 0x80000000u) ? ~b : (b | 0x80000000u);
    return (uint64_t(b) << 32) | (0xffffffffu - uint32_t(token));
}
inline int64_t token_of(uint64_t key) { return int64_t(0xffffffffu - uint32_t(key)); }

// Weight of a token relative to the most likely one, in units of 2^-40: integers, so that sums do not depend on their order.
// exp in fp64: n = rint(d / log 2), Taylor to the 13th power (remainder below 2^-57).
inline int64_t mass_of(double d) {
    constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52: the sum's low bits are the nearest integer
    d = d < -30.0 ? -30.0 : d;                    // e^-30 2^40 = 0.10 rounds to 0
    const double t = d * 1.4426950408889634 + magic, n = t - magic;
    double r = __builtin_fma(n, -0.69314718036912382, d);
    r = __builtin_fma(n, -1.9082149292705877e-10, r);
    double p = 1.0 / 6227020800.0;
    p = __builtin_fma(p, r, 1.0 / 479001600.0);
    p = __builtin_fma(p, r, 1.0 / 39916800.0);
    p = __builtin_fma(p, r, 1.0 / 3628800.0);
    p = __builtin_fma(p, r, 1.0 / 362880.0);
    p = __builtin_fma(p, r, 1.0 / 40320.0);
    p = __builtin_fma(p, r, 1.0 / 5040.0);
    p = __builtin_fma(p, r, 1.0 / 720.0);
    p = __builtin_fma(p, r, 1.0 / 120.0);
    p = __builtin_fma(p, r, 1.0 / 24.0);
    p = __builtin_fma(p, r, 1.0 / 6.0);
    p = __builtin_fma(p, r, 0.5);
    p = __builtin_fma(p, r, 1.0);
    p = __builtin_fma(p, r, 1.0);
    int64_t exponent;
    std::memcpy(&exponent, &t, 8);
    exponent = (exponent + 1023 + 40) << 52;
    double scale;
    std::memcpy(&scale, &exponent, 8);
    const double units = p * scale + magic;  // rounds to an integer below 2^41, held in the low bits
    int64_t mass;
    std::memcpy(&mass, &units, 8);
    return mass & ((int64_t(1) << 50) - 1);
}

// Filtering works on a row padded with -infinity to whole blocks; `vocab` below counts the padding.

// Tokens with x >= floor, as keys. -infinity is never collected.
void collect(const float* x, int64_t vocab, float floor, std::vector<uint64_t>& keys) {
    keys.clear();
    floor = std::max(floor, -std::numeric_limits<float>::max());
    for (int64_t i = 0; i < vocab; i += LANES) {
        const uint32_t below = lanes_of(less(load(x + i), splat(floor)));
        if (below == 0xffff) continue;
        for (int lane = 0; lane < LANES; lane++)
            if (!(below >> lane & 1)) keys.push_back(key_of(x[i + lane], i + lane));
    }
}

// A lower bound of the k-th largest x: the k-th largest among maxima of disjoint sets of 16 tokens.
float floor_of_top_k(const float* x, int64_t vocab, int64_t k, std::vector<float>& tops) {
    tops.resize(vocab / LANES);
    if (k > int64_t(tops.size())) return -INF;
    for (int64_t first = 0; first < vocab; first += BLOCK_TOKENS) {
        Lanes top = load(x + first);
        for (int64_t i = LANES; i < BLOCK_TOKENS; i += LANES) top = larger(top, load(x + first + i));
        store(tops.data() + first / LANES, top);
    }
    std::nth_element(tops.begin(), tops.begin() + (k - 1), tops.end(), std::greater<float>());
    return tops[k - 1];
}

// Length of the shortest run of `keys`, largest first, whose mass reaches `wanted`; 0 where all of them do not.
// `keys` is left so that the run is its beginning, the run's last token in its place.
int64_t count_top_p(std::vector<uint64_t>& keys, const std::vector<int64_t>& masses, double wanted) {
    int64_t mass = 0, low = 0, high = int64_t(keys.size());  // the run ends in (low, high]; `mass` is that of [0, low)
    for (int64_t middle = 256; high - low > 64; middle = low + (high - low) / 2) {
        middle = std::min(middle, low + (high - low) / 2);
        std::nth_element(keys.begin() + low, keys.begin() + middle, keys.begin() + high, std::greater<uint64_t>());
        int64_t more = 0;
        for (int64_t i = low; i < middle; i++) more += masses[token_of(keys[i])];
        if (double(mass + more) >= wanted) {
            high = middle;
        } else {
            low = middle;
            mass += more;
        }
    }
    std::sort(keys.begin() + low, keys.begin() + high, std::greater<uint64_t>());
    for (; low < high; low++) {
        mass += masses[token_of(keys[low])];
        if (double(mass) >= wanted) return low + 1;
    }
    return 0;
}

// The smallest fp32 number whose distance to max, in fp64, is at least `lowest`.
float edge_of_min_p(double max, double lowest) {
    float edge = float(max + lowest);
    while (double(edge) - max >= lowest) edge = std::nextafter(edge, -INF);
    while (!(double(edge) - max >= lowest)) edge = std::nextafter(edge, INF);
    return edge;
}

// Sets the logits that the filter drops to -infinity. x is finite or -infinity, `max` its largest.
void drop(float* x, int64_t vocab, double max, const Filter& filter, Scratch& scratch) {
    std::vector<uint64_t>& keys = scratch.keys;
    uint64_t last = 0;  // key of the last token kept by top-k and top-p; 0: all are
    if (filter.top_k > 0) {
        collect(x, vocab, floor_of_top_k(x, vocab, filter.top_k, scratch.tops), keys);
        if (int64_t(keys.size()) > filter.top_k) {
            std::nth_element(keys.begin(), keys.begin() + (filter.top_k - 1), keys.end(), std::greater<uint64_t>());
            keys.resize(filter.top_k);
        }
        last = *std::min_element(keys.begin(), keys.end());
    }
    if (filter.top_p < 1.0) {
        std::vector<int64_t>& masses = scratch.masses;
        masses.resize(vocab);
        int64_t total = 0, count = 0;
        for (int64_t i = 0; i < vocab; i++) masses[i] = mass_of(double(x[i]) - max);
        if (filter.top_k > 0) {
            for (uint64_t key : keys) total += masses[token_of(key)];
        } else {
            for (int64_t mass : masses) total += mass;
            // Tokens below this floor together have less than 1 - top_p of the mass: first try without them.
            collect(x, vocab, float(max - std::log(double(vocab) / (1.0 - filter.top_p)) - 1.0), keys);
            count = count_top_p(keys, masses, filter.top_p * double(total));
            if (count == 0) collect(x, vocab, -INF, keys);
        }
        if (count == 0) count = count_top_p(keys, masses, filter.top_p * double(total));
        last = keys[count - 1];
    }
    float edge = last ? x[token_of(last)] : -std::numeric_limits<float>::max();
    const float edge_min_p = filter.min_p > 0.0 ? edge_of_min_p(max, std::log(filter.min_p)) : edge;
    int64_t ties = last ? token_of(last) + 1 : vocab;  // tokens before this are kept where x == edge
    if (edge_min_p > edge) {
        edge = edge_min_p;
        ties = vocab;
    }
    for (int64_t i = 0; i < ties; i++) x[i] = x[i] < edge ? -INF : x[i];
    for (int64_t i = ties; i < vocab; i++) x[i] = x[i] <= edge ? -INF : x[i];
}

// Distinct masks of `words` words, a bit a token; a row has that of its number, or none where it is negative.
struct Masks {
    const uint32_t* masks;  // null: no row has one
    const int32_t* numbers;
    int64_t words;
    // The logits of row s, -infinity where its mask has no bit. NaN and +infinity stay: such a row is refused whatever its mask.
    const float* apply(const float* logits, int64_t s, int64_t vocab, Scratch& scratch) const {
        if (!masks || numbers[s] < 0) return logits;
        const uint32_t* mask = masks + numbers[s] * words;
        scratch.allowed.resize(vocab);
        for (int64_t i = 0; i < vocab; i++) scratch.allowed[i] = mask[i / 32] >> (i % 32) & 1 || !(logits[i] < INF) ? logits[i] : -INF;
        return scratch.allowed.data();
    }
};

// The row after temperature and filters, in scratch.row, padded to whole blocks; false where it is not finite.
bool filter_row(const float* logits, int64_t vocab, float temperature, const Filter& filter, Scratch& scratch) {
    const int64_t padded = num_blocks(vocab) * BLOCK_TOKENS;
    scratch.row.resize(padded);
    float* x = scratch.row.data();
    int64_t token;
    if (temperature == 0.0f) {
        if (!greedy(logits, vocab, token)) return false;
        std::fill(x, x + padded, -INF);
        x[token] = 0.0f;
        return true;
    }
    for (int64_t i = 0; i < vocab; i++) x[i] = logits[i] / temperature;
    std::fill(x + vocab, x + padded, -INF);
    if (!greedy(x, padded, token)) return false;
    if (filter.any()) drop(x, padded, double(x[token]), filter, scratch);
    return true;
}

bool sample_row(const float* logits, int64_t vocab, float temperature, const Filter& filter, const Noise& noise, Scratch& scratch,
                int64_t& token, float& logprob) {
    if (temperature == 0.0f) {
        logprob = 0.0f;
        return greedy(logits, vocab, token);
    }
    if (filter.any()) {
        if (!filter_row(logits, vocab, temperature, filter, scratch)) return false;
        logits = scratch.row.data();
        temperature = 1.0f;
    }
    Best best;
    const RowStats row = row_stats(logits, vocab, temperature, scratch, [&](const float* x, const float* terms, BlockStats stats, int64_t first) {
        block_noise(x, terms, stats.max, first, noise, best);
    });
    token = best.token;
    logprob = best.logit - log_sum_exp(row);
    return row.sum < INF && best.token >= 0;
}

template <typename Body>
int64_t first_bad_row(int64_t rows, int threads, Body body) {
    int64_t bad = rows;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(min : bad)
    for (int64_t s = 0; s < rows; s++) {
        static thread_local Scratch scratch;
        if (!body(s, scratch)) bad = std::min(bad, s);
    }
    return bad == rows ? -1 : bad;
}

}  // namespace

extern "C" {

// Each returns the first row that holds a NaN, +infinity or nothing but -infinity, or -1. `stride` is between rows of logits.

int64_t tandem_sample(const float* logits, int64_t stride, int64_t rows, int64_t vocab, const float* temperature, const int32_t* top_k,
                      const double* top_p, const double* min_p, const uint32_t* masks, const int32_t* numbers, int64_t words, const uint64_t* seeds,
                      const uint32_t* positions, uint32_t stream, int64_t* tokens, float* logprobs, int threads) {
    const Masks allowed{masks, numbers, words};
    return first_bad_row(rows, threads, [&](int64_t s, Scratch& scratch) {
        return sample_row(allowed.apply(logits + s * stride, s, vocab, scratch), vocab, temperature[s], {top_k[s], top_p[s], min_p[s]}, {seeds[s], positions[s], stream}, scratch,
                          tokens[s], logprobs[s]);
    });
}

int64_t tandem_processed_logits(const float* logits, int64_t stride, int64_t rows, int64_t vocab, const float* temperature,
                                const int32_t* top_k, const double* top_p, const double* min_p, const uint32_t* masks, const int32_t* numbers,
                                int64_t words, float* out, int threads) {
    const Masks allowed{masks, numbers, words};
    return first_bad_row(rows, threads, [&](int64_t s, Scratch& scratch) {
        const Filter filter{top_k[s], top_p[s], min_p[s]};
        if (!filter_row(allowed.apply(logits + s * stride, s, vocab, scratch), vocab, temperature[s], filter, scratch)) return false;
        std::copy_n(scratch.row.data(), vocab, out + s * vocab);
        return true;
    });
}

// `temperature` may be null: 1. Rows that are not finite give NaN.
int64_t tandem_log_sum_exp(const float* logits, int64_t stride, int64_t rows, int64_t vocab, const float* temperature, float* out, int threads) {
    return first_bad_row(rows, threads, [&](int64_t s, Scratch& scratch) {
        const RowStats row = row_stats(logits + s * stride, vocab, temperature ? temperature[s] : 1.0f, scratch,
                                       [](const float*, const float*, BlockStats, int64_t) {});
        out[s] = log_sum_exp(row);
        return row.sum < INF;
    });
}

int64_t tandem_entropy(const float* logits, int64_t stride, int64_t rows, int64_t vocab, const float* temperature, float* out, int threads) {
    return first_bad_row(rows, threads, [&](int64_t s, Scratch& scratch) {
        std::vector<float> weighted;
        const RowStats row = row_stats(logits + s * stride, vocab, temperature ? temperature[s] : 1.0f, scratch,
                                       [&](const float* x, const float* terms, BlockStats stats, int64_t) { weighted.push_back(block_weighted(x, terms, stats.max)); });
        out[s] = entropy(row, scratch.maxima.data(), scratch.sums.data(), weighted.data(), num_blocks(vocab));
        return row.sum < INF;
    });
}

// For tests: the shared primitives over `count` values (a multiple of 16), `which` 0 exp, 1 log.
void tandem_vector(int which, const float* x, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(out + i, which == 0 ? tandem::exp(load(x + i)) : tandem::log(load(x + i)));
}

void tandem_noise(uint64_t seed, uint32_t position, uint32_t stream, int64_t vocab, uint32_t* words, float* noise) {  // vocab: a multiple of 64
    for (int64_t first = 0; first < vocab; first += 4 * LANES) {
        Words w[4];
        philox64({seed, position, stream}, first, w);
        for (int i = 0; i < 4; i++) store(words + first + i * LANES, w[i]);
    }
    for (int64_t i = 0; i < vocab; i++) noise[i] = gumbel(words[i]);
}

}  // extern "C"

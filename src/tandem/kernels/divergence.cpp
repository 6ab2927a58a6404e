// The divergence of a student's distribution over a vocabulary from a teacher's, with -log p of a target beside it, and its gradient at the student's
// logits; and a distribution's most likely tokens. Contract in divergence.py.
#include "head.h"
#include "head_gradient.h"
#include "layer.h"

using namespace tandem;

namespace {

enum Kind : int64_t { FORWARD, REVERSE, JENSEN_SHANNON, SKEWED_FORWARD, SKEWED_REVERSE };  // divergence.py: KINDS

constexpr float FAR = -1e4f;      // a log-prob is no lower, so that 0 times it is 0
constexpr float LEAST = 1e-37f;   // of a mixture, whose parts are 0 where it is less

// A token's share of the divergence, and p times its derivative by p up to a constant times p, which the softmax takes out again.
struct Share { Lanes value, drift; };

template <int64_t KIND>
inline Share share_of(Lanes p, Lanes q, Lanes logp, Lanes logq, Lanes mix, Lanes rest) {
    if constexpr (KIND == FORWARD) return {q * (logq - logp), splat(0.0f) - q};
    if constexpr (KIND == REVERSE) {
        const Lanes own = p * (logp - logq);
        return {own, own};
    }
    const Lanes mixed = KIND == SKEWED_REVERSE ? fma(mix, p, rest * q) : fma(mix, q, rest * p), m = larger(splat(LEAST), mixed), logm = log(m);
    if constexpr (KIND == JENSEN_SHANNON) {
        const Lanes own = rest * p * (logp - logm);
        return {fma(mix * q, logq - logm, own), own};
    }
    if constexpr (KIND == SKEWED_FORWARD) return {q * (logq - logm), splat(0.0f) - rest * (p * q / m)};
    const Lanes gap = logp - logm;
    return {p * gap, p * (gap - mix * (p / m))};
}

struct Logits {  // [blocks][rows][BLOCK_TOKENS], over the temperature; and each row's log-sum-exp
    float* x;
    std::vector<float> maxima, sums, lse;
    Logits(float* x, int64_t blocks, int64_t rows) : x(x), maxima(blocks * rows), sums(blocks * rows), lse(rows) {}
};

template <typename E>
void logits_share(const Product<E>& head, const Codes* codes, const float* temperature, Logits& out, const Team& team) {
    each_block(head, codes, temperature, team, [&](int64_t row, const float* x, float*, BlockStats stats, int64_t first) {
        const int64_t at = first / BLOCK_TOKENS * head.rows + row;
        out.maxima[at] = stats.max, out.sums[at] = stats.sum;
        std::memcpy(out.x + at * BLOCK_TOKENS, x, BLOCK_TOKENS * sizeof(float));
    });
}

float lse_of(const Logits& of, int64_t row, int64_t rows, int64_t blocks) {
    std::vector<float> m(blocks), s(blocks);
    for (int64_t b = 0; b < blocks; b++) m[b] = of.maxima[b * rows + row], s[b] = of.sums[b * rows + row];
    return log_sum_exp(finish(m.data(), s.data(), blocks));
}

template <typename E>
struct Out {
    E* dlogits;  // [blocks][all][BLOCK_TOKENS], of temperature 1; null: not wanted
    float text;  // in them, so much of the gradient of -log p(target)
    int64_t first, all;
    float *divergence, *logprobs, *teacher_logprobs, *entropies;
};

// A row of both, whose logits it overwrites. `target`: its place in them.
template <int64_t KIND, typename E>
void row_of(Logits& student, Logits& teacher, int64_t row, int64_t rows, int64_t blocks, int64_t target, float mix, const Out<E>& out) {
    const Lanes lse_s = splat(student.lse[row]), lse_t = splat(teacher.lse[row]), far = splat(FAR), weight = splat(mix), rest = splat(1.0f - mix);
    double value = 0.0, drift = 0.0, entropy = 0.0;
    for (int64_t b = 0; b < blocks; b++) {
        float *s = student.x + (b * rows + row) * BLOCK_TOKENS, *t = teacher.x + (b * rows + row) * BLOCK_TOKENS;
        Lanes values = splat(0.0f), drifts = splat(0.0f), entropies = splat(0.0f);
        for (int64_t c = 0; c < BLOCK_TOKENS; c += LANES) {
            const Lanes logp = larger(far, load(s + c) - lse_s), logq = larger(far, load(t + c) - lse_t), p = exp(logp), q = exp(logq);
            const Share share = share_of<KIND>(p, q, logp, logq, weight, rest);
            values = values + share.value, drifts = drifts + share.drift;
            entropies = fma(p, logp, entropies);
            if (out.dlogits) store(s + c, share.drift), store(t + c, p);
        }
        value += sum_lanes(values), drift += sum_lanes(drifts), entropy -= sum_lanes(entropies);
    }
    out.divergence[out.first + row] = float(value), out.entropies[out.first + row] = float(entropy);
    if (!out.dlogits) return;
    student.x[target] -= out.text;  // p - [target] is the gradient of -log p(target): a drift of -1 there
    const Lanes sum = splat(float(drift - out.text));
    for (int64_t b = 0; b < blocks; b++) {
        const float *s = student.x + (b * rows + row) * BLOCK_TOKENS, *t = teacher.x + (b * rows + row) * BLOCK_TOKENS;
        E* to = out.dlogits + (b * out.all + out.first + row) * BLOCK_TOKENS;
        for (int64_t c = 0; c < BLOCK_TOKENS; c += LANES) store_narrow(to + c, load(s + c) - load(t + c) * sum);
    }
}

template <typename E>
void forward(const Product<E>& student, const Codes* codes, const Product<E>& teacher, const Codes* teacher_codes, int64_t kind, float mix, float temperature, const int64_t* targets,
             float* room, const Out<E>& out) {
    const int64_t n = student.rows, blocks = num_blocks(student.columns);
    const std::vector<float> temperatures(n, temperature);
    Logits own(room, blocks, n), others(room + blocks * n * BLOCK_TOKENS, blocks, n);
    with_team([&](const Team& team) {
        logits_share(student, codes, temperatures.data(), own, team);
        logits_share(teacher, teacher_codes, temperatures.data(), others, team);
        team.wait();
        int64_t row, last;
        team.share(n, row, last);
        for (; row < last; row++) {
            own.lse[row] = lse_of(own, row, n, blocks), others.lse[row] = lse_of(others, row, n, blocks);
            const int64_t target = targets[out.first + row], at = (target / BLOCK_TOKENS * n + row) * BLOCK_TOKENS + target % BLOCK_TOKENS;
            out.logprobs[out.first + row] = own.x[at] - own.lse[row], out.teacher_logprobs[out.first + row] = others.x[at] - others.lse[row];
            switch (kind) {
                case FORWARD: row_of<FORWARD>(own, others, row, n, blocks, at, mix, out); break;
                case REVERSE: row_of<REVERSE>(own, others, row, n, blocks, at, mix, out); break;
                case JENSEN_SHANNON: row_of<JENSEN_SHANNON>(own, others, row, n, blocks, at, mix, out); break;
                case SKEWED_FORWARD: row_of<SKEWED_FORWARD>(own, others, row, n, blocks, at, mix, out); break;
                default: row_of<SKEWED_REVERSE>(own, others, row, n, blocks, at, mix, out);
            }
        }
    });
}

struct Likely { float x; int64_t id; };

// Of two tokens the likelier one; of equals the one of the lower id.
inline bool likelier(const Likely& a, const Likely& b) { return a.x > b.x || (a.x == b.x && a.id < b.id); }

// The `count` likeliest tokens of a row, in order. Blocks are looked at from that of the largest logit on, until the next one's is too small.
inline void likeliest(const Logits& of, int64_t row, int64_t rows, int64_t blocks, int64_t vocab, int64_t count, int64_t* ids, float* logprobs) {
    std::vector<int64_t> order(blocks);
    for (int64_t b = 0; b < blocks; b++) order[b] = b;
    const auto largest = [&](int64_t b) { return of.maxima[b * rows + row]; };
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return largest(a) > largest(b); });
    std::vector<Likely> kept;  // a heap, the least likely at its front
    kept.reserve(count);
    for (int64_t b : order) {
        if (int64_t(kept.size()) == count && largest(b) < kept.front().x) break;
        const float* x = of.x + (b * rows + row) * BLOCK_TOKENS;
        const int64_t first = b * BLOCK_TOKENS, some = std::min(BLOCK_TOKENS, vocab - first);
        for (int64_t c = 0; c < some; c++) {
            const Likely one{x[c], first + c};
            if (int64_t(kept.size()) == count) {
                if (!likelier(one, kept.front())) continue;
                std::pop_heap(kept.begin(), kept.end(), likelier);
                kept.pop_back();
            }
            kept.push_back(one);
            std::push_heap(kept.begin(), kept.end(), likelier);
        }
    }
    std::sort_heap(kept.begin(), kept.end(), likelier);
    for (int64_t k = 0; k < count; k++) ids[k] = kept[k].id, logprobs[k] = kept[k].x - of.lse[row];
}

template <typename E>
void top(const Product<E>& head, const Codes* codes, float temperature, int64_t count, float* room, int64_t* ids, float* logprobs) {
    const int64_t n = head.rows, blocks = num_blocks(head.columns);
    const std::vector<float> temperatures(n, temperature);
    Logits own(room, blocks, n);
    with_team([&](const Team& team) {
        logits_share(head, codes, temperatures.data(), own, team);
        team.wait();
        int64_t row, last;
        team.share(n, row, last);
        for (; row < last; row++) {
            own.lse[row] = lse_of(own, row, n, blocks);
            likeliest(own, row, n, blocks, head.columns, count, ids + row * count, logprobs + row * count);
        }
    });
}

// The gradients that `forward` left, each row's times a factor.
template <typename E>
class Scaled {
public:
    Scaled(const E* dlogits, const float* factors, int64_t rows) : dlogits_(dlogits), factors_(factors), rows_(rows) {}
    void prepare(const Team&) {}
    void write(int64_t row, int64_t first, int64_t count, E* out) const {
        const E* from = dlogits_ + (first / BLOCK_TOKENS * rows_ + row) * BLOCK_TOKENS + first % BLOCK_TOKENS;
        const Lanes factor = splat(factors_[row]);
        for (int64_t c = 0; c < count; c += LANES) store_narrow(out + c, load_wide(from + c) * factor);
    }

private:
    const E* dlogits_;
    const float* factors_;
    const int64_t rows_;
};

}  // namespace

#define TANDEM_DIVERGENCE(NAME, E)                                                                                                                   \
    void divergence_##NAME(const E* hidden, int64_t stride, const E* packed, const Codes* codes, const E* teacher, int64_t teacher_stride, const E* teacher_packed, \
                           const Codes* teacher_codes, int64_t n, int64_t vocab, int64_t depth, int64_t teacher_depth, int64_t kind, float mix, float temperature, \
                           float text, const int64_t* targets, float* room, E* dlogits, int64_t first, int64_t all, float* divergences, float* logprobs, \
                           float* teacher_logprobs, float* entropies) {                                                                             \
        forward(Product<E>{hidden, stride, packed, n, vocab, depth}, codes, Product<E>{teacher, teacher_stride, teacher_packed, n, vocab, teacher_depth}, teacher_codes, \
                kind, mix, temperature, targets, room, Out<E>{dlogits, text, first, all, divergences, logprobs, teacher_logprobs, entropies});             \
    }                                                                                                                                                \
    void top_tokens_##NAME(const E* hidden, int64_t stride, const E* packed, const Codes* codes, int64_t n, int64_t vocab, int64_t depth, float temperature, int64_t count, \
                           float* room, int64_t* ids, float* logprobs) {                                                                             \
        top(Product<E>{hidden, stride, packed, n, vocab, depth}, codes, temperature, count, room, ids, logprobs);                                    \
    }                                                                                                                                                \
    void divergence_backward_##NAME(const E* dlogits, const float* factors, const E* hidden, const E* weight, float* dhidden, float* dweight, int64_t n, \
                                    int64_t vocab, int64_t width) {                                                                                  \
        Scaled<E> scaled(dlogits, factors, n);                                                                                                       \
        head_backward(scaled, hidden, weight, dhidden, dweight, n, vocab, width);                                                                    \
    }

extern "C" {
TANDEM_DIVERGENCE(bf16, bf16)
TANDEM_DIVERGENCE(fp32, float)
}

// AdamW over a tensor's fp32 master copy, writing the compute copy; and the squared norm of a gradient. See adamw.py.
#include "sample.h"
#include "tile.h"
#include <omp.h>
#include <vector>

using namespace tandem;

namespace {

constexpr int64_t CHUNK = 1 << 16;  // elements summed by one thread; fixes the order of the norm's reduction

template <typename E>
void step(float* master, float* first, float* second, const float* grad, E* value, int64_t n, float lr, float beta1, float beta2,
          float eps, float decay, float bias1, float bias2, float scale) {
    const float keep = 1.0f - lr * decay, rate = lr / bias1, root = 1.0f / std::sqrt(bias2);
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < n; c += CHUNK) {
        const int64_t end = std::min(n, c + CHUNK);
#pragma omp simd
        for (int64_t i = c; i < end; i++) {
            const float g = grad[i] * scale;
            const float m = beta1 * first[i] + (1.0f - beta1) * g, v = beta2 * second[i] + (1.0f - beta2) * g * g;
            first[i] = m;
            second[i] = v;
            master[i] = master[i] * keep - rate * m / (std::sqrt(v) * root + eps);
        }
        for (int64_t i = c; i < end; i++) value[i] = from_float<E>(master[i]);
    }
}

constexpr int64_t SHARED = 1024;  // numbers of a moment that share a scale
constexpr uint32_t ROUNDING = 4;  // numerics.random.Stream

struct Constants {
    float lr, beta1, beta2, eps, decay, bias1, bias2, scale;
};

// e4m3, a size without a sign: its bits are those of fp32 from the 20th on, with another bias.
inline float size_of(uint32_t code) { return of_bits(code << 20) * 0x1p120f; }
inline uint32_t drawn_size(float size, uint32_t below) { return std::min<uint32_t>((bits_of(size * 0x1p-120f) + below) >> 20, 126); }

// Moments as codes with a scale for SHARED of them, the second as its root; the weights in fp32, or (OWN) in bf16 alone. What is rounded
// goes up by the probability of what is lost, by words of Philox; bits of a word: 10 for the first moment, 10 for the second, 12 for the
// weight. A second moment above zero stays there: over one that became zero an update would be a moment over eps.
template <bool EIGHT, bool OWN>
void step_few(float* master, void* firsts, void* seconds, float* first_scales, float* second_scales, const float* grad, bf16* value, int64_t n, uint64_t seed,
              uint32_t update, const Constants& k) {
    const float keep = 1.0f - k.lr * k.decay, rate = k.lr / k.bias1, root = 1.0f / std::sqrt(k.bias2);
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < n; c += SHARED) {
        const int64_t count = std::min(SHARED, n - c), block = c / SHARED;
        alignas(64) float m[SHARED] = {}, v[SHARED] = {}, w[SHARED] = {};
        alignas(64) uint32_t words[SHARED];
        uint8_t *first = (uint8_t*)firsts + c, *second = (uint8_t*)seconds + c;
        for (int64_t i = 0; i < SHARED; i += 64) {
            Words drawn[4];
            philox64({seed, update, ROUNDING}, c + i, drawn);
            std::memcpy(words + i, drawn, sizeof drawn);
        }
        if constexpr (EIGHT) {
#pragma omp simd
            for (int64_t i = 0; i < count; i++) {
                m[i] = of_bits(bits_of(size_of(first[i] & 127u) * first_scales[block]) | (first[i] & 128u) << 24);
                const float deviation = size_of(second[i]) * second_scales[block];
                v[i] = deviation * deviation;
            }
        } else {
            std::memcpy(m, (float*)firsts + c, 4 * count);
            std::memcpy(v, (float*)seconds + c, 4 * count);
        }
        for (int64_t i = 0; i < count; i++) w[i] = OWN ? to_float(value[c + i]) : master[c + i];
        float most = 0, widest = 0;
#pragma omp simd reduction(max : most, widest)
        for (int64_t i = 0; i < count; i++) {
            const float g = grad[c + i] * k.scale;
            m[i] = k.beta1 * m[i] + (1.0f - k.beta1) * g;
            v[i] = k.beta2 * v[i] + (1.0f - k.beta2) * g * g;
            w[i] = w[i] * keep - rate * m[i] / (std::sqrt(v[i]) * root + k.eps);
            most = std::max(most, std::fabs(m[i])), widest = std::max(widest, v[i]);
        }
        if constexpr (EIGHT) {
            const float of_first = most / 448.0f, of_second = std::sqrt(widest) / 448.0f;
            const float by_first = of_first > 0 ? of_first : INF, by_second = of_second > 0 ? of_second : INF;
#pragma omp simd
            for (int64_t i = 0; i < count; i++) {
                const uint32_t below = (words[i] & 1023u) << 10 | 512u, under = (words[i] >> 10 & 1023u) << 10 | 512u;
                first[i] = uint8_t(drawn_size(std::fabs(m[i]) / by_first, below) | (bits_of(m[i]) >> 24 & 128u));
                second[i] = uint8_t(std::max<uint32_t>(drawn_size(std::sqrt(v[i]) / by_second, under), v[i] > 0));
            }
            first_scales[block] = of_first, second_scales[block] = of_second;
        } else {
            std::memcpy((float*)firsts + c, m, 4 * count);
            std::memcpy((float*)seconds + c, v, 4 * count);
        }
        if constexpr (OWN) {
#pragma omp simd
            for (int64_t i = 0; i < count; i++) {
                const uint32_t bits = bits_of(w[i]), up = bits + ((words[i] >> 20) << 4 | 8u);
                value[c + i] = bf16(((bits & 0x7f800000u) != 0x7f800000u ? up : bits) >> 16);
            }
        } else {
            std::memcpy(master + c, w, 4 * count);
            for (int64_t i = 0; i < count; i++) value[c + i] = from_float<bf16>(w[i]);
        }
    }
}

}  // namespace

extern "C" {
// `first_scales` null: moments in fp32; `master` null: weights in bf16 alone.
void adamw_few_bf16(float* w, void* m, void* v, float* ms, float* vs, const float* g, bf16* out, int64_t n, int64_t seed, int64_t update, float lr, float b1, float b2,
                    float eps, float wd, float c1, float c2, float scale) {
    const Constants k{lr, b1, b2, eps, wd, c1, c2, scale};
    if (ms) w ? step_few<true, false>(w, m, v, ms, vs, g, out, n, seed, update, k) : step_few<true, true>(w, m, v, ms, vs, g, out, n, seed, update, k);
    else w ? step_few<false, false>(w, m, v, ms, vs, g, out, n, seed, update, k) : step_few<false, true>(w, m, v, ms, vs, g, out, n, seed, update, k);
}
void adamw_bf16(float* w, float* m, float* v, const float* g, bf16* out, int64_t n, float lr, float b1, float b2, float eps, float wd, float c1, float c2, float scale) {
    step(w, m, v, g, out, n, lr, b1, b2, eps, wd, c1, c2, scale);
}
void adamw_fp32(float* w, float* m, float* v, const float* g, float* out, int64_t n, float lr, float b1, float b2, float eps, float wd, float c1, float c2, float scale) {
    step(w, m, v, g, out, n, lr, b1, b2, eps, wd, c1, c2, scale);
}
// Sum of squares in fp64, over chunks in order: the same for any number of threads.
void squared_norm_fp32(const float* g, int64_t n, double* out) {
    const int64_t chunks = (n + CHUNK - 1) / CHUNK;
    std::vector<double> partial(chunks);
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < chunks; c++) {
        double lane[8] = {};
        const int64_t end = std::min(n, (c + 1) * CHUNK);
        int64_t i = c * CHUNK;
        for (; i + 8 <= end; i += 8)
            for (int j = 0; j < 8; j++) lane[j] += double(g[i + j]) * double(g[i + j]);
        for (; i < end; i++) lane[i & 7] += double(g[i]) * double(g[i]);
        partial[c] = ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
    }
    double sum = 0;
    for (double p : partial) sum += p;
    *out = sum;
}
}

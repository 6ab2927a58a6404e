// Gradient of log-probs at the logits, a block of the vocabulary at a time. Contract in logprob.py.
#include "tile.h"
#include <omp.h>

using namespace tandem;

namespace {

// dlogits[n][v] = grad[n] / T * (1 where v is the target, minus exp(logits / T - lse)), rounded to E.
template <typename E>
void backward(const float* logits, const float* lse, const float* grad, const int64_t* targets, E* out, int64_t n, int64_t width,
              int64_t first, float temperature) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const float *row = logits + i * width, scale = grad[i] / temperature;
        E* target_row = out + i * width;
        for (int64_t c = 0; c < width; c += LANES) {
            const int count = int(std::min<int64_t>(LANES, width - c));
            float x[LANES];
            for (int j = 0; j < LANES; j++) x[j] = j < count ? row[c + j] : 0.0f;
            store(x, exp(load(x) / splat(temperature) - splat(lse[i])) * splat(-scale));
            for (int j = 0; j < count; j++) target_row[c + j] = from_float<E>(x[j]);
        }
        const int64_t at = targets[i] - first;
        if (at >= 0 && at < width) {
            const float p = exp_one(row[at] / temperature - lse[i]);
            target_row[at] = from_float<E>(scale * (1.0f - p));
        }
    }
}

}  // namespace

extern "C" {
void logprob_backward_bf16(const float* l, const float* lse, const float* g, const int64_t* t, bf16* out, int64_t n, int64_t w, int64_t first, float temperature) {
    backward(l, lse, g, t, out, n, w, first, temperature);
}
void logprob_backward_fp32(const float* l, const float* lse, const float* g, const int64_t* t, float* out, int64_t n, int64_t w, int64_t first, float temperature) {
    backward(l, lse, g, t, out, n, w, first, temperature);
}
}

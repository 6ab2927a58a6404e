// AdamW over a tensor's fp32 master copy, writing the compute copy; and the squared norm of a gradient. See adamw.py.
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

}  // namespace

extern "C" {
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

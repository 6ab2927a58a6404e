// What stands between the matrix products of a layer: RMS norm, rotary embedding, SwiGLU; forward and
// backward. Contracts in norm.py, rotary.py and swiglu.py. Rows are independent and reduced in a fixed order, in fp32.
#include "rotary.h"
#include <omp.h>
#include <vector>

using namespace tandem;

namespace {

constexpr int64_t NORM_BLOCK = 64;  // rows of one partial sum of the norm's weight gradient

template <typename E>
void norm(const E* x, int64_t x_stride, const E* weight, E* y, int64_t y_stride, float* rstd, int64_t t, int64_t width, float eps) {
#pragma omp parallel for schedule(static) if (t * width > 16384)
    for (int64_t i = 0; i < t; i++) {
        const float scale = norm_row(x + i * x_stride, weight, y + i * y_stride, width, eps);
        if (rstd) rstd[i] = scale;
    }
}

// dx = rstd (w dy - xhat mean(w dy xhat)); dweight += sum over rows of dy xhat, in blocks of NORM_BLOCK rows.
template <typename E>
void norm_backward(const E* dy, const E* x, const E* weight, const float* rstd, E* dx, float* dweight, int64_t t, int64_t width) {
    const int64_t blocks = (t + NORM_BLOCK - 1) / NORM_BLOCK;
    std::vector<float> partial(blocks * width, 0.0f);
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        float* sum = partial.data() + b * width;
        for (int64_t i = b * NORM_BLOCK; i < std::min(t, (b + 1) * NORM_BLOCK); i++) {
            const E *dy_row = dy + i * width, *x_row = x + i * width;
            E* out = dx + i * width;
            const float r = rstd[i];
            const auto terms = [&](int64_t c) { return load_wide(dy_row + c) * load_wide(weight + c) * load_wide(x_row + c); };
            const auto term = [&](int64_t c) { return to_float(dy_row[c]) * to_float(weight[c]) * to_float(x_row[c]); };
            const float mean = lane_sum(width, terms, term) * r / float(width);
            for (int64_t c = 0; c < width; c++) {
                const float xhat = to_float(x_row[c]) * r, d = to_float(dy_row[c]);
                sum[c] += d * xhat;
                out[c] = from_float<E>(r * (d * to_float(weight[c]) - xhat * mean));
            }
        }
    }
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t c = 0; c < width; c++) dweight[c] += partial[b * width + c];
}

// Rotates pairs (i, i + D/2) of each head in place by sign * angle; tables are [positions, D/2].
template <typename E>
void rotate(E* x, int64_t stride, const int64_t* positions, const float* cosine, const float* sine, int64_t t, int64_t heads,
            int64_t head_size, float sign) {
    const int64_t half = head_size / 2;
#pragma omp parallel for schedule(static) if (t * heads * head_size > 16384)
    for (int64_t i = 0; i < t; i++) {
        const float *c = cosine + positions[i] * half, *s = sine + positions[i] * half;
        for (int64_t h = 0; h < heads; h++) rotate_head(x + i * stride + h * head_size, c, s, half, sign);
    }
}

// The first n of 64 values, rounded.
template <typename E>
inline void store_panel(const float* source, E* target, int n) {
    if (n == PANEL) return narrow_panel<E>(source, target);
    for (int j = 0; j < n; j++) target[j] = from_float<E>(source[j]);
}

template <typename E>
void swiglu(const E* gate_up, E* y, int64_t t, int64_t width) {
#pragma omp parallel for schedule(static) if (t * width > 16384)
    for (int64_t i = 0; i < t; i++)
        for (int64_t c = 0; c < width; c += PANEL) {
            const E* gate = gate_up + i * 2 * width + c;
            swiglu_panel(gate, gate + width, y + i * width + c, int(std::min<int64_t>(PANEL, width - c)));
        }
}

template <typename E>
void swiglu_backward(const E* dy, const E* gate_up, E* dgate_up, E* y, int64_t t, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < t; i++) {
        const E *gate = gate_up + i * 2 * width, *up = gate + width, *d = dy + i * width;
        E *dgate = dgate_up + i * 2 * width, *dup = dgate + width, *out = y + i * width;
        float e[PANEL];
        for (int64_t c = 0; c < width; c += PANEL) {
            const int n = int(std::min<int64_t>(PANEL, width - c));
            for (int j = 0; j < PANEL; j++) e[j] = j < n ? -to_float(gate[c + j]) : 0.0f;
            exp_panel(e);
            float gates[PANEL], ups[PANEL], acts[PANEL];
            for (int j = 0; j < n; j++) {
                const float g = to_float(gate[c + j]), u = to_float(up[c + j]), dv = to_float(d[c + j]);
                const float sigmoid = 1.0f / (1.0f + e[j]), silu = g * sigmoid;
                gates[j] = dv * u * (sigmoid + silu * (1.0f - sigmoid));
                ups[j] = dv * silu;
                acts[j] = g / (1.0f + e[j]) * u;
            }
            store_panel<E>(gates, dgate + c, n);
            store_panel<E>(ups, dup + c, n);
            store_panel<E>(acts, out + c, n);
        }
    }
}

}  // namespace

#define TANDEM_BOTH(DEFINE) DEFINE(bf16, bf16) DEFINE(fp32, float)
#define TANDEM_LAYER(NAME, E)                                                                                              \
    void norm_##NAME(const E* x, int64_t xs, const E* w, E* y, int64_t ys, float* rstd, int64_t t, int64_t m, float eps) { norm(x, xs, w, y, ys, rstd, t, m, eps); } \
    void norm_backward_##NAME(const E* dy, const E* x, const E* w, const float* rstd, E* dx, float* dw, int64_t t, int64_t m) { norm_backward(dy, x, w, rstd, dx, dw, t, m); } \
    void rotate_##NAME(E* x, int64_t s, const int64_t* pos, const float* c, const float* sn, int64_t t, int64_t h, int64_t d, float sign) { rotate(x, s, pos, c, sn, t, h, d, sign); } \
    void swiglu_##NAME(const E* gu, E* y, int64_t t, int64_t f) { swiglu(gu, y, t, f); }                                     \
    void swiglu_backward_##NAME(const E* dy, const E* gu, E* dgu, E* y, int64_t t, int64_t f) { swiglu_backward(dy, gu, dgu, y, t, f); }

extern "C" {
TANDEM_BOTH(TANDEM_LAYER)
}

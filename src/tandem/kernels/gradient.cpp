// Products of the backward pass. Contract in gradient.py.
#include "gradient.h"

using namespace tandem;

namespace {

// grad[N, K] += dy[T, N]^T x[T, K].
template <typename E>
void accumulate(const E* dy, int64_t dy_stride, const E* x, int64_t x_stride, float* grad, int64_t t, int64_t n, int64_t k) {
    const int64_t depth = padded_depth<E>(t);
    const auto packed = scratch<E>((k + PANEL - 1) / PANEL * PANEL * depth);
    with_team([&](const Team& team) {
        depth_panels_share(x, x_stride, packed.get(), t, k, team);
        team.wait();
        add_share(packed.get(), depth, grad, n, k, team, [&](int64_t first, int64_t count, int64_t begin, int64_t some, E* out) {
            for (int64_t i = begin; i < begin + some; i += STRIP) {
                for (int64_t r = i + STRIP; r < std::min(t, i + 2 * STRIP); r++)  // short pieces of far rows: asked for early, twice as fast
                    for (int64_t c = 0; c < count; c += 64 / sizeof(E)) __builtin_prefetch(dy + r * dy_stride + first + c);
                turn_strip<E>(dy + i * dy_stride + first, dy_stride, std::min(STRIP, t - i), count, out + i - begin);
            }
        });
    });
}

// dx[T, K] = dy[T, N] W[N, K], `depth` = N padded; columns of dy from N on are zeros.
template <typename E>
void input_gradient(const E* dy, int64_t stride, const E* weight, E* dx, int64_t t, int64_t n, int64_t k) {
    const int64_t depth = padded_depth<E>(n);
    const auto packed = scratch<E>((k + PANEL - 1) / PANEL * PANEL * depth);
    const Product<E> product{dy, stride, packed.get(), t, k, depth};
    with_team([&](const Team& team) {
        depth_panels_share(weight, k, packed.get(), n, k, team);
        team.wait();
        linear_share<E, E>(product, dx, team);
    });
}

}  // namespace

#define TANDEM_GRADIENT(NAME, E)                                                                                                               \
    void accumulate_##NAME(const E* dy, int64_t ds, const E* x, int64_t xs, float* g, int64_t t, int64_t n, int64_t k) { accumulate(dy, ds, x, xs, g, t, n, k); } \
    void input_gradient_##NAME(const E* dy, int64_t s, const E* w, E* dx, int64_t t, int64_t n, int64_t k) { input_gradient(dy, s, w, dx, t, n, k); }

extern "C" {
TANDEM_GRADIENT(bf16, bf16)
TANDEM_GRADIENT(fp32, float)
}

// What stands between the matrix products of a layer, a row at a time, in fp32. Contracts in norm.py and swiglu.py.
#pragma once
#include "team.h"
#include "tile.h"

namespace tandem {

#ifdef TANDEM_AVX512
inline Lanes load_wide(const bf16* p) { return {widen(p)}; }
inline void store_narrow(bf16* p, Lanes a) { narrow(p, a.v); }
#else
inline Lanes load_wide(const bf16* p) {
    float v[LANES];
    for (int i = 0; i < LANES; i++) v[i] = to_float(p[i]);
    return load(v);
}
inline void store_narrow(bf16* p, Lanes a) {
    float v[LANES];
    store(v, a);
    for (int i = 0; i < LANES; i++) p[i] = from_float<bf16>(v[i]);
}
#endif
inline Lanes load_wide(const float* p) { return load(p); }
inline void store_narrow(float* p, Lanes a) { store(p, a); }

// Sum over 16 lanes, then a fixed tree: the order every row is reduced in. `terms(c)`: 16 terms from c; `term(c)`: one.
template <typename Terms, typename Term>
inline float lane_sum(int64_t width, Terms terms, Term term) {
    Lanes sum = splat(0.0f);
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES) sum = sum + terms(c);
    float lane[LANES];
    store(lane, sum);
    for (; c < width; c++) lane[c % LANES] += term(c);
    return sum_lanes(load(lane));
}

// y = x / sqrt(mean(x^2) + eps) * w; returns the factor 1 / sqrt(...).
template <typename E>
inline float norm_row(const E* x, const E* weight, E* y, int64_t width, float eps) {
    const auto squares = [&](int64_t c) { const Lanes v = load_wide(x + c); return v * v; };
    const auto square = [&](int64_t c) { const float v = to_float(x[c]); return v * v; };
    const float scale = 1.0f / std::sqrt(lane_sum(width, squares, square) / float(width) + eps);
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES) store_narrow(y + c, load_wide(x + c) * splat(scale) * load_wide(weight + c));
    for (; c < width; c++) y[c] = from_float<E>(to_float(x[c]) * scale * to_float(weight[c]));
    return scale;
}

// out = silu(gate) * up for n <= 64 values.
template <typename E>
inline void swiglu_panel(const E* gate, const E* up, E* out, int n) {
    int c = 0;
    for (; c + LANES <= n; c += LANES) {
        const Lanes g = load_wide(gate + c);
        store_narrow(out + c, g / (splat(1.0f) + exp(splat(0.0f) - g)) * load_wide(up + c));
    }
    for (; c < n; c++) out[c] = from_float<E>(to_float(gate[c]) / (1.0f + exp_one(-to_float(gate[c]))) * to_float(up[c]));
}

}  // namespace tandem

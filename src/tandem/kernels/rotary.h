// Rotary embedding of one head. Contract in rotary.py.
#pragma once
#include "layer.h"

namespace tandem {

// Rotates pairs (i, i + half) in place by sign * angle.
template <typename E>
inline void rotate_head(E* low, const float* cosine, const float* sine, int64_t half, float sign) {
    E* high = low + half;
    int64_t d = 0;
    for (; d + LANES <= half; d += LANES) {
        const Lanes a = load_wide(low + d), b = load_wide(high + d), c = load(cosine + d), s = splat(sign) * load(sine + d);
        store_narrow(low + d, a * c - b * s);
        store_narrow(high + d, b * c + a * s);
    }
    for (; d < half; d++) {
        const float a = to_float(low[d]), b = to_float(high[d]), s = sign * sine[d];
        low[d] = from_float<E>(a * cosine[d] - b * s);
        high[d] = from_float<E>(b * cosine[d] + a * s);
    }
}

}  // namespace tandem

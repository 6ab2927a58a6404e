// Integers that share a scale, as weights and as keys and values are stored. Contract in numerics/quantise.py: fp32 operations in
// its order, none of them contracted, so the bits are those of its torch operations.
#pragma once
#include "tile.h"

namespace tandem {

// Infinite or NaN where any of them is.
template <typename E>
inline float largest_size(const E* x, int64_t count) {
    uint32_t top = 0;  // sizes compare as their bits do; infinity and NaN are above all numbers
    for (int64_t i = 0; i < count; i++) {
        const float v = to_float(x[i]);
        uint32_t bits;
        std::memcpy(&bits, &v, 4);
        top = std::max(top, bits & 0x7fffffffu);
    }
    float size;
    std::memcpy(&size, &top, 4);
    return size;
}

template <typename E>
inline void write_codes(const E* x, int64_t count, float scale, float largest, int8_t* codes) {
    const float divisor = scale > 0 ? scale : INF;
    for (int64_t i = 0; i < count; i++) {
        const float code = std::nearbyint(to_float(x[i]) / divisor);
        codes[i] = int8_t(int32_t(std::max(-largest, std::min(largest, code))));
    }
}

// numerics.quantise.to_int8 of one vector: gives its scale.
template <typename E>
inline float to_int8(const E* x, int64_t count, int8_t* codes) {
    const float amax = largest_size(x, count);
    if (!(amax < INF)) {
        std::memset(codes, 0, count);
        return std::numeric_limits<float>::quiet_NaN();
    }
    const float scale = amax / 127.0f;
    write_codes(x, count, scale, 127.0f, codes);
    return scale;
}

}  // namespace tandem

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

#ifdef TANDEM_AVX512
// 32 codes by the scales of the first and of the last 16 of them.
inline void widen_codes(const int8_t* source, __m512 first, __m512 last, bf16* target) {
    const __m512 a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)source)));
    const __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(source + 16))));
    _mm512_storeu_si512(target, (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(b, last), _mm512_mul_ps(a, first)));
}
#endif

// Keys of `run` positions, a scale each: the next pair of channels lies `step` and `target_step` further.
template <typename E>
inline void widen_keys(const int8_t* source, int64_t step, int64_t size, int run, const float* scales, E* target, int64_t target_step) {
    constexpr int pair = pair_of<E>();
    int64_t d = 0;
#ifdef TANDEM_AVX512
    if constexpr (pair == 2)
        if (run == 16) {
            const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
            const __m512 each = _mm512_loadu_ps(scales), first = _mm512_permutexvar_ps(low, each);
            const __m512 last = _mm512_permutexvar_ps(_mm512_add_epi32(low, _mm512_set1_epi32(8)), each);
            for (; d < size; d += 2, source += step, target += target_step) widen_codes(source, first, last, target);
        }
#endif
    for (; d < size; d += pair, source += step, target += target_step)
        for (int i = 0; i < run * pair; i++) target[i] = from_float<E>(float(source[i]) * scales[i / pair]);
}

// Values of `run` positions, a scale each, pair by pair.
template <typename E>
inline void widen_values(const int8_t* source, int64_t size, int run, const float* scales, E* target) {
    constexpr int pair = pair_of<E>();
    for (int j = 0; j < run; j += pair, source += pair * size, target += pair * size) {
        int64_t i = 0;
#ifdef TANDEM_AVX512
        if constexpr (pair == 2) {
            double both;
            std::memcpy(&both, scales + j, 8);
            const __m512 each = _mm512_castpd_ps(_mm512_set1_pd(both));
            for (; i + 32 <= pair * size; i += 32) widen_codes(source + i, each, each, target + i);
        }
#endif
        for (; i < pair * size; i++) target[i] = from_float<E>(float(source[i]) * scales[j + i % pair]);
    }
}

}  // namespace tandem

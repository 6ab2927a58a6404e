// Keys and values in 4 bits: codes of two channels a byte, with a scale and a zero point for each 32 channels of a vector. Contract in
// numerics/quantise.py, to_int4: fp32 operations in its order, none of them contracted.
//
// A vector is D / 2 bytes of codes, the lower channel in the lower half, and behind them a byte for each group's zero point.
#pragma once
#include "integers.h"

namespace tandem {

struct nibbles { uint8_t byte; };
static_assert(sizeof(nibbles) == 1, "as pages hold them");

constexpr int64_t NIBBLE_GROUP = 32;
constexpr int64_t nibble_groups(int64_t size) { return (size + NIBBLE_GROUP - 1) / NIBBLE_GROUP; }

// numerics.quantise.to_int4 of one vector: D / 2 + groups bytes, and scales `step` apart.
template <typename E>
inline void to_nibbles(const E* x, int64_t size, nibbles* codes, float* scales, int64_t step) {
    const int64_t groups = nibble_groups(size);
    const bool finite = largest_size(x, size) < INF;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t first = g * NIBBLE_GROUP, last = std::min(size, first + NIBBLE_GROUP);
        float low = 0, high = 0;
        for (int64_t d = first; finite && d < last; d++) low = std::min(low, to_float(x[d])), high = std::max(high, to_float(x[d]));
        const float scale = (high - low) / 15.0f, divisor = scale > 0 ? scale : INF;
        const float zero = std::max(0.0f, std::min(15.0f, std::nearbyint(-low / divisor)));
        const auto code = [&](int64_t d) {
            const float near = finite ? std::nearbyint(to_float(x[d]) / divisor) : 0.0f;
            return uint8_t(std::max(0.0f, std::min(15.0f, near + zero)));
        };
        for (int64_t d = first; d < last; d += 2) codes[d / 2].byte = uint8_t(code(d) | code(d + 1) << 4);
        codes[size / 2 + g].byte = uint8_t(zero);
        scales[g * step] = finite ? scale : std::numeric_limits<float>::quiet_NaN();
    }
}

template <typename E>
inline E of_nibble(int code, int zero, float scale) { return from_float<E>(float(code - zero) * scale); }

#ifdef TANDEM_AVX512
inline __m512 of_nibbles(__m512i codes, __m512i zeros, __m512 scales) { return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(codes, zeros)), scales); }
// Sixteen of each, in pairs.
inline __m512i pairs_of(__m512 low, __m512 high) {
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(rounded<bf16>(low)), 16), _mm512_castps_si512(rounded<bf16>(high)));
}
inline __m512i widened(const nibbles* bytes) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes)); }
// Codes of 16 channels that lie in 8 bytes.
inline __m512i channels_of(const nibbles* bytes) {
    const __m128i both = _mm_loadl_epi64((const __m128i*)bytes), half = _mm_set1_epi8(15);
    return _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(_mm_and_si128(both, half), _mm_and_si128(_mm_srli_epi16(both, 4), half)));
}
#endif

// Two channels of keys of `count` positions that lie side by side: to pairs, or to two rows of `row` elements.
template <typename E>
inline void widen_keys(const nibbles* codes, const nibbles* zeros, const float* scales, int count, E* target, int64_t row) {
    int t = 0;
#ifdef TANDEM_AVX512
    if (count == LANES) {
        const __m512i both = widened(codes), zero = widened(zeros);
        const __m512 by = _mm512_loadu_ps(scales);
        const __m512 low = of_nibbles(_mm512_and_si512(both, _mm512_set1_epi32(15)), zero, by), high = of_nibbles(_mm512_srli_epi32(both, 4), zero, by);
        if constexpr (sizeof(E) == 2) _mm512_storeu_si512(target, pairs_of(low, high));
        else _mm512_storeu_ps(target, low), _mm512_storeu_ps(target + row, high);
        return;
    }
#endif
    constexpr int pair = pair_of<E>();
    for (; t < count; t++) {
        target[t * pair] = of_nibble<E>(codes[t].byte & 15, zeros[t].byte, scales[t]);
        target[t * pair + (pair == 2 ? 1 : row)] = of_nibble<E>(codes[t].byte >> 4, zeros[t].byte, scales[t]);
    }
}

// Values of pair_of<E>() positions, vectors of `bytes` bytes side by side: [D][pair].
template <typename E>
inline void widen_values(const nibbles* vectors, int64_t bytes, const float* scales, int64_t step, int64_t size, E* target) {
    constexpr int pair = pair_of<E>();
    for (int64_t g = 0; g < nibble_groups(size); g++, scales += step) {
        const int64_t last = std::min(size, (g + 1) * NIBBLE_GROUP);
        int64_t d = g * NIBBLE_GROUP;
#ifdef TANDEM_AVX512
        const auto lanes = [&](int i) {
            const nibbles* own = vectors + i * bytes;
            return of_nibbles(channels_of(own + d / 2), _mm512_set1_epi32(own[size / 2 + g].byte), _mm512_set1_ps(scales[i]));
        };
        for (; d + LANES <= last; d += LANES)
            if constexpr (pair == 2) _mm512_storeu_si512(target + 2 * d, pairs_of(lanes(0), lanes(1)));
            else _mm512_storeu_ps(target + d, lanes(0));
#endif
        for (; d < last; d++)
            for (int i = 0; i < pair; i++) {
                const nibbles* own = vectors + i * bytes;
                target[d * pair + i] = of_nibble<E>(own[d / 2].byte >> (d % 2 * 4) & 15, own[size / 2 + g].byte, scales[i]);
            }
    }
}

}  // namespace tandem

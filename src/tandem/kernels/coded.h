// Keys and values of full pages as codes of 2, 4 or 8 bits, with a scale and a minimum a group: keys' groups are tokens of a channel, values'
// are channels of a token. Contract in span_pool.py; code * scale + minimum in fp32, each operation rounded, as numerics/kv.py has it.
#pragma once
#include "nibbles.h"

extern "C" struct CodedArgs {
    const uint8_t *keys, *values;           // [pages, K, D, R codes], [pages, K, R, D codes]; the first code in the lowest bits
    const void *key_scales, *value_scales;  // in the compute dtype: scales and then minima, [pages, K, 2, R / token_group, D], [pages, K, 2, R, D / channel_group]
    int64_t pages;  // a table's entry from here on is a page of the attention's own pools, as it was made
    int64_t bits, token_group, channel_group;
};

namespace tandem {

struct coded {};  // what a pool of such pages stores

inline int code_at(const uint8_t* codes, int64_t i, int64_t bits) { return codes[i * bits / 8] >> (i * bits % 8) & ((1 << bits) - 1); }

#ifdef TANDEM_AVX512
// Sixteen codes that begin with a byte.
inline __m512 codes_of(const uint8_t* codes, int64_t bits) {
    if (bits == 4) return _mm512_cvtepi32_ps(channels_of((const nibbles*)codes));
    if (bits == 8) return _mm512_cvtepi32_ps(widened((const nibbles*)codes));
    int32_t word;
    std::memcpy(&word, codes, 4);
    const __m512i shifts = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(word), shifts), _mm512_set1_epi32(3)));
}
#endif

template <typename E>
struct CodedPage {  // of one head
    const CodedArgs& c;
    int64_t page_tokens, size, at;  // at: page * K + head
    E value_of(int code, E scale, E low) const { return from_float<E>(float(code) * to_float(scale) + to_float(low)); }

    // Keys of `run` positions of a page from `in_page` on, channel groups of pair_of<E>() `row` positions apart.
    void keys(int64_t in_page, int run, E* target, int64_t row) const {
        constexpr int pair = pair_of<E>();
        const int64_t groups = page_tokens / c.token_group, bytes = page_tokens * c.bits / 8;
        const uint8_t* codes = c.keys + at * size * bytes + in_page * c.bits / 8;
        const E* scales = (const E*)c.key_scales + at * 2 * groups * size + in_page / c.token_group * size;
        const E* lows = scales + groups * size;
        for (int64_t d = 0; d < size; d += pair, target += row * pair) {
#ifdef TANDEM_AVX512
            if (run == LANES) {
                const auto lanes = [&](int64_t i) {
                    const __m512 by = _mm512_set1_ps(to_float(scales[i])), low = _mm512_set1_ps(to_float(lows[i]));
                    return _mm512_add_ps(_mm512_mul_ps(codes_of(codes + i * bytes, c.bits), by), low);
                };
                if constexpr (pair == 2) _mm512_storeu_si512(target, pairs_of(lanes(d), lanes(d + 1)));
                else _mm512_storeu_ps(target, lanes(d));
                continue;
            }
#endif
            for (int t = 0; t < run; t++)
                for (int i = 0; i < pair; i++) target[t * pair + i] = value_of(code_at(codes + (d + i) * bytes, t, c.bits), scales[d + i], lows[d + i]);
        }
    }

    // Values of `run` positions: groups of pair_of<E>() positions, [D][pair] each.
    void values(int64_t in_page, int run, E* target) const {
        constexpr int pair = pair_of<E>();
        const int64_t groups = size / c.channel_group, bytes = size * c.bits / 8;
        const uint8_t* codes = c.values + (at * page_tokens + in_page) * bytes;
        const E* scales = (const E*)c.value_scales + (at * 2 * page_tokens + in_page) * groups;
        const E* lows = scales + page_tokens * groups;
        for (int t = 0; t < run; t += pair, codes += pair * bytes, scales += pair * groups, lows += pair * groups, target += pair * size) {
            int64_t d = 0;
#ifdef TANDEM_AVX512
            const auto lanes = [&](int i) {
                const int64_t g = i * groups + d / c.channel_group;
                const __m512 by = _mm512_set1_ps(to_float(scales[g])), low = _mm512_set1_ps(to_float(lows[g]));
                return _mm512_add_ps(_mm512_mul_ps(codes_of(codes + i * bytes + d * c.bits / 8, c.bits), by), low);
            };
            for (; c.channel_group % LANES == 0 && d < size; d += LANES)
                if constexpr (pair == 2) _mm512_storeu_si512(target + 2 * d, pairs_of(lanes(0), lanes(1)));
                else _mm512_storeu_ps(target + d, lanes(0));
#endif
            for (; d < size; d++)
                for (int i = 0; i < pair; i++) {
                    const int64_t g = i * groups + d / c.channel_group;
                    target[d * pair + i] = value_of(code_at(codes + i * bytes, d, c.bits), scales[g], lows[g]);
                }
        }
    }
};

}  // namespace tandem

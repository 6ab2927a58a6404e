// Rotary embedding of a step's queries and keys, and the write of its keys and values into packed pages. Contract in
// page_pool.py: the same bits as rotate_ and then a store, a row at a time.
#pragma once
#include "float8.h"
#include "integers.h"
#include "page_layout.h"
#include "rotary.h"
#include <type_traits>
#include <vector>

extern "C" struct StoreArgs {
    void *query, *key;  // [T, H, D], [T, K, D]: rotated in place where there are tables
    const void* value;  // [T, K, D]
    void *keys, *values;  // pools of packed pages
    const int64_t *positions, *slots;  // [T]
    const float *cosine, *sine;  // [positions, D / 2], or null
    int64_t rows, stride;  // between the rows of query, key and value alike
    int64_t heads, kv_heads, head_size, page_tokens;
    float* scales;  // of codes in int8 and int4, or null
};

namespace tandem {

template <typename S, typename X>
inline S stored(X x) {
    if constexpr (std::is_same_v<S, X>) return x;
    else return to_e4m3(to_float(x));
}

// The key of one position and head, X as it comes: groups of channels lie a step apart.
template <typename S, typename X>
inline void store_key(const X* key, S* target, const PageLayout& layout) {
    const int64_t channels = layout.channels, step = layout.key_step();
    const auto in_groups = [&](auto group) {
        constexpr int64_t width = group;
        for (int64_t d = 0; d < layout.head_size; d += width, target += step) {
            S own[width];
            for (int64_t j = 0; j < width; j++) own[j] = stored<S>(key[d + j]);
            std::memcpy((void*)target, own, sizeof own);
        }
    };
    if (channels == 4) in_groups(std::integral_constant<int64_t, 4>{});
    else if (channels == 2) in_groups(std::integral_constant<int64_t, 2>{});
    else in_groups(std::integral_constant<int64_t, 1>{});
}

// The other positions of each group of values may be another thread's: they are not touched.
template <typename S, typename X>
inline void store_value(const X* value, S* target, const PageLayout& layout) {
    int64_t d = 0;
#ifdef TANDEM_AVX512
    if constexpr (std::is_same_v<S, bf16>)
        for (; d + LANES <= layout.head_size; d += LANES)
            _mm512_mask_storeu_epi16(target + 2 * d, 0x55555555, _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(value + d))));
    if constexpr (std::is_same_v<S, int8_t>)
        for (; layout.positions == 2 && d + LANES <= layout.head_size; d += LANES)
            _mm512_mask_storeu_epi8(target + 4 * d, 0x1111111111111111, _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(value + d))));
#endif
    for (; d < layout.head_size; d++) target[d << layout.positions] = stored<S>(value[d]);
}

// This thread's share of the rows.
template <typename E, typename S = E>
void rotate_store_share(const StoreArgs& a, const Team& team) {
    const PageLayout layout = page_layout<E, S>(a.page_tokens, a.kv_heads, a.head_size);
    const int shift = __builtin_ctzll(a.page_tokens);
    const int64_t half = a.head_size / 2, size = a.head_size;
    int64_t first, last;
    team.share(a.rows, first, last);
    for (int64_t t = first; t < last; t++) {
        E *query = (E*)a.query + t * a.stride, *key = (E*)a.key + t * a.stride;
        const E* value = (const E*)a.value + t * a.stride;
        if (a.cosine) {
            const float *c = a.cosine + a.positions[t] * half, *s = a.sine + a.positions[t] * half;
            for (int64_t h = 0; h < a.heads; h++) rotate_head(query + h * size, c, s, half, 1.0f);
            for (int64_t h = 0; h < a.kv_heads; h++) rotate_head(key + h * size, c, s, half, 1.0f);
        }
        const int64_t page = a.slots[t] >> shift, offset = a.slots[t] & (a.page_tokens - 1);
        for (int64_t h = 0; h < a.kv_heads; h++) {
            const int64_t start = layout.start(page, h);
            S *key_at = (S*)a.keys + start + layout.key(offset), *value_at = (S*)a.values + start + layout.value(offset);
            if constexpr (std::is_same_v<S, nibbles>) {
                thread_local std::vector<nibbles> codes;
                codes.resize(layout.head_size);
                to_nibbles(key + h * size, size, codes.data(), a.scales + layout.scales(page, 0, h) + offset, a.page_tokens);
                store_key(codes.data(), key_at, layout);
                to_nibbles(value + h * size, size, codes.data(), a.scales + layout.scales(page, 1, h) + offset, a.page_tokens);
                store_value(codes.data(), value_at, layout);
            } else if constexpr (std::is_same_v<S, int8_t>) {
                thread_local std::vector<int8_t> codes;
                codes.resize(size);
                a.scales[layout.scales(page, 0, h) + offset] = to_int8(key + h * size, size, codes.data());
                store_key(codes.data(), key_at, layout);
                a.scales[layout.scales(page, 1, h) + offset] = to_int8(value + h * size, size, codes.data());
                store_value(codes.data(), value_at, layout);
            } else {
                store_key(key + h * size, key_at, layout);
                store_value(value + h * size, value_at, layout);
            }
        }
    }
}

}  // namespace tandem

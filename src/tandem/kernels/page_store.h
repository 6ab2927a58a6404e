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
    float* scales;  // of codes in int8, or null
};

namespace tandem {

template <typename S, typename X>
inline S stored(X x) {
    if constexpr (std::is_same_v<S, X>) return x;
    else return to_e4m3(to_float(x));
}

// The key of one position and head, X as it comes: pairs of channels lie `step` apart.
template <typename E, typename X, typename S>
inline void store_key(const X* key, S* target, int64_t size, int64_t step) {
    constexpr int pair = pair_of<E>();
    for (int64_t d = 0; d < size; d += pair, target += step) {
        S two[pair];
        for (int j = 0; j < pair; j++) two[j] = stored<S>(key[d + j]);
        std::memcpy((void*)target, two, sizeof(two));
    }
}

// The other position of each pair of values may be another thread's: it is not touched.
template <typename E, typename X, typename S>
inline void store_value(const X* value, S* target, int64_t size) {
    int64_t d = 0;
#ifdef TANDEM_AVX512
    if constexpr (std::is_same_v<S, bf16>)
        for (; d + LANES <= size; d += LANES)
            _mm512_mask_storeu_epi16(target + 2 * d, 0x55555555, _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(value + d))));
#endif
    for (; d < size; d++) target[d * pair_of<E>()] = stored<S>(value[d]);
}

// This thread's share of the rows.
template <typename E, typename S = E>
void rotate_store_share(const StoreArgs& a, const Team& team) {
    const PageLayout layout{a.page_tokens, a.kv_heads, a.head_size};
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
            const int64_t start = layout.start(page, h), step = layout.template key_step<E>();
            S *key_at = (S*)a.keys + start + layout.template key<E>(offset), *value_at = (S*)a.values + start + layout.template value<E>(offset);
            if constexpr (std::is_same_v<S, int8_t>) {
                thread_local std::vector<int8_t> codes;
                codes.resize(size);
                a.scales[layout.scales(page, 0, h) + offset] = to_int8(key + h * size, size, codes.data());
                store_key<E>(codes.data(), key_at, size, step);
                a.scales[layout.scales(page, 1, h) + offset] = to_int8(value + h * size, size, codes.data());
                store_value<E>(codes.data(), value_at, size);
            } else {
                store_key<E>(key + h * size, key_at, size, step);
                store_value<E>(value + h * size, value_at, size);
            }
        }
    }
}

}  // namespace tandem

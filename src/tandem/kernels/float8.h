// e4m3 (1 sign, 4 exponent, 3 mantissa bits, bias 7; no infinity, NaN is 0x7f) as keys and values are stored.
// Every value is exact in bf16, so reading is exact; writing rounds to nearest even and saturates at 448.
#pragma once
#include "tile.h"

namespace tandem {

struct e4m3 {
    uint8_t code;
};

// Integer operations only: no flushing of subnormals and no rounding mode can change a value.
inline bf16 to_bf16(e4m3 x) {
    const uint32_t sign = uint32_t(x.code & 0x80u) << 8, low = x.code & 0x7fu;
    if (low == 0x7fu) return bf16(sign | 0x7fc0u);
    if (low >= 8) return bf16(sign | ((low << 4) + (120u << 7)));
    constexpr uint16_t SUBNORMAL[8] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};  // m 2^-9
    return bf16(sign | SUBNORMAL[low]);
}

inline e4m3 to_e4m3(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    const uint32_t sign = bits >> 31 << 7, size = bits & 0x7fffffffu;
    const uint32_t normal = ((size + 0x7ffffu + ((size >> 20) & 1u)) >> 20) - (120u << 3);
    float shifted;  // below 2^-6 the spacing is 2^-9, that of fp32 at 2^14: the addition rounds
    std::memcpy(&shifted, &size, 4);
    shifted += 16384.0f;
    uint32_t small;
    std::memcpy(&small, &shifted, 4);
    small -= 0x46800000u;
    const uint32_t finite = size < 0x3c800000u ? small : size >= 0x43e00000u ? 0x7eu : normal;
    return {uint8_t(sign | (size > 0x7f800000u ? 0x7fu : finite))};
}

// `count` codes to the compute dtype.
inline void widen_codes(const e4m3* source, int64_t count, bf16* target) {
    int64_t i = 0;
#ifdef TANDEM_AVX512
    const __m512i table = _mm512_zextsi128_si512(_mm_set_epi16(0x3c60, 0x3c40, 0x3c20, 0x3c00, 0x3bc0, 0x3b80, 0x3b00, 0));
    for (; i + 32 <= count; i += 32) {
        const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(source + i)));
        const __m512i low = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
        const __m512i sign = _mm512_slli_epi16(_mm512_xor_si512(code, low), 8);
        __m512i value = _mm512_add_epi16(_mm512_slli_epi16(low, 4), _mm512_set1_epi16(120 << 7));
        value = _mm512_mask_permutexvar_epi16(value, _mm512_cmplt_epi16_mask(low, _mm512_set1_epi16(8)), low, table);
        value = _mm512_mask_mov_epi16(value, _mm512_cmpeq_epi16_mask(low, _mm512_set1_epi16(0x7f)), _mm512_set1_epi16(0x7fc0));
        _mm512_storeu_si512(target + i, _mm512_or_si512(sign, value));
    }
#endif
    for (; i < count; i++) target[i] = to_bf16(source[i]);
}
inline void widen_codes(const e4m3* source, int64_t count, float* target) {
    bf16 part[PANEL];
    for (int64_t i = 0; i < count; i += PANEL) {
        const int64_t n = std::min<int64_t>(PANEL, count - i);
        widen_codes(source + i, n, part);
        for (int64_t j = 0; j < n; j++) target[i + j] = to_float(part[j]);
    }
}

}  // namespace tandem

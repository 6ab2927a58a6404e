// Sixteen fp32 lanes: AVX-512 or AVX2 where the processor has it, plain loops elsewhere (or with -DTANDEM_PORTABLE), with the same
// bits: every operation here is exact or correctly rounded, and exp and log are written once on top of them.
//
// Measured over every fp32 argument: exp within 1.011 ulp, log within 0.827 ulp of the exact value.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__AVX512F__) && defined(__AVX512DQ__) && !defined(TANDEM_PORTABLE)
#include <immintrin.h>
#define TANDEM_LANES_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && !defined(TANDEM_PORTABLE)
#include <immintrin.h>
#define TANDEM_LANES_AVX2 1
#endif

namespace tandem {

constexpr int LANES = 16;
constexpr float INF = std::numeric_limits<float>::infinity();

#ifdef TANDEM_LANES_AVX512

struct Lanes { __m512 v; };
struct Words { __m512i v; };
struct LaneMask { __mmask16 v; };

inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
inline Lanes splat(float a) { return {_mm512_set1_ps(a)}; }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
inline LaneMask less(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline LaneMask is_nan(Lanes a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
inline LaneMask operator|(LaneMask a, LaneMask b) { return {__mmask16(a.v | b.v)}; }
inline LaneMask operator~(LaneMask a) { return {__mmask16(~a.v)}; }
inline uint32_t lanes_of(LaneMask m) { return m.v; }  // bit i: lane i
inline Lanes select(LaneMask m, Lanes yes, Lanes no) { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }
inline Words bits(Lanes a) { return {_mm512_castps_si512(a.v)}; }
inline Lanes from_bits(Words a) { return {_mm512_castsi512_ps(a.v)}; }
inline Lanes to_float(Words a) { return {_mm512_cvtepu32_ps(a.v)}; }
inline Lanes to_float_signed(Words a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Words load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(uint32_t* p, Words a) { _mm512_storeu_si512(p, a.v); }
inline Words splat(uint32_t a) { return {_mm512_set1_epi32(int32_t(a))}; }
inline Words operator+(Words a, Words b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Words operator-(Words a, Words b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline Words operator&(Words a, Words b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Words operator~(Words a) { return {_mm512_ternarylogic_epi32(a.v, a.v, a.v, 0x55)}; }
template <int N> inline Words shift_left(Words a) { return {_mm512_slli_epi32(a.v, N)}; }
template <int N> inline Words shift_right_signed(Words a) { return {_mm512_srai_epi32(a.v, N)}; }

// The two halves of the 64-bit products of 32-bit words.
inline void multiply(Words a, uint32_t b, Words& high, Words& low) {
    const __m512i factor = _mm512_set1_epi64(b);
    const __m512i even = _mm512_mul_epu32(a.v, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
    high.v = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
    low.v = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}

// Lane 4 j + i of w[0..3] goes to lane 4 i + (0..3) of w[j]: sixteen counters of four words become 64 words in the order
// of counters 4 j + i, see philox64.
inline void transpose_words(Words* w) {
    const __m512i a = _mm512_unpacklo_epi32(w[0].v, w[1].v), b = _mm512_unpackhi_epi32(w[0].v, w[1].v);
    const __m512i c = _mm512_unpacklo_epi32(w[2].v, w[3].v), d = _mm512_unpackhi_epi32(w[2].v, w[3].v);
    w[0].v = _mm512_unpacklo_epi64(a, c);
    w[1].v = _mm512_unpackhi_epi64(a, c);
    w[2].v = _mm512_unpacklo_epi64(b, d);
    w[3].v = _mm512_unpackhi_epi64(b, d);
}

// Lane i + lane i+8, then +4, +2, +1.
inline float sum_lanes(Lanes a) {
    const __m256 x = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    const __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 z = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}

#elif defined(TANDEM_LANES_AVX2)

// Written out, since the compiler keeps arrays indexed in a loop in memory (measured: 3 x slower).
#define TANDEM_EACH(...) { constexpr int i = 0; __VA_ARGS__; } { constexpr int i = 1; __VA_ARGS__; }
struct Lanes { __m256 v[2]; };
struct Words { __m256i v[2]; };
struct LaneMask { __m256 v[2]; };

inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Lanes a) { TANDEM_EACH(_mm256_storeu_ps(p + 8 * i, a.v[i])) }
inline Lanes splat(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline Lanes operator+(Lanes a, Lanes b) { TANDEM_EACH(a.v[i] = _mm256_add_ps(a.v[i], b.v[i])) return a; }
inline Lanes operator-(Lanes a, Lanes b) { TANDEM_EACH(a.v[i] = _mm256_sub_ps(a.v[i], b.v[i])) return a; }
inline Lanes operator*(Lanes a, Lanes b) { TANDEM_EACH(a.v[i] = _mm256_mul_ps(a.v[i], b.v[i])) return a; }
inline Lanes operator/(Lanes a, Lanes b) { TANDEM_EACH(a.v[i] = _mm256_div_ps(a.v[i], b.v[i])) return a; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { TANDEM_EACH(c.v[i] = _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i])) return c; }
inline Lanes larger(Lanes a, Lanes b) { TANDEM_EACH(b.v[i] = _mm256_max_ps(a.v[i], b.v[i])) return b; }
inline LaneMask less(Lanes a, Lanes b) { TANDEM_EACH(a.v[i] = _mm256_cmp_ps(a.v[i], b.v[i], _CMP_LT_OQ)) return {a.v[0], a.v[1]}; }
inline LaneMask is_nan(Lanes a) { TANDEM_EACH(a.v[i] = _mm256_cmp_ps(a.v[i], a.v[i], _CMP_UNORD_Q)) return {a.v[0], a.v[1]}; }
inline LaneMask operator|(LaneMask a, LaneMask b) { TANDEM_EACH(a.v[i] = _mm256_or_ps(a.v[i], b.v[i])) return a; }
inline LaneMask operator~(LaneMask a) {
    TANDEM_EACH(a.v[i] = _mm256_xor_ps(a.v[i], _mm256_castsi256_ps(_mm256_set1_epi32(-1))))
    return a;
}
inline uint32_t lanes_of(LaneMask m) { return uint32_t(_mm256_movemask_ps(m.v[0])) | uint32_t(_mm256_movemask_ps(m.v[1])) << 8; }
inline Lanes select(LaneMask m, Lanes yes, Lanes no) { TANDEM_EACH(no.v[i] = _mm256_blendv_ps(no.v[i], yes.v[i], m.v[i])) return no; }
inline Words bits(Lanes a) { return {_mm256_castps_si256(a.v[0]), _mm256_castps_si256(a.v[1])}; }
inline Lanes from_bits(Words a) { return {_mm256_castsi256_ps(a.v[0]), _mm256_castsi256_ps(a.v[1])}; }
inline Lanes to_float_signed(Words a) { return {_mm256_cvtepi32_ps(a.v[0]), _mm256_cvtepi32_ps(a.v[1])}; }
inline Lanes to_float(Words a) {  // both halves are exact, and the fused sum is rounded once
    Lanes r;
    TANDEM_EACH(r.v[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(a.v[i], 16)), _mm256_set1_ps(65536.0f),
                                         _mm256_cvtepi32_ps(_mm256_and_si256(a.v[i], _mm256_set1_epi32(0xffff)))))
    return r;
}
inline Words load(const uint32_t* p) { Words r; TANDEM_EACH(r.v[i] = _mm256_loadu_si256((const __m256i*)p + i)) return r; }
inline void store(uint32_t* p, Words a) { TANDEM_EACH(_mm256_storeu_si256((__m256i*)p + i, a.v[i])) }
inline Words splat(uint32_t a) { return {_mm256_set1_epi32(int32_t(a)), _mm256_set1_epi32(int32_t(a))}; }
inline Words operator+(Words a, Words b) { TANDEM_EACH(a.v[i] = _mm256_add_epi32(a.v[i], b.v[i])) return a; }
inline Words operator-(Words a, Words b) { TANDEM_EACH(a.v[i] = _mm256_sub_epi32(a.v[i], b.v[i])) return a; }
inline Words operator^(Words a, Words b) { TANDEM_EACH(a.v[i] = _mm256_xor_si256(a.v[i], b.v[i])) return a; }
inline Words operator&(Words a, Words b) { TANDEM_EACH(a.v[i] = _mm256_and_si256(a.v[i], b.v[i])) return a; }
inline Words operator~(Words a) { return a ^ splat(0xffffffffu); }
template <int N> inline Words shift_left(Words a) { TANDEM_EACH(a.v[i] = _mm256_slli_epi32(a.v[i], N)) return a; }
template <int N> inline Words shift_right_signed(Words a) { TANDEM_EACH(a.v[i] = _mm256_srai_epi32(a.v[i], N)) return a; }

inline void multiply(Words a, uint32_t b, Words& high, Words& low) {
    const __m256i factor = _mm256_set1_epi64x(b);
    TANDEM_EACH(
        const __m256i even = _mm256_mul_epu32(a.v[i], factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v[i], 32), factor);
        high.v[i] = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
        low.v[i] = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    )
}

inline void transpose_words(Words* w) {
    TANDEM_EACH(
        const __m256i a = _mm256_unpacklo_epi32(w[0].v[i], w[1].v[i]), b = _mm256_unpackhi_epi32(w[0].v[i], w[1].v[i]);
        const __m256i c = _mm256_unpacklo_epi32(w[2].v[i], w[3].v[i]), d = _mm256_unpackhi_epi32(w[2].v[i], w[3].v[i]);
        w[0].v[i] = _mm256_unpacklo_epi64(a, c);
        w[1].v[i] = _mm256_unpackhi_epi64(a, c);
        w[2].v[i] = _mm256_unpacklo_epi64(b, d);
        w[3].v[i] = _mm256_unpackhi_epi64(b, d);
    )
}

inline float sum_lanes(Lanes a) {
    const __m256 x = _mm256_add_ps(a.v[0], a.v[1]);
    const __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 z = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
#undef TANDEM_EACH

#else

#define TANDEM_EACH for (int i = 0; i < LANES; i++)
struct alignas(64) Lanes { float v[LANES]; };
struct alignas(64) Words { uint32_t v[LANES]; };
struct alignas(64) LaneMask { uint32_t v[LANES]; };  // 0 or all ones

inline Words bits(Lanes a) { Words r; std::memcpy(&r, &a, sizeof r); return r; }
inline Lanes from_bits(Words a) { Lanes r; std::memcpy(&r, &a, sizeof r); return r; }
inline Lanes load(const float* p) { Lanes r; std::memcpy(&r, p, sizeof r); return r; }
inline void store(float* p, Lanes a) { std::memcpy(p, &a, sizeof a); }
inline Lanes splat(float a) { Lanes r; TANDEM_EACH r.v[i] = a; return r; }
inline Lanes operator+(Lanes a, Lanes b) { TANDEM_EACH a.v[i] += b.v[i]; return a; }
inline Lanes operator-(Lanes a, Lanes b) { TANDEM_EACH a.v[i] -= b.v[i]; return a; }
inline Lanes operator*(Lanes a, Lanes b) { TANDEM_EACH a.v[i] *= b.v[i]; return a; }
inline Lanes operator/(Lanes a, Lanes b) { TANDEM_EACH a.v[i] /= b.v[i]; return a; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { TANDEM_EACH c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]); return c; }
inline Lanes larger(Lanes a, Lanes b) { TANDEM_EACH b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return b; }
inline LaneMask less(Lanes a, Lanes b) { LaneMask m; TANDEM_EACH m.v[i] = a.v[i] < b.v[i] ? ~0u : 0u; return m; }
inline LaneMask is_nan(Lanes a) { LaneMask m; TANDEM_EACH m.v[i] = a.v[i] != a.v[i] ? ~0u : 0u; return m; }
inline LaneMask operator|(LaneMask a, LaneMask b) { TANDEM_EACH a.v[i] |= b.v[i]; return a; }
inline LaneMask operator~(LaneMask a) { TANDEM_EACH a.v[i] = ~a.v[i]; return a; }
inline Lanes select(LaneMask m, Lanes yes, Lanes no) {
    Words y = bits(yes), n = bits(no);
    TANDEM_EACH n.v[i] = (y.v[i] & m.v[i]) | (n.v[i] & ~m.v[i]);
    return from_bits(n);
}
inline uint32_t lanes_of(LaneMask m) {
    uint32_t any = 0, r = 0;
    TANDEM_EACH any |= m.v[i];
    if (any) TANDEM_EACH r |= m.v[i] & (1u << i);
    return r;
}
inline Lanes to_float(Words a) { Lanes r; TANDEM_EACH r.v[i] = float(a.v[i]); return r; }
inline Lanes to_float_signed(Words a) { Lanes r; TANDEM_EACH r.v[i] = float(int32_t(a.v[i])); return r; }
inline Words load(const uint32_t* p) { Words r; std::memcpy(&r, p, sizeof r); return r; }
inline void store(uint32_t* p, Words a) { std::memcpy(p, &a, sizeof a); }
inline Words splat(uint32_t a) { Words r; TANDEM_EACH r.v[i] = a; return r; }
inline Words operator+(Words a, Words b) { TANDEM_EACH a.v[i] += b.v[i]; return a; }
inline Words operator-(Words a, Words b) { TANDEM_EACH a.v[i] -= b.v[i]; return a; }
inline Words operator^(Words a, Words b) { TANDEM_EACH a.v[i] ^= b.v[i]; return a; }
inline Words operator&(Words a, Words b) { TANDEM_EACH a.v[i] &= b.v[i]; return a; }
inline Words operator~(Words a) { TANDEM_EACH a.v[i] = ~a.v[i]; return a; }
template <int N> inline Words shift_left(Words a) { TANDEM_EACH a.v[i] <<= N; return a; }
template <int N> inline Words shift_right_signed(Words a) { TANDEM_EACH a.v[i] = uint32_t(int32_t(a.v[i]) >> N); return a; }

inline void multiply(Words a, uint32_t b, Words& high, Words& low) {
    TANDEM_EACH {
        const uint64_t product = uint64_t(a.v[i]) * b;
        high.v[i] = uint32_t(product >> 32);
        low.v[i] = uint32_t(product);
    }
}

inline void transpose_words(Words* w) {
    Words r[4];
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 4; k++) r[j].v[4 * i + k] = w[k].v[4 * i + j];
    for (int j = 0; j < 4; j++) w[j] = r[j];
}

inline float sum_lanes(Lanes a) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) a.v[i] += a.v[i + width];
    return a.v[0];
}
#undef TANDEM_EACH

#endif

inline float max_lanes(Lanes a) {  // skips NaN where it can: exp of the same lanes reports them
    float v[LANES];
    store(v, a);
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
}

// e^x. 0 below -87 (e^-87 = 1.6e-38, next to the smallest normal), infinity above 88.7228, NaN for NaN.
// x = n log 2 + r, |r| <= log(2) / 2; polynomial of Cephes expf; 2^n by adding to the exponent.
inline Lanes exp(Lanes x) {
    const Lanes magic = splat(12582912.0f);  // 1.5 * 2^23: the sum's low bits are the nearest integer
    const Lanes t = fma(x, splat(1.44269504088896341f), magic);
    const Lanes n = t - magic;
    Lanes r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    Lanes p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + splat(1.0f);
    Lanes y = from_bits(bits(p) + shift_left<23>(bits(t)));
    y = select(less(x, splat(-87.0f)), splat(0.0f), y);
    y = select(less(splat(88.72283f), x), splat(INF), y);
    return select(is_nan(x), x, y);
}

// log x. -infinity at 0, NaN below; subnormal arguments too. x = 2^n m, sqrt(1/2) <= m < sqrt(2); polynomial of Cephes logf.
inline Lanes log(Lanes x) {
    const LaneMask tiny = less(x, splat(1.17549435e-38f));
    const Lanes scaled = select(tiny, x * splat(8388608.0f), x);
    const Words offset = bits(scaled) - splat(0x3f3504f3u);  // so that the exponent field steps at sqrt(1/2)
    const Lanes n = to_float_signed(shift_right_signed<23>(offset)) - select(tiny, splat(23.0f), splat(0.0f));
    const Lanes m = from_bits((offset & splat(0x007fffffu)) + splat(0x3f3504f3u)) - splat(1.0f);
    const Lanes square = m * m;
    Lanes p = splat(7.0376836292e-2f);
    p = fma(p, m, splat(-1.1514610310e-1f));
    p = fma(p, m, splat(1.1676998740e-1f));
    p = fma(p, m, splat(-1.2420140846e-1f));
    p = fma(p, m, splat(1.4249322787e-1f));
    p = fma(p, m, splat(-1.6668057665e-1f));
    p = fma(p, m, splat(2.0000714765e-1f));
    p = fma(p, m, splat(-2.4999993993e-1f));
    p = fma(p, m, splat(3.3333331174e-1f));
    p = p * m * square;
    p = fma(n, splat(-2.12194440e-4f), p);
    p = fma(square, splat(-0.5f), p);
    Lanes y = fma(n, splat(0.693359375f), m + p);
    y = select(less(x, splat(0.0f)), splat(std::numeric_limits<float>::quiet_NaN()), y);
    y = select(less(splat(std::numeric_limits<float>::max()), x), splat(INF), y);
    y = select(~(less(x, splat(0.0f)) | less(splat(0.0f), x) | is_nan(x)), splat(-INF), y);
    return select(is_nan(x), x, y);
}

}  // namespace tandem

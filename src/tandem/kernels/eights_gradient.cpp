// The two products of the backward pass in integers of 8 bits. Contract in eights_gradient.py: fp32 operations in its order, none of them
// contracted, and exact sums, so the bits are those of its torch operations.
#include "eights.h"
#include "gradient.h"
#include "sample.h"
#include "team.h"
#include <atomic>

using namespace tandem;

namespace {

constexpr uint32_t ROUNDING = 4;  // numerics.random.Stream
constexpr int NOISE = 256;        // bytes of 64 words
constexpr float MAGIC = 12582912.0f;

inline uint32_t size_bits(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return bits & 0x7fffffffu;
}

// Largest size of each of `count` columns over `rows` rows; infinite or NaN where one is.
template <typename E>
void column_sizes(const E* x, int64_t stride, int64_t rows, int64_t count, uint32_t* top) {
    std::fill_n(top, count, 0u);
    for (int64_t t = 0; t < rows; t++)
        for (int64_t c = 0; c < count; c++) top[c] = std::max(top[c], size_bits(to_float(x[t * stride + c])));
}

inline float scale_of(uint32_t top) {
    float size;
    std::memcpy(&size, &top, 4);
    return size < INF ? size / 127.0f : std::numeric_limits<float>::quiet_NaN();
}

inline uint64_t seed_of(uint32_t top, uint32_t use) { return uint64_t(top) << 32 | use; }

// 64 numbers over their divisors as codes, into byte r of their words.
template <bool DRAW, typename E>
inline void code_panel(const E* row, const float* divisors, const uint32_t* noise, int64_t r, uint32_t* word, int32_t* total) {
    int64_t c = 0;
#ifdef TANDEM_AVX512
    const __m512i most = _mm512_set1_epi32(127), least = _mm512_set1_epi32(-127), byte = _mm512_set1_epi32(255), half = _mm512_set1_epi32(DRAW ? 128 : 0);
    const __m128i places = _mm_cvtsi64_si128(8 * r);
    for (; c < PANEL; c += 16) {
        __m512 over = _mm512_div_ps(widen(row + c), _mm512_load_ps(divisors + c));
        if constexpr (DRAW) {
            const __m512 lost = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srl_epi32(_mm512_load_si512(noise + c), places), byte));
            over = _mm512_floor_ps(_mm512_add_ps(over, _mm512_mul_ps(_mm512_add_ps(lost, _mm512_set1_ps(0.5f)), _mm512_set1_ps(0x1p-8f))));
        }
        const __m512i code = _mm512_max_epi32(least, _mm512_min_epi32(most, _mm512_cvtps_epi32(over)));
        _mm512_store_si512(total + c, _mm512_add_epi32(_mm512_load_si512(total + c), code));
        const __m512i placed = _mm512_sll_epi32(_mm512_and_si512(_mm512_add_epi32(code, half), byte), places);
        _mm512_store_si512(word + c, _mm512_or_si512(_mm512_load_si512(word + c), placed));
    }
#endif
    for (; c < PANEL; c++) {
        const float over = to_float(row[c]) / divisors[c];
        float code;
        if constexpr (DRAW) code = std::floor(over + (float(noise[c] >> 8 * r & 255u) + 0.5f) * 0x1p-8f);
        else code = over + MAGIC - MAGIC;
        const int32_t inside = int32_t(std::max(-127.0f, std::min(127.0f, code)));
        total[c] += inside;
        word[c] |= (uint32_t(inside + (DRAW ? 128 : 0)) & 255u) << 8 * r;
    }
}

// 64 columns of x[rows, ...] as codes, four rows a word: word g of column c lies at out[g * step + c * width]. `top`: sizes of columns.
// With `draw` what is lost goes up by chance, and 128 is added; rows beyond the last are zeros.
template <bool DRAW, typename E>
void columns_of(const E* x, int64_t stride, int64_t rows, int64_t count, int64_t words, const uint32_t* top, uint64_t seed, int64_t first, int32_t* out, int64_t step,
                int64_t width, float* scales, int32_t* sums) {
    alignas(64) float divisors[PANEL];
    alignas(64) int32_t total[PANEL] = {};
    for (int64_t c = 0; c < PANEL; c++) {
        const float scale = c < count ? scale_of(top[c]) : 0.0f;
        if (c < count) scales[c] = scale;
        divisors[c] = scale > 0 ? scale : INF;
    }
    for (int64_t g = 0; g < words; g++) {
        alignas(64) uint32_t word[PANEL] = {};
        alignas(64) uint32_t noise[PANEL] = {};
        if constexpr (DRAW) {
            Words drawn[4];
            philox64({seed, uint32_t(g), ROUNDING}, first, drawn);
            std::memcpy(noise, drawn, sizeof drawn);
        }
        for (int64_t r = 0; r < QUAD; r++) {
            const int64_t t = g * QUAD + r;
            if (t >= rows) {
                if constexpr (DRAW)
                    for (int64_t c = 0; c < PANEL; c++) word[c] |= 128u << 8 * r;
                continue;
            }
            const E* row = x + t * stride;
            alignas(64) E padded[PANEL] = {};
            if (count < PANEL) std::memcpy(padded, row, count * sizeof(E)), row = padded;
            code_panel<DRAW>(row, divisors, noise, r, word, total);
        }
        if constexpr (DRAW)
            for (int64_t c = 0; c < count; c++) out[g * step + c * width] = int32_t(word[c]);
        else
            std::memcpy(out + g * step, word, sizeof word);
    }
    if (sums)
        for (int64_t c = 0; c < PANEL; c++) sums[c] = 128 * total[c];
}

// A row as codes with 128 added, what is lost goes up by chance.
template <typename E>
void drawn_row(const E* x, int64_t count, int64_t depth, uint64_t seed, uint32_t row, uint8_t* codes, float* scale) {
    *scale = scale_of(size_bits(largest_size(x, count)));
    const float divisor = *scale > 0 ? *scale : INF;
    for (int64_t i = 0; i < count; i += NOISE) {
        alignas(64) uint8_t noise[NOISE];
        Words drawn[4];
        philox64({seed, row, ROUNDING}, i / QUAD, drawn);
        std::memcpy(noise, drawn, sizeof noise);
        const int64_t some = std::min<int64_t>(NOISE, count - i);
        int64_t j = 0;
#ifdef TANDEM_AVX512
        const __m512 wide = _mm512_set1_ps(divisor);
        const __m512i most = _mm512_set1_epi32(127), least = _mm512_set1_epi32(-127), half = _mm512_set1_epi32(128);
        for (; j + 16 <= some; j += 16) {
            const __m512 lost = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_load_si128((const __m128i*)(noise + j))));
            const __m512 up = _mm512_mul_ps(_mm512_add_ps(lost, _mm512_set1_ps(0.5f)), _mm512_set1_ps(0x1p-8f));
            const __m512i code = _mm512_cvtps_epi32(_mm512_floor_ps(_mm512_add_ps(_mm512_div_ps(widen(x + i + j), wide), up)));
            const __m512i inside = _mm512_add_epi32(_mm512_max_epi32(least, _mm512_min_epi32(most, code)), half);
            _mm_storeu_si128((__m128i*)(codes + i + j), _mm512_cvtepi32_epi8(inside));
        }
#endif
        for (; j < some; j++) {
            const float code = std::floor(to_float(x[i + j]) / divisor + (float(noise[j]) + 0.5f) * 0x1p-8f);
            codes[i + j] = uint8_t(int32_t(std::max(-127.0f, std::min(127.0f, code))) + 128);
        }
    }
    for (int64_t i = count; i < depth; i++) codes[i] = 128;
}

// matrix[rows, columns] turned: a panel of 64 columns has their codes over all rows.
template <typename E>
void turn_share(const E* x, int64_t stride, int64_t rows, int64_t columns, int64_t depth, int8_t* packed, float* scales, int32_t* sums, const Team& team) {
    int64_t p, last;
    team.share((columns + PANEL - 1) / PANEL, p, last);
    for (; p < last; p++) {
        const int64_t first = p * PANEL, count = std::min<int64_t>(PANEL, columns - first);
        uint32_t top[PANEL];
        column_sizes(x + first, stride, rows, count, top);
        columns_of<false>(x + first, stride, rows, count, depth / QUAD, top, 0, 0, (int32_t*)(packed + p * depth * PANEL), PANEL, 1, scales + first, sums + first);
    }
}

inline void raise(std::atomic<uint32_t>& most, uint32_t top) {
    uint32_t seen = most.load(std::memory_order_relaxed);
    while (seen < top && !most.compare_exchange_weak(seen, top)) {}
}

// dx[T, K] = dy[T, N] W[N, K], W turned.
template <typename E>
void input_gradient(const E* dy, int64_t stride, const Eights* w, E* dx, int64_t t, int64_t n) {
    const auto codes = scratch<uint8_t>(t * w->depth);
    const auto scales = scratch<float>(t);
    const EightRows rows{codes.get(), scales.get(), w->depth};
    const Product<E> product{nullptr, 0, nullptr, t, w->columns, w->depth};
    std::atomic<uint32_t> most{0};
    with_team([&](const Team& team) {
        int64_t begin, end;
        team.share(t, begin, end);
        for (int64_t i = begin; i < end; i++) raise(most, size_bits(largest_size(dy + i * stride, n)));
        team.wait();
        const uint64_t seed = seed_of(most, 0);
        for (int64_t i = begin; i < end; i++) drawn_row(dy + i * stride, n, w->depth, seed, uint32_t(i), rows.codes + i * w->depth, rows.scales + i);
        team.wait();
        eights_share<E, E>(product, rows, *w, dx, team);
    });
}

// grad[N, K] += dy[T, N]^T x[T, K].
template <typename E>
void accumulate(const E* dy, int64_t dy_stride, const E* x, int64_t x_stride, float* grad, int64_t t, int64_t n, int64_t k) {
    const int64_t depth = (t + QUAD - 1) / QUAD * QUAD, panels = (k + PANEL - 1) / PANEL, tops = (n + PANEL - 1) / PANEL * PANEL;
    const auto codes = scratch<uint8_t>(n * depth);
    const auto packed = scratch<int8_t>(panels * PANEL * depth);
    const auto row_scales = scratch<float>(tops), scales = scratch<float>(panels * PANEL);
    const auto sums = scratch<int32_t>(panels * PANEL);
    const auto top = scratch<uint32_t>(tops);
    const Eights turned{packed.get(), scales.get(), sums.get(), k, depth};
    const EightRows rows{codes.get(), row_scales.get(), depth};
    const Product<float> product{nullptr, 0, nullptr, n, k, depth, nullptr, grad};
    std::atomic<uint32_t> most{0};
    with_team([&](const Team& team) {
        int64_t begin, end;
        team.share(tops / PANEL, begin, end);
        for (int64_t p = begin; p < end; p++) {
            const int64_t first = p * PANEL, count = std::min<int64_t>(PANEL, n - first);
            column_sizes(dy + first, dy_stride, t, count, top.get() + first);
            for (int64_t c = 0; c < count; c++) raise(most, top[first + c]);
        }
        team.wait();
        const uint64_t seed = seed_of(most, 1);
        for (int64_t p = begin; p < end; p++) {
            const int64_t first = p * PANEL, count = std::min<int64_t>(PANEL, n - first);
            columns_of<true>(dy + first, dy_stride, t, count, depth / QUAD, top.get() + first, seed, first, (int32_t*)(codes.get() + first * depth), 1, depth / QUAD,
                             row_scales.get() + first, nullptr);
        }
        turn_share(x, x_stride, t, k, depth, packed.get(), scales.get(), sums.get(), team);
        team.wait();
        eights_share<float, float>(product, rows, turned, grad, team);
    });
}

template <typename E>
void turn(const E* value, int8_t* packed, float* scales, int32_t* sums, int64_t n, int64_t k, int64_t depth) {
    with_team([&](const Team& team) { turn_share(value, k, n, k, depth, packed, scales, sums, team); });
}

}  // namespace

#define TANDEM_EIGHTS_GRADIENT(NAME, E)                                                                                                              \
    void turn_eights_##NAME(const E* v, int8_t* p, float* s, int32_t* z, int64_t n, int64_t k, int64_t d) { turn(v, p, s, z, n, k, d); }                  \
    void input_gradient_eights_##NAME(const E* dy, int64_t s, const Eights* w, E* dx, int64_t t, int64_t n) { input_gradient(dy, s, w, dx, t, n); }      \
    void accumulate_eights_##NAME(const E* dy, int64_t ds, const E* x, int64_t xs, float* g, int64_t t, int64_t n, int64_t k) { accumulate(dy, ds, x, xs, g, t, n, k); }

extern "C" {
TANDEM_EIGHTS_GRADIENT(bf16, bf16)
TANDEM_EIGHTS_GRADIENT(fp32, float)
}

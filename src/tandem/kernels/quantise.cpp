// Matrices to integers in groups that share a scale, and back. Contract in numerics/quantise.py: fp32 operations in its
// order, none of them contracted, so the bits are those of its torch operations.
#include "tile.h"
#include <omp.h>

using namespace tandem;

namespace {

inline uint32_t size_bits(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return bits & 0x7fffffffu;
}

template <typename E>
void quantise(const E* weight, int8_t* codes, float* scales, int64_t rows, int64_t inputs, int64_t group, float largest) {
    const int64_t groups = (inputs + group - 1) / group;
#pragma omp parallel for schedule(static) if (rows * inputs > 16384)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t first = i * inputs + g * group, count = std::min(group, inputs - g * group);
            const E* source = weight + first;
            int8_t* target = codes + first;
            uint32_t top = 0;  // sizes compare as their bits do; infinity and NaN are above all numbers
            for (int64_t j = 0; j < count; j++) top = std::max(top, size_bits(to_float(source[j])));
            float amax;
            std::memcpy(&amax, &top, 4);
            const float scale = amax / largest, divisor = scale > 0 ? scale : INF;
            scales[i * groups + g] = scale;
            for (int64_t j = 0; j < count; j++) {
                const float code = std::nearbyint(to_float(source[j]) / divisor);
                target[j] = int8_t(int32_t(std::max(-largest, std::min(largest, code))));
            }
        }
}

template <typename E>
void dequantise(const int8_t* codes, const float* scales, E* out, int64_t rows, int64_t inputs, int64_t group) {
    const int64_t groups = (inputs + group - 1) / group;
#pragma omp parallel for schedule(static) if (rows * inputs > 16384)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t first = i * inputs + g * group, count = std::min(group, inputs - g * group);
            const float scale = scales[i * groups + g];
            for (int64_t j = 0; j < count; j++) out[first + j] = from_float<E>(float(codes[first + j]) * scale);
        }
}

}  // namespace

extern "C" {
void quantise_bf16(const bf16* w, int8_t* c, float* s, int64_t n, int64_t k, int64_t g, float l) { quantise(w, c, s, n, k, g, l); }
void quantise_fp32(const float* w, int8_t* c, float* s, int64_t n, int64_t k, int64_t g, float l) { quantise(w, c, s, n, k, g, l); }
void dequantise_bf16(const int8_t* c, const float* s, bf16* w, int64_t n, int64_t k, int64_t g) { dequantise(c, s, w, n, k, g); }
void dequantise_fp32(const int8_t* c, const float* s, float* w, int64_t n, int64_t k, int64_t g) { dequantise(c, s, w, n, k, g); }
}

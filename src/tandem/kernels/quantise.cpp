// Matrices to integers in groups that share a scale, and back. Contract in numerics/quantise.py: fp32 operations in its
// order, none of them contracted, so the bits are those of its torch operations.
#include "integers.h"
#include <omp.h>

using namespace tandem;

namespace {

template <typename E>
void quantise(const E* weight, int8_t* codes, float* scales, int64_t rows, int64_t inputs, int64_t group, float largest) {
    const int64_t groups = (inputs + group - 1) / group;
#pragma omp parallel for schedule(static) if (rows * inputs > 16384)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t first = i * inputs + g * group, count = std::min(group, inputs - g * group);
            const float scale = scales[i * groups + g] = largest_size(weight + first, count) / largest;
            write_codes(weight + first, count, scale, largest, codes + first);
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

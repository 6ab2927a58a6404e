// Numbers rounded to formats whose blocks share a scale, and read back. Contract in numerics/blocks.py: fp32 operations in its order,
// none of them contracted, so the bits are those of its torch operations.
#include "integers.h"
#include "sample.h"
#include "team.h"
#include <vector>

using namespace tandem;

namespace {

enum Scale { POWER, FLOAT8, SINGLE };
enum Rule { FLOOR, RCEIL, CEIL, EVEN };

// As kernels/blocks.py has it.
struct Form {
    int64_t block;  // inputs; all of a row where there are fewer
    int64_t rows;   // of a block
    int64_t scale, rule;
    int64_t inference, zero_point, fixed;
    int64_t mantissa, least, most;  // of an element; least: exponent of its smallest normal number, or of its unit where it is fixed
    double largest;
    double top;  // largest size of the tensor; negative: of each row its own
    int64_t drawn, seed;  // whether it rounds by words of Philox: (seed, row, column); rows of a block are then 1, and there is no zero point
};

constexpr uint32_t ROUNDING = 4;  // numerics.random.Stream

inline float power_of_two(int64_t exponent) {  // within [-127, 127]
    return of_bits(exponent == -127 ? 1u << 22 : uint32_t(exponent + 127) << 23);
}

constexpr float MAGIC = 12582912.0f;  // 1.5 x 2^23: added and taken off, it leaves the nearest integer, ties to the even one

// The nearest number of a floating element: its code is even where two are as near. Saturates; zeros keep their sign.
inline float floating(float v, int32_t mantissa, int32_t least, float largest) {
    const uint32_t bits = bits_of(v), sign = bits & 0x80000000u;
    const float size = std::min(of_bits(bits & 0x7fffffffu), largest);
    const int32_t exponent = std::max(int32_t(bits_of(size) >> 23) - 127, least) - mantissa;
    const float unit = of_bits(uint32_t(exponent + 127) << 23), inverse = of_bits(uint32_t(127 - exponent) << 23);
    return of_bits(bits_of((size * inverse + MAGIC - MAGIC) * unit) | sign);
}

inline float fixed_point(float v, float unit, float inverse, float largest) {
    const float inside = std::max(-largest, std::min(largest, v));
    return (inside * inverse + MAGIC - MAGIC) * unit;
}

// A number of floating or fixed point, up by the probability of what is lost: where that is above the word's first bits.
inline float drawn_element(float v, int32_t mantissa, int32_t least, float largest, bool fixed, uint32_t word) {
    const uint32_t bits = bits_of(v), size = bits & 0x7fffffffu, field = size >> 23;
    const uint64_t whole = field ? (size & 0x7fffff) | 0x800000 : size;  // v = whole 2^(exponent - 23)
    const int32_t exponent = std::max(int32_t(field), 1) - 127;
    const int32_t unit = fixed ? least : std::max(exponent, least) - mantissa, shift = unit - exponent + 23;
    if (shift <= 0 || size >= bits_of(largest)) return of_bits(std::min(size, bits_of(largest)) | (bits & 0x80000000u));
    const int32_t right = std::min(shift, 62);
    const uint64_t lost = whole & ((uint64_t(1) << right) - 1), edge = right <= 32 ? word >> (32 - right) : uint64_t(word) << (right - 32);
    const float found = float((whole >> right) + (lost > edge)) * of_bits(uint32_t(unit + 127) << 23);
    return of_bits(bits_of(std::min(found, largest)) | (bits & 0x80000000u));
}

inline int64_t exponent_of(float amax, const Form& f) {
    if (f.rule == RCEIL) amax = amax / float(f.largest);
    int32_t bits = int32_t(bits_of(amax));
    if (f.rule == EVEN) bits += 1 << (22 - f.mantissa);
    int64_t exponent = (bits >> 23) - 127;
    if (f.rule == CEIL || f.rule == RCEIL) exponent += (bits & 0x7fffff) > 0 && bits > 0x400000;
    if (f.rule != RCEIL) exponent -= f.most;
    return std::max<int64_t>(-127, std::min<int64_t>(127, exponent));
}

// x times `first`, times `second`, over `divisor`, to the nearest element, times `scale`.
template <typename E>
void elements(const E* x, E* out, int64_t count, const Form& f, float first, float second, float divisor, float scale, const uint32_t* words) {
    const int32_t mantissa = int32_t(f.mantissa), least = int32_t(f.least);
    const float largest = float(f.largest);
    if (words) {
        const float none = f.fixed ? 0.0f : -0.0f;  // + 0: an integer's zero has no sign
        for (int64_t i = 0; i < count; i++)
            out[i] = from_float<E>((drawn_element(to_float(x[i]) * first * second / divisor, mantissa, least, largest, f.fixed, words[i]) + none) * scale);
    } else if (f.fixed) {
        const float unit = power_of_two(least), inverse = power_of_two(-least);
        for (int64_t i = 0; i < count; i++)  // + 0: a zero has no sign
            out[i] = from_float<E>((fixed_point(to_float(x[i]) * first * second / divisor, unit, inverse, largest) + 0.0f) * scale);
    } else {
        for (int64_t i = 0; i < count; i++) out[i] = from_float<E>(floating(to_float(x[i]) * first * second / divisor, mantissa, least, largest) * scale);
    }
}

template <typename E>
void with_zero_point(const E* x, E* out, int64_t inputs, int64_t rows, int64_t count, const Form& f) {
    float low = 0, high = 0;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < count; i++) low = std::min(low, to_float(x[r * inputs + i])), high = std::max(high, to_float(x[r * inputs + i]));
    const float last = float(2 * f.largest + 1), span = high - low, scale = span < INF ? span / last : high / last - low / last;
    const float divisor = scale > 0 ? scale : INF;
    const float zero = std::max(0.0f, std::min(last, std::nearbyint(-low / divisor)));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < count; i++) {
            const float code = to_float(x[r * inputs + i]) / divisor + MAGIC - MAGIC + zero;
            out[r * inputs + i] = from_float<E>((std::max(0.0f, std::min(last, code)) - zero) * scale);
        }
}

// Of NVFP4: what the scales of blocks are multiplied by, and what goes before them.
struct Whole {
    float enc, value;

    Whole(float top, const Form& f) {
        if (f.inference) {
            value = top / (448.0f * 6.0f);
            if (value == 0) value = 1;
            enc = 1.0f / value;
        } else {
            enc = std::min(2688.0f / top, std::numeric_limits<float>::max());
            if (top == 0 || enc == 0) enc = 1;
            value = 1.0f / enc;
        }
    }
};

template <typename E>
void block(const E* x, E* out, int64_t inputs, int64_t rows, int64_t count, const Form& f, const Whole& whole, const uint32_t* words) {
    if (f.zero_point) return with_zero_point(x, out, inputs, rows, count, f);
    float amax = 0;
    for (int64_t r = 0; r < rows; r++) {
        const float size = largest_size(x + r * inputs, count);
        amax = size < INF ? std::max(amax, size) : std::numeric_limits<float>::quiet_NaN();
        if (!(size < INF)) break;
    }
    float first = 1, second = 1, divisor = 1, scale;
    if (f.scale == POWER) {
        if (!(amax < INF)) {
            for (int64_t r = 0; r < rows; r++) std::fill_n(out + r * inputs, count, from_float<E>(std::numeric_limits<float>::quiet_NaN()));
            return;
        }
        const int64_t exponent = exponent_of(amax, f), half = -exponent / 2;
        first = power_of_two(half), second = power_of_two(-exponent - half);  // 2^127 and 2^-127 are reached in two steps
        scale = power_of_two(exponent);
    } else if (f.scale == FLOAT8) {
        float own;
        if (f.inference) {
            own = floating(std::max(0.015625f, std::min(448.0f, amax / 6.0f / whole.value)), 3, -6, 448.0f);
            first = std::min(whole.enc / own, std::numeric_limits<float>::max());
        } else {
            own = floating(std::min(amax * (whole.enc * (1.0f / 6.0f)), 448.0f), 3, -6, 448.0f);
            first = std::min(1.0f / (own * whole.value), std::numeric_limits<float>::max());
        }
        scale = own * whole.value;
    } else {
        scale = amax / float(f.largest);
        divisor = scale > 0 ? scale : INF;
    }
    for (int64_t r = 0; r < rows; r++) elements(x + r * inputs, out + r * inputs, count, f, first, second, divisor, scale, words);
}

template <typename E>
void round_blocks(const E* x, E* out, int64_t rows, int64_t inputs, const Form& f) {
    const int64_t bands = (rows + f.rows - 1) / f.rows, width = f.block > 0 ? std::min(f.block, inputs) : inputs;
    with_team([&](const Team& team) {
        int64_t b, last;
        team.share(bands, b, last);
        std::vector<uint32_t> words(f.drawn ? (inputs + 63) / 64 * 64 : 0);
        for (; b < last; b++) {
            for (size_t i = 0; i < words.size(); i += 64) {
                Words drawn[4];
                philox64({uint64_t(f.seed), uint32_t(b), ROUNDING}, int64_t(i), drawn);
                std::memcpy(words.data() + i, drawn, sizeof drawn);
            }
            const E* from = x + b * f.rows * inputs;
            E* to = out + b * f.rows * inputs;
            const int64_t high = std::min(f.rows, rows - b * f.rows);
            float top = float(f.top);
            if (f.top < 0) {
                top = largest_size(from, inputs);
                if (!(top < INF)) {
                    std::fill_n(to, inputs, from_float<E>(std::numeric_limits<float>::quiet_NaN()));
                    continue;
                }
            }
            const Whole whole(top, f);
            for (int64_t k = 0; k < inputs; k += width) {
                block(from + k, to + k, inputs, high, std::min(width, inputs - k), f, whole, f.drawn ? words.data() + k : nullptr);
            }
        }
    });
}

}  // namespace

extern "C" {
void round_blocks_bf16(const bf16* x, bf16* out, int64_t rows, int64_t inputs, const Form* f) { round_blocks(x, out, rows, inputs, *f); }
void round_blocks_fp32(const float* x, float* out, int64_t rows, int64_t inputs, const Form* f) { round_blocks(x, out, rows, inputs, *f); }
}

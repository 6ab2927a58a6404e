// Products of integers of 8 bits, and how a matrix is packed for them. Contract in eights.py.
#include "eights.h"
#include "gradient.h"
#include <atomic>

using namespace tandem;

namespace {

// codes[columns, inputs] into panels; sums of columns.
void pack(const int8_t* codes, int8_t* packed, int32_t* sums, int64_t columns, int64_t inputs, int64_t depth) {
    const int64_t panels = (columns + PANEL - 1) / PANEL;
    with_team([&](const Team& team) {
        int64_t p, last;
        team.share(panels, p, last);
        for (; p < last; p++)
            for (int64_t c = 0; c < PANEL; c++) {
                const int64_t column = p * PANEL + c;
                int32_t sum = 0;
                for (int64_t k = 0; k < depth; k++) {
                    const int8_t code = column < columns && k < inputs ? codes[column * inputs + k] : int8_t(0);
                    packed[p * depth * PANEL + k / QUAD * QUAD * PANEL + c * QUAD + k % QUAD] = code;
                    sum += code;
                }
                sums[column] = 128 * sum;
            }
    });
}

// value[columns, inputs], each column rounded by its own scale, into panels; or, where `different` is not null, the number of panels
// that are not that.
template <typename E>
void round_into(const E* value, int8_t* packed, float* scales, int32_t* sums, int64_t* different, int64_t columns, int64_t inputs, int64_t depth) {
    const int64_t panels = (columns + PANEL - 1) / PANEL, words = depth / QUAD;
    std::atomic<int64_t> found{0};
    with_team([&](const Team& team) {
        int64_t p, last;
        team.share(panels, p, last);
        const auto codes = scratch<int8_t>(depth);
        std::memset(codes.get(), 0, depth);
        for (; p < last; p++) {
            int32_t* panel = (int32_t*)(packed + p * depth * PANEL);
            const int64_t wide = std::min<int64_t>(PANEL, columns - p * PANEL);
            bool same = true;
            for (int64_t c = 0; c < wide; c++) {
                const int64_t column = p * PANEL + c;
                const E* own = value + column * inputs;
                const float scale = largest_size(own, inputs) / 127.0f;
                write_codes(own, inputs, scale, 127.0f, codes.get());
                int32_t sum = 0;
                for (int64_t k = 0; k < inputs; k++) sum += codes[k];
                const int32_t* word = (const int32_t*)codes.get();
                if (different) {
                    int32_t apart = 0;
                    for (int64_t k = 0; k < words; k++) apart |= word[k] ^ panel[k * PANEL + c];
                    same = same && !apart && scales[column] == scale && sums[column] == 128 * sum;
                } else {
                    for (int64_t k = 0; k < words; k++) panel[k * PANEL + c] = word[k];
                    scales[column] = scale, sums[column] = 128 * sum;
                }
            }
            if (!different)
                for (int64_t c = wide; c < PANEL; c++) {
                    for (int64_t k = 0; k < words; k++) panel[k * PANEL + c] = 0;
                    scales[p * PANEL + c] = 0, sums[p * PANEL + c] = 0;
                }
            found += !same;
        }
    });
    if (different) *different = found;
}

template <typename E, typename O>
void product(const E* x, int64_t stride, const Eights* w, const float* bias, const E* residual, const float* factor, O* y, int64_t rows, int64_t inputs) {
    const auto codes = scratch<uint8_t>(rows * w->depth);
    const auto scales = scratch<float>(rows);
    const EightRows own{codes.get(), scales.get(), w->depth};
    const Product<E> a{nullptr, 0, nullptr, rows, w->columns, w->depth, bias, residual, factor};
    with_team([&](const Team& team) {
        int64_t i, end;
        team.share(rows, i, end);
        for (; i < end; i++) eight_row(x + i * stride, inputs, w->depth, own.codes + i * w->depth, own.scales + i);
        team.wait();
        eights_share<E, O>(a, own, *w, y, team);
    });
}

// What the codes stand for, [columns, inputs].
template <typename E>
void unpack(const Eights& w, E* out, int64_t inputs) {
    with_team([&](const Team& team) {
        int64_t n, last;
        team.share(w.columns, n, last);
        for (; n < last; n++) {
            const int8_t* own = w.packed + n / PANEL * w.panel_bytes() + n % PANEL * QUAD;
            E* row = out + n * inputs;
            for (int64_t k = 0; k < inputs; k += QUAD, own += QUAD * PANEL)
                for (int64_t q = 0; q < std::min<int64_t>(QUAD, inputs - k); q++) row[k + q] = from_float<E>(float(own[q]) * w.scales[n]);
        }
    });
}

}  // namespace

#define TANDEM_EIGHTS(NAME, E, O)                                                                                                          \
    void eights_##NAME(const E* x, int64_t s, const Eights* w, const float* b, const E* r, const float* f, O* y, int64_t t, int64_t k) {  \
        product<E, O>(x, s, w, b, r, f, y, t, k);                                                                                         \
    }

extern "C" {
void pack_eights(const int8_t* codes, int8_t* packed, int32_t* sums, int64_t n, int64_t k, int64_t depth) { pack(codes, packed, sums, n, k, depth); }
void round_eights_bf16(const bf16* v, int8_t* packed, float* scales, int32_t* sums, int64_t* different, int64_t n, int64_t k, int64_t depth) {
    round_into(v, packed, scales, sums, different, n, k, depth);
}
void round_eights_fp32(const float* v, int8_t* packed, float* scales, int32_t* sums, int64_t* different, int64_t n, int64_t k, int64_t depth) {
    round_into(v, packed, scales, sums, different, n, k, depth);
}
void unpack_eights_bf16(const Eights* w, bf16* out, int64_t k) { unpack(*w, out, k); }
void unpack_eights_fp32(const Eights* w, float* out, int64_t k) { unpack(*w, out, k); }
TANDEM_EIGHTS(bf16, bf16, bf16)
TANDEM_EIGHTS(bf16_fp32, bf16, float)
TANDEM_EIGHTS(fp32, float, float)
}

// Products of integers of 8 bits, and how a matrix is packed for them. Contract in eights.py.
#include "eights.h"
#include "gradient.h"

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

void unpack(const Eights& w, int8_t* codes, int64_t inputs) {
    with_team([&](const Team& team) {
        int64_t n, last;
        team.share(w.columns, n, last);
        for (; n < last; n++)
            for (int64_t k = 0; k < inputs; k++) codes[n * inputs + k] = w.packed[n / PANEL * w.panel_bytes() + k / QUAD * QUAD * PANEL + n % PANEL * QUAD + k % QUAD];
    });
}

}  // namespace

#define TANDEM_EIGHTS(NAME, E, O)                                                                                                          \
    void eights_##NAME(const E* x, int64_t s, const Eights* w, const float* b, const E* r, const float* f, O* y, int64_t t, int64_t k) {  \
        product<E, O>(x, s, w, b, r, f, y, t, k);                                                                                         \
    }

extern "C" {
void pack_eights(const int8_t* codes, int8_t* packed, int32_t* sums, int64_t n, int64_t k, int64_t depth) { pack(codes, packed, sums, n, k, depth); }
void unpack_eights(const Eights* w, int8_t* codes, int64_t k) { unpack(*w, codes, k); }
TANDEM_EIGHTS(bf16, bf16, bf16)
TANDEM_EIGHTS(bf16_fp32, bf16, float)
TANDEM_EIGHTS(fp32, float, float)
}

// Products of codes of 4 bits by rows of 8, and how a matrix is rounded for them. Contract in fours.py.
#include "fours.h"
#include "gradient.h"
#include <atomic>

using namespace tandem;

namespace {

// A panel of value[columns, inputs], rounded in groups.
template <typename E>
void round_panel(const Codes& w, const E* value, int64_t inputs, int64_t p, int8_t* codes, uint8_t* at) {
    const int64_t count = std::min<int64_t>(PANEL, w.columns - p * PANEL);
    for (int64_t g = 0; g < w.depth; g += w.group) {
        const int64_t own = std::min(w.group, inputs - g), all = std::min(w.group, w.depth - g);
        float* scales = (float*)at;
        for (int64_t c = 0; c < PANEL; c++) {
            const E* x = value + (p * PANEL + c) * inputs + g;
            scales[c] = c < count ? largest_size(x, own) / 7.0f : 0.0f;
            if (c < count) write_codes(x, own, scales[c], 7.0f, codes + c * w.group);
            for (int64_t k = own; k < all; k++) codes[c * w.group + k] = 0;
        }
        const auto column = [&](int64_t c) { return c < count ? codes + c * w.group : nullptr; };
        pack_fours(column, all, EIGHT_MORE, at + w.header_bytes());
        at += w.header_bytes() + all * PANEL / 2;
    }
}

// A matrix into w.packed, scales in fp32; or, where `different` is not null, the number of panels that are not its.
// finite: 0 where a scale is not.
template <typename E>
void round_into(Codes& w, const E* value, int64_t inputs, int64_t* different, int64_t* finite) {
    std::atomic<int64_t> found{0};
    std::atomic<bool> fine{true}, normal{true};
    with_team([&](const Team& team) {
        const auto codes = scratch<int8_t>(PANEL * w.group);
        const auto made = scratch<uint8_t>(w.panel_bytes());
        std::memset(codes.get(), 0, PANEL * w.group);
        int64_t p, last;
        team.share(w.panels(), p, last);
        for (; p < last; p++) {
            uint8_t* place = (uint8_t*)w.packed + p * w.panel_bytes();
            uint8_t* target = different ? made.get() : place;
            round_panel(w, value, inputs, p, codes.get(), target);
            if (different) found += std::memcmp(made.get(), place, w.panel_bytes()) != 0;
            for (int64_t g = 0, at = 0; g < w.depth; g += w.group, at += w.header_bytes() + w.group * PANEL / 2)
                for (int64_t c = 0; c < PANEL; c++) {
                    const float scale = ((const float*)(target + at))[c];
                    if (!(scale < INF)) fine = false;
                    if (scale > 0 && scale < std::numeric_limits<float>::min()) normal = false;
                }
        }
    });
    if (different) *different = found;
    else w.normal = fine && normal;
    *finite = fine;
}

template <typename E, typename O>
void product(const E* x, int64_t stride, const Codes* w, const float* bias, const E* residual, const float* factor, O* y, int64_t rows, int64_t inputs) {
    const int64_t groups = groups_of(*w);
    const auto codes = scratch<uint8_t>(rows * w->depth);
    const auto scales = scratch<float>(rows);
    const auto starts = scratch<int32_t>(rows * groups * 2);
    const FourRows own{codes.get(), scales.get(), starts.get(), w->depth, groups};
    const Product<E> a{nullptr, 0, nullptr, rows, w->columns, w->depth, bias, residual, factor};
    with_team([&](const Team& team) {
        int64_t i, end;
        team.share(rows, i, end);
        for (; i < end; i++) four_row(x + i * stride, inputs, *w, own.codes + i * w->depth, own.scales + i, own.starts + i * groups * 2);
        team.wait();
        fours_share<E, O>(a, own, *w, y, team);
    });
}

// What the codes stand for, [columns, inputs].
template <typename E>
void unpack(const Codes& w, E* out, int64_t inputs) {
    with_team([&](const Team& team) {
        int64_t p, last;
        team.share(w.panels(), p, last);
        const auto values = scratch<bf16>(w.depth * PANEL);
        for (; p < last; p++) {
            if constexpr (sizeof(E) == 2) {
                dequantise_panel(w, p, values.get());
                for (int64_t c = 0; c < std::min<int64_t>(PANEL, w.columns - p * PANEL); c++)
                    for (int64_t k = 0; k < inputs; k++) out[(p * PANEL + c) * inputs + k] = values[k / 2 * 2 * PANEL + 2 * c + k % 2];
                continue;
            }
            for (int64_t g = 0; g < w.depth; g += w.group) {
                const uint8_t* group = w.packed + p * w.panel_bytes() + g / w.group * (w.header_bytes() + w.group * PANEL / 2);
                for (int64_t c = 0; c < std::min<int64_t>(PANEL, w.columns - p * PANEL); c++) {
                    E* row = out + (p * PANEL + c) * inputs + g;
                    for (int64_t k = 0; k < std::min(w.group, inputs - g); k++) row[k] = from_float<E>(value_at(w, group, c, k));
                }
            }
        }
    });
}

}  // namespace

#define TANDEM_FOURS(NAME, E, O)                                                                                                          \
    void fours_##NAME(const E* x, int64_t s, const Codes* w, const float* b, const E* r, const float* f, O* y, int64_t t, int64_t k) {    \
        product<E, O>(x, s, w, b, r, f, y, t, k);                                                                                        \
    }

extern "C" {
void round_fours_bf16(Codes* w, const bf16* v, int64_t* different, int64_t* finite, int64_t k) { round_into(*w, v, k, different, finite); }
void round_fours_fp32(Codes* w, const float* v, int64_t* different, int64_t* finite, int64_t k) { round_into(*w, v, k, different, finite); }
void unpack_fours_bf16(const Codes* w, bf16* out, int64_t k) { unpack(*w, out, k); }
void unpack_fours_fp32(const Codes* w, float* out, int64_t k) { unpack(*w, out, k); }
TANDEM_FOURS(bf16, bf16, bf16)
TANDEM_FOURS(bf16_fp32, bf16, float)
TANDEM_FOURS(fp32, float, float)
}

// Matrices as codes: packing, values, products. Contract in codes.py, layout in codes.h.
#include "codes.h"

using namespace tandem;

namespace {

// codes [columns, depth], scales and minima [columns, groups] become `w.packed`. Missing columns have scales of 0.
void pack(const Codes& w, const int8_t* codes, const uint8_t* scales, const uint8_t* minima, uint8_t* packed) {
    const int64_t size = w.half ? 2 : 4, groups = (w.depth + w.group - 1) / w.group;
    const uint64_t offset = w.minimum ? 0 : EIGHT_MORE;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < w.panels(); p++) {
        uint8_t* at = packed + p * w.panel_bytes();
        const int64_t count = std::min<int64_t>(PANEL, w.columns - p * PANEL);
        for (int64_t g = 0; g < groups; g++) {
            std::memset(at, 0, w.header_bytes());
            for (int64_t c = 0; c < count; c++) {
                const int64_t from = ((p * PANEL + c) * groups + g) * size;
                std::memcpy(at + c * size, scales + from, size);
                if (w.minimum) std::memcpy(at + w.scale_bytes() + c * size, minima + from, size);
            }
            at += w.header_bytes();
            const int64_t first = g * w.group, inputs = std::min(w.group, w.depth - first);
            const auto column = [&](int64_t c) { return c < count ? codes + (p * PANEL + c) * w.depth + first : nullptr; };
            if (w.bits == 4) pack_fours(column, inputs, offset, at);
            else
                for (int64_t k = 0; k < inputs; k += 8)
                    for (int64_t c = 0; c < PANEL; c++)
                        for (int64_t i = 0; i < 8; i++) at[(k / 8 * 4 + c / 16) * 128 + i / 2 * 32 + c % 16 * 2 + i % 2] = c < count ? uint8_t(column(c)[k + i]) : 0;
            at += inputs * PANEL * w.bits / 8;
        }
    }
}

// values [columns, depth].
void dequantise(const Codes& w, bf16* out) {
#pragma omp parallel
    {
        std::vector<bf16> values(w.depth * PANEL);
#pragma omp for schedule(static)
        for (int64_t p = 0; p < w.panels(); p++) {
            dequantise_panel(w, p, values.data());
            for (int64_t c = 0; c < std::min<int64_t>(PANEL, w.columns - p * PANEL); c++)
                for (int64_t k = 0; k < w.depth; k += 2) std::memcpy(out + (p * PANEL + c) * w.depth + k, values.data() + k * PANEL + 2 * c, 2 * sizeof(bf16));
        }
    }
}

template <typename O>
void multiply(const bf16* x, int64_t stride, const Codes& w, const float* bias, const bf16* residual, const float* factor, O* y, int64_t rows) {
    const Product<bf16> a{x, stride, nullptr, rows, w.columns, w.depth, bias, residual, factor};
    with_team([&](const Team& team) { codes_share(a, w, y, team); });
}

}  // namespace

extern "C" {
void pack_codes(const Codes* w, const int8_t* codes, const uint8_t* scales, const uint8_t* minima, uint8_t* packed) { pack(*w, codes, scales, minima, packed); }
void dequantise_codes(const Codes* w, bf16* out) { dequantise(*w, out); }
void codes_bf16(const bf16* x, int64_t s, const Codes* w, const float* b, const bf16* r, const float* f, bf16* y, int64_t t) { multiply(x, s, *w, b, r, f, y, t); }
void codes_bf16_fp32(const bf16* x, int64_t s, const Codes* w, const float* b, const bf16* r, const float* f, float* y, int64_t t) { multiply(x, s, *w, b, r, f, y, t); }
}

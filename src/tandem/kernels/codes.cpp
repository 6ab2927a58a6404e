// Matrices as codes: packing, values, products. Contract in codes.py, layout in codes.h.
#include "codes.h"

using namespace tandem;

namespace {

// 8 inputs of columns c and c + 8 of a strip as two words; codes of 4 bits, symmetric ones moved up by 8.
inline void pack_nibbles(const int8_t* low, const int8_t* high, uint64_t offset, uint8_t* words) {
    uint64_t a = 0, b = 0;
    if (low) std::memcpy(&a, low, 8);
    if (high) std::memcpy(&b, high, 8);
    constexpr uint64_t NIBBLES = 0x0f0f0f0f0f0f0f0f;
    const uint64_t both = ((a ^ offset) & NIBBLES) | ((b ^ offset) & NIBBLES) << 4;
    for (int p = 0; p < 4; p++)
        for (int j = 0; j < 2; j++) words[4 * j + p] = uint8_t(both >> (16 * p + 8 * j));
}

// codes [columns, depth], scales and minima [columns, groups] become `w.packed`. Missing columns have scales of 0.
void pack(const Codes& w, const int8_t* codes, const uint8_t* scales, const uint8_t* minima, uint8_t* packed) {
    const int64_t size = w.half ? 2 : 4, groups = (w.depth + w.group - 1) / w.group;
    const uint64_t offset = w.minimum ? 0 : 0x0808080808080808;
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
            const auto column = [&](int64_t c, int64_t k) { return c < count ? codes + (p * PANEL + c) * w.depth + k : nullptr; };
            for (int64_t k = g * w.group; k < std::min(w.depth, (g + 1) * w.group); k += 8)
                for (int64_t strip = 0; strip < 4; strip++, at += 16 * w.bits)
                    if (w.bits == 4) {
                        for (int64_t c = 0; c < 8; c++) pack_nibbles(column(16 * strip + c, k), column(16 * strip + c + 8, k), offset, at + 8 * c);
                    } else {
                        for (int64_t c = 0; c < 16; c++)
                            for (int64_t i = 0; i < 8; i++) at[i / 2 * 32 + 2 * c + i % 2] = c + 16 * strip < count ? uint8_t(column(16 * strip + c, k)[i]) : 0;
                    }
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

// An adapter on every row of a product: the learner's way, and its gradients. Contract in adapter.py.
#include "adapter.h"
#include "gradient.h"
#include <vector>

using namespace tandem;

namespace {

template <typename E>
void adapt(const E* x, int64_t x_stride, const AdapterMatrix* matrix, E* lowered, E* y, int64_t rows, int64_t columns, int64_t depth) {
    std::vector<int64_t> all(rows);
    for (int64_t i = 0; i < rows; i++) all[i] = i;
    const AdapterRows part{matrix, all.data(), rows};
    const AdapterProduct<E> a{x, x_stride, depth, lowered, matrix->ranks, y, columns};
    with_team([&](const Team& team) {
        lower_share(&part, 1, a, team);
        team.wait();
        raise_share(&part, 1, a, team);
    });
}

// What the backward pass needs of a piece beside AdapterPiece.
template <typename E>
struct PieceValues {
    const E* up;  // B, [columns, rank]
    float* grad;  // of B, or null
    int64_t rank;
};

// B^T of a piece in strips, as lower_tile reads them: [depth / PAIR][16 strips][PAIR] of each panel of ranks, zeros beyond them.
template <typename E>
void turn_up_share(const PieceValues<E>& values, int64_t columns, int64_t ranks, E* strips, const Team& team) {
    constexpr int64_t pair = pair_of<E>();
    for (int64_t first = 0; first < ranks; first += PANEL) {
        const int64_t width = 16 * strips_of(ranks, first);
        int64_t n, last;
        team.share(columns, n, last);
        for (; n < last; n++) {
            E* target = strips + first * columns + n / pair * width * pair + n % pair;
            const E* source = values.up + n * values.rank + first;
            for (int64_t r = 0; r < width; r++) target[r * pair] = first + r < values.rank ? source[r] : E(0);
        }
    }
}

// dx[T, K] = dy[T, N] W[N, K] + dlow[T, R] A[R, K], rounded once; dlow = s dy B, rounded before.
template <typename E>
void input_gradient(const E* dy, int64_t stride, const E* weight, const E* down, const AdapterMatrix* matrix, const PieceValues<E>* values, E* dlow, E* dx, int64_t t,
                    int64_t n, int64_t k) {
    const int64_t depth = padded_depth<E>(n), ranks = matrix->ranks, low_depth = padded_depth<E>(ranks), width = (k + PANEL - 1) / PANEL * PANEL;
    const auto packed = scratch<E>(width * depth), packed_down = scratch<E>(width * low_depth);
    std::vector<std::unique_ptr<E[]>> ups;
    std::vector<int64_t> all(t);
    for (int64_t i = 0; i < t; i++) all[i] = i;
    for (int64_t i = 0; i < matrix->num_pieces; i++) ups.push_back(scratch<E>((matrix->pieces[i].rank + 15) / 16 * 16 * matrix->pieces[i].columns));
    const Product<E> low{dlow, ranks, packed_down.get(), t, k, low_depth};
    Product<E> product{dy, stride, packed.get(), t, k, depth};
    product.more = &low;
    with_team([&](const Team& team) {
        depth_panels_share(weight, k, packed.get(), n, k, team);
        depth_panels_share(down, k, packed_down.get(), ranks, k, team);
        for (int64_t i = 0; i < matrix->num_pieces; i++) turn_up_share(values[i], matrix->pieces[i].columns, matrix->pieces[i].rank, ups[i].get(), team);
        team.wait();
        for (int64_t i = 0; i < matrix->num_pieces; i++) {
            const AdapterPiece& piece = matrix->pieces[i];
            const AdapterMatrix turned{ups[i].get(), matrix->scales + piece.start, nullptr, nullptr, 0, piece.rank};
            const AdapterRows part{&turned, all.data(), t};
            lower_share(&part, 1, AdapterProduct<E>{dy + piece.first, stride, piece.columns, dlow + piece.start, ranks, nullptr, 0}, team);
        }
        team.wait();
        linear_share<E, E>(product, dx, team);
    });
}

// grad[r, c] += sum over t of left[t, r] right[t, c]: few r. left is turned; right becomes panels a few rows at a time, which stay in the
// first-level cache, where `accumulate` (gradient.cpp) would write and read all of it. Every element is summed in order of the rows.
template <typename E>
struct Outer {
    const E* left;
    int64_t left_stride, ranks;
    const E* right;
    int64_t right_stride, columns;
    float* grad;
    int64_t rank_step, column_step;  // of grad
    E* turned;                       // [ranks, rows padded]
    int64_t panels() const { return (columns + PANEL - 1) / PANEL; }
};
constexpr int64_t OUTER_ROWS = 128;

template <typename E>
void turn_left_share(const Outer<E>& a, int64_t t, const Team& team) {
    const int64_t depth = padded_depth<E>(t);
    int64_t block, last;
    team.share((depth + PANEL - 1) / PANEL, block, last);
    for (int64_t i = block * PANEL; i < std::min(depth, last * PANEL); i++)
        for (int64_t r = 0; r < a.ranks; r++) a.turned[r * depth + i] = i < t ? a.left[i * a.left_stride + r] : E(0);
}

template <typename E>
void outer_panels(const Outer<E>& a, int64_t t, int64_t first, int64_t last) {
    const int64_t depth = padded_depth<E>(t);
    const auto sums = scratch<float>((last - first) * a.ranks * PANEL);
    alignas(64) E packed[OUTER_ROWS * PANEL];
    for (int64_t k = 0; k < depth; k += OUTER_ROWS) {
        const int64_t some = std::min(OUTER_ROWS, depth - k);
        for (int64_t p = first; p < last; p++) {
            const int64_t width = std::min<int64_t>(PANEL, a.columns - p * PANEL);
            depth_panel<E>(a.right + k * a.right_stride, a.right_stride, a.columns, 0, p, 0, std::min(some, t - k), packed);
            float* out = sums.get() + (p - first) * a.ranks * PANEL;
            for (int64_t r = 0; r < a.ranks; r += ROWS) {
                const int count = int(std::min<int64_t>(ROWS, a.ranks - r));
                const E* rows[ROWS];
                for (int i = 0; i < count; i++) rows[i] = a.turned + (r + i) * depth + k;
                tile<E>(count, rows, pair_of<E>(), packed, some, out + r * PANEL, PANEL, k > 0, Ahead(), width);
            }
        }
    }
    for (int64_t p = first; p < last; p++)
        for (int64_t c = 0; c < std::min<int64_t>(PANEL, a.columns - p * PANEL); c++) {
            float* target = a.grad + (p * PANEL + c) * a.column_step;
            for (int64_t r = 0; r < a.ranks; r++) target[r * a.rank_step] += sums[((p - first) * a.ranks + r) * PANEL + c];
        }
}

// To those of A (`down`) and of each piece's B, where they are wanted.
template <typename E>
void gradients(const E* dy, int64_t dy_stride, const E* x, int64_t x_stride, const E* lowered, const E* dlow, const AdapterMatrix* matrix, const PieceValues<E>* values,
               float* down, int64_t t, int64_t k) {
    const int64_t ranks = matrix->ranks, depth = padded_depth<E>(t);
    std::vector<Outer<E>> all;
    if (down) all.push_back({dlow, ranks, ranks, x, x_stride, k, down, k, 1, nullptr});
    for (int64_t i = 0; i < matrix->num_pieces; i++) {
        const AdapterPiece& piece = matrix->pieces[i];
        if (values[i].grad) all.push_back({lowered + piece.start, ranks, values[i].rank, dy + piece.first, dy_stride, piece.columns, values[i].grad, 1, values[i].rank, nullptr});
    }
    int64_t turned_rows = 0, panels = 0;
    for (const Outer<E>& one : all) turned_rows += one.ranks, panels += one.panels();
    const auto turned = scratch<E>(turned_rows * depth);
    int64_t at = 0;
    for (Outer<E>& one : all) one.turned = turned.get() + at * depth, at += one.ranks;
    with_team([&](const Team& team) {
        for (const Outer<E>& one : all) turn_left_share(one, t, team);
        team.wait();
        const Tiles configured;
        int64_t first, last, base = 0;
        team.share(panels, first, last);
        for (const Outer<E>& one : all) {
            const int64_t own = std::max<int64_t>(0, first - base), end = std::min(one.panels(), last - base);
            if (own < end) outer_panels(one, t, own, end);
            base += one.panels();
        }
    });
}

}  // namespace

#define TANDEM_ADAPTER_GRADIENT(NAME, E)                                                                                                      \
    void adapted_input_gradient_##NAME(const E* dy, int64_t s, const E* w, const E* a, const AdapterMatrix* m, const void* values, E* dlow, E* dx,  \
                                       int64_t t, int64_t n, int64_t k) {                                                                     \
        input_gradient(dy, s, w, a, m, (const PieceValues<E>*)values, dlow, dx, t, n, k);                                                     \
    }                                                                                                                                         \
    void adapter_gradients_##NAME(const E* dy, int64_t ds, const E* x, int64_t xs, const E* low, const E* dlow, const AdapterMatrix* m, const void* values, \
                                  float* down, int64_t t, int64_t n, int64_t k) {                                                             \
        (void)n;                                                                                                                              \
        gradients(dy, ds, x, xs, low, dlow, m, (const PieceValues<E>*)values, down, t, k);                                                    \
    }

extern "C" {
TANDEM_ADAPTER_GRADIENT(bf16, bf16)
TANDEM_ADAPTER_GRADIENT(fp32, float)
void adapt_bf16(const bf16* x, int64_t s, const AdapterMatrix* m, bf16* low, bf16* y, int64_t t, int64_t n, int64_t k) { adapt(x, s, m, low, y, t, n, k); }
void adapt_fp32(const float* x, int64_t s, const AdapterMatrix* m, float* low, float* y, int64_t t, int64_t n, int64_t k) { adapt(x, s, m, low, y, t, n, k); }
}

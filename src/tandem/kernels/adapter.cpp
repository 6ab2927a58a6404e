// An adapter on every row of a product: the learner's way. Contract in adapter.py.
#include "adapter.h"
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

}  // namespace

extern "C" {
void adapt_bf16(const bf16* x, int64_t s, const AdapterMatrix* m, bf16* low, bf16* y, int64_t t, int64_t n, int64_t k) { adapt(x, s, m, low, y, t, n, k); }
void adapt_fp32(const float* x, int64_t s, const AdapterMatrix* m, float* low, float* y, int64_t t, int64_t n, int64_t k) { adapt(x, s, m, low, y, t, n, k); }
}

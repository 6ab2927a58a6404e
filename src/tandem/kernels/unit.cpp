// What tile() multiplies bf16 with in this process, and tile() by itself, for the check that comes before all others (build/check.py).
#include "tile.h"

using namespace tandem;

extern "C" {

const char* matrix_unit() {
#ifdef TANDEM_AMX
    if (AMX_READY) return "amx";
#endif
#if defined(TANDEM_AVX512)
    return "avx512_bf16";
#elif defined(TANDEM_LANES_AVX512)
    return "avx512";
#elif defined(TANDEM_LANES_AVX2)
    return "avx2";
#else
    return "portable";
#endif
}

// out[count, 64] (+)= x[count, depth] times a panel; rows of x lie `stride` elements apart.
void multiply_bf16(const bf16* x, int64_t stride, int64_t count, const bf16* panel, int64_t depth, float* out, int64_t add) {
    for (int64_t first = 0; first < count; first += ROWS) {
        const bf16* rows[ROWS];
        const int some = int(std::min<int64_t>(ROWS, count - first));
        for (int r = 0; r < some; r++) rows[r] = x + (first + r) * stride;
        tile<bf16>(some, rows, pair_of<bf16>(), panel, depth, out + first * PANEL, PANEL, add != 0);
    }
}
}

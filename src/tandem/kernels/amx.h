// The matrix unit of Intel's AMX: eight tiles of 16 rows x 64 bytes a thread. tile.h multiplies with it.
//
// The order of reduction of tdpbf16ps is not vdpbf16ps's: per instruction, the even and the odd inputs of 32 are summed apart, from
// zero, then together, then added to the tile (Intel, Software Developer's Manual 2: fp32, to nearest even, denormals are zero on the
// way in and out). It depends on no row but an output's own, and tile.h feeds it 32 inputs at a time from the first one on.
//
// -DTANDEM_AMX_EMULATED: plain C++ with these semantics in place of the instructions, on any processor; =0: as where Linux refuses them.
// -DTANDEM_NO_AMX: without.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(TANDEM_NO_AMX)
#elif defined(TANDEM_AMX_EMULATED)
#include <cmath>
#include <cstdlib>
#define TANDEM_AMX 1
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__) && !defined(TANDEM_PORTABLE)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TANDEM_AMX 1
#endif

namespace tandem {

#ifdef TANDEM_AMX

constexpr int TILE_ROWS = 16, TILE_BYTES = 64;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {TILE_BYTES, TILE_BYTES, TILE_BYTES, TILE_BYTES, TILE_BYTES, TILE_BYTES, TILE_BYTES, TILE_BYTES};
    uint8_t rows[16] = {TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS};
};
static_assert(sizeof(TileConfig) == 64, "the layout that ldtilecfg reads");

#ifdef TANDEM_AMX_EMULATED

struct alignas(64) EmulatedTile {
    uint8_t row[TILE_ROWS][TILE_BYTES];
};
static thread_local EmulatedTile emulated[8];
static thread_local bool emulated_ready = false;

inline EmulatedTile& emulated_tile(int t) {
    if (!emulated_ready) std::abort();  // the processor raises #UD
    return emulated[t];
}
inline void emulated_load(int t, const void* base, int64_t stride) {
    for (int r = 0; r < TILE_ROWS; r++) std::memcpy(emulated_tile(t).row[r], (const char*)base + r * stride, TILE_BYTES);
}
inline void emulated_store(int t, void* base, int64_t stride) {
    for (int r = 0; r < TILE_ROWS; r++) std::memcpy((char*)base + r * stride, emulated_tile(t).row[r], TILE_BYTES);
}
inline float flushed(float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }
inline void emulated_multiply(int c, int a, int b) {
    const auto widened = [](uint32_t bits) {
        float v;
        std::memcpy(&v, &bits, 4);
        return flushed(v);
    };
    float even_b[TILE_ROWS][16], odd_b[TILE_ROWS][16];
    for (int k = 0; k < TILE_ROWS; k++) {
        uint32_t words[16];
        std::memcpy(words, emulated_tile(b).row[k], TILE_BYTES);
        for (int n = 0; n < 16; n++) even_b[k][n] = widened(words[n] << 16), odd_b[k][n] = widened(words[n] & 0xffff0000u);
    }
    for (int m = 0; m < TILE_ROWS; m++) {
        uint32_t pairs[16];
        float even[16] = {}, odd[16] = {}, out[16];
        std::memcpy(pairs, emulated_tile(a).row[m], TILE_BYTES);
        std::memcpy(out, emulated_tile(c).row[m], TILE_BYTES);
        for (int k = 0; k < TILE_ROWS; k++) {
            const float even_a = widened(pairs[k] << 16), odd_a = widened(pairs[k] & 0xffff0000u);
            for (int n = 0; n < 16; n++) {
                even[n] = flushed(__builtin_fmaf(even_a, even_b[k][n], even[n]));
                odd[n] = flushed(__builtin_fmaf(odd_a, odd_b[k][n], odd[n]));
            }
        }
        for (int n = 0; n < 16; n++) out[n] = flushed(flushed(out[n]) + flushed(even[n] + odd[n]));
        std::memcpy(emulated_tile(c).row[m], out, TILE_BYTES);
    }
}
#define TILE_LOAD(t, base, stride) ::tandem::emulated_load(t, base, stride)
#define TILE_STORE(t, base, stride) ::tandem::emulated_store(t, base, stride)
#define TILE_ZERO(t) (void)(::tandem::emulated_tile(t) = {})
#define TILE_MULTIPLY(c, a, b) ::tandem::emulated_multiply(c, a, b)
inline void load_config(const TileConfig&) { emulated_ready = true; }
inline void release_tiles() { emulated_ready = false; }
inline bool ask_for_tiles() { return TANDEM_AMX_EMULATED; }

#else

// Macros, since the compiler takes tiles by literal numbers only.
#define TILE_LOAD(t, base, stride) _tile_loadd(t, base, stride)
#define TILE_STORE(t, base, stride) _tile_stored(t, base, stride)
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)
inline void load_config(const TileConfig& config) { _tile_loadconfig(&config); }
inline void release_tiles() { _tile_release(); }
// A process asks Linux once for the state that tiles need; refused where a signal stack is too small or the kernel predates 5.16.
inline bool ask_for_tiles() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

#endif

static const bool AMX_READY = ask_for_tiles();
static thread_local int living_tiles = 0;

// The calling thread's tiles are set up for tile() while one of these lives. tile() makes one itself; around many calls an outer one
// spares each the set-up (some 200 cycles by Intel's tables, not measured). No other library's code may run meanwhile: theirs may
// set tiles up otherwise. Released at the end, so that a switch of threads saves no tiles.
class Tiles {
public:
    Tiles() {
        static const TileConfig config;
        if (AMX_READY && living_tiles++ == 0) load_config(config);
    }
    ~Tiles() {
        if (AMX_READY && --living_tiles == 0) release_tiles();
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

#else

class Tiles {
public:
    Tiles() {}
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

#endif

}  // namespace tandem

// Which 16-bit words of a tensor changed, coded by blocks. Contract in changes.py.
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512BW__) && !defined(TANDEM_PORTABLE)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t BLOCK = 1 << 16;  // words, so that a place in a block has 16 bits

// Bit i: whether word i of 64 differs.
inline uint64_t differ(const uint16_t* now, const uint16_t* base) {
#if defined(__AVX512BW__) && !defined(TANDEM_PORTABLE)
    const auto mask = [&](int64_t at) { return uint64_t(_mm512_cmpneq_epu16_mask(_mm512_loadu_si512(now + at), _mm512_loadu_si512(base + at))); };
    return mask(0) | mask(32) << 32;
#else
    uint64_t bits = 0;
    if (std::memcmp(now, base, 128))
        for (int64_t i = 0; i < 64; i++) bits |= uint64_t(now[i] != base[i]) << i;
    return bits;
#endif
}

// Words of the shortest stream, and which it is.
enum class Form { none, places, mask, whole };
inline int64_t shortest(int64_t count, int64_t words, Form& form) {
    const int64_t places = 2 * count, mask = (words + 15) / 16 + count;
    form = !count ? Form::none : places <= mask && places <= words ? Form::places : mask <= words ? Form::mask : Form::whole;
    return form == Form::places ? places : form == Form::mask ? mask : form == Form::whole ? words : 0;
}

inline int64_t size_of(int64_t words, int64_t block) { return words - block * BLOCK < BLOCK ? words - block * BLOCK : BLOCK; }

// Changed words of a block, by ascending place; returns how many.
int64_t find(const uint16_t* now, const uint16_t* base, int64_t words, uint16_t* places) {
    int64_t count = 0, i = 0;
    for (; i + 64 <= words; i += 64)
        for (uint64_t bits = differ(now + i, base + i); bits; bits &= bits - 1) places[count++] = uint16_t(i + __builtin_ctzll(bits));
    for (; i < words; i++)
        if (now[i] != base[i]) places[count++] = uint16_t(i);
    return count;
}

int64_t write(const uint16_t* now, int64_t words, const uint16_t* places, int64_t count, uint16_t* out) {
    Form form;
    const int64_t length = shortest(count, words, form);
    if (form == Form::whole) std::memcpy(out, now, 2 * words);
    if (form == Form::places) std::memcpy(out, places, 2 * count);
    if (form == Form::mask) {
        std::memset(out, 0, 2 * (length - count));
        for (int64_t i = 0; i < count; i++) out[places[i] / 16] |= uint16_t(1u << places[i] % 16);
    }
    if (form == Form::places || form == Form::mask)
        for (int64_t i = 0; i < count; i++) out[length - count + i] = now[places[i]];
    return length;
}

void apply(uint16_t* base, int64_t words, int64_t count, const uint16_t* stream) {
    Form form;
    const int64_t length = shortest(count, words, form);
    const uint16_t* values = stream + length - count;
    if (form == Form::whole) std::memcpy(base, stream, 2 * words);
    if (form == Form::places)
        for (int64_t i = 0; i < count; i++)
            if (stream[i] < words) base[stream[i]] = values[i];
    if (form == Form::mask)
        for (int64_t i = 0, next = 0; i < words; i += 16)
            for (uint32_t bits = stream[i / 16]; bits && next < count; bits &= bits - 1) {
                const int64_t place = i + __builtin_ctz(bits);
                if (place < words) base[place] = values[next];
                next++;
            }
}

}  // namespace

// counts: of each block. streams: room for `words`; `total` of them are written, one block's after the other's.
extern "C" void code_changes(const uint16_t* now, const uint16_t* base, int64_t words, int32_t* counts, uint16_t* streams, int64_t* total) {
    const int64_t blocks = (words + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        uint16_t places[BLOCK];
        const int64_t start = b * BLOCK;
        counts[b] = int32_t(find(now + start, base + start, size_of(words, b), places));
        write(now + start, size_of(words, b), places, counts[b], streams + start);
    }
    *total = 0;
    for (int64_t b = 0; b < blocks; b++) {
        Form form;
        const int64_t length = shortest(counts[b], size_of(words, b), form);
        if (*total != b * BLOCK) std::memmove(streams + *total, streams + b * BLOCK, 2 * length);
        *total += length;
    }
}

// Where each block's stream starts, and behind the last one; empty where such counts can be of no tensor of `words`.
static std::vector<int64_t> starts_of(int64_t words, const int32_t* counts) {
    const int64_t blocks = (words + BLOCK - 1) / BLOCK;
    std::vector<int64_t> starts(blocks + 1);
    for (int64_t b = 0; b < blocks; b++) {
        Form form;
        if (counts[b] < 0 || counts[b] > size_of(words, b)) return {};
        starts[b + 1] = starts[b] + shortest(counts[b], size_of(words, b), form);
    }
    return starts;
}

extern "C" void sound_changes(int64_t words, const int32_t* counts, int64_t length, int32_t* sound) {
    const std::vector<int64_t> starts = starts_of(words, counts);
    *sound = !starts.empty() && starts.back() == length;
}

extern "C" void apply_changes(uint16_t* base, int64_t words, const int32_t* counts, const uint16_t* streams) {
    const int64_t blocks = (words + BLOCK - 1) / BLOCK;
    const std::vector<int64_t> starts = starts_of(words, counts);
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; b++) apply(base + b * BLOCK, size_of(words, b), counts[b], streams + starts[b]);
}

// Sums of the pages of keys and values, by which a shared page is known to be what it was when it was named.
// Contract in page_sum.py.
#include <cstdint>
#include <cstring>

extern "C" void page_sums(const void* const* pools, const int64_t* page_bytes, int64_t num_pools, const int64_t* pages, int64_t count,
                          uint64_t* sums) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) {
        uint64_t sum = 0;
        int64_t before = 0;  // words of the pools before
        for (int64_t p = 0; p < num_pools; p++) {
            const int64_t bytes = page_bytes[p], words = (bytes + 7) / 8;  // the last one may be part of a word, filled with zeros
            const char* page = (const char*)pools[p] + pages[i] * bytes;
            const auto factor = [&](int64_t w) { return (2 * uint64_t(before + w) + 1) * 0x9E3779B97F4A7C15u; };
            for (int64_t w = 0; w < bytes / 8; w++) {
                uint64_t word;
                std::memcpy(&word, page + w * 8, 8);
                sum += word * factor(w);
            }
            uint64_t rest = 0;
            std::memcpy(&rest, page + bytes / 8 * 8, bytes % 8);
            if (bytes % 8) sum += rest * factor(words - 1);
            before += words;
        }
        sums[i] = sum;
    }
}

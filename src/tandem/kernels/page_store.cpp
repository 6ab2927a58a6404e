// Rotary embedding and the page write for one layer (page_store.h). Contract in page_pool.py.
#include "page_store.h"

using namespace tandem;

namespace {

constexpr int64_t ALONE = 32;  // rows that one thread has written before another has woken

template <typename E, typename S = E>
void rotate_store(const StoreArgs& a) {
    with_team([&](const Team& team) { rotate_store_share<E, S>(a, team); }, a.rows < ALONE ? 1 : 0);
}

}  // namespace

extern "C" {
void rotate_store_bf16(const StoreArgs* a) { rotate_store<bf16>(*a); }
void rotate_store_fp32(const StoreArgs* a) { rotate_store<float>(*a); }
void rotate_store_e4m3_bf16(const StoreArgs* a) { rotate_store<bf16, e4m3>(*a); }
void rotate_store_e4m3_fp32(const StoreArgs* a) { rotate_store<float, e4m3>(*a); }
void rotate_store_int8_bf16(const StoreArgs* a) { rotate_store<bf16, int8_t>(*a); }
void rotate_store_int8_fp32(const StoreArgs* a) { rotate_store<float, int8_t>(*a); }
void rotate_store_int4_bf16(const StoreArgs* a) { rotate_store<bf16, nibbles>(*a); }
void rotate_store_int4_fp32(const StoreArgs* a) { rotate_store<float, nibbles>(*a); }
}

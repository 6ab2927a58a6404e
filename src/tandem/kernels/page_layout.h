// Where the elements of a packed page lie, so that attention's products read pages as they are. Contract in page_pool.py.
//
// Keys [pages][K][D / PAIR][page_tokens][PAIR]: positions are columns. Values [pages][K][page_tokens / PAIR][D][PAIR]:
// positions are depth. PAIR is that of the compute dtype (tile.h), whatever the pool stores. Scales of codes in int8
// [pages][keys, values][K][page_tokens].
#pragma once
#include "tile.h"

namespace tandem {

struct PageLayout {
    int64_t page_tokens, kv_heads, head_size;
    // First element of a page's keys, and of its values, of one head.
    int64_t start(int64_t page, int64_t kv_head) const { return (page * kv_heads + kv_head) * page_tokens * head_size; }
    // From there: where the key of position `offset` begins, and how far its next pair of elements lies.
    template <typename E> static constexpr int64_t key(int64_t offset) { return offset * pair_of<E>(); }
    template <typename E> int64_t key_step() const { return page_tokens * pair_of<E>(); }
    // From there: where the value of position `offset` begins; its next element lies PAIR further.
    template <typename E> int64_t value(int64_t offset) const {
        return offset / pair_of<E>() * head_size * pair_of<E>() + offset % pair_of<E>();
    }
    template <typename E> int64_t value_step() const { return head_size * pair_of<E>(); }
    // The scales of a page's keys (0) or values (1) of one head.
    int64_t scales(int64_t page, int which, int64_t kv_head) const { return ((page * 2 + which) * kv_heads + kv_head) * page_tokens; }
};

}  // namespace tandem

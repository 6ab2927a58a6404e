// Where the elements of a packed page lie, so that attention's products read pages as they are. Contract in page_pool.py.
//
// Keys [pages][K][D / GROUP][page_tokens][GROUP]: positions are columns. Values [pages][K][page_tokens / GROUP][D][GROUP]:
// positions are depth. GROUP is the pair of the compute dtype (tile.h), and of codes in int8 four, or as many of it as divide. Scales of
// codes in int8 [pages][keys, values][K][page_tokens].
//
// Codes in int4 are vectors of bytes (nibbles.h): keys [pages][K][bytes][page_tokens], values [pages][K][page_tokens][bytes]. Scales
// [pages][keys, values][K][groups][page_tokens].
#pragma once
#include "nibbles.h"
#include <type_traits>

namespace tandem {

struct PageLayout {
    int64_t page_tokens, kv_heads, head_size;  // head_size: elements of a vector, of which int4 has fewer than the head
    int64_t channels;  // of a key that lie side by side
    int positions;     // of values that do: this power of two
    int64_t groups = 1;  // of a vector that have a scale
    // First element of a page's keys, and of its values, of one head.
    int64_t start(int64_t page, int64_t kv_head) const { return (page * kv_heads + kv_head) * page_tokens * head_size; }
    // From there: where the key of position `offset` begins, and how far its next group of elements lies.
    int64_t key(int64_t offset) const { return offset * channels; }
    int64_t key_step() const { return page_tokens * channels; }
    // From there: where the value of position `offset` begins; its next element lies a group further.
    int64_t value(int64_t offset) const { return ((offset >> positions) * head_size << positions) + (offset & ((1 << positions) - 1)); }
    int64_t value_step() const { return head_size << positions; }
    // The scales of a page's keys (0) or values (1) of one head.
    int64_t scales(int64_t page, int which, int64_t kv_head) const { return ((page * 2 + which) * kv_heads + kv_head) * groups * page_tokens; }
};

// Of E computed with and S stored.
template <typename E, typename S>
inline PageLayout page_layout(int64_t page_tokens, int64_t kv_heads, int64_t head_size) {
    if constexpr (std::is_same_v<S, int8_t>) return {page_tokens, kv_heads, head_size, head_size % 4 == 0 ? 4 : head_size % 2 == 0 ? 2 : 1, page_tokens > 2 ? 2 : 1};
    if constexpr (std::is_same_v<S, nibbles>) return {page_tokens, kv_heads, head_size / 2 + nibble_groups(head_size), 1, 0, nibble_groups(head_size)};
    return {page_tokens, kv_heads, head_size, pair_of<E>(), pair_of<E>() - 1};
}

}  // namespace tandem

// Which queries attend to what: the arguments of attention, and a step's work cut into spans. Contract in attention.h.
#pragma once
#include "coded.h"
#include "page_layout.h"
#include "team.h"
#include <memory>
#include <vector>

extern "C" struct AttentionArgs {
    const void* query;         // [T, H, D], a stride between tokens
    const void *key, *value;   // page_tokens 1: slots of [K, D], a stride between them; else pools of packed pages
    int64_t query_stride, key_stride, value_stride;
    void* out;    // [T, H, D]
    float* lse;   // [T, H] or null
    const int32_t *row_start, *first_position, *table;  // [S + 1], [S], [S, table_stride]
    int64_t table_stride, page_tokens, segments, heads, kv_heads, head_size;
    int64_t window, chunk, sinks;  // 0: none; sinks count with a window only
    float scale;
    const float* kv_scales;  // of codes in int8 and int4, as PageLayout has them; or null
    const CodedArgs* coded;  // of full pages; or null
};

namespace tandem __attribute__((visibility("hidden"))) {

constexpr int BLOCK = 64;        // keys reduced at a time; equals PANEL
constexpr int64_t SPLIT = 512;   // positions of one online softmax
constexpr int RUN = 16;          // positions of one register of scores; a page holds whole runs or a power of two below
constexpr int QUERY_CHUNK = 32;  // query tokens of one forward task
static_assert(BLOCK == PANEL, "scores of a block fill one panel");
static_assert(SPLIT % BLOCK == 0, "a block lies in one split");

struct Span {  // queries of one segment that share a key head; tokens counted within the segment
    int32_t segment, kv_head, first_token, tokens;
    int32_t split = -1;  // the one split of its positions that it reduces, for `join`; -1: all of them
    int32_t join = -1;
};

// What a query has seen so far of its keys.
struct Softmax {
    float top, total;  // largest score; sum of exponentials relative to it
};

struct Join {  // of the splits [first, first + splits) of one span
    int32_t first, splits;
    int64_t at;  // of its parts in Spans
};

// What a step's attention is cut into, the same for all layers of one reach.
struct Spans {
    std::vector<Span> spans;
    std::vector<Join> joins;
    std::unique_ptr<std::atomic<int32_t>[]> left;  // parts to come, of each join
    std::vector<Softmax> states;                   // of each part's queries
    std::vector<float> outs;                       // [.., columns], times `total`
};

// First position that a query at `position` sees, sinks aside. Never decreases with `position`.
inline int64_t first_seen(const AttentionArgs& a, int64_t position) {
    if (a.window > 0) return std::max<int64_t>(0, position - a.window + 1);
    return a.chunk > 0 ? position / a.chunk * a.chunk : 0;
}

// Keys of a block that a query at `position` sees: [low, high) within the block.
inline void visible(int64_t position, int64_t seen_from, int64_t block_first, int& low, int& high) {
    high = int(std::max<int64_t>(0, std::min<int64_t>(BLOCK, position + 1 - block_first)));
    low = int(std::max<int64_t>(0, std::min<int64_t>(high, seen_from - block_first)));
}

// Keys of a block that a query sees as sinks: [0, lead). Where they reach its window, one run from 0 is left.
inline int sinks_seen(int64_t block_first, int64_t sinks, int& low, int high) {
    const int lead = int(std::max<int64_t>(0, std::min<int64_t>(high, sinks - block_first)));
    if (lead >= low) low = 0;
    return low == 0 ? 0 : lead;
}

// What R rows see of a block: each [low, high) and, as sinks, [0, lead); together [first, last) and [0, most).
template <int R>
struct RowsSeen {
    int low[R], high[R], lead[R] = {}, first = BLOCK, last = 0, most = 0;
};

template <int R, bool SINKS, typename Row>
inline RowsSeen<R> rows_seen(const AttentionArgs& a, const Row* rows, int64_t block_first) {
    RowsSeen<R> s;
    for (int r = 0; r < R; r++) {
        visible(rows[r].position, rows[r].seen_from, block_first, s.low[r], s.high[r]);
        if constexpr (SINKS) s.lead[r] = sinks_seen(block_first, a.sinks, s.low[r], s.high[r]), s.most = std::max(s.most, s.lead[r]);
        if (s.low[r] < s.high[r]) s.first = std::min(s.first, s.low[r]), s.last = std::max(s.last, s.high[r]);
    }
    if (SINKS && s.first >= s.last) s.first = 0, s.last = s.most, s.most = 0;
    if (SINKS && s.most >= s.first) s.first = 0, s.most = 0;
    return s;
}

// Which positions of a segment's span are seen by any of it.
struct Extent {
    int64_t begin, end;
    Extent(const AttentionArgs& a, const Span& span) {
        const int64_t position = a.first_position[span.segment] + span.first_token;
        begin = first_seen(a, position), end = position + span.tokens;
        if (span.split >= 0) begin = std::max(begin, span.split * SPLIT), end = std::min(end, (span.split + 1) * SPLIT);
    }
    int32_t first_split() const { return int32_t(begin / SPLIT); }
    int32_t last_split() const { return int32_t((end - 1) / SPLIT); }
};

// Columns of sums as the value tiles write them.
inline int64_t sum_columns(const AttentionArgs& a) { return (a.head_size + RUN - 1) / RUN * RUN; }

// Puts a span for each split in the place of every span that has several.
inline void cut(const AttentionArgs& a, Spans& all) {
    std::vector<Span> parts;
    int64_t queries = 0;
    for (const Span& span : all.spans) {
        const Extent seen(a, span);
        const int32_t first = seen.first_split(), splits = seen.last_split() + 1 - first;
        if (splits == 1) {
            parts.push_back(span);
            continue;
        }
        for (int32_t i = 0; i < splits; i++) {
            parts.push_back(span);
            parts.back().split = first + i, parts.back().join = int32_t(all.joins.size());
        }
        all.joins.push_back({first, splits, queries});
        queries += span.tokens * (a.heads / a.kv_heads) * splits;
    }
    all.spans = std::move(parts);
    all.left = std::make_unique<std::atomic<int32_t>[]>(all.joins.size());
    for (size_t i = 0; i < all.joins.size(); i++) all.left[i] = all.joins[i].splits;
    all.states.resize(queries), all.outs.resize(queries * sum_columns(a));
}

// Segments that begin with the same page follow each other head by head, so that one thread finds what they share in its
// cache. Fewer spans than keep all threads busy are cut into their splits.
inline Spans make_spans(const AttentionArgs& a, int64_t threads) {
    std::vector<int32_t> order(a.segments);
    std::vector<int64_t> begins(a.segments);
    for (int32_t s = 0; s < a.segments; s++) {
        order[s] = s;
        begins[s] = a.table[s * a.table_stride + first_seen(a, a.first_position[s]) / a.page_tokens];
    }
    std::stable_sort(order.begin(), order.end(), [&](int32_t s, int32_t t) { return begins[s] < begins[t]; });
    Spans all;
    all.spans.reserve(a.segments * a.kv_heads);
    for (size_t i = 0, j = 0; i < order.size(); i = j) {
        while (j < order.size() && begins[order[j]] == begins[order[i]]) j++;
        for (int32_t k = 0; k < a.kv_heads; k++)
            for (size_t m = i; m < j; m++) {
                const int32_t s = order[m], tokens = a.row_start[s + 1] - a.row_start[s];
                for (int32_t first = 0; first < tokens; first += QUERY_CHUNK)
                    all.spans.push_back({s, k, first, std::min(QUERY_CHUNK, tokens - first)});
            }
    }
    const bool sinks = a.window > 0 && a.sinks > 0;  // few splits, and they come before the window's
    if (threads > 1 && int64_t(all.spans.size()) < 4 * threads && !sinks) cut(a, all);
    return all;
}

}  // namespace tandem

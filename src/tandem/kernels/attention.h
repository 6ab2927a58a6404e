// Attention of packed queries over a table of key and value slots, forward. Contract in attention.py.
//
// Keys are reduced in blocks of 64 absolute positions with an online softmax, begun anew at every 512th position and then
// folded in order, whatever the number of queries that ride along, the chunk they came in, the page size or the threads
// that take the splits of 512: a query's result is a function of its position and its path.
//
// A value enters a product only from the first to the last position that a query beside it sees: what a page holds beyond
// (nothing yet, or what another sequence left, NaN included) and pages that nobody sees are never read into a sum. A
// position that one query sees and another does not meets a probability of 0 there: the sum stays as it is but for the
// sign of a zero, and the result's zeros are positive.
//
// E is the compute dtype, S what keys and values are stored in: E itself; e4m3, int4 (nibbles.h) or codes of full pages (coded.h), widened to E as a block is gathered; or int8 with a scale a
// position and head, which is multiplied as it is (attention_eights.h).
#pragma once
#include "attention_eights.h"
#include "attention_spans.h"
#include "float8.h"
#include <type_traits>

namespace tandem __attribute__((visibility("hidden"))) {

// A block of keys and values as the tiles read them; pointers of runs that nobody sees are not set.
template <typename E>
struct Panels {
    const E *key[BLOCK / RUN], *value[BLOCK / RUN];  // of each run of positions
    int64_t key_step, value_step;                    // elements to the next pair of channels; of positions
    int64_t value_panel;                             // elements to the next 64 channels of the values
    // What this thread reads next, laid out alike: brought into the cache while the tiles compute. Null: nothing.
    const E *next_key[BLOCK / RUN] = {}, *next_value[BLOCK / RUN] = {};
};

#ifdef TANDEM_AVX512
inline __m512 multiply_add(__m512 sum, const bf16* a, __m512i b) {
    int32_t two;
    std::memcpy(&two, a, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(two), (__m512bh)b);
}
inline __m512 multiply_add(__m512 sum, const float* a, __m512i b) { return _mm512_fmadd_ps(_mm512_set1_ps(*a), _mm512_castsi512_ps(b), sum); }

// out[r][16 g ..] = sum over channels of rows[r] * key[g], for G runs of positions. `next`: of four runs.
template <int R, int G, typename E>
inline void score_tile(const E* const* rows, const E* const* key, const E* const* next, int64_t step, int64_t size, float* out) {
    __m512 sum[R][G];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) sum[r][g] = _mm512_setzero_ps();
    const bool ahead = next[0] != nullptr;
    for (int64_t d = 0, at = 0; d < size; d += pair_of<E>(), at += step) {
        __m512i b[G];
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) b[g] = _mm512_loadu_si512(key[g] + at);
        if (ahead)
            for (int g = 0; g < BLOCK / RUN; g++) _mm_prefetch(next[g] + at, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int g = 0; g < G; g++) sum[r][g] = multiply_add(sum[r][g], rows[r] + d, b[g]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) _mm512_storeu_ps(out + r * BLOCK + RUN * g, sum[r][g]);
}

// out[r] = out[r] * factor[r] + sum over positions [low, high) of rows[r] * value, for 16 C channels. An odd `low` is
// rounded down: the two positions of a pair lie in one page. Of a pair that `high` parts, the second counts as 0.
template <int R, int C, typename E>
inline void value_tile(const E* const* rows, const E* const* value, const E* const* next, int64_t step, int low, int high, const float* factor,
                       float* out, int64_t stride) {
    constexpr int pair = pair_of<E>(), words = RUN * pair;
    __m512 sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) sum[r][c] = _mm512_mul_ps(_mm512_loadu_ps(out + r * stride + RUN * c), _mm512_set1_ps(factor[r]));
    constexpr int of_run = RUN / pair;  // pairs
    for (unsigned j = low / pair; j < unsigned(high / pair); j++) {
        const int64_t at = j % of_run * step;
        const E* from = value[j / of_run] + at;
        __m512i b[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) b[c] = _mm512_loadu_si512(from + words * c);
        if (const E* ahead = next[j / of_run])
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) _mm_prefetch(ahead + at + words * c, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) sum[r][c] = multiply_add(sum[r][c], rows[r] + pair * j, b[c]);
    }
    if (high % pair > 0) {
        const int j = high / pair;
        const E* from = value[j / of_run] + j % of_run * step;
        __m512i b[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) b[c] = _mm512_and_si512(_mm512_loadu_si512(from + words * c), _mm512_set1_epi32(0xffff));
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) sum[r][c] = multiply_add(sum[r][c], rows[r] + pair * j, b[c]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) _mm512_storeu_ps(out + r * stride + RUN * c, sum[r][c]);
}
#else
template <int R, int G, typename E>
inline void score_tile(const E* const* rows, const E* const* key, const E* const*, int64_t step, int64_t size, float* out) {
    constexpr int pair = pair_of<E>();
    for (int r = 0; r < R; r++)
        for (int g = 0; g < G; g++) {
            float sum[RUN] = {};
            for (int64_t d = 0; d < size; d++)
                for (int c = 0; c < RUN; c++) sum[c] += to_float(rows[r][d]) * to_float(key[g][d / pair * step + c * pair + d % pair]);
            for (int c = 0; c < RUN; c++) out[r * BLOCK + RUN * g + c] = sum[c];
        }
}

template <int R, int C, typename E>
inline void value_tile(const E* const* rows, const E* const* value, const E* const*, int64_t step, int low, int high, const float* factor,
                       float* out, int64_t stride) {
    constexpr int pair = pair_of<E>();
    for (int r = 0; r < R; r++) {
        float* o = out + r * stride;
        for (int c = 0; c < RUN * C; c++) o[c] *= factor[r];
        for (int j = low; j < high; j++) {
            const E* from = value[j / RUN] + j % RUN / pair * step + j % pair;
            for (int c = 0; c < RUN * C; c++) o[c] += to_float(rows[r][j]) * to_float(from[c * pair]);
        }
    }
}
#endif

template <int R, typename E>
inline void score_runs(int runs, const E* const* rows, const E* const* key, const E* const* next, int64_t step, int64_t size, float* out) {
    switch (runs) {
        case 1: return score_tile<R, 1>(rows, key, next, step, size, out);
        case 2: return score_tile<R, 2>(rows, key, next, step, size, out);
        case 3: return score_tile<R, 3>(rows, key, next, step, size, out);
        default: return score_tile<R, 4>(rows, key, next, step, size, out);
    }
}

template <int R, typename E>
inline void value_columns(const E* const* rows, const Panels<E>& panels, int low, int high, const float* factor, float* out, int64_t stride) {
    const E *value[BLOCK / RUN], *next[BLOCK / RUN];
    for (int64_t c = 0; c < stride; c += PANEL) {
        const int64_t at = c / PANEL * panels.value_panel;
        for (int g = low / RUN; g * RUN < high; g++)
            value[g] = panels.value[g] + at, next[g] = panels.next_value[g] ? panels.next_value[g] + at : nullptr;
        switch (std::min<int64_t>(PANEL, stride - c) / RUN) {
            case 1: value_tile<R, 1>(rows, value, next, panels.value_step, low, high, factor, out + c, stride); break;
            case 2: value_tile<R, 2>(rows, value, next, panels.value_step, low, high, factor, out + c, stride); break;
            case 3: value_tile<R, 3>(rows, value, next, panels.value_step, low, high, factor, out + c, stride); break;
            default: value_tile<R, 4>(rows, value, next, panels.value_step, low, high, factor, out + c, stride);
        }
    }
}

// R rows of 64 scores -> probabilities relative to each row's running maximum, and the factors for what came before. Seen are
// [low, high) and, with SINKS, [0, lead); a row that sees nothing stays as it is.
template <int R, bool SINKS, typename E>
inline void soften(const float* scores, E* probability, const int* lead, const int* low, const int* high, float scale, Softmax* const* state,
                   float* factor) {
    float best[R], behind[LANES] = {};
#ifdef TANDEM_AVX512
    __mmask16 seen[R][BLOCK / RUN];
    const __m512 least = _mm512_set1_ps(-INFINITY), by = _mm512_set1_ps(scale);
    for (int r = 0; r < R; r++) {
        uint64_t bits = high[r] > low[r] ? (~0ull >> (BLOCK - (high[r] - low[r]))) << low[r] : 0;
        if constexpr (SINKS) bits |= lead[r] > 0 ? ~0ull >> (BLOCK - lead[r]) : 0;
        __m512 s[BLOCK / RUN];
        for (int c = 0; c < BLOCK / RUN; c++) {
            seen[r][c] = __mmask16(bits >> (RUN * c));
            s[c] = _mm512_mask_mul_ps(least, seen[r][c], _mm512_loadu_ps(scores + r * BLOCK + RUN * c), by);
        }
        best[r] = std::max(state[r]->top, _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(s[0], s[1]), _mm512_max_ps(s[2], s[3]))));
        behind[r] = best[r] == -INFINITY ? 0.0f : state[r]->top - best[r];
    }
    const Lanes factors = exp(load(behind));
    store(behind, factors);
    for (int r = 0; r < R; r++) {
        __m512 s[BLOCK / RUN];
        for (int c = 0; c < BLOCK / RUN; c++) {
            const __m512 x = _mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(scores + r * BLOCK + RUN * c), by), _mm512_set1_ps(best[r]));
            s[c] = _mm512_maskz_mov_ps(seen[r][c], exp(Lanes{x}).v);
            narrow(probability + r * BLOCK + RUN * c, s[c]);
        }
        const float sum = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
        factor[r] = behind[r];
        *state[r] = {best[r], state[r]->total * factor[r] + sum};
    }
#else
    for (int r = 0; r < R; r++) {
        const auto seen = [&](int c) { return (c >= low[r] && c < high[r]) || (SINKS && c < lead[r]); };
        best[r] = state[r]->top;
        for (int c = 0; c < BLOCK; c++)
            if (seen(c)) best[r] = std::max(best[r], scores[r * BLOCK + c] * scale);
        behind[r] = best[r] == -INFINITY ? 0.0f : state[r]->top - best[r];
        float sum = 0;
        for (int c = 0; c < BLOCK; c++) {
            const float p = seen(c) ? exp_one(scores[r * BLOCK + c] * scale - best[r]) : 0.0f;
            sum += p, probability[r * BLOCK + c] = from_float<E>(p);
        }
        factor[r] = exp_one(behind[r]);
        *state[r] = {best[r], state[r]->total * factor[r] + sum};
    }
#endif
}

// What a thread keeps from span to span; grows and never shrinks.
template <typename E>
struct AttentionScratch {
    struct Row {  // a query: its token and head
        const E* query;
        E* out;
        float* lse;
        int64_t position, seen_from;
        Softmax state, sum;  // of one split; of those before it
        EightQuery eight;    // where keys and values are in int8
    };
    std::vector<E> keys, values;  // a block, where pages can't be read as they are
    std::vector<int8_t> codes, gathered;  // of queries; of a block in int8
    std::vector<float> gathered_scales;
    EightScratch eight;
    std::vector<Row> rows;
    std::vector<float> out, sums;  // [rows, columns], times `total`, of one split; of those before it
    alignas(64) float scores[LANE_ROWS * BLOCK];
    alignas(64) E probability[LANE_ROWS * BLOCK];
    template <typename T> static T* room(std::vector<T>& v, int64_t count) {
        if (int64_t(v.size()) < count) v.resize(count);
        return v.data();
    }
};

// Panels of the positions [0, lead) and [low, high) of the block from `first`, for one span.
template <typename E, typename S>
struct BlockReader {
    using Panels = tandem::Panels<E>;
    const AttentionArgs& a;
    const Span& span;
    AttentionScratch<E>& scratch;
    const int32_t* table = a.table + span.segment * a.table_stride;
    const PageLayout layout = page_layout<E, S>(a.page_tokens, a.kv_heads, a.head_size);
    const int shift = __builtin_ctzll(a.page_tokens);
    const bool as_they_are = std::is_same_v<E, S> && a.page_tokens >= RUN && a.head_size % RUN == 0;

    void read(int64_t first, int lead, int low, int high, Panels& p) const {
        if (a.page_tokens == 1) return pack(first, lead, low, high, p);
        if constexpr (std::is_same_v<E, S>)
            if (as_they_are) return point(first, lead, low, high, p);
        gather(first, lead, low, high, p);
    }
    int64_t start(int64_t position) const { return layout.start(table[position >> shift], span.kv_head); }
    int64_t offset(int64_t position) const { return position & (a.page_tokens - 1); }

    void point(int64_t first, int lead, int low, int high, Panels& p) const {
        for (int g = lead > 0 ? 0 : low / RUN; g * RUN < high; g++) {
            if (g * RUN >= lead && g * RUN + RUN <= low) {  // between sinks and window: scores that nobody looks at
                p.key[g] = p.key[0];
                continue;
            }
            const int64_t at = start(first + g * RUN), in_page = offset(first + g * RUN);
            p.key[g] = (const E*)a.key + at + layout.key(in_page);
            p.value[g] = (const E*)a.value + at + layout.value(in_page);
        }
        p.key_step = layout.key_step(), p.value_step = layout.value_step();
        p.value_panel = PANEL * pair_of<E>();
    }

    // Has the block from `first` brought into the cache as the tiles of `p` pass; what [low, high) of it leaves out, at once.
    void look_ahead(int64_t first, const Extent& seen, int low, int high, Panels& p) const {
        if (!as_they_are) return;
        for (int g = 0; g < BLOCK / RUN; g++) {
            const int64_t position = std::max(seen.begin / RUN * RUN, std::min(first + g * RUN, (seen.end - 1) / RUN * RUN));
            const int64_t at = start(position), in_page = offset(position);
            p.next_key[g] = (const E*)a.key + at + layout.key(in_page);
            p.next_value[g] = (const E*)a.value + at + layout.value(in_page);
            if (position == first + g * RUN && (g < low / RUN || g * RUN >= high))
                for (int64_t i = 0; i < RUN * a.head_size; i += 64 / int64_t(sizeof(E))) __builtin_prefetch(p.next_value[g] + i);
        }
    }

    // Pages smaller than a run, or of another dtype: into scratch of one page of 64 positions.
    void gather(int64_t first, int lead, int low, int high, Panels& p) const {
        constexpr int pair = pair_of<E>();
        const PageLayout whole = page_layout<E, E>(BLOCK, 1, a.head_size);
        E* keys = scratch.room(scratch.keys, (a.head_size + pair) * BLOCK);
        E* values = scratch.room(scratch.values, a.head_size * BLOCK + PANEL * pair);  // a tile reads whole registers
        const int run = int(std::min<int64_t>(RUN, a.page_tokens));
        for (int j = lead > 0 ? 0 : low / run * run; j < high; j += run) {
            if (j >= lead && j + run <= low) continue;
            E *key_to = keys + whole.key(j), *value_to = values + whole.value(j);
            if constexpr (std::is_same_v<S, coded>) {
                read_run(first + j, run, whole, key_to, value_to);
                continue;
            }
            const int64_t at = start(first + j), in_page = offset(first + j);
            const S *key = (const S*)a.key + at + layout.key(in_page), *value = (const S*)a.value + at + layout.value(in_page);
            if constexpr (std::is_same_v<S, nibbles>) {
                widen_run(table[(first + j) >> shift], in_page, run, key, value, key_to, value_to);
                continue;
            }
            for (int64_t d = 0; d < a.head_size; d += pair, key += layout.key_step(), key_to += whole.key_step()) widen(key, run * pair, key_to);
            widen(value, run * a.head_size, value_to);
        }
        for (int g = 0; g < BLOCK / RUN; g++) p.key[g] = keys + whole.key(g * RUN), p.value[g] = values + whole.value(g * RUN);
        p.key_step = whole.key_step(), p.value_step = whole.value_step(), p.value_panel = PANEL * pair;
    }
    static void widen(const S* source, int64_t count, E* target) {
        if constexpr (std::is_same_v<E, S>) std::memcpy((void*)target, source, count * sizeof(E));
        else if constexpr (!std::is_same_v<S, nibbles> && !std::is_same_v<S, coded>) widen_codes(source, count, target);
    }

    // `run` positions of a page of codes, or of one behind those as it was made.
    void read_run(int64_t position, int run, const PageLayout& whole, E* key_to, E* value_to) const {
        constexpr int pair = pair_of<E>();
        const int64_t page = table[position >> shift], in_page = offset(position), size = a.head_size;
        if (page < a.coded->pages) {
            const CodedPage<E> codes{*a.coded, a.page_tokens, size, page * a.kv_heads + span.kv_head};
            codes.keys(in_page, run, key_to, BLOCK), codes.values(in_page, run, value_to);
            return;
        }
        const int64_t at = layout.start(page - a.coded->pages, span.kv_head);
        const E *key = (const E*)a.key + at + layout.key(in_page), *value = (const E*)a.value + at + layout.value(in_page);
        for (int64_t d = 0; d < size; d += pair, key += layout.key_step(), key_to += whole.key_step()) std::memcpy((void*)key_to, key, run * pair * sizeof(E));
        std::memcpy((void*)value_to, value, run * size * sizeof(E));
    }

    // `run` positions of a page in int4.
    void widen_run(int64_t page, int64_t in_page, int run, const nibbles* key, const nibbles* value, E* key_to, E* value_to) const {
        constexpr int pair = pair_of<E>();
        const int64_t half = a.head_size / 2, step = a.page_tokens;
        const float* key_scales = a.kv_scales + layout.scales(page, 0, span.kv_head) + in_page;
        for (int64_t c = 0; c < half; c++) {
            const int64_t g = 2 * c / NIBBLE_GROUP;
            widen_keys(key + c * step, key + (half + g) * step, key_scales + g * step, run, key_to + 2 * c * BLOCK, BLOCK);
        }
        const float* value_scales = a.kv_scales + layout.scales(page, 1, span.kv_head) + in_page;
        for (int t = 0; t < run; t += pair)
            widen_values(value + t * layout.head_size, layout.head_size, value_scales + t, step, a.head_size, value_to + t * a.head_size);
    }

    // Slots of one token: the rows of the learner's pack.
    void pack(int64_t first, int lead, int low, int high, Panels& p) const {
        if constexpr (std::is_same_v<E, S>) {
            const int64_t size = a.head_size, depth = padded_depth<E>(size), panels = (size + PANEL - 1) / PANEL;
            E* keys = scratch.room(scratch.keys, depth * PANEL);
            E* values = scratch.room(scratch.values, panels * PANEL * BLOCK);
            low = lead > 0 ? 0 : low / RUN * RUN;
            const E *key[BLOCK], *value[BLOCK], *part[BLOCK];
            for (int j = low; j < high; j++) {
                const int64_t slot = table[first + j];
                key[j] = (const E*)a.key + slot * a.key_stride + span.kv_head * size;
                value[j] = (const E*)a.value + slot * a.value_stride + span.kv_head * size;
            }
            pack_columns<E>(key + low, high - low, size, keys);
            for (int64_t c = 0; c < panels; c++) {
                for (int j = low; j < high; j++) part[j] = value[j] + c * PANEL;
                pack_depth<E>(part + low, high - low, std::min<int64_t>(PANEL, size - c * PANEL), values + c * BLOCK * PANEL);
            }
            for (int g = low / RUN; g < BLOCK / RUN; g++)
                p.key[g] = keys + (g * RUN - low) * pair_of<E>(), p.value[g] = values + (g * RUN - low) * PANEL;
            p.key_step = p.value_step = PANEL * pair_of<E>(), p.value_panel = BLOCK * PANEL;
        }
    }
};

// R rows against one block.
template <int R, bool SINKS, typename E>
inline void attend_rows(const AttentionArgs& a, typename AttentionScratch<E>::Row* rows, int64_t block_first, const Panels<E>& panels,
                        AttentionScratch<E>& scratch, float* out, int64_t wide) {
    const RowsSeen<R> seen = rows_seen<R, SINKS>(a, rows, block_first);
    const int first = seen.first, last = seen.last, most = seen.most;
    if (first >= last) return;
    const E *query[R], *probability[R];
    Softmax* state[R];
    for (int r = 0; r < R; r++) query[r] = rows[r].query, probability[r] = scratch.probability + r * BLOCK, state[r] = &rows[r].state;
    const int from = (most > 0 ? 0 : first) / RUN;
    score_runs<R>((last + RUN - 1) / RUN - from, query, panels.key + from, panels.next_key, panels.key_step, a.head_size, scratch.scores + from * RUN);
    float factor[R];
    soften<R, SINKS>(scratch.scores, scratch.probability, seen.lead, seen.low, seen.high, a.scale, state, factor);
    if (most > 0) {
        value_columns<R>(probability, panels, 0, most, factor, out, wide);
        for (int r = 0; r < R; r++) factor[r] = 1.0f;
    }
    value_columns<R>(probability, panels, first, last, factor, out, wide);
}

// Adds what a query saw in a later split, which may be nothing, to what it saw before.
inline void fold(Softmax& sum, float* sums, const Softmax& part, const float* parts, int64_t columns) {
    if (part.total == 0.0f) return;
    if (sum.total == 0.0f) {
        sum = part;
        std::memcpy(sums, parts, columns * sizeof(float));
        return;
    }
    const float best = std::max(sum.top, part.top), before = exp_one(sum.top - best), now = exp_one(part.top - best);
    sum = {best, sum.total * before + part.total * now};
    for (int64_t c = 0; c < columns; c++) sums[c] = sums[c] * before + parts[c] * now;
}

// Whether this part of a span is the last to come; then `rows` and `sums` hold all of them, folded in order.
template <typename Row>
inline bool joined(Spans& all, const Span& span, Row* rows, int64_t n, const float* out, float* sums, int64_t columns) {
    const Join& join = all.joins[span.join];
    const int64_t own = join.at + (span.split - join.first) * n;
    for (int64_t i = 0; i < n; i++) all.states[own + i] = rows[i].state;
    std::memcpy(all.outs.data() + own * columns, out, n * columns * sizeof(float));
    if (all.left[span.join].fetch_sub(1, std::memory_order_acq_rel) > 1) return false;
    all.left[span.join].store(join.splits, std::memory_order_relaxed);  // for the next layer, behind a barrier
    for (int64_t part = 0; part < join.splits; part++)
        for (int64_t i = 0; i < n; i++) {
            const int64_t at = join.at + part * n + i;
            fold(rows[i].sum, sums + i * columns, all.states[at], all.outs.data() + at * columns, columns);
        }
    return true;
}

template <typename E, typename S, bool SINKS>
void attend_span(const AttentionArgs& a, Spans& all, const Span& span, const Span* following) {
    using Row = typename AttentionScratch<E>::Row;
    thread_local AttentionScratch<E> scratch;
    const int64_t group = a.heads / a.kv_heads, n = span.tokens * group, size = a.head_size, wide = sum_columns(a);
    constexpr Softmax nothing{-INFINITY, 0.0f};
    Row* rows = scratch.room(scratch.rows, n);
    float *out = scratch.room(scratch.out, n * wide), *sums = scratch.room(scratch.sums, n * wide);
    std::memset(out, 0, n * wide * sizeof(float));
    for (int64_t t = 0, i = 0; t < span.tokens; t++) {
        const int64_t row = a.row_start[span.segment] + span.first_token + t, position = a.first_position[span.segment] + span.first_token + t;
        const int64_t seen_from = first_seen(a, position);
        for (int64_t h = span.kv_head * group; h < (span.kv_head + 1) * group; h++, i++)
            rows[i] = {(const E*)a.query + row * a.query_stride + h * size, (E*)a.out + (row * a.heads + h) * size,
                       a.lse ? a.lse + row * a.heads + h : nullptr, position, seen_from, nothing, nothing, {}};
    }
    const auto reader_of = [&](const Span& read) {
        if constexpr (std::is_same_v<S, int8_t>) return EightReader{a, read, scratch.gathered, scratch.gathered_scales};
        else return BlockReader<E, S>{a, read, scratch};
    };
    if constexpr (std::is_same_v<S, int8_t>) {
        const int64_t room = 2 * ((size + QUAD - 1) / QUAD * QUAD);
        int8_t* codes = scratch.room(scratch.codes, n * room);
        for (int64_t i = 0; i < n; i++) rows[i].eight = eight_query(rows[i].query, size, a.scale, codes + i * room);
    }
    const auto reader = reader_of(span);
    const Extent seen(a, span);
    const int64_t begin = seen.begin, end = seen.end;
    const int64_t sink_blocks = SINKS ? std::min(begin / BLOCK, (a.sinks + BLOCK - 1) / BLOCK) : 0;
    const int64_t last_split = seen.last_split();
    int64_t split = sink_blocks > 0 ? 0 : seen.first_split();
    const bool several = split < last_split;
    for (int64_t turn = -sink_blocks; turn <= (end - 1) / BLOCK - begin / BLOCK; turn++) {
        const int64_t first = (turn < 0 ? turn + sink_blocks : turn + begin / BLOCK) * BLOCK;
        if (first / SPLIT > split) {
            for (int64_t i = 0; i < n; i++) fold(rows[i].sum, sums + i * wide, rows[i].state, out + i * wide, wide), rows[i].state = nothing;
            std::memset(out, 0, n * wide * sizeof(float));
            split = first / SPLIT;
        }
        const int lead = SINKS ? int(std::max<int64_t>(0, std::min<int64_t>(BLOCK, a.sinks - first))) : 0;
        const int low = int(std::max<int64_t>(0, begin - first)), high = turn < 0 ? lead : int(std::min<int64_t>(BLOCK, end - first));
        typename decltype(reader_of(span))::Panels panels;
        reader.read(first, lead, low, high, panels);
        if (n <= LANE_ROWS) {  // what follows a decode is read once; behind more rows it comes in time
            if (first + BLOCK < end) reader.look_ahead(first + BLOCK, seen, low, high, panels);
            else if (following) {
                const Extent next(a, *following);
                reader_of(*following).look_ahead(next.begin / BLOCK * BLOCK, next, low, high, panels);
            }
        }
        auto& room = [&]() -> auto& {
            if constexpr (std::is_same_v<S, int8_t>) return scratch.eight;
            else return scratch;
        }();
        for (int64_t i = 0; i < n; i += LANE_ROWS) switch (n - i) {
            case 1: attend_rows<1, SINKS>(a, rows + i, first, panels, room, out + i * wide, wide); break;
            case 2: attend_rows<2, SINKS>(a, rows + i, first, panels, room, out + i * wide, wide); break;
            case 3: attend_rows<3, SINKS>(a, rows + i, first, panels, room, out + i * wide, wide); break;
            case 4: attend_rows<4, SINKS>(a, rows + i, first, panels, room, out + i * wide, wide); break;
            case 5: attend_rows<5, SINKS>(a, rows + i, first, panels, room, out + i * wide, wide); break;
            default: attend_rows<6, SINKS>(a, rows + i, first, panels, room, out + i * wide, wide);
        }
    }
    if (span.join >= 0) {
        if (!joined(all, span, rows, n, out, sums, wide)) return;
    } else if (several) {
        for (int64_t i = 0; i < n; i++) fold(rows[i].sum, sums + i * wide, rows[i].state, out + i * wide, wide);
    } else {
        for (int64_t i = 0; i < n; i++) rows[i].sum = rows[i].state;
        sums = out;
    }
    for (int64_t i = 0; i < n; i++) {
        float* o = sums + i * wide;
        const float inverse = 1.0f / rows[i].sum.total;
        for (int64_t c = 0; c < wide; c++) o[c] = o[c] * inverse + 0.0f;  // -0 becomes 0
        int64_t c = 0;
        for (; c + PANEL <= size; c += PANEL) narrow_panel<E>(o + c, rows[i].out + c);
        for (; c < size; c++) rows[i].out[c] = from_float<E>(o[c]);
        if (rows[i].lse) *rows[i].lse = rows[i].sum.top + std::log(rows[i].sum.total);
    }
}

// One thread's part of the spans: it takes runs of them until none is left, long ones first.
template <typename E, typename S = E>
void run_spans(const AttentionArgs& a, Spans& all, std::atomic<int64_t>& next, int64_t threads) {
    const std::vector<Span>& spans = all.spans;
    const int64_t total = int64_t(spans.size());
    for (;;) {
        int64_t first = next.load(std::memory_order_relaxed), last;
        do {
            if (first >= total) return;
            last = first + std::max<int64_t>(1, (total - first) / (2 * threads));
        } while (!next.compare_exchange_weak(first, last, std::memory_order_relaxed));
        for (int64_t i = first; i < last; i++)
            if (a.window > 0 && a.sinks > 0) attend_span<E, S, true>(a, all, spans[i], i + 1 < last ? &spans[i + 1] : nullptr);
            else attend_span<E, S, false>(a, all, spans[i], i + 1 < last ? &spans[i + 1] : nullptr);
    }
}

// All of one layer's.
constexpr int64_t ALONE_BLOCKS = 48;  // queries times blocks of keys below which one thread is done before another has woken

template <typename E, typename S = E>
void attend(const AttentionArgs& a) {
    Spans all = make_spans(a, omp_get_max_threads());
    int64_t blocks = 0;
    for (const Span& span : all.spans) blocks += span.tokens * ((Extent(a, span).end - 1) / BLOCK - Extent(a, span).begin / BLOCK + 1);
    std::atomic<int64_t> next{0};
    with_team([&](const Team& team) { run_spans<E, S>(a, all, next, team.threads); }, blocks < ALONE_BLOCKS ? 1 : 0);
}

}  // namespace tandem

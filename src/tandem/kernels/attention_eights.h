// Attention to keys and values in int8, multiplied as integers: rows of queries against a block of 64 positions. Contract in attention.py,
// int8_attention_reference.
//
// A query is rounded to 15 bits, code = 128 high + low. What it gives the values of a block, probability x scale of the value, is rounded to
// 8 bits of the largest of them. Sums of products of codes are exact, and what is fp32 is written in lanes of vector.h: a query's bits hang
// neither on the instruction set nor on the rows that ride along. Codes of positions that it does not see meet a 0, or a score that is
// masked, so that it does not matter what they are.
#pragma once
#include "attention_spans.h"
#include "eights.h"

namespace tandem __attribute__((visibility("hidden"))) {

constexpr float QUERY_LARGEST = 16319.0f;   // 127 * 128 + 63
constexpr float WEIGHT_LARGEST = 255.0f;
constexpr float NOTHING = 0x1p-100f;        // what is no larger is taken for 0
constexpr int RUNS = BLOCK / RUN;

// A query as codes, to whole quads of channels.
struct EightQuery {
    const int8_t *high, *low;
    float scale;   // of a unit of its products, softmax's included
    int32_t over;  // what the 128 that is added to codes of keys adds to a product
};

template <typename E>
inline EightQuery eight_query(const E* query, int64_t size, float scale, int8_t* codes) {
    const int64_t depth = (size + QUAD - 1) / QUAD * QUAD;
    int8_t *high = codes, *low = codes + depth;
    std::memset(codes, 0, 2 * depth);
    const float amax = largest_size(query, size);
    if (!(amax < INF)) return {high, low, std::numeric_limits<float>::quiet_NaN(), 0};
    const float by = amax > NOTHING ? QUERY_LARGEST / amax : 0.0f;
    int32_t sum = 0;
    for (int64_t d = 0; d < size; d++) {
        const int32_t code = int32_t(std::nearbyint(to_float(query[d]) * by)), upper = (code + 64) >> 7;
        high[d] = int8_t(upper), low[d] = int8_t(code - 128 * upper), sum += code;
    }
    return {high, low, amax / QUERY_LARGEST * scale, 128 * sum};
}

// A block as the tiles read it; pointers of runs that nobody sees are not set.
struct EightPanels {
    const int8_t *key[RUNS], *value[RUNS];  // of each run of positions
    const float *key_scales[RUNS], *value_scales[RUNS];
    int64_t key_step, value_step;  // to the next four channels; to the next four positions
    const int8_t *next_key[RUNS] = {}, *next_value[RUNS] = {};  // what this thread reads next, laid out alike; or null
};

struct EightScratch {
    alignas(64) int32_t sums[LANE_ROWS * BLOCK];
    alignas(64) uint8_t codes[LANE_ROWS * BLOCK];
};

// Positions of a block, by four, that values are read of.
struct Quads {
    int count = 0, at[BLOCK / QUAD];
    void add(int first, int last) {
        for (int j = first; j < last; j++) at[count++] = j;
    }
};

// out[r][16 g ..] = products of rows' codes with those of G runs of positions.
#ifdef TANDEM_VNNI
template <int R, int G>
__attribute__((noipa)) void eight_scores(const EightQuery* const* rows, const int8_t* const* key, const int8_t* const* next, int64_t step, int64_t quads, int32_t* out) {
    __m512i sum[R][G];
    const __m512i half = _mm512_set1_epi8(-128);
    TANDEM_UNROLL
    for (int r = 0; r < R; r++)
        TANDEM_UNROLL
        for (int g = 0; g < G; g++) sum[r][g] = no_sum();
    for (int part = 0; part < 2; part++) {  // of the query: sums of both would not fit into the registers
        const int8_t* codes[R];
        for (int r = 0; r < R; r++) codes[r] = part == 0 ? rows[r]->high : rows[r]->low;
        const int8_t* ahead[RUNS / 2];  // dealt out over both; what is there already costs nothing
        for (int g = 0; g < RUNS / 2; g++) ahead[g] = next[0] ? next[RUNS / 2 * part + g] : key[0];
        for (int64_t d = 0, at = 0; d < quads; d++, at += step) {
            TANDEM_UNROLL
            for (int g = 0; g < RUNS / 2; g++) _mm_prefetch(ahead[g] + at, _MM_HINT_T0);
            __m512i b[G];
            TANDEM_UNROLL
            for (int g = 0; g < G; g++) b[g] = _mm512_xor_si512(_mm512_loadu_si512(key[g] + at), half);
            TANDEM_UNROLL
            for (int r = 0; r < R; r++) {
                int32_t four;
                std::memcpy(&four, codes[r] + QUAD * d, 4);
                const __m512i a = _mm512_set1_epi32(four);
                TANDEM_UNROLL
                for (int g = 0; g < G; g++) sum[r][g] = _mm512_dpbusd_epi32(sum[r][g], b[g], a);
            }
        }
        if (part > 0) break;
        TANDEM_UNROLL
        for (int r = 0; r < R; r++)
            TANDEM_UNROLL
            for (int g = 0; g < G; g++) sum[r][g] = _mm512_slli_epi32(sum[r][g], 7);
    }
    TANDEM_UNROLL
    for (int r = 0; r < R; r++)
        TANDEM_UNROLL
        for (int g = 0; g < G; g++) _mm512_store_si512(out + r * BLOCK + RUN * g, _mm512_sub_epi32(sum[r][g], _mm512_set1_epi32(rows[r]->over)));
}

// out[r][16 c ..] = sums over positions of codes[r] * value, for 16 C channels from `channel` on.
template <int R, int C>
__attribute__((noipa)) void eight_value_sums(const uint8_t* codes, const EightPanels& p, int64_t channel, const Quads& quads, int32_t* out) {
    __m512i sum[R][C];
    TANDEM_UNROLL
    for (int r = 0; r < R; r++)
        TANDEM_UNROLL
        for (int c = 0; c < C; c++) sum[r][c] = no_sum();
    const int8_t *from[BLOCK / QUAD], *next[BLOCK / QUAD];
    for (int i = 0; i < quads.count; i++) {
        const int64_t j = quads.at[i], at = j % QUAD * p.value_step + QUAD * channel;
        from[i] = p.value[j / QUAD] + at, next[i] = p.next_value[j / QUAD] && j >= QUAD ? p.next_value[j / QUAD] + at : from[i];
    }
    for (int i = 0; i < quads.count; i++) {
        const uint8_t* four = codes + QUAD * quads.at[i];
        TANDEM_UNROLL
        for (int c = 0; c < C; c++) _mm_prefetch(next[i] + 64 * c, _MM_HINT_T0);
        __m512i b[C];
        TANDEM_UNROLL
        for (int c = 0; c < C; c++) b[c] = _mm512_loadu_si512(from[i] + 64 * c);
        TANDEM_UNROLL
        for (int r = 0; r < R; r++) {
            int32_t own;
            std::memcpy(&own, four + r * BLOCK, 4);
            const __m512i a = _mm512_set1_epi32(own);
            TANDEM_UNROLL
            for (int c = 0; c < C; c++) sum[r][c] = _mm512_dpbusd_epi32(sum[r][c], a, b[c]);
        }
    }
    TANDEM_UNROLL
    for (int r = 0; r < R; r++)
        TANDEM_UNROLL
        for (int c = 0; c < C; c++) _mm512_store_si512(out + r * PANEL + RUN * c, sum[r][c]);
}
#else
template <int R, int G>
__attribute__((noipa)) void eight_scores(const EightQuery* const* rows, const int8_t* const* key, const int8_t* const*, int64_t step, int64_t quads, int32_t* out) {
    for (int r = 0; r < R; r++)
        for (int g = 0; g < G; g++) {
            int32_t sum[RUN] = {};
            for (int64_t d = 0; d < QUAD * quads; d++) {
                const int32_t code = 128 * rows[r]->high[d] + rows[r]->low[d];
                for (int c = 0; c < RUN; c++) sum[c] += code * key[g][d / QUAD * step + c * QUAD + d % QUAD];
            }
            std::memcpy(out + r * BLOCK + RUN * g, sum, sizeof sum);
        }
}

template <int R, int C>
__attribute__((noipa)) void eight_value_sums(const uint8_t* codes, const EightPanels& p, int64_t channel, const Quads& quads, int32_t* out) {
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) {
            int32_t sum[RUN] = {};
            for (int q = 0; q < quads.count; q++) {
                const int j = quads.at[q];
                const int8_t* from = p.value[j / QUAD] + j % QUAD * p.value_step + QUAD * (channel + RUN * c);
                for (int i = 0; i < QUAD * RUN; i++) sum[i / QUAD] += int32_t(codes[r * BLOCK + QUAD * j + i % QUAD]) * from[i];
            }
            std::memcpy(out + r * PANEL + RUN * c, sum, sizeof sum);
        }
}
#endif

template <int R>
inline void eight_scores_of_runs(int from, int to, const EightQuery* const* rows, const EightPanels& p, int64_t quads, int32_t* out) {
    const int8_t* const* key = p.key + from;
    switch (out += RUN * from, to - from) {
        case 1: return eight_scores<R, 1>(rows, key, p.next_key, p.key_step, quads, out);
        case 2: return eight_scores<R, 2>(rows, key, p.next_key, p.key_step, quads, out);
        case 3: return eight_scores<R, 3>(rows, key, p.next_key, p.key_step, quads, out);
        default: return eight_scores<R, 4>(rows, key, p.next_key, p.key_step, quads, out);
    }
}

// out[r] = out[r] * factor[r] + scale[r] * sums over positions of codes[r] * value.
template <int R>
inline void eight_values(const uint8_t* codes, const EightPanels& p, const Quads& quads, const float* scale, const float* factor, int32_t* sums, float* out, int64_t wide) {
    for (int64_t c = 0; c < wide; c += PANEL) {
        const int64_t count = std::min<int64_t>(PANEL, wide - c);
        switch (count / RUN) {
            case 1: eight_value_sums<R, 1>(codes, p, c, quads, sums); break;
            case 2: eight_value_sums<R, 2>(codes, p, c, quads, sums); break;
            case 3: eight_value_sums<R, 3>(codes, p, c, quads, sums); break;
            default: eight_value_sums<R, 4>(codes, p, c, quads, sums);
        }
        for (int r = 0; r < R; r++)
            for (int64_t i = 0; i < count; i += LANES) {
                float* o = out + r * wide + c + i;
                const Lanes sum = to_float_signed(bits(load((const float*)sums + r * PANEL + i)));
                store(o, fma(sum, splat(scale[r]), load(o) * splat(factor[r])));
            }
    }
}

inline float top_lane(Lanes a) {
#ifdef TANDEM_LANES_AVX512
    return _mm512_reduce_max_ps(a.v);
#else
    return max_lanes(a);
#endif
}

// 16 numbers of [0, 255] to the nearest even.
inline void store_weights(uint8_t* codes, Lanes weights) {
    const Words words = bits(weights + splat(12582912.0f)) & splat(0xffu);  // 1.5 * 2^23: the sum's low bits are the nearest integer
#ifdef TANDEM_LANES_AVX512
    _mm_storeu_si128((__m128i*)codes, _mm512_cvtepi32_epi8(words.v));
#else
    uint32_t word[LANES];
    store(word, words);
    for (int i = 0; i < LANES; i++) codes[i] = uint8_t(word[i]);
#endif
}

// The lanes of run g that a row does not see.
template <bool SINKS>
inline LaneMask hidden_lanes(int g, int lead, int low, int high) {
    alignas(64) static constexpr float COUNT[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Lanes position = load(COUNT) + splat(float(RUN * g));
    const LaneMask seen = ~(less(position, splat(float(low))) | ~less(position, splat(float(high))));
    return SINKS ? ~(seen | less(position, splat(float(lead)))) : ~seen;
}

// R rows of sums of the runs [from, to) -> weights of values as codes, their scales, and the factors for what came before. WHOLE: every row
// sees all four runs.
template <int R, bool SINKS, bool WHOLE>
__attribute__((noipa)) void eight_soften(const EightQuery* const* rows, const EightPanels& p, int from, int to, const RowsSeen<R>& seen, EightScratch& scratch, Softmax* const* state,
                                            float* weight_scale, float* factor) {
    const auto outside = [&](int g) { return !WHOLE && (g < from || g >= to); };
    const auto hidden = [&](int r, int g) { return hidden_lanes<SINKS>(g, seen.lead[r], seen.low[r], seen.high[r]); };
    float best[R], behind[LANES] = {};
    float* scores = (float*)scratch.sums;  // in their place
    for (int r = 0; r < R; r++) {
        Lanes top = splat(-INF);
        const Lanes own = splat(rows[r]->scale);
        TANDEM_UNROLL
        for (int g = 0; g < RUNS; g++) {
            if (outside(g)) continue;
            float* at = scores + r * BLOCK + RUN * g;
            Lanes s = to_float_signed(bits(load(at))) * (load(p.key_scales[g]) * own);
            if (!WHOLE) s = select(hidden(r, g), splat(-INF), s);
            top = larger(top, s);
            store(at, s);
        }
        best[r] = std::max(state[r]->top, top_lane(top));
        behind[r] = best[r] == -INF ? 0.0f : state[r]->top - best[r];
    }
    store(behind, exp(load(behind)));
    for (int r = 0; r < R; r++) {
        Lanes term[RUNS], weight[RUNS], most = splat(0.0f);
        LaneMask broken = less(most, most);
        TANDEM_UNROLL
        for (int g = 0; g < RUNS; g++) {
            term[g] = weight[g] = splat(0.0f);
            if (outside(g)) continue;
            term[g] = exp(load(scores + r * BLOCK + RUN * g) - splat(best[r])), weight[g] = term[g] * load(p.value_scales[g]);
            if (!WHOLE) term[g] = select(hidden(r, g), splat(0.0f), term[g]), weight[g] = select(hidden(r, g), splat(0.0f), weight[g]);
            broken = broken | is_nan(weight[g]);
            most = larger(most, weight[g]);
        }
        const float largest = top_lane(most);
        const bool some = largest > NOTHING;
        const Lanes by = splat(some ? WEIGHT_LARGEST / largest : 0.0f);
        TANDEM_UNROLL
        for (int g = 0; g < RUNS; g++) store_weights(scratch.codes + r * BLOCK + RUN * g, weight[g] * by);
        weight_scale[r] = lanes_of(broken) ? std::numeric_limits<float>::quiet_NaN() : some ? largest / WEIGHT_LARGEST : 0.0f;
        factor[r] = behind[r];
        *state[r] = {best[r], state[r]->total * factor[r] + sum_lanes((term[0] + term[1]) + (term[2] + term[3]))};
    }
}

// R rows against one block.
template <int R, bool SINKS, typename Row>
inline void attend_rows(const AttentionArgs& a, Row* rows, int64_t block_first, const EightPanels& panels, EightScratch& scratch, float* out, int64_t wide) {
    const RowsSeen<R> seen = rows_seen<R, SINKS>(a, rows, block_first);
    if (seen.first >= seen.last) return;
    const EightQuery* query[R];
    Softmax* state[R];
    bool whole = true;
    for (int r = 0; r < R; r++) {
        query[r] = &rows[r].eight, state[r] = &rows[r].state;
        whole = whole && seen.low[r] == 0 && seen.high[r] == BLOCK;
    }
    const int from = seen.most > 0 ? 0 : seen.first / RUN, to = (seen.last + RUN - 1) / RUN;
    eight_scores_of_runs<R>(from, to, query, panels, (a.head_size + QUAD - 1) / QUAD, scratch.sums);
    if (const int8_t* next = panels.next_value[0])  // the rest comes with the tiles
        for (int64_t i = 0; i < RUN * a.head_size; i += 64) __builtin_prefetch(next + i);
    float scale[R], factor[R];
    if (whole) eight_soften<R, SINKS, true>(query, panels, from, to, seen, scratch, state, scale, factor);
    else eight_soften<R, SINKS, false>(query, panels, from, to, seen, scratch, state, scale, factor);
    const int lead = (seen.most + QUAD - 1) / QUAD;
    Quads quads;
    quads.add(0, lead), quads.add(std::max(lead, seen.first / QUAD), (seen.last + QUAD - 1) / QUAD);
    eight_values<R>(scratch.codes, panels, quads, scale, factor, scratch.sums, out, wide);
}

// Panels of the positions [0, lead) and [low, high) of the block from `first`, for one span.
struct EightReader {
    using Panels = EightPanels;
    const AttentionArgs& a;
    const Span& span;
    std::vector<int8_t>& room;  // for a block, where pages can't be read as they are
    std::vector<float>& scales_room;
    const int32_t* table = a.table + span.segment * a.table_stride;
    const PageLayout layout = page_layout<bf16, int8_t>(a.page_tokens, a.kv_heads, a.head_size);
    const int shift = __builtin_ctzll(a.page_tokens);
    const bool as_they_are = a.page_tokens >= RUN && a.head_size % RUN == 0;

    int64_t start(int64_t position) const { return layout.start(table[position >> shift], span.kv_head); }
    int64_t offset(int64_t position) const { return position & (a.page_tokens - 1); }
    const int8_t* key(int64_t position) const { return (const int8_t*)a.key + start(position) + layout.key(offset(position)); }
    const int8_t* value(int64_t position) const { return (const int8_t*)a.value + start(position) + layout.value(offset(position)); }
    const float* scales(int64_t position, int which) const {
        return a.kv_scales + layout.scales(table[position >> shift], which, span.kv_head) + offset(position);
    }

    void read(int64_t first, int lead, int low, int high, EightPanels& p) const {
        if (!as_they_are) return gather(first, lead, low, high, p);
        for (int g = lead > 0 ? 0 : low / RUN; g * RUN < high; g++) {
            const bool between = g * RUN >= lead && g * RUN + RUN <= low;  // sinks and window: scores that nobody looks at
            const int64_t at = between ? first : first + g * RUN;
            p.key[g] = key(at), p.value[g] = value(at), p.key_scales[g] = scales(at, 0), p.value_scales[g] = scales(at, 1);
        }
        p.key_step = layout.key_step(), p.value_step = layout.value_step();
    }

    // As BlockReader::look_ahead.
    void look_ahead(int64_t first, const Extent& seen, int low, int high, EightPanels& p) const {
        if (!as_they_are) return;
        for (int g = 0; g < RUNS; g++) {
            const int64_t position = std::max(seen.begin / RUN * RUN, std::min(first + g * RUN, (seen.end - 1) / RUN * RUN));
            p.next_key[g] = key(position), p.next_value[g] = value(position);
            __builtin_prefetch(scales(position, 0)), __builtin_prefetch(scales(position, 1));
            if (position == first + g * RUN && (g < low / RUN || g * RUN >= high))
                for (int64_t i = 0; i < RUN * a.head_size; i += 64) __builtin_prefetch(p.next_value[g] + i);
        }
    }

    // Pages smaller than a run, or heads of no whole runs: into scratch of one page of 64 positions.
    void gather(int64_t first, int lead, int low, int high, EightPanels& p) const {
        const int64_t depth = (a.head_size + QUAD - 1) / QUAD * QUAD, wide = sum_columns(a);
        const PageLayout to{BLOCK, 1, wide, QUAD, 2};
        if (int64_t(room.size()) < BLOCK * (depth + wide)) room.resize(BLOCK * (depth + wide));
        if (scales_room.size() < 2 * BLOCK) scales_room.resize(2 * BLOCK);
        int8_t *keys = room.data(), *values = keys + BLOCK * depth;
        const int run = int(std::min<int64_t>(RUN, a.page_tokens));
        for (int j = lead > 0 ? 0 : low / run * run; j < high; j += run) {
            if (j >= lead && j + run <= low) continue;
            for (int which = 0; which < 2; which++) std::memcpy(scales_room.data() + which * BLOCK + j, scales(first + j, which), run * sizeof(float));
            for (int i = 0; i < run; i++) {
                const int8_t *k = key(first + j + i), *v = value(first + j + i);
                int8_t *k_to = keys + to.key(j + i), *v_to = values + to.value(j + i);
                for (int64_t d = 0; d < a.head_size; d++) {
                    k_to[d / QUAD * to.key_step() + d % QUAD] = k[d / layout.channels * layout.key_step() + d % layout.channels];
                    v_to[d * QUAD] = v[d << layout.positions];
                }
            }
        }
        for (int g = 0; g < RUNS; g++) {
            p.key[g] = keys + to.key(g * RUN), p.value[g] = values + to.value(g * RUN);
            p.key_scales[g] = scales_room.data() + g * RUN, p.value_scales[g] = p.key_scales[g] + BLOCK;
        }
        p.key_step = to.key_step(), p.value_step = to.value_step();
    }
};

}  // namespace tandem

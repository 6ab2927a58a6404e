// Attention of packed queries over a table of key and value slots, forward and backward. Contract in attention.py.
//
// Keys are reduced in blocks of 64 absolute positions with an online softmax, whatever the number of queries that ride
// along, the chunk they came in or the page size: a query's result is a function of its position and its path.
//
// E is the compute dtype, S what keys and values are stored in: E itself, or e4m3, widened to E as a block is gathered.
#include "float8.h"
#include "tile.h"
#include <omp.h>
#include <type_traits>
#include <vector>

using namespace tandem;

namespace {

constexpr int BLOCK = 64;        // keys reduced at a time; equals PANEL
constexpr int QUERY_CHUNK = 32;  // query tokens of one forward task
static_assert(BLOCK == PANEL, "scores of a block fill one panel");

}  // namespace

extern "C" struct AttentionArgs {
    const void *query, *key, *value;  // [T, H, D] and slots of [K, D], each with a stride between tokens
    int64_t query_stride, key_stride, value_stride;
    void* out;    // [T, H, D]
    float* lse;   // [T, H] or null
    const int32_t *row_start, *first_position, *table;  // [S + 1], [S], [S, table_stride]
    int64_t table_stride, page_tokens, segments, heads, kv_heads, head_size, window, sinks;
    float scale;
};

extern "C" struct AttentionGrads {
    const void* dout;  // [T, H, D]
    void *dquery, *dkey, *dvalue;
    int64_t dquery_stride, dkey_stride, dvalue_stride;
    float *dkey_sum, *dvalue_sum;  // [T, K, D], zero on entry
    const int32_t* component_start;  // [components + 1] of segments; components share no slot
    int64_t components;
};

namespace {

struct Span {
    int64_t segment, kv_head, first_token, tokens;  // tokens counted within the segment
};

template <typename E, typename S = E>
struct View {  // addresses of one segment's queries, keys and values
    const AttentionArgs& a;
    int64_t s, kv_head;
    int64_t group = a.heads / a.kv_heads;
    int64_t row(int64_t token) const { return a.row_start[s] + token; }
    int64_t position(int64_t token) const { return a.first_position[s] + token; }
    int64_t slot(int64_t position) const { return int64_t(a.table[s * a.table_stride + position / a.page_tokens]) * a.page_tokens + position % a.page_tokens; }
    const E* query(int64_t i, const void* base, int64_t stride) const {  // i counts token-major over (token, head of group)
        return (const E*)base + row(i / group) * stride + (kv_head * group + i % group) * a.head_size;
    }
    // Addresses of the keys and values of `count` positions from `first`; one division a page, not one a position.
    void rows(int64_t first, int64_t count, const S** keys, const S** values) const {
        const int32_t* page = a.table + s * a.table_stride + first / a.page_tokens;
        int64_t offset = first % a.page_tokens;
        for (int64_t j = 0; j < count; page++, offset = 0)
            for (int64_t at = int64_t(*page) * a.page_tokens + offset; offset < a.page_tokens && j < count; at++, offset++, j++) {
                keys[j] = (const S*)a.key + at * a.key_stride + kv_head * a.head_size;
                values[j] = (const S*)a.value + at * a.value_stride + kv_head * a.head_size;
            }
    }
};

// `rows` in the compute dtype: the stored rows themselves, or copies in `key_rows` and `value_rows` [BLOCK, D].
template <typename E, typename S>
inline void gather(const View<E, S>& v, int64_t first, int64_t count, std::vector<E>& key_rows, std::vector<E>& value_rows,
                   const E** keys, const E** values) {
    if constexpr (std::is_same_v<E, S>) v.rows(first, count, keys, values);
    else {
        const int64_t size = v.a.head_size;
        key_rows.resize(BLOCK * size), value_rows.resize(BLOCK * size);
        const S *stored_keys[BLOCK], *stored_values[BLOCK];
        v.rows(first, count, stored_keys, stored_values);
        for (int64_t j = 0; j < count; j++) {
            E *key = key_rows.data() + j * size, *value = value_rows.data() + j * size;
            widen_codes(stored_keys[j], size, key), widen_codes(stored_values[j], size, value);
            keys[j] = key, values[j] = value;
        }
    }
}

// Keys of a block that a query at `position` sees: [low, high) within the block.
inline void visible(int64_t position, int64_t block_first, int64_t window, int& low, int& high) {
    high = int(std::max<int64_t>(0, std::min<int64_t>(BLOCK, position + 1 - block_first)));
    low = window > 0 ? int(std::max<int64_t>(0, std::min<int64_t>(high, position - window + 1 - block_first))) : 0;
}

inline int64_t first_block(int64_t position, int64_t window) { return window > 0 ? std::max<int64_t>(0, position - window + 1) / BLOCK : 0; }

// Keys of a block that a query at `position` sees as sinks: [0, lead). Where they reach its window, one run from 0 is left.
inline int sinks_seen(int64_t block_first, int64_t sinks, int& low, int high) {
    const int lead = int(std::max<int64_t>(0, std::min<int64_t>(high, sinks - block_first)));
    if (lead >= low) low = 0;
    return low == 0 ? 0 : lead;
}

// scores[0..63] -> probabilities relative to the running maximum; returns the factor for what came before. Seen are
// [low, high) and, with SINKS, [0, lead).
template <bool SINKS>
inline float soften(float* scores, int lead, int low, int high, float scale, float& top, float& total) {
    float best = top;
#ifdef TANDEM_AVX512
    __m512 s[4];
    __mmask16 seen[4];
    __m512 m = _mm512_set1_ps(-INFINITY);
    for (int c = 0; c < 4; c++) {
        const int l = std::max(0, std::min(16, low - 16 * c)), h = std::max(0, std::min(16, high - 16 * c));
        seen[c] = __mmask16(((1u << h) - 1u) & ~((1u << l) - 1u));
        if constexpr (SINKS) seen[c] = __mmask16(seen[c] | ((1u << std::max(0, std::min(16, lead - 16 * c))) - 1u));
        s[c] = _mm512_mul_ps(_mm512_loadu_ps(scores + 16 * c), _mm512_set1_ps(scale));
        m = _mm512_mask_max_ps(m, seen[c], m, s[c]);
    }
    best = std::max(best, _mm512_reduce_max_ps(m));
    for (int c = 0; c < 4; c++) {
        s[c] = _mm512_maskz_mov_ps(seen[c], exp(Lanes{_mm512_sub_ps(s[c], _mm512_set1_ps(best))}).v);
        _mm512_storeu_ps(scores + 16 * c, s[c]);
    }
    const float sum = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
#else
    const auto seen = [&](int c) { return (c >= low && c < high) || (SINKS && c < lead); };
    for (int c = 0; c < high; c++)
        if (seen(c)) best = std::max(best, scores[c] *= scale);
    float sum = 0;
    for (int c = 0; c < BLOCK; c++) sum += scores[c] = seen(c) ? exp_one(scores[c] - best) : 0.0f;
#endif
    const float factor = exp_one(top - best);
    total = total * factor + sum;
    top = best;
    return factor;
}

// Flattened: with four instances g++ no longer inlines the tiles by itself, and a decode over 64 keys takes a third longer.
template <typename E, typename S, bool SINKS>
__attribute__((flatten)) void forward_span(const AttentionArgs& a, const Span& span) {
    const View<E, S> v{a, span.segment, span.kv_head};
    const int64_t group = v.group, n = span.tokens * group, d_size = a.head_size, panels = (d_size + PANEL - 1) / PANEL;
    const int64_t depth = padded_depth<E>(d_size), wide = panels * PANEL, base = span.first_token * group;
    thread_local std::vector<E> key_panel, value_panel, probability, key_rows, value_rows;
    thread_local std::vector<float> scores, out, top, total;
    key_panel.resize(depth * PANEL), value_panel.resize(wide * BLOCK), probability.resize(n * BLOCK);
    scores.resize(n * BLOCK), out.assign(n * wide, 0.0f), top.assign(n, -INFINITY), total.assign(n, 0.0f);

    const int64_t last = v.position(span.first_token + span.tokens - 1);
    const int64_t begin = first_block(v.position(span.first_token), a.window);
    const int64_t sink_blocks = SINKS ? std::min(begin, (a.sinks + BLOCK - 1) / BLOCK) : 0;
    for (int64_t turn = SINKS ? -sink_blocks : 0; turn <= last / BLOCK - begin; turn++) {
        const int64_t b = turn < 0 ? turn + sink_blocks : turn + begin;
        const int64_t count = std::min<int64_t>(BLOCK, last + 1 - b * BLOCK);
        const E *keys[BLOCK], *values[BLOCK], *part[BLOCK];
        gather<E, S>(v, b * BLOCK, count, key_rows, value_rows, keys, values);
        pack_columns<E>(keys, count, d_size, key_panel.data());
        for (int64_t p = 0; p < panels; p++) {
            for (int64_t j = 0; j < count; j++) part[j] = values[j] + p * PANEL;
            E* panel = value_panel.data() + p * BLOCK * PANEL;
            pack_depth<E>(part, count, std::min<int64_t>(PANEL, d_size - p * PANEL), panel);
            const int64_t filled = padded_depth<E>(count);
            std::memset((void*)(panel + filled * PANEL), 0, (BLOCK - filled) * PANEL * sizeof(E));
        }
        for (int64_t i = 0; i < n; i += ROWS) {
            const int rows = int(std::min<int64_t>(ROWS, n - i));
            const E* q[ROWS];
            for (int r = 0; r < rows; r++) q[r] = v.query(base + i + r, a.query, a.query_stride);
            tile<E>(rows, q, pair_of<E>(), key_panel.data(), depth, scores.data() + i * BLOCK, BLOCK, false);
            const E* p[ROWS];
            for (int r = 0; r < rows; r++) {
                int low, high, lead = 0;
                visible(v.position((base + i + r) / group), b * BLOCK, a.window, low, high);
                if constexpr (SINKS) lead = sinks_seen(b * BLOCK, a.sinks, low, high);
                float* s = scores.data() + (i + r) * BLOCK;
                E* target = probability.data() + (i + r) * BLOCK;
                p[r] = target;
                if (low >= high && lead == 0) {
                    std::memset((void*)target, 0, BLOCK * sizeof(E));
                    continue;
                }
                const float factor = soften<SINKS>(s, lead, low, high, a.scale, top[i + r], total[i + r]);
                float* o = out.data() + (i + r) * wide;
                for (int64_t c = 0; c < wide; c++) o[c] *= factor;
                narrow_panel<E>(s, target);
            }
            for (int64_t c = 0; c < panels; c++)
                tile<E>(rows, p, pair_of<E>(), value_panel.data() + c * BLOCK * PANEL, BLOCK, out.data() + i * wide + c * PANEL, wide, true);
        }
    }
    for (int64_t i = 0; i < n; i++) {
        const int64_t token = (base + i) / group, head = span.kv_head * group + i % group;
        E* target = (E*)a.out + (v.row(token) * a.heads + head) * d_size;
        float* o = out.data() + i * wide;
        const float inverse = 1.0f / total[i];
        for (int64_t c = 0; c < wide; c++) o[c] *= inverse;
        for (int64_t c = 0; c < d_size; c += PANEL) {
            if (c + PANEL <= d_size) narrow_panel<E>(o + c, target + c);
            else
                for (int64_t j = c; j < d_size; j++) target[j] = from_float<E>(o[j]);
        }
        if (a.lse) a.lse[v.row(token) * a.heads + head] = top[i] + std::log(total[i]);
    }
}

template <typename E, typename S = E>
void forward(const AttentionArgs& a) {
    std::vector<Span> spans;
    for (int64_t s = 0; s < a.segments; s++)
        for (int64_t first = 0, tokens = a.row_start[s + 1] - a.row_start[s]; first < tokens; first += QUERY_CHUNK)
            for (int64_t k = 0; k < a.kv_heads; k++) spans.push_back({s, k, first, std::min<int64_t>(QUERY_CHUNK, tokens - first)});
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t i = 0; i < spans.size(); i++)
        if (a.window > 0 && a.sinks > 0) forward_span<E, S, true>(a, spans[i]);
        else forward_span<E, S, false>(a, spans[i]);
}

// Gradients of one segment and key head, added to dquery and to the sums of dkey and dvalue.
template <typename E>
void backward_segment(const AttentionArgs& a, const AttentionGrads& g, int64_t s, int64_t kv_head) {
    constexpr int TILE = 64;  // query rows at a time
    const View<E> v{a, s, kv_head};
    const int64_t group = v.group, tokens = a.row_start[s + 1] - a.row_start[s], n = tokens * group, d_size = a.head_size;
    const int64_t panels = (d_size + PANEL - 1) / PANEL, depth = padded_depth<E>(d_size), wide = panels * PANEL;
    thread_local std::vector<E> key_columns, value_columns, key_depth, query_depth, dout_depth, p_rows, ds_rows, p_depth, ds_depth;
    thread_local std::vector<float> scores, dp, dq, dk, dv, delta, lse;
    key_columns.resize(depth * PANEL), value_columns.resize(depth * PANEL), key_depth.resize(wide * BLOCK);
    query_depth.resize(wide * TILE), dout_depth.resize(wide * TILE), p_rows.resize(TILE * BLOCK), ds_rows.resize(TILE * BLOCK);
    p_depth.resize(TILE * BLOCK), ds_depth.resize(TILE * BLOCK), scores.resize(TILE * BLOCK), dp.resize(TILE * BLOCK);
    dq.assign(n * wide, 0.0f), delta.resize(n), lse.resize(n);

    for (int64_t i = 0; i < n; i++) {
        const E* o = v.query(i, a.out, a.heads * d_size);
        const E* d = v.query(i, g.dout, a.heads * d_size);
        float sum = 0;
        for (int64_t c = 0; c < d_size; c++) sum += to_float(o[c]) * to_float(d[c]);
        delta[i] = sum;
        lse[i] = a.lse[v.row(i / group) * a.heads + kv_head * group + i % group];
    }
    const int64_t last = v.position(tokens - 1);
    for (int64_t b = first_block(v.position(0), a.window); b <= last / BLOCK; b++) {
        const int64_t count = std::min<int64_t>(BLOCK, last + 1 - b * BLOCK);
        const E *keys[BLOCK], *values[BLOCK], *part[BLOCK];
        v.rows(b * BLOCK, count, keys, values);
        pack_columns<E>(keys, count, d_size, key_columns.data());
        pack_columns<E>(values, count, d_size, value_columns.data());
        for (int64_t p = 0; p < panels; p++) {
            for (int64_t j = 0; j < count; j++) part[j] = keys[j] + p * PANEL;
            E* panel = key_depth.data() + p * BLOCK * PANEL;
            pack_depth<E>(part, count, std::min<int64_t>(PANEL, d_size - p * PANEL), panel);
            const int64_t filled = padded_depth<E>(count);
            std::memset((void*)(panel + filled * PANEL), 0, (BLOCK - filled) * PANEL * sizeof(E));
        }
        dk.assign(BLOCK * wide, 0.0f), dv.assign(BLOCK * wide, 0.0f);
        for (int64_t t = 0; t < n; t += TILE) {
            const int64_t rows = std::min<int64_t>(TILE, n - t);
            if (v.position((t + rows - 1) / group) < b * BLOCK) continue;
            const E *q[TILE], *d[TILE], *p[TILE], *ds[TILE];
            for (int64_t r = 0; r < rows; r++) {
                q[r] = v.query(t + r, a.query, a.query_stride), d[r] = v.query(t + r, g.dout, a.heads * d_size);
                p[r] = p_rows.data() + r * BLOCK, ds[r] = ds_rows.data() + r * BLOCK;
            }
            for (int64_t i = 0; i < rows; i += ROWS) {
                const int count_rows = int(std::min<int64_t>(ROWS, rows - i));
                tile<E>(count_rows, q + i, pair_of<E>(), key_columns.data(), depth, scores.data() + i * BLOCK, BLOCK, false);
                tile<E>(count_rows, d + i, pair_of<E>(), value_columns.data(), depth, dp.data() + i * BLOCK, BLOCK, false);
            }
            for (int64_t r = 0; r < rows; r++) {
                int low, high;
                visible(v.position((t + r) / group), b * BLOCK, a.window, low, high);
                float *s_row = scores.data() + r * BLOCK, *dp_row = dp.data() + r * BLOCK;
                for (int c = 0; c < BLOCK; c++) s_row[c] = s_row[c] * a.scale - lse[t + r];
                exp_panel(s_row);
                for (int c = 0; c < BLOCK; c++) {
                    s_row[c] = (c >= low && c < high) ? s_row[c] : 0.0f;
                    dp_row[c] = s_row[c] == 0.0f ? 0.0f : s_row[c] * (dp_row[c] - delta[t + r]) * a.scale;
                }
                narrow_panel<E>(s_row, p_rows.data() + r * BLOCK);
                narrow_panel<E>(dp_row, ds_rows.data() + r * BLOCK);
            }
            for (int64_t i = 0; i < rows; i += ROWS)
                for (int64_t c = 0; c < panels; c++)
                    tile<E>(int(std::min<int64_t>(ROWS, rows - i)), ds + i, pair_of<E>(), key_depth.data() + c * BLOCK * PANEL, BLOCK,
                            dq.data() + (t + i) * wide + c * PANEL, wide, true);
            const int64_t rows_depth = padded_depth<E>(rows);
            pack_depth<E>(p, rows, BLOCK, p_depth.data());
            pack_depth<E>(ds, rows, BLOCK, ds_depth.data());
            for (int64_t c = 0; c < panels; c++) {
                const int64_t width = std::min<int64_t>(PANEL, d_size - c * PANEL);
                const E *q_part[TILE], *d_part[TILE];
                for (int64_t r = 0; r < rows; r++) q_part[r] = q[r] + c * PANEL, d_part[r] = d[r] + c * PANEL;
                pack_depth<E>(q_part, rows, width, query_depth.data());
                pack_depth<E>(d_part, rows, width, dout_depth.data());
                for (int64_t j = 0; j < count; j += ROWS) {
                    const int some = int(std::min<int64_t>(ROWS, count - j));
                    const E *p_columns[ROWS], *ds_columns[ROWS];
                    for (int r = 0; r < some; r++)
                        p_columns[r] = p_depth.data() + (j + r) * pair_of<E>(), ds_columns[r] = ds_depth.data() + (j + r) * pair_of<E>();
                    tile<E>(some, p_columns, pair_of<E>() * PANEL, dout_depth.data(), rows_depth, dv.data() + j * wide + c * PANEL, wide, true);
                    tile<E>(some, ds_columns, pair_of<E>() * PANEL, query_depth.data(), rows_depth, dk.data() + j * wide + c * PANEL, wide, true);
                }
            }
        }
        for (int64_t j = 0; j < count; j++) {
            const int64_t at = (v.slot(b * BLOCK + j) * a.kv_heads + kv_head) * d_size;
            for (int64_t c = 0; c < d_size; c++) g.dkey_sum[at + c] += dk[j * wide + c], g.dvalue_sum[at + c] += dv[j * wide + c];
        }
    }
    for (int64_t i = 0; i < n; i++) {
        E* target = (E*)g.dquery + v.row(i / group) * g.dquery_stride + (kv_head * group + i % group) * d_size;
        for (int64_t c = 0; c < d_size; c++) target[c] = from_float<E>(dq[i * wide + c]);
    }
}

template <typename E>
void backward(const AttentionArgs& a, const AttentionGrads& g) {
    // A task owns its slots, so the sums are the same for any number of threads.
#pragma omp parallel for schedule(dynamic, 1) collapse(2)
    for (int64_t c = 0; c < g.components; c++)
        for (int64_t k = 0; k < a.kv_heads; k++)
            for (int64_t s = g.component_start[c]; s < g.component_start[c + 1]; s++) backward_segment<E>(a, g, s, k);
    const int64_t rows = a.row_start[a.segments], width = a.kv_heads * a.head_size;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < rows; t++)
        for (int64_t c = 0; c < width; c++) {
            ((E*)g.dkey)[t * g.dkey_stride + c] = from_float<E>(g.dkey_sum[t * width + c]);
            ((E*)g.dvalue)[t * g.dvalue_stride + c] = from_float<E>(g.dvalue_sum[t * width + c]);
        }
}

}  // namespace

extern "C" {
void attention_bf16(const AttentionArgs* a) { forward<bf16>(*a); }
void attention_fp32(const AttentionArgs* a) { forward<float>(*a); }
void attention_e4m3_bf16(const AttentionArgs* a) { forward<bf16, e4m3>(*a); }
void attention_e4m3_fp32(const AttentionArgs* a) { forward<float, e4m3>(*a); }
void attention_backward_bf16(const AttentionArgs* a, const AttentionGrads* g) { backward<bf16>(*a, *g); }
void attention_backward_fp32(const AttentionArgs* a, const AttentionGrads* g) { backward<float>(*a, *g); }
}

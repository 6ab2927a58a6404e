// Attention, forward (attention.h) and backward, for one layer. Contract in attention.py.
#include "attention.h"
#include "layer.h"
#include <omp.h>

using namespace tandem;

extern "C" struct AttentionGrads {
    const void* dout;  // [T, H, D]
    void *dquery, *dkey, *dvalue;
    int64_t dquery_stride, dkey_stride, dvalue_stride;
    float *dkey_sum, *dvalue_sum;  // [slots, K, D], zero on entry
    const int32_t* component_start;  // [components + 1] of segments; components share no slot
    int64_t components, slots;
};

namespace {

template <typename E>
struct View {  // addresses of one segment's queries, keys and values; pages of one token
    const AttentionArgs& a;
    int64_t s, kv_head;
    int64_t group = a.heads / a.kv_heads;
    int64_t row(int64_t token) const { return a.row_start[s] + token; }
    int64_t position(int64_t token) const { return a.first_position[s] + token; }
    int64_t slot(int64_t position) const { return a.table[s * a.table_stride + position]; }
    const E* query(int64_t i, const void* base, int64_t stride) const {  // i counts token-major over (token, head of group)
        return (const E*)base + row(i / group) * stride + (kv_head * group + i % group) * a.head_size;
    }
    void rows(int64_t first, int64_t count, const E** keys, const E** values) const {
        for (int64_t j = 0; j < count; j++) {
            keys[j] = (const E*)a.key + slot(first + j) * a.key_stride + kv_head * a.head_size;
            values[j] = (const E*)a.value + slot(first + j) * a.value_stride + kv_head * a.head_size;
        }
    }
};

// [n] floats, rounded.
template <typename E>
void store_row(const float* source, E* target, int64_t n) {
    int64_t c = 0;
    for (; c + LANES <= n; c += LANES) store_narrow(target + c, load(source + c));
    for (; c < n; c++) target[c] = from_float<E>(source[c]);
}

// p = e^(score * scale - lse) of the keys [low, high) of a block, else 0; ds = p (dp - delta) scale. Rounded.
template <typename E>
void softmax_backward(const float* scores, const float* dp, int low, int high, float scale, float lse, float delta, E* p, E* ds) {
    alignas(64) static constexpr float COUNT[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Lanes count = load(COUNT), zero = splat(0.0f), by = splat(scale);
    for (int c = 0; c < BLOCK; c += LANES) {
        Lanes x = exp(load(scores + c) * by - splat(lse));
        Lanes dx = x * (load(dp + c) - splat(delta)) * by;
        if (low > c || high < c + LANES) {
            const LaneMask hidden = less(count, splat(float(low - c))) | ~less(count, splat(float(high - c)));
            x = select(hidden, zero, x), dx = select(hidden, zero, dx);
        }
        store_narrow(p + c, x), store_narrow(ds + c, dx);
    }
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
    query_depth.resize((n + TILE) * wide), dout_depth.resize((n + TILE) * wide), p_rows.resize(TILE * BLOCK), ds_rows.resize(TILE * BLOCK);
    p_depth.resize(TILE * BLOCK), ds_depth.resize(TILE * BLOCK), scores.resize(TILE * BLOCK), dp.resize(TILE * BLOCK);
    dq.assign(n * wide, 0.0f), delta.resize(n), lse.resize(n);

    const auto query_of = [&](int64_t i) { return v.query(i, a.query, a.query_stride); };
    const auto dout_of = [&](int64_t i) { return v.query(i, g.dout, a.heads * d_size); };
    for (int64_t i = 0; i < n; i++) {
        const E *o = v.query(i, a.out, a.heads * d_size), *d = dout_of(i);
        const auto terms = [&](int64_t c) { return load_wide(o + c) * load_wide(d + c); };
        delta[i] = lane_sum(d_size, terms, [&](int64_t c) { return to_float(o[c]) * to_float(d[c]); });
        lse[i] = a.lse[v.row(i / group) * a.heads + kv_head * group + i % group];
    }
    for (int64_t t = 0; t < n; t += TILE)  // [tile][panel][rows, PANEL]
        for (int64_t c = 0; c < panels; c++) {
            const int64_t rows = std::min<int64_t>(TILE, n - t), width = std::min<int64_t>(PANEL, d_size - c * PANEL);
            const E *q[TILE], *d[TILE];
            for (int64_t r = 0; r < rows; r++) q[r] = query_of(t + r) + c * PANEL, d[r] = dout_of(t + r) + c * PANEL;
            pack_depth<E>(q, rows, width, query_depth.data() + t * wide + c * TILE * PANEL);
            pack_depth<E>(d, rows, width, dout_depth.data() + t * wide + c * TILE * PANEL);
        }
    const int64_t last = v.position(tokens - 1);
    const Tiles configured;
    for (int64_t b = first_seen(a, v.position(0)) / BLOCK; b <= last / BLOCK; b++) {
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
            if (v.position((t + rows - 1) / group) < b * BLOCK || first_seen(a, v.position(t / group)) >= (b + 1) * BLOCK) continue;
            const E *q[TILE], *d[TILE], *p[TILE], *ds[TILE];
            for (int64_t r = 0; r < rows; r++) {
                q[r] = query_of(t + r), d[r] = dout_of(t + r);
                p[r] = p_rows.data() + r * BLOCK, ds[r] = ds_rows.data() + r * BLOCK;
            }
            for (int64_t i = 0; i < rows; i += ROWS) {
                const int count_rows = int(std::min<int64_t>(ROWS, rows - i));
                tile<E>(count_rows, q + i, pair_of<E>(), key_columns.data(), depth, scores.data() + i * BLOCK, BLOCK, false);
                tile<E>(count_rows, d + i, pair_of<E>(), value_columns.data(), depth, dp.data() + i * BLOCK, BLOCK, false);
            }
            for (int64_t r = 0; r < rows; r++) {
                int low, high;
                visible(v.position((t + r) / group), first_seen(a, v.position((t + r) / group)), b * BLOCK, low, high);
                const int64_t at = r * BLOCK;
                softmax_backward<E>(scores.data() + at, dp.data() + at, low, high, a.scale, lse[t + r], delta[t + r], p_rows.data() + at, ds_rows.data() + at);
            }
            for (int64_t i = 0; i < rows; i += ROWS)
                for (int64_t c = 0; c < panels; c++)
                    tile<E>(int(std::min<int64_t>(ROWS, rows - i)), ds + i, pair_of<E>(), key_depth.data() + c * BLOCK * PANEL, BLOCK,
                            dq.data() + (t + i) * wide + c * PANEL, wide, true);
            const int64_t rows_depth = padded_depth<E>(rows);
            pack_depth<E>(p, rows, BLOCK, p_depth.data());
            pack_depth<E>(ds, rows, BLOCK, ds_depth.data());
            for (int64_t c = 0; c < panels; c++) {
                const E *q_panel = query_depth.data() + t * wide + c * TILE * PANEL, *d_panel = dout_depth.data() + t * wide + c * TILE * PANEL;
                for (int64_t j = 0; j < count; j += ROWS) {
                    const int some = int(std::min<int64_t>(ROWS, count - j));
                    const E *p_columns[ROWS], *ds_columns[ROWS];
                    for (int r = 0; r < some; r++)
                        p_columns[r] = p_depth.data() + (j + r) * pair_of<E>(), ds_columns[r] = ds_depth.data() + (j + r) * pair_of<E>();
                    tile<E>(some, p_columns, pair_of<E>() * PANEL, d_panel, rows_depth, dv.data() + j * wide + c * PANEL, wide, true);
                    tile<E>(some, ds_columns, pair_of<E>() * PANEL, q_panel, rows_depth, dk.data() + j * wide + c * PANEL, wide, true);
                }
            }
        }
        for (int64_t j = 0; j < count; j++) {
            const int64_t at = (v.slot(b * BLOCK + j) * a.kv_heads + kv_head) * d_size;
            for (int64_t c = 0; c < d_size; c++) g.dkey_sum[at + c] += dk[j * wide + c], g.dvalue_sum[at + c] += dv[j * wide + c];
        }
    }
    for (int64_t i = 0; i < n; i++)
        store_row(dq.data() + i * wide, (E*)g.dquery + v.row(i / group) * g.dquery_stride + (kv_head * group + i % group) * d_size, d_size);
}

template <typename E>
void backward(const AttentionArgs& a, const AttentionGrads& g) {
    // A task owns its slots, so the sums are the same for any number of threads.
#pragma omp parallel for schedule(dynamic, 1) collapse(2)
    for (int64_t c = 0; c < g.components; c++)
        for (int64_t k = 0; k < a.kv_heads; k++)
            for (int64_t s = g.component_start[c]; s < g.component_start[c + 1]; s++) backward_segment<E>(a, g, s, k);
    const int64_t width = a.kv_heads * a.head_size;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < g.slots; t++) {
        store_row(g.dkey_sum + t * width, (E*)g.dkey + t * g.dkey_stride, width);
        store_row(g.dvalue_sum + t * width, (E*)g.dvalue + t * g.dvalue_stride, width);
    }
}

}  // namespace

extern "C" {
void attention_bf16(const AttentionArgs* a) { attend<bf16>(*a); }
void attention_fp32(const AttentionArgs* a) { attend<float>(*a); }
void attention_e4m3_bf16(const AttentionArgs* a) { attend<bf16, e4m3>(*a); }
void attention_e4m3_fp32(const AttentionArgs* a) { attend<float, e4m3>(*a); }
void attention_backward_bf16(const AttentionArgs* a, const AttentionGrads* g) { backward<bf16>(*a, *g); }
void attention_backward_fp32(const AttentionArgs* a, const AttentionGrads* g) { backward<float>(*a, *g); }
}

// The decoder's forward pass of an engine step in one parallel region: embedding, every layer against pages of keys and values, the
// final norm of the rows asked for. Contract in forward.py. Each operation is the one that the learner's pass calls, a row at a
// time, so the bits are the same.
#include <chrono>
#include "adapter.h"
#include "attention.h"
#include "codes.h"
#include "eights.h"
#include "fours.h"
#include "layer.h"
#include "linear.h"
#include "page_store.h"

using namespace tandem;

extern "C" struct MatrixArgs {
    const void* packed;
    const Codes* codes;  // in place of `packed`, or null
    const Eights* eights;  // in place of both, rows in 8 bits too, or null
    const Codes* fours;    // in place of all, rows in 8 bits too, or null
};

extern "C" struct LayerArgs {
    MatrixArgs qkv, out, gate_up, down;
    const void *norm, *feed_norm, *q_norm, *k_norm;  // the norms of heads may be null
    const float* qkv_bias;                           // may be null
    void *keys, *values;                             // pools of packed pages
    float* scales;                                   // of codes in int8, or null
    int64_t group, rotary;                           // which tables of pages; 0: no rotation
};

extern "C" struct AdapterLayer {
    AdapterMatrix qkv, out, gate_up, down;
};

extern "C" struct AdapterArgs {  // of one adapter and the rows that it serves: runs of adapter_rows and of adapter_last
    const AdapterLayer* layers;
    int64_t begin, end, last_begin, last_end;
};

extern "C" struct GroupArgs {
    const int32_t *table, *last_table;  // [S, table_stride]; [N, table_stride], of the rows asked for
    const int64_t* slots;               // [T]
    int64_t table_stride, window, chunk, sinks;
};

extern "C" struct ForwardArgs {
    const LayerArgs* layers;
    const GroupArgs* groups;
    const void *embedding, *norm;                        // [V, M], [M]
    const int64_t *tokens, *positions, *last_rows;       // [T], [T], [N] rows asked for, ascending
    const int32_t *row_start, *first_position;           // [S + 1], [S]
    const int32_t *last_start, *last_positions;          // [N + 1] 0 .. N, [N]
    const float *cosine, *sine;                          // [positions, D / 2]
    void *hidden, *normed, *qkv, *attended, *both, *act;  // scratch: [T, M], [max(T, FEW threads), M], [T, W], [T, H D], [T, 2 F], [T, F]
    void* out;                                           // [N, M]
    const AdapterArgs* adapters;                         // [num_adapters]
    const int64_t *adapter_rows, *adapter_last;          // rows, and places among the rows asked for, by adapter
    void* lowered;                                       // scratch: [T, ranks]
    uint8_t* codes;                                      // scratch of rows in 8 bits: [max(T, FEW threads), deepest]
    float* code_scales;                                  // of them
    int32_t* code_starts;                                // [of them, deepest / 8, 2], of groups
    double* seconds;                                     // [KINDS], added to; or null
    const int64_t *taps, *tap_slots;                     // [num_taps] layers, ascending, not the last; [T], of rows in `tapped`
    void* tapped;                                        // [slots, num_taps, M]
    int64_t num_layers, num_groups, rows, segments, num_last, width, ff_width, heads, kv_heads, head_size, page_tokens;
    int64_t num_adapters, ranks;  // of the widest of their matrices
    int64_t deepest;              // inputs, to whole words
    int64_t num_taps;
    float eps;
};

namespace {

constexpr int64_t FEW = 8;  // rows up to which every thread norms them all for itself rather than wait for the others

enum Kind { EMBED, NORM, QKV, STORE, ATTEND, OUT, GATE_UP, DOWN, KINDS };

// Seconds of thread 0 from one operation to the next.
class Clock {
public:
    Clock(double* seconds, const Team& team) : seconds_(team.me == 0 ? seconds : nullptr), last_(now()) {}
    void stop(Kind kind) {
        if (!seconds_) return;
        const double t = now();
        seconds_[kind] += t - last_;
        last_ = t;
    }

private:
    double now() const { return seconds_ ? std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count() : 0.0; }
    double* seconds_;
    double last_;
};

struct Steps {  // what attention shares among the threads
    std::vector<Spans> spans;  // of each group, then of the rows asked for in the last layer's group
    std::vector<std::atomic<int64_t>> next;
    Steps(const ForwardArgs& a, int64_t threads);
};

AttentionArgs attention_args(const ForwardArgs& a, const LayerArgs& layer, bool last) {
    const GroupArgs& group = a.groups[layer.group];
    const int64_t width = (a.heads + 2 * a.kv_heads) * a.head_size;
    return {a.qkv, layer.keys, layer.values, width, 0, 0, a.attended, nullptr, last ? a.last_start : a.row_start, last ? a.last_positions : a.first_position,
            last ? group.last_table : group.table, group.table_stride, a.page_tokens, last ? a.num_last : a.segments, a.heads, a.kv_heads, a.head_size,
            group.window, group.chunk, group.sinks, float(1.0 / std::sqrt(double(a.head_size))), layer.scales};
}

Steps::Steps(const ForwardArgs& a, int64_t threads) : spans(a.num_groups + 1), next(a.num_layers) {
    for (int64_t l = 0; l < a.num_layers; l++)
        if (Spans& found = spans[a.layers[l].group]; found.spans.empty()) found = make_spans(attention_args(a, a.layers[l], false), threads);
    spans[a.num_groups] = make_spans(attention_args(a, a.layers[a.num_layers - 1], true), threads);
}

// What depends on how keys and values are stored.
struct Stored {
    decltype(&rotate_store_share<float, float>) store;
    decltype(&run_spans<float, float>) attend;
};

template <typename E>
class Forward {
public:
    Forward(const ForwardArgs& a, const Team& team, Steps& steps, Stored stored) : a_(a), team_(team), steps_(steps), stored_(stored), rows_(a.rows), clock_(a.seconds, team) {}

    void run() {
        embed();
        for (int64_t l = 0; l < a_.num_layers; l++) {
            const LayerArgs& layer = a_.layers[l];
            const bool last = l + 1 == a_.num_layers;
            project(layer, l);
            rotate_store(layer);
            if (last && a_.num_last == 0) return;  // a chunk from which nothing is drawn: its keys and values are in their pages
            if (last && a_.num_last < a_.rows) keep_last();
            attend(layer, l, last);
            feed_forward(layer, l, last ? nullptr : &a_.layers[l + 1]);
            if (tap_ < a_.num_taps && a_.taps[tap_] == l) tap();
        }
        int64_t i, end;
        team_.share(a_.num_last, i, end);
        for (; i < end; i++) norm_row(hidden() + i * a_.width, (const E*)a_.norm, (E*)a_.out + i * a_.width, a_.width, a_.eps);
        clock_.stop(NORM);
    }

private:
    E* hidden() const { return (E*)a_.hidden; }
    int64_t qkv_width() const { return (a_.heads + 2 * a_.kv_heads) * a_.head_size; }
    static int64_t depth(int64_t inputs) { return padded_depth<E>(inputs); }

    // Where this thread begins to read a matrix: packed columns or codes.
    const void* begin(const MatrixArgs& matrix, int64_t columns, int64_t inputs) const {
        if (matrix.eights) return first_eights(*matrix.eights, rows_, columns, team_);
        if (matrix.fours) return first_fours(*matrix.fours, rows_, columns, team_);
        return matrix.codes ? (const void*)first_codes(*matrix.codes, rows_, team_) : first_panel((const E*)matrix.packed, rows_, columns, depth(inputs), team_);
    }

    void multiply(const MatrixArgs& matrix, Product<E> a, void* y, const void* after = nullptr, Fetch* also = nullptr) {
        a.packed = (const E*)matrix.packed;
        if (matrix.eights) return eights_share<E, E>(a, rounded_rows(a, *matrix.eights), *matrix.eights, (E*)y, team_, (const int8_t*)after);
        if (matrix.fours) return fours_share<E, E>(a, rounded_rows(a, *matrix.fours), *matrix.fours, (E*)y, team_, (const uint8_t*)after);
        if constexpr (sizeof(E) == 2)
            if (matrix.codes) return codes_share<E>(a, *matrix.codes, (E*)y, team_, (const uint8_t*)after);
        linear_share<E, E>(a, (E*)y, team_, (const E*)after, also);
    }

    // Rows of x as codes. Ends in a wait where other threads wrote rows that this one reads.
    EightRows rounded_rows(const Product<E>& a, const Eights& w) {
        const int64_t place = own_rows();
        const EightRows found{a_.codes + place * a_.deepest, a_.code_scales + place, w.depth};
        round_rows([&](int64_t i) { eight_row(a.x + i * a.stride, std::min(a.depth, w.depth), w.depth, found.codes + i * w.depth, found.scales + i); });
        return found;
    }

    FourRows rounded_rows(const Product<E>& a, const Codes& w) {
        const int64_t place = own_rows(), groups = groups_of(w);
        const FourRows found{a_.codes + place * a_.deepest, a_.code_scales + place, a_.code_starts + place * a_.deepest / OCTET * 2, w.depth, groups};
        round_rows([&](int64_t i) {
            four_row(a.x + i * a.stride, std::min(a.depth, w.depth), w, found.codes + i * w.depth, found.scales + i, found.starts + i * groups * 2);
        });
        return found;
    }

    // Where this thread's own copy of few rows lies; 0 where all share one.
    int64_t own_rows() const { return rows_ <= FEW ? team_.me * FEW : 0; }

    template <typename Round>
    void round_rows(Round round) {
        int64_t i = 0, end = rows_;
        if (rows_ > FEW) team_.share(rows_, i, end);
        for (; i < end; i++) round(i);
        if (rows_ > FEW) team_.wait();
    }

    // As multiply, with what adapters add to their rows; everybody has finished where it returns.
    void apply(AdapterMatrix AdapterLayer::*which, int64_t l, const MatrixArgs& matrix, Product<E> a, void* y, const void* after) {
        if (find(which, l)) a.row_factors = row_factors_.data();
        foresee(a.depth);
        multiply(matrix, a, y, after, &fetch_);
        if (!parts_.empty()) {
            const AdapterProduct<E> product{a.x, a.stride, a.depth, (E*)a_.lowered, a_.ranks, (E*)y, a.columns};
            lower_share(parts_.data(), int64_t(parts_.size()), product, team_);
            team_.wait();
            raise_share(parts_.data(), int64_t(parts_.size()), product, team_);
        }
        team_.wait();
    }

    // The rows whose adapters have something for a matrix of layer l; returns whether some of them have factors.
    bool find(AdapterMatrix AdapterLayer::*which, int64_t l) {
        bool factors = false;
        parts_.clear();
        for (int64_t i = 0; i < a_.num_adapters; i++) {
            const AdapterArgs& one = a_.adapters[i];
            const AdapterMatrix& matrix = one.layers[l].*which;
            const int64_t begin = asked_ ? one.last_begin : one.begin, end = asked_ ? one.last_end : one.end;
            if (!matrix.down || begin == end) continue;
            parts_.push_back({&matrix, (asked_ ? a_.adapter_last : a_.adapter_rows) + begin, end - begin});
            factors = factors || matrix.factor;
        }
        if (!factors) return false;
        row_factors_.assign(rows_, nullptr);
        for (const AdapterRows& part : parts_)
            for (int64_t i = 0; i < part.count; i++) row_factors_[part.rows[i]] = part.matrix->factor;
        return true;
    }

    // What this thread reads of the adapters, about: its share of them.
    void foresee(int64_t inputs) {
        fetch_.clear();
        int64_t i, end;
        team_.share(int64_t(parts_.size()), i, end);
        for (; i < end; i++) {
            const AdapterMatrix& matrix = *parts_[i].matrix;
            fetch_.add(matrix.down, (matrix.ranks + 15) / 16 * 16 * inputs * sizeof(E));
            for (int64_t k = 0; k < matrix.num_pieces; k++) {
                const AdapterPiece& piece = matrix.pieces[k];
                fetch_.add(piece.up, (piece.columns + PANEL - 1) / PANEL * PANEL * piece.rank * sizeof(E));
            }
        }
    }

    void embed() {
        int64_t i, end;
        team_.share(rows_, i, end);
        for (; i < end; i++) std::memcpy((void*)(hidden() + i * a_.width), (const E*)a_.embedding + a_.tokens[i] * a_.width, a_.width * sizeof(E));
        team_.wait();
        clock_.stop(EMBED);
    }

    // Ends in a wait where other threads wrote rows that this one reads.
    const E* normed(const void* weight) {
        const bool alone = rows_ <= FEW;
        E* target = (E*)a_.normed + (alone ? team_.me * FEW * a_.width : 0);
        int64_t i = 0, end = rows_;
        if (!alone) team_.share(rows_, i, end);
        for (; i < end; i++) norm_row(hidden() + i * a_.width, (const E*)weight, target + i * a_.width, a_.width, a_.eps);
        if (!alone) team_.wait();
        clock_.stop(NORM);
        return target;
    }

    void project(const LayerArgs& layer, int64_t l) {
        const Product<E> qkv{normed(layer.norm), a_.width, nullptr, rows_, qkv_width(), depth(a_.width), layer.qkv_bias};
        apply(&AdapterLayer::qkv, l, layer.qkv, qkv, a_.qkv, begin(layer.out, a_.width, a_.heads * a_.head_size));
        clock_.stop(QKV);
        if (!layer.q_norm) return;
        const int64_t heads = a_.heads + a_.kv_heads;
        int64_t i, end;
        team_.share(rows_ * heads, i, end);
        for (; i < end; i++) {
            E* x = (E*)a_.qkv + i / heads * qkv_width() + i % heads * a_.head_size;
            norm_row(x, (const E*)(i % heads < a_.heads ? layer.q_norm : layer.k_norm), x, a_.head_size, a_.eps);
        }
        team_.wait();
        clock_.stop(NORM);
    }

    void rotate_store(const LayerArgs& layer) {
        E *query = (E*)a_.qkv, *key = query + a_.heads * a_.head_size;
        const StoreArgs args{query, key, key + a_.kv_heads * a_.head_size, layer.keys, layer.values, a_.positions, a_.groups[layer.group].slots,
                             layer.rotary ? a_.cosine : nullptr, a_.sine, rows_, qkv_width(), a_.heads, a_.kv_heads, a_.head_size, a_.page_tokens, layer.scales};
        stored_.store(args, team_);
        team_.wait();
        clock_.stop(STORE);
    }

    // From here on only the rows asked for: keys and values of all rows are in their pages.
    void keep_last() {
        if (team_.me == 0)
            for (int64_t i = 0; i < a_.num_last; i++) {
                const int64_t row = a_.last_rows[i], wide = qkv_width();
                std::memmove((void*)(hidden() + i * a_.width), hidden() + row * a_.width, a_.width * sizeof(E));
                std::memmove((void*)((E*)a_.qkv + i * wide), (E*)a_.qkv + row * wide, wide * sizeof(E));
            }
        rows_ = a_.num_last;
        asked_ = true;
        team_.wait();
    }

    void attend(const LayerArgs& layer, int64_t l, bool last) {
        stored_.attend(attention_args(a_, layer, last), steps_.spans[last ? a_.num_groups : layer.group], steps_.next[l], team_.threads);
        team_.wait();
        clock_.stop(ATTEND);
    }

    void feed_forward(const LayerArgs& layer, int64_t l, const LayerArgs* after) {
        const int64_t attended = a_.heads * a_.head_size, width = a_.width, inner = a_.ff_width;
        const Product<E> out{(const E*)a_.attended, attended, nullptr, rows_, width, depth(attended), nullptr, hidden()};
        apply(&AdapterLayer::out, l, layer.out, out, hidden(), begin(layer.gate_up, paired(layer) ? inner : 2 * inner, width));
        clock_.stop(OUT);
        Product<E> gate_up{normed(layer.feed_norm), width, (const E*)layer.gate_up.packed, rows_, 2 * inner, depth(width)};
        find(&AdapterLayer::gate_up, l);
        if (paired(layer) && parts_.empty()) gate_and_up(gate_up, layer.gate_up, begin(layer.down, width, inner));
        else gate_then_up(layer, l, gate_up, begin(layer.down, width, inner));
        team_.wait();
        clock_.stop(GATE_UP);
        const Product<E> down{(const E*)a_.act, inner, nullptr, rows_, width, depth(inner), nullptr, hidden()};
        apply(&AdapterLayer::down, l, layer.down, down, hidden(), after ? begin(after->qkv, qkv_width(), width) : nullptr);
        clock_.stop(DOWN);
    }

    // The residual stream behind a layer, of every row. No wait: nobody writes it before the next layer's attention is done.
    void tap() {
        int64_t i, end;
        team_.share(rows_, i, end);
        for (; i < end; i++)
            std::memcpy((void*)((E*)a_.tapped + (a_.tap_slots[i] * a_.num_taps + tap_) * a_.width), hidden() + i * a_.width, a_.width * sizeof(E));
        tap_++;
    }

    // Whether panels of the gate have panels of up beside them.
    bool paired(const LayerArgs& layer) const { return a_.ff_width % PANEL == 0 && !layer.gate_up.codes; }

    void gate_and_up(const Product<E>& a, const MatrixArgs& matrix, const void* after) {
        const int64_t panels = a_.ff_width / PANEL;
        if (const Eights* w = matrix.eights) {
            const EightRows x = rounded_rows(a, *w);
            return pair_panels(LANE_ROWS, [&](int64_t p, int64_t tile, int64_t tiles, bool more, float* out) {
                const int8_t* next = more ? w->packed + (p + 1) * w->panel_bytes() : p < panels ? (const int8_t*)after : nullptr;
                return eights_tile(x, rows_, *w, p, tile, tiles, next, out);
            });
        }
        if (const Codes* w = matrix.fours) {
            const FourRows x = rounded_rows(a, *w);
            return pair_panels(LANE_ROWS, [&](int64_t p, int64_t tile, int64_t tiles, bool more, float* out) {
                const uint8_t* next = more ? w->packed + (p + 1) * w->panel_bytes() : p < panels ? (const uint8_t*)after : nullptr;
                return fours_tile(x, rows_, *w, p, tile, tiles, next, out);
            });
        }
        pair_panels(ROWS, [&](int64_t p, int64_t tile, int64_t tiles, bool more, float* out) {
            return product_tile(a, p, tile, tiles, more ? a.packed + (p + 1) * a.depth * PANEL : p < panels ? (const E*)after : nullptr, out);
        });
    }

    // A panel of the gate with the same panel of up: what they give never leaves the cache. Rounded to E as if stored.
    // multiply(panel, tile of rows, tiles, whether the next panel follows, out) gives the rows of the tile.
    template <typename Multiply>
    void pair_panels(int64_t rows, Multiply multiply) {
        const int64_t panels = a_.ff_width / PANEL, tiles = (rows_ + rows - 1) / rows;
        int64_t t, last;
        team_.share(panels * tiles, t, last);
        for (; t < last; t++) {
            const int64_t p = t / tiles, m = t % tiles * rows;
            const bool more = (p + 1) * tiles < last;
            alignas(64) float gate[ROWS * PANEL], up[ROWS * PANEL];
            const int count = multiply(p, t % tiles, tiles, more, gate);
            multiply(panels + p, t % tiles, tiles, more, up);
            for (int r = 0; r < count; r++) {
                alignas(64) E g[PANEL], u[PANEL];
                narrow_panel<E>(gate + r * PANEL, g), narrow_panel<E>(up + r * PANEL, u);
                swiglu_panel(g, u, (E*)a_.act + (m + r) * a_.ff_width + p * PANEL, PANEL);
            }
        }
    }

    void gate_then_up(const LayerArgs& layer, int64_t l, const Product<E>& a, const void* after) {
        E* both = (E*)a_.both;
        apply(&AdapterLayer::gate_up, l, layer.gate_up, a, both, after);
        int64_t i, end;
        team_.share(rows_, i, end);
        for (; i < end; i++)
            for (int64_t c = 0; c < a_.ff_width; c += PANEL) {
                const E* gate = both + i * 2 * a_.ff_width + c;
                swiglu_panel(gate, gate + a_.ff_width, (E*)a_.act + i * a_.ff_width + c, int(std::min<int64_t>(PANEL, a_.ff_width - c)));
            }
    }

    const ForwardArgs& a_;
    const Team& team_;
    Steps& steps_;
    const Stored stored_;
    int64_t rows_;
    bool asked_ = false;  // the rows are those asked for
    int64_t tap_ = 0;     // the next one
    std::vector<AdapterRows> parts_;
    std::vector<const float*> row_factors_;
    Fetch fetch_;
    Clock clock_;
};

template <typename E, typename S>
void forward(const ForwardArgs& a) {
    Steps steps(a, omp_get_max_threads());
    with_team([&](const Team& team) {
        const Tiles configured;
        Forward<E>(a, team, steps, {&rotate_store_share<E, S>, &run_spans<E, S>}).run();
    });
}

}  // namespace

extern "C" {
void forward_bf16(const ForwardArgs* a) { forward<bf16, bf16>(*a); }
void forward_fp32(const ForwardArgs* a) { forward<float, float>(*a); }
void forward_e4m3_bf16(const ForwardArgs* a) { forward<bf16, e4m3>(*a); }
void forward_e4m3_fp32(const ForwardArgs* a) { forward<float, e4m3>(*a); }
void forward_int8_bf16(const ForwardArgs* a) { forward<bf16, int8_t>(*a); }
void forward_int8_fp32(const ForwardArgs* a) { forward<float, int8_t>(*a); }
void forward_int4_bf16(const ForwardArgs* a) { forward<bf16, nibbles>(*a); }
void forward_int4_fp32(const ForwardArgs* a) { forward<float, nibbles>(*a); }
}

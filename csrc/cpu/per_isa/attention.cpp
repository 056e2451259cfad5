// Compiled once per instruction set. See attention.h for the idea, matmul.h for the layouts.
//
// Letters: W head width filled up to a multiple of 32; k0 the first key of a block. S^T, P^T, dP^T
// and dS^T are (keys x 64 queries). Scores are kept in units of log 2.
#include "attention.h"

#include <math.h>

#include <algorithm>

#include "matmul.h"
#include "rows.h"

namespace stellarator {
namespace STELLARATOR_ISA {
namespace {

constexpr int kGroups = kQueries / kLanes;  // vectors in a row of scores
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// The next `count` elements of a buffer; every part begins on a line of 64 bytes.
template <typename T>
T* take(unsigned char*& buffer, int64_t count) {
    T* part = reinterpret_cast<T*>(buffer);
    buffer += round_up(count * sizeof(T), 64);
    return part;
}

// Packed keys and values of one block of one group.
template <typename Work>
struct Packed {
    Work* keys;         // (kKeys, W)
    Work* transposed;   // (W, kKeys): of the values in the forward pass, the keys in the backward
    Work* values;       // (kKeys, W); backward only
};

template <typename Work>
Packed<Work> packed(const Plan& plan, int64_t block, int64_t group, bool backward) {
    const int64_t size = kKeys * plan.width;
    Work* base = reinterpret_cast<Work*>(plan.shared) +
                 (block * plan.call.G + group) * size * (backward ? 3 : 2);
    return {base, base + size, base + 2 * size};
}

template <typename Element>
const Element* head_of(const void* tensor, const Strides& strides, int64_t batch, int64_t token,
                       int64_t head) {
    return static_cast<const Element*>(tensor) + batch * strides.batch + token * strides.token +
           head * strides.head;
}

template <typename Element>
void pack(const Plan& plan, int64_t task, bool backward, unsigned char* scratch) {
    typedef typename WorkOf<Element>::type Work;
    const Attention& call = plan.call;
    const int64_t block = task / call.G, group = task % call.G, W = plan.width;
    const auto after = std::upper_bound(
        plan.sequences.begin(), plan.sequences.end(), block,
        [](int64_t value, const Sequence& sequence) { return value < sequence.first_block; });
    const Sequence& sequence = *(after - 1);
    const int64_t k0 = (block - sequence.first_block) * kKeys;
    const int64_t count = std::min(kKeys, sequence.S - k0), full = round_up(count, 32);
    const Packed<Work> to = packed<Work>(plan, block, group, backward);
    const Element* k =
        head_of<Element>(call.k, call.k_strides, sequence.batch, sequence.key + k0, group);
    const Element* v =
        head_of<Element>(call.v, call.v_strides, sequence.batch, sequence.key + k0, group);
    copy_rows(k, call.k_strides.token, count, call.D, to.keys, full, W);
    Work* values = backward ? to.values : take<Work>(scratch, kKeys * W);
    copy_rows(v, call.v_strides.token, count, call.D, values, full, W);
    transpose_rows(backward ? to.keys : values, W, full, W, to.transposed, kKeys);
}

// Which keys of a block a block of queries sees: rows [first, last) of the packed keys, multiples
// of 32, and whether some of them are hidden from some of the queries.
struct Range {
    int64_t first, last;
    bool partly;
};

class Sight {
public:
    Sight(const Attention& call, const Sequence& sequence)
        : S_(sequence.S), T_(sequence.T), shift_(sequence.S - sequence.T),
          causal_(call.causal), window_(call.window) {}

    int64_t begin_key(int64_t q0) const {
        return window_ == 0 ? 0 : std::max<int64_t>(0, q0 + shift_ - window_ + 1);
    }
    int64_t end_key(int64_t q0) const {
        const int64_t rows = std::min(kQueries, T_ - q0);
        return causal_ ? std::min(S_, q0 + rows + shift_) : S_;
    }
    int64_t begin_query(int64_t k0) const {
        return causal_ ? std::max<int64_t>(0, k0 - shift_) : 0;
    }
    int64_t end_query(int64_t k0) const {
        const int64_t last = std::min(k0 + kKeys, S_) - 1;
        return window_ == 0 ? T_ : std::min(T_, last + window_ - shift_);
    }
    Range range(int64_t q0, int64_t k0) const {
        const int64_t begin = begin_key(q0) - k0, end = std::min(kKeys, end_key(q0) - k0);
        Range range;
        range.first = std::max<int64_t>(0, begin) / 32 * 32;
        range.last = round_up(end, 32);
        const int64_t last_query = std::min(q0 + kQueries, T_) - 1;
        range.partly = k0 + range.last > S_ ||
                       (causal_ && k0 + range.last - 1 > q0 + shift_) ||
                       (window_ != 0 && k0 + range.first <= last_query + shift_ - window_);
        return range;
    }
    // All ones in the lanes of the queries, from q on, that see `key`.
    Ints sees(int64_t key, int64_t q) const {
        Ints visible = (Ints){} - (key < S_ ? 1 : 0);
        Ints position;
        for (int i = 0; i < kLanes; ++i) position[i] = static_cast<int32_t>(q + shift_ + i);
        const int32_t at = static_cast<int32_t>(key);
        if (causal_) visible &= (position >= at);
        if (window_ != 0) visible &= (position - static_cast<int32_t>(window_) < at);
        return visible;
    }

private:
    int64_t S_, T_, shift_;
    bool causal_;
    int64_t window_;
};

// Two rows of B, as one row of panels. Rounds ties away from zero: a weight is never negative, and
// a tie is one in 65,536.
inline void store_pair(uint16_t* to, Floats even, Floats odd) {
    const Bits pairs = (((Bits)even + 0x8000u) >> 16) | (((Bits)odd + 0x8000u) & 0xffff0000u);
    memcpy(to, &pairs, sizeof pairs);
}

// Where columns [group * kLanes, ...) of row r of B (k x 64) are in its panels.
template <typename Work>
inline Work* in_panels(Work* panels, int64_t k, int64_t r, int group) {
    const int column = group * kLanes;
    return panels + ((column / kPanel) * k + r) * kPanel + (column % kPanel) * kPair<Work>;
}

// The running softmax of 64 queries.
struct Softmax {
    Floats top[kGroups], total[kGroups];

    Softmax() {
        for (int g = 0; g < kGroups; ++g) top[g] = all(-INFINITY), total[g] = (Floats){};
    }

    // Scores (keys x 64) become weights in panels; false if `rescale` is 1 for every query.
    template <typename Work>
    bool step(const float* scores, int64_t keys, float unit, Work* weights, Floats* rescale) {
        Floats base[kGroups], sums[kGroups];
        for (int g = 0; g < kGroups; ++g) base[g] = top[g], sums[g] = (Floats){};
        for (int64_t r = 0; r < keys; ++r) {
            for (int g = 0; g < kGroups; ++g) {
                base[g] = maximum(load(scores + r * kQueries + g * kLanes) * unit, base[g]);
            }
        }
        Ints changed = {};
        for (int g = 0; g < kGroups; ++g) {
            changed |= base[g] != top[g];
            const Floats before = top[g];
            top[g] = base[g];
            base[g] = base[g] == -INFINITY ? (Floats){} : base[g];  // nothing seen yet
            rescale[g] = exp2(before - base[g]);
        }
        for (int64_t r = 0; r < keys; r += kPair<Work>) {
            for (int g = 0; g < kGroups; ++g) {
                const float* from = scores + r * kQueries + g * kLanes;
                const Floats even = exp2(load(from) * unit - base[g]);
                sums[g] += even;
                if constexpr (kPair<Work> == 2) {
                    const Floats odd = exp2(load(from + kQueries) * unit - base[g]);
                    sums[g] += odd;
                    store_pair(in_panels(weights, keys, r, g), even, odd);
                } else {
                    store(in_panels(weights, keys, r, g), even);
                }
            }
        }
        for (int g = 0; g < kGroups; ++g) total[g] = total[g] * rescale[g] + sums[g];
        bool any = false;
        for (int i = 0; i < kLanes; ++i) any |= changed[i] != 0;
        return any;
    }
};

// rows (count, D) of a tensor = factor * transposed sums (W x 64).
template <typename Element>
void store_transposed(const float* sums, int64_t W, int64_t count, int64_t D, float factor,
                      float* buffer, Element* to, int64_t stride) {
    for (int64_t d = 0; d < W; d += 16) {
        for (int64_t c = 0; c < kQueries; c += 16) {
            transpose_16x16(reinterpret_cast<const uint32_t*>(sums + d * kQueries + c), kQueries,
                            reinterpret_cast<uint32_t*>(buffer + c * W + d), W);
        }
    }
    for (int64_t r = 0; r < count; ++r) {
        const float* from = buffer + r * W;
        Element* row = to + r * stride;
        int64_t d = 0;
        for (; d + kLanes <= D; d += kLanes) store(row + d, load(from + d) * factor);
        if (d < D) {
            alignas(64) Element tail[kLanes];
            store(tail, load(from + d) * factor);  // W is a multiple of kLanes
            memcpy(row + d, tail, (D - d) * sizeof(Element));
        }
    }
}

template <typename Element>
void forward(const Plan& plan, const Sequence& sequence, int64_t head, int64_t block,
             unsigned char* scratch) {
    typedef typename WorkOf<Element>::type Work;
    const Attention& call = plan.call;
    const int64_t W = plan.width, D = call.D, group = head / (call.H / call.G);
    const int64_t q0 = block * kQueries, count = std::min(kQueries, sequence.T - q0);
    Work* rows = take<Work>(scratch, kQueries * W);
    Work* queries = take<Work>(scratch, kQueries * W);
    float* scores = take<float>(scratch, kKeys * kQueries);
    Work* weights = take<Work>(scratch, kKeys * kQueries);
    float* sums = take<float>(scratch, W * kQueries);
    float* buffer = take<float>(scratch, kQueries * W);
    const Element* q =
        head_of<Element>(call.q, call.q_strides, sequence.batch, sequence.query + q0, head);
    copy_rows(q, call.q_strides.token, count, D, rows, kQueries, W);
    pack_columns(rows, W, W, kQueries, queries);

    const MatrixUnit unit;
    const Sight sight(call, sequence);
    const float to_log2 = call.scale * kLog2E;
    const int64_t end = sight.end_key(q0);
    Softmax softmax;
    bool started = false;
    for (int64_t k0 = sight.begin_key(q0) / kKeys * kKeys; k0 < end; k0 += kKeys) {
        const Range range = sight.range(q0, k0);
        const int64_t keys = range.last - range.first;
        const Packed<Work> from =
            packed<Work>(plan, sequence.first_block + k0 / kKeys, group, false);
        multiply(scores, kQueries, from.keys + range.first * W, W, queries, keys, kQueries, W,
                 false);
        if (range.partly) {
            const Floats hidden = all(-INFINITY / (to_log2 < 0 ? -1.0f : 1.0f));
            for (int64_t r = 0; r < keys; ++r) {
                for (int g = 0; g < kGroups; ++g) {
                    float* score = scores + r * kQueries + g * kLanes;
                    const Ints sees = sight.sees(k0 + range.first + r, q0 + g * kLanes);
                    store(score, sees ? load(score) : hidden);
                }
            }
        }
        Floats rescale[kGroups];
        if (softmax.step(scores, keys, to_log2, weights, rescale) && started) {
            for (int64_t d = 0; d < W; ++d) {
                for (int g = 0; g < kGroups; ++g) {
                    float* at = sums + d * kQueries + g * kLanes;
                    store(at, load(at) * rescale[g]);
                }
            }
        }
        multiply(sums, kQueries, from.transposed + range.first, kKeys, weights, W, kQueries, keys,
                 started);
        started = true;
    }
    if (!started) memset(sums, 0, W * kQueries * sizeof(float));
    float* lse = call.lse + (sequence.batch * call.H + head) * call.T + sequence.query + q0;
    Floats inverse[kGroups];
    alignas(64) float tops[kQueries], totals[kQueries];
    for (int g = 0; g < kGroups; ++g) {
        inverse[g] = softmax.total[g] == 0.0f ? (Floats){} : 1.0f / softmax.total[g];
        store(tops + g * kLanes, softmax.top[g]);
        store(totals + g * kLanes, softmax.total[g]);
    }
    for (int64_t c = 0; c < count; ++c) {
        lse[c] = totals[c] == 0.0f ? -INFINITY : tops[c] * kLn2 + logf(totals[c]);
    }
    for (int64_t d = 0; d < W; ++d) {
        for (int g = 0; g < kGroups; ++g) {
            float* at = sums + d * kQueries + g * kLanes;
            store(at, load(at) * inverse[g]);
        }
    }
    const Strides strides = {call.T * call.H * D, call.H * D, D};
    Element* out = const_cast<Element*>(
        head_of<Element>(call.out, strides, sequence.batch, sequence.query + q0, head));
    store_transposed(sums, W, count, D, 1.0f, buffer, out, call.H * D);
}

// One head of the backward pass: its queries and output gradients, packed both ways.
template <typename Work>
struct Head {
    Work *queries_across, *queries;  // B operands (W x 64) and (64 x W) for each block
    Work *douts_across, *douts;
    float *lse, *delta;  // for each query: lse in log 2, infinite for none; sum(dout * out) - dlse
    float* dq;           // (W x 64) for each block
};

template <typename Element, typename Work>
void prepare_head(const Plan& plan, const Sequence& sequence, int64_t head, Work* rows,
                  const Head<Work>& to) {
    const Attention& call = plan.call;
    const int64_t W = plan.width, D = call.D;
    const Strides dense = {call.T * call.H * D, call.H * D, D};
    for (int64_t q0 = 0; q0 < sequence.T; q0 += kQueries) {
        const int64_t count = std::min(kQueries, sequence.T - q0);
        const int64_t token = sequence.query + q0;
        const Element* q = head_of<Element>(call.q, call.q_strides, sequence.batch, token, head);
        copy_rows(q, call.q_strides.token, count, D, rows, kQueries, W);
        pack_columns(rows, W, W, kQueries, to.queries_across + q0 * W);
        pack_rows(rows, W, kQueries, W, to.queries + q0 * W);
        const Element* dout =
            head_of<Element>(call.dout, call.dout_strides, sequence.batch, token, head);
        copy_rows(dout, call.dout_strides.token, count, D, rows, kQueries, W);
        pack_columns(rows, W, W, kQueries, to.douts_across + q0 * W);
        pack_rows(rows, W, kQueries, W, to.douts + q0 * W);
        const Element* out = head_of<Element>(call.out, dense, sequence.batch, token, head);
        const int64_t first = (sequence.batch * call.H + head) * call.T + token;
        for (int64_t c = 0; c < kQueries; ++c) {
            if (c >= count) {
                to.lse[q0 + c] = INFINITY, to.delta[q0 + c] = 0.0f;
                continue;
            }
            const Element* a = dout + c * call.dout_strides.token;
            const Element* b = out + c * dense.token;
            Floats parts = {};
            int64_t d = 0;
            for (; d + kLanes <= D; d += kLanes) parts += load(a + d) * load(b + d);
            float delta = sum(parts);
            for (; d < D; ++d) {
                const Floats x = all(0.0f);
                Element one[kLanes] = {}, two[kLanes] = {};
                one[0] = a[d], two[0] = b[d];
                delta += (load(one) * load(two) + x)[0];
            }
            const float lse = call.lse[first + c];
            to.lse[q0 + c] = lse == -INFINITY ? INFINITY : lse * kLog2E;
            to.delta[q0 + c] = delta - (call.dlse == nullptr ? 0.0f : call.dlse[first + c]);
        }
    }
    memset(to.dq, 0, round_up(sequence.T, kQueries) * W * sizeof(float));
}

// Scores and dP^T (keys x 64) become P^T and dS^T as rows of A, and dS^T in panels of B.
template <typename Work>
void weights_and_gradients(const float* scores, const float* dweights, int64_t keys, float unit,
                           const float* lse, const float* delta, const Sight* sight, int64_t key,
                           int64_t q0, Work* weights, Work* dscores, Work* across) {
    Floats base[kGroups], mean[kGroups];
    for (int g = 0; g < kGroups; ++g) {
        base[g] = load(lse + g * kLanes), mean[g] = load(delta + g * kLanes);
    }
    for (int64_t r = 0; r < keys; r += kPair<Work>) {
        for (int g = 0; g < kGroups; ++g) {
            Floats gradients[kPair<Work>];
            for (int i = 0; i < kPair<Work>; ++i) {
                const int64_t at = (r + i) * kQueries + g * kLanes;
                Floats p = exp2(load(scores + at) * unit - base[g]);
                if (sight != nullptr) {
                    p = sight->sees(key + r + i, q0 + g * kLanes) ? p : (Floats){};
                }
                gradients[i] = p * (load(dweights + at) - mean[g]);
                store(weights + at, p);
                store(dscores + at, gradients[i]);
            }
            if constexpr (kPair<Work> == 2) {
                store_pair(in_panels(across, keys, r, g), gradients[0], gradients[1]);
            } else {
                store(in_panels(across, keys, r, g), gradients[0]);
            }
        }
    }
}

// Adds one head to the gradients of its group's keys and values; leaves dq.
template <typename Work>
void backward_head(const Plan& plan, const Sequence& sequence, int64_t group,
                   const Head<Work>& head, unsigned char* scratch, float* dk, float* dv) {
    const Attention& call = plan.call;
    const int64_t W = plan.width;
    const Sight sight(call, sequence);
    const float to_log2 = call.scale * kLog2E;
    float* scores = take<float>(scratch, kKeys * kQueries);
    float* dweights = take<float>(scratch, kKeys * kQueries);
    Work* weights = take<Work>(scratch, kKeys * kQueries);
    Work* dscores = take<Work>(scratch, kKeys * kQueries);
    Work* across = take<Work>(scratch, kKeys * kQueries);
    for (int64_t k0 = 0; k0 < sequence.S; k0 += kKeys) {
        const Packed<Work> from =
            packed<Work>(plan, sequence.first_block + k0 / kKeys, group, true);
        const int64_t end = sight.end_query(k0);
        for (int64_t q0 = sight.begin_query(k0) / kQueries * kQueries; q0 < end; q0 += kQueries) {
            const Range range = sight.range(q0, k0);
            const int64_t first = range.first, keys = range.last - range.first, at = q0 * W;
            if (keys <= 0) continue;
            multiply(scores, kQueries, from.keys + first * W, W, head.queries_across + at, keys,
                     kQueries, W, false);
            multiply(dweights, kQueries, from.values + first * W, W, head.douts_across + at, keys,
                     kQueries, W, false);
            weights_and_gradients(scores, dweights, keys, to_log2, head.lse + q0, head.delta + q0,
                                  range.partly ? &sight : nullptr, k0 + first, q0, weights,
                                  dscores, across);
            multiply(dv + (k0 + first) * W, W, weights, kQueries, head.douts + at, keys, W,
                     kQueries, true);
            multiply(dk + (k0 + first) * W, W, dscores, kQueries, head.queries + at, keys, W,
                     kQueries, true);
            multiply(head.dq + at, kQueries, from.transposed + first, kKeys, across, W, kQueries,
                     keys, true);
        }
    }
}

template <typename Element>
void backward(const Plan& plan, const Sequence& sequence, int64_t group, int64_t share,
              unsigned char* scratch, float* dk, float* dv) {
    typedef typename WorkOf<Element>::type Work;
    const Attention& call = plan.call;
    const int64_t W = plan.width, D = call.D, heads = call.H / call.G;
    const int64_t T = round_up(sequence.T, kQueries);
    Head<Work> head;
    head.queries_across = take<Work>(scratch, T * W);
    head.queries = take<Work>(scratch, T * W);
    head.douts_across = take<Work>(scratch, T * W);
    head.douts = take<Work>(scratch, T * W);
    head.lse = take<float>(scratch, T);
    head.delta = take<float>(scratch, T);
    head.dq = take<float>(scratch, T * W);
    float* buffer = take<float>(scratch, kQueries * W);
    const int64_t bytes = round_up(sequence.S, kKeys) * W * sizeof(float);
    memset(dk, 0, bytes);
    memset(dv, 0, bytes);
    const MatrixUnit unit;
    const int64_t last = heads * (share + 1) / plan.shares;
    for (int64_t i = heads * share / plan.shares; i < last; ++i) {
        const int64_t number = group * heads + i;
        prepare_head<Element>(plan, sequence, number, reinterpret_cast<Work*>(buffer), head);
        backward_head(plan, sequence, group, head, scratch, dk, dv);
        for (int64_t q0 = 0; q0 < sequence.T; q0 += kQueries) {
            Element* dq = const_cast<Element*>(
                head_of<Element>(call.dq, call.dq_strides, sequence.batch, sequence.query + q0,
                                 number));
            store_transposed(head.dq + q0 * W, W, std::min(kQueries, sequence.T - q0), D,
                             call.scale, buffer, dq, call.dq_strides.token);
        }
    }
}

// Rows (count, D) of a tensor = factor * sum of `parts` sums of rows of width W.
template <typename Element>
void store_sum(const float* first, int64_t parts, int64_t part_stride, int64_t count, int64_t W,
               int64_t D, float factor, Element* to, int64_t stride) {
    for (int64_t r = 0; r < count; ++r) {
        for (int64_t d = 0; d < D; d += kLanes) {
            Floats total = {};
            for (int64_t i = 0; i < parts; ++i) total += load(first + i * part_stride + r * W + d);
            alignas(64) Element values[kLanes];
            store(values, total * factor);
            memcpy(to + r * stride + d, values, std::min<int64_t>(kLanes, D - d) * sizeof(Element));
        }
    }
}

template <typename Element>
void finish(const Plan& plan, const Sequence& sequence, int64_t group, int64_t k0, int64_t count,
            const float* dk, const float* dv, int64_t part_stride) {
    const Attention& call = plan.call;
    const int64_t W = plan.width, D = call.D, b = sequence.batch, key = sequence.key + k0;
    store_sum(dk + k0 * W, plan.shares, part_stride, count, W, D, call.scale,
              const_cast<Element*>(head_of<Element>(call.dk, call.dk_strides, b, key, group)),
              call.dk_strides.token);
    store_sum(dv + k0 * W, plan.shares, part_stride, count, W, D, 1.0f,
              const_cast<Element*>(head_of<Element>(call.dv, call.dv_strides, b, key, group)),
              call.dv_strides.token);
}

}  // namespace

int64_t work_bytes(bool is_bfloat16) { return is_bfloat16 ? sizeof(Narrow) : sizeof(float); }

void pack_keys(const Plan& plan, int64_t task, bool backward, void* scratch) {
    unsigned char* own = static_cast<unsigned char*>(scratch);
    if (plan.call.is_bfloat16) {
        pack<uint16_t>(plan, task, backward, own);
    } else {
        pack<float>(plan, task, backward, own);
    }
}

void forward_task(const Plan& plan, const Sequence& sequence, int64_t head, int64_t block,
                  void* scratch) {
    unsigned char* own = static_cast<unsigned char*>(scratch);
    if (plan.call.is_bfloat16) {
        forward<uint16_t>(plan, sequence, head, block, own);
    } else {
        forward<float>(plan, sequence, head, block, own);
    }
}

void backward_task(const Plan& plan, const Sequence& sequence, int64_t group, int64_t share,
                   void* scratch, float* dk, float* dv) {
    unsigned char* own = static_cast<unsigned char*>(scratch);
    if (plan.call.is_bfloat16) {
        backward<uint16_t>(plan, sequence, group, share, own, dk, dv);
    } else {
        backward<float>(plan, sequence, group, share, own, dk, dv);
    }
}

void finish_keys(const Plan& plan, const Sequence& sequence, int64_t group, int64_t k0,
                 int64_t count, const float* dk, const float* dv, int64_t part_stride) {
    if (plan.call.is_bfloat16) {
        finish<uint16_t>(plan, sequence, group, k0, count, dk, dv, part_stride);
    } else {
        finish<float>(plan, sequence, group, k0, count, dk, dv, part_stride);
    }
}

}  // namespace STELLARATOR_ISA
}  // namespace stellarator

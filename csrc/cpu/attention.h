// Flash attention, forward and backward, for bfloat16 and float32.
//
// All scores are kept transposed: a row is a key, a column a query, 64 queries at a time. Maxima
// and sums over the keys are then sums of whole vectors, and exp(S)^T is in the order that the next
// products want, so nothing is transposed but inputs and outputs.
//
// Work is cut into tasks whose results do not overlap: no atomics, the same bits on every run.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"

namespace stellarator {

constexpr int64_t kQueries = 64;  // queries of a block
constexpr int64_t kKeys = 128;    // keys of a block

// Element strides of a tensor (rows of a batch, tokens, heads); elements of a head are adjacent.
struct Strides {
    int64_t batch, token, head;
};

// Queries [query, query + T) of row `batch` see keys [key, key + S) of it, aligned at their ends.
struct Sequence {
    int64_t batch, query, T, key, S;
    int64_t first_block;  // number of blocks of keys before it: where its packed keys are
};

// One call. The names and shapes are those of stellarator_kernels/attention/api.py.
struct Attention {
    bool is_bfloat16;
    int64_t B, T, S, H, G, D;
    const int32_t* cu_seqlens;  // (documents + 1,), or null: then the B rows are the sequences
    int64_t documents;
    bool causal;
    int64_t window;  // visible keys; 0: all
    float scale;
    const void *q, *k, *v;
    Strides q_strides, k_strides, v_strides;
    void* out;   // (B, T, H, D), contiguous
    float* lse;  // (B, H, T)
    // Backward only. `out` and `lse` are read.
    const void* dout;
    Strides dout_strides;
    const float* dlse;   // (B, H, T) or null
    void *dq, *dk, *dv;
    Strides dq_strides, dk_strides, dv_strides;
};

// What all tasks of one call share.
struct Plan {
    const Attention& call;
    int64_t width;        // D filled up to a multiple of 32
    int64_t shares;       // backward: tasks that share the heads of a group
    std::vector<Sequence> sequences;
    int64_t blocks;       // of keys, over all sequences
    unsigned char* shared;  // packed keys and values
};

// Bytes of workspace that the calls need for `threads` threads.
int64_t attention_forward_workspace(const Attention& call, int threads, Isa isa);
int64_t attention_backward_workspace(const Attention& call, int threads, Isa isa);

// `workspace` is aligned to 64 bytes.
void attention_forward(const Attention& call, void* workspace, int threads, Isa isa);
void attention_backward(const Attention& call, void* workspace, int threads, Isa isa);

// The parts that are compiled per instruction set.
STELLARATOR_FOR_EACH_ISA(int64_t work_bytes(bool is_bfloat16))  // of one packed element
// Packs one block of keys and values of one group; `task` counts groups within blocks.
STELLARATOR_FOR_EACH_ISA(void pack_keys(const Plan& plan, int64_t task, bool backward,
                                        void* scratch))
// Output and lse of one block of queries of one head.
STELLARATOR_FOR_EACH_ISA(void forward_task(const Plan& plan, const Sequence& sequence,
                                           int64_t head, int64_t block, void* scratch))
// dq of the heads of one share of a group; their sums of dk and dv, float32 (S filled up, width).
STELLARATOR_FOR_EACH_ISA(void backward_task(const Plan& plan, const Sequence& sequence,
                                            int64_t group, int64_t share, void* scratch, float* dk,
                                            float* dv))
// dk and dv of keys [k0, k0 + count) of one group from the sums of all shares.
STELLARATOR_FOR_EACH_ISA(void finish_keys(const Plan& plan, const Sequence& sequence,
                                          int64_t group, int64_t k0, int64_t count,
                                          const float* dk, const float* dv, int64_t part_stride))

}  // namespace stellarator

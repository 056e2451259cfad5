#include "layer_norm.h"

#include <algorithm>

#include "column_sums.h"
#include "parallel.h"

namespace stellarator {
namespace {

template <typename Call>
struct Job {
    const Call& call;
    int64_t rows;  // of a task
    Isa isa;
};

void forward(void* context, int64_t i, int) {
    const auto& [call, rows, isa] = *static_cast<Job<LayerNormForward>*>(context);
    STELLARATOR_SELECT(isa, normalise_rows)
    (call, i * rows, std::min((i + 1) * rows, call.N));
}

void backward(void* context, int64_t i, int) {
    const auto& [call, rows, isa] = *static_cast<Job<LayerNormBackward>*>(context);
    float* sums = call.sums == nullptr ? nullptr : call.sums + i * 2 * call.C;
    STELLARATOR_SELECT(isa, normalise_rows_backward)
    (call, i * rows, std::min((i + 1) * rows, call.N), sums);
}

}  // namespace

void layer_norm_forward(const LayerNormForward& call, int threads, Isa isa) {
    Job<LayerNormForward> job{call, rows_of_block(call.N), isa};
    parallel_for(blocks_of_rows(call.N), threads, forward, &job);
}

void layer_norm_backward(const LayerNormBackward& call, int threads, Isa isa) {
    Job<LayerNormBackward> job{call, rows_of_block(call.N), isa};
    const int64_t blocks = blocks_of_rows(call.N);
    parallel_for(blocks, threads, backward, &job);
    void* const results[] = {call.dweight, call.dbias};
    for (int i = 0; i < 2; ++i) {
        if (results[i] == nullptr) continue;
        const float* sums = call.sums + i * call.C;
        add_columns({sums, blocks, 2 * call.C, call.C, call.is_bfloat16, results[i]}, threads, isa);
    }
}

}  // namespace stellarator

#include "bias_gelu.h"

#include <algorithm>

#include "column_sums.h"
#include "parallel.h"

namespace stellarator {
namespace {

constexpr int64_t kColumns = 4096;  // of a task: its sums of dbias stay in the nearest cache

struct Job {
    const BiasGelu& call;
    Isa isa;

    int64_t chunks() const { return (call.C + kColumns - 1) / kColumns; }
    int64_t tasks() const { return blocks_of_rows(call.N) * chunks(); }
    Block block(int64_t task) const {
        const int64_t rows = rows_of_block(call.N), row = task / chunks() * rows;
        const int64_t column = task % chunks() * kColumns;
        return {row, std::min(row + rows, call.N), column, std::min(column + kColumns, call.C)};
    }
};

void forward(void* context, int64_t i, int) {
    const Job& job = *static_cast<Job*>(context);
    STELLARATOR_SELECT(job.isa, gelu_block)(job.call, job.block(i));
}

void backward(void* context, int64_t i, int) {
    const Job& job = *static_cast<Job*>(context);
    const BiasGelu& call = job.call;
    float* sums = call.sums == nullptr ? nullptr : call.sums + i / job.chunks() * call.C;
    STELLARATOR_SELECT(job.isa, gelu_block_backward)(call, job.block(i), sums);
}

}  // namespace

void bias_gelu_forward(const BiasGelu& call, int threads, Isa isa) {
    Job job{call, isa};
    parallel_for(job.tasks(), threads, forward, &job);
}

void bias_gelu_backward(const BiasGelu& call, int threads, Isa isa) {
    Job job{call, isa};
    parallel_for(job.tasks(), threads, backward, &job);
    if (call.dbias == nullptr) return;
    const int64_t blocks = blocks_of_rows(call.N), C = call.C;
    add_columns({call.sums, blocks, C, C, call.is_bfloat16, call.dbias}, threads, isa);
}

}  // namespace stellarator

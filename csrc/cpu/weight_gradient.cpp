#include "weight_gradient.h"

#include "parallel.h"
#include "rows.h"

namespace stellarator {
namespace {

struct Job {
    WeightGradient call;
    Isa isa;
    int64_t columns;  // blocks in a row of blocks
    unsigned char* scratch;
    int64_t scratch_size;
};

void run(void* context, int64_t i, int thread) {
    const Job& job = *static_cast<Job*>(context);
    STELLARATOR_SELECT(job.isa, gradient_block)
    (job.call, i / job.columns * job.call.rows, i % job.columns * kGradientColumns,
     job.scratch + thread * job.scratch_size);
}

}  // namespace

int64_t weight_gradient_workspace(int threads, Isa isa) {
    return threads * STELLARATOR_SELECT(isa, gradient_block_bytes)();
}

void weight_gradient(const WeightGradient& call, void* workspace, int threads, Isa isa) {
    const int64_t columns = ceil_div(call.K, kGradientColumns);
    int64_t rows = ceil_div(call.M, kGradientRows);
    // Few tasks come in a multiple of the threads.
    while (rows * columns < 4 * threads && rows * columns % threads != 0) ++rows;
    Job job{call, isa, columns, static_cast<unsigned char*>(workspace),
            STELLARATOR_SELECT(isa, gradient_block_bytes)()};
    job.call.rows = round_up(ceil_div(call.M, rows), 16);
    parallel_for(ceil_div(call.M, job.call.rows) * columns, threads, run, &job);
}

}  // namespace stellarator

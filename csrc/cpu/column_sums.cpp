#include "column_sums.h"

#include <algorithm>

#include "parallel.h"

namespace stellarator {
namespace {

constexpr int64_t kRows = 64, kBlocks = 128;
constexpr int64_t kColumns = 512;  // of a task

struct Job {
    const ColumnSums& sums;
    void (*range)(const ColumnSums&, int64_t, int64_t);
};

}  // namespace

int64_t rows_of_block(int64_t N) { return std::max(kRows, (N + kBlocks - 1) / kBlocks); }

int64_t blocks_of_rows(int64_t N) { return (N + rows_of_block(N) - 1) / rows_of_block(N); }

void add_columns(const ColumnSums& sums, int threads, Isa isa) {
    Job job{sums, STELLARATOR_SELECT(isa, add_column_range)};
    const auto run = [](void* context, int64_t i, int) {
        const Job& job = *static_cast<Job*>(context);
        job.range(job.sums, i * kColumns, std::min((i + 1) * kColumns, job.sums.C));
    };
    parallel_for((sums.C + kColumns - 1) / kColumns, threads, run, &job);
}

}  // namespace stellarator

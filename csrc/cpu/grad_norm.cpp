#include "grad_norm.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace stellarator {
namespace {

constexpr int64_t kBlock = 65536;

struct Job {
    const void* x;
    bool is_bfloat16;
    int64_t n;
    double (*range)(const void*, bool, int64_t, int64_t);
    std::vector<double> sums;
};

}  // namespace

double sum_of_squares(const void* x, bool is_bfloat16, int64_t n, int threads, Isa isa) {
    const int64_t blocks = (n + kBlock - 1) / kBlock;
    Job job{x, is_bfloat16, n, STELLARATOR_SELECT(isa, squares_range), std::vector<double>(blocks)};
    const auto run = [](void* context, int64_t i, int) {
        Job& job = *static_cast<Job*>(context);
        const int64_t end = std::min((i + 1) * kBlock, job.n);
        job.sums[i] = job.range(job.x, job.is_bfloat16, i * kBlock, end);
    };
    parallel_for(blocks, threads, run, &job);
    double sum = 0.0;
    for (const double partial : job.sums) sum += partial;
    return sum;
}

}  // namespace stellarator

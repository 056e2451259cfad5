#include "cross_entropy.h"

#include <algorithm>

#include "parallel.h"

namespace stellarator {
namespace {

constexpr int64_t kElements = 1 << 17;  // of a task, about

struct Job {
    const CrossEntropy& call;
    int64_t rows;  // of a task
    Isa isa;
};

void run(void* context, int64_t i, int) {
    const Job& job = *static_cast<Job*>(context);
    const int64_t begin = i * job.rows, end = std::min(begin + job.rows, job.call.N);
    STELLARATOR_SELECT(job.isa, cross_entropy_rows)(job.call, begin, end);
}

}  // namespace

void cross_entropy(const CrossEntropy& call, int threads, Isa isa) {
    Job job{call, std::max<int64_t>(1, kElements / call.V), isa};
    parallel_for((call.N + job.rows - 1) / job.rows, threads, run, &job);
}

}  // namespace stellarator

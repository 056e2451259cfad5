#include "rope.h"

#include <algorithm>

#include "parallel.h"

namespace stellarator {
namespace {

constexpr int64_t kElements = 1 << 15;  // of a task, or one token

struct Job {
    const Rope& call;
    int64_t tokens;  // of a task
    void (*rotate)(const Rope&, int64_t, int64_t);
};

}  // namespace

void rope(const Rope& call, int threads, Isa isa) {
    const int64_t width = std::max<int64_t>(1, (call.q.count + call.k.count) * call.D);
    const int64_t tokens = std::max<int64_t>(1, kElements / width);
    Job job{call, tokens, STELLARATOR_SELECT(isa, rotate_tokens)};
    const auto run = [](void* context, int64_t i, int) {
        const Job& job = *static_cast<Job*>(context);
        job.rotate(job.call, i * job.tokens, std::min((i + 1) * job.tokens, job.call.M));
    };
    parallel_for((call.M + tokens - 1) / tokens, threads, run, &job);
}

}  // namespace stellarator

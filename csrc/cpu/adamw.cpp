#include "adamw.h"

#include <algorithm>

#include "parallel.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace stellarator {
namespace {

// While it lives, subnormal numbers count as zero on this thread. The first moment of a weight that
// gets no gradient decays to 1e-45 and stays there, and x86 takes 5 to 20 times as long for such
// operands (measured, docs/LOG.md); next to eps they change nothing.
class FlushSubnormals {
public:
    FlushSubnormals() {
#if defined(__SSE__)
        saved_ = _mm_getcsr();
        _mm_setcsr(saved_ | 0x8040u);  // flush results to zero, read operands as zero
#endif
    }
    ~FlushSubnormals() {
#if defined(__SSE__)
        _mm_setcsr(saved_);
#endif
    }
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;

private:
    unsigned saved_ = 0;
};

// Elements per task: 30 bytes each, so about half a megabyte.
constexpr int64_t kBlock = 16384;

struct Job {
    const AdamW& update;
    void (*range)(const AdamW&, int64_t, int64_t);
};

}  // namespace

void adamw(const AdamW& update, int threads, Isa isa) {
    Job job{update, STELLARATOR_SELECT(isa, adamw_range)};
    const auto run = [](void* context, int64_t i, int) {
        const Job& job = *static_cast<Job*>(context);
        const FlushSubnormals flush;
        job.range(job.update, i * kBlock, std::min((i + 1) * kBlock, job.update.n));
    };
    parallel_for((update.n + kBlock - 1) / kBlock, threads, run, &job);
}

}  // namespace stellarator

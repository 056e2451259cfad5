#include "attention.h"

#include <algorithm>
#include <utility>

#include "parallel.h"
#include "rows.h"

namespace stellarator {
namespace {

Plan make_plan(const Attention& call) {
    Plan plan{call, round_up(call.D, 32), 1, {}, 0, nullptr};
    const auto add = [&plan](Sequence sequence) {
        if (sequence.T == 0) return;
        sequence.first_block = plan.blocks;
        plan.blocks += round_up(sequence.S, kKeys) / kKeys;
        plan.sequences.push_back(sequence);
    };
    if (call.cu_seqlens == nullptr) {
        for (int64_t b = 0; b < call.B; ++b) add({b, 0, call.T, 0, call.S, 0});
        return plan;
    }
    for (int64_t i = 0; i < call.documents; ++i) {
        const int64_t start = call.cu_seqlens[i], length = call.cu_seqlens[i + 1] - start;
        add({0, start, length, start, length, 0});
    }
    return plan;
}

// Tasks that share the heads of a group: as few as keep the largest task below a quarter of what
// one thread has to do.
int64_t shares_of(const Plan& plan, int threads) {
    int64_t largest = 0, total = 0;
    for (const Sequence& sequence : plan.sequences) {
        const int64_t work = sequence.T * sequence.S;
        largest = std::max(largest, work);
        total += work;
    }
    if (total == 0) return 1;
    const double wanted = 4.0 * threads * largest / (static_cast<double>(plan.call.G) * total);
    const int64_t heads = plan.call.H / plan.call.G;
    return std::clamp<int64_t>(static_cast<int64_t>(wanted + 0.999), 1, heads);
}

// Floats of dk, and of dv, of one group of a sequence.
int64_t sums_of(const Plan& plan, const Sequence& sequence) {
    return round_up(sequence.S, kKeys) * plan.width;
}

// The workspace after the packed keys and values; bytes, multiples of 64.
struct Layout {
    int64_t sums = 0;        // where sums of dk and dv begin
    int64_t sums_size = 0;   // of each thread; 0: every task has its own
    int64_t own = 0;         // where the scratch of thread 0 begins
    int64_t own_size = 0;    // of each thread
    int64_t size = 0;        // of it all
};

Layout layout_of(const Plan& plan, int threads, int64_t work, bool backward) {
    const int64_t W = plan.width, keys = plan.blocks * plan.call.G * kKeys;
    int64_t T = 0, longest = 0;
    for (const Sequence& sequence : plan.sequences) {
        T = std::max(T, round_up(sequence.T, kQueries));
        longest = std::max(longest, sums_of(plan, sequence));
    }
    Layout layout;
    layout.sums = layout.own = round_up(keys * W * work * (backward ? 3 : 2), 64);
    int64_t own = kQueries * W * (2 * work + 8) + kKeys * kQueries * (4 + work);
    if (backward) {
        if (plan.shares == 1) {
            layout.sums_size = 2 * longest * 4;
            layout.own += threads * layout.sums_size;
        } else {
            layout.own += 2 * keys * W * plan.shares * 4;
        }
        own = T * (W * (4 * work + 4) + 8) + kQueries * W * 4 + kKeys * kQueries * (8 + 3 * work);
    }
    own = std::max(own, kKeys * W * work);         // what pack_keys needs
    layout.own_size = round_up(own, 64) + 64 * 16;  // every part begins on a line of its own
    layout.size = layout.own + threads * layout.own_size;
    return layout;
}

struct Task {
    const Sequence* sequence;
    int64_t head;   // backward: the group
    int64_t block;  // of queries; backward: the share
};

struct Job {
    const Plan& plan;
    const Layout& layout;
    Isa isa;
    bool backward;
    std::vector<Task> tasks;

    void* scratch(int thread) const {
        return plan.shared + layout.own + thread * layout.own_size;
    }
    // dk of a share of a group; its dv follows.
    float* sums(const Sequence& sequence, int64_t group, int64_t share, int thread) const {
        unsigned char* base = plan.shared + layout.sums;
        if (plan.shares == 1) return reinterpret_cast<float*>(base + thread * layout.sums_size);
        const int64_t before = sequence.first_block * kKeys * plan.width * plan.call.G;
        const int64_t number = group * plan.shares + share;
        return reinterpret_cast<float*>(base) +
               2 * (before * plan.shares + number * sums_of(plan, sequence));
    }
    void finish(const Sequence& sequence, int64_t group, int64_t k0, int64_t count,
                const float* dk) const {
        const int64_t size = sums_of(plan, sequence);
        STELLARATOR_SELECT(isa, finish_keys)
        (plan, sequence, group, k0, count, dk, dk + size, 2 * size);
    }
};

void pack(void* context, int64_t i, int thread) {
    const Job& job = *static_cast<Job*>(context);
    STELLARATOR_SELECT(job.isa, pack_keys)(job.plan, i, job.backward, job.scratch(thread));
}

void forward(void* context, int64_t i, int thread) {
    const Job& job = *static_cast<Job*>(context);
    const Task& task = job.tasks[i];
    STELLARATOR_SELECT(job.isa, forward_task)
    (job.plan, *task.sequence, task.head, task.block, job.scratch(thread));
}

void backward(void* context, int64_t i, int thread) {
    const Job& job = *static_cast<Job*>(context);
    const auto [sequence, group, share] = job.tasks[i];
    float* dk = job.sums(*sequence, group, share, thread);
    STELLARATOR_SELECT(job.isa, backward_task)
    (job.plan, *sequence, group, share, job.scratch(thread), dk,
     dk + sums_of(job.plan, *sequence));
    if (job.plan.shares == 1) job.finish(*sequence, group, 0, sequence->S, dk);
}

// One block of keys of one group: adds the shares.
void finish(void* context, int64_t i, int) {
    const Job& job = *static_cast<Job*>(context);
    const auto [sequence, group, block] = job.tasks[i];
    const int64_t k0 = block * kKeys;
    job.finish(*sequence, group, k0, std::min(kKeys, sequence->S - k0),
               job.sums(*sequence, group, 0, 0));
}

int64_t workspace(const Attention& call, int threads, Isa isa, bool backward) {
    Plan plan = make_plan(call);
    if (backward) plan.shares = shares_of(plan, threads);
    return layout_of(plan, threads, STELLARATOR_SELECT(isa, work_bytes)(call.is_bfloat16), backward)
        .size;
}

}  // namespace

int64_t attention_forward_workspace(const Attention& call, int threads, Isa isa) {
    return workspace(call, threads, isa, false);
}

int64_t attention_backward_workspace(const Attention& call, int threads, Isa isa) {
    return workspace(call, threads, isa, true);
}

void attention_forward(const Attention& call, void* workspace, int threads, Isa isa) {
    Plan plan = make_plan(call);
    plan.shared = static_cast<unsigned char*>(workspace);
    const int64_t work = STELLARATOR_SELECT(isa, work_bytes)(call.is_bfloat16);
    const Layout layout = layout_of(plan, threads, work, false);
    Job job{plan, layout, isa, false, {}};
    parallel_for(plan.blocks * call.G, threads, pack, &job);
    // Heads of a group together, as they read the same keys; the longest rows of keys first.
    for (const Sequence& sequence : plan.sequences) {
        for (int64_t group = 0; group < call.G; ++group) {
            for (int64_t block = (sequence.T - 1) / kQueries; block >= 0; --block) {
                for (int64_t i = 0; i < call.H / call.G; ++i) {
                    job.tasks.push_back({&sequence, group * (call.H / call.G) + i, block});
                }
            }
        }
    }
    parallel_for(static_cast<int64_t>(job.tasks.size()), threads, forward, &job);
}

void attention_backward(const Attention& call, void* workspace, int threads, Isa isa) {
    Plan plan = make_plan(call);
    plan.shares = shares_of(plan, threads);
    plan.shared = static_cast<unsigned char*>(workspace);
    const int64_t work = STELLARATOR_SELECT(isa, work_bytes)(call.is_bfloat16);
    const Layout layout = layout_of(plan, threads, work, true);
    Job job{plan, layout, isa, true, {}};
    parallel_for(plan.blocks * call.G, threads, pack, &job);
    for (const Sequence& sequence : plan.sequences) {
        for (int64_t i = 0; i < call.G * plan.shares; ++i) {
            job.tasks.push_back({&sequence, i / plan.shares, i % plan.shares});
        }
    }
    const auto longer = [](const Task& a, const Task& b) {
        return a.sequence->T * a.sequence->S > b.sequence->T * b.sequence->S;
    };
    std::stable_sort(job.tasks.begin(), job.tasks.end(), longer);
    parallel_for(static_cast<int64_t>(job.tasks.size()), threads, backward, &job);
    if (plan.shares == 1) return;
    job.tasks.clear();
    for (const Sequence& sequence : plan.sequences) {
        for (int64_t block = 0; block * kKeys < sequence.S; ++block) {
            for (int64_t group = 0; group < call.G; ++group) {
                job.tasks.push_back({&sequence, group, block});
            }
        }
    }
    parallel_for(static_cast<int64_t>(job.tasks.size()), threads, finish, &job);
}

}  // namespace stellarator

// Threads: torch's own OpenMP team where there is one, else std::thread.
//
// Linking OpenMP here would load a second runtime beside torch's: two thread pools for one set of
// cores. Threads of our own are slower too: after a parallel region the threads of libgomp spin for
// milliseconds waiting for the next one, and hold the cores that ours want. AdamW right after a
// matrix product of torch, 2 cores, 0.2, 2 and 12.6 million elements: 0.30, 0.92, 7.5 ms on torch's
// team, 0.45, 1.64, 9.1 ms on std::thread (Xeon with AVX-512, November 2026; where other processes
// compete for the cores, std::thread wins instead, as its waiting threads sleep).
// So the region is started by the runtime that torch has loaded. GOMP_parallel is its stable entry
// point, exported by libgomp, LLVM's libomp and Intel's libiomp5 alike, and nothing is linked.
#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace stellarator {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// GOMP_parallel as libtorch_cpu.so sees it; null where torch is built without OpenMP.
GompParallel torch_parallel() {
#if defined(__linux__)
    static const GompParallel found = [] {
        void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
        void* symbol = torch == nullptr ? nullptr : dlsym(torch, "GOMP_parallel");
        return reinterpret_cast<GompParallel>(symbol);
    }();
    return found;
#else
    return nullptr;
#endif
}

struct Loop {
    void (*run)(void*, int64_t, int);
    void* context;
    int64_t tasks;
    std::atomic<int64_t> next{0};
    std::atomic<int> threads{0};
};

// One thread's share: takes tasks until none is left.
void work(void* pointer) {
    Loop& loop = *static_cast<Loop*>(pointer);
    const int thread = loop.threads++;
    for (int64_t i = loop.next++; i < loop.tasks; i = loop.next++) {
        loop.run(loop.context, i, thread);
    }
}

}  // namespace

const char* threads_of() { return torch_parallel() != nullptr ? "torch" : "std::thread"; }

void parallel_for(int64_t tasks, int threads, void (*run)(void*, int64_t, int), void* context) {
    const int64_t team = std::min<int64_t>(tasks, std::max(threads, 1));
    if (team <= 1) {
        for (int64_t i = 0; i < tasks; ++i) run(context, i, 0);
        return;
    }
    Loop loop;
    loop.run = run;
    loop.context = context;
    loop.tasks = tasks;
    if (const GompParallel parallel = torch_parallel()) {
        parallel(work, &loop, static_cast<unsigned>(team), 0);
        return;
    }
    std::vector<std::thread> helpers;
    for (int64_t i = 1; i < team; ++i) helpers.emplace_back(work, &loop);
    work(&loop);
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace stellarator

// A parallel loop over tasks that does not bring a second OpenMP runtime into the process.
#pragma once

#include <cstdint>

namespace stellarator {

// Calls run(context, i, thread) once for every i in [0, tasks), from at most `threads` threads, in
// any order. Returns when all calls have returned. `run` must not throw. Tasks are handed out one
// by one, lowest first, so which thread gets which is a matter of luck: give each task its own
// output, and use `thread`, in [0, threads), for scratch memory only.
void parallel_for(int64_t tasks, int threads, void (*run)(void* context, int64_t i, int thread),
                  void* context);

// Whose threads are used: "torch" (its OpenMP team) or "std::thread".
const char* threads_of();

}  // namespace stellarator

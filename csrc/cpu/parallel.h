// A parallel loop over tasks that does not bring a second OpenMP runtime into the process.
#pragma once

#include <cstdint>

namespace stellarator {

// Calls run(context, i) once for every i in [0, tasks), from at most `threads` threads, in any
// order. Returns when all calls have returned. `run` must not throw. Tasks are handed out one by
// one, so the number of threads must not change any result: give each task its own output.
void parallel_for(int64_t tasks, int threads, void (*run)(void* context, int64_t i), void* context);

// Whose threads are used: "torch" (its OpenMP team) or "std::thread".
const char* threads_of();

}  // namespace stellarator

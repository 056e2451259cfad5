#include "arena.h"

#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace stellarator {
namespace {

constexpr int64_t kGranule = 4096;

struct Arena {
    std::mutex mutex;
    char* base = nullptr;
    std::map<int64_t, int64_t> gaps, blocks;  // offset -> bytes
    ArenaState state{0, 0, 0, 0};

    Arena() {
#if defined(__linux__)
        rlimit limit;
        // Where addresses are limited they are not ours to reserve.
        if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY) return;
        const int64_t size = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
        void* range = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (range == MAP_FAILED) return;
        madvise(range, size, MADV_HUGEPAGE);  // best effort
        base = static_cast<char*>(range);
        gaps[0] = state.reserved = size;
#endif
    }
};

// Never destroyed: tensors may be freed while the process ends.
Arena& arena() {
    static Arena* const only = [] {
        Arena* made = new Arena;
#if defined(__linux__)
        // A child of fork must not find the lock held by a thread that it does not have.
        pthread_atfork([] { arena().mutex.lock(); }, [] { arena().mutex.unlock(); },
                       [] { arena().mutex.unlock(); });
#endif
        return made;
    }();
    return *only;
}

}  // namespace

void* arena_allocate(int64_t bytes) {
    Arena& a = arena();
    const int64_t size = (bytes + kGranule - 1) / kGranule * kGranule;
    const std::lock_guard<std::mutex> lock(a.mutex);
    for (auto gap = a.gaps.begin(); gap != a.gaps.end(); ++gap) {
        const auto [offset, room] = *gap;
        if (room < size) continue;
        a.gaps.erase(gap);
        if (room > size) a.gaps[offset + size] = room - size;
        a.blocks[offset] = size;
        a.state.used += size;
        if (a.state.used > a.state.peak) a.state.peak = a.state.used;
        if (offset + size > a.state.high) a.state.high = offset + size;
        return a.base + offset;
    }
    return nullptr;
}

void arena_free(void* block) {
    Arena& a = arena();
    const std::lock_guard<std::mutex> lock(a.mutex);
    const auto found = a.blocks.find(static_cast<char*>(block) - a.base);
    if (found == a.blocks.end()) {  // memory is damaged: going on would damage more
        std::fputs("stellarator: arena_free of an address that is no block\n", stderr);
        std::abort();
    }
    auto [offset, size] = *found;
    a.blocks.erase(found);
    a.state.used -= size;
    const auto after = a.gaps.find(offset + size);
    if (after != a.gaps.end()) {
        size += after->second;
        a.gaps.erase(after);
    }
    const auto next = a.gaps.lower_bound(offset);
    if (next != a.gaps.begin()) {
        const auto before = std::prev(next);
        if (before->first + before->second == offset) {
            before->second += size;
            return;
        }
    }
    a.gaps[offset] = size;
}

void arena_trim() {
    Arena& a = arena();
    const std::lock_guard<std::mutex> lock(a.mutex);
    const auto last = a.blocks.rbegin();
    const int64_t end = last == a.blocks.rend() ? 0 : last->first + last->second;
#if defined(__linux__)
    if (end < a.state.high) madvise(a.base + end, a.state.high - end, MADV_DONTNEED);
#endif
    a.state.high = end;
}

ArenaState arena_state() {
    Arena& a = arena();
    const std::lock_guard<std::mutex> lock(a.mutex);
    return a.state;
}

void arena_reset_peak() {
    Arena& a = arena();
    const std::lock_guard<std::mutex> lock(a.mutex);
    a.state.peak = a.state.used;
}

}  // namespace stellarator

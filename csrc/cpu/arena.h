// Memory of large tensors, used again and again.
//
// The C library maps every large block anew and gives it back at once, so a training step touches
// fresh pages for each of its tensors: a fifth of a step of a small model went into page faults.
// Here one range of addresses is reserved for good. A block takes the lowest gap that holds it; a
// freed one joins the gaps beside it. Pages that were touched stay, at most as many as the highest
// block ever reached, and so a run needs little more than its tensors at their peak; arena_trim
// gives back those above the last block.
#pragma once

#include <cstdint>

namespace stellarator {

struct ArenaState {
    int64_t reserved;  // bytes of addresses; 0: there is no arena
    int64_t used;      // bytes of blocks now
    int64_t high;      // the highest end of a block since arena_trim: what may be resident
    int64_t peak;      // the most bytes of blocks since arena_reset_peak
};

// `bytes` aligned to 4096, or null: no arena on this machine, or no gap. Any thread may call these.
void* arena_allocate(int64_t bytes);
void arena_free(void* block);  // a null or foreign address ends the process
void arena_trim();             // pages above the last block go back to the system
ArenaState arena_state();
void arena_reset_peak();

}  // namespace stellarator

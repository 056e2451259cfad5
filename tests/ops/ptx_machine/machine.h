// A block of warps that take turns.
#pragma once

#include "engines.h"

struct Machine : Engines {
    const Ins* code;
    std::mt19937_64 random;
    u32 counts[16], generations[16];  // of the barriers of a block
    std::vector<Tensor> loads;        // by TMA, under way
    s64 executed = 0, limit;
    int now_pc = 0, now_warp = 0;
    u32 threads, ctaid[3], nctaid[3];

    enum Result { kOn, kYield, kBlocked, kDone };

    Result execute(Warp& w, const Ins& i, u32 m);
    Result run(Warp& w, int turns);
    void jump(Warp& w, u32 m, u32 taken, int pc, int target);
    void start(Warp& w, int id);
    void block(u32 x, u32 y, u32 z);
};

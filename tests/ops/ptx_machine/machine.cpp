// Runs the instruction table of one kernel (reader.py) on the CPU, a block after the other.
//
// A warp has 32 lanes in step; where they part, those with the lowest instruction go first, so that
// they meet again. Warps take turns of a random number of instructions. What the hardware does in
// its own time happens as late as it may: copies by cp.async when they are waited for, products of
// warpgroups likewise, copies by TMA at random, or when every warp waits.
#include "machine.h"

void Machine::jump(Warp& w, u32 m, u32 taken, int pc, int target) {
    if (!w.parted) {
        if (taken == m || !taken) {
            w.pc = taken ? target : pc + 1;
            return;
        }
        w.parted = true;
    }
    for (int l = 0; l < kLanes; l++)
        if (m >> l & 1) w.lane_pc[l] = taken >> l & 1 ? target : pc + 1;
}

Machine::Result Machine::run(Warp& w, int turns) {
    now_warp = w.id;
    while (turns-- > 0) {
        int pc = w.pc;
        u32 m = w.live;
        if (w.parted) {
            pc = INT32_MAX;
            for (int l = 0; l < kLanes; l++)
                if ((w.live & ~w.parked) >> l & 1) pc = std::min(pc, w.lane_pc[l]);
            if (pc == INT32_MAX) fault("lanes of a warp that wait for each other");
            m = 0;
            for (int l = 0; l < kLanes; l++)
                if ((w.live >> l & 1) && w.lane_pc[l] == pc) m |= 1u << l;
            if (m == w.live) w.parted = false, w.pc = pc, w.parked = 0;
        }
        const Ins& i = code[pc];
        now_pc = pc;
        if (w.parted && i.together) {
            w.parked |= m;
            continue;
        }
        u32 e = m;
        if (i.guard != -1) {
            u32 p = pred(w, i.guard);
            e &= i.neg ? ~p : p;
        }
        if (++executed > limit) fault("more than %lld instructions", (long long)limit);
        if (i.op == o_bra) {
            jump(w, m, e, pc, i.m[0]);
            continue;
        }
        if (i.op == o_brx) {
            if (m != e) fault("a brx for a part of a warp");
            u32 target = get<u32>(reg(w, operands[i.first]), __builtin_ctz(m));
            for (int l = 0; l < kLanes; l++)
                if ((m >> l & 1) && get<u32>(reg(w, operands[i.first]), l) != target)
                    fault("a brx that parts a warp");
            if (target >= u32(i.m[1])) fault("a brx past its table");
            jump(w, m, m, pc, operands[i.m[0] + target]);
            continue;
        }
        if (!w.parted)
            w.pc = pc + 1;
        else
            for (int l = 0; l < kLanes; l++)
                if (m >> l & 1) w.lane_pc[l] = pc + 1;
        if (!e) continue;
        if (i.op == o_ret) {
            if (!w.parted && e != m) {
                w.parted = true;
                std::fill(w.lane_pc, w.lane_pc + kLanes, pc + 1);
            }
            w.live &= ~e;
            if (!w.live) return kDone;
            continue;
        }
        Result r = execute(w, i, e);
        if (r != kOn) return r;
    }
    return kOn;
}

void Machine::start(Warp& w, int id) {
    w.id = id;
    w.pc = 0;
    w.live = ~0u;
    w.parted = false;
    w.barrier = -1;
    w.copies.clear();
    w.products.clear();
    w.stores.clear();
    w.store_groups.clear();
    w.fenced = w.parked = 0;
    w.copy_group = w.product_group = w.stores_open = 0;
    for (u32 l = 0; l < kLanes; l++) {  // as _SPECIAL of reader.py
        const u32 special[] = {
            id * kLanes + l, 0,        0,         threads,   1,         1, ctaid[0],
            ctaid[1],        ctaid[2], nctaid[0], nctaid[1], nctaid[2], l, u32(id)};
        for (size_t k = 0; k < std::size(special); k++) set<u32>(w.regs + 128 * k, l, special[k]);
    }
}

void Machine::block(u32 x, u32 y, u32 z) {
    ctaid[0] = x, ctaid[1] = y, ctaid[2] = z;
    std::fill(shared.begin(), shared.end(), 0xff);
    std::fill(written.begin(), written.end(), 0);
    clock = 0;
    std::memset(counts, 0, sizeof counts);
    std::memset(generations, 0, sizeof generations);
    loads.clear();
    const int n = int(warps.size());
    const int turns[] = {8, 60, 500, 20000}, longest = turns[random() % 4];  // of a block its own
    int left = n, idle = 0;
    std::vector<int> order(n);
    for (int k = 0; k < n; k++) start(warps[k], k), order[k] = k;
    while (left) {
        bool progress = false;
        if (random() % 2) std::shuffle(order.begin(), order.end(), random);
        for (int k : order) {
            Warp& w = warps[k];
            if (!w.live) continue;
            if (w.barrier >= 0) {
                if (generations[w.barrier] == u32(w.generation)) continue;
                w.barrier = -1;
            }
            s64 before = executed;
            Result r = run(w, 1 + random() % longest);
            if (r != kYield || executed - before > 8) progress = true;
            if (r == kDone) {
                if (!w.products.empty())
                    fault("the end of a warp whose products were not waited for");
                if (!w.stores.empty())
                    fault("the end of a warp whose TMA stores were not waited for");
                left--;
            }
        }
        // Copies by TMA come in any order; one comes for sure where nothing else goes on.
        bool came = false;
        for (size_t count = loads.size(); count > 0 && (progress || !came); count--) {
            if (progress && random() % 8) continue;
            const size_t k = random() % loads.size();
            load_now(loads[k]);
            loads.erase(loads.begin() + k);
            came = true;
        }
        progress = progress || came;
        idle = progress ? 0 : idle + 1;
        if (idle > 50) {
            std::string where;
            for (auto& w : warps)
                if (w.live)
                    where += " warp " + std::to_string(w.id) +
                             (w.barrier >= 0 ? " at barrier " + std::to_string(w.barrier)
                                             : " at instruction " + std::to_string(w.pc)) +
                             ",";
            fault("a deadlock:%s", where.substr(0, 300).c_str());
        }
    }
    if (!loads.empty()) fault("the end of a block whose TMA loads nobody waited for");
}

// Runs a kernel; 0, or 1 with a message, the block and the instruction (counts[1]). counts[0] is
// the number of instructions.
extern "C" int emulate(const s32* code, const s32* operands, const char* constants,
                       int register_bytes, int shared_bytes, int local_bytes, int threads,
                       const u32* grid, const u8* params, const u64* ranges, int num_ranges,
                       u64 seed, s64 limit, char* message, s64* counts) {
    Machine machine;
    machine.code = reinterpret_cast<const Ins*>(code);
    machine.operands = operands;
    machine.constants = constants;
    machine.params = params;
    machine.ranges = ranges;
    machine.num_ranges = num_ranges;
    machine.threads = threads;
    machine.local_bytes = local_bytes;
    machine.limit = limit;
    machine.random.seed(seed);
    machine.shared.resize(shared_bytes);
    machine.writer.resize(shared_bytes);
    machine.written.resize(shared_bytes);
    machine.local.resize(size_t(local_bytes) * threads);
    machine.warps.resize(threads / kLanes);
    std::vector<char> registers(size_t(register_bytes) * machine.warps.size(), char(0xff));
    for (size_t k = 0; k < machine.warps.size(); k++)
        machine.warps[k].regs = registers.data() + size_t(register_bytes) * k;
    std::copy(grid, grid + 3, machine.nctaid);
    u32 x = 0, y = 0, z = 0;
    int failed = 0;
    try {
        for (z = 0; z < grid[2]; z++)
            for (y = 0; y < grid[1]; y++)
                for (x = 0; x < grid[0]; x++) machine.block(x, y, z);
    } catch (const Fault& error) {
        failed = 1;
        std::snprintf(message, 1000, "block (%u, %u, %u), warp %d: %s", x, y, z, machine.now_warp,
                      error.what());
    }
    counts[0] = machine.executed;
    counts[1] = machine.now_pc;
    return failed;
}

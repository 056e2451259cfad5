// What each instruction does.
#include "machine.h"

Machine::Result Machine::execute(Warp& w, const Ins& i, u32 m) {
    const s32* o = operands + i.first;
    auto R = [&](int k) { return reg(w, o[k]); };
    if (compute(w, i, m)) return kOn;
    switch (i.op) {
        case o_nop:
        case o_converge:
            return kOn;
        case o_ld_param:
        case o_ld:
            load(w, i, m);
            return kOn;
        case o_st:
            store(w, i, m);
            return kOn;
        case o_add_atomic:
            add_atomic(w, i, m);
            return kOn;
        case o_cp_async:
            each(m, [&](int l) {
                Copy c{address(w, o[0], i.m[1], 4, l), address(w, o[1], i.m[2], 8, l), i.m[0],
                       int(get<u32>(R(2), l)), w.copy_group};
                if (c.to % i.m[0] || (c.read && c.of % i.m[0]))
                    fault("a cp.async that is not aligned");
                in_shared(c.to, c.bytes, "cp.async");
                if (c.read < 0 || c.read > c.bytes)
                    fault("a cp.async of %d bytes that reads %d", c.bytes, c.read);
                w.copies.push_back(c);
            });
            return kOn;
        case o_cp_async_commit:
            w.copy_group++;
            return kOn;
        case o_cp_async_wait:
            while (!w.copies.empty() && w.copies.front().group < w.copy_group - i.m[0]) {
                copy_now(w, w.copies.front());
                w.copies.pop_front();
            }
            return kOn;
        case o_ldmatrix:
        case o_stmatrix:
            matrices(w, i, m);
            return kOn;

        case o_shfl: {  // bfly, idx
            int n = i.m[1];
            const char *a = R(n), *b = R(n + 1), *c = R(n + 2);
            u32 values[kLanes], p = 0;
            for (int l = 0; l < kLanes; l++) {
                u32 by = get<u32>(b, l) & 31, clamp = get<u32>(c, l), segment = clamp >> 8 & 31;
                int most = (l & segment) | (clamp & 31 & ~segment);
                int from = i.m[0] == 0 ? l ^ by : (l & segment) | (by & ~segment);
                bool ok = from <= most;
                if (!ok) from = l;
                if ((m >> l & 1) && !(m >> from & 1))
                    fault("a shuffle that reads lane %d, which does not take part", from);
                values[l] = get<u32>(a, from);
                p |= u32(ok) << l;
            }
            lanes<u32>(m, R(0), [&](int l) { return values[l]; });
            if (n == 2) put_pred(R(1), m, p);
            return kOn;
        }
        case o_redux: {  // min, max
            s64 found = i.m[0] == 0 ? INT64_MAX : INT64_MIN;
            each(m, [&](int l) {
                u32 bits = get<u32>(R(1), l);
                s64 y = i.type == t_s32 ? s64(s32(bits)) : s64(bits);
                found = i.m[0] == 0 ? std::min(found, y) : std::max(found, y);
            });
            lanes<u32>(m, R(0), [=](int) { return u32(found); });
            return kOn;
        }
        case o_elect: {
            int leader = __builtin_ctz(m);
            lanes<u32>(m, R(0), [=](int) { return u32(leader); });
            put_pred(R(1), m, 1u << leader);
            return kOn;
        }
        case o_bar: {
            if (m != w.live) fault("a barrier that a part of a warp comes to");
            u32 id = get<u32>(R(0), 0), wanted = get<u32>(R(1), 0);
            if (id > 15) fault("barrier %u", id);
            if (!wanted) {
                for (auto& other : warps) wanted += other.live ? kLanes : 0;
            }
            counts[id] += kLanes;
            if (counts[id] > wanted)
                fault("%u threads at barrier %u for %u", counts[id], id, wanted);
            if (counts[id] == wanted) {
                counts[id] = 0;
                generations[id]++;
                return kOn;
            }
            w.barrier = id;
            w.generation = generations[id];
            return kBlocked;
        }

        case o_mma:
            multiply(w, i, m);
            return kOn;
        case o_wgmma: {
            if (m != ~0u) fault("wgmma of a part of a warp");
            u64 a = i.m[2] ? 0 : get<u64>(R(2), 0), b = get<u64>(R(1), 0);
            w.products.push_back({&i, a, b, pred(w, o[0]) & 1, w.product_group, seen_by(w)});
            return kOn;
        }
        case o_wgmma_commit:
            w.product_group++;
            return kOn;
        case o_wgmma_wait:
            while (!w.products.empty() && w.products.front().group < w.product_group - i.m[0]) {
                product_now(w, w.products.front());
                w.products.pop_front();
            }
            return kOn;
        case o_mbarrier_init:
            each(m, [&](int l) {
                Barrier& b = barrier(address(w, o[0], i.m[0], 4, l));
                b.pending = b.expected = u16(get<u32>(R(1), l));
                b.phase_and_bytes = 0;
            });
            return kOn;
        case o_mbarrier_arrive:
            each(m, [&](int l) {
                arrive(barrier(address(w, o[0], i.m[0], 4, l)), get<u32>(R(1), l));
            });
            return kOn;
        case o_mbarrier_expect:
            each(m, [&](int l) {
                Barrier& b = barrier(address(w, o[0], i.m[0], 4, l));
                b.phase_and_bytes += get<u32>(R(1), l) << 1;
                if (i.m[1]) arrive(b, 1);
            });
            return kOn;
        case o_mbarrier_wait: {
            u32 p = 0;
            each(m, [&](int l) {
                Barrier& b = barrier(address(w, o[1], i.m[0], 4, l));
                p |= u32((b.phase_and_bytes & 1) != s32(get<u32>(R(2), l) & 1)) << l;
            });
            put_pred(R(0), m, p);
            return p == m ? kOn : kYield;
        }
        case o_fence_async:
            w.fenced = clock;
            return kOn;
        case o_tma_load:
            loads.push_back(tensor(w, i, m, true));
            return kOn;
        case o_tma_store:
            w.stores.push_back(tensor(w, i, m, false));
            w.stores_open++;
            return kOn;
        case o_tma_commit:
            w.store_groups.push_back(w.stores_open);
            w.stores_open = 0;
            return kOn;
        case o_tma_wait:
            while (int(w.store_groups.size()) > i.m[0]) {
                for (int k = 0; k < w.store_groups.front(); k++) {
                    store_now(w.stores.front());
                    w.stores.pop_front();
                }
                w.store_groups.erase(w.store_groups.begin());
            }
            return kOn;
        case o_map_replace:
            replace(w, i, m);
            return kOn;
        case o_map_copy: {
            int l = __builtin_ctz(m);
            u64 of = address(w, o[1], i.m[1], 8, l) & ~kShared;
            std::memcpy(global(address(w, o[0], i.m[0], 8, l), 128, "a tensor map"),
                        in_shared(of, 128, "a tensor map"), 128);
            return kOn;
        }
    }
    fault("operation %d", i.op);
}

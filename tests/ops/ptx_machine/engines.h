// What works beside the threads: products of warps and warpgroups, barriers in shared memory, TMA.
#pragma once

#include "memory.h"

struct Engines : Memory {
    // 16 x 16 elements in the registers of a warp: of A, for mma and wgmma.
    void gather(Warp& w, const s32* a, bool brain, float A[16][16]) {
        for (int l = 0; l < kLanes; l++)
            for (int r = 0; r < 4; r++)
                for (int h = 0; h < 2; h++)
                    A[l / 4 + 8 * (r & 1)][l % 4 * 2 + h + 8 * (r / 2)] =
                        half(get<u32>(reg(w, a[r]), l) >> 16 * h, brain);
    }
    void multiply(Warp& w, const Ins& i, u32 m) {  // mma.sync m16n8k16
        if (m != ~0u) fault("mma of a part of a warp");
        float A[16][16], B[16][8], result[4][kLanes];
        const bool brain = i.type == t_bf16;
        const s32 *d = operands + i.first, *a = d + 4, *b = a + 4, *c = b + 2;
        gather(w, a, brain, A);
        for (int l = 0; l < kLanes; l++)
            for (int r = 0; r < 2; r++)
                for (int h = 0; h < 2; h++)
                    B[l % 4 * 2 + h + 8 * r][l / 4] =
                        half(get<u32>(reg(w, b[r]), l) >> 16 * h, brain);
        for (int l = 0; l < kLanes; l++)
            for (int r = 0; r < 4; r++) {
                int row = l / 4 + 8 * (r / 2), column = l % 4 * 2 + r % 2;
                double sum = get<float>(reg(w, c[r]), l);
                for (int k = 0; k < 16; k++) sum += double(A[row][k]) * B[k][column];
                result[r][l] = float(sum);
            }
        for (int r = 0; r < 4; r++) std::memcpy(reg(w, d[r]), result[r], 128);
    }
    static u64 swizzled(u64 at, int bits) { return at ^ ((at >> 7 & ((1u << bits) - 1)) << 4); }
    // Element (row, k) of a matrix that a descriptor names, 16 bits an element.
    float element(const Product& p, u64 d, int row, int k, bool trans, bool brain) {
        u64 start = (d & 0x3fff) << 4, lead = (d >> 16 & 0x3fff) << 4,
            stride = (d >> 32 & 0x3fff) << 4;
        int mode = d >> 62;
        int pitch = mode == 1 ? 128 : mode == 2 ? 64 : 32, bits = mode == 1 ? 3 : mode == 2 ? 2 : 1;
        if (d >> 49 & 7 || (mode == 0 && trans)) fault("a product with such a descriptor");
        u64 at;
        if (mode == 0)
            at = start + row / 8 * stride + row % 8 * 16 + k / 8 * lead + k % 8 * 2;
        else if (trans)
            at = swizzled(start + row / (pitch / 2) * lead + k / 8 * stride + k % 8 * pitch +
                              row % (pitch / 2) * 2,
                          bits);
        else
            at = swizzled(start + row / 8 * stride + row % 8 * pitch + k * 2, bits);
        u16 x;
        std::memcpy(&x, in_shared(at, 2, "wgmma"), 2);
        see(at, p.seen);
        return half(x, brain);
    }
    void product_now(Warp& w, const Product& p) {
        const Ins& i = *p.ins;
        int N = i.m[0], K = i.m[1];
        bool from_registers = i.m[2], brain = i.type == t_bf16;
        const s32* a = operands + i.first + 2;
        const s32* d = a + (from_registers ? 4 : 1);
        float A[16][16];
        static thread_local float B[16][256], C[16][256];
        int rows = w.id % 4 * 16;
        if (from_registers) {
            gather(w, a, brain, A);
        } else {
            for (int r = 0; r < 16; r++)
                for (int k = 0; k < K; k++) A[r][k] = element(p, p.a, rows + r, k, i.m[3], brain);
        }
        for (int n = 0; n < N; n++)
            for (int k = 0; k < K; k++) B[k][n] = element(p, p.b, n, k, i.m[4], brain);
        for (int r = 0; r < N / 2; r++) {
            const char* in = reg(w, d[r]);
            for (int l = 0; l < kLanes; l++)
                C[l / 4 + 8 * (r / 2 % 2)][r / 4 * 8 + l % 4 * 2 + r % 2] =
                    p.scale ? get<float>(in, l) : 0.f;
        }
        for (int r = 0; r < 16; r++)
            for (int k = 0; k < K; k++)
                for (int n = 0; n < N; n++) C[r][n] += A[r][k] * B[k][n];
        for (int r = 0; r < N / 2; r++) {
            char* out = reg(w, d[r]);
            for (int l = 0; l < kLanes; l++)
                set<float>(out, l, C[l / 4 + 8 * (r / 2 % 2)][r / 4 * 8 + l % 4 * 2 + r % 2]);
        }
    }

    struct Barrier {
        u16 pending, expected;
        s32 phase_and_bytes;  // lowest bit: phase
    };
    Barrier& barrier(u64 at) {
        if (at % 8) fault("an mbarrier that is not aligned");
        return *reinterpret_cast<Barrier*>(in_shared(at, 8, "mbarrier"));
    }
    void settle(Barrier& b) {
        if (b.pending == 0 && b.phase_and_bytes >> 1 == 0) {
            b.phase_and_bytes = ~b.phase_and_bytes & 1;
            b.pending = b.expected;
        }
    }
    void arrive(Barrier& b, u32 count) {
        if (count > b.pending)
            fault("%u arrivals at an mbarrier that waits for %u of %u", count, b.pending,
                  b.expected);
        b.pending -= count;
        settle(b);
    }

    void check_map(const Map& t) {
        if (t.address % 16) fault("a tensor map whose address is not aligned to 16 bytes");
        for (int k = 0; k + 1 < t.rank; k++)
            if (t.stride[k] % 16 || !t.stride[k])
                fault("a tensor map with a stride of %llu bytes", (unsigned long long)t.stride[k]);
        int inner = t.box[0] * kElement[t.type], span = 16 << t.swizzle;
        if (inner % 16) fault("a tensor map with %d bytes in a row of the box", inner);
        if (t.swizzle && inner > span)
            fault("a tensor map with %d bytes in a row, more than its swizzle spans", inner);
        for (int k = 0; k < t.rank; k++)
            if (!t.box[k] || t.box[k] > 256 || !t.dim[k])
                fault("a tensor map with box %u of %u", t.box[k], t.dim[k]);
    }
    // Calls f(shared offset, global address or 0) for each element of a box; its bytes.
    template <class F>
    int elements_of_box(const Tensor& x, F f) {
        const Map& t = x.map;
        int size = kElement[t.type], inner = t.box[0] * size, n = 1;
        for (int k = 1; k < t.rank; k++) n *= t.box[k];
        for (int row = 0; row < n; row++) {
            int rest = row;
            u64 at = t.address;
            bool inside = true;
            for (int k = 1; k < t.rank; k++) {
                s64 c = s64(x.place[k]) + rest % t.box[k];
                rest /= t.box[k];
                inside = inside && c >= 0 && c < t.dim[k];
                at += c * t.stride[k - 1];
            }
            for (u32 e = 0; e < t.box[0]; e++) {
                s64 c = s64(x.place[0]) + e;
                u64 here = swizzled(x.shared + u64(row) * inner + e * size, t.swizzle);
                f(here, inside && c >= 0 && c < t.dim[0] ? at + c * size : 0);
            }
        }
        return n * inner;
    }
    void load_now(const Tensor& x) {
        int size = kElement[x.map.type];
        int bytes = elements_of_box(x, [&](u64 to, u64 of) {
            u8* p = in_shared(to, size, "TMA");
            soil(0, to, size, true);
            if (of)
                std::memcpy(p, global(of, size, "TMA"), size);
            else
                std::memset(p, 0, size);
        });
        Barrier& b = barrier(x.bar);
        b.phase_and_bytes -= bytes << 1;
        settle(b);
    }
    void store_now(const Tensor& x) {
        int size = kElement[x.map.type];
        elements_of_box(x, [&](u64 of, u64 to) {
            const u8* p = in_shared(of, size, "TMA");
            see(of, x.seen);
            if (to) std::memcpy(global(to, size, "TMA"), p, size);
        });
    }
    Tensor tensor(Warp& w, const Ins& i, u32 m, bool load) {
        if (__builtin_popcount(m) != 1) fault("a TMA copy by %d threads", __builtin_popcount(m));
        int l = __builtin_ctz(m);
        const s32* o = operands + i.first;
        Tensor x{};
        x.seen = seen_by(w);
        x.shared = address(w, o[0], i.m[1], 4, l);
        if (x.shared % 128)
            fault("a TMA copy at %llu of shared memory, not a multiple of 128",
                  (unsigned long long)x.shared);
        u64 map = get<u64>(reg(w, o[1]), l);
        if (map % 64) fault("a tensor map that is not aligned to 64 bytes");
        std::memcpy(&x.map, reinterpret_cast<void*>(map), sizeof(Map));
        if (x.map.rank != i.m[0])
            fault("a tensor map of %d dimensions used for %d", x.map.rank, i.m[0]);
        check_map(x.map);
        if (load) x.bar = address(w, o[2], i.m[2], 4, l);
        for (int k = 0; k < i.m[0]; k++) x.place[k] = get<s32>(reg(w, o[(load ? 3 : 2) + k]), l);
        return x;
    }
    void replace(Warp& w, const Ins& i, u32 m) {
        int l = __builtin_ctz(m);
        u64 at = address(w, operands[i.first], i.m[2], 8, l) & ~kShared;
        Map& t = *reinterpret_cast<Map*>(in_shared(at, 128, "tensormap.replace"));
        const char* p = reg(w, operands[i.first + 1]);
        u64 x = i.m[3] == 8 ? get<u64>(p, l) : get<u32>(p, l);
        int k = i.m[1];
        switch (i.m[0]) {  // as _FIELDS of instructions.py
            case 0:
                t.address = x;
                break;
            case 1:
                t.rank = u8(x + 1);
                break;
            case 2:
                t.box[k] = u32(x);
                break;
            case 3:
                t.dim[k] = u32(x);
                break;
            case 4:
                t.stride[k] = x;
                break;
            case 6:
                t.type = u8(x);
                break;
            case 8:
                t.swizzle = u8(x);
                break;
            default:  // steps between elements, interleaving, what stands for missing elements
                if (x != (i.m[0] == 5)) fault("a tensor map that is not plain");
        }
    }
};

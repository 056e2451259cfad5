// Global, shared and local memory: loads, stores, atomics, cp.async, ldmatrix and stmatrix.
//
// Global accesses have to lie in a tensor that the launch was given. Of each byte of shared memory
// it is known who wrote it when: an asynchronous operation needs a fence.proxy.async behind what
// threads wrote, its own or the writer's, and nobody may write what it still reads.
#pragma once

#include "arithmetic.h"

struct Memory : Arithmetic {
    const u64* ranges;  // begin and end of each tensor
    int num_ranges, local_bytes;
    // Who wrote each byte of shared memory: a warp, by itself or by cp.async; behind that
    // Triton 3.6 has products read without a fence (3.9 has one), so none is asked for.
    static constexpr u8 kCopied = 0x80;
    std::vector<u8> shared, writer, local;
    std::vector<u32> written;  // when each byte was; the clock counts writes
    u32 clock = 0;
    int last_range = 0;
    std::vector<Warp> warps;

    u8* global(u64 at, int bytes, const char* what) {
        if (num_ranges) {
            auto in = [&](int i) { return at >= ranges[2 * i] && at + bytes <= ranges[2 * i + 1]; };
            if (!in(last_range)) {
                int i = 0;
                while (i < num_ranges && !in(i)) i++;
                if (i == num_ranges)
                    fault("%s of %d bytes outside of every tensor, at %#llx", what, bytes,
                          (unsigned long long)at);
                last_range = i;
            }
        }
        return reinterpret_cast<u8*>(at);
    }
    u8* in_shared(u64 at, int bytes, const char* what) {
        if (at + bytes > shared.size())
            fault("%s of %d bytes at %llu of %zu bytes of shared memory", what, bytes,
                  (unsigned long long)at, shared.size());
        return shared.data() + at;
    }
    u8* memory(Warp& w, int lane, int space, u64 at, int bytes, const char* what) {
        if (at % bytes)
            fault("%s of %d bytes at %#llx, which is not aligned", what, bytes,
                  (unsigned long long)at);
        if (space == 0) {
            if (at & kShared) {
                space = 2;
                at &= ~kShared;
            } else if (at & kLocal) {
                space = 3;
                at &= ~kLocal;
            } else
                space = 1;
        }
        if (space == 1) return global(at, bytes, what);
        if (space == 2) return in_shared(at, bytes, what);
        if (at + bytes > u64(local_bytes)) fault("%s outside of local memory", what);
        return local.data() + (u64(w.id) * kLanes + lane) * local_bytes + at;
    }
    u64 address(Warp& w, int offset, int plus, int bytes, int lane) {
        const char* p = reg(w, offset);
        return bytes == 8 ? get<u64>(p, lane) + s64(plus) : u64(u32(get<u32>(p, lane) + plus));
    }

    void soil(int warp, u32 at, int bytes, bool copied = false) {
        std::memset(writer.data() + at, warp | (copied ? kCopied : 0), bytes);
        std::fill_n(written.data() + at, bytes, ++clock);
    }
    // What an asynchronous operation may read, at the time at which it is issued.
    Seen seen_by(const Warp& w) {
        Seen seen{clock, w.id, {}};
        for (const Warp& other : warps) seen.fenced.push_back(other.fenced);
        return seen;
    }
    // An asynchronous operation, issued at one time and with the fences of that time, reads a byte.
    void see(u64 at, const Seen& seen) {
        const u32 when = written[at], warp = writer[at] & ~kCopied;
        if (when > seen.issued)
            fault(
                "shared byte %llu was written by warp %u while an asynchronous operation reads it",
                (unsigned long long)at, warp);
        if (!(writer[at] & kCopied) && when > seen.fenced[seen.warp] && when > seen.fenced[warp])
            fault(
                "an asynchronous operation reads shared byte %llu, which warp %u wrote, without a "
                "fence.proxy.async",
                (unsigned long long)at, warp);
    }

    void load(Warp& w, const Ins& i, u32 m) {
        int bytes = size_of(i.type), n = i.count - 1;
        each(m, [&](int l) {
            u64 at = address(w, operands[i.first], i.m[1], i.m[2], l);
            const u8* p;
            if (i.op == o_ld_param)
                p = params + at;
            else
                p = memory(w, l, i.m[0], at, bytes * n, "a load");
            for (int k = 0; k < n; k++, p += bytes) {
                char* d = reg(w, operands[i.first + 1 + k]);
                u64 x = 0;
                std::memcpy(&x, p, bytes);
                bool is_signed = i.type == t_s8 || i.type == t_s16 || i.type == t_s32;
                if (is_signed) x = u64(s64(x << (64 - 8 * bytes)) >> (64 - 8 * bytes));
                if (i.m[4])
                    set<u64>(d, l, x);
                else
                    set<u32>(d, l, u32(x));
            }
        });
    }
    void store(Warp& w, const Ins& i, u32 m) {
        int bytes = size_of(i.type), n = i.count - 1;
        each(m, [&](int l) {
            u64 at = address(w, operands[i.first], i.m[1], i.m[2], l);
            u8* p = memory(w, l, i.m[0], at, bytes * n, "a store");
            if (p >= shared.data() && p < shared.data() + shared.size())
                soil(w.id, u32(p - shared.data()), bytes * n);
            for (int k = 0; k < n; k++, p += bytes) {
                const char* s = reg(w, operands[i.first + 1 + k]);
                u64 x = bytes == 8 || i.m[3] >> k & 1 ? get<u64>(s, l) : get<u32>(s, l);
                std::memcpy(p, &x, bytes);
            }
        });
    }
    void add_atomic(Warp& w, const Ins& i, u32 m) {
        if (i.type != t_f32 && i.type != t_s32 && i.type != t_u32)
            fault("an atomic sum of this type");
        int n = i.m[3], results = i.m[4];
        each(m, [&](int l) {
            u64 at = address(w, operands[i.first], i.m[1], i.m[2], l);
            u8* p = memory(w, l, i.m[0], at, 4 * n, "an atomic sum");
            for (int k = 0; k < n; k++, p += 4) {
                const char* s = reg(w, operands[i.first + 1 + results + k]);
                u32 old;
                std::memcpy(&old, p, 4);
                if (i.type == t_f32) {
                    float sum;
                    std::memcpy(&sum, p, 4);
                    sum += get<float>(s, l);
                    std::memcpy(p, &sum, 4);
                } else {
                    u32 sum = old + get<u32>(s, l);
                    std::memcpy(p, &sum, 4);
                }
                if (k < results) set<u32>(reg(w, operands[i.first + 1 + k]), l, old);
            }
        });
    }
    void copy_now(Warp& w, const Copy& c) {
        u8* to = in_shared(c.to, c.bytes, "cp.async");
        if (c.read) std::memcpy(to, global(c.of, c.read, "cp.async"), c.read);
        std::memset(to + c.read, 0, c.bytes - c.read);
        soil(w.id, u32(c.to), c.bytes, true);
    }
    void matrices(Warp& w, const Ins& i, u32 m) {  // ldmatrix, stmatrix
        if (m != ~0u) fault("ldmatrix or stmatrix of a part of a warp");
        int n = i.count - 1;
        for (int k = 0; k < n; k++) {
            char* r = reg(w, operands[i.first + 1 + k]);
            u16 tile[8][8];
            u8* rows[8];
            for (int j = 0; j < 8; j++) {
                u64 at = address(w, operands[i.first], i.m[1], i.m[2], 8 * k + j);
                if (at % 16) fault("a row of a matrix that is not aligned to 16 bytes");
                rows[j] = in_shared(at, 16, "ldmatrix or stmatrix");
            }
            if (i.op == o_ldmatrix) {
                for (int j = 0; j < 8; j++) std::memcpy(tile[j], rows[j], 16);
                for (int l = 0; l < kLanes; l++) {
                    int a = l / 4, b = l % 4 * 2;
                    u32 x = i.m[0] ? tile[b][a] | u32(tile[b + 1][a]) << 16
                                   : tile[a][b] | u32(tile[a][b + 1]) << 16;
                    set<u32>(r, l, x);
                }
            } else {
                for (int l = 0; l < kLanes; l++) {
                    int a = l / 4, b = l % 4 * 2;
                    u32 x = get<u32>(r, l);
                    (i.m[0] ? tile[b][a] : tile[a][b]) = u16(x);
                    (i.m[0] ? tile[b + 1][a] : tile[a][b + 1]) = u16(x >> 16);
                }
                for (int j = 0; j < 8; j++) {
                    std::memcpy(rows[j], tile[j], 16);
                    soil(w.id, u32(rows[j] - shared.data()), 16);
                }
            }
        }
    }
};

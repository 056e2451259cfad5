// Numbers, instructions, and warps with their registers: 32 lanes of 4 or 8 bytes each, a predicate
// is one word. Operations and types are numbered as in instructions.py (OPS, TYPES).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <iterator>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

enum Op { OPS };
enum Type { TYPES };

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f16 = _Float16;

struct bf16 {
    u16 bits;
};
inline float wide(bf16 x) {
    u32 bits = u32(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline float wide(f16 x) { return float(x); }
inline bf16 to_bf16(float x) {
    u32 bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {0x7fff};
    return {u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct Ins {
    int op, type, guard, neg, m[5], first, count;
    int together;  // whether all lanes of a warp execute it at once
};

struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};
template <class... A>
[[noreturn]] void fault(const char* form, A... values) {
    char text[400];
    std::snprintf(text, sizeof text, form, values...);
    throw Fault(text);
}

constexpr u64 kShared = 1ull << 60, kLocal = 1ull << 61;
constexpr int kLanes = 32, kSink = 1 << 30;

struct Map {  // what stands in the 128 bytes of a tensor map
    u64 address, stride[4];
    u32 dim[5], box[5];
    u8 rank, type, swizzle;
};
static_assert(sizeof(Map) <= 128);
const int kElement[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};

struct Copy {
    u64 to, of;
    int bytes, read, group;
};
// The time at which something was issued, by which warp, and every warp's last fence until then.
struct Seen {
    u32 issued;
    int warp;
    std::vector<u32> fenced;
};
struct Product {
    const Ins* ins;
    u64 a, b;
    u32 scale;
    int group;
    Seen seen;
};
struct Tensor {
    Map map;
    u64 shared, bar;
    s32 place[5];
    Seen seen;
};

struct Warp {
    char* regs;
    int id, pc = 0;
    u32 live = ~0u;
    bool parted = false;
    int lane_pc[kLanes];
    int barrier = -1, generation = 0;  // waits for a barrier of the block
    std::deque<Copy> copies;
    int copy_group = 0;
    std::deque<Product> products;
    int product_group = 0;
    std::deque<Tensor> stores;
    std::vector<int> store_groups;
    int stores_open = 0;
    u32 fenced = 0;  // what was written until then its asynchronous operations may read
    u32 parked = 0;  // lanes that wait for the rest of the warp at a collective instruction
};

// Registers of a warp, and constants, by the offsets of reader.py.
struct Registers {
    const s32* operands;
    const char* constants;
    char sink[256];  // takes results that nobody wants

    char* reg(Warp& w, int offset) {
        if (offset == kSink) return sink;
        return offset >= 0 ? w.regs + offset : const_cast<char*>(constants) + (-offset - 1);
    }
    template <class T>
    static T get(const char* p, int lane) {
        T x;
        std::memcpy(&x, p + lane * (sizeof(T) == 8 ? 8 : 4), sizeof(T));
        return x;
    }
    template <class T>
    static void set(char* p, int lane, T x) {
        if constexpr (sizeof(T) >= 4) {
            std::memcpy(p + lane * sizeof(T), &x, sizeof(T));
        } else {
            u32 full = 0;
            std::memcpy(&full, &x, sizeof(T));
            std::memcpy(p + lane * 4, &full, 4);
        }
    }
    // Calls f(lane) for the lanes of a mask.
    template <class F>
    static void each(u32 m, F f) {
        for (int l = 0; l < kLanes; l++)
            if (m >> l & 1) f(l);
    }
    static int size_of(int type) {
        switch (type) {
            case t_b8:
            case t_u8:
            case t_s8:
                return 1;
            case t_b16:
            case t_u16:
            case t_s16:
            case t_f16:
            case t_bf16:
                return 2;
            case t_b64:
            case t_u64:
            case t_s64:
            case t_f64:
                return 8;
        }
        return 4;
    }
};

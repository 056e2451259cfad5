// Instructions on the bits of a word.
#include "arithmetic.h"

bool Arithmetic::bits(Warp& w, const Ins& i, u32 m) {
    auto R = [&](int k) { return reg(w, operands[i.first + k]); };
    switch (i.op) {
        case o_bfe: {
            const char *a = R(1), *b = R(2), *c = R(3);
            auto extract = [&](auto zero) {
                using T = decltype(zero);
                constexpr int bits = 8 * sizeof(T);
                lanes<T>(m, R(0), [=](int l) {
                    int at = get<u32>(b, l) & 0xff, n = get<u32>(c, l) & 0xff;
                    T x = get<T>(a, l);
                    if (n == 0) return T(0);
                    int last = std::min(at + n - 1, bits - 1);
                    T sign = std::is_signed_v<T> && (x >> last & 1) ? T(-1) : T(0);
                    std::make_unsigned_t<T> y = 0;
                    for (int k = 0; k < bits; k++)
                        y |= std::make_unsigned_t<T>(
                                 (k < n && at + k < bits ? x >> (at + k) : sign) & 1)
                             << k;
                    return T(y);
                });
            };
            switch (i.type) {
                case t_u32:
                    extract(u32(0));
                    break;
                case t_s32:
                    extract(s32(0));
                    break;
                case t_u64:
                    extract(u64(0));
                    break;
                default:
                    extract(s64(0));
            }
            return true;
        }
        case o_bfi: {
            const char *a = R(1), *b = R(2), *c = R(3), *d = R(4);
            auto insert = [&](auto zero) {
                using T = decltype(zero);
                constexpr u32 bits = 8 * sizeof(T);
                lanes<T>(m, R(0), [=](int l) {
                    u32 at = get<u32>(c, l) & 0xff, n = get<u32>(d, l) & 0xff;
                    T x = get<T>(b, l), y = get<T>(a, l);
                    for (u32 k = 0; k < n && at + k < bits; k++)
                        x = (x & ~(T(1) << (at + k))) | (y >> k & 1) << (at + k);
                    return x;
                });
            };
            if (size_of(i.type) == 8)
                insert(u64(0));
            else
                insert(u32(0));
            return true;
        }
        case o_bfind: {
            const char* a = R(1);
            bool is_long = size_of(i.type) == 8, is_signed = i.type == t_s32 || i.type == t_s64,
                 amount = i.m[0];
            lanes<u32>(m, R(0), [=](int l) {
                s64 x = is_long     ? get<s64>(a, l)
                        : is_signed ? s64(get<s32>(a, l))
                                    : s64(get<u32>(a, l));
                if (is_signed && x < 0) x = ~x;
                if (!x) return ~0u;
                u32 at = 63 - __builtin_clzll(x);
                return amount ? (is_long ? 63 : 31) - at : at;
            });
            return true;
        }
        case o_lop3: {
            const char *a = R(1), *b = R(2), *c = R(3);
            int table = i.m[0];
            lanes<u32>(m, R(0), [=](int l) {
                u32 x = get<u32>(a, l), y = get<u32>(b, l), z = get<u32>(c, l), out = 0;
                for (int k = 0; k < 8; k++)
                    if (table >> k & 1)
                        out |= (k & 4 ? x : ~x) & (k & 2 ? y : ~y) & (k & 1 ? z : ~z);
                return out;
            });
            return true;
        }
        case o_shf: {
            const char *a = R(1), *b = R(2), *c = R(3);
            bool right = i.m[0], wrap = i.m[1];
            lanes<u32>(m, R(0), [=](int l) {
                u64 x = u64(get<u32>(b, l)) << 32 | get<u32>(a, l);
                u32 by = wrap ? get<u32>(c, l) & 31 : std::min(get<u32>(c, l), 32u);
                return right ? u32(x >> by) : u32(x << by >> 32);
            });
            return true;
        }
        case o_prmt: {
            const char *a = R(1), *b = R(2), *c = R(3);
            lanes<u32>(m, R(0), [=](int l) {
                u64 x = u64(get<u32>(b, l)) << 32 | get<u32>(a, l);
                u32 how = get<u32>(c, l), out = 0;
                for (int k = 0; k < 4; k++) {
                    u32 s = how >> 4 * k & 15;
                    u32 byte = x >> 8 * (s & 7) & 0xff;
                    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
                    out |= byte << 8 * k;
                }
                return out;
            });
            return true;
        }
        case o_popc:
        case o_clz: {
            const char* a = R(1);
            bool is_long = size_of(i.type) == 8, count = i.op == o_popc;
            lanes<u32>(m, R(0), [=](int l) {
                u64 x = is_long ? get<u64>(a, l) : get<u32>(a, l);
                if (count) return u32(__builtin_popcountll(x));
                return u32(x ? __builtin_clzll(x) - (is_long ? 0 : 32) : is_long ? 64 : 32);
            });
            return true;
        }
        case o_brev:
            one<u32>(w, i, m, [](u32 a) {
                u32 y = 0;
                for (int k = 0; k < 32; k++) y |= (a >> k & 1) << (31 - k);
                return y;
            });
            return true;
    }
    return false;
}

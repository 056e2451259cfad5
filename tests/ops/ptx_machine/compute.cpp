// What the instructions do that look at one lane at a time.
#include "arithmetic.h"

bool Arithmetic::compute(Warp& w, const Ins& i, u32 m) {
    const s32* o = operands + i.first;
    auto R = [&](int k) { return reg(w, o[k]); };
    switch (i.op) {
        case o_mov:
            by_width(i.type, [&](auto zero) {
                using T = decltype(zero);
                lanes<T>(m, R(0), [s = R(1)](int l) { return get<T>(s, l); });
            });
            return true;
        case o_pack: {
            int n = i.count - 1, bits = 8 * i.m[0];
            each(m, [&](int l) {
                u64 x = 0;
                for (int k = 0; k < n; k++) {
                    u64 part = bits == 32 ? get<u32>(R(1 + k), l) : get<u16>(R(1 + k), l);
                    if (bits == 8) part &= 0xff;
                    x |= part << bits * k;
                }
                if (n * bits == 64)
                    set<u64>(R(0), l, x);
                else
                    set<u32>(R(0), l, u32(x));
            });
            return true;
        }
        case o_unpack: {
            int n = i.count - 1, bits = 8 * i.m[0];
            each(m, [&](int l) {
                u64 x = n * bits == 64 ? get<u64>(R(0), l) : get<u32>(R(0), l);
                for (int k = 0; k < n; k++)
                    set<u32>(R(1 + k), l, u32(x >> bits * k & ((1ull << bits) - 1)));
            });
            return true;
        }
        case o_add:
            if (is_float(i.type))
                floats(w, i, m, 2, [](auto a, auto b, auto) { return a + b; });
            else
                integers(w, i, m, [](auto a, auto b) { return a + b; });
            return true;
        case o_sub:
            if (is_float(i.type))
                floats(w, i, m, 2, [](auto a, auto b, auto) { return a - b; });
            else
                integers(w, i, m, [](auto a, auto b) { return a - b; });
            return true;
        case o_mul:
            if (is_float(i.type))
                floats(w, i, m, 2, [](auto a, auto b, auto) { return a * b; });
            else
                integers(w, i, m, [](auto a, auto b) { return a * b; });
            return true;
        case o_mul_hi:
            integers(w, i, m, [](auto a, auto b) {
                using T = decltype(a);
                using Twice = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
                return T(Twice(a) * b >> 8 * sizeof(T));
            });
            return true;
        case o_mul_wide:
        case o_mad_wide:
            by_integer(i.type, [&](auto zero) {
                using T = decltype(zero);
                using Twice = std::conditional_t<sizeof(T) == 2, u32, u64>;  // signs wrap around
                const char *a = R(1), *b = R(2), *c = i.op == o_mad_wide ? R(3) : nullptr;
                lanes<Twice>(m, R(0), [=](int l) {
                    return Twice(get<T>(a, l)) * Twice(get<T>(b, l)) + (c ? get<Twice>(c, l) : 0);
                });
            });
            return true;
        case o_mad:
            by_width(i.type, [&](auto zero) {
                using T = decltype(zero);
                const char *a = R(1), *b = R(2), *c = R(3);
                lanes<T>(m, R(0),
                         [=](int l) { return T(u64(get<T>(a, l)) * get<T>(b, l) + get<T>(c, l)); });
            });
            return true;
        case o_fma:
            floats(w, i, m, 3, [](auto a, auto b, auto c) { return std::fma(a, b, c); });
            return true;
        case o_div:
            if (is_float(i.type))
                floats(w, i, m, 2, [](auto a, auto b, auto) { return a / b; });
            else
                integers(w, i, m, [](auto a, auto b) -> decltype(a) {
                    using T = decltype(a);
                    return b == 0 ? T(-1) : std::is_signed_v<T> && b == T(-1) ? T(0 - a) : T(a / b);
                });
            return true;
        case o_rem:
            integers(w, i, m, [](auto a, auto b) -> decltype(a) {
                using T = decltype(a);
                return b == 0 ? a : std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
            });
            return true;
        case o_min:
            if (!is_float(i.type))
                integers(w, i, m, [](auto a, auto b) { return a < b ? a : b; });
            else if (i.m[1])
                floats(w, i, m, 2, [](auto a, auto b, auto) {
                    return a != a ? a : b != b ? b : std::fmin(a, b);
                });
            else
                floats(w, i, m, 2, [](auto a, auto b, auto) { return std::fmin(a, b); });
            return true;
        case o_max:
            if (!is_float(i.type))
                integers(w, i, m, [](auto a, auto b) { return a > b ? a : b; });
            else if (i.m[1])
                floats(w, i, m, 2, [](auto a, auto b, auto) {
                    return a != a ? a : b != b ? b : std::fmax(a, b);
                });
            else
                floats(w, i, m, 2, [](auto a, auto b, auto) { return std::fmax(a, b); });
            return true;
        case o_neg:
            if (is_float(i.type))
                floats(w, i, m, 1, [](auto a, auto, auto) { return -a; });
            else
                integer(w, i, m, [](auto a) { return 0 - u64(a); });
            return true;
        case o_abs:
            if (is_float(i.type))
                floats(w, i, m, 1, [](auto a, auto, auto) { return std::fabs(a); });
            else
                integer(w, i, m, [](auto a) { return a < 0 ? 0 - u64(a) : u64(a); });
            return true;
        case o_ex2:
            floats(w, i, m, 1, [](auto a, auto, auto) { return std::exp2(a); });
            return true;
        case o_rcp:
            floats(w, i, m, 1, [](auto a, auto, auto) { return 1 / a; });
            return true;
        case o_sqrt:
            floats(w, i, m, 1, [](auto a, auto, auto) { return std::sqrt(a); });
            return true;
        case o_not:
            if (i.type == t_pred)
                put_pred(R(0), m, ~pred(w, o[1]));
            else
                integer(w, i, m, [](auto a) { return ~a; });
            return true;
        case o_and:
            if (i.type == t_pred)
                put_pred(R(0), m, pred(w, o[1]) & pred(w, o[2]));
            else
                integers(w, i, m, [](auto a, auto b) { return a & b; });
            return true;
        case o_or:
            if (i.type == t_pred)
                put_pred(R(0), m, pred(w, o[1]) | pred(w, o[2]));
            else
                integers(w, i, m, [](auto a, auto b) { return a | b; });
            return true;
        case o_xor:
            if (i.type == t_pred)
                put_pred(R(0), m, pred(w, o[1]) ^ pred(w, o[2]));
            else
                integers(w, i, m, [](auto a, auto b) { return a ^ b; });
            return true;
        case o_shl:
        case o_shr: {
            const char *a = R(1), *b = R(2);
            bool left = i.op == o_shl;
            auto shift = [&](auto zero) {
                using T = decltype(zero);
                using U = std::make_unsigned_t<T>;
                constexpr u32 bits = 8 * sizeof(T);
                lanes<T>(m, R(0), [=](int l) {
                    u32 by = get<u32>(b, l);
                    T x = get<T>(a, l);
                    if (left) return by >= bits ? T(0) : T(U(x) << by);
                    return by >= bits ? T(x < 0 ? -1 : 0) : T(x >> by);
                });
            };
            by_integer(i.type, shift);
            return true;
        }
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
            by_integer(i.type, extract);
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
        case o_selp:
            by_width(i.type, [&](auto zero) {
                using T = decltype(zero);
                const char *a = R(1), *b = R(2);
                const u32 p = pred(w, o[3]);
                lanes<T>(m, R(0), [=](int l) { return get<T>(p >> l & 1 ? a : b, l); });
            });
            return true;
        case o_setp: {
            u32 p = 0;
            switch (i.type) {
                case t_f32:
                    p = compared<float>(w, i);
                    break;
                case t_f64:
                    p = compared<double>(w, i);
                    break;
                case t_f16:
                    p = compared<f16, float>(w, i);
                    break;
                case t_bf16:
                    p = compared<bf16>(w, i);
                    break;
                default:
                    by_integer(i.type, [&](auto zero) { p = compared<decltype(zero)>(w, i); });
            }
            put_pred(R(0), m, p);
            return true;
        }
        case o_set_pred:
            put_pred(R(0), m, pred(w, o[1]));
            return true;
        case o_cvt:
            convert(w, i, m);
            return true;
        case o_cvt_pack: {
            const char *a = R(1), *b = R(2);
            bool brain = i.type == t_bf16x2;
            lanes<u32>(m, R(0), [=](int l) {
                float high = get<float>(a, l), low = get<float>(b, l);
                return u32(narrow(high, brain)) << 16 | narrow(low, brain);
            });
            return true;
        }
        case o_cvta: {
            const char* a = R(1);
            u64 base = i.m[1] == 2 ? kShared : i.m[1] == 3 ? kLocal : 0;
            if (i.m[1] == 4) base = reinterpret_cast<u64>(params);
            bool to = i.m[0] && i.m[1] != 4;
            lanes<u64>(m, R(0),
                       [=](int l) { return to ? get<u64>(a, l) & ~base : get<u64>(a, l) + base; });
            return true;
        }
    }
    return false;
}

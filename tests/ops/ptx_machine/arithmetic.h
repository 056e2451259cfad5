// Instructions that look at one lane at a time.
#pragma once

#include "warp.h"

struct Arithmetic : Registers {
    const u8* params;

    // Whether this was such an instruction; then it is done.
    bool compute(Warp& w, const Ins& i, u32 m);

    template <class D, class F>
    void lanes(u32 m, char* d, F f) {
        if (m == ~0u)
            for (int l = 0; l < kLanes; l++) set<D>(d, l, f(l));
        else
            each(m, [&](int l) { set<D>(d, l, f(l)); });
    }
    template <class T, class F>
    void two(Warp& w, const Ins& i, u32 m, F f) {
        const char *a = reg(w, operands[i.first + 1]), *b = reg(w, operands[i.first + 2]);
        lanes<T>(m, reg(w, operands[i.first]),
                 [=](int l) { return T(f(get<T>(a, l), get<T>(b, l))); });
    }
    template <class T, class F>
    void one(Warp& w, const Ins& i, u32 m, F f) {
        const char* a = reg(w, operands[i.first + 1]);
        lanes<T>(m, reg(w, operands[i.first]), [=](int l) { return T(f(get<T>(a, l))); });
    }
    static float flush(float x) {
        return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x;
    }

    template <class F>
    void floats(Warp& w, const Ins& i, u32 m, int arity,
                F f) {  // f of up to three floats or doubles
        const char* s[3];
        for (int k = 0; k < arity; k++) s[k] = reg(w, operands[i.first + 1 + k]);
        for (int k = arity; k < 3; k++) s[k] = s[0];
        char* d = reg(w, operands[i.first]);
        bool ftz = i.m[0];
        switch (i.type) {
            case t_f32:
                if (ftz)
                    return lanes<float>(m, d, [=](int l) {
                        return flush(f(flush(get<float>(s[0], l)), flush(get<float>(s[1], l)),
                                       flush(get<float>(s[2], l))));
                    });
                return lanes<float>(m, d, [=](int l) {
                    return f(get<float>(s[0], l), get<float>(s[1], l), get<float>(s[2], l));
                });
            case t_f64:
                return lanes<double>(m, d, [=](int l) {
                    return f(get<double>(s[0], l), get<double>(s[1], l), get<double>(s[2], l));
                });
            case t_f16:  // double holds every intermediate result of half precision exactly, but
                         // for fma's
                return lanes<f16>(m, d, [=](int l) {
                    return f16(f(double(get<f16>(s[0], l)), double(get<f16>(s[1], l)),
                                 double(get<f16>(s[2], l))));
                });
            case t_bf16:
                return lanes<bf16>(m, d, [=](int l) {
                    return to_bf16(
                        float(f(double(wide(get<bf16>(s[0], l))), double(wide(get<bf16>(s[1], l))),
                                double(wide(get<bf16>(s[2], l))))));
                });
            case t_f16x2:
            case t_bf16x2:
                return lanes<u32>(m, d, [=](int l) {
                    u32 out = 0;
                    for (int h = 0; h < 2; h++) {
                        double x[3];
                        for (int k = 0; k < 3; k++)
                            x[k] = half(get<u32>(s[k], l) >> 16 * h, i.type == t_bf16x2);
                        out |= u32(narrow(f(x[0], x[1], x[2]), i.type == t_bf16x2)) << 16 * h;
                    }
                    return out;
                });
        }
        fault("type of a float operation");
    }
    static float half(u32 bits, bool brain) {
        u16 b = u16(bits);
        if (brain) return wide(bf16{b});
        f16 x;
        std::memcpy(&x, &b, 2);
        return float(x);
    }
    static u16 narrow(double x, bool brain) {
        if (brain) return to_bf16(float(x)).bits;
        f16 y = f16(x);
        u16 b;
        std::memcpy(&b, &y, 2);
        return b;
    }
    static bool is_float(int t) {
        return t == t_f16 || t == t_bf16 || t == t_f32 || t == t_f64 || t == t_f16x2 ||
               t == t_bf16x2;
    }

    // Calls f with a zero of the unsigned integer that is as wide.
    template <class F>
    static void by_width(int type, F f) {
        switch (size_of(type)) {
            case 2:
                return f(u16(0));
            case 4:
                return f(u32(0));
            case 8:
                return f(u64(0));
        }
        fault("a width of %d bytes", size_of(type));
    }
    // The same, of the integer that the type names; bits have no sign.
    template <class F>
    static void by_integer(int type, F f) {
        switch (type) {
            case t_s16:
                return f(s16(0));
            case t_s32:
                return f(s32(0));
            case t_s64:
                return f(s64(0));
        }
        by_width(type, f);
    }
    template <class F>
    void integers(Warp& w, const Ins& i, u32 m, F f) {
        by_integer(i.type, [&](auto zero) { two<decltype(zero)>(w, i, m, f); });
    }
    template <class F>
    void integer(Warp& w, const Ins& i, u32 m, F f) {
        by_integer(i.type, [&](auto zero) { one<decltype(zero)>(w, i, m, f); });
    }

    template <class T>
    static bool compare(int how, T a, T b) {
        bool nan = a != a || b != b;
        switch (how) {  // as _COMPARISONS of instructions.py
            case 0:
                return a == b;
            case 1:
                return !nan && a != b;
            case 2:
                return a < b;
            case 3:
                return a <= b;
            case 4:
                return a > b;
            case 5:
                return a >= b;
            case 6:
                return nan || a == b;
            case 7:
                return nan || a != b;
            case 8:
                return nan || a < b;
            case 9:
                return nan || a <= b;
            case 10:
                return nan || a > b;
            case 11:
                return nan || a >= b;
            case 12:
                return !nan;
            case 13:
                return nan;
        }
        return false;
    }
    template <class T, class W = T>
    u32 compared(Warp& w, const Ins& i) {
        const char *a = reg(w, operands[i.first + 1]), *b = reg(w, operands[i.first + 2]);
        u32 p = 0;
        for (int l = 0; l < kLanes; l++) {
            if constexpr (std::is_same_v<T, bf16>)
                p |= u32(compare(i.m[0], wide(get<T>(a, l)), wide(get<T>(b, l)))) << l;
            else
                p |= u32(compare<W>(i.m[0], W(get<T>(a, l)), W(get<T>(b, l)))) << l;
        }
        return p;
    }
    static void put_pred(char* d, u32 m, u32 p) {
        u32 old;
        std::memcpy(&old, d, 4);
        old = (old & ~m) | (p & m);
        std::memcpy(d, &old, 4);
    }
    u32 pred(Warp& w, int offset) {
        u32 p;
        std::memcpy(&p, reg(w, offset), 4);
        return p;
    }

    static double rounded(double x, int how) {
        switch (how) {
            case 1:
                return std::trunc(x);
            case 2:
                return std::floor(x);
            case 3:
                return std::ceil(x);
        }
        return std::nearbyint(x);
    }
    void convert(Warp& w, const Ins& i, u32 m) {
        char *d = reg(w, operands[i.first]), *s = reg(w, operands[i.first + 1]);
        int of = i.m[0], how = i.m[1];
        bool ftz = i.m[2], integral = i.m[3];
        each(m, [&](int l) {
            if (is_float(of)) {
                double x = of == t_f32   ? get<float>(s, l)
                           : of == t_f64 ? get<double>(s, l)
                           : of == t_f16 ? double(get<f16>(s, l))
                                         : double(wide(get<bf16>(s, l)));
                if (ftz && of == t_f32) x = flush(float(x));
                if (is_float(i.type)) {
                    if (integral) x = rounded(x, how);
                    if (i.type == t_f32)
                        set<float>(d, l, float(x));
                    else if (i.type == t_f64)
                        set<double>(d, l, x);
                    else
                        set<u16>(d, l, narrow(x, i.type == t_bf16));
                    return;
                }
                x = x != x ? 0 : rounded(x, how);
                by_integer(i.type, [&](auto zero) {
                    using T = decltype(zero);
                    constexpr T least = std::numeric_limits<T>::min();
                    constexpr T most = std::numeric_limits<T>::max();
                    set<T>(d, l, x <= double(least) ? least : x >= double(most) ? most : T(x));
                });
                return;
            }
            s64 x = 0;
            if (size_of(of) == 1)
                x = of == t_s8 ? int8_t(get<u16>(s, l)) : u8(get<u16>(s, l));
            else
                by_integer(of, [&](auto zero) { x = s64(get<decltype(zero)>(s, l)); });
            switch (i.type) {
                case t_f32:
                    set<float>(d, l, of == t_u64 ? float(u64(x)) : float(x));
                    break;
                case t_f64:
                    set<double>(d, l, of == t_u64 ? double(u64(x)) : double(x));
                    break;
                case t_f16:
                case t_bf16:
                    set<u16>(d, l, narrow(double(x), i.type == t_bf16));
                    break;
                case t_s8:
                    set<s16>(d, l, int8_t(x));
                    break;
                case t_u8:
                case t_b8:
                    set<u16>(d, l, u8(x));
                    break;
                default:
                    by_integer(i.type,
                               [&](auto zero) { set<decltype(zero)>(d, l, decltype(zero)(x)); });
            }
        });
    }
};

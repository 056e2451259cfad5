#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace stellarator {
namespace {

#if defined(__x86_64__)
// Bit `bit` of a register of CPUID leaf 7; GCC 12's __builtin_cpu_supports knows no AMX.
bool leaf7(unsigned subleaf, int reg, int bit) {
    unsigned registers[4] = {};  // a, b, c, d
    if (!__get_cpuid_count(7, subleaf, &registers[0], &registers[1], &registers[2],
                           &registers[3])) {
        return false;
    }
    return (registers[reg] >> bit & 1u) != 0;
}

// Whether the processor has AMX and Linux lets this process use its 8 KiB of state.
bool permitted_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int kEdx = 3, kAmxBf16 = 22, kAmxTile = 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    static const bool permitted = leaf7(0, kEdx, kAmxBf16) && leaf7(0, kEdx, kAmxTile) &&
                                  syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return permitted;
#else
    return false;
#endif
}
#endif

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
    // These also ask whether the operating system saves the wide registers.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    constexpr int kEax = 0, kAvx512Bf16 = 5;
    if (avx2 && avx512) {
        if (!leaf7(1, kEax, kAvx512Bf16)) return Isa::avx512;
        return permitted_amx() ? Isa::amx : Isa::avx512_bf16;
    }
    if (avx2) return Isa::avx2;
#endif
    return Isa::portable;
}

}  // namespace stellarator

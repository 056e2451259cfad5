// Which instruction sets the kernels were compiled for, and which of them this processor has.
#pragma once

namespace stellarator {

// In ascending order; names match setup.py's ISA_FLAGS and the STELLARATOR_ISA variable.
enum class Isa { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

// The best level that this processor and operating system can run.
Isa best_isa();

}  // namespace stellarator

// Declares one function for every level that is compiled in, in a namespace named like the level.
#if defined(__x86_64__)
#define STELLARATOR_FOR_EACH_ISA(...)      \
    namespace portable { __VA_ARGS__; }    \
    namespace avx2 { __VA_ARGS__; }        \
    namespace avx512 { __VA_ARGS__; }      \
    namespace avx512_bf16 { __VA_ARGS__; } \
    namespace amx { __VA_ARGS__; }
// The function of the level `isa`.
#define STELLARATOR_SELECT(isa, function)                                \
    ((isa) == ::stellarator::Isa::amx           ? amx::function          \
     : (isa) == ::stellarator::Isa::avx512_bf16 ? avx512_bf16::function  \
     : (isa) == ::stellarator::Isa::avx512      ? avx512::function       \
     : (isa) == ::stellarator::Isa::avx2        ? avx2::function         \
                                                : portable::function)
#else
#define STELLARATOR_FOR_EACH_ISA(...) \
    namespace portable { __VA_ARGS__; }
#define STELLARATOR_SELECT(isa, function) ((void)(isa), portable::function)
#endif

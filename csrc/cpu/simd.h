// One body of code for several instruction sets, in one translation unit and without compiler flags: kernels.cpp
// includes the .inl files once for each, in a namespace of its own between SIMD_TARGET_BEGIN and SIMD_TARGET_END.
// SIMD_BYTES is the width of a register, SIMD_NAME torch's name of the instruction set.
//
// Two rules keep code for a newer machine out of an older one: every standard header is included before the first
// target begins (an inline function of theirs compiled for AVX-512 could be the copy that the linker keeps), and
// everything inside has internal linkage.
#pragma once

#define SIMD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SIMD_TARGET_BEGIN(isa) SIMD_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define SIMD_TARGET_END SIMD_PRAGMA(clang attribute pop)
#else
#define SIMD_TARGET_BEGIN(isa) SIMD_PRAGMA(GCC push_options) SIMD_PRAGMA(GCC target(isa))
#define SIMD_TARGET_END SIMD_PRAGMA(GCC pop_options)
#endif

#define XENT_INLINE static inline __attribute__((always_inline))
#define XENT_INLINE_MEMBER inline __attribute__((always_inline))
#define XENT_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__)
#define SIMD_X86 1
#else
#define SIMD_X86 0
#endif

// A store past the caches, and the fence that orders such stores before all later ones. Plain stores where there are
// none.
#if defined(__clang__)
#define SIMD_STREAM(p, v) __builtin_nontemporal_store(v, p)
#elif SIMD_X86
#define SIMD_STREAM(p, v) stream_x86(p, v)
#else
#define SIMD_STREAM(p, v) (*(p) = (v))
#endif
#if SIMD_X86
#define SIMD_FENCE() __builtin_ia32_sfence()
#else
#define SIMD_FENCE() ((void)0)
#endif

// The CPU kernels, compiled once for each instruction set. simd.h says how and why.
#include "kernels.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace xent {
namespace {

#if SIMD_X86
#define SIMD_NAME "AVX512"
#define SIMD_BYTES 64
SIMD_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace avx512 {
#include "dispatch.inl"
}  // namespace avx512
SIMD_TARGET_END
#undef SIMD_NAME
#undef SIMD_BYTES

#define SIMD_NAME "AVX2"
#define SIMD_BYTES 32
SIMD_TARGET_BEGIN("avx2,fma")
namespace avx2 {
#include "dispatch.inl"
}  // namespace avx2
SIMD_TARGET_END
#undef SIMD_NAME
#undef SIMD_BYTES
#endif

#define SIMD_NAME "baseline"
#define SIMD_BYTES 16
namespace baseline {
#include "dispatch.inl"
}  // namespace baseline

}  // namespace

const Kernels& kernels_for(const char* cpu_capability) {
#if SIMD_X86
  if (!std::strcmp(cpu_capability, "AVX512")) return avx512::kKernels;
  if (!std::strcmp(cpu_capability, "AVX2")) return avx2::kKernels;
#endif
  (void)cpu_capability;
  return baseline::kKernels;
}

}  // namespace xent

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

// `forward` and `backward` of one instruction set.
#define XENT_DEFINE_KERNELS(name)                                                           \
  static void forward(const Forward& problem, int64_t begin, int64_t end, Sums& sums) {     \
    problem.arithmetic_in_double ? forward_positions<double>(problem, begin, end, sums)     \
                                 : forward_positions<float>(problem, begin, end, sums);     \
  }                                                                                         \
  static void backward(const Backward& problem, int64_t begin, int64_t end) {               \
    problem.arithmetic_in_double ? backward_positions<double>(problem, begin, end)          \
                                 : backward_positions<float>(problem, begin, end);          \
  }                                                                                         \
  static void sum_weights(const Problem& problem, int64_t begin, int64_t end, Sums& sums) { \
    problem.arithmetic_in_double ? sum_target_weights<double>(problem, begin, end, sums)    \
                                 : sum_target_weights<float>(problem, begin, end, sums);    \
  }                                                                                         \
  static void nll_forward(const Forward& problem, int64_t begin, int64_t end, Sums& sums) { \
    problem.arithmetic_in_double ? forward_nll<double>(problem, begin, end, sums)           \
                                 : forward_nll<float>(problem, begin, end, sums);           \
  }                                                                                         \
  constexpr Kernels kKernels{name,         SIMD_BYTES,    forward,                          \
                             backward,     sum_weights,   nll_forward,                      \
                             backward_nll, add_to_halves, add_scaled_to_halves};

namespace xent {
namespace {

#if SIMD_X86
#define SIMD_BYTES 64
SIMD_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace avx512 {
#include "dispatch.inl"
XENT_DEFINE_KERNELS("AVX512")
}  // namespace avx512
SIMD_TARGET_END
#undef SIMD_BYTES

#define SIMD_BYTES 32
SIMD_TARGET_BEGIN("avx2,fma")
namespace avx2 {
#include "dispatch.inl"
XENT_DEFINE_KERNELS("AVX2")
}  // namespace avx2
SIMD_TARGET_END
#undef SIMD_BYTES
#endif

#define SIMD_BYTES 16
namespace baseline {
#include "dispatch.inl"
XENT_DEFINE_KERNELS("baseline")
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

// The only file that knows which compiler reads a kernel: nvcc, for a GPU, or a C++ compiler, for the emulator in which
// the tests run the same text on the CPU, one fiber for each CUDA thread. Everything beyond plain CUDA C++ (PTX,
// launches, shared memory, clusters, asynchronous copies) has its two halves here.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <vector>

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "cuda_emulator.h"  // tests/cuda_on_cpu
#endif

#include "kernel/scalar_types.h"
#include "plan.h"

#define XENT_DEVICE __device__ __forceinline__

namespace xent::gpu {

// ---- shared memory --------------------------------------------------------------------------------------------------

#if defined(__CUDACC__)
#define XENT_SHARED_ARRAY(T, name, count) __shared__ T name[count]
#define XENT_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#define XENT_SHARED_ARRAY(T, name, count) T* const name = emulator::shared_array<T>(count, #name, __FILE__, __LINE__)
#define XENT_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(emulator::dynamic_shared_memory())
#endif

// ---- 16 bytes at a time ---------------------------------------------------------------------------------------------

// An address modulo 16: two pointers of equal phase can be walked with the same vectors.
XENT_DEVICE uint32_t phase_of(const void* p) { return uint32_t(reinterpret_cast<uintptr_t>(p)) & 15u; }

#if defined(__CUDACC__)

XENT_DEVICE uint4 load_vector(const void* p) { return *static_cast<const uint4*>(p); }
XENT_DEVICE void store_vector(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

// Stores what this kernel does not read again: the first to leave the caches.
XENT_DEVICE void stream_vector(void* p, uint4 v) { __stcs(static_cast<uint4*>(p), v); }

// Copies 16 bytes from global to shared memory, past the registers and the first-level cache.
XENT_DEVICE void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
XENT_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kGroups` of this thread's groups of copies are under way.
template <int kGroups>
XENT_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

#else

inline void* aligned(const void* p) {
  if (phase_of(p) != 0) throw emulator::Error("a vector access at an address that is not a multiple of 16");
  return const_cast<void*>(p);
}
inline uint4 load_vector(const void* p) {
  uint4 v;
  memcpy(&v, aligned(p), sizeof v);
  asm volatile("" ::"m"(v));  // keeps an unused load, for sanitizers
  return v;
}
inline void store_vector(void* p, uint4 v) { memcpy(aligned(p), &v, sizeof v); }
inline void stream_vector(void* p, uint4 v) { store_vector(p, v); }
inline void copy_async(void* shared, const void* global) { emulator::cp_async(shared, global, 16); }
inline void commit_copies() { emulator::cp_async_commit(); }
template <int kGroups>
void wait_for_copies() {
  emulator::cp_async_wait(kGroups);
}

#endif

// ---- elements -------------------------------------------------------------------------------------------------------

// The type in which a position's sums are formed.
template <class T>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::type;

template <class A, class T>
XENT_DEVICE A widen(T x) {
  return A(x);
}

#if defined(__CUDACC__)

XENT_DEVICE float half_to_float(Float16 x) { return __half2float(__half(__half_raw{x.bits})); }
XENT_DEVICE void round_to(float x, Float16& y) { y.bits = __half_as_ushort(__float2half_rn(x)); }
XENT_DEVICE void round_to(float x, BFloat16& y) { y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// Two neighbours as one word, the first in its lower half: one instruction for both.
template <class T>
XENT_DEVICE uint32_t narrow_pair(float low, float high) {
  if constexpr (std::is_same_v<T, Float16>) {
    return bit_cast<uint32_t>(__floats2half2_rn(low, high));
  } else {
    return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
  }
}

// The larger of each of two neighbours; the other one, where one is NaN.
template <class T>
XENT_DEVICE uint32_t max_pair(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<T, Float16>) {
    return bit_cast<uint32_t>(__hmax2(bit_cast<__half2>(a), bit_cast<__half2>(b)));
  } else {
    return bit_cast<uint32_t>(__hmax2(bit_cast<__nv_bfloat162>(a), bit_cast<__nv_bfloat162>(b)));
  }
}

#else

inline float half_to_float(Float16 x) { return to_float(x); }
inline void round_to(float x, Float16& y) { y = to_float16(x); }
inline void round_to(float x, BFloat16& y) { y = to_bfloat16(x); }

template <class T>
inline uint32_t narrow_pair(float low, float high) {
  T pair[2];
  round_to(low, pair[0]);
  round_to(high, pair[1]);
  return uint32_t(pair[0].bits) | uint32_t(pair[1].bits) << 16;
}
template <class T>
inline uint32_t max_pair(uint32_t a, uint32_t b) {
  const auto larger = [](uint32_t x, uint32_t y) { return fmaxf(to_float(T{uint16_t(x)}), to_float(T{uint16_t(y)})); };
  return narrow_pair<T>(larger(a, b), larger(a >> 16, b >> 16));
}

#endif

template <class A>
XENT_DEVICE A widen(Float16 x) {
  return A(half_to_float(x));
}
template <class A>
XENT_DEVICE A widen(BFloat16 x) {
  return A(to_float(x));
}

template <class T, class A>
XENT_DEVICE T narrow(A x) {
  if constexpr (sizeof(T) == 2) {
    T narrowed;
    round_to(float(x), narrowed);
    return narrowed;
  } else {
    return T(x);
  }
}

// ---- elementary functions -------------------------------------------------------------------------------------------

// exp2_fast: in float, the relative error is 2^-22 and results below 2^-126 are zero (PTX ISA, ex2.approx.ftz).
// rounded_product: the compiler may fuse a * b with an addition that relies on the rounding.
// rough_quotient: to a few units in the last place.
#if defined(__CUDACC__)
XENT_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
XENT_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
XENT_DEVICE double rounded_product(double a, double b) { return __dmul_rn(a, b); }
XENT_DEVICE float rough_quotient(float a, float b) { return __fdividef(a, b); }
#else
inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;
}
inline float rounded_product(float a, float b) { return a * b; }
inline double rounded_product(double a, double b) { return a * b; }
inline float rough_quotient(float a, float b) { return a / b; }
#endif
XENT_DEVICE double exp2_fast(double x) { return exp2(x); }
XENT_DEVICE double rough_quotient(double a, double b) { return a / b; }

XENT_DEVICE float log(float x) { return ::logf(x); }
XENT_DEVICE double log(double x) { return ::log(x); }
XENT_DEVICE float expm1(float x) { return ::expm1f(x); }
XENT_DEVICE double expm1(double x) { return ::expm1(x); }
XENT_DEVICE float maximum(float a, float b) { return ::fmaxf(a, b); }  // of a NaN and a number, the number
XENT_DEVICE double maximum(double a, double b) { return ::fmax(a, b); }
XENT_DEVICE float abs(float x) { return ::fabsf(x); }
XENT_DEVICE double abs(double x) { return ::fabs(x); }
XENT_DEVICE float fused(float a, float b, float c) { return ::fmaf(a, b, c); }
XENT_DEVICE double fused(double a, double b, double c) { return ::fma(a, b, c); }

// ---- clusters: blocks that read each other's shared memory (sm_90) --------------------------------------------------

#if defined(__CUDACC__)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
XENT_DEVICE void cluster_barrier() { cooperative_groups::this_cluster().sync(); }
XENT_DEVICE uint32_t cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
XENT_DEVICE uint32_t cluster_blocks() { return cooperative_groups::this_cluster().num_blocks(); }
template <class T>
XENT_DEVICE T* in_block(T* shared, uint32_t rank) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}
#else
XENT_DEVICE void cluster_barrier() { __syncthreads(); }
XENT_DEVICE uint32_t cluster_rank() { return 0; }
XENT_DEVICE uint32_t cluster_blocks() { return 1; }
template <class T>
XENT_DEVICE T* in_block(T* shared, uint32_t) {
  return shared;
}
#endif
#else
inline void cluster_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::cluster_sync(file, line);
}
inline uint32_t cluster_rank() { return emulator::cluster_rank(); }
inline uint32_t cluster_blocks() { return emulator::cluster_size(); }
template <class T>
T* in_block(T* shared, uint32_t rank) {
  return emulator::map_shared_rank(shared, rank);
}
#endif

// ---- kernels that overlap (sm_90) -----------------------------------------------------------------------------------
//
// Between two kernels nothing runs for a microsecond or two, as long as it takes to copy 4 MB. A kernel whose
// LaunchShape says `overlaps` begins once all blocks of the previous one have allowed it, or have ended, and has to
// wait before it touches what that one writes. Earlier kernels have ended: one that is overlapped by the next either
// overlaps none itself or waits for it.

#if defined(__CUDACC__)
XENT_DEVICE void let_next_kernel_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
XENT_DEVICE void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
#else
inline void let_next_kernel_begin() {}
inline void wait_for_previous_kernel() { emulator::wait_for_previous_kernel(); }
#endif

// ---- launches -------------------------------------------------------------------------------------------------------

#if defined(__CUDACC__)

using Status = cudaError_t;
constexpr Status kSuccess = cudaSuccess;

// The first question about a kernel may load it, which a graph that is being captured must not notice.
class Unnoticed {
 public:
  Unnoticed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Unnoticed() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Lets a kernel have all the shared memory that there is, once and for all: another thread's launch of the same kernel
// could take back what a launch sets for itself.
template <auto kernel>
Status allow_shared_memory() {
  static std::atomic<bool> is_allowed[kMostDevices];
  int device = 0, most = 0;
  cudaFuncAttributes attributes{};
  Status status = cudaGetDevice(&device);
  if (status != cudaSuccess || is_allowed[device].load(std::memory_order_relaxed)) return status;
  const Unnoticed unnoticed;
  status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
  most -= int(attributes.sharedSizeBytes);
  if (status == cudaSuccess) status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (status == cudaSuccess) is_allowed[device].store(true, std::memory_order_relaxed);
  return status;
}

// A LaunchShape as CUDA has it.
struct LaunchConfig : cudaLaunchConfig_t {
  cudaLaunchAttribute attributes[2] = {};

  LaunchConfig(const LaunchShape& shape, void* on_stream) : cudaLaunchConfig_t{} {
    gridDim = dim3(unsigned(shape.blocks));
    blockDim = dim3(unsigned(shape.threads));
    dynamicSmemBytes = size_t(shape.shared_bytes);
    stream = static_cast<cudaStream_t>(on_stream);
    attrs = attributes;
    if (shape.cluster > 1) {
      attributes[numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[numAttrs++].val.clusterDim = {unsigned(shape.cluster), 1, 1};
    }
    if (shape.overlaps) {
      attributes[numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
  }
};

template <auto kernel, class Argument>
Status launch(const LaunchShape& shape, void* stream, const Argument& argument) {
  if (shape.shared_bytes > 0) {
    const Status status = allow_shared_memory<kernel>();
    if (status != cudaSuccess) return status;
  }
  const LaunchConfig config(shape, stream);
  return cudaLaunchKernelEx(&config, kernel, argument);
}

// Finds how many clusters of this shape the device runs at a time: all blocks of one are in one part of it (a GPC),
// whose room their number seldom divides. Asks the device once for each amount of shared memory.
template <auto kernel>
Status clusters_at_a_time(const LaunchShape& shape, int& most) {
  struct Known {
    int device, cluster, most;
    int64_t shared_bytes;
  };
  static std::mutex mutex;
  static std::vector<Known> all_known;
  int device = 0;
  Status status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Known& known : all_known) {
    most = known.most;
    if (known.device == device && known.cluster == shape.cluster && known.shared_bytes == shape.shared_bytes) {
      return cudaSuccess;
    }
  }
  status = allow_shared_memory<kernel>();
  if (status != cudaSuccess) return status;
  const Unnoticed unnoticed;
  const LaunchConfig config(shape, nullptr);
  status = cudaOccupancyMaxActiveClusters(&most, kernel, &config);
  if (status == cudaSuccess) all_known.push_back({device, shape.cluster, most, shape.shared_bytes});
  return status;
}

#else

using Status = int;
constexpr Status kSuccess = 0;

template <auto kernel, class Argument>
Status launch(const LaunchShape& shape, void*, const Argument& argument) {
  emulator::launch(dim3(unsigned(shape.blocks)), dim3(unsigned(shape.threads)), size_t(shape.shared_bytes),
                   unsigned(shape.cluster), shape.overlaps, shape.is_overlapped, [=] { kernel(argument); });
  return kSuccess;
}

template <auto kernel>
Status clusters_at_a_time(const LaunchShape& shape, int& most) {
  most = emulator::clusters_at_a_time(unsigned(shape.cluster));
  return kSuccess;
}

#endif

}  // namespace xent::gpu

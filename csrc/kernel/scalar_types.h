// The element types of tensors and their conversions to the type that arithmetic is done in.
// Host and device: included by the CPU and the CUDA kernels alike. Knows nothing of torch.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define XENT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define XENT_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace xent {

// What a tensor holds, known at run time.
enum class ElementType : uint8_t { kFloat16, kBFloat16, kFloat32, kFloat64, kInt8, kUInt8, kInt16, kInt32, kInt64 };

// Storage formats without arithmetic of their own.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
XENT_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// A bfloat16 is the upper half of a float.
XENT_HOST_DEVICE float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

XENT_HOST_DEVICE float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // 112 moves the exponent's bias from 15 to 127; infinity and NaN move to the top of the range.
  uint32_t bits = (magnitude << 13) + (112u << 23);
  if (magnitude >= 0x7c00u) bits += 112u << 23;
  if (magnitude < 0x0400u) bits = bit_cast<uint32_t>(float(magnitude) * 0x1p-24f);  // subnormal
  return bit_cast<float>(bits | sign);
}

// Round to nearest, ties to even; a NaN stays one.
XENT_HOST_DEVICE BFloat16 to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {uint16_t(0x7fc0)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

XENT_HOST_DEVICE Float16 to_float16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (x != x) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves units of 2^-24 in the low bits, rounded
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  }
  return {uint16_t(sign | half)};
}

}  // namespace xent

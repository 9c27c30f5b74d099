// Vectors of 16 bytes of elements, and their elements in the type of arithmetic.
#pragma once

#include "portable.cuh"

namespace xent::gpu {

template <class T>
constexpr int kPerVector = 16 / int(sizeof(T));

template <class T>
XENT_DEVICE void widen_vector(uint4 raw, Arithmetic<T> (&x)[kPerVector<T>]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int j = 0; j < kPerVector<T>; ++j) {
    if constexpr (sizeof(T) == 2) {
      x[j] = widen<float>(T{uint16_t(words[j / 2] >> (16 * (j % 2)))});
    } else if constexpr (sizeof(T) == 4) {
      x[j] = bit_cast<float>(words[j]);
    } else {
      x[j] = bit_cast<double>(uint64_t(words[2 * j]) | uint64_t(words[2 * j + 1]) << 32);
    }
  }
}

template <class T>
XENT_DEVICE uint4 narrow_vector(const Arithmetic<T> (&x)[kPerVector<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 2) {
      words[w] = narrow_pair<T>(x[2 * w], x[2 * w + 1]);
    } else if constexpr (sizeof(T) == 4) {
      words[w] = bit_cast<uint32_t>(x[w]);
    } else {
      words[w] = uint32_t(bit_cast<uint64_t>(x[w / 2]) >> (32 * (w % 2)));
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// A part of a vector, for arithmetic that needs many registers: four elements from `begin` on, or all where there are
// fewer.
template <class T>
constexpr int kPerPart = kPerVector<T> < 4 ? kPerVector<T> : 4;

template <class T>
XENT_DEVICE void widen_part(uint4 raw, int begin, Arithmetic<T> (&x)[kPerPart<T>]) {
  if constexpr (kPerPart<T> == kPerVector<T>) {
    widen_vector<T>(raw, x);
  } else {
    const uint32_t words[2] = {begin == 0 ? raw.x : raw.z, begin == 0 ? raw.y : raw.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = widen<float>(T{uint16_t(words[j / 2] >> (16 * (j % 2)))});
  }
}

// Writes a part of a vector.
template <class T>
XENT_DEVICE void narrow_part(const Arithmetic<T> (&x)[kPerPart<T>], int begin, uint4& raw) {
  if constexpr (kPerPart<T> == kPerVector<T>) {
    raw = narrow_vector<T>(x);
  } else {
    const uint32_t low = narrow_pair<T>(x[0], x[1]), high = narrow_pair<T>(x[2], x[3]);
    raw = begin == 0 ? uint4{low, high, 0, 0} : uint4{raw.x, raw.y, low, high};
  }
}

template <class T>
XENT_DEVICE uint4 max_vector(uint4 a, uint4 b) {
  if constexpr (sizeof(T) == 2) {
    return {max_pair<T>(a.x, b.x), max_pair<T>(a.y, b.y), max_pair<T>(a.z, b.z), max_pair<T>(a.w, b.w)};
  } else {
    Arithmetic<T> x[kPerVector<T>], y[kPerVector<T>];
    widen_vector<T>(a, x);
    widen_vector<T>(b, y);
#pragma unroll
    for (int j = 0; j < kPerVector<T>; ++j) x[j] = maximum(x[j], y[j]);
    return narrow_vector<T>(x);
  }
}

// The largest element of a vector; ignores NaN.
template <class T>
XENT_DEVICE Arithmetic<T> largest_of(uint4 raw) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t pair = max_pair<T>(max_pair<T>(raw.x, raw.y), max_pair<T>(raw.z, raw.w));
    return maximum(widen<float>(T{uint16_t(pair)}), widen<float>(T{uint16_t(pair >> 16)}));
  } else {
    Arithmetic<T> x[kPerVector<T>];
    widen_vector<T>(raw, x);
#pragma unroll
    for (int j = 1; j < kPerVector<T>; ++j) x[0] = maximum(x[0], x[j]);
    return x[0];
  }
}

// A mask with all bits of the elements to keep, none of the others.
template <class T>
XENT_DEVICE uint4 mask_of(const bool (&keep)[kPerVector<T>]) {
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < kPerVector<T>; ++j) {
    const int first = j * int(sizeof(T));  // byte
    if constexpr (sizeof(T) == 2) {
      words[first / 4] |= keep[j] ? 0xffffu << (first % 4 * 8) : 0u;
    } else {
#pragma unroll
      for (int w = first / 4; w < (first + int(sizeof(T))) / 4; ++w) words[w] = keep[j] ? ~0u : 0u;
    }
  }
  return {words[0], words[1], words[2], words[3]};
}
XENT_DEVICE uint4 operator&(uint4 a, uint4 b) { return {a.x & b.x, a.y & b.y, a.z & b.z, a.w & b.w}; }

// How `count` neighbours divide into vectors at addresses that are multiples of 16, and single elements around them.
struct Vectors {
  int64_t head = 0;  // elements before the first vector; may exceed `count`, where there is none
  int64_t vectors = 0;
  int64_t tail = 0;  // first element after the last vector
  int edges = 0;     // elements outside the vectors: fewer than two vectors hold

  template <class T>
  static XENT_DEVICE Vectors of(const T* p, int64_t count) {
    Vectors result;
    result.head = int64_t((16u - phase_of(p)) % 16u / uint32_t(sizeof(T)));
    result.vectors = (count - result.head) / kPerVector<T>;
    result.tail = result.head + result.vectors * kPerVector<T>;
    result.edges = int(result.head + (count - result.tail));
    return result;
  }

  XENT_DEVICE int64_t edge(int i) const { return i < head ? i : tail + (i - head); }
};

}  // namespace xent::gpu

// Vectors of SIMD_BYTES bytes (GNU vector extensions) and the elementary functions on them.

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(SIMD_BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = SIMD_BYTES / sizeof(T);

using FloatVector = Vector<float>;
using DoubleVector = Vector<double>;
using Int32Vector = Vector<int32_t>;
using Int64Vector = Vector<int64_t>;
using Uint32Vector = Vector<uint32_t>;
using Uint64Vector = Vector<uint64_t>;

// Integers as wide as T: masks, indices and classes as lanes beside those of T.
template <class T>
using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <class T>
using Ints = Vector<Int<T>>;

template <class T>
XENT_INLINE Vector<T> broadcast(T x) {
  return Vector<T>{} + x;
}

template <class T>
XENT_INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
XENT_INLINE void store(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Stores past the caches. A gradient larger than the caches would push out data that is still needed, and a plain store
// reads the line that it overwrites. `p` is aligned to the size of V.
#if SIMD_X86 && !defined(__clang__)
typedef long long Words16 __attribute__((vector_size(16)));
typedef long long Words32 __attribute__((vector_size(32)));
typedef long long Words64 __attribute__((vector_size(64)));

template <class V>
XENT_INLINE void stream_x86(V* p, V v) {
#if SIMD_BYTES == 64
  if constexpr (sizeof(V) == 64) __builtin_ia32_movntdq512((Words64*)p, (Words64)v);
#endif
#if SIMD_BYTES >= 32
  if constexpr (sizeof(V) == 32) __builtin_ia32_movntdq256((Words32*)p, (Words32)v);
#endif
  if constexpr (sizeof(V) == 16) __builtin_ia32_movntdq((Words16*)p, (Words16)v);
  if constexpr (sizeof(V) == 8) __builtin_ia32_movnti64((long long*)p, (long long)v);
}
#endif

template <class V>
XENT_INLINE V rough_quotient(V a, V b) {
  return a / b;
}

// Returns how many elements are stored singly before `p` is aligned for vectors of V.
template <class V, class S>
XENT_INLINE int64_t elements_to_alignment(const S* p) {
  return int64_t((sizeof(V) - reinterpret_cast<uintptr_t>(p) % sizeof(V)) % sizeof(V) / sizeof(S));
}

// Loads the first `count` lanes and reads nothing past them; the other lanes hold `fill`.
template <class T>
XENT_INLINE Vector<T> load_partial(const T* p, int64_t count, T fill = 0) {
  if (count >= kLanes<T>) return load(p);
  T lanes[kLanes<T>];
  for (int k = 0; k < kLanes<T>; ++k) lanes[k] = k < count ? p[k] : fill;
  return load(lanes);
}

template <class T>
XENT_INLINE void store_partial(T* p, Vector<T> v, int64_t count) {
  if (count >= kLanes<T>) return store(p, v);
  for (int64_t k = 0; k < count; ++k) p[k] = v[k];
}

// Calls use(i, count) for each vector of n elements. The last may have fewer elements than lanes.
template <class T, class Use>
XENT_INLINE void for_vectors(int64_t n, const Use& use) {
  for (int64_t i = 0; i < n; i += kLanes<T>) use(i, std::min<int64_t>(kLanes<T>, n - i));
}

// Loads the last kLanes of n >= kLanes elements, with `fill` in the lanes that the whole vectors before them cover.
template <class T>
XENT_INLINE Vector<T> load_rest(const T* p, int64_t n, T fill) {
  Ints<T> lane;
  for (int k = 0; k < kLanes<T>; ++k) lane[k] = k;
  const auto covered = kLanes<T> - n % kLanes<T>;
  return lane >= Int<T>(covered) ? load(p + n - kLanes<T>) : broadcast(fill);
}

template <class Mask, class V>
XENT_INLINE V select(Mask mask, V a, V b) {
  return mask ? a : b;
}

// Returns `b` where either is NaN. gcc does not see that this is one instruction when `a` is a constant.
#if SIMD_X86 && !defined(__clang__) && SIMD_BYTES == 64
XENT_INLINE FloatVector maximum(FloatVector a, FloatVector b) { return __builtin_ia32_maxps512_mask(a, b, b, -1, 4); }
XENT_INLINE DoubleVector maximum(DoubleVector a, DoubleVector b) {
  return __builtin_ia32_maxpd512_mask(a, b, b, -1, 4);
}
#else
template <class V>
XENT_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}
#endif

template <class T, size_t... lane>
XENT_INLINE void interleave(Vector<T> a, Vector<T> b, Vector<T>& low, Vector<T>& high, std::index_sequence<lane...>) {
  constexpr int W = kLanes<T>;
#if defined(__clang__)
  low = __builtin_shufflevector(a, b, (int(lane) / 2 + int(lane) % 2 * W)...);
  high = __builtin_shufflevector(a, b, (W / 2 + int(lane) / 2 + int(lane) % 2 * W)...);
#else
  low = __builtin_shuffle(a, b, Ints<T>{(int(lane) / 2 + int(lane) % 2 * W)...});
  high = __builtin_shuffle(a, b, Ints<T>{(W / 2 + int(lane) / 2 + int(lane) % 2 * W)...});
#endif
}

// Turns rows into columns. Each of the log2(lanes) steps interleaves the first half of the rows with the second, which
// moves one bit of an element's place from the row's number to the lane's.
template <class T>
XENT_INLINE void transpose(Vector<T> (&rows)[kLanes<T>]) {
  constexpr int W = kLanes<T>;
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
    Vector<T> next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      interleave<T>(rows[i], rows[i + W / 2], next[2 * i], next[2 * i + 1], std::make_index_sequence<W>());
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

// Halves the lanes log2(lanes) times; a loop over the lanes would wait for each addition.
template <class T>
XENT_INLINE double sum_of_lanes(Vector<T> v) {
  double lanes[kLanes<T>];
  for (int k = 0; k < kLanes<T>; ++k) lanes[k] = double(v[k]);
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

template <class T>
XENT_INLINE T maximum_of_lanes(Vector<T> v) {
  T lanes[kLanes<T>];
  for (int k = 0; k < kLanes<T>; ++k) lanes[k] = v[k];
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] = lanes[k] > lanes[k + half] ? lanes[k] : lanes[k + half];
  }
  return lanes[0];
}

// exp(x) = 2^n exp(r), n = round(x / ln 2), r = x - n ln 2, exp(r) = 1 + r + r^2 P(r).
// Every exponent here is <= 0, since the maximum or the logarithm of the sum has been subtracted. A result below half
// the least subnormal becomes zero, so exp(-inf) = 0. A NaN stays one. P: minimax of the relative error of exp on
// [-ln 2 / 2, ln 2 / 2] with the first two terms fixed (Remez): 3.1e-9.
XENT_INLINE FloatVector exp_polynomial(FloatVector r) {
  FloatVector p = r * 0.00138143207f + 0.00836885107f;
  p = p * r + 0.0416684011f;
  p = p * r + 0.166665195f;
  return p * r + 0.499999934f;
}

// Taylor's series; its first missing term, r^14 / 14!, is below 5e-18 relative to exp(r).
XENT_INLINE DoubleVector exp_polynomial(DoubleVector r) {
  DoubleVector p = r * (1.0 / 6227020800) + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  return p * r + 1.0 / 2;
}

// x = n ln 2 + r, with |r| <= ln 2 / 2. Adding 1.5 * 2^(mantissa bits) rounds to an integer and leaves it in the low
// bits of `rounded`. ln 2 comes in two parts, the first of which is exact when multiplied by n.
template <class V>
struct Reduced {
  V r, n, rounded;
};

XENT_INLINE Reduced<FloatVector> reduce_exponent(FloatVector x) {
  x = maximum(broadcast(-104.f), x);
  const FloatVector rounded = x * 1.44269504f + 0x1.8p23f;
  const FloatVector n = rounded - 0x1.8p23f;
  return {(x - n * 0.693145752f) - n * 1.42860682e-6f, n, rounded};
}

XENT_INLINE Reduced<DoubleVector> reduce_exponent(DoubleVector x) {
  x = maximum(broadcast(-746.), x);
  const DoubleVector rounded = x * 1.4426950408889634 + 0x1.8p52;
  const DoubleVector n = rounded - 0x1.8p52;
  return {(x - n * 0.69314718036912382) - n * 1.9082149292705877e-10, n, rounded};
}

// p 2^n, which may be subnormal. Without an instruction for it, the bits of 2^(n + 64), which is normal, are made, and
// a product with 2^-64 follows.
#if SIMD_X86 && SIMD_BYTES == 64
XENT_INLINE FloatVector times_power_of_two(FloatVector p, const Reduced<FloatVector>& x) {
  return __builtin_ia32_scalefps512_mask(p, x.n, p, -1, 4);
}
XENT_INLINE DoubleVector times_power_of_two(DoubleVector p, const Reduced<DoubleVector>& x) {
  return __builtin_ia32_scalefpd512_mask(p, x.n, p, -1, 4);
}
#else
XENT_INLINE FloatVector times_power_of_two(FloatVector p, const Reduced<FloatVector>& x) {
  return p * (FloatVector)(((Uint32Vector)x.rounded << 23) + (uint32_t(127 + 64) << 23)) * 0x1p-64f;
}
XENT_INLINE DoubleVector times_power_of_two(DoubleVector p, const Reduced<DoubleVector>& x) {
  return p * (DoubleVector)(((Uint64Vector)x.rounded << 52) + (uint64_t(1023 + 64) << 52)) * 0x1p-64;
}
#endif

template <class V>
XENT_INLINE V exp(V x) {
  using T = decltype(x[0] + x[0]);
  const auto reduced = reduce_exponent(x);
  return times_power_of_two((exp_polynomial(reduced.r) * reduced.r + T(1)) * reduced.r + T(1), reduced);
}

#if SIMD_X86 && SIMD_BYTES == 64 && !defined(__clang__)
// AVX-512 has an instruction for each step but the polynomial, which needs half as many terms. t = x / ln 2 is cut into
// floor(t) + j / 16 + f: one instruction takes f in [0, 1/16), one multiplies by 2^floor(t), and one looks up 2^(j/16)
// by the low bits of t rounded down to sixteenths. Infinity and NaN need no care: exp(-inf) = 0, and exp(0) = 1
// exactly. Polynomial: 2^f, minimax of the relative error, 1.4e-9, with the first term fixed (Remez).
alignas(64) static constexpr float kPowersOfTwo[16] = {
    1.f,         1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
    1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f, 1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};

XENT_INLINE FloatVector exp(FloatVector x) {
  const FloatVector t = x * 1.44269504f;
  const FloatVector f = __builtin_ia32_reduceps512_mask(t, 0x49, t, -1);
  const Int32Vector sixteenths = (Int32Vector)__builtin_ia32_addps512_mask(t, broadcast(0x1.8p19f), t, -1, 9);
  const FloatVector power = __builtin_ia32_permvarsf512_mask(load(kPowersOfTwo), sixteenths, t, -1);
  const FloatVector p = (f * 0.0566698994f + 0.240184242f) * f + 0.693147615f;
  return __builtin_ia32_scalefps512_mask(power * f * p + power, t, p, -1, 4);
}
#endif

// exp and expm1 together cost little more than one of them. With p = exp(r) - 1, expm1(x) = 2^n p + (2^n - 1) keeps its
// relative accuracy for small x, where n = 0.
template <class V>
XENT_INLINE void exp_and_expm1(V x, V& exp_x, V& expm1_x) {
  using T = decltype(x[0] + x[0]);
  const auto reduced = reduce_exponent(x);
  const V p = exp_polynomial(reduced.r) * (reduced.r * reduced.r) + reduced.r;
  exp_x = times_power_of_two(p + T(1), reduced);
  const V two_to_n = times_power_of_two(V{} + T(1), reduced);
  expm1_x = p * two_to_n + (two_to_n - T(1));
}

// log(x) for x >= 1: x = 2^n f with f in [sqrt(1/2), sqrt(2)), log f = 2 atanh(s), s = (f - 1) / (f + 1), by the series
// of atanh up to s^(2 terms + 1); |s| < 0.172. NaN and infinity come back as NaN.
template <int terms, class V, class T>
XENT_INLINE V log_of_fraction(V f, T one) {
  const V s = (f - one) / (f + one);
  const V square = s * s;
  V series = broadcast(one / T(2 * terms + 1));
  for (int k = terms - 1; k > 0; --k) series = series * square + one / T(2 * k + 1);
  return (s + s) + (s + s) * (square * series);
}

XENT_INLINE FloatVector log(FloatVector x) {
  const Int32Vector bits = (Int32Vector)x;
  const Int32Vector n = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3: sqrt(1/2)
  const FloatVector f = (FloatVector)(bits - (n << 23));
  const FloatVector exponent = __builtin_convertvector(n, FloatVector);
  const FloatVector result = exponent * 0.693145752f + (log_of_fraction<5>(f, 1.f) + exponent * 1.42860682e-6f);
  return x < __builtin_inff() ? result : x * 0.f;
}

XENT_INLINE DoubleVector log(DoubleVector x) {
  const Int64Vector bits = (Int64Vector)x;
  const Int64Vector n = (bits - 0x3fe6a09e667f3bcd) >> 52;
  const DoubleVector f = (DoubleVector)(bits - (n << 52));
  const DoubleVector exponent = __builtin_convertvector(n, DoubleVector);
  const DoubleVector result =
      exponent * 0.69314718036912382 + (log_of_fraction<11>(f, 1.) + exponent * 1.9082149292705877e-10);
  return x < __builtin_inf() ? result : x * 0.;
}

// For kernels that finish one position at a time.
XENT_INLINE double log(double x) { return ::log(x); }

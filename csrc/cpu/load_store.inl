// Between memory and arithmetic. Tensors come in four types and any stride; the kernels compute on short contiguous
// buffers of T = float or double that stay in the first-level cache. Everything that depends on a tensor's type or
// stride is in this file, so that no kernel is written twice for it.

typedef uint16_t Uint16Lanes __attribute__((vector_size(SIMD_BYTES / 2)));
typedef uint32_t Uint32Lanes __attribute__((vector_size(SIMD_BYTES)));

XENT_INLINE FloatVector to_float(Uint16Lanes bits, BFloat16) {
  return (FloatVector)(__builtin_convertvector(bits, Uint32Lanes) << 16);
}

// The vector forms of the conversions in scalar_types.h.
XENT_INLINE FloatVector to_float(Uint16Lanes bits, Float16) {
  const Uint32Lanes wide = __builtin_convertvector(bits, Uint32Lanes);
  const Uint32Lanes magnitude = wide & 0x7fffu;
  Uint32Lanes result = (magnitude << 13) + (112u << 23);
  result = magnitude >= 0x7c00u ? result + (112u << 23) : result;
  const FloatVector subnormal = __builtin_convertvector((Int32Vector)magnitude, FloatVector) * 0x1p-24f;
  result = magnitude < 0x0400u ? (Uint32Lanes)subnormal : result;
  return (FloatVector)(result | ((wide & 0x8000u) << 16));
}

XENT_INLINE Uint16Lanes from_float(FloatVector x, BFloat16) {
  const Uint32Lanes bits = (Uint32Lanes)x;
  const Uint32Lanes rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Uint32Lanes nan = Uint32Lanes{} + 0x7fc0u;
  return __builtin_convertvector(x == x ? rounded : nan, Uint16Lanes);
}

XENT_INLINE Uint16Lanes from_float(FloatVector x, Float16) {
  const Uint32Lanes bits = (Uint32Lanes)x;
  const Uint32Lanes magnitude = bits & 0x7fffffffu;
  const Uint32Lanes subnormal = (Uint32Lanes)((FloatVector)magnitude + 0.5f) - 0x3f000000u;
  Uint32Lanes half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  half = magnitude < 0x38800000u ? subnormal : half;
  half = magnitude >= 0x477ff000u ? Uint32Lanes{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? Uint32Lanes{} + 0x7e00u : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), Uint16Lanes);
}

XENT_INLINE double widen(Float16 x) { return to_float(x); }
XENT_INLINE double widen(BFloat16 x) { return to_float(x); }
XENT_INLINE double widen(float x) { return x; }
XENT_INLINE double widen(double x) { return x; }

XENT_INLINE void narrow(float x, Float16& out) { out = to_float16(x); }
XENT_INLINE void narrow(float x, BFloat16& out) { out = to_bfloat16(x); }
XENT_INLINE void narrow(double x, float& out) { out = float(x); }
XENT_INLINE void narrow(double x, double& out) { out = x; }

// n elements, `stride` apart.
template <class T, class S>
XENT_INLINE void read_elements(T* out, const S* in, int64_t stride, int64_t n) {
  int64_t i = 0;
  if constexpr (sizeof(S) == 2 && sizeof(T) == 4) {
    if (stride == 1) {
      for (; i + kLanes<T> <= n; i += kLanes<T>) {
        Uint16Lanes bits;
        __builtin_memcpy(&bits, in + i, sizeof bits);
        store(out + i, to_float(bits, S{}));
      }
    }
  } else if constexpr (sizeof(S) == sizeof(T)) {
    if (stride == 1) {
      for (; i + kLanes<T> <= n; i += kLanes<T>) store(out + i, load(in + i));
    }
  }
  for (; i < n; ++i) out[i] = T(widen(in[i * stride]));
}

// Contiguous elements whose type is as wide as T, or half as wide.
template <class S, class T>
XENT_INLINE auto vector_for_memory(Vector<T> v) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return v;
  } else {
    return from_float(v, S{});
  }
}

// A vector of T from such elements, and back.
template <class T, class S>
XENT_INLINE Vector<T> load_from_memory(const S* p) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return load(p);
  } else {
    Uint16Lanes bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return to_float(bits, S{});
  }
}

template <class S, class T>
XENT_INLINE void store_to_memory(S* p, Vector<T> v, bool stream) {
  const auto stored = vector_for_memory<S, T>(v);
  if (stream) {
    SIMD_STREAM(reinterpret_cast<decltype(vector_for_memory<S, T>(v))*>(p), stored);
  } else {
    __builtin_memcpy(p, &stored, sizeof stored);
  }
}

template <class S, class T>
XENT_INLINE void write_elements(S* out, const T* in, int64_t stride, int64_t n, bool stream) {
  constexpr int W = kLanes<T>;
  int64_t i = 0;
  if constexpr (sizeof(S) == sizeof(T) || (sizeof(S) == 2 && sizeof(T) == 4)) {
    using Stored = decltype(vector_for_memory<S, T>(Vector<T>{}));
    if (stride == 1 && stream) {
      const int64_t head = std::min(n, elements_to_alignment<Stored>(out));
      for (; i < head; ++i) narrow(in[i], out[i]);
      for (; i + W <= n; i += W) {
        SIMD_STREAM(reinterpret_cast<Stored*>(out + i), (vector_for_memory<S, T>(load(in + i))));
      }
    } else if (stride == 1) {
      for (; i + W <= n; i += W) {
        const Stored v = vector_for_memory<S, T>(load(in + i));
        __builtin_memcpy(out + i, &v, sizeof v);
      }
    }
  }
  for (; i < n; ++i) narrow(in[i], out[i * stride]);
}

// Reads n elements of `view` from `offset` on into `buffer`.
template <class T>
static void read_into(T* buffer, const View& view, int64_t offset, int64_t stride, int64_t n) {
  switch (view.type) {
    case ElementType::kFloat16:
      return read_elements(buffer, static_cast<const Float16*>(view.data) + offset, stride, n);
    case ElementType::kBFloat16:
      return read_elements(buffer, static_cast<const BFloat16*>(view.data) + offset, stride, n);
    case ElementType::kFloat32: return read_elements(buffer, static_cast<const float*>(view.data) + offset, stride, n);
    default: return read_elements(buffer, static_cast<const double*>(view.data) + offset, stride, n);
  }
}

template <class T>
static void write_from(const T* buffer, const View& view, int64_t offset, int64_t stride, int64_t n,
                       bool stream = false) {
  switch (view.type) {
    case ElementType::kFloat16:
      return write_elements(static_cast<Float16*>(view.data) + offset, buffer, stride, n, stream);
    case ElementType::kBFloat16:
      return write_elements(static_cast<BFloat16*>(view.data) + offset, buffer, stride, n, stream);
    case ElementType::kFloat32:
      return write_elements(static_cast<float*>(view.data) + offset, buffer, stride, n, stream);
    default: return write_elements(static_cast<double*>(view.data) + offset, buffer, stride, n, stream);
  }
}

template <class T>
constexpr ElementType kElementTypeOf = sizeof(T) == 4 ? ElementType::kFloat32 : ElementType::kFloat64;

// The elements themselves where they already are contiguous and of type T, else a copy in `buffer`.
template <class T>
XENT_INLINE const T* read_or_point(T* buffer, const View& view, int64_t offset, int64_t stride, int64_t n) {
  if (stride == 1 && view.type == kElementTypeOf<T>) return static_cast<const T*>(view.data) + offset;
  read_into(buffer, view, offset, stride, n);
  return buffer;
}

// Where results can be stored as they are made, else `buffer`, from which they are to be written.
template <class T>
XENT_INLINE T* write_or_point(T* buffer, const View& view, int64_t offset, int64_t stride, bool buffered) {
  if (stride == 1 && view.type == kElementTypeOf<T> && !buffered) return static_cast<T*>(view.data) + offset;
  return buffer;
}

template <class T>
XENT_INLINE T read_one(const View& view, int64_t offset) {
  T value;
  read_into(&value, view, offset, 1, 1);
  return value;
}

// Walks the positions in order; knows where the current one lies in every view.
struct Cursor {
  const Problem& problem;
  int64_t index[kMaxDims];

  XENT_INLINE_MEMBER Cursor(const Problem& problem, int64_t position) : problem(problem) {
    for (int d = problem.dims - 1; d > 0; --d) {
      index[d] = position % problem.size[d];
      position /= problem.size[d];
    }
    index[0] = position;
  }

  XENT_INLINE_MEMBER int64_t offset(const View& view) const {
    int64_t offset = 0;
    for (int d = 0; d < problem.dims; ++d) offset += index[d] * view.stride[d];
    return offset;
  }

  // How many of the next `limit` positions follow along the innermost dimension.
  XENT_INLINE_MEMBER int64_t run(int64_t limit) const {
    const int d = problem.dims - 1;
    return problem.size[d] - index[d] < limit ? problem.size[d] - index[d] : limit;
  }

  // By at most run() positions.
  XENT_INLINE_MEMBER void advance(int64_t count) {
    int d = problem.dims - 1;
    index[d] += count;
    while (d > 0 && index[d] == problem.size[d]) {
      index[d] = 0;
      ++index[--d];
    }
  }

  // By any number.
  XENT_INLINE_MEMBER void skip(int64_t count) {
    while (count > 0) {
      const int64_t step = run(count);
      advance(step);
      count -= step;
    }
  }
};

template <class S>
XENT_INLINE void read_integers(int64_t* out, const S* in, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i * stride];
}

static void read_into(int64_t* buffer, const View& view, int64_t offset, int64_t stride, int64_t n) {
  switch (view.type) {
    case ElementType::kUInt8: return read_integers(buffer, static_cast<const uint8_t*>(view.data) + offset, stride, n);
    case ElementType::kInt8: return read_integers(buffer, static_cast<const int8_t*>(view.data) + offset, stride, n);
    case ElementType::kInt16: return read_integers(buffer, static_cast<const int16_t*>(view.data) + offset, stride, n);
    case ElementType::kInt32: return read_integers(buffer, static_cast<const int32_t*>(view.data) + offset, stride, n);
    default: return read_integers(buffer, static_cast<const int64_t*>(view.data) + offset, stride, n);
  }
}

// One element for each of `count` positions, run by run; of class c, where the view has classes.
template <class T>
static void read_positions(T* out, Cursor cursor, int64_t count, const View& view, int64_t c = 0) {
  const int64_t inner = view.stride[cursor.problem.dims - 1];
  for (int64_t done = 0; done < count;) {
    const int64_t run = cursor.run(count - done);
    read_into(out + done, view, cursor.offset(view) + c * view.class_stride, inner, run);
    done += run;
    cursor.advance(run);
  }
}

// Remembers the first position whose target is no class, which are those marked by -2, and ignores it.
static __attribute__((noinline)) void report_bad_targets(int64_t* y, const Problem& problem, int64_t first,
                                                         int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (y[i] != -2) continue;
    y[i] = -1;
    int64_t known = __atomic_load_n(problem.first_bad_position, __ATOMIC_RELAXED);
    while (first + i < known && !__atomic_compare_exchange_n(problem.first_bad_position, &known, first + i, false,
                                                             __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
}

// Replaces targets that are ignored by -1, and those that are no class, too; remembers the first of these.
XENT_INLINE void check_targets(int64_t* y, const Problem& problem, int64_t first, int64_t count) {
  constexpr int64_t L = kLanes<double>;
  const uint64_t classes = uint64_t(problem.all_classes());
  Int64Vector any_bad{};
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    Int64Vector v;
    __builtin_memcpy(&v, y + i, sizeof v);
    const Int64Vector ignored = v == problem.ignore_index, is_class = (Uint64Vector)v < classes;
    const Int64Vector bad = ~ignored & ~is_class;
    v = (is_class & ~ignored ? v : Int64Vector{} - 1) + bad;  // a mask's lanes are -1
    any_bad |= bad;
    __builtin_memcpy(y + i, &v, sizeof v);
  }
  bool is_bad = false;
  for (int64_t k = 0; k < L; ++k) is_bad |= any_bad[k] != 0;
  for (; i < count; ++i) {
    const bool ignored = y[i] == problem.ignore_index, is_class = uint64_t(y[i]) < classes;
    is_bad |= !ignored & !is_class;
    y[i] = ignored ? -1 : is_class ? y[i] : -2;
  }
  if (is_bad) report_bad_targets(y, problem, first, count);
}

// Of n classes of pairs: counted from here, where they are not ignored. Returns what those that are have become.
XENT_INLINE int64_t count_from_here(int64_t* y, const Problem& problem, int64_t n) {
  if (!problem.is_shard()) return problem.ignore_index;
  for (int64_t i = 0; i < n; ++i) y[i] = y[i] == problem.ignore_index ? -1 : problem.counted_from_here(y[i]);
  return -1;
}

// What the targets of `count` positions say: a class, counted from here; -1 where they are to be ignored, as a position
// of only ignored pairs is; 0 where they have no class of their own. At most kTile positions.
static void read_labels(int64_t* y, const Problem& problem, const Cursor& cursor, int64_t first, int64_t count) {
  if (problem.target_kind == TargetKind::kPairs) {
    const uint64_t classes = uint64_t(problem.all_classes());
    int64_t of_pair[kTile];
    bool any_bad = false;
    std::fill_n(y, count, int64_t{-1});
    for (int64_t j = 0; j < problem.pairs; ++j) {
      read_positions(of_pair, cursor, count, problem.target, j);
      for (int64_t i = 0; i < count; ++i) {
        const bool ignored = of_pair[i] == problem.ignore_index, is_class = uint64_t(of_pair[i]) < classes;
        y[i] = ignored | (y[i] == -2) ? y[i] : is_class ? 0 : -2;
        any_bad |= y[i] == -2;
      }
    }
    if (any_bad) report_bad_targets(y, problem, first, count);
  } else if (problem.target_kind == TargetKind::kIndices || problem.labels) {
    read_positions(y, cursor, count, problem.labels ? problem.labels : problem.target);
    check_targets(y, problem, first, count);
    for (int64_t i = 0; i < count && problem.is_shard(); ++i) y[i] = y[i] < 0 ? y[i] : problem.counted_from_here(y[i]);
  } else {
    std::fill_n(y, count, int64_t{0});
  }
}

// The factors of `count` positions.
template <class T>
XENT_INLINE void read_sample_weights(T* s, const Problem& problem, const Cursor& cursor, int64_t count) {
  if (problem.sample_weight) {
    read_positions(s, cursor, count, problem.sample_weight);
  } else {
    std::fill_n(s, count, T(1));
  }
}

XENT_INLINE double sample_weight_at(const Problem& problem, const Cursor& cursor) {
  return problem.sample_weight ? read_one<double>(problem.sample_weight, cursor.offset(problem.sample_weight)) : 1;
}

// ---- logits that are transformed first ------------------------------------------------------------------------------

XENT_INLINE bool is_transformed(const Problem& problem) { return problem.softcap != 0 || problem.logit_scale != 1; }

template <class T>
XENT_INLINE Vector<T> transformed(const Problem& problem, Vector<T> x) {
  // What a temperature divides is rounded once, as elsewhere, and is not part of a fused multiply-add where it is used.
  x = problem.temperature != 1 ? x / T(problem.temperature) : x * T(problem.logit_scale);
  return problem.softcap != 0 ? softcapped(x, broadcast(T(problem.softcap))) : x;
}

// The derivative of a transformed logit by the one that was given.
template <class T>
XENT_INLINE Vector<T> slope_of_transform(const Problem& problem, Vector<T> x) {
  const Vector<T> scale = broadcast(T(problem.logit_scale));
  return problem.softcap != 0 ? scale * slope_of_softcap(x, broadcast(T(problem.softcap))) : scale;
}

// read_or_point, of logits as the loss sees them.
template <class T>
XENT_INLINE const T* read_logits(T* buffer, const Problem& problem, int64_t offset, int64_t n) {
  const T* x = read_or_point(buffer, problem.logits, offset, problem.logits.class_stride, n);
  if (!is_transformed(problem)) return x;
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < n; i += W) {
    const int64_t count = n - i;
    store_partial(buffer + i, transformed<T>(problem, count >= W ? load(x + i) : load_partial(x + i, count, T(0))),
                  count);
  }
  return buffer;
}

template <class T>
XENT_INLINE T read_logit(const Problem& problem, int64_t offset) {
  const T x = read_one<T>(problem.logits, offset);
  return is_transformed(problem) ? transformed<T>(problem, broadcast(x))[0] : x;
}

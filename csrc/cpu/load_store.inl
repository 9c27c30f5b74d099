// Between memory and arithmetic. Tensors come in four types and any stride; the kernels compute on short contiguous
// buffers of T = float or double that stay in the first-level cache. Everything that depends on a tensor's type or
// stride is in this file, so that no kernel is written once for each.

// ---- the vector forms of the conversions in scalar_types.h ----------------------------------------------------------

typedef uint16_t Uint16Lanes __attribute__((vector_size(SIMD_BYTES / 2)));

XENT_INLINE FloatVector to_float(Uint16Lanes bits, BFloat16) {
  return (FloatVector)(__builtin_convertvector(bits, Uint32Vector) << 16);
}

XENT_INLINE FloatVector to_float(Uint16Lanes bits, Float16) {
  const Uint32Vector wide = __builtin_convertvector(bits, Uint32Vector);
  const Uint32Vector magnitude = wide & 0x7fffu;
  Uint32Vector result = (magnitude << 13) + (112u << 23);
  result = magnitude >= 0x7c00u ? result + (112u << 23) : result;
  const FloatVector subnormal = __builtin_convertvector((Int32Vector)magnitude, FloatVector) * 0x1p-24f;
  result = magnitude < 0x0400u ? (Uint32Vector)subnormal : result;
  return (FloatVector)(result | ((wide & 0x8000u) << 16));
}

XENT_INLINE Uint16Lanes from_float(FloatVector x, BFloat16) {
  const Uint32Vector bits = (Uint32Vector)x;
  const Uint32Vector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Uint32Vector nan = Uint32Vector{} + 0x7fc0u;
  return __builtin_convertvector(x == x ? rounded : nan, Uint16Lanes);
}

XENT_INLINE Uint16Lanes from_float(FloatVector x, Float16) {
  const Uint32Vector bits = (Uint32Vector)x;
  const Uint32Vector magnitude = bits & 0x7fffffffu;
  const Uint32Vector subnormal = (Uint32Vector)((FloatVector)magnitude + 0.5f) - 0x3f000000u;
  Uint32Vector half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  half = magnitude < 0x38800000u ? subnormal : half;
  half = magnitude >= 0x477ff000u ? Uint32Vector{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? Uint32Vector{} + 0x7e00u : half;
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

// ---- elements of any type and stride --------------------------------------------------------------------------------

// True where contiguous elements of type S are loaded and stored as whole vectors of T: they are T, or half as wide.
template <class S, class T>
constexpr bool kFillsVectors = sizeof(S) == sizeof(T) || (sizeof(S) == 2 && sizeof(T) == 4);

template <class S, class T>
XENT_INLINE auto vector_for_memory(Vector<T> v) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return v;
  } else {
    return from_float(v, S{});
  }
}

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

// Reads n elements, `stride` apart.
template <class T, class S>
XENT_INLINE void read_elements(T* out, const S* in, int64_t stride, int64_t n) {
  int64_t i = 0;
  if constexpr (kFillsVectors<S, T>) {
    if (stride == 1) {
      for (; i + kLanes<T> <= n; i += kLanes<T>) store(out + i, load_from_memory<T>(in + i));
    }
  }
  for (; i < n; ++i) out[i] = T(widen(in[i * stride]));
}

template <class S, class T>
XENT_INLINE void write_elements(S* out, const T* in, int64_t stride, int64_t n, bool stream) {
  constexpr int W = kLanes<T>;
  int64_t i = 0;
  if constexpr (kFillsVectors<S, T>) {
    using Stored = decltype(vector_for_memory<S, T>(Vector<T>{}));
    if (stride == 1 && stream) {
      const int64_t head = std::min(n, elements_to_alignment<Stored>(out));
      for (; i < head; ++i) narrow(in[i], out[i]);
      for (; i + W <= n; i += W) store_to_memory<S, T>(out + i, load(in + i), true);
    } else if (stride == 1) {
      for (; i + W <= n; i += W) store_to_memory<S, T>(out + i, load(in + i), false);
    }
  }
  for (; i < n; ++i) narrow(in[i], out[i * stride]);
}

// Calls use(p) with the address of a view's element as a pointer to its type.
template <class Use>
XENT_INLINE void with_numbers(const View& view, int64_t offset, const Use& use) {
  switch (view.type) {
    case ElementType::kFloat16: return use(static_cast<Float16*>(view.data) + offset);
    case ElementType::kBFloat16: return use(static_cast<BFloat16*>(view.data) + offset);
    case ElementType::kFloat32: return use(static_cast<float*>(view.data) + offset);
    default: return use(static_cast<double*>(view.data) + offset);
  }
}

template <class Use>
XENT_INLINE void with_integers(const View& view, int64_t offset, const Use& use) {
  switch (view.type) {
    case ElementType::kUInt8: return use(static_cast<uint8_t*>(view.data) + offset);
    case ElementType::kInt8: return use(static_cast<int8_t*>(view.data) + offset);
    case ElementType::kInt16: return use(static_cast<int16_t*>(view.data) + offset);
    case ElementType::kInt32: return use(static_cast<int32_t*>(view.data) + offset);
    default: return use(static_cast<int64_t*>(view.data) + offset);
  }
}

// Reads n elements of `view` from `offset` on into `buffer`.
template <class T>
static void read_into(T* buffer, const View& view, int64_t offset, int64_t stride, int64_t n) {
  with_numbers(view, offset, [&](const auto* in) XENT_INLINE_LAMBDA { read_elements(buffer, in, stride, n); });
}

static void read_into(int64_t* buffer, const View& view, int64_t offset, int64_t stride, int64_t n) {
  with_integers(view, offset, [&](const auto* in) XENT_INLINE_LAMBDA {
    for (int64_t i = 0; i < n; ++i) buffer[i] = in[i * stride];
  });
}

template <class T>
static void write_from(const T* buffer, const View& view, int64_t offset, int64_t stride, int64_t n,
                       bool stream = false) {
  with_numbers(view, offset, [&](auto* out) XENT_INLINE_LAMBDA { write_elements(out, buffer, stride, n, stream); });
}

template <class T>
constexpr ElementType kElementTypeOf = sizeof(T) == 4 ? ElementType::kFloat32 : ElementType::kFloat64;

// Returns the elements themselves where they are contiguous and of type T, else a copy in `buffer`.
template <class T>
XENT_INLINE const T* read_or_point(T* buffer, const View& view, int64_t offset, int64_t stride, int64_t n) {
  if (stride == 1 && view.type == kElementTypeOf<T>) return static_cast<const T*>(view.data) + offset;
  read_into(buffer, view, offset, stride, n);
  return buffer;
}

// Returns the place of the results in memory where they are contiguous, of type T and not `buffered`. Else returns
// `buffer`, from which the caller writes them.
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

// ---- positions ------------------------------------------------------------------------------------------------------

// Walks the positions in order, and knows where the current one lies in every view.
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

  // Returns how many of the next `limit` positions follow each other along the innermost dimension.
  XENT_INLINE_MEMBER int64_t run(int64_t limit) const {
    const int d = problem.dims - 1;
    return problem.size[d] - index[d] < limit ? problem.size[d] - index[d] : limit;
  }

  // Steps over `count` <= run() positions.
  XENT_INLINE_MEMBER void advance(int64_t count) {
    int d = problem.dims - 1;
    index[d] += count;
    while (d > 0 && index[d] == problem.size[d]) {
      index[d] = 0;
      ++index[--d];
    }
  }

  // Steps over any number of positions.
  XENT_INLINE_MEMBER void skip(int64_t count) {
    while (count > 0) {
      const int64_t step = run(count);
      advance(step);
      count -= step;
    }
  }
};

// Calls use(done, offset, run) for each run of neighbours among the `count` positions from `cursor` on: `done`
// positions come before the run, and it begins at `offset` in the view.
template <class Use>
XENT_INLINE void for_runs(Cursor cursor, int64_t count, const View& view, const Use& use) {
  for (int64_t done = 0; done < count;) {
    const int64_t run = cursor.run(count - done);
    use(done, cursor.offset(view), run);
    done += run;
    cursor.advance(run);
  }
}

// Calls use(cursor, first, count) for each tile of at most `width` of the positions [begin, end).
template <class Use>
XENT_INLINE void for_tiles(const Problem& problem, int64_t begin, int64_t end, int64_t width, const Use& use) {
  Cursor cursor(problem, begin);
  for (int64_t first = begin; first < end; first += width) {
    const int64_t count = std::min(width, end - first);
    use(cursor, first, count);
    cursor.skip(count);
  }
}

// Reads one element for each of `count` positions: of class c, where the view has classes.
template <class T>
static void read_positions(T* out, const Cursor& cursor, int64_t count, const View& view, int64_t c = 0) {
  const int64_t inner = view.stride[cursor.problem.dims - 1];
  for_runs(cursor, count, view, [&](int64_t done, int64_t offset, int64_t run) XENT_INLINE_LAMBDA {
    read_into(out + done, view, offset + c * view.class_stride, inner, run);
  });
}

template <class T>
static void write_positions(const T* in, const Cursor& cursor, int64_t count, const View& view, int64_t c) {
  const int64_t inner = view.stride[cursor.problem.dims - 1];
  for_runs(cursor, count, view, [&](int64_t done, int64_t offset, int64_t run) XENT_INLINE_LAMBDA {
    write_from(in + done, view, offset + c * view.class_stride, inner, run);
  });
}

template <class T>
XENT_INLINE T* saved_row(const Problem& problem, int row) {
  return static_cast<T*>(problem.lse) + row * problem.positions;
}

// ---- targets --------------------------------------------------------------------------------------------------------

// Reports the first position that is marked kBad, and marks all of them kIgnored.
static __attribute__((noinline)) void report_bad_targets(int64_t* y, const Problem& problem, int64_t first,
                                                         int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (y[i] != kBad) continue;
    y[i] = kIgnored;
    int64_t known = __atomic_load_n(problem.first_bad_position, __ATOMIC_RELAXED);
    while (first + i < known && !__atomic_compare_exchange_n(problem.first_bad_position, &known, first + i, false,
                                                             __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
}

// Replaces by kIgnored the targets that are ignore_index and those that are no class. Reports the first of the latter.
XENT_INLINE void check_targets(int64_t* y, const Problem& problem, int64_t first, int64_t count) {
  constexpr int64_t L = kLanes<double>;
  const uint64_t classes = uint64_t(problem.all_classes());
  Int64Vector any_bad{};
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    const Int64Vector v = load(y + i);
    const Int64Vector ignored = v == problem.ignore_index, is_class = (Uint64Vector)v < classes;
    const Int64Vector bad = ~ignored & ~is_class;
    static_assert(kBad == kIgnored - 1);  // a mask's lanes are -1
    store(y + i, (is_class & ~ignored ? v : Int64Vector{} + kIgnored) + bad);
    any_bad |= bad;
  }
  bool is_bad = false;
  for (int64_t k = 0; k < L; ++k) is_bad |= any_bad[k] != 0;
  for (; i < count; ++i) {
    const bool ignored = y[i] == problem.ignore_index, is_class = uint64_t(y[i]) < classes;
    is_bad |= !ignored & !is_class;
    y[i] = ignored ? kIgnored : is_class ? y[i] : kBad;
  }
  if (is_bad) report_bad_targets(y, problem, first, count);
}

// Counts the classes of n pairs from the shard's first on. Returns the number that then stands for an ignored pair.
XENT_INLINE int64_t count_from_here(int64_t* y, const Problem& problem, int64_t n) {
  if (!problem.is_shard()) return problem.ignore_index;
  for (int64_t i = 0; i < n; ++i) y[i] = y[i] == problem.ignore_index ? kIgnored : problem.counted_from_here(y[i]);
  return kIgnored;
}

// Reads the labels of `count` <= kTile positions: the class, counted from here, of an index target or of a label beside
// a teacher; 0 for other targets; kIgnored for a position that does not count. Pairs do not count where all of them are
// ignored.
static void read_labels(int64_t* y, const Problem& problem, const Cursor& cursor, int64_t first, int64_t count) {
  if (problem.target_kind == TargetKind::kPairs) {
    const uint64_t classes = uint64_t(problem.all_classes());
    int64_t of_pair[kTile];
    bool any_bad = false;
    std::fill_n(y, count, int64_t{kIgnored});
    for (int64_t j = 0; j < problem.pairs; ++j) {
      read_positions(of_pair, cursor, count, problem.target, j);
      for (int64_t i = 0; i < count; ++i) {
        const bool ignored = of_pair[i] == problem.ignore_index, is_class = uint64_t(of_pair[i]) < classes;
        y[i] = ignored | (y[i] == kBad) ? y[i] : is_class ? 0 : kBad;
        any_bad |= y[i] == kBad;
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

// Reads the factors of `count` positions' losses.
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
  // The quotient by a temperature is rounded once, as elsewhere, and is no part of a later fused multiply-add.
  x = problem.temperature != 1 ? x / T(problem.temperature) : x * T(problem.logit_scale);
  return problem.softcap != 0 ? softcapped(x, broadcast(T(problem.softcap))) : x;
}

// The derivative of a transformed logit by the given one.
template <class T>
XENT_INLINE Vector<T> slope_of_transform(const Problem& problem, Vector<T> x) {
  const Vector<T> scale = broadcast(T(problem.logit_scale));
  return problem.softcap != 0 ? scale * slope_of_softcap(x, broadcast(T(problem.softcap))) : scale;
}

// read_or_point for logits, transformed.
template <class T>
XENT_INLINE const T* read_logits(T* buffer, const Problem& problem, int64_t offset, int64_t n) {
  const T* x = read_or_point(buffer, problem.logits, offset, problem.logits.class_stride, n);
  if (!is_transformed(problem)) return x;
  for_vectors<T>(n, [&](int64_t i, int64_t count) XENT_INLINE_LAMBDA {
    store_partial(buffer + i, transformed<T>(problem, load_partial(x + i, count)), count);
  });
  return buffer;
}

template <class T>
XENT_INLINE T read_logit(const Problem& problem, int64_t offset) {
  const T x = read_one<T>(problem.logits, offset);
  return is_transformed(problem) ? transformed<T>(problem, broadcast(x))[0] : x;
}

// Kernels of the negative log likelihood.
//
// forward_nll     reads one element for each position, and writes or sums the losses
// backward_nll    writes each element of the gradient once, all zero but one for each position
//
// The backward copies from a block of zeros in the first-level cache, and puts the few other numbers into the block
// while they are copied: a line that was stored past the caches never comes back for its one element.

constexpr int64_t kZeroBytes = 24576;

template <class T, class S>
XENT_INLINE void gather_elements(T* out, const S* in, int64_t stride, int64_t class_stride, const int64_t* y,
                                 int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T x = T(widen(in[i * stride + std::max(y[i], int64_t{0}) * class_stride]));
    out[i] = y[i] < 0 ? T(0) : x;
  }
}

// Reads the element of each position's own class; zero where it has none.
template <class T>
static void gather_targets(T* out, const Problem& problem, const Cursor& cursor, const int64_t* y, int64_t count) {
  const View& view = problem.logits;
  const int64_t stride = view.stride[problem.dims - 1], class_stride = view.class_stride;
  for_runs(cursor, count, view, [&](int64_t done, int64_t offset, int64_t run) XENT_INLINE_LAMBDA {
    with_numbers(view, offset, [&](const auto* in) XENT_INLINE_LAMBDA {
      gather_elements(out + done, in, stride, class_stride, y + done, run);
    });
  });
}

template <class T>
static void forward_nll(const Forward& problem, int64_t begin, int64_t end, Sums& sums) {
  const T* weight = static_cast<const T*>(problem.weight);
  for_tiles(problem, begin, end, kTile, [&](const Cursor& cursor, int64_t first, int64_t count) {
    int64_t y[kTile];
    T loss[kTile];
    read_labels(y, problem, cursor, first, count);
    gather_targets(loss, problem, cursor, y, count);
    for (int64_t i = 0; i < count; ++i) {
      const T w = weight && y[i] >= 0 ? weight[y[i]] : T(1);
      loss[i] = w == T(0) || y[i] < 0 ? T(0) : -w * loss[i];
    }
    if (problem.loss) {
      write_from(loss, problem.loss, first, 1, count);
    } else {
      sums.loss += sum_of(loss, count);
      sums.weight += sum_of_target_weights<T>(weight, nullptr, y, count);
    }
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

static void copy_bytes(void* to, const void* from, int64_t n, bool stream) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  int64_t i = 0;
  if (stream) {
    i = std::min(n, elements_to_alignment<FloatVector>(out));
    __builtin_memcpy(out, in, size_t(i));
    for (; i + SIMD_BYTES <= n; i += SIMD_BYTES) {
      FloatVector v;
      __builtin_memcpy(&v, in + i, sizeof v);
      SIMD_STREAM(reinterpret_cast<FloatVector*>(out + i), v);
    }
  }
  __builtin_memcpy(out + i, in + i, size_t(n - i));
}

XENT_INLINE void narrow(double x, Float16& out) { narrow(float(x), out); }
XENT_INLINE void narrow(double x, BFloat16& out) { narrow(float(x), out); }

// The element other than zero that each position of a tile has in its gradient, and its class.
template <class S>
struct NllTile {
  int64_t count = 0;
  int64_t y[kTile];
  S value[kTile];

  template <class T>
  void read(const Backward& problem, const Cursor& cursor, int64_t first, int64_t positions) {
    count = positions;
    read_labels(y, problem, cursor, first, count);
    const View& grad_output = problem.grad_output;
    const T* weight = static_cast<const T*>(problem.weight);
    const bool is_one =
        std::all_of(grad_output.stride, grad_output.stride + problem.dims, [](auto s) { return s == 0; });
    if (is_one && !weight) {
      S value_of_all;
      narrow(-read_one<double>(grad_output, 0) * problem.scale, value_of_all);
      std::fill_n(value, count, value_of_all);
      return;
    }
    double g[kTile];
    read_positions(g, cursor, count, grad_output);
    for (int64_t i = 0; i < count; ++i) {
      const double w = weight && y[i] >= 0 ? double(weight[y[i]]) : 1;
      narrow(-g[i] * w * problem.scale, value[i]);
    }
  }
};

// The gradient, as it lies in memory: [outer positions][classes][inner positions]. A slab is one of the outer ones.
template <class S>
struct NllGradient {
  static constexpr int64_t kZeros = kZeroBytes / int64_t(sizeof(S));
  alignas(64) S zeros[kZeros + 1];  // the last takes the values that belong to no class
  S* const out;
  const int64_t classes, inner;
  const bool stream;

  NllGradient(const Backward& problem, int64_t positions)
      : out(static_cast<S*>(problem.grad_logits.data)),
        classes(problem.classes),
        inner(problem.grad_logits.class_stride),
        stream(problem.stream) {
    std::fill_n(zeros, std::min(kZeros, positions * classes), S{});
  }

  // Returns how many positions are written together from `position` on: whole slabs, or some of one slab.
  int64_t together(int64_t position, int64_t most) const {
    const int64_t at = position % inner;
    if (at != 0 || classes * inner > kZeros || inner > most) return std::min(inner - at, most);
    return std::min(most / inner, kZeros / (classes * inner)) * inner;
  }

  void write(const NllTile<S>& tile, int64_t position) {
    const int64_t at = position % inner;
    S* const slab = out + (position - at) * classes;
    if (at == 0 && tile.count % inner == 0 && tile.count * classes <= kZeros) {
      write_slabs(tile, slab);
    } else {
      write_part(tile, slab + at);
    }
  }

 private:
  void write_slabs(const NllTile<S>& tile, S* to) {
    const auto put = [&](auto&& value) {
      S* slab = zeros;
      for (int64_t k = 0; k < tile.count; slab += classes * inner) {
        for (int64_t i = 0; i < inner; ++i, ++k) {
          *(tile.y[k] >= 0 ? slab + tile.y[k] * inner + i : zeros + kZeros) = value(k);
        }
      }
    };
    put([&](int64_t k) { return tile.value[k]; });
    copy_bytes(to, zeros, tile.count * classes * int64_t(sizeof(S)), stream);
    put([](int64_t) { return S{}; });
  }

  // Writes some positions of one slab: as many classes at a time as there are zeros for.
  void write_part(const NllTile<S>& tile, S* to) {
    const int64_t count = tile.count, most = kZeros / count;
    for (int64_t first = 0; first < classes; first += most) {
      const int64_t block = std::min(most, classes - first);
      const auto put = [&](auto&& value) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t c = tile.y[i] - first;
          zeros[uint64_t(c) < uint64_t(block) ? c * count + i : kZeros] = value(i);
        }
      };
      put([&](int64_t i) { return tile.value[i]; });
      const int64_t rows = count == inner ? 1 : block, row = count == inner ? block * count : count;
      for (int64_t r = 0; r < rows; ++r) {
        copy_bytes(to + (first + r) * inner, zeros + r * row, row * int64_t(sizeof(S)), stream);
      }
      put([](int64_t) { return S{}; });
    }
  }
};

template <class T, class S>
static void backward_nll_of(const Backward& problem, int64_t begin, int64_t end) {
  NllGradient<S> gradient(problem, end - begin);
  NllTile<S> tile;
  Cursor cursor(problem, begin);
  for (int64_t position = begin; position < end; position += tile.count) {
    const int64_t count = gradient.together(position, std::min(kTile, end - position));
    tile.template read<T>(problem, cursor, position, count);
    gradient.write(tile, position);
    cursor.skip(count);
  }
  if (problem.stream) SIMD_FENCE();
}

static void backward_nll(const Backward& problem, int64_t begin, int64_t end) {
  with_numbers(problem.grad_logits, 0, [&](auto* out) XENT_INLINE_LAMBDA {
    using S = std::remove_pointer_t<decltype(out)>;
    backward_nll_of<std::conditional_t<sizeof(S) == 8, double, float>, S>(problem, begin, end);
  });
}

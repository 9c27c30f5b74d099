// The negative log likelihood: the forward reads one element for each position; the backward writes each element of the
// gradient once, all zero but one for each position. That is done by copies from a block of zeros in the first-level
// cache, in which a few are something else while they are copied: so stores that go past the caches never meet a line
// that has to come back for its one element.

constexpr int64_t kZeroBytes = 24576;

template <class T, class S>
XENT_INLINE void gather_elements(T* out, const S* in, int64_t stride, int64_t class_stride, const int64_t* y,
                                 int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T x = T(widen(in[i * stride + std::max(y[i], int64_t{0}) * class_stride]));
    out[i] = y[i] < 0 ? T(0) : x;
  }
}

// The element of each position's own class; zero where it has none.
template <class T>
static void gather_targets(T* out, const Problem& problem, Cursor cursor, const int64_t* y, int64_t count) {
  const View& view = problem.logits;
  const int64_t stride = view.stride[problem.dims - 1], class_stride = view.class_stride;
  for (int64_t done = 0; done < count;) {
    const int64_t run = cursor.run(count - done), offset = cursor.offset(view);
    const auto gather = [&](auto* in) {
      gather_elements(out + done, in + offset, stride, class_stride, y + done, run);
    };
    switch (view.type) {
      case ElementType::kFloat16: gather(static_cast<const Float16*>(view.data)); break;
      case ElementType::kBFloat16: gather(static_cast<const BFloat16*>(view.data)); break;
      case ElementType::kFloat32: gather(static_cast<const float*>(view.data)); break;
      default: gather(static_cast<const double*>(view.data));
    }
    done += run;
    cursor.advance(run);
  }
}

template <class T>
static void forward_nll(const Forward& problem, int64_t begin, int64_t end, Sums& sums) {
  const T* weight = static_cast<const T*>(problem.weight);
  Cursor cursor(problem, begin);
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t count = std::min(kTile, end - first);
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
    cursor.skip(count);
  }
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

// What a tile of positions writes, and of which classes.
template <class S>
struct NllTile {
  int64_t count = 0;
  int64_t y[kTile];
  S value[kTile];  // of class y

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

// Memory is [outer positions][classes][inner positions]; a slab is one of the outer ones.
template <class S>
struct NllGradient {
  static constexpr int64_t kZeros = kZeroBytes / int64_t(sizeof(S));
  alignas(64) S zeros[kZeros + 1];  // the last is for those that are not to be written
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

  // How many positions can be written together from `position` on: whole slabs, or some of one slab.
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

  // As many classes at a time as there are zeros for.
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
  switch (problem.grad_logits.type) {
    case ElementType::kFloat16: return backward_nll_of<float, Float16>(problem, begin, end);
    case ElementType::kBFloat16: return backward_nll_of<float, BFloat16>(problem, begin, end);
    case ElementType::kFloat32: return backward_nll_of<float, float>(problem, begin, end);
    default: return backward_nll_of<double, double>(problem, begin, end);
  }
}

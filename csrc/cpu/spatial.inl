// Kernels whose vector lanes are positions: a tile of positions, their classes in blocks. For logits whose neighbours
// in memory are positions ((N, C, H, W) and its kin), and for few classes in any layout, where a vector of classes
// would be mostly empty.
//
// forward_tile     reads the logits from memory once, and writes lse and loss; and the gradient, if it is asked for and
//                  one block holds all classes
// backward_tile    reads the logits and lse, and writes the gradient
//
// The forward copies a tile's block of classes to a buffer, [class][position], and passes over that twice, for the
// maximum and for the sums. Planes of an image often lie a power of two apart: without the copy, the cache lines of all
// planes would fall into the same few sets of the cache and drive each other out between the passes. Where classes are
// neighbours in memory, the copy is a transposition.
//
// The logit of a target's class is chosen by comparing each class with the targets, not looked up position by position:
// a number that is stored alone and soon read again in a vector makes the processor wait.

// A group: vectors that are worked on together, so that the latency of one's chain of maxima or sums is no wait.
constexpr int kGroup = 2;
template <class T>
constexpr int64_t kGroupLanes = kGroup * kLanes<T>;

// Returns how many classes a block has: all of them, where a tile of the least width holds them.
template <class T>
XENT_INLINE int64_t classes_of_block(const Problem& problem) {
  return problem.classes <= most_classes_of_tile(sizeof(T)) ? problem.classes : kTileBytes / int64_t(sizeof(T)) / kTile;
}

// Returns how many positions a tile has: as many as fit, so that it reads long runs of memory.
template <class T>
XENT_INLINE int64_t width_of_tile(const Problem& problem) {
  int64_t width = kTile;
  while (width * classes_of_block<T>(problem) * int64_t(sizeof(T)) > kTileBytes) width /= 2;
  return width;
}

// The buffer, with room for a vector past its end.
template <class T>
struct Tile {
  int64_t width;
  alignas(64) T cells[kTileBytes / sizeof(T) + kLanes<T> * kLanes<T>];

  XENT_INLINE_MEMBER explicit Tile(const Problem& problem) : width(width_of_tile<T>(problem)) {}
  XENT_INLINE_MEMBER T* row(int64_t k) { return cells + k * width; }
  XENT_INLINE_MEMBER const T* row(int64_t k) const { return cells + k * width; }
};

struct NoTile {
  explicit NoTile(const Problem&) {}
};

template <class T>
XENT_INLINE int64_t whole_groups(int64_t count) {
  return (count + kGroupLanes<T> - 1) / kGroupLanes<T> * kGroupLanes<T>;
}

// ---- between memory and tiles ---------------------------------------------------------------------------------------

// Brings the next tile from memory while a tile is worked on: its runs are too short for the hardware to foresee. Each
// step of the work asks for as much as it consumes. The data goes to the second-level cache, for in the first one
// planes a power of two apart would drive each other out.
class Prefetch {
 public:
  // For the tile after `cursor`'s, if its positions follow those of this one in memory; else asks for nothing.
  template <class T>
  XENT_INLINE_MEMBER Prefetch(const Tile<T>& tile, const Cursor& cursor, const View& view, int64_t c) {
    const int64_t inner = view.stride[cursor.problem.dims - 1];
    const int64_t size = view.type == ElementType::kFloat64 ? 8 : view.type == ElementType::kFloat32 ? 4 : 2;
    if (cursor.run(2 * tile.width) < 2 * tile.width) return;
    start_ =
        static_cast<const char*>(view.data) + (cursor.offset(view) + tile.width * inner + c * view.class_stride) * size;
    const bool rows = view.class_stride == 1;
    of_position_ = inner * size;
    of_class_ = rows ? kGroupLanes<T> * size : view.class_stride * size;
    bytes_ = rows || inner == 1 ? kGroupLanes<T> * size : 0;
  }

  // Asks for what the next tile has in the place of class k of the group at v.
  XENT_INLINE_MEMBER void ask(int64_t v, int64_t k) const {
    const char* p = start_ + v * of_position_ + k * of_class_;
    for (int64_t i = 0; i < bytes_; i += 64) __builtin_prefetch(p + i, 0, 2);
  }

 private:
  const char* start_ = nullptr;
  int64_t of_position_ = 0, of_class_ = 0, bytes_ = 0;
};

// Turns `count` <= kLanes rows of classes, one after the other in memory, into columns, a square of vectors at a time.
// Where `past` elements can be read behind the last row, vectors are loaded whole and read on into what follows their
// row. Each column has room for `room` elements.
template <class T>
XENT_INLINE void transpose_rows(T* columns, int64_t width, const T* rows, int64_t count, int64_t classes, int64_t past,
                                int64_t room) {
  constexpr int W = kLanes<T>;
  const bool whole = count == W && past + classes >= W;
  for (int64_t c = 0;;) {
    const int64_t n = std::min<int64_t>(W, classes - c);
    Vector<T> square[W];
    if (whole) {
      for (int r = 0; r < W; ++r) square[r] = load(rows + r * classes + c);
    } else {
      T edge[W * W] = {};
      for (int64_t r = 0; r < count; ++r) std::copy_n(rows + r * classes + c, n, edge + r * W);
      for (int r = 0; r < W; ++r) square[r] = load(edge + r * W);
    }
    transpose<T>(square);
#pragma GCC unroll 16
    for (int k = 0; k < W; ++k) {
      if (k < n) store_partial(columns + (c + k) * width, square[k], room);
    }
    if (c + W >= classes) break;
    c = std::min(c + W, classes - W);  // the last square overlaps the one before
  }
}

// Turns columns back into kLanes rows. A row of fewer classes than lanes is stored whole, and the next one overwrites
// its end: `rows` has room for a vector past its end.
template <class T>
XENT_INLINE void transpose_columns(T* rows, const T* columns, int64_t width, int64_t classes) {
  constexpr int W = kLanes<T>;
  for (int64_t c = 0;;) {
    Vector<T> square[W];
    for (int k = 0; k < W; ++k) square[k] = load(columns + (c + k) * width);
    transpose<T>(square);
    for (int r = 0; r < W; ++r) store(rows + r * classes + c, square[r]);
    if (c + W >= classes) break;
    c = std::min(c + W, classes - W);
  }
}

// Reads the classes [c, c + classes) of the `count` positions from `cursor` on. Lanes past the end become zero.
template <class T>
static void read_tile(Tile<T>& tile, const Cursor& cursor, int64_t count, const View& view, int64_t c,
                      int64_t classes) {
  const int64_t inner = view.stride[cursor.problem.dims - 1], step = view.class_stride;
  for_runs(cursor, count, view, [&](int64_t done, int64_t offset, int64_t run) XENT_INLINE_LAMBDA {
    offset += c * step;
    if (step == 1 && classes > 1) {
      constexpr int64_t kRows = kLanes<T>;
      for (int64_t i = 0; i < run; i += kRows) {
        T buffer[kRows * most_classes_of_tile(sizeof(T)) + kLanes<T>];
        const int64_t rows = std::min(kRows, run - i), from = offset + i * inner;
        const T* x = buffer;
        if (inner == classes) {
          x = read_or_point(buffer, view, from, 1, rows * classes);
        } else {
          for (int64_t r = 0; r < rows; ++r) read_into(buffer + r * classes, view, from + r * inner, 1, classes);
        }
        transpose_rows(tile.cells + done + i, tile.width, x, rows, classes,
                       x == buffer ? kLanes<T> : (run - i - rows) * classes, tile.width - done - i);
      }
    } else if (run >= kShortRun) {
      for (int64_t k = 0; k < classes; ++k) read_into(tile.row(k) + done, view, offset + k * step, inner, run);
    } else {
      for (int64_t i = 0; i < run; ++i) {
        for (int64_t k = 0; k < classes; ++k) {
          tile.row(k)[done + i] = read_one<T>(view, offset + i * inner + k * step);
        }
      }
    }
  });
  for (int64_t k = 0; k < classes; ++k) {
    for (int64_t i = count; i < whole_groups<T>(count); ++i) tile.row(k)[i] = 0;
  }
}

template <class T>
static void write_tile(const Tile<T>& tile, const Cursor& cursor, int64_t count, const View& view, int64_t c,
                       int64_t classes, bool stream) {
  const int64_t inner = view.stride[cursor.problem.dims - 1], step = view.class_stride;
  for_runs(cursor, count, view, [&](int64_t done, int64_t offset, int64_t run) XENT_INLINE_LAMBDA {
    offset += c * step;
    if (step == 1 && classes > 1) {
      constexpr int64_t kRows = kLanes<T>;
      for (int64_t i = 0; i < run; i += kRows) {
        alignas(64) T buffer[kRows * most_classes_of_tile(sizeof(T)) + kLanes<T>];
        const int64_t rows = std::min(kRows, run - i), to = offset + i * inner;
        transpose_columns(buffer, tile.cells + done + i, tile.width, classes);
        if (inner == classes) {
          write_from(buffer, view, to, 1, rows * classes, stream);
        } else {
          for (int64_t r = 0; r < rows; ++r) write_from(buffer + r * classes, view, to + r * inner, 1, classes);
        }
      }
    } else if (run >= kShortRun) {
      for (int64_t k = 0; k < classes; ++k) write_from(tile.row(k) + done, view, offset + k * step, inner, run, stream);
    } else {
      for (int64_t i = 0; i < run; ++i) {
        for (int64_t k = 0; k < classes; ++k) {
          write_from(tile.row(k) + done + i, view, offset + i * inner + k * step, 1, 1);
        }
      }
    }
  });
}

// Loads classes, and kIgnored, as lanes beside those of T.
template <class T>
XENT_INLINE Ints<T> load_classes(const int64_t* y) {
  Int<T> narrow[kLanes<T>];
  for (int k = 0; k < kLanes<T>; ++k) narrow[k] = Int<T>(y[k]);
  return load(narrow);
}

// Sums in double, and in eight chains that do not wait for each other.
template <class T>
XENT_INLINE double sum_of(const T* x, int64_t n) {
  double chains[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int k = 0; k < 8; ++k) chains[k] += double(x[i + k]);
  }
  for (; i < n; ++i) chains[0] += double(x[i]);
  return ((chains[0] + chains[1]) + (chains[2] + chains[3])) + ((chains[4] + chains[5]) + (chains[6] + chains[7]));
}

// Sums the product of class weight and sample weight over the targets that are not ignored; without weights, counts
// them. `y` and `sample_weight` have room for whole vectors.
template <class T>
XENT_INLINE double sum_of_target_weights(const T* weight, const T* sample_weight, const int64_t* y, int64_t count) {
  if (weight || sample_weight) {
    T weights[kTile + kLanes<T>];
    if (!weight) std::fill_n(weights, count, T(1));
    for (int64_t i = 0; i < count && weight; ++i) weights[i] = y[i] < 0 ? T(0) : weight[y[i]];
    for (int64_t i = 0; i < count && sample_weight; i += kLanes<T>) {
      const Vector<T> product = load(weights + i) * load(sample_weight + i);
      store(weights + i, select(load_classes<T>(y + i) >= 0, product, Vector<T>{}));
    }
    return sum_of(weights, count);
  }
  int64_t counted = 0;
  for (int64_t i = 0; i < count; ++i) counted += y[i] >= 0;
  return double(counted);
}

// Adds the weights of the targets that count: a mean's denominator.
template <class T>
static void sum_target_weights(const Problem& problem, int64_t begin, int64_t end, Sums& sums) {
  const T* weight = problem.target_kind == TargetKind::kIndices ? static_cast<const T*>(problem.weight) : nullptr;
  for_tiles(problem, begin, end, kTile, [&](const Cursor& cursor, int64_t first, int64_t count) {
    int64_t y[kTile + kLanes<T>];
    T sample_weights[kTile + kLanes<T>];
    read_labels(y, problem, cursor, first, count);
    if (problem.sample_weight) read_sample_weights(sample_weights, problem, cursor, count);
    sums.weight += sum_of_target_weights(weight, problem.sample_weight ? sample_weights : nullptr, y, count);
  });
}

// ---- targets --------------------------------------------------------------------------------------------------------

// The targets of a tile. Of an index target, `hit` is (1 - e) w_y and `smoothed` is (e / C) w_y. Lanes past the end are
// ignored targets.
template <class T>
struct TileTargets {
  alignas(64) Int<T> y[kTile];      // kIgnored for probabilities, too, which have no class of their own
  alignas(64) Int<T> valid[kTile];  // as lanes of a mask
  alignas(64) T hit[kTile], smoothed[kTile];
  alignas(64) T sample_weight[kTile];  // the factor of the loss
  double sum_of_weights = 0;
  bool any_valid = false;

  // `weighed`: the sum of the weights is needed.
  TileTargets(const Problem& problem, const Cursor& cursor, int64_t first, int64_t count, bool weighed) {
    const int64_t lanes = whole_groups<T>(count);
    const T* weight = static_cast<const T*>(problem.weight);
    const T keep = T(problem.keep), share = T(problem.share);
    read_sample_weights(sample_weight, problem, cursor, count);
    for (int64_t i = count; i < lanes; ++i) sample_weight[i] = 0;
    if (problem.objective == Objective::kProbabilities) {
      any_valid = count > 0;
      if (weighed) sum_of_weights = sum_of(sample_weight, count);
      for (int64_t i = 0; i < lanes; ++i) {
        y[i] = kIgnored;
        valid[i] = -Int<T>(i < count);
        hit[i] = smoothed[i] = 0;
      }
      return;
    }
    int64_t classes[kTile];
    read_positions(classes, cursor, count, problem.target);
    check_targets(classes, problem, first, count);
    for (int64_t i = count; i < lanes; ++i) classes[i] = kIgnored;
    if (weighed) {
      sum_of_weights = sum_of_target_weights(weight, problem.sample_weight ? sample_weight : nullptr, classes, count);
    }
    Ints<T> any{};
    for (int64_t v = 0; v < lanes; v += kLanes<T>) {
      const Ints<T> index = load_classes<T>(classes + v), counts = index >= 0;
      store(y + v, index);
      store(valid + v, counts);
      store(hit + v, select(counts, broadcast(keep), Vector<T>{}));
      store(smoothed + v, select(counts, broadcast(share), Vector<T>{}));
      any |= counts;
    }
    for (int k = 0; k < kLanes<T>; ++k) any_valid |= any[k] != 0;
    for (int64_t i = 0; i < count && weight; ++i) {
      if (classes[i] < 0) continue;
      hit[i] *= weight[classes[i]];
      smoothed[i] *= weight[classes[i]];
    }
  }

  XENT_INLINE_MEMBER Ints<T> classes_at(int64_t v) const { return load(y + v); }
  XENT_INLINE_MEMBER Ints<T> valid_at(int64_t v) const { return load(valid + v); }
};

// The coefficient that class c has at a vector of positions, as of dense_coefficients(). `q`: their probabilities.
template <class T, Objective objective>
XENT_INLINE Vector<T> coefficient(const Problem& problem, int64_t c, const T* q) {
  const T* weight = static_cast<const T*>(problem.weight);
  const Vector<T> w = broadcast(weight ? weight[c] : T(1));
  if constexpr (objective != Objective::kProbabilities) return w;
  const T keep = T(problem.keep), share = T(problem.share);
  return w * (load(q) * keep + share);
}

// ---- forward --------------------------------------------------------------------------------------------------------

// The sums of each position over the blocks seen so far, and what adding them up has lost.
template <class T>
struct TileSums {
  alignas(64) T max[kTile], ties[kTile], rest[kTile], lost[kTile], target_logit[kTile];
  alignas(64) T spread[kTile], spread_lost[kTile], mass[kTile], mass_lost[kTile];

  // Adds a block's sums to the lanes [v, v + kLanes). `first`: the block is the first one, and nothing is stored yet.
  template <bool dense>
  XENT_INLINE_MEMBER void add(int64_t v, bool first, Vector<T> new_max, Vector<T> block_ties,
                              const LaneSums<T, dense>& lanes) {
    const Vector<T> zero{}, old_max = load(max + v);
    store(max + v, new_max);
    if (first) {
      store(ties + v, block_ties);
      store(rest + v, lanes.rest);
      store(lost + v, zero);
      if constexpr (dense) {
        store(spread + v, lanes.spread);
        store(spread_lost + v, lanes.spread_lost);
        store(mass + v, lanes.mass);
        store(mass_lost + v, lanes.mass_lost);
      }
      return;
    }
    const Vector<T> raised = new_max - old_max;
    const auto higher = raised > zero;
    const Vector<T> factor = exp(-raised);
    const Vector<T> old_ties = load(ties + v), old_rest = load(rest + v), old_lost = load(lost + v);
    // Over thousands of blocks the roundings of a plain sum would show.
    Vector<T> sum, sum_lost;
    two_sum(select(higher, (old_rest + old_ties) * factor, old_rest), lanes.rest, sum, sum_lost);
    store(rest + v, sum);
    store(lost + v, select(higher, old_lost * factor, old_lost) + sum_lost);
    store(ties + v, select(higher, zero, old_ties) + block_ties);
    if constexpr (dense) {
      const Vector<T> old_mass = load(mass + v), old_spread = load(spread + v);
      Vector<T> new_spread = select(higher & (old_mass != zero), old_spread + old_mass * raised, old_spread);
      Vector<T> new_mass = old_mass;
      Vector<T> new_spread_lost = load(spread_lost + v) + lanes.spread_lost;
      Vector<T> new_mass_lost = load(mass_lost + v) + lanes.mass_lost;
      add_keeping_lost(new_spread, lanes.spread, new_spread_lost);
      add_keeping_lost(new_mass, lanes.mass, new_mass_lost);
      store(spread + v, new_spread);
      store(spread_lost + v, new_spread_lost);
      store(mass + v, new_mass);
      store(mass_lost + v, new_mass_lost);
    }
  }
};

// Adds a block of `classes` classes from c on, at the group at v. With `keep`, exponentials take the logits' place.
template <class T, Objective objective, bool keep>
XENT_INLINE void sum_group(TileSums<T>& sums, const Problem& problem, Tile<T>& x, const Tile<T>* q,
                           const TileTargets<T>& targets, const Prefetch& next, int64_t v, int64_t c, int64_t classes) {
  constexpr int W = kLanes<T>;
  constexpr bool dense = objective != Objective::kIndex;
  Vector<T> max[kGroup], target_logit[kGroup];
  Ints<T> y[kGroup];
#pragma GCC unroll 2
  for (int g = 0; g < kGroup; ++g) {
    max[g] = c == 0 ? broadcast(std::numeric_limits<T>::lowest()) : load(sums.max + v + g * W);
    target_logit[g] = c == 0 ? Vector<T>{} : load(sums.target_logit + v + g * W);
    y[g] = targets.classes_at(v + g * W);
  }
  const T* logits = x.cells + v;
  Ints<T> index = Ints<T>{} + Int<T>(c);
  for (int64_t k = 0; k < classes; ++k, logits += x.width, index += 1) {
    next.ask(v, k);
#pragma GCC unroll 2
    for (int g = 0; g < kGroup; ++g) {
      const Vector<T> logit = load(logits + g * W);
      max[g] = maximum(logit, max[g]);
      if constexpr (objective != Objective::kProbabilities)
        target_logit[g] = select(y[g] == index, logit, target_logit[g]);
    }
  }
#pragma GCC unroll 2
  for (int g = 0; g < kGroup; ++g) store(sums.target_logit + v + g * W, target_logit[g]);

  LaneSums<T, dense> lanes[kGroup];
  T* cells = x.cells + v;
  for (int64_t first = 0; first < classes; first += kTermsOfASum) {
    LaneSums<T, dense> part[kGroup];
    const int64_t last = std::min(first + kTermsOfASum, classes);
    for (int64_t k = first; k < last; ++k, cells += x.width) {
#pragma GCC unroll 2
      for (int g = 0; g < kGroup; ++g) {
        T* const cell = cells + g * W;
        const Vector<T> a =
            dense ? coefficient<T, objective>(problem, c + k, q ? q->row(k) + v + g * W : nullptr) : Vector<T>{};
        const Vector<T> exponential = part[g].add(load(cell), max[g], a);
        if constexpr (keep) store(cell, exponential);
      }
    }
#pragma GCC unroll 2
    for (int g = 0; g < kGroup; ++g) lanes[g].add(part[g]);
  }
#pragma GCC unroll 2
  for (int g = 0; g < kGroup; ++g) {
    const Vector<T> ties = T(classes) - lanes[g].count_of_others();
    sums.template add<dense>(v + g * W, c == 0, max[g], ties, lanes[g]);
  }
}

// What a vector of positions needs for its gradient, once its sums are known.
template <class T>
struct GroupSums {
  Vector<T> ties, rest, gap, hit, sample_weight;
  Vector<T> of_z_loss;  // what z-loss adds to A
};

// Turns the exponentials of all classes of a vector of positions into their gradient. An index target's own
// softmax - 1 is minus the share of the other classes, which are summed without it.
template <class T, bool smoothed>
XENT_INLINE void finish_gradient(const Forward& problem, Tile<T>& x, const TileTargets<T>& targets,
                                 const GroupSums<T>& sums, int64_t v) {
  const T* weight = static_cast<const T*>(problem.weight);
  const T share = T(problem.share);
  const Vector<T> zero{}, one = zero + T(1);
  const auto valid = targets.valid_at(v) != Ints<T>{};
  const Vector<T> is_maximum = select(sums.gap == zero, one, zero), exponential = exp(-sums.gap);
  const Vector<T> others = (sums.ties - is_maximum) + (sums.rest - select(sums.gap == zero, zero, exponential));
  // With smoothing the scale comes last, as in the backward: infinite, it would be multiplied into each term.
  const Vector<T> scale = T(problem.scale) * sums.sample_weight;
  const Vector<T> rest_of_total = sums.of_z_loss + (smoothed ? T(problem.smoothed_total) : T(0));
  const Vector<T> share_of_one = (smoothed ? one : scale) / (sums.ties + sums.rest);
  const Vector<T> factor = share_of_one * (sums.hit + rest_of_total);
  Vector<T> own = -(share_of_one * sums.hit) * others;
  if (smoothed || problem.z_loss != 0) own += share_of_one * rest_of_total * exponential;
  if constexpr (smoothed) own = scale * (own - load(targets.smoothed + v));
  const Ints<T> y = targets.classes_at(v);
  const int64_t classes = problem.classes, width = x.width;
  T* cell = x.cells + v;
  Ints<T> index{};
  for (int64_t k = 0; k < classes; ++k, cell += width, index += 1) {
    Vector<T> gradient = load(cell) * factor;
    if constexpr (smoothed) gradient = scale * (gradient - share * (weight ? weight[k] : T(1)));
    store(cell, select(y == index, own, select(valid, gradient, zero)));
  }
}

// With one_pass, for all classes in one block, the gradient is made of the exponentials that the sums are made of.
template <class T, Objective objective, bool one_pass>
static void forward_tile(const Forward& problem, const Cursor& cursor, int64_t first, int64_t count, Sums& sums) {
  constexpr bool soft = objective == Objective::kProbabilities, smoothed = objective == Objective::kSmoothedIndex;
  Tile<T> x(problem);
  std::conditional_t<soft, Tile<T>, NoTile> q(problem);
  const TileTargets<T> targets(problem, cursor, first, count, !one_pass);
  TileSums<T> tile;
  const int64_t of_block = classes_of_block<T>(problem), lanes = whole_groups<T>(count);
  for (int64_t c = 0; c < problem.classes && targets.any_valid; c += of_block) {
    const int64_t classes = std::min(of_block, problem.classes - c);
    read_tile(x, cursor, count, problem.logits, c, classes);
    const Tile<T>* probabilities = nullptr;
    if constexpr (soft) {
      read_tile(q, cursor, count, problem.target, c, classes);
      probabilities = &q;
    }
    const Prefetch next(x, cursor, problem.logits, c);
    for (int64_t v = 0; v < lanes; v += kGroupLanes<T>) {
      sum_group<T, objective, one_pass>(tile, problem, x, probabilities, targets, next, v, c, classes);
    }
  }

  const Vector<T> zero{};
  const T share = objective == Objective::kIndex ? T(0) : soft ? T(1) : T(problem.share);
  T losses[kTile + kGroupLanes<T>];
  for (int64_t v = 0; v < count; v += kLanes<T>) {
    const int64_t n = std::min<int64_t>(kLanes<T>, count - v);
    const auto save = [&](saved::Row row, Vector<T> value) {
      store_partial(saved_row<T>(problem, row) + first + v, value, n);
    };
    if (!targets.any_valid) {
      store(losses + v, zero);
      save(saved::kLse, zero);
      save(saved::kLseLost, zero);
      if constexpr (one_pass) {
        for (int64_t k = 0; k < problem.classes; ++k) store(x.row(k) + v, zero);
      }
      continue;
    }
    const auto valid = targets.valid_at(v) != Ints<T>{};
    const Vector<T> max = load(tile.max + v), hit = load(targets.hit + v);
    const Vector<T> ties = load(tile.ties + v), rest = load(tile.rest + v) + load(tile.lost + v);
    const Vector<T> log_sum = log_of_sum(ties, rest);
    const Vector<T> gap = max - load(tile.target_logit + v);
    Vector<T> lse_rounded, lse_lost;
    two_sum(max, log_sum, lse_rounded, lse_lost);
    save(saved::kLse, select(valid, lse_rounded, zero));
    save(saved::kLseLost, select(valid, lse_lost, zero));
    Vector<T> spread{}, mass{};
    if constexpr (objective != Objective::kIndex) {
      spread = load(tile.spread + v) + load(tile.spread_lost + v);
      mass = load(tile.mass + v) + load(tile.mass_lost + v);
    }
    if constexpr (soft) save(saved::kMass, mass);
    Vector<T> loss = index_loss(hit, broadcast(share), gap, spread, mass, log_sum), of_z_loss{};
    if (problem.z_loss != 0) {
      const Vector<T> lse = max + log_sum;
      of_z_loss = T(2 * problem.z_loss) * lse;
      loss += T(problem.z_loss) * lse * lse;
    }
    const Vector<T> sample_weight = load(targets.sample_weight + v);
    store(losses + v, select(valid, loss * sample_weight, zero));
    if constexpr (one_pass) {
      finish_gradient<T, smoothed>(problem, x, targets, {ties, rest, gap, hit, sample_weight, of_z_loss}, v);
    }
  }
  sums.loss += sum_of<T>(losses, count);
  sums.weight += targets.sum_of_weights;
  if (problem.loss) write_from(losses, problem.loss, first, 1, count);
  if constexpr (one_pass) write_tile(x, cursor, count, problem.grad_logits, 0, problem.classes, problem.stream);
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Reads grad_output / denominator.
template <class T>
XENT_INLINE void read_scales(T* scale, const Backward& problem, const Cursor& cursor, int64_t count) {
  bool one_for_all = true;
  for (int d = 0; d < problem.dims; ++d) one_for_all &= problem.grad_output.stride[d] == 0;
  if (one_for_all) {
    std::fill_n(scale, count, T(double(read_one<T>(problem.grad_output, 0)) * problem.scale));
  } else {
    read_positions(scale, cursor, count, problem.grad_output);
    for (int64_t i = 0; i < count; ++i) scale[i] = T(double(scale[i]) * problem.scale);
  }
}

// The constants of each position's gradient, as in GradientTerms. rest_of_total: A without `hit`.
template <class T>
struct TileTerms {
  alignas(64) T scale[kTile], rest_of_total[kTile], lse_rounded[kTile], lse_lost[kTile];

  TileTerms(const Backward& problem, const TileTargets<T>& targets, const Cursor& cursor, int64_t first,
            int64_t count) {
    const bool soft = problem.objective == Objective::kProbabilities;
    const int64_t lanes = whole_groups<T>(count);
    const auto read_saved = [&](T* out, saved::Row row) {
      read_elements(out, saved_row<T>(problem, row) + first, 1, count);
    };
    read_scales(scale, problem, cursor, count);
    read_saved(lse_rounded, saved::kLse);
    read_saved(lse_lost, saved::kLseLost);
    if (soft) read_saved(rest_of_total, saved::kMass);
    for (int64_t i = 0; i < lanes && !soft; ++i) rest_of_total[i] = T(problem.smoothed_total);
    for (int64_t i = 0; i < count && problem.z_loss != 0; ++i) {
      rest_of_total[i] += T(2 * problem.z_loss) * (lse_rounded[i] + lse_lost[i]);
    }
    for (int64_t i = 0; i < count && problem.sample_weight; ++i) scale[i] *= targets.sample_weight[i];
    for (int64_t i = count; i < lanes; ++i) scale[i] = rest_of_total[i] = lse_rounded[i] = lse_lost[i] = 0;
  }

  XENT_INLINE_MEMBER Vector<T> log_softmax(Vector<T> x, int64_t v) const {
    return (x - load(lse_rounded + v)) - load(lse_lost + v);
  }

  // The gradient of an index target's own class.
  XENT_INLINE_MEMBER Vector<T> own_gradient(const TileTargets<T>& targets, Vector<T> target_logit, int64_t v) const {
    return load(scale + v) * target_gradient(load(targets.hit + v), load(rest_of_total + v), load(targets.smoothed + v),
                                             log_softmax(target_logit, v));
  }
};

// The same in registers, for the positions of a group and an index target.
template <class T>
struct GroupTerms {
  Vector<T> rounded[kGroup], lost[kGroup], scale[kGroup], total[kGroup], own[kGroup];
  Ints<T> y[kGroup], valid[kGroup];

  XENT_INLINE_MEMBER GroupTerms(const TileTerms<T>& terms, const TileTargets<T>& targets, const T* target_logits,
                                int64_t v) {
#pragma GCC unroll 2
    for (int g = 0; g < kGroup; ++g, v += kLanes<T>) {
      rounded[g] = load(terms.lse_rounded + v);
      lost[g] = load(terms.lse_lost + v);
      scale[g] = load(terms.scale + v);
      total[g] = load(targets.hit + v) + load(terms.rest_of_total + v);
      own[g] = terms.own_gradient(targets, load(target_logits + g * kLanes<T>), v);
      y[g] = targets.classes_at(v);
      valid[g] = targets.valid_at(v);
    }
  }

  template <bool smoothed>
  XENT_INLINE_MEMBER Vector<T> gradient(int g, Vector<T> x, Ints<T> index, Vector<T> smoothed_weight) const {
    const Vector<T> softmax = exp((x - rounded[g]) - lost[g]);
    Vector<T> result = total[g] * softmax;
    if constexpr (smoothed) result -= smoothed_weight;
    return select(valid[g] != Ints<T>{}, select(y[g] == index, own[g], scale[g] * result), Vector<T>{});
  }
};

// Where positions are neighbours in memory: reads each logit once and stores its gradient at once, without a tile.
template <class T, class S, bool smoothed>
static void backward_planes(const Backward& problem, const TileTargets<T>& targets, const TileTerms<T>& terms,
                            const Cursor& cursor, int64_t count, const Prefetch& next) {
  constexpr int W = kLanes<T>;
  const View &from = problem.logits, &to = problem.grad_logits;
  const S* const x = static_cast<const S*>(from.data) + cursor.offset(from);
  S* const out = static_cast<S*>(to.data) + cursor.offset(to);
  const T* weight = static_cast<const T*>(problem.weight);
  const T share = T(problem.share);
  const int64_t bytes = W * int64_t(sizeof(S));
  const bool stream = problem.stream && reinterpret_cast<uintptr_t>(out) % bytes == 0 &&
                      to.class_stride * int64_t(sizeof(S)) % bytes == 0;
  for (int64_t v = 0; v < count; v += kGroupLanes<T>) {
    T target_logits[kGroupLanes<T>];
    for (int64_t i = 0; i < kGroupLanes<T>; ++i) {
      const int64_t y = targets.y[v + i];
      target_logits[i] = y < 0 ? T(0) : T(widen(x[y * from.class_stride + v + i]));
    }
    const GroupTerms<T> group(terms, targets, target_logits, v);
    const S* logits = x + v;
    S* gradients = out + v;
    Ints<T> index{};
    for (int64_t k = 0; k < problem.classes;
         ++k, logits += from.class_stride, gradients += to.class_stride, index += 1) {
      next.ask(v, k);
      const Vector<T> smoothed_weight = broadcast(smoothed ? share * (weight ? weight[k] : T(1)) : T(0));
#pragma GCC unroll 2
      for (int g = 0; g < kGroup; ++g) {
        const Vector<T> logit = load_from_memory<T>(logits + g * W);
        const Vector<T> gradient = group.template gradient<smoothed>(g, logit, index, smoothed_weight);
        store_to_memory<S, T>(gradients + g * W, gradient, stream);
      }
    }
  }
}

// Where classes are neighbours in memory: a row at a time, whose terms are the same for all lanes, so that nothing is
// transposed. Stores into the caches, since rows do not end where the lines do that could be stored past them.
template <class T, class S, bool smoothed>
static void backward_short_rows(const Backward& problem, const TileTargets<T>& targets, const TileTerms<T>& terms,
                                const Cursor& cursor, int64_t count, const Prefetch& next) {
  constexpr int W = kLanes<T>;
  const int inner = problem.dims - 1;
  const View &from = problem.logits, &to = problem.grad_logits;
  const S* x = static_cast<const S*>(from.data) + cursor.offset(from);
  S* out = static_cast<S*>(to.data) + cursor.offset(to);
  const T* weight = static_cast<const T*>(problem.weight);
  const T share = T(problem.share);
  const int64_t n = problem.classes, rest = n % W;
  alignas(64) T own[kTile];
  for (int64_t v = 0; v < count; v += W) {
    T target_logits[W];
    for (int64_t i = 0; i < W; ++i) {
      const int64_t y = v + i < count ? targets.y[v + i] : kIgnored;
      target_logits[i] = y < 0 ? T(0) : T(widen(x[(v + i) * from.stride[inner] + y]));
    }
    store(own + v, terms.own_gradient(targets, load(target_logits), v));
  }
  for (int64_t i = 0; i < count; ++i, x += from.stride[inner], out += to.stride[inner]) {
    for (int64_t k = i % kGroupLanes<T>; k < n; k += kGroupLanes<T>) next.ask(i - i % kGroupLanes<T>, k);
    const int64_t y = targets.y[i];
    if (y < 0) {
      std::fill_n(out, n, S{});
      continue;
    }
    const Vector<T> rounded = broadcast(terms.lse_rounded[i]), lost = broadcast(terms.lse_lost[i]);
    const Vector<T> scale = broadcast(terms.scale[i]), total = broadcast(targets.hit[i] + terms.rest_of_total[i]);
    const auto gradient = [&](Vector<T> logits, int64_t c) XENT_INLINE_LAMBDA {
      Vector<T> result = total * exp((logits - rounded) - lost);
      if constexpr (smoothed) result -= weight ? share * load(weight + c) : broadcast(share);
      return scale * result;
    };
    const Vector<T> last = load_from_memory<T>(x + n - W);  // before what it overlaps is overwritten
    for (int64_t c = 0; c + W <= n; c += W)
      store_to_memory<S, T>(out + c, gradient(load_from_memory<T>(x + c), c), false);
    if (rest) store_to_memory<S, T>(out + n - W, gradient(last, n - W), false);
    narrow(own[i], out[y]);
  }
}

// Writes the gradient of an index target without a tile, where the layouts allow it. Returns true if so.
template <class T, bool smoothed>
static bool backward_directly(const Backward& problem, const TileTargets<T>& targets, const TileTerms<T>& terms,
                              const Cursor& cursor, int64_t count, const Prefetch& next) {
  const View &from = problem.logits, &to = problem.grad_logits;
  const int inner = problem.dims - 1;
  if (!to || to.type != from.type || cursor.run(count) < count) return false;
  const bool planes = from.stride[inner] == 1 && to.stride[inner] == 1 && count % kGroupLanes<T> == 0;
  const bool rows = from.class_stride == 1 && to.class_stride == 1 && !problem.stream && problem.classes >= kLanes<T>;
  bool done = false;
  with_numbers(from, 0, [&](auto* logits) XENT_INLINE_LAMBDA {
    using S = std::remove_pointer_t<decltype(logits)>;
    if constexpr (kFillsVectors<S, T>) {
      if (planes) {
        backward_planes<T, S, smoothed>(problem, targets, terms, cursor, count, next);
      } else if (rows) {
        backward_short_rows<T, S, smoothed>(problem, targets, terms, cursor, count, next);
      }
      done = planes || rows;
    }
  });
  return done;
}

template <class T, Objective objective>
static void backward_tile(const Backward& problem, const Cursor& cursor, int64_t first, int64_t count) {
  constexpr bool soft = objective == Objective::kProbabilities, smoothed = objective == Objective::kSmoothedIndex;
  constexpr int W = kLanes<T>;
  Tile<T> x(problem);
  std::conditional_t<soft, Tile<T>, NoTile> q(problem);
  const TileTargets<T> targets(problem, cursor, first, count, false);
  const TileTerms<T> terms(problem, targets, cursor, first, count);
  if constexpr (!soft) {
    const Prefetch next(x, cursor, problem.logits, 0);
    if (backward_directly<T, smoothed>(problem, targets, terms, cursor, count, next)) return;
  }

  const T* weight = static_cast<const T*>(problem.weight);
  const T keep = T(problem.keep);
  const T share = T(soft ? 1 : problem.share);
  const int64_t of_block = classes_of_block<T>(problem), lanes = whole_groups<T>(count);
  for (int64_t c = 0; c < problem.classes; c += of_block) {
    const int64_t classes = std::min(of_block, problem.classes - c);
    if (targets.any_valid) {
      read_tile(x, cursor, count, problem.logits, c, classes);
      if constexpr (soft) read_tile(q, cursor, count, problem.target, c, classes);
    }
    const Prefetch next(x, cursor, problem.logits, c);
    for (int64_t v = 0; v < lanes; v += kGroupLanes<T>) {
      T target_logits[kGroupLanes<T>];
      T* cells = x.cells + v;
      for (int g = 0; g < kGroup && !soft; ++g) {
        const Ints<T> y = targets.classes_at(v + g * W);
        Vector<T> target_logit{};
        Ints<T> index = Ints<T>{} + Int<T>(c);
        for (int64_t k = 0; k < classes; ++k, index += 1) {
          target_logit = select(y == index, load(cells + k * x.width + g * W), target_logit);
        }
        store(target_logits + g * W, target_logit);
      }
      const GroupTerms<T> group(terms, targets, target_logits, v);
      Ints<T> index = Ints<T>{} + Int<T>(c);
      for (int64_t k = 0; k < classes; ++k, cells += x.width, index += 1) {
        next.ask(v, k);
        const T own_weight = weight ? weight[c + k] : T(1);
#pragma GCC unroll 2
        for (int g = 0; g < kGroup; ++g) {
          T* const cell = cells + g * W;
          if constexpr (soft) {
            T* const q_cell = q.row(k) + v + g * W;
            const Vector<T> log_softmax = (load(cell) - group.rounded[g]) - group.lost[g];
            const Vector<T> a = coefficient<T, objective>(problem, c + k, q_cell);
            store(cell, group.scale[g] * soft_gradient(load(terms.rest_of_total + v + g * W), log_softmax, a));
            store(q_cell, -(group.scale[g] * (keep * own_weight)) * log_softmax);
          } else {
            store(cell, group.template gradient<smoothed>(g, load(cell), index, broadcast(share * own_weight)));
          }
        }
      }
    }
    if (problem.grad_logits) write_tile(x, cursor, count, problem.grad_logits, c, classes, problem.stream);
    if constexpr (soft) {
      if (problem.grad_target) write_tile(q, cursor, count, problem.grad_target, c, classes, problem.stream);
    }
  }
}

// Kernels whose vector lanes are positions: a tile of kTile positions, their classes in blocks. For logits whose
// neighbours in memory are positions ((N, C, H, W) and its kin), and for few classes in any layout, where a vector of
// classes would be mostly empty.
//
// A tile's block of classes is first copied to a buffer, [class][position]. Planes of an image often lie a power of two
// apart, so that the cache lines which a tile needs of each plane would all fall into the same few sets of the cache
// and drive each other out between the pass for the maximum and the pass for the sum.

template <class T>
constexpr int64_t kClassBlock = kTileBytes / sizeof(T) / kTile;

template <class T>
XENT_INLINE int64_t whole_vectors(int64_t count) {
  return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Each plane is read in a short run, too short for the hardware to see it coming. Not further ahead than the run after
// the next: lines of planes a power of two apart drive each other out.
XENT_INLINE void prefetch(const View& view, int64_t offset, int64_t n) {
  const int64_t size = view.type == ElementType::kFloat64 ? 8 : view.type == ElementType::kFloat32 ? 4 : 2;
  const char* p = static_cast<const char*>(view.data) + offset * size;
  for (int64_t i = 0; i < n * size; i += 64) __builtin_prefetch(p + i);
}

// The classes [c, c + classes) of the `count` positions from `cursor` on. Lanes past the end become zero. Runs along
// the innermost dimension that are shorter than kShortRun are read one position after the other, all classes of each.
template <class T>
static void read_tile(T* tile, Cursor cursor, int64_t count, const View& view, int64_t c, int64_t classes) {
  const int64_t inner = view.stride[cursor.problem.dims - 1];
  for (int64_t done = 0; done < count;) {
    const int64_t run = cursor.run(count - done), offset = cursor.offset(view) + c * view.class_stride;
    if (run >= kShortRun) {
      for (int64_t k = 0; k < classes; ++k) {
        read_into(tile + k * kTile + done, view, offset + k * view.class_stride, inner, run);
        if (inner == 1) prefetch(view, offset + (k + 2) * view.class_stride, run);
      }
    } else {
      for (int64_t i = 0; i < run; ++i) {
        T column[kClassBlock<T>];
        read_into(column, view, offset + i * inner, view.class_stride, classes);
        for (int64_t k = 0; k < classes; ++k) tile[k * kTile + done + i] = column[k];
      }
    }
    done += run;
    cursor.advance(run);
  }
  for (int64_t k = 0; k < classes; ++k) {
    for (int64_t i = count; i < whole_vectors<T>(count); ++i) tile[k * kTile + i] = 0;
  }
}

template <class T>
static void write_tile(const T* tile, Cursor cursor, int64_t count, const View& view, int64_t c, int64_t classes,
                       bool stream) {
  const int64_t inner = view.stride[cursor.problem.dims - 1];
  for (int64_t done = 0; done < count;) {
    const int64_t run = cursor.run(count - done), offset = cursor.offset(view) + c * view.class_stride;
    if (run >= kShortRun) {
      for (int64_t k = 0; k < classes; ++k) {
        write_from(tile + k * kTile + done, view, offset + k * view.class_stride, inner, run, stream);
      }
    } else {
      for (int64_t i = 0; i < run; ++i) {
        T column[kClassBlock<T>];
        for (int64_t k = 0; k < classes; ++k) column[k] = tile[k * kTile + done + i];
        write_from(column, view, offset + i * inner, view.class_stride, classes);
      }
    }
    done += run;
    cursor.advance(run);
  }
}

// The index targets of a tile. `hit` is a target's own coefficient, (1 - e) w_y; ignored positions have class -1.
template <class T>
struct TileTargets {
  int64_t y[kTile];
  T hit[kTile], valid[kTile];
  bool any_valid = false;

  TileTargets(const Problem& problem, const Cursor& cursor, int64_t first, int64_t count) {
    const T* weight = static_cast<const T*>(problem.weight);
    const T keep = T(1 - problem.label_smoothing);
    const bool soft = problem.kind == TargetKind::kSoft;
    for (int64_t i = 0; i < whole_vectors<T>(count); ++i) y[i] = -1;
    if (!soft) {
      read_positions(y, cursor, count, problem.target);
      check_targets(y, problem, first, count);
    }
    for (int64_t i = 0; i < whole_vectors<T>(count); ++i) {
      const bool counts = soft ? i < count : y[i] >= 0;
      any_valid |= counts;
      valid[i] = counts;
      hit[i] = soft ? T(0) : valid[i] * keep;
    }
    if (soft || !weight) return;
    for (int64_t i = 0; i < count; ++i) hit[i] = y[i] < 0 ? T(0) : keep * weight[y[i]];
  }
};

// The coefficient of class c in a vector of positions. `q` are their probabilities, read for soft targets only.
template <class T, TargetKind kind>
XENT_INLINE Vector<T> coefficient(const Problem& problem, int64_t c, const T* q) {
  const T* weight = static_cast<const T*>(problem.weight);
  const Vector<T> w = broadcast(weight ? weight[c] : T(1));
  if constexpr (kind != TargetKind::kSoft) return w;
  const T keep = T(1 - problem.label_smoothing), share = T(problem.label_smoothing / double(problem.classes));
  return w * (load(q) * keep + share);
}

template <class T>
struct TileSums {
  alignas(64) T max[kTile], ties[kTile], rest[kTile], lost[kTile], target_logit[kTile];
  alignas(64) T spread[kTile], spread_lost[kTile], mass[kTile], mass_lost[kTile];

  TileSums() {
    for (int64_t i = 0; i < kTile; ++i) {
      max[i] = std::numeric_limits<T>::lowest();
      ties[i] = rest[i] = lost[i] = target_logit[i] = spread[i] = spread_lost[i] = mass[i] = mass_lost[i] = 0;
    }
  }

  // Classes [c, c + classes) of the lanes [v, v + kLanes). The exponentials take the logits' place where they are kept.
  template <TargetKind kind, bool keep>
  XENT_INLINE_MEMBER void add(const Problem& problem, T* x, const T* q, int64_t v, int64_t c, int64_t classes) {
    const Vector<T> zero{};
    const Vector<T> old_max = load(max + v);
    Vector<T> new_max = old_max;
    for (int64_t k = 0; k < classes; ++k) new_max = maximum(load(x + k * kTile + v), new_max);

    LaneSums<T, kind != TargetKind::kIndex> lanes;
    for (int64_t first = 0; first < classes; first += kTermsOfASum) {
      LaneSums<T, kind != TargetKind::kIndex> part;
      for (int64_t k = first; k < std::min(first + kTermsOfASum, classes); ++k) {
        T* const cell = x + k * kTile + v;
        const Vector<T> a = coefficient<T, kind>(problem, c + k, q + k * kTile + v);
        const Vector<T> exponential = part.add(load(cell), new_max, a);
        if constexpr (keep) store(cell, exponential);
      }
      lanes.add(part);
    }

    const Vector<T> raised = new_max - old_max;
    const auto higher = raised > zero;
    const Vector<T> factor = exp(-raised);
    const Vector<T> old_ties = load(ties + v), old_rest = load(rest + v), old_lost = load(lost + v);
    // Over thousands of blocks the roundings of a plain sum would show: keep what each addition lost.
    Vector<T> sum, sum_lost;
    two_sum(select(higher, (old_rest + old_ties) * factor, old_rest), lanes.rest, sum, sum_lost);
    store(rest + v, sum);
    store(lost + v, select(higher, old_lost * factor, old_lost) + sum_lost);
    store(ties + v, select(higher, zero, old_ties) + (T(classes) - lanes.count_of_others()));
    store(max + v, new_max);
    if constexpr (kind != TargetKind::kIndex) {
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

// In double, and in eight chains that do not wait for each other.
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

// With one_pass, for all classes in one block, the gradient is made of the exponentials that the sums are made of.
template <class T, TargetKind kind, bool one_pass>
static void forward_tile(const Forward& problem, Cursor cursor, int64_t first, int64_t count, Sums& sums) {
  constexpr bool soft = kind == TargetKind::kSoft;
  alignas(64) T x[kTile * kClassBlock<T>], q[soft ? kTile * kClassBlock<T> : 1];
  const TileTargets<T> targets(problem, cursor, first, count);
  TileSums<T> tile;
  for (int64_t c = 0; c < problem.classes && targets.any_valid; c += kClassBlock<T>) {
    const int64_t classes = std::min(kClassBlock<T>, problem.classes - c);
    read_tile(x, cursor, count, problem.logits, c, classes);
    if constexpr (soft) read_tile(q, cursor, count, problem.target, c, classes);
    for (int64_t i = 0; i < count && !soft; ++i) {
      const int64_t k = targets.y[i] - c;
      if (k >= 0 && k < classes) tile.target_logit[i] = x[k * kTile + i];
    }
    for (int64_t v = 0; v < count; v += kLanes<T>) tile.template add<kind, one_pass>(problem, x, q, v, c, classes);
  }

  const T* weight = static_cast<const T*>(problem.weight);
  T* const lse = static_cast<T*>(problem.lse) + first;
  const Vector<T> zero{}, share = broadcast(T(soft ? 1 : problem.label_smoothing / double(problem.classes)));
  T losses[kTile], own[one_pass ? kTile : 1];
  for (int64_t v = 0; v < count; v += kLanes<T>) {
    const auto valid = load(targets.valid + v) != zero;
    const Vector<T> max = load(tile.max + v);
    const Vector<T> log_sum = log_of_sum(load(tile.ties + v), load(tile.rest + v) + load(tile.lost + v));
    const Vector<T> gap = max - load(tile.target_logit + v);
    Vector<T> lse_rounded, lse_lost;
    two_sum(max, log_sum, lse_rounded, lse_lost);
    const int64_t lanes = std::min<int64_t>(kLanes<T>, count - v);
    store_partial(lse + v, select(valid, lse_rounded, zero), lanes);
    store_partial(lse + problem.positions + v, select(valid, lse_lost, zero), lanes);
    const Vector<T> spread = load(tile.spread + v) + load(tile.spread_lost + v);
    const Vector<T> mass = load(tile.mass + v) + load(tile.mass_lost + v);
    if constexpr (soft) store_partial(lse + 2 * problem.positions + v, mass, lanes);
    const Vector<T> loss = index_loss(load(targets.hit + v), share, gap, spread, mass, log_sum);
    store(losses + v, select(valid, loss, zero));
    if constexpr (one_pass) {
      const Vector<T> scaled_hit = T(problem.scale) * load(targets.hit + v);
      const Vector<T> factor = scaled_hit / (load(tile.ties + v) + (load(tile.rest + v) + load(tile.lost + v)));
      for (int64_t k = 0; k < problem.classes; ++k) {
        T* const cell = x + k * kTile + v;
        store(cell, select(valid, load(cell) * factor, zero));
      }
      store(own + v, target_gradient(scaled_hit, zero, zero, -gap - log_sum));
    }
  }
  sums.loss += sum_of<T>(losses, count);
  if constexpr (!soft) {
    T weights[kTile];
    for (int64_t i = 0; i < count; ++i) {
      weights[i] = targets.y[i] < 0 ? T(0) : weight ? weight[targets.y[i]] : T(1);
    }
    sums.weight += sum_of<T>(weights, count);
  }
  if (problem.loss) write_from(losses, problem.loss, first, 1, count);
  if constexpr (one_pass) {
    for (int64_t i = 0; i < count; ++i) {
      if (targets.y[i] >= 0) x[targets.y[i] * kTile + i] = own[i];
    }
    write_tile(x, cursor, count, problem.grad_logits, 0, problem.classes, problem.stream);
  }
}

template <class T, TargetKind kind>
static void backward_tile(const Backward& problem, Cursor cursor, int64_t first, int64_t count) {
  constexpr bool soft = kind == TargetKind::kSoft;
  alignas(64) T x[kTile * kClassBlock<T>], q[soft ? kTile * kClassBlock<T> : 1];
  const T* weight = static_cast<const T*>(problem.weight);
  const T keep = T(1 - problem.label_smoothing);
  const T share = T(soft ? 1 : problem.label_smoothing / double(problem.classes));
  const Vector<T> zero{};
  const TileTargets<T> targets(problem, cursor, first, count);

  // The positions' terms as in rows.inl, one array each; ignored positions have a scale of zero.
  alignas(64) T scale[kTile], rest_of_total[kTile], lse_rounded[kTile], lse_lost[kTile];
  const T* const lse = static_cast<const T*>(problem.lse) + first;
  for (int64_t i = count; i < whole_vectors<T>(count); ++i)
    scale[i] = rest_of_total[i] = lse_rounded[i] = lse_lost[i] = 0;
  read_positions(scale, cursor, count, problem.grad_output);
  for (int64_t i = 0; i < count; ++i) {
    scale[i] = targets.valid[i] != 0 ? T(double(scale[i]) * problem.scale) : T(0);
    rest_of_total[i] = soft ? lse[2 * problem.positions + i] : T(problem.smoothed_total);
    lse_rounded[i] = lse[i];
    lse_lost[i] = lse[problem.positions + i];
  }

  for (int64_t c = 0; c < problem.classes; c += kClassBlock<T>) {
    const int64_t classes = std::min(kClassBlock<T>, problem.classes - c);
    if (targets.any_valid) {
      read_tile(x, cursor, count, problem.logits, c, classes);
      if constexpr (soft) read_tile(q, cursor, count, problem.target, c, classes);
    }

    alignas(64) T target_logit[kTile] = {};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = targets.y[i] - c;
      if (k >= 0 && k < classes) target_logit[i] = x[k * kTile + i];
    }

    for (int64_t v = 0; v < count; v += kLanes<T>) {
      const auto valid = load(targets.valid + v) != zero;
      const Vector<T> g = load(scale + v), hit = load(targets.hit + v), rest = load(rest_of_total + v);
      const Vector<T> rounded = load(lse_rounded + v), lost = load(lse_lost + v);
      for (int64_t k = 0; k < classes; ++k) {
        T* const cell = x + k * kTile + v;
        T* const q_cell = q + k * kTile + v;
        const Vector<T> log_softmax = (load(cell) - rounded) - lost;
        const Vector<T> a = coefficient<T, kind>(problem, c + k, q_cell);
        Vector<T> gradient;
        if constexpr (kind == TargetKind::kSoft) {
          gradient = soft_gradient(rest, log_softmax, a);
          const T own_weight = weight ? weight[c + k] : T(1);
          store(q_cell, -(g * (keep * own_weight)) * log_softmax);
        } else if constexpr (kind == TargetKind::kSmoothedIndex) {
          gradient = plain_gradient(hit + rest, exp(log_softmax), a * share);
        } else {
          gradient = plain_gradient(hit, exp(log_softmax), zero);
        }
        store(cell, select(valid, g * gradient, zero));
      }
    }

    if constexpr (!soft) {
      T own[kTile];
      for (int64_t v = 0; v < count; v += kLanes<T>) {
        const Vector<T> log_softmax = (load(target_logit + v) - load(lse_rounded + v)) - load(lse_lost + v);
        T smoothed[kLanes<T>] = {};
        for (int64_t i = v; kind == TargetKind::kSmoothedIndex && i < v + kLanes<T> && i < count; ++i) {
          if (targets.y[i] >= 0) smoothed[i - v] = share * (weight ? weight[targets.y[i]] : T(1));
        }
        const Vector<T> gradient =
            target_gradient(load(targets.hit + v), load(rest_of_total + v), load(smoothed), log_softmax);
        store(own + v, load(scale + v) * gradient);
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t k = targets.y[i] - c;
        if (k >= 0 && k < classes) x[k * kTile + i] = own[i];
      }
    }
    if (problem.grad_logits) write_tile(x, cursor, count, problem.grad_logits, c, classes, problem.stream);
    if constexpr (soft) {
      if (problem.grad_target) write_tile(q, cursor, count, problem.grad_target, c, classes, problem.stream);
    }
  }
}

template <class T>
static void forward_tiles(const Forward& problem, int64_t begin, int64_t end, Sums& sums) {
  Cursor cursor(problem, begin);
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t count = std::min(kTile, end - first);
    switch (problem.kind) {
      case TargetKind::kIndex:
        problem.grad_logits ? forward_tile<T, TargetKind::kIndex, true>(problem, cursor, first, count, sums)
                            : forward_tile<T, TargetKind::kIndex, false>(problem, cursor, first, count, sums);
        break;
      case TargetKind::kSmoothedIndex:
        forward_tile<T, TargetKind::kSmoothedIndex, false>(problem, cursor, first, count, sums);
        break;
      case TargetKind::kSoft: forward_tile<T, TargetKind::kSoft, false>(problem, cursor, first, count, sums); break;
    }
    cursor.skip(count);
  }
}

template <class T>
static void backward_tiles(const Backward& problem, int64_t begin, int64_t end) {
  Cursor cursor(problem, begin);
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t count = std::min(kTile, end - first);
    switch (problem.kind) {
      case TargetKind::kIndex: backward_tile<T, TargetKind::kIndex>(problem, cursor, first, count); break;
      case TargetKind::kSmoothedIndex:
        backward_tile<T, TargetKind::kSmoothedIndex>(problem, cursor, first, count);
        break;
      case TargetKind::kSoft: backward_tile<T, TargetKind::kSoft>(problem, cursor, first, count); break;
    }
    cursor.skip(count);
  }
}

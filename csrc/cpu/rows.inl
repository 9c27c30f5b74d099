// Kernels whose vector lanes are classes: one position after the other, its logits in blocks of kBlock. For logits that
// are contiguous along the class dimension ((N, C), channels_last, a transposed (B, V, T)) and, copied to a buffer
// first, for any other stride.
//
// forward_rows_of            reads the logits from memory once, and writes lse and loss
// forward_backward_rows      the same for rows of one block, and writes the gradient
// backward_rows_of           reads the logits and lse, and writes the gradient, softmax(x) = exp(x - lse)
//
// The forward passes over each block twice, for its maximum and for its sum of exponentials, while the block is in the
// first-level cache. It rescales the sums so far when a block raises the maximum. The next block's maximum is taken
// while this block's sums are reduced from lanes to a number, which is all waiting.

template <class T>
constexpr int64_t kBlock = kBlockVectors * kLanes<T>;

// ---- sums over classes ----------------------------------------------------------------------------------------------

// The sums of online_softmax.h over the classes seen so far, relative to their maximum. `max` starts at the least
// finite number, not at -inf: a leading block of masked logits then sums to zero instead of to NaN.
template <class T>
struct RowSums {
  T max = std::numeric_limits<T>::lowest();
  double ties = 0, rest = 0;
  double spread = 0, mass = 0;

  XENT_INLINE_MEMBER void raise_max(T new_max) {
    const double raised = double(new_max) - double(max);
    if (ties != 0) rest = (rest + ties) * ::exp(-raised);  // before the first finite logit, both are zero
    ties = 0;
    if (mass != 0) spread += mass * raised;
    max = new_max;
  }

  // Adds the sums of n classes, in whole vectors. Lanes past the last class hold -inf and are among the others.
  template <class Lanes>
  XENT_INLINE_MEMBER void add(const Lanes& lanes, int64_t n) {
    const int64_t counted = (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    ties += double(counted) - sum_of_lanes<T>(lanes.count_of_others());
    rest += sum_of_lanes<T>(lanes.rest);
    if constexpr (Lanes::kDense) {
      spread += sum_of_lanes<T>(lanes.spread) + sum_of_lanes<T>(lanes.spread_lost);
      mass += sum_of_lanes<T>(lanes.mass) + sum_of_lanes<T>(lanes.mass_lost);
    }
  }
};

template <class T>
XENT_INLINE T block_maximum(const T* x, int64_t n) {
  constexpr int W = kLanes<T>;
  const Vector<T> lowest = broadcast(std::numeric_limits<T>::lowest());
  Vector<T> m0 = lowest, m1 = lowest, m2 = lowest, m3 = lowest;  // four chains hide the latency
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    m0 = maximum(load(x + i), m0);
    m1 = maximum(load(x + i + W), m1);
    m2 = maximum(load(x + i + 2 * W), m2);
    m3 = maximum(load(x + i + 3 * W), m3);
  }
  for (; i + W <= n; i += W) m0 = maximum(load(x + i), m0);
  if (i < n && n >= W) m1 = maximum(load(x + n - W), m1);  // some twice, which changes no maximum
  if (i < n && n < W) m1 = maximum(load_partial(x, n, std::numeric_limits<T>::lowest()), m1);
  return maximum_of_lanes<T>(maximum(maximum(m0, m1), maximum(m2, m3)));
}

// Adds `term` to `sum`, and what rounding lost to `lost`: nothing, where the sum is infinite.
template <class V>
XENT_INLINE void add_keeping_lost(V& sum, V term, V& lost) {
  V total, rounding;
  two_sum(sum, term, total, rounding);
  lost += select(total - total == V{}, rounding, V{});
  sum = total;
}

// The same sums, lane by lane. `dense`: every class has a coefficient, and so spread and mass are summed.
template <class T, bool dense>
struct LaneSums {
  static constexpr bool kDense = dense;
  Ints<T> others{};                      // counts the logits that are no tie, as integers, which is cheaper
  Vector<T> rest{}, spread{}, mass{};    // as in RowSums
  Vector<T> spread_lost{}, mass_lost{};  // what rounding lost where parts were added up

  // Adds a vector of logits with coefficients `a`; returns the exponentials. A coefficient of zero adds nothing, even
  // at a logit of -inf. The maximum itself adds nothing to the spread, even at an infinite coefficient.
  XENT_INLINE_MEMBER Vector<T> add(Vector<T> x, Vector<T> max, Vector<T> a) {
    const Vector<T> zero{};
    const Vector<T> difference = x - max;
    const auto other = difference != zero;
    const Vector<T> exponential = exp(difference);
    rest = select(other, rest + exponential, rest);
    others = select(other, others + 1, others);
    if constexpr (dense) {
      spread = select(other & (a != zero), spread - a * difference, spread);
      mass += a;
    }
    return exponential;
  }

  XENT_INLINE_MEMBER Vector<T> count_of_others() const { return __builtin_convertvector(others, Vector<T>); }

  XENT_INLINE_MEMBER void add(const LaneSums& part) {
    rest += part.rest;
    others += part.others;
    if constexpr (dense) {
      add_keeping_lost(spread, part.spread, spread_lost);
      add_keeping_lost(mass, part.mass, mass_lost);
    }
  }
};

// Long sums of equal terms round the same way each time, so a lane adds up this many terms before they are added to a
// sum one level up.
constexpr int64_t kTermsOfASum = 8;

// Loads the last vector of a block of n elements; the lanes without an element of its own hold `fill`.
template <class T>
XENT_INLINE Vector<T> load_last(const T* p, int64_t n, T fill) {
  return n >= kLanes<T> ? load_rest(p, n, fill) : load_partial(p, n, fill);
}

// A part of a row, in memory or in a buffer.
template <class T>
struct Block {
  const T* x = nullptr;
  int64_t n = 0;
  T max{};
};

template <class T, bool dense>
XENT_INLINE void add_vector(LaneSums<T, dense>& sums, const T* x, Vector<T> max, const T* a, int64_t i) {
  __builtin_prefetch(x + i + kBlock<T>);  // while this block is summed, the next one comes from memory
  if constexpr (dense) __builtin_prefetch(a + i + kBlock<T>);
  sums.add(load(x + i), max, dense ? load(a + i) : Vector<T>{});
}

// Returns the sums of a block relative to `row_max`. `a` holds its coefficients where they are dense.
template <class T, bool dense>
XENT_INLINE LaneSums<T, dense> sum_block(const Block<T>& block, T row_max, const T* a) {
  constexpr int W = kLanes<T>;
  const T* const x = block.x;
  const int64_t n = block.n;
  const Vector<T> max = broadcast(row_max);
  LaneSums<T, dense> sums, rest;
  int64_t i = 0;
  for (; i + kTermsOfASum * W <= n; i += kTermsOfASum * W) {
    LaneSums<T, dense> part;
#pragma GCC unroll 8
    for (int k = 0; k < kTermsOfASum; ++k) add_vector<T, dense>(part, x, max, a, i + k * W);
    sums.add(part);
  }
  for (; i + W <= n; i += W) add_vector<T, dense>(rest, x, max, a, i);
  sums.add(rest);
  if (i < n) {
    sums.add(load_last(x, n, -std::numeric_limits<T>::infinity()), max, dense ? load_last(a, n, T(0)) : Vector<T>{});
  }
  return sums;
}

// Returns the coefficients that every class has, for the classes [c, c + n) of a position: w_c ((1 - e) q_c + e / C)
// for probabilities, w_c for an index target, whose factor e / C is applied to the sums.
template <class T>
XENT_INLINE const T* dense_coefficients(T* buffer, const Problem& problem, int64_t target_offset, int64_t c,
                                        int64_t n) {
  const T* weight = static_cast<const T*>(problem.weight);
  if (problem.target_kind == TargetKind::kProbabilities) {
    const int64_t stride = problem.target.class_stride;
    const T keep = T(problem.keep), share = T(problem.share);
    const T* q = read_or_point(buffer, problem.target, target_offset + c * stride, stride, n);
    if (keep == 1 && !weight) return q;
    for (int64_t i = 0; i < n; ++i) buffer[i] = (weight ? weight[c + i] : T(1)) * (keep * q[i] + share);
    return buffer;
  }
  if (weight) return weight + c;
  for (int64_t i = 0; i < n; ++i) buffer[i] = 1;
  return buffer;
}

template <class T>
XENT_INLINE T one_target_gradient(T hit, T rest_of_total, T smoothed, T log_softmax) {
  return target_gradient(broadcast(hit), broadcast(rest_of_total), broadcast(smoothed), broadcast(log_softmax))[0];
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Writes the gradient of an ignored position.
template <class T>
static void zero_gradient(const Problem& problem, const View& view, int64_t offset, bool stream) {
  if (!view) return;
  const T zeros[64] = {};
  for (int64_t c = 0; c < problem.classes; c += 64) {
    write_from(zeros, view, offset + c * view.class_stride, view.class_stride,
               std::min<int64_t>(64, problem.classes - c), stream);
  }
}

// Where a position's logits, target and gradient begin; its label, as of read_labels; and the factor of its loss.
struct Row {
  int64_t position, logits, target, gradient, y;
  double sample_weight;
};

template <Objective objective, class ForwardOrBackward>
XENT_INLINE Row row_at(const ForwardOrBackward& problem, const Cursor& cursor, int64_t position) {
  const int64_t target = cursor.offset(problem.target);
  int64_t y = 0;
  if constexpr (objective == Objective::kGeneral) {
    read_labels(&y, problem, cursor, position, 1);
  } else if constexpr (objective != Objective::kProbabilities) {
    read_into(&y, problem.target, target, 1, 1);
    check_targets(&y, problem, position, 1);
  }
  return {position, cursor.offset(problem.logits),    target, cursor.offset(problem.grad_logits),
          y,        sample_weight_at(problem, cursor)};
}

// Reads the blocks of rows. Each is valid until the next but one is read.
template <class T>
struct BlockReader {
  const Forward& problem;
  T buffers[2][kBlock<T>];
  int which = 0;

  XENT_INLINE_MEMBER explicit BlockReader(const Forward& problem) : problem(problem) {}

  XENT_INLINE_MEMBER Block<T> read(const Row& row, int64_t c) {
    const int64_t n = std::min(kBlock<T>, problem.classes - c);
    const T* x = read_logits(buffers[which ^= 1], problem, row.logits + c * problem.logits.class_stride, n);
    return {x, n, block_maximum(x, n)};
  }
};

// The lse, as an unevaluated sum of two numbers.
template <class T>
struct Lse {
  T rounded = 0, lost = 0;

  static XENT_INLINE_MEMBER Lse of(double max, double log_sum) {
    double sum, sum_lost;
    two_sum(max, log_sum, sum, sum_lost);
    const T rounded = T(sum);
    return {rounded, T(sizeof(T) == sizeof(double) ? sum_lost : (max - double(rounded)) + log_sum)};
  }
};

// Writes what a position leaves behind: its lse and its loss. An ignored one leaves zeros.
template <class T>
struct PositionResult {
  Lse<T> lse;
  T mass = 0;
  double loss = 0;

  XENT_INLINE_MEMBER void write(const Forward& problem, int64_t p, Sums& sums) const {
    saved_row<T>(problem, saved::kLse)[p] = lse.rounded;
    saved_row<T>(problem, saved::kLseLost)[p] = lse.lost;
    if (problem.objective == Objective::kProbabilities) saved_row<T>(problem, saved::kMass)[p] = mass;
    sums.loss += loss;
    if (problem.loss) {
      const T rounded = T(loss);
      write_from(&rounded, problem.loss, p, 1, 1);
    }
  }
};

// Completes a position's loss.
XENT_INLINE double finish_loss(const Problem& problem, const Row& row, double of_target, double lse) {
  if (problem.z_loss != 0) of_target += problem.z_loss * lse * lse;
  return of_target * row.sample_weight;
}

template <class T, Objective objective>
static void forward_rows_of(const Forward& problem, int64_t begin, int64_t end, Sums& sums) {
  constexpr bool dense = objective != Objective::kIndex;
  alignas(64) T coefficient_buffer[kBlock<T>];
  const T* weight = static_cast<const T*>(problem.weight);
  BlockReader<T> blocks(problem);
  Cursor cursor(problem, begin);
  Row next_row = row_at<objective>(problem, cursor, begin);
  Block<T> next;
  if (next_row.y >= 0) next = blocks.read(next_row, 0);
  for (int64_t p = begin; p < end; ++p) {
    const Row here = next_row;
    next_row.y = kIgnored;
    if (p + 1 < end) {
      cursor.advance(1);
      next_row = row_at<objective>(problem, cursor, p + 1);
    }
    PositionResult<T> result;
    if (here.y >= 0) {
      RowSums<T> row;
      for (int64_t c = 0; c < problem.classes; c += kBlock<T>) {
        const Block<T> block = next;
        if (block.max > row.max) row.raise_max(block.max);
        const T* a = dense ? dense_coefficients(coefficient_buffer, problem, here.target, c, block.n) : nullptr;
        const auto lanes = sum_block<T, dense>(block, row.max, a);
        if (c + kBlock<T> < problem.classes) {
          next = blocks.read(here, c + kBlock<T>);
        } else if (next_row.y >= 0) {
          next = blocks.read(next_row, 0);
        }
        row.add(lanes, block.n);
      }
      const double log_sum = log_of_sum(row.ties, row.rest);
      result.lse = Lse<T>::of(double(row.max), log_sum);
      result.mass = T(row.mass);
      double w = 1, loss;
      if constexpr (objective == Objective::kProbabilities) {
        loss = index_loss(0., 1., 0., row.spread, row.mass, log_sum);
      } else {
        if (weight) w = double(weight[here.y]);
        const int64_t own = here.logits + here.y * problem.logits.class_stride;
        const double gap = double(row.max) - double(read_one<T>(problem.logits, own));
        loss = index_loss(problem.keep * w, problem.share, gap, row.spread, row.mass, log_sum);
      }
      result.loss = finish_loss(problem, here, loss, double(row.max) + log_sum);
      sums.weight += w * here.sample_weight;
    } else if (next_row.y >= 0) {
      next = blocks.read(next_row, 0);
    }
    result.write(problem, p, sums);
  }
}

// ---- forward with gradient ------------------------------------------------------------------------------------------
//
// For rows of one block, whose exponentials are all at hand when their sum is known: the gradient is exp(x - max) times
// one factor for the row, but for the target's class.
//
// Three rows are under way in one loop: it sums the exponentials of a row, stores the gradient of the row two before it
// and takes the maximum of the row two after it. One after the other, each of the three would leave idle the units that
// it does not need. Two rows apart, nothing waits for lanes to become a number (a maximum, a sum, its reciprocal),
// which takes as long as a dozen vectors.

// How a row's exponentials become its gradient.
template <class T>
struct RowGradient {
  T* out;  // in memory, or a buffer
  T factor = 0, own = 0;
  int64_t offset = 0, y = kIgnored;  // kIgnored: there is no such row, and what is stored for it is never read

  XENT_INLINE_MEMBER void finish(const Forward& problem, const T* buffer) const {
    if (y < 0) return;
    out[y] = own;
    if (out != buffer) return;
    const View& view = problem.grad_logits;
    write_from(buffer, view, offset, view.class_stride, problem.classes, problem.stream);
  }
};

// Does one vector of each of the three rows. `exponentials` holds those of the row two before, and then of this row.
template <class T>
XENT_INLINE void pipeline_vector(LaneSums<T, false>& sums, const T* x, Vector<T> max, T* exponentials, T* out,
                                 Vector<T> factor, const T* after, Vector<T>& max_of_after) {
  store(out, load(exponentials) * factor);
  store(exponentials, sums.add(load(x), max, Vector<T>{}));
  max_of_after = maximum(load(after), max_of_after);
}

// Returns the sums of a row of n >= kLanes classes relative to `row_max`. Stores the gradient `before`, and takes the
// maximum of the row `after`.
template <class T>
XENT_INLINE LaneSums<T, false> pipeline_row(const T* x, T row_max, T* exponentials, const RowGradient<T>& before,
                                            const T* after, T& max_of_after, int64_t n) {
  constexpr int W = kLanes<T>;
  const Vector<T> max = broadcast(row_max), factor = broadcast(before.factor);
  T* const out = before.out;
  // The last vector overlaps the one before it, which is overwritten by then.
  store(out + n - W, load(exponentials + n - W) * factor);
  Vector<T> max1 = broadcast(std::numeric_limits<T>::lowest()), max0 = maximum(load(after + n - W), max1);
  LaneSums<T, false> sums, rest;
  int64_t i = 0;
  for (; i + kTermsOfASum * W <= n; i += kTermsOfASum * W) {
    LaneSums<T, false> part;
#pragma GCC unroll 8
    for (int k = 0; k < kTermsOfASum; ++k) {
      const int64_t at = i + k * W;
      pipeline_vector(part, x + at, max, exponentials + at, out + at, factor, after + at, k % 2 ? max0 : max1);
    }
    sums.add(part);
  }
  for (; i + W <= n; i += W) pipeline_vector(rest, x + i, max, exponentials + i, out + i, factor, after + i, max0);
  sums.add(rest);
  if (i < n) {
    store(exponentials + n - W, exp(load(x + n - W) - max));
    sums.add(load_rest(x, n, -std::numeric_limits<T>::infinity()), max, Vector<T>{});
  }
  max_of_after = maximum_of_lanes<T>(maximum(max0, max1));
  return sums;
}

// Finishes rows: as many at a time as a vector has lanes.
struct RowBatch {
  static constexpr int64_t kRows = 64;
  Row rows[kRows];
  int64_t count = 0;
  double max[kRows], ties[kRows], rest[kRows], gap[kRows], hit[kRows];

  template <class T>
  XENT_INLINE_MEMBER void finish(const Forward& problem, Sums& sums) {
    constexpr int L = kLanes<double>;
    for (int64_t k = count; k % L != 0; ++k) max[k] = ties[k] = rest[k] = gap[k] = hit[k] = 1;
    for (int64_t first = 0; first < count; first += L) {
      const DoubleVector log_sum = log_of_sum(load(ties + first), load(rest + first)), m = load(max + first);
      const DoubleVector loss =
          index_loss(load(hit + first), DoubleVector{}, load(gap + first), DoubleVector{}, DoubleVector{}, log_sum);
      for (int64_t k = first; k < std::min(first + L, count); ++k) {
        PositionResult<T> result;
        result.lse = Lse<T>::of(m[k - first], log_sum[k - first]);
        result.loss = finish_loss(problem, rows[k], loss[k - first], m[k - first] + log_sum[k - first]);
        result.write(problem, rows[k].position, sums);
        sums.weight += hit[k] * rows[k].sample_weight;
      }
    }
  }
};

template <class T>
static void forward_backward_rows(const Forward& problem, int64_t begin, int64_t end, Sums& sums) {
  alignas(64) T exponentials[2][kBlock<T>], logits[3][kBlock<T>], buffer[kBlock<T>];
  const int64_t n = problem.classes, stride = problem.logits.class_stride;
  const T* weight = static_cast<const T*>(problem.weight);
  Cursor cursor(problem, begin);
  while (begin < end) {
    RowBatch batch;
    Row* const rows = batch.rows;
    int64_t& count = batch.count;
    for (const int64_t stop = std::min(begin + RowBatch::kRows, end); begin < stop; ++begin, cursor.advance(1)) {
      rows[count] = row_at<Objective::kIndex>(problem, cursor, begin);
      if (rows[count].y >= 0) {
        ++count;
      } else {
        zero_gradient<T>(problem, problem.grad_logits, rows[count].gradient, problem.stream);
        PositionResult<T>().write(problem, begin, sums);
      }
    }
    Block<T> blocks[3];
    for (int64_t k = 0; k < std::min<int64_t>(2, count); ++k) {
      const T* x = read_or_point(logits[k], problem.logits, rows[k].logits, stride, n);
      blocks[k] = {x, n, block_maximum(x, n)};
    }
    RowGradient<T> gradients[2] = {{buffer}, {buffer}};
    for (int64_t k = 0; k < count; ++k) {
      const Row& here = rows[k];
      const Block<T> block = blocks[k % 3];
      Block<T>& after = blocks[(k + 2) % 3];
      RowGradient<T>& gradient = gradients[k % 2];
      T* const e = exponentials[k % 2];
      after.x =
          k + 2 < count ? read_or_point(logits[(k + 2) % 3], problem.logits, rows[k + 2].logits, stride, n) : block.x;
      RowSums<T> row;
      row.max = std::max(row.max, block.max);
      row.add(pipeline_row(block.x, row.max, e, gradient, after.x, after.max, n), n);
      gradient.finish(problem, buffer);
      const double w = weight ? double(weight[here.y]) : 1, sum = row.ties + row.rest;
      const double factor = problem.scale * here.sample_weight / sum;
      // The sum times (softmax - 1) of the target: exact, for a target at the maximum has the exponential 1 and is a
      // tie.
      const double minus_others = (double(e[here.y]) - row.ties) - row.rest;
      const double of_z_loss =
          problem.z_loss == 0 ? 0 : 2 * problem.z_loss * (double(row.max) + log_of_sum(row.ties, row.rest));
      T* const out =
          write_or_point(buffer, problem.grad_logits, here.gradient, problem.grad_logits.class_stride, problem.stream);
      gradient = {out, T(factor * (w + of_z_loss)), T(factor * (w * minus_others + of_z_loss * double(e[here.y]))),
                  here.gradient, here.y};
      batch.max[k] = double(row.max);
      batch.ties[k] = row.ties;
      batch.rest[k] = row.rest;
      batch.gap[k] = double(row.max) - double(block.x[here.y]);
      batch.hit[k] = w;
    }
    batch.finish<T>(problem, sums);
    for (int64_t k = count; k < count + 2; ++k) {
      const RowGradient<T>& gradient = gradients[k % 2];
      for (int64_t i = 0; i < n; ++i) gradient.out[i] = exponentials[k % 2][i] * gradient.factor;
      gradient.finish(problem, buffer);
    }
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// A class whose softmax exceeds a half has a log softmax above this, with a margin for what rounding lost of the lse.
template <class T>
constexpr T kNearOne = T(-0.7);

// The constants of a position's gradient, scale (A softmax - a).
template <class T>
struct GradientTerms {
  T scale;         // grad_output / denominator, times the position's factor
  T total, share;  // A, and the factor of the coefficients that every class has
  T lse_rounded, lse_lost;
  T correction;  // exp(-lse_lost): softmax = exp(x - lse_rounded) correction, one addition less for each element

  template <class V>
  XENT_INLINE_MEMBER V log_softmax(V x) const {
    return (x - lse_rounded) - lse_lost;
  }
};

// The gradient of one vector of classes.
template <class T, Objective objective>
XENT_INLINE Vector<T> gradient(const GradientTerms<T>& terms, Vector<T> x, Vector<T> a) {
  if constexpr (objective != Objective::kIndex) {
    const Vector<T> coefficient = objective == Objective::kProbabilities ? a : terms.share * a;
    return terms.scale *
           plain_gradient(broadcast(terms.total * terms.correction), exp(x - terms.lse_rounded), coefficient);
  } else {
    return (terms.scale * terms.total * terms.correction) * exp(x - terms.lse_rounded);
  }
}

template <class T, Objective objective>
XENT_INLINE void gradient_block(T* out, const GradientTerms<T>& terms, const T* x, const T* a, int64_t n) {
  constexpr int W = kLanes<T>;
  constexpr bool dense = objective != Objective::kIndex;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    store(out + i, gradient<T, objective>(terms, load(x + i), dense ? load(a + i) : Vector<T>{}));
  }
  if (i == n) return;
  if (n >= W) {  // the last vector overlaps the one before it
    i = n - W;
    store(out + i, gradient<T, objective>(terms, load(x + i), dense ? load(a + i) : Vector<T>{}));
  } else {
    const Vector<T> last = dense ? load_partial(a, n) : Vector<T>{};
    store_partial(out, gradient<T, objective>(terms, load_partial(x, n), last), n);
  }
}

// grad_output / denominator, times the position's factor.
XENT_INLINE double scale_at(const Backward& problem, const Cursor& cursor, const Row& row) {
  return read_one<double>(problem.grad_output, cursor.offset(problem.grad_output)) * problem.scale * row.sample_weight;
}

template <class T, Objective objective>
static void backward_rows_of(const Backward& problem, int64_t begin, int64_t end) {
  constexpr bool soft = objective == Objective::kProbabilities, dense = objective != Objective::kIndex;
  alignas(64) T logits_buffer[kBlock<T>], coefficient_buffer[kBlock<T>], gradient_buffer[kBlock<T>];
  const T* weight = static_cast<const T*>(problem.weight);
  const T* const lse_rounded = saved_row<T>(problem, saved::kLse);
  const T* const lse_lost = saved_row<T>(problem, saved::kLseLost);
  const T keep = T(problem.keep);
  const T share = T(problem.share);
  Cursor cursor(problem, begin);
  for (int64_t p = begin; p < end; ++p, cursor.advance(1)) {
    const Row row = row_at<objective>(problem, cursor, p);
    const int64_t y = row.y;
    if (y < 0) {
      zero_gradient<T>(problem, problem.grad_logits, row.gradient, problem.stream);
      continue;
    }
    const T scale = T(scale_at(problem, cursor, row));
    const T hit = soft ? T(0) : keep * (weight ? weight[y] : T(1));
    T rest_of_total = soft ? saved_row<T>(problem, saved::kMass)[p] : T(problem.smoothed_total);
    if (problem.z_loss != 0) rest_of_total += T(2 * problem.z_loss) * (lse_rounded[p] + lse_lost[p]);
    const GradientTerms<T> terms{scale,          hit + rest_of_total, soft ? T(1) : share,
                                 lse_rounded[p], lse_lost[p],         T(::exp(-double(lse_lost[p])))};
    for (int64_t c = 0; c < problem.classes; c += kBlock<T>) {
      const int64_t n = std::min(kBlock<T>, problem.classes - c);
      const int64_t stride = problem.logits.class_stride;
      const T* block = read_or_point(logits_buffer, problem.logits, row.logits + c * stride, stride, n);
      if (problem.grad_target) {
        for (int64_t i = 0; i < n; ++i) {
          gradient_buffer[i] = -scale * keep * (weight ? weight[c + i] : T(1)) * terms.log_softmax(block[i]);
        }
        const int64_t out_stride = problem.grad_target.class_stride;
        const int64_t out = cursor.offset(problem.grad_target) + c * out_stride;
        write_from(gradient_buffer, problem.grad_target, out, out_stride, n, problem.stream);
      }
      if (problem.grad_logits) {
        const T* a = dense ? dense_coefficients(coefficient_buffer, problem, row.target, c, n) : nullptr;
        const int64_t out_stride = problem.grad_logits.class_stride, out = row.gradient + c * out_stride;
        T* const result = write_or_point(gradient_buffer, problem.grad_logits, out, out_stride, problem.buffered);
        gradient_block<T, objective>(result, terms, block, a, n);
        // A soft target's gradient can cancel only where the softmax exceeds a half, which at most one class's does.
        if (soft && block_maximum(block, n) - terms.lse_rounded > kNearOne<T>) {
          for (int64_t i = 0; i < n; ++i) {
            if (block[i] - terms.lse_rounded > kNearOne<T>) {
              result[i] = scale * soft_gradient(broadcast(terms.total), broadcast(terms.log_softmax(block[i])),
                                                broadcast(a[i]))[0];
            }
          }
        }
        if (!soft && c <= y && y < c + n) {
          const T smoothed = dense ? share * a[y - c] : T(0);
          result[y - c] = scale * one_target_gradient(hit, rest_of_total, smoothed, terms.log_softmax(block[y - c]));
        }
        if (result == gradient_buffer) {
          write_from(gradient_buffer, problem.grad_logits, out, out_stride, n, problem.stream);
        }
      }
    }
  }
}

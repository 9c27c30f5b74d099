// Positions that are neighbours in memory, with classes far apart: NCHW, NCDHW, (N, C, d).
//
// Fuses log-sum-exp, loss and gradient for a run of neighbouring positions and all their classes:
//
//   positions in vectors, classes fit shared memory    1 read + 1 write (forward with gradient; backward alone)
//   otherwise                                          2 reads + 1 write, the second from a cache where it can
//
// Why: a thread has as many neighbouring positions as 16 bytes hold, so each class is one transaction, and every
// position's sums are its own: nothing to shuffle. Copies into shared memory are asynchronous, and each thread waits
// for its own alone. Where there are many classes, several threads share them (`slices`), so that a tile is narrow
// enough for several blocks on a multiprocessor; they exchange maxima and sums through shared memory.
//
// The maximum is found first, from shared memory, and the sums after it without a branch: with few classes, the online
// sum would meet a new maximum all the time.
#pragma once

#include "position.cuh"
#include "reduce.cuh"
#include "vector.cuh"

namespace xent::gpu {

// The place of a thread's N neighbouring positions: a run along the last dimension, and the first one's index in it.
struct Place {
  int64_t run, inner;

  XENT_DEVICE int64_t offset(const Task& task, const View& view) const {
    return offset_of_run(task, view, run) + inner * view.stride[task.dims - 1];
  }
};

// N elements of one class: a single one, or a vector.
template <class T, int N>
struct Pack {
  using A = Arithmetic<T>;
  using Mask = std::conditional_t<N == 1, bool, uint4>;  // of elements

  static XENT_DEVICE void load(const T* p, A (&x)[N]) {
    if constexpr (N == 1) {
      x[0] = widen<A>(*p);
    } else {
      widen_vector<T>(load_vector(p), x);
    }
  }
  static XENT_DEVICE Mask mask(const bool (&keep)[N]) {
    if constexpr (N == 1) {
      return keep[0];
    } else {
      return mask_of<T>(keep);
    }
  }
  static XENT_DEVICE void store(T* p, const A (&x)[N]) {
    if constexpr (N == 1) {
      *p = narrow<T>(x[0]);
    } else {
      stream_vector(p, narrow_vector<T>(x));
    }
  }
  // Stores zero where the mask is zero.
  static XENT_DEVICE void store(T* p, const A (&x)[N], const Mask& mask) {
    if constexpr (N == 1) {
      *p = mask ? narrow<T>(x[0]) : T{};
    } else {
      stream_vector(p, narrow_vector<T>(x) & mask);
    }
  }
};

// Joins a number of each position over the slices: mine(j) is the thread's own for its position j, and becomes the
// joined one. All threads of the block call it.
template <int N, class A, class Mine, class Join>
XENT_DEVICE void join_slices(A* exchange, int x, int y, int width, int slices, const Mine& mine, const Join& join) {
  __syncthreads();  // all threads have read what was exchanged before
#pragma unroll
  for (int j = 0; j < N; ++j) exchange[j * kSpatialThreads + y * width + x] = mine(j);
  __syncthreads();
#pragma unroll
  for (int j = 0; j < N; ++j) {
    A joined = exchange[j * kSpatialThreads + x];
    for (int other = 1; other < slices; ++other) {
      joined = join(joined, exchange[j * kSpatialThreads + other * width + x]);
    }
    mine(j) = joined;
  }
}

template <class T, Objective objective, int N, bool kCopied>
__global__ void __launch_bounds__(kSpatialThreads, spatial_resident(sizeof(T), objective, N > 1, kCopied))
    spatial(const __grid_constant__ Task task) {
  using A = Arithmetic<T>;
  using Softmax = OnlineSoftmax<A, objective != Objective::kIndex, true>;
  static_assert(!kCopied || N == kPerVector<T>);
  constexpr bool kSoft = objective == Objective::kProbabilities;
  constexpr int kTogether = N == 8 ? 2 : 4;                  // classes
  constexpr int kNextCopy = kSpatialThreads * kVectorBytes;  // bytes, to a thread's next class
  if (nothing_to_do(task)) return;
  let_next_kernel_begin();

  XENT_DYNAMIC_SHARED(shared);
  XENT_SHARED_ARRAY(A, exchange, kSpatialThreads * N);
  const int slices = task.division.slices, width = kSpatialThreads / slices;
  const int x_index = int(threadIdx.x) % width, y_index = int(threadIdx.x) / width;
  const auto slice_of = [&](int c) { return c & (slices - 1); };
  const int last = task.dims - 1;
  const int64_t inner_size = task.size[last];
  const int64_t pieces = (inner_size + width * N - 1) / (width * N);  // of a run
  const int64_t tiles = task.positions / inner_size * pieces;
  const int64_t class_stride = task.logits.class_stride;
  const int classes = int(task.classes);
  unsigned char* const copies = shared + int(threadIdx.x) * kVectorBytes;
  A scale_of_all = 0;
  const bool forward = task.pass != Pass::kBackward, backward = task.pass != Pass::kForward;
  Sums sums{0, 0};

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t run = tile / pieces;
    const Place place{run, ((tile - run * pieces) * width + x_index) * N};
    const bool exists = place.inner < inner_size;  // all N do, or none
    const int own_classes = exists ? classes : 0;  // where this thread's loops end
    const int64_t first = run * inner_size + place.inner;
    const T* const logits = static_cast<const T*>(task.logits.data) + (exists ? place.offset(task, task.logits) : 0);
    // Calls use(class, its copy) for this thread's classes.
    const auto for_classes = [&](const auto& use) {
      unsigned char* copy = copies;
      for (int c = y_index; c < own_classes; c += slices, copy += kNextCopy) use(c, copy);
    };
    const auto load_class = [&](int c, [[maybe_unused]] const unsigned char* copy, A(&x)[N]) {
      if constexpr (kCopied) {
        widen_vector<T>(load_vector(copy), x);
      } else {
        Pack<T, N>::load(logits + c * class_stride, x);
      }
    };

    if constexpr (kCopied) {
      for_classes([&](int c, unsigned char* copy) { copy_async(copy, logits + c * class_stride); });
      commit_copies();
    }
    if (tile == blockIdx.x) scale_of_all = gradient_scale<A>(task);

    // ---- targets
    int label[N] = {};
    const int64_t target = exists ? place.offset(task, task.target) : 0, target_stride = task.target.stride[last];
    if (exists) {
#pragma unroll
      for (int j = 0; j < N; ++j) label[j] = int(read_label<objective>(task, target + j * target_stride));
    }
    const auto load_coefficients = [&](int c, A(&a)[N]) {
      if constexpr (kSoft) {
        const int64_t at = target + c * task.target.class_stride;
        if (task.division.twin_target) {
          Pack<T, N>::load(static_cast<const T*>(task.target.data) + at, a);
        } else {
#pragma unroll
          for (int j = 0; j < N; ++j) a[j] = read_number<A>(task.target, at + j * target_stride);
        }
#pragma unroll
        for (int j = 0; j < N; ++j) a[j] = coefficient<objective>(task, c, a[j]);
      } else {
        const A same = coefficient<objective>(task, c, A(0));
#pragma unroll
        for (int j = 0; j < N; ++j) a[j] = same;
      }
    };
    const int64_t weights = exists && task.sample_weight ? place.offset(task, task.sample_weight) : 0;
    const auto sample_weight = [&](int j) {
      return read_sample_weight<A>(task, weights + j * task.sample_weight.stride[last]);
    };
    if constexpr (kCopied) wait_for_copies<0>();

    // ---- sums
    Result<A> result[N];
    const auto larger = [](A a, A b) { return maximum(a, b); };
    const auto sum = [](A a, A b) { return a + b; };
    const auto join = [&](const auto& mine, const auto& how) {
      if (slices > 1) join_slices<N>(exchange, x_index, y_index, width, slices, mine, how);
    };
    if (forward) {
      A largest[N];
      if constexpr (kCopied) {
#pragma unroll
        for (int j = 0; j < N; ++j) largest[j] = A(-INFINITY);
        uint4 all_largest = narrow_vector<T>(largest);
        for_classes(
            [&](int, const unsigned char* copy) { all_largest = max_vector<T>(all_largest, load_vector(copy)); });
        widen_vector<T>(all_largest, largest);
        join([&](int j) -> A& { return largest[j]; }, larger);
        KnownMaximum<A> known[N];
#pragma unroll
        for (int j = 0; j < N; ++j) known[j] = KnownMaximum<A>::of(largest[j]);
        for_classes([&](int c, const unsigned char* copy) {
          A x[N], a[N];
          load_class(c, copy, x);
          if constexpr (objective != Objective::kIndex) load_coefficients(c, a);
#pragma unroll
          for (int j = 0; j < N; ++j) {
            known[j].add(x[j]);
            if constexpr (objective != Objective::kIndex) known[j].add_spread(x[j], a[j]);
            if constexpr (kSoft) known[j].mass += a[j];
          }
        });
        join([&](int j) -> A& { return known[j].ties; }, sum);
        join([&](int j) -> A& { return known[j].rest; }, sum);
        if constexpr (objective != Objective::kIndex) {
          bool careful = false;
#pragma unroll
          for (int j = 0; j < N; ++j) careful |= known[j].spread != known[j].spread;
          if (careful) {
#pragma unroll
            for (int j = 0; j < N; ++j) known[j].spread = A(0);
            for_classes([&](int c, const unsigned char* copy) {
              A x[N], a[N];
              load_class(c, copy, x);
              load_coefficients(c, a);
#pragma unroll
              for (int j = 0; j < N; ++j) known[j].add_careful_spread(x[j], a[j]);
            });
          }
          join([&](int j) -> A& { return known[j].spread; }, sum);
        }
        if constexpr (kSoft) join([&](int j) -> A& { return known[j].mass; }, sum);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const A mass = kSoft ? known[j].mass : objective == Objective::kIndex ? A(0) : smoothed_total<A>(task);
          result[j] = {known[j].max, known[j].log_sum(), known[j].spread, mass};
        }
      } else {
        Softmax softmax[N];
#pragma unroll
        for (int j = 0; j < N; ++j) softmax[j] = Softmax::of_nothing(task);
        for (int c = y_index; c < own_classes; c += slices * kTogether) {
          A x[kTogether][N], a[kTogether][N];
#pragma unroll
          for (int k = 0; k < kTogether; ++k) {
            const int at = c + k * slices;
            if (at < classes) {
              load_class(at, nullptr, x[k]);
              load_coefficients(at, a[k]);
            } else {
#pragma unroll
              for (int j = 0; j < N; ++j) x[k][j] = A(-INFINITY), a[k][j] = A(0);
            }
          }
#pragma unroll
          for (int j = 0; j < N; ++j) {
            A of_position[kTogether], coefficients[kTogether];
#pragma unroll
            for (int k = 0; k < kTogether; ++k) of_position[k] = x[k][j], coefficients[k] = a[k][j];
            softmax[j].add(of_position, coefficients);
          }
        }
        if (slices > 1) {
#pragma unroll
          for (int j = 0; j < N; ++j) largest[j] = softmax[j].max;
          join([&](int j) -> A& { return largest[j]; }, larger);
#pragma unroll
          for (int j = 0; j < N; ++j) softmax[j].raise(largest[j]), softmax[j].settle();
          join([&](int j) -> A& { return softmax[j].ties; }, sum);
          join([&](int j) -> A& { return softmax[j].rest.sum; }, sum);
          if constexpr (objective != Objective::kIndex) {
            join([&](int j) -> A& { return softmax[j].spread.sum; }, sum);
            join([&](int j) -> A& { return softmax[j].mass.sum; }, sum);
          }
        }
#pragma unroll
        for (int j = 0; j < N; ++j) result[j] = Result<A>::of(task, softmax[j]);
      }
      const int64_t loss = exists ? place.offset(task, task.loss) : 0;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (!exists || slice_of(j) != y_index) continue;
        A target_logit = 0;
        if (!kSoft && is_counted(label[j])) {
          target_logit = widen<A>(logits[label[j] * class_stride + j * task.logits.stride[last]]);
        }
        const Destination<A> to{first + j, target + j * target_stride, loss + j * task.loss.stride[last],
                                sample_weight(j)};
        finish_loss<objective>(task, to, label[j], target_logit, result[j], sums);
      }
    } else if (exists) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        result[j] = SavedResult<objective>::template at<A>(task, first + j);
        if (label[j] == kBad && slice_of(j) == y_index)
          report_bad_target<objective>(task, first + j, target + j * target_stride);
      }
    }
    if (!backward || !exists) continue;

    // ---- the gradient
    const int64_t grad_output = place.offset(task, task.grad_output);
    const int64_t grad_target = place.offset(task, task.grad_target);
    T* const out =
        task.grad_logits ? static_cast<T*>(task.grad_logits.data) + place.offset(task, task.grad_logits) : nullptr;
    Gradient<objective, A> gradient[N];
    A own[N];  // the gradient of an index target's own class: dear, so made once and not for each class
    bool counts[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      own[j] = 0;
      counts[j] = is_counted(label[j]);
      gradient[j].set(
          task, first + j, counts[j] ? label[j] : 0, result[j],
          scale_of_all * read_grad_output<A>(task, grad_output + j * task.grad_output.stride[last]) * sample_weight(j));
      if (kSoft || !counts[j] || slice_of(label[j]) != y_index) continue;
      const T* const from =
          kCopied ? reinterpret_cast<const T*>(copies + (label[j] >> task.division.slice_bits) * kNextCopy) + j
                  : logits + label[j] * class_stride + j * task.logits.stride[last];
      own[j] = gradient[j].own(widen<A>(*from));
    }
    const auto write = [&](auto masked) {
      const auto mask = Pack<T, N>::mask(counts);
      const int64_t step = slices * task.grad_logits.class_stride;
      T* to = out ? out + y_index * task.grad_logits.class_stride : nullptr;
      for_classes([&](int c, const unsigned char* copy) {
        A x[N], dx[N];
        load_class(c, copy, x);
        gradients<objective>(
            task, [&](int j) -> const auto& { return gradient[j]; }, x, [&](A(&a)[N]) { load_coefficients(c, a); }, dx);
        if constexpr (kSoft) {
          for (int j = 0; task.grad_target && j < N; ++j) {
            write_probability_gradient(task, grad_target + j * task.grad_target.stride[last], c,
                                       gradient[j].of_probability(x[j]));
          }
        } else {
#pragma unroll
          for (int j = 0; j < N; ++j) dx[j] = label[j] == c ? own[j] : dx[j];
        }
        if (kSoft && to == nullptr) return;
        if constexpr (decltype(masked)::value) {
          Pack<T, N>::store(to, dx, mask);
        } else {
          Pack<T, N>::store(to, dx);
        }
        to += step;
      });
    };
    bool all_count = true;
#pragma unroll
    for (int j = 0; j < N; ++j) all_count &= counts[j];
    all_count ? write(std::false_type()) : write(std::true_type());
  }
  leave_sums(task, sums);
}

}  // namespace xent::gpu

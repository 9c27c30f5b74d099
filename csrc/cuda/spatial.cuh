// Positions that are neighbours in memory, with classes far apart: NCHW, NCDHW, (N, C, d).
//
// Fuses log-sum-exp, loss and gradient for a run of neighbouring positions and all their classes:
//
//   positions in vectors, classes fit shared memory    1 read + 1 write (forward with gradient; backward alone)
//   otherwise                                          2 reads + 1 write, the second from a cache where it can
//
// Why so: a thread has as many neighbouring positions as 16 bytes hold, so each class is one transaction, and every
// position's sums are its own: nothing to shuffle. Copies into shared memory are asynchronous, and each thread waits
// for its own alone. Where there are many classes, several threads share them (`slices`), so that a tile is narrow
// enough for several blocks on a multiprocessor; they exchange maxima and sums through shared memory.
//
// The maximum is found first, from shared memory, and the sums after it without a branch: with few classes, the online
// sum of rows.cuh would meet a new maximum all the time.
#pragma once

#include "position.cuh"
#include "reduce.cuh"
#include "vector.cuh"

namespace xent::gpu {

// Where a thread's N neighbouring positions are: on a run along the last dimension.
struct Place {
  int64_t run, inner;

  XENT_DEVICE int64_t offset(const Task& task, const View& view) const {
    return offset_of_run(task, view, run) + inner * view.stride[task.dims - 1];
  }
};

// What N elements of one class are, at a time.
template <class T, int N>
struct Pack {
  using A = Arithmetic<T>;

  static XENT_DEVICE void load(const T* p, A (&x)[N]) {
    if constexpr (N == 1) {
      x[0] = widen<A>(*p);
    } else {
      widen_vector<T>(load_vector(p), x);
    }
  }
  static XENT_DEVICE void store(T* p, const A (&x)[N]) {
    if constexpr (N == 1) {
      *p = narrow<T>(x[0]);
    } else {
      stream_vector(p, narrow_vector<T>(x));
    }
  }
};

// Adds up, or finds the maximum, over the slices: `mine(j)` is a number of the thread's position j. All threads of the
// block call it.
template <int N, class A, class Mine, class Join>
XENT_DEVICE void join_slices(A* exchange, int x, int y, int width, int slices, const Mine& mine, const Join& join) {
  __syncthreads();  // what was exchanged before has been read
#pragma unroll
  for (int j = 0; j < N; ++j) exchange[(y * width + x) * N + j] = mine(j);
  __syncthreads();
#pragma unroll
  for (int j = 0; j < N; ++j) {
    A joined = exchange[x * N + j];
    for (int other = 1; other < slices; ++other) joined = join(joined, exchange[(other * width + x) * N + j]);
    mine(j) = joined;
  }
}

template <class T, TargetKind kind, int N, bool kCopied>
__global__ void __launch_bounds__(kSpatialThreads, spatial_resident(sizeof(T), N > 1, kCopied))
    spatial(const __grid_constant__ Task task) {
  using A = Arithmetic<T>;
  using S = Statistics<A, kind != TargetKind::kIndex, !kCopied>;
  static_assert(!kCopied || N == kPerVector<T>);
  constexpr int kTogether = N == 8 ? 2 : 4;  // classes
  if (nothing_to_do(task)) return;

  XENT_DYNAMIC_SHARED(copies);
  XENT_SHARED_ARRAY(A, exchange, kSpatialThreads * N);
  const int slices = task.slices, width = kSpatialThreads / slices;
  const int x_index = int(threadIdx.x) % width, y_index = int(threadIdx.x) / width;
  const int last = task.dims - 1;
  const int64_t inner_size = task.size[last];
  const int64_t pieces = (inner_size + width * N - 1) / (width * N);  // of a run
  const int64_t tiles = task.positions / inner_size * pieces;
  const int64_t class_stride = task.logits.class_stride;
  const int classes = int(task.classes);
  const A scale_of_all = gradient_scale<A>(task);
  const bool forward = task.pass != Pass::kBackward, backward = task.pass != Pass::kForward;
  Sums sums{0, 0};

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t run = tile / pieces;
    const Place place{run, ((tile - run * pieces) * width + x_index) * N};
    const bool exists = place.inner < inner_size;  // all N do, or none
    const int64_t first = run * inner_size + place.inner;
    const T* const logits = static_cast<const T*>(task.logits.data) + (exists ? place.offset(task, task.logits) : 0);
    const auto copy_of = [&](int c) { return copies + (int64_t(c / slices) * kSpatialThreads + threadIdx.x) * 16; };
    const auto load_class = [&](int c, A(&x)[N]) {
      if constexpr (kCopied) {
        widen_vector<T>(load_vector(copy_of(c)), x);
      } else {
        Pack<T, N>::load(logits + c * class_stride, x);
      }
    };

    if (kCopied && exists) {
      for (int c = y_index; c < classes; c += slices) copy_async(copy_of(c), logits + c * class_stride);
      commit_copies();
    }

    // ---- targets
    int label[N];
    const int64_t target = exists ? place.offset(task, task.target) : 0, target_stride = task.target.stride[last];
    if (exists) {
#pragma unroll
      for (int j = 0; j < N; ++j) label[j] = int(read_label<kind>(task, target + j * target_stride));
    }
    const auto load_coefficients = [&](int c, A(&a)[N]) {
      if constexpr (kind == TargetKind::kSoft) {
        const int64_t at = target + c * task.target.class_stride;
        if (task.twin_target) {
          Pack<T, N>::load(static_cast<const T*>(task.target.data) + at, a);
        } else {
#pragma unroll
          for (int j = 0; j < N; ++j) a[j] = read_element<A>(task.target, at + j * target_stride);
        }
#pragma unroll
        for (int j = 0; j < N; ++j) a[j] = coefficient<kind>(task, c, a[j]);
      } else {
        const A same = coefficient<kind>(task, c, A(0));
#pragma unroll
        for (int j = 0; j < N; ++j) a[j] = same;
      }
    };
    if constexpr (kCopied) wait_for_copies<0>();

    // ---- sums
    A max[N], log_sum[N], mass[N];
    const auto larger = [](A a, A b) { return maximum(a, b); };
    if (forward) {
      S statistics[N];
#pragma unroll
      for (int j = 0; j < N; ++j) statistics[j] = S::of_nothing();
      if constexpr (kCopied) {
        A largest[N];
#pragma unroll
        for (int j = 0; j < N; ++j) largest[j] = A(-INFINITY);
        if (exists) {
          for (int c = y_index; c < classes; c += slices) {
            A x[N];
            load_class(c, x);
#pragma unroll
            for (int j = 0; j < N; ++j) largest[j] = maximum(largest[j], x[j]);
          }
        }
        if (slices > 1) {
          join_slices<N>(exchange, x_index, y_index, width, slices, [&](int j) -> A& { return largest[j]; }, larger);
        }
#pragma unroll
        for (int j = 0; j < N; ++j) statistics[j].raise(largest[j]);
        if (exists) {
          for (int c = y_index; c < classes; c += slices) {
            A x[N], a[N];
            load_class(c, x);
            load_coefficients(c, a);
#pragma unroll
            for (int j = 0; j < N; ++j) {
              const A of_position[1] = {x[j]}, its_coefficient[1] = {a[j]};
              statistics[j].add_up_to_max(of_position, its_coefficient);
            }
          }
        }
      } else {
        if (exists) {
          for (int c = y_index; c < classes; c += slices * kTogether) {
            A x[kTogether][N], a[kTogether][N];
#pragma unroll
            for (int k = 0; k < kTogether; ++k) {
              const int at = c + k * slices;
              if (at < classes) {
                load_class(at, x[k]);
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
              statistics[j].add(of_position, coefficients);
            }
          }
        }
        if (slices > 1) {
          A largest[N];
#pragma unroll
          for (int j = 0; j < N; ++j) largest[j] = statistics[j].max;
          join_slices<N>(exchange, x_index, y_index, width, slices, [&](int j) -> A& { return largest[j]; }, larger);
#pragma unroll
          for (int j = 0; j < N; ++j) statistics[j].raise(largest[j]);
        }
      }
      if (slices > 1) {
#pragma unroll
        for (int j = 0; j < N; ++j) statistics[j].settle();
        const auto sum = [](A a, A b) { return a + b; };
        join_slices<N>(exchange, x_index, y_index, width, slices, [&](int j) -> A& { return statistics[j].ties; }, sum);
        join_slices<N>(
            exchange, x_index, y_index, width, slices, [&](int j) -> A& { return statistics[j].rest.sum; }, sum);
        if constexpr (kind != TargetKind::kIndex) {
          join_slices<N>(
              exchange, x_index, y_index, width, slices, [&](int j) -> A& { return statistics[j].spread.sum; }, sum);
          join_slices<N>(
              exchange, x_index, y_index, width, slices, [&](int j) -> A& { return statistics[j].mass.sum; }, sum);
        }
      }
      const int64_t loss = exists ? place.offset(task, task.loss) : 0;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        max[j] = statistics[j].max;
        log_sum[j] = statistics[j].log_sum();
        mass[j] = statistics[j].mass.value();
        if (!exists || j % slices != y_index) continue;
        A target_logit = 0;
        if (kind != TargetKind::kSoft && is_counted(label[j])) {
          target_logit = widen<A>(logits[label[j] * class_stride + j * task.logits.stride[last]]);
        }
        finish_loss<kind>(task, first + j, target + j * target_stride, loss + j * task.loss.stride[last], label[j],
                          target_logit, statistics[j], log_sum[j], sums);
      }
    } else if (exists) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const SavedLse<A> lse(task, first + j);
        max[j] = lse.max;
        log_sum[j] = lse.log_sum;
        mass[j] = lse.mass;
        if (label[j] == kBad && j % slices == y_index) {
          report_bad_target(task, first + j, target + j * target_stride);
        }
      }
    }
    if (!backward || !exists) continue;

    // ---- the gradient
    const int64_t grad_output = place.offset(task, task.grad_output),
                  grad_logits = place.offset(task, task.grad_logits);
    const int64_t grad_target = place.offset(task, task.grad_target);
    Gradient<kind, A> gradient[N];
    A own[N];          // of an index target's own class, which is dear: once, and not for each class
    int own_class[N];  // kOthers: another thread's, or none; kIgnored: no gradient
    constexpr int kOthers = -2;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      own[j] = 0;
      own_class[j] = is_counted(label[j]) ? kOthers : kIgnored;
      if (own_class[j] == kIgnored) continue;
      gradient[j].set(task, label[j], max[j], log_sum[j], mass[j],
                      scale_of_all * read_grad_output<A>(task, grad_output + j * task.grad_output.stride[last]));
      if (kind == TargetKind::kSoft || label[j] % slices != y_index) continue;
      own_class[j] = label[j];
      const T* const from = kCopied ? reinterpret_cast<const T*>(copy_of(own_class[j])) + j
                                    : logits + own_class[j] * class_stride + j * task.logits.stride[last];
      own[j] = gradient[j].own(widen<A>(*from));
    }
    for (int c = y_index; c < classes; c += slices) {
      A x[N], a[N], dx[N];
      load_class(c, x);
      load_coefficients(c, a);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        dx[j] = own_class[j] == kIgnored ? A(0) : own_class[j] == c ? own[j] : gradient[j](x[j], a[j]);
      }
      if (kind == TargetKind::kSoft && task.grad_target) {
        for (int j = 0; j < N; ++j) {
          write_probability_gradient(task, grad_target + j * task.grad_target.stride[last], c,
                                     gradient[j].of_probability(x[j]));
        }
      }
      if (task.grad_logits) {
        Pack<T, N>::store(static_cast<T*>(task.grad_logits.data) + grad_logits + c * task.grad_logits.class_stride, dx);
      }
    }
  }
  leave_sums(task, sums);
}

}  // namespace xent::gpu

// Small rows: positions with few classes, in any layout that the spatial kernel does not take.
//
// Each warp works on a tile of positions that it brings into shared memory; a thread, or 2 to 32 neighbouring ones,
// then has a position to itself. In contiguous rows (N, C) or channels_last a tile is one run of memory, moved 16 bytes
// at a time however few classes there are: 1 read + 1 write of the logits, forward with gradient or backward alone.
//
// Why so: a row of 10 floats is no multiple of 16 bytes, and a warp that read rows directly would use a third of each
// transaction. From shared memory threads read single elements. Rows are C elements apart, so with 2^k the largest
// power of two in C, at least 2^k threads for a row touch 32 different banks (up to conflicts of two).
#pragma once

#include "position.cuh"
#include "reduce.cuh"
#include "vector.cuh"

namespace xent::gpu {

// Where a tile's rows are neighbours in memory, and so is what is written.
XENT_DEVICE bool is_one_run(const Task& task, const View& view) {
  return task.dims == 1 && view.class_stride == 1 && view.stride[0] == task.classes;
}

// A tile in shared memory, at the same place within 16 bytes as in global memory.
template <class T>
struct Tile {
  unsigned char* memory;
  int64_t first;  // position
  int rows, classes;

  XENT_DEVICE const T* source(const Task& task, const View& view) const {
    return static_cast<const T*>(view.data) + first * task.classes;
  }

  // Calls function(element of the tile, offset in the tensor), for this thread's elements.
  template <class Function>
  XENT_DEVICE void for_elements(const Task& task, const View& view, int lane, const Function& function) const {
    for (int e = lane; e < rows * classes; e += kWarp) {
      const int row = e / classes;
      function(e, offset_of(task, view, first + row) + (e - row * classes) * view.class_stride);
    }
  }

  // Returns where the tile's elements begin.
  XENT_DEVICE T* load(const Task& task, int lane) const {
    const int count = rows * classes;
    if (!is_one_run(task, task.logits)) {
      T* const elements = reinterpret_cast<T*>(memory);
      for_elements(task, task.logits, lane,
                   [&](int e, int64_t offset) { elements[e] = static_cast<const T*>(task.logits.data)[offset]; });
      return elements;
    }
    const T* const from = source(task, task.logits);
    T* const elements = reinterpret_cast<T*>(memory + phase_of(from));
    const Vectors shape = Vectors::of(from, count);
    for (int i = lane; i < shape.vectors; i += kWarp) {
      const int64_t e = shape.head + int64_t(i) * kPerVector<T>;
      copy_async(elements + e, from + e);
    }
    commit_copies();
    for (int i = lane; i < shape.edges; i += kWarp) elements[shape.edge(i)] = from[shape.edge(i)];
    wait_for_copies<0>();
    return elements;
  }

  XENT_DEVICE void store(const Task& task, const T* elements, int lane) const {
    const T* const to = source(task, task.grad_logits);
    if (!is_one_run(task, task.grad_logits) || phase_of(to) != phase_of(elements)) {
      for_elements(task, task.grad_logits, lane,
                   [&](int e, int64_t offset) { static_cast<T*>(task.grad_logits.data)[offset] = elements[e]; });
      return;
    }
    T* const out = const_cast<T*>(to);
    const Vectors shape = Vectors::of(to, rows * classes);
    for (int i = lane; i < shape.vectors; i += kWarp) {
      const int64_t e = shape.head + int64_t(i) * kPerVector<T>;
      stream_vector(out + e, load_vector(elements + e));
    }
    for (int i = lane; i < shape.edges; i += kWarp) out[shape.edge(i)] = elements[shape.edge(i)];
  }
};

template <class T, TargetKind kind>
__global__ void __launch_bounds__(kSmallRowsThreads, small_rows_resident(sizeof(T)))
    small_rows(const __grid_constant__ Task task) {
  using A = Arithmetic<T>;
  using S = Statistics<A, kind != TargetKind::kIndex>;
  constexpr int kTogether = 4;
  if (nothing_to_do(task)) return;

  XENT_DYNAMIC_SHARED(shared);
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int lanes = task.lanes_per_row, own_lane = lane % lanes, classes = int(task.classes);
  const A scale_of_all = gradient_scale<A>(task);
  const bool forward = task.pass != Pass::kBackward, backward = task.pass != Pass::kForward;
  Sums sums{0, 0};

  const int64_t tiles = (task.positions + task.rows_per_tile - 1) / task.rows_per_tile;
  const int64_t step = int64_t(gridDim.x) * (kSmallRowsThreads / kWarp);
  for (int64_t t = int64_t(blockIdx.x) * (kSmallRowsThreads / kWarp) + warp; t < tiles; t += step) {
    Tile<T> tile{shared + int64_t(warp) * task.copy_bytes, t * task.rows_per_tile, task.rows_per_tile, classes};
    tile.rows = int(min(int64_t(tile.rows), task.positions - tile.first));
    T* const elements = tile.load(task, lane);
    __syncwarp();

    for (int r = lane / lanes; r < task.rows_per_tile; r += kWarp / lanes) {  // as often for every thread
      const bool exists = r < tile.rows;
      const int64_t position = tile.first + (exists ? r : 0);
      T* const row = elements + int64_t(exists ? r : 0) * classes;
      const int64_t target = offset_of(task, task.target, position), label = read_label<kind>(task, target);
      const bool counts = exists && is_counted(label);
      const auto coefficient_of = [&](int c) {
        A q = 0;
        if constexpr (kind == TargetKind::kSoft) {
          q = read_element<A>(task.target, target + c * task.target.class_stride);
        }
        return coefficient<kind>(task, c, q);
      };

      S statistics = S::of_nothing();
      A max, log_sum, mass;
      if (forward) {
        if (counts) {
          A largest = A(-INFINITY);
          for (int c = own_lane; c < classes; c += lanes) largest = maximum(largest, widen<A>(row[c]));
          statistics.raise(largest);
        }
        statistics.raise(lanes_max(statistics.max, lanes));
        if (counts) {
          for (int c = own_lane; c < classes; c += lanes * kTogether) {
            A x[kTogether], a[kTogether];
#pragma unroll
            for (int k = 0; k < kTogether; ++k) {
              const int at = c + k * lanes;
              x[k] = at < classes ? widen<A>(row[at]) : A(-INFINITY);
              a[k] = at < classes ? coefficient_of(at) : A(0);
            }
            statistics.add_up_to_max(x, a);
          }
        }
        join_lanes(statistics, lanes);
        max = statistics.max;
        log_sum = statistics.log_sum();
        mass = statistics.mass.value();
        if (exists && own_lane == 0) {
          const A target_logit = counts && kind != TargetKind::kSoft ? widen<A>(row[label]) : A(0);
          finish_loss<kind>(task, position, target, offset_of(task, task.loss, position), label, target_logit,
                            statistics, log_sum, sums);
        }
      } else {
        const SavedLse<A> lse(task, position);
        max = lse.max;
        log_sum = lse.log_sum;
        mass = lse.mass;
        if (exists && own_lane == 0 && label == kBad) {
          report_bad_target(task, position, target);
        }
      }
      if (!backward) continue;

      __syncwarp();  // the target's logit has been read
      if (counts) {
        Gradient<kind, A> gradient;
        gradient.set(task, label, max, log_sum, mass,
                     scale_of_all * read_grad_output<A>(task, offset_of(task, task.grad_output, position)));
        const int64_t grad_target = task.grad_target ? offset_of(task, task.grad_target, position) : 0;
        for (int c = own_lane; c < classes; c += lanes) {
          const A x = widen<A>(row[c]);
          row[c] = narrow<T>(c == label ? gradient.own(x) : gradient(x, coefficient_of(c)));
          if (kind == TargetKind::kSoft && task.grad_target) {
            write_probability_gradient(task, grad_target, c, gradient.of_probability(x));
          }
        }
      } else if (exists) {
        for (int c = own_lane; c < classes; c += lanes) row[c] = T{};
      }
    }
    __syncwarp();
    if (backward && task.grad_logits) tile.store(task, elements, lane);
    __syncwarp();  // before the next tile takes this one's place
  }
  leave_sums(task, sums);
}

}  // namespace xent::gpu

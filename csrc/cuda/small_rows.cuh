// Small rows: positions with few classes, in any layout that the spatial kernel does not take.
//
// Each warp copies a tile of positions into shared memory; a thread, or 2 to 32 neighbouring ones, then has a position
// to itself. In contiguous rows (N, C) or channels_last a tile is one run of memory, moved 16 bytes at a time however
// few classes there are: 1 read + 1 write of the logits, forward with gradient or backward alone. A warp has room for
// two tiles: the next one loads while this one is worked on.
//
// Why: a row of 10 floats is no multiple of 16 bytes, and a warp that read rows directly would use a third of each
// transaction. From shared memory, threads take single elements, once, into registers; maximum, exponentials and
// gradient are made there, each exponential once. With so few classes the work per row counts, too: so a thread has up
// to 32 classes, and a row as few threads as that allows, unless they all met in the same banks (plan.cpp).
#pragma once

#include "position.cuh"
#include "reduce.cuh"
#include "vector.cuh"

namespace xent::gpu {

// Returns true where the rows of a tile are one run of memory.
XENT_DEVICE bool is_one_run(const Task& task, const View& view) {
  return task.dims == 1 && view.class_stride == 1 && view.stride[0] == task.classes;
}

// A tile in shared memory, with the alignment within 16 bytes that it has in global memory.
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

  // Returns where the tile's elements are once a group of copies has ended and the warp has met.
  XENT_DEVICE T* start_load(const Task& task, int lane) const {
    const int count = rows * classes;
    if (!is_one_run(task, task.logits)) {
      T* const elements = reinterpret_cast<T*>(memory);
      for_elements(task, task.logits, lane,
                   [&](int e, int64_t offset) { elements[e] = static_cast<const T*>(task.logits.data)[offset]; });
      commit_copies();  // an empty group
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

template <class T, Objective objective>
__global__ void __launch_bounds__(kSmallRowsThreads, small_rows_resident(sizeof(T), objective))
    small_rows(const __grid_constant__ Task task) {
  using A = Arithmetic<T>;
  constexpr bool kSoft = objective == Objective::kProbabilities;
  constexpr int kTogether = 4;
  if (nothing_to_do(task)) return;
  let_next_kernel_begin();

  XENT_DYNAMIC_SHARED(shared);
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int lanes = task.division.lanes_per_row, held_classes = task.division.classes_per_lane,
            classes = int(task.classes);
  const int first_class = lane % lanes * held_classes;
  const int own_classes = max(0, min(held_classes, classes - first_class));  // zero, where fewer threads would do
  A scale_of_all = 0;
  const bool forward = task.pass != Pass::kBackward, backward = task.pass != Pass::kForward;
  Sums sums{0, 0};

  // Calls use(k) for a thread's classes, and for as many more as make all threads call it as often.
  const auto for_held = [&](const auto& use) {
#pragma unroll
    for (int begin = 0; begin < kMostHeld; begin += kTogether) {
      if (begin < held_classes) {
#pragma unroll
        for (int k = begin; k < begin + kTogether; ++k) use(k);
      }
    }
  };

  const int64_t tiles = (task.positions + task.division.rows_per_tile - 1) / task.division.rows_per_tile;
  const int64_t step = int64_t(gridDim.x) * (kSmallRowsThreads / kWarp);
  const int64_t first_tile = int64_t(blockIdx.x) * (kSmallRowsThreads / kWarp) + warp;
  const auto tile_at = [&](int64_t t, int place) {
    Tile<T> tile{shared + int64_t(2 * warp + place) * task.division.copy_bytes, t * task.division.rows_per_tile, 0,
                 classes};
    tile.rows = int(max(int64_t(0), min(int64_t(task.division.rows_per_tile), task.positions - tile.first)));
    return tile;
  };
  Tile<T> next = tile_at(first_tile, 0);
  T* next_elements = next.start_load(task, lane);
  int place = 0;

  for (int64_t t = first_tile; t < tiles; t += step) {
    const Tile<T> tile = next;
    T* const elements = next_elements;
    place ^= 1;
    next = tile_at(t + step, place);
    next_elements = next.start_load(task, lane);  // loads nothing after the last tile

    const auto label_at = [&](int r) {
      return r < tile.rows ? read_label<objective>(task, offset_of(task, task.target, tile.first + r))
                           : int64_t(kIgnored);
    };
    int64_t label, next_label = label_at(lane / lanes);
    wait_for_copies<1>();
    __syncwarp();
    if (t == first_tile) scale_of_all = gradient_scale<A>(task);

    for (int r = lane / lanes; r < task.division.rows_per_tile;
         r += kWarp / lanes) {  // every thread goes round as often
      const bool exists = r < tile.rows, leads = exists && first_class == 0;
      const int64_t position = tile.first + (exists ? r : 0);
      T* const row = elements + int64_t(exists ? r : 0) * classes + first_class;
      const int64_t target = offset_of(task, task.target, position);
      label = next_label;
      next_label = label_at(r + kWarp / lanes);
      const bool counts = exists && is_counted(label);
      const int own_label = int(label) - first_class;
      const int own = exists ? own_classes : 0;
      const auto coefficient_of = [&](int k) {
        A q = 0;
        if constexpr (kSoft) {
          if (k < own) q = read_number<A>(task.target, target + (first_class + k) * task.target.class_stride);
        }
        return k < own ? coefficient<objective>(task, first_class + k, q) : A(0);
      };

      A held[kMostHeld];  // logits, then powers of two
      for_held([&](int k) { held[k] = k < own ? widen<A>(row[k]) : A(-INFINITY); });

      Result<A> result;
      Gradient<objective, A> gradient;
      const A grad_output = backward ? scale_of_all * grad_output_of<A>(task, position) : A(0);
      const int64_t of_label = counts ? label : 0;
      if (forward) {
        A largest = A(-INFINITY);
        for_held([&](int k) { largest = maximum(largest, held[k]); });
        auto known = KnownMaximum<A>::of(lanes_max(largest, lanes));
        if constexpr (objective != Objective::kIndex) {
          for_held([&](int k) {
            const A a = coefficient_of(k);
            known.add_careful_spread(held[k], a);
            known.mass += a;
          });
          known.spread = lanes_sum(known.spread, lanes);
          known.mass = kSoft ? lanes_sum(known.mass, lanes) : smoothed_total<A>(task);
        }
        for_held([&](int k) { held[k] = known.add(held[k]); });
        known.ties = lanes_sum(known.ties, lanes);
        known.rest = lanes_sum(known.rest, lanes);
        result = {known.max, known.log_sum(), known.spread, known.mass};
        if (leads) {
          const A target_logit = counts && !kSoft ? widen<A>(row[label]) : A(0);
          finish_loss<objective>(task, Destination<A>::of(task, position, target), label, target_logit, result, sums);
        }
        gradient.set(task, position, of_label, result, grad_output);
      } else {
        result = SavedResult<objective>::template at<A>(task, position);
        gradient.set(task, position, of_label, result, grad_output);
        if (leads && label == kBad) report_bad_target<objective>(task, position, target);
        if (kSoft && task.grad_target) {
          const int64_t grad_target = offset_of(task, task.grad_target, position);
          for (int k = 0; k < own; ++k) {
            write_probability_gradient(task, grad_target, first_class + k, gradient.of_probability(widen<A>(row[k])));
          }
        }
        for_held([&](int k) { held[k] = gradient.power(held[k]); });
      }
      if (!backward) continue;

      const bool has_label = uint32_t(own_label) < uint32_t(own);
      const A own_gradient = !kSoft && has_label ? gradient.own(widen<A>(row[own_label])) : A(0);
      __syncwarp();  // all threads have read the target's logit
      if (is_uniform<objective>(task)) {
        bool careful = false;
        for_held([&](int k) { held[k] = gradient.of_power(held[k], numbers<A>(task).share, careful); });
      } else {
        for_held([&](int k) {
          const A a = coefficient_of(k);
          bool careful = false;
          held[k] = gradient.of_power(held[k], a, careful);
          if (careful && k < own) held[k] = gradient.from_logit(widen<A>(row[k]), a);
        });
      }
      for_held([&](int k) {
        if (k < own) row[k] = counts ? narrow<T>(held[k]) : T{};
      });
      if (!kSoft && has_label) row[own_label] = narrow<T>(own_gradient);
    }
    __syncwarp();
    if (backward && task.grad_logits) tile.store(task, elements, lane);
    __syncwarp();  // all threads have read the tile; another may take its place
  }
  wait_for_copies<0>();
  leave_sums(task, sums);
}

}  // namespace xent::gpu

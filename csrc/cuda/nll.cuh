// The negative log likelihood. The forward reads one element of each position. The backward writes the gradient once: a
// block zeroes a tile of memory with vectors, waits, and writes the one element of each of its positions while the
// zeros are still in the second-level cache. A kernel of zeros and another of elements would bring the line of each
// element back from memory. No atomics: an element belongs to one position.
#pragma once

#include "nll.h"
#include "reduce.cuh"

namespace xent::gpu {

template <class A>
__global__ void __launch_bounds__(kNllThreads) nll_forward(const __grid_constant__ Task task) {
  constexpr Objective objective = Objective::kIndex;
  Sums sums{0, 0};
  const int64_t step = int64_t(gridDim.x) * kNllThreads;
  for (int64_t p = int64_t(blockIdx.x) * kNllThreads + threadIdx.x; p < task.positions; p += step) {
    const int64_t target = offset_of(task, task.target, p), label = read_label<objective>(task, target);
    A loss = 0, weight = 0;
    if (label == kBad) {
      loss = A(NAN);
      report_bad_target<objective>(task, p, target);
    } else if (label != kIgnored) {
      weight = class_weight<A>(task, label);
      const int64_t at = offset_of(task, task.logits, p) + label * task.logits.class_stride;
      if (weight != A(0)) loss = -weight * read_number<A>(task.logits, at);
    }
    if (task.loss) write_element(task.loss, p, loss);
    sums.loss += double(loss);
    sums.weight += double(weight);
  }
  leave_sums(task, sums);
}

// Writes `bytes` of zeros. `threads` threads call it, each with its number.
XENT_DEVICE void write_zeros(void* at, int64_t bytes, int thread, int threads) {
  unsigned char* const p = static_cast<unsigned char*>(at);
  const int64_t head = min(bytes, int64_t((16u - phase_of(p)) % 16u));
  const int64_t vectors = (bytes - head) / 16, tail = head + vectors * 16;
  for (int64_t i = thread; i < vectors; i += threads) store_vector(p + head + i * 16, uint4{0, 0, 0, 0});
  for (int64_t i = thread; i < head; i += threads) p[i] = 0;
  for (int64_t i = tail + thread; i < bytes; i += threads) p[i] = 0;
}

template <class A>
__global__ void __launch_bounds__(kNllThreads, kNllResident) nll_backward(const __grid_constant__ NllGradient task) {
  const int64_t size = task.element_size;
  unsigned char* const gradient = static_cast<unsigned char*>(task.grad_logits.data);
  const double scale = 1 / *task.denominator;
  const int64_t slices = NllGradient::parts(task.classes, task.classes_of_tile);
  const int64_t runs = NllGradient::parts(task.inner, task.inner_of_tile), tiles = task.tiles();

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first_class = tile % slices * task.classes_of_tile;
    const int64_t first_inner = tile / slices % runs * task.inner_of_tile;
    const int64_t first_slab = tile / slices / runs * task.slabs_of_tile;
    const int64_t classes = min(task.classes_of_tile, task.classes - first_class);
    const int64_t inner = min(task.inner_of_tile, task.inner - first_inner);
    const int64_t slabs = min(task.slabs_of_tile, task.slabs() - first_slab);
    const int64_t first = (first_slab * task.classes + first_class) * task.inner + first_inner;

    if (inner == task.inner) {  // the tile is one run of memory
      write_zeros(gradient + first * size, slabs * classes * inner * size, int(threadIdx.x), kNllThreads);
    } else {
      for (int64_t c = threadIdx.x / kWarp; c < classes; c += kNllThreads / kWarp) {
        write_zeros(gradient + (first + c * task.inner) * size, inner * size, int(threadIdx.x) % kWarp, kWarp);
      }
    }
    __syncthreads();

    for (int64_t k = threadIdx.x; k < slabs * inner; k += kNllThreads) {
      const int64_t slab = first_slab + k / inner, i = first_inner + k % inner, position = slab * task.inner + i;
      const int64_t label = read_label<Objective::kIndex>(task, offset_of(task, task.target, position));
      if (label < first_class || label >= first_class + classes) continue;  // also where it is no class
      const double g = read_number<double>(task.grad_output, offset_of(task, task.grad_output, position));
      write_element(task.grad_logits, (slab * task.classes + label) * task.inner + i,
                    -g * double(class_weight<A>(task, label)) * scale);
    }
  }
}

}  // namespace xent::gpu

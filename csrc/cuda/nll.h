// The tasks and the launches of the negative log likelihood's kernels. Knows neither torch nor CUDA.
#pragma once

#include "task.h"

namespace xent::gpu {

// The gradient's memory is [slabs][classes][inner], and positions come in its order. A block writes a tile at a time:
// whole slabs, or a run of one slab's inner positions; and of a large one, a slice of its classes.
struct NllGradient : Task {
  int64_t inner = 1, element_size = 0;
  int64_t slabs_of_tile = 1, inner_of_tile = 1, classes_of_tile = 1;

  XENT_HOST_DEVICE static int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
  XENT_HOST_DEVICE int64_t slabs() const { return positions / inner; }
  XENT_HOST_DEVICE int64_t tiles() const {
    return parts(slabs(), slabs_of_tile) * parts(inner, inner_of_tile) * parts(classes, classes_of_tile);
  }
};

constexpr int kNllThreads = 256, kNllResident = 3;  // threads of a block, blocks of a multiprocessor

// Fills in the tiles, and returns the number of blocks.
int64_t plan_nll_gradient(NllGradient& task, const Device& device);

// Writes the blocks' sums to task.partial_sums, or the losses to task.loss.
int launch_nll_forward(const Task& task, int64_t blocks, void* stream);
int launch_nll_backward(const NllGradient& task, int64_t blocks, void* stream);

}  // namespace xent::gpu

// Launch decisions: which kernel a task gets, and how its work is divided. Plain C++ that knows no CUDA, so the same
// function decides for a GPU and for the emulator. How many clusters fit is for the device to say: the host code asks
// it, and plans again where none does (plan_on in cross_entropy_cuda.cpp).
#pragma once

#include "task.h"

namespace xent::gpu {

enum class Family : uint8_t { kSmallRows, kRows, kSpatial, kStrided };

// The threads that share a row.
enum class Team : uint8_t { kWarp, kBlock, kCluster };

struct LaunchShape {
  int64_t blocks = 1;
  int threads = 1;
  int64_t shared_bytes = 0;  // dynamic
  int cluster = 1;           // blocks

  // The kernel may begin before the previous one has ended; the next one may begin before this one has (portable.cuh).
  bool overlaps = false, is_overlapped = false;
};

struct Plan {
  Family family = Family::kStrided;
  Team team = Team::kWarp;  // rows, strided
  bool copied = false;      // rows, spatial: through shared memory
  bool vectors = false;     // spatial
  LaunchShape shape;
  Division division;
};

constexpr int kMostDevices = 64;

constexpr int kWarp = 32;  // threads that run in lockstep, and shuffle values among each other
constexpr int kVectorBytes = 16;

// Classes of a small row that a thread has in registers, at most.
constexpr int kMostHeld = 32;

// Threads of a block.
constexpr int kSmallRowsThreads = 128;
constexpr int kSpatialThreads = 128;
constexpr int kReduceThreads = 256;
constexpr int kFinishThreads = 32;
constexpr int block_threads(Team team) { return team == Team::kWarp ? 128 : 256; }

constexpr int kCountedTogether = 8;  // targets that a thread of the count reads at a time
constexpr int kCountResident = 2;    // its blocks on a multiprocessor: few, for every warp of the loss adds their sums

// Blocks of a kernel on a multiprocessor, for which the compiler limits registers and the grid is made. No more than
// shared memory has room for, and so few that nothing spills. Not tuned for float64.
constexpr int rows_resident(int element_size, Objective objective, Team team, bool copied) {
  if (objective == Objective::kGeneral) return (team == Team::kWarp ? 4 : 2) / (element_size == 8 ? 2 : 1);
  if (element_size == 8) return team == Team::kWarp ? 3 : copied ? 2 : 1;
  if (team == Team::kWarp) return objective == Objective::kIndex ? 6 : 5;
  return objective == Objective::kIndex && copied ? 3 : 2;
}
constexpr int small_rows_resident(int element_size, Objective objective) {
  if (element_size == 8) return 2;
  return objective == Objective::kSmoothedIndex ? 3 : 4;
}
constexpr int spatial_resident(int element_size, Objective objective, bool vectors, bool copied) {
  if (element_size == 8) return 2;
  if (element_size == 4 || !vectors) return 4;
  return copied && objective != Objective::kProbabilities ? 4 : 3;
}
constexpr int strided_resident(int arithmetic_size, Team team) {
  return (team == Team::kWarp ? 4 : 2) / (arithmetic_size / 4);
}

// Fills in what kernels read of the options, and gives the dimension of a single class the stride of contiguous ones.
void prepare(Task& task);

// Returns the plan of a prepared task.
Plan plan(const Task& task, const Device& device);

// How many blocks count the targets of a mean.
int blocks_to_count(int64_t positions, const Device& device);

}  // namespace xent::gpu

// Which kernel a task gets, and how its work is divided: the launch decisions, all of them, as plain C++ that knows no
// CUDA. The same function decides for a GPU and for the emulator.
#pragma once

#include "task.h"

namespace xent::gpu {

enum class Family : uint8_t { kSmallRows, kRows, kSpatial, kStrided };

// Who has a row to itself.
enum class Team : uint8_t { kWarp, kBlock, kCluster };

struct LaunchShape {
  int64_t blocks = 1;
  int threads = 1;
  int64_t shared_bytes = 0;  // dynamic
  int cluster = 1;           // blocks
};

struct Plan {
  Family family = Family::kStrided;
  Team team = Team::kWarp;  // rows, strided
  bool copied = false;      // rows, spatial: through shared memory
  bool vectors = false;     // spatial
  LaunchShape shape;
};

// Threads of a block.
constexpr int kSmallRowsThreads = 128;
constexpr int kSpatialThreads = 128;
constexpr int kReduceThreads = 256;
constexpr int block_threads(Team team) { return team == Team::kWarp ? 128 : 256; }

// Also fills in how the task is divided.
Plan plan(Task& task, const Device& device);

// How many blocks count the targets of a mean.
int blocks_to_count(int64_t positions, const Device& device);

}  // namespace xent::gpu

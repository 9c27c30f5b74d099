// Kernels for the emulator's own test: wrong ones, one for each kind of bug that it is to report, and right ones, in
// which it must find nothing.
//
//   planted_bugs list               each case's name
//   planted_bugs CASE               in every order, with several seeds, until something is wrong
//   planted_bugs CASE ORDER SEED
//
// Exits with 0 if nothing was wrong, with 1 and a line on what was, or as a sanitizer has it.
#include <atomic>
#include <cstdio>
#include <thread>

#include "cuda_emulator.h"

#define SHARED_ARRAY(T, name, count) T* const name = emulator::shared_array<T>(count, #name, __FILE__, __LINE__)

namespace {

constexpr unsigned kAll = 0xffffffffu;

std::vector<float> ramp(size_t n) {
  std::vector<float> x(n);
  for (size_t i = 0; i < n; ++i) x[i] = float(i);
  return x;
}

// Runs kernel(x, y) with x[i] = i, and tells whether y[i] = expected(i) for each of the grid's threads.
template <class Expected>
bool maps_ramp(void (*kernel)(const float*, float*), dim3 grid, dim3 block, unsigned cluster, Expected expected) {
  const size_t threads = size_t(grid.x) * grid.y * grid.z * block.x * block.y * block.z;
  const std::vector<float> x = ramp(threads);
  std::vector<float> y(threads, -1);
  emulator::launch(grid, block, 0, cluster, [&] { kernel(x.data(), y.data()); });
  for (size_t i = 0; i < threads; ++i) {
    if (!(y[i] == float(expected(int(i))))) return false;
  }
  return true;
}

// ---- barriers -------------------------------------------------------------------------------------------------------

__global__ void divergent_barrier(const float*, float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void deadlock(const float*, float*) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

__global__ void missing_barrier(const float* x, float* y) {
  SHARED_ARRAY(float, all, 64);
  all[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = all[63 - threadIdx.x];
}

// The next round's values replace those that others have yet to read.
__global__ void missing_second_barrier(const float* x, float* y) {
  SHARED_ARRAY(float, all, 64);
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    all[threadIdx.x] = x[threadIdx.x] + float(100 * round);
    __syncthreads();
    sum += all[63 - threadIdx.x];
  }
  y[threadIdx.x] = sum;
}

__global__ void missing_syncwarp(const float* x, float* y) {
  SHARED_ARRAY(float, all, 32);
  all[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = all[31 - threadIdx.x];
}

// A shuffle is no __syncwarp: values in registers arrive, but what is in memory need not.
__global__ void shuffle_for_syncwarp(const float* x, float* y) {
  SHARED_ARRAY(float, all, 32);
  all[threadIdx.x] = x[threadIdx.x];
  __shfl_xor_sync(kAll, 0.f, 1);
  y[threadIdx.x] = all[31 - threadIdx.x];
}

// ---- warp collectives -----------------------------------------------------------------------------------------------

__global__ void mask_lacks_caller(const float* x, float* y) {
  y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, x[threadIdx.x], 1);
}

__global__ void mask_names_exited(const float* x, float* y) {
  if (threadIdx.x >= 16) return;
  __syncthreads();
  y[threadIdx.x] = __shfl_xor_sync(kAll, x[threadIdx.x], 1);
}

__global__ void exit_while_awaited(const float* x, float* y) {
  if (threadIdx.x == 31) return;
  y[threadIdx.x] = __shfl_xor_sync(kAll, x[threadIdx.x], 1);
}

__global__ void divergent_shuffle(const float* x, float* y) {
  if (threadIdx.x % 2 == 0) {
    y[threadIdx.x] = __shfl_xor_sync(kAll, x[threadIdx.x], 1);
  } else {
    y[threadIdx.x] = __shfl_xor_sync(kAll, x[threadIdx.x], 1);
  }
}

__global__ void lane_outside_mask(const float* x, float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, x[threadIdx.x], 16);
}

__global__ void width_of_three(const float* x, float* y) {
  y[threadIdx.x] = __shfl_xor_sync(kAll, x[threadIdx.x], 1, 3);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

__global__ void shared_overrun(const float* x, float* y) {
  SHARED_ARRAY(float, all, 63);
  all[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = all[threadIdx.x];
}

__global__ void dynamic_overrun(const float* x, float* y) {
  float* const all = static_cast<float*>(emulator::dynamic_shared_memory());  // of no bytes
  all[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = all[threadIdx.x];
}

__global__ void shared_overread(const float* x, float* y) {
  SHARED_ARRAY(float, all, 64);
  all[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = all[threadIdx.x + 1];
}

__global__ void global_out_of_bounds(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }

__global__ void misaligned_vector(const float* x, float* y) {
  if (threadIdx.x >= 8) return;
  const float4 v = __ldg(reinterpret_cast<const float4*>(x + 1) + threadIdx.x);
  __stcs(reinterpret_cast<float4*>(y) + threadIdx.x, v);
}

// All blocks in one element. They run one after another here, so that only TSan can tell.
__global__ void race_between_blocks(const float* x, float* y) {
  if (threadIdx.x == 0) y[0] += x[blockIdx.x * blockDim.x];
}

// Whichever block is the last adds up what the others left.
template <bool kFence>
void last_block_sums(const float* x, int* sums, int* finished) {
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = int(x[blockIdx.x]);
    if (kFence) __threadfence();
    if (atomicAdd(finished, 1) == int(gridDim.x) - 1) {
      if (kFence) __threadfence();
      int total = 0;
      for (unsigned b = 0; b < gridDim.x; ++b) total += sums[b];
      sums[gridDim.x] = total;
    }
  }
}
template <bool kFence>
bool last_block_case() {
  const std::vector<float> x = ramp(8);
  std::vector<int> sums(9);
  int finished = 0;
  emulator::launch(dim3(8), dim3(32), 0, 1, [&] { last_block_sums<kFence>(x.data(), sums.data(), &finished); });
  return sums[8] == 28;
}

// ---- asynchronous copies --------------------------------------------------------------------------------------------

__global__ void misaligned_copy(const float* x, float*) {
  SHARED_ARRAY(float4, all, 32);
  emulator::cp_async(all + threadIdx.x, x + 1, 16);
  emulator::cp_async_commit();
  emulator::cp_async_wait(0);
}

__global__ void copy_to_global(const float* x, float* y) {
  emulator::cp_async(y + threadIdx.x, x + threadIdx.x, 4);
  emulator::cp_async_commit();
  emulator::cp_async_wait(0);
}

__global__ void copy_never_awaited(const float* x, float* y) {
  SHARED_ARRAY(float, all, 32);
  emulator::cp_async(all + threadIdx.x, x + threadIdx.x, 4);
  emulator::cp_async_commit();
  y[threadIdx.x] = x[threadIdx.x];
}

// Reverses each 32 of 256 elements. While one 32 are read, the next are on their way.
template <int kLeft, bool kBarrierBeforeReuse>
void pipeline(const float* x, float* y) {
  constexpr int kRounds = 8, kStages = 2;
  SHARED_ARRAY(float, stages, kStages * 32);
  const int t = int(threadIdx.x);
  const auto fetch = [&](int round) {
    if (round < kRounds) emulator::cp_async(stages + round % kStages * 32 + t, x + round * 32 + t, 4);
    emulator::cp_async_commit();
  };
  fetch(0);
  for (int round = 0; round < kRounds; ++round) {
    fetch(round + 1);
    emulator::cp_async_wait(kLeft);
    __syncthreads();
    y[round * 32 + t] = stages[round % kStages * 32 + 31 - t];
    if (kBarrierBeforeReuse) __syncthreads();
  }
  emulator::cp_async_wait(0);
}
template <int kLeft, bool kBarrierBeforeReuse>
bool pipeline_case() {
  const std::vector<float> x = ramp(256);
  std::vector<float> y(256);
  emulator::launch(dim3(1), dim3(32), 0, 1, [&] { pipeline<kLeft, kBarrierBeforeReuse>(x.data(), y.data()); });
  for (int i = 0; i < 256; ++i) {
    if (y[size_t(i)] != float(i / 32 * 32 + 31 - i % 32)) return false;
  }
  return true;
}

// ---- clusters -------------------------------------------------------------------------------------------------------

// Each block takes what the next one of its cluster has. The first barrier is for what is read to be there, the last
// one for it to be there still.
template <bool kFirst, bool kLast>
void from_next_block(const float* x, float* y) {
  SHARED_ARRAY(float, mine, 32);
  const unsigned i = blockIdx.x * 32 + threadIdx.x;
  mine[threadIdx.x] = x[i];
  float* const theirs = emulator::map_shared_rank(mine, (emulator::cluster_rank() + 1) % emulator::cluster_size());
  if (kFirst) emulator::cluster_sync();
  y[i] = theirs[threadIdx.x];
  if (kLast) emulator::cluster_sync();
}
template <bool kFirst, bool kLast>
bool next_block_case(unsigned cluster) {
  return maps_ramp(from_next_block<kFirst, kLast>, dim3(8), dim3(32), cluster, [=](int i) {
    const int block = i / 32, size = int(cluster);
    return (block / size * size + (block + 1) % size) * 32 + i % 32;
  });
}

// The first block is gone when the second one asks for its memory.
__global__ void map_of_exited_block(const float* x, float* y) {
  SHARED_ARRAY(float, mine, 32);
  mine[threadIdx.x] = x[threadIdx.x];
  emulator::cluster_sync();
  if (emulator::cluster_rank() == 0) return;
  for (int i = 0; i < 8; ++i) __syncthreads();
  y[threadIdx.x] = emulator::map_shared_rank(mine, 0)[threadIdx.x];
}

// ---- kernels that overlap -------------------------------------------------------------------------------------------

enum class Wait { kFirst, kLate, kNever };

// The first doubles x, the second adds one to that, the third two.
template <Wait how>
bool overlap_case() {
  const std::vector<float> x = ramp(64);
  std::vector<float> doubled(64, -1), more(64, -1), most(64, -1);
  const auto run = [](bool overlaps, bool is_overlapped, const std::function<void(unsigned)>& kernel) {
    emulator::launch(dim3(2), dim3(32), 0, 1, overlaps, is_overlapped, [=] { kernel(blockIdx.x * 32 + threadIdx.x); });
  };
  run(false, true, [&](unsigned i) { doubled[i] = 2 * x[i]; });
  run(true, true, [&](unsigned i) {
    if (how == Wait::kFirst) emulator::wait_for_previous_kernel();
    more[i] = doubled[i] + 1;
    if (how == Wait::kLate) emulator::wait_for_previous_kernel();
  });
  run(true, false, [&](unsigned i) {
    emulator::wait_for_previous_kernel();
    most[i] = more[i] + 2;
  });
  for (int i = 0; i < 64; ++i) {
    if (most[size_t(i)] != float(2 * i + 3)) return false;
  }
  return true;
}

// ---- right ones -----------------------------------------------------------------------------------------------------

template <class T>
bool shuffles_are_right(T unit) {
  const int lane = int(threadIdx.x % 32);
  const T value = T(lane) * unit;
  bool right = true;
  for (int width = 1; width <= 32; width *= 2) {
    const int first = lane / width * width, last = first + width - 1;
    for (const int d : {0, 1, 2, 5, 8, 16, 31}) {
      const int down = lane + d <= last ? lane + d : lane, up = lane - d >= first ? lane - d : lane;
      const int other = (lane ^ d) <= last ? lane ^ d : lane;
      right = right && __shfl_sync(kAll, value, d, width) == T(first + d % width) * unit;
      right = right && __shfl_down_sync(kAll, value, unsigned(d), width) == T(down) * unit;
      right = right && __shfl_up_sync(kAll, value, unsigned(d), width) == T(up) * unit;
      right = right && __shfl_xor_sync(kAll, value, d, width) == T(other) * unit;
    }
  }
  return right;
}

template <class T>
bool shuffle_case(T unit) {
  std::vector<int> right(64);
  emulator::launch(dim3(1), dim3(64), 0, 1, [&] { right[threadIdx.x] = shuffles_are_right(unit); });
  return std::count(right.begin(), right.end(), 1) == 64;
}

__global__ void votes(int* right) {
  const unsigned t = threadIdx.x, lane = t % 32;
  bool good = __ballot_sync(kAll, lane % 3 == 0) == 0x49249249u;
  good = good && __any_sync(kAll, lane == 7) == 1 && __any_sync(kAll, 0) == 0;
  good = good && __all_sync(kAll, 1) == 1 && __all_sync(kAll, lane != 7) == 0;
  // Two halves of a warp, each with its own mask and at its own pace.
  if (lane < 16) {
    for (int i = 0; i < 3; ++i) good = good && __ballot_sync(0x0000ffffu, lane == 4) == 0x10u;
  } else {
    good = good && __shfl_xor_sync(0xffff0000u, int(lane), 3) == int(lane ^ 3);
  }
  good = good && __syncthreads_count(t % 5 == 0) == 13;
  good = good && __syncthreads_or(t == 63) == 1 && __syncthreads_or(0) == 0;
  good = good && __syncthreads_and(1) == 1 && __syncthreads_and(t != 63) == 0;
  right[t] = good;
}
bool votes_case() {
  std::vector<int> right(64);
  emulator::launch(dim3(1), dim3(64), 0, 1, [&] { votes(right.data()); });
  return std::count(right.begin(), right.end(), 1) == 64;
}

// 48 threads: half a warp is not there. Some exit early, and no barrier waits for them.
__global__ void partial_warp(const float* x, float* y) {
  SHARED_ARRAY(float, all, 48);
  const unsigned t = threadIdx.x, mask = t < 32 ? kAll : 0x0000ffffu;
  all[t] = x[t];
  __syncwarp(mask);
  y[t] = all[t ^ 1] + __shfl_xor_sync(mask, x[t], 2);
  if (t % 3 == 0) return;
  __syncthreads();
  if (t % 3 == 1) y[t] = all[47 - t];
}

__global__ void warp_reverse(const float* x, float* y) {
  SHARED_ARRAY(float, all, 64);
  const unsigned t = threadIdx.x;
  for (int round = 0; round < 3; ++round) {
    all[t] = x[t];
    __syncwarp();
    y[t] = all[t / 32 * 32 + 31 - t % 32];
    __syncwarp();
  }
}

template <class T>
void atomics(T* cells, int* right, T threads) {
  atomicAdd(&cells[0], T(2));
  atomicMin(&cells[1], T(threadIdx.x) + 5);
  atomicMax(&cells[2], T(threadIdx.x) + 5);
  if (atomicCAS(&cells[3], T(0), T(threadIdx.x) + 1) == 0) atomicExch(&cells[4], T(7));
  __syncthreads();
  const bool winner_exists = cells[3] >= 1 && cells[3] <= threads;
  right[threadIdx.x] =
      cells[0] == 2 * threads && cells[1] == 5 && cells[2] == threads + 4 && cells[4] == 7 && winner_exists;
}
template <class T>
bool atomics_case() {
  std::vector<T> cells = {0, 100, 0, 0, 0};
  std::vector<int> right(96);
  emulator::launch(dim3(1), dim3(96), 0, 1, [&] { atomics(cells.data(), right.data(), T(96)); });
  return std::count(right.begin(), right.end(), 1) == 96;
}

__global__ void vector_copies(const float* x, float* y, int* right) {
  unsigned char* const shared = static_cast<unsigned char*>(emulator::dynamic_shared_memory());
  const unsigned t = threadIdx.x;
  emulator::cp_async(shared + 16 * t, x + 4 * t, 16);
  emulator::cp_async_commit();
  emulator::cp_async(shared + 1024 + 8 * t, x + 4 * t, 8);
  emulator::cp_async(shared + 1536 + 4 * t, x + 4 * t, 4);
  emulator::cp_async_commit();
  emulator::cp_async_wait(1);
  const uint4 v = *reinterpret_cast<const uint4*>(shared + 16 * t);
  __stcs(reinterpret_cast<uint4*>(y) + t, v);
  emulator::cp_async_wait(0);
  __syncthreads();
  const float2 pair = *reinterpret_cast<const float2*>(shared + 1024 + 8 * (63 - t));
  const float single = *reinterpret_cast<const float*>(shared + 1536 + 4 * (63 - t));
  right[t] = reinterpret_cast<uintptr_t>(shared) % 128 == 0 && pair.x == single && pair.y == single + 1 &&
             single == __ldcs(x + 4 * (63 - t)) && min(int(t), 3) <= 3 && max(int64_t(t), int64_t(3)) >= 3;
}
bool vector_copies_case() {
  alignas(16) float x[256], y[256];
  for (int i = 0; i < 256; ++i) x[i] = float(i);
  std::vector<int> right(64);
  emulator::launch(dim3(1), dim3(64), 1792, 1, [&] { vector_copies(x, y, right.data()); });
  return std::equal(x, x + 256, y) && std::count(right.begin(), right.end(), 1) == 64;
}

// Every thread of a grid of three dimensions, once.
bool indices_case() {
  const dim3 grid(4, 3, 2), block(5, 3, 2);
  std::vector<int> seen(24 * 30);
  emulator::launch(grid, block, 0, 2, [&] {
    const unsigned b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    ++seen[b * 30 + t];
    if (emulator::cluster_rank() != blockIdx.x % 2 || emulator::cluster_size() != 2) seen[b * 30 + t] = 2;
  });
  return std::count(seen.begin(), seen.end(), 1) == 24 * 30;
}

bool fails(void (*kernel)(const float*, float*), unsigned threads) {
  const std::vector<float> x = ramp(threads);
  std::vector<float> y(threads);
  try {
    emulator::launch(dim3(1), dim3(threads), 0, 1, [&] { kernel(x.data(), y.data()); });
  } catch (const emulator::Error&) {
    return true;
  }
  return false;
}

// What has failed leaves nothing behind, and runs the destructors of what kernels have on their stacks.
bool after_errors_case() {
  static std::atomic<int> objects = 0;
  struct Counted {
    Counted() { ++objects; }
    ~Counted() { --objects; }
  };
  for (int i = 0; i < 2; ++i) {
    const auto deadlock_with_objects = [](const float* x, float* y) {
      const Counted counted;
      deadlock(x, y);
    };
    if (!fails(deadlock_with_objects, 64) || objects != 0) return false;
    if (!fails(divergent_barrier, 256) || !votes_case()) return false;
  }
  return true;
}

// Each OS thread has its own fibers, and its own errors.
bool os_threads_case() {
  bool right[2] = {};
  std::vector<std::thread> threads;
  for (bool& its_own : right) {
    threads.emplace_back([&its_own] {
      its_own = true;
      for (int i = 0; i < 3; ++i) {
        its_own = its_own && votes_case() && next_block_case<true, true>(2) && pipeline_case<1, true>();
        its_own = its_own && fails(deadlock, 64);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return std::count(right, right + 2, true) == 2;
}

bool limits_case() {
  const auto is_refused = [](dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster) {
    try {
      emulator::launch(grid, block, shared_bytes, cluster, [] {});
    } catch (const emulator::Error& error) {
      return std::strncmp(error.what(), "launch: ", 8) == 0;
    }
    return false;
  };
  const size_t most = emulator::most_shared_bytes;
  return is_refused(dim3(0), dim3(1), 0, 1) && is_refused(dim3(1), dim3(0), 0, 1) &&
         is_refused(dim3(1), dim3(1025), 0, 1) && is_refused(dim3(1), dim3(33, 32), 0, 1) &&
         is_refused(dim3(1), dim3(1, 1, 65), 0, 1) && is_refused(dim3(1, 65536), dim3(1), 0, 1) &&
         is_refused(dim3(1, 1, 65536), dim3(1), 0, 1) && is_refused(dim3(0x80000000u), dim3(1), 0, 1) &&
         is_refused(dim3(3), dim3(1), 0, 2) && is_refused(dim3(16), dim3(1), 0, 16) &&
         is_refused(dim3(1), dim3(1), 0, 0) && is_refused(dim3(1), dim3(1), most + 1, 1) &&
         !is_refused(dim3(8, 1, 2), dim3(1), 0, 8) && !is_refused(dim3(1), dim3(4, 1, 64), most, 1);
}

bool too_much_static_case() {
  emulator::launch(dim3(1), dim3(1), 0, 1, [] {
    SHARED_ARRAY(float, big, 12289);
    (void)big;
  });
  return true;
}

bool launch_from_kernel_case() {
  emulator::launch(dim3(1), dim3(1), 0, 1, [] { emulator::launch(dim3(1), dim3(1), 0, 1, [] {}); });
  return true;
}

#if defined(PLANT_FLOAT_ATOMIC)
__global__ void float_atomic(const float* x, float* y) { atomicAdd(y, x[threadIdx.x]); }
#endif

// ---- cases ----------------------------------------------------------------------------------------------------------

template <class Expected>
bool on_ramp(void (*kernel)(const float*, float*), unsigned threads, Expected expected) {
  return maps_ramp(kernel, dim3(1), dim3(threads), 1, expected);
}
bool on_ramp(void (*kernel)(const float*, float*), unsigned threads) {
  return on_ramp(kernel, threads, [](int i) { return i; });
}

struct Case {
  const char* name;
  bool (*is_right)();
};

const Case cases[] = {
    {"divergent_barrier", [] { return on_ramp(divergent_barrier, 64); }},
    {"deadlock", [] { return on_ramp(deadlock, 64); }},
    {"missing_barrier", [] { return on_ramp(missing_barrier, 64, [](int i) { return 63 - i; }); }},
    {"missing_second_barrier",
     [] { return on_ramp(missing_second_barrier, 64, [](int i) { return 2 * (63 - i) + 100; }); }},
    {"missing_syncwarp", [] { return on_ramp(missing_syncwarp, 32, [](int i) { return 31 - i; }); }},
    {"shuffle_for_syncwarp", [] { return on_ramp(shuffle_for_syncwarp, 32, [](int i) { return 31 - i; }); }},
    {"mask_lacks_caller", [] { return on_ramp(mask_lacks_caller, 32); }},
    {"mask_names_exited", [] { return on_ramp(mask_names_exited, 32); }},
    {"exit_while_awaited", [] { return on_ramp(exit_while_awaited, 32); }},
    {"divergent_shuffle", [] { return on_ramp(divergent_shuffle, 32); }},
    {"lane_outside_mask", [] { return on_ramp(lane_outside_mask, 32); }},
    {"width_of_three", [] { return on_ramp(width_of_three, 32); }},
    {"shared_overrun", [] { return on_ramp(shared_overrun, 64); }},
    {"dynamic_overrun", [] { return on_ramp(dynamic_overrun, 4); }},
    {"shared_overread", [] { return on_ramp(shared_overread, 64, [](int i) { return i + 1; }); }},
    {"global_out_of_bounds", [] { return on_ramp(global_out_of_bounds, 64, [](int i) { return i + 1; }); }},
    {"misaligned_vector", [] { return on_ramp(misaligned_vector, 36, [](int i) { return i < 32 ? i + 1 : -1; }); }},
    {"race_between_blocks",
     [] { return maps_ramp(race_between_blocks, dim3(3), dim3(1), 1, [](int i) { return i == 0 ? 2 : -1; }); }},
    {"missing_fence", last_block_case<false>},
    {"misaligned_copy", [] { return on_ramp(misaligned_copy, 32); }},
    {"copy_to_global", [] { return on_ramp(copy_to_global, 32); }},
    {"copy_never_awaited", [] { return on_ramp(copy_never_awaited, 32); }},
    {"late_copy", pipeline_case<2, true>},
    {"copy_into_used_memory", pipeline_case<1, false>},
    {"missing_cluster_barrier", [] { return next_block_case<false, true>(2); }},
    {"missing_last_cluster_barrier", [] { return next_block_case<true, false>(2); }},
    {"map_of_exited_block",
     [] { return maps_ramp(map_of_exited_block, dim3(2), dim3(32), 2, [](int i) { return i; }); }},
    {"kernel_awaited_late", overlap_case<Wait::kLate>},
    {"kernel_never_awaited", overlap_case<Wait::kNever>},
    {"too_much_static", too_much_static_case},
    {"launch_from_kernel", launch_from_kernel_case},
    {"outside_of_kernels", [] { return threadIdx.x == 0; }},

    {"right_shuffles", [] { return shuffle_case(0.5f) && shuffle_case(0.25) && shuffle_case(-3); }},
    {"right_shuffles_of_integers", [] { return shuffle_case(3u) && shuffle_case(int64_t(-1) << 33); }},
    {"right_votes", votes_case},
    {"right_partial_warp",
     [] { return on_ramp(partial_warp, 48, [](int i) { return i % 3 == 1 ? 47 - i : (i ^ 1) + (i ^ 2); }); }},
    {"right_warp", [] { return on_ramp(warp_reverse, 64, [](int i) { return i / 32 * 32 + 31 - i % 32; }); }},
    {"right_atomics", [] { return atomics_case<int>() && atomics_case<unsigned>() && atomics_case<int64_t>(); }},
    {"right_fences", last_block_case<true>},
    {"right_copies", pipeline_case<1, true>},
    {"right_vectors", vector_copies_case},
    {"right_clusters",
     [] { return next_block_case<true, true>(1) && next_block_case<true, true>(2) && next_block_case<true, true>(8); }},
    {"right_overlap", overlap_case<Wait::kFirst>},
    {"right_indices", indices_case},
    {"right_after_errors", after_errors_case},
    {"right_os_threads", os_threads_case},
    {"right_limits", limits_case},
};

const char* const order_names[] = {"in_order", "reversed", "shuffled", "starve_thread", "starve_warp", "starve_block"};

bool is_right(const Case& which, int order, uint64_t seed) {
  emulator::schedule = {emulator::Order(order), seed};
  try {
    if (which.is_right()) return true;
    std::printf("wrong result (%s %d)\n", order_names[order], int(seed));
  } catch (const emulator::Error& error) {
    std::printf("error (%s %d): %s\n", order_names[order], int(seed), error.what());
  }
  return false;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string name = count > 1 ? arguments[1] : "";
  if (name == "list") {
    for (const Case& known : cases) std::printf("%s\n", known.name);
    return 0;
  }
  const Case* const found =
      std::find_if(std::begin(cases), std::end(cases), [&](const Case& c) { return c.name == name; });
  if (found == std::end(cases) || (count != 2 && count != 4)) {
    std::fprintf(stderr, "usage: planted_bugs list | CASE [ORDER SEED]\n");
    return 2;
  }
  for (int order = 0; order < 6; ++order) {
    for (uint64_t seed = 0; seed < (order < 2 ? 2 : 4); ++seed) {
      if (count == 4 && (arguments[2] != std::string(order_names[order]) || arguments[3] != std::to_string(seed)))
        continue;
      if (!is_right(*found, order, seed)) return 1;
    }
  }
  return 0;
}

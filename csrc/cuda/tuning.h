// The numbers by which launch decisions are made (plan.cpp), in one table. They are for the time alone: whatever they
// are, results are the same. `python -m benchmarks.tune` measures others on a GPU; these were chosen from the
// compiler's report of registers, the shared memory there is, and the bytes that have to be under way.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string_view>

namespace xent::gpu {

struct Tuning {
  // Rows of fewer bytes are staged many at a time; up to the second, a warp each; above, a block or a cluster.
  int64_t small_row_bytes = 1 << 10;
  int64_t warp_row_bytes = 8 << 10;

  // Small rows: what a warp stages at a time, about, and how many rows each thread, or few of them, then has.
  int64_t small_tile_bytes = 4 << 10;
  int64_t small_rows_of_thread = 8;

  // Blocks on a multiprocessor, at least, for one to load while another computes and a third stores: a longer row gets
  // a cluster, an image's position more threads.
  int64_t row_blocks = 3;
  int64_t spatial_blocks = 5;

  int64_t short_run = 8;           // fewer neighbouring positions are not worth threads along them
  int64_t most_slices = 32;        // threads that share the classes of a position, at most: a power of two
  int64_t classes_of_thread = 64;  // where they are read twice
  int64_t warp_classes = 2048;     // strided: up to which a warp has a position, above, a block
};

struct Tunable {
  const char* name;
  int64_t Tuning::* value;
};
constexpr Tunable kTunables[] = {
    {"small_row_bytes", &Tuning::small_row_bytes},
    {"warp_row_bytes", &Tuning::warp_row_bytes},
    {"small_tile_bytes", &Tuning::small_tile_bytes},
    {"small_rows_of_thread", &Tuning::small_rows_of_thread},
    {"row_blocks", &Tuning::row_blocks},
    {"spatial_blocks", &Tuning::spatial_blocks},
    {"short_run", &Tuning::short_run},
    {"most_slices", &Tuning::most_slices},
    {"classes_of_thread", &Tuning::classes_of_thread},
    {"warp_classes", &Tuning::warp_classes},
};

// Of this process.
inline Tuning tuning;

// By name, for measurements and tests, while nothing else runs. Returns what it was.
inline int64_t tune(std::string_view name, int64_t value) {
  for (const Tunable& tunable : kTunables) {
    if (tunable.name != name) continue;
    if (value < 1) throw std::invalid_argument("a tunable is positive");
    const int64_t before = tuning.*tunable.value;
    tuning.*tunable.value = value;
    return before;
  }
  throw std::invalid_argument("there is no such tunable");
}

}  // namespace xent::gpu

// The constants of launch decisions (plan.cpp), in one table. They change the time alone, never a result. They were
// chosen from the compiler's report of registers, the shared memory there is, and the bytes that have to be under way;
// `python -m benchmarks.tune` measures others on a GPU.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string_view>

namespace xent::gpu {

struct Tuning {
  // Rows up to the first are small rows; up to the second, a warp has a row; above, a block or a cluster.
  int64_t small_row_bytes = 1 << 10;
  int64_t warp_row_bytes = 8 << 10;

  // Small rows: the bytes of a tile, about, and the rows of a thread in it, at most.
  int64_t small_tile_bytes = 4 << 10;
  int64_t small_rows_of_thread = 8;

  // Blocks wanted on a multiprocessor, for one to load while another computes and a third stores: a longer row gets a
  // cluster, an image's position more threads.
  int64_t row_blocks = 3;
  int64_t spatial_blocks = 5;

  int64_t short_run = 8;           // spatial: neighbouring positions, at least
  int64_t most_slices = 32;        // spatial: threads that share the classes of a position, at most; a power of two
  int64_t classes_of_thread = 64;  // spatial: where classes are read twice, about
  int64_t warp_classes = 2048;     // strided: up to here a warp has a position, above, a block
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

// This process's.
inline Tuning tuning;

// Sets a constant by name and returns its former value: for measurements and tests, while nothing else runs.
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

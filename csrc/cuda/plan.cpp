#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "tuning.h"

namespace xent::gpu {
namespace {

// Shared memory of a block beside its copies: its own arrays, and what the system reserves.
constexpr int64_t kOverheadBytes = 3 << 10;
constexpr int64_t kSpatialOverheadBytes = 6 << 10;  // its threads exchange more

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t size_of(ElementType type) {
  switch (type) {
    case ElementType::kFloat16:
    case ElementType::kBFloat16: return 2;
    case ElementType::kFloat32: return 4;
    default: return 8;
  }
}

// Returns as many blocks as fit on the device at a time, or as there is work for.
int64_t persistent_blocks(const Device& device, int threads, int64_t shared_bytes, int resident, int64_t work,
                          int64_t overhead_bytes = kOverheadBytes) {
  const int64_t by_shared = device.shared_per_multiprocessor / (shared_bytes + overhead_bytes);
  const int64_t by_threads = device.most_threads / threads;
  const int64_t each = std::min({by_shared, by_threads, int64_t(device.most_blocks), int64_t(resident)});
  return std::max<int64_t>(1, std::min(std::max<int64_t>(1, each) * device.multiprocessors, work));
}

bool is_class_contiguous(const Task& task) {
  return task.logits.class_stride == 1 && (!task.grad_logits || task.grad_logits.class_stride == 1);
}

// ---- small rows -----------------------------------------------------------------------------------------------------

// Returns how many of `threads`, whose elements lie `stride` bytes apart, meet in one bank of shared memory.
int64_t bank_conflicts(int64_t threads, int64_t stride) {
  constexpr int64_t kAllBanks = 128;                                      // bytes
  const int64_t common = std::min<int64_t>(kAllBanks, stride & -stride);  // divisor: they have as many banks
  return std::max<int64_t>(1, threads * common / kAllBanks);
}

// Decides how many threads share a row, and how many of its classes each has, by the cycles that a warp takes of a
// multiprocessor. That issues 4 instructions at a time, but 1 access to shared memory, longer by its conflicts.
void share_small_row(const Task& task, Division& division) {
  constexpr double kForEachClass = 14 / 4., kAccesses = 2., kForEachRow = 250 / 4.;
  const int64_t size = size_of(task.logits.type);
  double best = INFINITY;
  for (int lanes = 1; lanes <= kWarp; lanes *= 2) {
    const int64_t of_rows = bank_conflicts(kWarp / lanes, task.classes * size);
    for (int64_t more = 0; more < 2; ++more) {
      const int64_t classes = divide_up(task.classes, lanes) + more;
      if (classes > kMostHeld) continue;
      const double accesses = double(kAccesses * of_rows * bank_conflicts(lanes, classes * size));
      const double cost = lanes * (kForEachRow + double(classes) * std::max(kForEachClass, accesses));
      if (cost >= best) continue;
      best = cost;
      division.lanes_per_row = lanes;
      division.classes_per_lane = int32_t(classes);
    }
  }
}

// Returns how often a warp's threads, each with its share of a row, go through a tile. The next tile loads while one is
// worked on, so time goes with the longest sequence of a warp, and with one load that nothing hides. Besides, each tile
// costs about half as much as a row of all threads.
int64_t repeats_of_tile(int64_t positions, int64_t at_a_time, int64_t most, int64_t warps) {
  constexpr double kForEachTile = 0.5;
  int64_t best = 1;
  double least = INFINITY;
  for (int64_t repeat = 1; repeat <= most; ++repeat) {
    const int64_t rounds = divide_up(divide_up(positions, at_a_time * repeat), warps);
    const double cost = double(rounds + 1) * (double(repeat) + kForEachTile);
    if (cost > least) continue;
    least = cost;
    best = repeat;
  }
  return best;
}

Plan plan_small_rows(const Task& task, const Device& device) {
  constexpr int kWarps = kSmallRowsThreads / kWarp;
  Plan plan;
  plan.family = Family::kSmallRows;
  share_small_row(task, plan.division);
  const int64_t row_bytes = task.classes * size_of(task.logits.type);
  const int64_t at_a_time = kWarp / plan.division.lanes_per_row;
  const int64_t room = (device.shared_per_block - kOverheadBytes) / (2 * kWarps) - 2 * kVectorBytes;
  const int64_t tile_bytes = std::min(room, tuning.small_tile_bytes);
  const int64_t most = std::clamp<int64_t>(tile_bytes / (at_a_time * row_bytes), 1, tuning.small_rows_of_thread);
  const int resident = small_rows_resident(int(size_of(task.logits.type)), task.objective);
  const int64_t all_warps = int64_t(device.multiprocessors) * resident * kWarps;
  const int64_t rows = at_a_time * repeats_of_tile(task.positions, at_a_time, most, all_warps);
  plan.division.rows_per_tile = int32_t(rows);
  // A tile begins anywhere within 16 bytes, and a warp has two.
  plan.division.copy_bytes = int32_t(divide_up(rows * row_bytes, kVectorBytes) * kVectorBytes + kVectorBytes);
  plan.shape.threads = kSmallRowsThreads;
  plan.shape.shared_bytes = int64_t(2 * kWarps) * plan.division.copy_bytes;
  const int64_t work = divide_up(divide_up(task.positions, rows), kWarps);
  plan.shape.blocks = persistent_blocks(device, plan.shape.threads, plan.shape.shared_bytes, resident, work);
  return plan;
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// Returns true where every row of the target is contiguous and lies within 16 bytes as that of the logits does.
bool is_twin(const Task& task) {
  const View &logits = task.logits, &target = task.target;
  const int64_t size = size_of(logits.type);
  if (!is_dense(task.target_kind) || target.type != logits.type || target.class_stride != 1) return false;
  const auto differ = [](int64_t a, int64_t b) { return (a - b) % kVectorBytes != 0; };
  if (differ(int64_t(reinterpret_cast<uintptr_t>(logits.data)), int64_t(reinterpret_cast<uintptr_t>(target.data)))) {
    return false;
  }
  for (int d = 0; d < task.dims; ++d) {
    if (differ(logits.stride[d] * size, target.stride[d] * size)) return false;
  }
  return true;
}

Plan plan_rows(const Task& task, const Device& device) {
  constexpr int kRowsOfWarps = block_threads(Team::kWarp) / kWarp;
  Plan plan;
  plan.family = Family::kRows;
  bool& twin_target = plan.division.twin_target;
  twin_target = is_twin(task);
  const int64_t row_bytes = task.classes * size_of(task.logits.type), vectors = row_bytes / kVectorBytes;
  const auto bytes_of = [&](int64_t blocks) {
    return divide_up(vectors, blocks) * kVectorBytes * (twin_target ? 2 : 1);
  };
  const int64_t preferred = device.shared_per_multiprocessor / tuning.row_blocks - kOverheadBytes;
  const int64_t most = device.shared_per_block - kOverheadBytes;
  if (bytes_of(device.largest_cluster) > most) twin_target = false;

  int cluster = 1, rows = 1;
  if (row_bytes <= tuning.warp_row_bytes && kRowsOfWarps * bytes_of(1) <= most) {
    plan.team = Team::kWarp;
    rows = kRowsOfWarps;
  } else {
    while (cluster < device.largest_cluster && bytes_of(cluster) > preferred) cluster *= 2;
    plan.team = cluster > 1 ? Team::kCluster : Team::kBlock;
  }
  plan.copied = bytes_of(cluster) <= most;
  if (!plan.copied) {
    cluster = 1;
    plan.team = Team::kBlock;
  }
  plan.division.copy_bytes = plan.copied ? int32_t(bytes_of(cluster)) : 0;
  plan.shape.threads = block_threads(plan.team);
  plan.shape.cluster = cluster;
  plan.shape.shared_bytes = int64_t(rows) * plan.division.copy_bytes;
  const int64_t work = divide_up(task.positions, rows) * cluster;
  const int resident = rows_resident(int(size_of(task.logits.type)), task.objective, plan.team, plan.copied);
  const int64_t blocks = persistent_blocks(device, plan.shape.threads, plan.shape.shared_bytes, resident, work);
  plan.shape.blocks = std::max<int64_t>(cluster, blocks / cluster * cluster);
  return plan;
}

// ---- spatial --------------------------------------------------------------------------------------------------------

// Returns true where 16 bytes along the last dimension are 16 aligned bytes of one class, wherever they begin.
bool has_vectors(const Task& task, const View& view) {
  const int64_t size = size_of(view.type), per_vector = kVectorBytes / size;
  const int last = task.dims - 1;
  if (view.stride[last] != 1 || task.size[last] % per_vector != 0 || view.class_stride % per_vector != 0) return false;
  for (int d = 0; d < last; ++d) {
    if (view.stride[d] % per_vector != 0) return false;
  }
  return reinterpret_cast<uintptr_t>(view.data) % kVectorBytes == 0;
}

Plan plan_spatial(const Task& task, const Device& device) {
  Plan plan;
  plan.family = Family::kSpatial;
  plan.vectors = has_vectors(task, task.logits) && (!task.grad_logits || has_vectors(task, task.grad_logits));
  plan.division.twin_target = plan.vectors && task.objective == Objective::kProbabilities &&
                              task.target.type == task.logits.type && has_vectors(task, task.target);
  const int64_t inner = task.size[task.dims - 1];
  const int64_t of_thread = plan.vectors ? kVectorBytes / size_of(task.logits.type) : 1;
  const int64_t preferred = device.shared_per_multiprocessor / tuning.spatial_blocks;
  const auto bytes_of = [&](int64_t slices) {
    return divide_up(task.classes, slices) * kSpatialThreads * kVectorBytes;
  };

  const int64_t most_slices = std::min<int64_t>(tuning.most_slices, kSpatialThreads);
  int slices = 1;
  const auto is_wide = [&] { return kSpatialThreads / slices * of_thread >= 2 * inner && slices * 2 <= task.classes; };
  while (slices < most_slices && is_wide()) slices *= 2;
  if (plan.vectors) {
    int more = slices;
    while (more < most_slices && bytes_of(more) + kSpatialOverheadBytes > preferred) more *= 2;
    plan.copied = bytes_of(more) + kSpatialOverheadBytes <= device.shared_per_block;
    if (plan.copied) slices = more;
  }
  if (!plan.copied) {
    while (slices < most_slices && task.classes / slices > tuning.classes_of_thread) slices *= 2;
  }
  plan.division.slices = slices;
  while ((1 << plan.division.slice_bits) < slices) ++plan.division.slice_bits;
  plan.shape.threads = kSpatialThreads;
  plan.shape.shared_bytes = plan.copied ? bytes_of(slices) : 0;
  const int64_t tiles = task.positions / inner * divide_up(inner, kSpatialThreads / slices * of_thread);
  const int resident = spatial_resident(int(size_of(task.logits.type)), task.objective, plan.vectors, plan.copied);
  plan.shape.blocks =
      persistent_blocks(device, plan.shape.threads, plan.shape.shared_bytes, resident, tiles, kSpatialOverheadBytes);
  return plan;
}

// ---- strided --------------------------------------------------------------------------------------------------------

Plan plan_strided(const Task& task, const Device& device) {
  Plan plan;
  plan.family = Family::kStrided;
  plan.team = task.classes > tuning.warp_classes ? Team::kBlock : Team::kWarp;
  plan.shape.threads = block_threads(plan.team);
  const int64_t rows = plan.team == Team::kWarp ? plan.shape.threads / kWarp : 1;
  const int resident = strided_resident(task.arithmetic_in_double ? 8 : 4, plan.team);
  plan.shape.blocks = persistent_blocks(device, plan.shape.threads, 0, resident, divide_up(task.positions, rows));
  return plan;
}

template <class A>
Task::Numbers<A> numbers_of(const Task& task) {
  return {A(task.keep),
          A(task.share),
          A(task.logit_scale),
          A(task.softcap),
          A(task.softcap == 0 ? 0 : 1 / task.softcap),
          A(task.temperature),
          A(task.z_loss),
          A(task.smoothed_total)};
}

}  // namespace

void prepare(Task& task) {
  task.in_float = numbers_of<float>(task);
  task.in_double = numbers_of<double>(task);
  if (task.classes != 1) return;
  task.logits.class_stride = task.grad_logits.class_stride = 1;
  if (task.target_kind != TargetKind::kPairs) task.target.class_stride = task.grad_target.class_stride = 1;
}

Plan plan(const Task& task, const Device& device) {
  const bool mixed = task.arithmetic_in_double && task.logits.type != ElementType::kFloat64;
  const bool is_countable = task.classes < INT32_MAX - 4096;  // with a step more, within a kernel's int
  if (mixed || !is_countable) return plan_strided(task, device);
  if (task.objective == Objective::kGeneral) {
    return is_class_contiguous(task) ? plan_rows(task, device) : plan_strided(task, device);
  }
  const bool small =
      task.classes * size_of(task.logits.type) <= tuning.small_row_bytes && task.classes <= kWarp * kMostHeld;
  if (is_class_contiguous(task)) return small ? plan_small_rows(task, device) : plan_rows(task, device);
  const int last = task.dims - 1;
  const bool along_positions = task.size[last] >= tuning.short_run && task.logits.stride[last] != 0 &&
                               task.logits.stride[last] < task.logits.class_stride;
  if (along_positions) return plan_spatial(task, device);
  return small ? plan_small_rows(task, device) : plan_strided(task, device);
}

int blocks_to_count(int64_t positions, const Device& device) {
  const int64_t work = divide_up(positions, kReduceThreads * kCountedTogether);
  return int(persistent_blocks(device, kReduceThreads, 0, kCountResident, work));
}

}  // namespace xent::gpu

// Every CUDA kernel for float32 in a program without torch or Python, for sanitizers that want a whole program
// (ThreadSanitizer above all): all launch decisions, every kind of target, forward with gradient and backward alone, in
// the logits' place too. Compares with the loss in plain double, and exits with 1 if anything is wrong.
//   kernels_alone ORDER SEED
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/launch.h"
#include "cuda_emulator.h"

// Only the kernels for float32 are compiled: the others are the same templates.
namespace xent::gpu {
template <class T>
int launch_loss_of(const Task& task, const Plan& plan, void* stream);
template <class T>
int most_clusters_of(const Task& task, const Plan& plan, int& most);

#define XENT_NOT_HERE(T)                                    \
  template <>                                               \
  int launch_loss_of<T>(const Task&, const Plan&, void*) {  \
    return 1;                                               \
  }                                                         \
  template <>                                               \
  int most_clusters_of<T>(const Task&, const Plan&, int&) { \
    return 1;                                               \
  }
XENT_NOT_HERE(Float16)
XENT_NOT_HERE(BFloat16)
XENT_NOT_HERE(double)
#undef XENT_NOT_HERE
}  // namespace xent::gpu

namespace {

using namespace xent;
using namespace xent::gpu;

struct Shape {
  const char* name;
  int64_t outer, classes, inner;  // (outer, classes, inner), contiguous
  Device device;
};

Device device(int64_t shared_kb, int cluster) {
  Device result;
  result.multiprocessors = 1;  // so that each team has several rows or tiles
  result.shared_per_multiprocessor = shared_kb << 10;
  result.shared_per_block = (shared_kb - 1) << 10;
  result.largest_cluster = cluster;
  return result;
}

template <class T>
View view(T* data, ElementType type, const Shape& shape) {
  View result{data, type, shape.inner};
  result.stride[0] = shape.classes * shape.inner;
  result.stride[1] = 1;
  return result;
}

// Of a kGeneral task: two of each position's three pairs are of one class.
constexpr int64_t kPairs = 3;
constexpr float kProbs[kPairs] = {0.5f, 0.125f, 0.25f};

// sum_c a_c (lse - x_c) and A softmax - a, for a mean over positions that weigh `denominator`.
struct Reference {
  std::vector<double> grad;
  double loss = 0, denominator = 0;

  Reference(const Shape& shape, Objective objective, double smoothing, const float* logits,
            const std::vector<int64_t>& target, const std::vector<float>& weight,
            const std::vector<float>& probabilities)
      : grad(size_t(shape.outer * shape.classes * shape.inner)) {
    const int64_t classes = shape.classes;
    for (int64_t p = 0; p < shape.outer * shape.inner; ++p) {
      const int64_t first = p / shape.inner * classes * shape.inner + p % shape.inner, label = target[size_t(p)];
      const auto at = [&](int64_t c) { return size_t(first + c * shape.inner); };
      if (objective != Objective::kProbabilities && label < 0) continue;
      const bool pairs = objective == Objective::kGeneral, soft = pairs || objective == Objective::kProbabilities;
      denominator += soft ? 1 : double(weight[size_t(label)]);
      double sum = 0, total = 0;
      for (int64_t c = 0; c < classes; ++c) sum += std::exp(double(logits[at(c)]));
      const auto coefficient = [&](int64_t c) {
        double q = objective == Objective::kProbabilities ? double(probabilities[at(c)]) : c == label;
        if (pairs) q = (c == label ? kProbs[0] + kProbs[1] : 0) + (c == (label + 1) % classes ? kProbs[2] : 0);
        return double(weight[size_t(c)]) * ((1 - smoothing) * q + smoothing / double(classes));
      };
      for (int64_t c = 0; c < classes; ++c) {
        total += coefficient(c);
        loss += coefficient(c) * (std::log(sum) - double(logits[at(c)]));
      }
      for (int64_t c = 0; c < classes; ++c) {
        grad[at(c)] = total * std::exp(double(logits[at(c)])) / sum - coefficient(c);
      }
    }
    loss /= denominator;
    for (double& g : grad) g /= denominator;
  }
};

int wrong = 0;

void compare(const char* what, const Shape& shape, Objective objective, double got, double right) {
  if (std::abs(got - right) <= 2e-6 * std::abs(right) + 1e-8) return;
  if (++wrong < 20)
    std::printf("%s, objective %d: %s is %.9g, not %.9g\n", shape.name, int(objective), what, got, right);
}

// `misaligned`: logits and gradient begin at places of their own within 16 bytes.
void run(const Shape& shape, Objective objective, bool in_place, bool misaligned) {
  const size_t logits_begin = misaligned ? 1 : 0, grad_begin = misaligned ? 2 : 0;
  const bool pairs = objective == Objective::kGeneral;
  const size_t positions = size_t(shape.outer * shape.inner), count = positions * size_t(shape.classes);
  std::vector<float> logits_memory(logits_begin + count), grad_memory(grad_begin + count, NAN);
  float *const logits = logits_memory.data() + logits_begin, *const grad = grad_memory.data() + grad_begin;
  std::vector<float> probabilities(count), lse(3 * positions, NAN);
  std::vector<int64_t> target(positions);
  const auto draw_logits = [&] {
    for (size_t i = 0; i < count; ++i) logits[i] = float(i * 7919 % 1000) / 100;
  };
  draw_logits();
  for (size_t i = 0; i < count; ++i) probabilities[i] = float(i * 31 % 17) / float(8 * shape.classes);
  for (size_t i = 0; i < positions; ++i) target[i] = i % 5 == 3 ? -100 : int64_t(i * 31 + 5) % shape.classes;
  std::vector<float> weight(size_t(shape.classes));
  for (size_t c = 0; c < weight.size(); ++c) weight[c] = 0.5f + float(c % 4);
  const double smoothing = objective == Objective::kIndex ? 0 : 0.1;
  const Reference reference(shape, objective, smoothing, logits, target, weight, probabilities);

  Task task;
  task.positions = int64_t(positions);
  task.classes = shape.classes;
  task.dims = shape.inner > 1 ? 2 : 1;
  task.size[0] = shape.outer;
  task.size[1] = shape.inner;
  task.objective = objective;
  task.target_kind = pairs                                    ? TargetKind::kPairs
                     : objective == Objective::kProbabilities ? TargetKind::kProbabilities
                                                              : TargetKind::kIndices;
  task.label_smoothing = smoothing;
  task.keep = 1 - smoothing;
  task.share = smoothing / double(shape.classes);
  task.ignore_index = -100;
  task.logits = view(logits, ElementType::kFloat32, shape);
  task.weight = weight.data();
  std::vector<int64_t> classes_of_pairs;
  std::vector<float> probs, grad_probs(pairs ? positions * kPairs : 0, NAN);
  for (size_t i = 0; pairs && i < positions; ++i) {
    const int64_t y = target[i];
    for (const int64_t c : {y, y, y < 0 ? y : (y + 1) % shape.classes}) classes_of_pairs.push_back(c);
    for (const float p : kProbs) probs.push_back(p);
  }
  const auto view_of_pairs = [&](void* data, ElementType type) {
    View result{data, type, 1};
    result.stride[0] = shape.inner * kPairs;
    result.stride[1] = kPairs;
    return result;
  };
  if (objective == Objective::kProbabilities) {
    task.target = view(probabilities.data(), ElementType::kFloat32, shape);
  } else if (pairs) {
    task.pairs = kPairs;
    task.target = view_of_pairs(classes_of_pairs.data(), ElementType::kInt64);
    task.probs = view_of_pairs(probs.data(), ElementType::kFloat32);
  } else {
    task.target = View{target.data(), ElementType::kInt64};
    task.target.stride[0] = shape.inner;
    task.target.stride[1] = 1;
  }
  task.lse = lse.data();
  task.grad_logits = view(grad, ElementType::kFloat32, shape);
  BadTarget bad_target;
  int32_t taken = 0;
  task.bad_target = &bad_target;
  task.bad_targets = &taken;

  double smoothed_total = NAN;
  launch_weight_sum({weight.data(), shape.classes, false, smoothing / double(shape.classes), &smoothed_total}, nullptr);
  task.smoothed_total_on_device = &smoothed_total;
  const int counting = blocks_to_count(task.positions, shape.device);
  std::vector<Sums> counted(static_cast<size_t>(counting));
  task.partial_sums = counted.data();
  launch_count(task, counting, nullptr);
  if (objective == Objective::kProbabilities) {
    task.known_denominator = double(positions);
  } else {
    task.counted = counted.data();
    task.counted_blocks = counting;
  }
  task.pass = Pass::kForwardBackward;
  prepare(task);
  Plan how = plan(task, shape.device);
  std::vector<Sums> partial(static_cast<size_t>(how.shape.blocks));
  task.partial_sums = partial.data();
  launch_loss(task, how, nullptr);

  double loss = 0, denominator = 0;
  Totals totals;
  totals.partial_sums = partial.data();
  totals.blocks = int32_t(how.shape.blocks);
  totals.counted = task.counted;
  totals.counted_blocks = task.counted_blocks;
  totals.mean = true;
  totals.count_is_known = objective == Objective::kProbabilities;
  totals.known_count = double(positions);
  totals.loss = View{&loss, ElementType::kFloat64};
  totals.denominator = &denominator;
  launch_finish(totals, nullptr);
  compare("the loss", shape, objective, loss, reference.loss);
  compare("the denominator", shape, objective, denominator, reference.denominator);
  for (size_t i = 0; i < count; ++i) compare("the forward's gradient", shape, objective, grad[i], reference.grad[i]);

  std::vector<float> grad_target(objective == Objective::kProbabilities ? count : 0, NAN);
  if (objective == Objective::kProbabilities) task.grad_target = view(grad_target.data(), ElementType::kFloat32, shape);
  if (pairs) task.grad_target = view_of_pairs(grad_probs.data(), ElementType::kFloat32);
  const float grad_output = 2;
  task.grad_output = View{const_cast<float*>(&grad_output), ElementType::kFloat32};
  task.pass = Pass::kBackward;
  task.partial_sums = nullptr;
  task.denominator = &denominator;
  if (in_place) task.grad_logits.data = logits;
  const float* const result = in_place ? logits : grad;
  how = plan(task, shape.device);
  launch_loss(task, how, nullptr);
  for (size_t i = 0; i < count; ++i) compare("the gradient", shape, objective, result[i], 2 * reference.grad[i]);
  for (const float g : pairs ? grad_probs : grad_target) {
    if (!std::isfinite(g)) compare("the probabilities' gradient", shape, objective, g, 0);
  }

  // In the logits' place from the one read of them, while the count, the loss and the reduction overlap.
  if (!in_place || shape.inner > 1 || pairs) return;
  draw_logits();
  task.pass = Pass::kForwardBackward;
  task.lse = nullptr;
  task.denominator = nullptr;
  task.grad_output = task.grad_target = View();
  task.partial_sums = counted.data();
  launch_count(task, counting, nullptr, /*is_overlapped=*/true);
  how = plan(task, shape.device);
  how.shape.overlaps = how.shape.is_overlapped = true;
  partial.assign(size_t(how.shape.blocks), Sums{NAN, NAN});
  task.partial_sums = partial.data();
  launch_loss(task, how, nullptr);
  totals.partial_sums = partial.data();
  totals.blocks = int32_t(how.shape.blocks);
  launch_finish(totals, nullptr, /*overlaps=*/true);
  compare("the loss, in place", shape, objective, loss, reference.loss);
  for (size_t i = 0; i < count; ++i)
    compare("the forward's gradient, in place", shape, objective, logits[i], reference.grad[i]);
}

}  // namespace

int main(int argc, char** argv) {
  const Device large = device(228, 8), small = device(24, 1), clusters = device(24, 8);
  const Shape shapes[] = {
      {"small_rows", 5001, 10, 1, large},           {"small_rows, 2 lanes", 900, 24, 1, large},
      {"small_rows, 16 lanes", 300, 256, 1, large}, {"rows: warp", 60, 300, 1, large},
      {"rows: block", 8, 2100, 1, large},           {"rows: cluster", 8, 9001, 1, clusters},
      {"rows: read twice", 4, 9217, 1, small},      {"spatial: vectors", 2, 19, 64, large},
      {"spatial: slices", 2, 150, 36, large},       {"spatial: read twice", 1, 300, 32, small},
      {"spatial: one by one", 2, 19, 35, large},    {"strided: warp", 4, 300, 3, large},
      {"strided: block", 2, 2101, 3, large},
  };
  emulator::schedule = {emulator::Order(argc > 1 ? atoi(argv[1]) : 0), uint64_t(argc > 2 ? atoi(argv[2]) : 0)};
  for (const Shape& shape : shapes) {
    for (const Objective objective : {Objective::kIndex, Objective::kSmoothedIndex, Objective::kProbabilities}) {
      run(shape, objective, false, false);
      run(shape, objective, true, false);
    }
    run(shape, Objective::kIndex, false, true);
    run(shape, Objective::kGeneral, false, false);
    run(shape, Objective::kGeneral, false, true);
  }
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}

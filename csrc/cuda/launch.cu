#include "launch.h"

#include "reduce.cuh"

namespace xent::gpu {

template <class T>
Status launch_loss_of(const Task& task, const Plan& plan, void* stream);  // kernels_*.cu
template <class T>
Status most_clusters_of(const Task& task, const Plan& plan, int& most);

// Calls use(an element of the type).
template <class Use>
int with_type(ElementType type, const Use& use) {
  switch (type) {
    case ElementType::kFloat16: return use(Float16());
    case ElementType::kBFloat16: return use(BFloat16());
    case ElementType::kFloat32: return use(float());
    default: return use(double());
  }
}

int most_clusters(const Task& task, const Plan& plan, int& most) {
  return with_type(task.logits.type, [&](auto x) { return most_clusters_of<decltype(x)>(task, plan, most); });
}

int launch_loss(Task task, const Plan& plan, void* stream) {
  task.division = plan.division;
  return with_type(task.logits.type, [&](auto x) { return launch_loss_of<decltype(x)>(task, plan, stream); });
}

int launch_count(const Task& task, int blocks, void* stream, bool is_overlapped) {
  LaunchShape shape{blocks, kReduceThreads};
  shape.is_overlapped = is_overlapped;
  return task.arithmetic_in_double ? launch<count_targets<double>>(shape, stream, task)
                                   : launch<count_targets<float>>(shape, stream, task);
}

int launch_weight_sum(const WeightSum& request, void* stream) {
  const LaunchShape shape{1, kReduceThreads};
  return request.in_double ? launch<sum_weights<double>>(shape, stream, request)
                           : launch<sum_weights<float>>(shape, stream, request);
}

int launch_finish(const Totals& totals, void* stream, bool overlaps) {
  LaunchShape shape{1, kFinishThreads};
  shape.overlaps = overlaps;
  return launch<finish<double>>(shape, stream, totals);
}

int compiled_for(int& capability) {
#if defined(__CUDACC__)
  cudaFuncAttributes attributes{};
  const Status status = cudaFuncGetAttributes(&attributes, sum_weights<float>);
  capability = attributes.ptxVersion;
  return status;
#else
  capability = 90;
  return kSuccess;
#endif
}

#define XENT_TEXT_OF(...) #__VA_ARGS__
#define XENT_TEXT(...) XENT_TEXT_OF(__VA_ARGS__)
const char* compiled_archs() { return XENT_TEXT(__CUDA_ARCH_LIST__); }

}  // namespace xent::gpu

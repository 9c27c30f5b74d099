#include "launch.h"

#include "reduce.cuh"

namespace xent::gpu {

template <class T>
Status launch_loss_of(const Task& task, const Plan& plan, void* stream);  // kernels_*.cu
template <class T>
Status most_clusters_of(const Task& task, const Plan& plan, int& most);

int most_clusters(const Task& task, const Plan& plan, int& most) {
  switch (task.logits.type) {
    case ElementType::kFloat16: return most_clusters_of<Float16>(task, plan, most);
    case ElementType::kBFloat16: return most_clusters_of<BFloat16>(task, plan, most);
    case ElementType::kFloat32: return most_clusters_of<float>(task, plan, most);
    default: return most_clusters_of<double>(task, plan, most);
  }
}

int launch_loss(const Task& task, const Plan& plan, void* stream) {
  switch (task.logits.type) {
    case ElementType::kFloat16: return launch_loss_of<Float16>(task, plan, stream);
    case ElementType::kBFloat16: return launch_loss_of<BFloat16>(task, plan, stream);
    case ElementType::kFloat32: return launch_loss_of<float>(task, plan, stream);
    default: return launch_loss_of<double>(task, plan, stream);
  }
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

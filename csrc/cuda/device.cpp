#include "device.h"

#include "launch.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <mutex>

namespace xent::gpu {
namespace {

// The state of a device, from its first use to the end of the process.
struct State {
  std::once_flag once;
  std::atomic<bool> ready{false};
  Device limits;
  BadTarget* bad_target = nullptr;
  int32_t* bad_targets = nullptr;
};

State& state_of(int index) {
  static std::array<State, kMostDevices> states;
  TORCH_CHECK(index >= 0 && index < kMostDevices, "cross_entropy_ext: device ", index);
  return states[size_t(index)];
}

bool is_capturing_now() { return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None; }

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
  return value;
}

// Allocates without torch's allocator, whose memory may belong to a graph that is being captured. If that holds all of
// the device's memory, it has to give back the unused part.
void* allocate(size_t bytes) {
  void* memory = nullptr;
  cudaError_t status = cudaMalloc(&memory, bytes);
  if (status == cudaErrorMemoryAllocation && !is_capturing_now()) {  // emptyCache waits for the device
    (void)cudaGetLastError();
    c10::cuda::CUDACachingAllocator::emptyCache();
    status = cudaMalloc(&memory, bytes);
  }
  C10_CUDA_CHECK(status);
  return memory;
}

// May be called while a graph is being captured, which must not notice.
void initialize(State& state, int index) {
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  Device& limits = state.limits;
  limits.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
  limits.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  limits.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  limits.most_threads = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, index);
  limits.most_blocks = attribute(cudaDevAttrMaxBlocksPerMultiprocessor, index);
  // Every device with clusters can have 8 blocks in one, if its code was compiled for clusters.
  int capability = 0;
  C10_CUDA_CHECK(static_cast<cudaError_t>(compiled_for(capability)));
  const bool clusters = attribute(cudaDevAttrClusterLaunch, index) != 0 && capability >= 90;
  limits.largest_cluster = clusters ? 8 : 1;
  // Graphs know of kernels that overlap from CUDA 12.3 on.
  int driver = 0;
  C10_CUDA_CHECK(cudaDriverGetVersion(&driver));
  limits.overlaps_kernels = clusters && driver >= 12030;

  void* const device = allocate(sizeof(int32_t));
  void* host = nullptr;
  C10_CUDA_CHECK(cudaHostAlloc(&host, sizeof(BadTarget), cudaHostAllocMapped | cudaHostAllocPortable));
  state.bad_target = new (host) BadTarget();
  cudaStream_t stream = nullptr;
  C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  C10_CUDA_CHECK(cudaMemsetAsync(device, 0, sizeof(int32_t), stream));
  C10_CUDA_CHECK(cudaStreamSynchronize(stream));
  C10_CUDA_CHECK(cudaStreamDestroy(stream));
  state.bad_targets = static_cast<int32_t*>(device);
  state.ready = true;
}

State& ready_state(int index) {
  State& state = state_of(index);
  std::call_once(state.once, [&] { initialize(state, index); });
  return state;
}

}  // namespace

DeviceScope::DeviceScope(c10::Device device)
    : index_(device.index()), previous_(c10::cuda::ExchangeDevice(device.index())) {}
DeviceScope::~DeviceScope() { c10::cuda::MaybeExchangeDevice(c10::DeviceIndex(previous_)); }

const Device& DeviceScope::limits() const { return ready_state(index_).limits; }
void* DeviceScope::stream() const { return c10::cuda::getCurrentCUDAStream(c10::DeviceIndex(index_)).stream(); }
bool DeviceScope::is_capturing() const { return is_capturing_now(); }
BadTarget* DeviceScope::bad_target() const { return ready_state(index_).bad_target; }
int32_t* DeviceScope::bad_targets() const { return ready_state(index_).bad_targets; }

std::vector<c10::Device> synchronized_devices() {
  std::vector<c10::Device> devices;
  for (int index = 0; index < kMostDevices; ++index) {
    if (!state_of(index).ready) continue;
    devices.emplace_back(c10::kCUDA, c10::DeviceIndex(index));
    const DeviceScope device(devices.back());
    C10_CUDA_CHECK(cudaDeviceSynchronize());
  }
  return devices;
}

void check_cuda(int status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // clears it, or the next check would raise it, too
  TORCH_CHECK(false, "cross_entropy_ext: ", what, ": ", cudaGetErrorString(static_cast<cudaError_t>(status)));
}

}  // namespace xent::gpu

// csrc/cuda/device.h where the CUDA device is the emulator.
#include "cuda/device.h"

#include <c10/util/Exception.h>

#include "device_on_cpu.h"

namespace xent::gpu {

Device& emulated_device() {
  static Device device = [] {
    Device with_everything;
    with_everything.overlaps_kernels = true;
    return with_everything;
  }();
  return device;
}

namespace {
BadTarget bad_target_word;
int32_t bad_targets_begun = 0;
}  // namespace

DeviceScope::DeviceScope(c10::Device device) : index_(device.index()), previous_(0) {}
DeviceScope::~DeviceScope() = default;
const Device& DeviceScope::limits() const { return emulated_device(); }
void* DeviceScope::stream() const { return nullptr; }
bool DeviceScope::is_capturing() const { return false; }
BadTarget* DeviceScope::bad_target() const { return &bad_target_word; }
int32_t* DeviceScope::bad_targets() const { return &bad_targets_begun; }
std::vector<c10::Device> synchronized_devices() { return {c10::Device(c10::kCPU)}; }
void check_cuda(int status, const char* what) { TORCH_CHECK(status == 0, what); }

}  // namespace xent::gpu

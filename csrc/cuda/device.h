// The CUDA runtime for the host code: device and stream, the device's limits, and the reports of its kernels. The tests
// on the CPU bring an implementation of their own.
#pragma once

#include <c10/core/Device.h>

#include <vector>

#include "task.h"

namespace xent::gpu {

// Makes a tensor's device the current one, for as long as it lives.
class DeviceScope {
 public:
  explicit DeviceScope(c10::Device device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;

  const Device& limits() const;
  void* stream() const;  // torch's current one
  bool is_capturing() const;

  // Where kernels report a bad target, and count their reports.
  BadTarget* bad_target() const;
  int32_t* bad_targets() const;

 private:
  int index_, previous_;
};

// Waits for all work on the devices that may have reported something, and returns them.
std::vector<c10::Device> synchronized_devices();

// Raises an error unless `status`, a cudaError_t, is success.
void check_cuda(int status, const char* what);

// Raises what a kernel reported on this device. Does not wait for it.
void raise_bad_target(c10::Device device);

// Waits for all devices, and raises what any of them reported.
void check_errors();

}  // namespace xent::gpu

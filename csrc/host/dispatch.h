// C++ calls an operator of this package through the dispatcher, as Python does, or calls the kernel that it would call.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>

namespace xent {

inline c10::OperatorHandle find_operator(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload);
}

template <class Signature>
auto find_operator(const char* name, const char* overload = "") {
  return find_operator(name, overload).typed<Signature>();
}

// Returns the key of the first kernel that the dispatcher would call for tensors with these keys, or Undefined while a
// profiler watches. Where that is a kernel of this package, C++ calls it itself: to pack the arguments for the
// dispatcher and to find the kernel take a tenth of a small loss.
inline c10::DispatchKey first_key(c10::DispatchKeySet of_tensors) {
  if (at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION)) return c10::DispatchKey::Undefined;
  constexpr c10::DispatchKeySet kWithoutKernels({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return (((of_tensors | local.included_) - local.excluded_) - kWithoutKernels).highestPriorityTypeId();
}

inline bool is_autograd(c10::DispatchKey key) {
  return key == c10::DispatchKey::AutogradCPU || key == c10::DispatchKey::AutogradCUDA;
}

}  // namespace xent

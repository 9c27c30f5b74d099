// How C++ calls an operator of this package: through the dispatcher, as Python does.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace xent {

template <class Signature>
auto find_operator(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

}  // namespace xent

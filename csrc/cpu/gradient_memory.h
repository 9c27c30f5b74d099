// The memory of large gradients on the CPU: pages that are kept from one training step to the next.
#pragma once

#include <c10/core/Allocator.h>

namespace xent {

// The allocator of at least kLargeGradient bytes. Faulting in the pages of a fresh buffer costs more than computing a
// gradient, so a freed buffer is kept for the next one. Kept and live buffers together never take more memory than the
// live ones alone once did, and the system may take the pages of large kept buffers whenever memory is short.
c10::Allocator* gradient_memory();

constexpr size_t kLargeGradient = size_t{64} << 10;

// Gives the kept buffers back to the system, and returns their bytes.
size_t release_gradient_memory();

}  // namespace xent

// Where large gradients on the CPU live: pages that are kept from one training step to the next.
#pragma once

#include <c10/core/Allocator.h>

namespace xent {

// For allocations of at least kLargeGradient bytes. Faulting in the pages of a fresh buffer costs more than computing a
// gradient, so a freed buffer is kept for the next one. Bounded: freed and live buffers together never take more than
// live ones alone once did. While kept, the system may take the pages back whenever memory is short.
c10::Allocator* gradient_memory();

constexpr size_t kLargeGradient = size_t{64} << 10;

// Gives the kept buffers back; returns their bytes.
size_t release_gradient_memory();

}  // namespace xent

// Registers the CUDA kernels of the operators: for CUDA tensors, or in the tests for those of the CPU, where the
// kernels run in the emulator.
#pragma once

#include <torch/library.h>

namespace xent::gpu {

void register_kernels(torch::Library& m);
void register_nll_loss(torch::Library& m);  // called by register_kernels

}  // namespace xent::gpu

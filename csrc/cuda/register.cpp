#include "cross_entropy_cuda.h"

TORCH_LIBRARY_IMPL(cross_entropy_ext, CUDA, m) { xent::gpu::register_kernels(m); }

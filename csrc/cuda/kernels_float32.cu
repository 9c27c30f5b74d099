#include "kernels.cuh"

template xent::gpu::Status xent::gpu::launch_loss_of<float>(const Task&, const Plan&, void*);

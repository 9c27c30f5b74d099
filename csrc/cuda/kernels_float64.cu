#include "kernels.cuh"

template xent::gpu::Status xent::gpu::launch_loss_of<double>(const Task&, const Plan&, void*);
template xent::gpu::Status xent::gpu::most_clusters_of<double>(const Task&, const Plan&, int&);

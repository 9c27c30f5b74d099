// The CUDA kernels and their host code, compiled for the CPU, as a Python module. `install` puts them in the place of
// the CPU kernels, so that every test of the package can run on them; `uninstall` undoes it.
#include <ATen/record_function.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <string>

#include "cuda/cross_entropy_cuda.h"
#include "cuda/device.h"
#include "cuda/plan.h"
#include "cuda/tuning.h"
#include "host/make_problem.h"
#include "cuda_emulator.h"
#include "device_on_cpu.h"

namespace {

std::unique_ptr<torch::Library> installed;

// While a profiler watches, C++ calls operators through the dispatcher (csrc/host/dispatch.h), and so these kernels.
at::CallbackHandle watcher = at::INVALID_CALLBACK_HANDLE;

void uninstall() {
  installed.reset();
  if (watcher != at::INVALID_CALLBACK_HANDLE) at::removeCallback(std::exchange(watcher, at::INVALID_CALLBACK_HANDLE));
}

void install() {
  uninstall();
  watcher = at::addGlobalCallback(at::RecordFunctionCallback(nullptr).scopes({at::RecordScope::FUNCTION}));
  installed = std::make_unique<torch::Library>(torch::Library::IMPL, "cross_entropy_ext", c10::DispatchKey::CPU,
                                               __FILE__, __LINE__);
  xent::gpu::register_kernels(*installed);
}

void set_schedule(const std::string& order, unsigned seed) {
  const char* const names[] = {"in_order", "reversed", "shuffled", "starve_thread", "starve_warp", "starve_block"};
  for (int i = 0; i < 6; ++i) {
    if (order == names[i]) {
      emulator::schedule = {emulator::Order(i), seed};
      return;
    }
  }
  throw pybind11::value_error(order);
}

// The launch decision for a forward with gradient, in words: which kernel, and how it divides its work. `general`:
// of logits that are scaled first.
pybind11::dict plan(const at::Tensor& logits, const at::Tensor& target, bool general) {
  xent::gpu::Task task;
  const xent::Inputs inputs{logits, target};
  xent::Options options;
  if (general) options.logit_scale = 2;
  xent::make_problem(task, inputs, options, {}, xent::arithmetic_type(inputs, options), logits);
  task.grad_logits = task.logits;
  xent::merge_dimensions(task, {&task.logits, &task.target, &task.grad_logits});
  xent::gpu::prepare(task);
  const xent::gpu::Plan plan = xent::gpu::plan(task, xent::gpu::emulated_device());
  const char* const families[] = {"small_rows", "rows", "spatial", "strided"};
  const char* const teams[] = {"warp", "block", "cluster"};
  pybind11::dict result;
  result["family"] = families[int(plan.family)];
  result["team"] = teams[int(plan.team)];
  result["copied"] = plan.copied;
  result["vectors"] = plan.vectors;
  result["blocks"] = plan.shape.blocks;
  result["cluster"] = plan.shape.cluster;
  result["shared_bytes"] = plan.shape.shared_bytes;
  result["lanes_per_row"] = plan.division.lanes_per_row;
  result["classes_per_lane"] = plan.division.classes_per_lane;
  result["rows_per_tile"] = plan.division.rows_per_tile;
  result["slices"] = plan.division.slices;
  return result;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using xent::gpu::Device;
  m.def("install", &install);
  m.def("uninstall", &uninstall);
  m.def("check_errors", &xent::gpu::check_errors);
  m.def("set_schedule", &set_schedule);
  m.def("tune", &xent::gpu::tune);
  m.def("set_most_clusters", [](int most) { return std::exchange(emulator::most_clusters, most); });
  m.def("set_largest_cluster", [](unsigned blocks) { return std::exchange(emulator::largest_cluster, blocks); });
  m.def("plan", &plan, pybind11::arg("logits"), pybind11::arg("target"), pybind11::arg("general") = false);
  m.def("set_device",
        [](int multiprocessors, int64_t shared_per_multiprocessor, int64_t shared_per_block, int largest_cluster) {
          Device& device = xent::gpu::emulated_device();
          device.multiprocessors = multiprocessors;
          device.shared_per_multiprocessor = shared_per_multiprocessor;
          device.shared_per_block = shared_per_block;
          device.largest_cluster = largest_cluster;
        });
}

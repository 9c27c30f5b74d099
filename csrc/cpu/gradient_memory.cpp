#include "gradient_memory.h"

#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace xent {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

struct Buffer {
  void* data;
  size_t bytes;
};

class GradientMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &deallocate, c10::Device(c10::kCPU)};
    void* data = take(bytes);
    return {data, data, &deallocate, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &deallocate; }

  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }

  size_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return shrink_kept_to(0);
  }

 private:
  // A kept buffer that fits without wasting half of it, else a new one.
  void* take(size_t bytes) {
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      const bool fits = it->bytes >= bytes && it->bytes / 2 <= bytes;
      if (fits && (best == kept_.end() || it->bytes < best->bytes)) best = it;
    }
    Buffer buffer;
    if (best != kept_.end()) {
      buffer = *best;
      kept_.erase(best);
      kept_bytes_ -= buffer.bytes;
    } else {
      peak_bytes_ = std::max(peak_bytes_, live_bytes_ + bytes);
      shrink_kept_to(peak_bytes_ - live_bytes_ - bytes);
      buffer = {map(bytes), bytes};
    }
    live_.emplace(buffer.data, buffer.bytes);
    live_bytes_ += buffer.bytes;
    peak_bytes_ = std::max(peak_bytes_, live_bytes_);
    return buffer.data;
  }

  void give_back(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto it = live_.find(data);
    const Buffer buffer{data, it->second};
    live_.erase(it);
    live_bytes_ -= buffer.bytes;
#if defined(MADV_FREE)
    // The pages stay, unless the system needs them before the next step does.
    madvise(buffer.data, buffer.bytes, MADV_FREE);
#endif
    kept_.push_back(buffer);
    kept_bytes_ += buffer.bytes;
  }

  // The longest unused go first.
  size_t shrink_kept_to(size_t limit) {
    size_t freed = 0;
    auto it = kept_.begin();
    for (; it != kept_.end() && kept_bytes_ > limit; ++it) {
      munmap(it->data, it->bytes);
      kept_bytes_ -= it->bytes;
      freed += it->bytes;
    }
    kept_.erase(kept_.begin(), it);
    return freed;
  }

  static void* map(size_t bytes) {
    // Room to start at a huge page's boundary; what lies before and after is given back.
    const size_t room = bytes + kHugePage;
    void* mapped = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, mapped != MAP_FAILED, "cross_entropy_ext: cannot allocate ", bytes,
                     " bytes for the gradient of the logits.");
    const auto start = reinterpret_cast<uintptr_t>(mapped);
    const uintptr_t aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
    if (aligned > start) munmap(mapped, aligned - start);
    munmap(reinterpret_cast<void*>(aligned + bytes), start + room - (aligned + bytes));
    void* data = reinterpret_cast<void*>(aligned);
#if defined(MADV_HUGEPAGE)
    madvise(data, bytes, MADV_HUGEPAGE);
#endif
    return data;
  }

  static void deallocate(void* data);

  std::mutex mutex_;
  std::vector<Buffer> kept_;  // the longest unused first
  std::unordered_map<void*, size_t> live_;
  size_t kept_bytes_ = 0, live_bytes_ = 0, peak_bytes_ = 0;
};

// Never destroyed: a gradient may outlive every static.
GradientMemory& instance() {
  static auto* memory = new GradientMemory;
  return *memory;
}

void GradientMemory::deallocate(void* data) {
  if (data) instance().give_back(data);
}

}  // namespace

c10::Allocator* gradient_memory() { return &instance(); }

size_t release_gradient_memory() { return instance().release(); }

}  // namespace xent

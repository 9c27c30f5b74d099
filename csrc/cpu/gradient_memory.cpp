#include "gradient_memory.h"

#include <c10/util/Exception.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace xent {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kWorthHugePages = size_t{512} << 10;
constexpr size_t kWorthGivingBack = size_t{16} << 20;
const size_t kPage = size_t(sysconf(_SC_PAGESIZE));

// A mapping of `capacity` bytes. Only its first `resident` bytes, those of the last gradient in it, take memory.
struct Buffer {
  void* data;
  size_t capacity;
  size_t resident;
};

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

class GradientMemory;
GradientMemory& instance();

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
  // Returns the smallest kept buffer that fits, else a new one.
  void* take(size_t bytes) {
    bytes = round_up(bytes, bytes < kWorthHugePages ? kPage : kHugePage);
    const std::lock_guard<std::mutex> lock(mutex_);
    Buffer buffer = take_kept(bytes);
    const size_t live = live_bytes_ + bytes;
    shrink_kept_to(std::max(peak_bytes_, live) - live);
    if (!buffer.data) buffer = {map(bytes), bytes, 0};
    live_bytes_ = live;
    peak_bytes_ = std::max(peak_bytes_, live);
    if (buffer.resident > bytes) {
      madvise(static_cast<char*>(buffer.data) + bytes, buffer.resident - bytes, MADV_DONTNEED);
    }
    buffer.resident = bytes;
    live_.emplace(buffer.data, buffer);
    return buffer.data;
  }

  Buffer take_kept(size_t bytes) {
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      if (it->capacity >= bytes && (best == kept_.end() || it->capacity < best->capacity)) best = it;
    }
    if (best == kept_.end()) return {nullptr, 0, 0};
    const Buffer buffer = *best;
    kept_.erase(best);
    kept_bytes_ -= buffer.resident;
    return buffer;
  }

  void give_back(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto it = live_.find(data);
    const Buffer buffer = it->second;
    live_.erase(it);
    live_bytes_ -= buffer.resident;
#if defined(MADV_FREE)
    // The pages stay until the system needs them.
    if (buffer.resident >= kWorthGivingBack) madvise(buffer.data, buffer.resident, MADV_FREE);
#endif
    kept_.push_back(buffer);
    kept_bytes_ += buffer.resident;
  }

  // Unmaps kept buffers, the longest unused first, and returns how many bytes they took.
  size_t shrink_kept_to(size_t limit) {
    size_t freed = 0;
    auto it = kept_.begin();
    for (; it != kept_.end() && kept_bytes_ > limit; ++it) {
      munmap(it->data, it->capacity);
      kept_bytes_ -= it->resident;
      freed += it->resident;
    }
    kept_.erase(kept_.begin(), it);
    return freed;
  }

  static void* map(size_t bytes) {
    // Huge pages begin at multiples of their size: maps one more, and gives back what is not needed.
    const bool huge = bytes >= kHugePage;
    const size_t room = huge ? bytes + kHugePage : bytes;
    void* mapped = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, mapped != MAP_FAILED, "cross_entropy_ext: cannot allocate ", bytes,
                     " bytes for the gradient of the logits.");
    if (!huge) return mapped;
    char* const start = static_cast<char*>(mapped);
    char* const data = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(mapped), kHugePage));
    if (data > start) munmap(start, size_t(data - start));
    munmap(data + bytes, size_t(start + room - (data + bytes)));
#if defined(MADV_HUGEPAGE)
    madvise(data, bytes, MADV_HUGEPAGE);
#endif
    return data;
  }

  static void deallocate(void* data);
  friend GradientMemory& instance();

  std::mutex mutex_;
  std::vector<Buffer> kept_;  // the longest unused first
  std::unordered_map<void*, Buffer> live_;
  size_t kept_bytes_ = 0, live_bytes_ = 0, peak_bytes_ = 0;
};

// Never destroyed: a gradient may outlive every static. The lock is taken around a fork, for a child must not inherit
// it from another thread of its parent.
GradientMemory& instance() {
  static auto* memory = [] {
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
    return new GradientMemory;
  }();
  return *memory;
}

void GradientMemory::deallocate(void* data) {
  if (data) instance().give_back(data);
}

}  // namespace

c10::Allocator* gradient_memory() { return &instance(); }

size_t release_gradient_memory() { return instance().release(); }

}  // namespace xent

// Runs CUDA C++ on the CPU: to test kernels where there is no GPU, and with tools that no GPU has.
//
// A kernel is an ordinary function here, and each CUDA thread is a fiber: a stack of its own, but no OS thread. A fiber
// runs until it has to wait for others (at a barrier, a shuffle, a vote), then another one goes on. So barriers, warp
// collectives, clusters and asynchronous copies mean what they mean on a GPU, the order of the threads is the test's
// choice and the same in every run, and compiler, debugger and sanitizers see plain C++.
//
// Reported as emulator::Error, with the place in the source:
// * a barrier that threads of a block reach at different places; threads that wait for each other forever;
// * warp collectives at different places, with a mask that lacks the caller or names threads that have exited, and
//   shuffles that read a lane outside the mask;
// * cp.async that is misaligned, to anything but this block's shared memory, or never waited for;
// * map_shared_rank of a block that has exited; writes just past the end of shared memory;
// * launches beyond CUDA's limits; a kernel that overlaps the one before and never waits for it.
// Seen as wrong results, in some schedule:
// * a missing barrier. Shared memory starts as NaN (all bits one), and `schedule` says who goes first: the orders in
//   which one thread, warp or block starves until nothing else can run find most;
// * a missing wait for a copy. Copies are made as late as allowed, when they are waited for; or, with an odd seed, as
//   early, when they are issued, which finds those into memory that is still in use;
// * a read before the wait for the kernel that wrote it, if no other thread has waited. (TSan sees it if one has.)
// With -fsanitize=address,undefined: accesses out of bounds (each shared array is an allocation of its own, of exact
// size), shared memory of a block that has exited, misaligned vectors.
// With -fsanitize=thread: data races between threads of a grid, whatever the order they ran in. Barriers, __syncwarp
// and __threadfence order memory; shuffles, votes and atomics do not. A cluster of 8 x 1024 is more threads than TSan
// takes.
//
// Cannot be seen: coalescing, bank conflicts, occupancy, time; the bits of approximate arithmetic; code for the device
// compiler alone (PTX, __CUDA_ARCH__). Nobody loses the processor without waiting, so a kernel that spins until another
// thread writes never ends. Blocks run one after another (those of a cluster together), in the schedule's order. A mask
// may not name lanes that have exited, even where CUDA would overlook it. Two instances of a template that declares
// shared memory share one array, if type and size agree.
//
// To use it, compile the kernel with this header in place of CUDA's (C++20, -fno-strict-aliasing), without __shared__:
//
//   __global__ void reverse(const float* x, float* y) {
//     float* const all = emulator::shared_array<float>(64, "all", __FILE__, __LINE__);
//     all[threadIdx.x] = x[threadIdx.x];
//     __syncthreads();
//     y[threadIdx.x] = all[63 - threadIdx.x];
//   }
//   ...
//   emulator::schedule = {emulator::Order::kStarveWarp, seed};
//   emulator::launch(dim3(1), dim3(64), 0, 1, [&] { reverse(x, y); });
//
// Several OS threads may launch at once: each has its own fibers.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1
#endif
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN(...) __VA_ARGS__
#else
#define EMULATOR_ASAN(...)
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#define EMULATOR_TSAN(...) __VA_ARGS__
#else
#define EMULATOR_TSAN(...)
#endif
#define EMULATOR_UNINSTRUMENTED \
  __attribute__((no_sanitize("address", "thread"), no_profile_instrument_function, noinline))

#if !defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT
#endif
#if defined(EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

// ---- CUDA's words and types -----------------------------------------------------------------------------------------

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned dx = 1, unsigned dy = 1, unsigned dz = 1) : x(dx), y(dy), z(dz) {}
};
constexpr int warpSize = 32;

namespace emulator {

// ---- launches -------------------------------------------------------------------------------------------------------

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Who goes on, of the threads that need not wait; and who begins, of the blocks of a grid.
enum class Order {
  kInOrder,       // the first one
  kReversed,      // the last one
  kShuffled,      // any one
  kStarveThread,  // any one, but a certain one only if nobody else can: often the first of a warp
  kStarveWarp,    // the same with a warp, often the first of a block
  kStarveBlock,   // the same with a block of a cluster
};
struct Schedule {
  Order order = Order::kInOrder;
  uint64_t seed = 0;  // even: asynchronous copies are made as late as allowed; odd: as early
};

// For all launches of the process. To be set while there are none.
inline Schedule schedule;
inline size_t most_shared_bytes = 227 << 10;  // of a block
inline int most_clusters = 1 << 30;           // at a time, as the device would answer: a launch of more is refused
inline unsigned largest_cluster = 8;          // of a larger one there is never any
inline int clusters_at_a_time(unsigned cluster) { return cluster > largest_cluster ? 0 : most_clusters; }

// As kernel<<<grid, block, shared_bytes>>>, in clusters of so many blocks along x. Returns when all threads have
// exited, and throws Error if one of them did something wrong.
void launch(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, const std::function<void()>& kernel);

namespace internal {

constexpr unsigned kLanes = 32;
constexpr unsigned kMostThreads = 1024;  // of a block
constexpr unsigned kMostCluster = 8;     // blocks
constexpr size_t kMostStaticBytes = 48 << 10;

// A place in the source, as in "__syncthreads at kernel.cu:12".
struct Site {
  const char* what = "";
  const char* file = "";
  int line = 0;

  static bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
  bool operator==(const Site& other) const {
    return line == other.line && same(what, other.what) && same(file, other.file);
  }
  std::string text() const { return std::string(what) + " at " + file + ":" + std::to_string(line); }
};
#define EMULATOR_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

template <class... Part>
[[noreturn]] void fail(const Site& site, const Part&... parts) {
  throw Error((site.text() + ": " + ... + parts));
}

// While one lives, TSan overlooks what this fiber reads and writes: the emulator's own state.
struct Quiet {
  Quiet() { EMULATOR_TSAN(__tsan_ignore_thread_begin()); }
  ~Quiet() { EMULATOR_TSAN(__tsan_ignore_thread_end()); }
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
};

// Tells TSan that what came before a release() comes before what follows an acquire().
struct Fence {
  void release() { EMULATOR_TSAN(Quiet quiet; __tsan_release(address.get())); }
  void acquire() { EMULATOR_TSAN(Quiet quiet; __tsan_acquire(address.get())); }
  void renew() { EMULATOR_TSAN(address = std::make_unique<char>()); }  // freed memory forgets its releases

  EMULATOR_TSAN(std::unique_ptr<char> address = std::make_unique<char>();)
};

// ---- stacks, and how to go from one to another ----------------------------------------------------------------------

#if defined(EMULATOR_UCONTEXT)

using Context = ucontext_t;
inline void switch_context(Context* from, const Context* to) { swapcontext(from, to); }
inline void prepare_context(Context* context, char* stack, size_t bytes, void (*function)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, function, 0);
}

#else

struct Context {
  void* stack_pointer = nullptr;
};

// Leaves the registers that a call preserves on one stack, and takes them from the other.
__attribute__((naked)) EMULATOR_UNINSTRUMENTED inline void switch_context(Context* /* rdi */,
                                                                          const Context* /* rsi */) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
      "movq %rsp, (%rdi); movq (%rsi), %rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

// As if nobody were about to call the function: a return address of null is where debuggers' backtraces end.
inline void prepare_context(Context* context, char* stack, size_t bytes, void (*function)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(function);
  for (int preserved = 0; preserved < 6; ++preserved) *--top = nullptr;
  context->stack_pointer = top;
}

#endif

constexpr size_t kStackBytes = 128 << 10;  // the system provides those pages that are used
constexpr size_t kGuardBytes = 64 << 10;   // below, where an overflow ends in a crash

struct Unmap {  // for std::unique_ptr
  void operator()(char* stack) const { munmap(stack - kGuardBytes, kGuardBytes + kStackBytes); }
};

struct Stack {
  std::unique_ptr<char, Unmap> begin;
  void* tsan = nullptr;  // whom TSan takes its users for

  void allocate() {
    if (begin != nullptr) return;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* const pages = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    mprotect(pages, kGuardBytes, PROT_NONE);
    begin.reset(static_cast<char*>(pages) + kGuardBytes);
    EMULATOR_TSAN(tsan = __tsan_create_fiber(0));
  }
};

// ---- threads, warps, blocks -----------------------------------------------------------------------------------------

struct Block;
struct Machine;
struct Warp;

// By cp.async.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  size_t group;
};

struct Fiber {
  uint3 index;      // threadIdx
  unsigned number;  // of the thread in its block
  unsigned lane;
  Warp* warp;
  Block* block;
  Machine* machine;
  Site waits_in;
  std::vector<Copy> copies;  // not waited for yet, in the order in which they were issued
  size_t groups;             // committed
  Context context;
  const void* stack;
  size_t stack_bytes;
  void* asan = nullptr;  // by what the sanitizers know it
  void* tsan = nullptr;

  unsigned bit() const { return 1u << lane; }
};

// Where those lanes of some warps that a mask names wait for each other, time and again. Nobody can be two rounds ahead
// of anyone, so that two sets of what belongs to a round suffice.
struct Rendezvous {
  Warp* warps = nullptr;
  unsigned warp_count = 1;
  unsigned mask = ~0u;
  unsigned arrived = 0;
  unsigned round = 0;  // modulo 2
  Site site;
  unsigned votes[2];
  Fence fences[2];

  void renew(Warp* its_warps, unsigned count) {
    warps = its_warps;
    warp_count = count;
    arrived = 0;
    for (Fence& fence : fences) fence.renew();
  }
};

// Of lanes of one warp, which bring values for each other.
struct Collective : Rendezvous {
  uint64_t values[2][kLanes];
};

struct Warp {
  unsigned alive = 0;  // each bit is a lane
  unsigned started = 0;
  unsigned ready = 0;  // need not wait, and do not run
  unsigned starved = 0;
  std::vector<std::unique_ptr<Collective>> collectives;  // one for each mask that came up

  Collective* collective(unsigned mask) {
    for (const auto& known : collectives) {
      if (known->mask == mask) return known.get();
    }
    collectives.push_back(std::make_unique<Collective>());
    collectives.back()->mask = mask;
    collectives.back()->renew(this, 1);
    return collectives.back().get();
  }
};

// An array in a block's shared memory.
struct Shared {
  Site site;
  const void* type;
  size_t bytes;
  char* data;

  bool is(const Site& its_site, const void* its_type, size_t its_bytes) const {
    return type == its_type && bytes == its_bytes && site == its_site;
  }
};

struct Block {
  uint3 index;  // blockIdx
  unsigned rank = 0;
  unsigned live = 0;  // threads
  Warp* warps = nullptr;
  Rendezvous barrier;
  Fence exits;
  std::vector<Shared> memory;  // the dynamic one first
  size_t static_bytes = 0;

#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kMargin = 0;  // ASan has its own
#else
  static constexpr size_t kMargin = 64;
#endif
  static constexpr char kMarginByte = 0x5a;
  static constexpr int kNothingYet = 0xff;  // in each byte: NaN

  char* allocate(const Site& site, const void* type, size_t bytes) {
    void* data = nullptr;
    if (posix_memalign(&data, 128, bytes + kMargin) != 0) throw std::bad_alloc();
    std::memset(data, kNothingYet, bytes);
    std::memset(static_cast<char*>(data) + bytes, kMarginByte, kMargin);
    memory.push_back({site, type, bytes, static_cast<char*>(data)});
    return memory.back().data;
  }
  Shared find(const void* p, size_t bytes, const Site& site) const {
    for (const Shared& shared : memory) {
      if (p >= shared.data && static_cast<const char*>(p) + bytes <= shared.data + shared.bytes) return shared;
    }
    fail(site, "not an address in this block's shared memory");
  }
  void check_margins() const {
    for (const Shared& shared : memory) {
      const char* const margin = shared.data + shared.bytes;
      if (std::count(margin, margin + kMargin, kMarginByte) != ptrdiff_t(kMargin)) {
        fail(shared.site, "written past the end of this shared memory");
      }
    }
  }
  void free_memory() {
    for (const Shared& shared : memory) std::free(shared.data);
    memory.clear();
  }
};

inline constinit thread_local Fiber* current = nullptr;  // none outside of kernels

inline Fiber& self() {
  if (current == nullptr) throw Error("called outside of a kernel");
  return *current;
}

// ---- the machine: what an OS thread needs to run grids --------------------------------------------------------------

struct Machine {
  struct Unwind {};  // thrown in the fibers that are left when one has failed

  dim3 grid, block;
  unsigned cluster = 1;
  const std::function<void()>* kernel = nullptr;
  Schedule how;

  std::vector<Warp> warps;    // of the cluster that runs; there may be more than it needs
  std::vector<Fiber> fibers;  // kLanes for each warp
  std::vector<Block> blocks;
  std::vector<Stack> stacks;
  std::vector<uint64_t> clusters;  // in the order in which they run
  unsigned block_warps = 0, used_warps = 0;
  unsigned live = 0;  // threads
  Rendezvous cluster_barrier;
  Fence begin, end, fence;

  Fiber host{};  // whoever called launch
  bool busy = false, unwinding = false;
  std::string error;
  uint64_t random_state = 0;

  static Machine& of_this_os_thread() {
    static thread_local Machine machine;
    return machine;
  }
  Machine() { host.machine = this; }
  ~Machine() {
    EMULATOR_TSAN(for (const Stack& stack : stacks) if (stack.tsan != nullptr) __tsan_destroy_fiber(stack.tsan));
  }
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  // -- who goes on

  unsigned random(size_t below) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return unsigned((random_state >> 32) * below >> 32);
  }
  bool any_order() const { return how.order >= Order::kShuffled; }

  Fiber* pick(bool starved_too) {
    const bool reversed = how.order == Order::kReversed, any = any_order();
    unsigned w = any ? random(used_warps) : reversed ? used_warps - 1 : 0;
    for (unsigned i = 0; i < used_warps; ++i) {
      Warp& warp = warps[w];
      if (const unsigned lanes = starved_too ? warp.ready : warp.ready & ~warp.starved) {
        const int first = any ? int(random(kLanes)) : 0;
        const int lane = reversed ? 31 - std::countl_zero(lanes) : std::countr_zero(std::rotr(lanes, first)) + first;
        Fiber& fiber = fibers[w * kLanes + unsigned(lane) % kLanes];
        warp.ready &= ~fiber.bit();
        warp.started |= fiber.bit();
        return &fiber;
      }
      w = reversed ? w - 1 : w + 1 == used_warps ? 0 : w + 1;
    }
    return nullptr;
  }

  // The host if nobody can go on, or nobody should.
  Fiber* pick() {
    if (unwinding) return &host;
    Fiber* next = pick(false);
    if (next == nullptr) next = pick(true);
    return next == nullptr ? &host : next;
  }

  EMULATOR_UNINSTRUMENTED void switch_fibers(Fiber* from, Fiber* to, [[maybe_unused]] bool for_good = false) {
    current = to == &host ? nullptr : to;
    EMULATOR_ASAN(__sanitizer_start_switch_fiber(for_good ? nullptr : &from->asan, to->stack, to->stack_bytes));
    EMULATOR_TSAN(__tsan_switch_to_fiber(to->tsan, __tsan_switch_to_fiber_no_sync));
    switch_context(&from->context, &to->context);
    EMULATOR_ASAN(__sanitizer_finish_switch_fiber(from->asan, nullptr, nullptr));
  }

  void leave(Fiber* me) {
    Fiber* const next = pick();
    if (next != me) switch_fibers(me, next);
    if (unwinding) throw Unwind();
  }

  // Returns when as many have arrived as are expected, and what their votes add up to.
  unsigned arrive(Fiber* me, Rendezvous* place, unsigned expected, unsigned vote, bool orders_memory,
                  const Site& site) {
    const unsigned round = place->round;
    if (place->arrived == 0) {
      place->site = site;
      place->votes[round] = 0;
    } else if (!(place->site == site)) {
      fail(site, "divergent, others are in ", place->site.text());
    }
    place->votes[round] += vote;
    if (orders_memory) place->fences[round].release();
    if (++place->arrived != expected) {
      me->waits_in = site;
      leave(me);
    } else {
      complete(place);
      // Always to go on would be too regular, and the starved are not to.
      if (any_order() && ((me->warp->starved & me->bit()) != 0 || random(2) == 0)) {
        leave(me);
      } else {
        me->warp->ready &= ~me->bit();
      }
    }
    if (orders_memory) place->fences[round].acquire();
    return place->votes[round];
  }

  static void complete(Rendezvous* place) {
    place->arrived = 0;
    place->round ^= 1;
    for (unsigned w = 0; w < place->warp_count; ++w) place->warps[w].ready |= place->warps[w].alive & place->mask;
  }

  // -- the life of a thread

  EMULATOR_UNINSTRUMENTED static void run_fiber() {
    Fiber* const me = current;
    Machine* const machine = me->machine;
    Fiber* const host = &machine->host;
    if (host->stack == nullptr) {  // the first fiber comes from the host
      EMULATOR_ASAN(__sanitizer_finish_switch_fiber(nullptr, &host->stack, &host->stack_bytes));
    } else {
      EMULATOR_ASAN(__sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr));
    }
    machine->run_kernel(me);
    machine->switch_fibers(me, machine->exit(me), true);
  }

  void run_kernel(Fiber* me) {
    begin.acquire();
    try {
      (*kernel)();
      Quiet quiet;
      if (!me->copies.empty()) throw Error("exits without having waited for its asynchronous copies");
    } catch (const Unwind&) {
    } catch (const std::exception& exception) {
      Quiet quiet;
      report(*me, exception.what());
    } catch (...) {
      Quiet quiet;
      report(*me, "throws what is no std::exception");
    }
    me->block->exits.release();
    end.release();
  }

  // Returns who goes on.
  Fiber* exit(Fiber* me) {
    Quiet quiet;
    Block& its_block = *me->block;
    me->warp->alive &= ~me->bit();
    --live;
    --its_block.live;
    if (unwinding) return &host;
    for (const auto& collective : me->warp->collectives) {
      if (collective->arrived != 0 && (collective->mask & me->bit()) != 0) {
        report(*me, "exits while others of its warp wait for it in " + collective->site.text());
      }
    }
    if (its_block.live == 0) end_block(me);
    for (auto [place, left] : {std::pair(&its_block.barrier, its_block.live), std::pair(&cluster_barrier, live)}) {
      if (left != 0 && place->arrived == left) complete(place);
    }
    return pick();
  }

  // Whoever still uses its memory gets to know: from ASan, from TSan, which sees it written, or by NaN.
  void end_block(Fiber* last) {
    try {
      last->block->check_margins();
    } catch (const Error& overrun) {
      report(*last, overrun.what());
    }
    last->block->exits.acquire();
    EMULATOR_ASAN(last->block->free_memory());
    for (const auto [site, type, bytes, data] : last->block->memory) {
      EMULATOR_TSAN(__tsan_ignore_thread_end());
      std::memset(data, Block::kNothingYet, bytes);
      EMULATOR_TSAN(__tsan_ignore_thread_begin());
    }
  }

  static std::string name(const Fiber& fiber) {
    const auto text = [](unsigned x) { return std::to_string(x); };
    const uint3& index = fiber.block->index;
    return "block (" + text(index.x) + "," + text(index.y) + "," + text(index.z) + ") thread " + text(fiber.number);
  }
  void report(const Fiber& fiber, const std::string& message) {
    if (!unwinding) error = name(fiber) + ": " + message;
    unwinding = true;
  }
  // Who waits where: the first of those in each place, and how many they are.
  void report_deadlock() {
    std::vector<std::pair<const Fiber*, unsigned>> places;
    for (unsigned i = 0; i < used_warps * kLanes; ++i) {
      const Fiber& fiber = fibers[i];
      if ((warps[i / kLanes].alive >> i % kLanes & 1) == 0) continue;
      auto place = std::find_if(places.begin(), places.end(),
                                [&](const auto& known) { return known.first->waits_in == fiber.waits_in; });
      if (place == places.end()) place = places.insert(place, {&fiber, 0u});
      ++place->second;
    }
    error = "deadlock:";
    for (const auto& [first, count] : places) {
      error +=
          "\n  " + std::to_string(count) + " threads wait in " + first->waits_in.text() + ", first " + name(*first);
    }
    unwinding = true;
  }

  // -- grids

  // What the threads of a cluster start with.
  void prepare_cluster(uint64_t number, size_t shared_bytes) {
    live = 0;
    for (unsigned rank = 0; rank < cluster; ++rank) {
      Block& b = blocks[rank];
      const uint64_t i = number * cluster + rank;
      b.index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
      b.rank = rank;
      b.warps = &warps[rank * block_warps];
      b.live = block.x * block.y * block.z;
      b.barrier.renew(b.warps, block_warps);
      b.exits.renew();
      b.static_bytes = 0;
      b.free_memory();
      b.allocate({"dynamic shared memory", "launch", 0}, nullptr, shared_bytes);
      for (unsigned w = 0; w < block_warps; ++w) {
        const unsigned lanes = std::min(b.live - w * kLanes, kLanes);
        b.warps[w].alive = b.warps[w].ready = ~0u >> (kLanes - lanes);
        b.warps[w].started = b.warps[w].starved = 0;
        for (const auto& collective : b.warps[w].collectives) collective->renew(&b.warps[w], 1);
      }
      for (unsigned t = 0; t < b.live; ++t) prepare_fiber(&b, t, number);
      live += b.live;
    }
    cluster_barrier.renew(warps.data(), used_warps);
    choose_starved();
  }

  void prepare_fiber(Block* its_block, unsigned t, [[maybe_unused]] uint64_t number) {
    const size_t i = its_block->rank * block_warps * kLanes + t;
    Fiber& fiber = fibers[i];
    fiber.index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
    fiber.number = t;
    fiber.lane = t % kLanes;
    fiber.warp = its_block->warps + t / kLanes;
    fiber.block = its_block;
    fiber.machine = this;
    fiber.copies.clear();
    fiber.groups = 0;
    // To TSan, whatever ran on one stack is in order. So the same thread of the next block gets another one.
    size_t its_stack = i;
    EMULATOR_TSAN(its_stack = (i + number) % stacks.size());
    Stack& stack = stacks[its_stack];
    stack.allocate();
    fiber.stack = stack.begin.get();
    fiber.stack_bytes = kStackBytes - its_stack % 32 * 64;  // not all in the same sets of the caches
    fiber.tsan = stack.tsan;
    EMULATOR_ASAN(__asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes));  // its last user never returned
    prepare_context(&fiber.context, stack.begin.get(), fiber.stack_bytes, run_fiber);
  }

  void choose_starved() {
    if (how.order < Order::kStarveThread) return;
    const auto often_the_first = [&](size_t of) { return random(2) == 0 ? 0 : random(of); };
    Block& b = blocks[random(cluster)];
    Warp& warp = b.warps[often_the_first(block_warps)];
    if (how.order == Order::kStarveThread) warp.starved = 1u << often_the_first(size_t(std::popcount(warp.alive)));
    if (how.order == Order::kStarveWarp) warp.starved = ~0u;
    for (unsigned w = 0; how.order == Order::kStarveBlock && w < block_warps; ++w) b.warps[w].starved = ~0u;
  }

  void run_cluster() {
    switch_fibers(&host, pick());
    if (live != 0 && !unwinding) report_deadlock();
    if (!unwinding) return;
    for (unsigned w = 0; w < used_warps; ++w) {
      while (const unsigned left = warps[w].alive & warps[w].started) {
        switch_fibers(&host, &fibers[w * kLanes + unsigned(std::countr_zero(left))]);
      }
    }
    throw Error(error);
  }

  void run_grid(size_t shared_bytes) {
    block_warps = (block.x * block.y * block.z + kLanes - 1) / kLanes;
    used_warps = block_warps * cluster;
    if (warps.size() < used_warps) warps.resize(used_warps);
    fibers.resize(warps.size() * kLanes);
    stacks.resize(fibers.size());
    if (blocks.size() < cluster) blocks.resize(cluster);
    clusters.resize(size_t(grid.x / cluster) * grid.y * grid.z);
    for (size_t i = 0; i < clusters.size(); ++i) {
      clusters[i] = how.order == Order::kReversed ? clusters.size() - 1 - i : i;
      if (any_order()) std::swap(clusters[i], clusters[random(i + 1)]);
    }
    for (const uint64_t number : clusters) {
      prepare_cluster(number, shared_bytes);
      run_cluster();
    }
  }

  static void check_limits(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster) {
    const auto check = [](bool right, const char* what) {
      if (!right) throw Error(std::string("launch: ") + what);
    };
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    check(threads != 0 && block.x <= kMostThreads && block.y <= kMostThreads && threads <= kMostThreads,
          "a block has 1 to 1024 threads");
    check(block.z <= 64, "block.z is at most 64");
    check(grid.x != 0 && grid.y != 0 && grid.z != 0, "a grid has at least one block");
    check(grid.x < 1u << 31 && grid.y < 1u << 16 && grid.z < 1u << 16, "grid.x is below 2^31, y and z below 2^16");
    check(cluster >= 1 && cluster <= kMostCluster, "a cluster has 1 to 8 blocks");
    check(grid.x % cluster == 0, "grid.x is a multiple of the cluster's blocks");
    check(cluster == 1 || grid.x / cluster <= unsigned(clusters_at_a_time(cluster)),
          "more clusters than run at a time");
    check(shared_bytes <= most_shared_bytes, "more shared memory than a block can have");
  }

  void launch(dim3 its_grid, dim3 its_block, size_t shared_bytes, unsigned its_cluster,
              const std::function<void()>& its_kernel) {
    Quiet quiet;
    check_limits(its_grid, its_block, shared_bytes, its_cluster);
    if (busy) throw Error("launch: from within a kernel");
    grid = its_grid;
    block = its_block;
    cluster = its_cluster;
    kernel = &its_kernel;
    how = schedule;
    random_state = how.seed * 0x9e3779b97f4a7c15u;
    unwinding = false;
    host.stack = nullptr;
    EMULATOR_TSAN(host.tsan = __tsan_get_current_fiber());
    fence.renew();
    begin.release();
    struct Busy {  // until it has run, or has failed
      Machine* machine;
      explicit Busy(Machine* m) : machine(m) { machine->busy = true; }
      ~Busy() {
        machine->end.acquire();
        for (Block& b : machine->blocks) b.free_memory();
        machine->busy = false;
      }
    } until_the_end(this);
    run_grid(shared_bytes);
  }
};

// ---- warp collectives -----------------------------------------------------------------------------------------------

// Checks that this lane may meet the mask's others.
inline Collective* meet(const Fiber& me, unsigned mask, const Site& site) {
  if ((mask & me.bit()) == 0) fail(site, "the mask lacks the calling lane, ", std::to_string(me.lane));
  if ((mask & ~me.warp->alive) != 0) fail(site, "the mask names lanes that have exited, or never were");
  return me.warp->collective(mask);
}

// `source_of(lane, first, last)` is the lane to read, of those from the first to the last that exchange values.
template <class T, class SourceOf>
T shuffle(unsigned mask, T value, int width, const Site& site, SourceOf source_of) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles are for 4 and 8 bytes");
  Quiet quiet;
  Fiber& me = self();
  Collective* const place = meet(me, mask, site);
  if (width < 1 || width > 32 || !std::has_single_bit(unsigned(width))) fail(site, "the width is no power of 2 to 32");
  const int lane = int(me.lane), first = lane & -width, source = source_of(lane, first, first + width - 1);
  if ((mask >> source & 1) == 0) fail(site, "reads lane ", std::to_string(source), ", which the mask lacks");
  uint64_t* const values = place->values[place->round];
  std::memcpy(&values[lane], &value, sizeof value);
  me.machine->arrive(&me, place, unsigned(std::popcount(mask)), 0, false, site);
  std::memcpy(&value, &values[source], sizeof value);
  return value;
}

inline unsigned warp_barrier(unsigned mask, bool vote, bool orders_memory, const Site& site) {
  Quiet quiet;
  Fiber& me = self();
  Collective* const place = meet(me, mask, site);
  return me.machine->arrive(&me, place, unsigned(std::popcount(mask)), vote ? me.bit() : 0, orders_memory, site);
}

inline unsigned block_barrier(bool vote, const Site& site) {
  Quiet quiet;
  Fiber& me = self();
  return me.machine->arrive(&me, &me.block->barrier, me.block->live, vote, true, site);
}

// ---- shared memory --------------------------------------------------------------------------------------------------

template <class T>
inline constexpr char type_tag = 0;  // its address stands for the type

}  // namespace internal

inline void launch(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, const std::function<void()>& kernel) {
  internal::Machine::of_this_os_thread().launch(grid, block, shared_bytes, cluster, kernel);
}

// ---- kernels that overlap ------------------------------------------------------------------------------------------
//
// A GPU may begin a kernel before the one before it has ended. Here such a one (`is_overlapped`) runs as late as it
// may: when the next one waits for it. So whoever reads what it writes, and does not wait, finds nothing.

struct Launched {
  std::function<void()> run;
  std::atomic<bool> has_run = false;  // acquired by each thread that waits, as sanitizers see
};

namespace internal {
inline thread_local std::shared_ptr<Launched> not_run;  // the last kernel of this OS thread, if it is to be overlapped
inline thread_local Launched* to_wait_for = nullptr;    // of the kernel that runs
}  // namespace internal

// The same with what is said of its neighbours: it overlaps the one before, and the next one overlaps it.
inline void launch(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, bool overlaps, bool is_overlapped,
                   const std::function<void()>& kernel) {
  using namespace internal;
  const std::shared_ptr<Launched> before = std::exchange(not_run, nullptr);
  if (before && !overlaps) before->run();
  const auto run = [=, before = overlaps ? before : nullptr] {
    struct Waits {
      explicit Waits(Launched* before) { to_wait_for = before; }
      ~Waits() { to_wait_for = nullptr; }
    } waits(before.get());
    launch(grid, block, shared_bytes, cluster, kernel);
    if (before && !before->has_run) throw Error("a kernel has ended and not waited for the one that it overlaps");
  };
  if (!is_overlapped) return run();
  not_run = std::make_shared<Launched>();
  not_run->run = run;
}

// As griddepcontrol.wait. The other kernel runs in an OS thread of its own, as it would on a GPU: this one is busy.
inline void wait_for_previous_kernel() {
  Launched* const before = internal::to_wait_for;
  if (before == nullptr || before->has_run.load(std::memory_order_acquire)) return;
  std::exception_ptr error;
  std::thread([&] {
    try {
      before->run();
    } catch (...) {
      error = std::current_exception();
    }
  }).join();
  before->has_run.store(true, std::memory_order_release);
  if (error) std::rethrow_exception(error);
}

// As `__shared__ T name[count]`: one array for each block, place, type and count.
template <class T>
T* shared_array(size_t count, const char* name, const char* file, int line) {
  static_assert(std::is_trivially_copyable_v<T>);
  using namespace internal;
  Quiet quiet;
  Block& block = *self().block;
  const Site site{name, file, line};
  const size_t bytes = count * sizeof(T);
  for (const Shared& shared : block.memory) {
    if (shared.is(site, &type_tag<T>, bytes)) return reinterpret_cast<T*>(shared.data);
  }
  block.static_bytes += bytes;
  if (block.static_bytes > kMostStaticBytes) fail(site, "more than 48 KiB of shared arrays");
  if (block.static_bytes + block.memory[0].bytes > most_shared_bytes) fail(site, "more shared memory than there is");
  return reinterpret_cast<T*>(block.allocate(site, &type_tag<T>, bytes));
}

// As `extern __shared__`.
inline void* dynamic_shared_memory() {
  internal::Quiet quiet;
  return internal::self().block->memory[0].data;
}

// ---- asynchronous copies, as PTX has them ---------------------------------------------------------------------------

// 4, 8 or 16 bytes.
inline void cp_async(void* shared, const void* global, size_t bytes, EMULATOR_CALLER) {
  using namespace internal;
  {
    Quiet quiet;
    Fiber& me = self();
    const Site site{"cp.async", file, line};
    if (bytes != 4 && bytes != 8 && bytes != 16) fail(site, "copies 4, 8 or 16 bytes");
    if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % bytes != 0) {
      fail(site, "misaligned, an address is no multiple of ", std::to_string(bytes));
    }
    me.block->find(shared, bytes, site);
    me.copies.push_back({shared, global, bytes, me.groups});
    if (me.machine->how.seed % 2 == 0) return;
  }
  std::memcpy(shared, global, bytes);
}

// What was issued since the last commit is a group.
inline void cp_async_commit() {
  internal::Quiet quiet;
  ++internal::self().groups;
}

// Until no more than so many groups are under way, the youngest.
inline void cp_async_wait(size_t groups_left) {
  using namespace internal;
  Fiber* me;
  std::vector<Copy>::iterator due, end;
  bool late;
  {
    Quiet quiet;
    me = &self();
    late = me->machine->how.seed % 2 == 0;
    due = me->copies.begin();
    end = std::find_if(due, me->copies.end(), [&](const Copy& copy) { return copy.group + groups_left >= me->groups; });
  }
  // Not quiet: these are the kernel's accesses.
  if (late) std::for_each(due, end, [](const Copy& copy) { std::memcpy(copy.to, copy.from, copy.bytes); });
  Quiet quiet;
  me->copies.erase(due, end);
}

// ---- clusters -------------------------------------------------------------------------------------------------------

inline void cluster_sync(EMULATOR_CALLER) {
  internal::Quiet quiet;
  internal::Fiber& me = internal::self();
  internal::Machine& machine = *me.machine;
  machine.arrive(&me, &machine.cluster_barrier, machine.live, 0, true, {"cluster_sync", file, line});
}
inline unsigned cluster_rank() { return internal::self().block->rank; }
inline unsigned cluster_size() { return internal::self().machine->cluster; }

// Where another block of the cluster has what this block has at p.
template <class T>
T* map_shared_rank(T* p, unsigned rank, EMULATOR_CALLER) {
  using namespace internal;
  Quiet quiet;
  const Site site{"map_shared_rank", file, line};
  Machine& machine = *self().machine;
  if (rank >= machine.cluster) fail(site, "the cluster has no block ", std::to_string(rank));
  Block& other = machine.blocks[rank];
  if (other.live == 0) fail(site, "block ", std::to_string(rank), " of the cluster has exited");
  const Shared mine = self().block->find(p, 0, site);
  const auto theirs = std::find_if(other.memory.begin(), other.memory.end(),
                                   [&](const Shared& shared) { return shared.is(mine.site, mine.type, mine.bytes); });
  char* const data =
      theirs != other.memory.end() ? theirs->data : other.allocate(mine.site, mine.type, mine.bytes);  // not there yet
  return reinterpret_cast<T*>(data + (reinterpret_cast<const char*>(p) - mine.data));
}

}  // namespace emulator

// ---- CUDA's variables and functions ---------------------------------------------------------------------------------

#define threadIdx (std::as_const(emulator::internal::self().index))
#define blockIdx (std::as_const(emulator::internal::self().block->index))
#define blockDim (std::as_const(emulator::internal::self().machine->block))
#define gridDim (std::as_const(emulator::internal::self().machine->grid))

inline void __syncthreads(EMULATOR_CALLER) { emulator::internal::block_barrier(false, {"__syncthreads", file, line}); }
inline int __syncthreads_count(int predicate, EMULATOR_CALLER) {
  return int(emulator::internal::block_barrier(predicate != 0, {"__syncthreads_count", file, line}));
}
inline int __syncthreads_or(int predicate, EMULATOR_CALLER) {
  return emulator::internal::block_barrier(predicate != 0, {"__syncthreads_or", file, line}) != 0;
}
inline int __syncthreads_and(int predicate, EMULATOR_CALLER) {
  return emulator::internal::block_barrier(predicate == 0, {"__syncthreads_and", file, line}) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, EMULATOR_CALLER) {
  emulator::internal::warp_barrier(mask, false, true, {"__syncwarp", file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_CALLER) {
  return emulator::internal::warp_barrier(mask, predicate != 0, false, {"__ballot_sync", file, line});
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_CALLER) {
  return emulator::internal::warp_barrier(mask, predicate != 0, false, {"__any_sync", file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_CALLER) {
  return emulator::internal::warp_barrier(mask, predicate == 0, false, {"__all_sync", file, line}) == 0;
}

// Where there is no lane to read from, a lane reads its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, EMULATOR_CALLER) {
  return emulator::internal::shuffle(mask, value, width, {"__shfl_sync", file, line},
                                     [&](int, int first, int) { return first + (source & (width - 1)); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, EMULATOR_CALLER) {
  return emulator::internal::shuffle(mask, value, width, {"__shfl_xor_sync", file, line}, [&](int lane, int, int last) {
    return (lane ^ lanes) >= 0 && (lane ^ lanes) <= last ? lane ^ lanes : lane;  // reads of earlier segments are CUDA's
  });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATOR_CALLER) {
  return emulator::internal::shuffle(mask, value, width, {"__shfl_up_sync", file, line}, [&](int lane, int first, int) {
    return delta <= unsigned(lane - first) ? lane - int(delta) : lane;
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATOR_CALLER) {
  return emulator::internal::shuffle(
      mask, value, width, {"__shfl_down_sync", file, line},
      [&](int lane, int, int last) { return delta <= unsigned(last - lane) ? lane + int(delta) : lane; });
}

// To TSan, a fence comes after every fence of the grid before it.
inline void __threadfence() {
  emulator::internal::Fence& fence = emulator::internal::self().machine->fence;
  fence.acquire();
  fence.release();
}
inline void __threadfence_block() { __threadfence(); }
inline void __threadfence_system() { __threadfence(); }

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> value) {
  *p = value;
}

// Sets *p to update(*p), and returns what it was.
template <class T, class Update>
T emulator_atomic(T* p, Update update) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "atomics are for integers of 4 or 8 bytes: floating-point sums in the order of arrival are not "
                "deterministic");
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, update(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  return emulator_atomic(p, [&](T old) { return T(uint64_t(old) + uint64_t(value)); });
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> value) {
  return emulator_atomic(p, [&](T old) { return value < old ? value : old; });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  return emulator_atomic(p, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> value) {
  return emulator_atomic(p, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emulator_atomic(p, [&](T old) { return old == expected ? value : old; });
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }

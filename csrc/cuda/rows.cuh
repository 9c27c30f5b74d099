// Rows: positions whose classes are contiguous, and too many for small_rows.cuh.
//
// Fuses the log-sum-exp, the loss and the gradient of a row. A warp, a block or a cluster of blocks has a row to
// itself, copies it into shared memory once, and makes the gradient from there:
//
//   forward with gradient    1 read + 1 write of the row, and 1 read of probabilities that lie as the logits do
//                            (others are read twice, the second time from L2)
//   forward alone            1 read
//   backward alone           1 read + 1 write
//
// Why:
// * Copies into shared memory are asynchronous and need no registers, so a multiprocessor has up to 200 KB under way,
//   where latency x bandwidth asks for about 25 (H200: 4.8 TB/s x 0.7 us / 132).
// * Each thread copies, sums and writes the same vectors. It needs no barrier to see its own copies, and may write the
//   gradient in the logits' place as soon as the row's sums are joined. A row has one barrier, and none in a warp.
// * Copies are waited for in stages: the first is summed while the last is on its way. A thread finds the maximum of
// its
//   part of a stage before it sums it, without a branch. An online sum would meet a new maximum in nearly every vector:
//   a thread has few of them, and one lane of 32 is enough.
// * A row that does not fit shared memory is read twice, the second time from the L2 cache where that is large enough.
// * The grid is as large as fits on the device at a time and walks the rows, so the sums of each block come in an order
//   that depends on the shapes alone.
//
// Vectors lie at addresses that are multiples of 16 whatever a row's own alignment. The elements around them (fewer
// than 2 x 16 bytes) are taken one by one, each by a thread of its own, in a register.
#pragma once

#include "general.cuh"
#include "reduce.cuh"
#include "vector.cuh"

namespace xent::gpu {

// Threads of a block.
template <Team team>
constexpr int kBlockThreads = block_threads(team);

// The threads that share a row, and their exchange of sums.
template <Team team>
struct Members {
  static constexpr int kThreads = team == Team::kWarp ? kWarp : kBlockThreads<team>;  // in one block
  static constexpr int kWarps = kThreads / kWarp;

  int thread;
  int rank = 0, blocks = 1;  // of a cluster
  int64_t first;             // position of this team
  int step;                  // to its next position

  XENT_DEVICE Members() : thread(int(threadIdx.x) % kThreads) {
    constexpr int kTeams = kBlockThreads<team> / kThreads;  // in one block
    if constexpr (team == Team::kCluster) {
      rank = int(cluster_rank());
      blocks = int(cluster_blocks());
    }
    first = int64_t(blockIdx.x / blocks) * kTeams + int(threadIdx.x) / kThreads;
    step = int(gridDim.x) / blocks * kTeams;
  }

  XENT_DEVICE bool leads() const { return rank == 0 && thread == 0; }

  // Among all threads that share a row.
  XENT_DEVICE int64_t index() const { return int64_t(rank) * kThreads + thread; }
  XENT_DEVICE int64_t count() const { return int64_t(blocks) * kThreads; }

  XENT_DEVICE void barrier() const {
    if constexpr (team == Team::kWarp) {
      __syncwarp();
    } else if constexpr (team == Team::kBlock) {
      __syncthreads();
    } else {
      cluster_barrier();
    }
  }

  // Joins the sums of all members, for each of them, once all have read what they add: the gradient may take its place.
  // `exchange` has two halves, taken in turn: a warp may be one barrier ahead of another that still reads.
  template <class Softmax>
  XENT_DEVICE void join(const Task& task, Softmax& softmax, Softmax* exchange, uint32_t round) const {
    join_lanes(softmax, kWarp);
    if constexpr (team == Team::kWarp) {
      barrier();
    } else {
      Softmax* const mine = exchange + (round % 2) * kWarps;
      const int lane = thread % kWarp;
      if (lane == 0) mine[thread / kWarp] = softmax;
      barrier();
      softmax = Softmax::of_nothing(task);
      for (int i = lane; i < blocks * kWarps; i += kWarp) {
        softmax.merge(*in_block(mine + i % kWarps, uint32_t(i / kWarps)));
      }
      join_lanes(softmax, kWarp);
    }
  }
};

// One block's part of a row: its vectors in global memory, and the copies that each thread makes of its own.
template <class T, Team team, bool kCopied, bool kLongUse>
struct Slice {
  static constexpr int kStages = team == Team::kWarp ? 2 : 4;       // of copies
  static constexpr int kTogether = kCopied ? 1 : kLongUse ? 2 : 4;  // loads under way at a time, without copies
  static constexpr int kThreads = Members<team>::kThreads;

  const T* row;
  unsigned char* copies;
  Vectors shape;
  int64_t first;  // among the row's vectors
  int count, stage_size;

  XENT_DEVICE Slice(const T* row, int64_t classes, unsigned char* copies, const Members<team>& members)
      : row(row), copies(copies), shape(Vectors::of(row, classes)) {
    first = shape.vectors * members.rank / members.blocks;
    count = int(shape.vectors * (members.rank + 1) / members.blocks - first);
    stage_size = (count + kStages * kThreads - 1) / (kStages * kThreads) * kThreads;
  }

  XENT_DEVICE int64_t class_of(int i) const { return shape.head + (first + i) * kPerVector<T>; }
  XENT_DEVICE int stage_end(int stage) const { return min((stage + 1) * stage_size, count); }

  // Copies the row and, if it is not null, a twin: a row that lies in memory as this one does. The copy of the twin's
  // class c is at (returned pointer)[c].
  XENT_DEVICE const T* start_copies(int thread, const T* twin, unsigned char* copies_of_twin) const {
#pragma unroll 1
    for (int stage = 0; stage < kStages; ++stage) {
      for (int i = stage * stage_size + thread; i < stage_end(stage); i += kThreads) {
        copy_async(copies + int64_t(i) * 16, row + class_of(i));
        if (twin) copy_async(copies_of_twin + int64_t(i) * 16, twin + class_of(i));
      }
      commit_copies();
    }
    return twin ? reinterpret_cast<const T*>(copies_of_twin) - class_of(0) : nullptr;
  }

  static XENT_DEVICE void wait_for(int stage) {
    switch (kStages - 1 - stage) {  // stages that may be under way
      case 3: wait_for_copies<3>(); break;
      case 2: wait_for_copies<2>(); break;
      case 1: wait_for_copies<1>(); break;
      default: wait_for_copies<0>();
    }
  }

  // Returns true where a class is in one of this thread's vectors; and that class's logit.
  XENT_DEVICE bool has(int64_t c, int thread) const {
    const int64_t element = c - class_of(0);
    return uint64_t(element) < uint64_t(int64_t(count) * kPerVector<T>) &&
           int(element / kPerVector<T>) % kThreads == thread;
  }
  XENT_DEVICE Arithmetic<T> logit_of(int64_t c) const {
    return widen<Arithmetic<T>>(kCopied ? reinterpret_cast<const T*>(copies)[c - class_of(0)] : row[c]);
  }

  // The largest logit of this thread's vectors in [begin, end).
  XENT_DEVICE Arithmetic<T> largest(int begin, int end, int thread) const {
    Arithmetic<T> lowest[kPerVector<T>];
#pragma unroll
    for (int j = 0; j < kPerVector<T>; ++j) lowest[j] = -INFINITY;
    uint4 all = narrow_vector<T>(lowest);
    for (int i = begin + thread; i < end; i += kThreads)
      all = max_vector<T>(all, load_vector(copies + int64_t(i) * 16));
    return largest_of<T>(all);
  }

  // Calls use(class, vector) for this thread's vectors in [begin, end).
  template <class Use>
  XENT_DEVICE void for_each(int begin, int end, int thread, const Use& use) const {
    for (int i = begin + thread; i < end; i += kThreads * kTogether) {
      uint4 raw[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        const int at = i + k * kThreads;
        if constexpr (kCopied) {
          raw[k] = load_vector(copies + int64_t(at) * 16);
        } else if (at < end) {
          raw[k] = load_vector(row + class_of(at));
        }
      }
      if constexpr (kLongUse) {  // `use` is too long to be unrolled
#pragma unroll 1
        for (int k = 0; k < kTogether && i + k * kThreads < end; ++k) use(class_of(i + k * kThreads), pick(raw, k));
      } else {
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          if (kTogether == 1 || i + k * kThreads < end) use(class_of(i + k * kThreads), raw[k]);
        }
      }
    }
  }
};

// A position of a target of every class.
template <class T>
struct TargetRow {
  using A = Arithmetic<T>;
  const Task& task;
  int64_t offset;
  const T* twin = nullptr;  // its elements or their copies, where they lie as the logits do: read as vectors

  XENT_DEVICE TargetRow(const Task& task, int64_t position, const T* row)
      : task(task), offset(offset_of(task, task.target, position)) {
    const T* const start = static_cast<const T*>(task.target.data) + offset;
    const bool alike = task.target.type == task.logits.type && task.target.class_stride == 1;
    if (alike && phase_of(start) == phase_of(row)) twin = start;
  }

  // Loads N classes from c on: one, or as many as a vector of the logits.
  template <int N>
  XENT_DEVICE void load(int64_t c, A (&q)[N]) const {
    if constexpr (N == kPerVector<T>) {
      if (twin) return widen_vector<T>(load_vector(twin + c), q);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) q[j] = read_number<A>(task.target, offset + (c + j) * task.target.class_stride);
  }
  XENT_DEVICE void load_part(int64_t c, int begin, A (&q)[kPerPart<T>]) const {
    if (twin) return widen_part<T>(load_vector(twin + c), begin, q);
#pragma unroll
    for (int j = 0; j < kPerPart<T>; ++j) {
      q[j] = read_number<A>(task.target, offset + (c + begin + j) * task.target.class_stride);
    }
  }
};

// The coefficients of a position's classes, a vector of neighbours at a time.
template <class T, Objective objective>
struct Coefficients {
  using A = Arithmetic<T>;
  struct Nothing {
    XENT_DEVICE Nothing(const Task&, int64_t, const T*) {}
  };
  const Task& task;
  std::conditional_t<objective == Objective::kProbabilities, TargetRow<T>, Nothing> target;

  XENT_DEVICE Coefficients(const Task& task, int64_t position, const T* row)
      : task(task), target(task, position, row) {}

  XENT_DEVICE A at(int64_t c) const {
    A q[1] = {A(0)};
    if constexpr (objective == Objective::kProbabilities) target.load(c, q);
    return coefficient<objective>(task, c, q[0]);
  }

  XENT_DEVICE void of_vector(int64_t c, A (&a)[kPerVector<T>]) const {
    if constexpr (objective == Objective::kProbabilities) {
      target.load(c, a);
#pragma unroll
      for (int j = 0; j < kPerVector<T>; ++j) a[j] = numbers<A>(task).keep * a[j] + numbers<A>(task).share;
    } else {
#pragma unroll
      for (int j = 0; j < kPerVector<T>; ++j) a[j] = numbers<A>(task).share;
    }
    if (task.weight == nullptr) return;
#pragma unroll
    for (int j = 0; j < kPerVector<T>; ++j) a[j] *= static_cast<const A*>(task.weight)[c + j];
  }
};

template <class T>
struct Coefficients<T, Objective::kGeneral> {
  using A = Arithmetic<T>;
  const Task& task;
  DenseTarget<A> dense;
  TargetRow<T> target;
  bool skipped = false;  // all are zero: a teacher's, in the first pass of a divergence

  XENT_DEVICE Coefficients(const Task& task, int64_t position, const T* row)
      : task(task), dense(task, position), target(task, position, row) {}

  // Calls use(transformed logits, their terms) for one class, or use(..., begin) for each part of a vector of
  // neighbours from class c on.
  template <class Use>
  XENT_DEVICE void for_class(int64_t c, A logit, const Use& use) const {
    A x[1] = {logit};
    Terms<A, 1> terms;
    if (is_dense(task.target_kind) && !skipped) target.load(c, terms.a);
    finish(c, x, terms);
    use(x, terms);
  }
  template <class Use>
  XENT_DEVICE void for_parts(int64_t c, uint4 raw, const Use& use) const {
#pragma unroll 1
    for (int begin = 0; begin < kPerVector<T>; begin += kPerPart<T>) {
      A x[kPerPart<T>];
      Terms<A, kPerPart<T>> terms;
      widen_part<T>(raw, begin, x);
      if (is_dense(task.target_kind) && !skipped) target.load_part(c, begin, terms.a);
      finish(c + begin, x, terms);
      use(x, terms, begin);
    }
  }

  // Calls use(logit, teacher's logit), not transformed, for each class of a vector of neighbours from c on.
  template <class Use>
  XENT_DEVICE void for_given(int64_t c, uint4 raw, const Use& use) const {
#pragma unroll 1
    for (int begin = 0; begin < kPerVector<T>; begin += kPerPart<T>) {
      A x[kPerPart<T>], z[kPerPart<T>];
      widen_part<T>(raw, begin, x);
      target.load_part(c, begin, z);
#pragma unroll 1
      for (int j = 0; j < kPerPart<T>; ++j) use(pick(x, j), pick(z, j));
    }
  }

  // Transforms logits, and turns the elements of a dense target in terms.a into coefficients.
  template <int N>
  XENT_DEVICE void finish(int64_t c, A (&x)[N], Terms<A, N>& terms) const {
    terms.first = c;
    terms.step = 1;
    const bool any = has_coefficients<A>(task) && !skipped;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (any) {
        dense.set(task, c + j, terms.a[j], terms.a[j], terms.log[j]);
      } else {
        terms.a[j] = terms.log[j] = A(0);
      }
    }
    transform<Objective::kGeneral>(task, x);
  }
};

// Writes the gradient of a position that is ignored, or has a bad target.
template <class T, Team team>
XENT_DEVICE void write_zeros(T* out, int64_t classes, const Members<team>& members) {
  const Vectors shape = Vectors::of(out, classes);
  for (int64_t i = members.index(); i < shape.vectors; i += members.count()) {
    stream_vector(out + shape.head + i * kPerVector<T>, {0, 0, 0, 0});
  }
  if (members.rank == 0 && members.thread < shape.edges) out[shape.edge(members.thread)] = T{};
}

template <class T, Objective objective, Team team, bool kCopied>
__global__ void __launch_bounds__(kBlockThreads<team>, rows_resident(sizeof(T), objective, team, kCopied))
    rows(const __grid_constant__ Task task) {
  using A = Arithmetic<T>;
  using Softmax = SoftmaxOf<objective, A, !kCopied>;
  using RowSlice = Slice<T, team, kCopied, objective == Objective::kGeneral>;
  constexpr int N = kPerVector<T>;
  constexpr bool kGeneral = objective == Objective::kGeneral;
  if (nothing_to_do(task)) return;
  let_next_kernel_begin();

  XENT_DYNAMIC_SHARED(shared);
  XENT_SHARED_ARRAY(Softmax, exchange, 2 * Members<team>::kWarps);
  const Members<team> members;
  unsigned char* const copies = shared + int64_t(threadIdx.x / members.kThreads) * task.division.copy_bytes;
  A scale_of_all = 0;
  const bool forward = task.pass != Pass::kBackward, backward = task.pass != Pass::kForward;
  Sums sums{0, 0};
  uint32_t round = 0;

  // A row is copied only if its label counts, so labels are read one row ahead.
  const auto label_at = [&](int64_t position) {
    return position < task.positions
               ? read_label<objective, kWarp>(task, offset_of(task, labels_of<objective>(task), position))
               : int64_t(kIgnored);
  };
  int64_t label, next_label = label_at(members.first);

  for (int64_t position = members.first; position < task.positions; position += members.step, ++round) {
    const T* const row = static_cast<const T*>(task.logits.data) + offset_of(task, task.logits, position);
    const int64_t target = offset_of(task, labels_of<objective>(task), position);
    label = next_label;
    const bool counts = is_counted(label);
    Coefficients<T, objective> coefficients(task, position, row);
    const RowSlice slice(row, task.classes, copies, members);
    const bool has_edge = counts && members.rank == 0 && members.thread < slice.shape.edges;
    const int64_t edge = slice.shape.edge(members.thread);

    A edge_logit[1] = {A(0)}, edge_coefficient[1] = {A(0)}, target_logit = 0;
    if constexpr (kCopied && (objective == Objective::kProbabilities || kGeneral)) {
      const T*& twin = coefficients.target.twin;
      const T* const to_copy = task.division.twin_target ? twin : nullptr;
      const T* const copied =
          counts ? slice.start_copies(members.thread, to_copy, copies + task.division.copy_bytes / 2) : nullptr;
      if (copied) twin = copied;
    } else if (kCopied && counts) {
      slice.start_copies(members.thread, nullptr, nullptr);
    }
    next_label = label_at(position + members.step);
    if (has_edge) {
      edge_logit[0] = widen<A>(row[edge]);
      if constexpr (!kGeneral) edge_coefficient[0] = coefficients.at(edge);
    }

    Softmax softmax = Softmax::of_nothing(task);
    const auto add_general = [&](const auto& x, const auto& terms, int = 0) { add_logits(task, x, terms, softmax); };
    ResultOf<objective, A> result;
    if (forward) {
      if constexpr (kGeneral) coefficients.skipped = task.kl;
      if (task.is_here(label) && members.leads()) target_logit = read_logit<objective>(task, row, label);
      if (counts) {
        for (int stage = 0; stage < RowSlice::kStages; ++stage) {
          const int begin = stage * slice.stage_size, end = slice.stage_end(stage);
          if constexpr (kCopied) slice.wait_for(stage);
          if constexpr (kCopied && !kGeneral) softmax.raise(slice.largest(begin, end, members.thread));
          slice.for_each(begin, end, members.thread, [&](int64_t c, uint4 raw) {
            if constexpr (kGeneral) {
              coefficients.for_parts(c, raw, add_general);
            } else {
              A x[N];
              widen_vector<T>(raw, x);
              const auto add = [&](const auto& a) {
                if constexpr (kCopied) {
                  softmax.add_up_to_max(x, a);
                } else {
                  softmax.add(x, a);
                }
              };
              if (is_uniform<objective>(task)) return add(numbers<A>(task).share);
              A a[N];
              coefficients.of_vector(c, a);
              add(a);
            }
          });
        }
      }
      if constexpr (kGeneral) {
        if (has_edge) coefficients.for_class(edge, edge_logit[0], add_general);
        if (counts) add_pairs(task, position, row, members.index(), members.count(), softmax);
      } else {
        if (has_edge) softmax.add(edge_logit, edge_coefficient);
      }
      members.join(task, softmax, exchange, kGeneral && task.kl ? 2 * round : round);
      result = ResultOf<objective, A>::of(task, softmax);
      if constexpr (kGeneral) {
        coefficients.skipped = false;
        if (task.kl) {
          const Divergence<A> divergence(task, coefficients.dense, result.max, result.log_sum);
          softmax = divergence.template of_nothing<Softmax>(task);
          const auto add = [&](A x, A z) { divergence.add(x, z, softmax); };
          if (counts) {
            slice.for_each(0, slice.count, members.thread,
                           [&](int64_t c, uint4 raw) { coefficients.for_given(c, raw, add); });
          }
          if (has_edge) {
            A z[1];
            coefficients.target.load(edge, z);
            add(edge_logit[0], z[0]);
          }
          members.join(task, softmax, exchange, 2 * round + 1);
          set_divergence(result, softmax);
        }
      }
      if (members.leads()) {
        finish_loss<objective>(task, Destination<A>::of(task, position, target), label, target_logit, result, sums);
        if constexpr (kGeneral) finish_statistics(task, position, label, row, target_logit, result);
      }
    } else {
      if constexpr (kCopied) wait_for_copies<0>();
      result = SavedResult<objective>::template at<A>(task, position);
      if (label == kBad && members.leads()) report_bad_target<objective>(task, position, target);
    }
    if (!backward) continue;

    if (round == 0) scale_of_all = gradient_scale<A>(task);
    T* const out = task.grad_logits
                       ? static_cast<T*>(task.grad_logits.data) + offset_of(task, task.grad_logits, position)
                       : nullptr;
    if (!counts) {
      if (!kGeneral || out) write_zeros(out, task.classes, members);
      if (kGeneral) write_target_zeros(task, position, members.index(), members.count());
      continue;
    }
    Gradient<objective, A> gradient;
    gradient.set(task, position, label, result, scale_of_all * grad_output_of<A>(task, position));
    const auto gradient_of = [&](int) -> const auto& { return gradient; };
    const bool aligned = phase_of(out) == phase_of(row);
    const int64_t grad_target = task.grad_target ? offset_of(task, task.grad_target, position) : 0;
    if constexpr (kGeneral) {
      slice.for_each(0, slice.count, members.thread, [&](int64_t c, uint4 raw) {
        uint4 narrowed{0, 0, 0, 0};
        coefficients.for_parts(c, raw, [&](const auto& x, const auto& terms, int begin) {
          A dx[kPerPart<T>];
          gradient.of_classes(task, grad_target, label, x, terms, dx);
          narrow_part<T>(dx, begin, narrowed);
          if (!out || aligned) return;
#pragma unroll
          for (int j = 0; j < kPerPart<T>; ++j) out[terms.class_of(j)] = narrow<T>(dx[j]);
        });
        if (out && aligned) stream_vector(out + c, narrowed);
      });
    } else {
      // The gradient of an index target's own class is made once, rather than looked for in each vector, and written by
      // the same thread after the vector.
      const bool has_own = objective != Objective::kProbabilities && slice.has(label, members.thread);
      const A own = has_own ? gradient.own(slice.logit_of(label)) : A(0);
      const auto write = [&](auto as_vectors) {
        slice.for_each(0, slice.count, members.thread, [&](int64_t c, uint4 raw) {
          A x[N], dx[N];
          widen_vector<T>(raw, x);
          if (objective == Objective::kProbabilities && task.grad_target) {
            for (int j = 0; j < N; ++j) {
              write_probability_gradient(task, grad_target, c + j, gradient.of_probability(x[j]));
            }
            if (!out) return;
          }
          gradients<objective>(task, gradient_of, x, [&](A(&a)[N]) { coefficients.of_vector(c, a); }, dx);
          if constexpr (decltype(as_vectors)::value) {
            stream_vector(out + c, narrow_vector<T>(dx));
          } else {
#pragma unroll
            for (int j = 0; j < N; ++j) out[c + j] = narrow<T>(dx[j]);
          }
        });
      };
      aligned ? write(std::true_type()) : write(std::false_type());
      if (has_own) out[label] = narrow<T>(own);
    }
    if (has_edge) {
      A dx[1];
      if constexpr (kGeneral) {
        coefficients.for_class(edge, edge_logit[0], [&](const auto& x, const auto& terms) {
          gradient.of_classes(task, grad_target, label, x, terms, dx);
        });
      } else {
        gradients<objective>(task, gradient_of, edge_logit, [&](A(&a)[1]) { a[0] = edge_coefficient[0]; }, dx);
        if (edge == label) dx[0] = gradient.own(edge_logit[0]);
        if (task.grad_target) {
          write_probability_gradient(task, grad_target, edge, gradient.of_probability(edge_logit[0]));
        }
      }
      if (out) out[edge] = narrow<T>(dx[0]);
    }
    if constexpr (kGeneral) {
      if (task.target_kind != TargetKind::kPairs) continue;
      members.barrier();  // the threads that have the pairs' classes have written them
      gradient.write_pairs(task, position, row, out, members.index(), members.count());
    }
  }
  if constexpr (team == Team::kCluster) cluster_barrier();  // others may still read this block's shared memory
  leave_sums(task, sums);
}

}  // namespace xent::gpu

// What every CPU operator does around its kernels: positions are shared out among threads, results find memory, bad
// targets become errors.
#pragma once

#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <limits>

#include "host/make_problem.h"
#include "kernels.h"

namespace xent {

// Those of the instruction set that torch chose.
const Kernels& kernels();

// ---- threads --------------------------------------------------------------------------------------------------------

// Positions are cut into pieces of a size that follows from the shape alone, so that the order in which sums are
// formed, and with it every bit of the result, is the same for any number of threads. `work`: how many elements a
// position costs.
inline int64_t positions_worth_a_piece(int64_t work) {
  constexpr int64_t kElements = 32768;
  return std::max<int64_t>(1, kElements / std::max<int64_t>(1, work));
}

inline int64_t piece_size(const Problem& problem, int64_t work) {
  const int64_t positions = positions_worth_a_piece(work);
  return problem.lanes == Lanes::kClasses ? positions : (positions + kTile - 1) / kTile * kTile;
}

inline int64_t count_of_pieces(const Problem& problem, int64_t work) {
  const int64_t size = piece_size(problem, work);
  return (problem.positions + size - 1) / size;
}

// Calls function(piece, begin, end) for every piece of `size` positions, on libtorch's own threads where there is
// enough to do.
template <bool backwards = false, class Function>
void for_each_piece_of(int64_t size, int64_t positions, int64_t work, const Function& function) {
  constexpr int64_t kElementsWorthAThread = 16384;
  const int64_t pieces = (positions + size - 1) / size;
  struct Context {
    const Function& function;
    int64_t size, positions;
  } context{function, size, positions};
  const auto run = [](int64_t first, int64_t last, void* opaque) {
    const auto& context = *static_cast<Context*>(opaque);
    for (int64_t k = first; k < last; ++k) {
      const int64_t piece = backwards ? first + last - 1 - k : k;
      const int64_t begin = piece * context.size;
      context.function(piece, begin, std::min(begin + context.size, context.positions));
    }
  };
  const int64_t grain = std::max<int64_t>(1, kElementsWorthAThread / std::max<int64_t>(1, size * work));
  if (pieces <= grain) {
    run(0, pieces, &context);
  } else {
    TORCH_CHECK(torch_parallel_for(0, pieces, grain, run, &context) == 0, "cross_entropy_ext: a thread failed");
  }
}

template <bool backwards = false, class Function>
void for_each_piece(const Problem& problem, int64_t work, const Function& function) {
  for_each_piece_of<backwards>(piece_size(problem, work), problem.positions, work, function);
}

using SumsOfPieces = c10::SmallVector<Sums, 4>;

Sums sum_pieces(const SumsOfPieces& pieces);

// ---- errors ---------------------------------------------------------------------------------------------------------

constexpr int64_t kNoPosition = std::numeric_limits<int64_t>::max();

// Of class indices, of a position's pairs, or of labels.
void raise_bad_target(const Inputs& in, const Options& options, int64_t position);

// ---- results --------------------------------------------------------------------------------------------------------

// Without the dispatcher's help, which would cost more than a small tensor. What is large comes from memory whose pages
// are there already.
at::Tensor new_tensor(at::IntArrayRef shape, at::ScalarType type);

// A tensor for the gradient of `tensor`, in its memory format.
at::Tensor empty_gradient(const at::Tensor& tensor);

bool is_larger_than_caches(const at::Tensor& tensor);

void store_scalar(const at::Tensor& scalar, double value);

}  // namespace xent

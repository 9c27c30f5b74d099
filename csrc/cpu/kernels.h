// The table of the kernels of one instruction set: the wall between torch and arithmetic.
#pragma once

#include "kernel/problem.h"

namespace xent {

// Rows are worked on in blocks of this many vectors. They stay in the first-level cache, and no lane adds up more than
// this many terms before the sum goes on in double.
constexpr int64_t kBlockVectors = 128;

// A tile has up to kTile positions, fewer where classes are many, and as many of their classes as fit kTileBytes, which
// share the first-level cache with the sums.
constexpr int64_t kTile = 256;
constexpr int64_t kLeastTile = 64;
constexpr int64_t kTileBytes = 40960;

// Returns how many classes fit in one block of a tile, for arithmetic in numbers of `size` bytes.
constexpr int64_t most_classes_of_tile(int64_t size) { return kTileBytes / kLeastTile / size; }

constexpr int64_t kShortRun = 8;  // fewer neighbours than this are not worth a vector of positions

// Each kernel works on the positions [begin, end), and adds up `sums` in their order.
struct Kernels {
  const char* instruction_set;
  int64_t vector_bytes;
  void (*forward)(const Forward&, int64_t begin, int64_t end, Sums& sums);
  void (*backward)(const Backward&, int64_t begin, int64_t end);
  void (*sum_weights)(const Problem&, int64_t begin, int64_t end, Sums& sums);

  // The negative log likelihood. The Problem's logits are log-probabilities.
  void (*nll_forward)(const Forward&, int64_t begin, int64_t end, Sums& sums);
  void (*nll_backward)(const Backward&, int64_t begin, int64_t end);

  // Add bfloat16 numbers to sums in float32, of which `upper` and `lower` are the halves; see halves.inl.
  void (*add_to_halves)(uint16_t* upper, uint16_t* lower, const uint16_t* products, int64_t count, bool first,
                        bool last);
  void (*add_scaled_to_halves)(uint16_t* upper, uint16_t* lower, const uint16_t* x, float factor, int64_t count);
};

// Returns the kernels for "AVX512" or "AVX2"; for any other name, those that every machine of this architecture runs.
const Kernels& kernels_for(const char* cpu_capability);

}  // namespace xent

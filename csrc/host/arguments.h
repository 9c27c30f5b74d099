// The arguments that the fused kernels take, decided once for all devices.
#pragma once

#include "inputs.h"

namespace xent {

// Raises an error for options out of range, and for tensors that native has no name for: pairs, teachers, sample
// weights, denominators. Native judges the others: it raises its own error, or accepts a corner that is not worth a
// kernel. So every message has one source.
void check(const Inputs& inputs, const Options& options);

// Returns true for the arguments of a loss that this package defines.
bool is_valid(const Inputs& inputs, const Options& options);

// Returns true for arguments that the fused kernels take: valid ones, on a device that this build has kernels for.
bool is_supported(const Inputs& inputs, const Options& options);

// Returns true if a number requires a gradient that the composite alone has: any number but logit_scale, and a
// logit_scale of zero.
bool numbers_need_composite(const Options& options);

Options with_loss_type(const Inputs& inputs, const Options& options);

// Under autocast, half logits are read as they are, for a loss in float32 with class weights in float32; a layer is
// computed in autocast's type.
std::pair<Inputs, Options> with_autocast(const Inputs& inputs, const Options& options);

// Rows of the tensor that a forward saves for the backward, see saved::Row.
int64_t saved_rows(TargetKind target_kind, const Options& options);

}  // namespace xent

// The CPU's operators, for callers in C++. Their contracts are in ../cross_entropy.h and ../nll_loss.h.
#pragma once

#include "host/cross_entropy.h"
#include "nll/nll_loss.h"

namespace xent {
namespace cpu {

ForwardResult forward(const Inputs& inputs, const Options& options);
ForwardBackwardResult forward_backward(const Inputs& inputs, const Options& options);
BackwardResult backward(const Gradients& gradients, const Inputs& inputs, const Options& options,
                        std::array<bool, 2> wanted);

}  // namespace cpu

namespace nll::cpu {

ForwardResult forward(XENT_NLL_INPUTS, XENT_NLL_OPTIONS, at::ScalarType loss_dtype);

}  // namespace nll::cpu
}  // namespace xent

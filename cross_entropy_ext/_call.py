"""Calls the operators with plain tensors.

There are four ways: directly, past the dispatcher's parser, which takes longer than a small loss; through it, if a
compiler or a mode is to see the call; for proxies of torch.fx, by recording the call; and for tensor subclasses, as a
composition of ATen operations that the subclass handles one by one.
"""

from __future__ import annotations

import operator
import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ._extension import load
from ._options import (
    EMPTY,
    OF_NUMBERS,
    REDUCTIONS,
    CrossEntropyStats,
    Options,
    Tensors,
    as_list,
    check_loss_dtype,
    has_extras,
    is_default,
    is_known,
    is_tensor,
    named,
    packed,
    packed_numbers,
)

_C = load()
_ops = torch.ops.cross_entropy_ext
_native_cross_entropy = F.cross_entropy
_native_nll_loss = F.nll_loss

is_dynamo_compiling = torch.compiler.is_dynamo_compiling
is_mode_enabled = torch._C._is_torch_function_mode_enabled

# The operators as functions of the compiled module.
direct_cross_entropy = _C.cross_entropy
direct_loss_with_numbers = _C.loss_with_numbers
direct_nll_loss = _C.nll_loss

# The types that the operators understand: plain tensors, and those that compilers trace with.
PLAIN = frozenset({Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor})


def is_dtensor(tensor: Tensor) -> bool:
    """Returns True for a DTensor. There is none before its module was imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def has_subclass(*tensors: Tensor | None) -> bool:
    """Returns True if a tensor is one that the operators do not understand."""
    return any(isinstance(tensor, Tensor) and type(tensor) not in PLAIN for tensor in tensors)


def takes_directly(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int) -> bool:
    """Returns True if a function of the compiled module takes these arguments, and no compiler or mode is to see it."""
    return (
        type(input) in PLAIN
        and type(target) in PLAIN
        and (weight is None or type(weight) in PLAIN)
        and reduction in ("mean", "sum", "none")
        and type(ignore_index) is int
        and -(2**63) <= ignore_index < 2**63
        and not is_dynamo_compiling()
        and not is_mode_enabled()
    )


def loss(tensors: Tensors, options: Options) -> Tensor | CrossEntropyStats:
    """Returns the loss, or with ``options.statistics`` all of CrossEntropyStats."""
    if options.statistics:
        return _as_stats(_call_operator(tensors, options))
    input, target, weight, _, sample_weight, denominator = tensors
    if options.kind is not None or sample_weight is not None or denominator is not None or has_extras(options):
        return _call_operator(tensors, options)
    if not (
        type(input) in PLAIN
        and type(target) in PLAIN
        and (weight is None or type(weight) in PLAIN)
        and options.reduction in ("mean", "sum", "none")
        and type(options.ignore_index) is int
        and -(2**63) <= options.ignore_index < 2**63
        and type(options.label_smoothing) is float
        and options.empty in EMPTY
    ):
        return _slow_path(tensors, options)
    check_loss_dtype(options.loss_dtype)
    label_smoothing = options.label_smoothing
    if not is_known(label_smoothing):
        if not is_default(label_smoothing, 0.0):
            return _call_operator(tensors, options)
        label_smoothing = 0.0
    named = {
        "loss_dtype": options.loss_dtype,
        "empty_is_zero": options.empty == "zero",
        "inplace": options.inplace,
    }
    numbers = REDUCTIONS[options.reduction], options.ignore_index, label_smoothing
    if weight is None:
        return _ops.cross_entropy.default(input, target, *numbers, **named)
    return _ops.cross_entropy.weight(input, target, weight, *numbers, **named)


def linear_loss(
    layer: tuple[Tensor, Tensor, Tensor | None], tensors: Tensors, options: Options, chunk: int
) -> Tensor | CrossEntropyStats:
    """Returns the loss of a layer (input, weight, bias), whose flat input is ``tensors.input``, too."""
    proxies = [tensor for tensor in (*layer, *tensors) if type(tensor) not in PLAIN and is_tensor(tensor)]
    if proxies or is_dynamo_compiling() or is_mode_enabled():
        input, linear_weight, bias = layer
        arguments = named(tensors, options)
        if bias is not None:
            arguments["linear_bias"] = bias
        if chunk:
            arguments["chunk"] = chunk
        name = "linear_cross_entropy_with_stats" if options.statistics else "linear_cross_entropy"
        results = _record(name, (input, linear_weight, tensors.target), arguments, proxies)
    else:
        _, target, *others = packed(tensors, options)
        results = _C.linear_loss(*layer, target, *others, chunk)
        results = results if options.statistics else results[0]
    return _as_stats(results) if options.statistics else results


def nll_loss(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    """Returns the negative log likelihood of arguments of any types."""
    tensors = (input, target) if weight is None else (input, target, weight)
    if is_dtensor(input) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        if isinstance(target, Tensor) and target.dtype in (torch.int8, torch.int16, torch.int32, torch.uint8):
            target = target.long()
        return _native_nll_loss(input, target, weight, None, ignore_index, None, reduction)
    if not (reduction in ("mean", "sum", "none") and type(ignore_index) is int and -(2**63) <= ignore_index < 2**63):
        _native_nll_loss(torch.zeros(1, 1), torch.zeros(1).long(), None, None, ignore_index, None, reduction)
    reduction, ignore_index = F._Reduction.get_enum(reduction), operator.index(ignore_index)
    if has_subclass(*tensors):
        return _ops._composite_nll_loss.default(input, target, as_list(weight), reduction, ignore_index)
    overload = _ops.nll_loss.default if weight is None else _ops.nll_loss.weight
    return overload(*tensors, reduction, ignore_index)


def _slow_path(tensors: Tensors, options: Options) -> Tensor:
    """Returns a loss that PyTorch has, too, for types that the operator's parser would refuse or misread."""
    input, target, weight, *_ = tensors
    if all(isinstance(tensor, Tensor) for tensor in (tensors[:2] if weight is None else tensors[:3])):
        return _call_operator(tensors, _judged(options))
    if options.loss_dtype is None and options.empty == "nan":
        # Raises PyTorch's own TypeError, or for a proxy of torch.fx records the native function.
        ignore_index, reduction = options.ignore_index, options.reduction
        return _native_cross_entropy(
            input, target, weight, None, ignore_index, None, reduction, options.label_smoothing
        )
    return _call_operator(tensors, options)


def _judged(options: Options) -> Options:
    """Has PyTorch's own parser judge the options that it knows, and converts what it accepts."""
    label_smoothing, reduction = options.label_smoothing, options.reduction
    is_scalar = isinstance(label_smoothing, Tensor) and label_smoothing.dim() == 0
    known = 0.0 if is_scalar else label_smoothing
    _native_cross_entropy(
        torch.zeros(1, 1), torch.zeros(1).long(), None, None, options.ignore_index, None, reduction, known
    )
    return options._replace(
        label_smoothing=label_smoothing if is_scalar else float(label_smoothing),
        reduction="mean" if reduction == "elementwise_mean" else reduction,
    )


def _call_operator(tensors: Tensors, options: Options):
    """Calls the operator of all options, or for tensor subclasses the composition of ATen operations."""
    others = [one for one in tensors if one is not None and type(one) not in PLAIN and is_tensor(one)]
    others += [number for number in options[OF_NUMBERS] if type(number) not in PLAIN and isinstance(number, Tensor)]
    if any(isinstance(tensor, Tensor) for tensor in others):
        results = _ops._composite.default(*packed(tensors, options))
    elif others or is_dynamo_compiling() or is_mode_enabled():
        name = "cross_entropy_with_stats" if options.statistics else "general_cross_entropy"
        return _record(name, tensors[:2], named(tensors, options), others)
    else:
        function = _C.loss_with_stats if options.statistics else _C.loss
        return function(*packed(tensors, options))
    return results if options.statistics else results[0]


def _record(name: str, tensors: tuple, arguments: dict, proxies: list):
    """Calls an operator through its parser, where a compiler or a mode sees it. Proxies of torch.fx record the call."""
    op = getattr(_ops, name).default
    if proxies:
        return torch.overrides.handle_torch_function(op, proxies, *tensors, **arguments)
    return op(*tensors, **arguments)


def _as_stats(results) -> CrossEntropyStats:
    """Returns the results of an operator by name. A proxy has no length."""
    return CrossEntropyStats(*(results[i] for i in range(len(CrossEntropyStats._fields))))


# ---- the kernels of a shard of the classes --------------------------------------------------------------------------
# `shard` has `begin`, its first class, and `total`, the number of all classes. Options are plain numbers. `layer` is
# (input, weight, bias), `found` the rows and the denominator of the forward.


def shard_forward(logits, target, weight, options: Options, shard) -> tuple[Tensor, Tensor, Tensor]:
    """Returns losses, the rows that are saved, and the denominator."""
    return _ops._forward.default(logits, target, as_list(weight), *packed_numbers(options, shard))


def shard_backward(grads, inputs, found, options: Options, shard, wanted: list[bool]) -> list[Tensor]:
    """Returns the gradients of logits and probabilities for those of the loss and, if there are any, of statistics."""
    grad_output, grad_statistics = grads
    logits, target, weight, sample_weight = inputs
    if grad_statistics is None:
        grad_statistics = found[1]  # any scalar
    inputs = logits, target, as_list(weight, None, sample_weight)
    lists = packed_numbers(options, shard)
    return _ops._backward.default(grad_output, grad_statistics, *inputs, *found, *lists, wanted)


def shard_linear_forward(layer, target, weight, options: Options, shard, chunk) -> tuple[Tensor, Tensor, Tensor]:
    """As shard_forward, for the logits that a layer makes."""
    input, linear_weight, linear_bias = layer
    inputs = input, linear_weight, as_list(linear_bias), target, as_list(weight)
    return _ops._linear_forward.default(*inputs, *packed_numbers(options, shard), chunk)


def shard_linear_backward(grad_output, layer, others, found, options: Options, shard, chunk, wanted) -> list[Tensor]:
    """Returns the gradients of input, weight, bias and probabilities. The others: target, weight, sample_weight."""
    input, linear_weight, linear_bias = layer
    target, weight, sample_weight = others
    inputs = input, linear_weight, as_list(linear_bias), target, as_list(weight, None, sample_weight)
    lists = packed_numbers(options._replace(statistics=False), shard)
    return _ops._linear_backward.default(grad_output, found[1], *inputs, *found, *lists, chunk, wanted)

"""The loss as functions: torch.nn.functional's signatures and values, computed by the fused kernels."""

from __future__ import annotations

import operator
import warnings
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

# Under a name of this module, so that it stays native's while patch_torch() is in effect.
from torch.nn.functional import cross_entropy as native_cross_entropy

from ._extension import load

_call = load().cross_entropy
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_torch_function_mode_enabled = torch._C._is_torch_function_mode_enabled

__all__ = ["cross_entropy"]

_cross_entropy = torch.ops.cross_entropy_ext.cross_entropy.default

# What the operators understand: plain tensors and those that compilers trace with. Any other subclass means something
# of its own by an operation, and gets the native one to express it in.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor})
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_EMPTY = ("nan", "zero")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    loss_dtype: torch.dtype | None = None,
    empty: Literal["nan", "zero"] = "nan",
    inplace: bool = False,
) -> Tensor:
    r"""Cross entropy between logits and target: :func:`torch.nn.functional.cross_entropy` in one pass.

    With coefficients :math:`a_c` made from the target, the loss of one position is
    :math:`\sum_c a_c (\mathrm{lse}(x) - x_c)`: for a class index :math:`y`,
    :math:`a_c = (1 - \varepsilon) w_y [c = y] + \frac{\varepsilon}{C} w_c`; for probabilities :math:`q`,
    :math:`a_c = w_c ((1 - \varepsilon) q_c + \frac{\varepsilon}{C})`. The reduction ``'mean'`` divides by the sum of
    :math:`w_y` over the positions that are not ignored, or for probabilities by the number of positions.

    Args:
        input: logits of shape (C), (N, C) or (N, C, d1, ..., dK), in float16, bfloat16, float32 or float64 and with any
            strides, which are read as they are. The gradient has the input's memory format.
        target: class indices of shape (), (N) or (N, d1, ..., dK) in int64, int32, int16, int8 or uint8; or
            probabilities of the input's shape in any floating dtype, which may require a gradient.
        weight: one factor per class, of shape (C).
        size_average, reduce: deprecated, as in PyTorch; see ``reduction``.
        ignore_index: target value whose positions add nothing to the loss, are not counted by ``'mean'`` and have a
            gradient of zero; their logits are not used, so they may be NaN. Class indices only.
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.
        label_smoothing: :math:`\varepsilon` in [0, 1], the share of the target that is spread evenly over the classes.
        loss_dtype: dtype of the result. Default: the input's, promoted with probabilities and their weights; float32
            for half logits under autocast. Sums are formed in float32 or better whatever it is.
        empty: what a mean over nothing (0 / 0) is: ``'nan'``, as in PyTorch, or ``'zero'``.
        inplace: let the gradient take the logits' storage in the backward, which then needs no memory of its own. The
            logits are intact until then; autograd raises an error for whatever would use them afterwards. Without
            effect where it cannot be done (expanded logits, ``create_graph=True``, under ``torch.compile``).

    Returns:
        A scalar, or for ``reduction='none'`` a tensor of shape (), (N) or (N, d1, ..., dK).

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``.
        RuntimeError, ValueError, TypeError: as PyTorch's own function, with its messages.
    """
    if size_average is not None or reduce is not None:
        reduction = _legacy_reduction(size_average, reduce)
    if not (
        type(input) in _PLAIN
        and type(target) in _PLAIN
        and (weight is None or type(weight) in _PLAIN)
        and reduction in ("mean", "sum", "none")
        and type(ignore_index) is int
        and -(2**63) <= ignore_index < 2**63
        and type(label_smoothing) is float
        and empty in _EMPTY
    ):
        return _unusual(input, target, weight, ignore_index, reduction, label_smoothing, loss_dtype, empty, inplace)
    common = loss_dtype is None and empty == "nan" and not inplace
    if common and not _is_dynamo_compiling() and not _is_torch_function_mode_enabled():
        # The operator without its general parser, which takes longer than a small loss, where no compiler and no mode
        # is to see it.
        return _call(input, target, weight, _REDUCTIONS[reduction], ignore_index, label_smoothing)
    return _cross_entropy(
        input,
        target,
        weight,
        _REDUCTIONS[reduction],
        ignore_index,
        label_smoothing,
        loss_dtype=loss_dtype,
        empty_is_zero=empty == "zero",
        inplace=inplace,
    )


def _legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """What the deprecated arguments, of which one is not None, mean."""
    reduction = "mean"
    if reduce is not None and not reduce:
        reduction = "none"
    elif size_average is not None and not size_average:
        reduction = "sum"
    if torch.compiler.is_compiling():  # which cannot trace a warning
        return reduction
    warnings.warn(
        f"size_average and reduce args will be deprecated, please use reduction='{reduction}' instead.",
        stacklevel=3,
    )
    return reduction


def _unusual(input, target, weight, ignore_index, reduction, label_smoothing, loss_dtype, empty, inplace) -> Tensor:
    """What the operator's own parser would refuse or misread: other types of arguments, and tensor subclasses."""
    if empty not in _EMPTY:
        raise ValueError(f"empty must be 'nan' or 'zero', but got {empty!r}")
    tensors = [input, target] if weight is None else [input, target, weight]
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        # Raises PyTorch's own TypeError, or for a proxy of torch.fx records the native function.
        if loss_dtype is not None or empty != "nan":
            return _native(input, target, weight, ignore_index, reduction, label_smoothing, loss_dtype, empty == "zero")
        return native_cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    if not all(type(tensor) in _PLAIN for tensor in tensors):
        return _native(input, target, weight, ignore_index, reduction, label_smoothing, loss_dtype, empty == "zero")
    # PyTorch's own parser judges the other arguments; what it accepts (numbers of other types) is then converted.
    native_cross_entropy(
        torch.zeros(1, 1), torch.zeros(1).long(), None, None, ignore_index, None, reduction, label_smoothing
    )
    if reduction == "elementwise_mean":
        reduction = "mean"
    return cross_entropy(
        input,
        target,
        weight,
        None,
        operator.index(ignore_index),
        None,
        reduction,
        float(label_smoothing),
        loss_dtype=loss_dtype,
        empty=empty,
        inplace=inplace,
    )


def _native(input, target, weight, ignore_index, reduction, label_smoothing, loss_dtype, empty_is_zero) -> Tensor:
    """The composite of PyTorch's own operations, with what this package adds to it."""
    if not label_smoothing >= 0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    indices = input.shape != target.shape
    if indices and target.dtype in (torch.int8, torch.int16, torch.int32, torch.uint8):
        target = target.long()
    if loss_dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise RuntimeError(f"loss_dtype must be float16, bfloat16, float32 or float64. Got: {loss_dtype}")
    if empty_is_zero and reduction == "mean":  # 0 / 0 is to be 0, for the gradient too: divide by one there
        total = native_cross_entropy(input, target, weight, None, ignore_index, None, "sum", label_smoothing)
        if indices:
            valid = target != ignore_index
            counts = valid.double() if weight is None else weight.double()[torch.where(valid, target, 0)]
            denominator = torch.where(valid, counts, 0).sum()
        else:
            denominator = torch.as_tensor(target[:, 0].numel() if target.dim() > 1 else 1)
        loss = total / torch.where((denominator == 0) & (total == 0), 1, denominator)
        loss = loss.to(total.dtype)
    else:
        loss = native_cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    return loss if loss_dtype is None else loss.to(loss_dtype)

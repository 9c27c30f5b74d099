"""The output layer and its loss in one: the logits, the largest tensor of a language model's step, are never whole."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .losses import (
    _PLAIN,
    CrossEntropyStats,
    _arguments,
    _as_list,
    _is_dtensor,
    call_operator,
    check_tensors,
    cross_entropy,
    cross_entropy_with_stats,
    is_tensor,
    sparse_cross_entropy,
)

__all__ = [
    "LinearCrossEntropyOptions",
    "linear_cross_entropy",
    "linear_cross_entropy_with_stats",
    "linear_sparse_cross_entropy",
]

if hasattr(nn, "LinearCrossEntropyOptions"):
    LinearCrossEntropyOptions = nn.LinearCrossEntropyOptions
else:

    @dataclasses.dataclass(frozen=True)
    class LinearCrossEntropyOptions:
        """The fields of :class:`torch.nn.LinearCrossEntropyOptions`, for a torch that does not have it.

        Of these, ``batch_chunk_size`` and ``chunking_method`` say how many positions a chunk has. Gradients are always
        summed in float32 or better, and a second backward is always possible.
        """

        allow_retain_graph: bool = False
        batch_chunk_size: int | None = None
        chunking_method: str | None = "auto"
        acc_policy: str = "auto"
        acc_dtype: torch.dtype | None = None

        def __post_init__(self) -> None:
            method, size = self.chunking_method, self.batch_chunk_size
            if self.acc_policy not in ("accurate", "balanced", "compact", "auto"):
                raise ValueError(f"invalid acc_policy: {self.acc_policy!r}")
            if method not in (None, "auto"):
                name, _, factor = method.partition(":")
                if name != "aspect_ratio" or (":" in method and not (factor.isdigit() and int(factor) > 0)):
                    raise ValueError(f"invalid chunking_method: {method!r}")
            if size is not None and not (isinstance(size, int) and size > 0):
                raise ValueError(f"batch_chunk_size must be positive int or None, got {size!r}")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    loss_dtype: torch.dtype | None = None,
    empty: Literal["nan", "zero"] = "nan",
    denominator: float | Tensor | None = None,
) -> Tensor:
    r"""Cross entropy of ``linear(input, linear_weight, linear_bias)``, whose logits are never whole.

    :func:`torch.nn.functional.linear_cross_entropy` with the arguments of :func:`cross_entropy` besides. Some hundreds
    of positions at a time (on a GPU thousands), the logits are multiplied out, their gradient takes their place, and
    what it contributes to the gradients of input, weight and bias is added to these: in float32 where they are of half
    precision. So a training step takes the layer's three matrix products and, besides its gradients, the memory of a
    chunk. With ``reduction='none'``, and for whatever needs more than the gradients of the layer (probabilities that
    require one, ``create_graph=True``), the backward makes the logits again; so it does in float16, whose gradients
    are not made before their scale is known. Derivatives of derivatives, torch.func and forward mode have all the
    logits, as any composition of linear and cross entropy.

    Args:
        input: (F), (N, F), or (B, ..., F) with more dimensions of positions; floating.
        linear_weight: (C, F), or (C, d1, ..., dK, F) with an input (N, F), for logits (N, C, d1, ..., dK). If it is a
            DTensor, the input has to be one.
        target: class indices of shape (), (N), (B, ...) or (N, d1, ..., dK), of any integer dtype; or probabilities of
            the shape of the logits, (C), (N, C), (B, ..., C) or (N, C, d1, ..., dK).
        linear_bias: (C), or (C, d1, ..., dK).
        weight: one factor per class, (C).
        ignore_index: as for :func:`cross_entropy`, but for class indices alone, for which None is -100.
        options: ``batch_chunk_size`` and ``chunking_method`` choose the size of a chunk; None and ``'auto'`` leave it
            to the shapes. The other fields are of PyTorch's own implementation and without effect.
        sample_weight: a factor for each position, of the shape of class indices.
        reduction, label_smoothing, z_loss, softcap, logit_scale, loss_dtype, empty, denominator: as for
            :func:`cross_entropy`. There is no ``dim``: the classes come after the input's positions.

    Returns:
        A scalar, or for ``reduction='none'`` a loss for each position: (), (N), (B, ...) or (N, d1, ..., dK). In the
        input's dtype, or float32 under autocast, which multiplies in half precision.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``.
        RuntimeError, ValueError, TypeError: as PyTorch's function and :func:`cross_entropy`.
    """
    layer = _Layer(input, linear_weight, linear_bias, target, options)
    if layer.probabilities and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    return layer.call(
        "linear_cross_entropy",
        cross_entropy,
        (target, weight, None, sample_weight, denominator),
        reduction=reduction,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        loss_dtype=loss_dtype,
        empty=empty,
    )


def linear_cross_entropy_with_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    loss_dtype: torch.dtype | None = None,
    empty: Literal["nan", "zero"] = "nan",
    denominator: float | Tensor | None = None,
) -> CrossEntropyStats:
    r""":func:`linear_cross_entropy`, and what :func:`cross_entropy_with_stats` finds out of each position besides.

    ``lse``, ``target_log_prob`` and ``entropy`` are differentiable. The backward makes the logits again.

    Raises:
        As :func:`linear_cross_entropy`.
    """
    layer = _Layer(input, linear_weight, linear_bias, target, options)
    if layer.probabilities and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    return layer.call(
        "linear_cross_entropy_with_stats",
        cross_entropy_with_stats,
        (target, weight, None, sample_weight, denominator),
        reduction=reduction,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        loss_dtype=loss_dtype,
        empty=empty,
        statistics=True,
    )


def linear_sparse_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    indices: Tensor,
    probs: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    loss_dtype: torch.dtype | None = None,
    empty: Literal["nan", "zero"] = "nan",
    denominator: float | Tensor | None = None,
) -> Tensor:
    r""":func:`linear_cross_entropy` against pairs of classes and probabilities, as :func:`sparse_cross_entropy`.

    Args:
        indices, probs: k classes for each position and their probabilities: (k), (N, k), (B, ..., k) or
            (N, k, d1, ..., dK).

    Returns, Raises:
        As :func:`linear_cross_entropy` and :func:`sparse_cross_entropy`.
    """
    layer = _Layer(input, linear_weight, linear_bias, None, options)
    return layer.call(
        "linear_cross_entropy",
        sparse_cross_entropy,
        (indices, weight, probs, sample_weight, denominator),
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        loss_dtype=loss_dtype,
        empty=empty,
        form="pairs",
    )


def size_of_chunk(options: LinearCrossEntropyOptions | None, positions: int, classes: int, features: int) -> int:
    """What the options say of it, in positions; 0 where it is left to the operator."""
    if options is None:
        return 0
    if not isinstance(options, LinearCrossEntropyOptions):
        raise TypeError(f"options must be None or LinearCrossEntropyOptions, but got {options!r}")
    method, size = options.chunking_method, options.batch_chunk_size
    if method is None:
        return size or positions
    if method == "auto":
        return size or 0
    factor, ratio = int(method.partition(":")[2] or 1), -(-classes // max(1, features))
    power = 1 << max(0, -(-positions // max(1, ratio)) - 1).bit_length()
    chosen = max(1, min(power // factor, positions))
    if size is not None and size != chosen:
        raise ValueError(
            f"batch_chunk_size (={size}) and chunking_method ('{method}') give different chunk sizes "
            f"({size} vs {chosen}); pass only one."
        )
    return chosen


def _check_types(input, linear_weight, linear_bias, target) -> None:
    if isinstance(linear_weight, nn.Module):
        raise TypeError(f"linear_weight must be a tensor, as the layer's weight is, but got {linear_weight!r}")
    optional = {"linear_bias": linear_bias, "target": target}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    check_tensors(input=input, linear_weight=linear_weight, **given)


class _Layer:
    """What the logits are made of, checked as PyTorch's function checks it."""

    def __init__(self, input, linear_weight, linear_bias, target, options) -> None:
        optional = [tensor for tensor in (linear_bias, target) if tensor is not None]
        if not all(isinstance(tensor, Tensor) for tensor in (input, linear_weight, *optional)):
            _check_types(input, linear_weight, linear_bias, target)
        if input.dim() < 1 or (input.dim() > 2 and linear_weight.dim() > 2):
            raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
        if linear_weight.dim() < 2:
            raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
        if input.shape[-1] != linear_weight.shape[-1]:
            raise RuntimeError(
                "expected equal input and linear_weight last dimensions (in_features), "
                f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
            )
        self.input, self.weight, self.bias = input, linear_weight, linear_bias
        self.batch = input.shape[:-1]
        self.classes, *self.inner = linear_weight.shape[:-1]
        if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
            raise RuntimeError(
                f"expected linear_bias shape {(self.classes, *self.inner)}, got {tuple(linear_bias.shape)}"
            )
        if self.inner and not self.batch:
            raise RuntimeError(
                f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires"
                f" batched input, (N, {input.shape[-1]}), got unbatched input with shape {tuple(input.shape)}"
            )
        shape = (*self.batch, self.classes, *self.inner)
        self.probabilities = target is not None and tuple(target.shape) == shape
        self.options = options
        self.chunk = size_of_chunk(options, math.prod(self.batch), self.classes, input.shape[-1])

    def flat(self, tensor: Tensor | None, axes: int) -> Tensor | None:
        """A tensor of positions, with `axes` dimensions after those, as one of (N, ...)."""
        if not isinstance(tensor, Tensor) or len(self.batch) == 1:
            return tensor
        if not self.batch:
            return tensor.unsqueeze(0)
        if tensor.shape[: len(self.batch)] != self.batch or tensor.dim() != len(self.batch) + axes:
            raise ValueError(
                f"expected a tensor whose shape begins with that of the positions, {tuple(self.batch)}, "
                f"and has {axes} more dimensions, but got the shape {tuple(tensor.shape)}"
            )
        return tensor.flatten(0, -1 - axes)

    def call(self, name, composition, tensors, **options):
        """The operator, with everything flat. For tensors of another kind, what `composition` makes of the logits."""
        target, weight, companion, sample_weight, denominator = tensors
        input = self.flat(self.input, 1)
        dense = self.probabilities or companion is not None
        if not self.batch and not dense and target.dim() == 1:  # one label in a list is one, too
            if target.numel() != 1:
                raise ValueError(f"For 1D input, 1D target must have size 1, but got target size: {target.numel()}")
            target = target.squeeze(0)
        target, companion = self.flat(target, int(dense)), self.flat(companion, 1)
        sample_weight = self.flat(sample_weight, 0)
        named = (input, target, weight, companion, sample_weight, denominator)
        others = [tensor for tensor in (self.weight, self.bias, *named) if type(tensor) not in _PLAIN]
        if not any(isinstance(tensor, Tensor) for tensor in others):
            arguments, integers, values = _arguments(named, **options)
            layer, optional = (input, self.weight, _as_list(self.bias)), _as_list(*arguments[2:])
            arguments = (*layer, arguments[1], optional, integers, values, self.chunk)
            return self.unflat(call_operator(name, *arguments, proxies=[one for one in others if is_tensor(one)]))
        matrix, bias = self.weight, self.bias
        if _is_dtensor(matrix):
            from .._parallel import dtensor

            if not _is_dtensor(input):
                raise RuntimeError(
                    "got mixed torch.Tensor and DTensor: linear_weight is a DTensor with placements "
                    f"{tuple(matrix.placements)}, and input is a plain tensor, which may be another on every rank. "
                    "Under FSDP, compute the loss in the forward of the module that owns the weight, where it is whole "
                    "(cross_entropy_ext.LinearCrossEntropyLoss is such a module). Under tensor parallelism, hand the "
                    "input as a DTensor: DTensor.from_local(input, linear_weight.device_mesh, [Replicate()]) if it is "
                    "the same on every rank"
                )
            if name == "linear_cross_entropy" and companion is None and not self.inner:
                arguments = {"weight": weight, "sample_weight": sample_weight, "denominator": denominator, **options}
                loss = dtensor.linear_loss(input, matrix, target, linear_bias=bias, options=self.options, **arguments)
                if loss is not None:
                    return self.unflat(loss)
            bias = dtensor.on_mesh(bias, matrix)
        if self.inner:
            matrix, bias = matrix.flatten(0, -2), None if bias is None else bias.flatten()
        logits = F.linear(input, matrix, bias)
        if self.inner:
            logits = logits.unflatten(1, (self.classes, *self.inner))
        for name in ("form", "statistics"):
            options.pop(name, None)
        targets = (target,) if companion is None else (target, companion)
        result = composition(logits, *targets, weight, sample_weight=sample_weight, denominator=denominator, **options)
        return self.unflat(result)

    def unflat(self, result):
        if isinstance(result, Tensor):
            return result if len(self.batch) == 1 or result.dim() == 0 else result.reshape((*self.batch, *self.inner))
        return CrossEntropyStats(*(self.unflat(tensor) for tensor in result))

"""An output layer and its loss in one: the logits, the largest tensor of a language model's step, are never whole."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _call
from .._call import has_subclass, is_dtensor
from .._options import CrossEntropyStats, LinearCrossEntropyOptions, Options, Tensors, check_tensors, size_of_chunk
from .losses import loss_of


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
    its contributions to the gradients of input, weight and bias are added up, in float32 if these are of half
    precision. So a training step takes the layer's three matrix products and, besides its gradients, the memory of a
    chunk. The backward makes the logits again with ``reduction='none'``, if more than the gradients of the layer is
    needed (probabilities that require one, ``create_graph=True``), and in float16, whose gradients are not made before
    their scale is known. Second derivatives, torch.func and forward mode have all the logits, as any composition of
    linear and cross entropy.

    Args:
        input: (F), (N, F), or (B, ..., F) with more dimensions of positions; floating.
        linear_weight: (C, F), or (C, d1, ..., dK, F) with an input (N, F), for logits (N, C, d1, ..., dK). If it is a
            DTensor, the input has to be one.
        target: class indices of shape (), (N), (B, ...) or (N, d1, ..., dK), of any integer dtype; or probabilities of
            the shape of the logits, (C), (N, C), (B, ..., C) or (N, C, d1, ..., dK).
        linear_bias: (C), or (C, d1, ..., dK).
        weight: one factor per class, (C).
        ignore_index: as for :func:`cross_entropy`, for class indices alone; None is -100.
        options: ``batch_chunk_size`` and ``chunking_method`` choose the size of a chunk; None and ``'auto'`` leave it
            to the shapes. The other fields are of PyTorch's own implementation and without effect.
        sample_weight: a factor for each position, of the shape of class indices.
        others: as for :func:`cross_entropy`. There is no ``dim``: the classes come after the input's positions.

    Returns:
        A scalar, or for ``reduction='none'`` a loss for each position: (), (N), (B, ...) or (N, d1, ..., dK). In the
        input's dtype, or float32 under autocast, which multiplies in half precision.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``.
        RuntimeError, ValueError, TypeError: as PyTorch's function and :func:`cross_entropy`.
    """
    layer = _Layer(input, linear_weight, linear_bias, target, options)
    ignore_index = layer.checked(ignore_index)
    given = Options(reduction, ignore_index, loss_dtype, empty, label_smoothing, z_loss, softcap, logit_scale)
    return layer.loss(Tensors(input, target, weight, None, sample_weight, denominator), given)


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
    r""":func:`linear_cross_entropy` and the statistics of :func:`cross_entropy_with_stats`.

    Takes the arguments of :func:`linear_cross_entropy`, and raises its errors. ``lse``, ``target_log_prob`` and
    ``entropy`` are differentiable. The backward makes the logits again.
    """
    layer = _Layer(input, linear_weight, linear_bias, target, options)
    ignore_index = layer.checked(ignore_index)
    given = Options(reduction, ignore_index, loss_dtype, empty, label_smoothing, z_loss, softcap, logit_scale)
    tensors = Tensors(input, target, weight, None, sample_weight, denominator)
    return layer.loss(tensors, given._replace(statistics=True))


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
    given = Options(reduction, ignore_index, loss_dtype, empty, label_smoothing, z_loss, softcap, logit_scale)
    tensors = Tensors(input, indices, weight, probs, sample_weight, denominator)
    return layer.loss(tensors, given._replace(kind="pairs"))


def _check_types(input, linear_weight, linear_bias, target) -> None:
    if isinstance(linear_weight, nn.Module):
        raise TypeError(f"linear_weight must be a tensor, as the layer's weight is, but got {linear_weight!r}")
    optional = {"linear_bias": linear_bias, "target": target}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    check_tensors(input=input, linear_weight=linear_weight, **given)


class _Layer:
    """An output layer and its input, checked as PyTorch's function checks them."""

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
        """Returns a tensor of positions, with `axes` dimensions after those, as one of (N, ...)."""
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

    def checked(self, ignore_index: int | None) -> int:
        if self.probabilities and ignore_index is not None:
            raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
        return -100 if ignore_index is None else ignore_index

    def loss(self, tensors: Tensors, options: Options) -> Tensor | CrossEntropyStats:
        """Calls the operator with flat tensors. For tensor subclasses, makes the logits and then their loss."""
        _, target, weight, companion, sample_weight, denominator = tensors
        input = self.flat(self.input, 1)
        dense = self.probabilities or companion is not None
        if not self.batch and not dense and target.dim() == 1:  # native accepts one label in a list
            if target.numel() != 1:
                raise ValueError(f"For 1D input, 1D target must have size 1, but got target size: {target.numel()}")
            target = target.squeeze(0)
        target, companion = self.flat(target, int(dense)), self.flat(companion, 1)
        tensors = Tensors(input, target, weight, companion, self.flat(sample_weight, 0), denominator)
        if not has_subclass(self.weight, self.bias, *tensors):
            return self.unflat(_call.linear_loss((input, self.weight, self.bias), tensors, options, self.chunk))
        matrix, bias = self.weight, self.bias
        if is_dtensor(matrix):
            from .._parallel import dtensor

            if not is_dtensor(input):
                raise RuntimeError(
                    "got mixed torch.Tensor and DTensor: linear_weight is a DTensor with placements "
                    f"{tuple(matrix.placements)}, and input is a plain tensor, which may be another on every rank. "
                    "Under FSDP, compute the loss in the forward of the module that owns the weight, where it is whole "
                    "(cross_entropy_ext.LinearCrossEntropyLoss is such a module). Under tensor parallelism, hand the "
                    "input as a DTensor: DTensor.from_local(input, linear_weight.device_mesh, [Replicate()]) if it is "
                    "the same on every rank"
                )
            if not options.statistics and companion is None and not self.inner:
                loss = dtensor.linear_loss((input, matrix, bias), tensors, options, self.options)
                if loss is not None:
                    return self.unflat(loss)
            bias = dtensor.on_mesh(bias, matrix)
        if self.inner:
            matrix, bias = matrix.flatten(0, -2), None if bias is None else bias.flatten()
        logits = F.linear(input, matrix, bias)
        if self.inner:
            logits = logits.unflatten(1, (self.classes, *self.inner))
        return self.unflat(loss_of(tensors._replace(input=logits), options))

    def unflat(self, result: Tensor | CrossEntropyStats) -> Tensor | CrossEntropyStats:
        if isinstance(result, Tensor):
            return result if len(self.batch) == 1 or result.dim() == 0 else result.reshape((*self.batch, *self.inner))
        return CrossEntropyStats(*map(self.unflat, result))

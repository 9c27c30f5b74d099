"""Cross entropy of logits whose classes are sharded over the processes of a `torch.distributed` group."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ._options import CrossEntropyStats, LinearCrossEntropyOptions, Options, Tensors
from ._parallel import vocabulary
from .modules import EXTRAS, CrossEntropyLoss, extras_of, shown

__all__ = [
    "VocabParallelCrossEntropyLoss",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_cross_entropy_with_stats",
    "vocab_parallel_linear_cross_entropy",
]


def vocab_parallel_cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    loss_dtype: torch.dtype | None = None,
    empty: Literal["nan", "zero"] = "nan",
    denominator: float | Tensor | None = None,
    dim: int = 1,
) -> Tensor:
    r"""Cross entropy of logits whose classes are sharded over a group, each process with logits of its own classes:
    :func:`cross_entropy_ext.functional.cross_entropy` of all of them side by side.

    Every rank of the group calls it, with the same options, and gets the same loss, bit for bit. There is one
    all-gather, of 32 bytes for each position and rank, and none in the backward, whose gradient is that of the local
    logits. It has no second derivative, and is not for torch.func.

    Args:
        local_logits: (N, C_r, d1, ..., dK) or (C_r): the logits of this rank's classes, in float16, bfloat16, float32
            or float64 and with any strides. Ranks have consecutive classes, in their order in the group.
        target: the same on every rank, class indices of shape (N, d1, ..., dK) or () among all C classes, of any
            integer dtype; or, sharded as the logits and of their shape, probabilities of the local classes, which may
            require a gradient.
        group: whose ranks have the shards; None for all processes.
        shard_sizes: the number of classes of each rank, of which some may be 0. Default: all have as many as this one.
        weight: one factor per class, of all of them: (C). May not require a gradient.
        sample_weight: a factor for each position, the same on every rank. May not require a gradient.
        denominator: what ``'mean'`` divides by instead of its own denominator, a number or a scalar tensor.
        ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, loss_dtype, empty: as for
            :func:`cross_entropy_ext.functional.cross_entropy`; smoothing is over all C classes. A number in a tensor
            may not require a gradient.
        dim: the dimension of the classes in local logits and probabilities: -1 for (B, T, C_r).

    Returns:
        A scalar, or for ``reduction='none'`` a loss for each position; in the logits' dtype, promoted with
        probabilities and their weights (float32 for half logits under autocast), or ``loss_dtype``.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``.
        ValueError, RuntimeError, TypeError: arguments that are wrong, or not the same on every rank; shards of
            different sizes without ``shard_sizes``.

    What one rank finds wrong is raised on every rank, with the number of that rank. On a CUDA device, where nothing
    waits for the host, the others have a loss of NaN instead; and a target out of range is reported as all of them are
    (:func:`cross_entropy_ext.check_errors`), on every rank.

    Ranks send checksums of what has to be the same on all of them; a difference is an error, or NaN. Labels have to be
    equal. Class weights and sample weights may differ by about 1/256 of their norm, a denominator by about a millionth,
    and the states of :func:`vocab_parallel_linear_cross_entropy` by about 1/16 of their norm: each rank makes these on
    its own, and rounding is no error. Smaller differences pass unseen. A tensor with an infinity or NaN is not
    compared. Checksums take 0.03 ms of a CPU for 2048 class indices, where forward and backward of 8000 classes take
    33 ms, and 0.5 ms for states of 2048 x 512.

    It is an error, too, to hand all classes on every rank instead of each rank's own. This is seen by logits that are
    the same on every rank, bit for bit, though not all equal, while every label is among the first rank's classes, or
    the probabilities of each rank sum up to one. It is not seen for probabilities with a ``label_smoothing`` above
    0.999, of which next to nothing is left. ``shard_sizes`` says that they are shards nevertheless.

    Where ranks have different numbers of positions, the collective is none: the group's backend or this function raises
    an error, and gloo may end the process with one; ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` names the shapes. If a rank
    ends, the others get the backend's error.
    """
    options = Options(reduction, ignore_index, loss_dtype, empty, label_smoothing, z_loss, softcap, logit_scale)
    tensors = Tensors(local_logits, target, weight, None, sample_weight, denominator)
    return vocabulary.loss(tensors, options._replace(dim=dim), group, shard_sizes)


def vocab_parallel_cross_entropy_with_stats(
    local_logits: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    loss_dtype: torch.dtype | None = None,
    empty: Literal["nan", "zero"] = "nan",
    denominator: float | Tensor | None = None,
    dim: int = 1,
) -> CrossEntropyStats:
    """The loss and statistics of all classes' softmax: :class:`cross_entropy_ext.functional.CrossEntropyStats`.

    Takes the arguments of :func:`vocab_parallel_cross_entropy`, and raises its errors. The one exchange has 72 bytes
    for each position and rank. ``lse``, ``target_log_prob`` and ``entropy`` are differentiable; ``argmax`` is among all
    classes.
    """
    options = Options(reduction, ignore_index, loss_dtype, empty, label_smoothing, z_loss, softcap, logit_scale)
    tensors = Tensors(local_logits, target, weight, None, sample_weight, denominator)
    return vocabulary.loss(tensors, options._replace(statistics=True, dim=dim), group, shard_sizes)


def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    local_weight: Tensor,
    target: Tensor,
    *,
    local_bias: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
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
    r"""Cross entropy of an output layer whose weight is sharded over a group by classes; no rank ever has all of its
    own logits: :func:`cross_entropy_ext.functional.linear_cross_entropy` of all shards together.

    The logits are made twice, a chunk of positions at a time: in the forward for what the ranks exchange, which is that
    of :func:`vocab_parallel_cross_entropy`, and in the backward for the gradients. There the gradient of the input,
    which each rank needs whole, is summed over the group: the one collective of a backward, which every rank has to
    run.

    Args:
        input: (N, F), (B, ..., F) or (F), the same on every rank.
        local_weight: (C_r, F), the rows of this rank's classes.
        target: class indices of shape (N), (B, ...) or () among all C classes, the same on every rank; or probabilities
            of the local classes, (N, C_r), (B, ..., C_r) or (C_r).
        local_bias: (C_r).
        options: as for :func:`cross_entropy_ext.functional.linear_cross_entropy`.
        group, shard_sizes, weight, ...: as for :func:`vocab_parallel_cross_entropy`.

    Returns, Raises:
        As :func:`vocab_parallel_cross_entropy`.
    """
    layer = vocabulary.Layer(input, local_weight, local_bias, options)
    given = Options(reduction, ignore_index, loss_dtype, empty, label_smoothing, z_loss, softcap, logit_scale)
    tensors = Tensors(None, target, weight, None, sample_weight, denominator)
    loss = vocabulary.loss(tensors, given, group, shard_sizes, layer)
    return loss.reshape(layer.batch) if reduction == "none" else loss


class VocabParallelCrossEntropyLoss(CrossEntropyLoss):
    """:func:`vocab_parallel_cross_entropy` as a module, with the buffers and the state_dict of
    :class:`cross_entropy_ext.CrossEntropyLoss`.

    Example:
        >>> criterion = VocabParallelCrossEntropyLoss(group=tensor_parallel_group, ignore_index=0)
        >>> loss = criterion(hidden @ my_rows_of_the_head.T, target)
        >>> loss.backward()
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        group: dist.ProcessGroup | None = None,
        shard_sizes: Sequence[int] | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        loss_dtype: torch.dtype | None = None,
        empty: Literal["nan", "zero"] = "nan",
        dim: int = 1,
    ) -> None:
        super().__init__(
            weight,
            size_average,
            ignore_index,
            reduce,
            reduction,
            label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            loss_dtype=loss_dtype,
            empty=empty,
            dim=dim,
        )
        self.group = group
        self.shard_sizes = shard_sizes

    def __deepcopy__(self, memo: dict) -> VocabParallelCrossEntropyLoss:
        """With the same group, which is the processes' and cannot be copied."""
        memo[id(self.group)] = self.group
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        result.__dict__ = copy.deepcopy(self.__dict__, memo)
        return result

    def extra_repr(self) -> str:
        sizes = [] if self.shard_sizes is None else [f"shard_sizes={self.shard_sizes}"]
        return ", ".join([*shown(self, EXTRAS), *sizes])

    def forward(
        self,
        local_logits: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """Returns the loss of local logits (C_r), (N, C_r) or (N, C_r, d1, ..., dK) against indices among all classes,
        or probabilities of the local ones."""
        options = extras_of(self)
        del options["inplace"]
        return vocab_parallel_cross_entropy(
            local_logits,
            target,
            group=self.group,
            shard_sizes=self.shard_sizes,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            denominator=denominator,
            **options,
        )

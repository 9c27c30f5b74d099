"""The losses as functions: torch.nn.functional's signatures and values and what is written around them, computed by the
fused kernels in the same pass."""

from __future__ import annotations

import math
import numbers
import operator
import sys
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from .._extension import load

_C = load()
_call = _C.cross_entropy
_call_with_extras = _C.cross_entropy_with_extras
_call_nll_loss = _C.nll_loss
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_torch_function_mode_enabled = torch._C._is_torch_function_mode_enabled

__all__ = [
    "CrossEntropyStats",
    "cross_entropy",
    "cross_entropy_with_stats",
    "distillation_loss",
    "linear_cross_entropy",
    "linear_cross_entropy_with_stats",
    "linear_sparse_cross_entropy",
    "mixup_cross_entropy",
    "nll_loss",
    "sparse_cross_entropy",
]

_ops = torch.ops.cross_entropy_ext
_cross_entropy = _ops.cross_entropy.default
_weighted_cross_entropy = _ops.cross_entropy.weight
_native_cross_entropy = F.cross_entropy
_nll_loss = _ops.nll_loss.default
_weighted_nll_loss = _ops.nll_loss.weight
_native_nll_loss = F.nll_loss

# What the operators understand: plain tensors and those that compilers trace with. Any other subclass means something
# of its own by an operation, and gets the loss as a composite of ATen operations.
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
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    loss_dtype: torch.dtype | None = None,
    empty: Literal["nan", "zero"] = "nan",
    denominator: float | Tensor | None = None,
    inplace: bool = False,
    dim: int = 1,
) -> Tensor:
    r"""Cross entropy between logits and target: :func:`torch.nn.functional.cross_entropy` in one pass.

    With coefficients :math:`a_c` made from the target, the loss of one position is
    :math:`\sum_c a_c (\mathrm{lse}(x) - x_c)`: for a class index :math:`y`,
    :math:`a_c = (1 - \varepsilon) w_y [c = y] + \frac{\varepsilon}{C} w_c`; for probabilities :math:`q`,
    :math:`a_c = w_c ((1 - \varepsilon) q_c + \frac{\varepsilon}{C})`. The reduction ``'mean'`` divides by the sum of
    :math:`w_y` over the positions that are not ignored, or for probabilities by the number of positions.

    What is written around it is part of the same pass: each position's loss is
    :math:`s (\mathrm{ce}(x) + z\,\mathrm{lse}(x)^2)`, where
    :math:`x = \mathrm{cap} \tanh(\mathrm{scale} \cdot \mathrm{input} / \mathrm{cap})`
    (softcap: Gemma 2, arXiv 2408.00118; z-loss: PaLM, arXiv 2204.02311, section 5).

    Args:
        input: logits of shape (C), (N, C) or (N, C, d1, ..., dK), in float16, bfloat16, float32 or float64 and with any
            strides, which are read as they are. The gradient has the input's memory format. Or a DTensor of such, with
            any placements: the loss is a DTensor, too, and classes that are sharded stay where they are.
        target: class indices of shape (), (N) or (N, d1, ..., dK) in int64, int32, int16, int8 or uint8; or
            probabilities of the input's shape in any floating dtype, which may require a gradient.
        weight: one factor per class, of shape (C).
        size_average, reduce: deprecated, as in PyTorch; see ``reduction``.
        ignore_index: target value whose positions add nothing to the loss, are not counted by ``'mean'`` and have a
            gradient of zero; their logits are not used, so they may be NaN. Class indices only.
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.
        label_smoothing: :math:`\varepsilon` in [0, 1], the share of the target that is spread evenly over the classes.
        sample_weight: :math:`s`, a factor for each position, of the shape of class indices; floating, bool or integer.
            ``'mean'`` then divides by the sum of :math:`w_y s` over the positions that count, for probabilities of
            :math:`s`. Where it requires a gradient, the loss is made by PyTorch's own operations.
        z_loss: :math:`z`, what the squared logarithm of the sum of exponentials is multiplied by. Class weights have no
            part in this term: ``'mean'`` adds :math:`z` times the mean of :math:`\mathrm{lse}^2` over the positions
            that count, weighted by ``sample_weight`` alone. A given ``denominator`` divides both terms.
        softcap: a positive bound that logits approach smoothly, or None.
        logit_scale: what logits are multiplied by first, an inverse temperature. As a tensor it may require a gradient,
            which takes one more read of the logits and of their gradient.
        label_smoothing, z_loss, softcap, logit_scale: these four may be scalar tensors, too. A call waits for the value
            of one that is not on the CPU. ``torch.compile`` compiles a call twice at most, whatever their values are;
            with ``dynamic=True`` it does if the first value is not the default. If one other than ``logit_scale``
            requires a gradient, PyTorch's own operations compute the loss.
        loss_dtype: dtype of the result. Default: the input's, promoted with probabilities and their weights; float32
            for half logits under autocast. Sums are formed in float32 or better whatever it is.
        empty: what a mean over nothing (0 / 0) is: ``'nan'``, as in PyTorch, or ``'zero'``.
        denominator: what ``'mean'`` divides by instead: a number, or a scalar tensor on the logits' device, which is
            not waited for. The number of tokens in all micro-batches makes each of them add its share of one mean.
            DDP and FSDP average gradients over ranks: there it is ``tokens / world_size``, of the tokens of all ranks.
            May require a gradient.
        inplace: the backward leaves the gradient in the logits: a metric that reads them afterwards gets gradients, and
            no error. So read metrics before the backward, until which the logits are intact. In return the gradient
            needs no memory of its own. Autograd raises an error where a node of the graph needs the overwritten
            values. Without effect on a leaf or a view of one, whose values the user keeps, and where it cannot be done
            (expanded logits, ``create_graph=True``, under ``torch.compile``).
        dim: the dimension of the classes in logits and probabilities; of 1-d logits it is 0. Another one than 1 is read
            where it is, in a view: -1 for logits (B, T, V), whose target and losses are (B, T).

    Returns:
        A scalar, or for ``reduction='none'`` a tensor of shape (), (N) or (N, d1, ..., dK).

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``; or there is no dimension ``dim``.
        ValueError: ``sample_weight`` of another shape; ``z_loss``, ``softcap`` or ``logit_scale`` that is not finite;
            ``z_loss`` below 0, ``softcap`` not above 0; ``denominator`` with another reduction, not a scalar, or the
            number 0.
        RuntimeError, ValueError, TypeError: as PyTorch's own function, with its messages.

        Values of scalar tensors are checked, too, but not those that a transform of ``torch.func`` batches.
    """
    if size_average is not None or reduce is not None:
        reduction = _legacy_reduction(size_average, reduce)
    if dim != 1:
        input, target = _classes_at_one(dim, input=input, target=target)
    extras = sample_weight is not None or softcap is not None or denominator is not None
    # A tensor is not True here, nor is what a compiler leaves open: neither is asked for its value.
    if extras or (z_loss == 0) is not True or (logit_scale == 1) is not True:
        return _with_extras(
            input,
            target,
            weight,
            ignore_index,
            reduction,
            label_smoothing,
            sample_weight,
            z_loss,
            softcap,
            logit_scale,
            loss_dtype,
            empty,
            denominator,
            inplace,
        )
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
    check_loss_dtype(loss_dtype)
    if not _is_known(label_smoothing):
        if not _is(label_smoothing, 0):
            return _general(
                "general_cross_entropy",
                (input, target, weight, None, None, None),
                reduction=reduction,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                loss_dtype=loss_dtype,
                empty=empty,
                inplace=inplace,
            )
        label_smoothing = 0.0
    options = (_REDUCTIONS[reduction], ignore_index, label_smoothing)
    named = {"loss_dtype": loss_dtype, "empty_is_zero": empty == "zero", "inplace": inplace}
    if weight is None:
        return _cross_entropy(input, target, *options, **named)
    return _weighted_cross_entropy(input, target, weight, *options, **named)


class CrossEntropyStats(NamedTuple):
    """What one pass over logits (N, C, d1, ..., dK) finds out.

    All but ``loss`` and ``z_loss`` have an element for each position, (N, d1, ..., dK): 0 where it is ignored
    (``argmax``: -1, or -2 where ``ignore_index`` is -1, so that no padding equals it). They are of the logits as the
    loss sees them, after ``logit_scale`` and ``softcap``, and neither weighted nor smoothed; in float32, or float64
    where the logits or probabilities are.
    """

    loss: Tensor
    """As :func:`cross_entropy` returns it."""
    lse: Tensor
    """The logarithm of the sum of exponentials, in nats. Differentiable."""
    target_log_prob: Tensor
    """The logarithm of the target's softmax; of probabilities q, the sum of q log softmax. Differentiable.

    Where the loss weights or smooths probabilities, a second pass makes it of them as they are.
    """
    entropy: Tensor
    """Of the softmax, in nats: -sum p log p. Differentiable."""
    z_loss: Tensor
    """What ``z_loss`` adds to ``loss``, and reduced as that is."""
    argmax: Tensor
    """The class of the largest logit, int64; of equals the first.

    ``(stats.argmax == target)[target != ignore_index].float().mean()`` is the accuracy over the positions that count.
    """


def cross_entropy_with_stats(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    loss_dtype: torch.dtype | None = None,
    empty: Literal["nan", "zero"] = "nan",
    denominator: float | Tensor | None = None,
    inplace: bool = False,
    dim: int = 1,
) -> CrossEntropyStats:
    r"""Cross entropy and what else the same read of the logits tells: :class:`CrossEntropyStats`.

    Takes the arguments of :func:`cross_entropy`. ``lse``, ``target_log_prob`` and ``entropy`` are differentiable, and
    one backward pass makes the gradient of whatever mixture of them and the loss is used: a policy loss is
    ``-(advantage * stats.target_log_prob).mean() - beta * stats.entropy.mean()``.

    Raises:
        As :func:`cross_entropy`.
    """
    if size_average is not None or reduce is not None:
        reduction = _legacy_reduction(size_average, reduce)
    if dim != 1:
        input, target = _classes_at_one(dim, input=input, target=target)
    results = _general(
        "cross_entropy_with_stats",
        (input, target, weight, None, sample_weight, denominator),
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        loss_dtype=loss_dtype,
        empty=empty,
        inplace=inplace,
        statistics=True,
    )
    return CrossEntropyStats(*(results[i] for i in range(len(CrossEntropyStats._fields))))


def sparse_cross_entropy(
    input: Tensor,
    indices: Tensor,
    probs: Tensor,
    weight: Tensor | None = None,
    *,
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
    r"""Cross entropy against probabilities of which k are not zero: a teacher's top k, or a mixture of labels.

    The coefficients of a position are
    :math:`a_c = \sum_j (1 - \varepsilon) w_c p_j [c = i_j] + \frac{\varepsilon}{C} w_c`: the loss of
    :func:`cross_entropy` against the dense target that pairs :math:`(i_j, p_j)` stand for, which is never made.
    Repeated indices add up; probabilities are neither checked nor normalized.

    Args:
        input: logits of shape (C), (N, C) or (N, C, d1, ..., dK).
        indices: k classes for each position, (k), (N, k) or (N, k, d1, ..., dK), of any integer dtype. One that is
            ``ignore_index`` adds nothing; a position of only such is ignored.
        probs: their probabilities, of the same shape and any floating dtype. May require a gradient.
        weight: one factor per class, of shape (C), any floating dtype.
        reduction: ``'none'``, ``'sum'``, or ``'mean'``, which divides by the number of positions that are not ignored,
            or the sum of their ``sample_weight``: not by class weights, as for probabilities.
        label_smoothing, sample_weight, z_loss, softcap, logit_scale, loss_dtype, empty, denominator: as for
            :func:`cross_entropy`.
        dim: as for :func:`cross_entropy`; it is also the dimension of the k pairs.

    Returns:
        A scalar, or for ``reduction='none'`` a loss for each position; in the input's dtype, or ``loss_dtype``.

    Raises:
        IndexError: an index is neither a class nor ``ignore_index``.
        ValueError: shapes that disagree, no pairs (k = 0), or as :func:`cross_entropy`.
    """
    if dim != 1:
        input, indices, probs = _classes_at_one(dim, input=input, indices=indices, probs=probs)
    return _general(
        "general_cross_entropy",
        (input, indices, weight, probs, sample_weight, denominator),
        form="pairs",
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        loss_dtype=loss_dtype,
        empty=empty,
    )


def mixup_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: float | Tensor,
    weight: Tensor | None = None,
    *,
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
    r"""The loss of MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899): :math:`\lambda\,\mathrm{ce}(x, a) + (1 -
    \lambda)\,\mathrm{ce}(x, b)`, in one pass over the logits.

    That is ``lam * cross_entropy(input, target_a, ...) + (1 - lam) * cross_entropy(input, target_b, ...)`` for every
    option: a mean divides each part by its own denominator. Where ``lam`` has elements, each multiplies the losses of
    its sample or position before they are summed.

    Args:
        input: logits of shape (C), (N, C) or (N, C, d1, ..., dK).
        target_a, target_b: class indices of shape (), (N) or (N, d1, ..., dK).
        lam: the share of ``target_a``: a number in [0, 1], or a tensor of shape (), (N) or (N, d1, ..., dK), whose
            values are not checked. It may require a gradient. Beside a DTensor it has no elements.
        weight: one factor per class, of shape (C), any floating dtype.
        ignore_index: a label with this value adds nothing to its part, and is not counted there.
        reduction, label_smoothing, ...: as for :func:`cross_entropy`. The logits are read twice for class weights with
            both ``label_smoothing`` and ``z_loss``, and for a ``lam`` that requires a gradient with one of these two.

    Returns:
        A scalar, or for ``reduction='none'`` a loss for each position; in the input's dtype, or ``loss_dtype``.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``.
        ValueError: shapes that disagree, a number ``lam`` out of range, or as :func:`cross_entropy`.
    """
    if dim != 1:
        (input,) = _classes_at_one(dim, input=input)
    if not (isinstance(input, Tensor) and isinstance(target_a, Tensor) and isinstance(target_b, Tensor)):
        check_tensors(input=input, target_a=target_a, target_b=target_b)
    for name, target in (("target_a", target_a), ("target_b", target_b)):
        if target.is_floating_point() or target.is_complex():
            raise ValueError(f"{name} must be a tensor of class indices, but got {target.dtype}")
    if target_a.shape != target_b.shape:
        raise ValueError(
            f"target_b must have the shape of target_a, {tuple(target_a.shape)}, but got {tuple(target_b.shape)}"
        )
    axis = 1 if input.dim() > 1 else 0
    if target_a.shape != input.shape[:axis] + input.shape[axis + 1 :]:
        raise ValueError(
            f"target_a must have a class for each position of an input of shape {tuple(input.shape)}, "
            f"but got the shape {tuple(target_a.shape)}"
        )
    if _is_dtensor(input):
        return _mixture_of_dtensors(
            input,
            (target_a, target_b),
            lam,
            loss_dtype,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            sample_weight=sample_weight,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            empty=empty,
            denominator=denominator,
        )
    if isinstance(lam, Tensor):
        if lam.is_complex():
            raise ValueError(f"lam must be a number or a tensor of a real type, but got {lam.dtype}")
        if lam.dim() > target_a.dim() or lam.shape != target_a.shape[: lam.dim()]:
            raise ValueError(
                f"lam must be a number or a tensor whose shape begins that of target_a, {tuple(target_a.shape)}, "
                f"but got the shape {tuple(lam.shape)}"
            )
        lam = lam.to(torch.promote_types(lam.dtype, _arithmetic(input)))  # before 1 - lam is formed
        lam = lam.reshape(lam.shape + (1,) * (target_a.dim() - lam.dim()))
        shares = torch.stack([lam, 1 - lam], axis)
    else:
        lam = _share(lam)
        wide = {"dtype": torch.float64, "device": input.device}
        if _is_dynamo_compiling():  # which traces this for whatever number is drawn
            shares = torch.arange(2, **wide) * (1 - 2 * lam) + lam
        else:
            shares = torch.linspace(lam, 1 - lam, 2, **wide)
        if target_a.dim() > axis:
            shares = shares.view((2,) + (1,) * (target_a.dim() - axis))
    return _mixture(
        input,
        (target_a, target_b),
        shares,
        weight,
        axis,
        reduction,
        sample_weight,
        denominator,
        loss_dtype,
        empty,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
    )


def _mixture_of_dtensors(input, targets, lam, loss_dtype, **options) -> Tensor:
    """The two losses one after the other, since the operator of pairs takes no DTensors."""
    from .._parallel import dtensor

    if isinstance(lam, Tensor):
        if lam.dim() > 0 or lam.is_complex():
            raise ValueError(
                "lam must be a number or a real scalar tensor where the input is a DTensor, "
                f"but got {lam.dtype} of shape {tuple(lam.shape)}"
            )
        lam = dtensor.on_mesh(lam.to(torch.promote_types(lam.dtype, _arithmetic(input))), input)
    else:
        lam = _share(lam)
    if isinstance(options["weight"], Tensor):  # which native has of the logits' type alone
        options["weight"] = options["weight"].to(_arithmetic(input))
    loss_of_a, loss_of_b = (
        cross_entropy(input, target, loss_dtype=_arithmetic(input), **options) for target in targets
    )
    return (lam * loss_of_a + (1 - lam) * loss_of_b).to(loss_dtype or loss_type(input, targets[0], None))


def _share(lam: float) -> float:
    lam = _number("lam", lam)
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], but got {lam}")
    return lam


def _mixture(
    input, targets, shares, weight, axis, reduction, sample_weight, denominator, loss_dtype, empty, **options
) -> Tensor:
    """The sum over labels j of ``shares`` times their cross entropy, each divided by its own denominator.

    A label's factor F is its share divided by the denominator of its part, or zero where the label is ignored. The loss
    of a position is sum_j F_j (1 - e) w_j t_j + (sum_j F_j) smoothing + (sum_j G_j) z lse^2, where G is divided by the
    denominators of the z-loss, which have no class weights. So the labels are pairs of one call, and the sum of a
    position's factors is its sample weight, unless F and G are both needed and differ.
    """
    indices, ignore_index = torch.stack(targets, axis), options["ignore_index"]
    well_formed = (
        (sample_weight is None or _is_real(sample_weight, targets[0].shape))
        and (weight is None or _is_real(weight, input.shape[axis : axis + 1]))
        and (denominator is None or reduction == "mean")
        and -(2**63) <= operator.index(ignore_index) < 2**63
    )
    if not well_formed:  # an error that the operator raises
        return sparse_cross_entropy(
            input,
            indices,
            shares.expand(indices.shape),
            weight,
            reduction=reduction,
            sample_weight=sample_weight,
            denominator=denominator,
            loss_dtype=loss_dtype,
            empty=empty,
            **options,
        )
    if indices.dtype != torch.int64:
        indices = indices.long()
    counted = reduction in ("mean", "elementwise_mean") and denominator is None
    smoothed, penalized = (_may_differ(options[name], 0) for name in ("label_smoothing", "z_loss"))
    valid = indices != ignore_index if counted or smoothed or penalized else None
    counts = of_classes = None
    if counted:
        counts = of_classes = _denominators(indices, valid, axis, None, sample_weight)
        if weight is not None:
            of_classes = _denominators(indices, valid, axis, weight, sample_weight)
    apart = smoothed and penalized and of_classes is not counts
    if apart or (shares.requires_grad and (smoothed or penalized)):
        of_positions = shares.expand(indices.shape)
        loss = _mixture_of_two_passes(
            input, targets, of_positions, weight, axis, counts, of_classes, reduction, sample_weight, empty, **options
        )
        if denominator is not None:
            denominator = _divisor(denominator, input)
            if empty == "zero":
                denominator = torch.where((denominator == 0) & (loss == 0), 1.0, denominator)
            loss = loss / denominator
        half = input.dtype in (torch.float16, torch.bfloat16)
        wide = half and torch.is_autocast_enabled(input.device.type)
        return loss.to(loss_dtype or (torch.float32 if wide else input.dtype))
    factors = shares if of_classes is None else _quotient(shares, of_classes, empty)
    nothing = factors
    if smoothed or penalized:
        of_each = _quotient(shares, counts, empty) if penalized and counts is not of_classes else factors
        of_position = torch.where(valid, of_each, 0.0).sum(axis)
        factors = factors / torch.where(of_position == 0, 1.0, of_position).unsqueeze(axis)
        sample_weight = of_position if sample_weight is None else of_position * sample_weight
    loss = _general(
        "general_cross_entropy",
        (input, indices, weight, factors.expand(indices.shape), sample_weight, denominator),
        form="pairs",
        reduction="sum" if counted else reduction,
        loss_dtype=loss_dtype,
        empty=empty,
        **options,
    )
    if counted and empty == "nan":  # a part over nothing is NaN, and has no gradient
        if nothing.requires_grad or nothing.numel() != 2:
            nothing = 0.0 / of_classes.detach()
        dtype, loss = loss.dtype, torch.add(loss, nothing.sum(dtype=_arithmetic(loss)), alpha=0)
        return loss if loss.dtype == dtype else loss.to(dtype)
    return loss


def _mixture_of_two_passes(
    input, targets, shares, weight, axis, counts, of_classes, reduction, sample_weight, empty, **options
) -> Tensor:
    """The same, one cross entropy after the other; but for a given denominator."""
    loss, arithmetic = 0.0, _arithmetic(input)
    for place, (target, share) in enumerate(zip(targets, shares.unbind(axis), strict=True)):
        weight_of_part = weight if weight is None else weight.to(arithmetic)
        if of_classes is not counts:  # so that both terms are divided by the same, as KernelInputs does
            ratio = _quotient(counts, of_classes, empty).reshape(-1)[place]
            weight_of_part = (weight.double() * ratio).to(arithmetic)
        losses = share * cross_entropy(
            input,
            target,
            weight_of_part,
            reduction="none",
            sample_weight=sample_weight,
            loss_dtype=arithmetic,
            **options,
        )
        if reduction != "none":
            losses = losses.sum()
        loss = loss + (losses if counts is None else _quotient(losses, counts.reshape(-1)[place], empty))
    return loss


def _quotient(values: Tensor, denominator: Tensor, empty: str) -> Tensor:
    return values / (denominator if empty == "nan" else torch.where(denominator == 0, math.inf, denominator))


def _denominators(indices, valid, axis, weight, sample_weight) -> Tensor:
    """Returns what the mean of each label's cross entropy divides by, of a shape beside (N, 2, d1, ..., dK)."""
    parts = valid
    if weight is not None:  # a class out of range is an error elsewhere
        of_labels = weight.double()[indices.clamp(0, weight.numel() - 1)]
        parts = torch.where(valid, of_labels, 0.0)
    if sample_weight is not None:
        parts = torch.where(valid, parts * sample_weight.double().unsqueeze(axis), 0.0)
    positions = [dim for dim in range(indices.dim()) if dim != axis]
    return parts.sum(positions, keepdim=True, dtype=torch.float64) if positions else parts.double()


def _arithmetic(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _is_real(tensor: Tensor, shape: torch.Size) -> bool:
    return isinstance(tensor, Tensor) and tensor.shape == shape and not tensor.is_complex()


def _may_differ(value: float | Tensor, usual: float) -> bool:
    """From a number; a tensor is not asked."""
    return isinstance(value, Tensor) or value != usual


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    alpha: float | None = None,
    kind: Literal["kl", "ce"] = "kl",
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
    dim: int = 1,
) -> Tensor:
    r"""How far a student's softmax is from a teacher's (Hinton et al., arXiv 1503.02531); neither is ever in memory.

    With :math:`p = \mathrm{softmax}(\mathrm{student} / T)` and :math:`q = \mathrm{softmax}(\mathrm{teacher} / T)`, the
    loss of a position is :math:`T^2 \sum_c q_c (\log q_c - \log p_c)`, or for ``kind='ce'``
    :math:`-T^2 \sum_c q_c \log p_c`. With a ``target`` it is :math:`\alpha` times that and :math:`1 - \alpha` times the
    cross entropy of the student's logits at temperature 1, from the same read of them; ``label_smoothing`` and
    ``weight`` take another.

    The divergence is exactly 0 for equal logits and never below 0. Below 1/8 it is exact to a few roundings of itself;
    above, to a few roundings of the logits, as PyTorch's. Classes at -inf in both add nothing.

    Args:
        student_logits, teacher_logits: (C), (N, C) or (N, C, d1, ..., dK), in any floating dtypes and strides. Both may
            require a gradient.
        target: class indices of shape (), (N) or (N, d1, ..., dK), or None.
        temperature: :math:`T > 0`.
        alpha: the share of the distillation, in [0, 1]; to be given where there is a target, else without effect. Both
            may be scalar tensors, as the numbers of :func:`cross_entropy`.
        kind: ``'kl'`` or ``'ce'``. Their gradients of the student are the same.
        reduction: ``'none'``, ``'sum'``, or ``'mean'``: over the positions that count, by the sum of their
            ``sample_weight``; the ``'batchmean'`` of :func:`torch.nn.functional.kl_div` for logits (N, C).
        sample_weight: a factor for each position, of the shape of ``target``.
        ignore_index: positions with this target add nothing to either part.
        label_smoothing, weight: of the labels' cross entropy alone, as for :func:`cross_entropy`; without effect where
            there is no target. Its ``'mean'`` divides by class weights, if there are any; that of the distillation
            stays over positions.
        loss_dtype: dtype of the result; default: that of student and teacher, promoted.
        dim: the dimension of the classes in both, as for :func:`cross_entropy`: -1 for logits (B, T, V).

    Returns:
        A scalar, or for ``reduction='none'`` a loss for each position.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``.
        ValueError: shapes that disagree, an unknown ``kind``, a ``temperature`` or ``alpha`` out of range, or a target
            without an ``alpha``.
    """
    if kind not in ("kl", "ce"):
        raise ValueError(f"kind must be 'kl' or 'ce', but got {kind!r}")
    if dim != 1:
        student_logits, teacher_logits = _classes_at_one(
            dim, student_logits=student_logits, teacher_logits=teacher_logits
        )
    if target is not None and alpha is None:
        raise ValueError("alpha, the share of the distillation beside the labels, must be given with a target")
    if target is not None and (weight is not None or not _is(label_smoothing, 0)):
        # Two passes, each with its own denominator. In that of the teacher the labels tell no more than who is ignored.
        check_tensors(student_logits=student_logits, teacher_logits=teacher_logits, target=target)
        alpha = _number_or_tensor("alpha", alpha)
        value = float(alpha.detach()) if isinstance(alpha, Tensor) and _is_readable(alpha) else alpha
        if _is_known(value) and not 0 <= value <= 1:
            raise ValueError(f"alpha must be between 0 and 1, but got {value}")
        if weight is not None:
            check_tensors(weight=weight)
            weight = weight.to(widened(student_logits.dtype))
        options = {"reduction": reduction, "sample_weight": sample_weight, "ignore_index": ignore_index}
        options["loss_dtype"] = widened(torch.promote_types(student_logits.dtype, teacher_logits.dtype))
        distilled = distillation_loss(
            student_logits, teacher_logits, target, temperature=temperature, alpha=1.0, kind=kind, **options
        )
        of_labels = cross_entropy(student_logits, target, weight, label_smoothing=label_smoothing, **options)
        check_loss_dtype(loss_dtype)
        if _is_known(alpha) and alpha in (0, 1):
            loss = distilled if alpha == 1 else of_labels
        else:
            loss = alpha * distilled + (1 - alpha) * of_labels
        return loss.to(loss_dtype or loss_type(student_logits, teacher_logits, None))
    return _general(
        "general_cross_entropy",
        (student_logits, teacher_logits, None, target, sample_weight, None),
        form="teacher",
        reduction=reduction,
        ignore_index=ignore_index,
        temperature=temperature,
        alpha=1.0 if alpha is None else alpha,
        kl=kind == "kl",
        loss_dtype=loss_dtype,
    )


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    dim: int = 1,
) -> Tensor:
    r"""Negative log likelihood: :func:`torch.nn.functional.nll_loss`, deterministic on every device.

    The loss of a position whose class is :math:`y` is :math:`-w_y x_y`; ``'mean'`` divides by the sum of :math:`w_y`
    over the positions that are not ignored. For logits, :func:`cross_entropy` makes this and the softmax before it in
    one pass.

    Args:
        input: log-probabilities of shape (C), (N, C) or (N, C, d1, ..., dK), in float16, bfloat16, float32 or float64
            and with any strides. The gradient has the input's memory format.
        target: class indices of shape (), (N) or (N, d1, ..., dK) in int64, int32, int16, int8 or uint8.
        weight: one factor per class, of shape (C).
        size_average, reduce: deprecated, as in PyTorch; see ``reduction``.
        ignore_index: target value whose positions add nothing to the loss, are not counted by ``'mean'`` and have a
            gradient of zero; their log-probabilities are not used, so they may be NaN.
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.
        dim: the dimension of the classes, as for :func:`cross_entropy`.

    Returns:
        A scalar, or for ``reduction='none'`` a tensor of shape (), (N) or (N, d1, ..., dK); in the input's dtype, or
        float32 for half log-probabilities under autocast.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``.
        RuntimeError, ValueError, TypeError: as PyTorch's own function, with its messages.
    """
    if size_average is not None or reduce is not None:
        reduction = _legacy_reduction(size_average, reduce)
    if dim != 1:
        input, target = _classes_at_one(dim, input=input, target=target)
    if not (
        type(input) in _PLAIN
        and type(target) in _PLAIN
        and (weight is None or type(weight) in _PLAIN)
        and reduction in ("mean", "sum", "none")
        and type(ignore_index) is int
        and -(2**63) <= ignore_index < 2**63
    ):
        return _unusual_nll_loss(input, target, weight, ignore_index, reduction)
    if not _is_dynamo_compiling() and not _is_torch_function_mode_enabled():  # as in cross_entropy
        return _call_nll_loss(input, target, weight, _REDUCTIONS[reduction], ignore_index)
    if weight is None:
        return _nll_loss(input, target, _REDUCTIONS[reduction], ignore_index)
    return _weighted_nll_loss(input, target, weight, _REDUCTIONS[reduction], ignore_index)


def _unusual_nll_loss(input, target, weight, ignore_index, reduction) -> Tensor:
    """As _unusual, for nll_loss: judged by PyTorch's own parser, or made of its operations."""
    tensors = [input, target] if weight is None else [input, target, weight]
    if _is_dtensor(input) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        if isinstance(target, Tensor) and target.dtype in (torch.int8, torch.int16, torch.int32, torch.uint8):
            target = target.long()
        return _native_nll_loss(input, target, weight, None, ignore_index, None, reduction)
    _native_nll_loss(torch.zeros(1, 1), torch.zeros(1).long(), None, None, ignore_index, None, reduction)
    reduction, ignore_index = F._Reduction.get_enum(reduction), operator.index(ignore_index)
    if not all(type(tensor) in _PLAIN for tensor in tensors):
        return _ops._composite_nll_loss.default(input, target, _as_list(weight), reduction, ignore_index)
    if weight is None:
        return _nll_loss(input, target, reduction, ignore_index)
    return _weighted_nll_loss(input, target, weight, reduction, ignore_index)


# csrc/cross_entropy.h: Form, and at::ScalarType's numbers of what a loss may be.
_FORMS = {None: 0, "pairs": 3, "teacher": 4}
# What the tensors are called.
_NAMES = {
    None: ("input", "target", "weight", "companion", "sample_weight", "denominator"),
    "pairs": ("input", "indices", "weight", "probs", "sample_weight", "denominator"),
    "teacher": ("student_logits", "teacher_logits", "weight", "target", "sample_weight", "denominator"),
}
# csrc/cross_entropy.h: Options::Number.
_NUMBERS = ("label_smoothing", "z_loss", "softcap", "logit_scale", "temperature", "alpha")
_FLOATS = [float] * len(_NUMBERS)
_LOSS_DTYPES = {None: -1, torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}


def _with_extras(
    input,
    target,
    weight,
    ignore_index,
    reduction,
    label_smoothing,
    sample_weight,
    z_loss,
    softcap,
    logit_scale,
    loss_dtype,
    empty,
    denominator,
    inplace,
) -> Tensor:
    """The loss with what native has no argument for; as `cross_entropy`, without the general parser where it can be."""
    if (
        not _is_dynamo_compiling()
        and type(input) in _PLAIN
        and type(target) in _PLAIN
        and (weight is None or type(weight) in _PLAIN)
        and (sample_weight is None or (type(sample_weight) in _PLAIN and sample_weight.is_floating_point()))
        and denominator is None
        and reduction in ("mean", "sum", "none")
        and type(ignore_index) is int
        and -(2**63) <= ignore_index < 2**63
        and type(label_smoothing) is type(z_loss) is type(logit_scale) is float
        and (softcap is None or (type(softcap) is float and softcap > 0))
        and (loss_dtype is None and empty == "nan" and not inplace)
        and not _is_torch_function_mode_enabled()
    ):
        return _call_with_extras(
            input,
            target,
            weight,
            _REDUCTIONS[reduction],
            ignore_index,
            label_smoothing,
            sample_weight,
            z_loss,
            softcap or 0.0,
            logit_scale,
        )
    extras = sample_weight is not None or softcap is not None or denominator is not None
    if not extras and _is(z_loss, 0) and _is(logit_scale, 1):  # numbers of another kind, as of NumPy or of a compiler
        return cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=0.0,
            logit_scale=1.0,
            loss_dtype=loss_dtype,
            empty=empty,
            inplace=inplace,
            dim=1,
        )
    return _general(
        "general_cross_entropy",
        (input, target, weight, None, sample_weight, denominator),
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        loss_dtype=loss_dtype,
        empty=empty,
        inplace=inplace,
    )


def _general(name, tensors, **options):
    """Calls an operator of everything that native does not have: tensors, and its options as two lists of numbers."""
    all_tensors, integers, values = _arguments(tensors, **options)
    tensors = all_tensors[:6]
    others = [tensor for tensor in all_tensors if tensor is not None and type(tensor) not in _PLAIN]
    if not any(isinstance(tensor, Tensor) for tensor in others):
        arguments = (*tensors[:2], _as_list(*all_tensors[2:]), integers, values)
        return call_operator(name, *arguments, proxies=others)
    if options.get("form") is None and _is_dtensor(tensors[0]):
        from .._parallel import (
            dtensor,  # the one look at a layer above, whose import takes as long as its tensors are rare
        )

        input, target, weight, _, sample_weight, denominator = tensors
        options = {"statistics": False, **options}
        options.pop("inplace", None)
        return dtensor.results(
            input, target, weight=weight, sample_weight=sample_weight, denominator=denominator, **options
        )
    results = _ops._composite.default(*tensors[:2], _as_list(*all_tensors[2:]), integers, values)
    return results if options.get("statistics") else results[0]


def _arguments(
    tensors,
    *,
    reduction,
    ignore_index,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    logit_scale=1.0,
    temperature=1.0,
    alpha=1.0,
    loss_dtype=None,
    empty="nan",
    inplace=False,
    statistics=False,
    form=None,
    kl=False,
):
    """Tensors, and options as two lists of numbers, as the operators take them (csrc/cross_entropy.h: Options). After
    the tensors that are given come those of numbers."""
    if empty not in _EMPTY:
        raise ValueError(f"empty must be 'nan' or 'zero', but got {empty!r}")
    tensors = (*tensors[:-1], _divisor(tensors[-1], tensors[0]))
    for place, (name, tensor) in enumerate(zip(_NAMES[form], tensors, strict=True)):
        optional = tensor is None and place >= 2 and name != "probs"
        if not (optional or isinstance(tensor, Tensor)):  # asked here, too, for a call takes longer
            check_tensors(**{name: tensor})
    if isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an integer, but got {ignore_index}")
    if not -(2**63) <= operator.index(ignore_index) < 2**63:
        raise ValueError(f"ignore_index must be an integer of 64 bits, but got {ignore_index}")
    values = [label_smoothing, z_loss, 0.0 if softcap is None else softcap, logit_scale, temperature, alpha]
    in_tensors, is_capped = (), softcap is not None
    if _is_dynamo_compiling() or [*map(type, values)] != _FLOATS:
        values = [_number_or_tensor(name, value) for name, value in zip(_NUMBERS, values, strict=True)]
        in_tensors = [None if _is_known(value) else _in_tensor(value) for value in values]
        scale = in_tensors[3]
        if _is_dynamo_compiling() and scale is not None and scale.requires_grad and tensors[0].dtype != torch.float16:
            # The gradient of a zero is a quotient of zeros, for which eager takes another path than a graph may.
            in_tensors[3] = scale + (scale == 0) * 2.0**-40
        is_capped = is_capped and in_tensors[2] is None
        values = [value if tensor is None else 0.0 for value, tensor in zip(values, in_tensors, strict=True)]
    if is_capped and not 0 < values[2] < math.inf:
        raise ValueError(f"softcap must be None or a finite number above 0, but got {softcap}")
    if loss_dtype is not None:
        check_loss_dtype(loss_dtype)
    sample_weight = tensors[4]
    if isinstance(sample_weight, Tensor) and not (sample_weight.is_floating_point() or sample_weight.is_complex()):
        wide = tensors[0].dtype == torch.float64
        tensors = (*tensors[:4], sample_weight.to(torch.float64 if wide else torch.float32), tensors[5])
    flags = (empty == "zero") | bool(inplace) << 1 | statistics << 2 | kl << 3 | _FORMS[form] << 4
    integers = [F._Reduction.get_enum(reduction), operator.index(ignore_index), _LOSS_DTYPES[loss_dtype], flags, 0, 0]
    return (*tensors, *in_tensors), integers, values


def _is_known(value: float | Tensor) -> bool:
    """Returns True if a number has its value: no tensor, and not left open by a compiler."""
    if isinstance(value, Tensor):
        return False
    if not _is_dynamo_compiling() and not isinstance(value, (torch.SymFloat, torch.SymInt)):
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value  # which takes a while to import

    return has_static_value(value)


def _is(value: float | Tensor, usual: int) -> bool:
    """Returns True if a number is known to be its default. A number that a compiler leaves open is not compared, for
    each answer would compile the call again; unless all numbers are open from the first call on."""
    if isinstance(value, Tensor):
        return False
    return bool(value == usual) if _is_known(value) or _leaves_all_open() else False


def _leaves_all_open() -> bool:
    """Returns True under ``torch.compile(dynamic=True)``."""
    return not torch._dynamo.config.assume_static_by_default


_leaves_all_open._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result, without its imports


def _in_tensor(value: float | Tensor) -> Tensor:
    """A number as the operators take it where it has no value yet: a scalar in the host's memory."""
    if isinstance(value, Tensor):
        return value.to("cpu", torch.float64)
    return torch.ones((), dtype=torch.float64) * value  # which torch.compile traces for whatever number there is


def _as_list(*tensors: Tensor | None) -> list[Tensor | None]:
    """Optional tensors as the operators take them: up to the last that there is."""
    others = [*tensors]
    while others and others[-1] is None:
        others.pop()
    return others


def call_operator(name: str, *arguments, proxies: Sequence[object]):
    """Calls an operator, without the general parser if no compiler and no mode is to see the call.

    ``proxies`` among the arguments stand for tensors, as for torch.fx, and record the call.
    """
    if proxies:  # in lists, too, where the operator would not find them
        return torch.overrides.handle_torch_function(getattr(_ops, name).default, proxies, *arguments)
    if _is_dynamo_compiling() or _is_torch_function_mode_enabled():
        return getattr(_ops, name).default(*arguments)
    return getattr(_C, name)(*arguments)


def _is_dtensor(tensor: Tensor) -> bool:
    """Returns True for a DTensor. There is none before its module was imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _divisor(denominator: float | Tensor | None, input: Tensor) -> Tensor | None:
    """A mean's denominator as the operators take it: a float64 scalar. Nothing waits for its value."""
    if denominator is None:
        return None
    if not isinstance(denominator, Tensor):
        if is_tensor(denominator):  # stands for one, as for torch.fx
            return denominator
        denominator = _number("denominator", denominator)
        if denominator == 0 or not abs(denominator) < math.inf:
            raise ValueError(f"denominator must be a finite number other than 0, or a tensor, but got {denominator}")
        return torch.ones((), dtype=torch.float64, device=input.device) * denominator
    if denominator.is_complex():
        raise ValueError(f"denominator must be a number or a tensor of a real type, but got {denominator.dtype}")
    return denominator.to(torch.float64)


def widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def loss_type(logits: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """Returns the dtype that `cross_entropy` gives a loss without ``loss_dtype``."""
    types = [logits.dtype]
    if target.is_floating_point():
        types += [target.dtype] if weight is None else [target.dtype, weight.dtype]
    if torch.is_autocast_enabled(logits.device.type):
        types = [widened(dtype) for dtype in types]
    result = types[0]
    for dtype in types[1:]:
        result = torch.promote_types(result, dtype)
    return result


def is_tensor(value: object) -> bool:
    """Returns True for a tensor, and for a proxy of torch.fx that stands for one."""
    return isinstance(value, Tensor) or hasattr(type(value), "__torch_function__")


def check_tensors(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not is_tensor(tensor):
            raise TypeError(f"{name} must be a tensor, but got {tensor!r}")


def check_loss_dtype(loss_dtype: torch.dtype | None) -> None:
    if loss_dtype is not None and not isinstance(loss_dtype, torch.dtype):
        raise TypeError(
            f"loss_dtype must be None, torch.float16, torch.bfloat16, torch.float32 or torch.float64, "
            f"but got {loss_dtype!r}"
        )
    if loss_dtype not in _LOSS_DTYPES:
        raise RuntimeError(f"loss_dtype must be float16, bfloat16, float32 or float64. Got: {loss_dtype}")


def _classes_at_one(dim: int, **tensors: Tensor) -> tuple[Tensor, ...]:
    """Views of logits, and of what else has a dimension of classes, with that at 1, or 0 if it is the only one."""
    check_tensors(**tensors)
    dims = next(iter(tensors.values())).dim()
    return tuple(t.movedim(dim, min(1, dims - 1)) if t.dim() == dims else t for t in tensors.values())


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) and name != "label_smoothing":  # which native takes
        raise TypeError(f"{name} must be a number, but got {value}")
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return value + 0.0
    if isinstance(value, numbers.Real):  # of NumPy
        return float(value)
    if isinstance(value, Tensor) and value.dim() == 0:
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must be a number here, or a tensor that requires no gradient")
        return float(value)
    raise TypeError(f"{name} must be a number, but got {value!r}")


def _number_or_tensor(name: str, value: float | Tensor) -> float | Tensor:
    """A number; or a scalar tensor as it is, where its value may not be asked for or does not say all: while something
    is traced or transformed, or where it is to get a gradient."""
    if not isinstance(value, Tensor):
        return _number(name, value)
    if value.dim() != 0 or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(
            f"{name} must be a number or a scalar tensor of a real type, but got {value.dtype} of shape "
            f"{tuple(value.shape)}"
        )
    differentiated = value.requires_grad and torch.is_grad_enabled()
    return float(value) if _is_readable(value) and not differentiated else value


def _is_readable(value: Tensor) -> bool:
    """Returns True for a tensor whose value can be read: no compiler traces and no transform batches it."""
    if _is_dynamo_compiling() or type(value) not in (Tensor, torch.nn.Parameter):
        return False
    transformed = torch._C._functorch.is_functorch_wrapped_tensor(value) or forward_ad._current_level >= 0
    return not transformed and torch._C._len_torch_dispatch_stack() == 0


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
    tensors = [input, target] if weight is None else [input, target, weight]
    if all(isinstance(tensor, Tensor) for tensor in tensors):
        # PyTorch's own parser judges the other arguments; what it accepts (numbers of other types) is then converted.
        is_scalar = isinstance(label_smoothing, Tensor) and label_smoothing.dim() == 0
        known = 0.0 if is_scalar else label_smoothing
        _native_cross_entropy(
            torch.zeros(1, 1), torch.zeros(1).long(), None, None, ignore_index, None, reduction, known
        )
        if known is label_smoothing:
            label_smoothing = float(label_smoothing)
        if reduction == "elementwise_mean":
            reduction = "mean"
    elif loss_dtype is None and empty == "nan":
        # Raises PyTorch's own TypeError, or for a proxy of torch.fx records the native function.
        return _native_cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    return _general(
        "general_cross_entropy",
        (input, target, weight, None, None, None),
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        loss_dtype=loss_dtype,
        empty=empty,
        inplace=inplace,
    )


from .linear import linear_cross_entropy, linear_cross_entropy_with_stats, linear_sparse_cross_entropy  # noqa: E402

"""Cross entropy, its relatives and the negative log likelihood as functions."""

from __future__ import annotations

import math
import operator
from typing import Literal

import torch
from torch import Tensor

from .. import _call
from .._call import (
    PLAIN,
    direct_cross_entropy,
    direct_loss_with_numbers,
    direct_nll_loss,
    is_dtensor,
    is_dynamo_compiling,
    is_mode_enabled,
    takes_directly,
)
from .._options import (
    ALPHA,
    REDUCTIONS,
    TEMPERATURE,
    CrossEntropyStats,
    Options,
    Tensors,
    arithmetic_type,
    as_denominator,
    check_bounds,
    check_loss_dtype,
    check_tensors,
    class_dim,
    classes_at_one,
    is_default,
    is_known,
    is_readable,
    legacy_reduction,
    loss_type,
    number,
    number_or_tensor,
    positions_of,
    widened,
)


def loss_of(tensors: Tensors, options: Options) -> Tensor | CrossEntropyStats:
    """Hands a loss down: of DTensors to where their shards are combined, of others to the operators."""
    if type(tensors.input) not in PLAIN and options.kind is None and is_dtensor(tensors.input):
        from .._parallel import dtensor  # takes a while to import

        return dtensor.loss(tensors, options)
    return _call.loss(tensors, options)


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

    The same pass computes the options that PyTorch does not have: each position's loss is
    :math:`s (\mathrm{ce}(x) + z\,\mathrm{lse}(x)^2)`, where
    :math:`x = \mathrm{cap} \tanh(\mathrm{scale} \cdot \mathrm{input} / \mathrm{cap})`
    (softcap: Gemma 2, arXiv 2408.00118; z-loss: PaLM, arXiv 2204.02311, section 5).

    Args:
        input: logits of shape (C), (N, C) or (N, C, d1, ..., dK), in float16, bfloat16, float32 or float64 and with any
            strides, which are read as they are. The gradient has the input's memory format. Or a DTensor with any
            placements: the loss is a DTensor, too, and sharded classes stay where they are.
        target: class indices of shape (), (N) or (N, d1, ..., dK) in int64, int32, int16, int8 or uint8; or
            probabilities of the input's shape in any floating dtype, which may require a gradient.
        weight: one factor per class, of shape (C).
        size_average, reduce: deprecated, as in PyTorch; see ``reduction``.
        ignore_index: positions with this target add nothing to the loss, are not counted by ``'mean'`` and have a
            gradient of zero; their logits are not used, so they may be NaN. Class indices only.
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.
        label_smoothing: :math:`\varepsilon` in [0, 1], the share of the target that is spread evenly over the classes.
        sample_weight: :math:`s`, a factor for each position, of the shape of class indices; floating, bool or integer.
            ``'mean'`` then divides by the sum of :math:`w_y s` over the positions that count, for probabilities of
            :math:`s`. If it requires a gradient, PyTorch's own operations compute the loss.
        z_loss: :math:`z`, the factor of the squared logarithm of the sum of exponentials. Class weights have no part in
            this term: ``'mean'`` adds :math:`z` times the mean of :math:`\mathrm{lse}^2` over the positions that count,
            weighted by ``sample_weight`` alone. A given ``denominator`` divides both terms.
        softcap: a positive bound that logits approach smoothly, or None.
        logit_scale: the factor that logits are multiplied by first, an inverse temperature. As a tensor it may require
            a gradient, which takes one more read of the logits and of their gradient.
        label_smoothing, z_loss, softcap, logit_scale: these four may be scalar tensors, too. A call waits for the value
            of one that is not on the CPU. ``torch.compile`` compiles a call twice at most, whatever their values are;
            with ``dynamic=True`` it does if the first value is not the default. If one other than ``logit_scale``
            requires a gradient, PyTorch's own operations compute the loss.
        loss_dtype: dtype of the result. Default: the input's, promoted with probabilities and their weights; float32
            for half logits under autocast. Sums are always formed in float32 or better.
        empty: the value of a mean over nothing (0 / 0): ``'nan'``, as in PyTorch, or ``'zero'``.
        denominator: the divisor of ``'mean'`` instead of its own: a number, or a scalar tensor on the logits' device,
            which is not waited for. With the number of tokens in all micro-batches, each of them adds its share of one
            mean. DDP and FSDP average gradients over ranks: there it is ``tokens / world_size``, of the tokens of all
            ranks. May require a gradient.
        inplace: the backward leaves the gradient in the logits' memory, and needs none of its own. Logits are intact
            until then: read metrics before the backward, for afterwards they see gradients, and no error. Autograd
            raises an error if a node of the graph needs the overwritten values. Without effect on a leaf or a view of
            one, whose values the user keeps, and where it is impossible (expanded logits, ``create_graph=True``,
            ``torch.compile``).
        dim: the dimension of the classes in logits and probabilities; 0 for 1-d logits. Any other than 1 is read in
            place, as a view: -1 for logits (B, T, V), whose target and losses are (B, T).

    Returns:
        A scalar, or for ``reduction='none'`` a tensor of shape (), (N) or (N, d1, ..., dK).

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``; or there is no dimension ``dim``.
        ValueError: ``sample_weight`` of another shape; ``z_loss``, ``softcap`` or ``logit_scale`` that is not finite;
            ``z_loss`` below 0, ``softcap`` not above 0; ``denominator`` with another reduction, not a scalar, or the
            number 0.
        RuntimeError, ValueError, TypeError: as PyTorch's own function, with its messages.

        Values of scalar tensors are checked, too, unless a transform of ``torch.func`` batches them.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    if dim != 1:
        input, target = classes_at_one(dim, input=input, target=target)
    if (  # takes_directly, written out: a call takes a part of a small loss's time
        not is_dynamo_compiling()
        and type(input) in PLAIN
        and type(target) in PLAIN
        and (weight is None or type(weight) in PLAIN)
        and reduction in ("mean", "sum", "none")
        and type(ignore_index) is int
        and -(2**63) <= ignore_index < 2**63
        and type(label_smoothing) is type(z_loss) is type(logit_scale) is float
        and (loss_dtype is None and empty == "nan" and denominator is None and not inplace)
        and not is_mode_enabled()
    ):
        if z_loss == 0 and logit_scale == 1 and sample_weight is None and softcap is None:
            return direct_cross_entropy(input, target, weight, REDUCTIONS[reduction], ignore_index, label_smoothing)
        if (softcap is None or (type(softcap) is float and softcap > 0)) and (
            sample_weight is None or (type(sample_weight) in PLAIN and sample_weight.is_floating_point())
        ):
            return direct_loss_with_numbers(  # written out, too: a call with * takes longer
                input,
                target,
                weight,
                sample_weight,
                REDUCTIONS[reduction],
                ignore_index,
                label_smoothing,
                z_loss,
                softcap or 0.0,
                logit_scale,
                TEMPERATURE,
                ALPHA,
            )
    options = Options(reduction, ignore_index, loss_dtype, empty, label_smoothing, z_loss, softcap, logit_scale)
    if inplace:
        options = options._replace(inplace=inplace)
    return loss_of(Tensors(input, target, weight, None, sample_weight, denominator), options)


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
    r"""Cross entropy and statistics from the same read of the logits: :class:`CrossEntropyStats`.

    Takes the arguments of :func:`cross_entropy`, and raises its errors. ``lse``, ``target_log_prob`` and ``entropy``
    are differentiable, and one backward pass makes the gradient of any mixture of them and the loss: a policy loss is
    ``-(advantage * stats.target_log_prob).mean() - beta * stats.entropy.mean()``.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    if dim != 1:
        input, target = classes_at_one(dim, input=input, target=target)
    options = Options(reduction, ignore_index, loss_dtype, empty, label_smoothing, z_loss, softcap, logit_scale)
    options = options._replace(inplace=inplace, statistics=True)
    return loss_of(Tensors(input, target, weight, None, sample_weight, denominator), options)


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
    :func:`cross_entropy` against the dense target with the pairs :math:`(i_j, p_j)`, which is never made. Repeated
    indices add up; probabilities are neither checked nor normalized.

    Args:
        input: logits of shape (C), (N, C) or (N, C, d1, ..., dK).
        indices: k classes for each position, (k), (N, k) or (N, k, d1, ..., dK), of any integer dtype. One that is
            ``ignore_index`` adds nothing; a position of only such is ignored.
        probs: their probabilities, of the same shape and any floating dtype. May require a gradient.
        weight: one factor per class, of shape (C), any floating dtype.
        reduction: ``'none'``, ``'sum'``, or ``'mean'``, which divides by the number of positions that are not ignored,
            or the sum of their ``sample_weight``; not by class weights, as for probabilities.
        dim: the dimension of the classes and of the k pairs.
        others: as for :func:`cross_entropy`.

    Returns:
        A scalar, or for ``reduction='none'`` a loss for each position; in the input's dtype, or ``loss_dtype``.

    Raises:
        IndexError: an index is neither a class nor ``ignore_index``.
        ValueError: shapes that disagree, no pairs (k = 0), or as :func:`cross_entropy`.
    """
    if dim != 1:
        input, indices, probs = classes_at_one(dim, input=input, indices=indices, probs=probs)
    options = Options(reduction, ignore_index, loss_dtype, empty, label_smoothing, z_loss, softcap, logit_scale)
    tensors = Tensors(input, indices, weight, probs, sample_weight, denominator)
    return _call.loss(tensors, options._replace(kind="pairs"))


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

    It equals ``lam * cross_entropy(input, target_a, ...) + (1 - lam) * cross_entropy(input, target_b, ...)`` for every
    option: a mean divides each part by its own denominator. If ``lam`` has elements, each multiplies the losses of its
    sample or position before they are summed.

    Args:
        input: logits of shape (C), (N, C) or (N, C, d1, ..., dK).
        target_a, target_b: class indices of shape (), (N) or (N, d1, ..., dK).
        lam: the share of ``target_a``: a number in [0, 1], or a tensor of shape (), (N) or (N, d1, ..., dK), whose
            values are not checked. It may require a gradient. With a DTensor it is a scalar.
        weight: one factor per class, of shape (C), any floating dtype.
        ignore_index: a label with this value adds nothing to its part, and is not counted there.
        others: as for :func:`cross_entropy`. The logits are read twice for class weights with both ``label_smoothing``
            and ``z_loss``, and for a ``lam`` that requires a gradient with one of these two.

    Returns:
        A scalar, or for ``reduction='none'`` a loss for each position; in the input's dtype, or ``loss_dtype``.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``.
        ValueError: shapes that disagree, a number ``lam`` out of range, or as :func:`cross_entropy`.
    """
    if dim != 1:
        (input,) = classes_at_one(dim, input=input)
    if not (isinstance(input, Tensor) and isinstance(target_a, Tensor) and isinstance(target_b, Tensor)):
        check_tensors(input=input, target_a=target_a, target_b=target_b)
    for name, target in (("target_a", target_a), ("target_b", target_b)):
        if target.is_floating_point() or target.is_complex():
            raise ValueError(f"{name} must be a tensor of class indices, but got {target.dtype}")
    if target_a.shape != target_b.shape:
        raise ValueError(
            f"target_b must have the shape of target_a, {tuple(target_a.shape)}, but got {tuple(target_b.shape)}"
        )
    if target_a.shape != positions_of(input):
        raise ValueError(
            f"target_a must have a class for each position of an input of shape {tuple(input.shape)}, "
            f"but got the shape {tuple(target_a.shape)}"
        )
    options = Options(reduction, ignore_index, loss_dtype, empty, label_smoothing, z_loss, softcap, logit_scale)
    tensors, targets = Tensors(input, target_a, weight, None, sample_weight, denominator), (target_a, target_b)
    if is_dtensor(input):
        return _mixture_of_dtensors(tensors, targets, lam, options)
    axis = class_dim(input)
    if isinstance(lam, Tensor):
        if lam.is_complex():
            raise ValueError(f"lam must be a number or a tensor of a real type, but got {lam.dtype}")
        if lam.dim() > target_a.dim() or lam.shape != target_a.shape[: lam.dim()]:
            raise ValueError(
                f"lam must be a number or a tensor whose shape begins that of target_a, {tuple(target_a.shape)}, "
                f"but got the shape {tuple(lam.shape)}"
            )
        lam = lam.to(torch.promote_types(lam.dtype, arithmetic_type(input)))  # before 1 - lam is formed
        lam = lam.reshape(lam.shape + (1,) * (target_a.dim() - lam.dim()))
        shares = torch.stack([lam, 1 - lam], axis)
    else:
        lam = check_bounds("lam", number("lam", lam))
        wide = {"dtype": torch.float64, "device": input.device}
        if is_dynamo_compiling():  # traced for any number
            shares = torch.arange(2, **wide) * (1 - 2 * lam) + lam
        else:
            shares = torch.linspace(lam, 1 - lam, 2, **wide)
        if target_a.dim() > axis:
            shares = shares.view((2,) + (1,) * (target_a.dim() - axis))
    return _mixture(tensors, targets, shares, axis, options)


def _mixture_of_dtensors(tensors: Tensors, targets: tuple, lam: float | Tensor, options: Options) -> Tensor:
    """Computes the two losses one after the other, since the operator of pairs takes no DTensors."""
    from .._parallel import dtensor

    arithmetic = arithmetic_type(tensors.input)
    if isinstance(lam, Tensor):
        if lam.dim() > 0 or lam.is_complex():
            raise ValueError(
                "lam must be a number or a real scalar tensor where the input is a DTensor, "
                f"but got {lam.dtype} of shape {tuple(lam.shape)}"
            )
        lam = dtensor.on_mesh(lam.to(torch.promote_types(lam.dtype, arithmetic)), tensors.input)
    else:
        lam = check_bounds("lam", number("lam", lam))
    if isinstance(tensors.weight, Tensor):  # native takes only the logits' type
        tensors = tensors._replace(weight=tensors.weight.to(arithmetic))
    of_part = options._replace(loss_dtype=arithmetic)
    a, b = (loss_of(tensors._replace(target=target), of_part) for target in targets)
    return (lam * a + (1 - lam) * b).to(options.loss_dtype or loss_type(tensors.input, targets[0], None))


def _mixture(tensors: Tensors, targets: tuple, shares: Tensor, axis: int, options: Options) -> Tensor:
    """The sum over labels j of ``shares`` times their cross entropy, each divided by its own denominator.

    A label's factor F is its share divided by the denominator of its part, or zero where the label is ignored. The loss
    of a position is sum_j F_j (1 - e) w_j t_j + (sum_j F_j) smoothing + (sum_j G_j) z lse^2, where G is divided by the
    denominators of the z-loss, which have no class weights. So the labels are pairs of one call, and the sum of a
    position's factors is its sample weight, unless F and G are both needed and differ.
    """
    input, _, weight, _, sample_weight, denominator = tensors
    reduction, ignore_index, loss_dtype, empty, *_ = options
    indices = torch.stack(targets, axis)
    well_formed = (
        (sample_weight is None or _is_real(sample_weight, targets[0].shape))
        and (weight is None or _is_real(weight, input.shape[axis : axis + 1]))
        and (denominator is None or reduction == "mean")
        and -(2**63) <= operator.index(ignore_index) < 2**63
    )
    if not well_formed:  # the operator raises an error
        tensors = tensors._replace(target=indices, companion=shares.expand(indices.shape))
        return _call.loss(tensors, options._replace(kind="pairs"))
    if indices.dtype != torch.int64:
        indices = indices.long()
    counted = reduction in ("mean", "elementwise_mean") and denominator is None
    smoothed, penalized = _may_differ(options.label_smoothing, 0), _may_differ(options.z_loss, 0)
    valid = indices != ignore_index if counted or smoothed or penalized else None
    counts = of_classes = None
    if counted:
        counts = of_classes = _denominators(indices, valid, axis, None, sample_weight)
        if weight is not None:
            of_classes = _denominators(indices, valid, axis, weight, sample_weight)
    apart = smoothed and penalized and of_classes is not counts
    if apart or (shares.requires_grad and (smoothed or penalized)):
        of_parts = zip(targets, shares.expand(indices.shape).unbind(axis), strict=True)
        loss = _mixture_of_two_passes(tensors, of_parts, counts, of_classes, options)
        if denominator is not None:
            denominator = as_denominator(denominator, input)
            if empty == "zero":
                denominator = torch.where((denominator == 0) & (loss == 0), 1.0, denominator)
            loss = loss / denominator
        return loss.to(loss_dtype or loss_type(input, targets[0], None))
    factors = shares if of_classes is None else _quotient(shares, of_classes, empty)
    nothing = factors
    if smoothed or penalized:
        of_each = _quotient(shares, counts, empty) if penalized and counts is not of_classes else factors
        of_position = torch.where(valid, of_each, 0.0).sum(axis)
        factors = factors / torch.where(of_position == 0, 1.0, of_position).unsqueeze(axis)
        sample_weight = of_position if sample_weight is None else of_position * sample_weight
    loss = _call.loss(
        Tensors(input, indices, weight, factors.expand(indices.shape), sample_weight, denominator),
        options._replace(kind="pairs", reduction="sum" if counted else reduction),
    )
    if counted and empty == "nan":  # a part over nothing is NaN, and has no gradient
        if nothing.requires_grad or nothing.numel() != 2:
            nothing = 0.0 / of_classes.detach()
        dtype, loss = loss.dtype, torch.add(loss, nothing.sum(dtype=arithmetic_type(loss)), alpha=0)
        return loss if loss.dtype == dtype else loss.to(dtype)
    return loss


def _mixture_of_two_passes(tensors: Tensors, parts, counts, of_classes, options: Options) -> Tensor:
    """Computes the same mixture, but for a given denominator, one cross entropy after the other."""
    loss, arithmetic, weight, empty = 0.0, arithmetic_type(tensors.input), tensors.weight, options.empty
    of_part = options._replace(reduction="none", loss_dtype=arithmetic, empty="nan")
    for place, (target, share) in enumerate(parts):
        weight_of_part = weight if weight is None else weight.to(arithmetic)
        if of_classes is not counts:  # so that one denominator divides both terms, as in csrc/host/make_problem.cpp
            ratio = _quotient(counts, of_classes, empty).reshape(-1)[place]
            weight_of_part = (weight.double() * ratio).to(arithmetic)
        of_part_tensors = tensors._replace(target=target, weight=weight_of_part, denominator=None)
        losses = share * loss_of(of_part_tensors, of_part)
        if options.reduction != "none":
            losses = losses.sum()
        loss = loss + (losses if counts is None else _quotient(losses, counts.reshape(-1)[place], empty))
    return loss


def _quotient(values: Tensor, denominator: Tensor, empty: str) -> Tensor:
    return values / (denominator if empty == "nan" else torch.where(denominator == 0, math.inf, denominator))


def _denominators(indices, valid, axis, weight, sample_weight) -> Tensor:
    """Returns the denominator of the mean of each label's cross entropy, broadcastable to (N, 2, d1, ..., dK)."""
    parts = valid
    if weight is not None:  # a class out of range is an error elsewhere
        of_labels = weight.double()[indices.clamp(0, weight.numel() - 1)]
        parts = torch.where(valid, of_labels, 0.0)
    if sample_weight is not None:
        parts = torch.where(valid, parts * sample_weight.double().unsqueeze(axis), 0.0)
    positions = [dim for dim in range(indices.dim()) if dim != axis]
    return parts.sum(positions, keepdim=True, dtype=torch.float64) if positions else parts.double()


def _is_real(tensor: Tensor, shape: torch.Size) -> bool:
    return isinstance(tensor, Tensor) and tensor.shape == shape and not tensor.is_complex()


def _may_differ(value: float | Tensor, default: float) -> bool:
    """Returns True for another number, and for a tensor, which is not read."""
    return isinstance(value, Tensor) or value != default


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
        alpha: the share of the distillation, in [0, 1]. Required with a target, else without effect. Both may be scalar
            tensors, as the numbers of :func:`cross_entropy`.
        kind: ``'kl'`` or ``'ce'``. Their gradients of the student are the same.
        reduction: ``'none'``, ``'sum'``, or ``'mean'``: over the positions that count, by the sum of their
            ``sample_weight``; the ``'batchmean'`` of :func:`torch.nn.functional.kl_div` for logits (N, C).
        sample_weight: a factor for each position, of the shape of ``target``.
        ignore_index: positions with this target add nothing to either part.
        label_smoothing, weight: of the labels' cross entropy alone, as for :func:`cross_entropy`; without effect if
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
        student_logits, teacher_logits = classes_at_one(
            dim, student_logits=student_logits, teacher_logits=teacher_logits
        )
    if target is not None and alpha is None:
        raise ValueError("alpha, the share of the distillation beside the labels, must be given with a target")
    tensors = Tensors(student_logits, teacher_logits, None, target, sample_weight)
    options = Options(
        reduction,
        ignore_index,
        loss_dtype,
        temperature=temperature,
        alpha=1.0 if alpha is None else alpha,
        kl=kind == "kl",
        kind="teacher",
    )
    if target is not None and (weight is not None or not is_default(label_smoothing, 0.0)):
        return _distillation_of_two_passes(tensors, weight, label_smoothing, options)
    return _call.loss(tensors, options)


def _distillation_of_two_passes(tensors: Tensors, weight, label_smoothing, options: Options) -> Tensor:
    """Adds the labels' cross entropy, with a denominator of its own, to that of the teacher's, in which the labels
    only say which positions are ignored."""
    student, teacher, _, target, sample_weight, _ = tensors
    check_tensors(student_logits=student, teacher_logits=teacher, target=target)
    alpha = number_or_tensor("alpha", options.alpha)
    value = float(alpha.detach()) if isinstance(alpha, Tensor) and is_readable(alpha) else alpha
    if is_known(value):
        check_bounds("alpha", value)
    if weight is not None:
        check_tensors(weight=weight)
        weight = weight.to(widened(student.dtype))
    wide = widened(torch.promote_types(student.dtype, teacher.dtype))
    distilled = _call.loss(tensors, options._replace(loss_dtype=wide, alpha=1.0))
    of_labels = loss_of(
        Tensors(student, target, weight, None, sample_weight),
        Options(options.reduction, options.ignore_index, wide, label_smoothing=label_smoothing),
    )
    check_loss_dtype(options.loss_dtype)
    if is_known(alpha) and alpha in (0, 1):
        loss = distilled if alpha == 1 else of_labels
    else:
        loss = alpha * distilled + (1 - alpha) * of_labels
    return loss.to(options.loss_dtype or loss_type(student, teacher, None))


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
        ignore_index: as for :func:`cross_entropy`; log-probabilities at ignored positions may be NaN.
        size_average, reduce, reduction, dim: as for :func:`cross_entropy`.

    Returns:
        A scalar, or for ``reduction='none'`` a tensor of shape (), (N) or (N, d1, ..., dK); in the input's dtype, or
        float32 for half log-probabilities under autocast.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``.
        RuntimeError, ValueError, TypeError: as PyTorch's own function, with its messages.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    if dim != 1:
        input, target = classes_at_one(dim, input=input, target=target)
    if takes_directly(input, target, weight, reduction, ignore_index):
        return direct_nll_loss(input, target, weight, REDUCTIONS[reduction], ignore_index)
    return _call.nll_loss(input, target, weight, ignore_index, reduction)

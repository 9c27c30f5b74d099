"""The losses of this package as one writes them without it: PyTorch's own operations, one after the other.

Differentiable any number of times and transformable in every way, so what autograd and the transforms should give is
what they give here. In float64 this is a second opinion on the oracle; in the arithmetic's own type it is the "native"
whose errors an implementation may make too. The signatures are those of `cross_entropy_ext.functional`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Stats(NamedTuple):
    loss: Tensor
    lse: Tensor
    target_log_prob: Tensor
    entropy: Tensor
    z_loss: Tensor
    argmax: Tensor


def classes_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1 if tensor.dim() > 1 else 0, -1)


def transformed(logits: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    x = logits * logit_scale
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def without_ignored(x: Tensor, counts: Tensor) -> Tensor:
    """Zeros at ignored positions, whose logits are not to be read: not even for a gradient of zero times NaN."""
    return torch.where(counts.unsqueeze(-1), x, torch.zeros_like(x))


def cross(a: Tensor, log_p: Tensor) -> Tensor:
    """-sum_c a_c log p_c, where nothing times infinity is nothing."""
    return -(a * torch.where((a == 0) & log_p.isinf(), torch.zeros_like(log_p), log_p)).sum(-1)


def gather(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def reduce(
    losses: Tensor,
    counts: Tensor,
    factors: Tensor | None,
    sample_weight: Tensor | None,
    reduction: str,
    empty: str,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """`factors`: what a position's loss is divided by in a mean, besides its sample weight; unless by `denominator`."""
    s = torch.ones_like(losses) if sample_weight is None else sample_weight.to(losses.dtype)
    losses = torch.where(counts, losses * s, torch.zeros_like(losses))
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if denominator is None:
        parts = s if factors is None else s * factors
        denominator = torch.where(counts, parts, torch.zeros_like(parts)).sum()
    else:
        denominator = torch.as_tensor(denominator).to(losses)
    if empty == "zero":
        nothing = (denominator == 0) & (losses.sum() == 0)
        denominator = torch.where(nothing, torch.ones_like(denominator), denominator)
    return losses.sum() / denominator


def cross_entropy_with_stats(
    input: Tensor,
    target: Tensor,
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
    empty: str = "nan",
    denominator: float | Tensor | None = None,
    inplace: bool = False,
) -> Stats:
    x = classes_last(transformed(input, softcap, logit_scale))
    classes, e = x.size(-1), label_smoothing
    w = torch.ones(classes, dtype=x.dtype) if weight is None else weight.to(x.dtype)
    if input.shape == target.shape:
        counts = torch.ones_like(x[..., 0], dtype=torch.bool)
        q, factors = classes_last(target), None
    else:
        y = target.long()
        counts = y != ignore_index
        y = torch.where(counts, y, torch.zeros_like(y))
        x = without_ignored(x, counts)
        q, factors = F.one_hot(y, classes).to(x.dtype), w[y]
    a = w * ((1 - e) * q + e / classes)
    if input.shape != target.shape:  # the label's own weight, and each class's
        a = (1 - e) * factors.unsqueeze(-1) * q + e / classes * w
    log_p, lse = x.log_softmax(-1), x.logsumexp(-1)
    z = z_loss * lse.square()

    def reduced(losses: Tensor, factors: Tensor | None = None) -> Tensor:
        return reduce(losses, counts, factors, sample_weight, reduction, empty, denominator)

    def statistic(value: Tensor) -> Tensor:
        return torch.where(counts, value, torch.zeros_like(value))

    p = log_p.exp()
    loss = reduced(cross(a, log_p), factors)
    loss = loss + reduced(z) if z_loss != 0 else loss
    return Stats(
        loss.to(loss_dtype or loss.dtype),
        statistic(lse),
        statistic(-cross(q, log_p)),
        statistic(cross(p, log_p)),
        reduced(z).detach().to(loss_dtype or z.dtype),
        torch.where(counts, x.argmax(-1), -2 if ignore_index == -1 else -1),
    )


def cross_entropy(*arguments, **options) -> Tensor:
    return cross_entropy_with_stats(*arguments, **options).loss


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
    empty: str = "nan",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """A dense target is scattered together; what the sparse loss is there to avoid."""
    x = classes_last(transformed(input, softcap, logit_scale))
    indices, probs = classes_last(indices.long()), classes_last(probs).to(x.dtype)
    classes, e = x.size(-1), label_smoothing
    w = torch.ones(classes, dtype=x.dtype) if weight is None else weight.to(x.dtype)
    valid = indices != ignore_index
    counts = valid.any(-1)
    x = without_ignored(x, counts)
    probs = torch.where(valid, probs, torch.zeros_like(probs))
    q = torch.zeros_like(x).scatter_add(-1, torch.where(valid, indices, torch.zeros_like(indices)), probs)
    losses = cross(w * ((1 - e) * q + e / classes), x.log_softmax(-1)) + z_loss * x.logsumexp(-1).square()
    return reduce(losses, counts, None, sample_weight, reduction, empty, denominator).to(loss_dtype or losses.dtype)


def mixup_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: float | Tensor,
    weight: Tensor | None = None,
    **options,
) -> Tensor:
    """lam CE(a) + (1 - lam) CE(b): where lam has elements, each of a position's loss."""
    share, loss = share_of_mixup(target_a, lam, input.dtype), 0
    s, reduction = options.pop("sample_weight", None), options.pop("reduction", "mean")
    loss_dtype, given = options.pop("loss_dtype", None), options.pop("denominator", None)
    for target, part in ((target_a, share), (target_b, 1 - share)):
        w, divide_by, of_z = denominators_of_mixup(input, target, weight, s, reduction, given, **options)
        factor = part if s is None else part * s.to(part.dtype)
        if of_z is not None:  # both terms divided by the same number
            w, divide_by = w * (of_z / divide_by), of_z
        loss = loss + cross_entropy(
            input, target, w, sample_weight=factor, reduction=reduction, denominator=divide_by, **options
        )
    return loss.to(loss_dtype or loss.dtype)


def share_of_mixup(target_a: Tensor, lam: float | Tensor, dtype: torch.dtype) -> Tensor:
    share = (lam if isinstance(lam, Tensor) else torch.tensor(lam, dtype=torch.double)).to(dtype)
    return share.reshape(share.shape + (1,) * (target_a.dim() - share.dim())).expand(target_a.shape)


def denominators_of_mixup(
    input: Tensor, target: Tensor, weight: Tensor | None, s: Tensor | None, reduction: str, given: object, **options
) -> tuple[Tensor | None, object, Tensor | None]:
    """The class weights, the denominator of a part, and that of its z-loss where it is another one."""
    w = None if weight is None else weight.to(input.dtype)
    if reduction != "mean" or given is not None:
        return w, given, None
    counts = target.long() != options.get("ignore_index", -100)
    of_z = counts.to(input.dtype) if s is None else torch.where(counts, s.to(input.dtype), 0)
    parts = of_z if w is None else of_z * w[torch.where(counts, target.long(), 0)]
    return w, parts.sum(), of_z.sum() if w is not None and options.get("z_loss", 0) != 0 else None


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    kind: str = "kl",
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    x, z = classes_last(student_logits), classes_last(teacher_logits)
    counts = torch.ones_like(x[..., 0], dtype=torch.bool) if target is None else target.long() != ignore_index
    x, z = without_ignored(x, counts), without_ignored(z, counts)
    log_q, log_p = (z / temperature).log_softmax(-1), (x / temperature).log_softmax(-1)
    q = log_q.exp()
    losses = cross(q, log_p) - (cross(q, log_q) if kind == "kl" else 0)
    losses = temperature**2 * losses
    if target is not None:
        y = torch.where(counts, target.long(), torch.zeros_like(target.long()))
        losses = alpha * losses - (1 - alpha) * gather(x.log_softmax(-1), y)
    return reduce(losses, counts, None, sample_weight, reduction, "nan").to(loss_dtype or losses.dtype)

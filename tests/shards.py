"""The losses of logits whose classes are cut into shards, as processes that have one each would make them together: the
private operators on every shard, and between forward and backward a few numbers for each position.

With coefficients a_c, a shard r of the classes has its own lse_r, L_r = sum_c a_c (lse_r - x_c), A_r = sum_c a_c, and

    loss     sum_r L_r + A_r (lse - lse_r)        every term >= 0, as lse >= lse_r: nothing cancels
    entropy  sum_r P_r (H_r + lse - lse_r)        with P_r = exp(lse_r - lse)

Here all shards are in one process, and the numbers are put together in float64, but for what the backward is given.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from compositions import Stats
from oracle import zero_if
from torch import Tensor

ops = torch.ops.cross_entropy_ext
FORMS = {None: 0, "pairs": 3, "teacher": 4}
LSE, LSE_LOST, MASS, ENTROPY, TARGET_LOG_PROB, ARGMAX = range(6)


def sizes_of(classes: int, count: int) -> list[int]:
    """Uneven ones; of three and more the second has a single class."""
    count = min(count, classes)
    if count < 3:
        return [classes - (count - 1) * max(classes // 3, 1), *[max(classes // 3, 1)] * (count - 1)]
    shares = [2, 0, *range(3, count + 1)]
    sizes = [1 + (classes - count) * share // sum(shares) for share in shares]
    return [*sizes[:-1], classes - sum(sizes[:-1])]


def numbered(
    begin: int,
    classes: int,
    *,
    reduction: str = "none",
    form: str | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    statistics: bool = False,
    loss_dtype: int = 7,
) -> tuple[list[int], list[float]]:
    """The options of the private operators for the shard that begins with class `begin` of `classes`."""
    flags = statistics << 2 | FORMS[form] << 4
    integers = [("none", "mean", "sum").index(reduction), ignore_index, loss_dtype, flags, begin, classes]
    return integers, [label_smoothing, z_loss, softcap or 0.0, logit_scale, 1.0, 1.0]


def lse_together(high: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From every shard's lse as two numbers (shards, positions): that of all classes, and how far each is behind it."""
    top = (high + low).argmax(0, keepdim=True)  # of a NaN, too
    of_top = high.gather(0, top), low.gather(0, top)
    gaps = (of_top[0] - high) + (of_top[1] - low)
    others = (-gaps).exp().scatter(0, top, 0.0).sum(0) + (of_top[0] - of_top[0])[0]
    more = others.log1p()
    return of_top[0][0], of_top[1][0] + more, gaps.scatter(0, top, 0.0) + more


class Sharded(torch.autograd.Function):
    """What `functional` returns, from shards. `options`: those of `numbered`, `empty` and `loss_dtype` of torch."""

    @staticmethod
    def forward(ctx, sizes, options, input, target, weight, companion, sample_weight):
        options = dict(options)
        empty, loss_dtype = options.pop("empty", "nan"), options.pop("loss_dtype", None)
        axis = 1 if input.dim() > 1 else 0
        classes, soft = input.size(axis), companion is None and input.shape == target.shape
        begins = [0, *accumulate(sizes)][:-1]
        reduction, z_loss = options.pop("reduction"), options.pop("z_loss", 0.0)
        positions = input.select(axis, 0).shape

        def local(tensor: Tensor, begin: int, size: int) -> Tensor:
            return tensor.narrow(axis, begin, size)

        found, losses = [], []
        for begin, size in zip(begins, sizes, strict=True):
            part = local(target, begin, size) if soft else target
            loss, saved, _ = ops._forward(
                local(input, begin, size), part, [weight, companion], *numbered(begin, classes, **options)
            )
            assert loss.dtype == torch.float64 and loss.shape == positions
            assert saved.size(0) == (6 if options["statistics"] else 3)
            losses.append(loss.reshape(-1))
            found.append(saved)
        arithmetic = found[0].dtype
        high, low, mass = (torch.stack([saved[row].double() for saved in found]) for row in (LSE, LSE_LOST, MASS))
        high, low, behind = lse_together(high, low)
        lse = high + low
        loss = (torch.stack(losses) + zero_if(mass == 0, mass * behind)).sum(0)

        if soft:
            counts = torch.ones(positions, dtype=torch.bool)
        else:
            counts = target != options.get("ignore_index", -100)
            counts = counts.any(axis) if companion is not None else counts
        w, weighted = torch.ones((), dtype=torch.double), weight is not None and companion is None and not soft
        if weighted:
            w = weight.double()[zero_if(~counts, target.long())]
        s = torch.ones((), dtype=torch.double) if sample_weight is None else sample_weight.double()

        def of_positions(value: Tensor) -> Tensor:
            return zero_if(~counts, value.reshape(positions))

        def reduced(loss: Tensor) -> Tensor:
            loss = of_positions(loss) * s
            return loss if reduction == "none" else loss.sum() / divide_by

        divide_by = torch.ones((), dtype=torch.double)
        z = z_loss * lse.square()
        if reduction == "mean":
            divide_by = zero_if(~counts, (w * s).expand(positions)).sum()
            if z_loss != 0 and weighted:  # class weights that divide the cross entropy do not divide the z-loss
                of_classes, divide_by = divide_by, zero_if(~counts, s.expand(positions)).sum()
                loss, weight = loss * (divide_by / of_classes), weight.double() * (divide_by / of_classes)
            if empty == "zero" and divide_by == 0 and zero_if(~counts, (loss + z).reshape(positions) * s).sum() == 0:
                divide_by = torch.ones((), dtype=torch.double)
        result = reduced(loss + z).to(loss_dtype or arithmetic)

        rounded = lse.to(arithmetic)
        saved = [rounded, ((high - rounded) + low).to(arithmetic), mass.sum(0).to(arithmetic)]
        outputs = [result, of_positions(lse).to(arithmetic)]
        if options["statistics"]:
            share = (-behind).exp()
            entropies = torch.stack([saved[ENTROPY].double() for saved in found])
            entropy = zero_if(share == 0, share * (entropies + behind)).sum(0)
            saved += [entropy.to(arithmetic), torch.zeros_like(rounded), torch.zeros_like(rounded)]

            index = torch.int64 if arithmetic == torch.float64 else torch.int32
            argmax = [saved.view(index)[ARGMAX].long().reshape(positions) for saved in found]
            tops, log_probs, at = [], [], zero_if(~counts, target.long()) if not soft else None
            for begin, size, saved_here, top, gap in zip(begins, sizes, found, argmax, behind, strict=True):
                logit = local(input, begin, size).gather(axis, top.clamp(min=0).unsqueeze(axis)).squeeze(axis)
                tops.append(logit.double() * options.get("logit_scale", 1.0))
                q = local(target, begin, size).double().sum(axis) if soft else (begin <= at) & (at < begin + size)
                q = q.double().reshape(-1)
                log_probs.append(saved_here[TARGET_LOG_PROB].double() - zero_if(q == 0, q * gap))
            first = torch.stack(tops).argmax(0, keepdim=True)
            argmax = (torch.stack(argmax) + torch.tensor(begins).view(-1, *[1] * len(positions))).gather(0, first)[0]
            outputs += [of_positions(sum(log_probs)).to(arithmetic), of_positions(entropy).to(arithmetic)]
            outputs.append(reduced(z).to(loss_dtype or arithmetic))
            outputs.append(torch.where(counts, argmax, -2 if options.get("ignore_index") == -1 else -1))
            ctx.mark_non_differentiable(*outputs[4:])
        ctx.save_for_backward(input, target, weight, companion, sample_weight, torch.stack(saved), divide_by)
        ctx.given = sizes, begins, axis, soft, {**options, "reduction": reduction, "z_loss": z_loss}
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad_output, *grads):
        input, target, weight, companion, sample_weight, saved, divide_by = ctx.saved_tensors
        sizes, begins, axis, soft, options = ctx.given
        grad_statistics = divide_by  # a scalar, for none
        if options["statistics"]:
            grad_statistics = torch.stack([g.reshape(-1).to(saved.dtype) for g in grads[:3]])
        probabilities = companion if companion is not None else target
        wanted = [ctx.needs_input_grad[2], ctx.needs_input_grad[3] or ctx.needs_input_grad[5]]
        grad_input = torch.empty_like(input)
        grad_target = torch.empty_like(probabilities) if soft else torch.zeros_like(probabilities)
        for begin, size in zip(begins, sizes, strict=True):
            part = target.narrow(axis, begin, size) if soft else target
            of_logits, of_target = ops._backward(
                grad_output,
                grad_statistics,
                input.narrow(axis, begin, size),
                part,
                [weight, companion, sample_weight],
                saved,
                divide_by,
                *numbered(begin, input.size(axis), **options),
                wanted,
            )
            if wanted[0]:
                grad_input.narrow(axis, begin, size).copy_(of_logits)
            if wanted[1]:
                part = grad_target.narrow(axis, begin, size) if soft else grad_target
                part.copy_(of_target if soft else part + of_target)  # of a pair no more than one shard has a gradient
        grad_target = grad_target if wanted[1] else None
        pairs = companion is not None
        return (
            None,
            None,
            grad_input if wanted[0] else None,
            *(None if pairs else grad_target, None),
            (grad_target if pairs else None),
            None,
        )


def sharded(function: Callable, count: int) -> Callable:
    """A function of `functional`, on as many shards."""

    def with_stats(input, target, weight=None, *, companion=None, sample_weight=None, statistics=True, **options):
        options = {"reduction": "mean", "statistics": statistics, **options}
        sizes = sizes_of(input.size(1 if input.dim() > 1 else 0), count)
        results = Sharded.apply(sizes, options, input, target, weight, companion, sample_weight)
        if not statistics:
            return results[0]
        stats = Stats(*results)
        if input.shape == target.shape and (weight is not None or options.get("label_smoothing", 0.0)):
            # log p of the probabilities as they are
            kept = {name: options[name] for name in ("softcap", "logit_scale") if name in options}
            return stats._replace(
                target_log_prob=-with_stats(input, target, statistics=False, reduction="none", **kept)
            )
        return stats

    def cross_entropy_with_stats(input, target, weight=None, **options):
        return with_stats(input, target, weight, **options)

    def cross_entropy(input, target, weight=None, **options):
        return with_stats(input, target, weight, statistics=False, **options)

    def sparse_cross_entropy(input, indices, probs, weight=None, **options):
        return with_stats(input, indices, weight, companion=probs, form="pairs", statistics=False, **options)

    return locals()[function.__name__]

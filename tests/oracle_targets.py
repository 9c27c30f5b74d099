"""Every target and every output in plain float64, and how exact each has to be: `oracle.py` for the functions that
PyTorch has not.

A position's loss is made of *hits* h (a class and its coefficient: of a label, or of a pair) and of coefficients d of
every class (of smoothing, probabilities, a teacher), all of the transformed logits x. With t_c = lse - x_c,

    loss          L = sum_j h_j t_{i_j} + sum_c d_c t_c + z lse^2,  times the position's share S of the result
    d/dx_c        sum_{j: i_j = c} h_j (p_c - 1) + sum_{j: i_j != c} h_j p_c + (sum_k d_k) p_c - d_c + 2 z lse p_c
    statistics    lse, H = sum_c p_c t_c and log p_y = -t_y, whose gradients are added to that
    d/dinput_c    d/dx_c logit_scale sech^2(logit_scale input_c / softcap)

Besides its value every result has a *scale*: the magnitude of the terms that it is the sum of, at which an error of a
few roundings of the arithmetic is allowed (`oracle.assert_as_exact`). A term is as inexact as what it is made of:
exp(x - m) by as many roundings as x - m is long (`Softmax.lengths`); and where logits are transformed, or calculated
before (`noise`), x is itself rounded (`Softmax.noise`). What can be had exactly has no such excuse: p_y - 1 is as small
as the sum of the other probabilities, and coefficients that are zero add nothing to a scale.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import compositions
import torch
from compositions import classes_last, denominators_of_mixup, gather, share_of_mixup
from oracle import (
    ROUNDINGS,
    SMALLEST_POWER,
    Exact,
    arithmetic_of,
    assert_as_exact,
    same_strides,
    storage_bytes,
    zero_if,
)
from torch import Tensor


def finite(value: Tensor) -> Tensor:
    return value.nan_to_num(0.0, posinf=0.0, neginf=0.0)


def times(factor: Tensor | float, value: Tensor) -> Tensor:
    """The product, where nothing times infinity is nothing."""
    return zero_if((value == 0) | (factor == 0), factor * value)


@dataclass
class Softmax:
    """The softmax of logits (classes last), with magnitudes of what arithmetic may lose of it."""

    x: Tensor
    noise: Tensor  # roundings of x: its magnitude, where it was calculated

    def __post_init__(self) -> None:
        m, top = self.x.max(-1, keepdim=True)
        self.gaps = m - self.x
        powers = (-self.gaps).exp()
        # The sum without the maximum's own 1. (m - m: with a maximum of inf, -inf or NaN everything is NaN.)
        others = powers.scatter(-1, top, 0.0).sum(-1, keepdim=True) + (m - m)
        log_s = others.log1p()
        self.p = powers / (others + 1)
        self.not_p = (1 - self.p).scatter(-1, top, others / (others + 1))
        self.terms = self.gaps + log_s  # lse - x, each of them >= 0
        self.lse = (m + log_s).squeeze(-1)

        noise_of_m = self.noise.gather(-1, top)
        noise = finite(self.noise + noise_of_m)
        self.lengths = 1 + finite(self.gaps) + noise  # roundings of p, as a share of it
        inexact = self.p * self.lengths
        inexact_others = inexact.scatter(-1, top, 0.0).sum(-1, keepdim=True)
        self.not_p_scale = self.not_p + torch.where(
            torch.zeros_like(self.p).scatter(-1, top, 1.0) > 0, inexact_others, inexact
        )
        log_s_scale = log_s + inexact_others
        self.terms_scale = finite(self.gaps) + log_s_scale + self.terms.clamp(max=1) * noise
        self.lse_scale = finite(m.abs() + log_s_scale + noise_of_m).squeeze(-1)

        self.entropy_terms = zero_if(self.p == 0, self.p * self.terms)
        self.entropy = self.entropy_terms.sum(-1)
        scales = inexact * self.terms + self.p * self.terms_scale
        self.entropy_scale = finite(zero_if(self.p == 0, scales)).sum(-1)


@dataclass
class Upstream:
    """Gradients of the outputs, each one or one for each position; None where an output is not used."""

    loss: Tensor | None = None
    lse: Tensor | None = None
    target_log_prob: Tensor | None = None
    entropy: Tensor | None = None


@dataclass
class Logits:
    """The input, what becomes of it before its softmax, and the way back."""

    input: Tensor
    softcap: float | None = None
    logit_scale: float = 1.0
    counts: Tensor | None = None  # positions whose logits may be read
    noise: Tensor | None = None  # roundings of the input, where it is the result of a calculation

    def __post_init__(self) -> None:
        raw = classes_last(self.input.detach().double())
        noise = torch.zeros_like(raw) if self.noise is None else classes_last(self.noise)
        if self.counts is not None:
            raw, noise = (zero_if(~self.counts.unsqueeze(-1), v) for v in (raw, noise))
        x = raw * self.logit_scale
        self.slope = torch.full_like(x, self.logit_scale)
        self.slope_terms = torch.zeros_like(x)
        if self.softcap is not None:
            u = x / self.softcap
            x = self.softcap * u.tanh()
            decay = (-2 * u.abs()).exp()
            self.slope = self.logit_scale * 4 * decay / (1 + decay).square()  # sech^2
            self.slope_terms = torch.full_like(x, 2 * abs(self.logit_scale))  # 1 - tanh^2
            self.slope_terms += noise * (2 * u.tanh() * self.slope * self.logit_scale / self.softcap).abs()
        calculated = self.softcap is not None or self.logit_scale != 1
        self.softmax = Softmax(x, noise * self.slope.abs() + (x.abs() if calculated else torch.zeros_like(x)))

    def gradient(self, value: Tensor, scale: Tensor) -> Exact:
        """From the gradient of x to that of the input, in its order of dimensions."""
        scale = scale * self.slope.abs() + value.abs() * self.slope_terms
        value = value * self.slope
        if self.counts is not None:
            value, scale = (zero_if(~self.counts.unsqueeze(-1), v) for v in (value, scale))
        return dense(value, scale)


def dense(value: Tensor, scale: Tensor) -> Exact:
    axis = 1 if value.dim() > 1 else 0
    return Exact(value.movedim(-1, axis), finite(scale).movedim(-1, axis))


@dataclass
class Sum:
    """Losses of positions, weighted and reduced; and each position's share in the result."""

    counts: Tensor
    sample_weight: Tensor | None
    factors: Tensor  # what a mean divides by, besides the sample weights
    reduction: str
    empty: str
    upstream: Tensor | None
    divisor: float | Tensor | None = None  # what a mean divides by instead

    def __post_init__(self) -> None:
        s = self.sample_weight
        self.s = torch.ones_like(self.factors) if s is None else s.detach().double()
        self.denominator, condition = torch.ones((), dtype=torch.double), torch.ones((), dtype=torch.double)
        self.counting = self.reduction == "mean" and self.divisor is None
        if self.counting:
            parts = zero_if(~self.counts, self.s * self.factors)
            self.denominator = parts.sum()
            # By how much terms of both signs make the denominator more inexact than its terms.
            condition = parts.abs().sum() / self.denominator.abs()
        elif self.divisor is not None:
            self.denominator = torch.as_tensor(self.divisor, dtype=torch.double).detach()
        self.condition = condition.nan_to_num(1.0, posinf=1.0)

    def __call__(self, value: Tensor, scale: Tensor) -> Exact:
        value = zero_if(~self.counts, times(self.s, value))
        scale = finite(zero_if(~self.counts, self.s.abs() * scale)) * self.condition
        if self.reduction == "none":
            return Exact(value, scale)
        value, scale = value.sum(), scale.sum()
        self.nothing = (
            self.reduction == "mean" and self.empty == "zero" and bool((self.denominator == 0) & (value == 0))
        )
        if self.nothing:
            return Exact(torch.zeros_like(value), torch.zeros_like(value))
        return Exact(value / self.denominator, finite(scale / self.denominator.abs()))

    @property
    def g(self) -> Tensor:
        """Of each position, before its sample weight."""
        if self.upstream is None:
            return torch.zeros_like(self.factors)
        g = self.upstream.detach().double()
        if self.reduction != "none" and self.nothing:
            g = torch.zeros_like(g)
        return zero_if(~self.counts, (g / self.denominator).expand(self.counts.shape))

    @property
    def shares(self) -> Tensor:
        """S = g s / denominator, the gradient of a position's loss."""
        if self.reduction != "none" and self.nothing:
            return torch.zeros_like(self.factors)
        return zero_if(~self.counts, self.g * self.s)

    def gradient_of_sample_weight(self, losses: Exact, loss: Exact) -> Exact:
        """A mean's denominator, too, depends on it."""
        value, scale = times(self.g, losses.value), self.g.abs() * losses.scale
        if self.counting:
            value = value - self.g * self.factors * loss.value
            scale = scale + (self.g * self.factors).abs() * (loss.value.abs() + loss.scale)
        return Exact(zero_if(~self.counts, value), finite(zero_if(~self.counts, scale)) * self.condition)

    def gradient_of_denominator(self, loss: Exact) -> Exact:
        """Of one that was given: the loss is inverse to it."""
        g = torch.zeros(()) if self.upstream is None or self.reduction == "none" else self.upstream.detach().double()
        share = torch.zeros_like(loss.value) if self.reduction != "none" and self.nothing else g / self.denominator
        return Exact(-share * loss.value, finite(share.abs() * loss.scale))


@dataclass
class Coefficients:
    """Of every position. `hits` (.., k): of the classes `index` (.., k). `spread` (.., C): of every class."""

    index: Tensor
    hits: Tensor
    spread: Tensor
    spread_scale: Tensor
    z: float = 0.0

    def loss(self, f: Softmax) -> Exact:
        own, own_scale = f.terms.gather(-1, self.index), f.terms_scale.gather(-1, self.index)
        value = times(self.hits, own).sum(-1) + times(self.spread, f.terms).sum(-1) + self.z * f.lse.square()
        scale = (self.hits.abs() * own_scale).sum(-1) + times(self.spread_scale, f.terms + f.terms_scale).sum(-1)
        return Exact(value, finite(scale + abs(self.z) * f.lse_scale.square()))

    def gradient(self, f: Softmax, further: Tensor, further_scale: Tensor) -> Exact:
        """To x, where `further` times p_c is added."""
        classes = torch.arange(f.p.size(-1)).view(-1, 1)
        here = self.index.unsqueeze(-2) == classes  # (.., C, k)
        hits = self.hits.unsqueeze(-2)
        own, elsewhere = zero_if(~here, hits).sum(-1), zero_if(here, hits)
        mass = self.spread.sum(-1, keepdim=True)
        value = (
            times(own, -f.not_p)
            + (elsewhere.sum(-1) + mass + further.unsqueeze(-1)) * f.p
            - times(self.spread, torch.ones_like(f.p))
        )
        total = elsewhere.abs().sum(-1) + self.spread_scale.sum(-1, keepdim=True) + further_scale.unsqueeze(-1)
        return Exact(value, own.abs() * f.not_p_scale + total * f.p * f.lengths + self.spread_scale)


def no_hits(f: Softmax) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(f.x[..., :1], dtype=torch.long), torch.zeros_like(f.x[..., :1])


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
    empty: str = "nan",
    denominator: float | Tensor | None = None,
    noise: Tensor | None = None,
    upstream: Upstream,
) -> dict[str, Exact]:
    soft, e, classes = input.shape == target.shape, label_smoothing, input.size(1 if input.dim() > 1 else 0)
    w = torch.ones(classes, dtype=torch.double) if weight is None else weight.detach().double()
    positions = classes_last(input).shape[:-1]
    counts = torch.ones(positions, dtype=torch.bool) if soft else target.detach().long() != ignore_index
    logits = Logits(input, softcap, logit_scale, counts, noise)
    f = logits.softmax
    index, hits = no_hits(f)
    if soft:
        q = classes_last(target.detach().double())
        spread = w * ((1 - e) * q + e / classes)
        spread_scale = (w * (1 - e) * q).abs() + (w * e / classes).abs()
        factors = torch.ones(positions, dtype=torch.double)
    else:
        index = zero_if(~counts, target.detach().long()).unsqueeze(-1)
        factors = w[index.squeeze(-1)]
        hits = (1 - e) * factors.unsqueeze(-1)
        spread = (e / classes * w).expand_as(f.x)
        spread_scale = spread.abs()
    # Class weights are in the denominator of the cross entropy, and not in that of the z-loss.
    apart = z_loss != 0 and weight is not None and not soft and reduction == "mean" and denominator is None
    coefficients = Coefficients(index, hits, spread, spread_scale, 0.0 if apart else z_loss)
    total = Sum(counts, sample_weight, factors, reduction, empty, upstream.loss, denominator)
    losses = coefficients.loss(f)
    loss, s = total(losses.value, losses.scale), total.shares.unsqueeze(-1)
    of_z, losses_of_z = total, Exact(z_loss * f.lse.square(), abs(z_loss) * f.lse_scale.square())
    if apart:
        of_z = Sum(counts, sample_weight, torch.ones_like(factors), reduction, empty, upstream.loss)
    sum_of_z = of_z(losses_of_z.value, losses_of_z.scale)
    of_sample_weight = total.gradient_of_sample_weight(losses, loss)
    if apart:
        more = of_z.gradient_of_sample_weight(losses_of_z, sum_of_z)
        loss = Exact(loss.value + sum_of_z.value, loss.scale + sum_of_z.scale)
        of_sample_weight = Exact(of_sample_weight.value + more.value, of_sample_weight.scale + more.scale)

    def of_positions(g: Tensor | None) -> Tensor:
        g = torch.zeros(()) if g is None else g.detach()
        return zero_if(~counts, g.double().expand(positions))

    g_lse, g_t, g_h = (of_positions(g) for g in (upstream.lse, upstream.target_log_prob, upstream.entropy))
    scaled = Coefficients(index, s * hits, times(s, spread), times(s, spread_scale).abs())
    if soft:
        scaled.spread = scaled.spread - g_t.unsqueeze(-1) * q
        scaled.spread_scale = scaled.spread_scale + (g_t.unsqueeze(-1) * q).abs()
        target_log_prob = Exact(-times(q, f.terms).sum(-1), finite(times(q.abs(), f.terms_scale)).sum(-1))
    else:
        scaled.hits = scaled.hits - g_t.unsqueeze(-1)
        target_log_prob = Exact(-gather(f.terms, index.squeeze(-1)), gather(f.terms_scale, index.squeeze(-1)))
    further = times(of_z.shares, 2 * z_loss * f.lse) + g_lse
    further_scale = (of_z.shares * 2 * z_loss).abs() * f.lse_scale + g_lse.abs()
    dx = scaled.gradient(f, further, further_scale)
    # -g_H p_c (log p_c + H)
    g_h = g_h.unsqueeze(-1)
    bend = zero_if((f.p == 0) | (g_h == 0), g_h * f.p * (f.terms - f.entropy.unsqueeze(-1)))
    bend_scale = g_h.abs() * f.p * f.lengths * (finite(f.terms + f.terms_scale) + f.entropy_scale.unsqueeze(-1))

    # What is lost with probabilities of 2^-126 and less: of an entropy, each with a log p of 88 nats.
    vanished = SMALLEST_POWER * classes
    flushed = 88 * vanished
    mass = finite(hits.abs().sum(-1) + spread.abs().sum(-1))
    flushed_of_loss = finite(total(mass * vanished, mass * vanished).value).abs()
    of_gradient = finite(scaled.hits.abs().sum(-1) + scaled.spread.abs().sum(-1))
    flushed_of_input = 0.0
    if g_h.numel():
        flushed_of_input = flushed * float(finite(g_h).abs().max()) + vanished * float(of_gradient.max())

    def statistic(value: Tensor, scale: Tensor) -> Exact:
        return Exact(zero_if(~counts, value), finite(zero_if(~counts, scale)))

    results = {
        "loss": replace(loss, flushed=flushed_of_loss),
        "lse": replace(statistic(f.lse, f.lse_scale), flushed=vanished),
        "target_log_prob": replace(statistic(target_log_prob.value, target_log_prob.scale), flushed=vanished),
        "entropy": replace(statistic(f.entropy, f.entropy_scale), flushed=flushed),
        "input": replace(
            logits.gradient(dx.value + bend, (dx.scale + bend_scale) * total.condition), flushed=flushed_of_input
        ),
        "sample_weight": of_sample_weight,
        "denominator": total.gradient_of_denominator(loss),
        "z_loss": sum_of_z,
        # How far each class is behind, and by how much that may be wrong.
        "argmax": Exact(
            torch.where(counts.unsqueeze(-1), f.gaps, -2.0 if ignore_index == -1 else -1.0),
            finite(f.noise + f.noise.gather(-1, f.x.argmax(-1, keepdim=True))),
        ),
    }
    if soft:
        share = s * (1 - e) * w + g_t.unsqueeze(-1) * -1
        scale = (s * (1 - e) * w).abs() + g_t.unsqueeze(-1).abs()
        results["target"] = dense(share * f.terms, scale * f.terms_scale * total.condition)
        if weight is not None:
            q = (1 - e) * q + e / classes
            parts = times(q, f.terms) * s
            scales = times(q, f.terms_scale).abs() * s.abs() * total.condition
            results["weight"] = Exact(parts.reshape(-1, classes).sum(0), finite(scales).reshape(-1, classes).sum(0))
    return results


def cross_entropy(*arguments, **options) -> dict[str, Exact]:
    results = cross_entropy_with_stats(*arguments, **options)
    return {name: results[name] for name in results if name not in STATISTICS}


STATISTICS = ("lse", "target_log_prob", "entropy", "z_loss", "argmax")


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
    empty: str = "nan",
    denominator: float | Tensor | None = None,
    noise: Tensor | None = None,
    upstream: Upstream,
) -> dict[str, Exact]:
    e, classes = label_smoothing, input.size(1 if input.dim() > 1 else 0)
    w = torch.ones(classes, dtype=torch.double) if weight is None else weight.detach().double()
    index = classes_last(indices.detach().long())
    valid = index != ignore_index
    counts, index = valid.any(-1), zero_if(~valid, index)
    logits = Logits(input, softcap, logit_scale, counts, noise)
    f = logits.softmax
    factor = zero_if(~valid, (1 - e) * w[index])
    hits = times(factor, classes_last(probs.detach().double()))
    spread = (e / classes * w).expand_as(f.x)
    losses = Coefficients(index, hits, spread, spread.abs(), z_loss).loss(f)
    ones = torch.ones(counts.shape, dtype=torch.double)
    total = Sum(counts, sample_weight, ones, reduction, empty, upstream.loss, denominator)
    loss, s = total(losses.value, losses.scale), total.shares.unsqueeze(-1)
    scaled = Coefficients(index, times(s, hits), times(s, spread), times(s, spread).abs())
    further = times(total.shares, 2 * z_loss * f.lse)
    dx = scaled.gradient(f, further, (total.shares * 2 * z_loss).abs() * f.lse_scale)
    own, own_scale = f.terms.gather(-1, index), f.terms_scale.gather(-1, index)
    return {
        "loss": loss,
        "input": logits.gradient(dx.value, dx.scale * total.condition),
        "probs": dense(times(s * factor, own), (s * factor).abs() * own_scale * total.condition),
        "sample_weight": total.gradient_of_sample_weight(losses, loss),
        "denominator": total.gradient_of_denominator(loss),
    }


def mixup_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: float | Tensor,
    weight: Tensor | None = None,
    **options,
) -> dict[str, Exact]:
    """lam CE(a) + (1 - lam) CE(b): where lam has elements, each of a position's loss."""
    share = share_of_mixup(target_a, lam.detach() if isinstance(lam, Tensor) else lam, torch.double)
    s, reduction, given = (options.pop(name, usual) for name, usual in OF_MIXUP)
    s = None if s is None else s.detach().double()
    parts = []
    for target, part in ((target_a, share), (target_b, 1 - share)):
        w, divide_by, of_z = denominators_of_mixup(
            input.detach().double(), target.detach(), weight, s, reduction, given, **options
        )
        if of_z is not None:  # both terms divided by the same number
            w, divide_by = w * (of_z / divide_by), of_z
        factor = part if s is None else part * s
        own = {"sample_weight": factor, "reduction": reduction, "denominator": divide_by}
        parts.append(cross_entropy(input, target, w, **options, **own))
    one, other = parts
    return {
        name: Exact(one[name].value + other[name].value, one[name].scale + other[name].scale)
        for name in ("loss", "input", "denominator")
    }


OF_MIXUP = (("sample_weight", None), ("reduction", "mean"), ("denominator", None))


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
    upstream: Upstream,
) -> dict[str, Exact]:
    positions = classes_last(student_logits).shape[:-1]
    counts = torch.ones(positions, dtype=torch.bool) if target is None else target.detach().long() != ignore_index
    student = Logits(student_logits, None, 1 / temperature, counts)
    teacher = Logits(teacher_logits, None, 1 / temperature, counts)
    f, q = student.softmax, teacher.softmax
    factor = temperature**2 * (alpha if target is not None else 1.0)

    terms, terms_scale = f.terms, f.terms_scale  # of the distillation, for each class
    if kind == "kl":
        terms, terms_scale = terms - q.terms, terms_scale + q.terms_scale
    terms, terms_scale = zero_if(q.p == 0, terms), zero_if(q.p == 0, terms_scale)
    inexact = q.p * q.lengths
    distilled = (q.p * terms).sum(-1)
    distilled_scale = (inexact * finite(terms.abs()) + q.p * terms_scale).sum(-1)
    value, scale = factor * distilled, abs(factor) * distilled_scale

    # The label's part is of the logits at temperature 1; which a kernel may have made of those at another.
    label = Logits(student_logits, None, 1.0, counts)
    if temperature != 1:
        label.softmax = Softmax(label.softmax.x, label.softmax.x.abs())
    g = label.softmax
    if target is not None:
        y = zero_if(~counts, target.detach().long())
        value = value + (1 - alpha) * gather(g.terms, y) if alpha != 1 else value
        scale = scale + abs(1 - alpha) * gather(g.terms_scale, y)

    total = Sum(counts, sample_weight, torch.ones(positions, dtype=torch.double), reduction, "nan", upstream.loss)
    losses = Exact(value, finite(scale))
    loss, s = total(losses.value, losses.scale), total.shares.unsqueeze(-1)
    dx = student.gradient(s * factor * (f.p - q.p), (s * factor).abs() * (f.p * f.lengths + inexact))
    if target is not None:
        hits = s * (1 - alpha)
        nothing = torch.zeros_like(f.p)
        part = Coefficients(y.unsqueeze(-1), hits, nothing, nothing).gradient(
            g, torch.zeros_like(value), torch.zeros_like(value)
        )
        part = label.gradient(part.value, part.scale)
        dx = Exact(dx.value + part.value, dx.scale + part.scale)
    dx.scale *= total.condition
    bend = zero_if(q.p == 0, s * factor * q.p * (terms - distilled.unsqueeze(-1)))
    bend_scale = (s * factor).abs() * inexact * (finite(terms.abs() + terms_scale) + distilled_scale.unsqueeze(-1))
    return {
        "loss": loss,
        "student_logits": dx,
        "teacher_logits": teacher.gradient(bend, bend_scale * total.condition),
        "sample_weight": total.gradient_of_sample_weight(losses, loss),
    }


# ---- a call of a function against all of that -----------------------------------------------------------------------

REFERENCES: dict[str, Callable[..., dict[str, Exact]]] = {
    f.__name__: f
    for f in (cross_entropy, cross_entropy_with_stats, sparse_cross_entropy, mixup_cross_entropy, distillation_loss)
}
OUTPUTS = ("loss", "lse", "target_log_prob", "entropy")
# What may have a gradient from the fused kernels: it is asked for, unless a test says otherwise.
LEAVES = ("input", "target", "probs", "student_logits", "teacher_logits")


@dataclass
class Call:
    """One call of a function by name, with its arguments by theirs."""

    name: str
    arguments: dict[str, object]
    options: dict[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, function: Callable, arguments: tuple, options: dict[str, object]) -> Call:
        name = function.__name__
        known = "cross_entropy_with_stats" if name == "cross_entropy" else name
        names = list(inspect.signature(REFERENCES[known]).parameters)
        bound = dict(zip(names, arguments, strict=False))
        bound |= {key: value for key, value in options.items() if isinstance(value, Tensor)}
        return cls(name, bound, {key: value for key, value in options.items() if not isinstance(value, Tensor)})

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    def run(
        self, function: Callable, upstream: Upstream, wanted: tuple[str, ...], dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Outputs, and gradients of what is wanted, from fresh leaves that share the arguments' storage and strides;
        or in another type."""
        arguments = dict(self.arguments)
        for name, tensor in self.tensors().items():
            tensor = tensor.detach()
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            arguments[name] = tensor.requires_grad_(name in wanted)
        outputs = function(**arguments, **self.options)
        outputs = {"loss": outputs} if isinstance(outputs, Tensor) else outputs._asdict()
        used = {name: g for name in OUTPUTS if (g := getattr(upstream, name)) is not None}
        leaves = {name: arguments[name] for name in wanted}
        if leaves:
            gradients = torch.autograd.grad(
                [outputs[name] for name in used],
                list(leaves.values()),
                [g.to(outputs[name].dtype).expand_as(outputs[name]) for name, g in used.items()],
            )
        else:
            gradients = ()
        return {name: value.detach() for name, value in outputs.items()} | dict(zip(leaves, gradients, strict=True))

    def exact(self, upstream: Upstream) -> dict[str, Exact]:
        options = {k: v for k, v in self.options.items() if k not in ("loss_dtype", "inplace")}
        return REFERENCES[self.name](**self.arguments, **options, upstream=upstream)

    def arithmetic(self) -> torch.dtype:
        """float64 where the logits are, or what says something of each of them."""
        tensors = [
            self.arguments[name] for name in ("input", "student_logits", "teacher_logits") if name in self.arguments
        ]
        target = self.arguments.get("target")
        if "input" in self.arguments and target is not None and target.shape == tensors[0].shape:
            tensors += [target, *([weight] if (weight := self.arguments.get("weight")) is not None else [])]
        return torch.float64 if any(arithmetic_of(t) == torch.float64 for t in tensors) else torch.float32


def assert_argmax(result: Tensor, behind: Exact, eps: float, name: str) -> None:
    """The first of the largest logits; or of those that rounding may have made equal to it. Of an ignored position what
    stands in the place of its gaps, -1 or -2."""
    ignored, unknown = (behind.value < 0).all(-1), behind.value.isnan().any(-1)
    first = (behind.value == 0).double().argmax(-1)
    gap = gather(behind.value - eps * behind.scale, result.clamp(min=0))
    right = torch.where(ignored, result == behind.value[..., 0], (result == first) | (gap < 0) | unknown)
    assert result.dtype == torch.int64 and right.all(), name


def check_call(
    function: Callable,
    *arguments: object,
    upstream: Upstream | Tensor | None = None,
    wanted: tuple[str, ...] = LEAVES,
    reason: str = "",
    roundings: float = ROUNDINGS,
    strictly: bool = False,
    passes: int = 1,
    **options: object,
) -> dict[str, Tensor]:
    """Outputs and gradients pass the rule and have the right dtypes, gradients lie in memory as what they are of, no
    argument was written to. Returns them. `strictly`: that PyTorch's own operations lose an element excuses nothing.
    In two `passes`: gradients are sums of two that have been rounded."""
    call = Call.of(function, arguments, options)
    tensors = call.tensors()
    wanted = tuple(name for name in wanted if name in tensors and tensors[name].is_floating_point())
    if upstream is None:
        upstream = torch.ones(())
    upstream = upstream if isinstance(upstream, Upstream) else Upstream(upstream)

    before = {name: storage_bytes(tensor).clone() for name, tensor in tensors.items()}
    ours = call.run(function, upstream, wanted)
    for name, old in before.items():
        assert torch.equal(storage_bytes(tensors[name]), old), f"{name}'s storage was written to ({reason})"

    rounded = {
        name: g.to(ours[name].dtype) for name in OUTPUTS if (g := getattr(upstream, name)) is not None and name in ours
    }
    exact, arithmetic = call.exact(Upstream(**rounded)), call.arithmetic()
    composed = {} if strictly else call.run(getattr(compositions, call.name), upstream, wanted, arithmetic)
    for name, result in ours.items():
        where = f"{name} ({reason})" if reason else name
        if name == "argmax":
            assert_argmax(result, exact[name], roundings * torch.finfo(arithmetic).eps, where)
            continue
        if name in tensors:
            assert result.dtype == tensors[name].dtype, where
            expected = torch.empty_like(tensors[name])
            assert same_strides(result, expected), f"{where}: strides {result.stride()}, not {expected.stride()}"
        elif name in ("lse", "target_log_prob", "entropy"):
            assert result.dtype == arithmetic, where
        twice = passes > 1 and name in tensors and result.dtype.itemsize < arithmetic.itemsize
        assert_as_exact(
            result,
            exact[name],
            composed.get(name),
            arithmetic=result.dtype if twice else arithmetic,
            name=where,
            as_native=False,
            roundings=passes if twice else roundings,
        )
    return ours

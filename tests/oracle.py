"""The loss in plain float64, and the rule by which an implementation is as exact as it has to be.

`reference` writes the mathematics down once, without a kernel's tricks and without calling the native loss:

    coefficients   a_c = (1 - e) * w_y * [c = y] + (e / C) * w_c          class indices
                   a_c = w_c * ((1 - e) * q_c + e / C)                    probabilities
    loss           sum_c a_c * ((m - x_c) + log s),  m = max x, s = sum exp(x - m)
                   (a_c = 0 contributes 0, also at x_c = -inf)
    gradients      dx_c = g * (A * p_c - a_c),  p = softmax(x),  A = sum_c a_c
                   dq_c = g * (1 - e) * w_c * (lse - x_c),  dw_c = sum g * q'_c * (lse - x_c)

Float64 itself must not lose what is under test. Therefore log s is log1p of the sum without the maximum, and
a class index's p_y - 1 is minus the sum of the other probabilities: at a margin of 100 nats both are 3.7e-44,
and not 0.

The pass rule has two halves, because a maximum over a tensor hides what happens to its small elements:

1. *As native*: the largest error is at most native's largest error plus one rounding of the result (one unit
   in the last place at the tensor's largest magnitude, and of the terms' where they cancel). Where native has
   no answer, or not a finite one, its error earns no allowance.
2. *Element by element*: an error is at most one rounding of the result plus a few roundings of the arithmetic
   type at the magnitude of the terms that make the element up (`Exact.scale`), or native's error at the same
   element. A gradient of 1e-9 that comes out as 0 fails here, although the first half cannot see it.

An element that is NaN or infinite in the rounded reference must be exactly that, and the other way round.

On CUDA an exponential in float32 that is below 2^-126 is zero (`ex2.approx.ftz`): a class that is 87 nats below the
largest has no part in the sums, and no gradient. While `flushes_exponentials` is set, an error may be that much too
(`Exact.flushed`): 2^-126 for each class, times what the exponentials are multiplied by, which may be 65536.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cross_entropy_ext import functional as ext

# Of the arithmetic type, at the magnitude of an element's terms: exp, log, a sum, two products, a quotient.
ROUNDINGS = 8

# The smallest exponential in float32 that is not zero, on a device on which smaller ones are.
SMALLEST_POWER = 2.0**-126
flushes_exponentials = False


@dataclass
class Exact:
    """A float64 result; for each element the magnitude of the terms it is the sum of, and what zeros in the place of
    the smallest exponentials change."""

    value: Tensor
    scale: Tensor
    flushed: Tensor | float = 0.0


def is_soft(input: Tensor, target: Tensor) -> bool:
    return input.shape == target.shape


def zero_if(condition: Tensor, value: Tensor) -> Tensor:
    return torch.where(condition, torch.zeros_like(value), value)


def reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    empty: str = "nan",
    grad_output: Tensor | None = None,
) -> dict[str, Exact]:
    """The loss and its gradients to 'input', and for probabilities to 'target' and 'weight', in float64."""
    axis = 1 if input.dim() > 1 else 0
    x = input.detach().double().movedim(axis, -1)  # the classes last, whatever the layout
    classes, e = x.size(-1), label_smoothing
    w = torch.ones(classes, dtype=torch.double) if weight is None else weight.detach().double().reshape(classes)
    soft = is_soft(input, target)

    if classes:
        m, top = x.max(-1, keepdim=True)
        powers = (x - m).exp()
        # s without the maximum's own 1. (m - m: with a maximum of inf, -inf or NaN everything is NaN.)
        others = powers.scatter(-1, top, 0.0).sum(-1, keepdim=True) + (m - m)
        log_s = others.log1p()
        p = powers / (others + 1)
        minus_lp = (m - x) + log_s
    else:
        p, minus_lp = torch.zeros_like(x), torch.zeros_like(x)

    smooth = e / max(classes, 1) * w
    if soft:
        q = target.detach().double().movedim(axis, -1)
        q = (1 - e) * q + e / max(classes, 1)
        a = w * q
        counts = torch.ones(x.shape[:-1], dtype=torch.bool)
        hot = torch.zeros(x.shape[:-1], dtype=torch.double)
        denominator = divisor_scale = torch.tensor(float(counts.numel()), dtype=torch.double)
        curve = a.sum(-1, keepdim=True) * p - a
        curve_scale = a.abs().sum(-1, keepdim=True) * p * (1 + minus_lp.nan_to_num(posinf=0.0)) + a.abs()
        mass = a.abs().sum(-1)
    else:
        y = target.detach().long().reshape(x.shape[:-1])  # ([1] for a (C,) input: native takes it for one position)
        counts = y != ignore_index
        index = zero_if(~counts, y).unsqueeze(-1)
        hot = (1 - e) * (w[index.squeeze(-1)] if classes else torch.zeros(y.shape, dtype=torch.double))
        a = smooth.expand_as(x)
        w_y = zero_if(~counts, w[index.squeeze(-1)] if classes else torch.zeros(y.shape, dtype=torch.double))
        denominator, divisor_scale = w_y.sum(), w_y.abs().sum()
        rest = p.scatter(-1, index, 0.0) if classes else p  # the true class's p - 1 is minus the others' sum
        one_hot = rest.scatter(-1, index, -rest.sum(-1, keepdim=True)) if classes else p
        curve = hot.unsqueeze(-1) * one_hot + (a.sum(-1, keepdim=True) * p - a)
        lengths = 1 + minus_lp.nan_to_num(posinf=0.0)
        curve_scale = hot.abs().unsqueeze(-1) * one_hot.abs() * lengths + (
            a.abs().sum(-1, keepdim=True) * p * lengths + a.abs()
        )
        mass = hot.abs() + a.abs().sum(-1)

    flushed = zero_if(~counts, mass * (classes * SMALLEST_POWER))
    terms = zero_if(a == 0, a * minus_lp)
    loss, loss_scale = terms.sum(-1), terms.abs().sum(-1)
    if not soft and classes:
        true = zero_if(hot == 0, hot * minus_lp.gather(-1, index).squeeze(-1))
        loss, loss_scale = loss + true, loss_scale + true.abs()
    loss, loss_scale = zero_if(~counts, loss), zero_if(~counts, loss_scale)

    g = torch.ones((), dtype=torch.double) if grad_output is None else grad_output.detach().double()
    condition = torch.ones((), dtype=torch.double)
    if reduction != "none":
        loss, loss_scale = loss.sum(), loss_scale.sum()
    loss_flushed = flushed if reduction == "none" else flushed.sum()
    if reduction == "mean":
        nothing = (denominator == 0) & (loss == 0) & (empty == "zero")
        condition = (divisor_scale / denominator.abs()).nan_to_num(1.0, posinf=1.0)
        loss = zero_if(nothing, loss / denominator)
        loss_scale = (loss_scale / denominator.abs()) * condition
        loss_flushed = zero_if(denominator == 0, loss_flushed / denominator.abs())
        g = torch.zeros_like(g) if nothing else g / denominator
    g = g.expand(counts.shape).unsqueeze(-1)

    def shaped(value: Tensor, scale: Tensor) -> Exact:
        scale = (g.abs() * scale * condition).nan_to_num(0.0, posinf=0.0)
        value = g * value
        if empty == "zero":
            value = zero_if(g == 0, value)
        keep = ~counts.unsqueeze(-1)
        lost = (g.abs() * flushed.unsqueeze(-1)).nan_to_num(0.0, posinf=0.0).expand_as(value)
        return Exact(*(zero_if(keep, part).movedim(-1, axis) for part in (value, scale, lost)))

    if not soft and target.shape != loss.shape and reduction == "none":
        loss, loss_scale, loss_flushed = (part.reshape(target.shape) for part in (loss, loss_scale, loss_flushed))
    results = {"loss": Exact(loss, loss_scale, loss_flushed), "input": shaped(curve, curve_scale)}
    if soft:
        results["target"] = shaped((1 - e) * w * minus_lp, ((1 - e) * w * minus_lp).abs())
        if weight is not None:
            parts = zero_if(q == 0, q * minus_lp) * g
            flat = parts.reshape(-1, classes) if classes else parts.reshape(0, 0)
            results["weight"] = Exact(flat.sum(0), flat.abs().sum(0))
    return results


def spacing_of_nothing(dtype: torch.dtype) -> float:
    """What may vanish: below the smallest normal number arithmetic may flush; fp16 keeps its subnormals (they
    are normal fp32)."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps if dtype == torch.float16 else info.tiny


def assert_as_exact(
    ours: Tensor,
    exact: Exact,
    native: Tensor | None,
    *,
    arithmetic: torch.dtype,
    name: str = "",
    as_native: bool = True,
    roundings: float = ROUNDINGS,
) -> None:
    """The pass rule of this module's first lines."""
    assert ours.shape == exact.value.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(exact.value.shape)}"
    if not ours.numel():
        return
    rounded = exact.value.to(ours.dtype).double()
    got = ours.detach().double()
    same_kind = (got == rounded) | (got.isnan() & rounded.isnan()) | (got.isfinite() & rounded.isfinite())
    at = int((~same_kind).flatten().double().argmax())
    assert same_kind.all(), f"{name}[{at}] is {got.flatten()[at]}, not {rounded.flatten()[at]}"

    finite = rounded.isfinite()
    value = zero_if(~finite, exact.value)
    error = zero_if(~finite, (got - value).abs())
    native_error = torch.zeros_like(error)
    if native is not None:
        native_error = (native.detach().double() - value).abs()
        native_error = zero_if(~(finite & native_error.isfinite()), native_error)
    eps, eps_arithmetic = torch.finfo(ours.dtype).eps, torch.finfo(arithmetic).eps
    nothing = spacing_of_nothing(ours.dtype)
    scale = zero_if(~finite, exact.scale.nan_to_num(0.0, posinf=0.0))
    flushed = torch.zeros_like(error)
    if flushes_exponentials and arithmetic != torch.float64:
        flushed = flushed + exact.flushed

    allowed = torch.maximum(eps * value.abs() + roundings * eps_arithmetic * scale + nothing + flushed, native_error)
    worst = int((error - allowed).flatten().argmax())
    assert (error <= allowed).all(), (
        f"{name}[{worst}] is {got.flatten()[worst].item()!r}, exactly {value.flatten()[worst].item()!r}: "
        f"error {error.flatten()[worst]:.3g}, allowed {allowed.flatten()[worst]:.3g} "
        f"(native's {native_error.flatten()[worst]:.3g})"
    )
    if as_native and native is not None:
        # Of the arithmetic one rounding too, where terms cancel; several in float64, where the reference is
        # itself rounded.
        noise = (roundings if ours.dtype == torch.float64 else 1) * eps_arithmetic * scale.max()
        limit = native_error.max() + eps * value.abs().max() + noise + nothing + flushed.max()
        assert error.max() <= limit, (
            f"{name}: largest error {error.max():.3g}; native's {native_error.max():.3g}, limit {limit:.3g}"
        )


def arithmetic_of(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def storage_bytes(tensor: Tensor) -> Tensor:
    """All bytes of the storage, those outside the view included: what a stray write would change."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def as_native_takes_them(input: Tensor, target: Tensor) -> Tensor:
    """Native reads only int64 at every rank; probabilities pass unchanged."""
    return target if is_soft(input, target) else target.long()


def run(
    function, input: Tensor, target: Tensor, weight: Tensor | None, grad_output: Tensor | None, **options
) -> dict[str, Tensor]:
    """The loss and every gradient there is, from fresh leaves that share the arguments' storage and
    strides."""
    x = input.detach().requires_grad_()
    leaves = {"input": x}
    if is_soft(input, target):
        target = leaves["target"] = target.detach().requires_grad_()
        if weight is not None and weight.is_floating_point():
            weight = leaves["weight"] = weight.detach().requires_grad_()
    loss = function(x, target, weight, **options)
    if grad_output is not None:
        grad_output = grad_output.to(loss.dtype).expand_as(loss)
    gradients = torch.autograd.grad(
        loss, list(leaves.values()), grad_output if grad_output is not None else torch.ones_like(loss)
    )
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def same_strides(one: Tensor, other: Tensor) -> bool:
    """Equal strides, where they have a meaning: a dimension of size 1, or any of an empty tensor, has
    none."""
    return not one.numel() or all(
        a == b for a, b, size in zip(one.stride(), other.stride(), one.shape, strict=True) if size > 1
    )


def check(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    grad_output: Tensor | None = None,
    reason: str = "",
    as_native: bool = True,
    roundings: float = ROUNDINGS,
    loss_dtype: torch.dtype | None = None,
    **options,
) -> dict[str, Tensor]:
    """Loss and gradients pass the rule, have native's dtypes and the inputs' memory format, and nothing else
    was written."""
    arguments = [t for t in (input, target, weight) if t is not None]
    before = [storage_bytes(t).clone() for t in arguments]
    more = {} if loss_dtype is None else {"loss_dtype": loss_dtype}
    ours = run(ext.cross_entropy, input, target, weight, grad_output, **options, **more)
    for tensor, old in zip(arguments, before, strict=True):
        assert torch.equal(storage_bytes(tensor), old), f"an argument's storage was written to ({reason})"
    shared = {name: value for name, value in options.items() if name != "empty"}
    native = run(F.cross_entropy, input, as_native_takes_them(input, target), weight, grad_output, **shared)

    seen = None if grad_output is None else grad_output.to(ours["loss"].dtype)
    exact = reference(input, target, weight, grad_output=seen, **options)
    assert ours["loss"].dtype == (loss_dtype or native["loss"].dtype), f"loss is {ours['loss'].dtype} ({reason})"
    assert ours["loss"].is_contiguous()
    assert ours.keys() == native.keys()
    for name, result in ours.items():
        if name != "loss":
            source = {"input": input, "target": target, "weight": weight}[name]
            assert result.dtype == source.dtype, f"the gradient to {name} is {result.dtype} ({reason})"
        assert_as_exact(
            result,
            exact[name],
            native[name],
            arithmetic=arithmetic_of(input),
            name=f"{name} ({reason})" if reason else name,
            as_native=as_native,
            roundings=roundings,
        )
        if name == "input":
            expected = torch.empty_like(input)
            assert same_strides(result, expected), (
                f"gradient strides {result.stride()}, not {expected.stride()} ({reason})"
            )
    return ours

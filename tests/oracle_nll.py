"""The negative log likelihood in plain float64, and arguments for it."""

from __future__ import annotations

import torch
from cases import generator
from oracle import Exact, arithmetic_of, assert_as_exact, same_strides, storage_bytes
from torch import Tensor

from cross_entropy_ext import functional as ext


def axis_of(input: Tensor) -> int:
    return 1 if input.dim() > 1 else 0


def positions_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], *shape[2:]) if len(shape) > 1 else ()


def log_probabilities(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=generator(shape), dtype=torch.double)
    return values.log_softmax(axis_of(values)).to(dtype)


def target_for(input: Tensor, *, ignored: float = 0.0, dtype: torch.dtype = torch.long, ignore: int = -100) -> Tensor:
    random, shape = generator(tuple(input.shape), ignored), positions_of(tuple(input.shape))
    target = torch.randint(max(1, input.size(axis_of(input))), shape, generator=random)
    return target.masked_fill_(torch.rand(shape, generator=random) < ignored, ignore).to(dtype)


def weight_for(input: Tensor) -> Tensor:
    return (0.25 + torch.rand(input.size(axis_of(input)), generator=generator("weight"))).to(input.dtype)


def reference(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, grad_output: Tensor
) -> tuple[Exact, Exact]:
    """Loss and gradient in float64."""
    axis, y = axis_of(input), target.long()
    counts = y != ignore_index
    index = y.where(counts, 0)
    w = torch.ones(input.size(axis), dtype=torch.double) if weight is None else weight.double()
    w = w[index].where(counts, 0)
    own = input.detach().double().movedim(axis, -1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    loss = (-w * own).where(counts & (w != 0), 0)
    scale = loss.abs()
    g = grad_output.double()
    if reduction != "none":
        loss, scale = loss.sum(), scale.sum()
    if reduction == "mean":
        condition = (w.abs().sum() / w.sum().abs()).nan_to_num(1.0, posinf=1.0)
        loss, scale, g = loss / w.sum(), scale / w.sum().abs() * condition, g / w.sum()
    values = (-w * g).where(counts, 0)
    gradient = torch.zeros(input.shape, dtype=torch.double).movedim(axis, -1)
    gradient = gradient.scatter(-1, index.unsqueeze(-1), values.unsqueeze(-1)).movedim(-1, axis)
    return Exact(loss, scale), Exact(gradient, gradient.abs())


def check(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    reason: str = "",
) -> None:
    """Loss and gradient are exact up to rounding, of the input's dtype and strides; nothing else was written."""
    arguments = [t for t in (input, target, weight) if t is not None]
    before = [storage_bytes(t).clone() for t in arguments]
    leaf = input.detach().requires_grad_()
    loss = ext.nll_loss(leaf, target, weight, ignore_index=ignore_index, reduction=reduction)
    g = torch.randn(loss.shape, generator=generator(reason)).to(loss.dtype)
    (gradient,) = torch.autograd.grad(loss, leaf, g)
    for tensor, old in zip(arguments, before, strict=True):
        assert torch.equal(storage_bytes(tensor), old), f"an argument's storage was written to ({reason})"
    assert loss.dtype == gradient.dtype == input.dtype and loss.is_contiguous()
    assert same_strides(gradient, torch.empty_like(input)), reason
    exact_loss, exact_gradient = reference(input, target, weight, ignore_index, reduction, g)
    assert_as_exact(loss, exact_loss, None, arithmetic=arithmetic_of(input), name=f"loss ({reason})")
    assert_as_exact(gradient, exact_gradient, None, arithmetic=arithmetic_of(input), name=f"gradient ({reason})")

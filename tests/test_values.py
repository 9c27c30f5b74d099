"""Values and gradients against the float64 oracle: every shape and layout, every kind of target and option,
and the extremes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CASES,
    DTYPES,
    IMAGE_LAYOUTS,
    INTEGERS,
    OBJECTIVES,
    Case,
    Objective,
    expand,
    generator,
    grad_output_for,
    name_of,
    place,
)
from oracle import arithmetic_of, assert_as_exact, check, reference, run

from cross_entropy_ext import CrossEntropyLoss
from cross_entropy_ext import functional as ext

inf, nan = math.inf, math.nan
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
pytestmark = pytest.mark.usefixtures("backend")


# ------------------------------------------------------------------------------------------------------------
# Shapes and layouts. 'core': repeated for every instruction set by the last test of this file.


@pytest.mark.thin(1, emulator=3)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.id)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_core_cases(case: Case, objective: Objective) -> None:
    for dtype in DTYPES:
        logits = case.logits(dtype)
        target, weight = objective.target(logits, case.id), objective.weight(logits, case.id)
        grad_output = grad_output_for(logits, objective.reduction, case.id)
        reason = f"{name_of(dtype)}: {case.reason}"
        check(logits, target, weight, grad_output=grad_output, reason=reason, **objective.options())


@pytest.mark.thin(1, emulator=3)
@pytest.mark.parametrize("classes", [2, 7, 16, 19, 33, 96, 97, 160, 161])
@pytest.mark.parametrize("layout", ["planes", "rows", "padded rows"])
def test_core_tiles_of_positions(layout: str, classes: int) -> None:
    """Few classes: tiles that runs of positions end in, of the widths that class counts give them, planes and rows that
    are transposed; the backward by itself and with the forward, and in the logits' place."""
    for positions in (64, 65, 130, 300):
        key = (layout, classes, positions)
        planes = torch.randn(2, classes, positions, generator=generator(*key)) * 3
        if layout == "rows":
            logits = planes.movedim(1, 2).contiguous().movedim(2, 1)
        elif layout == "padded rows":
            logits = torch.cat([planes, planes[:, :1]], 1).movedim(1, 2).contiguous().movedim(2, 1)[:, :classes]
        else:
            logits = planes
        labels = torch.randint(classes, (2, positions), generator=generator(*key, "labels"))
        labels[torch.rand(2, positions, generator=generator(*key, "ignored")) < 0.2] = -100
        for options in ({}, {"label_smoothing": 0.1}):
            for reduction in ("mean", "none"):
                grad_output = grad_output_for(logits, reduction, key)
                check(logits, labels, grad_output=grad_output, reduction=reduction, reason=str(key), **options)
            fresh, own = logits.clone().requires_grad_(), logits.clone().requires_grad_()
            ext.cross_entropy(fresh, labels, reduction="none", **options).backward(grad_output)
            ext.cross_entropy(own * 1, labels, reduction="none", inplace=True, **options).backward(grad_output)
            assert torch.equal(fresh.grad, own.grad)
        q = torch.rand(2, classes, positions, generator=generator(*key, "q")).softmax(1)
        check(logits, q, grad_output=grad_output_for(logits, "mean", key), reason=str(key))


@pytest.mark.thin(2, emulator=4)
@dtypes
@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
def test_core_index_targets_of_every_integer_dtype_and_layout(dtype: torch.dtype, layout: str) -> None:
    """At every rank, ignored labels included; native takes int64, and uint8 for (N, C) alone."""
    for shape in [(6, 11, 5), (3, 11, 6, 8), (6, 11, 1, 9)]:
        axes = [d for d in range(len(shape)) if d != 1]
        for channels_last in [False, True] if len(shape) == 4 else [False]:
            logits = torch.randn(shape, generator=generator(layout, shape), dtype=torch.double).to(dtype)
            if channels_last:
                logits = logits.contiguous(memory_format=torch.channels_last)
            for integer in INTEGERS:
                ignore_index = 255 if integer == torch.uint8 else -100
                target = torch.randint(11, [shape[d] for d in axes], generator=generator(layout, shape, "target"))
                target[0, ::3] = ignore_index
                target = IMAGE_LAYOUTS[layout](target.to(integer))
                check(logits, target, ignore_index=ignore_index, reason=f"{integer} {shape}")


@pytest.mark.parametrize("integer", INTEGERS, ids=name_of)
def test_index_targets_of_every_integer_dtype_at_ranks_one_and_two(integer: torch.dtype) -> None:
    for shape in [(100,), (40, 100)]:
        logits = torch.randn(shape, generator=generator(shape))
        target = torch.randint(100, shape[:-1], generator=generator(shape)).to(integer)
        check(logits, target)
        check(
            logits,
            expand(target, 0) if target.dim() else target,
            torch.rand(100, generator=generator(1)),
            label_smoothing=0.2,
        )
        if target.dim():
            check(logits, place(target, step={0: 3}, offset=1), reduction="none")


@pytest.mark.thin(2, emulator=4)
@pytest.mark.parametrize("soft_dtype", DTYPES, ids=name_of)
@dtypes
def test_core_probabilities_in_any_dtype_and_layout(dtype: torch.dtype, soft_dtype: torch.dtype) -> None:
    """Probabilities need neither the logits' dtype nor their strides."""
    layouts = {
        **IMAGE_LAYOUTS,
        "channels_last": lambda v: v.contiguous(memory_format=torch.channels_last),
        "cropped_channels_last": lambda v: place(v, order=(0, 2, 3, 1), margin={1: 1, 2: 1, 3: 2}),
        "class_step": lambda v: place(v, step={1: 2}),
        "one_distribution": lambda v: expand(v, 0, 2, 3),
    }
    values = torch.randn(2, 9, 5, 6, generator=generator(0), dtype=torch.double)
    soft = torch.randn(2, 9, 5, 6, generator=generator(1), dtype=torch.double).softmax(1)
    weight = (0.5 + torch.rand(9, generator=generator(2), dtype=torch.double)).to(dtype)
    for x_layout in ["contiguous", "cropped", "channels_last", "class_step"]:
        logits = layouts[x_layout](values.to(dtype))
        for q_layout, lay in layouts.items():
            target, reason = lay(soft.to(soft_dtype)), f"{x_layout} logits, {q_layout} probabilities"
            check(logits, target, label_smoothing=0.1, reason=reason)
            check(logits, target, weight, reduction="none", reason=reason)


@pytest.mark.parametrize("weight_dtype", [*DTYPES, torch.int64, torch.int32, torch.uint8, torch.bool], ids=name_of)
@dtypes
def test_probabilities_take_a_weight_of_any_dtype(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    logits = torch.randn(6, 10, generator=generator(0), dtype=torch.double).to(dtype)
    target = torch.rand(6, 10, generator=generator(1), dtype=torch.double).to(dtype)
    weight = (torch.rand(10, generator=generator(2)) * 3).to(weight_dtype)
    check(logits, target, weight, label_smoothing=0.1)


def test_weights_in_any_layout() -> None:
    logits, target = torch.randn(6, 10, generator=generator(0)), torch.arange(6)
    weight = torch.rand(10, generator=generator(1))
    for lay in [lambda w: place(w, step={0: 3}, offset=1), lambda w: expand(w, 0), torch.Tensor.detach]:
        for e in [0.0, 0.1]:
            check(logits, target, lay(weight), label_smoothing=e)
            check(logits, logits.softmax(1), lay(weight), label_smoothing=e)
            check(logits.view(2, 10, 3).contiguous(), target.view(2, 3), lay(weight), label_smoothing=e)


def test_the_true_class_is_found_at_every_place_of_a_row() -> None:
    """Every lane of every vector, head, body and tail, holds the true class once."""
    for shape, classes in [((67, 67), 67), ((67, 67, 3), 67), ((300, 300), 300)]:
        logits = torch.randn(shape, generator=generator(shape))
        target = torch.arange(classes).view(-1, *[1] * (len(shape) - 2)).expand(shape[0], *shape[2:])
        for reduction in ("none", "mean"):
            check(logits, target, reduction=reduction, reason="the true class moves through the row")


def test_the_maximum_is_found_at_every_place_of_a_row() -> None:
    """exp overflows where the maximum was overlooked, and vanishes where it was invented."""
    for shape in [(131, 131), (131, 131, 2)]:
        for dtype in DTYPES:
            logits = torch.randn(shape, generator=generator(shape), dtype=torch.double)
            for i in range(131):
                logits[i, i] = 300.0
            logits[::2] -= 600.0
            for reduction in ("none", "mean"):
                check(logits.to(dtype), torch.zeros(131, *shape[2:], dtype=torch.long), reduction=reduction)


# ------------------------------------------------------------------------------------------------------------
# Options, all combinations of them.

WEIGHTS = {
    "none": None,
    "positive": [0.5, 1.5, 0.75, 2.0, 0.25, 1.0, 3.0],
    "some zero": [0.0, 1.5, 0.0, 2.0, 0.25, 0.0, 3.0],
    "all zero": [0.0] * 7,
    "negative": [0.5, -1.5, 0.75, -2.0, 0.25, 1.0, 3.5],
}
IGNORED = {
    "no label": (-100, lambda y: y),
    "some labels": (-100, lambda y: y.masked_fill(y % 3 == 0, -100)),
    "all labels": (-100, lambda y: torch.full_like(y, -100)),
    "a class": (2, lambda y: y),
    "another negative": (-1, lambda y: y.masked_fill(y % 3 == 1, -1)),
    "past 32 bits": (2**40, lambda y: y.masked_fill(y % 3 == 1, 2**40)),
    "equal to a class in 32 bits": (2**32 + 2, lambda y: y),
}


@pytest.mark.thin(3, emulator=7)
@pytest.mark.parametrize("e", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize("weights", WEIGHTS)
@reductions
def test_options_with_class_indices(reduction: str, weights: str, ignored: str, e: float) -> None:
    ignore_index, ignore = IGNORED[ignored]
    for shape in [(7,), (13, 7), (3, 7, 5), (2, 7, 3, 4)]:
        for dtype in [torch.float32, torch.float64, torch.bfloat16]:
            logits = torch.randn(shape, generator=generator(shape), dtype=torch.double).to(dtype) * 2
            target = ignore(
                torch.randint(7, (shape[0], *shape[2:]) if len(shape) > 1 else (), generator=generator(e, shape))
            )
            weight = None if WEIGHTS[weights] is None else torch.tensor(WEIGHTS[weights], dtype=dtype)
            check(
                logits,
                target,
                weight,
                grad_output=grad_output_for(logits, reduction, shape),
                reason=f"{shape} {dtype}",
                reduction=reduction,
                label_smoothing=e,
                ignore_index=ignore_index,
            )


@pytest.mark.thin(2, emulator=5)
@pytest.mark.parametrize("e", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weights", WEIGHTS)
@reductions
def test_options_with_probabilities(reduction: str, weights: str, e: float) -> None:
    """Probabilities are neither checked nor normalised: zeros, sums other than one and negative ones are
    legal."""
    for shape in [(7,), (13, 7), (3, 7, 5), (2, 7, 3, 4)]:
        axis = 1 if len(shape) > 1 else 0
        for dtype in [torch.float32, torch.float64, torch.bfloat16]:
            logits = torch.randn(shape, generator=generator(shape), dtype=torch.double).to(dtype) * 2
            soft = torch.randn(shape, generator=generator(shape, 1), dtype=torch.double).softmax(axis)
            weight = None if WEIGHTS[weights] is None else torch.tensor(WEIGHTS[weights], dtype=dtype)
            for kind in [soft, soft * 3, soft - 0.2, soft * (soft > 0.1), torch.zeros_like(soft)]:
                check(
                    logits,
                    kind.to(dtype),
                    weight,
                    grad_output=grad_output_for(logits, reduction, shape),
                    reason=f"{shape} {dtype}",
                    reduction=reduction,
                    label_smoothing=e,
                )


def test_weighted_mean_divides_by_the_labels_weights_and_for_probabilities_by_the_positions() -> None:
    """One-hot probabilities are not class indices, once there are weights: as native, on purpose."""
    logits, target = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0]]), torch.tensor([0, 1])
    weight = torch.tensor([1.0, 4.0, 2.0])
    losses = ext.cross_entropy(logits, target, weight, reduction="none")
    assert torch.allclose(ext.cross_entropy(logits, target, weight), losses.sum() / 5)
    soft = torch.nn.functional.one_hot(target, 3).float()
    assert torch.allclose(ext.cross_entropy(logits, soft, weight), losses.sum() / 2)
    ignored = torch.tensor([0, -100])
    assert torch.allclose(
        ext.cross_entropy(logits, ignored, weight, label_smoothing=0.5),
        ext.cross_entropy(logits[:1], target[:1], weight, label_smoothing=0.5),
    )


def test_smoothing_of_one_forgets_the_label() -> None:
    logits = torch.randn(5, 9, generator=generator(0))
    one = ext.cross_entropy(logits, torch.zeros(5, dtype=torch.long), label_smoothing=1.0)
    other = ext.cross_entropy(logits, torch.arange(5), label_smoothing=1.0)
    assert torch.equal(one, other)
    assert torch.allclose(one, -logits.log_softmax(1).mean())


# ------------------------------------------------------------------------------------------------------------
# Exactness: where float arithmetic loses everything, if one lets it.


@dtypes
@pytest.mark.parametrize("classes", [2, 3, 40, 1000])
@pytest.mark.parametrize("layout", ["rows", "spatial"])
def test_core_confident_labels(dtype: torch.dtype, classes: int, layout: str) -> None:
    """The true class leads by 5 to 100 nats: loss log1p(S), its gradient -g * S / (1 + S). Native says 0 and
    0 from 17 nats on."""
    margins = torch.tensor(
        [5.0, 8.0, 10.0, 14.0, 17.0, 18.0, 20.0, 25.0, 30.0, 40.0, 50.0, 64.0, 80.0, 100.0],
        dtype=torch.double,
    )
    target = torch.arange(len(margins)) * 31 % classes
    logits = torch.zeros(len(margins), classes, dtype=torch.double)
    logits[torch.arange(len(margins)), target] = margins
    logits = logits.to(dtype)
    s = (classes - 1) * (-margins).exp()
    loss, gradient = s.log1p(), -s / (1 + s)
    if layout == "spatial":
        x = logits.t().reshape(1, classes, len(margins)).requires_grad_()
        ours = ext.cross_entropy(x, target[None], reduction="none")[0]
        (grad,) = torch.autograd.grad(ours.sum(), x)
        grad = grad[0].t()
    else:
        x = logits.clone().requires_grad_()
        ours = ext.cross_entropy(x, target, reduction="none")
        (grad,) = torch.autograd.grad(ours.sum(), x)
    true = grad[torch.arange(len(margins)), target]
    floor = {
        torch.float16: 2.0**-24,
        torch.bfloat16: 2.0**-126,
        torch.float32: 2.0**-126,
        torch.float64: 0.0,
    }[dtype]
    # Equal terms are the worst case of a sum: the error of one exp is the error of all, and every rounding of
    # a lane's running sum goes the same way, C / lanes times half a unit. Native is off by thousands of
    # units, then by everything.
    roundings = 16 + classes / 16
    eps = max(torch.finfo(dtype).eps, roundings * torch.finfo(arithmetic_of(logits)).eps)
    for ours_, exact in [(ours, loss), (true, gradient)]:
        assert ((ours_.double() - exact).abs() <= eps * exact.abs() + floor).all(), (
            f"{ours_.tolist()} is not {exact.tolist()}"
        )
    for reduction in ["none", "sum", "mean"]:
        check(logits, target, reduction=reduction, roundings=roundings, reason="confident labels")


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e6, 3e7])
@pytest.mark.parametrize("shape", [(5, 33), (5, 1000), (2, 9, 40)])
def test_core_logits_with_a_common_offset(shape: tuple[int, ...], offset: float) -> None:
    """log-sum-exp near 1e4 has a spacing of 1e-3 in fp32: kept in one number it spoils every probability."""
    random = generator(shape, offset)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=random)
    for dtype in [torch.float32, torch.float64]:
        logits = (torch.randn(shape, generator=random, dtype=torch.double) * 4 + offset).to(dtype)
        soft = torch.randn(shape, generator=random).softmax(1).to(dtype)
        for reduction in ["none", "mean"]:
            check(logits, target, reduction=reduction, reason="common offset")
            check(logits, target, reduction=reduction, label_smoothing=0.1, reason="common offset")
            check(logits, soft, reduction=reduction, reason="common offset")


@pytest.mark.parametrize("classes", [100, 1000, 2049, 32000])
def test_core_long_rows_are_summed_as_exactly_as_natives(classes: int) -> None:
    """A plain running sum loses a unit for every few hundred terms, and sooner the narrower the vectors."""
    random = generator(classes)
    logits = torch.randn(64, classes, generator=random) * 3
    soft, weight = (
        torch.randn(64, classes, generator=random).softmax(1),
        torch.rand(classes, generator=random),
    )
    for target in (torch.randint(classes, (64,), generator=random), soft):
        for w, e in [(None, 0.0), (weight, 0.0), (None, 0.1), (weight, 0.1)]:
            check(logits, target, w, reduction="none", label_smoothing=e, reason=f"{classes} terms, {e=}")


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 30.0, 1e3, 1e6])
@dtypes
def test_logits_of_every_magnitude(dtype: torch.dtype, scale: float) -> None:
    for shape in [(9, 77), (2, 9, 40)]:
        logits = (torch.randn(shape, generator=generator(shape), dtype=torch.double) * scale).clamp(-6e4, 6e4).to(dtype)
        target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator(scale))
        check(logits, target, reduction="none")
        check(logits, target, label_smoothing=0.1)
        check(logits, torch.rand(shape, generator=generator(1)).to(dtype), reduction="none")


@pytest.mark.thin(1, emulator=2)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", [(300_000, 4), (3, 4, 400, 250)], ids=["rows", "image"])
def test_sums_of_halves_are_exact(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """300,000 positions: summed in fp16 they give inf or NaN and no gradient, in bf16 a loss off by a percent
    (native)."""
    logits = torch.randn(shape, generator=generator(shape)).to(dtype)
    target = torch.randint(4, (shape[0], *shape[2:]), generator=generator(0))
    target[::7] = -100 if len(shape) == 2 else target[::7]
    weight = torch.tensor([0.5, 1.5, 1.0, 2.0], dtype=dtype)
    for w, e in [(None, 0.0), (weight, 0.1)]:
        for reduction in ["mean", "sum"]:
            g = torch.tensor(64.0 if reduction == "mean" else 0.5)
            check(
                logits,
                target,
                w,
                grad_output=g,
                reduction=reduction,
                label_smoothing=e,
                reason="many positions",
            )
    check(logits, logits.float().softmax(1).to(dtype), reason="many positions", grad_output=torch.tensor(64.0))
    loss = ext.cross_entropy(logits, target)
    assert loss.isfinite() and abs(loss.item() - ext.cross_entropy(logits.double(), target).item()) < 2e-2 * 0.5


def test_sums_of_floats_do_not_drift() -> None:
    """2**21 equal losses: a running fp32 sum would drift by 1e-3 and more."""
    logits = torch.zeros(2**21, 3)
    logits[:, 0] = 0.1
    target = torch.zeros(2**21, dtype=torch.long)
    one = reference(logits[:1], target[:1])["loss"].value.item()
    assert ext.cross_entropy(logits, target).item() == pytest.approx(one, rel=1.2e-7)
    assert ext.cross_entropy(logits, target, reduction="sum").item() == pytest.approx(one * 2**21, rel=1.2e-7)


@dtypes
def test_gradient_rows_sum_to_zero(dtype: torch.dtype) -> None:
    """Softmax does not see a common offset: each position's gradient sums to 0, to the rounding of its
    elements."""
    for shape in [(20, 50), (3, 50, 7)]:
        logits = torch.randn(shape, generator=generator(shape), dtype=torch.double).to(dtype).requires_grad_()
        target = torch.randint(50, (shape[0], *shape[2:]), generator=generator(1))
        soft = torch.rand(shape, generator=generator(2), dtype=torch.double).to(dtype)
        weight = torch.rand(50, generator=generator(3), dtype=torch.double).to(dtype)
        for t in (target, soft):
            loss = ext.cross_entropy(logits, t, weight, reduction="sum", label_smoothing=0.1)
            (grad,) = torch.autograd.grad(loss, logits)
            sums, sizes = grad.double().sum(1).abs(), grad.double().abs().sum(1)
            assert (sizes > 0.05).all()
            assert (sums <= sizes * torch.finfo(dtype).eps * 4).all()


# ------------------------------------------------------------------------------------------------------------
# NaN, infinity and nothing at all.


def row(
    values: list[float], target: int | list[float], weight: list[float] | None = None, **options
) -> tuple[float, list[float]]:
    """Loss ('sum') and gradient of one row, found alike as one row, among other rows, as pixels and in a
    channels_last image."""
    results = []
    for form in ["rows", "spatial", "channels_last", "alone"]:
        x = torch.tensor(values, dtype=options.get("dtype", torch.float32))
        t = torch.tensor(target, dtype=torch.float32) if isinstance(target, list) else torch.tensor(target)
        if form != "alone":
            others = torch.zeros(4, len(values), dtype=x.dtype)
            x = torch.cat([others, x[None], others])
            t = torch.cat([torch.zeros(4, *t.shape, dtype=t.dtype), t[None], torch.zeros(4, *t.shape, dtype=t.dtype)])
        if form in ("spatial", "channels_last"):
            x = x.t().reshape(1, len(values), 3, 3)
            t = t.t().reshape(1, len(values), 3, 3) if t.dim() > 1 else t.reshape(1, 3, 3)
        if form == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        w = None if weight is None else torch.tensor(weight, dtype=x.dtype)
        more = {k: v for k, v in options.items() if k != "dtype"}
        loss = ext.cross_entropy(x, t, w, reduction="none", **more)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        if form == "alone":
            loss, grad = loss.item(), grad.tolist()
        elif form == "rows":
            loss, grad = loss[4].item(), grad[4].tolist()
        else:
            loss, grad = loss[0, 1, 1].item(), grad[0, :, 1, 1].tolist()
        results.append((loss, grad))
    for loss, grad in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6, abs=1e-30, nan_ok=True)
        assert grad == pytest.approx(results[0][1], rel=1e-6, abs=1e-30, nan_ok=True)
    return results[0]


def close(values: list[float]) -> object:
    return pytest.approx(values, abs=6e-5, nan_ok=True)


def test_core_a_masked_class() -> None:
    """-inf in a vocabulary: a class that cannot be. Fine as long as it is not the label."""
    assert row([0, -inf, 1], 0) == (close(1.3133), close([-0.7311, 0, 0.7311]))
    assert row([0, -inf, 1], 1) == (inf, close([0.2689, -1, 0.7311]))
    assert row([0, -inf, 1], 0, [1, 1, 2]) == (close(1.3133), close([-0.7311, 0, 0.7311]))
    for label in (0, 1):  # smoothing asks for every class, this one too
        loss, grad = row([0, -inf, 1], label, label_smoothing=0.1)
        assert loss == inf
        a = [0.9 * (c == label) + 0.1 / 3 for c in range(3)]
        assert grad == close([0.2689 - a[0], -a[1], 0.7311 - a[2]])


def test_core_nan_and_infinite_logits() -> None:
    for values in ([-inf] * 3, [0, inf, 1], [inf, inf, 0], [0, nan, 1], [nan] * 3, [nan, inf, -inf]):
        for label in (0, 1, 2):
            assert row(values, label) == (close(nan), close([nan] * 3)), (values, label)
    assert row([3.4e38, -3.4e38, 0], 1) == (inf, close([1, -1, 0]))
    assert row([1e38, -1e38, 0], 1) == (pytest.approx(2e38), close([1, -1, 0]))
    assert row([1e38, -1e38, 0], 0) == (0, close([0, 0, 0]))
    assert row([1e308, -1e307, 0], 1, dtype=torch.double) == (pytest.approx(1.1e308), close([1, -1, 0]))


def test_core_probabilities_of_nan_infinity_and_zero() -> None:
    """A probability of 0 at a logit of -inf contributes nothing (native: NaN)."""
    assert row([0, -inf, 1], [0.25, 0.0, 0.75]) == (close(0.5633), close([0.2689 - 0.25, 0, 0.7311 - 0.75]))
    assert row([-inf, -inf, 1], [0.0, 0.0, 1.0]) == (0, close([0, 0, 0]))
    assert row([0, -inf, 1], [0.25, 0.25, 0.5]) == (inf, close([0.0189, -0.25, 0.2311]))
    assert row([0, -inf, 1], [0.25, 0.0, 0.75], label_smoothing=0.1)[0] == inf
    assert row([0, 0.5, 1], [0.25, nan, 0.5]) == (close(nan), close([nan] * 3))
    loss, grad = row([0, 0.5, 1], [0.25, inf, 0.5])
    assert loss == inf and grad == close([inf, nan, inf])
    assert row([0, 0.5, 1], [0.0, 0.0, 0.0]) == (0, [0, 0, 0])


def test_a_class_of_weight_zero_at_minus_infinity() -> None:
    """The class has coefficient 0, so it contributes 0 (native: NaN = 0 * inf), as a probability of 0
    does."""
    assert row([0, -inf, 1], 1, [1, 0, 1]) == (0, close([0, 0, 0]))
    assert row([0, -inf, 1], [0.25, 0.5, 0.25], [1, 0, 1]) == (
        close(0.25 * 1.3133 + 0.25 * 0.3133),
        close([0.2689 * 0.5 - 0.25, 0, 0.7311 * 0.5 - 0.25]),
    )


@pytest.mark.parametrize("form", ["rows", "sequence", "image", "channels_last", "wide"])
def test_core_ignored_positions_are_not_read(form: str) -> None:
    """NaN and infinity at ignored positions give gradient 0, and the other positions do not notice (native:
    NaN gradients)."""
    shape = {"rows": (12, 21), "sequence": (3, 21, 20), "wide": (6, 3001)}.get(form, (2, 21, 6, 7))
    for dtype in DTYPES:
        random = generator(form, dtype)
        logits = torch.randn(shape, generator=random, dtype=torch.double).to(dtype)
        target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=random)
        ignored = torch.rand(target.shape, generator=random) < 0.5
        target = target.masked_fill(ignored, -100)
        weight = (torch.rand(shape[1], generator=random) + 0.5).to(dtype)
        for poison in (nan, inf, -inf):
            poisoned = logits.masked_fill(ignored.unsqueeze(1), poison)
            if form == "channels_last":
                poisoned = poisoned.contiguous(memory_format=torch.channels_last)
            for w, e in [(None, 0.0), (weight, 0.0), (None, 0.1), (weight, 0.1)]:
                for reduction in ["mean", "sum", "none"]:
                    options = {"reduction": reduction, "label_smoothing": e}
                    ours = run(ext.cross_entropy, poisoned, target, w, None, **options)
                    clean = reference(logits, target, w, **options)
                    assert_as_exact(ours["loss"], clean["loss"], None, arithmetic=arithmetic_of(logits), name="loss")
                    assert_as_exact(
                        ours["input"], clean["input"], None, arithmetic=arithmetic_of(logits), name="gradient"
                    )
                    assert (ours["input"].masked_select(ignored.unsqueeze(1)) == 0).all()


@pytest.mark.thin(1, emulator=3)
@pytest.mark.parametrize("classes", [32, 33, 47, 64, 129, 500])
def test_core_rows_in_any_number_with_ignored_ones_anywhere(classes: int) -> None:
    """Rows that make their gradient in the forward have neighbours under way with them: the first and the last
    have none, ignored ones (NaN here) are no neighbours, and 64 rows make a batch."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for rows in (1, 2, 3, 4, 63, 64, 65, 131):
            random = generator(classes, rows, dtype)
            logits = (3 * torch.randn(rows, classes, generator=random, dtype=torch.double)).to(dtype)
            target = torch.randint(classes, (rows,), generator=random)
            position = torch.arange(rows)
            for ignored in (
                position < 0,
                position == 0,
                position >= rows - 2,
                position % 2 == 1,
                (position >= 1) & (position <= 62),
                torch.rand(rows, generator=random) < 0.9,
            ):
                poisoned, labels = logits.masked_fill(ignored[:, None], nan), target.masked_fill(ignored, -100)
                ours = run(ext.cross_entropy, poisoned, labels, None, None, empty="zero")
                exact = reference(logits, labels, None, empty="zero")
                for name in ("loss", "input"):
                    assert_as_exact(ours[name], exact[name], None, arithmetic=arithmetic_of(logits), name=name)
                assert (ours["input"][ignored] == 0).all()


def test_infinity_and_nan_stay_in_their_position() -> None:
    for shape in [(33, 40), (2, 21, 6, 7)]:
        logits = torch.randn(shape, generator=generator(shape))
        target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator(1))
        bad = torch.rand(target.shape, generator=generator(2)) < 0.3
        for poison in (nan, inf):
            check(
                logits.masked_fill(bad.unsqueeze(1), poison),
                target,
                reduction="none",
                reason="poisoned positions",
            )


def test_empty_and_degenerate() -> None:
    """No positions, all ignored, weights of zero, no classes: native's answers, and 0 instead of NaN where
    'empty' asks for it."""
    long, none = {"dtype": torch.long}, -100
    weight = torch.zeros(3)
    cases = [
        (torch.randn(0, 3), torch.zeros(0, **long), None),
        (torch.randn(0, 3), torch.zeros(0, 3), None),
        (torch.randn(0, 3), torch.zeros(0, **long), torch.ones(3)),
        (torch.randn(2, 3, 0), torch.zeros(2, 0, **long), None),
        (torch.randn(2, 3, 0, 4), torch.zeros(2, 0, 4, **long), None),
        (torch.randn(2, 3, 0), torch.zeros(2, 3, 0), None),
        (torch.randn(2, 3), torch.full((2,), none), None),
        (torch.randn(2, 3, 4), torch.full((2, 4), none), torch.ones(3)),
        (torch.randn(3), torch.tensor(none), None),
        (torch.randn(2, 3), torch.tensor([1, 2]), weight),
        (torch.randn(2, 3), torch.tensor([1, none]), weight),
        (torch.randn(2, 3, 4), torch.ones(2, 4, **long), weight),
        (torch.randn(3), torch.tensor(1), weight),
    ]
    for input, target, w in cases:
        for e in (0.0, 0.1, 1.0):
            options = {"label_smoothing": e}
            mean = check(input, target, w, **options)
            assert mean["loss"].isnan() or (e > 0 and w is not None and mean["loss"] == 0)
            check(input, target, w, reduction="sum", **options)
            check(input, target, w, reduction="none", **options)
            zero = check(input, target, w, empty="zero", **options)
            assert zero["loss"] == 0 and (zero["input"] == 0).all()
            assert check(input, target, w, reduction="sum", empty="zero", **options)["loss"] == 0


def test_empty_zero_changes_nothing_else() -> None:
    logits, target = torch.randn(6, 5, generator=generator(0)), torch.tensor([0, 1, -100, 3, 4, 2])
    for w in (None, torch.rand(5, generator=generator(1))):
        for t in (target, logits.softmax(1)):
            for reduction in ("mean", "sum", "none"):
                one = check(logits, t, w, reduction=reduction, empty="zero")
                other = check(logits, t, w, reduction=reduction)
                assert all(torch.equal(one[name], other[name]) for name in one)
    module = CrossEntropyLoss(empty="zero")
    x = logits.clone().requires_grad_()
    loss = module(x, torch.full((6,), -100))
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


def test_empty_zero_does_not_hide_nan() -> None:
    """Only a mean over nothing becomes 0: a NaN in the logits of a position that counts stays one."""
    logits = torch.randn(3, 5)
    logits[1, 2] = nan
    assert ext.cross_entropy(logits, torch.tensor([0, 1, 2]), empty="zero").isnan()


@pytest.mark.parametrize("classes", [5, 50, 5000])
def test_empty_zero_does_not_hide_infinity(classes: int) -> None:
    """Labels of a total weight of zero, but a loss: that is no mean over nothing."""
    logits, weight = torch.randn(4, classes, generator=generator(classes)), torch.ones(classes)
    weight[1], weight[2] = -1, 0
    for e, labels in ((0.0, [0, 1, 0, 1]), (0.1, [2, 2, 2, 2])):
        for x in (logits, logits.clone().requires_grad_()):
            loss = ext.cross_entropy(x, torch.tensor(labels), weight, label_smoothing=e, empty="zero")
            assert loss.isinf()


def test_no_classes() -> None:
    soft = torch.randn(2, 0)
    for reduction, expected in [("sum", 0.0), ("none", [0.0, 0.0])]:
        loss = ext.cross_entropy(soft, soft, reduction=reduction)
        assert loss.tolist() == expected
    assert ext.cross_entropy(torch.randn(2, 0), torch.full((2,), -100)).isnan()
    with pytest.raises(IndexError, match="Target 0 is out of bounds"):
        ext.cross_entropy(torch.randn(2, 0), torch.tensor([0, 0]))


# ------------------------------------------------------------------------------------------------------------
# The extras, and what the arguments may look like.


@pytest.mark.parametrize("loss_dtype", DTYPES, ids=name_of)
@dtypes
def test_loss_dtype(dtype: torch.dtype, loss_dtype: torch.dtype) -> None:
    """The loss alone changes its dtype, and is rounded once: fp32 losses of half logits have fp32's
    precision."""
    logits = torch.randn(40, 30, generator=generator(0), dtype=torch.double).to(dtype)
    target = torch.randint(30, (40,), generator=generator(1))
    for reduction in ("mean", "sum", "none"):
        check(logits, target, reduction=reduction, loss_dtype=loss_dtype)
        check(logits, target, reduction=reduction, loss_dtype=loss_dtype, label_smoothing=0.1)
        check(logits, logits.double().softmax(1).to(dtype), reduction=reduction, loss_dtype=loss_dtype)
    x = logits.clone().requires_grad_()
    loss = CrossEntropyLoss(loss_dtype=loss_dtype)(x, target)
    loss.backward()
    assert loss.dtype == loss_dtype and x.grad.dtype == dtype


def assert_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """To a few roundings: made in the forward, a gradient reuses exponentials that the backward makes from lse."""
    rounding = 4 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding * expected.abs().max().item())


@dtypes
def test_inplace_gives_the_gradient_the_logits_storage(dtype: torch.dtype) -> None:
    """In the backward, and not before: metrics read from the logits after the loss are right."""
    for shape in [(9, 33), (2, 7, 5, 6)]:
        source = torch.randn(shape, generator=generator(shape), dtype=torch.double).to(dtype).requires_grad_()
        target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator(1))
        target[0] = -100
        soft = source.detach().double().softmax(1).to(dtype)
        for t, options in [
            (target, {}),
            (target, {"label_smoothing": 0.1}),
            (target, {"reduction": "none"}),
            (soft, {}),
        ]:
            (expected,) = torch.autograd.grad(ext.cross_entropy(source, t, **options).sum(), source)
            logits = source * 1
            pointer, version = logits.data_ptr(), logits._version
            loss = ext.cross_entropy(logits, t, inplace=True, **options)
            assert torch.equal(logits, source) and logits._version == version, "the forward wrote"
            assert torch.equal(loss, ext.cross_entropy(source, t, **options))
            (grad,) = torch.autograd.grad(loss.sum(), logits)
            assert_alike(grad, expected)
            assert grad.data_ptr() == pointer
            assert logits._version > version


def test_inplace_is_guarded_by_the_version_counter() -> None:
    """What would use the overwritten logits raises autograd's error instead of giving wrong numbers."""
    leaf = torch.randn(6, 5, generator=generator(0)).requires_grad_()
    target = torch.arange(5).repeat(2)[:6]

    logits = leaf * 1
    square = logits.square().sum()  # saved the logits
    ext.cross_entropy(logits, target, inplace=True).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()

    logits = leaf * 1
    loss = ext.cross_entropy(logits, target, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):  # the logits are gone: no second gradient, but no wrong one either
        loss.backward()

    logits = leaf * 1
    loss = ext.cross_entropy(logits, target, inplace=True)
    with torch.no_grad():
        logits.add_(1)  # changed between forward and backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_writes_no_element_twice() -> None:
    """Logits whose elements share memory cannot hold their gradient: it gets its own."""
    small = torch.randn(1, 33, generator=generator(0)).requires_grad_()
    target = torch.arange(5)
    for view in [
        lambda x: x.expand(5, 33),
        lambda x: x[0, :5, None].expand(5, 33),
        lambda x: x[0].as_strided((5, 20), (1, 1)),
    ]:
        base = small * 1  # of a leaf, nothing would be overwritten in any case
        logits = view(base)
        (expected,) = torch.autograd.grad(ext.cross_entropy(logits, target), logits)
        (grad,) = torch.autograd.grad(ext.cross_entropy(logits, target, inplace=True), logits)
        assert_alike(grad, expected)
        assert torch.equal(base, small)


def test_inplace_writes_only_inside_the_view() -> None:
    """Logits cut from a wider buffer: what lies between their rows is not theirs."""
    wide = torch.randn(6, 40, generator=generator(0))
    view = wide.clone()[:, 3:30]
    target = torch.arange(6)
    x = wide[:, 3:30].requires_grad_()
    expected = torch.autograd.grad(ext.cross_entropy(x, target), x)[0]
    leaf = torch.zeros((), requires_grad=True)
    buffer = wide.clone()
    logits = (buffer + leaf)[:, 3:30]
    base = logits._base.detach().clone()
    (grad,) = torch.autograd.grad(ext.cross_entropy(logits, target, inplace=True), logits)
    assert_alike(grad, expected)
    whole = logits._base.detach()
    assert torch.equal(whole[:, :3], base[:, :3]) and torch.equal(whole[:, 30:], base[:, 30:])
    assert torch.equal(view, wide[:, 3:30])


@pytest.mark.parametrize("shape", [(12, 21), (3, 21, 20), (2, 21, 6, 7)], ids=str)
@dtypes
def test_grad_output_in_any_layout(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    positions = (shape[0], *shape[2:])
    logits = torch.randn(shape, generator=generator(0), dtype=torch.double).to(dtype)
    target = torch.randint(21, positions, generator=generator(1))
    values = torch.randn(positions, generator=generator(2), dtype=torch.double).to(dtype)
    grad_outputs = [
        values,
        expand(values, 0),
        expand(values, *range(values.dim())),
        place(values, step={values.dim() - 1: 2}, offset=1),
        place(values, order=tuple(reversed(range(values.dim())))),
        torch.zeros_like(values),
        torch.where(values > 0, values, torch.zeros_like(values)),
    ]
    for g in grad_outputs:
        check(logits, target, grad_output=g, reduction="none")
        check(logits, target, grad_output=g, reduction="none", label_smoothing=0.1)
        check(logits, logits.double().softmax(1).to(dtype), grad_output=g, reduction="none")
    for g in (0.0, -1.0, 1024.0, 3e-5):
        for reduction in ("mean", "sum"):
            check(logits, target, grad_output=torch.tensor(g), reduction=reduction)


@pytest.mark.parametrize(("inplace", "scale"), [(False, 0.25), (False, 2.0**-16), (True, 0.25), (True, 65536.0)])
def test_grad_output_scales_exactly(inplace: bool, scale: float) -> None:
    """A power of two changes the exponent of the gradient and no digit of it. (Where the forward has made the gradient,
    a larger scale has it made anew, rounded in another place, so that its smallest elements keep their digits.)"""
    x = torch.randn(9, 31, generator=generator(0)).requires_grad_()
    target = torch.arange(9)
    (one,) = torch.autograd.grad(ext.cross_entropy(x * 1, target, inplace=inplace), x)
    (scaled,) = torch.autograd.grad(ext.cross_entropy(x * 1, target, inplace=inplace) * scale, x)
    assert torch.equal(scaled, one * scale)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x, q, w = torch.randn(4, 5), torch.rand(4, 5), torch.rand(5)
    whole = run(ext.cross_entropy, x, q, w, None)
    for wanted in ([0], [1], [2], [0, 2], [1, 2], [0, 1]):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((x, q, w))]
        loss = ext.cross_entropy(*leaves)
        gradients = torch.autograd.grad(loss, [leaves[i] for i in wanted])
        for i, gradient in zip(wanted, gradients, strict=True):
            assert torch.allclose(gradient, whole[("input", "target", "weight")[i]], rtol=1e-6, atol=1e-8)
    assert not ext.cross_entropy(x, q, w).requires_grad


def test_backward_twice_accumulates_the_same() -> None:
    x = torch.randn(9, 31, generator=generator(0)).requires_grad_()
    loss = ext.cross_entropy(x, torch.arange(9), label_smoothing=0.1)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once)


# ------------------------------------------------------------------------------------------------------------
# The same bits, always.


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    "shape",
    [(4099, 101), (3, 70001), (7, 19, 63, 65), (2, 70001, 3), (300_007, 3), (1, 3, 640, 479)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_bits_do_not_depend_on_the_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """1, 2 and 3 threads, and one run after the other: not one bit of loss or gradient differs."""
    logits = torch.randn(shape, generator=generator(shape)).to(dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator(0))
    target.view(-1)[::5] = -100
    weight = torch.rand(shape[1], generator=generator(1)).to(dtype)
    soft = logits.softmax(1) if logits.numel() < 1_000_000 else None
    objectives = [
        (target, None, 0.0),
        (target, weight, 0.1),
        *([(soft, weight, 0.1)] if soft is not None else []),
    ]
    threads = torch.get_num_threads()
    try:
        for t, w, e in objectives:
            for reduction in ("mean", "none"):
                results = []
                for n in (1, 2, 3, 2):
                    torch.set_num_threads(n)
                    results.append(run(ext.cross_entropy, logits, t, w, None, reduction=reduction, label_smoothing=e))
                for other in results[1:]:
                    for name, tensor in other.items():
                        assert torch.equal(tensor, results[0][name]), f"{name} differs"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dims", [12, 13, 14, 16])
def test_more_dimensions_than_the_kernels_take(dims: int) -> None:
    """None of which can be merged: 13 with the classes' are the most, beyond them native takes over."""
    x = torch.randn((2,) * dims, generator=generator(dims)).permute(*reversed(range(dims)))
    labels = torch.randint(2, (2,) * (dims - 1), generator=generator(dims, "target"))
    for target in (labels, (x * 2).softmax(1)):
        for reduction in ("mean", "none"):
            ours = run(ext.cross_entropy, x, target, None, None, reduction=reduction)
            native = run(F.cross_entropy, x, target, None, None, reduction=reduction)
            torch.testing.assert_close(ours, native, rtol=1e-5, atol=1e-6, check_stride=False)


def test_layouts_agree_with_each_other() -> None:
    """NCHW and channels_last take different paths to the same numbers, each within a rounding of float64."""
    x = torch.randn(2, 19, 33, 31, generator=generator(0))
    target = torch.randint(19, (2, 33, 31), generator=generator(1))
    one = run(ext.cross_entropy, x, target, None, None, reduction="none")
    other = run(
        ext.cross_entropy,
        x.contiguous(memory_format=torch.channels_last),
        target,
        None,
        None,
        reduction="none",
    )
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=1e-6, atol=1e-7)


def supported_instruction_sets() -> dict[str, bool]:
    return {
        "default": True,
        "avx2": torch.cpu._is_avx2_supported(),
        "avx512": torch.cpu._is_avx512_supported(),
    }


@pytest.mark.backends("cpu")
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="the instruction set is already chosen")
@pytest.mark.parametrize("level", ["default", "avx2", "avx512"])
def test_every_instruction_set(level: str, request: pytest.FixtureRequest) -> None:
    """The 'core' tests above once more in a process that is told which instructions to use."""
    if not supported_instruction_sets()[level]:
        pytest.skip(f"this processor has no {level}")
    if level == torch.backends.cpu.get_cpu_capability().lower():
        pytest.skip("the tests above use it")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": level}
    environment.pop("PYTEST_ADDOPTS", None)
    shown = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert shown.lower() == level
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--maxfail=5",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-k",
        "test_core_ and not emulator",
        "-m",
        request.config.option.markexpr,
    ]
    done = subprocess.run(
        [*command, "-o", "addopts=", str(Path(__file__))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout

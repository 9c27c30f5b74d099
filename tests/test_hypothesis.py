"""Shapes, strides, dtypes and options that nobody thought of, against the oracle. The same examples in every
run."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
from cases import DTYPES, INTEGERS, place
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import check
from torch import Tensor

settings.register_profile(
    "fixed",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


def examples(most: int) -> Callable[[Callable], Callable]:
    """Runs a test on a fifth of `most` drawn examples, and in `make test-all` on all of them."""

    def decorate(test: Callable) -> Callable:
        @pytest.mark.parametrize("number", [most // 5, pytest.param(most, marks=pytest.mark.long)])
        def run(number: int) -> None:
            settings(settings.get_profile("fixed"), max_examples=number)(given(st.data())(test))()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


class_counts = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129, 255, 300, 1025]))
seeds = st.integers(0, 2**32 - 1)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """(C,), (N, C) and (N, C, d1..dK), at most about 20,000 elements."""
    inner = draw(st.lists(st.one_of(st.integers(0, 5), st.sampled_from([1, 15, 16, 17, 33, 130])), max_size=4))
    inner = inner if prod(max(size, 1) for size in inner) <= 600 else inner[:1]
    classes = draw(class_counts)
    if prod(inner) * classes > 10_000:
        classes = classes % 33 + 1
    batch = draw(st.integers(0, 9))
    return draw(st.sampled_from([(classes,), (batch, classes), (batch, classes, *inner), (batch, classes, *inner)]))


@st.composite
def laid_out(draw: st.DrawFn, value: Tensor) -> Tensor:
    """'value' with its dimensions stored in any order, cut out of something larger, stepped through, repeated
    by strides of 0."""
    d = value.dim()
    repeated = [i for i in range(d) if value.size(i) > 1 and draw(st.integers(0, 5)) == 0]
    small = value
    for i in repeated:
        small = small.narrow(i, 0, 1)
    order = draw(st.permutations(range(d))) if draw(st.booleans()) else range(d)
    # In two dimensions at most, and around something only: else gigabytes lie around a few elements.
    cut = draw(st.lists(st.integers(0, d - 1), max_size=2)) if value.numel() and d else []
    step = {i: draw(st.sampled_from([1, 2, 3])) for i in cut}
    margin = {i: draw(st.sampled_from([0, 1, 2])) for i in cut}
    return place(small, order=order, step=step, margin=margin, offset=draw(st.integers(0, 3))).expand_as(value)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    shape, scale = draw(shapes()), draw(st.sampled_from([0.01, 1.0, 3.0, 30.0]))
    values = torch.randn(shape, generator=random(draw(seeds)), dtype=torch.double) * scale
    return draw(laid_out(values.to(draw(st.sampled_from(DTYPES)))))


def positions_of(x: Tensor) -> tuple[int, ...]:
    return (x.size(0), *x.shape[2:]) if x.dim() > 1 else ()


@st.composite
def weights(draw: st.DrawFn, classes: int, dtype: torch.dtype) -> Tensor | None:
    if draw(st.booleans()):
        return None
    values = torch.rand(classes, generator=random(draw(seeds)), dtype=torch.double) + 0.1
    if draw(st.booleans()):
        values[:: draw(st.integers(2, 5))] = 0
    return draw(laid_out(values.to(dtype)))


@st.composite
def options(draw: st.DrawFn, x: Tensor) -> dict[str, object]:
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    g = torch.randn(positions_of(x) if reduction == "none" else (), generator=random(draw(seeds)))
    return {
        "reduction": reduction,
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0])),
        "grad_output": draw(laid_out(g)),
        "empty": draw(st.sampled_from(["nan", "nan", "zero"])),
    }


# The single rounding errors of a few elements say nothing about native's exactness: only the rule's second
# half is asked for. Its roundings are more here: strides of 0 make all terms of a sum equal, and all errors
# go the same way.
RULE = {"as_native": False, "roundings": 32}


@examples(500)
def test_class_indices(data: st.DataObject) -> None:
    x = data.draw(logits())
    classes = x.size(1 if x.dim() > 1 else 0)
    integer = data.draw(st.sampled_from([d for d in INTEGERS if torch.iinfo(d).max >= classes - 1]))
    y = torch.randint(classes, positions_of(x), generator=random(data.draw(seeds)))
    ignore_index = data.draw(st.sampled_from([-100, 0, classes - 1, -1, 2**40]))
    if torch.iinfo(integer).min <= ignore_index <= torch.iinfo(integer).max:
        y[torch.rand(y.shape, generator=random(data.draw(seeds))) < data.draw(st.sampled_from([0.0, 0.3, 1.0]))] = (
            ignore_index
        )
    if y.shape == x.shape:  # (0, 0) and the like: by their shapes they would be probabilities
        return
    y = data.draw(laid_out(y.to(integer)))
    weight = data.draw(weights(classes, x.dtype))
    check(x, y, weight, **RULE, ignore_index=ignore_index, **data.draw(options(x)))


@examples(300)
def test_probabilities(data: st.DataObject) -> None:
    x = data.draw(logits())
    classes = x.size(1 if x.dim() > 1 else 0)
    q = torch.rand(x.shape, generator=random(data.draw(seeds)), dtype=torch.double)
    q = q * (q > data.draw(st.sampled_from([0.0, 0.5, 0.9]))) + data.draw(st.sampled_from([0.0, 0.0, -0.1]))
    q = data.draw(laid_out(q.to(data.draw(st.sampled_from(DTYPES)))))
    weight = data.draw(weights(classes, data.draw(st.sampled_from(DTYPES))))
    check(x, q, weight, **RULE, **data.draw(options(x)))


@examples(200)
def test_minus_infinity_and_ignored_nan(data: st.DataObject) -> None:
    """Masked classes are fine unless they are asked for, and nothing at an ignored position is ever read."""
    x = data.draw(logits()).clone()
    axis = 1 if x.dim() > 1 else 0
    y = torch.randint(x.size(axis), positions_of(x), generator=random(data.draw(seeds)))
    masked = torch.rand(x.shape, generator=random(data.draw(seeds))) < data.draw(st.sampled_from([0.2, 0.9]))
    masked = masked.scatter(axis, y.unsqueeze(axis), data.draw(st.integers(0, 4)) == 0)
    masked.select(axis, data.draw(st.integers(0, x.size(axis) - 1))).fill_(False)  # (all -inf: NaN, elsewhere)
    x[masked] = float("-inf")
    ignored = torch.rand(y.shape, generator=random(data.draw(seeds))) < data.draw(st.sampled_from([0.0, 0.5]))
    if y.shape == x.shape:
        return
    y[ignored] = -100
    x[ignored.unsqueeze(axis).expand_as(x)] = data.draw(st.sampled_from([float("nan"), float("inf"), 0.0]))
    weight = data.draw(weights(x.size(axis), x.dtype))
    check(data.draw(laid_out(x)), data.draw(laid_out(y)), weight, **RULE, **data.draw(options(x)))

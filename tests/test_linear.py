"""Linear + cross entropy: values and every gradient against the float64 oracle, whatever the target, the options and
the chunks; what autograd, the transforms and the compilers may ask of it; errors; memory; and the module."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import pickle
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import compositions
import oracle_linear
import pytest
import torch
import torch._functorch.config
import torch._inductor.config
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
import torch.nn.utils.prune
from cases import DTYPES, INTEGERS, generator, name_of, place
from differentiable import alike, close, same
from oracle_linear import LEAVES, LOSSES, Call, check_call, logits_of
from oracle_targets import Upstream
from test_memory import needs_peak, run_alone
from torch import Tensor, nn
from torch import distributed as dist
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cross_entropy_ext import LinearCrossEntropyLoss, LinearCrossEntropyOptions
from cross_entropy_ext import functional as ext
from cross_entropy_ext.distributed import vocab_parallel_linear_cross_entropy

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
STATISTICS = ("lse", "target_log_prob", "entropy")
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.02, "softcap": 5.0, "logit_scale": 0.7}
native_linear = getattr(F, "linear_cross_entropy", None)
NativeModule = getattr(nn, "LinearCrossEntropyLoss", None)
needs_native = pytest.mark.skipif(native_linear is None, reason="this torch has no linear_cross_entropy")


def chunked(size: int | None) -> dict[str, object]:
    return {} if size is None else {"options": LinearCrossEntropyOptions(batch_chunk_size=size)}


# ------------------------------------------------------------------------------------------------------------
# What is asked for, on what it is asked.


@dataclass(frozen=True)
class Case:
    """Sizes of the input and the weight, and a way to lay them out in memory."""

    id: str
    reason: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    layout: Callable[[Tensor], Tensor] = Tensor.contiguous
    weight_layout: Callable[[Tensor], Tensor] = Tensor.contiguous
    scale: float = 3.0  # of the logits

    @property
    def lead(self) -> tuple[int, ...]:
        return self.input[:-1]

    @property
    def positions(self) -> tuple[int, ...]:
        return (*self.lead, *self.weight[1:-1])

    @property
    def classes(self) -> int:
        return self.weight[0]

    def with_classes(self, classes: int) -> tuple[int, ...]:
        """Of something that has so many for each position: after the input's own dimensions."""
        return (*self.lead, classes, *self.weight[1:-1])


class Draw:
    """Arguments for a case, each with its own numbers, the same in every run."""

    def __init__(self, case: Case, dtype: torch.dtype, *key: object) -> None:
        self.case, self.dtype, self.key = case, dtype, (case.id, *key)

    def random(self, what: object) -> torch.Generator:
        return generator(*self.key, what)

    def normal(self, what: object, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.random(what), dtype=torch.double) * scale

    def uniform(self, what: object, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self.random(what), dtype=torch.double)

    def head(self) -> tuple[Tensor, Tensor]:
        """Input and weight, whose logits have a standard deviation of `scale`."""
        case, features = self.case, max(1, self.case.input[-1])
        weight = self.normal("weight", case.weight, case.scale / features**0.5)
        return (
            case.layout(self.normal("input", case.input).to(self.dtype)),
            case.weight_layout(weight.to(self.dtype)),
        )

    def bias(self) -> Tensor:
        return self.normal("bias", self.case.weight[:-1]).to(self.dtype)

    def labels(self, ignored: float = 0.0) -> Tensor:
        target = torch.randint(max(self.case.classes, 1), self.case.positions, generator=self.random("labels"))
        return target.masked_fill(self.uniform("ignored", self.case.positions) < ignored, -100)

    def probabilities(self) -> Tensor:
        shape = self.case.with_classes(self.case.classes)
        return self.normal("q", shape).softmax(len(self.case.lead)).to(self.dtype)

    def pairs(self, k: int, ignored: float = 0.0) -> tuple[Tensor, Tensor]:
        shape, axis = self.case.with_classes(k), len(self.case.lead)
        index = torch.randint(self.case.classes, shape, generator=self.random("pairs"))
        index.masked_fill_(self.uniform("no pair", shape) < ignored, -100)
        return index, self.normal("probs", shape).softmax(axis).to(self.dtype)

    def class_weight(self) -> Tensor:
        return (0.25 + self.uniform("class weight", (self.case.classes,))).to(self.dtype)

    def sample_weight(self, negative: bool = False) -> Tensor:
        s = self.uniform("s", self.case.positions) + 0.25
        if negative and s.dim():
            s.view(-1)[1::3] *= -0.5
            s.view(-1)[2::5] = 0
        return s.to(self.dtype)

    def upstream(self, reduction: str, *statistics: str) -> Upstream:
        """Neither one nor constant: a missing or misplaced factor shows."""
        g = self.normal("g", self.case.positions if reduction == "none" else ())
        return Upstream(g, **{name: self.normal(name, self.case.positions) for name in statistics})


@dataclass(frozen=True)
class Target:
    """A function with its targets and options; and what of its outputs is differentiated."""

    id: str
    reason: str
    build: Callable[[Draw], tuple[tuple[Tensor, ...], dict[str, object]]]
    function: Callable = ext.linear_cross_entropy
    statistics: tuple[str, ...] = ()

    def arguments(self, case: Case, dtype: torch.dtype) -> tuple[Draw, tuple[Tensor, ...], dict[str, object]]:
        draw = Draw(case, dtype, self.id)
        targets, options = self.build(draw)
        return draw, (*draw.head(), *targets), options

    def check(self, case: Case, dtype: torch.dtype, chunk: int | None = None) -> None:
        draw, arguments, options = self.arguments(case, dtype)
        reason = f"{self.id}, {name_of(dtype)}, chunks of {chunk}: {case.reason}"
        upstream = draw.upstream(options.get("reduction", "mean"), *self.statistics)
        check_call(self.function, *arguments, upstream=upstream, reason=reason, **options, **chunked(chunk))


TARGETS = [
    Target(
        "labels",
        "what a language model calls, with ignored tokens",
        lambda d: ((d.labels(ignored=0.3),), {}),
    ),
    Target(
        "labels-bias-none",
        "one loss and one grad_output for each position: nothing can be made in the forward",
        lambda d: ((d.labels(),), {"linear_bias": d.bias(), "reduction": "none"}),
    ),
    Target(
        "labels-weighted-smoothed-bias",
        "every term of a_c at once; the denominator is known only after the last chunk",
        lambda d: (
            (d.labels(ignored=0.3),),
            {"linear_bias": d.bias(), "weight": d.class_weight(), "label_smoothing": 0.1},
        ),
    ),
    Target(
        "labels-sum",
        "no denominator",
        lambda d: ((d.labels(ignored=0.3),), {"reduction": "sum", "linear_bias": d.bias()}),
    ),
    Target(
        "labels-sample-weight",
        "weighted tokens: the denominator is the sum of the weights of those that count",
        lambda d: ((d.labels(ignored=0.3),), {"sample_weight": d.sample_weight()}),
    ),
    Target(
        "labels-everything",
        "all options at once",
        lambda d: (
            (d.labels(ignored=0.3),),
            {
                "linear_bias": d.bias(),
                "weight": d.class_weight(),
                "sample_weight": d.sample_weight(),
                **EVERYTHING,
            },
        ),
    ),
    Target(
        "labels-everything-none",
        "and position by position, with factors of either sign",
        lambda d: (
            (d.labels(),),
            {"sample_weight": d.sample_weight(negative=True), "reduction": "none", **EVERYTHING},
        ),
    ),
    Target("labels-z-loss", "the term of lse alone", lambda d: ((d.labels(),), {"z_loss": 0.1})),
    Target("labels-softcap", "Gemma 2", lambda d: ((d.labels(),), {"softcap": 4.0, "reduction": "sum"})),
    Target("labels-scale", "a temperature", lambda d: ((d.labels(),), {"logit_scale": -0.6, "reduction": "none"})),
    Target(
        "labels-denominator",
        "a mean over the tokens of all ranks: known before the first chunk",
        lambda d: ((d.labels(ignored=0.3),), {"denominator": 41.5, "linear_bias": d.bias()}),
    ),
    Target(
        "labels-denominator-tensor",
        "the same as it comes from an all_reduce",
        lambda d: ((d.labels(ignored=0.3),), {"denominator": torch.tensor(41), "weight": d.class_weight()}),
    ),
    Target("soft", "probabilities, and a gradient of them", lambda d: ((d.probabilities(),), {})),
    Target(
        "soft-weighted-smoothed-none",
        "gradients to everything, position by position",
        lambda d: (
            (d.probabilities(),),
            {"weight": d.class_weight(), "label_smoothing": 0.1, "reduction": "none", "linear_bias": d.bias()},
        ),
    ),
    Target(
        "soft-everything-sum",
        "probabilities and all options at once",
        lambda d: (
            (d.probabilities(),),
            {"sample_weight": d.sample_weight(negative=True), "reduction": "sum", **EVERYTHING},
        ),
    ),
    Target(
        "pairs",
        "a teacher's top k, some of no account",
        lambda d: (d.pairs(3, ignored=0.4), {"linear_bias": d.bias()}),
        ext.linear_sparse_cross_entropy,
    ),
    Target(
        "pairs-everything-none",
        "with all options",
        lambda d: (
            d.pairs(4),
            {
                "weight": d.class_weight(),
                "sample_weight": d.sample_weight(negative=True),
                "reduction": "none",
                **EVERYTHING,
            },
        ),
        ext.linear_sparse_cross_entropy,
    ),
    Target(
        "statistics",
        "all outputs, and one backward for a mixture of them",
        lambda d: ((d.labels(ignored=0.3),), {"linear_bias": d.bias()}),
        ext.linear_cross_entropy_with_stats,
        STATISTICS,
    ),
    Target(
        "statistics-everything-none",
        "statistics are of the changed logits, without weights",
        lambda d: (
            (d.labels(ignored=0.3),),
            {
                "weight": d.class_weight(),
                "sample_weight": d.sample_weight(negative=True),
                "reduction": "none",
                **EVERYTHING,
            },
        ),
        ext.linear_cross_entropy_with_stats,
        STATISTICS,
    ),
    Target(
        "soft-statistics",
        "statistics of probabilities",
        lambda d: ((d.probabilities(),), {"reduction": "sum"}),
        ext.linear_cross_entropy_with_stats,
        STATISTICS,
    ),
]
TARGET = {target.id: target for target in TARGETS}

rows = (37, 24), (50, 24)
CASES = [
    Case("rows", "neither a chunk nor a vector", *rows),
    Case("vector", "no batch dimension", (24,), (50, 24)),
    Case("one-row", "one row", (1, 24), (50, 24)),
    Case("one-class", "one class: the loss is 0, but for the z-loss", (7, 5), (1, 5)),
    Case("one-feature", "products of one term", (9, 1), (13, 1)),
    Case("sequence", "(B, T, F)", (3, 7, 24), (50, 24)),
    Case("volume", "(B, T, U, F)", (2, 3, 4, 8), (11, 8)),
    Case("heads", "(C, d, F): several predictions for each row", (9, 12), (5, 3, 12)),
    Case("pixels", "(C, d1, d2, F): two dimensions of them", (4, 12), (7, 2, 3, 12)),
    Case("wide", "more classes than one piece of a row", (5, 16), (4099, 16)),
    Case("tall", "a prime number of rows, several chunks", (523, 8), (19, 8)),
    Case("confident", "logits of a trained model: most gradients are next to nothing", *rows, scale=12.0),
]
LAYOUTS = [
    Case("transposed", "input and weight stored by features", *rows, *[lambda v: place(v, order=(1, 0))] * 2),
    Case("sliced", "columns cut from wider matrices", *rows, *[lambda v: place(v, margin={1: 3})] * 2),
    Case("steps", "no stride is 1", *rows, *[lambda v: place(v, step={0: 2, 1: 3})] * 2),
    Case("misaligned", "starting one element off", *rows, *[lambda v: place(v, offset=1)] * 2),
    Case("expanded", "the same row for every sample", *rows, lambda v: v[:1].clone().expand_as(v)),
    Case(
        "time-first",
        "(T, B, F) seen as (B, T, F), a position cut off: rows that no view has in one dimension",
        (3, 7, 24),
        (50, 24),
        lambda v: place(v, order=(1, 0, 2), margin={1: 1}),
    ),
    Case(
        "heads-permuted",
        "(d, C, F) seen as (C, d, F)",
        (9, 12),
        (5, 3, 12),
        weight_layout=lambda v: place(v, order=(1, 0, 2)),
    ),
]


@pytest.mark.thin(3)
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.id)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_values(case: Case, target: Target) -> None:
    for dtype in DTYPES:
        target.check(case, dtype)


FEW = ("labels", "labels-weighted-smoothed-bias", "soft-weighted-smoothed-none", "statistics")


@pytest.mark.parametrize("target", [TARGET[name] for name in FEW], ids=lambda t: t.id)
@pytest.mark.parametrize("case", LAYOUTS, ids=lambda c: c.id)
def test_layouts(case: Case, target: Target) -> None:
    for dtype in DTYPES:
        target.check(case, dtype, chunk=5)


@pytest.mark.thin(2, emulator=5)
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.id)
@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 1000], ids=lambda chunk: f"chunk-{chunk}")
def test_chunks(target: Target, chunk: int) -> None:
    """One row, a divisor of nothing, all but one row, all, and more than there are."""
    for case, dtype in itertools.product([CASES[0], CASES[5], CASES[7]], DTYPES):
        target.check(case, dtype, chunk)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("chunk", [1, 16])
def test_chunks_are_added_up_in_float32(dtype: torch.dtype, chunk: int) -> None:
    """A sum of a thousand chunks in half precision would stop to grow."""
    case = Case("many", "a gradient that every chunk adds to", (1024, 4), (3, 4))
    draw = Draw(case, dtype)
    x, weight = draw.head()
    check_call(
        ext.linear_cross_entropy,
        x.abs(),
        weight,
        torch.zeros(1024, dtype=torch.long),
        linear_bias=draw.bias(),
        reduction="sum",
        **chunked(chunk),
    )


@pytest.mark.parametrize("integer", INTEGERS, ids=name_of)
def test_labels_of_every_integer_type(integer: torch.dtype) -> None:
    draw = Draw(CASES[0], torch.float32)
    target = draw.labels(ignored=0.3)
    ignored = 255 if integer == torch.uint8 else -100
    target = target.masked_fill(target < 0, ignored).to(integer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_call(ext.linear_cross_entropy, *draw.head(), target, ignore_index=ignored, **chunked(7))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"empty": "zero"}], ids=str)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)], ids=str)
@every_reduction
def test_empty(shape: tuple[int, ...], reduction: str, options: dict[str, object]) -> None:
    """As the loss of no logits; and gradients of zero, of their sizes."""
    x, weight, bias = torch.zeros(shape, requires_grad=True), torch.randn(5, 4), torch.randn(5)
    leaves = [x, weight.requires_grad_(), bias.requires_grad_()]
    target = torch.zeros(shape[:-1], dtype=torch.long)
    loss = ext.linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction, **options)
    same(loss, ext.cross_entropy(torch.zeros(0, 5), target.flatten(), reduction=reduction, **options).view(loss.shape))
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    for found, leaf in zip(torch.autograd.grad(loss.sum(), leaves), leaves, strict=True):
        same(found, torch.zeros_like(leaf))


@pytest.mark.parametrize("empty", ["nan", "zero"])
def test_all_ignored(empty: str) -> None:
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = ext.linear_cross_entropy(x, weight, torch.full((6,), -100), empty=empty, **chunked(4))
    assert loss.isnan() if empty == "nan" else loss == 0
    for found in torch.autograd.grad(loss, (x, weight)):
        same(found, torch.zeros_like(found))


WEIGHTLESS = {
    "a denominator of zero": {"denominator": torch.tensor(0)},
    "nothing by a denominator": {"denominator": 2.0, "target": torch.full((6,), -100)},
    "labels that weigh nothing": {"weight": torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])},
    "labels that weigh nothing, smoothed": {"weight": torch.tensor([0.0, 0, 1, 1, 1]), "label_smoothing": 0.1},
    "labels that weigh nothing, and a z-loss": {"weight": torch.tensor([0.0, 0, 1, 1, 1]), "z_loss": 0.1},
    "samples that weigh nothing": {"sample_weight": torch.zeros(6), "z_loss": 0.1},
    "sample weights that cancel": {"sample_weight": torch.tensor([1.0, -1, 2, -2, 0.5, -0.5])},
}


@pytest.mark.parametrize("made_in", ["forward", "backward"])
@pytest.mark.parametrize("empty", ["nan", "zero"])
@pytest.mark.parametrize("what", WEIGHTLESS)
def test_division_by_nothing(what: str, empty: str, made_in: str) -> None:
    """Is known only at the end, and is what it is for the loss of logits: NaN, infinite, or with empty='zero' 0."""
    options = {"target": torch.arange(6) % 2, "empty": empty, **WEIGHTLESS[what]}
    target, found = options.pop("target"), []
    torch.manual_seed(0)
    leaves = [torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)]
    # Where tensors are kept elsewhere, gradients are made in the backward.
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    for function in (
        lambda x, w: ext.linear_cross_entropy(x, w, target, **options, **chunked(4)),
        lambda x, w: ext.cross_entropy(F.linear(x, w), target, **options),
    ):
        with hooks if made_in == "backward" else contextlib.nullcontext():
            loss = function(*leaves)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    (ours, *gradients), (theirs, *expected) = found
    z_loss_alone = empty == "zero" and "and a z-loss" in what  # whose denominator has no class weights
    assert z_loss_alone or theirs.isnan() or theirs.isinf() or theirs == 0
    if what == "sample weights that cancel":  # infinities of both signs, in chunks
        assert not ours.isfinite()
        return
    same(ours, theirs)
    for one, other in zip(gradients, expected, strict=True):
        same(one.isfinite(), other.isfinite())
        torch.testing.assert_close(one.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0))


def test_no_features() -> None:
    """Logits are the bias, or zero."""
    x, weight, bias = torch.randn(6, 0), torch.randn(5, 0), torch.randn(5, requires_grad=True)
    target = torch.arange(6) % 5
    close(ext.linear_cross_entropy(x, weight, target).item(), math.log(5), 1e-6)
    loss = ext.linear_cross_entropy(x, weight, target, linear_bias=bias)
    close(torch.autograd.grad(loss, bias), torch.autograd.grad(F.cross_entropy(bias.expand(6, 5), target), bias), 1e-6)


@every_reduction
def test_a_label_in_a_list(reduction: str) -> None:
    """For a vector; the loss of which has no dimension all the same, as native's."""
    x, weight = torch.randn(4, requires_grad=True), torch.randn(5, 4)
    listed, alone = (ext.linear_cross_entropy(x, weight, torch.tensor(y), reduction=reduction) for y in ([3], 3))
    same(listed.detach(), alone.detach())
    same(torch.autograd.grad(listed, x), torch.autograd.grad(alone, x))


def test_confident_labels() -> None:
    """A margin of 40: the loss is e^-40 and so is the gradient, where native has zero."""
    x, weight = torch.ones(3, 1, requires_grad=True), torch.tensor([[40.0], [0.0]])
    loss = ext.linear_cross_entropy(x, weight, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(loss.item(), math.exp(-40), rtol=1e-4, atol=0)
    (found,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(found, torch.full((3, 1), -40 * math.exp(-40) / 3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
def test_soft_targets_of_another_type(dtype: torch.dtype) -> None:
    """The loss is promoted as native's is."""
    draw = Draw(CASES[0], dtype)
    for other in (torch.float32, torch.float64, torch.bfloat16):
        target = draw.probabilities().to(other)
        found = check_call(ext.linear_cross_entropy, *draw.head(), target, **chunked(8))
        assert found["target"].dtype == other


@every_reduction
def test_loss_dtype(reduction: str) -> None:
    draw = Draw(CASES[0], torch.bfloat16)
    x, weight = draw.head()
    options = {"reduction": reduction, "label_smoothing": 0.1}
    loss = ext.linear_cross_entropy(x, weight, draw.labels(), loss_dtype=torch.float32, **options)
    assert loss.dtype == torch.float32
    alike(loss, ext.cross_entropy(F.linear(x, weight).float(), draw.labels(), **options))


# ------------------------------------------------------------------------------------------------------------
# Autograd.


def leaves_of(case: Case, dtype: torch.dtype = torch.float32, **options: object) -> tuple[list[Tensor], Tensor]:
    draw = Draw(case, dtype, *options)
    return [t.requires_grad_() for t in (*draw.head(), draw.bias())], draw.labels(ignored=0.2)


def loss_of(leaves: list[Tensor], target: Tensor, **options: object) -> Tensor:
    x, weight, bias = leaves
    return ext.linear_cross_entropy(x, weight, target, linear_bias=bias, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("wanted", [w for k in (1, 2) for w in itertools.combinations(LEAVES[:3], k)], ids="+".join)
def test_gradients_of_some(wanted: tuple[str, ...], dtype: torch.dtype) -> None:
    """A frozen weight or input: the others' gradients are right, and the rest has none."""
    for reduction in ("mean", "none"):
        draw = Draw(CASES[0], dtype)
        options = {"linear_bias": draw.bias(), "reduction": reduction, **chunked(8)}
        check_call(
            ext.linear_cross_entropy,
            *draw.head(),
            draw.labels(ignored=0.2),
            upstream=draw.upstream(reduction),
            wanted=wanted,
            **options,
        )


def test_gradient_of_a_soft_target_alone() -> None:
    for reduction in ("mean", "none"):
        draw = Draw(CASES[0], torch.float32)
        upstream = draw.upstream(reduction)
        arguments = (*draw.head(), draw.probabilities())
        check_call(
            ext.linear_cross_entropy,
            *arguments,
            upstream=upstream,
            wanted=("target",),
            reduction=reduction,
            **chunked(8),
        )


def test_no_grad() -> None:
    """The same loss, and no graph."""
    leaves, target = leaves_of(CASES[0])
    for reduction in ("mean", "none"):
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                loss = loss_of(leaves, target, reduction=reduction, **chunked(8))
            assert not loss.requires_grad and loss.grad_fn is None
            same(loss.clone(), loss_of(leaves, target, reduction=reduction, **chunked(8)).detach())


@pytest.mark.usefixtures("backend")
@every_reduction
def test_second_backward(reduction: str) -> None:
    """The same bits again, for this grad_output and after another one; gradients that were handed out stay."""
    leaves, target = leaves_of(CASES[0])
    loss = loss_of(leaves, target, reduction=reduction, label_smoothing=0.1, **chunked(8))
    one, other = torch.ones_like(loss), torch.linspace(-2, 3, loss.numel()).view_as(loss)
    first = torch.autograd.grad(loss, leaves, one, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.mul_(7)  # what was handed out is its receiver's
    scaled = torch.autograd.grad(loss, leaves, other, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, one, retain_graph=True)
    same(again, tuple(kept))
    same(torch.autograd.grad(loss, leaves, other), scaled)
    if reduction != "none":
        for a, b in zip(scaled, kept, strict=True):
            torch.testing.assert_close(a, other * b)


def test_accumulation() -> None:
    """Two micro-batches by .backward(): the sum of their gradients, nothing overwritten."""
    leaves, target = leaves_of(CASES[0])
    parts = [torch.autograd.grad(loss_of([leaves[0][i::2], *leaves[1:]], target[i::2]), leaves) for i in range(2)]
    for i in range(2):
        loss_of([leaves[0][i::2], *leaves[1:]], target[i::2]).backward()
    for leaf, a, b in zip(leaves, *parts, strict=True):
        torch.testing.assert_close(leaf.grad, a + b)


def test_tied_weights() -> None:
    """An embedding that is the output layer, too: both its gradients."""
    found = []
    for loss in (ext.linear_cross_entropy, lambda x, w, t: F.cross_entropy(x @ w.T, t)):
        weight = Draw(CASES[0], torch.float64).head()[1].requires_grad_()
        tokens = torch.arange(13) % 50
        loss(weight[tokens].tanh(), weight, tokens.roll(-1)).backward()
        found.append(weight.grad)
    close(found[0], found[1])


def test_checkpoint() -> None:
    leaves, target = leaves_of(CASES[0])
    expected = torch.autograd.grad(loss_of(leaves, target), leaves)
    loss = checkpoint(loss_of, leaves, target, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected)


def test_changed_arguments_are_noticed() -> None:
    """What the backward needs again may not have been changed in place; a changed target must not crash it."""
    for reduction, which in itertools.product(("mean", "none"), (0, 1)):
        leaves, target = leaves_of(CASES[0])
        moved = [leaf * 1 for leaf in leaves]
        loss = loss_of(moved, target, reduction=reduction)
        expected = torch.autograd.grad(loss_of(moved, target, reduction=reduction).sum(), leaves)
        moved[which].mul_(2)
        try:
            found = torch.autograd.grad(loss.sum(), leaves)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:  # where all was made in the forward
            torch.testing.assert_close(found, expected)


def test_deterministic() -> None:
    """The same bits in every run, also where only deterministic algorithms are allowed."""
    for dtype, reduction in itertools.product([torch.float32, torch.bfloat16], ["mean", "none"]):
        leaves, target = leaves_of(CASES[10], dtype)
        found = []
        for strict in (False, True, False):
            torch.use_deterministic_algorithms(strict)
            try:
                loss = loss_of(leaves, target, reduction=reduction, **chunked(64))
                found.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
            finally:
                torch.use_deterministic_algorithms(False)
        same(found[1], found[0])
        same(found[2], found[0])


@every_dtype
def test_threads(dtype: torch.dtype) -> None:
    """The same bits for any number of threads, where torch's matrix products of the same chunks have them."""
    leaves, target = leaves_of(CASES[10], dtype)
    threads, products, found = torch.get_num_threads(), [], []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            x, weight, bias = (leaf.detach() for leaf in leaves)
            parts = [(rows, F.linear(rows, weight, bias)) for rows in x.split(64)]
            products.append([(logits, logits @ weight, logits.t() @ rows) for rows, logits in parts])
            loss = loss_of(leaves, target, **chunked(64))
            found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    finally:
        torch.set_num_threads(threads)
    if not all(torch.equal(a, b) for one, two in zip(*products, strict=True) for a, b in zip(one, two, strict=True)):
        pytest.skip("torch's own products differ")
    same(found[1], found[0])


# ------------------------------------------------------------------------------------------------------------
# Derivatives of any order and direction, in float64, against PyTorch's own operations.


def composed(name: str) -> Callable[..., Tensor | tuple]:
    """The function of this name, made of F.linear and of PyTorch's own operations."""

    def function(input: Tensor, linear_weight: Tensor, *targets: Tensor, linear_bias=None, **options) -> Tensor:
        logits = logits_of(input, linear_weight, linear_bias)
        return getattr(compositions, LOSSES[name])(logits, *targets, **options)

    return function


@dataclass(frozen=True)
class Problem:
    name: str
    reason: str
    build: Callable[[], tuple[tuple[Tensor, ...], dict[str, object]]]
    wanted: tuple[int, ...] = (0, 1)  # which of the positional arguments are differentiated
    options_wanted: tuple[str, ...] = ("linear_bias",)
    function: str = "linear_cross_entropy"

    def of(self, module: object) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """(what is differentiable of the outputs, as a function of what is differentiated; that)"""
        torch.manual_seed(0)
        arguments, options = self.build()
        function = getattr(ext, self.function) if module is ext else composed(self.function)
        names = [name for name in self.options_wanted if name in options]
        if module is not ext:
            options.pop("options", None)

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            positional, named = list(arguments), dict(options)
            for place_, tensor in zip(self.wanted, tensors, strict=False):
                positional[place_] = tensor
            named |= dict(zip(names, tensors[len(self.wanted) :], strict=True))
            result = function(*positional, **named)
            return (result,) if isinstance(result, Tensor) else tuple(result[:4])

        return call, (*(arguments[i] for i in self.wanted), *(options[name] for name in names))


def normal(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.double)


def index(n: int = 4, f: int = 3, c: int = 5, **more: object) -> tuple[tuple[Tensor, ...], dict[str, object]]:
    target = torch.randint(c, (n,))
    target[::3] = -100
    return (normal(n, f), normal(c, f), target), {"linear_bias": normal(c), **chunked(2), **more}


PROBLEMS = [
    Problem("mean", "the usual one", index),
    Problem("none", "one upstream gradient for each", lambda: index(reduction="none")),
    Problem(
        "smoothed", "every class has a coefficient", lambda: index(label_smoothing=0.2, weight=torch.rand(5).double())
    ),
    Problem("everything", "all options", lambda: index(sample_weight=torch.rand(4).double(), **EVERYTHING)),
    Problem(
        "sample-weight",
        "weights that are learned",
        lambda: index(sample_weight=torch.rand(4).double() + 0.5),
        options_wanted=("linear_bias", "sample_weight"),
    ),
    Problem(
        "denominator",
        "a denominator that is learned",
        lambda: index(denominator=torch.tensor(3.5, dtype=torch.double)),
        options_wanted=("linear_bias", "denominator"),
    ),
    Problem(
        "soft",
        "gradients to probabilities, and across",
        lambda: ((normal(4, 3), normal(5, 3), normal(4, 5).softmax(1)), {"label_smoothing": 0.1, **chunked(3)}),
        (0, 1, 2),
    ),
    Problem(
        "pairs",
        "gradients to a teacher's probabilities",
        lambda: ((normal(4, 3), normal(5, 3), torch.randint(5, (4, 2)), torch.rand(4, 2).double()), {}),
        (0, 1, 3),
        function="linear_sparse_cross_entropy",
    ),
    Problem(
        "heads",
        "several predictions for each row",
        lambda: ((normal(3, 2), normal(4, 2, 2), torch.randint(4, (3, 2))), {"linear_bias": normal(4, 2)}),
    ),
    Problem("vector", "no batch", lambda: ((normal(3), normal(5, 3), torch.tensor(2)), {})),
    Problem(
        "statistics",
        "of all outputs",
        lambda: index(reduction="sum"),
        function="linear_cross_entropy_with_stats",
    ),
]
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)


@every_problem
def test_gradcheck(problem: Problem) -> None:
    function, tensors = problem.of(ext)
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, tensors)


@every_problem
def test_transforms(problem: Problem) -> None:
    """torch.func's: the same as of PyTorch's own operations."""
    ours, tensors = problem.of(ext)
    theirs, _ = problem.of(compositions)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    places = tuple(range(len(tensors)))

    def total(function: Callable) -> Callable[..., Tensor]:
        return lambda *tensors: sum(
            (out * torch.arange(1, out.numel() + 1).view_as(out)).sum() for out in function(*tensors)
        )

    for transform in (
        lambda f: f(*tensors),
        lambda f: grad(total(f), places)(*tensors),
        lambda f: jvp(f, tensors, tangents),
        lambda f: vjp(f, *tensors)[1](f(*tensors)),
        lambda f: hessian(total(f), 0)(*tensors),
        lambda f: jvp(grad(total(f), places), tensors, tangents),
        lambda f: vmap(lambda s: f(*(s * t for t in tensors)))(torch.tensor([0.5, 1.0, -2.0], dtype=torch.double)),
        lambda f: vmap(lambda s: grad(total(f), places)(*(s * t for t in tensors)))(normal(3).abs_()),
    ):
        torch.manual_seed(1)
        expected = transform(theirs)
        torch.manual_seed(1)
        close(transform(ours), expected, 1e-10)


def test_vmap_of_batches() -> None:
    x, weight, target = normal(3, 4, 2), normal(5, 2), torch.randint(5, (3, 4))
    found = vmap(lambda x, t: ext.linear_cross_entropy(x, weight, t))(x, target)
    close(found, torch.stack([F.cross_entropy(a @ weight.T, t) for a, t in zip(x, target, strict=True)]))


@every_problem
def test_forward_ad(problem: Problem) -> None:
    """Dual tensors, and through them those of the gradient."""
    torch.manual_seed(2)
    results = []
    for module in (ext, compositions):
        function, tensors = problem.of(module)
        generator_ = torch.Generator().manual_seed(3)
        with fwad.dual_level():
            duals = [
                fwad.make_dual(t.requires_grad_(), torch.randn(t.shape, generator=generator_, dtype=t.dtype))
                for t in tensors
            ]
            outputs = function(*duals)
            tangents = tuple(fwad.unpack_dual(out).tangent.detach() for out in outputs)
            gradients = torch.autograd.grad(sum(out.sum() for out in outputs), duals)
            results.append((*tangents, *(fwad.unpack_dual(g).tangent.detach() for g in gradients)))
    close(results[0], results[1], 1e-10)


@every_problem
def test_double_backward(problem: Problem) -> None:
    """A gradient penalty."""
    results = []
    for module in (ext, compositions):
        function, tensors = problem.of(module)
        tensors = [t.requires_grad_() for t in tensors]
        loss = sum(out.sum() for out in function(*tensors))
        gradients = torch.autograd.grad(loss, tensors, create_graph=True)
        results.append(torch.autograd.grad(loss + sum(g.square().sum() for g in gradients), tensors))
    close(results[0], results[1], 1e-10)


# ------------------------------------------------------------------------------------------------------------
# Compilers and autocast.


@pytest.fixture
def fresh_compiler():
    """No test profits or suffers from the graphs of another, or of another build of this package."""
    torch._dynamo.reset()
    functorch, inductor = torch._functorch.config, torch._inductor.config
    with functorch.patch(enable_autograd_cache=False), inductor.patch(fx_graph_cache=False):
        yield
    torch._dynamo.reset()


def operators(graph: torch.fx.GraphModule) -> tuple[list[str], list[str]]:
    """What a graph calls: of ours, and of others."""
    called = [str(node.target) for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
    return [name for name in called if "cross_entropy_ext" in name], [n for n in called if "cross_entropy_ext" not in n]


COMPILED = (
    "labels",
    "labels-bias-none",
    "labels-everything",
    "labels-denominator-tensor",
    "soft",
    "pairs",
    "statistics",
)
BACKENDS = [(name, "aot_eager") for name in COMPILED]
BACKENDS += [pytest.param(name, "inductor", marks=pytest.mark.slow) for name in ("labels-denominator-tensor", "soft")]


@pytest.mark.thin(2)
@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_compiled(fresh_compiler: None, name: str, backend: str) -> None:
    """One frame, one operator of ours in the forward and no product beside it; values and gradients of eager; another
    batch size without another compilation."""
    from torch._dynamo.backends.common import aot_autograd

    graphs, target = [], TARGET[name]

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(graph)
        return graph

    def call(x: Tensor, weight: Tensor, *rest: Tensor | None) -> Tensor | tuple:
        targets, options = rest[:count], dict(zip(names, rest[count:], strict=True))
        return target.function(x, weight, *targets, **options, **others)

    for which in ("graphs", "values"):
        torch._dynamo.reset()
        compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep) if which == "graphs" else backend
        function = torch.compile(call, backend=compiler, fullgraph=True, dynamic=True)
        for n in (9, 14, 30):
            case = Case(f"compiled-{n}", "", (n, 6), (7, 6))
            _, arguments, options = target.arguments(case, torch.float64)
            tensors = {k: v for k, v in options.items() if isinstance(v, Tensor)}
            others = {k: v for k, v in options.items() if k not in tensors}
            names, count = list(tensors), len(arguments) - 2
            arguments = [*arguments, *tensors.values()]
            results = []
            for f in (call, function):
                leaves = [t.requires_grad_() for t in (arguments[0].detach(), arguments[1].detach())]
                with torch._dynamo.config.patch(error_on_recompile=n != 9):
                    outputs = f(*leaves, *arguments[2:])
                outputs = (outputs,) if isinstance(outputs, Tensor) else outputs[:4]
                loss = sum(out.sum() for out in outputs)
                results.append((*(out.detach() for out in outputs), *torch.autograd.grad(loss, leaves)))
            alike(results[1], results[0])
            if which == "graphs":
                break
    forward, backward = graphs
    assert len(operators(forward)[0]) == 1, operators(forward)
    assert len(operators(backward)[0]) <= 1
    for graph in graphs:
        assert not [name for name in operators(graph)[1] if "mm" in name or "softmax" in name or "linear" in name]


class Head(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 6).double()
        self.loss = LinearCrossEntropyLoss(6, 7, bias=True, dtype=torch.double, **options)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.body(x).tanh(), target)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "reduction": "none"}, chunked(3)], ids=str)
def test_export(options: dict[str, object], strict: bool) -> None:
    """One operator of ours, with a dynamic batch, whose program can be trained."""
    model = Head(**options)
    batch = torch.export.Dim("batch", min=2, max=1024)
    example = normal(4, 4), torch.randint(7, (4,))
    program = torch.export.export(model, example, dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    assert len(operators(program.graph_module)[0]) == 1, operators(program.graph_module)
    for n in (4, 11):
        x, target = normal(n, 4), torch.randint(7, (n,))
        found = []
        for module in (model, program.module()):
            module.zero_grad()
            loss = module(x, target)
            loss.sum().backward()
            found.append((loss.detach(), *(p.grad.clone() for p in module.parameters())))
        close(found[1], found[0])


def test_compiled_training(fresh_compiler: None) -> None:
    """Model and loss in one graph, batches of several sizes: the losses of eager."""
    torch.manual_seed(3)
    data = [(normal(n, 4), torch.randint(7, (n,))) for n in (8, 5, 12)]
    histories = []
    for compile_it in (False, True):
        model = Head(label_smoothing=0.1)
        step = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True) if compile_it else model
        optimizer, history = torch.optim.SGD(model.parameters(), lr=0.5), []
        for x, target in data:
            optimizer.zero_grad()
            loss = step(x, target)
            loss.backward()
            optimizer.step()
            history.append((loss.detach(), *(p.detach().clone() for p in model.parameters())))
        histories.append(history)
    close(histories[1], histories[0], 1e-11)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast(half: torch.dtype, reduction: str) -> None:
    """float32 tensors: products of halves, a float32 loss of their logits, and float32 gradients."""
    draw = Draw(CASES[0], torch.float32)
    x, weight = draw.head()
    bias, target, upstream = draw.bias(), draw.labels(ignored=0.2), draw.upstream(reduction).loss
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cpu", half):
        loss = loss_of(leaves, target, reduction=reduction, **chunked(8))
        composed_loss = ext.cross_entropy(F.linear(x, weight, bias), target, reduction=reduction)
    assert loss.dtype == composed_loss.dtype == torch.float32
    found = torch.autograd.grad(loss, leaves, upstream.float())
    others = torch.autograd.grad(composed_loss, leaves, upstream.float())

    rounded = [t.detach().to(half) for t in leaves]
    call = Call.of("linear_cross_entropy", (*rounded[:2], target), {"linear_bias": rounded[2], "reduction": reduction})
    exact = call.exact(Upstream(upstream.float()), None)
    for name, result, other in zip(("loss", *LEAVES), (loss, *found), (composed_loss, *others), strict=False):
        assert result.dtype == torch.float32
        oracle_linear.assert_as_native(result, exact[name], other, torch.float32, half, name)


def test_autocast_of_half_tensors_and_of_doubles() -> None:
    leaves, target = leaves_of(CASES[0], torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(leaves, target)
    assert loss.dtype == torch.float32
    alike(loss.detach(), loss_of(leaves, target, loss_dtype=torch.float32).detach())
    leaves, target = leaves_of(CASES[0], torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert loss_of(leaves, target).dtype == torch.float64


def test_meta_and_fake() -> None:
    """Shapes and types without values, of outputs and gradients."""
    for reduction in ("mean", "none"):
        leaves, target = leaves_of(CASES[5], torch.bfloat16)
        real = loss_of(leaves, target, reduction=reduction)
        leaves = [leaf.detach().to("meta").requires_grad_() for leaf in leaves]
        loss = loss_of(leaves, target.to("meta"), reduction=reduction)
        assert loss.is_meta and loss.shape == real.shape and loss.dtype == real.dtype
        for found, leaf in zip(torch.autograd.grad(loss.sum(), leaves), leaves, strict=True):
            assert found.is_meta and found.shape == leaf.shape and found.dtype == leaf.dtype


def test_subclasses() -> None:
    """What means something of its own by an operation keeps its type, as under the native function."""

    class Tagged(Tensor):
        pass

    leaves, target = leaves_of(CASES[0])
    loss = loss_of([leaves[0].as_subclass(Tagged), *leaves[1:]], target)
    assert isinstance(loss, Tagged)
    torch.testing.assert_close(loss.as_subclass(Tensor), loss_of(leaves, target))


# ------------------------------------------------------------------------------------------------------------
# Memory.

MIB = 2**20
WORKSPACE = 48 * MIB  # what a step may take besides its gradients

PEAKS = """
def measure(dtype=torch.float32, grad=True, twice=False, stats=False, pairs=False, sequence=False, heads=False,
            soft=False, bias=False, autocast=False, weighted=False, target_type=torch.long, chunk=None, **options):
    N, F_, C = 2048, 64, 16384  # logits of 128 MiB in float32
    functional = cross_entropy_ext.functional
    small = functional.linear_cross_entropy(
        torch.randn(64, 64, requires_grad=True), torch.randn(64, 64), torch.arange(64), label_smoothing=0.1
    )
    small.backward()
    x = torch.randn(N, F_).to(dtype)
    w = (torch.randn(C, F_) / 8).to(dtype)
    y = torch.randint(C, (N,))
    function = functional.linear_cross_entropy_with_stats if stats else functional.linear_cross_entropy
    if sequence:
        x, y = x.view(4, -1, F_), y.view(4, -1)
    if heads:
        w, y = w.view(-1, 16, F_), torch.randint(C // 16, (N, 16))
    targets = (y.to(target_type),)
    if soft:
        targets = (torch.randn(N, C).softmax(1).to(dtype),)
    if pairs:
        function, targets = functional.linear_sparse_cross_entropy, (torch.randint(C, (N, 8)), torch.rand(N, 8))
    if bias:
        options["linear_bias"] = torch.randn(w.shape[:-1]).to(dtype).requires_grad_(grad)
    if weighted:
        options["weight"] = torch.rand(len(w)).to(dtype) + 0.5
    if chunk:
        options["options"] = cross_entropy_ext.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    leaves = [t.requires_grad_(grad) for t in (x, w)] + [options[k] for k in ("linear_bias",) if k in options]
    gradients = sum(t.numel() * t.element_size() for t in leaves if t.requires_grad)
    gc.collect()
    cross_entropy_ext.empty_cache()
    reset_peak()
    before = resident()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = function(x, w, *targets, **options)
    if grad:
        loss = sum(part.sum() for part in result[:4]) if stats else result.sum()
        found = torch.autograd.grad(loss, leaves, retain_graph=twice)
        if twice:
            del found
            found = torch.autograd.grad(loss, leaves)
    return peak() - before - gradients
"""


@needs_peak
@pytest.mark.slow
def test_peak_of_a_step() -> None:
    """The gradients and a workspace, never the logits: whatever the target, the options and the passes. Where native's
    chunks fall back to whole logits, with a warning, there is no warning either."""
    peaks = run_alone(
        PEAKS
        + """
import warnings
warnings.simplefilter("error")
torch.manual_seed(0)
cases = {
    "labels": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "a bias": {"bias": True},
    "smoothing": {"label_smoothing": 0.1},
    "class weights and smoothing": {"label_smoothing": 0.1, "weighted": True},
    "int32 labels": {"target_type": torch.int32},
    "soft targets": {"soft": True},
    "pairs": {"pairs": True},
    "heads": {"heads": True},
    "a sequence": {"sequence": True},
    "none": {"reduction": "none"},
    "statistics": {"stats": True},
    "z-loss, softcap": {"z_loss": 1e-3, "softcap": 30.0},
    "a denominator": {"denominator": 1000},
    "second backward": {"twice": True},
    "second backward, bfloat16": {"twice": True, "dtype": torch.bfloat16},
    "autocast": {"autocast": True},
    "no grad": {"grad": False},
    "chunks of 64": {"chunk": 64},
    "chunks of 64, smoothing": {"chunk": 64, "label_smoothing": 0.1},
}
result = {name: measure(**options) for name, options in cases.items()}
warnings.simplefilter("ignore")
x, w = torch.randn(2048, 64, requires_grad=True), (torch.randn(16384, 64) / 8).requires_grad_()
reset_peak()
before = resident()
F.cross_entropy(F.linear(x, w), torch.randint(16384, (2048,))).backward()
result["native"] = peak() - before
"""
    )
    assert peaks.pop("native") > 128 * MIB  # the measurement sees what it is for
    limits = {"autocast": WORKSPACE + 8 * MIB}  # and copies of input and weight
    assert {n: v / MIB for n, v in peaks.items() if v > limits.get(n, WORKSPACE)} == {}


def test_saved_tensors() -> None:
    """Between forward and backward there are arguments, gradients and a few numbers for each position."""
    n, f, c = 64, 8, 512
    for reduction, options in itertools.product(("mean", "none"), ({}, {"label_smoothing": 0.1}, chunked(16))):
        x, weight = torch.randn(n, f, requires_grad=True), torch.randn(c, f, requires_grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved: to.append(t) or t, lambda t: t):
            loss = ext.linear_cross_entropy(x, weight, torch.randint(c, (n,)), reduction=reduction, **options)
        assert max(t.numel() for t in saved) <= max(x.numel(), weight.numel()) < n * c
        loss.sum().backward()


# ------------------------------------------------------------------------------------------------------------
# Options of the chunks.


@needs_native
def test_options_are_natives() -> None:
    assert LinearCrossEntropyOptions is nn.LinearCrossEntropyOptions


def test_options_without_effect() -> None:
    """Sums are always kept in float32, and a second backward is always allowed: the same bits whatever is asked for."""
    leaves, target = leaves_of(CASES[0], torch.bfloat16)

    def results(**fields: object) -> tuple[Tensor, ...]:
        loss = loss_of(leaves, target, options=LinearCrossEntropyOptions(batch_chunk_size=8, **fields))
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        same(torch.autograd.grad(loss, leaves), first)
        return loss.detach(), *first

    expected = results()
    for policy in ("accurate", "balanced", "compact", "auto"):
        same(results(acc_policy=policy, acc_dtype=torch.float32), expected)
    same(results(allow_retain_graph=True), expected)


@pytest.mark.parametrize("method", ["auto", "aspect_ratio", "aspect_ratio:4", None])
def test_chunking_methods(method: str | None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        draw = Draw(CASES[0], dtype)
        options = LinearCrossEntropyOptions(chunking_method=method)
        check_call(ext.linear_cross_entropy, *draw.head(), draw.labels(), options=options, label_smoothing=0.1)


@pytest.mark.parametrize(
    "fields",
    [{"batch_chunk_size": 0}, {"batch_chunk_size": 1.5}, {"chunking_method": "halves"}, {"acc_policy": "best"}],
    ids=str,
)
def test_options_that_are_none(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        LinearCrossEntropyOptions(**fields)


# ------------------------------------------------------------------------------------------------------------
# Errors.


def arguments_of(
    input: tuple[int, ...] = (3, 4),
    linear_weight: tuple[int, ...] = (5, 4),
    target: Tensor | tuple[int, ...] = (3,),
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    **options: object,
) -> tuple[list[Tensor], dict[str, object]]:
    target = torch.zeros(target, dtype=torch.long) if isinstance(target, tuple) else target
    return [torch.ones(input, dtype=dtypes[0]), torch.ones(linear_weight, dtype=dtypes[1]), target], options


ERRORS = {
    "no features in the weight": arguments_of(linear_weight=(4,)),
    "other features": arguments_of(linear_weight=(5, 3)),
    "a bias of another size": arguments_of(linear_bias=torch.ones(4)),
    "a flat bias of heads": arguments_of(linear_weight=(5, 2, 4), target=(3, 2), linear_bias=torch.ones(10)),
    "heads without a batch": arguments_of((4,), (5, 2, 4), (2,)),
    "ignore_index with probabilities": arguments_of(target=torch.ones(3, 5), ignore_index=1),
    "an unknown reduction": arguments_of(reduction="average"),
    "an unknown reduction of chunks": arguments_of(reduction="average", **chunked(2)),
    "smoothing above one": arguments_of(label_smoothing=1.5),
    "too few labels": arguments_of(target=(2,)),
    "labels for a vector": arguments_of((4,), target=(2,)),
    "labels of another shape": arguments_of(target=(3, 2)),
    "too few labels of heads": arguments_of(linear_weight=(5, 2, 4), target=(3, 3)),
    "a label that is no class": arguments_of(target=torch.tensor([0, 5, 1])),
    "a negative label": arguments_of(target=torch.tensor([0, -7, 1])),
    "a label that is no class of a vector": arguments_of((4,), target=torch.tensor(9)),
    "labels that are not integers": arguments_of(target=torch.zeros(3)),
    "class weights of another size": arguments_of(weight=torch.ones(4)),
    "probabilities that are integers": arguments_of(target=torch.ones(3, 5, dtype=torch.long)),
    "a weight of another type": arguments_of(dtypes=(torch.float32, torch.float64)),
    "a bias of another type": arguments_of(linear_bias=torch.ones(5, dtype=torch.float64)),
    "integers": arguments_of(dtypes=(torch.long, torch.long)),
}


def raised(function: Callable, *arguments: object, **options: object) -> Exception:
    with pytest.raises(Exception) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(*arguments, **options)
    return caught.value


@needs_native
@pytest.mark.parametrize("what", ERRORS)
def test_errors_are_natives(what: str) -> None:
    arguments, options = ERRORS[what]
    theirs, ours = (raised(f, *arguments, **options) for f in (native_linear, ext.linear_cross_entropy))
    assert type(ours) is type(theirs) and str(ours) == str(theirs)


def test_more_dimensions_than_native() -> None:
    """Which has no input of more than two; one of none is an error here, too."""
    with pytest.raises(RuntimeError, match="expected input with dimensionality"):
        ext.linear_cross_entropy(torch.ones(()), torch.ones(5, 4), torch.zeros((), dtype=torch.long))
    loss = ext.linear_cross_entropy(torch.ones(2, 3, 4), torch.ones(5, 4), torch.zeros(2, 3, dtype=torch.long))
    close(loss.item(), math.log(5), 1e-6)
    for target in (torch.zeros(3, 2), torch.zeros(6), torch.zeros(2, 3, 1), torch.zeros(2, 4)):
        with pytest.raises((ValueError, RuntimeError), match=r"[Ee]xpected|size mismatch"):
            ext.linear_cross_entropy(torch.ones(2, 3, 4), torch.ones(5, 4), target.long())


BAD_EXTRAS = {
    "sample_weight": {"sample_weight": torch.ones(2)},
    "softcap": {"softcap": -1.0},
    "z_loss": {"z_loss": math.nan},
    "logit_scale": {"logit_scale": math.inf},
    "empty": {"empty": "one"},
    "denominator": {"denominator": 3.0, "reduction": "sum"},
}


@pytest.mark.parametrize("argument", BAD_EXTRAS)
def test_errors_of_the_extras(argument: str) -> None:
    """As of the loss of logits: the argument is named."""
    arguments, _ = arguments_of()
    options = {"reduction": "mean", **BAD_EXTRAS[argument]}
    with pytest.raises(ValueError, match=argument):
        ext.linear_cross_entropy(*arguments, **options)
    with pytest.raises(ValueError, match=argument):
        ext.linear_cross_entropy_with_stats(*arguments, **options)
    indices, probs = torch.zeros(3, 2, dtype=torch.long), torch.full((3, 2), 0.5)
    with pytest.raises(ValueError, match=argument):
        ext.linear_sparse_cross_entropy(*arguments[:2], indices, probs, **options)


def test_errors_in_a_later_chunk() -> None:
    """A label that is no class is found wherever it is, and the next call is right."""
    x, weight, target = torch.randn(20, 4, requires_grad=True), torch.randn(5, 4), torch.arange(20) % 5
    bad = target.clone()
    bad[17] = 5
    for reduction in ("mean", "none"):
        with pytest.raises(IndexError, match="Target 5 is out of bounds"):
            ext.linear_cross_entropy(x, weight, bad, reduction=reduction, **chunked(4))
        loss = ext.linear_cross_entropy(x, weight, target, reduction=reduction, **chunked(4))
        torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, weight), target, reduction=reduction))


def test_negative_smoothing() -> None:
    """An error, as for the loss of logits; native takes it for 0."""
    arguments, _ = arguments_of()
    for value in (-0.1, math.nan):
        with pytest.raises(RuntimeError, match="label_smoothing must be between"):
            ext.linear_cross_entropy(*arguments, label_smoothing=value)


@needs_native
def test_no_warnings_where_native_warns() -> None:
    """What native computes from whole logits after all, with a warning, is chunked here, silently, and right."""
    x, weight, heads = torch.randn(8, 4), torch.randn(6, 4), torch.randn(3, 2, 4)
    labels, options = torch.randint(6, (8,)), chunked(3)
    calls = {
        "smoothing": ((weight, labels), {"label_smoothing": 0.1}),
        "probabilities": ((weight, torch.randn(8, 6).softmax(1)), {}),
        "heads": ((heads, labels.view(8, 1).expand(8, 2) % 3), {}),
    }
    for arguments, more in calls.values():
        with pytest.warns(UserWarning, match="``options`` ignored"):
            expected = native_linear(x, *arguments, **more, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = ext.linear_cross_entropy(x, *arguments, **more, **options)
        torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------------------------------
# The module.

MODULES = {
    "plain": ((24, 50), {}),
    "bias": ((24, 50), {"bias": True, "reduction": "none"}),
    "heads": ((12, 5), {"out_features": (3,), "bias": True}),
    "pixels": ((12, 7), {"out_features": (2, 3), "label_smoothing": 0.1}),
    "options": (
        (24, 50),
        {"weight": torch.linspace(0.5, 1.5, 50), "ignore_index": 3, "options": chunked(4)["options"]},
    ),
    "double": ((24, 50), {"dtype": torch.double, "reduction": "sum"}),
}
EXTRAS = {"z_loss": 0.02, "softcap": 5.0, "logit_scale": 0.7, "loss_dtype": torch.float64, "empty": "zero"}
every_module = pytest.mark.parametrize("name", MODULES)


def example(name: str) -> tuple[Tensor, Tensor]:
    (features, classes), options = MODULES[name]
    torch.manual_seed(1)
    x = torch.randn(9, features, dtype=options.get("dtype"))
    return x, torch.randint(classes, (9, *options.get("out_features", ())))


@every_module
def test_module_is_natives(name: str) -> None:
    """Constructor, repr, parameters, buffers and, by way of a state_dict in both directions, the loss."""
    if NativeModule is None:
        pytest.skip("this torch has no LinearCrossEntropyLoss")
    arguments, options = MODULES[name]
    ours, theirs = LinearCrossEntropyLoss(*arguments, **options), NativeModule(*arguments, **options)
    assert repr(ours) == repr(theirs)
    for entries in ("named_parameters", "named_buffers"):
        both = [[(n, t.shape, t.dtype) for n, t in getattr(m, entries)()] for m in (ours, theirs)]
        assert both[0] == both[1]
    x, target = example(name)
    for source, sink in ((ours, theirs), (theirs, ours)):
        nn.init.normal_(source.linear.weight)
        sink.load_state_dict(source.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(ours(x, target), theirs(x, target))


@every_module
def test_module_without_native(name: str) -> None:
    """What it is, said without PyTorch's own."""
    arguments, options = MODULES[name]
    module = LinearCrossEntropyLoss(*arguments, **options)
    outputs = math.prod(options.get("out_features", ()), start=arguments[1])
    expected = {"linear.weight": (outputs, arguments[0])}
    expected |= {"linear.bias": (outputs,)} if options.get("bias") else {}
    expected |= {"weight": (arguments[1],)} if "weight" in options else {}
    assert {n: tuple(t.shape) for n, t in module.state_dict().items()} == expected
    assert dict(module.named_buffers(remove_duplicate=False)).keys() == ({"weight"} if "weight" in options else set())
    assert f"in_features={arguments[0]}, num_classes={arguments[1]}, out_features=" in repr(module)
    x, target = example(name)
    weight = module.linear.weight.unflatten(0, (arguments[1], *options.get("out_features", ())))
    bias = module.linear.bias
    logits = logits_of(x, weight, bias)
    known = {k: v for k, v in options.items() if k in oracle_linear.NATIVE}
    torch.testing.assert_close(module(x, target), F.cross_entropy(logits, target, **known))


@every_module
def test_module_copies(name: str) -> None:
    """Copied and pickled, with all of its options."""
    arguments, options = MODULES[name]
    module = LinearCrossEntropyLoss(*arguments, **options, **EXTRAS)
    x, target = example(name)
    expected = module(x, target)
    assert expected.dtype == torch.float64
    buffer = pickle.dumps(module)
    for other in (copy.deepcopy(module), copy.copy(module), pickle.loads(buffer)):
        assert repr(other) == repr(module)
        same(other(x, target), expected)
    found = functional_call(module, {n: t * 2 for n, t in module.named_parameters()}, (x, target))
    assert not found.equal(expected)


def test_module_forward() -> None:
    """Its tensors for each call, and the extras of the constructor, get to the function."""
    module = LinearCrossEntropyLoss(24, 50, bias=True, **EXTRAS)
    x, target = example("plain")
    weight = torch.rand(9)
    expected = ext.linear_cross_entropy(
        x,
        module.linear.weight,
        target,
        linear_bias=module.linear.bias,
        sample_weight=weight,
        denominator=3.5,
        **EXTRAS,
    )
    same(module(x, target, sample_weight=weight, denominator=3.5), expected)
    assert not module(x, target).equal(expected)
    module.half().float()
    assert module(x.view(3, 3, 24), target.view(3, 3)).dim() == 0
    with pytest.raises(TypeError):
        LinearCrossEntropyLoss(24, 50, ())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"weight": torch.ones(4)}, "expected weight shape"), ({"label_smoothing": 2.0}, "expected label_smoothing")],
)
def test_module_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        LinearCrossEntropyLoss(3, 5, **options)


class Adapted(nn.Module):
    """A layer and what is learned beside it: an adapter of low rank."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False, dtype=torch.double)
        self.up = nn.Linear(2, layer.out_features, bias=False, dtype=torch.double)

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def forward(self, input: Tensor) -> Tensor:
        return self.layer(input) + self.up(self.down(input))


def adapt(loss: LinearCrossEntropyLoss) -> None:
    loss.linear = Adapted(loss.linear)


def replace_forward(loss: LinearCrossEntropyLoss) -> None:
    layer = loss.linear
    layer.forward = lambda input: 2 * F.linear(input, layer.weight)


# What is done to a layer, and to its weight where this is made anew for each forward.
LAYERS: dict[str, Callable[[LinearCrossEntropyLoss], object]] = {
    "pruned": lambda loss: nn.utils.prune.l1_unstructured(loss.linear, "weight", 0.5),
    "weight_norm": lambda loss: nn.utils.weight_norm(loss.linear),
    "parametrized": lambda loss: nn.utils.parametrizations.weight_norm(loss.linear),
    "pre-hook": lambda loss: loss.linear.register_forward_pre_hook(lambda layer, inputs: (2 * inputs[0],)),
    "backward hook": lambda loss: loss.linear.register_full_backward_hook(
        lambda layer, of_input, of_output: (2 * of_input[0],)
    ),
    "adapted": adapt,
    "another forward": replace_forward,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("out_features", [(), (2, 3)], ids=str)
def test_module_runs_its_layer(out_features: tuple[int, ...], name: str) -> None:
    """What stands around the layer's forward, or in its place, acts on the loss as on the logits; in every step."""
    g = generator(name)
    batch = (4,) if out_features else (2, 4)
    input = torch.randn(*batch, 6, generator=g, dtype=torch.double)
    target = torch.randint(5, (*batch, *out_features), generator=g)
    target[0, 0] = -100
    sample_weight = torch.rand(target.shape, generator=g, dtype=torch.double)

    def steps(fused: bool) -> list[Tensor]:
        torch.manual_seed(0)
        module = LinearCrossEntropyLoss(6, 5, out_features=out_features, dtype=torch.double, label_smoothing=0.1)
        LAYERS[name](module)
        parameters = [p for p in module.parameters() if p.requires_grad]
        results = []
        for reduction in ("mean", "none"):
            states = input.clone().requires_grad_()
            if fused:
                module.reduction = reduction
                loss = module(states, target, sample_weight=sample_weight)
            else:
                logits = module.linear(states).unflatten(-1, (5, *out_features))
                logits = logits if out_features else logits.movedim(-1, 1)
                options = {"reduction": reduction, "label_smoothing": 0.1}
                loss = ext.cross_entropy(logits, target, sample_weight=sample_weight, **options)
            grads = torch.autograd.grad(loss.sum(), [states, *parameters])
            with torch.no_grad():
                for parameter, gradient in zip(parameters, grads[1:], strict=True):
                    parameter.sub_(gradient)
            results += [loss.detach(), *grads]
        assert ("forward" in vars(module.linear)) == (name == "another forward")
        return results

    for ours, right in zip(steps(True), steps(False), strict=True):
        torch.testing.assert_close(ours, right)


class Held(nn.Linear):
    """A layer in which a call can wait: before it looks for the layer's forward, or in a hook, after that."""

    def __init__(self, where: str) -> None:
        super().__init__(6, 5, dtype=torch.double)
        self.held, self.entered, self.released = {where}, threading.Event(), threading.Event()
        self.seen = []
        self.register_forward_pre_hook(Held.double_the_input)
        self.register_forward_hook(lambda layer, inputs, output: layer.seen.append(output.shape))

    def wait(self, where: str) -> None:
        if where in self.held:
            self.held.clear()  # the next call goes on
            self.entered.set()
            assert self.released.wait(60)

    def __call__(self, *inputs: Tensor, **options: object) -> Tensor:
        if not torch.compiler.is_compiling():
            self.wait("before the forward")
        return super().__call__(*inputs, **options)

    def double_the_input(self, inputs: tuple[Tensor]) -> tuple[Tensor]:
        if not torch.compiler.is_compiling():
            self.wait("in a hook")
        return (2 * inputs[0],)


@pytest.mark.parametrize("others", ["eager", "compiled"])
@pytest.mark.parametrize("where", ["before the forward", "in a hook"])
def test_module_in_two_threads(fresh_compiler: None, where: str, others: str) -> None:
    """While one call waits in the layer, another one runs from its start to its end, and so does the layer itself."""
    torch.manual_seed(0)
    module = LinearCrossEntropyLoss(6, 5)
    module.linear = Held(where)
    layer, weight, bias = module.linear, module.linear.weight, module.linear.bias
    module_of_others = torch.compile(module, backend="aot_eager", fullgraph=True) if others == "compiled" else module
    calls = [(normal(n, 6), torch.randint(5, (n,))) for n in (3, 4)]

    def step(module: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        loss = module(x, target)
        return loss.detach(), *torch.autograd.grad(loss, [weight, bias])

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(step, module, *calls[0])
        try:
            assert layer.entered.wait(60)
            found = step(module_of_others, *calls[1])
            logits = layer(calls[1][0])
        finally:
            layer.released.set()
        results = [waiting.result(60), found]
    assert "forward" not in vars(layer)
    # Forward hooks see the loss where the loss was called, and logits where the layer was.
    assert layer.seen == [(), (4, 5), ()]
    same(logits, F.linear(2 * calls[1][0], weight, bias))
    for (x, target), result in zip(calls, results, strict=True):
        close(result, step(lambda x, target: F.cross_entropy(F.linear(2 * x, weight, bias), target), x, target))


def test_module_trains() -> None:
    """As nn.Linear and nn.CrossEntropyLoss do, step by step."""
    torch.manual_seed(0)
    fused = LinearCrossEntropyLoss(6, 9, bias=True, dtype=torch.double, label_smoothing=0.1)
    linear = nn.Linear(6, 9, dtype=torch.double)
    linear.load_state_dict(fused.linear.state_dict())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (fused, linear)]
    x, target = normal(20, 6), torch.randint(9, (20,))
    for _ in range(5):
        losses = [fused(x, target), F.cross_entropy(linear(x), target, label_smoothing=0.1)]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        close(losses[0], losses[1])
    close(fused.linear.weight, linear.weight)


# ------------------------------------------------------------------------------------------------------------
# What once went wrong


@pytest.mark.parametrize("factor", [math.inf, -math.inf, math.nan])
def test_a_gradient_without_end_leaves_ignored_rows_alone(factor: float) -> None:
    """As a loss scale that was too large makes it: gradients made in the forward were multiplied by it."""
    input, weight = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    target = torch.tensor([0, -100, 3, 1, -100])
    ext.linear_cross_entropy(input, weight, target).backward(torch.tensor(factor))
    assert not input.grad[target == -100].any() and not input.grad[target != -100].isfinite().any()


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=str)
def test_compiled_backward_of_an_eager_forward(fresh_compiler: None, options: dict[str, object]) -> None:
    import torch._dynamo.compiled_autograd as compiled_autograd

    tensors = [torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)]
    target = torch.tensor([0, 2, 3, 1, 1])
    expected = torch.autograd.grad(ext.linear_cross_entropy(*tensors, target, **options).sum() * 2, tensors)
    loss = ext.linear_cross_entropy(*tensors, target, **options).sum() * 2
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        loss.backward()
    for tensor, gradient in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


def test_no_features_of_several_dimensions() -> None:
    loss = ext.linear_cross_entropy(torch.randn(3, 0), torch.randn(2, 2, 0), torch.zeros(3, 2, dtype=torch.long))
    assert loss.item() == pytest.approx(math.log(2))


def test_sparse_input() -> None:
    input, weight, target = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([1, 4, 0])
    torch.testing.assert_close(
        ext.linear_cross_entropy(input.to_sparse(), weight, target), ext.linear_cross_entropy(input, weight, target)
    )


# ------------------------------------------------------------------------------------------------------------
# What is counted of it.


def flops(step: Callable[..., Tensor], *leaves: Tensor, backward: bool = True) -> int:
    with FlopCounterMode(display=False) as counter:
        loss = step(*leaves)
        if backward:
            loss.sum().backward()
    return counter.get_total_flops()


def heads(positions: int, features: int, classes: int) -> list[Tensor]:
    return [torch.randn(size, features, generator=generator("flops", size)) for size in (positions, classes)]


def native_loss(x: Tensor, weight: Tensor, target: Tensor, **options: object) -> Tensor:
    return F.cross_entropy(F.linear(x, weight.flatten(0, -2)).view(-1, *weight.shape[:-1]), target.flatten(), **options)


@every_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
@pytest.mark.parametrize("wanted", [w for k in (1, 2) for w in itertools.combinations((0, 1), k)], ids=str)
def test_flops(wanted: tuple[int, ...], dtype: torch.dtype, reduction: str) -> None:
    """As many as of F.linear and the loss, whether the gradients are made in the forward or in the backward."""
    leaves = [normal.to(dtype).requires_grad_(i in wanted) for i, normal in enumerate(heads(7, 6, 11))]
    target = torch.arange(7) % 11

    def sparse(x: Tensor, weight: Tensor) -> Tensor:
        return ext.linear_sparse_cross_entropy(
            x, weight, target[:, None], torch.ones(7, 1, dtype=dtype), reduction=reduction
        )

    expected = flops(lambda *head: native_loss(*head, target, reduction=reduction), *leaves)
    assert expected == 2 * 7 * 6 * 11 * (1 + len(wanted))
    for step in (
        lambda *head: ext.linear_cross_entropy(*head, target, reduction=reduction, **chunked(3)),
        lambda *head: ext.linear_cross_entropy_with_stats(*head, target, reduction=reduction).loss,
        sparse,
    ):
        assert flops(step, *leaves) == expected


@pytest.mark.parametrize(("input", "weight"), [((2, 5, 6), (11, 6)), ((5, 6), (11, 2, 3, 6))], ids=str)
def test_flops_of_more_dimensions(input: tuple[int, ...], weight: tuple[int, ...]) -> None:
    leaves = [torch.zeros(shape, requires_grad=True) for shape in (input, weight)]
    target = torch.zeros(*input[:-1], *weight[1:-1], dtype=torch.int64)
    step = lambda *head: ext.linear_cross_entropy(*head, target)  # noqa: E731
    assert flops(step, *leaves) == 3 * 2 * math.prod(input) * math.prod(weight) // 6
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert flops(step, *leaves, backward=False) == 2 * math.prod(input) * math.prod(weight) // 6


def test_flops_vocab_parallel() -> None:
    leaves, target = [normal.requires_grad_() for normal in heads(7, 6, 11)], torch.arange(7)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        count = flops(lambda *head: vocab_parallel_linear_cross_entropy(*head, target), *leaves)
    finally:
        dist.destroy_process_group()
    assert count == flops(lambda *head: native_loss(*head, target), *leaves)

"""Targets and options of every kind, and the logits that they are checked on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import Case, expand, generator, place
from oracle_targets import LEAVES, Upstream, check_call
from torch import Tensor

from cross_entropy_ext import functional as ext


class Draw:
    """Arguments for logits, each with its own numbers, the same in every run."""

    def __init__(self, logits: Tensor, *key: object) -> None:
        self.logits, self.key = logits, (*key, tuple(logits.shape))
        self.axis = 1 if logits.dim() > 1 else 0
        self.classes = logits.size(self.axis)
        self.positions = tuple(size for d, size in enumerate(logits.shape) if d != self.axis)

    def random(self, what: object) -> torch.Generator:
        return generator(*self.key, what)

    def normal(self, what: object, shape: tuple[int, ...] | None = None, scale: float = 1.0) -> Tensor:
        shape = tuple(self.logits.shape) if shape is None else shape
        return torch.randn(shape, generator=self.random(what), dtype=torch.double) * scale

    def labels(self, what: object = "labels", ignored: float = 0.0) -> Tensor:
        target = torch.randint(self.classes, self.positions, generator=self.random(what))
        return target.masked_fill(torch.rand(self.positions, generator=self.random((what, "ignored"))) < ignored, -100)

    def probabilities(self) -> Tensor:
        return self.normal("q").softmax(self.axis).to(self.logits.dtype)

    def weight(self) -> Tensor:
        weight = torch.rand(self.classes, generator=self.random("weight"), dtype=torch.double)
        return (0.25 + weight).to(self.logits.dtype)

    def sample_weight(self, negative: bool = False) -> Tensor:
        s = torch.rand(self.positions, generator=self.random("s"), dtype=torch.double) + 0.25
        if negative and s.dim():
            s.view(-1)[1::3] *= -0.5
            s.view(-1)[2::5] = 0
        return s.to(self.logits.dtype)

    def pairs(self, k: int, ignored: float = 0.0, repeated: bool = False) -> tuple[Tensor, Tensor]:
        shape = list(self.logits.shape)
        shape[self.axis] = k
        index = torch.randint(self.classes, shape, generator=self.random("pairs"))
        if repeated:
            index.narrow(self.axis, k - 1, 1).copy_(index.narrow(self.axis, 0, 1))
        index.masked_fill_(torch.rand(shape, generator=self.random("no pair")) < ignored, -100)
        return index, self.normal("probs", shape).softmax(self.axis).to(self.logits.dtype)

    def lam(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self.random("lam"), dtype=torch.double).to(self.logits.dtype)

    def teacher(self) -> Tensor:
        return self.normal("teacher", scale=2.0).to(self.logits.dtype)

    def upstream(self, reduction: str, *statistics: str, loss: bool = True) -> Upstream:
        """Neither one nor constant: a missing or misplaced factor shows."""
        g = self.normal("g", self.positions if reduction == "none" else ())
        return Upstream(g if loss else None, **{name: self.normal(name, self.positions) for name in statistics})


@dataclass(frozen=True)
class Target:
    """A function with its arguments and options; and what of its outputs is differentiated."""

    id: str
    reason: str
    function: Callable
    build: Callable[[Draw], tuple[tuple, dict]]
    statistics: tuple[str, ...] = ()
    loss: bool = True
    passes: int = 1

    def check(self, logits: Tensor, key: object, reason: str = "") -> None:
        draw = Draw(logits, self.id, key)
        arguments, options = self.build(draw)
        reduction = options.get("reduction", "mean")
        reason = f"{self.id}: {reason}"
        mixed, options = draw.upstream(reduction, *self.statistics, loss=self.loss), {**options, "reason": reason}
        check_call(self.function, logits, *arguments, upstream=mixed, passes=self.passes, **options)
        # A grad_output of one, and a gradient of the logits alone: what the forward makes at once.
        check_call(self.function, logits, *arguments, wanted=LEAVES[:1] + LEAVES[3:4], passes=self.passes, **options)


STATISTICS = ("lse", "target_log_prob", "entropy")
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.02, "softcap": 5.0, "logit_scale": 0.7}

TARGETS = [
    Target(
        "sample-weight-mean",
        "weighted tokens: the denominator is the sum of the weights of those that count",
        ext.cross_entropy,
        lambda d: ((d.labels(ignored=0.3),), {"sample_weight": d.sample_weight()}),
    ),
    Target(
        "sample-weight-none",
        "a factor and a grad_output for each position, negative and zero factors",
        ext.cross_entropy,
        lambda d: ((d.labels(),), {"sample_weight": d.sample_weight(negative=True), "reduction": "none"}),
    ),
    Target(
        "sample-weight-weighted-smoothed",
        "class weights and sample weights share the denominator",
        ext.cross_entropy,
        lambda d: ((d.labels(ignored=0.2), d.weight()), {"sample_weight": d.sample_weight(), "label_smoothing": 0.1}),
    ),
    Target(
        "z-loss-mean",
        "the term that is not weighted by classes, but divided by their weights",
        ext.cross_entropy,
        lambda d: ((d.labels(ignored=0.3), d.weight()), {"z_loss": 0.1}),
    ),
    Target(
        "z-loss-none",
        "and position by position",
        ext.cross_entropy,
        lambda d: ((d.labels(),), {"z_loss": 0.03, "reduction": "none"}),
    ),
    Target(
        "softcap-sum",
        "logits of the order of the cap: bent, and not yet flat",
        ext.cross_entropy,
        lambda d: ((d.labels(),), {"softcap": 3.0, "reduction": "sum"}),
    ),
    Target(
        "logit-scale-mean",
        "a factor that no binary number is",
        ext.cross_entropy,
        lambda d: ((d.labels(),), {"logit_scale": 0.3}),
    ),
    Target(
        "negative-scale-none",
        "a factor that turns the maximum into the minimum",
        ext.cross_entropy,
        lambda d: ((d.labels(),), {"logit_scale": -1.5, "reduction": "none", "label_smoothing": 0.1}),
    ),
    Target(
        "everything-mean",
        "all options at once, with ignored positions",
        ext.cross_entropy,
        lambda d: ((d.labels(ignored=0.3), d.weight()), {"sample_weight": d.sample_weight(), **EVERYTHING}),
    ),
    Target(
        "soft-sample-weight-mean",
        "probabilities: the denominator is the sum of the sample weights alone",
        ext.cross_entropy,
        lambda d: ((d.probabilities(), d.weight()), {"sample_weight": d.sample_weight(), "label_smoothing": 0.1}),
    ),
    Target(
        "soft-z-loss-softcap-none",
        "probabilities of capped logits, whose own gradient is not capped",
        ext.cross_entropy,
        lambda d: ((d.probabilities(),), {"z_loss": 0.1, "softcap": 4.0, "reduction": "none"}),
    ),
    Target(
        "soft-everything-sum",
        "probabilities and all options at once",
        ext.cross_entropy,
        lambda d: (
            (d.probabilities(), d.weight()),
            {"sample_weight": d.sample_weight(negative=True), "reduction": "sum", **EVERYTHING},
        ),
    ),
    Target(
        "one-pair-mean",
        "a label that is not certain",
        ext.sparse_cross_entropy,
        lambda d: (d.pairs(1), {}),
    ),
    Target(
        "pairs-none",
        "three classes for each position, two of them the same, some of no account",
        ext.sparse_cross_entropy,
        lambda d: (d.pairs(3, ignored=0.4, repeated=True), {"reduction": "none"}),
    ),
    Target(
        "pairs-weighted-smoothed-mean",
        "every term of a_c at once; ignored pairs take nothing from the smoothing",
        ext.sparse_cross_entropy,
        lambda d: ((*d.pairs(3, ignored=0.4), d.weight()), {"label_smoothing": 0.1}),
    ),
    Target(
        "many-pairs-everything-sum",
        "more pairs than some logits have classes",
        ext.sparse_cross_entropy,
        lambda d: (
            (*d.pairs(11), d.weight()),
            {"sample_weight": d.sample_weight(negative=True), "reduction": "sum", **EVERYTHING},
        ),
    ),
    Target(
        "statistics-two-means",
        "class weights divide the cross entropy and not the z-loss; -1 for padding, which is the argmax of none",
        ext.cross_entropy_with_stats,
        lambda d: (
            (torch.where(d.labels(ignored=0.3) < 0, -1, d.labels()), 5 * d.weight()),
            {"z_loss": 0.1, "label_smoothing": 0.1, "sample_weight": d.sample_weight(), "ignore_index": -1},
        ),
        statistics=("lse", "entropy"),
    ),
    Target(
        "mixup-weighted-mean",
        "each part has its own denominator, of its labels' class weights",
        ext.mixup_cross_entropy,
        lambda d: (
            (d.labels("a", 0.3), d.labels("b", 0.5), d.lam(d.positions[:1]), d.weight()),
            {"sample_weight": d.sample_weight(), "z_loss": 0.1},
        ),
    ),
    Target(
        "mixup-weighted-everything-mean",
        "all options at once, which takes two passes",
        ext.mixup_cross_entropy,
        lambda d: ((d.labels("a", 0.3), d.labels("b"), 0.3, d.weight()), EVERYTHING),
        passes=2,
    ),
    Target(
        "mixup-mean",
        "one lam for all; some labels ignored, some in one target alone",
        ext.mixup_cross_entropy,
        lambda d: ((d.labels("a", 0.3), d.labels("b", 0.3), 0.3), {}),
    ),
    Target(
        "mixup-sample-sum",
        "one lam for each sample, class weights, smoothing",
        ext.mixup_cross_entropy,
        lambda d: (
            (d.labels("a"), d.labels("b"), d.lam(d.positions[:1]), d.weight()),
            {"reduction": "sum", "label_smoothing": 0.1},
        ),
    ),
    Target(
        "mixup-position-everything-mean",
        "CutMix: one lam for each position, and all options at once",
        ext.mixup_cross_entropy,
        lambda d: (
            (d.labels("a"), d.labels("b"), d.lam(d.positions)),
            {"sample_weight": d.sample_weight(), **EVERYTHING},
        ),
    ),
    Target(
        "divergence-mean",
        "distillation as everyone writes it, gradients to both",
        ext.distillation_loss,
        lambda d: ((d.teacher(),), {"temperature": 2.0}),
    ),
    Target(
        "distilled-cross-entropy-none",
        "a temperature below one; sample weights of either sign",
        ext.distillation_loss,
        lambda d: (
            (d.teacher(),),
            {"temperature": 0.7, "kind": "ce", "reduction": "none", "sample_weight": d.sample_weight(negative=True)},
        ),
    ),
    Target(
        "divergence-and-labels-mean",
        "two temperatures in one pass, ignored positions dropped from both losses",
        ext.distillation_loss,
        lambda d: (
            (d.teacher(), d.labels(ignored=0.3)),
            {"temperature": 3.0, "alpha": 0.3, "sample_weight": d.sample_weight()},
        ),
    ),
    Target(
        "distilled-cross-entropy-and-labels-sum",
        "both losses at temperature 1",
        ext.distillation_loss,
        lambda d: ((d.teacher(), d.labels()), {"alpha": 0.9, "kind": "ce", "reduction": "sum"}),
    ),
    Target(
        "statistics-mean",
        "all outputs, and one backward for a mixture of them",
        ext.cross_entropy_with_stats,
        lambda d: ((d.labels(ignored=0.3),), {}),
        STATISTICS,
    ),
    Target(
        "statistics-everything-sum",
        "options change the loss and the logits; statistics are of the changed logits, without weights",
        ext.cross_entropy_with_stats,
        lambda d: (
            (d.labels(ignored=0.3), d.weight()),
            {"sample_weight": d.sample_weight(negative=True), "reduction": "sum", **EVERYTHING},
        ),
        STATISTICS,
    ),
    Target(
        "entropy-alone",
        "a bonus of a policy: the loss is not differentiated",
        ext.cross_entropy_with_stats,
        lambda d: ((d.labels(ignored=0.2),), {}),
        ("entropy",),
        loss=False,
    ),
    Target(
        "log-probabilities-none",
        "a policy gradient: log p of what was done, beside losses of positions",
        ext.cross_entropy_with_stats,
        lambda d: ((d.labels(),), {"reduction": "none", "z_loss": 0.1}),
        ("target_log_prob",),
    ),
    Target(
        "soft-statistics-none",
        "statistics of probabilities, which have a gradient by them, too",
        ext.cross_entropy_with_stats,
        lambda d: ((d.probabilities(),), {"reduction": "none", "softcap": 6.0}),
        STATISTICS,
    ),
    Target(
        "soft-statistics-weighted-mean",
        "target_log_prob is of the probabilities as they are, before weights and smoothing",
        ext.cross_entropy_with_stats,
        lambda d: ((d.probabilities(), d.weight()), {"label_smoothing": 0.1, "sample_weight": d.sample_weight()}),
        STATISTICS,
        passes=2,
    ),
]

wide, sequence, image = (5, 37), (3, 21, 20), (2, 19, 6, 10)
SHAPES = [
    Case("vector", "no batch dimension", (10,)),
    Case("vector-of-one", "no batch dimension and one class", (1,)),
    Case("vector-step", "a vector with stride 2", (11,), lambda v: place(v, step={0: 2}, offset=1)),
    *[
        Case(f"rows-{c}", reason, (2 if c > 4096 else 5, c))
        for c, reason in {
            1: "one class: all losses and gradients but the z-loss's are 0",
            2: "two classes: fewer than any vector holds",
            3: "odd and smaller than every vector",
            10: "digits",
            19: "one vector and a rest",
            33: "one vector of halves and one left over",
            100: "several vectors",
            1000: "ImageNet",
            4099: "past 4096 elements, with a ragged rest",
            32000: "a language model's vocabulary",
        }.items()
    ],
    Case("many-rows", "a prime number of rows, several pieces of work", (523, 10)),
    Case("no-rows", "a mean over nothing", (0, 19)),
    Case("row-slice", "columns cut from a wider matrix, poison between", wide, lambda v: place(v, margin={1: 3})),
    Case("class-step", "class stride 2", wide, lambda v: place(v, step={1: 2})),
    Case("transposed", "a (C, N) matrix seen as (N, C)", wide, lambda v: place(v, order=(1, 0))),
    Case("misaligned", "no vector is aligned", wide, lambda v: place(v, offset=1)),
    Case("expanded-batch", "the same row for every sample", wide, lambda v: expand(v, 0)),
    Case("expanded-classes", "one logit for all classes", wide, lambda v: expand(v, 1)),
    Case("image", "contiguous pixels: classes are strided", image),
    Case("image-no-width", "images of width 0", (2, 3, 4, 0)),
    Case("image-wide", "many classes, strided, with a ragged inner size", (2, 260, 37)),
    Case("image-tiles", "several tiles of positions", (1, 5, 301)),
    Case("channels-last", "class stride 1", image, lambda v: v.contiguous(memory_format=torch.channels_last)),
    Case("cropped", "rows not adjacent, poison between", image, lambda v: place(v, margin={2: 1, 3: 2})),
    Case("sequence-last", "(B, T, V) seen as (B, V, T)", sequence, lambda v: place(v, order=(0, 2, 1))),
    Case(
        "sequence-shifted",
        "a language model's logits[:, :-1].transpose(1, 2)",
        sequence,
        lambda v: place(v, order=(0, 2, 1), margin={2: 1}),
    ),
    Case(
        "permuted-5d",
        "five dimensions in an order no format has, with steps: nothing collapses",
        (2, 5, 3, 4, 6),
        lambda v: place(v, order=(3, 1, 4, 0, 2), step={4: 2}, margin={2: 1}),
    ),
]


def logits_of(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 3.0, key: object = "logits") -> Tensor:
    return (torch.randn(shape, generator=generator(shape, key), dtype=torch.double) * scale).to(dtype)


MARGINS = [5.0, 14.0, 17.0, 18.0, 30.0, 50.0, 100.0]


def confident(dtype: torch.dtype, classes: int, layout: str = "rows") -> tuple[Tensor, Tensor]:
    """Logits whose label leads by 5 to 100 nats."""
    target = torch.arange(len(MARGINS)) * 31 % classes
    logits = torch.zeros(len(MARGINS), classes, dtype=torch.double)
    logits[torch.arange(len(MARGINS)), target] = torch.tensor(MARGINS, dtype=torch.double)
    if layout == "planes":
        return logits.t().reshape(1, classes, len(MARGINS)).contiguous().to(dtype), target[None]
    return logits.to(dtype), target

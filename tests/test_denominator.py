"""`denominator=`: what a mean divides by instead of what it counts, a number or a scalar on the device. Values and
gradients against the float64 oracle, for every function that has one; and what it is for: a mean over the tokens of
many batches, one batch at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, name_of
from compositions import cross_entropy as composed
from differentiable import alike, close, same
from oracle_targets import Upstream, check_call
from target_cases import EVERYTHING, STATISTICS, Draw, logits_of
from torch import Tensor
from torch.func import grad, jvp, vmap

from cross_entropy_ext import CrossEntropyLoss
from cross_entropy_ext import functional as ext

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)

# Shapes of the logits, and whether their gradient is made in the forward.
SHAPES = {
    "vector": (19,),
    "rows": (37, 50),
    "few-classes": (523, 3),
    "pixels": (2, 5, 6, 10),
    "made-in-the-backward": (132, 128256),  # past 64 MB in float32
}
DENOMINATORS: dict[str, Callable[[], float | Tensor]] = {
    "integer": lambda: 41,
    "number": lambda: 12.7,
    "negative": lambda: -3.0,
    "large": lambda: 1e9,
    "int64": lambda: torch.tensor(41),
    "float32": lambda: torch.tensor(12.7),
    "float64": lambda: torch.tensor(12.7, dtype=torch.double),
    "bfloat16": lambda: torch.tensor(12.7, dtype=torch.bfloat16),
}
# Of each function the arguments beside logits, and options.
FORMS: dict[str, tuple[Callable, Callable[[Draw], tuple[tuple, dict]]]] = {
    "labels": (ext.cross_entropy, lambda d: ((d.labels(ignored=0.3),), {})),
    "weighted": (ext.cross_entropy, lambda d: ((d.labels(ignored=0.3), d.weight()), {"label_smoothing": 0.1})),
    "sample-weight": (ext.cross_entropy, lambda d: ((d.labels(),), {"sample_weight": d.sample_weight(negative=True)})),
    "everything": (
        ext.cross_entropy,
        lambda d: ((d.labels(ignored=0.3), d.weight()), {"sample_weight": d.sample_weight(), **EVERYTHING}),
    ),
    "soft": (ext.cross_entropy, lambda d: ((d.probabilities(),), {})),
    "soft-weighted": (ext.cross_entropy, lambda d: ((d.probabilities(), d.weight()), {"label_smoothing": 0.1})),
    "pairs": (ext.sparse_cross_entropy, lambda d: (d.pairs(3, ignored=0.4), {"z_loss": 0.1})),
    "mixup": (ext.mixup_cross_entropy, lambda d: ((d.labels("a", 0.3), d.labels("b"), 0.3), {})),
    "statistics": (ext.cross_entropy_with_stats, lambda d: ((d.labels(ignored=0.3),), {"z_loss": 0.1})),
}


def arguments_of(
    form: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Callable, tuple, dict[str, object]]:
    function, build = FORMS[form]
    draw = Draw(logits_of(shape, dtype), form)
    arguments, options = build(draw)
    return function, (draw.logits, *arguments), options


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "made-in-the-backward"])
@pytest.mark.parametrize("form", FORMS)
def test_values(form: str, shape: str) -> None:
    """Every function, of every layout's kernels; the denominator multiplies neither weights nor statistics."""
    for dtype, denominator in itertools.product(DTYPES, (DENOMINATORS["number"](), DENOMINATORS["int64"]())):
        function, arguments, options = arguments_of(form, SHAPES[shape], dtype)
        draw = Draw(arguments[0], "upstream")
        statistics = STATISTICS if form == "statistics" else ()
        for upstream in (None, draw.upstream("mean", *statistics)):
            check_call(function, *arguments, upstream=upstream, denominator=denominator, reason=form, **options)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_denominators(denominator: str) -> None:
    """Numbers and tensors of every type."""
    for dtype, form in itertools.product(DTYPES, ("labels", "soft-weighted")):
        function, arguments, options = arguments_of(form, (37, 50), dtype)
        check_call(function, *arguments, denominator=DENOMINATORS[denominator](), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_made_in_the_backward(dtype: torch.dtype) -> None:
    """Large logits are read a second time. The oracle is of a few rows: the others' gradients do not depend on them."""
    shape = SHAPES["made-in-the-backward"]
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype).requires_grad_()
    target = torch.arange(shape[0])
    loss = ext.cross_entropy(x, target, denominator=7.5)
    (found,) = torch.autograd.grad(loss, x, torch.tensor(0.5, dtype=dtype))
    some = slice(3, 6)
    few = x.detach()[some].double().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(few, target[some], reduction="sum") * 0.5 / 7.5, few)
    alike(found[some], expected.to(dtype))
    total = F.cross_entropy(x.detach().double(), target, reduction="sum") / 7.5
    torch.testing.assert_close(loss.detach().double(), total, rtol=torch.finfo(dtype).eps, atol=0)


@every_dtype
@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_the_denominator(form: str, dtype: torch.dtype) -> None:
    function, arguments, options = arguments_of(form, (37, 50), dtype)
    denominator = torch.tensor(12.7, dtype=dtype)
    wanted = ("input", "target", "probs", "denominator")
    found = check_call(function, *arguments, wanted=wanted, denominator=denominator, **options)
    assert found["denominator"].dtype == dtype and found["denominator"] != 0


@pytest.mark.parametrize("shape", [(37, 50), (2, 5, 6, 10)], ids=str)
@every_dtype
def test_in_place(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The gradient takes the logits' storage, and has the same values."""
    _, (logits, target), _ = arguments_of("labels", shape, dtype)
    found = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        x = leaf * 1
        loss = ext.cross_entropy(x, target, denominator=torch.tensor(12.7), inplace=inplace)
        address = x.data_ptr()
        (g,) = torch.autograd.grad(loss, x)
        assert (g.data_ptr() == address) == inplace
        found.append((loss.detach(), g))
    alike(found[1], found[0])


def test_second_backward_and_double() -> None:
    _, (logits, target), _ = arguments_of("labels", (7, 5), torch.float64)
    leaves = [logits.requires_grad_(), torch.tensor(2.5, dtype=torch.double, requires_grad=True)]
    loss = ext.cross_entropy(leaves[0], target, denominator=leaves[1])
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    close(torch.autograd.grad(loss, leaves), first)
    for denominator in leaves[1], leaves[1].detach():
        function = lambda x, d=denominator: ext.cross_entropy(x, target, denominator=d)  # noqa: E731
        assert torch.autograd.gradgradcheck(function, (leaves[0],))
    both = lambda x, d: ext.cross_entropy(x, target, denominator=d)  # noqa: E731
    assert torch.autograd.gradcheck(both, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(both, leaves)


def test_transforms() -> None:
    _, (logits, target), _ = arguments_of("labels", (7, 5), torch.float64)
    d = torch.tensor(2.5, dtype=torch.double)

    def results(function: Callable) -> list[Tensor | tuple]:
        both = lambda x, d: function(x, target, denominator=d)  # noqa: E731
        return [
            grad(both, (0, 1))(logits, d),
            jvp(both, (logits, d), (torch.ones_like(logits).cumsum(1), torch.ones_like(d))),
            vmap(both)(torch.stack([logits, -logits]), torch.stack([d, 2 * d])),
            vmap(both, (None, 0))(logits, torch.stack([d, 2 * d])),
        ]

    close(results(ext.cross_entropy), results(composed))


def test_gradient_accumulation() -> None:
    """Micro-batches of unequal numbers of tokens, each divided by the number in all: the whole batch's mean."""
    torch.manual_seed(0)
    x, target = torch.randn(60, 11, dtype=torch.double, requires_grad=True), torch.randint(11, (60,))
    target[torch.rand(60) < 0.4] = -100
    weight = torch.rand(11).double() + 0.5
    whole = ext.cross_entropy(x, target, weight)
    (expected,) = torch.autograd.grad(whole, x)
    tokens = weight[target[target >= 0]].sum()
    losses = []
    for begin, end in ((0, 7), (7, 8), (8, 41), (41, 60)):
        loss = ext.cross_entropy(x[begin:end], target[begin:end], weight, denominator=tokens)
        loss.backward()
        losses.append(loss.detach())
    close(sum(losses), whole.detach())
    close(x.grad, expected)
    uneven = sum(ext.cross_entropy(x[b:e], target[b:e], weight) for b, e in ((0, 30), (30, 60))) / 2
    assert not torch.isclose(uneven, whole)  # what happens without


def test_what_counts_is_the_default() -> None:
    """Given what a mean counts, the mean; and for one half the type of the sums alone makes it right."""
    for form, dtype in itertools.product(("labels", "weighted", "soft", "everything"), DTYPES):
        function, arguments, options = arguments_of(form, (37, 50), dtype)
        target, options = arguments[1], dict(options)
        options.pop("z_loss", None)  # whose mean is not over class weights
        if form == "soft":
            count = torch.tensor(37)
        else:
            weight = arguments[2].double() if len(arguments) > 2 else torch.ones(50).double()
            s = options.get("sample_weight", torch.ones(37)).double()
            count = (torch.where(target >= 0, weight[target.clamp(min=0)], 0) * s).sum()
        alike(function(*arguments, denominator=count, **options), function(*arguments, **options))
    ones = torch.zeros(70_000, 4, dtype=torch.float16)
    loss = ext.cross_entropy(ones, torch.zeros(70_000, dtype=torch.long), denominator=70_000)
    torch.testing.assert_close(loss, torch.tensor(math.log(4), dtype=torch.float16), rtol=1e-3, atol=0)


@pytest.mark.parametrize("empty", ["nan", "zero"])
def test_zero(empty: str) -> None:
    """Nothing by nothing is what `empty` says; something by nothing is infinite; nothing by something is 0."""
    zero = torch.tensor(0)  # of which the host knows nothing; a number of 0 is an error
    x, none = torch.randn(3, 4, requires_grad=True), torch.full((3,), -100)
    nothing = ext.cross_entropy(x, none, denominator=zero, empty=empty)
    assert nothing.isnan() if empty == "nan" else nothing == 0
    (g,) = torch.autograd.grad(nothing, x)
    same(g, torch.zeros_like(x))
    assert ext.cross_entropy(x, torch.tensor([0, 1, 2]), denominator=zero, empty=empty).isposinf()
    assert ext.cross_entropy(x, none, denominator=4, empty=empty) == 0
    assert ext.cross_entropy(x[:0], none[:0], denominator=torch.tensor(4), empty=empty) == 0


def test_module() -> None:
    """In the call, as it is another for each batch; and numbers of NumPy."""
    _, (logits, target), _ = arguments_of("labels", (37, 50))
    module, weight = CrossEntropyLoss(label_smoothing=0.1, z_loss=0.01), torch.rand(37)
    expected = ext.cross_entropy(
        logits, target, label_smoothing=0.1, z_loss=0.01, sample_weight=weight, denominator=12.5
    )
    for denominator in (12.5, torch.tensor(12.5), np.float32(12.5)):
        same(module(logits, target, sample_weight=weight, denominator=denominator), expected)
    same(module(logits, target), ext.cross_entropy(logits, target, label_smoothing=0.1, z_loss=0.01))


def test_it_changes_the_result_of_every_function() -> None:
    """None forgets to pass it on."""
    for form in FORMS:
        function, arguments, options = arguments_of(form, (37, 50), torch.float64)
        results = [function(*arguments, denominator=d, **options) for d in (1, 2.0, torch.tensor(4.0))]
        losses = [r if isinstance(r, Tensor) else r.loss for r in results]
        close([losses[0] / 2, losses[0] / 4], losses[1:])
        if form == "statistics":
            close(results[0].z_loss / 4, results[2].z_loss)
            same(results[0].lse, results[2].lse)


CALLS = {
    "cross_entropy": lambda **o: ext.cross_entropy(torch.ones(3, 4), torch.zeros(3).long(), **o),
    "soft": lambda **o: ext.cross_entropy(torch.ones(3, 4), torch.ones(3, 4), **o),
    "with_stats": lambda **o: ext.cross_entropy_with_stats(torch.ones(3, 4), torch.zeros(3).long(), **o),
    "sparse": lambda **o: ext.sparse_cross_entropy(torch.ones(3, 4), torch.zeros(3, 2).long(), torch.ones(3, 2), **o),
    "mixup": lambda **o: ext.mixup_cross_entropy(torch.ones(3, 4), *[torch.zeros(3).long()] * 2, 0.5, **o),
    "module": lambda **o: CrossEntropyLoss(reduction=o.pop("reduction", "mean"))(
        torch.ones(3, 4), torch.zeros(3).long(), **o
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_errors(call: str) -> None:
    """The argument is named, and what is wrong with it."""
    for reduction in ("sum", "none"):
        for denominator in (3, torch.tensor(3.0)):
            with pytest.raises(ValueError, match=r"denominator .*'mean'"):
                CALLS[call](denominator=denominator, reduction=reduction)
    for wrong in (torch.ones(1), torch.ones(3), torch.ones(1, 1)):
        with pytest.raises(ValueError, match=r"denominator .* a scalar tensor, of shape \(\), but got"):
            CALLS[call](denominator=wrong)
    with pytest.raises(ValueError, match=r"denominator .*complex"):
        CALLS[call](denominator=torch.tensor(1j))
    with pytest.raises(TypeError, match="denominator"):
        CALLS[call](denominator="3")
    with pytest.raises(ValueError, match=r"denominator .*device"):
        CALLS[call](denominator=torch.ones((), device="meta"))


COMPILED = [(form, "aot_eager") for form in FORMS]
COMPILED += [pytest.param(form, "inductor", marks=pytest.mark.slow) for form in ("labels", "soft-weighted", "pairs")]


@pytest.mark.thin(2)
@pytest.mark.parametrize(("form", "backend"), COMPILED)
def test_compiled(form: str, backend: str) -> None:
    """One graph for whatever the denominator is, be it a number that changes or a tensor."""
    torch._dynamo.reset()
    function, (logits, *arguments), options = arguments_of(form, (9, 7), torch.float64)

    def call(x: Tensor, d: float | Tensor) -> Tensor:
        result = function(x, *arguments, denominator=d, **options)
        return result if isinstance(result, Tensor) else result.loss

    compiled = torch.compile(call, backend=backend, fullgraph=True, dynamic=True)
    for denominators in ((2.5, 3.5, 7.25), (torch.tensor(2.5), torch.tensor(7))):
        for first, denominator in zip((True, False, False), denominators, strict=False):
            integer = isinstance(denominator, Tensor) and not denominator.is_floating_point()
            results = []
            for f in (call, compiled):
                x = logits.clone().requires_grad_()
                with torch._dynamo.config.patch(error_on_recompile=not first and not integer):
                    loss = f(x, denominator)
                results.append((loss.detach(), *torch.autograd.grad(loss * 0.5, x)))
            alike(results[1], results[0])
    torch._dynamo.reset()


def test_compiled_gradient_of_the_denominator() -> None:
    torch._dynamo.reset()
    _, (logits, target), _ = arguments_of("labels", (9, 7), torch.float64)
    function = lambda x, d: ext.cross_entropy(x, target, denominator=d)  # noqa: E731
    found = []
    for f in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        leaves = [logits.clone().requires_grad_(), torch.tensor(2.5, requires_grad=True)]
        found.append(torch.autograd.grad(f(*leaves), leaves))
    close(found[1], found[0])


def test_autocast() -> None:
    _, (logits, target), _ = arguments_of("labels", (37, 50), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ext.cross_entropy(logits, target, denominator=torch.tensor(12.5))
    assert loss.dtype == torch.float32
    alike(loss, ext.cross_entropy(logits, target, denominator=12.5, loss_dtype=torch.float32))


def test_upstream_scales_it() -> None:
    """A loss scaler's factor, and a gradient made again for another."""
    function, arguments, _ = arguments_of("labels", (37, 50), torch.float16)
    check_call(function, *arguments, upstream=Upstream(torch.tensor(1024.0)), denominator=37 * 1024)

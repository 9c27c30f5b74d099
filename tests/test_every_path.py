"""Lines of the README's "where it differs from native", on the ways that lead to a loss.

The ways are the kernels, a `sample_weight` that learns, vmap, grad, forward mode, a tensor subclass, the composite of
ATen operations, torch.compile and DTensors. `cases` has the lines on integer targets, zeros at -inf, ignored positions,
float16 means and confident labels; all outputs and gradients are those of the float64 oracle. Each case runs on each
way, except that

- forward mode leaves out the float16 means, which have too many elements;
- a `sample_weight` that learns leaves out `nll_loss`, which has none;
- torch.compile runs one case of each function and reason, with the backend aot_eager;
- DTensors run `cross_entropy` and `cross_entropy_with_stats`, and of the outputs only their total is compared.

Second derivatives are compared on the kernels and the composite, in float64 and for small float32 cases alone.
Autocast and a `label_smoothing` out of range have tests of their own here, on the ways of `PATHS` (autocast not in
forward mode), and not on the last three. Four lines are not here, so this file says nothing of them on any way: the
gradient's memory format, determinism, CUDA targets that are no class, and logits changed in place between forward and
backward.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from cases import INTEGERS, generator, name_of
from oracle import ROUNDINGS, Exact, assert_as_exact
from oracle_nll import reference as nll_reference
from oracle_targets import Call, Upstream, assert_argmax
from torch import Tensor
from torch.func import grad_and_value, jacfwd, vmap

from cross_entropy_ext import _call
from cross_entropy_ext import functional as ext
from cross_entropy_ext.functional import losses

inf, nan = math.inf, math.nan
ONE = torch.ones(())


@dataclass
class Case:
    id: str
    reason: str
    function: Callable
    arguments: tuple[Tensor, ...]
    options: dict[str, object] = field(default_factory=dict)
    wanted: tuple[str, ...] = ("input",)

    @property
    def named(self) -> dict[str, Tensor]:
        tensors = dict(zip(inspect.signature(self.function).parameters, self.arguments, strict=False))
        return tensors | {name: value for name, value in self.options.items() if isinstance(value, Tensor)}

    @property
    def numbers(self) -> dict[str, object]:
        return {name: value for name, value in self.options.items() if not isinstance(value, Tensor)}

    def outputs(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = self.function(**tensors, **self.numbers)
        return {"loss": outputs} if isinstance(outputs, Tensor) else outputs._asdict()

    def loss(self, tensors: dict[str, Tensor]) -> Tensor:
        return total(self.outputs(tensors))

    def check(self, found: dict[str, Tensor]) -> None:
        """All that was found is as exact as the oracle asks for. Of the outputs, `found` has each or their `total`."""
        stats = self.function is ext.cross_entropy_with_stats
        if self.function is ext.nll_loss:
            options = {"weight": None, "ignore_index": -100, "reduction": "mean"} | self.options
            exact = dict(
                zip(("loss", "input"), nll_reference(*self.arguments, **options, grad_output=ONE), strict=True)
            )
        else:
            upstream = Upstream(*[ONE] * 4) if stats else Upstream(ONE)
            exact = Call.of(self.function, self.arguments, self.options).exact(upstream)
        outputs = {"loss", "lse", "target_log_prob", "entropy", "z_loss", "argmax"} if stats else {"loss"}
        assert found.keys() in (outputs | {*self.wanted}, {"total", *self.wanted})
        parts = [exact[name] for name in SUMMED if name in outputs]
        exact["total"] = Exact(sum(part.value.sum() for part in parts), sum(part.scale.sum() for part in parts))

        logits = self.arguments[0]
        arithmetic = torch.float64 if logits.dtype == torch.float64 else torch.float32
        loss_dtype = self.options.get("loss_dtype") or logits.dtype
        dtypes = {name: arithmetic if name in STATISTICS else loss_dtype for name in (*outputs, "total")}
        dtypes |= {name: tensor.dtype for name, tensor in self.named.items()}
        for name, result in found.items():
            where = f"{name} ({self.reason})"
            if name == "argmax":
                assert_argmax(result, exact[name], ROUNDINGS * torch.finfo(arithmetic).eps, where)
                continue
            assert result.dtype == dtypes[name], f"{name} is {result.dtype}"
            assert_as_exact(result, exact[name], None, arithmetic=arithmetic, name=where)


STATISTICS = ("lse", "target_log_prob", "entropy")
SUMMED = ("loss", *STATISTICS)  # what has a gradient


def total(outputs: dict[str, Tensor]) -> Tensor:
    """A scalar: the loss, and all that has a gradient besides."""
    return sum(outputs[name].sum() for name in SUMMED if name in outputs)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(shape, dtype), dtype=torch.double).to(dtype)


def put(tensor: Tensor, place: object, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


def confident(margins: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """Class 1 is ahead of two others by each of the margins."""
    return torch.tensor([[0.0, m, -1.0] for m in margins], dtype=dtype)


LABELS = torch.tensor([1, 0, 3, -100])
X = normal(4, 5)
Q = normal(4, 5).exp().softmax(1)
MASKED = put(X, (slice(None), 2), -inf)  # no label is 2
MARGINS = [0.5, 5.0, 17.0, 30.0, 60.0]
WEIGHT = torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0])  # none for the class that is masked
POISONED = torch.stack([X[0], X[1], X[2], torch.tensor([nan, inf, -inf, 0.0, nan])])
MANY = normal(70_000, 2, dtype=torch.float16)


def cases() -> Iterator[Case]:
    ce, nll = ext.cross_entropy, ext.nll_loss
    for dtype in INTEGERS:
        ignored = {"ignore_index": 4} if dtype == torch.uint8 else {}
        labels = LABELS.where(LABELS >= 0, ignored.get("ignore_index", -100)).to(dtype)
        yield Case(f"labels of {name_of(dtype)}", "native takes int64 alone", ce, (X, labels), ignored)
        yield Case(f"nll, labels of {name_of(dtype)}", "native takes int64 alone", nll, (X, labels), ignored)
    yield Case("labels of int32, pixels", "native takes int64 alone", ce, (normal(2, 3, 4), torch.ones(2, 4).int()))

    why = "0 * inf is NaN, also as what `where` leaves out of a gradient"
    none = put(Q, (slice(None), 2), 0)
    yield Case("probability 0 at -inf", why, ce, (MASKED, none))
    yield Case("probability 0 at -inf, each", why, ce, (MASKED, none), {"reduction": "none"})
    yield Case("probability 0 at -inf, pixels", why, ce, (MASKED.T[None], none.T[None]), {"reduction": "sum"})
    yield Case("pair of probability 0 at -inf", why, ext.sparse_cross_entropy,
               (MASKED, torch.tensor([[1, 2], [2, 0], [3, 3], [-100, 0]]),
                torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.1, 0.7], [0.5, 0.25]])))  # fmt: skip
    smoothed = {"weight": WEIGHT, "label_smoothing": 0.1}
    yield Case("class weight 0 at -inf", why, ce, (MASKED, LABELS), smoothed)
    yield Case("class weight 0 at -inf, each", why, ce, (MASKED, LABELS), smoothed | {"reduction": "none"})
    yield Case("class weight 0 at -inf, its label", why, ce, (MASKED, LABELS.clamp(min=2)), smoothed)
    yield Case("class weight 0 at -inf, probabilities", why, ce, (MASKED, Q), smoothed)
    yield Case("nll, class weight 0 at -inf", why, nll, (MASKED, LABELS.clamp(min=2)), {"weight": WEIGHT})
    yield Case("a mask, and statistics", why, ext.cross_entropy_with_stats, (MASKED, LABELS), {"reduction": "none"})
    yield Case("a mask, and statistics of every term", why, ext.cross_entropy_with_stats, (MASKED, LABELS),
               smoothed | {"z_loss": 0.1, "softcap": 5.0, "logit_scale": 0.7,
                           "sample_weight": torch.tensor([1.0, 0.5, 2.0, 0.5])})  # fmt: skip
    yield Case("a mask, and statistics of probabilities", why, ext.cross_entropy_with_stats, (MASKED, none), smoothed)
    yield Case("a mask in student and teacher", "inf - inf", ext.distillation_loss, (MASKED, MASKED + X),
               {"temperature": 2.0}, wanted=("student_logits", "teacher_logits"))  # fmt: skip

    why = "an ignored position is not used"
    yield Case("ignored NaN", why, ce, (POISONED, LABELS))
    yield Case("ignored NaN, smoothed", why, ce, (POISONED, LABELS), smoothed | {"reduction": "none"})
    yield Case("ignored NaN, every term", why, ce, (POISONED, LABELS),
               {"z_loss": 0.1, "softcap": 5.0, "sample_weight": torch.tensor([1.0, 0.5, 2.0, nan])})  # fmt: skip
    yield Case("ignored NaN, pixels", why, ce, (POISONED.T[None], LABELS[None]))
    yield Case("ignored NaN, nll", why, nll, (POISONED, LABELS))
    yield Case("ignored NaN, statistics", why, ext.cross_entropy_with_stats, (POISONED, LABELS), {"z_loss": 0.1})
    yield Case("all ignored", "0 / 0 may be 0", ce, (X, torch.full((4,), -100)), {"empty": "zero"})

    why = "a sum in float16 is inf, and the gradient of its mean 0"
    yield Case("a mean of many in float16", why, ce, (MANY, torch.zeros(len(MANY)).long()))
    yield Case("a mean of many in float16, nll", why, nll, (MANY - 9, torch.zeros(len(MANY)).long()))

    why = "1 - p is 0 from a margin of 17 on"
    ones = torch.ones(len(MARGINS)).long()
    yield Case("confident labels", why, ce, (confident(MARGINS), ones), {"reduction": "none"})
    yield Case("confident labels, mean", why, ce, (confident(MARGINS[2:]), ones[2:]))
    yield Case("confident labels, weighted", why, ce, (confident(MARGINS), ones),
               {"weight": WEIGHT[:3] + 1, "z_loss": 0.01, "reduction": "none"})  # fmt: skip
    yield Case("confident labels, half", why, ce, (confident(MARGINS, torch.bfloat16), ones),
               {"reduction": "none", "loss_dtype": torch.float32})  # fmt: skip
    yield Case("a confident pair", why, ext.sparse_cross_entropy, (confident(MARGINS), ones[:, None], torch.ones(5, 1)),
               {"reduction": "none"})  # fmt: skip
    yield Case("labels far behind", "p - 1 is -1", ce, (-confident(MARGINS), ones), {"reduction": "none"})


CASES = list(cases())
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def leaves_of(case: Case) -> dict[str, Tensor]:
    return {name: t.detach().clone().requires_grad_(name in case.wanted) for name, t in case.named.items()}


def gradients(case: Case, outputs: dict[str, Tensor] | Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs, or their total if that is what is given, and the gradients of the total."""
    outputs = {"total": outputs} if isinstance(outputs, Tensor) else outputs
    of = outputs["total"] if "total" in outputs else total(outputs)
    found = torch.autograd.grad(of, [leaves[name] for name in case.wanted])
    return {name: output.detach() for name, output in outputs.items()} | dict(zip(case.wanted, found, strict=True))


def by_autograd(call: Callable[[Case, dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Case], dict[str, Tensor]]:
    def path(case: Case) -> dict[str, Tensor]:
        leaves = leaves_of(case)
        return gradients(case, call(case, leaves), leaves)

    return path


def in_a_batch(case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    outputs = vmap(case.outputs)({name: t.expand(2, *t.shape) for name, t in leaves.items()})
    return {name: output[0] for name, output in outputs.items()}


class Tagged(Tensor):
    """A subclass that only has a name."""


def tagged(case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    outputs = case.outputs({name: t.as_subclass(Tagged) for name, t in leaves.items()})
    assert {type(output) for output in outputs.values()} == {Tagged}
    return {name: output.as_subclass(Tensor) for name, output in outputs.items()}


def with_weights_that_learn(case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """A `sample_weight` that requires a gradient has no kernel. Ones change nothing."""
    if case.function is ext.nll_loss:
        pytest.skip("it has no sample_weight")
    logits = case.arguments[0]
    ones = torch.ones(logits[:, 0].shape, dtype=torch.float32, requires_grad=True)
    return case.outputs({"sample_weight": ones} | {n: t.clone().requires_grad_() if n == "sample_weight" else t
                                                   for n, t in leaves.items()})  # fmt: skip


def total_and_outputs(case: Case, leaves: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    outputs = case.outputs(case.named | leaves)
    return total(outputs), outputs


def transformed(case: Case) -> dict[str, Tensor]:
    wanted = {name: case.named[name] for name in case.wanted}
    found, (_, outputs) = grad_and_value(partial(total_and_outputs, case), has_aux=True)(wanted)
    return outputs | found


def forward_mode(case: Case) -> dict[str, Tensor]:
    wanted = {name: case.named[name] for name in case.wanted}
    if wanted[case.wanted[0]].numel() > 100:
        pytest.skip("as many tangents as elements")
    found, outputs = jacfwd(partial(total_and_outputs, case), has_aux=True)(wanted)
    return outputs | {name: gradient.to(wanted[name].dtype) for name, gradient in found.items()}


PATHS = {
    "kernels": by_autograd(Case.outputs),
    "weights that learn": by_autograd(with_weights_that_learn),
    "vmap": by_autograd(in_a_batch),
    "grad": transformed,
    "jvp": forward_mode,
    "subclass": by_autograd(tagged),
}


@every_case
@pytest.mark.parametrize("path", PATHS)
def test_every_path(path: str, case: Case) -> None:
    case.check(PATHS[path](case))


@every_case
def test_composite(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is one that the kernels are asked for."""
    for module in (_call, losses):
        monkeypatch.setattr(module, "PLAIN", frozenset())
    case.check(by_autograd(Case.outputs)(case))


def test_compiled() -> None:
    """A case of each kind, all in one graph."""
    kinds = list({(case.function, case.reason): case for case in CASES}.values())
    leaves = [leaves_of(case) for case in kinds]
    torch.compiler.reset()
    compiled = torch.compile(
        lambda all_leaves: [case.outputs(t) for case, t in zip(kinds, all_leaves, strict=True)],
        backend="aot_eager",
        fullgraph=True,
    )
    outputs = compiled(leaves)
    wanted = [t for tensors in leaves for t in tensors.values() if t.requires_grad]
    # In one backward, of which there is one graph, too.
    found = iter(torch.autograd.grad([total(of_case) for of_case in outputs], wanted))
    for case, of_case in zip(kinds, outputs, strict=True):
        of_case = {name: output.detach() for name, output in of_case.items()}
        case.check(of_case | {name: next(found) for name in case.named if name in case.wanted})


def test_dtensor() -> None:
    """Replicated, and sharded along positions and classes, over a mesh of one process."""
    pytest.importorskip("torch.distributed.tensor")
    import test_transforms
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = test_transforms.one_rank_mesh.__wrapped__()
    try:
        device_mesh = next(mesh)
        for case in CASES:
            if case.function not in (ext.cross_entropy, ext.cross_entropy_with_stats):
                continue
            for placement in (Replicate(), Shard(0), Shard(1)):
                leaves = leaves_of(case)
                leaves["input"] = distribute_tensor(case.named["input"], device_mesh, [placement]).requires_grad_()
                found = gradients(case, case.loss(leaves), leaves)
                case.check({name: tensor.full_tensor() for name, tensor in found.items()})
    finally:
        next(mesh, None)


@pytest.mark.parametrize("path", [path for path in PATHS if path != "jvp"])
def test_autocast(path: str) -> None:
    """Half logits are read as they are; the loss is float32."""
    for function in (ext.cross_entropy, ext.nll_loss):
        if path == "weights that learn" and function is ext.nll_loss:
            continue
        for x, labels in (
            (normal(6, 5, dtype=torch.bfloat16), torch.arange(6) % 5),
            (MANY, torch.zeros(len(MANY)).long()),
        ):
            case = Case("autocast", "a loss in bfloat16 has 8 bits", function, (x, labels))
            with torch.autocast("cpu", torch.bfloat16):
                found = PATHS[path](case)
            assert found["loss"].dtype == torch.float32
            exact = torch.nn.functional.nll_loss if function is ext.nll_loss else torch.nn.functional.cross_entropy
            torch.testing.assert_close(found["loss"].double(), exact(x.double(), labels), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("smoothing", [-0.1, nan, 1.1])
def test_smoothing_out_of_range(smoothing: float, path: str) -> None:
    for target in (LABELS, Q):
        case = Case("smoothing", "taken for 0", ext.cross_entropy, (X, target), {"label_smoothing": smoothing})
        with pytest.raises(RuntimeError, match=r"label_smoothing must be between 0\.0 and 1\.0"):
            PATHS[path](case)


SECOND = [case for case in CASES if case.arguments[0].numel() <= 20 and case.arguments[0].dtype == torch.float32]


@pytest.mark.parametrize("case", SECOND, ids=lambda case: case.id)
def test_second_derivatives(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of logits that are finite, but so low that their exponentials are 0 as well."""
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in case.named.items()}
    tensors = {name: t.nan_to_num(0) if name == "sample_weight" else t for name, t in tensors.items()}

    def seconds(tensors: dict[str, Tensor]) -> list[Tensor]:
        leaves = {name: t.clone().requires_grad_(name in case.wanted) for name, t in tensors.items()}
        inputs = [leaves[name] for name in case.wanted]
        firsts = torch.autograd.grad(case.loss(leaves), inputs, create_graph=True)
        if not any(first.requires_grad for first in firsts):
            return [torch.zeros_like(tensor) for tensor in inputs]
        along = [torch.linspace(-1, 2, first.numel(), dtype=torch.double).view(first.shape) for first in firsts]
        return list(torch.autograd.grad(firsts, inputs, along))

    finite = {n: t.nan_to_num(0, 0, -1e3) if t.is_floating_point() else t for n, t in tensors.items()}
    expected, found = seconds(finite), [seconds(tensors)]
    for module in (_call, losses):
        monkeypatch.setattr(module, "PLAIN", frozenset())
    found.append(seconds(tensors))
    for ours in found:
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)

"""What autograd, the transforms and the compilers may ask of every target and every output: derivatives of any order
and direction, one backward for any mixture of statistics, one graph, and nothing kept of the logits' size but what was
given."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import compositions
import pytest
import torch
import torch._functorch.config
import torch._inductor.config
import torch.autograd.forward_ad as fwad
from differentiable import close, labels, normal, same, soft, transposed, weights
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cross_entropy_ext import CrossEntropyLoss, DistillationLoss
from cross_entropy_ext import functional as ext

STATISTICS = ("lse", "target_log_prob", "entropy")
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.05, "softcap": 3.0, "logit_scale": 0.7}


@dataclass(frozen=True)
class Problem:
    """A call with float64 arguments, and which of them are differentiated."""

    name: str
    reason: str
    function: str
    build: Callable[[], dict[str, object]]
    wanted: tuple[str, ...] = ("input",)

    def arguments(self, seed: int = 0) -> dict[str, object]:
        torch.manual_seed(seed)
        return self.build()

    def of(
        self, module: object, arguments: dict[str, object]
    ) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
        """(what is differentiable of the outputs, as a function of what is differentiated; that)"""
        function = getattr(module, self.function)

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            result = function(**arguments | dict(zip(self.wanted, tensors, strict=True)))
            return (result,) if isinstance(result, Tensor) else result[:4]

        return call, [arguments[name].detach() for name in self.wanted]


def index(size: tuple[int, ...], ignored: bool = False, **more: object) -> dict[str, object]:
    positions = (size[0], *size[2:]) if len(size) > 1 else ()
    return {
        "input": normal(*size),
        "target": labels(size[-1] if len(size) == 1 else size[1], *positions, ignored=ignored),
    } | more


def sparse(size: tuple[int, ...], k: int, ignored: bool = False, **more: object) -> dict[str, object]:
    shape = (size[0], k, *size[2:]) if len(size) > 1 else (k,)
    indices = labels(size[1] if len(size) > 1 else size[0], *shape, ignored=ignored)
    if k > 1:
        indices.select(1 if len(size) > 1 else 0, 1).copy_(indices.select(1 if len(size) > 1 else 0, 0))
    return {"input": normal(*size), "indices": indices, "probs": soft(*shape)} | more


def mixed(*size: int, **more: object) -> dict[str, object]:
    positions = (size[0], *size[2:])
    return {
        "input": normal(*size),
        "target_a": labels(size[1], *positions, ignored=True),
        "target_b": labels(size[1], *positions),
    } | more


def teacher(*size: int, **more: object) -> dict[str, object]:
    return {"student_logits": normal(*size), "teacher_logits": normal(*size)} | more


BOTH = ("student_logits", "teacher_logits")
PROBLEMS = [
    Problem(
        "sample_weight",
        "the mean divides by the weights of those that count",
        "cross_entropy",
        lambda: index((5, 4), ignored=True, sample_weight=normal(5), weight=weights(4)),
    ),
    Problem(
        "sample_weight_gradient",
        "which is in the denominator, too",
        "cross_entropy",
        lambda: index((5, 4), ignored=True, sample_weight=weights(5), weight=weights(4), label_smoothing=0.1),
        ("input", "sample_weight"),
    ),
    Problem("z_loss", "of the logits alone", "cross_entropy", lambda: index((4, 5), ignored=True, z_loss=0.1)),
    Problem(
        "softcap_none",
        "a bend, whose second derivative counts in the second derivative",
        "cross_entropy",
        lambda: index((4, 5), softcap=2.0, reduction="none"),
    ),
    Problem(
        "scale_sum",
        "twice in the second derivative",
        "cross_entropy",
        lambda: index((4, 5), logit_scale=-0.6, label_smoothing=0.2, reduction="sum"),
    ),
    Problem("vector", "no batch", "cross_entropy", lambda: index((5,), z_loss=0.1, sample_weight=weights(1)[0])),
    Problem(
        "everything",
        "pixels, all options",
        "cross_entropy",
        lambda: index(
            (2, 3, 2, 3), ignored=True, weight=weights(3), sample_weight=weights(12).view(2, 2, 3), **EVERYTHING
        ),
    ),
    Problem(
        "soft",
        "probabilities with sample weights, which are the denominator",
        "cross_entropy",
        lambda: {"input": normal(4, 5), "target": soft(4, 5), "sample_weight": weights(4)},
        ("input", "target"),
    ),
    Problem(
        "soft_everything",
        "gradients to all there is, in another layout than the logits'",
        "cross_entropy",
        lambda: {
            "input": transposed(2, 3, 4),
            "target": soft(2, 4, 3),
            "weight": weights(4),
            "sample_weight": normal(2, 3),
            "reduction": "none",
            **EVERYTHING,
        },
        ("input", "target", "weight"),
    ),
    Problem(
        "pairs",
        "a class twice, and ignored ones",
        "sparse_cross_entropy",
        lambda: sparse((5, 4), 3, ignored=True),
        ("input", "probs"),
    ),
    Problem(
        "pairs_vector",
        "k pairs without a batch",
        "sparse_cross_entropy",
        lambda: sparse((5,), 2, reduction="none"),
        ("input", "probs"),
    ),
    Problem(
        "pairs_everything",
        "pixels, more pairs than classes",
        "sparse_cross_entropy",
        lambda: sparse(
            (2, 3, 2, 2), 4, weight=weights(3), sample_weight=normal(2, 2, 2), reduction="none", **EVERYTHING
        ),
        ("input", "probs"),
    ),
    Problem(
        "pairs_all_gradients",
        "the pairs' probabilities and the sample weights at once",
        "sparse_cross_entropy",
        lambda: sparse((4, 5), 2, sample_weight=weights(4), z_loss=0.1),
        ("input", "probs", "sample_weight"),
    ),
    Problem("mixup", "one lam", "mixup_cross_entropy", lambda: mixed(4, 5, lam=0.3, label_smoothing=0.1)),
    Problem(
        "mixup_lam",
        "a lam for each sample that is learnt",
        "mixup_cross_entropy",
        lambda: mixed(3, 4, 2, lam=torch.rand(3, dtype=torch.float64), weight=weights(4)),
        ("input", "lam"),
    ),
    Problem("divergence", "to both", "distillation_loss", lambda: teacher(4, 5, temperature=2.0), BOTH),
    Problem(
        "divergence_student",
        "a teacher that does not learn",
        "distillation_loss",
        lambda: teacher(4, 5, temperature=0.5, reduction="sum"),
        BOTH[:1],
    ),
    Problem(
        "divergence_teacher",
        "a student that does not learn",
        "distillation_loss",
        lambda: teacher(4, 5, reduction="none"),
        BOTH[1:],
    ),
    Problem(
        "divergence_labels",
        "two temperatures, ignored positions, sample weights",
        "distillation_loss",
        lambda: teacher(5, 4, target=labels(4, 5, ignored=True), temperature=3.0, alpha=0.3, sample_weight=weights(5)),
        BOTH,
    ),
    Problem(
        "distilled_pixels",
        "the cross entropy, in two layouts",
        "distillation_loss",
        lambda: {
            "student_logits": transposed(2, 3, 4),
            "teacher_logits": normal(2, 4, 3),
            "target": labels(4, 2, 3),
            "kind": "ce",
            "alpha": 0.6,
            "reduction": "none",
        },
        BOTH,
    ),
    Problem(
        "distilled_all_gradients",
        "and to the sample weights",
        "distillation_loss",
        lambda: teacher(4, 5, sample_weight=weights(4), kind="ce", temperature=2.0),
        (*BOTH, "sample_weight"),
    ),
    Problem("statistics", "all of them and a mean", "cross_entropy_with_stats", lambda: index((5, 4), ignored=True)),
    Problem(
        "statistics_everything",
        "of pixels, with all options",
        "cross_entropy_with_stats",
        lambda: index((2, 3, 2, 2), ignored=True, weight=weights(3), sample_weight=normal(2, 2, 2), **EVERYTHING),
    ),
    Problem(
        "statistics_vector",
        "each a number",
        "cross_entropy_with_stats",
        lambda: index((5,), reduction="none", z_loss=0.1),
    ),
    Problem(
        "soft_statistics",
        "of probabilities",
        "cross_entropy_with_stats",
        lambda: {"input": normal(4, 5), "target": soft(4, 5), "reduction": "sum"},
        ("input", "target"),
    ),
    Problem(
        "soft_statistics_everything",
        "whose weights and smoothing are the loss's alone",
        "cross_entropy_with_stats",
        lambda: {"input": normal(4, 5), "target": soft(4, 5), "weight": weights(5), **EVERYTHING},
        ("input", "target"),
    ),
]

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)


def some(*names: str):
    table = {p.name: p for p in PROBLEMS}
    return pytest.mark.parametrize("problem", [table[name] for name in names], ids=lambda p: p.name)


few = some("everything", "pairs", "mixup", "divergence_labels", "statistics")


def results(
    call: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor], seed: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of a mixture of them, of fresh leaves that keep the strides."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = call(*leaves)
    torch.manual_seed(seed)
    upstream = [torch.randn_like(t) for t in outputs]
    return [t.detach() for t in outputs], list(torch.autograd.grad(outputs, leaves, upstream))


def both(problem: Problem, function: Callable) -> None:
    """function(call, tensors) of ours must equal function of the composition."""
    arguments = problem.arguments()
    close(*(function(*problem.of(module, arguments)) for module in (ext, compositions)))


# -- derivatives ---------------------------------------------------------------------------------------------


@every_problem
def test_gradcheck_of_every_target(problem: Problem) -> None:
    call, tensors = problem.of(ext, problem.arguments())
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(
        call, leaves, check_batched_grad=True, check_undefined_grad=True, check_forward_ad=True
    )


@pytest.mark.thin(2)
@every_problem
def test_gradgradcheck_of_every_target(problem: Problem) -> None:
    call, tensors = problem.of(ext, problem.arguments())
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradgradcheck(call, leaves, check_batched_grad=True, check_fwd_over_rev=True)


@every_problem
def test_values_and_gradients_equal_the_composition(problem: Problem) -> None:
    both(problem, results)


@every_problem
def test_gradients_keep_the_layout(problem: Problem) -> None:
    call, tensors = problem.of(ext, problem.arguments())
    for tensor, gradient in zip(tensors, results(call, tensors)[1], strict=True):
        assert gradient.stride() == torch.empty_like(tensor).stride()


def test_every_mixture_of_statistics() -> None:
    """Each alone, and all ways to use several: the sum of their gradients, from one pass over the logits."""

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    for arguments in (
        index((5, 4), ignored=True, z_loss=0.1),
        index((5, 4), reduction="none", softcap=2.0, sample_weight=normal(5)),
        {"input": normal(4, 5), "target": soft(4, 5)},
        index((2, 3, 4)),
    ):
        for count in range(1, 5):
            for used in itertools.combinations(("loss", *STATISTICS), count):
                found = []
                for module in (ext, compositions):
                    x = arguments["input"].detach().requires_grad_()
                    stats = module.cross_entropy_with_stats(**{**arguments, "input": x})
                    torch.manual_seed(2)
                    total = sum((torch.randn_like(t := getattr(stats, name)) * t).sum() for name in used)
                    with Watch() as watch:
                        found.append(torch.autograd.grad(total, x)[0])
                    if module is ext:
                        backwards = [op for op in watch.seen if "cross_entropy_ext" in op]
                        assert len(backwards) == 1, backwards
                close(*found)


@few
def test_third_derivatives(problem: Problem) -> None:
    def third(call: Callable, tensors: list[Tensor]) -> list[Tensor]:
        x = tensors[0].detach().requires_grad_()
        y = sum((t * t).sum() for t in call(x, *tensors[1:]))
        for power in (2, 3, 1):  # functions of the derivative whose own derivatives do not vanish
            (y,) = torch.autograd.grad(y, x, create_graph=True)
            y = (y**power).sum() if y.dim() else y
        return torch.autograd.grad(y, x)[0]

    arguments = problem.arguments()
    close(*(third(*problem.of(module, arguments)) for module in (ext, compositions)), tolerance=1e-10)


@every_problem
def test_a_retained_graph(problem: Problem) -> None:
    """Several walks through one graph, each with upstream gradients of its own, and a double backward between them."""
    arguments = problem.arguments()
    found = []
    for module in (ext, compositions):
        call, tensors = problem.of(module, arguments)
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs, gradients = call(*leaves), []
        for seed, create_graph in ((1, False), (2, True), (1, False), (3, False)):
            torch.manual_seed(seed)
            upstream = [torch.randn_like(t) for t in outputs]
            gradients.append(
                torch.autograd.grad(outputs, leaves, upstream, retain_graph=True, create_graph=create_graph)
            )
        twice = torch.autograd.grad(sum(g.square().sum() for g in gradients[1]), leaves)
        found.append([[g.detach() for g in walk] for walk in gradients] + [list(twice)])
    close(*found)
    close(found[0][0], found[0][2])


def test_targets_modified_between_forward_and_backward() -> None:
    """Whatever the backward reads again must not have changed since the forward."""
    cases = [
        (PROBLEMS[0], "sample_weight"),
        (next(p for p in PROBLEMS if p.name == "pairs"), "indices"),
        (next(p for p in PROBLEMS if p.name == "pairs"), "probs"),
        (next(p for p in PROBLEMS if p.name == "divergence"), "teacher_logits"),
        (next(p for p in PROBLEMS if p.name == "divergence_labels"), "target"),
        (next(p for p in PROBLEMS if p.name == "statistics"), "input"),
    ]
    for problem, changed in cases:
        arguments = problem.arguments()
        x = arguments[problem.wanted[0]].requires_grad_() * 1
        arguments[problem.wanted[0]] = x
        result = getattr(ext, problem.function)(**arguments)
        loss = result if isinstance(result, Tensor) else result.loss
        with torch.no_grad():
            arguments[changed].mul_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()


# -- modes ---------------------------------------------------------------------------------------------------


@every_problem
def test_modes_without_a_graph(problem: Problem) -> None:
    """The same bits in every grad mode, a graph in none but the first."""
    call, tensors = problem.of(ext, problem.arguments())
    leaves = [t.requires_grad_() for t in tensors]
    recorded = call(*leaves)
    assert all(t.requires_grad for t in recorded)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            outputs = call(*leaves)
        assert not any(t.requires_grad or t.grad_fn is not None for t in outputs)
        close([t.clone() for t in outputs], [t.detach() for t in recorded])
    assert not any(t.requires_grad for t in call(*(t.detach() for t in leaves)))


@every_problem
def test_deterministic_algorithms(problem: Problem) -> None:
    call, tensors = problem.of(ext, problem.arguments())
    plain = results(call, tensors)
    torch.use_deterministic_algorithms(True)
    try:
        same(results(call, tensors), plain)
    finally:
        torch.use_deterministic_algorithms(False)


def arguments_in(dtype: torch.dtype, arguments: dict[str, object]) -> dict[str, object]:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


@every_problem
def test_autocast_of_every_target(problem: Problem) -> None:
    """Half logits, a float32 loss: as exact as float32, from logits that are read as they are."""
    half = arguments_in(torch.bfloat16, problem.arguments())
    wide = arguments_in(torch.float64, half)
    found = []
    for module, arguments in ((ext, half), (compositions, wide)):
        call, tensors = problem.of(module, arguments)
        leaves = [t.detach().requires_grad_() for t in tensors]
        with torch.autocast("cpu", torch.bfloat16, enabled=module is ext):
            outputs = call(*leaves)
        if module is ext:
            assert all(t.dtype == torch.float32 for t in outputs)
        gradients = torch.autograd.grad([t.sum() for t in outputs], leaves)
        if module is ext:
            assert all(g.dtype == torch.bfloat16 for g in gradients)
        found.append((outputs, gradients))
    for ours, exact in zip(*found, strict=True):
        for one, other in zip(ours, exact, strict=True):
            eps = torch.finfo(one.dtype).eps
            torch.testing.assert_close(one.double(), other, rtol=8 * eps, atol=8 * eps)


# -- memory --------------------------------------------------------------------------------------------------


def saved_by(function: Callable[[], object]) -> list[Tensor]:
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()
    del kept
    return saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_tensors_of_every_target(reduction: str, dtype: torch.dtype) -> None:
    """Of the logits' size only what was given; besides that a few numbers for each position and pair."""
    n, c, k = 16, 1024, 3
    torch.manual_seed(0)
    x, z = torch.randn(n, c).to(dtype).requires_grad_(), torch.randn(n, c).to(dtype).requires_grad_()
    q, w, s = torch.randn(n, c).softmax(1).to(dtype), torch.rand(c).to(dtype), torch.rand(n).to(dtype)
    y, pairs, probs = labels(c, n), labels(c, n, k), torch.rand(n, k).to(dtype)
    calls = [
        lambda **o: ext.cross_entropy(x, y, sample_weight=s, **EVERYTHING, **o),
        lambda **o: ext.cross_entropy(x, y, w, z_loss=0.1, **o),
        lambda **o: ext.cross_entropy(x, q, sample_weight=s, softcap=5.0, **o),
        lambda **o: ext.sparse_cross_entropy(x, pairs, probs.requires_grad_(), z_loss=0.1, **o),
        lambda **o: ext.mixup_cross_entropy(x, y, y.flip(0), 0.3, **o),
        lambda **o: ext.distillation_loss(x, z.detach(), temperature=2.0, **o),
        lambda **o: ext.distillation_loss(x, z, y, temperature=2.0, alpha=0.5, **o),
        lambda **o: ext.cross_entropy_with_stats(x, y, **o),
        lambda **o: ext.cross_entropy_with_stats(x, q, softcap=5.0, **o),
    ]
    given = {t.data_ptr() for t in (x, z, q, w, s, y, pairs, probs)}
    for number, call in enumerate(calls):
        own = [t for t in saved_by(lambda call=call: call(reduction=reduction)) if t.data_ptr() not in given]
        large = [tuple(t.shape) for t in own if t.numel() > c]
        assert not large, f"call {number} keeps {large}"
        weights_of_a_mean = c * (number == 1 and reduction == "mean")  # with a z-loss besides, class weights are scaled
        assert sum(t.numel() for t in own) <= 16 * n + 8 * n * k + weights_of_a_mean, f"call {number}"


@some("everything", "pairs_everything", "divergence_labels", "statistics", "soft_statistics")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_targets(problem: Problem, use_reentrant: bool) -> None:
    call, tensors = problem.of(ext, problem.arguments())
    found = []
    for wrapped in (False, True):
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs = checkpoint(call, *leaves, use_reentrant=use_reentrant) if wrapped else call(*leaves)
        sum(t.sum() for t in outputs).backward()
        found.append([t.grad for t in leaves])
    close(*found)


# -- torch.func ----------------------------------------------------------------------------------------------


def total(call: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """A function of all outputs with one value, in which each counts differently."""

    def function(*tensors: Tensor) -> Tensor:
        return sum((t * torch.linspace(0.5, 2.0, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in call(*tensors))

    return function


@every_problem
def test_func_grad_of_every_target(problem: Problem) -> None:
    both(problem, lambda f, tensors: grad(total(f), argnums=tuple(range(len(tensors))))(*tensors))


@every_problem
def test_func_products_of_every_target(problem: Problem) -> None:
    """jvp and vjp, through all that is differentiable."""
    both(problem, lambda f, tensors: jvp(f, tuple(tensors), tuple(t.cos() for t in tensors)))
    both(problem, lambda f, tensors: vjp(total(f), *tensors)[1](torch.tensor(0.7, dtype=torch.float64)))


@every_problem
def test_func_hessian_of_every_target(problem: Problem) -> None:
    """Forward over reverse; for the first ones, reverse over reverse and over forward, too."""
    both(problem, lambda f, tensors: hessian(lambda x: total(f)(x, *tensors[1:]))(tensors[0]))
    if problem.name in ("everything", "pairs", "divergence", "statistics"):
        both(problem, lambda f, tensors: jacrev(jacrev(lambda x: total(f)(x, *tensors[1:])))(tensors[0]))
        both(problem, lambda f, tensors: jacrev(jacfwd(lambda x: total(f)(x, *tensors[1:])))(tensors[0]))


@every_problem
def test_vmap_of_every_target(problem: Problem) -> None:
    """All tensors batched: a loop's values, and its gradients for each example; only the first batched; in chunks."""
    batch = [problem.arguments(seed) for seed in range(3)]
    names = [name for name, value in batch[0].items() if isinstance(value, Tensor)]
    rest = {name: value for name, value in batch[0].items() if name not in names}
    stacked = [torch.stack([arguments[name] for arguments in batch]) for name in names]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = getattr(ext, problem.function)(**dict(zip(names, tensors, strict=True)), **rest)
        return (result,) if isinstance(result, Tensor) else result[:4]

    def loop(function: Callable) -> list[Tensor]:
        return [torch.stack(parts) for parts in zip(*(function(*(b[n] for n in names)) for b in batch), strict=True)]

    close(list(vmap(call)(*stacked)), loop(call))
    close(list(vmap(call, chunk_size=2)(*stacked)), loop(call))
    first = names.index(problem.wanted[0])
    gradient = grad(total(call), argnums=(first,))
    close(list(vmap(gradient)(*stacked)), loop(gradient))
    dims = tuple(0 if i == first else None for i in range(len(names)))
    alone = [t if i == first else t[0] for i, t in enumerate(stacked)]
    expected = [call(*(t[i] if d == 0 else t for t, d in zip(alone, dims, strict=True))) for i in range(3)]
    close(list(vmap(call, dims)(*alone)), [torch.stack(parts) for parts in zip(*expected, strict=True)])


@every_problem
def test_forward_ad_of_every_target(problem: Problem) -> None:
    """Dual tensors everywhere, and a dual backward of a graph that was recorded on them."""

    def duals(call: Callable, tensors: list[Tensor]) -> list[Tensor]:
        with fwad.dual_level():
            leaves = [fwad.make_dual(t.detach().requires_grad_(), t.cos()) for t in tensors]
            outputs = call(*leaves)
            gradients = torch.autograd.grad(total(lambda: outputs)(), leaves, create_graph=True)
            unpacked = [fwad.unpack_dual(t) for t in (*outputs, *gradients)]
            return [part.detach() for pair in unpacked for part in pair if part is not None]

    both(problem, duals)


class Tagged(torch.Tensor):
    """A subclass that only has a name."""


@every_problem
def test_subclasses_of_every_target(problem: Problem) -> None:
    """A subclass comes back as that subclass, with the same values; as from PyTorch's functions."""
    arguments = problem.arguments()
    plain = getattr(ext, problem.function)(**arguments)
    x = arguments[problem.wanted[0]].as_subclass(Tagged).requires_grad_()
    tagged = getattr(ext, problem.function)(**{**arguments, problem.wanted[0]: x})
    pairs = [(tagged, plain)] if isinstance(plain, Tensor) else list(zip(tagged[:4], plain[:4], strict=True))
    for ours, expected in pairs:
        assert type(ours) is Tagged
        close(ours.detach().as_subclass(Tensor), expected)
    pairs[0][0].sum().backward()
    assert x.grad is not None


@every_problem
def test_fake_tensors_of_every_target(problem: Problem) -> None:
    """The metadata of the real results, strides of gradients included; and meta tensors have shapes and types."""
    from torch._subclasses import FakeTensorMode

    arguments = problem.arguments()
    call, tensors = problem.of(ext, arguments)
    real = results(call, tensors)
    mode = FakeTensorMode()
    fake = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
    with mode:
        found = results(*problem.of(ext, fake))
    for kind in range(2):
        for one, other in zip(found[kind], real[kind], strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
    meta = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in arguments.items()}
    call, tensors = problem.of(ext, meta)
    for one, other in zip(call(*tensors), real[0], strict=True):
        assert (one.shape, one.dtype, one.device.type) == (other.shape, other.dtype, "meta")


# -- compilers -----------------------------------------------------------------------------------------------


@pytest.fixture
def compiler() -> Iterator[Callable]:
    """No test profits or suffers from the graphs of another."""

    def compile(function: Callable, backend: str = "aot_eager", dynamic: bool | None = True) -> Callable:
        return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)

    torch._dynamo.reset()
    functorch, inductor = torch._functorch.config, torch._inductor.config
    with functorch.patch(enable_autograd_cache=False), inductor.patch(fx_graph_cache=False):
        yield compile
    torch._dynamo.reset()


@pytest.mark.thin(4)
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@every_problem
def test_compiled_targets(problem: Problem, dynamic: bool | None, compiler: Callable) -> None:
    """One graph; eager's values and gradients; no recompilation for other values."""
    call, tensors = problem.of(ext, problem.arguments())
    function = compiler(call, dynamic=dynamic)
    close(results(function, tensors), results(call, tensors))
    with torch._dynamo.config.patch(error_on_recompile=True):
        others = [t.flip(0) for t in tensors]
        others = [torch.empty_like(t).copy_(o) for t, o in zip(tensors, others, strict=True)]
        close(results(function, others), results(call, others))


@pytest.mark.slow
@few
def test_inductor_compiled_targets(problem: Problem, compiler: Callable) -> None:
    call, tensors = problem.of(ext, problem.arguments())
    close(results(compiler(call, "inductor"), tensors), results(call, tensors))


@pytest.mark.parametrize("kind", ["index", "pairs", "teacher", "statistics"])
def test_no_recompilation_for_another_size(kind: str, compiler: Callable) -> None:
    """dynamic=True: one frame serves every batch, class count and picture."""
    build, function = {
        "index": (
            lambda n, c: index((n, c, n + 1), sample_weight=weights(n * (n + 1)).view(n, n + 1)),
            "cross_entropy",
        ),
        "pairs": (lambda n, c: sparse((n, c), 3), "sparse_cross_entropy"),
        "teacher": (lambda n, c: teacher(n, c, target=labels(c, n)), "distillation_loss"),
        "statistics": (lambda n, c: index((n, c)), "cross_entropy_with_stats"),
    }[kind]
    options = {"temperature": 2.0, "alpha": 0.5} if kind == "teacher" else {"z_loss": 0.1, "softcap": 4.0}
    names = list(build(2, 2))

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = getattr(ext, function)(**dict(zip(names, tensors, strict=True)), **options)
        return (result,) if isinstance(result, Tensor) else result[:4]

    compiled = compiler(call)
    for n, c in ((4, 7), (9, 5), (2, 11)):
        x, *others = build(n, c).values()
        with torch._dynamo.config.patch(error_on_recompile=n != 4):
            close(
                results(lambda x, others=others: compiled(x, *others), [x]),
                results(lambda x, others=others: call(x, *others), [x]),
            )


def test_compiled_mixup_with_another_lam(compiler: Callable) -> None:
    """A new number with every batch, as MixUp draws it; or a tensor, for which nothing is compiled again."""
    arguments = mixed(4, 5)
    x, a, b = arguments["input"], arguments["target_a"], arguments["target_b"]
    function = compiler(lambda x, lam: ext.mixup_cross_entropy(x, a, b, lam), dynamic=None)
    for lam in (0.3, 0.41, 0.7, 0.99):
        close(function(x, lam), ext.mixup_cross_entropy(x, a, b, lam))
    function(x, torch.tensor(0.2, dtype=torch.float64))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lam in (0.3, 0.7):
            close(function(x, torch.tensor(lam, dtype=torch.float64)), ext.mixup_cross_entropy(x, a, b, lam), 1e-7)


def test_compiled_modules(compiler: Callable) -> None:
    """Model and loss in one graph, as they are trained."""
    torch.manual_seed(0)
    body, tutor = torch.nn.Linear(6, 5).double(), torch.nn.Linear(6, 5).double()
    hard, distilled = CrossEntropyLoss(softcap=5.0, z_loss=0.1), DistillationLoss(temperature=2.0, alpha=0.5)

    def objective(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        logits = body(x)
        with torch.no_grad():
            teacher_logits = tutor(x)
        return hard(logits, y, sample_weight=s) + distilled(logits, teacher_logits, y, sample_weight=s)

    compiled = compiler(objective)
    for n in (7, 4, 9):
        x, y, s = normal(n, 6), labels(5, n, ignored=True), weights(n)
        found = []
        for function in (objective, compiled):
            body.zero_grad()
            loss = function(x, y, s)
            loss.backward()
            found.append((loss.detach(), *(p.grad.clone() for p in body.parameters())))
        close(*found)


def test_compiled_errors(compiler: Callable) -> None:
    """A bad label is the same IndexError in compiled code."""
    x, bad = normal(3, 4), torch.tensor([0, 7, 1])
    for call in (
        lambda x, y: ext.cross_entropy(x, y, z_loss=0.1),
        lambda x, y: ext.cross_entropy_with_stats(x, y).loss,
        lambda x, y: ext.mixup_cross_entropy(x, y, y, 0.5),
        lambda x, y: ext.distillation_loss(x, x, y, alpha=0.5),
    ):
        with pytest.raises(IndexError, match=r"Target 7 is out of bounds\."):
            compiler(call)(x, bad)


@pytest.mark.thin(2)
@every_problem
def test_opcheck_of_every_target(problem: Problem) -> None:
    """Schema, fake kernels, autograd registration and dynamic AOT dispatch of whichever operator is called."""

    class Watch(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple] = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if "cross_entropy_ext" in str(function):
                self.seen.append((function, args, kwargs or {}))
            return function(*args, **(kwargs or {}))

    call, tensors = problem.of(ext, problem.arguments())
    leaves = [t.requires_grad_() for t in tensors]
    with Watch() as watch:
        call(*leaves)
    assert len(watch.seen) == 1
    operator, arguments, options = watch.seen[0]
    torch.library.opcheck(operator, arguments, options)


def test_a_lam_that_is_drawn_anew_is_not_compiled_anew() -> None:
    """MixUp draws one at each step: once for a constant, and once for any number."""
    counter = CompileCounter()
    x, y = torch.randn(8, 10), torch.randint(10, (8,))
    compiled = torch.compile(ext.mixup_cross_entropy, fullgraph=True, backend=counter)
    for step in range(12):
        lam = step / 13
        torch.testing.assert_close(compiled(x, y, y.flip(0), lam), ext.mixup_cross_entropy(x, y, y.flip(0), lam))
    assert counter.frame_count <= 2


def test_fx_records_the_operator_of_every_loss() -> None:
    class Weighted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = CrossEntropyLoss(z_loss=0.1, softcap=5.0)

        def forward(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
            return self.loss(x, y, sample_weight=weight)

    x, t, y = normal(4, 6), normal(4, 6), torch.tensor([0, 1, 2, 3])
    for module, arguments in (
        (CrossEntropyLoss(), (x, y)),
        (Weighted(), (x, y, weights(4))),
        (DistillationLoss(2.0, 0.5), (x, t, y)),
    ):
        close(torch.fx.symbolic_trace(module)(*arguments), module(*arguments))


@pytest.mark.parametrize("shape", [(5, 30), (5, 3000), (2, 19, 4, 8)], ids=str)
def test_more_pairs_than_classes_are_the_dense_target_that_they_stand_for(shape: tuple[int, ...]) -> None:
    """150 for each position, most classes more than once; as many gradients of their probabilities."""
    x, k = torch.randn(shape, dtype=torch.double).requires_grad_(), 150
    of_pairs = (shape[0], k, *shape[2:])
    indices = torch.randint(min(shape[1], 40), of_pairs)
    probs = torch.rand(of_pairs, dtype=torch.double).requires_grad_()
    dense = torch.zeros(shape, dtype=torch.double).scatter_add(1, indices, probs)
    found, expected = ext.sparse_cross_entropy(x, indices, probs), ext.cross_entropy(x, dense)
    close(found, expected)
    close(torch.autograd.grad(found, (x, probs)), torch.autograd.grad(expected, (x, probs)))

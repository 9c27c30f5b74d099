"""What every function refuses, and in which words: the argument, its value and what is accepted. In eager mode, where
shapes alone are known, inside transforms and from the modules."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from cross_entropy_ext import CrossEntropyLoss, DistillationLoss
from cross_entropy_ext import functional as ext

inf, nan = math.inf, math.nan


def touched(logits: Tensor) -> Tensor:
    """Where a test wants them to depend on something."""
    return logits


def logits(*shape: int) -> Tensor:
    return touched(torch.linspace(-1, 1, math.prod(shape)).view(shape))


def labels(*shape: int, value: int = 0) -> Tensor:
    return torch.full(shape, value)


def pairs(*shape: int) -> tuple[Tensor, Tensor]:
    return labels(*shape), torch.full(shape, 0.5)


@dataclass(frozen=True)
class Bad:
    """A call that is an error, the name of what is wrong with it, and how its value is printed."""

    name: str
    value: str
    call: Callable[[], object]


def shape(*sizes: int) -> str:
    """As Python or as PyTorch prints it."""
    text = ", ".join(map(str, sizes))
    return rf"[\[(]{text},?[\])]"


NUMBERS = {0.0: "0", -1.0: "-1", 2.0: "2", nan: "nan", inf: "inf", -inf: "-inf"}
# argument: what it may not be, and the functions that have it
REFUSED = {
    "softcap": (0.0, -1.0, nan, inf, -inf),
    "z_loss": (-1.0, nan, inf, -inf),
    "logit_scale": (nan, inf, -inf),
    "temperature": (0.0, -1.0, nan, inf, -inf),
    "alpha": (-1.0, 2.0, nan, inf, -inf),
    "denominator": (0.0, nan, inf, -inf),
}
CALLS = {
    "cross_entropy": lambda **o: ext.cross_entropy(logits(3, 4), labels(3), **o),
    "soft cross_entropy": lambda **o: ext.cross_entropy(logits(3, 4), logits(3, 4), **o),
    "cross_entropy_with_stats": lambda **o: ext.cross_entropy_with_stats(logits(3, 4), labels(3), **o),
    "sparse_cross_entropy": lambda **o: ext.sparse_cross_entropy(logits(3, 4), *pairs(3, 2), **o),
    "mixup_cross_entropy": lambda **o: ext.mixup_cross_entropy(logits(3, 4), labels(3), labels(3), 0.5, **o),
    "linear_cross_entropy": lambda **o: ext.linear_cross_entropy(logits(3, 5), logits(4, 5), labels(3), **o),
    "CrossEntropyLoss": lambda denominator=None, **o: CrossEntropyLoss(**o)(
        logits(3, 4), labels(3), denominator=denominator
    ),
    "distillation_loss": lambda **o: ext.distillation_loss(logits(3, 4), logits(3, 4), **o),
    "labelled distillation_loss": lambda alpha=0.5, **o: ext.distillation_loss(
        logits(3, 4), logits(3, 4), labels(3), alpha=alpha, **o
    ),
    "smoothed distillation_loss": lambda alpha=0.5, **o: ext.distillation_loss(
        logits(3, 4), logits(3, 4), labels(3), alpha=alpha, label_smoothing=0.1, **o
    ),
    "DistillationLoss": lambda alpha=0.5, **o: DistillationLoss(alpha=alpha, **o)(
        logits(3, 4), logits(3, 4), labels(3)
    ),
}


def has(call: str, argument: str) -> bool:
    return (argument in ("temperature", "alpha")) == ("istillation" in call)


@pytest.mark.parametrize(
    ("call", "argument", "value"),
    [(c, a, v) for a, values in REFUSED.items() for v in values for c in CALLS if has(c, a)],
)
def test_numbers_that_mean_nothing(call: str, argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{argument} must .*got:? {NUMBERS[value]}\b"):
        CALLS[call](**{argument: value})


@pytest.mark.parametrize(
    ("call", "argument", "value"),
    [(c, a, values[0]) for a, values in REFUSED.items() for c in CALLS if has(c, a) and a != "denominator"],
)
def test_learned_numbers_that_mean_nothing(call: str, argument: str, value: float) -> None:
    number = torch.tensor(value, requires_grad=True)
    with pytest.raises(ValueError, match=rf"{argument} must .*got:? {NUMBERS[value]}\b"):
        CALLS[call](**{argument: number})


@pytest.mark.parametrize(
    ("call", "argument"), [(c, a) for a in REFUSED for c in CALLS if has(c, a) and a != "logit_scale"]
)
def test_no_number_is_true(call: str, argument: str) -> None:
    with pytest.raises(TypeError, match=f"{argument} must be a number, but got True"):
        CALLS[call](**{argument: True})


def test_a_share_of_the_teacher_is_given_with_labels() -> None:
    for call in (
        lambda: ext.distillation_loss(logits(3, 4), logits(3, 4), labels(3), temperature=2.0),
        lambda: ext.distillation_loss(logits(3, 4), logits(3, 4), labels(3), label_smoothing=0.1),
        lambda: DistillationLoss(2.0)(logits(3, 4), logits(3, 4), labels(3)),
    ):
        with pytest.raises(ValueError, match="alpha, the share of the distillation"):
            call()
    assert DistillationLoss(2.0, label_smoothing=0.1)(logits(3, 4), logits(3, 4)).isfinite()  # as there are no labels


@pytest.mark.parametrize("call", CALLS)
def test_numbers_that_mean_something(call: str) -> None:
    """Negative ones, integers, zeros: what is unusual is no error."""
    for argument, values in {
        "softcap": (None, 1, 1e-3, 1e30),
        "z_loss": (0, 1e-9, 1),
        "logit_scale": (0.0, -2, 1),
        "temperature": (1, 1e-2, 100),
        "alpha": (0, 0.5, 1),
        "denominator": (-1, 1e-3, 7),
    }.items():
        if has(call, argument):
            for value in values:
                result = CALLS[call](**{argument: value})
                loss = result if isinstance(result, Tensor) else result.loss
                assert loss.isfinite()


def sample_weights() -> list[Bad]:
    """Of a shape that is not the positions', though it may have as many elements or broadcast to them."""
    wrong = [
        ((), lambda x: x),
        ((1,), lambda x: x),
        ((4,), lambda x: x),
        ((3, 1), lambda x: x),
        ((3, 4), lambda x: x),
    ]
    functions = {
        "index": lambda s: ext.cross_entropy(logits(3, 4), labels(3), sample_weight=s),
        "soft": lambda s: ext.cross_entropy(logits(3, 4), logits(3, 4), sample_weight=s),
        "stats": lambda s: ext.cross_entropy_with_stats(logits(3, 4), labels(3), sample_weight=s),
        "sparse": lambda s: ext.sparse_cross_entropy(logits(3, 4), *pairs(3, 2), sample_weight=s),
        "mixup": lambda s: ext.mixup_cross_entropy(logits(3, 4), labels(3), labels(3), 0.5, sample_weight=s),
        "distillation": lambda s: ext.distillation_loss(logits(3, 4), logits(3, 4), sample_weight=s),
        "module": lambda s: CrossEntropyLoss()(logits(3, 4), labels(3), sample_weight=s),
    }
    cases = [
        Bad("sample_weight", shape(*sizes), lambda f=f, sizes=sizes: f(torch.ones(sizes)))
        for f in functions.values()
        for sizes, _ in wrong
    ]
    image = logits(2, 4, 3, 5)
    for sizes in ((2,), (2, 3), (2, 5, 3), (2, 1, 3, 5), (2, 15)):
        call = lambda sizes=sizes: ext.cross_entropy(image, labels(2, 3, 5), sample_weight=torch.ones(sizes))  # noqa: E731
        cases.append(Bad("sample_weight", shape(*sizes), call))
    one = lambda: ext.cross_entropy(logits(4), torch.tensor(1), sample_weight=torch.ones(1))  # noqa: E731
    return [*cases, Bad("sample_weight", shape(1), one)]


SHAPES = [
    *sample_weights(),
    # pairs: the batch, the inner sizes, the rank, k, and each other
    Bad("indices", shape(2, 2), lambda: ext.sparse_cross_entropy(logits(3, 4), *pairs(2, 2))),
    Bad("indices", shape(3), lambda: ext.sparse_cross_entropy(logits(3, 4), *pairs(3))),
    Bad("indices", shape(3, 2, 5), lambda: ext.sparse_cross_entropy(logits(3, 4), *pairs(3, 2, 5))),
    Bad("indices", shape(3, 2, 6), lambda: ext.sparse_cross_entropy(logits(3, 4, 5), *pairs(3, 2, 6))),
    Bad("indices", shape(3, 0), lambda: ext.sparse_cross_entropy(logits(3, 4), *pairs(3, 0))),
    Bad("indices", shape(0), lambda: ext.sparse_cross_entropy(logits(4), *pairs(0))),
    Bad("probs", shape(3, 3), lambda: ext.sparse_cross_entropy(logits(3, 4), labels(3, 2), logits(3, 3))),
    Bad("probs", shape(2), lambda: ext.sparse_cross_entropy(logits(3, 4), labels(3, 2), logits(2))),
    Bad("weight", shape(5), lambda: ext.sparse_cross_entropy(logits(3, 4), *pairs(3, 2), torch.ones(5))),
    Bad("weight", shape(1, 4), lambda: ext.sparse_cross_entropy(logits(3, 4), *pairs(3, 2), torch.ones(1, 4))),
    # mixtures
    Bad("target_b", shape(2), lambda: ext.mixup_cross_entropy(logits(3, 4), labels(3), labels(2), 0.5)),
    Bad("target_a", shape(2), lambda: ext.mixup_cross_entropy(logits(3, 4), labels(2), labels(2), 0.5)),
    Bad("target_a", shape(3, 1), lambda: ext.mixup_cross_entropy(logits(3, 4), labels(3, 1), labels(3, 1), 0.5)),
    Bad("lam", shape(2), lambda: ext.mixup_cross_entropy(logits(3, 4), labels(3), labels(3), torch.ones(2))),
    Bad("lam", shape(3, 1), lambda: ext.mixup_cross_entropy(logits(3, 4), labels(3), labels(3), torch.ones(3, 1))),
    Bad("lam", shape(5), lambda: ext.mixup_cross_entropy(logits(3, 4, 5), labels(3, 5), labels(3, 5), torch.ones(5))),
    Bad("weight", shape(3), lambda: ext.mixup_cross_entropy(logits(3, 4), labels(3), labels(3), 0.5, torch.ones(3))),
    # distillation
    Bad("teacher_logits", shape(3, 5), lambda: ext.distillation_loss(logits(3, 4), logits(3, 5))),
    Bad("teacher_logits", shape(2, 4), lambda: ext.distillation_loss(logits(3, 4), logits(2, 4))),
    Bad("teacher_logits", shape(4), lambda: ext.distillation_loss(logits(3, 4), logits(4))),
    Bad("target", shape(2), lambda: ext.distillation_loss(logits(3, 4), logits(3, 4), labels(2), alpha=0.5)),
    Bad("target", shape(3, 4), lambda: ext.distillation_loss(logits(3, 4), logits(3, 4), labels(3, 4), alpha=0.5)),
    Bad("target", shape(3, 1), lambda: ext.distillation_loss(logits(3, 4), logits(3, 4), labels(3, 1), alpha=0.5)),
    Bad("student_logits", "scalar", lambda: ext.distillation_loss(logits(), logits())),
]


@pytest.mark.parametrize("bad", SHAPES, ids=lambda b: f"{b.name}-{re.sub('[^0-9,a-z]', '', b.value)}")
@pytest.mark.parametrize("where", ["eager", "gradient", "fake", "grad", "vmap"])
def test_shapes_that_disagree(bad: Bad, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same error with and without data, and inside a transform of the logits."""

    def transformed(x: Tensor) -> Tensor:
        monkeypatch.setattr(sys.modules[__name__], "touched", lambda logits: logits * x)
        return first(bad.call()).sum()

    with pytest.raises(ValueError, match=rf"(?s)\b{bad.name} must .*{bad.value}"):
        if where == "eager":
            bad.call()
        elif where == "fake":
            with FakeTensorMode(allow_non_fake_inputs=True):
                bad.call()
        elif where == "gradient":
            transformed(torch.ones((), requires_grad=True))
        elif where == "grad":
            torch.func.grad(transformed)(torch.ones(()))
        else:
            torch.func.vmap(transformed)(torch.ones(2))


def first(result: object) -> Tensor:
    return result if isinstance(result, Tensor) else result.loss


TYPES = [
    Bad("indices", "float|Float", lambda: ext.sparse_cross_entropy(logits(3, 4), logits(3, 2), logits(3, 2))),
    Bad("indices", "bool|Bool", lambda: ext.sparse_cross_entropy(logits(3, 4), labels(3, 2).bool(), logits(3, 2))),
    Bad("probs", "int|Long", lambda: ext.sparse_cross_entropy(logits(3, 4), labels(3, 2), labels(3, 2))),
    Bad("input", "int|Long", lambda: ext.sparse_cross_entropy(labels(3, 4), *pairs(3, 2))),
    Bad("student_logits", "int|Long", lambda: ext.distillation_loss(labels(3, 4), logits(3, 4))),
    Bad("teacher_logits", "int|Long", lambda: ext.distillation_loss(logits(3, 4), labels(3, 4))),
    Bad("target", "float|Float", lambda: ext.distillation_loss(logits(3, 4), logits(3, 4), logits(3), alpha=0.5)),
    Bad("kind", "'js'", lambda: ext.distillation_loss(logits(3, 4), logits(3, 4), kind="js")),
    Bad("kind", "None", lambda: ext.distillation_loss(logits(3, 4), logits(3, 4), kind=None)),
    Bad("kind", "'KL'", lambda: DistillationLoss(kind="KL")(logits(3, 4), logits(3, 4))),
    Bad("empty", "'none'", lambda: ext.sparse_cross_entropy(logits(3, 4), *pairs(3, 2), empty="none")),
    Bad("empty", "'none'", lambda: ext.cross_entropy_with_stats(logits(3, 4), labels(3), empty="none")),
]


@pytest.mark.parametrize("bad", TYPES, ids=lambda b: f"{b.name}-{b.value}")
def test_types_and_names_that_are_none_of_these(bad: Bad) -> None:
    with pytest.raises(ValueError, match=rf"(?s)\b{bad.name} must .*got.*({bad.value})"):
        bad.call()


def test_plain_errors_are_natives_with_the_options_too() -> None:
    """What native says of shapes, types and reductions it says of a loss with our options."""
    for options in ({"z_loss": 0.1}, {"softcap": 5.0}, {"sample_weight": torch.ones(3)}):
        for function in (ext.cross_entropy, ext.cross_entropy_with_stats):
            with pytest.raises(ValueError, match=r"Expected input batch_size \(3\) to match target batch_size \(2\)"):
                function(logits(3, 4), labels(2), **options)
            with pytest.raises(ValueError, match="average is not a valid value for reduction"):
                function(logits(3, 4), labels(3), reduction="average", **options)
            with pytest.raises(RuntimeError, match=r"label_smoothing must be between 0.0 and 1.0. Got: 1.5"):
                function(logits(3, 4), labels(3), label_smoothing=1.5, **options)
            with pytest.raises(RuntimeError, match="weight tensor should be defined either for all 4 classes"):
                function(logits(3, 4), labels(3), torch.ones(5), **options)
            with pytest.raises(RuntimeError, match="loss_dtype must be float16, bfloat16, float32 or float64"):
                function(logits(3, 4), labels(3), loss_dtype=torch.int32, **options)


@pytest.mark.parametrize("bad", [4, 7, -1, 2**40])
@pytest.mark.parametrize("layout", ["rows", "planes", "vector", "many"])
def test_targets_that_are_no_class(bad: int, layout: str) -> None:
    """An IndexError at once, among ignored ones, and whether or not a gradient is wanted."""
    size = {"rows": (5, 4), "planes": (5, 4, 6), "vector": (4,), "many": (2000, 4)}[layout]
    positions = (size[0], *size[2:]) if len(size) > 1 else ()
    good = torch.zeros(positions, dtype=torch.long)
    target = good.clone()
    target.view(-1)[:2] = -100
    target.view(-1)[-1] = bad
    two = (torch.stack([good, target], 1 if len(size) > 1 else 0), torch.full((*positions[:1], 2, *positions[1:]), 0.5))
    x, s = logits(*size), torch.ones(positions)
    calls = [
        lambda x: ext.cross_entropy(x, target, sample_weight=s),
        lambda x: ext.cross_entropy(x, target, z_loss=0.1),
        lambda x: ext.cross_entropy(x, target, softcap=3.0, label_smoothing=0.1, reduction="none"),
        lambda x: ext.cross_entropy_with_stats(x, target),
        lambda x: ext.sparse_cross_entropy(x, *two),
        lambda x: ext.mixup_cross_entropy(x, target, good, 0.5),
        lambda x: ext.mixup_cross_entropy(x, good, target, 1.0, label_smoothing=0.1),
        lambda x: ext.distillation_loss(x, x, target, alpha=0.5),
        lambda x: ext.distillation_loss(x, x, target, alpha=1.0, temperature=2.0, reduction="none"),
    ]
    for call in calls:
        for leaf in (x, x.clone().requires_grad_()):
            with pytest.raises(IndexError, match=rf"Target {bad} is out of bounds\."):
                call(leaf)


def test_a_sample_weight_of_zero_hides_no_bad_target() -> None:
    with pytest.raises(IndexError, match=r"Target 9 is out of bounds\."):
        ext.cross_entropy(logits(2, 4), torch.tensor([0, 9]), sample_weight=torch.tensor([1.0, 0.0]))


def test_complex_sample_weights_and_other_strangers() -> None:
    with pytest.raises(ValueError, match=r"sample_weight must .*(?i:complex)"):
        ext.cross_entropy(logits(2, 4), labels(2), sample_weight=torch.ones(2, dtype=torch.complex64))
    for call in (
        lambda: ext.cross_entropy(logits(2, 4), labels(2), softcap="30"),
        lambda: ext.cross_entropy(logits(2, 4), labels(2), z_loss=None),
        lambda: ext.distillation_loss(logits(2, 4), logits(2, 4), temperature="hot"),
        lambda: ext.mixup_cross_entropy(logits(2, 4), labels(2), labels(2), "half"),
        lambda: ext.cross_entropy(logits(2, 4), labels(2), sample_weight=[1.0, 1.0]),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            call()


# ---- what is no tensor, no class index, or no number ----------------------------------------------------------------

X, Y = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("error", "said", "call"),
    [
        (TypeError, "sample_weight must be a tensor, but got 1.0", lambda: ext.cross_entropy(X, Y, sample_weight=1.0)),
        (TypeError, "target must be a tensor, but got None", lambda: ext.cross_entropy_with_stats(X, None)),
        (TypeError, "probs must be a tensor, but got None", lambda: ext.sparse_cross_entropy(X, Y[:, None], None)),
        (TypeError, "teacher_logits must be a tensor, but got 'a'", lambda: ext.distillation_loss(X, "a")),
        (TypeError, "z_loss must be a number, but got '1'", lambda: ext.cross_entropy(X, Y, z_loss="1")),
        (
            ValueError,
            "target_b must be .* indices, but got torch.float32",
            lambda: ext.mixup_cross_entropy(X, Y, X, 0.5),
        ),
        (ValueError, "lam must be .* real type, but got torch.complex64", lambda: mixed(torch.tensor(0.5j))),
        (ValueError, "lam must be in .*0, 1.*, but got 3", lambda: mixed(3)),
        (ValueError, "lam must be in .*0, 1.*, but got -0.1", lambda: mixed(-0.1)),
        (ValueError, "weight must be .* real type, but got ComplexFloat", lambda: mixed(0.5, torch.ones(6) * 1j)),
        (ValueError, f"ignore_index must be .* 64 bits, but got {2**63}", lambda: mixed(0.5, ignore_index=2**63)),
        (TypeError, "ignore_index must be an integer, but got True", lambda: mixed(0.5, ignore_index=True)),
        (TypeError, "target_a must be a tensor, but got", lambda: ext.mixup_cross_entropy(X, [0, 1, 2, 3], Y, 0.5)),
        (TypeError, "weight must be a tensor, but got", lambda: distilled(weight=[1.0] * 6)),
        (TypeError, "teacher_logits must be a tensor", lambda: ext.distillation_loss(X, [1], Y, alpha=0.5, weight=X)),
        (TypeError, "input must be a tensor, but got", lambda: linear(input=X.tolist())),
        (TypeError, "linear_weight .* the layer's weight .* got Linear", lambda: linear(linear_weight=nn.Linear(6, 9))),
        (TypeError, "target must be a tensor, but got", lambda: linear(target=[0, 1, 2, 3])),
        (TypeError, "linear_bias must be a tensor, but got 1.0", lambda: linear(linear_bias=1.0)),
        (TypeError, "options must be None or LinearCross.*, but got 512", lambda: linear(options=512)),
    ],
)
def test_what_is_no_tensor_no_class_and_no_number(error: type[Exception], said: str, call) -> None:
    with pytest.raises(error, match=said):
        call()


def linear(**arguments) -> Tensor:
    return ext.linear_cross_entropy(**{"input": X, "linear_weight": X, "target": Y, **arguments})


def distilled(**options) -> Tensor:
    return ext.distillation_loss(X, X, Y, alpha=0.5, **options)


LOSS_DTYPES = {
    "plain": lambda dtype: ext.cross_entropy(X, Y, loss_dtype=dtype),
    "extras": lambda dtype: ext.cross_entropy(X, Y, z_loss=0.1, loss_dtype=dtype),
    "statistics": lambda dtype: ext.cross_entropy_with_stats(X, Y, loss_dtype=dtype),
    "MixUp": lambda dtype: mixed(0.5, loss_dtype=dtype),
    "teacher": lambda dtype: distilled(loss_dtype=dtype),
    "smoothed teacher": lambda dtype: distilled(loss_dtype=dtype, label_smoothing=0.1),
    "linear": lambda dtype: linear(loss_dtype=dtype),
    "module": lambda dtype: CrossEntropyLoss(loss_dtype=dtype)(X, Y),
    "subclass": lambda dtype: ext.cross_entropy(X.as_subclass(type("Named", (Tensor,), {})), Y, loss_dtype=dtype),
}


@pytest.mark.parametrize("call", LOSS_DTYPES)
def test_what_is_no_dtype_of_a_loss(call: str) -> None:
    with pytest.raises(TypeError, match=r"loss_dtype must be None, torch.float16, .*, but got 'float32'"):
        LOSS_DTYPES[call]("float32")
    with pytest.raises(RuntimeError, match=r"loss_dtype must be float16, .* Got: torch.int64"):
        LOSS_DTYPES[call](torch.int64)


def mixed(lam, weight=None, **options) -> Tensor:
    return ext.mixup_cross_entropy(X, Y, Y.flip(0), lam, weight, **options)


def test_numbers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    assert mixed(numpy.float32(0.5)) == mixed(0.5)


# ---- what the review of these losses found --------------------------------------------------------------------------


def test_a_probability_of_zero_has_a_gradient_whoever_makes_it() -> None:
    """By the kernels, by the composite (a sample_weight with a gradient, transforms), and of the gradient."""
    x, q, i = X.double(), torch.eye(6, dtype=torch.double)[:4], torch.tensor([[0, 1], [2, 3], [4, 0], [5, 5]])
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 1.0]], dtype=torch.double)
    ones = torch.ones(4, dtype=torch.double)
    for loss, at, exact in (
        (lambda q, **options: ext.cross_entropy(x, q, z_loss=0.1, **options), q, -x.log_softmax(1) / 4),
        (lambda p, **options: ext.sparse_cross_entropy(x, i, p, **options), p, -x.log_softmax(1).gather(1, i) / 4),
    ):
        leaf = at.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(loss(leaf), leaf)[0], exact)
        weight = ones.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(loss(leaf, sample_weight=weight), leaf)[0], exact)
        torch.testing.assert_close(torch.func.grad(loss)(at), exact)
    assert torch.autograd.gradgradcheck(lambda x, q: ext.cross_entropy(x, q), (x.requires_grad_(), q.requires_grad_()))


@pytest.mark.parametrize(
    "call",
    [
        lambda y, weight: ext.cross_entropy(X, y, sample_weight=weight),
        lambda y, weight: ext.sparse_cross_entropy(X, y[:, None], torch.ones(4, 1), sample_weight=weight),
        lambda y, weight: ext.distillation_loss(X, X, y, alpha=0.5, sample_weight=weight),
    ],
)
def test_a_class_out_of_bounds_where_there_is_no_kernel(call) -> None:
    y = torch.tensor([0, 7, -100, 1])
    for weight in (torch.ones(4), torch.ones(4, requires_grad=True)):
        with pytest.raises(IndexError, match="Target 7 is out of bounds"):
            call(y, weight)


def test_statistics_have_gradients_where_the_mean_has_none() -> None:
    x = X.clone().requires_grad_()
    stats = ext.cross_entropy_with_stats(x, Y, sample_weight=torch.zeros(4))
    assert stats.loss.isnan()
    (found,) = torch.autograd.grad(stats.lse.sum(), x)
    torch.testing.assert_close(found, X.softmax(1))


@pytest.mark.parametrize("classes", [5, 40, 200, 3000])
def test_the_largest_logit_is_infinite(classes: int) -> None:
    x, y = torch.randn(1, classes), torch.tensor([0])
    x[0, 3] = math.inf
    assert ext.cross_entropy_with_stats(x, y).argmax.item() == 3
    assert ext.cross_entropy_with_stats(torch.full((1, classes), -math.inf), y).argmax.item() == 0

"""The negative log likelihood: values and gradients against float64, native's contract with its errors message for
message, derivatives of any order, compilers and transforms, the module."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, DTYPES, INTEGERS, Case, expand, generator, name_of, place
from oracle_nll import check, log_probabilities, target_for, weight_for
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import cross_entropy_ext
from cross_entropy_ext import NLLLoss
from cross_entropy_ext import functional as ext

nan = float("nan")
REDUCTIONS = ["none", "mean", "sum"]
SHAPES = [(7,), (6, 5), (3, 5, 4), (2, 5, 3, 4), (2, 5, 3, 2, 2)]
OP = torch.ops.cross_entropy_ext.nll_loss
FORWARD = torch.ops.cross_entropy_ext._nll_loss_forward.default
BACKWARD = torch.ops.cross_entropy_ext._nll_loss_backward.default
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
on_every_backend = pytest.mark.usefixtures("backend")


# ---- values ----------------------------------------------------------------------------------------------------------
# 'core': repeated for every instruction set, and by the emulated CUDA kernels.


@pytest.mark.thin(1, emulator=4)
@on_every_backend
@dtypes
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_core_nll_values(case: Case, dtype: torch.dtype) -> None:
    logits = case.logits(dtype)
    for reduction in REDUCTIONS:
        ignored = target_for(logits, ignored=0.3)
        check(logits, target_for(logits), reduction=reduction, reason=f"{case.reason}, {reduction}")
        check(logits, ignored, weight_for(logits), reduction=reduction, reason=f"{case.reason}, {reduction}, weighted")


@on_every_backend
@dtypes
def test_core_nll_tiles(dtype: torch.dtype) -> None:
    """The gradient's memory is [outer][classes][inner]: around what is written together of each."""
    zeros = 24576 // dtype.itemsize
    for shape in [
        (700, 3),  # whole rows, as many as a tile has positions
        (5, zeros - 1),
        (5, zeros),
        (5, zeros + 1),
        (3, 2 * zeros + 1),
        (90, zeros // 64, 8),  # whole images, several at a time
        (3, zeros // 8 + 1, 8),  # an image that does not fit
        (2, zeros + 3, 3),
        (2, 70, 255),
        (2, 70, 256),
        (2, 70, 257),
        (2, 3, 4099),
    ]:
        logits = torch.randn(shape, generator=generator(shape)).to(dtype)
        check(logits, target_for(logits, ignored=0.1), reduction="none", reason=str(shape))
        channels_last = place(logits, order=(0, *range(2, len(shape)), 1))
        check(channels_last, target_for(logits), reduction="none", reason=f"{shape}, classes last")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
def test_core_nll_streams(dtype: torch.dtype) -> None:
    """A gradient larger than the caches, stored past them: at odd sizes, so that few rows are aligned."""
    classes = 1001
    rows = (17 << 20) // (classes * dtype.itemsize)
    for shape in [(rows, classes), (1, classes, rows)]:
        logits = torch.zeros(1, dtype=dtype).expand(shape).contiguous()
        check(logits, target_for(logits, ignored=0.1), reduction="none", reason=str(shape))


@on_every_backend
@pytest.mark.parametrize("integer", INTEGERS, ids=name_of)
@shapes
def test_core_nll_integers(shape: tuple[int, ...], integer: torch.dtype) -> None:
    input = log_probabilities(*shape)
    for layout in (Tensor.contiguous, lambda t: place(t, offset=1), lambda t: expand(t, t.dim() - 1) if t.dim() else t):
        target = layout(target_for(input, dtype=integer))
        check(input, target, reason=f"{integer}")
        check(input, target, ignore_index=2, reduction="sum", reason=f"{integer}, one class ignored")


@on_every_backend
def test_core_nll_uint8_ignores_255() -> None:
    input = log_probabilities(6, 5, 4)
    check(input, target_for(input, ignored=0.4, dtype=torch.uint8, ignore=255), ignore_index=255)


@on_every_backend
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 5, 0), (0, 5, 4), (0, 5, 3, 4)], ids=str)
def test_core_nll_of_nothing(shape: tuple[int, ...], reduction: str) -> None:
    input = torch.zeros(shape, requires_grad=True)
    loss, native = (f(input, target_for(input), reduction=reduction) for f in (ext.nll_loss, F.nll_loss))
    torch.testing.assert_close(loss, native, equal_nan=True)
    assert torch.autograd.grad(loss.sum(), input)[0].shape == shape


@on_every_backend
@dtypes
@shapes
def test_core_nll_all_ignored(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """0 / 0 is NaN, as in native; gradients are zero."""
    input = log_probabilities(*shape, dtype=dtype).requires_grad_()
    target = target_for(input, ignored=1.0)
    for reduction in REDUCTIONS:
        loss = ext.nll_loss(input, target, reduction=reduction)
        torch.testing.assert_close(loss, F.nll_loss(input, target, reduction=reduction), equal_nan=True)
        assert not torch.autograd.grad(loss.sum(), input)[0].any()


@on_every_backend
@dtypes
def test_core_nll_ignored_positions_are_not_read(dtype: torch.dtype) -> None:
    for shape in SHAPES[1:]:
        clean = log_probabilities(*shape, dtype=dtype)
        target = target_for(clean, ignored=0.4)
        ignored = (target == -100).unsqueeze(1).expand(shape)
        for reduction in REDUCTIONS:
            results = []
            for input in (clean, clean.masked_fill(ignored, nan)):
                leaf = input.requires_grad_()
                loss = ext.nll_loss(leaf, target, reduction=reduction)
                results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
            assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
            assert not results[1][1][ignored].any()


@on_every_backend
def test_core_nll_one_class_whose_stride_means_nothing() -> None:
    for shape, stride in [((3, 1), (1, 0)), ((3, 1), (1, 7)), ((2, 1, 4), (4, 0, 1)), ((2, 1, 4), (4, 5, 1))]:
        input = torch.randn(8).as_strided(shape, stride)
        for reduction in REDUCTIONS:
            check(input, target_for(input, ignored=0.3), reduction=reduction, reason=f"{shape} {stride}")


@on_every_backend
def test_core_nll_special_values() -> None:
    """-inf and NaN at the target are the loss; a class that weighs nothing adds nothing, even at -inf."""
    input = torch.tensor([[-torch.inf, 0.0], [nan, -1.0], [-1.0, -2.0]])
    target, weight = torch.tensor([0, 0, 1]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(
        ext.nll_loss(input, target, reduction="none"), torch.tensor([torch.inf, nan, 2.0]), equal_nan=True
    )
    assert ext.nll_loss(input, target, weight, reduction="none").tolist() == [0, 0, 2]
    assert ext.nll_loss(input, target, weight).item() == 2


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", [(100_000, 3), (2, 3, 250, 200)], ids=str)
def test_core_nll_large_half_mean(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Where sums in half would be infinite, and counts end at 65504."""
    input = torch.full(shape, -3.0, dtype=dtype, requires_grad=True)
    loss = ext.nll_loss(input, target_for(input))
    (gradient,) = torch.autograd.grad(loss, input)
    assert loss.item() == 3
    torch.testing.assert_close(gradient.double().sum().item(), -1.0, rtol=2 * torch.finfo(dtype).eps, atol=0.0)
    assert (gradient != 0).sum() == 100_000


# ---- determinism -----------------------------------------------------------------------------------------------------


@shapes
def test_nll_in_deterministic_mode(shape: tuple[int, ...]) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        input = log_probabilities(*shape).requires_grad_()
        ext.nll_loss(input, target_for(input)).backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_nll_bits_do_not_depend_on_the_threads() -> None:
    for shape in [(40_000, 7), (3, 19, 130, 131)]:
        input = torch.randn(shape, generator=generator(shape)).requires_grad_()
        found, threads = [], torch.get_num_threads()
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            loss = ext.nll_loss(input, target_for(input, ignored=0.1), weight_for(input))
            found.append((loss.detach(), torch.autograd.grad(loss, input)[0]))
        torch.set_num_threads(threads)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# ---- errors ----------------------------------------------------------------------------------------------------------


def outcome(function: Callable, *args: object, **kwargs: object) -> tuple[type, str] | Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error).split("\n")[0]


def long(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


x1, x2, x3, x4 = torch.randn(3), torch.randn(2, 3), torch.randn(2, 3, 4), torch.randn(2, 3, 4, 5)
ERRORS = {
    "scalar input": (torch.tensor(1.0), long()),
    "scalar target": (x2, long()),
    "batch sizes": (x2, long(3)),
    "batch sizes, 3-d": (x3, long(3, 4)),
    "1-d target of two": (x1, long(2)),
    "1-d target of one": (x1, long(1)),
    "multi-target": (x2, long(2, 1)),
    "target as large as the input": (x2, long(2, 3)),
    "length": (x3, long(2, 5)),
    "no length": (x3, long(2)),
    "2-d target of an image": (x4, long(2, 4)),
    "image size": (x4, long(2, 5, 4)),
    "image, 4-d target": (x4, long(2, 4, 5, 1)),
    "float target": (x2, torch.zeros(2)),
    "float target, 3-d": (x3, torch.zeros(2, 4)),
    "bool target": (x2, torch.zeros(2, dtype=torch.bool)),
    "uint16 target": (x2, torch.zeros(2, dtype=torch.uint16)),
    "weight of two classes": (x2, long(2), torch.ones(2)),
    "weight of two classes, 3-d": (x3, long(2, 4), torch.ones(2)),
    "2-d weight": (x2, long(2), torch.ones(1, 3)),
    "weight of another type": (x2, long(2), torch.ones(3, dtype=torch.double)),
    "weight of another type, 4-d": (x4, long(2, 4, 5), torch.ones(3, dtype=torch.double)),
    "weight with a gradient": (x2, long(2), torch.ones(3, requires_grad=True)),
    "weight with a gradient, 4-d": (x4, long(2, 4, 5), torch.ones(3, requires_grad=True)),
    "integer input": (long(2, 3), long(2)),
    "complex input": (torch.zeros(2, 3, dtype=torch.cfloat), long(2)),
    "no such class": (x2, torch.tensor([0, 3])),
    "negative class": (x2, torch.tensor([-1, 0])),
    "no such class, 1-d": (x1, torch.tensor(5)),
    "no such class, 3-d": (x3, torch.full((2, 4), 4)),
    "no such class, 4-d": (x4, torch.full((2, 4, 5), -3)),
    "no classes": (torch.zeros(2, 0), long(2)),
    "batch size before type": (x2, torch.zeros(3)),
    "type before weight": (x2, torch.zeros(2), torch.ones(2)),
    "target None": (x2, None),
    "target list": (x2, [0, 1]),
    "weight list": (x2, long(2), [1.0, 1.0, 1.0]),
    "input array": (x2.numpy(), long(2)),
    "meta target": (x2, long(2).to("meta")),
}


@pytest.mark.parametrize("name", ERRORS)
def test_nll_errors_are_native(name: str) -> None:
    for reduction in REDUCTIONS:
        ours, native = (outcome(f, *ERRORS[name], reduction=reduction) for f in (ext.nll_loss, F.nll_loss))
        if isinstance(native, Tensor):
            torch.testing.assert_close(ours, native, equal_nan=True)
        else:
            assert ours == native


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "batchmean"},
        {"reduction": None},
        {"reduction": "elementwise_mean"},
        {"ignore_index": 1.0},
        {"ignore_index": None},
        {"ignore_index": True},
        {"ignore_index": 2**63},
        {"reduce": False},
        {"size_average": False},
        {"size_average": True, "reduce": True},
    ],
    ids=str,
)
def test_nll_other_arguments(options: dict) -> None:
    ours, native = (outcome(f, x2, torch.tensor([1, 2]), **options) for f in (ext.nll_loss, F.nll_loss))
    if isinstance(native, Tensor):
        torch.testing.assert_close(ours, native)
    else:
        assert ours == native


def test_nll_deprecated_arguments_warn() -> None:
    with pytest.warns(
        UserWarning, match="size_average and reduce args will be deprecated, please use reduction='none'"
    ):
        ext.nll_loss(x2, long(2), reduce=False)


@pytest.mark.parametrize("integer", INTEGERS, ids=name_of)
def test_nll_a_target_that_is_no_class(integer: torch.dtype) -> None:
    for shape in SHAPES:
        input = log_probabilities(*shape)
        target = target_for(input, dtype=integer)
        target.view(-1)[-1] = 100
        with pytest.raises(IndexError, match=r"^Target 100 is out of bounds\.$"):
            ext.nll_loss(input, target)


def test_nll_names_the_first_bad_target() -> None:
    for shape in [(2, 3), (9000, 3), (2, 3, 5000)]:
        target = target_for(log_probabilities(*shape))
        target.view(-1)[[0, -1]] = torch.tensor([7, 9])
        with pytest.raises(IndexError, match=r"^Target 7 is out of bounds\.$"):
            ext.nll_loss(log_probabilities(*shape), target)


def test_nll_private_operators_check_their_arguments() -> None:
    target, one = long(2), torch.ones((), dtype=torch.double)
    for op, arguments in [
        (FORWARD, (x2, long(3), [], 1, -100, torch.float32)),
        (FORWARD, (x2, target, [torch.ones(2)], 1, -100, torch.float32)),
        (FORWARD, (x2, target, [], 5, -100, torch.float32)),
        (BACKWARD, (torch.ones(()), x2, long(3), [], one, 1, -100)),
        (BACKWARD, (torch.ones(3), x2, target, [], one, 0, -100)),
        (BACKWARD, (torch.ones(2), x2, target, [], one, 1, -100)),
        (BACKWARD, (torch.ones(()), x2, target, [], torch.ones(()), 1, -100)),
    ]:
        with pytest.raises(RuntimeError):
            op(*arguments)
    with pytest.raises(IndexError, match="Target 9 is out of bounds"):
        BACKWARD(torch.ones(()), x4.permute(0, 1, 3, 2), torch.full((2, 5, 4), 9), [], one, 1, -100)


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@shapes
def test_nll_gradcheck(shape: tuple[int, ...], reduction: str) -> None:
    input = log_probabilities(*shape, dtype=torch.double).requires_grad_()
    target, weight = target_for(input, ignored=0.2), weight_for(input)
    if len(shape) == 1:
        target = long()

    def loss(x: Tensor) -> Tensor:
        return ext.nll_loss(x, target, weight, reduction=reduction)

    assert torch.autograd.gradcheck(loss, input, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x: loss(x * x), input, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


def test_nll_third_derivative() -> None:
    input = log_probabilities(4, 5, 3, dtype=torch.double).requires_grad_()
    target = target_for(input)
    found = []
    for function in (ext.nll_loss, F.nll_loss):
        y = function(input**4, target)
        for _ in range(3):
            (y,) = torch.autograd.grad(y.sum(), input, create_graph=True)
        found.append(y)
    torch.testing.assert_close(*found)
    assert found[0].requires_grad


def test_nll_derivative_of_the_backward() -> None:
    """It is linear in grad_output, and asks nothing of the input."""
    input = log_probabilities(6, 5, dtype=torch.double).requires_grad_()
    g = torch.randn(6, dtype=torch.double, requires_grad=True)
    target = target_for(input, ignored=0.2)
    assert torch.autograd.gradcheck(
        lambda g: torch.autograd.grad(
            ext.nll_loss(input, target, reduction="none"), input, g, create_graph=True, retain_graph=True
        )[0],
        g,
        check_forward_ad=True,
    )


def test_nll_forward_mode_of_what_has_a_graph() -> None:
    input, tangent = log_probabilities(4, 5).requires_grad_(), torch.randn(4, 5)
    target = target_for(input)
    with torch.autograd.forward_ad.dual_level():
        loss = ext.nll_loss(torch.autograd.forward_ad.make_dual(input, tangent), target)
        primal, derivative = torch.autograd.forward_ad.unpack_dual(loss)
        torch.testing.assert_close(derivative, F.nll_loss(tangent, target))
        (gradient,) = torch.autograd.grad(primal, input)
    torch.testing.assert_close(gradient, torch.autograd.grad(F.nll_loss(input, target), input)[0])


def test_nll_input_changed_before_the_backward() -> None:
    input = log_probabilities(4, 5).requires_grad_()
    copied = input * 1
    loss = ext.nll_loss(copied, target_for(input))
    copied.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- compilers, transforms, other tensors ----------------------------------------------------------------------------


def value_and_gradient(function: Callable, input: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    leaf = input.detach().requires_grad_()
    loss = function(leaf, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"ignore_index": 2, "weight": True}], ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_nll_compiled(backend: str, options: dict) -> None:
    """In one graph, for dynamic shapes, and the same bits."""
    torch._dynamo.reset()
    compiled = torch.compile(ext.nll_loss, fullgraph=True, dynamic=True, backend=backend)
    for shape in [(6, 5), (9, 7), (3, 5, 4), (2, 5, 3, 4)]:
        input = log_probabilities(*shape)
        target = target_for(input, ignored=0.3, ignore=options.get("ignore_index", -100))
        given = options | ({"weight": weight_for(input)} if "weight" in options else {})
        ours, eager = (value_and_gradient(f, input, target, **given) for f in (compiled, ext.nll_loss))
        assert torch.equal(ours[0], eager[0]) and torch.equal(ours[1], eager[1])
    torch._dynamo.reset()


def test_nll_compiled_with_channels_last_and_small_integers() -> None:
    torch._dynamo.reset()
    input = log_probabilities(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    target = target_for(input, dtype=torch.int16)
    compiled = torch.compile(ext.nll_loss, fullgraph=True, backend="aot_eager")
    ours, eager = (value_and_gradient(f, input, target) for f in (compiled, ext.nll_loss))
    assert torch.equal(ours[1], eager[1]) and ours[1].stride() == eager[1].stride() == input.stride()


def test_nll_exported() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = NLLLoss(weight=torch.rand(5))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.loss(x.log_softmax(1), y)

    model = Model()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (torch.randn(4, 5), long(4)), dynamic_shapes=({0: batch}, {0: batch}))
    x, y = torch.randn(7, 5), torch.randint(5, (7,))
    torch.testing.assert_close(program.module()(x, y), model(x, y))
    torch.testing.assert_close(program.run_decompositions().module()(x, y), model(x, y))


def test_nll_opcheck() -> None:
    for shape in SHAPES:
        input = log_probabilities(*shape, dtype=torch.double)
        target, weight = target_for(input, dtype=torch.int32), weight_for(input)
        for reduction in range(3):
            leaf = input.detach().requires_grad_()
            torch.library.opcheck(OP.default, (leaf, target, reduction))
            torch.library.opcheck(OP.weight, (leaf, target, weight, reduction))
            torch.library.opcheck(FORWARD, (input, target, [], reduction, -100, torch.float32))
            loss, denominator = FORWARD(input, target, [weight], reduction, -100, torch.float64)
            g = torch.rand_like(loss).requires_grad_()
            torch.library.opcheck(BACKWARD, (g, input, target, [weight], denominator, reduction, -100))
    strided = log_probabilities(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    arguments = (target_for(strided), [], torch.ones((), dtype=torch.double), 1, -100)
    torch.library.opcheck(BACKWARD, (torch.ones(()), strided, *arguments))


def test_nll_meta_and_fake() -> None:
    input = torch.empty(2, 5, 3, device="meta", dtype=torch.half, requires_grad=True)
    target = torch.empty(2, 3, device="meta", dtype=torch.int8)
    loss = ext.nll_loss(input, target, reduction="none")
    assert loss.shape == (2, 3) and loss.dtype == torch.half
    assert torch.autograd.grad(loss.sum(), input)[0].shape == input.shape


def test_nll_transforms() -> None:
    input, other = log_probabilities(3, 4, 5, dtype=torch.double), torch.randn(3, 4, 5, dtype=torch.double)
    target = torch.randint(5, (3, 4), dtype=torch.int32)
    target[0, 0] = -100
    f, native, y = ext.nll_loss, F.nll_loss, target.long()
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(f))(input, target), torch.vmap(torch.func.grad(native))(input, y)
    )
    torch.testing.assert_close(torch.vmap(f)(input, target), torch.vmap(native)(input, y))
    torch.testing.assert_close(
        torch.func.jvp(lambda x: f(x[0] ** 2, target[0]), (input,), (other,)),
        torch.func.jvp(lambda x: native(x[0] ** 2, y[0]), (input,), (other,)),
    )
    torch.testing.assert_close(
        torch.func.hessian(lambda x: f(x**2, target[0]))(input[0]),
        torch.func.hessian(lambda x: native(x**2, y[0]))(input[0]),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@shapes
def test_nll_autocast(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Half log-probabilities have a float32 loss, of what they are; gradients in their own type."""
    input = log_probabilities(*shape, dtype=dtype)
    target, weight = target_for(input), weight_for(input)
    for options in ({}, {"weight": weight}, {"weight": weight.float()}, {"reduction": "none"}):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, native = (
                outcome(value_and_gradient, f, input, target, **options) for f in (ext.nll_loss, F.nll_loss)
            )
        if isinstance(native[0], Tensor):
            assert ours[0].dtype == native[0].dtype and ours[1].dtype == native[1].dtype == dtype
            torch.testing.assert_close(ours, native)
        else:
            assert ours == native


def test_nll_subclasses() -> None:
    class Tagged(Tensor):
        pass

    input, target = log_probabilities(4, 5), target_for(log_probabilities(4, 5), dtype=torch.int32)
    found = ext.nll_loss(input.as_subclass(Tagged), target)
    assert type(found) is Tagged
    torch.testing.assert_close(found.as_subclass(Tensor), ext.nll_loss(input, target))
    assert type(ext.nll_loss(input, target.as_subclass(Tagged))) is Tagged


def test_nll_is_seen_by_modes() -> None:
    class Recorder(torch.overrides.TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Recorder() as recorder:
        ext.nll_loss(x2, long(2))
    assert any("cross_entropy_ext.nll_loss" in name for name in recorder.seen)


# ---- the module ------------------------------------------------------------------------------------------------------


def test_nll_module_is_native() -> None:
    for arguments in ({}, {"weight": torch.rand(5)}, {"ignore_index": 3, "reduction": "sum"}):
        ours, native = NLLLoss(**arguments), nn.NLLLoss(**arguments)
        assert isinstance(ours, nn.NLLLoss) and repr(ours) == repr(native)
        assert ours.state_dict().keys() == native.state_dict().keys()
        assert dict(ours.named_buffers()).keys() == dict(native.named_buffers()).keys()
        native.load_state_dict(ours.state_dict())
        input, target = log_probabilities(6, 5), torch.tensor([0, 1, 2, 4, 4, 1])
        expected = native(input, target)
        for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.jit.script(ours)):
            torch.testing.assert_close(module(input, target), expected)
    assert NLLLoss(weight=torch.rand(5)).half().weight.dtype == torch.half
    assert cross_entropy_ext.NLLLoss is NLLLoss


def test_nll_module_warns_at_construction() -> None:
    with pytest.warns(UserWarning, match="please use reduction='sum' instead"):
        assert NLLLoss(size_average=False).reduction == "sum"


# ---- PyTorch's own samples -------------------------------------------------------------------------------------------


def same_as_native(
    ours: Callable, native: Callable, input: Tensor, target: Tensor, weight: Tensor | None, **options: object
) -> None:
    """What PyTorch's own tests ask for; in halves, where native is the one further off, float64 decides alone."""
    check(input, target, weight, **options)
    result, expected = ours(input, target), native(input, target)
    assert result.dtype == expected.dtype and result.shape == expected.shape
    if input.dtype.itemsize >= 4:
        torch.testing.assert_close(result, expected, equal_nan=True)
        g = torch.randn_like(expected)
        one, other = (torch.autograd.grad(loss, input, g)[0] for loss in (result, expected))
        torch.testing.assert_close(one, other, equal_nan=True)


@dtypes
def test_nll_op_samples(dtype: torch.dtype) -> None:
    (info,) = [op for op in op_db if op.name == "nn.functional.nll_loss"]
    samples = list(info.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) >= 15, "PyTorch's samples are not there: nothing was tested"
    for sample in samples:
        for one in (sample, sample.noncontiguous()):
            target, *rest = one.args
            weight, *_ = [*rest, one.kwargs.get("weight")]
            options = {name: value for name, value in one.kwargs.items() if name in ("reduction", "ignore_index")}
            if one is sample:
                native = partial(F.nll_loss, **one.kwargs)
                same_as_native(partial(ext.nll_loss, **one.kwargs), native, one.input, target, weight, **options)
            else:  # whose gradient native does not make
                check(one.input, target, weight, **options)


@dtypes
def test_nll_module_samples(dtype: torch.dtype) -> None:
    (info,) = [module for module in module_db if module.module_cls is nn.NLLLoss]
    samples = info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=True)
    assert len(samples) >= 20, "PyTorch's samples are not there: nothing was tested"
    for sample in samples:
        constructor, (input, target) = sample.constructor_input, sample.forward_input.args
        ours, native = (cls(*constructor.args, **constructor.kwargs).to(dtype) for cls in (NLLLoss, nn.NLLLoss))
        options = {"reduction": native.reduction, "ignore_index": native.ignore_index}
        same_as_native(ours, native, input, target, native.weight, **options)


# ---- every instruction set -------------------------------------------------------------------------------------------


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="the instruction set is already chosen")
@pytest.mark.parametrize("level", ["default", "avx2", "avx512"])
def test_nll_every_instruction_set(level: str, request: pytest.FixtureRequest) -> None:
    """The 'core' tests above once more in a process that is told which instructions to use."""
    if level != "default" and not getattr(torch.cpu, f"_is_{level}_supported")():
        pytest.skip(f"this processor has no {level}")
    if level == torch.backends.cpu.get_cpu_capability().lower():
        pytest.skip("the tests above use it")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": level}
    environment.pop("PYTEST_ADDOPTS", None)
    options = ["-q", "--maxfail=5", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist"]
    chosen = ["-k", "test_core_ and not emulator", "-m", request.config.option.markexpr]
    command = [sys.executable, "-m", "pytest", *options, *chosen, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]

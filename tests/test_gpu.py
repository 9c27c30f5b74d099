"""The loss on a GPU: the CPU suite's values once more, then what only a GPU has: streams, graphs, errors that come
late, more elements than 32 bits count.

`test_values` is reused as it is, with the tensors moved to the GPU and back. Larger inputs are compared where they are,
with the oracle evaluated in float64 on the GPU. Tests named 'sanitizer' are few and small: for compute-sanitizer. Those
marked smoke have every kernel, by its name: `pytest -m smoke -v -x` says which one fails or hangs.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import oracle
import pytest
import test_values
import torch
import torch.nn.functional as F
from cases import CASES, DTYPES, OBJECTIVES, Case, Objective, name_of, place
from differentiable import SAMPLES, every_sample
from oracle import arithmetic_of, assert_as_exact, check, reference, run, storage_bytes
from torch import Tensor

import cross_entropy_ext
from cross_entropy_ext import functional as ext

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(cross_entropy_ext.build_info()["cuda_archs"] is None, reason="built without CUDA"),
]

DEVICE = torch.device("cuda")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
REDUCTIONS = ["mean", "sum", "none"]
objectives = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.id)
two_dtypes = pytest.mark.parametrize("dtype", [BF16, FP32], ids=name_of)


@pytest.fixture(autouse=True)
def errors_where_they_belong() -> Iterator[None]:
    """What a kernel reports late is raised by the test that launched it. What exponentials lose on a GPU is allowed."""
    oracle.flushes_exponentials = True
    yield
    oracle.flushes_exponentials = False
    cross_entropy_ext.check_errors()


@pytest.fixture
def factories_on_gpu() -> Iterator[None]:
    """The oracle's own tensors are made on the GPU."""
    with torch.device(DEVICE):
        yield
    if torch.cuda.memory_reserved() > 16 * 2**30:
        torch.cuda.empty_cache()


def random(*key: object) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(zlib.crc32(repr(key).encode()))


def normal(shape: tuple[int, ...], dtype: torch.dtype, *key: object) -> Tensor:
    return (3 * torch.randn(shape, generator=random("normal", shape, *key), device=DEVICE)).to(dtype)


def moved(tensor: Tensor | None, device: torch.device | str) -> Tensor | None:
    """The same view of a copy of the whole storage: strides, offset, and what lies around."""
    if tensor is None:
        return None
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    storage = whole.to(device, copy=True).untyped_storage()
    view = torch.empty(0, dtype=tensor.dtype, device=device)
    view = view.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
    return torch._neg_view(view) if tensor.is_neg() else view


# ------------------------------------------------------------------------------------------------------------
# The tests of test_values.py.


def through_gpu(input: Tensor, target: Tensor, weight: Tensor | None = None, **options) -> Tensor:
    there = [t.to(DEVICE) if t is not None and t.requires_grad else moved(t, DEVICE) for t in (input, target, weight)]
    return ext.cross_entropy(*there, **options).cpu()


def run_on_gpu(
    function: Callable, input: Tensor, target: Tensor, weight: Tensor | None, grad_output: Tensor | None, **options
) -> dict[str, Tensor]:
    """`oracle.run` on copies of the arguments, whose storages it must not change."""
    function = ext.cross_entropy if function is through_gpu else function
    arguments = [input, target, weight]
    there = [moved(t, DEVICE) for t in arguments]
    results = run(function, *there, moved(grad_output, DEVICE), **options)
    for argument, copy in zip(arguments, there, strict=True):
        if argument is not None:
            after = moved(copy, "cpu")
            assert torch.equal(storage_bytes(after), storage_bytes(argument)), "an argument's storage was written to"
    return {name: moved(result, "cpu") for name, result in results.items()}


def on_gpu(test: Callable) -> Callable:
    @functools.wraps(test)
    def wrapper(*args, **kwargs) -> None:
        with (
            patch.object(oracle, "run", run_on_gpu),
            patch.object(test_values, "run", run_on_gpu),
            patch.object(test_values, "ext", SimpleNamespace(cross_entropy=through_gpu)),
        ):
            test(*args, **kwargs)

    return wrapper


LEFT_OUT = {
    "test_every_instruction_set",  # of the CPU
    "test_bits_do_not_depend_on_the_threads",
    "test_no_classes",  # raises at once, where a GPU does so later
    "test_inplace_gives_the_gradient_the_logits_storage",  # look at pointers; here have tests of their own, below
    "test_inplace_is_guarded_by_the_version_counter",
    "test_inplace_writes_no_element_twice",
    "test_inplace_writes_only_inside_the_view",
    "test_grad_output_scales_exactly",  # a gradient that the backward makes differs by rounding
    "test_backward_twice_accumulates_the_same",
}
assert vars(test_values).keys() >= LEFT_OUT
for _name, _test in list(vars(test_values).items()):
    if _name.startswith("test_") and _name not in LEFT_OUT:
        globals()[_name.replace("test_", "test_values_", 1)] = on_gpu(_test)


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o.reduction != "none"], ids=lambda o: o.id)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@on_gpu
def test_values_of_gradients_from_the_forward(case: Case, objective: Objective) -> None:
    """The same cases with a grad_output of one, for which the gradient that the forward made is used as it is."""
    for dtype in DTYPES:
        logits = case.logits(dtype)
        target, weight = objective.target(logits, case.id), objective.weight(logits, case.id)
        check(logits, target, weight, reason=f"{name_of(dtype)}: {case.reason}", **objective.options())


# ------------------------------------------------------------------------------------------------------------
# Larger inputs, at the borders between kernels.


def arguments_of(objective: Objective, logits: Tensor, *key: object) -> tuple[Tensor, Tensor | None, Tensor]:
    """A target (probabilities lie in memory as the logits do), class weights and a grad_output."""
    axis = 1 if logits.dim() > 1 else 0
    positions = [size for d, size in enumerate(logits.shape) if d != axis]
    generator = random(objective.id, *key)
    if objective.soft:
        soft = torch.randn(logits.shape, generator=generator, device=DEVICE).softmax(axis)
        target = torch.empty_like(logits).copy_(soft)
    else:
        target = torch.randint(logits.size(axis), positions, generator=generator, device=DEVICE)
        if objective.ignored:
            target[torch.rand(positions, generator=generator, device=DEVICE) < 0.3] = -100
    weight = None
    if objective.weighted:
        weight = (0.25 + torch.rand(logits.size(axis), generator=generator, device=DEVICE)).to(logits.dtype)
    shape = positions if objective.reduction == "none" else ()
    return target, weight, torch.randn(shape, generator=generator, device=DEVICE)


def check_objective(objective: Objective, logits: Tensor, reason: str = "") -> None:
    target, weight, grad_output = arguments_of(objective, logits)
    check(logits, target, weight, grad_output=grad_output, reason=reason, **objective.options())
    if objective.reduction != "none":
        one = torch.ones((), device=DEVICE)
        check(logits, target, weight, grad_output=one, reason=reason, **objective.options())


# Around the borders between kernels; the emulator has the others (test_cuda_on_cpu.py).
CLASSES = [
    *(1, 2, 3, 4, 5, 7, 8, 9, 10, 16, 17, 31, 33, 64, 65, 100, 127, 128, 255, 256, 257, 511, 512, 513),
    *(1000, 1024, 2049, 4096, 4097, 8193),
    *(12288, 24576, 49152),  # a row, or a block's part of it, is 48 KB: with the kernel's own arrays a little more
    *(32000, 50257, 128256, 262144, 1_000_003),
]
FEWER_CLASSES = [1, 2, 3, 8, 10, 33, 64, 127, 128, 257, 511, 512, 513, 1000, 1025, 2049, 4097, 8193, 50257, 128257]


def rows_for(classes: int) -> int:
    return max(21, min(4099, 4_000_000 // classes))


@two_dtypes
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.usefixtures("factories_on_gpu")
def test_rows_of_every_length(classes: int, dtype: torch.dtype) -> None:
    logits = normal((rows_for(classes), classes), dtype)
    for objective in OBJECTIVES:
        check_objective(objective, logits, objective.id)


@pytest.mark.parametrize("dtype", [FP16, FP64], ids=name_of)
@pytest.mark.parametrize("classes", FEWER_CLASSES)
@pytest.mark.usefixtures("factories_on_gpu")
def test_rows_of_other_dtypes(classes: int, dtype: torch.dtype) -> None:
    logits = normal((rows_for(classes), classes), dtype)
    for objective in OBJECTIVES:
        check_objective(objective, logits, objective.id)


def odd_pitch(value: Tensor) -> Tensor:
    """Every row begins at another place within 16 bytes."""
    rows, classes = value.shape
    whole = torch.full((rows, classes + 1 + classes % 2), float("nan"), dtype=value.dtype)
    return whole[:, :classes].copy_(value)


ROW_LAYOUTS = {
    "odd pitch": odd_pitch,
    "cut from wider rows": lambda v: place(v, margin={1: 3}),
    "every other row": lambda v: place(v, step={0: 2}, offset=1),
    "one element off": lambda v: place(v, offset=1),
    "seven elements off": lambda v: place(v, offset=7),
    "every other class": lambda v: place(v, step={1: 2}),
    "classes outermost": lambda v: place(v, order=(1, 0)),
    "classes outermost, few rows": lambda v: place(v[:7], order=(1, 0)),
    "one row for all": lambda v: v[:1].expand(v.size(0), -1),
}


@two_dtypes
@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.usefixtures("factories_on_gpu")
def test_rows_of_every_layout(layout: str, dtype: torch.dtype) -> None:
    for classes in FEWER_CLASSES:
        logits = ROW_LAYOUTS[layout](normal((min(rows_for(classes), 301), classes), dtype))
        for objective in OBJECTIVES:
            check_objective(objective, logits, f"{classes} classes, {objective.id}")


@objectives
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3_000_001, 1), FP32),
        ((3_000_001, 2), BF16),
        ((3_000_001, 3), FP32),
        ((3_000_001, 10), FP32),
        ((200_003, 100), BF16),
        ((20_011, 1000), BF16),
        ((20_011, 1000), FP32),
        ((1001, 32_000), BF16),
        ((1001, 8193), FP64),
        ((301, 128_256), BF16),
        ((150, 262_144), FP32),
    ],
    ids=str,
)
@pytest.mark.usefixtures("factories_on_gpu")
def test_more_rows_than_the_device_holds(shape: tuple[int, int], dtype: torch.dtype, objective: Objective) -> None:
    """Blocks walk on to further rows. (Arithmetic in fp32: a sum over so many positions, in the order of blocks.)"""
    check_objective(objective, normal(shape, dtype))


def channels_last(value: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if value.dim() in formats:
        return value.contiguous(memory_format=formats[value.dim()])
    return place(value, order=(0, *range(2, value.dim()), 1))  # (B, T, V) as (B, V, T)


SPATIAL_LAYOUTS = {
    "contiguous": Tensor.contiguous,
    "channels_last": channels_last,
    "one element off": lambda v: place(v, offset=1),
    "cropped": lambda v: place(v, margin={v.dim() - 1: 1}),
    "cropped by eight": lambda v: place(v, margin={v.dim() - 1: 8}),
    "batch innermost": lambda v: place(v, order=(*range(1, v.dim()), 0)),
}


@two_dtypes
@pytest.mark.parametrize("layout", SPATIAL_LAYOUTS)
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 19, 21, 64, 65, 150, 260, 1000, 2049, 9001])
@pytest.mark.usefixtures("factories_on_gpu")
def test_positions_side_by_side(classes: int, layout: str, dtype: torch.dtype) -> None:
    for inner in [(8, 16), (7, 9), (1, 8), (3,), (40,), (1000,), (130, 72), (3, 4, 8), (3, 5, 7)]:
        shape = (3, classes, *inner)
        if classes * inner[0] * inner[-1] > 2_000_000:
            continue
        logits = SPATIAL_LAYOUTS[layout](normal(shape, dtype))
        for objective in OBJECTIVES:
            check_objective(objective, logits, f"{shape}, {objective.id}")


@objectives
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((8, 19, 512, 512), FP32),
        ((8, 19, 511, 513), BF16),
        ((4, 150, 256, 256), BF16),
        ((2, 5, 64, 128, 128), FP32),
        ((3, 50_257, 37), BF16),
        ((3, 32_000, 200), BF16),
        ((3, 704, 16, 16), BF16),  # copies that with the kernel's own arrays make just over 48 KB
    ],
    ids=str,
)
@pytest.mark.usefixtures("factories_on_gpu")
def test_large_images(shape: tuple[int, ...], dtype: torch.dtype, layout: str, objective: Objective) -> None:
    check_objective(objective, SPATIAL_LAYOUTS[layout](normal(shape, dtype)))


# ------------------------------------------------------------------------------------------------------------
# More elements than 32 bits count.


@pytest.fixture
def much_memory() -> Iterator[None]:
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of GPU memory")
    with torch.device(DEVICE):
        yield
    gc.collect()
    torch.cuda.empty_cache()


def assert_some(
    pick: Callable[[Tensor], Tensor], pick_target: Callable[[Tensor], Tensor], logits: Tensor, target: Tensor, **kwargs
) -> None:
    """Losses and gradients of a few positions are exact, and of all positions the mean is, which shows in the gradient.
    All three ways to a gradient: made in the forward, in the backward, and in the logits' place."""
    x, t = pick(logits), pick_target(target)
    count = int((target != -100).sum())

    def compare(name: str, ours: Tensor, exact: oracle.Exact) -> None:
        assert_as_exact(ours, exact, None, arithmetic=arithmetic_of(logits), name=name)

    leaf = logits.detach().requires_grad_()
    losses = ext.cross_entropy(leaf, target, reduction="none", loss_dtype=FP32)
    compare("losses", pick_target(losses.detach()), reference(x, t, reduction="none")["loss"])
    mean = losses.detach().double().sum() / count
    (grad,) = torch.autograd.grad(losses, leaf, torch.full((), 0.5).expand_as(losses))
    half = torch.full((), 0.5, dtype=FP64)
    compare("backward", pick(grad), reference(x, t, reduction="sum", grad_output=half)["input"])
    del losses, grad
    share = torch.full((), 1 / count, dtype=FP64)
    expected = reference(x, t, reduction="sum", grad_output=share)["input"]
    loss = ext.cross_entropy(leaf, target, loss_dtype=FP32)
    assert abs(loss.item() - mean.item()) <= 1e-6 * mean.item()
    (grad,) = torch.autograd.grad(loss, leaf)
    compare("in the forward", pick(grad), expected)
    del loss, grad
    loss = ext.cross_entropy(leaf, target, loss_dtype=FP32, inplace=True)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert grad.data_ptr() == logits.data_ptr()
    compare("in place", pick(grad), expected)


def huge(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=BF16, device=DEVICE).normal_(0, 3, generator=random(shape))


@pytest.mark.usefixtures("much_memory")
def test_huge_rows() -> None:
    classes, rows = 128_256, 34_000
    assert rows * classes > 2**32
    target = torch.randint(classes, (rows,), generator=random("huge"), device=DEVICE)
    target[5] = -100
    some = torch.tensor([0, 5, *(2**31 // classes + d for d in (0, 1)), *(2**32 // classes + d for d in (0, 1)), -1])
    assert_some(lambda v: v[some], lambda v: v[some], huge(rows, classes), target)


@pytest.mark.usefixtures("much_memory")
def test_huge_transposed_sequence() -> None:
    classes = 128_256
    logits = huge(17, 2000, classes).transpose(1, 2)
    target = torch.randint(classes, (17, 2000), generator=random("huge"), device=DEVICE)
    target[0, 1] = -100
    some = slice(None, None, 16), slice(1990, None)
    assert_some(lambda v: v[some[0], :, some[1]], lambda v: v[some], logits, target)


@pytest.mark.usefixtures("much_memory")
def test_huge_count_of_small_rows() -> None:
    rows = 440_000_000
    target = torch.randint(10, (rows,), generator=random("huge"), device=DEVICE, dtype=torch.uint8)
    edges = [0, 2**31 // 10, 2**32 // 10, rows - 50]
    some = torch.cat([torch.arange(e, e + 50) for e in edges])
    assert_some(lambda v: v[some], lambda v: v[some], huge(rows, 10), target)


@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize("width", [4104, 4097], ids=["vectors", "odd"])
def test_huge_image(width: int) -> None:
    target = torch.randint(130, (2, 4200, width), generator=random("huge"), device=DEVICE)
    target[0, 0, 1] = -100
    rows = torch.tensor([0, 1, 2100, 4199])
    logits = huge(2, 130, 4200, width)
    assert logits.numel() > 2**32
    assert_some(lambda v: v[:, :, rows, -50:], lambda v: v[:, rows, -50:], logits, target)


# ------------------------------------------------------------------------------------------------------------
# A step with any options, for what follows.

STEP_LAYOUTS = {
    "small rows": ((50, 10), Tensor.contiguous),
    "rows of a warp": ((9, 1000), Tensor.contiguous),
    "rows of a cluster": ((3, 70_001), Tensor.contiguous),
    "image": ((2, 19, 8, 16), Tensor.contiguous),
    "odd image": ((2, 150, 5, 7), Tensor.contiguous),
    "strided": ((5, 600), lambda v: place(v.cpu(), order=(1, 0))),
}
KINDS = ["index", "soft", "soft with gradients"]
layouts = pytest.mark.parametrize("layout", STEP_LAYOUTS)
kinds = pytest.mark.parametrize("kind", KINDS)
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


class Step:
    """Forward and backward on tensors that stay where they are, as a CUDA graph needs it; `refill` changes them."""

    def __init__(
        self,
        layout: str,
        kind: str,
        reduction: str,
        weighted: bool = False,
        label_smoothing: float = 0.0,
        inplace: bool = False,
        dtype: torch.dtype = BF16,
        **options,
    ) -> None:
        self.kind, self.inplace = kind, inplace
        self.options = {"reduction": reduction, "label_smoothing": label_smoothing, **options}
        self.text = f"{layout}, {kind}, {weighted=}, {inplace=}, {self.options}"
        shape, place_ = STEP_LAYOUTS[layout]
        self.logits = moved(place_(torch.zeros(shape, dtype=dtype)), DEVICE)
        positions = (shape[0], *shape[2:])
        if kind == "index":
            self.target = torch.zeros(positions, dtype=torch.long, device=DEVICE)
        else:
            self.target = torch.zeros(shape, dtype=dtype, device=DEVICE)
        self.weight = torch.zeros(shape[1], dtype=dtype, device=DEVICE) if weighted else None
        self.grad_output = torch.zeros(positions if reduction == "none" else (), dtype=dtype, device=DEVICE)
        self.refill(0)

    def refill(self, round: int, factor: float = 1.0) -> None:
        self.logits.copy_(normal(tuple(self.logits.shape), FP32, round))
        generator = random("refill", round)
        if self.kind == "index":
            values = torch.randint(self.logits.size(1), self.target.shape, generator=generator, device=DEVICE)
            ignored = torch.rand(self.target.shape, generator=generator, device=DEVICE) < 0.2
            ignored.view(-1)[0] = False  # a mean over nothing is NaN, which equals nothing
            values[ignored] = -100
        else:
            values = torch.randn(self.target.shape, generator=generator, device=DEVICE).softmax(1)
        self.target.copy_(values)
        if self.weight is not None:
            self.weight.copy_(0.5 + torch.rand(self.weight.shape, generator=generator, device=DEVICE))
        self.grad_output.fill_(factor)
        if self.grad_output.dim():
            self.grad_output.mul_(torch.rand(self.grad_output.shape, generator=generator, device=DEVICE))

    def leaves(self) -> list[Tensor]:
        """What gets a gradient: the logits first."""
        tensors = [self.logits]
        if self.kind == "soft with gradients":
            tensors += [self.target] if self.weight is None else [self.target, self.weight]
        return [t.detach().requires_grad_() for t in tensors]

    def loss(self, x: Tensor, target: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        target, weight = self.target if target is None else target, self.weight if weight is None else weight
        logits = x * 1 if self.inplace else x  # a leaf's values are wanted again
        return ext.cross_entropy(logits, target, weight, inplace=self.inplace, **self.options)

    def __call__(self) -> list[Tensor]:
        """The loss and all gradients."""
        leaves = self.leaves()
        loss = self.loss(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, self.grad_output.to(loss.dtype))]


def option_steps(layout: str, kind: str, reduction: str, **more) -> Iterator[Step]:
    for weighted, e, inplace in itertools.product([False, True], [0.0, 0.1], [False, True]):
        yield Step(layout, kind, reduction, weighted, e, inplace, **more)
    yield Step(layout, kind, reduction, True, 0.1, empty="zero", loss_dtype=FP32, **more)


def assert_same_bits(found: list[Tensor], expected: list[Tensor], reason: str) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"result {i} differs: {reason}"


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


# ------------------------------------------------------------------------------------------------------------
# Determinism, and a host that never waits.


@layouts
@kinds
@reductions
def test_the_same_bits_in_every_run(layout: str, kind: str, reduction: str) -> None:
    """Whatever else the device does; also in deterministic mode, which is no error and fills fresh memory with NaN."""
    noise, other = torch.randn(1024, 1024, device=DEVICE), torch.cuda.Stream()
    for dtype in (BF16, FP32):
        step = Step(layout, kind, reduction, weighted=True, label_smoothing=0.1, dtype=dtype)
        step.refill(0, 0.7)
        first = step()
        for turn in range(20):
            if turn % 2:
                with torch.cuda.stream(other):
                    noise @ noise
            assert_same_bits(step(), first, step.text)
        torch.use_deterministic_algorithms(True)
        try:
            assert_same_bits(step(), first, f"deterministic mode, {step.text}")
        finally:
            torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()


@pytest.mark.parametrize("shape", [(1_000_003, 10), (8192, 32_000), (4, 19, 512, 1024)], ids=str)
def test_the_same_bits_of_large_sums(shape: tuple[int, ...]) -> None:
    x = normal(shape, BF16).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=random(shape), device=DEVICE)
    results = []
    for _ in range(20):
        loss = ext.cross_entropy(x, target, loss_dtype=FP32)
        (grad,) = torch.autograd.grad(loss, x)
        results.append((loss.detach(), grad) if not results else (loss.detach(), torch.equal(grad, results[0][1])))
    assert all(torch.equal(loss, results[0][0]) and same is True for loss, same in results[1:])


@pytest.mark.parametrize(
    "shape", [(64, 10), (3000, 33), (2048, 1000), (512, 32_000), (96, 128_256), (2, 19, 64, 64)], ids=str
)
def test_kernels_that_overlap(shape: tuple[int, ...]) -> None:
    """The count of the targets, the loss and the reduction, again and again without a wait between them, each time with
    another count: in memory that the last call has used, a number that was read too early is another one."""
    x = normal(shape, FP32).requires_grad_()
    positions = (shape[0], *shape[2:])
    target = torch.randint(shape[1], positions, generator=random(shape), device=DEVICE)
    kept = torch.rand(100, *positions, generator=random("kept"), device=DEVICE) < torch.linspace(
        0.05, 1, 100, device=DEVICE
    ).view(-1, *[1] * len(positions))
    kept.view(100, -1)[:, 0] = True  # a mean over nothing is NaN
    found = []
    for keep in kept:
        loss = ext.cross_entropy(x, target.where(keep, -100))
        (grad,) = torch.autograd.grad(loss, x)
        found.append(torch.stack([loss.detach(), grad.abs().sum()]))
    losses = F.cross_entropy(x.detach().double(), target, reduction="none")
    p = x.detach().double().softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
    for keep, values in zip(kept, found, strict=True):
        expected = torch.stack([losses[keep].mean(), (2 - 2 * p[keep]).mean()])
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=0)


@layouts
@kinds
@reductions
def test_the_host_does_not_wait(layout: str, kind: str, reduction: str) -> None:
    for step in option_steps(layout, kind, reduction):
        step.refill(0, 0.7)
        expected = step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_same_bits(found, expected, step.text)


# ------------------------------------------------------------------------------------------------------------
# CUDA graphs.

ROUNDS = [(1, 1.0), (2, 1.0), (3, 0.7), (4, 0.0), (5, 1.0)]  # numbers of the inputs, and their grad_output


@layouts
@kinds
@reductions
def test_captured_in_a_graph(layout: str, kind: str, reduction: str) -> None:
    """Replayed with other inputs, and another grad_output: the bits that an eager step gives."""
    for step in option_steps(layout, kind, reduction):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        for number, factor in ROUNDS:
            step.refill(number, factor)
            graph.replay()
            found = clones(results)
            assert_same_bits(found, step(), f"round {number}, {step.text}")


@kinds
@reductions
@pytest.mark.parametrize("layout", ["small rows", "rows of a cluster", "image"])
def test_graphed_callables(layout: str, kind: str, reduction: str) -> None:
    """Forward and backward in a graph each: what the forward has made waits in the pool for the backward."""
    for step in option_steps(layout, kind, reduction):
        sample = tuple(leaf.clone().detach().requires_grad_() for leaf in step.leaves())
        graphed = torch.cuda.make_graphed_callables(step.loss, sample)
        for number, factor in ROUNDS:
            step.refill(number, factor)
            leaves = step.leaves()
            loss = graphed(*leaves)
            gradients = torch.autograd.grad(loss, leaves, step.grad_output.to(loss.dtype))
            found = clones([loss.detach(), *gradients])
            assert_same_bits(found, step(), f"round {number}, {step.text}")


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "ignore_index": 3}, {"inplace": True}, {"reduction": "none"}], ids=str
)
def test_compiled_with_graphs(options: dict) -> None:
    """mode="reduce-overhead": training is that of the eager loss, and no graph is given up."""
    pytest.importorskip("triton")
    import torch._functorch.config
    import torch._inductor.config
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    models = [torch.nn.Linear(64, 1000, device=DEVICE) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    data = [
        (torch.randn(128, 64, device=DEVICE), torch.randint(1000, (128,), device=DEVICE), torch.rand(128).to(DEVICE))
        for _ in range(8)
    ]

    def losses(function: Callable, model: torch.nn.Module) -> list[float]:
        optimizer, found = torch.optim.SGD(model.parameters(), lr=1.0), []
        for x, t, factors in data:
            torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            loss = function(model(x), t)
            loss = (loss * factors).sum() if loss.dim() else loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return ext.cross_entropy(logits, target, **options)

    torch._dynamo.reset()
    counters.clear()
    functorch, inductor = torch._functorch.config, torch._inductor.config
    with functorch.patch(enable_autograd_cache=False), inductor.patch(fx_graph_cache=False):
        found = losses(torch.compile(loss, mode="reduce-overhead", fullgraph=True), models[0])
    expected = losses(loss, models[1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-4, atol=1e-5)
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------------
# Streams and devices.

A_WHILE = 40_000_000  # cycles


@layouts
@kinds
def test_kernels_are_put_on_the_current_stream(layout: str, kind: str) -> None:
    """The logits arrive late on a side stream; a kernel on another stream would be too early. The backward follows on
    the forward's stream, wherever it is called."""
    for reduction in ("mean", "none"):
        step = Step(layout, kind, reduction, weighted=True, label_smoothing=0.1)
        expected, values = step(), step.logits.clone()
        side = torch.cuda.Stream()
        for backward_on_side in (True, False):
            step.logits.zero_()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                torch.cuda._sleep(A_WHILE)
                step.logits.copy_(values)
                leaves = step.leaves()
                loss = step.loss(*leaves)
                if backward_on_side:
                    gradients = torch.autograd.grad(loss, leaves, step.grad_output)
            if not backward_on_side:
                torch.cuda.current_stream().wait_stream(side)
                gradients = torch.autograd.grad(loss, leaves, step.grad_output)
            torch.cuda.synchronize()
            assert_same_bits([loss.detach(), *gradients], expected, step.text)


def test_several_streams_at_a_time() -> None:
    steps = [Step(layout, "index", "mean", True, 0.1) for layout in STEP_LAYOUTS]
    expected = [step() for step in steps]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in steps], [[] for _ in steps]
    for _ in range(10):
        for step, stream, results in zip(steps, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(step())
    torch.cuda.synchronize()
    for step, results, wanted in zip(steps, found, expected, strict=True):
        for result in results:
            assert_same_bits(result, wanted, step.text)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@reductions
def test_another_device_than_the_current_one(reduction: str) -> None:
    for layout in STEP_LAYOUTS:
        step = Step(layout, "index", reduction, weighted=True, label_smoothing=0.1)
        expected = step()
        for name in ("logits", "target", "weight", "grad_output"):
            setattr(step, name, moved(getattr(step, name), "cuda:1"))
        found = step()
        assert torch.cuda.current_device() == 0 and all(t.device.index == 1 for t in found)
        assert_same_bits([moved(t, "cuda:0") for t in found], expected, step.text)
        other = step.loss(step.logits)
        with pytest.raises(RuntimeError, match="device"):
            ext.cross_entropy(step.logits, step.target.to("cuda:0"))
        assert other.device.index == 1


# ------------------------------------------------------------------------------------------------------------
# Autograd.


def on_device(sample: object, dtype: torch.dtype = FP64) -> tuple[Tensor, Tensor, dict]:
    logits, target, options = sample.make(dtype)
    options = {k: moved(v, DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    return moved(logits, DEVICE), moved(target, DEVICE), options


@every_sample
def test_gradcheck(sample: object) -> None:
    logits, target, options = on_device(sample)
    logits.requires_grad_()
    soft = target.is_floating_point()
    weight = options.pop("weight", None)
    leaves = [logits, target.requires_grad_()] if soft else [logits]
    if soft and weight is not None:
        leaves.append(weight.requires_grad_())

    def loss(*tensors: Tensor) -> Tensor:
        x, t, w = (*tensors, *[target, weight][len(tensors) - 1 :])
        return ext.cross_entropy(x, t, w, **options)

    assert torch.autograd.gradcheck(loss, leaves, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


@every_sample
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_several_backwards(sample: object, inplace: bool) -> None:
    """Of one graph, with different grad_outputs, and a graph of the backward: float64 as native's."""
    logits, target, options = on_device(sample)

    def derivatives(function: Callable, **extras) -> list[Tensor]:
        x = logits.detach().requires_grad_()
        y = x * 1
        loss = function(y, target if target.is_floating_point() else target.long(), **options, **extras)
        ones, found = torch.ones_like(loss), [loss.detach()]
        first = torch.autograd.grad(loss, x, ones, create_graph=True)[0]
        found.append(first.detach())
        found += torch.autograd.grad(first.square().sum(), x, retain_graph=True)
        if not inplace:
            found += torch.autograd.grad(loss, x, ones * 65536, retain_graph=True)
        found += torch.autograd.grad(loss, x, ones * -0.3)
        return found

    for ours, native in zip(derivatives(ext.cross_entropy, inplace=inplace), derivatives(F.cross_entropy), strict=True):
        scale = max(1.0, native.abs().max().item())
        torch.testing.assert_close(ours, native, rtol=1e-12, atol=1e-13 * scale)


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32, FP64], ids=name_of)
@pytest.mark.parametrize("factor", [65536.0, 0.5, -1.0, 0.0, 3e-5])
@pytest.mark.usefixtures("factories_on_gpu")
def test_scaled_gradients(factor: float, dtype: torch.dtype) -> None:
    """As exact as an unscaled one, where the forward has made a gradient for a factor of one too: the elements that
    were too small for it appear."""
    for shape, spread in [((300, 10), 2), ((300, 10), 16), ((70, 1000), 2), ((3, 30_000), 2), ((2, 19, 16, 24), 2)]:
        logits = normal(shape, dtype) * spread
        target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=random(shape), device=DEVICE)
        soft = normal(shape, FP32).softmax(1).to(dtype)
        for t, e in [(target, 0.0), (target, 0.1), (soft, 0.0)]:
            g = torch.full((), factor)
            for reduction in ("mean", "sum"):
                check(logits, t, grad_output=g, reduction=reduction, label_smoothing=e, loss_dtype=FP32)


def test_grad_scaler() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(64, 32, device=DEVICE), torch.randint(500, (64,), device=DEVICE)
    results = []
    for function, extras in [(F.cross_entropy, {}), (ext.cross_entropy, {}), (ext.cross_entropy, {"inplace": True})]:
        torch.manual_seed(1)
        model = torch.nn.Linear(32, 500, device=DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cuda", init_scale=65536.0)
        with torch.autocast("cuda", torch.float16):
            loss = function(model(x), target, **extras)
        assert loss.dtype == FP32
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        results.append((loss.detach(), model.weight.grad.clone()))
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 65536.0, "the step was skipped"
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, results[0][1], rtol=5e-3, atol=5e-6)


@pytest.mark.parametrize("half", [FP16, BF16], ids=name_of)
@reductions
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_autocast(soft: bool, reduction: str, half: torch.dtype) -> None:
    """Half logits are read as they are; the loss has native's dtype and is what loss_dtype=float32 gives."""
    logits = normal((70, 1000), half)
    target = torch.randint(1000, (70,), generator=random(0), device=DEVICE)
    target = normal((70, 1000), FP32).softmax(1).to(half) if soft else target
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    with torch.autocast("cuda", half):
        loss = ext.cross_entropy(x, target, reduction=reduction)
        native = F.cross_entropy(logits, target, reduction=reduction)
    assert loss.dtype == native.dtype == FP32
    loss.sum().backward()
    expected = ext.cross_entropy(y, target, reduction=reduction, loss_dtype=FP32)
    expected.sum().backward()
    assert torch.equal(loss, expected) and torch.equal(x.grad, y.grad) and x.grad.dtype == half


@pytest.mark.parametrize("layout", STEP_LAYOUTS)
@reductions
def test_inplace_writes_the_logits_and_nothing_else(layout: str, reduction: str) -> None:
    for weighted, e in [(False, 0.0), (True, 0.1)]:
        step = Step(layout, "index", reduction, weighted, e, dtype=FP32)
        expected = step()
        leaf = torch.zeros((), device=DEVICE, requires_grad=True)
        logits = step.logits.add(leaf)
        pointer, before = logits.data_ptr(), logits.detach().clone()
        loss = ext.cross_entropy(logits, step.target, step.weight, inplace=True, **step.options)
        assert torch.equal(logits, before), "the forward wrote"
        (grad,) = torch.autograd.grad(loss, logits, step.grad_output)
        assert grad.data_ptr() == pointer
        torch.testing.assert_close(grad, expected[1], rtol=1e-5, atol=1e-7)
    wide = normal((64, 1003), FP32)
    buffer = wide + torch.zeros((), device=DEVICE, requires_grad=True)
    view, target = buffer[:, 1:-2], torch.zeros(64, dtype=torch.long, device=DEVICE)
    torch.autograd.grad(ext.cross_entropy(view, target, inplace=True), view)
    assert torch.equal(buffer[:, :1], wide[:, :1]) and torch.equal(buffer[:, -2:], wide[:, -2:])
    assert not torch.equal(buffer[:, 1:-2], wide[:, 1:-2])


@pytest.mark.parametrize("name", ["mean", "none", "weights_smoothing_ignored", "kdim", "soft_weights_smoothing"])
def test_opcheck(name: str) -> None:
    pytest.importorskip("expecttest")
    op = torch.ops.cross_entropy_ext.cross_entropy
    logits, target, options = on_device(next(s for s in SAMPLES if s.name == name), FP32)
    options["reduction"] = {"none": 0, "mean": 1, "sum": 2}[options.pop("reduction", "mean")]
    op = op.weight if "weight" in options else op.default
    torch.library.opcheck(op, (logits.requires_grad_(), target), options)


# ------------------------------------------------------------------------------------------------------------
# Memory.


def peak_of(function: Callable[[], object]) -> int:
    """Bytes beyond those that were there, at the worst moment of a call."""
    function()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=name_of)
@reductions
@pytest.mark.parametrize("kind", ["index", "smoothed", "soft"])
@pytest.mark.parametrize("shape", [(4096, 32_000), (4, 128, 256, 256)], ids=str)
def test_peak_memory(shape: tuple[int, ...], kind: str, reduction: str, dtype: torch.dtype) -> None:
    """One gradient, and what is kept of each position; in the logits' place only the latter."""
    x = normal(shape, dtype).requires_grad_()
    positions = (shape[0], *shape[2:])
    if kind == "soft":
        target = normal(shape, FP32).softmax(1).to(dtype)
    else:
        target = torch.randint(shape[1], positions, generator=random(0), device=DEVICE)
    options = {"reduction": reduction, "label_smoothing": 0.1 if kind == "smoothed" else 0.0}
    size, count = x.numel() * x.element_size(), x.numel() // shape[1]
    kept = 12 * count + (2 * x.element_size() * count if reduction == "none" else 0) + 2**22

    def step(logits: Tensor, **extras) -> None:
        loss = ext.cross_entropy(logits, target, **options, **extras)
        torch.autograd.grad(loss, logits, torch.ones((), dtype=loss.dtype, device=DEVICE).expand_as(loss))

    def forward() -> None:
        with torch.no_grad():
            ext.cross_entropy(x, target, **options)

    assert peak_of(lambda: step(x)) <= size + kept
    assert peak_of(forward) <= kept
    logits = x * 1
    inplace = peak_of(lambda: step(logits, inplace=True))
    assert inplace <= kept
    if len(shape) == 2:
        assert inplace < 0.01 * size
        assert peak_of(lambda: step(x)) <= 1.01 * size


def test_half_logits_are_not_widened_under_autocast() -> None:
    x = normal((2048, 32_000), BF16).requires_grad_()
    target = torch.randint(32_000, (2048,), generator=random(0), device=DEVICE)

    def step() -> None:
        with torch.autocast("cuda", BF16):
            loss = ext.cross_entropy(x, target)
        torch.autograd.grad(loss, x)

    assert peak_of(step) <= 1.01 * x.numel() * 2


# ------------------------------------------------------------------------------------------------------------
# Nothing, and what must not be read.


@pytest.mark.parametrize("shape", [(0, 10), (0, 5000), (0, 3, 4, 5), (2, 3, 0), (2, 3, 4, 0)], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_empty_batches(shape: tuple[int, ...], soft: bool) -> None:
    for reduction, inplace in itertools.product(REDUCTIONS, [False, True]):
        x = torch.zeros(shape, device=DEVICE, requires_grad=True)
        positions = (shape[0], *shape[2:])
        t = torch.zeros(shape if soft else positions, dtype=FP32 if soft else torch.long, device=DEVICE)
        loss = ext.cross_entropy(x, t, reduction=reduction, inplace=inplace)
        native = F.cross_entropy(x, t, reduction=reduction)
        assert torch.equal(loss.nan_to_num(7), native.nan_to_num(7)) and loss.dtype == native.dtype
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert grad.shape == x.shape
        zero = ext.cross_entropy(x, t, reduction=reduction, empty="zero")
        assert zero.sum() == 0


@layouts
@reductions
def test_ignored_rows_full_of_nan(layout: str, reduction: str) -> None:
    """Their gradient is zero, and no other position notices."""
    for step in option_steps(layout, "index", reduction):
        expected = step()
        ignored = (step.target == -100).unsqueeze(1)
        step.logits.masked_fill_(ignored, float("nan"))
        found = step()
        assert_same_bits(found, expected, step.text)
        assert (found[1].masked_select(ignored) == 0).all()
        step.target.fill_(-100)
        nothing = step()
        assert nothing[0].isnan().all() if "empty" not in step.options and reduction == "mean" else True, step.text
        assert (nothing[1].nan_to_num(0) == 0).all()


# ------------------------------------------------------------------------------------------------------------
# Targets out of bounds: reported late, and nothing breaks.

BAD = [7_000_000, -1, 2**40, -(2**63)]


def before_it_is_reported(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What a forward and a backward return if no kernel has run before all are launched. A host that has other things
    to do needs more time for that, and hears of the target in between."""
    for more in range(9):
        torch.cuda._sleep(A_WHILE << more)
        try:
            return call()
        except IndexError:
            torch.cuda.synchronize()
    raise AssertionError("the host takes seconds to launch a backward")


@layouts
@reductions
@pytest.mark.parametrize("bad", BAD)
def test_a_target_out_of_bounds(layout: str, reduction: str, bad: int) -> None:
    """A loss of NaN and a gradient of zero at its position, the others as ever; an IndexError when asked for."""
    for e, inplace in itertools.product([0.0, 0.1], [False, True]):
        step = Step(layout, "index", reduction, label_smoothing=e, inplace=inplace)
        expected = step()
        torch.cuda.synchronize()
        flat = step.target.view(-1)
        position = flat.numel() // 2
        flat[position] = bad
        loss, grad = before_it_is_reported(step)
        message = rf"Target {bad} is out of bounds\. \(Position {position} of .* over {step.logits.size(1)} classes"
        with pytest.raises(IndexError, match=message):
            cross_entropy_ext.check_errors()
        cross_entropy_ext.check_errors()
        there = (step.target == bad).unsqueeze(1).expand_as(grad)
        assert (grad[there] == 0).all(), step.text
        if reduction == "none":
            assert torch.equal(loss.isnan(), step.target == bad), step.text
            assert torch.equal(loss[step.target != bad], expected[0][step.target != bad]), step.text
            assert torch.equal(grad[~there], expected[1][~there]), step.text
        else:
            assert loss.isnan(), step.text
        step.refill(0)
        assert_same_bits(step(), expected, f"after the error, {step.text}")


def test_the_next_call_raises() -> None:
    x = normal((20, 5), FP32).requires_grad_()
    good, bad = torch.zeros(20, dtype=torch.long, device=DEVICE), torch.full((20,), 7, device=DEVICE)
    loss = ext.cross_entropy(x, bad)
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match=r"Target 7 is out of bounds\. \(Position"):
        ext.cross_entropy(x, good)
    expected = F.cross_entropy(x.double(), good)
    torch.testing.assert_close(ext.cross_entropy(x, good).double(), expected, rtol=1e-6, atol=0)
    assert loss.isnan()
    loss = ext.cross_entropy(x, bad)
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        loss.backward()
    cross_entropy_ext.check_errors()


def test_threads_that_launch_the_same_kernel() -> None:
    """With shared memory of different size."""

    def work(classes: int) -> bool:
        logits, target = normal((64, classes), BF16), torch.zeros(64, dtype=torch.long, device=DEVICE)
        return all(ext.cross_entropy(logits, target).isfinite() for _ in range(300))

    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(work, (32000, 26000)))


def test_reports_from_several_streams() -> None:
    """Taking one report needs nothing of the device, so it cannot be late for the next."""
    x, good = normal((20, 5), FP32), torch.zeros(20, dtype=torch.long, device=DEVICE)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    for bad in (7, 8):
        with torch.cuda.stream(side):
            ext.cross_entropy(x, torch.full_like(good, bad))
        side.synchronize()
        torch.cuda._sleep(A_WHILE)
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            ext.cross_entropy(x, good)
    cross_entropy_ext.check_errors()


def test_a_target_out_of_bounds_in_a_graph() -> None:
    step = Step("small rows", "index", "mean")
    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, _ = step()
    for _ in range(2):
        step.target[3] = 7_000_000
        graph.replay()
        with pytest.raises(IndexError, match=r"Target 7000000 is out of bounds\. \(Position 3 "):
            cross_entropy_ext.check_errors()
        assert loss.isnan()
        step.refill(0)
        graph.replay()
        assert torch.equal(loss, expected[0])
    cross_entropy_ext.check_errors()


SCRIPTS = {
    "the context survives": """
        x = torch.randn(20, 5, device="cuda", requires_grad=True)
        loss = ext.cross_entropy(x, torch.full((20,), 7, device="cuda"), reduction="none")
        assert loss.isnan().all()
        assert (torch.ones(3, device="cuda") + 1).tolist() == [2, 2, 2]
        for again in (lambda: ext.cross_entropy(x, torch.zeros(20, dtype=torch.long, device="cuda")),
                      cross_entropy_ext.check_errors):
            try:
                again()
                raise SystemExit("no error")
            except IndexError as error:
                assert "Target 7 is out of bounds." in str(error), error
            bad = torch.full((2, 4, 4), -3, device="cuda", dtype=torch.int32)
            bad.fill_(7)
            ext.cross_entropy(torch.randn(2, 5, 4, 4, device="cuda"), bad)
            torch.cuda.synchronize()
        try:
            cross_entropy_ext.check_errors()
            raise SystemExit("no error")
        except IndexError:
            pass
        good = torch.zeros(20, dtype=torch.long, device="cuda")
        ext.cross_entropy(x, good).backward()
        assert x.grad.isfinite().all()
        torch.cuda.synchronize()
    """,
    "a process that never asks ends as usual": """
        ext.cross_entropy(torch.randn(20, 5, device="cuda"), torch.full((20,), 7, device="cuda"))
    """,
    "the first call may be captured": """
        x = torch.randn(20, 5, device="cuda", requires_grad=True)
        t = torch.zeros(20, dtype=torch.long, device="cuda")
        torch.autograd.grad((x * 2).sum(), x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = ext.cross_entropy(x, t)
            grad, = torch.autograd.grad(loss, x)
        graph.replay()
        y = x.detach().requires_grad_()
        expected = ext.cross_entropy(y, t)
        assert torch.equal(loss, expected)
        assert torch.equal(grad, torch.autograd.grad(expected, y)[0])
    """,
    "mixed devices are native's errors": """
        def outcome(function, *arguments):
            try:
                return function(*arguments)
            except Exception as error:
                return type(error)
        x, t, w = torch.randn(4, 5), torch.zeros(4, dtype=torch.long), torch.ones(5)
        q, one, label = torch.full((4, 5), 0.2), torch.randn(5), torch.tensor(2)
        for cpu in [(x, t.cuda()), (x.cuda(), t), (x.cuda(), t.cuda(), w), (x, t, w.cuda()), (x.cuda(), q),
                    (x, q.cuda()), (x.cuda(), q.cuda(), w), (one.cuda(), label), (one, label.cuda()),
                    (x[0].cuda(), torch.tensor([2]))]:
            for grad in (False, True):
                arguments = (cpu[0].detach().requires_grad_(grad), *cpu[1:])
                native, ours = outcome(F.cross_entropy, *arguments), outcome(ext.cross_entropy, *arguments)
                places = [a.device.type for a in arguments]
                same = native is ours if isinstance(native, type) else torch.equal(native, ours)
                assert same, (places, native, ours)
        torch.cuda.synchronize()
    """,
}


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen]]:
    """All at a time, as each spends most of its time on starting."""
    prelude = """
        import torch
        import torch.nn.functional as F
        import cross_entropy_ext
        from cross_entropy_ext import functional as ext
    """
    root = str(Path(cross_entropy_ext.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        for name, script in SCRIPTS.items()
    }
    yield started
    for process in started.values():
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize("name", SCRIPTS)
def test_in_a_process_of_its_own(name: str, processes: dict[str, subprocess.Popen]) -> None:
    output, _ = processes[name].communicate(timeout=100)
    assert processes[name].returncode == 0, output[-3000:]


# ------------------------------------------------------------------------------------------------------------
# Every kernel, once, against the CPU's; and for compute-sanitizer. Nothing but the kernels under test runs on the GPU,
# beside copies.

KERNELS = {
    "small rows": ((70, 10), Tensor.contiguous),
    "small rows, odd": ((35, 33), lambda v: place(v, margin={1: 1}, offset=1)),
    "small rows, strided": ((5, 37), lambda v: place(v, order=(1, 0))),
    "rows of a warp": ((9, 1000), Tensor.contiguous),
    "rows of a warp, odd": ((9, 1001), lambda v: place(v, margin={1: 1}, offset=1)),
    "rows of a block": ((3, 9001), Tensor.contiguous),
    "rows of a cluster": ((3, 70_001), Tensor.contiguous),
    "rows past shared memory": ((2, 1_000_003), Tensor.contiguous),
    "image": ((2, 19, 8, 16), Tensor.contiguous),
    "image of many classes": ((1, 1000, 4, 8), Tensor.contiguous),
    "image of classes past shared memory": ((1, 9001, 8), Tensor.contiguous),
    "odd image": ((2, 19, 5, 7), Tensor.contiguous),
    "odd image of many classes": ((1, 300, 3, 11), Tensor.contiguous),
    "channels_last": ((2, 19, 5, 7), channels_last),
    "strided": ((5, 600), lambda v: place(v, order=(1, 0))),
    "strided, many classes": ((3, 3000), lambda v: place(v, order=(1, 0))),
}


def compare_with_cpu(layout: str, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """Loss and gradient, made in the forward, handed on for another grad_output, and made in the backward."""
    shape, place_ = KERNELS[layout]
    random_ = torch.Generator().manual_seed(0)
    logits = place_(torch.randn(shape, generator=random_).to(dtype))
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=random_)
    target.view(-1)[1] = -100
    if kind == "soft":
        target = torch.empty_like(logits).copy_(torch.randn(shape, generator=random_).softmax(1))
    weight = torch.rand(shape[1], generator=random_).to(dtype) if kind == "smoothed" else None
    options = {"smoothed": {"label_smoothing": 0.1}, "general": {"softcap": 5.0}}.get(kind, {})
    passes = [("mean", 1.0), ("mean", 0.5), ("none", 1.0)] if logits.numel() < 10**6 else [("mean", 0.5)]
    for reduction, factor in passes:
        results = []
        for device in (DEVICE, "cpu"):
            x, t, w = (moved(v, device) for v in (logits, target, weight))
            x.requires_grad_()
            loss = ext.cross_entropy(x, t, w, reduction=reduction, **options)
            grad_output = torch.full(loss.shape, factor, dtype=loss.dtype).to(device)
            results.append((loss.detach().cpu(), moved(torch.autograd.grad(loss, x, grad_output)[0], "cpu")))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=name_of)
@pytest.mark.parametrize("kind", ["index", "smoothed", "soft", "general"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_smoke(kernel: str, kind: str, dtype: torch.dtype) -> None:
    compare_with_cpu(kernel, kind, dtype, 4 * max(torch.finfo(dtype).eps, 1e-12 if dtype == FP64 else 1e-6))


@two_dtypes
@pytest.mark.parametrize("kind", ["index", "smoothed", "soft"])
@pytest.mark.parametrize("layout", KERNELS)
def test_sanitizer(layout: str, kind: str, dtype: torch.dtype) -> None:
    compare_with_cpu(layout, kind, dtype, 4 * torch.finfo(dtype).eps)


@pytest.mark.smoke
def test_sanitizer_other_passes() -> None:
    """Inference, a gradient in the logits' place, double arithmetic on half logits, and a target out of bounds."""
    x = torch.randn(9, 1000, generator=torch.Generator().manual_seed(0)).to(BF16).to(DEVICE).requires_grad_()
    with torch.no_grad():
        ext.cross_entropy(x, torch.zeros(9, dtype=torch.long).to(DEVICE))
    for target in (torch.full((9, 1000), 1e-3, dtype=FP64), torch.arange(9), torch.arange(9).to(torch.uint8)):
        y = moved(x.detach(), DEVICE).requires_grad_()
        loss = ext.cross_entropy(y * 1, target.to(DEVICE), inplace=True)  # a leaf itself is never overwritten
        torch.autograd.grad(loss, y)
        assert loss.isfinite()
    loss = ext.cross_entropy(x.detach(), torch.full((9,), 1000).to(DEVICE))
    with pytest.raises(IndexError):
        cross_entropy_ext.check_errors()
    assert loss.isnan()


# ------------------------------------------------------------------------------------------------------------
# Every target and every output. Against the CPU's kernels in float64, which test_targets.py holds to the oracle.


def labels_of(logits: Tensor) -> Tensor:
    shape = (logits.size(0), *logits.shape[2:])
    labels = torch.randint(logits.size(1), shape, generator=torch.Generator().manual_seed(1))
    labels.view(-1)[::7] = -100
    return labels


def pairs_of(logits: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    shape = (logits.size(0), k, *logits.shape[2:])
    random = torch.Generator().manual_seed(2)
    indices, probs = torch.randint(logits.size(1), shape, generator=random), torch.rand(shape, generator=random)
    indices[:, 2] = indices[:, 0]  # one comes twice
    return indices, probs


def weighted_by(logits: Tensor) -> Tensor:
    return torch.rand(labels_of(logits).shape, generator=torch.Generator().manual_seed(3))


Tensors = tuple[Tensor, ...]
TARGETS: dict[str, tuple[Callable[[Tensor], Tensors], Callable[..., Tensor]]] = {
    "sample_weight": (
        lambda x: (labels_of(x), weighted_by(x)),
        lambda x, y, s: ext.cross_entropy(x, y, sample_weight=s, label_smoothing=0.1),
    ),
    "z_loss": (lambda x: (labels_of(x),), lambda x, y: ext.cross_entropy(x, y, z_loss=0.1, reduction="sum")),
    "softcap": (lambda x: (labels_of(x),), lambda x, y: ext.cross_entropy(x, y, softcap=5.0, logit_scale=0.7)),
    "sparse": (pairs_of, lambda x, i, p: ext.sparse_cross_entropy(x, i, p, label_smoothing=0.1)),
    "mixup": (lambda x: (labels_of(x), labels_of(x).flip(0)), lambda x, a, b: ext.mixup_cross_entropy(x, a, b, 0.3)),
    "distillation": (
        lambda x: (x.detach().float().flip(0),),
        lambda x, t: ext.distillation_loss(x, t, temperature=3.0, reduction="none").sum(),
    ),
    "distillation and labels": (
        lambda x: (x.detach().float().flip(0), labels_of(x)),
        lambda x, t, y: ext.distillation_loss(x, t, y, temperature=3.0, alpha=0.7, kind="ce"),
    ),
    "statistics": (
        lambda x: (labels_of(x), weighted_by(x)),
        lambda x, y, s: (lambda r: r.loss + (s * (r.entropy + r.lse - r.target_log_prob)).mean())(
            ext.cross_entropy_with_stats(x, y)
        ),
    ),
    "nll": (lambda x: (labels_of(x),), lambda x, y: ext.nll_loss(x, y)),
    "denominator": (
        lambda x: (labels_of(x), torch.tensor(29.0)),
        lambda x, y, d: ext.cross_entropy(x, y, denominator=d, label_smoothing=0.1),
    ),
}
LAYOUTS = {
    "small rows": ((65, 21), None),
    "rows": ((40, 4103), None),
    "vocabulary": ((6, 50257), None),
    "image": ((2, 19, 16, 24), None),
    "channels_last": ((2, 150, 8, 8), (0, 2, 3, 1)),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
@two_dtypes
def test_every_target(name: str, layout: str, dtype: torch.dtype) -> None:
    shape, order = LAYOUTS[layout]
    draw, loss = TARGETS[name]
    random = torch.Generator().manual_seed(0)
    here = place((3 * torch.randn(shape, generator=random)).to(dtype), order=order)
    others = draw(here)
    exact_leaf, leaf = here.detach().double().requires_grad_(), here.detach().to(DEVICE).requires_grad_()
    wide = [t.double() if t.is_floating_point() else t for t in others]
    exact, found = loss(exact_leaf, *wide), loss(leaf, *(t.to(DEVICE) for t in others))
    (exact_grad,), (grad,) = torch.autograd.grad(exact, exact_leaf), torch.autograd.grad(found, leaf)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found.cpu().double(), exact, rtol=4 * max(rounding, 1e-6), atol=1e-5)
    scale = exact_grad.abs().max().item()
    torch.testing.assert_close(grad.cpu().double(), exact_grad, rtol=rounding, atol=scale * 1e-5)


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_in_a_graph(name: str) -> None:
    """Captured once and replayed on other logits: nothing waits for the device, nothing is left from the capture."""
    draw, loss = TARGETS[name]
    values = torch.randn(3, 64, 1000)
    leaf = values[0].to(DEVICE).requires_grad_()
    others = [t.to(DEVICE) for t in draw(values[0])]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(loss(leaf, *others), leaf)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (grad,) = torch.autograd.grad(loss(leaf, *others), leaf)
    for logits in values[1:]:
        with torch.no_grad():
            leaf.copy_(logits)
        graph.replay()
        (expected,) = torch.autograd.grad(loss(leaf, *others), leaf)
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", TARGETS)
def test_sanitizer_targets(name: str) -> None:
    draw, loss = TARGETS[name]
    for shape in ((5, 21), (3, 1031), (2, 19, 3, 8)):
        logits = torch.randn(shape)
        leaf = logits.to(DEVICE).requires_grad_()
        loss(leaf, *(t.to(DEVICE) for t in draw(logits))).backward()


# ------------------------------------------------------------------------------------------------------------
# The output layer with its loss: the products are cuBLAS's, and sums over chunks are made in float32.

LINEAR = {
    "mean": {},
    "sum, smoothed": {"reduction": "sum", "label_smoothing": 0.1},
    "none": {"reduction": "none"},
    "softcap and z_loss": {"softcap": 5.0, "z_loss": 1e-2},
    "soft": {"label_smoothing": 0.1},
}
chunks = pytest.mark.parametrize("chunk", [16, None], ids=["chunks", "one chunk"])


def layer(name: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Input, weight and bias; and the target."""
    random = torch.Generator().manual_seed(0)
    input, weight, bias = (torch.randn(shape, generator=random).to(dtype) for shape in ((70, 24), (1031, 24), (1031,)))
    labels = torch.randint(1031, (70,), generator=random)
    labels[::7] = -100
    return [input, weight, bias], torch.rand(70, 1031, generator=random).to(dtype) if name == "soft" else labels


def linear_loss(name: str, leaves: list[Tensor], target: Tensor, chunk: int | None) -> Tensor:
    options = chunk and cross_entropy_ext.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
    input, weight, bias = leaves
    loss = ext.linear_cross_entropy(input, weight, target, linear_bias=bias, options=options, **LINEAR[name])
    return loss.sum() * 0.7


@pytest.mark.smoke
@chunks
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=name_of)
@pytest.mark.parametrize("name", LINEAR)
def test_linear(name: str, dtype: torch.dtype, chunk: int | None) -> None:
    """At most the error of the layer and the native loss in the same type, and a rounding."""
    tensors, target = layer(name, dtype)
    exact_leaves = [t.double().requires_grad_() for t in tensors]
    exact = linear_loss(name, exact_leaves, target.double() if name == "soft" else target, None)
    truth = [exact, *torch.autograd.grad(exact, exact_leaves)]
    leaves = [t.to(DEVICE).requires_grad_() for t in tensors]
    on_device = target.to(DEVICE)
    found = linear_loss(name, leaves, on_device, chunk)
    native = ext.cross_entropy(F.linear(*leaves), on_device, **LINEAR[name]).sum() * 0.7
    pairs = zip(
        [found, *torch.autograd.grad(found, leaves)], [native, *torch.autograd.grad(native, leaves)], strict=True
    )
    for (ours, theirs), right in zip(pairs, truth, strict=True):
        error, allowed = ((t.detach().cpu().double() - right).abs().max() for t in (ours, theirs))
        assert error <= 1.5 * allowed + 2 * torch.finfo(dtype).eps * right.abs().max()


@chunks
@pytest.mark.parametrize("name", LINEAR)
def test_linear_in_a_graph(name: str, chunk: int | None) -> None:
    tensors, target = layer(name, BF16)
    leaves, target = [t.to(DEVICE).requires_grad_() for t in tensors], target.to(DEVICE)

    def step() -> tuple[Tensor, ...]:
        loss = linear_loss(name, leaves, target, chunk)
        return loss, *torch.autograd.grad(loss, leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].mul_(-1)
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def test_sanitizer_linear() -> None:
    for name in LINEAR:
        tensors, target = layer(name, BF16)
        linear_loss(name, [t.to(DEVICE).requires_grad_() for t in tensors], target.to(DEVICE), 16).backward()

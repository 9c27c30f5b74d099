"""The CUDA kernels in the emulator, through their own host code: every launch decision, schedules in which a missing
barrier shows, and what the kernels report. Tests of values and of autograd run on them too (see backends.py)."""

from __future__ import annotations

import os
import subprocess
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from backends import DEVICES, SCHEDULES, needs_emulator
from cases import DTYPES, Objective, generator, grad_output_for, name_of, place
from cuda_on_cpu import build
from oracle import arithmetic_of, assert_as_exact, check, reference
from oracle_targets import check_call
from shards import numbered, ops, sharded
from torch import Tensor
from torch.testing import assert_close

from benchmarks import tune
from cross_entropy_ext import functional as ext

pytestmark = [needs_emulator, pytest.mark.usefixtures("kernels")]


# ---- what every case is checked for ------------------------------------------------------------------------

OBJECTIVES_HERE = [
    Objective("index", "the plain loss, its gradient made in the forward", "mean"),
    Objective("index-ignored", "the same with weights and ignored rows", "mean", weighted=True, ignored=True),
    Objective("smoothed", "every class has a coefficient", "sum", weighted=True, label_smoothing=0.1, ignored=True),
    Objective("soft", "a second operand, in the forward and in the backward", "mean", soft=True, label_smoothing=0.1),
    Objective("none", "lse read back from memory, a grad_output for each position", "none"),
]


def check_all(logits: Tensor, *, key: object, objectives: list[Objective] = OBJECTIVES_HERE) -> None:
    """Loss and gradients by the forward's gradient, by the backward's, and in the logits' place."""
    for objective in objectives:
        target, weight = objective.target(logits, key), objective.weight(logits, key)
        options, reason = objective.options(), f"{key} {objective.id}"
        check(logits, target, weight, reason=reason, **options)
        check(logits, target, weight, grad_output=grad_output_for(logits, objective.reduction, key), **options)
        exact = reference(logits, target, weight, **options)["input"]
        leaf = logits.detach().requires_grad_()
        loss = ext.cross_entropy(leaf, target, weight, **options)
        (made,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
        assert_as_exact(made, exact, None, arithmetic=arithmetic_of(logits), name=reason)
        leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        memory = leaf * 1
        ext.cross_entropy(memory, target, weight, inplace=True, **options).sum().backward()
        assert_as_exact(leaf.grad, exact, None, arithmetic=arithmetic_of(logits), name=f"{reason}, in place")


def logits_of(
    shape: tuple[int, ...], dtype: torch.dtype, order: tuple[int, ...] | None = None, offset: int = 0
) -> Tensor:
    values = torch.randn(shape, generator=generator(shape, dtype), dtype=torch.double) * 3
    return place(values.to(dtype), order=order, offset=offset)


def index_target(logits: Tensor) -> Tensor:
    return torch.zeros([size for d, size in enumerate(logits.shape) if d != 1], dtype=torch.long)


# ---- launch decisions: every one, at its boundaries --------------------------------------------------------

half, single, double = torch.bfloat16, torch.float32, torch.float64
NHWC, NTC = (0, 2, 3, 1), (0, 2, 1)
small_rows, rows, spatial, strided = ({"family": name} for name in ("small_rows", "rows", "spatial", "strided"))
warp, block, cluster = (rows | {"team": name, "copied": True} for name in ("warp", "block", "cluster"))
reread = rows | {"team": "block", "copied": False}
tiles, direct, scalar = (
    spatial | {"vectors": vectors, "copied": copied}
    for vectors, copied in ((True, True), (True, False), (False, False))
)
DECISIONS = [
    # one thread for a row to a whole warp: the power of two in C, and more where a tile would be too large; few rows in
    # tiles that are many
    ("h200", single, (70, 1), None, small_rows | {"lanes_per_row": 1, "classes_per_lane": 1, "rows_per_tile": 32}),
    ("one", single, (9000, 1), None, small_rows | {"lanes_per_row": 1, "rows_per_tile": 96}),
    ("one", single, (700, 255), None, small_rows | {"lanes_per_row": 16, "rows_per_tile": 4}),
    ("h200", single, (300, 7), None, small_rows | {"lanes_per_row": 1, "classes_per_lane": 7}),
    ("h200", single, (333, 10), None, small_rows | {"lanes_per_row": 1, "classes_per_lane": 10}),
    ("h200", single, (65, 8), None, small_rows | {"lanes_per_row": 2, "classes_per_lane": 4}),
    ("h200", half, (65, 24), None, small_rows | {"lanes_per_row": 2}),
    ("h200", half, (65, 48), None, small_rows | {"lanes_per_row": 4}),
    ("h200", single, (33, 32), None, small_rows | {"lanes_per_row": 8}),
    ("h200", single, (19, 255), None, small_rows | {"lanes_per_row": 16, "rows_per_tile": 2}),
    ("h200", single, (9, 256), None, small_rows | {"lanes_per_row": 16}),
    ("h200", half, (9, 512), None, small_rows | {"lanes_per_row": 32}),
    ("h200", double, (9, 128), None, small_rows),
    ("h200", single, (2, 19, 5, 7), NHWC, small_rows | {"lanes_per_row": 1}),
    ("h200", single, (3, 5, 4), None, small_rows),  # a run too short for the spatial kernel
    # a warp, a block or a cluster for a row
    ("h200", single, (9, 257), None, warp),
    ("h200", half, (9, 513), None, warp),
    ("h200", half, (5, 4096), None, warp),
    ("h200", single, (5, 2048), None, warp),
    ("h200", single, (5, 2049), None, block),
    ("h200", half, (5, 4099), None, block),
    ("h200", double, (5, 1025), None, block),
    ("h200", single, (2, 300, 7), NTC, warp),
    ("h200", half, (3, 37376), None, block),
    ("h200", half, (2, 38000), None, cluster | {"cluster": 2}),
    ("h200", half, (2, 128256), None, cluster | {"cluster": 4}),
    ("h200", single, (1, 262144), None, cluster | {"cluster": 8}),
    ("h200", half, (1, 1000003), None, reread),
    ("a100", half, (2, 81000), None, block),
    ("a100", half, (2, 83000), None, reread),
    ("small", single, (5, 3000), None, block),
    ("small", single, (3, 4001), None, reread),
    ("small", half, (3, 9001), None, reread),
    ("small-clusters", single, (20, 2051), None, cluster | {"cluster": 2}),
    ("small-clusters", half, (20, 9001), None, cluster | {"cluster": 4}),
    ("small-clusters", single, (20, 8191), None, cluster | {"cluster": 8}),
    ("small-clusters", double, (5, 1601), None, cluster | {"cluster": 4}),
    # runs of positions: vectors of them, or one by one; one thread for all classes, or slices of them
    ("h200", single, (2, 19, 12, 40), None, tiles | {"slices": 1}),
    ("h200", half, (2, 19, 8, 130), None, tiles | {"slices": 1}),
    ("h200", half, (2, 19, 2, 20), None, tiles | {"slices": 16}),
    ("h200", single, (2, 23, 600), None, tiles | {"slices": 2}),
    ("h200", single, (2, 150, 132), None, tiles | {"slices": 8}),
    ("h200", double, (2, 21, 40), None, tiles),
    ("h200", single, (1, 700, 64), None, tiles | {"slices": 32}),
    ("h200", single, (1, 3600, 12), None, direct | {"slices": 32}),
    ("small", half, (1, 300, 16), None, direct),
    ("h200", single, (2, 19, 5, 5), None, scalar),
    ("h200", half, (2, 70, 131), None, scalar),
    ("h200", single, (2, 5, 3, 3, 7), None, scalar),
    ("h200", single, (300, 70), (1, 0), tiles),  # (C, N) transposed
    # everything else
    ("h200", single, (3, 300, 4), None, strided | {"team": "warp"}),
    ("h200", single, (2, 3001, 4), None, strided | {"team": "block"}),
]


@pytest.mark.parametrize(("device", "dtype", "shape", "order", "plan"), DECISIONS, ids=str)
def test_launch_decisions(kernels: ModuleType, device: str, dtype: torch.dtype, shape, order, plan: dict) -> None:
    kernels.set_device(*DEVICES[device])
    logits = logits_of(shape, dtype, order)
    chosen = kernels.plan(logits, index_target(logits))
    assert {name: chosen[name] for name in plan} == plan
    large = logits.numel() > 200_000
    check_all(logits, key=(device, shape), objectives=OBJECTIVES_HERE[1::2] if large else OBJECTIVES_HERE)


@pytest.mark.parametrize(("device", "dtype", "shape", "order", "plan"), DECISIONS, ids=str)
def test_one_pass(kernels: ModuleType, device: str, dtype: torch.dtype, shape, order, plan: dict) -> None:
    """The gradient that the forward makes: in the logits' place it has the same bits, and nothing is saved for a
    backward. Made again, for another grad_output, it is what a backward makes of what a forward saved."""
    kernels.set_device(*DEVICES[device])
    logits = logits_of(shape, dtype, order)
    objectives = OBJECTIVES_HERE[1:4:2] if logits.numel() < 100_000 else OBJECTIVES_HERE[:1]
    for objective in objectives:
        target, weight = objective.target(logits, shape), objective.weight(logits, shape)
        options = numbered(0, 0, reduction=objective.reduction, label_smoothing=objective.label_smoothing, loss_dtype=6)
        others = (target, [weight], *options)
        loss, lse, denominator, gradient = ops._forward_backward(logits, *others)
        assert lse.numel() == 0
        overwritten = logits.clone(memory_format=torch.preserve_format)
        own_loss, _, own_denominator = ops._forward_backward_(overwritten, *others)
        assert_close((own_loss, own_denominator), (loss, denominator), equal_nan=True)
        exact = reference(logits, target, weight, **objective.options())["input"]
        assert_as_exact(overwritten, exact, None, arithmetic=arithmetic_of(logits), name=objective.id)
        if kernels.plan(logits, target)["family"] in ("small_rows", "rows") and logits.stride(1) == 1:
            assert torch.equal(overwritten, gradient)

        grad_output = torch.tensor(0.75)
        _, saved, _ = ops._forward(logits, *others)
        assert saved.numel() > 0
        expected, _ = ops._backward(
            grad_output, denominator, logits, *others[:2], saved, denominator, *options, [True, False]
        )
        ops._adapt_gradient_(grad_output, denominator, logits, *others[:2], lse, denominator, *options, gradient)
        assert_close(gradient, expected, rtol=16 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


OTHER_NUMBERS = {
    "small_row_bytes": (64, 4096),
    "warp_row_bytes": (1, 65536),
    "small_tile_bytes": (1, 16384),
    "small_rows_of_thread": (1, 64),
    "row_blocks": (1, 8),
    "spatial_blocks": (1, 16),
    "short_run": (1, 1000),
    "most_slices": (1, 4, 1000),
    "classes_of_thread": (1, 1000),
    "warp_classes": (1, 100_000),
}


@pytest.mark.parametrize("name", OTHER_NUMBERS)
def test_other_numbers(kernels: ModuleType, name: str) -> None:
    """What measurements may choose changes the launch, and not the result."""
    plans = {}
    for value in OTHER_NUMBERS[name]:
        before = kernels.tune(name, value)
        try:
            for device, dtype, shape, layout in SCHEDULED:
                kernels.set_device(*DEVICES[device])
                logits = logits_of(shape, dtype, layout)
                plans.setdefault(shape, []).append(kernels.plan(logits, index_target(logits)))
                target, weight = OBJECTIVES_HERE[1].target(logits, shape), OBJECTIVES_HERE[1].weight(logits, shape)
                check(logits, target, weight, reason=f"{name}={value}, {shape}")
        finally:
            assert kernels.tune(name, before) == value
    assert any(first != second for first, second, *_ in plans.values())


def test_fewer_clusters_than_there_is_room_for(kernels: ModuleType) -> None:
    kernels.set_device(*DEVICES["small-clusters"])
    for shape, dtype in [((5, 8191), single), ((5, 9001), half)]:  # more rows than clusters
        logits = logits_of(shape, dtype)
        assert kernels.plan(logits, index_target(logits))["team"] == "cluster"
        for most in (1, 2):
            before = kernels.set_most_clusters(most)
            try:
                check_all(logits, key=("clusters", shape))
            finally:
                kernels.set_most_clusters(before)


@pytest.mark.parametrize("largest", [4, 2, 1])
def test_clusters_that_do_not_fit(kernels: ModuleType, largest: int) -> None:
    """As on a part of a GPU: smaller ones, or rows that are read twice. The emulator refuses to launch others."""
    kernels.set_device(*DEVICES["small-clusters"])
    before = kernels.set_largest_cluster(largest)
    try:
        for shape in [(4, 8191), (3, 20_000)]:  # which fit half a cluster, and do not
            logits = logits_of(shape, single)
            assert kernels.plan(logits, index_target(logits))["cluster"] == 8
            check(logits, index_target(logits), reduction="mean")
    finally:
        kernels.set_largest_cluster(before)


def test_measuring_other_numbers(kernels: ModuleType) -> None:
    """benchmarks.tune finds every number, and puts it back."""
    records = []
    for name, (values, cases) in tune.NUMBERS.items():
        in_use = kernels.tune(name, 1)
        kernels.tune(name, in_use)
        found = tune.measured(kernels.tune, name, values[:2], cases[0], cases[0].quick, "cpu", 0.0)
        assert {record["value"] for record in found} == {*values[:2], in_use}
        assert [record["value"] for record in found if record["in_use"]] == [in_use, in_use]
        assert all(record["copies"] > 0 for record in found) and kernels.tune(name, in_use) == in_use
        records += found
    assert len(tune.table(records).rows) == len(tune.NUMBERS)


def test_numbers_that_there_are_not(kernels: ModuleType) -> None:
    for name, value in [("row_blocks", 0), ("row_block", 2)]:
        with pytest.raises(ValueError, match="tunable"):
            kernels.tune(name, value)


BOUNDARIES = {
    # around the vector, the warp, the tile, the stages of copies, the block
    "small": [*range(1, 34), 63, 64, 65, 127, 128, 129, 255, 256],
    "warp": [257, 260, 263, 383, 384, 385, 511, 512, 513, 640, 1023, 1024, 1025, 2047, 2048],
    "block": [2049, 2052, 3071, 3072, 3073, 4095, 4096, 4097, 8191, 8193],
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("group", BOUNDARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_classes_around_every_boundary(dtype: torch.dtype, group: str) -> None:
    scale = 4 // dtype.itemsize if dtype.itemsize < 8 else 1
    for classes in BOUNDARIES[group]:
        classes = classes * scale + (classes % 3) * (scale - 1)
        offset = classes % 5  # most rows are not aligned, and each differently
        logits = logits_of((5, classes), dtype, offset=offset)
        check_all(
            logits, key=("boundary", classes), objectives=OBJECTIVES_HERE[:3:2] if classes > 100 else OBJECTIVES_HERE
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_inner_sizes_around_every_boundary(dtype: torch.dtype) -> None:
    for inner in [*range(8, 20), 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1024, 1032]:
        logits = logits_of((2, 5 if inner > 100 else 21, inner), dtype, offset=inner % 2)
        check_all(logits, key=("inner", inner), objectives=OBJECTIVES_HERE[1:4:2])


@pytest.mark.parametrize("dtype", [half, single, double], ids=name_of)
def test_a_gradient_that_lies_otherwise_than_the_logits(dtype: torch.dtype) -> None:
    """Logits off the 16-byte grid, or with gaps, have a gradient that is on it and has none."""
    for shape in [(7, 30), (7, 900), (5, 6000), (2, 16, 24)]:
        for offset, margin in [(1, 0), (0, 1), (3, 5)]:
            values = torch.randn(shape, generator=generator(shape), dtype=torch.double).to(dtype)
            logits = place(values, offset=offset, margin={len(shape) - 1: margin} if margin else None)
            check_all(logits, key=(shape, offset, margin), objectives=OBJECTIVES_HERE[:4])


@pytest.mark.parametrize("dtype", [half, single], ids=name_of)
def test_probabilities_that_lie_otherwise_than_the_logits(dtype: torch.dtype) -> None:
    """Not read as vectors: another dtype, alignment or order; float64 ones make the arithmetic double."""
    for shape in [(5, 40), (5, 700), (3, 5000), (2, 24, 16)]:
        logits = logits_of(shape, dtype)
        soft = torch.randn(shape, generator=generator(shape, "soft"), dtype=torch.double).softmax(1)
        for q in (
            soft.to(dtype),
            soft.float(),
            soft,
            place(soft.to(dtype), offset=1),
            place(soft.to(dtype), step={1: 2}),
        ):
            check(logits, q, label_smoothing=0.1, reason=f"{shape} {q.dtype}")
            check(logits, q, reduction="none", grad_output=grad_output_for(logits, "none", shape))


MASKED = [
    ("h200", (5, 21)),
    ("h200", (5, 300)),
    ("h200", (3, 2600)),
    ("small", (2, 5000)),
    ("small-clusters", (3, 9001)),
    ("h200", (2, 21, 40)),
    ("h200", (1, 150, 36)),
    ("small", (1, 300, 32)),
    ("h200", (2, 21, 15)),
    ("h200", (2, 300, 3)),
]


@pytest.mark.parametrize(("device", "shape"), MASKED, ids=str)
def test_masked_classes(kernels: ModuleType, device: str, shape: tuple[int, ...]) -> None:
    """Whole vectors of -inf, before the maximum or after it: nothing to the sums, zero in the gradient. Their
    probabilities are zero, which times infinity is to be nothing."""
    kernels.set_device(*DEVICES[device])
    classes = torch.arange(shape[1])
    last = classes[-1]
    for mask in (classes < 20, classes >= classes.numel() // 2, classes % 3 == 1, classes != 3, classes != last):
        for dtype in (half, single):
            values = torch.randn(shape, generator=generator(shape), dtype=torch.double).to(dtype)
            logits = values.movedim(1, -1).masked_fill(mask, -torch.inf).movedim(-1, 1).contiguous()
            allowed = classes[~mask]
            positions = index_target(logits).shape
            target = allowed[torch.randint(allowed.numel(), positions, generator=generator(shape))]
            check(logits, target, reason=f"{shape}, {int(mask.sum())} masked")
            check(logits, target.clone().fill_(classes[mask][0]), reduction="none")  # an infinite loss
            soft = torch.where(logits == -torch.inf, 0, logits.double().softmax(1)).to(dtype)
            check(logits, soft, reason=f"{shape}, probabilities, {int(mask.sum())} masked")


# ---- schedules ---------------------------------------------------------------------------------------------

SCHEDULED = [
    # device, dtype, shape, order of dimensions: every kernel, several tiles or rows for each block, and for each warp
    ("h200", half, (2000, 10), None),
    ("h200", single, (90, 100), None),
    ("one", half, (99, 511), None),  # and a last tile with fewer rows
    ("one", half, (3000, 10), None),  # several turns for each thread in a tile
    ("h200", single, (70, 300), None),
    ("h200", half, (40, 4100), None),
    ("h200", single, (2, 150, 132), None),
    ("h200", half, (3, 21, 260), None),
    ("small", single, (30, 4100), None),
    ("small", single, (2, 300, 160), None),
    ("small-clusters", half, (20, 9001), None),
    ("small-clusters", single, (40, 5000), None),
    ("h200", single, (3, 3001, 4), None),
    ("h200", single, (9, 300, 5), None),
]


def loss_and_gradient(objective: Objective, logits: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    key, leaf = tuple(logits.shape), logits.detach().requires_grad_()
    target, weight = objective.target(logits, key), objective.weight(logits, key)
    options = objective.options() | {"reduction": reduction}
    loss = ext.cross_entropy(leaf, target, weight, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf, torch.ones_like(loss))[0]


every_schedule = pytest.mark.parametrize(("order", "seed"), SCHEDULES)
scheduled = pytest.mark.parametrize(("device", "dtype", "shape", "layout"), SCHEDULED, ids=str)


@pytest.mark.thin(8)
@every_schedule
@scheduled
def test_schedules(kernels: ModuleType, device: str, dtype: torch.dtype, shape, layout, order: str, seed: int) -> None:
    """Whichever thread, warp or block is last: the same bits as in order, and those are checked above."""
    kernels.set_device(*DEVICES[device])
    logits = logits_of(shape, dtype, layout)
    for objective in OBJECTIVES_HERE[1:4]:
        for reduction in ("mean", "none"):
            kernels.set_schedule("in_order", 0)
            expected = loss_and_gradient(objective, logits, reduction)
            kernels.set_schedule(order, seed)
            for got, right in zip(loss_and_gradient(objective, logits, reduction), expected, strict=True):
                assert torch.equal(got, right), (objective.id, reduction)


@pytest.mark.thin(8)
@every_schedule
@scheduled
def test_schedules_in_place(
    kernels: ModuleType, device: str, dtype: torch.dtype, shape, layout, order: str, seed: int
) -> None:
    """Where the gradient takes the logits' place from the same read, every thread has read before any writes."""
    kernels.set_device(*DEVICES[device])
    logits = logits_of(shape, dtype, layout)
    for objective in OBJECTIVES_HERE[1:4:2]:
        options = numbered(0, 0, reduction="mean", label_smoothing=objective.label_smoothing, loss_dtype=6)
        others = objective.target(logits, shape), [objective.weight(logits, shape)], *options
        kernels.set_schedule("in_order", 0)
        loss, _, _, gradient = ops._forward_backward(logits, *others)
        kernels.set_schedule(order, seed)
        overwritten = logits.clone(memory_format=torch.preserve_format)
        own_loss, *_ = ops._forward_backward_(overwritten, *others)
        assert torch.equal(own_loss, loss), objective.id
        if logits.stride(1) == 1:
            assert torch.equal(overwritten, gradient), objective.id


def test_in_place_with_a_denominator_of_zero(kernels: ModuleType) -> None:
    """Whether `empty` makes it one depends on the loss, which the gradient does not wait for."""
    logits = logits_of((6, 40), single)
    target = torch.arange(6)
    for sample_weight, divisor in [(None, torch.zeros((), dtype=torch.double)), (torch.tensor([1.0, -1] * 3), None)]:
        integers, numbers = numbered(0, 0, reduction="mean", loss_dtype=6)
        integers[3] |= 1  # empty='zero'
        others = (target, [None, None, sample_weight, divisor], integers, numbers)
        ops._forward_backward_(overwritten := logits.clone(), *others)
        assert not overwritten.isfinite().all(1).any()


# ---- any target, transformed logits, statistics ------------------------------------------------------------

# Kernels that take everything: of rows, and of any strides.
GENERAL_DECISIONS = [
    ("h200", single, (70, 1), None, warp),
    ("h200", single, (33, 10), None, warp),
    ("h200", half, (5, 4096), None, warp),
    ("h200", double, (5, 300), None, warp),
    ("h200", single, (3, 2049), None, block),
    ("h200", half, (2, 38000), None, cluster | {"cluster": 2}),
    ("small", single, (3, 4001), None, reread),
    ("small-clusters", half, (9, 9001), None, cluster | {"cluster": 4}),
    ("h200", single, (2, 19, 5, 7), NHWC, warp),
    ("h200", single, (2, 19, 12, 40), None, strided | {"team": "warp"}),
    ("h200", single, (2, 2100, 3), None, strided | {"team": "block"}),
]
GENERAL = ("indices", "statistics", "pairs", "distillation")


def results_of(name: str, logits: Tensor, reduction: str = "mean", dtype: torch.dtype = double) -> list[Tensor]:
    """A loss with every option that its target has, and all gradients; of the values that `logits` have in `dtype`."""
    g = generator(name, tuple(logits.shape))
    shape, positions, k = logits.shape, index_target(logits).shape, 5

    def numbers(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, dtype=double)

    leaf = logits.detach().requires_grad_()
    options = {"reduction": reduction, "sample_weight": numbers(*positions).to(single)}
    transform = {"z_loss": 0.1, "softcap": 5.0, "logit_scale": 0.7, "label_smoothing": 0.1}
    weight = numbers(shape[1]).to(dtype).to(logits.dtype)
    target = torch.randint(shape[1], positions, generator=g)
    target.view(-1)[1::5] = -100
    leaves = [leaf]
    if name == "indices":
        losses = [ext.cross_entropy(leaf, target, weight, **options, **transform)]
    elif name == "statistics":
        stats = ext.cross_entropy_with_stats(leaf, target, weight, **options, **transform)
        losses = [stats.loss, stats.lse, stats.target_log_prob, stats.entropy]
    elif name == "pairs":
        indices = torch.randint(min(shape[1], 7), (shape[0], k, *shape[2:]), generator=g)
        indices[numbers(*indices.shape) < 0.3] = -100
        probs = numbers(*indices.shape).to(single).requires_grad_()
        leaves.append(probs)
        losses = [ext.sparse_cross_entropy(leaf, indices, probs, weight, **options, **transform)]
    else:
        teacher = (numbers(*shape) * 6).to(dtype).to(logits.dtype).requires_grad_()
        leaves.append(teacher)
        losses = [ext.distillation_loss(leaf, teacher, target, temperature=2.0, alpha=0.3, **options)]
    seeds = [numbers(*loss.shape).to(single).to(loss.dtype) for loss in losses]
    return [loss.detach() for loss in losses] + list(torch.autograd.grad(losses, leaves, seeds))


@pytest.mark.parametrize(("device", "dtype", "shape", "order", "plan"), GENERAL_DECISIONS, ids=str)
def test_launch_decisions_of_general_tasks(kernels: ModuleType, device: str, dtype: torch.dtype, shape, order, plan):
    """Each kernel against the CPU's own in float64; accuracy is for the tests of values."""
    kernels.set_device(*DEVICES[device])
    logits = logits_of(shape, dtype, order)
    chosen = kernels.plan(logits, index_target(logits), general=True)
    assert {name: chosen[name] for name in plan} == plan
    for name in GENERAL:
        for reduction in ("none", "mean") if logits.numel() < 10_000 else ("mean",):
            got = results_of(name, logits, reduction, dtype)
            kernels.uninstall()
            expected = results_of(name, logits.double(), reduction, dtype)
            kernels.install()
            for result, right in zip(got, expected, strict=True):
                scale = right.abs().max()
                close = {half: 0.01, single: 1e-5, double: 1e-7}[dtype] * scale  # probabilities are single
                assert (result - right).abs().max() <= close, (name, reduction)


def test_double_arithmetic_of_general_tasks(kernels: ModuleType) -> None:
    """A float64 teacher of float32 logits: neither is converted, and no kernel of float32 arithmetic is used."""
    logits, teacher = logits_of((3, 300), single), logits_of((3, 300), double, offset=1)
    target = torch.tensor([5, -100, 299])
    got = ext.distillation_loss(logits, teacher, target, temperature=3.0, alpha=0.4)
    kernels.uninstall()
    right = ext.distillation_loss(logits.double(), teacher, target, temperature=3.0, alpha=0.4)
    torch.testing.assert_close(got, right, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("order", "seed"), SCHEDULES[::2])
def test_schedules_of_general_tasks(kernels: ModuleType, order: str, seed: int) -> None:
    """Above all the gradients of pairs' classes, which are written over those of all classes."""
    for device, dtype, shape in [
        ("one", half, (9, 300)),
        ("h200", single, (5, 2100)),
        ("small-clusters", single, (5, 2051)),
        ("h200", single, (2, 40, 5)),
        ("h200", single, (1, 2100, 3)),
    ]:
        kernels.set_device(*DEVICES[device])
        logits = logits_of(shape, dtype)
        for name in GENERAL[1:]:
            kernels.set_schedule("in_order", 0)
            expected = results_of(name, logits, "mean", dtype)
            kernels.set_schedule(order, seed)
            for got, right in zip(results_of(name, logits, "mean", dtype), expected, strict=True):
                assert torch.equal(got, right), (shape, name)


@pytest.mark.parametrize("shape", [(4, 30), (4, 2100), (2, 30, 2)], ids=str)
def test_bad_classes_of_pairs_and_labels(kernels: ModuleType, shape: tuple[int, ...]) -> None:
    """Wherever the class is, among the pairs or besides a teacher: reported, and the others are right."""
    logits = logits_of(shape, single).requires_grad_()
    positions = index_target(logits).shape
    indices = torch.zeros(shape[0], 3, *shape[2:], dtype=torch.long)
    indices[1, 2] = shape[1] + 5
    labels = torch.zeros(positions, dtype=torch.long)
    labels[1] = -7
    probs, teacher = torch.ones(indices.shape), logits.detach() + 1
    for bad, make_loss in [
        (shape[1] + 5, lambda: ext.sparse_cross_entropy(logits, indices, probs, reduction="none")),
        (-7, lambda: ext.distillation_loss(logits, teacher, labels, alpha=0.5, reduction="none")),
    ]:
        loss = make_loss()
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            kernels.check_errors()
        assert loss.isnan().equal(torch.arange(shape[0]).eq(1).view(-1, *[1] * (loss.dim() - 1)).expand(loss.shape))
        (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
        assert grad.isfinite().all() and not grad[1].any() and grad[0].any()
        with pytest.raises(IndexError):
            kernels.check_errors()


@pytest.mark.parametrize(("device", "dtype", "shape", "order"), [d[:4] for d in GENERAL_DECISIONS], ids=str)
def test_launch_decisions_of_shards(kernels: ModuleType, device: str, dtype: torch.dtype, shape, order) -> None:
    """Each kernel on the larger of two shards, and on whichever the other asks for."""
    kernels.set_device(*DEVICES[device])
    shape = (shape[0], shape[1] * 3 // 2, *shape[2:])
    logits, positions = logits_of(shape, dtype, order), index_target(logits_of(shape, dtype)).shape
    random = generator("shards", shape)
    labels = torch.randint(shape[1], positions, generator=random)
    labels.view(-1)[1::5] = -100
    indices = torch.randint(shape[1], (shape[0], 3, *shape[2:]), generator=random)
    weight = torch.rand(shape[1], generator=random).to(dtype)
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0, "roundings": 12}
    check_call(sharded(ext.cross_entropy_with_stats, 2), logits, labels, weight, **options)
    check_call(sharded(ext.sparse_cross_entropy, 2), logits, indices, torch.ones(indices.shape), weight, **options)


@pytest.mark.parametrize("shape", [(4, 30), (4, 2100), (2, 30, 2)], ids=str)
def test_bad_classes_of_shards(kernels: ModuleType, shape: tuple[int, ...]) -> None:
    """One that no shard has is reported by all, with the number of all classes; one that another has is none."""
    logits, total = logits_of(shape, single), 2 * shape[1]
    positions = index_target(logits).shape
    first = torch.arange(shape[0]).eq(0).view(-1, *[1] * (len(positions) - 1)).expand(positions)
    for begin in (0, shape[1] // 2, shape[1]):
        for bad in (total, -1):
            labels = torch.full(positions, total - 1)
            arguments = numbered(begin, total)
            ops._forward(logits, labels, [], *arguments)
            kernels.check_errors()
            labels[0] = bad
            loss, saved, one = ops._forward(logits, labels, [], *arguments)
            with pytest.raises(IndexError, match=rf"Target {bad} is out of bounds\. .* over {total} classes"):
                kernels.check_errors()
            assert torch.equal(loss.isnan(), first)
            g = torch.ones(positions, dtype=double)
            rest = (logits, labels, [], saved, one, *arguments, [True, False])
            gradient, _ = ops._backward(g, one, *rest)
            assert gradient.isfinite().all() and not gradient[0].any()
            with pytest.raises(IndexError):
                kernels.check_errors()


# ---- without Python: the whole program under sanitizers --------------------------------------------------

PROGRAMS = {
    "plain": [],
    "memory": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "races": ["-fsanitize=thread"],  # between CUDA threads: a missing barrier, whatever the schedule
}


# Only "races" finds a missing __syncwarp that no schedule turns into other bits.
@pytest.mark.parametrize(
    "kind", [kind if kind == "races" else pytest.param(kind, marks=pytest.mark.long) for kind in PROGRAMS]
)
def test_kernels_alone(kind: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}

    def run(*command: object) -> str:
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    sources = {"kernels_alone": build.HERE / "kernels_alone.cpp", "plan": build.SOURCE / "cuda" / "plan.cpp"}
    sources |= {name: build.SOURCE / "cuda" / f"{name}.cu" for name in ("kernels_float32", "launch")}
    options = [*build.FLAGS, *build.WARNINGS, *build.INCLUDES, *PROGRAMS[kind]]
    for name, source in sources.items():
        run(build.compiler(), *options, "-x", "c++", "-c", source, "-o", tmp_path / f"{name}.o")
    program = tmp_path / "program"
    run(build.compiler(), *PROGRAMS[kind], *tmp_path.glob("*.o"), "-o", program)
    for order, seed in {"plain": [*product(range(6), (2, 3))], "memory": [(0, 0), (5, 3)]}.get(kind, [(0, 2), (4, 3)]):
        said = run(program, order, seed)
        assert "0 wrong" in said and "WARNING" not in said, said[-3000:]


# ---- targets that are no class -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 10), (6, 400), (6, 5000), (2, 21, 16), (2, 21, 9), (2, 300, 3)], ids=str)
@pytest.mark.parametrize("value", [-1, "C", 2**40, -(2**62)])
def test_a_target_that_is_no_class(kernels: ModuleType, shape: tuple[int, ...], value: int | str) -> None:
    """Nothing is read for it: its loss is NaN, its gradient zero, the others are right; then an IndexError, once."""
    logits = logits_of(shape, single)
    classes = shape[1]
    bad = classes if value == "C" else value
    good = torch.randint(classes, index_target(logits).shape, generator=generator(shape))
    target = good.clone()
    target.view(-1)[3] = bad
    exact = reference(logits, good, reduction="none")
    where = torch.zeros(good.shape, dtype=torch.bool)
    where.view(-1)[3] = True

    for reduction in ("none", "mean"):
        leaf = logits.detach().requires_grad_()
        loss = ext.cross_entropy(leaf, target, reduction=reduction)
        with pytest.raises(
            IndexError, match=rf"Target {bad} is out of bounds\. \(Position 3 of .* over {classes} classes"
        ):
            kernels.check_errors()
        kernels.check_errors()
        assert loss.isnan().equal(where if reduction == "none" else torch.tensor(True))
        (grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
        if reduction == "none":
            with pytest.raises(IndexError):  # the backward's kernel has seen it too
                ext.cross_entropy(logits, good)
        assert grad.isfinite().all() and not grad.movedim(1, -1)[where].any()
        others = ~where.unsqueeze(1).expand(shape)
        share = 1 if reduction == "none" else 1 / (good.numel() - 1)
        torch.testing.assert_close(grad[others], (exact["input"].value * share)[others].float(), rtol=1e-4, atol=1e-6)
    assert ext.cross_entropy(logits, good).isfinite()


def test_the_next_call_raises(kernels: ModuleType) -> None:
    logits = torch.randn(4, 5)
    ext.cross_entropy(logits, torch.tensor([0, 1, 7, 9]))
    with pytest.raises(IndexError, match=r"Target (7|9) is out of bounds"):
        ext.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    assert ext.cross_entropy(logits, torch.zeros(4, dtype=torch.long)).isfinite()


# ---- the gradient that the forward made --------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.0, 0.3, 65536.0, float("nan")])
@pytest.mark.parametrize("dtype", [half, single], ids=name_of)
def test_a_gradient_made_for_one_and_wanted_for_another(dtype: torch.dtype, scale: float) -> None:
    """It is made anew, with one rounding; where it is for one, the very tensor of the forward is handed over, once."""
    for shape in [(9, 21), (9, 600), (3, 6000), (2, 21, 32), (2, 300, 3)]:
        logits = logits_of(shape, dtype)
        target = torch.randint(shape[1], index_target(logits).shape, generator=generator(shape))
        target.view(-1)[1] = -100
        exact = reference(logits, target, grad_output=torch.tensor(scale))["input"]
        leaf = logits.detach().requires_grad_()
        loss = ext.cross_entropy(leaf, target)
        first, second = (
            torch.autograd.grad(loss, leaf, torch.tensor(scale).to(dtype), retain_graph=True)[0] for _ in "ab"
        )
        assert first.data_ptr() != second.data_ptr()
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
        if scale == scale:
            exact = reference(logits, target, grad_output=torch.tensor(scale).to(dtype))["input"]
            assert_as_exact(first, exact, None, arithmetic=arithmetic_of(logits))
        else:  # ignored positions keep their zeros
            ignored = (target == -100).unsqueeze(1).expand(shape)
            assert first[~ignored].isnan().all() and not first[ignored].any()


def test_exponentials_below_the_normal_numbers_are_zero() -> None:
    """As `ex2.approx.ftz` has them: far from a gradient's smallest number where grad_output is large. Around the border
    the oracle allows zeros and no more; in float64 none vanishes."""
    gaps = torch.linspace(80, 110, 61, dtype=torch.double)
    for classes in (61, 600, 6000):
        rows = torch.zeros(2, classes, dtype=torch.double)
        rows[:, 1:62] = -gaps[: classes - 1]
        rows[:, 62:] = -95.0
        for dtype, options in product((single, double), ({}, {"label_smoothing": 0.1})):
            logits = rows.to(dtype)
            for scale in (1.0, 65536.0):
                grad_output = torch.tensor(scale, dtype=dtype)
                check(logits, torch.zeros(2, dtype=torch.long), grad_output=grad_output, reduction="sum", **options)
        leaf = rows.float().requires_grad_()
        loss = ext.cross_entropy(leaf, torch.zeros(2, dtype=torch.long), reduction="sum")
        (grad,) = torch.autograd.grad(loss, leaf, torch.tensor(65536.0))
        assert ((grad[:, 1:61] == 0) == (gaps[:60] > 87.4).expand(2, -1)).all()


def test_positions_without_classes_to_speak_of(kernels: ModuleType) -> None:
    for shape in [(0, 5), (0, 5000), (0, 5, 8), (2, 5, 0), (3, 1), (3, 1, 16), (1, 1)]:
        logits = torch.randn(shape, requires_grad=True)
        for reduction in ("mean", "sum", "none"):
            loss = ext.cross_entropy(logits, index_target(logits), reduction=reduction)
            native = torch.nn.functional.cross_entropy(logits, index_target(logits), reduction=reduction)
            torch.testing.assert_close(loss, native, equal_nan=True)
            grad = torch.autograd.grad(loss, logits, torch.ones_like(loss))[0]
            assert grad.shape == logits.shape and not grad.any()

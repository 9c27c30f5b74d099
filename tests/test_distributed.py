"""Logits whose classes, or positions, are sharded over processes: values and gradients against the oracle of the whole,
what the processes say to each other, and what they raise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import distributed_tasks
import processes
import pytest
import torch
from cases import DTYPES, OBJECTIVES, Case, generator, name_of
from distributed_tasks import same_bits
from oracle_targets import Upstream, check_call
from target_cases import TARGETS, Target, logits_of
from torch import Tensor

from cross_entropy_ext import functional as ext

inf, nan = math.inf, math.nan
MOST = 4
every_world = pytest.mark.parametrize("ranks", range(1, MOST + 1))


@pytest.fixture(scope="module")
def pool() -> Iterator[processes.Pool]:
    pool = processes.Pool(MOST)
    yield pool
    pool.close()


# ------------------------------------------------------------------------------------------------------------
# A call on all ranks looks like one in this process.


class Remote(torch.autograd.Function):
    """Arguments go to the ranks, results and gradients come back; which are the same on all of them."""

    @staticmethod
    def forward(ctx, world: World, request: dict, names: tuple[str, ...], *tensors: Tensor):
        arguments = {name: tensor.detach() for name, tensor in zip(names, tensors, strict=True)}
        answers = world.forward(arguments, request)
        for other in answers[1:]:
            assert all(same_bits(answers[0][name], other[name]) for name in answers[0]), "ranks have other results"
        ctx.world, ctx.names, ctx.outputs = world, names, list(answers[0])
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        outputs = tuple(answers[0].values())
        ctx.mark_non_differentiable(*[v for name, v in answers[0].items() if name in ("z_loss", "argmax")])
        return outputs

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        upstream = {name: g for name, g in zip(ctx.outputs, grads, strict=True) if g is not None}
        tensors = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        found = iter(ctx.world.backward(upstream, tensors))
        result = [
            next(found) if name == "input" or (name == "target" and tensor.is_floating_point()) else None
            for name, tensor in tensors.items()
        ]
        return None, None, None, *result


class World:
    """Some of the ranks, and how logits are sharded over them."""

    def __init__(self, pool: processes.Pool, ranks: int, sizes: list[int] | None = None) -> None:
        self.pool, self.ranks, self.sizes = pool, ranks, sizes

    def forward(self, arguments: dict[str, Tensor], request: dict) -> list[dict[str, Tensor]]:
        classes = arguments["input"].size(1 if arguments["input"].dim() > 1 else 0)
        if self.sizes is None:
            assert classes % self.ranks == 0
        self.split = self.sizes or [classes // self.ranks] * self.ranks
        assert sum(self.split) == classes
        even = self.sizes is None
        return self.pool.run("call", self.ranks, sizes=self.split, even=even, arguments=arguments, **request)

    def backward(self, upstream: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[Tensor]:
        shards = self.pool.run("backward", self.ranks, upstream=upstream)
        dim = 1 if tensors["input"].dim() > 1 else 0
        of = [tensors["input"], tensors["target"]]
        return [
            torch.empty_like(whole).copy_(torch.cat(parts, dim))
            for whole, parts in zip(of, zip(*shards, strict=True), strict=False)
        ]

    def function(self, name: str):
        """`functional.cross_entropy`, or its like with statistics, by these ranks."""
        statistics = name == "cross_entropy_with_stats"

        def remote(input, target, weight=None, sample_weight=None, **options):
            tensors = {"input": input, "target": target, "weight": weight, "sample_weight": sample_weight}
            tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
            request = {"statistics": statistics, "options": options}
            outputs = Remote.apply(self, request, tuple(tensors), *tensors.values())
            return ext.CrossEntropyStats(*outputs) if statistics else outputs[0]

        remote.__name__ = name
        return remote


class MeshWorld(World):
    """DTensors on a mesh."""

    def __init__(self, pool: processes.Pool, mesh: tuple[int, ...], placements: str, wrapped: bool = False) -> None:
        self.pool, self.mesh, self.placements, self.wrapped = pool, mesh, placements.split(), wrapped

    def forward(self, arguments: dict[str, Tensor], request: dict) -> list[dict[str, Tensor]]:
        ranks = math.prod(self.mesh)
        answers = self.pool.run(
            "call_dtensor",
            mesh=self.mesh,
            placements=self.placements,
            wrapped=self.wrapped,
            arguments=arguments,
            **request,
        )[:ranks]
        dim = 1 if arguments["input"].dim() > 1 else 0
        reduced = request["options"].get("reduction", "mean") != "none"
        for _, where in answers:
            for name, placements in where.items():
                expected = [
                    "R" if p in ("R", "P", f"S{dim}") else f"S{int(p[1]) - (int(p[1]) > dim)}" for p in self.placements
                ]
                scalar = reduced and name in ("loss", "z_loss")
                assert placements == (["R"] * len(expected) if scalar else expected), name
        return [outputs for outputs, _ in answers]

    def backward(self, upstream: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[Tensor]:
        whole = self.pool.run("backward_dtensor", mesh=self.mesh, upstream=upstream)[: math.prod(self.mesh)]
        for other in whole[1:]:
            assert all(same_bits(a, b) for a, b in zip(whole[0], other, strict=True))
        return [
            torch.empty_like(tensors[name]).copy_(g) for name, g in zip(("input", "target"), whole[0], strict=False)
        ]


# ------------------------------------------------------------------------------------------------------------
# Values.

PLAIN = [
    Target(
        objective.id,
        objective.reason,
        ext.cross_entropy,
        lambda d, o=objective: (
            (o.target(d.logits, d.key), o.weight(d.logits, d.key)),
            o.options(),
        ),
    )
    for objective in OBJECTIVES
]
OTHERS = [target for target in TARGETS if target.function in (ext.cross_entropy, ext.cross_entropy_with_stats)]
EVERY = PLAIN + OTHERS

# Classes for each rank: of logits of three shapes.
SIZES = {
    1: ([12], [1], [300]),
    2: ([6, 6], [5, 1], [37, 263]),
    3: ([4, 4, 4], [0, 5, 2], [100, 3, 197]),
    4: ([3, 3, 3, 3], [1, 2, 0, 4], [75, 75, 75, 75]),
}


def shapes(ranks: int) -> list[tuple[Case, list[int] | None]]:
    even, uneven, wide = SIZES[ranks]
    return [
        (Case("rows", "as many classes on each rank", (5, sum(even))), None),
        (
            Case(
                "image-last",
                "channels_last images, uneven shards or none",
                (2, sum(uneven), 3, 4),
                lambda v: v.contiguous(memory_format=torch.channels_last),
            ),
            uneven,
        ),
        (Case("image", "classes strided, several vectors", (1, sum(wide), 2, 19)), wide),
        (Case("vector", "no batch dimension", (sum(uneven),)), uneven),
    ]


def on(world: World, target: Target) -> Target:
    return replace(target, function=world.function(target.function.__name__))


@pytest.mark.thin(2)
@every_world
@pytest.mark.parametrize("target", EVERY, ids=lambda t: t.id)
def test_every_option(pool: processes.Pool, target: Target, ranks: int) -> None:
    for i, (case, sizes) in enumerate(shapes(ranks)):
        for dtype in (torch.float32, DTYPES[(i + ranks) % 4]):
            reason = f"{ranks} ranks, {name_of(dtype)}, {case.reason}"
            on(World(pool, ranks, sizes), target).check(case.logits(dtype), case.id, reason)


@every_world
def test_confident_positions(pool: processes.Pool, ranks: int) -> None:
    """Margins at which 1 - p is nothing in float64, or in float32: the class in this shard, and in another."""
    world, classes = World(pool, ranks), 3 * ranks
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for offset in (0.0, 200.0, -200.0):
            for margin in (12.0, 30.0, 60.0):
                x = logits_of((2 * classes, classes), torch.double, 0.5, "confident")
                target = torch.arange(2 * classes) % classes
                top = target.clone()
                top[classes:] = (target[classes:] + classes // 2) % classes  # sure, and wrong
                x[torch.arange(2 * classes), top] += margin
                x = (x + offset).to(dtype)
                reason = f"{ranks} ranks, {name_of(dtype)}, margin {margin}, offset {offset}"
                upstream = Upstream(torch.linspace(-1, 2, 2 * classes).double())
                function = world.function("cross_entropy")
                check_call(function, x, target, upstream=upstream, reduction="none", reason=reason)
                check_call(function, x, x.double().softmax(1).to(dtype), reduction="sum", reason=reason)
                stats = world.function("cross_entropy_with_stats")
                ones = torch.ones(2 * classes)
                check_call(stats, x, target, upstream=Upstream(ones.sum(), ones, ones, ones), reason=reason)


@every_world
def test_masked_shards(pool: processes.Pool, ranks: int) -> None:
    """A rank's classes, or all but the target, may be impossible."""
    world, classes = World(pool, ranks), 4 * ranks
    for dtype in (torch.float32, torch.bfloat16):
        x = logits_of((2 * ranks + 1, classes), dtype)
        target = torch.arange(2 * ranks + 1) % classes
        for r in range(ranks):
            x[r, 4 * r : 4 * r + 4] = -inf
            target[r] = (4 * r + 4) % classes
            x[ranks + r] = -inf
            x[ranks + r, target[ranks + r]] = 1.5
        if ranks == 1:
            x[0, 0] = 0.0
        for name in ("cross_entropy", "cross_entropy_with_stats"):
            statistics = torch.ones(2 * ranks + 1)
            upstream = Upstream(statistics)
            if name != "cross_entropy":
                upstream = Upstream(statistics, statistics, statistics, statistics)
            check_call(world.function(name), x, target, upstream=upstream, reduction="none", reason=f"{ranks} ranks")
        q = torch.zeros_like(x).scatter(1, target.unsqueeze(1), 1.0)
        check_call(world.function("cross_entropy"), x, q, wanted=("input",), reason=f"{ranks} ranks, probabilities")
        x[0, target[0]] = -inf  # an impossible target
        check_call(world.function("cross_entropy"), x, target, reduction="none", wanted=(), reason=f"{ranks} ranks")


@every_world
def test_ignored_positions_are_not_read(pool: processes.Pool, ranks: int) -> None:
    x = logits_of((6, 5 * ranks), torch.float32)
    target = torch.tensor([0, -100, 3, -100, 5 * ranks - 1, 1])
    x[1], x[3] = nan, inf
    s = torch.tensor([1.0, nan, 2.0, nan, 0.5, 0.0])
    function = World(pool, ranks).function("cross_entropy_with_stats")
    ones = torch.ones(6)
    upstream = Upstream(torch.ones(()), ones, ones, ones)
    check_call(function, x, target, sample_weight=s, z_loss=0.1, upstream=upstream, reason="some are ignored")
    for empty in ("nan", "zero"):
        for target in (torch.full((6,), -100), torch.full((6,), 7)):
            arguments = {"ignore_index": int(target[0]), "empty": empty, "reason": f"all are ignored, {empty}"}
            check_call(World(pool, ranks).function("cross_entropy"), x, target, **arguments)


@every_world
def test_dtypes_around_the_logits(pool: processes.Pool, ranks: int) -> None:
    """Targets of every integer type, a loss in another type, weights as exact as they were given."""
    function = World(pool, ranks).function("cross_entropy")
    x = logits_of((7, 3 * ranks), torch.bfloat16)
    target = torch.arange(7) % (3 * ranks)
    for integer in (torch.int8, torch.int16, torch.int32, torch.uint8):
        check_call(function, x, target.to(integer), reason=name_of(integer))
    for dtype in DTYPES:
        loss = function(x, target, loss_dtype=dtype)
        exact = torch.nn.functional.cross_entropy(x.double(), target)
        assert loss.dtype == dtype
        torch.testing.assert_close(loss, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=0)
    weight = torch.rand(3 * ranks, generator=generator("weight"))
    exact = torch.nn.functional.cross_entropy(x.double(), target, weight.double())
    torch.testing.assert_close(function(x, target, weight, loss_dtype=torch.float32), exact.float())
    q = logits_of((7, 3 * ranks), torch.float32, 1.0, "q").softmax(1)
    assert function(x, q).dtype == torch.float32
    stats, upstream = World(pool, ranks).function("cross_entropy_with_stats"), Upstream(*[torch.ones(7)] * 4)
    x = x.float()  # weights in float64, which arithmetic follows
    check_call(stats, x, q, weight.double(), label_smoothing=0.1, reduction="none", upstream=upstream, passes=2)
    counts = torch.arange(7)  # sample weights that are integers
    exact = torch.nn.functional.cross_entropy(x.double(), target, reduction="none") @ counts.double() / counts.sum()
    torch.testing.assert_close(function(x, target, sample_weight=counts, loss_dtype=torch.float32), exact.float())


@every_world
def test_no_positions(pool: processes.Pool, ranks: int) -> None:
    x, target = torch.zeros(0, 2 * ranks), torch.zeros(0, dtype=torch.long)
    for reduction in ("none", "sum", "mean"):
        check_call(World(pool, ranks).function("cross_entropy"), x, target, reduction=reduction)


@every_world
def test_denominator(pool: processes.Pool, ranks: int) -> None:
    x, target = logits_of((5, 3 * ranks), torch.float32), torch.arange(5) % (3 * ranks)
    function = World(pool, ranks).function("cross_entropy")
    total = check_call(function, x, target, reduction="sum")
    for denominator in (4, 4.0, torch.tensor(4.0)):
        assert function(x, target, denominator=denominator) == total["loss"] / 4
        leaf = x.clone().requires_grad_()
        function(leaf, target, denominator=denominator).backward()
        assert torch.equal(leaf.grad, total["input"] / 4)


def test_many_positions_for_any_number_of_threads() -> None:
    """A sum that is divided among threads would have other last bits on a rank that has more of them."""
    from cross_entropy_ext._parallel.vocabulary import sum_in_order

    values = torch.randn(300_001, generator=generator("sum"), dtype=torch.double)
    before, sums = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        sums.append(sum_in_order(values).item())
    torch.set_num_threads(before)
    assert len(set(sums)) == 1 and abs(sums[0] - math.fsum(values.tolist())) < 1e-9


@every_world
def test_the_same_bits_from_run_to_run(pool: processes.Pool, ranks: int) -> None:
    x = logits_of((513, 7 * ranks), torch.float32)
    target = torch.arange(513) % (7 * ranks)
    function, runs = World(pool, ranks).function("cross_entropy_with_stats"), []
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        stats = function(leaf, target, z_loss=0.1)
        (stats.loss + stats.entropy.sum()).backward()
        runs.append([*stats, leaf.grad])
    for other in runs[1:]:
        assert all(same_bits(a.detach(), b.detach()) for a, b in zip(runs[0], other, strict=True))


# ------------------------------------------------------------------------------------------------------------
# What the ranks say to each other.

HEADER = 256 + 160


@every_world
def test_one_collective_and_none_in_the_backward(pool: processes.Pool, ranks: int) -> None:
    options = [
        {},
        {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "reduction": "none"},
        {"weight": torch.ones(5 * ranks), "sample_weight": torch.ones(200), "denominator": 3.0},
    ]
    for statistics, bytes_of_a_position in ((False, 32), (True, 72)):
        for chosen in options:
            for forward, backward in pool.run(
                "collectives", ranks, positions=200, statistics=statistics, options=chosen
            ):
                assert [name for name, _ in forward] == ["c10d::_allgather_base_"]
                assert forward[0][1] == HEADER + bytes_of_a_position * 200
                assert backward == []


def test_collectives_of_dtensors(pool: processes.Pool) -> None:
    """Whole classes: a sum and a count for each rank. Sharded ones: what vocab_parallel_cross_entropy has, and that."""
    of_sums = HEADER + 3 * 8
    for mesh, placements, reduction, expected in (
        ((4,), ["R"], "mean", []),
        ((4,), ["S0"], "none", []),
        ((4,), ["S0"], "mean", [of_sums]),
        ((4,), ["S1"], "mean", [HEADER + 32 * 6]),
        ((4,), ["S1"], "none", [HEADER + 32 * 6]),
        ((2, 2), ["S0", "S1"], "mean", [HEADER + 32 * 3, of_sums]),
        ((2, 2), ["S0", "S0"], "sum", [of_sums, of_sums]),
    ):
        for forward, backward in pool.run("dtensor_collectives", mesh=mesh, placements=placements, reduction=reduction):
            assert [size for _, size in forward] == expected, (placements, reduction, forward)
            assert backward == []


# ------------------------------------------------------------------------------------------------------------
# DTensors.

LAYOUTS = [
    ((1,), "S1"),
    ((2,), "S0"),
    ((2,), "S1"),
    ((3,), "S0"),
    ((3,), "S1"),
    ((4,), "S0"),
    ((4,), "S1"),
    ((4,), "S2"),
    ((4,), "R"),
    ((3,), "P"),
    ((2, 2), "S0 S1"),
    ((2, 2), "S1 S0"),
    ((2, 2), "S1 S1"),
    ((2, 2), "S0 S0"),
    ((2, 2), "R S1"),
    ((2, 2), "S1 R"),
    ((2, 2), "S0 S2"),
    ((2, 2), "S2 S1"),
    ((2, 2), "R R"),
]
OF_DTENSORS = [
    target
    for target in EVERY
    if target.id
    in {
        "index-mean",
        "index-none",
        "smoothed-weighted-mean",
        "soft-weighted-smoothed-none",
        "everything-mean",
        "soft-everything-sum",
        "z-loss-none",
        "statistics-mean",
        "statistics-everything-sum",
    }
]


@pytest.mark.parametrize(("mesh", "placements"), LAYOUTS, ids=lambda v: str(v))
def test_dtensors(pool: processes.Pool, mesh: tuple[int, ...], placements: str) -> None:
    """Evenly sharded or not, ranks with nothing among them; targets whole, or sharded in their own way."""
    shape = (5, 7, 3)
    for i, target in enumerate(OF_DTENSORS):
        dtype = (torch.float32, torch.bfloat16)[i % 2]
        case = Case("dtensor", "positions and classes that no mesh divides", shape)
        if "P" in placements:  # sums of halves of them, exact
            dtype = torch.float32
        world = MeshWorld(pool, mesh, placements, wrapped=i % 3 == 0)
        reason = f"{placements} on {mesh}, {name_of(dtype)}"
        values = case.logits(dtype)
        if "P" in placements:
            values = (values * 64).round() / 64 * math.prod(mesh)
        on(world, target).check(values, "dtensor", reason)


def test_dtensors_of_other_shapes(pool: processes.Pool) -> None:
    """No batch dimension; fewer classes, or fewer rows, than ranks."""
    for shape, placements in (((11,), "S0"), ((3,), "S0"), ((2, 3), "S0"), ((2, 3), "S1"), ((9, 6), "S0")):
        for target in (PLAIN[0], PLAIN[3], OTHERS[0]):
            x = Case("dtensor", "", shape).logits(torch.float32)
            on(MeshWorld(pool, (4,), placements), target).check(x, "dtensor", f"{shape} by {placements}")


def test_ignored_positions_of_dtensors_are_not_read(pool: processes.Pool) -> None:
    """Class weights with a z-loss included, which have sums of their own."""
    x, weight = logits_of((6, 7), torch.float32), torch.rand(7, generator=generator("weight")) + 0.1
    target = torch.tensor([0, -100, 3, -100, 6, 1])
    x[1], x[3] = nan, inf
    s = torch.tensor([1.0, nan, 2.0, nan, 0.5, 0.0])
    ones = torch.ones(6)
    upstream = Upstream(torch.ones(()), ones, ones, ones)
    for mesh, placements in (((2,), "R"), ((2,), "S0"), ((2,), "S1"), ((4,), "S0"), ((2, 2), "S0 S1")):
        for reduction in ("mean", "sum"):
            for given in ({}, {"weight": weight}):
                world = MeshWorld(pool, mesh, placements)
                options = {"sample_weight": s, "z_loss": 0.1, "reduction": reduction, **given}
                for name in ("cross_entropy", "cross_entropy_with_stats"):
                    if "stats" in name and not (given and reduction == "mean"):
                        continue
                    of = upstream if "stats" in name else None
                    reason = f"{name}, {placements} on {mesh}, {options}"
                    check_call(world.function(name), x, target, **options, upstream=of, reason=reason)


@pytest.mark.parametrize("ranks", [2, 4])
def test_column_parallel_layer(pool: processes.Pool, ranks: int) -> None:
    pool.run("colwise", ranks)


def test_logits_under_way(pool: processes.Pool) -> None:
    pool.run("under_way", 2)


# ------------------------------------------------------------------------------------------------------------
# Errors.

ERRORS = {
    "target": "IndexError: Target {bad} is out of bounds.",
    "shape": "ValueError: target must have a class for each position, (3,), but got the shape (2,)",
    "target type": "ValueError: target must be class indices or probabilities, but got torch.bool",
    "logits type": "ValueError: local_logits must be a tensor of float16",
    "weight": "ValueError: weight must have the shape ({classes},), but got (3,)",
    "weight needs a gradient": "ValueError: weight may not require a gradient where classes are sharded",
    "sample_weight": "ValueError: sample_weight must have the shape (3,), but got (4,)",
    "denominator": "ValueError: denominator is what reduction 'mean' divides by, but got another one",
    "softcap": "ValueError: softcap must be None or a finite number above 0, but got -1.0",
    "z_loss": "ValueError: z_loss must be a finite number of at least 0, but got nan",
    "smoothing": "RuntimeError: label_smoothing must be between 0.0 and 1.0. Got: 1.5",
    "reduction": "ValueError: median is not a valid value for reduction",
    "empty": "ValueError: empty must be 'nan' or 'zero', but got 'one'",
    "loss_dtype": "RuntimeError: loss_dtype must be float16, bfloat16, float32 or float64. Got: torch.int32",
    "probabilities": "ValueError: probabilities must have the shape of local_logits, (3, 4), but got (3, 5)",
    "ignored probabilities": "RuntimeError: ignore_index is not supported for floating point target",
    "shard_sizes": "ValueError: ",
    "another device": "ValueError: target must be on the device of the logits, cpu, not meta",
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_of_one_rank_is_every_rank_s(pool: processes.Pool, kind: str, ranks: int) -> None:
    culprit = ranks - 1
    kind_of_error, _, text = ERRORS[kind].format(bad=4 * ranks + 3, classes=4 * ranks).partition(": ")
    for rank, message in enumerate(pool.run("failing", ranks, kind=kind, culprit=culprit)):
        prefix = "" if rank == culprit else f"rank {culprit}: "
        assert message is not None and message.startswith(f"{kind_of_error}: {prefix}{text}"), (rank, message)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_disagree(pool: processes.Pool, ranks: int) -> None:
    for message in pool.run("failing", ranks, kind="classes", culprit=1):
        assert message.startswith("ValueError: ranks have different numbers of classes: 4 on rank 0, 5 on rank 1")
        assert "shard_sizes" in message
    for message in pool.run("failing", ranks, kind="disagreement", culprit=1):
        assert message.startswith("ValueError: ranks disagree: rank 0 has") and "label_smoothing=0.1" in message


def test_ranks_that_cut_the_classes_otherwise(pool: processes.Pool) -> None:
    for message in pool.run("other_sizes", 2)[:2]:
        assert message.startswith("ValueError: ranks disagree: rank 0 has [2, 4] classes") and "[3, 3]" in message


@pytest.mark.parametrize("ranks", [2, 3])
def test_tensors_that_differ(pool: processes.Pool, ranks: int) -> None:
    """Labels by one class or by their order, weights by one element, states altogether: an error on every rank. What
    rounding makes of them is none, and infinities are the loss's own."""
    names = {"label": "target", "order": "target", "linear label": "target", "linear states": "input"}
    names |= {name: name for name in ("weight", "sample_weight", "denominator")}
    for kind, name in names.items():
        for message in pool.run("disagreeing", ranks, kind=kind, culprit=ranks - 1, unread=False):
            expected = f"ValueError: ranks disagree: {name} has to be the same on every rank of the group, but rank"
            assert str(message).startswith(expected), (kind, message)
            assert message.endswith(f"rank {ranks - 1} has another than rank 0")
        for loss in pool.run("disagreeing", ranks, kind=kind, culprit=ranks - 1, unread=True):
            assert isinstance(loss, float) and math.isnan(loss), (kind, loss)
    for kind in ("nothing", "linear nothing", "linear rounding"):
        for unread in (False, True):
            for loss in pool.run("disagreeing", ranks, kind=kind, culprit=0, unread=unread):
                assert math.isfinite(loss), (kind, loss)
    assert all(
        isinstance(v, float) for v in pool.run("disagreeing", ranks, kind="linear infinity", culprit=0, unread=False)
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_gathered_logits(pool: processes.Pool, ranks: int) -> None:
    """All classes on every rank are an error; shards that happen to be alike are not."""
    legal = ["sizes are given", "of another shard", "all equal", "zeros with a bias", "one position differs"]
    legal += ["probabilities of shards", "probabilities of the first shard", "nothing counts"]
    for smoothing in (0.0, 0.1, 0.5, 0.6, 0.9, 0.99, 1.0):
        for kind in ("index", "probabilities", "ignored", "narrow", "linear"):
            if kind == "probabilities" and smoothing == 1:  # of which nothing is left
                continue
            for message in pool.run("gathered", ranks, kind=kind, unread=False, smoothing=smoothing):
                assert str(message).startswith("ValueError: every rank has the same logits"), (kind, smoothing, message)
                assert "shard_sizes" in message
            for loss in pool.run("gathered", ranks, kind=kind, unread=True, smoothing=smoothing):
                assert isinstance(loss, float) and math.isnan(loss), (kind, smoothing, loss)
        for kind in legal:
            for unread in (False, True):
                for loss in pool.run("gathered", ranks, kind=kind, unread=unread, smoothing=smoothing):
                    assert isinstance(loss, float), (kind, smoothing, loss)
                    assert math.isnan(loss) == (kind == "nothing counts"), (kind, smoothing, loss)


def test_labels_beside_dtensors_that_differ(pool: processes.Pool) -> None:
    for mesh, placements in (((4,), ["S0"]), ((4,), ["S1"]), ((2, 2), ["S0", "S1"]), ((2, 2), ["S0", "S0"])):
        for reduction in ("mean", "sum", "none"):
            messages = pool.run("labels_of_dtensors", mesh=mesh, placements=placements, reduction=reduction)
            if reduction == "none" and placements != ["S1"]:  # nothing is exchanged, or not with everybody
                continue
            assert sum(m is not None and "ranks disagree: target" in m for m in messages) == 4, (placements, messages)


LINEAR_ERRORS = {
    "weight": "ValueError: local_weight must be (classes, 5), as the input is, but got (4, 6)",
    "dimensions": "ValueError: local_weight must be (classes, 5), as the input is, but got (4, 2, 5)",
    "type": "ValueError: local_weight must be of the input's type",
    "bias": "ValueError: local_bias must have one element for each of the 4 classes",
    "no target": "TypeError: target must be a tensor, but got None",
    "chunk": "ValueError: batch_chunk_size (=2) and chunking_method",
    "a gradient": "ValueError: ranks disagree: ",
}


@pytest.mark.parametrize("kind", LINEAR_ERRORS)
def test_an_error_of_one_rank_s_layer(pool: processes.Pool, kind: str) -> None:
    """Found before the exchange, in which the others are."""
    for rank, message in enumerate(pool.run("failing_linear", 2, kind=kind, culprit=1)[:2]):
        named = kind != "a gradient" and rank == 0
        expected = LINEAR_ERRORS[kind].replace("Error: ", "Error: rank 1: ") if named else LINEAR_ERRORS[kind]
        assert message.startswith(expected), message


OF_POSITIONS = [((4,), ["S0"]), ((2, 2), ["S0", "S1"]), ((2, 2), ["S1", "S0"]), ((2, 2), ["S0", "S0"])]


def test_an_error_of_one_rank_s_positions(pool: processes.Pool) -> None:
    for mesh, placements in OF_POSITIONS:
        request = {"mesh": mesh, "placements": placements, "kind": "a class that is none", "everybody": True}
        for message in pool.run("failing_dtensor", **request):
            assert message.startswith("IndexError: ") and message.endswith("Target 6 is out of bounds."), message


ERRORS_OF_DTENSORS = {
    "labels elsewhere": "ValueError: target must be on the device of the logits, cpu, not meta",
    "probabilities elsewhere": "ValueError: target must be on the device of the logits, cpu, not meta",
    "weight elsewhere": "ValueError: weight must be on the device of the logits, cpu, not meta",
    "sample_weight elsewhere": "ValueError: sample_weight must be on the device of the logits, cpu, not meta",
    "shape": "ValueError: target must have the shape (4,), but got (5,)",
    "sample_weight": "ValueError: sample_weight must have the shape (4,), but got (3,)",
    "weight that learns": "ValueError: weight may not require a gradient where the logits are a DTensor",
    "z_loss": "ValueError: z_loss must be a finite number of at least 0, but got -0.1",
    "z_loss in a tensor": "ValueError: z_loss must be a finite number of at least 0, but got -0.5",
    "z_loss is no number": "ValueError: z_loss must be a finite number of at least 0, but got nan",
}


@pytest.mark.parametrize("kind", ERRORS_OF_DTENSORS)
def test_an_error_beside_dtensors(pool: processes.Pool, kind: str) -> None:
    """Of all ranks, whatever the placements are. And of one, which the others hear of."""
    error, _, text = ERRORS_OF_DTENSORS[kind].partition(": ")
    for mesh, placements in [*OF_POSITIONS, ((4,), ["R"]), ((4,), ["S1"])]:
        request = {"mesh": mesh, "placements": placements, "kind": kind}
        for message in pool.run("failing_dtensor", everybody=True, **request):
            assert message == f"{error}: {text}", (placements, message)
        if placements == ["R"] or kind.startswith("z_loss"):  # nothing is exchanged; ranks have to agree about options
            continue
        messages = pool.run("failing_dtensor", everybody=False, **request)
        assert messages[3] == f"{error}: {text}", (placements, messages)
        for message in messages[:3]:
            assert message.startswith(f"{error}: rank ") and message.endswith(text), (placements, messages)


def test_numbers_that_learn_beside_dtensors(pool: processes.Pool) -> None:
    """Their gradient is that of all positions, also where a rank has none. Sharded classes refuse them."""
    layouts = [((2,), ["S0"]), ((4,), ["S0"]), ((2,), ["R"]), ((2, 2), ["S0", "S2"]), ((2, 2), ["R", "S0"])]
    for i, (mesh, placements) in enumerate(layouts):
        for shape in ((5, 4, 3), (1, 4, 2)):
            wrapped = (i + shape[0]) % 2 == 0
            pool.run("learned_numbers", mesh=mesh, placements=placements, shape=shape, wrapped=wrapped)
    for mesh, placements in (((4,), ["S1"]), ((2, 2), ["S0", "S1"])):
        for name in ("logit_scale", "z_loss"):
            request = {"mesh": mesh, "placements": placements, "kind": f"{name} that learns", "everybody": True}
            for message in pool.run("failing_dtensor", **request):
                expected = f"ValueError: {name} may not require a gradient where the logits are a DTensor with sharded"
                assert message.startswith(expected), message


def test_where_the_host_does_not_read(pool: processes.Pool) -> None:
    """As on CUDA: an error of one rank is a loss of NaN on the others, and so is what ranks disagree about."""
    assert pool.run("unread_reports", 3, wrong=None) == [(None, pytest.approx(math.log(12)))] * 3
    for wrong, expected in (("target", ("IndexError", None, None)), ("classes", (None, None, None))):
        kinds, losses = zip(*pool.run("unread_reports", 3, wrong=wrong), strict=True)
        assert kinds == expected and all(math.isnan(loss) for loss in losses)


@pytest.mark.parametrize("task", ["in_one_process_of_another_length", "beside_one_that_dies"])
def test_no_rank_is_left_waiting(task: str) -> None:
    """Another number of positions, of which gloo ends a process; or a process that ended."""
    started = processes.start(getattr(distributed_tasks, task), 3, lambda rank: [])
    for process in started:
        process.join(processes.TIMEOUT / 2)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert None not in codes and 0 not in codes, codes
    if task == "beside_one_that_dies":
        assert codes == [3, 9, 3]


# ------------------------------------------------------------------------------------------------------------
# The rest of PyTorch.


def test_mixture_of_dtensors(pool: processes.Pool) -> None:
    pool.run("mixture_of_dtensors", 2)


def test_no_second_derivative(pool: processes.Pool) -> None:
    for message in pool.run("second_derivative", 2):
        assert message is not None and "has no second derivative" in message


def test_second_derivative_of_dtensors(pool: processes.Pool) -> None:
    pool.run("second_derivative_of_dtensors", 2)


def test_compiled(pool: processes.Pool) -> None:
    pool.run("compiled", 2)


def test_autocast(pool: processes.Pool) -> None:
    for found in pool.run("autocast", 2):
        assert found == [torch.float32, torch.bfloat16, torch.float32]


@every_world
def test_module(pool: processes.Pool, ranks: int) -> None:
    pool.run("module", ranks)


# ------------------------------------------------------------------------------------------------------------
# The output layer, sharded by classes

LINEAR = {
    "mean": {},
    "none": {"reduction": "none"},
    "weights-smoothing-softcap-z": {
        "weighted": True,
        "label_smoothing": 0.1,
        "softcap": 5.0,
        "z_loss": 1e-2,
        "logit_scale": 0.7,
        "reduction": "sum",
    },
    "sample-weight": {"sample": True, "weighted": True},
    "denominator": {"denominator": 37.0},
    "probabilities": {"soft": True, "label_smoothing": 0.1},
}


@every_world
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("name", LINEAR)
def test_linear(pool: processes.Pool, name: str, dtype: torch.dtype, ranks: int) -> None:
    """The error is at most that of the layer and the native loss in one process, and a rounding for each rank."""
    options = dict(LINEAR[name])
    soft, weighted, sample = (options.pop(key, False) for key in ("soft", "weighted", "sample"))
    g = generator(name, dtype)
    classes, features, batch = 11, 6, (3, 5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.double).to(dtype)

    arguments = {"input": normal(*batch, features), "linear_weight": normal(classes, features)}
    arguments["linear_bias"] = normal(classes)
    labels = torch.randint(classes, batch, generator=g)
    labels[0, 1] = -100
    arguments["target"] = normal(*batch, classes).softmax(-1) if soft else labels
    if weighted:
        arguments["weight"] = normal(classes).abs()
    if sample:
        arguments["sample_weight"] = normal(*batch).abs()
    sizes = [classes // ranks + (r < classes % ranks) for r in range(ranks)]
    if ranks == 3:
        sizes = [7, 0, 4]

    def alone(dtype: torch.dtype, composed: bool) -> list[Tensor]:
        tensors = {key: t.to(dtype) if t.is_floating_point() else t for key, t in arguments.items()}
        names = ["input", "linear_weight", "linear_bias"] + ["target"] * soft
        for key in names:
            tensors[key] = tensors[key].clone().requires_grad_()
        leaves = [tensors[key] for key in names]
        input, weight, bias, target = (tensors.pop(key) for key in ("input", "linear_weight", "linear_bias", "target"))
        if composed:
            logits = torch.nn.functional.linear(input, weight, bias).flatten(0, 1)
            flat = {key: t.flatten() for key, t in tensors.items()}
            result = ext.cross_entropy(logits, target.flatten(0, 1), **flat, **options)
            loss = result.view(batch) if options.get("reduction") == "none" else result
        else:
            loss = ext.linear_cross_entropy(input, weight, target, linear_bias=bias, **tensors, **options)
        upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.double).to(loss.dtype).view(loss.shape)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]

    exact, native = alone(torch.double, False), alone(dtype, True)
    answers = pool.run("linear", ranks, sizes=sizes, arguments=arguments, options=options, chunk=4)
    for loss, *_ in answers[1:]:
        assert same_bits(loss, answers[0][0])
    for _, grads, *_ in answers[1:]:
        assert same_bits(grads[0], answers[0][1][0])
    found = [answers[0][0], answers[0][1][0]]
    found += [torch.cat([grads[i] for _, grads, *_ in answers], -1 if i == 3 else 0) for i in range(1, 3 + soft)]
    for ours, theirs, truth in zip(found, native, exact, strict=True):
        rounding = torch.finfo(dtype).eps * truth.abs().max() * (ranks + 1)
        assert (ours - truth).abs().max() <= (theirs - truth).abs().max() + rounding
    exchanged, reduced = answers[0][2:]
    assert len(exchanged) == 1 and [call for call, _ in reduced] == ["c10d::allreduce_"]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "label_smoothing": 0.1}], ids=str)
def test_linear_of_dtensors(pool: processes.Pool, options: dict, wrapped: bool, ranks: int) -> None:
    """A module of which parallelize_module has sharded the layer: uneven shards, one of them empty."""
    g = generator("linear of DTensors")
    shapes = {"input": (3, 5, 6), "linear_weight": (11, 6), "linear_bias": (11,)}
    arguments = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    arguments["target"] = torch.randint(11, (3, 5), generator=g)
    leaves = [arguments[name].double().requires_grad_() for name in shapes]
    exact = ext.linear_cross_entropy(*leaves[:2], arguments["target"], linear_bias=leaves[2], **options)
    truth = [exact.detach(), *torch.autograd.grad(exact.sum(), leaves)]
    request = {"arguments": arguments, "options": options, "wrapped": wrapped}
    for found in pool.run("linear_of_dtensors", ranks, **request)[:ranks]:
        for ours, right in zip(found, truth, strict=True):
            torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", [2, 4])
def test_linear_of_placed_states(pool: processes.Pool, ranks: int) -> None:
    pool.run("linear_of_placed_states", ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_rank_has_all_of_its_logits(pool: processes.Pool, ranks: int) -> None:
    """Of 512 x 4000, that is; the largest is a chunk of 64, or what is exchanged."""
    assert all(elements <= 64 * 4000 for elements in pool.run("linear_without_whole_logits", ranks)[:ranks])


# ------------------------------------------------------------------------------------------------------------
# Ranks with data of their own


@pytest.mark.parametrize("way", ["ddp", "model", "head", "layers", "layers and model", "hsdp"])
def test_one_mean_over_all_ranks(pool: processes.Pool, way: str) -> None:
    """`denominator=tokens / world_size` under what averages gradients; a layer that is sharded on its own included."""
    pool.run("data_parallel", 4 if way == "hsdp" else 2, way=way)


def test_a_plain_tensor_beside_a_sharded_one(pool: processes.Pool) -> None:
    """It is not known to be the same on every rank. An error on each of them, and nothing is exchanged."""
    for messages in pool.run("mixed", 2)[:2]:
        for name, message in messages.items():
            assert message.startswith("RuntimeError: "), (name, message)
            assert "got mixed torch.Tensor and DTensor" in message, (name, message)
            if name.split(",")[0] in ("linear", "stats", "pairs", "replicated"):
                assert "LinearCrossEntropyLoss" in message and "DTensor.from_local" in message

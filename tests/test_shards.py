"""Kernels that are given a shard of the classes: what shards make together against the oracle of all classes, and what
each says alone."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, generator, name_of
from oracle_targets import Upstream, check_call
from shards import ARGMAX, ENTROPY, LSE, LSE_LOST, MASS, TARGET_LOG_PROB, numbered, ops, sharded, sizes_of
from target_cases import EVERYTHING, MARGINS, SHAPES, STATISTICS, TARGETS, Draw, Target, confident, logits_of
from torch import Tensor

from cross_entropy_ext import functional as ext

inf, nan = math.inf, math.nan
pytestmark = pytest.mark.usefixtures("backend")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
COUNTS = (1, 2, 3, 5)
# Of the arithmetic: each shard's lse is rounded, and theirs together.
ROUNDINGS = 12

OF_SHARDS = [
    Target(
        "plain",
        "a label, wherever it is, and ignored positions",
        ext.cross_entropy,
        lambda d: ((d.labels(ignored=0.3),), {}),
    ),
    Target(
        "weighted-smoothed",
        "weights and smoothing are of all classes, and so is the denominator",
        ext.cross_entropy,
        lambda d: ((d.labels(ignored=0.3), d.weight()), {"label_smoothing": 0.1}),
    ),
    Target(
        "soft-weighted-smoothed",
        "probabilities are cut as the logits are",
        ext.cross_entropy,
        lambda d: ((d.probabilities(), d.weight()), {"label_smoothing": 0.1, "reduction": "none"}),
    ),
    *[
        target
        for target in TARGETS
        if target.id
        in (
            "negative-scale-none",
            "everything-mean",
            "soft-everything-sum",
            "pairs-none",
            "pairs-weighted-smoothed-mean",
            "many-pairs-everything-sum",
            "statistics-everything-sum",
            "soft-statistics-none",
            "soft-statistics-weighted-mean",
        )
    ],
]


@pytest.mark.thin(3, emulator=8)
@pytest.mark.parametrize("target", OF_SHARDS, ids=lambda t: t.id)
@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.id)
def test_shards_of_every_target(case, target: Target) -> None:
    """One to five shards, uneven and of a single class: rows of one block and of several, tiles, strided classes."""
    turn = SHAPES.index(case) + OF_SHARDS.index(target)
    for i, dtype in enumerate(DTYPES):
        count = COUNTS[(turn + i) % len(COUNTS)]
        logits, function = case.logits(dtype), sharded(target.function, count)
        draw = Draw(logits, target.id, case.id)
        arguments, options = target.build(draw)
        upstream = draw.upstream(options.get("reduction", "mean"), *target.statistics)
        reason = f"{target.id}: {count} shards, {name_of(dtype)}, {case.reason}"
        rule = {"passes": target.passes, "roundings": ROUNDINGS, "reason": reason}
        check_call(function, logits, *arguments, upstream=upstream, **options, **rule)


@pytest.mark.thin(2, emulator=5)
@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("classes", [2, 10, 300])
@every_dtype
def test_confidence_survives_shards(dtype: torch.dtype, classes: int, layout: str) -> None:
    """A label that leads by 100 nats, in whichever shard, has a loss and a gradient of 1e-44, and not 0."""
    logits, target = confident(dtype, classes, layout)
    pair = target.unsqueeze(1)
    pairs = torch.cat([pair, pair, (pair + 1) % classes], 1)  # the label's class twice, and another that is none
    probs = torch.tensor([0.25, 0.75, 0.0], dtype=dtype).view(1, 3, *[1] * (pairs.dim() - 2)).expand(pairs.shape)
    soft = torch.zeros_like(logits).scatter(1, pair, 1)
    ones = torch.ones(target.shape)
    rule = {"strictly": True, "roundings": 16 + classes / 16}  # equal terms: all errors of a sum go the same way
    for count in COUNTS:
        plain, sparse, stats = (
            sharded(f, count)
            for f in (
                ext.cross_entropy,
                ext.sparse_cross_entropy,
                ext.cross_entropy_with_stats,
            )
        )
        for reduction in ("mean", "none"):
            rule["reduction"] = reduction
            check_call(plain, logits, target, **rule)
            check_call(plain, logits, target, z_loss=1e-4, sample_weight=-ones, **rule)
            check_call(plain, logits / 4, target, logit_scale=4.0, **rule)
            check_call(plain, logits, target, softcap=300.0, **rule)
            check_call(plain, logits, soft, **rule)
            check_call(sparse, logits, pairs, probs, **rule)
        for upstream in (
            Upstream(torch.ones(())),
            Upstream(torch.ones(()), target_log_prob=-ones, entropy=-ones),
            Upstream(torch.ones(()), ones, ones, ones),
        ):
            check_call(stats, logits, target, upstream=upstream, **rule | {"reduction": "mean"})


@pytest.mark.thin(3)
@pytest.mark.parametrize("shape", [(6, 21), (5, 300), (3, 4099), (2, 21, 16), (2, 300, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=name_of)
def test_masked_shards(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """-inf in all of a shard: nothing to any sum, and zero in every gradient; an infinite loss where the target has
    something there."""
    classes = torch.arange(shape[1])
    for count in (2, 3, 5):
        sizes = sizes_of(shape[1], count)
        plain, sparse, stats = (
            sharded(f, count)
            for f in (
                ext.cross_entropy,
                ext.sparse_cross_entropy,
                ext.cross_entropy_with_stats,
            )
        )
        for mask in (classes < sizes[0], classes >= sizes[0], (classes >= sizes[0]) & (classes < sum(sizes[:2]))):
            logits = logits_of(shape, dtype).movedim(1, -1).masked_fill(mask, -inf).movedim(-1, 1).contiguous()
            draw = Draw(logits, "masked")
            allowed, forbidden = classes[~mask], classes[mask]
            labels = allowed[draw.labels("a") % len(allowed)]
            wrong = forbidden[draw.labels("wrong") % len(forbidden)]
            pairs, probs = draw.pairs(3)
            pairs = allowed[pairs % len(allowed)]
            bad = pairs.clone()
            bad.select(1, 1).copy_(wrong)
            zeros = probs.clone()
            zeros.select(1, 1).fill_(0)
            soft = torch.where(logits == -inf, 0, logits.double().softmax(1)).to(dtype)
            options = {"roundings": ROUNDINGS, "reason": f"{count} shards, {int(mask.sum())} masked"}
            ones = Upstream(torch.ones(()), *[torch.ones(draw.positions)] * 3)
            check_call(stats, logits, labels, upstream=ones, **options)
            check_call(stats, logits, wrong, wanted=(), **options)
            check_call(stats, logits, soft, upstream=ones, wanted=("input",), **options)
            for reduction in ("mean", "none"):
                options["reduction"] = reduction
                check_call(plain, logits, labels, z_loss=0.1, logit_scale=0.7, **options)
                check_call(plain, logits, labels, label_smoothing=0.1, **options)  # an infinite loss
                check_call(plain, logits, wrong, **options)
                check_call(plain, logits, soft, wanted=("input",), **options)
                check_call(sparse, logits, pairs, probs, **options)
                check_call(sparse, logits, bad, probs, **options)
                check_call(sparse, logits, bad, zeros, wanted=("input",), **options)


FORMS = ["indices", "soft", "pairs"]


def of_form(form: str, draw: Draw) -> tuple[Tensor, Tensor | None, str | None]:
    """Target, companion, and the form's name."""
    if form == "pairs":
        return *draw.pairs(3), "pairs"
    return (draw.labels() if form == "indices" else draw.probabilities()), None, None


@pytest.mark.parametrize("shape", [(3, 6), (3, 600), (2, 6, 20)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_shard_of_nothing_but_infinities(form: str, shape: tuple[int, ...]) -> None:
    """Its lse is -inf, its share of the loss infinite where it has some of the target, and nothing of it NaN: but for
    a NaN among them."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        logits = torch.full(shape, -inf, dtype=dtype)
        draw = Draw(torch.zeros((shape[0], shape[1] * 2, *shape[2:]), dtype=dtype))
        target, companion, name = of_form(form, draw)
        for begin in (0, shape[1]):
            part = target.narrow(1, begin, shape[1]) if form == "soft" else target
            here = (begin <= target) & (target < begin + shape[1])
            here = here if form == "indices" else here.any(1) if form == "pairs" else torch.ones_like(here[:, 0])
            for options in ({}, {"label_smoothing": 0.1}):
                arguments = numbered(begin, shape[1] * 2, form=name, statistics=True, **options)
                loss, saved, _ = ops._forward(logits, part, [None, companion], *arguments)
                saved = saved.view(-1, *loss.shape)
                assert (saved[LSE] == -inf).all() and not saved[LSE_LOST].any() and not saved[ENTROPY].any()
                assert ((saved[MASS] > 0) == (here | bool(options))).all()
                assert (loss == torch.where(saved[MASS] > 0, inf, 0.0)).all()
                assert not saved[ARGMAX].any()
                q = here if form != "soft" or options else saved[MASS] > 0
                assert (saved[TARGET_LOG_PROB] == torch.where(q, -inf, 0.0)).all()
                poisoned = logits.clone()
                poisoned[:, 1] = nan
                loss, saved, _ = ops._forward(poisoned, part, [None, companion], *arguments)
                assert (saved[LSE] + saved[LSE_LOST]).isnan().all() and loss[here].isnan().all()


def test_no_class_at_all_has_a_finite_logit() -> None:
    """Then it is NaN, as for one process."""
    logits = torch.full((3, 9), -inf)
    logits[1] = torch.arange(9)
    for count in COUNTS:
        loss = sharded(ext.cross_entropy, count)(logits, torch.tensor([0, 4, 8]), reduction="none")
        assert torch.equal(loss.isnan(), torch.tensor([True, False, True]))


def test_poison_of_shards_stays_in_its_position() -> None:
    """NaN or inf in one shard make that position NaN in all of them, and no other."""
    for shape in [(9, 40), (2, 21, 6)]:
        for poison in (nan, inf):
            for count in (2, 3):
                logits = logits_of(shape, torch.float32)
                draw = Draw(logits)
                bad = torch.rand(draw.positions, generator=draw.random("bad")) < 0.3
                logits.select(1, shape[1] - 1).masked_fill_(bad, poison)
                function = sharded(ext.cross_entropy_with_stats, count)
                leaf = logits.clone().requires_grad_()
                stats = function(leaf, draw.labels(), reduction="none")
                for value in stats[:4]:
                    assert torch.equal(value.isnan(), bad)
                (gradient,) = torch.autograd.grad(stats.loss.sum(), leaf)
                assert torch.equal(gradient.isnan().any(1), bad)


@pytest.mark.parametrize("shape", [(9, 21), (4, 3001), (2, 21, 6, 7)], ids=str)
def test_ignored_positions_of_shards_are_not_read(shape: tuple[int, ...]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        clean = logits_of(shape, dtype)
        layouts = [clean]
        if len(shape) == 4:
            layouts.append(clean.contiguous(memory_format=torch.channels_last))
        for logits in layouts:
            draw = Draw(logits, "ignored")
            labels, other = draw.labels("a", 0.5), draw.labels("b", 0.5)
            alone, neither = labels == -100, (labels == -100) & (other == -100)
            for poison in (nan, inf, -inf):
                for reduction in ("mean", "none"):
                    options = {"reduction": reduction, "roundings": ROUNDINGS, "reason": f"{poison}"}
                    x = logits.masked_fill(alone.unsqueeze(1), poison)
                    plain, sparse = sharded(ext.cross_entropy, 3), sharded(ext.sparse_cross_entropy, 2)
                    stats = sharded(ext.cross_entropy_with_stats, 2)
                    found = check_call(plain, x, labels, sample_weight=draw.sample_weight(), **EVERYTHING, **options)
                    assert not found["input"].masked_select(alone.unsqueeze(1)).any()
                    upstream = draw.upstream(reduction, *STATISTICS)
                    check_call(stats, x, labels, upstream=upstream, **options)
                    x = logits.masked_fill(neither.unsqueeze(1), poison)
                    both = torch.stack([labels, other], 1)
                    check_call(sparse, x, both, torch.full_like(both, 0.5, dtype=torch.double), **options)


def test_other_values_of_ignore_index() -> None:
    """A class that is not to count, in a shard or in another; or a number that is no class."""
    logits = logits_of((40, 9), torch.float32)
    for ignore_index in (0, 4, 8, 255, -1):
        labels = Draw(logits).labels()
        labels[::5] = ignore_index
        for count in COUNTS:
            function = sharded(ext.cross_entropy, count)
            check_call(function, logits, labels, ignore_index=ignore_index, label_smoothing=0.1, roundings=ROUNDINGS)


@pytest.mark.parametrize("integer", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=name_of)
def test_shards_of_integers(integer: torch.dtype) -> None:
    logits = logits_of((2, 21, 6, 5), torch.float32)
    draw = Draw(logits)
    index, probs = draw.pairs(2)
    for count in (2, 3):
        check_call(sharded(ext.cross_entropy, count), logits, draw.labels().to(integer), roundings=ROUNDINGS)
        check_call(sharded(ext.sparse_cross_entropy, count), logits, index.to(integer), probs, roundings=ROUNDINGS)


def test_wide_probabilities_of_shards() -> None:
    """float64 ones make the arithmetic double, whatever the logits are; weights may have any type."""
    for shape in [(5, 40), (3, 900), (2, 24, 16)]:
        logits = logits_of(shape, torch.float32)
        draw = Draw(logits)
        soft, weight = draw.normal("soft").softmax(1), draw.weight()
        for count in (1, 3):
            options = {"label_smoothing": 0.1, "roundings": ROUNDINGS}
            check_call(sharded(ext.cross_entropy, count), logits, soft, **options)
            check_call(sharded(ext.cross_entropy, count), logits.bfloat16(), draw.labels(), weight, **options)


# ------------------------------------------------------------------------------------------------------------
# What a single call says.


def call_forward(logits: Tensor, target: Tensor, weight: Tensor | None = None, *numbers, **options):
    return ops._forward(logits, target, [weight], *numbered(*numbers, **options))


def test_every_shard_knows_the_denominator() -> None:
    """The weight of a class that is elsewhere counts, too."""
    for shape in [(40, 21), (40, 900), (2, 21, 40)]:
        logits = logits_of(shape, torch.float32)
        draw = Draw(logits)
        labels, weight, s = draw.labels(ignored=0.3), draw.weight(), draw.sample_weight()
        expected = (weight.double()[labels.clamp(min=0)] * (labels != -100) * s).sum()
        begin = 0
        for size in sizes_of(shape[1], 3):
            options = numbered(begin, shape[1], reduction="mean")
            _, _, denominator = ops._forward(logits.narrow(1, begin, size), labels, [weight, None, s], *options)
            torch.testing.assert_close(denominator, expected, rtol=1e-6, atol=0)
            begin += size


def test_what_a_shard_has_of_the_target() -> None:
    """For every form, and whether statistics are asked for or not."""
    logits = logits_of((6, 12), torch.float32)
    draw = Draw(logits)
    weight, e = draw.weight(), 0.1
    for form in FORMS:
        target, companion, name = of_form(form, draw)
        q = target.double()
        if form == "indices":
            q = torch.zeros_like(logits, dtype=torch.double).scatter(1, target[:, None], 1)
        elif form == "pairs":
            q = torch.zeros_like(logits, dtype=torch.double).scatter_add(1, target, companion.double())
        a = weight.double() * ((1 - e) * q + e / 12)
        for begin, size in ((0, 5), (5, 1), (6, 6)):
            part = target[:, begin : begin + size] if form == "soft" else target
            for statistics in (False, True):
                options = numbered(begin, 12, form=name, label_smoothing=e, statistics=statistics)
                x = logits[:, begin : begin + size]
                loss, saved, _ = ops._forward(x, part, [weight, companion], *options)
                here = a[:, begin : begin + size]
                gaps = x.double().logsumexp(1, keepdim=True) - x.double()
                torch.testing.assert_close(saved[MASS].double(), here.sum(1), rtol=1e-6, atol=0)
                torch.testing.assert_close(loss, (here * gaps).sum(1), rtol=1e-6, atol=1e-7)
                fake = ops._forward(x.to("meta"), part.to("meta"), [None, companion], *options)
                assert fake[1].shape == saved.shape


@pytest.mark.backends("cpu")
def test_bad_targets_of_shards() -> None:
    """A class is bad where no shard has it: then in all of them."""
    logits = torch.zeros(4, 5)
    for bad in (12, -1, 100):
        for begin in (0, 5, 7):
            labels = torch.tensor([0, 11, bad, 6])
            with pytest.raises(IndexError, match=f"^Target {bad} is out of bounds.$"):
                call_forward(logits, labels, None, begin, 12)
            pairs = torch.stack([labels, labels * 0], 1)
            with pytest.raises(IndexError, match=f"^Target {bad} is out of bounds.$"):
                probs = torch.ones(4, 2)
                ops._forward(logits, pairs, [None, probs], *numbered(begin, 12, form="pairs"))
            saved, one = torch.zeros(3, 4), torch.ones((), dtype=torch.double)
            memory = logits.clone()
            with pytest.raises(IndexError, match=f"^Target {bad} is out of bounds.$"):
                options = numbered(begin, 12, reduction="sum")
                ops._backward_(one, one, memory, labels, [], saved, one, *options, False)
            assert torch.equal(memory, logits)


@pytest.mark.parametrize("shape", [(6, 40), (4, 900), (2, 21, 40)], ids=str)
@pytest.mark.parametrize("form", ["indices", "soft"])
def test_the_gradient_of_a_shard_in_its_place(form: str, shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        whole = logits_of(shape, dtype)
        draw = Draw(whole)
        target, s = of_form(form, draw)[0], draw.sample_weight()
        begin, size = 3, shape[1] // 2
        part = target.narrow(1, begin, size) if form == "soft" else target
        g = draw.normal("g", draw.positions)
        options = numbered(begin, shape[1], label_smoothing=0.1, softcap=5.0, z_loss=0.1)
        logits = whole.narrow(1, begin, size).clone(memory_format=torch.contiguous_format)
        _, saved, one = ops._forward(logits, part, [], *options)
        gradient, _ = ops._backward(g, one, logits, part, [None, None, s], saved, one, *options, [True, False])
        ops._backward_(g, one, logits, part, [None, None, s], saved, one, *options, False)
        assert torch.equal(gradient, logits)


def test_errors_of_shards() -> None:
    logits, labels = logits_of((4, 5), torch.float32), torch.tensor([0, 11, 3, 6])
    for begin, classes in ((8, 12), (-1, 12), (0, 4), (1, 5), (0, -5), (1, 0), (0, 2**31)):
        with pytest.raises(ValueError, match="are no shard of"):
            call_forward(logits, labels, None, begin, classes)
    with pytest.raises(RuntimeError, match="arguments that"):  # weights are of all classes
        call_forward(logits, labels, torch.ones(5), 0, 12)
    call_forward(logits, labels, torch.ones(12), 0, 12)
    with pytest.raises(ValueError, match="a teacher's classes cannot be sharded"):
        call_forward(logits, logits, None, 0, 12, form="teacher")
    options = numbered(0, 12, reduction="sum")
    with pytest.raises(ValueError, match="needs the lse of all classes"):
        ops._forward_backward(logits, labels, [], *options)
    with pytest.raises(ValueError, match="only _forward and _backward take a shard"):
        ops._composite(logits, labels, [], *options)
    for op in (ops.general_cross_entropy, ops.cross_entropy_with_stats, ops.linear_cross_entropy):
        assert "total_classes" not in str(op.default._schema)
    _, saved, one = ops._forward(logits, labels, [], *options)
    with pytest.raises(RuntimeError, match="lse is not what _forward returned"):
        ops._backward(one, one, logits, labels, [], saved[:2], one, *options, [True, False])
    leaf = logits.clone().requires_grad_()
    gradient, _ = ops._backward(one, one, leaf, labels, [], saved, one, *options, [True, False])
    with pytest.raises(NotImplementedError, match="it has no derivative"):
        gradient.sum().backward()


def test_one_shard_is_the_whole() -> None:
    """To the bit, where the numbers are those of the plain operators."""
    for shape in [(7, 21), (3, 5000), (2, 21, 40)]:
        for dtype in DTYPES:
            logits = logits_of(shape, dtype)
            draw = Draw(logits)
            labels, weight = draw.labels(ignored=0.2), draw.weight()
            options = {"label_smoothing": 0.1, "softcap": 5.0, "statistics": True}
            as_shard, plain = numbered(0, shape[1], **options), numbered(0, 0, **options)
            kind = torch.float64 if dtype == torch.float64 else torch.float32
            weight = weight.to(kind) if dtype == kind else None
            loss, saved, one = ops._forward(logits, labels, [weight], *as_shard)
            expected, rows, _ = ops._forward(logits, labels, [weight], *plain)
            assert torch.equal(loss, expected)
            for row in (LSE, LSE_LOST, ENTROPY, TARGET_LOG_PROB, ARGMAX):
                assert torch.equal(saved[row].view(torch.uint8), rows[row].view(torch.uint8))
            g = draw.normal("g", draw.positions)
            gradients = [
                ops._backward(g, one, logits, labels, [weight], lse, one, *numbers, [True, False])[0]
                for lse, numbers in ((saved, as_shard), (rows, plain))
            ]
            assert torch.equal(*gradients)


def test_numbers_of_the_margins() -> None:
    """What `shards` puts together is as exact as what it is made of."""
    random = generator("together")
    for margin in MARGINS:
        x = torch.randn(3, 40, dtype=torch.double, generator=random)
        x[:, 7] += margin
        loss = sharded(ext.cross_entropy, 5)(x, torch.full((3,), 7), reduction="none")
        others = (x - x[:, 7:8]).exp()
        others[:, 7] = 0
        torch.testing.assert_close(loss, others.sum(1).log1p(), rtol=1e-14, atol=0)

"""Values and gradients of every target and every output against the float64 oracle: sample weights, z-loss, softcap and
logit scale, sparse and mixed targets, distillation, statistics; over shapes, layouts, dtypes and the extremes."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import compositions
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, INTEGERS, Case, expand, generator, name_of, place
from oracle import arithmetic_of
from oracle_targets import LEAVES, Call, Upstream, check_call
from target_cases import EVERYTHING, MARGINS, SHAPES, STATISTICS, TARGETS, Draw, Target, confident, logits_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cross_entropy_ext
from cross_entropy_ext import CrossEntropyLoss, CrossEntropyStats, DistillationLoss, LinearCrossEntropyLoss, NLLLoss
from cross_entropy_ext import functional as ext
from cross_entropy_ext.distributed import VocabParallelCrossEntropyLoss

inf, nan = math.inf, math.nan
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.thin(3, emulator=8)
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.id)
@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.id)
def test_core_targets(case: Case, target: Target) -> None:
    for dtype in DTYPES:
        target.check(case.logits(dtype), case.id, f"{name_of(dtype)}, {case.reason}")


INSTRUCTION_SETS = {
    "default": True,
    "avx2": torch.cpu._is_avx2_supported(),
    "avx512": torch.cpu._is_avx512_supported(),
}


@pytest.mark.backends("cpu")
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="the instruction set is already chosen")
@pytest.mark.parametrize("level", INSTRUCTION_SETS)
def test_targets_on_every_instruction_set(level: str, request: pytest.FixtureRequest) -> None:
    """Some of the shapes above in a process that is told which instructions to use."""
    if not INSTRUCTION_SETS[level]:
        pytest.skip(f"this processor has no {level}")
    if level == torch.backends.cpu.get_cpu_capability().lower():
        pytest.skip("the tests above use it")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": level}
    environment.pop("PYTEST_ADDOPTS", None)
    shapes = ("rows-19", "rows-33", "rows-100", "rows-1000", "image-tiles", "channels-last", "sequence-shifted", "5d")
    chosen = f"test_core_ and not emulator and ({' or '.join(shapes)} or confiden or temperature)"
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=5", "--tb=short", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [
            *command,
            "-p",
            "no:xdist",
            "-o",
            "addopts=",
            "-m",
            request.config.option.markexpr,
            "-k",
            chosen,
            str(Path(__file__)),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


# ------------------------------------------------------------------------------------------------------------
# Dtypes of what goes with the logits.


@pytest.mark.parametrize("integer", INTEGERS, ids=name_of)
def test_pairs_of_every_integer_dtype_and_layout(integer: torch.dtype) -> None:
    """Ignored ones included; uint8 has no -100, so a label of 255 is ignored there."""
    ignored = 255 if integer == torch.uint8 else -100
    for shape in [(11,), (6, 11), (3, 11, 6, 5)]:
        logits = logits_of(shape, torch.float32)
        draw = Draw(logits, integer)
        index, probs = draw.pairs(3, ignored=0.3)
        index = index.masked_fill(index == -100, ignored).to(integer)
        options = {"ignore_index": ignored}
        check_call(ext.sparse_cross_entropy, logits, index, probs, **options)
        labels = [draw.labels(name).to(integer) for name in "ab"]
        check_call(ext.mixup_cross_entropy, logits, *labels, 0.7, **options)
        check_call(ext.distillation_loss, logits, draw.teacher(), labels[0], alpha=0.5, **options)
        check_call(ext.cross_entropy_with_stats, logits, labels[0], sample_weight=draw.sample_weight(), **options)
        if len(shape) > 2:
            backwards = tuple(reversed(range(4)))
            index, probs = place(index, order=backwards), place(probs, step={3: 2}, offset=1)
            check_call(ext.sparse_cross_entropy, logits, index, probs, reduction="none", **options)
            labels = [place(labels[0], step={2: 2}), expand(labels[1], 1)]
            check_call(ext.mixup_cross_entropy, logits, *labels, 0.7, **options)


@pytest.mark.thin(1, emulator=2)
@pytest.mark.parametrize(
    "dtype", [*DTYPES, torch.bool, torch.uint8, torch.int32, torch.int64], ids=lambda d: f"s-{name_of(d)}"
)
def test_sample_weights_of_every_dtype_and_layout(dtype: torch.dtype) -> None:
    """A mask is a sample weight, too."""
    for logits in (logits_of((9, 21), torch.float32), logits_of((2, 21, 6, 7), torch.bfloat16)):
        draw = Draw(logits, dtype)
        s = (draw.normal("s", draw.positions).abs() * 2).to(dtype)
        layouts = [s, place(s, step={s.dim() - 1: 2}, offset=1) if dtype != torch.bool else s, expand(s, 0)]
        for s in layouts:
            for reduction in ("mean", "sum", "none"):
                options = {"sample_weight": s, "reduction": reduction, "empty": "zero"}
                check_call(ext.cross_entropy, logits, draw.labels(ignored=0.2), **options)
                check_call(ext.cross_entropy, logits, draw.probabilities(), z_loss=0.1, **options)
            check_call(ext.sparse_cross_entropy, logits, *draw.pairs(2), sample_weight=s, reduction="sum")
            check_call(ext.distillation_loss, logits, draw.teacher(), sample_weight=s, reduction="sum")


@pytest.mark.parametrize("other", DTYPES, ids=lambda d: f"other-{name_of(d)}")
@every_dtype
def test_the_dtype_of_what_goes_with_the_logits(dtype: torch.dtype, other: torch.dtype) -> None:
    """Teachers, probabilities of pairs and lam need not have the logits' dtype, nor their strides."""
    for shape in [(6, 21), (2, 21, 5, 4)]:
        logits = logits_of(shape, dtype)
        draw = Draw(logits, other)
        index, probs = draw.pairs(3)
        call = check_call(ext.sparse_cross_entropy, logits, index, probs.to(other))
        assert call["loss"].dtype == dtype
        labels = [draw.labels(name) for name in "ab"]
        for lam in (draw.lam(draw.positions[:1]).to(other), draw.lam(draw.positions).to(other)):
            call = check_call(ext.mixup_cross_entropy, logits, *labels, lam, loss_dtype=torch.float32)
        reverse = tuple(reversed(range(len(shape))))
        for teacher in (draw.teacher().to(other), place(draw.teacher().to(other), order=reverse)):
            for reduction in ("mean", "none"):
                call = check_call(ext.distillation_loss, logits, teacher, temperature=2.0, reduction=reduction)
                assert call["loss"].dtype == torch.promote_types(dtype, other)


@pytest.mark.parametrize("loss_dtype", DTYPES, ids=lambda d: f"loss-{name_of(d)}")
@every_dtype
def test_the_dtype_of_the_loss(dtype: torch.dtype, loss_dtype: torch.dtype) -> None:
    """Only the loss's: rounded once, it has all digits that the arithmetic has. A lam of 0.3 has them, too."""
    logits = logits_of((7, 30), dtype)
    draw = Draw(logits, loss_dtype)
    labels = draw.labels("a"), draw.labels("b")
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "loss_dtype": loss_dtype}
        for call in (
            check_call(ext.cross_entropy, logits, labels[0], sample_weight=draw.sample_weight(), **options),
            check_call(ext.sparse_cross_entropy, logits, *draw.pairs(2), z_loss=0.1, **options),
            check_call(ext.mixup_cross_entropy, logits, *labels, 0.3, **options),
            check_call(ext.distillation_loss, logits, draw.teacher(), temperature=2.0, **options),
            check_call(
                ext.cross_entropy_with_stats, logits, labels[0], upstream=draw.upstream(reduction, "lse"), **options
            ),
        ):
            assert call["loss"].dtype == loss_dtype


def test_statistics_are_float32_or_float64() -> None:
    for dtype in DTYPES:
        logits, target = logits_of((5, 9), dtype), torch.tensor([0, 8, -100, 3, 3])
        stats = ext.cross_entropy_with_stats(logits, target, z_loss=0.1)
        assert isinstance(stats, CrossEntropyStats) and cross_entropy_ext.CrossEntropyStats is CrossEntropyStats
        assert stats._fields == ("loss", "lse", "target_log_prob", "entropy", "z_loss", "argmax")
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert [t.dtype for t in stats[1:4]] == [wide] * 3
        assert stats.loss.dtype == dtype and stats.argmax.dtype == torch.int64
        assert all(t.shape == target.shape for t in (*stats[1:4], stats.argmax))
        assert stats.loss.shape == stats.z_loss.shape == ()
        for t in (stats.lse, stats.target_log_prob, stats.entropy):
            assert t[2] == 0
        assert stats.argmax[2] == -1


# ------------------------------------------------------------------------------------------------------------
# Exactness: where float arithmetic loses everything, if one lets it.


@pytest.mark.thin(1, emulator=4)
@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("classes", [2, 10, 40, 1000])
@every_dtype
def test_core_confidence_survives_every_option(dtype: torch.dtype, classes: int, layout: str) -> None:
    """p_y - 1 is -3e-44, and not 0; whatever is added to the loss, and however its target is written."""
    logits, target = confident(dtype, classes, layout)
    s = torch.linspace(0.5, 2.0, len(MARGINS)).view(target.shape).to(dtype)
    rule = {"strictly": True, "roundings": 16 + classes / 16}  # equal terms: all errors of a sum go the same way
    for reduction in ("mean", "none"):
        rule["reduction"] = reduction
        check_call(ext.cross_entropy, logits, target, sample_weight=s, **rule)
        check_call(ext.cross_entropy, logits, target, sample_weight=-s, **rule)
        check_call(ext.cross_entropy, logits / 4, target, logit_scale=4.0, **rule)
        for scale in (0.9, 0.3, 1 / 3):
            check_call(ext.cross_entropy, logits, target, logit_scale=scale, **rule)
        check_call(ext.cross_entropy, logits, target, softcap=300.0, **rule)
        check_call(ext.cross_entropy, logits, target, z_loss=1e-4, **rule)
        pair = target.unsqueeze(1)
        check_call(ext.sparse_cross_entropy, logits, pair, torch.ones_like(pair, dtype=dtype), **rule)
        pairs = torch.cat([pair, pair, (pair + 1) % classes], 1)  # the label's class twice, and another that is none
        probs = torch.tensor([0.25, 0.75, 0.0], dtype=dtype).view(1, 3, *[1] * (pairs.dim() - 2)).expand(pairs.shape)
        check_call(ext.sparse_cross_entropy, logits, pairs, probs, **rule)
        other = (target + 1) % classes
        for lam, labels in ((1.0, (target, other)), (0.0, (other, target)), (0.3, (target, target))):
            check_call(ext.mixup_cross_entropy, logits, *labels, lam, **rule)
        check_call(ext.distillation_loss, logits, logits, target, alpha=0.0, **rule)
        check_call(ext.distillation_loss, logits, logits, target, alpha=0.0, temperature=2.0, **rule)


@pytest.mark.parametrize("layout", ["rows", "planes"])
@every_dtype
def test_core_statistics_at_confidence(dtype: torch.dtype, layout: str) -> None:
    """Entropy and log p of a decision that is nearly made, and their gradients: tiny, not zero."""
    for classes in (2, 10, 300):
        logits, target = confident(dtype, classes, layout)
        ones = torch.ones(target.shape)
        rule = {"strictly": True, "roundings": 16 + classes / 16}
        for upstream in (
            Upstream(torch.ones(())),
            Upstream(target_log_prob=ones),
            Upstream(entropy=ones),
            Upstream(torch.ones(()), target_log_prob=-ones),
            Upstream(torch.ones(()), target_log_prob=-ones, entropy=-ones),
            Upstream(torch.ones(()), ones, ones, ones),
        ):
            check_call(ext.cross_entropy_with_stats, logits, target, upstream=upstream, **rule)
        wrong = (target + 1) % classes
        check_call(ext.cross_entropy_with_stats, logits, wrong, upstream=Upstream(target_log_prob=ones), **rule)
        soft = logits.double().softmax(1).to(dtype)
        check_call(ext.cross_entropy_with_stats, logits, soft, upstream=Upstream(entropy=ones), **rule)


@every_dtype
def test_core_distillation_at_confidence(dtype: torch.dtype) -> None:
    """Student and teacher as sure as can be: of the same class, or of another."""
    for classes in (2, 10, 300):
        logits, _ = confident(dtype, classes)
        other = logits.roll(1, 1)
        for teacher in (logits, logits / 2, other, torch.zeros_like(logits)):
            for kind in ("kl", "ce"):
                for temperature in (1.0, 4.0):
                    options = {"temperature": temperature, "kind": kind, "roundings": 16 + classes / 16}
                    check_call(ext.distillation_loss, logits, teacher, strictly=True, **options)


@pytest.mark.thin(1, emulator=2)
@pytest.mark.parametrize("temperature", [3.0, 0.7])
@every_dtype
def test_core_labels_and_distillation_at_any_temperature(dtype: torch.dtype, temperature: float) -> None:
    """A temperature that is no power of two rounds the logits: all of them alike, so that what is equal stays equal.
    The label's part, at temperature 1, knows nothing of it."""
    for classes in (1, 2, 10, 300):
        logits, target = confident(dtype, classes)
        rule = {"temperature": temperature, "roundings": 16 + classes / 16}
        for alpha in (0.0, 0.5, 1.0):
            for reduction in ("mean", "none"):
                rule |= {"alpha": alpha, "reduction": reduction}
                check_call(ext.distillation_loss, logits, logits, target, strictly=alpha == 0, **rule)
                check_call(ext.distillation_loss, logits, logits.roll(1, 1), target, **rule)


@pytest.mark.parametrize("shape", [(5, 33), (5, 1000), (2, 9, 40)], ids=str)
@every_dtype
def test_a_student_that_has_learnt_it_all(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Equal logits: a divergence of 0 and no gradient, but for rounding; logits that differ by a constant or a little,
    next to nothing."""
    teacher = logits_of(shape, dtype)
    for student in (teacher, teacher + 1, teacher * 1.01):
        for temperature in (1.0, 0.5, 3.0):
            for reduction in ("mean", "none"):
                options = {"temperature": temperature, "reduction": reduction}
                check_call(ext.distillation_loss, student, teacher, strictly=True, **options)
    small = 1e-6 if dtype != torch.float64 else 1e-14
    assert abs(ext.distillation_loss(teacher, teacher, temperature=2.0).item()) < small
    stats = check_call(ext.distillation_loss, teacher, teacher.clone())
    assert stats["student_logits"].abs().max() < small


def divergences(student: Tensor, teacher: Tensor, temperature: float) -> dict[str, Tensor]:
    """Of each position, by every path."""

    def loss(x: Tensor, **options: Tensor) -> Tensor:
        options |= {"temperature": temperature, "reduction": "none", "loss_dtype": arithmetic_of(student)}
        return ext.distillation_loss(x, teacher, **options)

    positions = student.select(1 if student.dim() > 1 else 0, 0).shape
    return {
        "kernels": loss(student),
        "composite": loss(student, sample_weight=torch.ones(positions, requires_grad=True)).detach(),
        "vmap": torch.func.vmap(loss)(torch.stack([student, student]))[0],
        "jvp": torch.func.jvp(loss, (student,), (student,))[0],
    }


@pytest.mark.thin(2, emulator=5)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("shape", [(3, 5), (70, 9), (3, 3000), (2, 9, 40), (2, 400, 3)], ids=str)
@every_dtype
def test_a_divergence_is_never_below_zero(dtype: torch.dtype, shape: tuple[int, ...], temperature: float) -> None:
    """Exactly zero for equal logits; for near ones as exact as any other."""
    teacher = logits_of(shape, dtype)
    for name, loss in divergences(teacher, teacher.clone(), temperature).items():
        assert not loss.any(), name
    noise = Draw(teacher).normal("noise")
    for scale, constant in ((1e-6, 0.0), (1e-4, 0.0), (1e-2, 5.0), (0.3, 0.0), (2.0, -100.0)):
        student = (teacher.double() + scale * noise + constant).to(dtype)
        x, z = (t.double() / temperature for t in (student, teacher))
        r = (z - x) - (z.logsumexp(1, keepdim=True) - x.logsumexp(1, keepdim=True))
        exact = temperature**2 * (z.softmax(1) * (torch.expm1(-r) + r)).sum(1)
        for name, loss in divergences(student, teacher, temperature).items():
            assert (loss >= 0).all(), name
            if dtype != torch.float64:  # where the reference is not exact itself
                error = (loss.double() - exact).abs() - 1e-17
                # Far ones are a sum of logits, with their roundings.
                of_logits = temperature**2 * (x.abs().amax(1) + z.abs().amax(1))
                size = torch.where(exact < temperature**2 / 9, exact, exact + of_logits)
                assert (error <= 16 * torch.finfo(torch.float32).eps * size).all(), (name, scale)


def test_a_divergence_of_masked_classes() -> None:
    """Masked in both nothing, in the student alone infinite, in the teacher alone what the student has there."""
    teacher, student = logits_of((2, 6), torch.float32), logits_of((2, 6), torch.float32, 2.0)
    for masked in (slice(3, 4), slice(0, 5)):
        x, z = student.clone(), teacher.clone()
        x[:, masked] = z[:, masked] = -inf
        kept = [c for c in range(6) if c not in range(6)[masked]]
        expected = divergences(student[:, kept], teacher[:, kept], 2.0)["kernels"]
        for name, loss in divergences(x, z, 2.0).items():
            torch.testing.assert_close(loss, expected, msg=name)
        assert all(loss.isinf().all() and (loss > 0).all() for loss in divergences(x, teacher, 2.0).values())
        q = (z / 2).softmax(1)
        alone = 4 * (q[:, kept] * (q[:, kept].log() - (student / 2).log_softmax(1)[:, kept])).sum(1)
        for name, loss in divergences(student, z, 2.0).items():
            torch.testing.assert_close(loss, alone, msg=name)


@pytest.mark.thin(1, emulator=4)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 30.0, 1e3, 1e4])
@every_dtype
def test_softcap_of_logits_of_every_magnitude(dtype: torch.dtype, scale: float) -> None:
    """Where tanh is the identity, where it bends, and where it is flat."""
    for shape in [(4, 77), (2, 9, 40)]:
        logits = logits_of(shape, dtype, scale).clamp(-6e4, 6e4)
        draw = Draw(logits, scale)
        for cap in (0.5, 30.0, 1e4):
            for reduction in ("mean", "none"):
                options = {"softcap": cap, "reduction": reduction}
                check_call(ext.cross_entropy, logits, draw.labels(), **options)
                check_call(ext.cross_entropy, logits, draw.labels(), z_loss=1e-3, logit_scale=0.1, **options)
            check_call(ext.cross_entropy, logits, draw.probabilities(), softcap=cap)
            check_call(ext.cross_entropy_with_stats, logits, draw.labels(), softcap=cap)


def test_softcap_of_infinities() -> None:
    """A logit of -inf becomes -cap: the class is no longer masked, but its gradient is zero."""
    logits = torch.tensor([[0.0, -inf, 1.0, inf], [2.0, 0.5, -inf, 1.0]])
    for target in (torch.tensor([1, 0]), torch.tensor([3, 2])):
        found = check_call(ext.cross_entropy, logits, target, softcap=5.0, reduction="none")
        assert found["loss"].isfinite().all() and (found["input"][logits.isinf()] == 0).all()


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_statistics_of_logits_with_a_common_offset(offset: float) -> None:
    """log-sum-exp near 1e4 has a spacing of 1e-3 in fp32; probabilities and entropies do not notice."""
    for shape in [(5, 33), (2, 9, 40)]:
        for dtype in (torch.float32, torch.float64):
            logits = logits_of(shape, dtype) + offset
            draw = Draw(logits, offset)
            for statistic in STATISTICS:
                upstream = draw.upstream("mean", statistic)
                check_call(ext.cross_entropy_with_stats, logits, draw.labels(), upstream=upstream, strictly=True)
            check_call(ext.sparse_cross_entropy, logits, *draw.pairs(3), strictly=True)
            check_call(ext.distillation_loss, logits, draw.teacher() - offset, strictly=True)
            check_call(ext.cross_entropy, logits, draw.labels(), z_loss=1e-8, strictly=True)


@pytest.mark.thin(1, emulator=2)
@pytest.mark.parametrize("classes", [2049, 32000])
def test_long_rows_of_every_target(classes: int) -> None:
    """Sums of many terms, in few rows."""
    logits = logits_of((8, classes), torch.float32)
    for target in TARGETS:
        if "everything" in target.id or "statistics" in target.id or target.function is ext.distillation_loss:
            target.check(logits, "long", f"{classes} terms")


@pytest.mark.thin(1, emulator=0)
def test_sums_of_halves_of_every_target() -> None:
    """Many positions: summed in fp16 they would give inf, in bf16 a loss off by a percent."""
    for dtype in (torch.float16, torch.bfloat16):
        logits = logits_of((20_000, 4), dtype)
        draw = Draw(logits, "many")
        for reduction in ("mean", "sum"):
            g = torch.tensor(64.0 if reduction == "mean" else 0.5)
            options = {"reduction": reduction, "upstream": g, "loss_dtype": torch.float32}
            s = draw.sample_weight(negative=True)
            check_call(ext.cross_entropy, logits, draw.labels(ignored=0.2), sample_weight=s, z_loss=0.1, **options)
            check_call(ext.mixup_cross_entropy, logits, draw.labels("a"), draw.labels("b"), 0.4, **options)
            check_call(ext.distillation_loss, logits, draw.teacher(), temperature=2.0, **options)
            check_call(ext.cross_entropy_with_stats, logits, draw.labels(), z_loss=0.1, **options)


# ------------------------------------------------------------------------------------------------------------
# NaN, infinity, zero and nothing at all.


@pytest.mark.thin(1, emulator=3)
@pytest.mark.parametrize("shape", [(6, 21), (5, 300), (2, 21, 16), (2, 300, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=name_of)
def test_masked_classes_of_every_target(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """-inf in a vocabulary: nothing to any sum, and zero in every gradient of the logits; a probability of zero there
    contributes nothing, any other an infinite loss."""
    classes = torch.arange(shape[1])
    for mask in (classes < 20, classes >= shape[1] // 2, classes % 3 == 1, classes != 4):
        logits = logits_of(shape, dtype).movedim(1, -1).masked_fill(mask, -inf).movedim(-1, 1).contiguous()
        draw = Draw(logits, "masked")
        allowed, forbidden = classes[~mask], classes[mask]
        labels, others = (allowed[draw.labels(name) % len(allowed)] for name in "ab")
        pairs, probs = draw.pairs(3)
        pairs = allowed[pairs % len(allowed)]
        bad = pairs.clone()
        bad.select(1, 1).fill_(forbidden[0])
        zeros = probs.clone()
        zeros.select(1, 1).fill_(0)
        ones = {
            "upstream": Upstream(torch.ones(()), *[torch.ones(draw.positions)] * 3),
            "reason": f"{mask.sum()} masked",
        }
        for reduction in ("mean", "none"):
            options = {"reduction": reduction, "reason": f"{int(mask.sum())} masked"}
            check_call(ext.cross_entropy, logits, labels, z_loss=0.1, logit_scale=0.7, **options)
            check_call(ext.sparse_cross_entropy, logits, pairs, probs, **options)
            check_call(ext.sparse_cross_entropy, logits, bad, probs, **options)  # an infinite loss
            check_call(ext.sparse_cross_entropy, logits, bad, zeros, wanted=("input",), **options)  # and none
            check_call(ext.mixup_cross_entropy, logits, labels, others, 0.3, **options)
            forbidden_label = torch.full_like(labels, int(forbidden[0]))
            check_call(ext.mixup_cross_entropy, logits, labels, forbidden_label, 1.0, **options)
            for kind in ("kl", "ce"):
                teacher = draw.teacher()
                masked = torch.where(logits == -inf, logits, teacher)
                for t in (masked, teacher):  # masked with the student; not masked: an infinite loss
                    check_call(ext.distillation_loss, logits, t, kind=kind, wanted=("student_logits",), **options)
                check_call(ext.distillation_loss, logits, masked, labels, alpha=0.5, kind=kind, **options)
                finite = torch.where(logits == -inf, 0, logits)
                check_call(ext.distillation_loss, finite, masked, kind=kind, temperature=2.0, **options)
        check_call(ext.cross_entropy_with_stats, logits, labels, **ones)
        check_call(ext.cross_entropy_with_stats, logits, forbidden_label, wanted=(), **ones)
        soft = torch.where(logits == -inf, 0, logits.double().softmax(1)).to(dtype)
        check_call(ext.cross_entropy_with_stats, logits, soft, **{**ones, "wanted": ("input",)})


POISONED = {
    "rows": (9, 21),
    "wide": (4, 3001),
    "sequence": (3, 21, 8),
    "channels_last": (2, 21, 6, 7),
    "planes": (2, 21, 6, 7),
}


@pytest.mark.parametrize("form", POISONED)
def test_core_ignored_positions_of_every_target_are_not_read(form: str) -> None:
    """NaN and infinity there give zeros, and the other positions do not notice."""
    for dtype in (torch.bfloat16, torch.float32):
        clean = logits_of(POISONED[form], dtype)
        if form == "channels_last":
            clean = clean.contiguous(memory_format=torch.channels_last)
        draw = Draw(clean, form)
        labels, other = draw.labels("a", 0.5), draw.labels("b", 0.5)
        pairs, probs = draw.pairs(2, ignored=0.5)
        alone, neither, no_pair = labels == -100, (labels == -100) & (other == -100), (pairs == -100).all(1)
        s = draw.sample_weight()
        for poison in (nan, inf, -inf):

            def poisoned(logits: Tensor, where: Tensor, poison: float = poison) -> Tensor:
                return logits.masked_fill(where.unsqueeze(1), poison)

            for reduction in ("mean", "none"):
                options = {"reduction": reduction, "reason": f"{poison}"}
                x = poisoned(clean, alone)
                found = [
                    check_call(ext.cross_entropy, x, labels, sample_weight=s, **EVERYTHING, **options),
                    check_call(
                        ext.cross_entropy_with_stats,
                        x,
                        labels,
                        upstream=draw.upstream(reduction, *STATISTICS),
                        **options,
                    ),
                    check_call(ext.distillation_loss, x, draw.teacher(), labels, alpha=0.5, **options),
                ]
                for call in found:
                    gradient = call.get("input", call.get("student_logits"))
                    assert not gradient.masked_select(alone.unsqueeze(1)).any()
                teacher = poisoned(draw.teacher(), alone)
                call = check_call(ext.distillation_loss, x, teacher, labels, alpha=0.5, temperature=2.0, **options)
                assert not call["teacher_logits"].masked_select(alone.unsqueeze(1)).any()
                call = check_call(ext.mixup_cross_entropy, poisoned(clean, neither), labels, other, 0.3, **options)
                assert not call["input"].masked_select(neither.unsqueeze(1)).any()
                call = check_call(
                    ext.sparse_cross_entropy, poisoned(clean, no_pair), pairs, probs, z_loss=0.1, **options
                )
                assert not call["input"].masked_select(no_pair.unsqueeze(1)).any()
                assert not call["probs"][pairs == -100].any()


def test_an_ignored_pair_is_not_read() -> None:
    """Its probability may be NaN: it adds nothing, and its gradient is zero."""
    logits, probs = logits_of((3, 7), torch.float32), torch.tensor([[0.5, nan], [nan, nan], [0.25, 0.75]])
    indices = torch.tensor([[1, -100], [-100, -100], [0, 6]])
    found = check_call(ext.sparse_cross_entropy, logits, indices, probs)
    assert found["loss"].isfinite() and not found["probs"][indices == -100].any()


def test_poison_stays_in_its_position() -> None:
    """NaN logits make that position's loss, statistics and gradients NaN, and no other's."""
    for shape in [(9, 40), (2, 21, 6)]:
        logits = logits_of(shape, torch.float32)
        draw = Draw(logits)
        bad = torch.rand(draw.positions, generator=draw.random("bad")) < 0.3
        poisoned = logits.masked_fill(bad.unsqueeze(1), nan)
        ones = torch.ones(draw.positions)
        for x, t in ((poisoned, draw.teacher()), (logits, draw.teacher().masked_fill(bad.unsqueeze(1), nan))):
            found = ext.distillation_loss(x, t, reduction="none")
            assert torch.equal(found.isnan(), bad)
        stats = ext.cross_entropy_with_stats(poisoned.requires_grad_(), draw.labels(), reduction="none")
        for value in stats[:4]:
            assert torch.equal(value.isnan(), bad)
        (gradient,) = torch.autograd.grad(stats[:4], poisoned, [ones] * 4)
        assert torch.equal(gradient.isnan(), bad.unsqueeze(1).expand(shape))


def test_probabilities_of_zero_and_one() -> None:
    """A pair of probability zero is as if it were not there, and lam of 0 or 1 is one target alone."""
    for dtype in DTYPES:
        for shape in [(5, 9), (5, 600), (2, 9, 6)]:
            logits = logits_of(shape, dtype)
            draw = Draw(logits)
            a, b = draw.labels("a"), draw.labels("b")
            plain = [check_call(ext.cross_entropy, logits, t, z_loss=0.0, reduction="none") for t in (a, b)]
            for lam, alone in ((1.0, plain[0]), (0.0, plain[1])):
                found = check_call(ext.mixup_cross_entropy, logits, a, b, lam, reduction="none")
                same_to_rounding(found["loss"], alone["loss"])
                same_to_rounding(found["input"], alone["input"])
            pairs, probs = torch.stack([a, b], 1), torch.zeros_like(torch.stack([a, b], 1), dtype=dtype)
            found = check_call(ext.sparse_cross_entropy, logits, pairs, probs, reduction="sum")
            assert found["loss"] == 0 and not found["input"].any()


def same_to_rounding(actual: Tensor, expected: Tensor, roundings: float = 4.0) -> None:
    rounding = roundings * torch.finfo(expected.dtype).eps
    scale = max(1.0, expected.abs().nan_to_num(0, 0, 0).max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding * scale, equal_nan=True)


@every_reduction
def test_nothing_that_counts(reduction: str) -> None:
    """All ignored, or no positions: 0, but for a mean, which is 0 / 0, or 0 where that is asked for; gradients of 0."""
    for shape in [(3, 7), (2, 7, 4), (0, 7), (2, 7, 0), (7,)]:
        logits = logits_of(shape, torch.float32)
        draw = Draw(logits)
        labels = torch.full(draw.positions, -100)
        pairs, probs = draw.pairs(2)
        pairs.fill_(-100)
        s = draw.sample_weight()
        for more in ({}, {"sample_weight": s}, EVERYTHING):
            for empty in ("nan", "zero"):
                options = {"reduction": reduction, "empty": empty, **more}
                found = [
                    check_call(ext.cross_entropy, logits, labels, **options),
                    check_call(ext.cross_entropy_with_stats, logits, labels, **options),
                    check_call(ext.sparse_cross_entropy, logits, pairs, probs, **options),
                    check_call(ext.mixup_cross_entropy, logits, labels, labels, 0.5, **options),
                ]
                if empty == "nan" and more is not EVERYTHING:
                    plain = {k: v for k, v in options.items() if k != "empty"}
                    found.append(check_call(ext.distillation_loss, logits, draw.teacher(), labels, alpha=0.5, **plain))
                for call in found:
                    if reduction == "mean" and empty == "nan":
                        assert call["loss"].isnan()
                    else:
                        assert not call["loss"].any()
                    assert not any(call[name].any() for name in LEAVES if name in call)


@pytest.mark.parametrize("rows", [1, 5, 200])
def test_sample_weights_of_zero(rows: int) -> None:
    """A mean over no weight at all is NaN, or 0 where that is asked for; a sum is 0 with gradients of 0."""
    logits = logits_of((rows, 9), torch.float32)
    draw = Draw(logits)
    s, labels = torch.zeros(rows), draw.labels()
    for function, arguments in (
        (ext.cross_entropy, (labels,)),
        (ext.cross_entropy, (draw.probabilities(),)),
        (ext.cross_entropy_with_stats, (labels,)),
        (ext.sparse_cross_entropy, draw.pairs(2)),
        (ext.mixup_cross_entropy, (labels, labels, 0.5)),
    ):
        loss = function(logits, *arguments, sample_weight=s)
        assert (loss if isinstance(loss, Tensor) else loss.loss).isnan()
        for options in ({"empty": "zero"}, {"reduction": "sum"}, {"reduction": "none"}):
            found = check_call(function, logits, *arguments, sample_weight=s, z_loss=0.1, **options)
            assert not found["loss"].any() and not found["input"].any()
    check_call(ext.distillation_loss, logits, draw.teacher(), sample_weight=s, reduction="sum")


def test_a_sample_weight_of_nothing_in_all() -> None:
    """Weights that cancel, but losses that do not: infinite, and not an empty mean."""
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for x in (logits, logits.clone().requires_grad_()):
        s = torch.tensor([1.0, -1.0])
        assert ext.cross_entropy(x, torch.tensor([0, 0]), sample_weight=s, empty="zero").isinf()


# ------------------------------------------------------------------------------------------------------------
# One loss written in two ways.


@every_reduction
def test_pairs_are_a_sparse_form_of_probabilities(reduction: str) -> None:
    """All classes in any order: the same loss as their probabilities, also where classes come twice."""
    for shape in [(9,), (5, 9), (2, 9, 6)]:
        logits = logits_of(shape, torch.float64)
        draw = Draw(logits)
        axis, q = draw.axis, draw.probabilities()
        order = torch.randperm(9, generator=draw.random("order"))
        index = order.view(1, 9, *[1] * (len(shape) - 2)).expand(shape) if len(shape) > 1 else order
        probs = q.index_select(axis, order)
        halves = torch.cat([index, index.flip(axis)], axis), torch.cat([probs / 2, probs.flip(axis) / 2], axis)
        for options in ({}, {"label_smoothing": 0.1, "weight": draw.weight(), "z_loss": 0.1, "softcap": 4.0}):
            options = {"reduction": reduction, **options}
            dense = check_call(ext.cross_entropy, logits, q, **options)
            for pairs in ((index, probs), halves):
                sparse = check_call(ext.sparse_cross_entropy, logits, *pairs, **options)
                same_to_rounding(sparse["loss"], dense["loss"], 16)
                same_to_rounding(sparse["input"], dense["input"], 16)


@every_reduction
def test_mixup_is_a_mixture(reduction: str) -> None:
    """lam * CE(a) + (1 - lam) * CE(b), as its paper writes it."""
    for shape in [(9,), (5, 9), (2, 9, 6, 3)]:
        logits = logits_of(shape, torch.float64)
        draw = Draw(logits)
        a, b = draw.labels("a"), draw.labels("b")
        found = ext.mixup_cross_entropy(logits, a, b, 0.3, reduction=reduction)
        one, other = (ext.cross_entropy(logits, t, reduction=reduction) for t in (a, b))
        same_to_rounding(found, 0.3 * one + 0.7 * other, 16)
        as_tensor = ext.mixup_cross_entropy(logits, a, b, torch.tensor(0.3, dtype=torch.double), reduction=reduction)
        same_to_rounding(as_tensor, found)


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_mixup_is_its_formula_for_every_option(ignored: float) -> None:
    """In value and gradients, with padding, class weights and all else; a part over nothing is NaN or zero."""
    logits = logits_of((6, 2), torch.float64)
    draw = Draw(logits)
    a, b, weight = draw.labels("a", 0.3), draw.labels("b", ignored), torch.tensor([1.0, 20.0], dtype=torch.double)
    lam, s = torch.tensor(0.3, dtype=torch.double), draw.sample_weight()
    for options in (
        {},
        {"weight": weight},
        {"weight": weight, "sample_weight": s, "label_smoothing": 0.1},
        {"weight": weight, "z_loss": 0.1},
        {"weight": weight, "sample_weight": s, "label_smoothing": 0.1, "z_loss": 0.1},
        {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.5},
        {"weight": weight, "denominator": 7.0, "label_smoothing": 0.1, "z_loss": 0.1},
    ):
        for reduction in ("mean",) if "denominator" in options else ("mean", "sum", "none"):
            for empty in ("nan", "zero"):
                options |= {"reduction": reduction, "empty": empty}
                found, expected = [], []
                for learnt in (False, True):
                    for results, mixed in (
                        (found, lambda x, lam, o=options: ext.mixup_cross_entropy(x, a, b, lam, **o)),
                        (
                            expected,
                            lambda x, lam, o=options: (
                                lam * ext.cross_entropy(x, a, **o) + (1 - lam) * ext.cross_entropy(x, b, **o)
                            ),
                        ),
                    ):
                        x, share = logits.clone().requires_grad_(), lam.clone().requires_grad_(learnt)
                        loss = mixed(x, share if learnt else 0.3)
                        of = (x, share) if learnt and not loss.isnan().any() else (x,)
                        results += [loss, *torch.autograd.grad(loss.sum(), of)]
                for one, other in zip(found, expected, strict=True):
                    same_to_rounding(one, other, 16)


def test_scaling_class_weights_changes_nothing() -> None:
    """Under a mean, z-loss included: of every path. It is the mean of lse^2 over the positions that count."""
    logits = logits_of((6, 5), torch.float64)
    draw = Draw(logits)
    y, weight, s = draw.labels(ignored=0.3), draw.weight(), draw.sample_weight()
    hidden, head = draw.normal("hidden", (6, 3)), draw.normal("head", (5, 3))
    valid = y != -100
    plain = ext.cross_entropy(logits, y, weight, sample_weight=s)
    z = (0.1 * logits.logsumexp(1).square() * s)[valid].sum() / s[valid].sum()
    for scale in (1, 10):
        options = {"z_loss": 0.1, "sample_weight": s}
        for loss in (
            ext.cross_entropy(logits, y, scale * weight, **options),
            ext.cross_entropy_with_stats(logits.clone().requires_grad_(), y, scale * weight, **options).loss,
            ext.cross_entropy(logits, y, scale * weight, **options | {"sample_weight": s.clone().requires_grad_()}),
            torch.func.jvp(
                lambda x, w=scale * weight, o=options: ext.cross_entropy(x, y, w, **o), (logits,), (logits,)
            )[0],
            torch.func.vmap(lambda x, w=scale * weight, o=options: ext.cross_entropy(x, y, w, **o))(logits[None])[0],
        ):
            same_to_rounding(loss.detach(), plain + z, 16)
        stats = ext.cross_entropy_with_stats(logits, y, scale * weight, **options)
        same_to_rounding(stats.z_loss, z, 16)
        linear = ext.linear_cross_entropy(hidden, head, y, weight=scale * weight, **options)
        same_to_rounding(linear, ext.cross_entropy(hidden @ head.T, y, weight, **options), 16)
    nothing = torch.zeros_like(weight)
    assert ext.cross_entropy(logits, y, nothing, **options).isnan()
    for x in (logits, logits.clone().requires_grad_()):
        same_to_rounding(ext.cross_entropy(x, y, nothing, empty="zero", **options).detach(), z, 16)
    # In bfloat16 the weights that the kernels are given are not rounded to it.
    half, halves = logits.bfloat16(), {name: value.bfloat16() for name, value in (("weight", weight), ("s", s))}
    found = ext.cross_entropy(half, y, halves["weight"], z_loss=0.1, loss_dtype=torch.float32)
    expected = ext.cross_entropy(half.double(), y, halves["weight"].double(), z_loss=0.1)
    assert abs(found - expected) < 1e-5
    assert abs(ext.cross_entropy(half, y, halves["weight"], z_loss=0.1) - expected) < 2**-8 * expected


def test_padding_is_never_the_argmax() -> None:
    """Neither a class nor ignore_index: an accuracy counts no padding as correct."""
    logits = logits_of((4, 5), torch.float32)
    hidden, head = torch.randn(4, 3), torch.randn(5, 3)
    for ignore_index, marked in ((-1, -2), (-100, -1), (3, -1)):
        y = torch.tensor([ignore_index, 1, ignore_index, 0])
        for stats in (
            lambda y, o: ext.cross_entropy_with_stats(logits, y, **o),
            lambda y, o: ext.cross_entropy_with_stats(logits.clone().requires_grad_(), y, **o),
            lambda y, o: ext.linear_cross_entropy_with_stats(hidden, head, y, **o),
            lambda y, o: torch.func.vmap(lambda x: ext.cross_entropy_with_stats(x, y, **o))(logits[None]),
        ):
            argmax = stats(y, {"ignore_index": ignore_index}).argmax.flatten()
            assert (argmax[::2] == marked).all() and (argmax[1::2] >= 0).all()


def test_mixup_of_ignored_labels() -> None:
    """A label ignored in one target leaves the other's share."""
    logits = logits_of((4, 5), torch.float64)
    a, b = torch.tensor([1, -100, 2, -100]), torch.tensor([3, 0, -100, -100])
    losses = ext.mixup_cross_entropy(logits, a, b, 0.25, reduction="none")
    log_p = logits.log_softmax(1)
    expected = [-0.25 * log_p[0, 1] - 0.75 * log_p[0, 3], -0.75 * log_p[1, 0], -0.25 * log_p[2, 2], 0 * log_p[0, 0]]
    same_to_rounding(losses, torch.stack(expected), 16)
    same_to_rounding(ext.mixup_cross_entropy(logits, a, b, 0.25), torch.stack(expected).sum() / 2, 16)


@every_reduction
def test_distillation_is_a_soft_target(reduction: str) -> None:
    """At temperature 1 the teacher's softmax is the target; the divergence is less by the teacher's entropy, which the
    student does not notice."""
    for shape in [(9,), (5, 9), (2, 9, 6)]:
        student = logits_of(shape, torch.float64)
        teacher, axis = Draw(student).teacher(), 1 if len(shape) > 1 else 0
        soft = check_call(ext.cross_entropy, student, teacher.softmax(axis), reduction=reduction, wanted=("input",))
        hard = check_call(ext.distillation_loss, student, teacher, kind="ce", reduction=reduction)
        same_to_rounding(hard["loss"], soft["loss"], 16)
        same_to_rounding(hard["student_logits"], soft["input"], 16)
        bent = check_call(ext.distillation_loss, student, teacher, kind="kl", reduction=reduction)
        same_to_rounding(bent["student_logits"], soft["input"], 16)
        entropy = ext.cross_entropy(teacher, teacher.softmax(axis), reduction=reduction)
        same_to_rounding(bent["loss"], soft["loss"] - entropy, 64)


def test_alpha_is_the_share_of_the_distillation() -> None:
    """And without labels it has no effect."""
    student = logits_of((6, 9), torch.float64)
    draw = Draw(student)
    teacher, labels = draw.teacher(), draw.labels(ignored=0.3)
    counts = labels != -100
    distilled = ext.distillation_loss(student[counts], teacher[counts], temperature=2.0)
    own = ext.cross_entropy(student, labels)
    for alpha in (0.0, 0.3, 1.0):
        found = ext.distillation_loss(student, teacher, labels, temperature=2.0, alpha=alpha)
        same_to_rounding(found, alpha * distilled + (1 - alpha) * own, 16)
        check_call(ext.distillation_loss, student, teacher, labels, temperature=2.0, alpha=alpha)
        alone = ext.distillation_loss(student, teacher, temperature=2.0, alpha=alpha)
        assert torch.equal(alone, ext.distillation_loss(student, teacher, temperature=2.0))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_labels_beside_a_teacher_have_weights_and_smoothing(reduction: str, weighted: bool) -> None:
    """As if the two losses were written side by side: a mean of each has its own denominator."""
    draw = Draw(logits_of((4, 9, 3), torch.float64))
    labels, s = draw.labels(ignored=0.4), draw.sample_weight().double()
    counts = (labels != -100).double() * (s if weighted else 1)
    options = {"weight": draw.weight().double(), "label_smoothing": 0.1}
    module = DistillationLoss(2.0, 0.3, reduction=reduction, **options)

    def written(student: Tensor, teacher: Tensor) -> Tensor:
        log_p, q = (student / 2).log_softmax(1), (teacher / 2).softmax(1)
        distilled = 4 * F.kl_div(log_p, q, reduction="none").sum(1) * counts
        of_labels = F.cross_entropy(student, labels, reduction="none", **options) * counts
        if reduction == "none":
            return 0.3 * distilled + 0.7 * of_labels
        if reduction == "sum":
            return 0.3 * distilled.sum() + 0.7 * of_labels.sum()
        of_classes = (options["weight"][labels.long().clamp(min=0)] * counts).sum()
        return 0.3 * distilled.sum() / counts.sum() + 0.7 * of_labels.sum() / of_classes

    results = []
    for loss in (written, lambda x, z: module(x, z, labels, sample_weight=s if weighted else None)):
        leaves = [draw.logits.detach().requires_grad_(), draw.teacher().double().detach().requires_grad_()]
        value = loss(*leaves)
        results.append((value, *torch.autograd.grad(value.sum(), leaves)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    half = [leaf.bfloat16() for leaf in leaves]
    exact = written(*(leaf.double() for leaf in half))
    found = module(*half, labels, sample_weight=s if weighted else None)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)
    masked = [leaf.index_fill(1, torch.tensor([8]), -torch.inf) for leaf in leaves]  # 0 times an infinity is 0
    for alpha, student, teacher in ((0.0, masked[0], leaves[1]), (1.0, *masked)):
        last = torch.where(labels == -100, labels, 8 if alpha else 0)
        assert ext.distillation_loss(student, teacher, last, alpha=alpha, weight=torch.ones(9)).isfinite()


def test_weighted_labels_beside_a_teacher_under_transforms() -> None:
    student, teacher = logits_of((4, 6, 9), torch.float32), logits_of((4, 6, 9), torch.float32, key="teacher")
    labels = torch.arange(24).view(4, 6) % 10 - 1
    module = DistillationLoss(2.0, 0.3, ignore_index=-1, label_smoothing=0.1, weight=torch.rand(9) + 0.1)
    each = torch.stack([module(student[i], teacher[i], labels[i]) for i in range(4)])
    torch.testing.assert_close(torch.func.vmap(module)(student, teacher, labels), each)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(student[0], teacher[0], labels[0]), each[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert module(student[0].bfloat16(), teacher[0].bfloat16(), labels[0]).dtype == torch.float32


def test_statistics_are_what_they_are_called() -> None:
    for shape in [(9,), (5, 9), (2, 9, 6)]:
        logits = logits_of(shape, torch.float64)
        draw = Draw(logits)
        labels = draw.labels()
        axis = draw.axis
        for options in ({}, {"weight": draw.weight(), "label_smoothing": 0.1, "sample_weight": draw.sample_weight()}):
            stats = ext.cross_entropy_with_stats(logits, labels, z_loss=0.1, **options)
            p = torch.distributions.Categorical(logits=logits.movedim(axis, -1))
            same_to_rounding(stats.lse, logits.logsumexp(axis), 16)
            same_to_rounding(stats.target_log_prob, p.log_prob(labels), 16)
            same_to_rounding(stats.entropy, p.entropy(), 16)
            assert torch.equal(stats.argmax, logits.argmax(axis))
            same_to_rounding(stats.loss, ext.cross_entropy(logits, labels, z_loss=0.1, **options))
            without = ext.cross_entropy(logits, labels, **options)
            same_to_rounding(stats.z_loss, stats.loss - without, 64)
            assert not stats.z_loss.requires_grad and not stats.argmax.requires_grad


def test_the_first_of_equal_logits_is_the_argmax() -> None:
    for shape in [(4, 130), (4, 5000), (2, 40, 24), (2, 300, 3)]:
        for dtype in DTYPES:
            logits = torch.zeros(shape, dtype=dtype)
            positions = (shape[0], *shape[2:])
            labels = torch.zeros(positions, dtype=torch.long)
            assert not ext.cross_entropy_with_stats(logits, labels).argmax.any()
            for first in (0, 1, 7, shape[1] // 2, shape[1] - 1):
                for second in (first, shape[1] - 1):
                    logits.zero_()
                    logits.select(1, first).fill_(1)
                    logits.select(1, second).fill_(1)
                    for x in (logits, logits.masked_fill(logits == 0, -inf)):
                        found = ext.cross_entropy_with_stats(x, labels).argmax
                        assert torch.equal(found, torch.full(positions, first)), (shape, dtype, first, second)


def test_weights_of_one_and_options_that_change_nothing() -> None:
    """Sample weights of one, a z-loss of zero and a scale of one are the plain loss."""
    for shape in [(9, 33), (2, 9, 40)]:
        for dtype in DTYPES:
            logits = logits_of(shape, dtype)
            draw = Draw(logits)
            for target in (draw.labels(ignored=0.2), draw.probabilities()):
                for reduction in ("mean", "sum", "none"):
                    plain = check_call(ext.cross_entropy, logits, target, reduction=reduction)
                    for options in (
                        {"sample_weight": torch.ones(draw.positions)},
                        {"sample_weight": torch.ones(draw.positions, dtype=torch.bool)},
                        {"z_loss": 0.0, "softcap": None, "logit_scale": 1.0},
                        {"z_loss": 0, "logit_scale": 1},
                    ):
                        found = check_call(ext.cross_entropy, logits, target, reduction=reduction, **options)
                        for name, value in plain.items():
                            same_to_rounding(found[name], value)


# ------------------------------------------------------------------------------------------------------------
# Gradients: where they go, how often they are made, and in which bits.


def test_inplace_with_every_option() -> None:
    """The gradient takes the logits' storage in the backward, not before; or has memory of its own, but is right."""
    for shape in [(9, 33), (2, 7, 5, 6)]:
        for dtype in DTYPES:
            source = logits_of(shape, dtype).requires_grad_()
            draw = Draw(source)
            labels, s = draw.labels(ignored=0.2), draw.sample_weight()
            for function, options in (
                (ext.cross_entropy, {"sample_weight": s}),
                (ext.cross_entropy, {"z_loss": 0.1, "reduction": "none"}),
                (ext.cross_entropy, {"sample_weight": s, **EVERYTHING}),
                (ext.cross_entropy_with_stats, {"softcap": 5.0}),
            ):
                found = []
                for inplace in (False, True):
                    logits = source * 1
                    before = logits.detach().clone()
                    outputs = function(logits, labels, inplace=inplace, **options)
                    outputs = [outputs] if isinstance(outputs, Tensor) else outputs[:4]
                    assert torch.equal(logits, before), "the forward wrote"
                    (gradient,) = torch.autograd.grad([t.sum() for t in outputs], logits)
                    found.append([*outputs, gradient])
                for one, other in zip(*found, strict=True):
                    same_to_rounding(other.detach(), one.detach(), 8)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.id)
def test_two_backwards_of_every_target(target: Target) -> None:
    """The same bits twice, and what a factor makes of them: nothing of the first is left in what is saved."""
    for shape in [(7, 21), (2, 9, 40)]:
        logits = logits_of(shape, torch.float32)
        arguments, options = target.build(Draw(logits, "twice"))
        leaf = logits.clone().requires_grad_()
        outputs = target.function(leaf, *arguments, **options)
        loss = (outputs if isinstance(outputs, Tensor) else outputs.loss).sum()
        if not isinstance(outputs, Tensor):
            loss = loss + sum(getattr(outputs, name).sum() for name in target.statistics)
        first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
        assert first.data_ptr() != second.data_ptr()
        same_to_rounding(second, first, 8)
        kept = first.clone()
        for factor in (-2.0, 0.0, 0.3):
            (scaled,) = torch.autograd.grad(loss, leaf, torch.tensor(factor), retain_graph=True)
            same_to_rounding(scaled, factor * kept, 8)
        assert torch.equal(first, kept)
        leaf.grad = None
        loss.backward(retain_graph=True)
        loss.backward()
        same_to_rounding(leaf.grad, 2 * kept, 8)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.id)
def test_targets_do_not_depend_on_the_threads(target: Target) -> None:
    """1, 2 and 3 threads, and one run after the other: not one bit of any output or gradient differs."""
    threads = torch.get_num_threads()
    try:
        for shape, dtype in [
            ((1031, 101), torch.float32),
            ((3, 40001), torch.float32),
            ((5, 19, 43, 35), torch.bfloat16),
        ]:
            logits = logits_of(shape, dtype)
            draw = Draw(logits, target.id)
            arguments, options = target.build(draw)
            for upstream in (
                Upstream(torch.ones(())),
                draw.upstream(options.get("reduction", "mean"), *target.statistics),
            ):
                results = []
                for n in (1, 2, 3, 2):
                    torch.set_num_threads(n)
                    call = Call.of(target.function, (logits, *arguments), options)
                    wanted = tuple(
                        name for name in LEAVES if name in (t := call.tensors()) and t[name].is_floating_point()
                    )
                    results.append(call.run(target.function, upstream, wanted))
                for other in results[1:]:
                    for name, tensor in other.items():
                        assert torch.equal(tensor, results[0][name]), f"{name} differs"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.backends("cpu")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["index", "soft", "pairs", "teacher", "statistics"])
def test_logits_too_large_for_a_gradient_in_the_forward(kind: str) -> None:
    """Past 64 MB the backward makes it, streaming. It is what the parts of the batch give, each by itself."""
    rows, classes, parts = 272, 62_001, 4
    logits = torch.randn(rows, classes, generator=generator(kind)) * 3
    draw = Draw(logits, kind)
    labels, s = draw.labels(ignored=0.2), draw.sample_weight()
    function, tensors, options = {
        "index": (ext.cross_entropy, (labels,), {**EVERYTHING}),
        "soft": (ext.cross_entropy, (draw.probabilities(),), {"softcap": 5.0}),
        "pairs": (ext.sparse_cross_entropy, draw.pairs(3), {"z_loss": 0.1}),
        "teacher": (ext.distillation_loss, (draw.teacher(), labels), {"temperature": 2.0, "alpha": 0.5}),
        "statistics": (ext.cross_entropy_with_stats, (labels,), {"z_loss": 0.1}),
    }[kind]
    assert logits.numel() * 4 > 64 << 20 > logits.numel() * 4 // parts

    def run(x: Tensor, s: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        outputs = function(x, *tensors, sample_weight=s, reduction="sum", **options)
        total = outputs if isinstance(outputs, Tensor) else outputs.loss + outputs.entropy.sum() - outputs.lse.sum()
        return total.detach(), torch.autograd.grad(total, x)[0]

    loss, gradient = run(logits, s, *tensors)
    losses, gradients = zip(
        *(run(*part) for part in zip(*(t.chunk(parts) for t in (logits, s, *tensors)), strict=True)), strict=True
    )
    torch.testing.assert_close(loss, torch.stack(losses).sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, torch.cat(gradients), rtol=4e-6, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------
# The modules.


def test_the_modules_are_the_functions() -> None:
    logits = logits_of((6, 9), torch.float32)
    draw = Draw(logits)
    labels, s, weight = draw.labels(ignored=0.2), draw.sample_weight(), draw.weight()
    for options in ({}, {"z_loss": 0.1}, {"softcap": 4.0, "logit_scale": 0.5}, {"label_smoothing": 0.1, **EVERYTHING}):
        module = CrossEntropyLoss(weight, **options)
        for target in (labels, draw.probabilities()):
            expected = ext.cross_entropy(logits, target, weight, **options)
            assert torch.equal(module(logits, target), expected)
            expected = ext.cross_entropy(logits, target, weight, sample_weight=s, **options)
            assert torch.equal(module(logits, target, sample_weight=s), expected)
    teacher = draw.teacher()
    for options in (
        {"alpha": 1.0},
        {"temperature": 3.0, "alpha": 0.3, "kind": "ce", "reduction": "sum", "ignore_index": 2},
        {"temperature": 0.5, "alpha": 0.0, "reduction": "none"},
    ):
        module = DistillationLoss(**options)
        assert torch.equal(module(logits, teacher), ext.distillation_loss(logits, teacher, **options))
        target = labels.clamp(min=0)
        expected = ext.distillation_loss(logits, teacher, target, sample_weight=s, **options)
        assert torch.equal(module(logits, teacher, target, sample_weight=s), expected)


def test_copies_of_the_modules() -> None:
    """A copy has the options; so has a module that was pickled before there were any."""
    logits, teacher = logits_of((6, 9), torch.float32), logits_of((6, 9), torch.float32, key="teacher")
    labels = torch.arange(6)
    for module, arguments in (
        (CrossEntropyLoss(z_loss=0.1, softcap=3.0, logit_scale=0.5), (logits, labels)),
        (DistillationLoss(2.0, 0.5, "ce", "sum", 3), (logits, teacher, labels)),
    ):
        for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            assert type(twin) is type(module) and repr(twin) == repr(module)
            assert torch.equal(twin(*arguments), module(*arguments))
    old = CrossEntropyLoss.__new__(CrossEntropyLoss)
    old.__setstate__(nn.CrossEntropyLoss().__dict__)
    assert torch.equal(old(logits, labels), ext.cross_entropy(logits, labels)) and repr(old) == "CrossEntropyLoss()"
    with pytest.raises(TypeError):
        CrossEntropyLoss(None, None, -100, None, "mean", 0.0, 0.1)  # the package's own are given by name


LABELS = torch.tensor([[0, 4, -100], [3, 1, 2]])
# Of logits (B, V, T), and of the names of what else has a dimension of classes.
ALONG: dict[str, tuple[Callable[..., Tensor | CrossEntropyStats], tuple[str, ...]]] = {
    "indices": (lambda x, **o: ext.cross_entropy(x, LABELS, **o), ()),
    "extras": (lambda x, **o: ext.cross_entropy(x, LABELS, sample_weight=LABELS + 200, z_loss=0.1, **o), ()),
    "probabilities": (lambda x, q, **o: ext.cross_entropy(x, q, label_smoothing=0.1, **o), ("probs",)),
    "statistics": (lambda x, **o: ext.cross_entropy_with_stats(x, LABELS, **o), ()),
    "pairs": (lambda x, i, p, **o: ext.sparse_cross_entropy(x, i, p, **o), ("indices", "probs")),
    "MixUp": (lambda x, **o: ext.mixup_cross_entropy(x, LABELS, LABELS.flip(0), 0.3, **o), ()),
    "teacher": (lambda x, z, **o: ext.distillation_loss(x, z, LABELS, temperature=2.0, alpha=0.5, **o), ("probs",)),
    "nll": (lambda x, **o: ext.nll_loss(x, LABELS, **o), ()),
    "module": (lambda x, dim=1, **o: CrossEntropyLoss(z_loss=0.1, dim=dim, **o)(x, LABELS), ()),
    "module of a teacher": (lambda x, z, dim=1, **o: DistillationLoss(2.0, dim=dim, **o)(x, z), ("probs",)),
    "module of nll": (lambda x, dim=1, **o: NLLLoss(dim=dim, **o)(x, LABELS), ()),
}


class Operators(TorchDispatchMode):
    """Their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.thin(1, emulator=4)
@pytest.mark.parametrize("name", ALONG)
@pytest.mark.parametrize("dim", [-1, 2, 0, -3])
def test_the_dimension_of_the_classes(name: str, dim: int) -> None:
    """Equal to the bit to that of the same memory seen with the classes at 1, for nothing is copied; a gradient has the
    logits' own layout. The other dimensions keep their order."""
    function, others = ALONG[name]
    drawn = {"indices": torch.arange(30).view(2, 5, 3) % 5, "probs": logits_of((2, 5, 3), torch.float32).softmax(1)}
    tensors = [logits_of((2, 5, 3), torch.float32), *(drawn[other] for other in others)]
    moved = [tensor.movedim(1, dim).contiguous() for tensor in tensors]
    for reduction in ("mean", "none"):
        results = []
        for dims, views in ((dim, moved), (1, [tensor.movedim(dim, 1) for tensor in moved])):
            leaf = views[0].detach().requires_grad_()
            with Operators() as operators:
                found = function(leaf, *views[1:], dim=dims, reduction=reduction)
            loss = found[0] if isinstance(found, tuple) else found
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
            results.append((found, grad, operators.names))
        (found, grad, names), (expected, expected_grad, expected_names) = results
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert torch.equal(grad.movedim(dim, 1), expected_grad) and grad.stride() == moved[0].stride()
        assert [other for other in names if "permute" not in other] == expected_names


def test_the_dimension_of_few_dimensions() -> None:
    x, q = logits_of((5,), torch.float32), logits_of((5,), torch.float32).softmax(0)
    label = torch.tensor(3)
    for dim in (1, 0, -1):
        assert torch.equal(ext.cross_entropy(x, label, dim=dim), ext.cross_entropy(x, label))
        assert torch.equal(ext.cross_entropy(x, q, dim=dim), ext.cross_entropy(x, q))
        assert torch.equal(ext.nll_loss(x, label, dim=dim), ext.nll_loss(x, label))
    rows, labels = logits_of((5, 4), torch.float32), torch.tensor([0, 4, 1, 2])
    for dim in (0, -2):
        assert torch.equal(ext.cross_entropy(rows, labels, dim=dim), ext.cross_entropy(rows.T, labels))
    for function in (ext.cross_entropy, ext.cross_entropy_with_stats, ext.nll_loss):
        for arguments, dim in (((x, label), -2), ((x, label), 2), ((rows, labels), 2), ((rows, labels), -3)):
            with pytest.raises(IndexError, match="Dimension out of range"):
                function(*arguments, dim=dim)
        with pytest.raises(TypeError, match=r"target must be a tensor, but got \[1\]"):
            function(rows, [1], dim=0)


def test_the_dimension_of_the_classes_under_transforms() -> None:
    x, labels = logits_of((4, 3, 5), torch.float32), torch.tensor([[0, 4, -100], [3, 1, 2], [1, 1, 1], [2, 0, 3]])

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return ext.cross_entropy(x, labels, dim=-1, z_loss=0.1)

    each = torch.stack([loss(x[i], labels[i]) for i in range(4)])
    torch.testing.assert_close(torch.func.vmap(loss)(x, labels), each)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, labels), loss(x, labels))
    for module in (CrossEntropyLoss(dim=-1), NLLLoss(dim=-1)):
        with pytest.raises(Exception, match="TorchScript"):
            torch.jit.script(module)(x, labels)


def test_what_the_modules_show() -> None:
    """The options that native does not have, where they are not the default; tensors among them as well."""
    assert repr(CrossEntropyLoss(softcap=30, loss_dtype=torch.float64, inplace=True, ignore_index=1)) == (
        "CrossEntropyLoss(softcap=30, loss_dtype=torch.float64, inplace=True)"
    )
    assert repr(VocabParallelCrossEntropyLoss(z_loss=1e-4, shard_sizes=[3, 4])) == (
        "VocabParallelCrossEntropyLoss(z_loss=0.0001, shard_sizes=[3, 4])"
    )
    assert repr(DistillationLoss(2.0, ignore_index=0)) == (
        "DistillationLoss(temperature=2.0, alpha=None, kind='kl', reduction='mean', ignore_index=0)"
    )
    assert repr(LinearCrossEntropyLoss(3, 5, empty="zero")).splitlines()[1].endswith("options=None, empty='zero'")
    assert "logit_scale=Parameter" in repr(CrossEntropyLoss(logit_scale=nn.Parameter(torch.tensor(1.0))))


def test_weights_of_positions_are_given_to_modules_by_name() -> None:
    """A third argument is class weights to the function, and would be something else to the module."""
    x, labels, ones = logits_of((6, 9), torch.float32), torch.arange(6), torch.ones(6)
    for module, arguments in (
        (CrossEntropyLoss(), (x, labels)),
        (DistillationLoss(alpha=0.5), (x, x, labels)),
        (LinearCrossEntropyLoss(9, 9), (x, labels)),
        (VocabParallelCrossEntropyLoss(), (x, labels)),
    ):
        with pytest.raises(TypeError, match="positional arguments"):
            module(*arguments, ones)
    assert CrossEntropyLoss()(x, labels, sample_weight=ones) == CrossEntropyLoss()(x, labels)


def test_the_oracle_agrees_with_the_compositions() -> None:
    """In float64, where neither loses much: two ways to write every loss and all of its gradients."""
    for shape in [(7,), (5, 7), (2, 7, 4)]:
        logits = logits_of(shape, torch.float64)
        for target in TARGETS:
            draw = Draw(logits, target.id)
            arguments, options = target.build(draw)
            call = Call.of(target.function, (logits, *arguments), options)
            wanted = (*LEAVES, *(["sample_weight"] if "sample_weight" in call.arguments else []))
            wanted = tuple(name for name in wanted if name in (t := call.tensors()) and t[name].is_floating_point())
            upstream = draw.upstream(options.get("reduction", "mean"), *target.statistics, loss=target.loss)
            composed = call.run(getattr(compositions, call.name), upstream, wanted)
            exact = call.exact(upstream)
            if not target.loss:
                exact.pop("sample_weight", None)
            for name, value in composed.items():
                if name == "argmax" or (name == "sample_weight" and call.name == "mixup_cross_entropy"):
                    continue  # of a mixture the oracle has no gradient to sample weights
                assert value.shape == exact[name].value.shape and torch.allclose(
                    value, exact[name].value, rtol=1e-11, atol=1e-12, equal_nan=True
                ), f"{target.id}: {name}"

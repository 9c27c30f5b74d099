"""The CUDA kernels of the negative log likelihood in the emulator: the gradient's tiles around each of their sizes,
schedules, and what the kernels report. The values are in test_nll.py."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from backends import DEVICES, SCHEDULES, needs_emulator
from cases import DTYPES, generator, name_of, place
from oracle_nll import check, log_probabilities, target_for, weight_for

from cross_entropy_ext import functional as ext

pytestmark = [needs_emulator, pytest.mark.usefixtures("kernels")]

TILE, RUN = 8192, 1024  # elements; inner positions


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "shape",
    [
        (9, TILE - 1),
        (9, TILE),
        (3, TILE + 1),
        (2, 2 * TILE + 3),
        (700, 33),
        (40, 21, 25),
        (2, 600, 30),
        (2, 9, RUN - 1),
        (2, 9, RUN),
        (2, 9, RUN + 1),
        (1, 3, 2 * RUN + 5),
    ],
    ids=str,
)
def test_nll_gradient_tiles(kernels: ModuleType, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, generator=generator(shape)).to(dtype)
    for device in ("h200", "one"):
        kernels.set_device(*DEVICES[device])
        for layout in (logits, place(logits, order=(0, *range(2, len(shape)), 1))):
            check(layout, target_for(logits, ignored=0.2), weight_for(logits), reduction="none", reason=str(shape))
            check(layout, target_for(logits, ignored=0.2), weight_for(logits), reason=str(shape))


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_nll_schedules(kernels: ModuleType, order: str, seed: int) -> None:
    """A missing barrier lets zeros overwrite an element."""
    for shape in [(900, 10), (3, TILE + 7), (2, 19, 1100), (2, 300, 40)]:
        logits = torch.randn(shape, generator=generator(shape)).requires_grad_()
        target, found = target_for(logits, ignored=0.2), []
        for schedule in (("in_order", 0), (order, seed)):
            kernels.set_schedule(*schedule)
            loss = ext.nll_loss(logits, target, weight_for(logits))
            found.append((loss.detach(), torch.autograd.grad(loss, logits)[0]))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("shape", [(6, 10), (2, 21, 16), (11,)], ids=str)
def test_nll_reports_a_target_that_is_no_class(kernels: ModuleType, shape: tuple[int, ...]) -> None:
    """Its loss is NaN and its gradient zero; then an IndexError, once."""
    input = log_probabilities(*shape).requires_grad_()
    target = target_for(input)
    target.view(-1)[-1] = 100
    loss = ext.nll_loss(input, target, reduction="none")
    with pytest.raises(IndexError, match=r"Target 100 is out of bounds"):
        kernels.check_errors()
    kernels.check_errors()
    assert loss.view(-1)[-1].isnan() and loss.view(-1)[:-1].isfinite().all()
    (gradient,) = torch.autograd.grad(loss, input, torch.ones_like(loss))
    assert (gradient != 0).sum() == loss.numel() - 1

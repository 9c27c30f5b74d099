"""Small float64 problems for everything that differentiates, transforms or compiles the loss: one per kind
of target, option and layout, each with the reason it is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from cross_entropy_ext import functional as ours


@dataclass(frozen=True)
class Sample:
    name: str
    reason: str
    build: Callable[[], tuple[torch.Tensor, torch.Tensor, dict]]

    def make(self, dtype: torch.dtype = torch.float64, seed: int = 0):
        """(logits, target, options), new every time; the logits keep the layout that the sample is about."""
        torch.manual_seed(seed)
        logits, target, options = self.build()
        options = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        return cast_like(logits, dtype), target.to(dtype) if target.is_floating_point() else target, options


def cast_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in another dtype with the same strides, in a storage that is as large as x's own."""
    if x.dtype == dtype:
        return x
    whole = torch.as_strided(x, (x.untyped_storage().size() // x.element_size(),), (1,), 0)
    return whole.to(dtype).as_strided(x.size(), x.stride(), x.storage_offset())


def normal(*size: int) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64)


def labels(classes: int, *size: int, ignored: bool = False) -> torch.Tensor:
    target = torch.randint(classes, size)
    if ignored:
        target.view(-1)[::3] = -100
    return target


def soft(*size: int) -> torch.Tensor:
    return normal(*size).softmax(1 if len(size) > 1 else 0)


def weights(classes: int) -> torch.Tensor:
    return torch.rand(classes, dtype=torch.float64) + 0.5


def transposed(batch: int, length: int, classes: int) -> torch.Tensor:
    return normal(batch, length, classes).transpose(1, 2)


SAMPLES = [
    Sample("mean", "the default call", lambda: (normal(4, 5), labels(5, 4), {})),
    Sample("sum", "no denominator", lambda: (normal(4, 5), labels(5, 4), {"reduction": "sum"})),
    Sample(
        "none",
        "one upstream gradient per position",
        lambda: (normal(4, 5), labels(5, 4), {"reduction": "none"}),
    ),
    Sample(
        "ignored",
        "rows outside the mean and the gradient",
        lambda: (normal(5, 4), labels(4, 5, ignored=True), {}),
    ),
    Sample(
        "weights",
        "the mean divides by the weights",
        lambda: (normal(4, 5), labels(5, 4), {"weight": weights(5)}),
    ),
    Sample(
        "smoothing",
        "every class has a coefficient",
        lambda: (normal(4, 5), labels(5, 4), {"label_smoothing": 0.2}),
    ),
    Sample(
        "weights_smoothing_ignored",
        "the three options that share the denominator",
        lambda: (normal(5, 4), labels(4, 5, ignored=True), {"weight": weights(4), "label_smoothing": 0.2}),
    ),
    Sample(
        "full_smoothing",
        "the label has no say",
        lambda: (normal(3, 4), labels(4, 3), {"label_smoothing": 1.0}),
    ),
    Sample("no_batch", "the class dimension is dimension 0", lambda: (normal(5), torch.tensor(2), {})),
    Sample("soft", "class probabilities", lambda: (normal(4, 5), soft(4, 5), {})),
    Sample("soft_no_batch", "probabilities without a batch", lambda: (normal(5), soft(5), {})),
    Sample(
        "soft_not_normalised",
        "probabilities that sum to anything: the softmax is scaled by their sum",
        lambda: (normal(3, 4), normal(3, 4), {"reduction": "sum"}),
    ),
    Sample(
        "soft_weights_smoothing",
        "probabilities with both options, position by position",
        lambda: (
            normal(3, 4),
            soft(3, 4),
            {"weight": weights(4), "label_smoothing": 0.3, "reduction": "none"},
        ),
    ),
    Sample(
        "soft_kdim",
        "probabilities per pixel",
        lambda: (normal(2, 3, 2, 2), soft(2, 3, 2, 2), {"weight": weights(3)}),
    ),
    Sample(
        "kdim",
        "contiguous pixels: classes are strided",
        lambda: (normal(2, 3, 2, 3), labels(3, 2, 2, 3, ignored=True), {"weight": weights(3)}),
    ),
    Sample(
        "kdim_none",
        "a map of losses",
        lambda: (normal(2, 3, 4), labels(3, 2, 4), {"reduction": "none", "label_smoothing": 0.1}),
    ),
    Sample("five_dims", "voxels", lambda: (normal(1, 3, 2, 1, 2), labels(3, 1, 2, 1, 2), {})),
    Sample(
        "channels_last",
        "pixels whose classes are contiguous",
        lambda: (normal(2, 3, 2, 2).to(memory_format=torch.channels_last), labels(3, 2, 2, 2), {}),
    ),
    Sample(
        "channels_last_soft",
        "probabilities in another layout than the logits",
        lambda: (normal(2, 3, 2, 2).to(memory_format=torch.channels_last), soft(2, 3, 2, 2), {}),
    ),
    Sample("transposed", "(B, T, V) handed over as (B, V, T)", lambda: (transposed(2, 3, 4), labels(4, 2, 3), {})),
    Sample(
        "row_slices",
        "rows of a wider matrix: the row stride is not the class count",
        lambda: (normal(4, 7)[:, 1:6], labels(5, 4), {"label_smoothing": 0.1}),
    ),
    Sample("column_major", "classes are strided in two dimensions", lambda: (normal(5, 4).t(), labels(5, 4), {})),
    Sample(
        "small_labels",
        "uint8 labels, as images store them",
        lambda: (normal(4, 5), labels(5, 4).to(torch.uint8), {}),
    ),
]

every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
soft_samples = pytest.mark.parametrize("sample", [s for s in SAMPLES if "soft" in s.name], ids=lambda s: s.name)


def named(*names: str):
    """Parametrize over a few samples, by name."""
    table = {s.name: s for s in SAMPLES}
    return pytest.mark.parametrize("sample", [table[n] for n in names], ids=lambda s: s.name)


def native(input, target, *args, loss_dtype=None, empty="nan", inplace=False, **options):
    """The native loss under our signature; integer labels of any width."""
    loss = F.cross_entropy(input, target if target.is_floating_point() else target.long(), *args, **options)
    return loss if loss_dtype is None else loss.to(loss_dtype)


def grads(loss_function, logits, target, options, upstream=None, **extras):
    """(loss, d logits, d target or None): one forward and one backward on fresh leaves that keep the
    strides."""
    logits = logits.detach().requires_grad_()
    soft_target = target.is_floating_point()
    target = target.detach().requires_grad_(soft_target)
    loss = loss_function(logits, target, **options, **extras)
    upstream = (
        torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape) if upstream is None else upstream
    )
    found = torch.autograd.grad(loss, (logits, target) if soft_target else (logits,), upstream)
    return loss.detach(), found[0], found[1] if soft_target else None


def close(actual, expected, tolerance: float = 1e-12):
    """Equal to rounding in float64, of one dtype and shape; of tuples and lists every element (None equals
    None)."""
    if isinstance(expected, tuple | list):
        for a, e in zip(actual, expected, strict=True):
            close(a, e, tolerance)
    elif expected is None:
        assert actual is None
    else:
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def same(actual, expected):
    """Equal bit for bit (NaN equals NaN)."""
    close(actual, expected, tolerance=0)


def alike(actual, expected):
    """Equal to a few roundings of their own dtype: a gradient that is made in the forward reuses its exponentials, one
    that is made in the backward computes them from lse."""
    if isinstance(expected, tuple | list):
        for a, e in zip(actual, expected, strict=True):
            alike(a, e)
    elif expected is None:
        assert actual is None
    else:
        rounding = 4 * torch.finfo(expected.dtype).eps
        # A gradient of zero may be the difference of two terms as large as a position's share.
        scale = max(expected.abs().nan_to_num(0, 0).max().item(), 1 / len(expected)) if expected.dim() else 0
        torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding * scale, equal_nan=True)


cross_entropy = ours.cross_entropy

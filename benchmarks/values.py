"""Compares a provider's loss and gradient with float64, before it is timed.

The float64 loss is computed in pieces, so that no case needs twice its memory. The gradient is compared at the first, a
middle and the last row or image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import Inputs

# Relative to the loss, and to the largest element of the gradient. They tell wrong from right; benchmarks.accuracy
# compares accuracies. The native loss rounds log-probabilities to bfloat16, which shows in its gradient.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 3e-2, torch.float32: 1e-4, torch.float64: 1e-10}


class Expected:
    def __init__(self, inputs: Inputs) -> None:
        logits, target, options = inputs.logits, inputs.target, inputs.options
        reduction = options.get("reduction", "mean")
        options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items() if k != "reduction"}
        denominator = _denominator(inputs) if reduction == "mean" else 1.0
        pieces = max(1, 2**25 * logits.size(0) // logits.numel())
        total = 0.0
        for x, t in zip(logits.split(pieces), target.split(pieces), strict=True):
            total += F.cross_entropy(x.double(), _wide(t), reduction="sum", **options).item()
        self.loss = total / denominator
        self.some = torch.tensor([0, logits.size(0) // 2, logits.size(0) - 1], device=logits.device)
        x = logits[self.some].double().requires_grad_()
        loss = F.cross_entropy(x, _wide(target[self.some]), reduction="sum", **options) / denominator
        (self.grad,) = torch.autograd.grad(loss, x)
        self.tolerance = TOLERANCE[logits.dtype]

    def wrong(self, loss: Tensor, grad: Tensor | None) -> str:
        """Says what is wrong, or nothing."""
        value = loss.double().sum().item()
        if not abs(value - self.loss) <= self.tolerance * abs(self.loss):
            return f"the loss is {value:.6g}, not {self.loss:.6g}"
        if grad is None:
            return ""
        return difference("the gradient", grad[self.some], self.grad, self.tolerance)


def difference(name: str, found: Tensor, expected: Tensor, tolerance: float) -> str:
    """Says how far a tensor is from the expected one, or nothing."""
    error, largest = (found.double() - expected.double()).abs().max().item(), expected.abs().max().item()
    if not error <= tolerance * largest:  # a NaN compares false
        return f"{name} is off by {error:.3g}, its largest element is {largest:.3g}"
    return ""


def _wide(target: Tensor) -> Tensor:
    return target.double() if target.is_floating_point() else target


def _denominator(inputs: Inputs) -> float:
    """The denominator of a mean."""
    if inputs.target.is_floating_point():
        return float(inputs.positions)
    counted = inputs.target[inputs.target != inputs.options.get("ignore_index", -100)]
    weight = inputs.options.get("weight")
    return float(counted.numel() if weight is None else weight.double()[counted].sum())

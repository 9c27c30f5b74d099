"""The losses as functions: torch.nn.functional's signatures and values, computed by the fused kernels."""

from .._options import CrossEntropyStats
from .linear import linear_cross_entropy, linear_cross_entropy_with_stats, linear_sparse_cross_entropy
from .losses import (
    cross_entropy,
    cross_entropy_with_stats,
    distillation_loss,
    mixup_cross_entropy,
    nll_loss,
    sparse_cross_entropy,
)

__all__ = [
    "CrossEntropyStats",
    "cross_entropy",
    "cross_entropy_with_stats",
    "distillation_loss",
    "linear_cross_entropy",
    "linear_cross_entropy_with_stats",
    "linear_sparse_cross_entropy",
    "mixup_cross_entropy",
    "nll_loss",
    "sparse_cross_entropy",
]

"""Fused cross-entropy for PyTorch: the native loss's interface and values, in one pass over the logits.

    from cross_entropy_ext import CrossEntropyLoss  # instead of: from torch.nn import CrossEntropyLoss

    loss = CrossEntropyLoss(label_smoothing=0.1)(logits, target)
    loss.backward()

`cross_entropy_ext.cross_entropy` is the same as a function. `python -m cross_entropy_ext`
prints how this copy was built and checks it against the native loss.
"""

__version__ = "0.1.0"

from ._extension import load, tag_compile_caches

load()  # before anything else imports torch, so that what is missing is said in one sentence
tag_compile_caches()

from . import distributed, functional
from ._decompositions import register_decompositions
from ._flops import register_flop_formulas
from ._options import LinearCrossEntropyOptions
from .functional import (
    CrossEntropyStats,
    cross_entropy,
    cross_entropy_with_stats,
    distillation_loss,
    linear_cross_entropy,
    linear_cross_entropy_with_stats,
    linear_sparse_cross_entropy,
    mixup_cross_entropy,
    nll_loss,
    sparse_cross_entropy,
)
from .modules import CrossEntropyLoss, DistillationLoss, LinearCrossEntropyLoss, NLLLoss
from .patch import is_patched, patch_torch, unpatch_torch
from .runtime import build_info, check_errors, empty_cache

register_decompositions()
register_flop_formulas()

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyStats",
    "DistillationLoss",
    "LinearCrossEntropyLoss",
    "LinearCrossEntropyOptions",
    "NLLLoss",
    "build_info",
    "check_errors",
    "cross_entropy",
    "cross_entropy_with_stats",
    "distillation_loss",
    "distributed",
    "empty_cache",
    "functional",
    "is_patched",
    "linear_cross_entropy",
    "linear_cross_entropy_with_stats",
    "linear_sparse_cross_entropy",
    "mixup_cross_entropy",
    "nll_loss",
    "patch_torch",
    "sparse_cross_entropy",
    "unpatch_torch",
]

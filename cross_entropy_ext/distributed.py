"""Cross entropy of logits whose classes are sharded over the processes of a `torch.distributed` group."""

from ._parallel.vocabulary import (
    VocabParallelCrossEntropyLoss,
    vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy_with_stats,
    vocab_parallel_linear_cross_entropy,
)

__all__ = [
    "VocabParallelCrossEntropyLoss",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_cross_entropy_with_stats",
    "vocab_parallel_linear_cross_entropy",
]

"""The loss as modules."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from . import functional

__all__ = ["CrossEntropyLoss"]


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` computed in one pass: the same arguments, buffers, state_dict and repr.

    The keyword-only arguments are those of :func:`cross_entropy_ext.functional.cross_entropy`, which also says what
    shapes, dtypes and errors there are.

    Example:
        >>> criterion = CrossEntropyLoss(ignore_index=0, label_smoothing=0.1)
        >>> loss = criterion(torch.randn(8, 1000, requires_grad=True), torch.randint(1000, (8,)))
        >>> loss.backward()
    """

    # For modules that were pickled as the class they derive from.
    loss_dtype = None
    empty = "nan"
    inplace = False

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        loss_dtype: torch.dtype | None = None,
        empty: Literal["nan", "zero"] = "nan",
        inplace: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.loss_dtype = loss_dtype
        self.empty = empty
        self.inplace = inplace

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (C), (N, C) or (N, C, d1, ..., dK) against indices or probabilities."""
        if torch.jit.is_scripting():
            assert self.empty == "nan" and self.loss_dtype is None, "TorchScript has the native loss and its arguments"
            return nn.functional.cross_entropy(
                input,
                target,
                weight=self.weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
            )
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            loss_dtype=self.loss_dtype,
            empty=self.empty,
            inplace=self.inplace,
        )

"""The loss as modules."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import functional
from ._call import is_dtensor
from ._options import LinearCrossEntropyOptions

__all__ = ["CrossEntropyLoss", "DistillationLoss", "LinearCrossEntropyLoss", "NLLLoss"]


# The options that PyTorch's modules do not have, and their defaults. The modules have them as attributes.
EXTRAS = {
    name: parameter.default
    for name, parameter in inspect.signature(functional.cross_entropy).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in ("sample_weight", "denominator")
}


def extras_of(module: nn.Module) -> dict[str, Any]:
    """Returns the module's own options by name, as far as it has them."""
    return {name: getattr(module, name) for name in EXTRAS if hasattr(module, name)}


def shown(module: nn.Module, defaults: dict[str, Any]) -> list[str]:
    """Returns the options of a module that are not the defaults, as `repr` shows them."""
    values = ((name, getattr(module, name, default), default) for name, default in defaults.items())
    return [f"{name}={value!r}" for name, value, default in values if isinstance(value, Tensor) or value != default]


def _complete(module: nn.Module, defaults: dict[str, Any]) -> None:
    """Gives a module the options that it was pickled without, as when its class derived from native's."""
    for name, default in defaults.items():
        if not hasattr(module, name):
            setattr(module, name, default)


def _scripted_as(scripted: Callable) -> Callable:
    """Let TorchScript, which knows no keyword-only arguments, compile another method in the place of the decorated one.

    It reads the source of what a function wraps. `inspect.signature` would do so, too, but for `__signature__`.
    """

    def decorate(forward: Callable) -> Callable:
        forward.__signature__ = inspect.signature(forward)
        forward.__wrapped__ = scripted
        return forward

    return decorate


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` computed in one pass: the same arguments, buffers, state_dict and repr.

    The keyword-only arguments are those of :func:`cross_entropy_ext.functional.cross_entropy`, which also says what
    shapes, dtypes and errors there are.

    Example:
        >>> criterion = CrossEntropyLoss(ignore_index=0, label_smoothing=0.1)
        >>> loss = criterion(torch.randn(8, 1000, requires_grad=True), torch.randint(1000, (8,)))
        >>> loss.backward()
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        loss_dtype: torch.dtype | None = None,
        empty: Literal["nan", "zero"] = "nan",
        inplace: bool = False,
        dim: int = 1,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.loss_dtype = loss_dtype
        self.empty = empty
        self.inplace = inplace
        self.dim = dim

    def _forward_of_torchscript(self, input: Tensor, target: Tensor) -> Tensor:
        assert self.empty == "nan" and self.loss_dtype is None, "TorchScript has the native loss and its arguments"
        assert self.z_loss == 0 and self.softcap is None and self.logit_scale == 1 and self.dim == 1
        return nn.functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    @_scripted_as(_forward_of_torchscript)
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of logits (C), (N, C) or (N, C, d1, ..., dK) against indices or probabilities.

        ``sample_weight``: a factor for each position, (), (N) or (N, d1, ..., dK). ``denominator``: a number or a
        scalar tensor that ``'mean'`` divides by instead. Both are keyword only: the third argument of
        :func:`cross_entropy_ext.functional.cross_entropy` is the class weights, which a module has from the start.
        """
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            loss_dtype=self.loss_dtype,
            empty=self.empty,
            denominator=denominator,
            inplace=self.inplace,
            dim=self.dim,
        )

    def extra_repr(self) -> str:
        return ", ".join(shown(self, EXTRAS))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _complete(self, EXTRAS)


class DistillationLoss(nn.Module):
    """:func:`cross_entropy_ext.functional.distillation_loss` as a module.

    That function's documentation describes the arguments, the shapes and dtypes, and the errors.

    Example:
        >>> criterion = DistillationLoss(temperature=4.0, alpha=0.7)
        >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        >>> criterion(student, teacher, torch.randint(10, (8,))).backward()
    """

    def __init__(
        self,
        temperature: float = 1.0,
        alpha: float | None = None,
        kind: Literal["kl", "ce"] = "kl",
        reduction: str = "mean",
        ignore_index: int = -100,
        *,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        loss_dtype: torch.dtype | None = None,
        dim: int = 1,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.temperature = temperature
        self.alpha = alpha
        self.kind = kind
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.loss_dtype = loss_dtype
        self.dim = dim

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of logits (C), (N, C) or (N, C, d1, ..., dK) of both, and of class indices where there are some."""
        return functional.distillation_loss(
            student_logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            alpha=self.alpha,
            kind=self.kind,
            reduction=self.reduction,
            sample_weight=sample_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            weight=self.weight,
            loss_dtype=self.loss_dtype,
            dim=self.dim,
        )

    def extra_repr(self) -> str:
        always = ("temperature", "alpha", "kind", "reduction")
        others = {"ignore_index": -100, "label_smoothing": 0.0, "loss_dtype": None, "dim": 1}
        return ", ".join([*(f"{name}={getattr(self, name)!r}" for name in always), *shown(self, others)])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _complete(self, {"label_smoothing": 0.0, "weight": None, "dim": 1})


class LinearCrossEntropyLoss(getattr(nn, "LinearCrossEntropyLoss", nn.modules.loss._WeightedLoss)):
    """:class:`torch.nn.LinearCrossEntropyLoss`: an output layer and its loss, whose logits are never whole.

    The same arguments, parameters, state_dict and repr, for any torch; the keyword-only arguments after ``options`` are
    those of :func:`cross_entropy_ext.functional.linear_cross_entropy`, which says what shapes and errors there are.

    The loss runs in the place of the forward of ``linear``, and so with the weight that FSDP gathers for that forward,
    whatever `fully_shard` was called on: this module, its ``linear`` or a module around them. Hooks of ``linear`` run.
    Its forward hooks see the loss in the place of logits, which there are none of; its forward pre-hooks may change the
    input. Several threads may call one module at a time.

    Another module in the place of ``linear`` (an adapter, a quantized layer) makes its own logits, and the loss is made
    of these. Hooks of such a module see its logits.

    Args:
        in_features: F, the size of each input.
        num_classes: C.
        out_features: (d1, ..., dK) of a K-dimensional loss. ``linear.weight`` is (C * d1 * ... * dK, F).
        bias: whether ``linear`` has one.
        device, dtype: of ``linear``.
        weight: one factor per class, (C).

    Example:
        >>> head = LinearCrossEntropyLoss(512, 32000)
        >>> hidden, target = torch.randn(8, 128, 512, requires_grad=True), torch.randint(32000, (8, 128))
        >>> head(hidden, target).backward()
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device=None,
        dtype=None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: LinearCrossEntropyOptions | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        loss_dtype: torch.dtype | None = None,
        empty: Literal["nan", "zero"] = "nan",
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if label_smoothing < 0 or label_smoothing > 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        nn.modules.loss._WeightedLoss.__init__(self, weight, None, None, reduction)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.linear = nn.Linear(
            in_features, math.prod(out_features, start=num_classes), bias=bias, device=device, dtype=dtype
        )
        self.options = options
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.loss_dtype = loss_dtype
        self.empty = empty

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of inputs (F), (N, F) or (B, ..., F) against class indices or probabilities of their logits."""
        layer = self.linear
        options = extras_of(self) | {
            "weight": self.weight,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "denominator": denominator,
        }
        own = _own_forward(layer)
        if type(layer).forward is not nn.Linear.forward or not (own is None or isinstance(own, _Forward)):
            return self._of_logits(layer(input), target, sample_weight, options)

        def loss(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if self.out_features:
                weight = weight.unflatten(0, (self.num_classes, *self.out_features))
                bias = None if bias is None else bias.unflatten(0, (self.num_classes, *self.out_features))
            return functional.linear_cross_entropy(
                input,
                weight,
                target,
                linear_bias=bias,
                ignore_index=self.ignore_index,
                options=self.options,
                sample_weight=sample_weight,
                **options,
            )

        if layer._forward_pre_hooks or layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
            return _in_forward_of(layer, input, loss)
        return loss(input, layer.weight, layer.bias)

    def _of_logits(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None, options: dict) -> Tensor:
        """The loss of logits that another module in the place of the layer has made, say one with an adapter."""
        logits = logits.unflatten(-1, (self.num_classes, *self.out_features))
        if self.ignore_index is not None:
            if target.shape == logits.shape:
                raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
            options["ignore_index"] = self.ignore_index
        dim = 1 if self.out_features else -1
        return functional.cross_entropy(logits, target, sample_weight=sample_weight, dim=dim, **options)

    def extra_repr(self) -> str:
        native = (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
            f"out_features={self.out_features}, bias={self.linear.bias is not None}, reduction={self.reduction}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, options={self.options}"
        )
        return ", ".join([native, *shown(self, EXTRAS)])


def _in_forward_of(layer: nn.Linear, input: Tensor, loss: Callable[..., Tensor]) -> Tensor:
    """``loss(input, layer.weight, layer.bias)`` in the place of the layer's forward, between the hooks around it.

    Some weights are there only between these: FSDP gathers them before the forward, pruning and old parametrizations
    make them. The hooks of `parallelize_module` instead place input and logits, of which there are none: the input
    alone is for them, and the weight stays sharded.
    """
    if _is_sharded_in_place(layer):
        for key, hook in layer._forward_pre_hooks.items():
            if key in layer._forward_pre_hooks_with_kwargs:
                result = hook(layer, (input,), {})
                result = result if result is None else result[0]
            else:
                result = hook(layer, (input,))
            if result is not None:
                (input,) = result if isinstance(result, tuple) else (result,)
        return loss(input, layer.weight, layer.bias)

    if torch.compiler.is_dynamo_compiling():  # Dynamo follows no lock. An attribute that is gone again is never real.
        if isinstance(_own_forward(layer), _Forward):  # An eager thread has set it.
            return layer(input, loss=loss)
        layer.forward = _Forward(layer)
        try:
            return layer(input, loss=loss)
        finally:
            layer.__dict__.pop("forward", None)

    with _forwards:
        forward = _own_forward(layer)
        if forward is None:
            layer.forward = forward = _Forward(layer)
        forward.calls += 1
    try:
        return layer(input, loss=loss)
    finally:
        with _forwards:
            forward.calls -= 1
            if not forward.calls:
                layer.__dict__.pop("forward", None)


class _Forward:
    """A layer's forward while calls of its LinearCrossEntropyLoss are under way, in any number of threads.

    A call hands over its own loss: nothing of it is kept here. A call of the layer itself hands over none.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.calls = 0  # This many are under way. The last one to end takes this forward away.

    def __call__(self, input: Tensor, loss: Callable[..., Tensor] | None = None) -> Tensor:
        layer = self.layer
        if loss is None:
            return type(layer).forward(layer, input)
        if is_dtensor(layer.weight):
            raise RuntimeError(
                "the layer of LinearCrossEntropyLoss is sharded by fully_shard and by parallelize_module: call "
                "fully_shard on the loss, or on a module around it, instead of on its layer"
            )
        return loss(input, layer.weight, layer.bias)


_forwards = threading.Lock()  # It is held while a _Forward is set, counted or taken away, and not while one runs.


def _own_forward(layer: nn.Module) -> Callable | None:
    """The forward that has been set on the layer itself, in the place of its class's."""
    return vars(layer).get("forward")


def _is_sharded_in_place(layer: nn.Linear) -> bool:
    """Return whether the weight is a DTensor, and will be one in the layer's forward."""
    if not is_dtensor(layer.weight):
        return False
    from torch.distributed.fsdp import FSDPModule

    return not isinstance(layer, FSDPModule)


class NLLLoss(nn.NLLLoss):
    """:class:`torch.nn.NLLLoss`, deterministic on every device: the same arguments, buffers, state_dict and repr.

    :func:`cross_entropy_ext.functional.nll_loss` says what shapes, dtypes and errors there are.

    Example:
        >>> criterion = NLLLoss(ignore_index=0)
        >>> loss = criterion(torch.randn(8, 1000, requires_grad=True).log_softmax(1), torch.randint(1000, (8,)))
        >>> loss.backward()
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        dim: int = 1,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction)
        self.dim = dim

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of log-probabilities (C), (N, C) or (N, C, d1, ..., dK) against class indices."""
        if torch.jit.is_scripting():
            assert self.dim == 1, "TorchScript has the native loss and its arguments"
            return nn.functional.nll_loss(
                input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction
            )
        return functional.nll_loss(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            dim=self.dim,
        )

    def extra_repr(self) -> str:
        return ", ".join(shown(self, {"dim": 1}))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _complete(self, {"dim": 1})

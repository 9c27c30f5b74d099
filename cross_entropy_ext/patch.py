"""`patch_torch()`: programs that know nothing of this package compute their losses with it.

It replaces three functions, `F.cross_entropy`, `F.nll_loss` and `F.linear_cross_entropy`, under every name that a
module has for them. The classes stay what they are: `nn.CrossEntropyLoss` and its like look the functions up whenever
they are called. So the patch reaches instances that exist already, subclasses, and classes kept where no search would
find them. `isinstance`, `type`, pickles and checkpoints notice nothing.
"""

import sys
from collections.abc import Callable
from threading import RLock
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.functional import cross_entropy as native_cross_entropy
from torch.nn.functional import nll_loss as native_nll_loss
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import functional
from ._options import LinearCrossEntropyOptions

native_linear_cross_entropy = getattr(F, "linear_cross_entropy", None)  # Torch 2.13 and later have it.

__all__ = ["is_patched", "patch_torch", "unpatch_torch"]

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_torch_function_mode_enabled = torch._C._is_torch_function_mode_enabled


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    if torch.jit.is_scripting():  # TorchScript has no Python to call back into.
        return native_cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    if _patched and _is_intercepted(input, target, weight):
        return handle_torch_function(
            _public(cross_entropy, native_cross_entropy, input, target, weight),
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    loss = functional.cross_entropy if _patched else native_cross_entropy
    return loss(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    if torch.jit.is_scripting():
        return native_nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
    if _patched and _is_intercepted(input, target, weight):
        return handle_torch_function(
            _public(nll_loss, native_nll_loss, input, target, weight),
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
        )
    loss = functional.nll_loss if _patched else native_nll_loss
    return loss(input, target, weight, size_average, ignore_index, reduce, reduction)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: "LinearCrossEntropyOptions | None" = None,
) -> Tensor:
    tensors = (input, linear_weight, target, linear_bias, weight)
    given = {
        "linear_bias": linear_bias,
        "weight": weight,
        "reduction": reduction,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "options": options,
    }
    if _patched and _is_intercepted(*tensors):
        public = _public(linear_cross_entropy, native_linear_cross_entropy, *tensors)
        return handle_torch_function(public, tensors, input, linear_weight, target, **given)
    loss = functional.linear_cross_entropy if _patched else native_linear_cross_entropy
    return loss(input, linear_weight, target, **given)


_REPLACEMENTS = {native_cross_entropy: cross_entropy, native_nll_loss: nll_loss}
if native_linear_cross_entropy is not None:
    _REPLACEMENTS[native_linear_cross_entropy] = linear_cross_entropy
for _native, _replacement in _REPLACEMENTS.items():
    _replacement.__doc__ = _native.__doc__


class _Level:
    """One call of `patch_torch()`, which the end of a `with` undoes, unless that has been done already."""

    in_a_with = False

    def __enter__(self) -> "_Level":
        if self not in _levels:
            raise RuntimeError("this patch has been undone: call patch_torch() again")
        self.in_a_with = True
        return self

    def __exit__(self, *exception: object) -> None:
        _undo(self)


_lock = RLock()
_levels: list[_Level] = []  # The calls in effect, oldest first.
# This says whether there are any. It is a constant for torch.compile, which would compile anew for every length.
_patched = False


def patch_torch() -> _Level:
    """Let everything that calls PyTorch's cross entropy, or its negative log-likelihood loss, run this package's.

    :func:`torch.nn.functional.cross_entropy`, :func:`torch.nn.functional.nll_loss` and, where torch has it,
    :func:`torch.nn.functional.linear_cross_entropy` are replaced there and in every module that imported them, before
    or after. :class:`torch.nn.CrossEntropyLoss`, :class:`torch.nn.NLLLoss`, :class:`torch.nn.LinearCrossEntropyLoss`,
    their instances and their subclasses follow, because they call these functions. The arguments are native's, and so
    are the values, but for what this package does differently on purpose.

    Libraries that look a loss up by its exact type, as BackPACK does, refuse this package's classes. With the patch
    they get :class:`torch.nn.CrossEntropyLoss` itself, which computes its loss here.

    The patch is for the whole process and all its threads, and lasts until :func:`unpatch_torch`, or to the end of a
    ``with`` statement. Called twice, as by a cell of a notebook that runs again, it is undone by one
    :func:`unpatch_torch`; ``with`` statements nest, in each other and in such calls, and end in any order and by any
    thread. PyTorch is itself again after the last. Then names that were patched are native's again, and a replacement
    that was kept elsewhere gives native's results. The patch leaves alone a function of somebody else in the place of
    native's, put there before or in between.

    :func:`is_patched` tells whether a patch is in effect. ``F.cross_entropy.__module__`` tells whose function it is:
    ``'cross_entropy_ext.patch'`` or ``'torch.nn.functional'``. :class:`torch.nn.CrossEntropyLoss` is the same class
    either way.

    Under ``torch.compile`` a function that was compiled before is compiled anew, and finds its first compilation again
    afterwards. The exception is a function that constructs ``nn.CrossEntropyLoss`` itself: torch.compile then does not
    notice that the loss has changed, and keeps the one it has compiled until :func:`torch.compiler.reset`.

    The patch does not reach functions that were kept elsewhere than under a module's name (in a closure, a dictionary,
    a ``functools.partial``, a default argument), TorchScript, and code that calls ``torch.ops.aten`` itself.

    Example:
        >>> patch_torch()  # at the head of a program
        >>> with patch_torch():  # or around a part of it
        ...     loss = torch.nn.CrossEntropyLoss()(torch.randn(8, 1000), torch.randint(1000, (8,)))

    Returns:
        A context manager whose end undoes this call.
    """
    # Dynamo looks its rules for torch's functions up by name, once, when it is imported: let it find torch's functions.
    import torch._dynamo  # noqa: F401

    global _patched
    level = _Level()
    with _lock:
        _levels.append(level)
        _patched = True
        # Each call looks again: other modules may have imported the native functions since the last one.
        _rename(_REPLACEMENTS)
    return level


def unpatch_torch() -> None:
    """Undo the latest :func:`patch_torch` that is in effect: if that is not in a ``with`` statement, all that are not.

    If there is none, nothing happens.
    """
    with _lock:
        if _levels:
            latest = _levels[-1]
            for level in [latest] if latest.in_a_with else [level for level in _levels if not level.in_a_with]:
                _undo(level)


def is_patched() -> bool:
    """Return whether a :func:`patch_torch` is in effect."""
    return _patched


def _undo(level: _Level) -> None:
    global _patched
    with _lock:
        if level in _levels:
            _levels.remove(level)
        if not _levels and _patched:
            _rename({replacement: native for native, replacement in _REPLACEMENTS.items()})
            _patched = False


def _rename(functions: dict[Callable[..., Tensor], Callable[..., Tensor]]) -> None:
    """Let every name that a module outside this package has for one of these functions stand for the other."""
    other = {id(function): replacement for function, replacement in functions.items()}
    for module_name, module in sys.modules.copy().items():
        if not isinstance(module, ModuleType) or f"{module_name}.".startswith(f"{__package__}."):
            continue
        # This avoids the __getattribute__ of modules that are loaded when they are first asked for something.
        names = ModuleType.__getattribute__(module, "__dict__")
        for name, value in names.copy().items():
            if id(value) in other and names.get(name) is value:
                names[name] = other[id(value)]


def _is_intercepted(*arguments: Any) -> bool:
    """Return whether a `__torch_function__` is to decide.

    Dynamo answers for subclasses alone, and asks them itself when it comes to the operator.
    """
    if _is_dynamo_compiling():
        return _is_torch_function_mode_enabled()
    return has_torch_function_variadic(*arguments)


def _public(
    replacement: Callable[..., Tensor], native: Callable[..., Tensor], *arguments: Any
) -> Callable[..., Tensor]:
    """Return the function to tell `__torch_function__` of: the one that `F.cross_entropy` is now, which it recognizes.

    A graph of torch.fx records the native one. It writes that as `torch.nn.functional.cross_entropy`, and looks it up
    when it runs. So the graph does not depend on whether torch was patched when it was recorded.
    """
    return native if any(isinstance(argument, fx.Proxy) for argument in arguments) else replacement

"""The losses that are measured: ours, the native one, and every peer that can be imported. REGISTRY lists them.

A provider is a function (logits, target, **options) -> loss with torch's arguments. It raises Refused, with a reason
for its record, if it lacks an option, a layout or a kind of target. Peers get rows of classes, as from their users.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cross_entropy_ext.functional import cross_entropy

from .records import Refused

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Provider:
    name: str
    load: Callable[[], Loss]  # raises ImportError if the package is missing
    overwrites: bool = False  # writes the gradient over the logits
    devices: tuple[str, ...] = ("cpu", "cuda")


def rows(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Reshapes to (positions, classes) without a copy, or refuses."""
    if logits.shape == target.shape:
        raise Refused("takes class indices only")
    if logits.dim() > 2:
        last = logits.movedim(1, -1)
        if not last.is_contiguous():
            raise Refused("takes rows of classes only")
        logits = last.flatten(0, -2)
    return logits, target.flatten()


def only(options: dict, *known: str) -> dict:
    """The options, if all are known."""
    for name in options:
        if name not in known:
            raise Refused(f"has no {name}")
    return options


def load_native_compiled() -> Loss:
    def native(logits: Tensor, target: Tensor, **options) -> Tensor:
        return F.cross_entropy(logits, target, **options)

    return torch.compile(native, dynamic=False, fullgraph=True)


def forget_compiled() -> None:
    """Drops compiled code, which torch would otherwise search in every call of the next case."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def load_liger() -> Loss:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def loss(logits: Tensor, target: Tensor, **options) -> Tensor:
        return liger_cross_entropy(*rows(logits, target), **options)

    return loss


def load_quack() -> Loss:
    from quack.cross_entropy import cross_entropy as quack_cross_entropy

    def loss(logits: Tensor, target: Tensor, **options) -> Tensor:
        known = only(options, "weight", "ignore_index", "reduction")
        return quack_cross_entropy(*rows(logits, target), **{"reduction": "mean", **known})

    return loss


def load_flash_attn() -> Loss:
    from flash_attn.losses.cross_entropy import CrossEntropyLoss

    def loss(logits: Tensor, target: Tensor, **options) -> Tensor:
        return CrossEntropyLoss(**only(options, "ignore_index", "reduction", "label_smoothing"))(*rows(logits, target))

    return loss


def load_apex() -> Loss:
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    def loss(logits: Tensor, target: Tensor, **options) -> Tensor:
        only(options, "ignore_index", "reduction", "label_smoothing")
        ignore_index, reduction = options.get("ignore_index", -100), options.get("reduction", "mean")
        logits, target = rows(logits, target)
        smoothing = options.get("label_smoothing", 0.0)
        losses = SoftmaxCrossEntropyLoss.apply(logits, target, smoothing, ignore_index, logits.dtype != torch.float32)
        if reduction == "none":
            return losses
        return losses.sum() / ((target != ignore_index).sum() if reduction == "mean" else 1)

    return loss


def packages_alone(*names: str) -> None:
    """Makes the packages' modules importable without running the packages' own __init__.py."""
    for name in names:
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise ImportError(name)
            sys.modules[name] = importlib.util.module_from_spec(spec)


def load_unsloth() -> Loss:
    """The loss alone. Importing Unsloth would patch torch and transformers for all that is measured later, and needs a
    dozen packages that the loss does not use."""
    packages_alone("unsloth", "unsloth.kernels", "unsloth_zoo")
    if "unsloth_zoo.loss_utils" not in sys.modules:  # it patches when it is imported
        patches = types.ModuleType("unsloth_zoo.loss_utils")
        patches.patch_loss_functions = patches.post_patch_loss_function = None
        sys.modules[patches.__name__] = patches
    from unsloth.kernels.cross_entropy_loss import fast_cross_entropy_loss

    def loss(logits: Tensor, target: Tensor, **options) -> Tensor:
        only(options)
        logits, target = rows(logits, target)
        return fast_cross_entropy_loss(logits.unsqueeze(0), target.unsqueeze(0))

    return loss


def load_cut_cross_entropy() -> Loss:
    import cut_cross_entropy  # noqa: F401

    def loss(logits: Tensor, target: Tensor, **options) -> Tensor:
        raise Refused("takes hidden states and the classifier, never logits")

    return loss


REGISTRY = [
    Provider("ours", lambda: cross_entropy),
    Provider("ours in place", lambda: functools.partial(cross_entropy, inplace=True), overwrites=True),
    Provider("native", lambda: F.cross_entropy),
    Provider("native compiled", load_native_compiled),
    Provider("liger", load_liger, overwrites=True, devices=("cuda",)),
    Provider("quack", load_quack, devices=("cuda",)),
    Provider("flash-attn", load_flash_attn, devices=("cuda",)),
    Provider("apex", load_apex, devices=("cuda",)),
    Provider("unsloth", load_unsloth, devices=("cuda",)),
    Provider("cut-cross-entropy", load_cut_cross_entropy),
]
PEERS = tuple(provider.name for provider in REGISTRY if not provider.name.startswith(("ours", "native")))


def importable(device: str) -> list[Provider]:
    """The providers of this device whose packages are installed."""
    found = []
    for provider in REGISTRY:
        if device not in provider.devices:
            continue
        try:
            provider.load()
        except ImportError:
            continue
        except Exception:  # it is installed; its records say why it fails
            pass
        found.append(provider)
    return found

"""Graphs that leave PyTorch: there, the losses are the core ATen operators that they can be made of."""

import functools
import sys

import torch
from torch._C import DispatchKey

_NAMES = (
    "cross_entropy",
    "cross_entropy_with_stats",
    "general_cross_entropy",
    "linear_cross_entropy",
    "linear_cross_entropy_with_stats",
    "nll_loss",
)


def _composite(op, *args, **kwargs):
    """Everything made of PyTorch's own operations, as for torch.func."""
    return op._op_dk(DispatchKey.FuncTorchDynamicLayerFrontMode, *args, **kwargs)


def _decomposed(op, *args, **kwargs):
    """In a table of decompositions. Compilers have a copy of it, too, but no use for this entry: they call the kernels.

    Export gives an operator, besides, kernels that keep autograd from it while it lets a table decide.
    """
    return _composite(op, *args, **kwargs) if DispatchKey.AutogradCPU in op.py_kernels else NotImplemented


def _with_autograd(op, *args, **kwargs):
    """For tracing. An export of forward and backward has autograd see the parts; AOTInductor's is a compiler's."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL)
    inductor = sys.modules.get("torch._inductor.virtualized")
    if mode is not None and mode.export and not (inductor and inductor.V.aot_compilation):
        return _composite(op, *args, **kwargs)
    return op._op_dk(DispatchKey.Autograd, *args, **kwargs)


def register_decompositions() -> None:
    """Let tables of decompositions have the losses, and graphs of forward and backward their parts."""
    for name in _NAMES:
        packet = getattr(torch.ops.cross_entropy_ext, name)
        for op in (getattr(packet, overload) for overload in packet.overloads()):
            op.py_impl(DispatchKey.CompositeImplicitAutograd)(functools.partial(_decomposed, op))
            op.py_impl(DispatchKey.Autograd)(functools.partial(_with_autograd, op))

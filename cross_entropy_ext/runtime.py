"""What can be asked of the compiled half of the package, besides the loss."""

from typing import Any

import torch

from . import __version__
from ._extension import load

_C = load()


def build_info() -> dict[str, Any]:
    """Say what this copy of the package is made of, for bug reports and for the log of a training run.

    Returns:
        A dictionary with

        - `version`: of this package;
        - `torch_built_for`, `torch_running`: the two versions of PyTorch, equal up to the minor version;
        - `compiler`: what compiled the binary;
        - `instruction_set`: the one of this package's CPU kernels that runs here;
        - `torch_cpu_capability`: the one that PyTorch chose; the environment variable `ATEN_CPU_CAPABILITY`
          (`default`, `avx2`, `avx512`) lowers both;
        - `cuda_archs`: the GPU architectures that the binary has kernels for, None if it has none.
    """
    binary = _C.build_info()
    return {
        "version": __version__,
        "torch_built_for": binary["torch"],
        "torch_running": torch.__version__,
        "compiler": binary["compiler"],
        "instruction_set": binary["instruction_set"],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda_archs": binary["cuda_archs"],
    }


def check_errors() -> None:
    """Wait for the GPU and raise what a kernel of this package reported there.

    A CUDA kernel cannot raise. One that meets a class index out of bounds makes that position's loss NaN
    and its gradient zero, and the next call into this package on that device raises the IndexError. Call
    this after the last step, or wherever the error has to appear at once. Without CUDA, errors are raised
    where they happen, and there is nothing to do.
    """
    if _C.build_info()["cuda_archs"] is not None:
        _C.check_errors()


def empty_cache() -> int:
    """Give the CPU memory that is kept for the next step's gradient back to the system.

    Fresh pages cost more than the gradient's arithmetic, so a large gradient's pages are kept, once it is
    freed, for the next one. This is `torch.cuda.empty_cache` for them; gradients in use are not touched.

    Returns:
        The number of bytes given back.
    """
    return _C.empty_cache()

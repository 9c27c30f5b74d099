"""Compiles the CUDA kernels and their host code for the CPU, where the emulator runs them."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
SOURCE = HERE.parent.parent / "csrc"
HOST = ("options", "inputs", "arguments", "denominator", "make_problem", "adapter")
FLAGS = ["-std=c++20", "-O1", "-g0", "-fno-strict-aliasing", "-ffp-contract=off", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
INCLUDES = [f"-I{folder}" for folder in (SOURCE, SOURCE / "cuda", HERE)]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def kernels_as_cpp(folder: Path) -> list[str]:
    """A .cpp for each .cu: compilers go by the name."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for source in sorted((SOURCE / "cuda").glob("*.cu")):
        file = folder / f"{source.stem}_cu.cpp"
        text = f'#include "{source.relative_to(SOURCE)}"\n'
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        files.append(str(file))
    return files


def load() -> ModuleType:
    """The module emulated_kernels, compiled if need be; SANITIZE chooses sanitizers, as for the package."""
    sanitize = os.environ.get("SANITIZE", "")
    checks = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"] if sanitize else []
    folder = SOURCE.parent / "build" / "-".join(["cuda_on_cpu", torch.__version__, *sanitize.split(",")]).rstrip("-")
    folder.mkdir(parents=True, exist_ok=True)
    sources = [
        *(SOURCE / "host" / f"{name}.cpp" for name in HOST),
        SOURCE / "cuda/plan.cpp",
        *(SOURCE / "cuda" / name for name in ("cross_entropy_cuda.cpp", "nll_loss_cuda.cpp")),
        *(HERE / name for name in ("emulated_kernels.cpp", "device_on_cpu.cpp")),
    ]
    with open(folder / "one_at_a_time", "w") as file:  # of several test processes
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)  # left by a process that was killed
        return cpp_extension.load(
            "emulated_kernels",
            [*map(str, sources), *kernels_as_cpp(folder)],
            extra_cflags=[*FLAGS, *WARNINGS, *INCLUDES, *checks],
            extra_ldflags=checks,
            build_directory=str(folder),
        )

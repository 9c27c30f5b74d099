"""The peak of memory that one step takes on top of the memory before it.

On a GPU the allocator reports it. On a CPU a process of its own reports the peak of its resident memory, which Linux
lets it reset. In that process freed memory goes back to the system at once (neither malloc nor this package keeps any),
so that no memory of earlier steps hides a step's need.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import re
import statistics
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import cross_entropy_ext

from .providers import REGISTRY, Loss, forget_compiled
from .records import reason
from .shapes import Case, Shape, make_inputs
from .timing import Run, as_of_a_layer, step

# Allocations of more than a few pages come from the system, and go back to it.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def cuda_peak(run: Run, logits: torch.Tensor) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run(logits)
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


class CpuPeaks:
    """Asks the process for peaks. Outside Linux there is none, and every peak is None."""

    def __init__(self) -> None:
        self.connection: Connection | None = None
        if not _can_reset_peak():
            return
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        before = {name: os.environ.get(name) for name in ENVIRONMENT}
        os.environ.update(ENVIRONMENT)
        context.Process(target=_serve, args=(theirs, torch.get_num_threads()), daemon=True).start()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        theirs.close()

    def of(self, case: Case, shape: Shape, provider: str, backward: bool) -> int | None:
        return self.of_made(_provider_step, case, shape, provider, backward)

    def of_made(self, make: Callable[..., tuple[Run, torch.Tensor]], *arguments: object) -> int | None:
        """The peak of a function on a tensor. The process makes both by `make(*arguments)`."""
        if self.connection is None:
            return None
        try:
            self.connection.send((make, arguments))
            answer = self.connection.recv()
        except (EOFError, OSError):  # the system ended the process, most likely for its memory
            self.connection = None
            return None
        return answer if isinstance(answer, int) else None

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()


def _can_reset_peak() -> bool:
    try:
        reset_peak()
        return resident("VmHWM") > 0
    except OSError:
        return False


def reset_peak() -> None:
    """Sets the peak of this process's memory to what is resident now. Raises OSError outside Linux."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(name: str) -> int:
    """This process's memory in bytes: VmRSS is resident now, VmHWM is the peak. Raises OSError outside Linux."""
    found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if not found:
        raise OSError(f"this system does not tell {name}")
    return 1024 * int(found[1])


@functools.cache
def _loss_of(provider: str) -> Loss:
    return next(one for one in REGISTRY if one.name == provider).load()


def _provider_step(case: Case, shape: Shape, provider: str, backward: bool) -> tuple[Run, torch.Tensor]:
    inputs = make_inputs(case, shape, "cpu")
    return step(_loss_of(provider), inputs, backward), as_of_a_layer(inputs.logits) if backward else inputs.logits


def _serve(connection: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    while True:
        try:
            make, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(_cpu_peak(*make(*arguments)))
        except Exception as error:
            connection.send(reason(error))
        forget_compiled()


def _cpu_peak(run: Run, logits: torch.Tensor) -> int:
    run(logits)  # allocates what is allocated only once: compiled code, threads' stacks
    gc.collect()
    peaks: list[int] = []
    for _ in range(3 if logits.numel() < 2**22 else 1):  # a few pages do not matter to a large one
        cross_entropy_ext.empty_cache()
        reset_peak()
        before = resident("VmRSS")
        result = run(logits)
        peaks.append(max(0, resident("VmHWM") - before))
        del result
    return int(statistics.median(peaks))

"""The kernels that a test runs on: those of this machine's CPU, or the CUDA kernels in the emulator.

A test that uses the fixture `backend` runs on both; with `@pytest.mark.backends("cpu")` only on those named. The
emulated kernels take the place of the CPU's for the length of a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import oracle
import pytest
from cuda_on_cpu import build

BACKENDS = ("cpu", "emulator")

# Of the emulated device: multiprocessors, shared memory of each, of a block, largest cluster.
DEVICES = {
    "h200": (2, 228 << 10, 227 << 10, 8),
    "a100": (2, 164 << 10, 163 << 10, 1),
    "one": (1, 228 << 10, 227 << 10, 8),  # one multiprocessor: several tiles for each warp
    "small": (3, 24 << 10, 16 << 10, 1),  # rows of 32 KB and more fit no block
    "small-clusters": (9, 24 << 10, 16 << 10, 8),  # clusters of 2, 4 and 8 for rows of a few KB
}

# Orders of an emulated block's threads in which a missing barrier shows, with seeds.
SCHEDULES = [
    (order, seed)
    for order in ("reversed", "shuffled", "starve_thread", "starve_warp", "starve_block")
    for seed in ((0,) if order == "reversed" else (2, 3, 4, 5))
]

needs_emulator = pytest.mark.skipif(build.compiler() is None, reason="the emulated kernels need a C++ compiler")


@contextmanager
def put_in_place(module: ModuleType) -> Iterator[ModuleType]:
    """Puts the emulated kernels in the place of the CPU's. The oracle allows what their exponentials lose."""
    module.set_device(*DEVICES["h200"])
    module.set_schedule("in_order", 0)
    module.install()
    oracle.flushes_exponentials = True
    try:
        yield module
    finally:
        oracle.flushes_exponentials = False
        module.uninstall()
        module.set_schedule("in_order", 0)
        module.check_errors()

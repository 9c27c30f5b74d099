"""What a result file holds: the machine, the versions, the command, and records, which are flat dictionaries.

`benchmarks/results/<device>/<part>.json`, where the device is `cpu` or a GPU's name and the part is the module that
measured it: run, idioms, linear, scaling, training, frameworks, accuracy. `benchmarks.report` reads nothing else. A run
with options of its own (`--quick`, `--only`, `--seconds`) writes to `benchmarks/output/<device>/<part>.json` instead.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
from datetime import date
from pathlib import Path

import torch

import cross_entropy_ext

RESULTS = Path(__file__).parent / "results"
OUTPUT = Path(__file__).parent / "output"  # of quick and partial runs, which git ignores
PACKAGES = ("triton", "liger-kernel", "quack-kernels", "flash-attn", "apex", "cut-cross-entropy", "unsloth")


def machine(device: str) -> dict:
    """What the figures depend on but for software."""
    cpu = {"cpu": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device == "cpu":
        info = cross_entropy_ext.build_info()
        return {**cpu, "instruction_set": info["instruction_set"], "memory_bytes": memory_bytes()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        **cpu,
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def versions() -> dict:
    """Of everything that is measured."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    info = cross_entropy_ext.build_info()
    return {**found, "cross_entropy_ext": info["version"], "compiler": info["compiler"], "archs": info["cuda_archs"]}


def folder(device: str, whole: bool = True) -> Path:
    """Where results of this device go, unless `--json` says otherwise; $OUT takes the place of both folders."""
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
    return Path(os.environ.get("OUT") or (RESULTS if whole else OUTPUT)) / re.sub(r"[^a-z0-9]+", "-", name.lower())


def command() -> str:
    """The command line that was given, without the file the result went to."""
    arguments = " ".join(sys.argv[1:])
    return f"python -m benchmarks.{Path(sys.argv[0]).stem} {re.sub(r'--json[ =][^ ]+', '', arguments)}".strip()


def write(path: Path, device: str, records: list[dict], **more: object) -> None:
    """Whole or not at all: a stop in between leaves the last file."""
    contents = {
        "command": command(),
        "date": date.today().isoformat(),
        "machine": machine(device),
        "versions": versions(),
        **more,
        "records": records,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(contents, indent=1) + "\n")
    os.replace(partial, path)


def read(device: str, part: str) -> dict | None:
    """A result, or None where it was never recorded."""
    path = RESULTS / device / f"{part}.json"
    return json.loads(path.read_text()) if path.exists() else None


def first_line(error: BaseException) -> str:
    """What a record says of a provider that failed."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"

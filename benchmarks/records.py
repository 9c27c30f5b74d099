"""A result file: the machine, the versions, the command, and records, which are flat dictionaries.

It is `benchmarks/results/<device>/<part>.json`; the device is `cpu` or a GPU's name, the part the module that measured
it. `benchmarks.report` reads nothing else. A run with options of its own (`--quick`, `--only`, `--seconds`) writes to
`benchmarks/output/<device>/<part>.json` instead.
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
OUTPUT = Path(__file__).parent / "output"  # results of quick and partial runs; git ignores it
PACKAGES = ("triton", "liger-kernel", "quack-kernels", "flash-attn", "apex", "cut-cross-entropy", "unsloth")


def machine(device: str) -> dict:
    """The hardware that the times depend on."""
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
    """The processor's name if the system tells it, else its architecture."""
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
    """The versions of everything that is measured."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    info = cross_entropy_ext.build_info()
    return {**found, "cross_entropy_ext": info["version"], "compiler": info["compiler"], "archs": info["cuda_archs"]}


def folder(device: str, whole: bool = True) -> Path:
    """The folder of this device's results, unless `--json` names a file. $OUT replaces both folders."""
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
    return Path(os.environ.get("OUT") or (RESULTS if whole else OUTPUT)) / re.sub(r"[^a-z0-9]+", "-", name.lower())


def command() -> str:
    """The command line, without the name of the result file."""
    arguments = " ".join(sys.argv[1:])
    return f"python -m benchmarks.{Path(sys.argv[0]).stem} {re.sub(r'--json[ =][^ ]+', '', arguments)}".strip()


def write(path: Path, device: str, records: list[dict], **more: object) -> None:
    """Replaces the file at once, so that an interruption leaves the last one whole."""
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
    """A committed result, or None if there is none."""
    path = RESULTS / device / f"{part}.json"
    return json.loads(path.read_text()) if path.exists() else None


class Refused(Exception):
    """Says why something was not measured."""


def reason(error: BaseException) -> str:
    """The `error` of a record: the text of a refusal, or an exception's type and first line."""
    if isinstance(error, Refused):
        return str(error)
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"

"""The form of a section of docs/benchmarks.md, which each suite fills in, and what a section says of a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import records as files
from .tables import Block


@dataclass(frozen=True)
class Section:
    part: str  # the result's name
    title: str
    blocks: Callable[[str, dict], list[Block]]  # from the device and the result; an empty block is left out
    only: str = ""  # "cpu" or "gpu", if there is a section for no other device
    draw: Callable[[str, dict, Path], None] | None = None  # writes the figures of a device into a folder
    readme: Callable[[dict[str, dict]], list[Block]] | None = None  # from the results by device, GPUs first


def described(result: dict) -> str:
    """The machine and the versions, in a sentence."""
    machine, versions = result["machine"], result["versions"]
    if "gpu" in machine:
        device = f"{machine['gpu']} (sm_{machine['capability'].replace('.', '')}), CUDA {versions['cuda']}"
    else:
        device = f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}"
    peers = [f"{name} {versions[name]}" for name in files.PACKAGES if versions.get(name)]
    return ", ".join([f"{device}; torch {versions['torch']}, Python {versions['python']}", *peers])


def measured_by(result: dict) -> str:
    return f"Measured by `{result['command']}` ({described(result)})."

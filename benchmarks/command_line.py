"""What the commands share: their options, the loop over what is measured, and the exit status."""

from __future__ import annotations

import argparse
import gc
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from rich.progress import Progress

import cross_entropy_ext

from . import records as files
from .tables import Block, console, said, show

NEUTRAL = {"device", "json", "part", "counters"}  # options that leave nothing out
NO_TIME = "no time left"


def parser_of(
    description: str,
    part: str,
    quick: str,
    only: str = "",
    devices: tuple[str, ...] = ("cpu", "cuda"),
    seconds: dict[str, float] | None = None,
    of_seconds: str = "for all turns",
    without: bool = False,
) -> argparse.ArgumentParser:
    """`only` names what --only chooses from, `seconds` the default for each device and "quick"."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--quick", action="store_true", help=f"{quick}; nothing to publish")
    if only:
        parser.add_argument("--only", default="", help=f"regular expression on the {only}' names")
    if without:
        parser.add_argument("--without", default="^$", help="regular expression on the names of providers to leave out")
    if seconds:
        defaults = ", ".join(f"{name} {value:g}" for name, value in seconds.items())
        parser.add_argument("--seconds", type=float, help=f"{of_seconds} ({defaults})")
        parser.set_defaults(default_seconds=seconds)
    parser.add_argument("--part", default=part, help=f"the result's name ({part})")
    place = "<part>.json in benchmarks/results/<device>; with any other option, in benchmarks/output/<device>"
    parser.add_argument("--json", type=Path, help=f"default: {place}; both below $OUT where that is set")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; ends with the reason if the device cannot be measured. From here on SIGTERM stops as Ctrl-C does.

    `json` is the file for the result. It is a committed one only if everything is measured, in the usual time."""
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("torch finds no GPU")
        if cross_entropy_ext.build_info()["cuda_archs"] is None:
            parser.error("the package was built without CUDA: FORCE_CUDA=1 python setup.py build_ext --inplace")
    if arguments.json is None:
        options = vars(arguments).keys() - NEUTRAL
        whole = all(getattr(arguments, name) == parser.get_default(name) for name in options)
        arguments.json = files.folder(arguments.device, whole) / f"{arguments.part}.json"
    if getattr(arguments, "seconds", 0.0) is None:
        arguments.seconds = arguments.default_seconds["quick" if arguments.quick else arguments.device]
    signal.signal(signal.SIGTERM, _interrupt)
    return arguments


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@dataclass(frozen=True)
class Item:
    """A part of a suite, measured in one go."""

    name: str
    failed: list[dict]  # its records if it fails as a whole, which get the error
    measure: Callable[[], list[dict]]


def measure_all(
    arguments: argparse.Namespace,
    items: list[Item],
    tables: Callable[[list[dict]], Iterable[Block]],
    ours: Callable[[dict], bool],
    records: list[dict] | None = None,
) -> NoReturn:
    """Measures the items, shows their tables, and ends with the command's exit status.

    The records are written after each item, so that an interruption loses one item at most. The status is 0 if all was
    measured and no record failed that is `ours`. `records` were made before."""
    path, device, quick = arguments.json, arguments.device, arguments.quick
    records, complete = records or [], False
    # Refreshed by hand: a thread that draws would take time from what is measured.
    with Progress(auto_refresh=False) as progress:
        task = progress.add_task("", total=len(items))
        try:
            for item in items:
                progress.update(task, description=item.name, refresh=True)
                try:
                    records += item.measure()
                except Exception as error:
                    records += [{**fields, "error": files.reason(error)} for fields in item.failed]
                files.write(path, device, records, quick=quick, complete=False)
                tidy(device)
                progress.advance(task)
            complete = not any(record.get("error") == NO_TIME for record in records)
        except KeyboardInterrupt:
            pass
    if records:  # otherwise an interrupted run would leave less than it found
        files.write(path, device, records, quick=quick, complete=complete)
    show(tables(records))
    console.print(f"{path}", highlight=False)
    sys.exit(0 if complete and not any(said(record) for record in records if ours(record)) else 1)


def tidy(device: str) -> None:
    """Gives back memory that nothing uses."""
    gc.collect()
    cross_entropy_ext.empty_cache()
    if device != "cpu":
        torch.cuda.empty_cache()

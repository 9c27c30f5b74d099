"""What the commands have in common: options, whether the device is there, and how they are stopped."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import torch

import cross_entropy_ext

from . import records

NEUTRAL = {"device", "json", "part", "counters"}  # arguments that leave nothing out


def parser_of(description: str, part: str, quick: str, only: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help=f"{quick}; nothing to publish")
    if only is not None:
        parser.add_argument("--only", default="", help=f"regular expression on the {only}' names")
    parser.add_argument("--part", default=part, help=f"the result's name ({part})")
    place = "<part>.json in benchmarks/results/<device>; with any other option, in benchmarks/output/<device>"
    parser.add_argument("--json", type=Path, help=f"default: {place}; both below $OUT where that is set")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Ends with the reason where the device cannot be measured. From here on SIGTERM stops as Ctrl-C does.

    `json` is where the result goes: to the committed results only if everything is measured, in the usual time."""
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("there is no GPU that torch finds")
        if cross_entropy_ext.build_info()["cuda_archs"] is None:
            parser.error("the package was built without CUDA: FORCE_CUDA=1 python setup.py build_ext --inplace")
    if arguments.json is None:
        options = vars(arguments).keys() - NEUTRAL
        whole = all(getattr(arguments, name) == parser.get_default(name) for name in options)
        arguments.json = records.folder(arguments.device, whole) / f"{arguments.part}.json"
    signal.signal(signal.SIGTERM, _interrupt)
    return arguments


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt

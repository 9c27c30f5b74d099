"""What the commands have in common: options, whether the device is there, and how they are stopped."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import torch

import cross_entropy_ext


def parser_of(description: str, part: str, quick: str, only: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help=f"{quick}; its times mean little")
    parser.add_argument("--only", default="", help=f"regular expression on the {only}' names")
    parser.add_argument("--json", type=Path, help=f"default: {part}.json in benchmarks/results/<device>, or below $OUT")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Ends with the reason where the device cannot be measured. From here on SIGTERM stops as Ctrl-C does."""
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("there is no GPU that torch finds")
        if cross_entropy_ext.build_info()["cuda_archs"] is None:
            parser.error("the package was built without CUDA: FORCE_CUDA=1 python setup.py build_ext --inplace")
    signal.signal(signal.SIGTERM, _interrupt)
    return arguments


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt

"""Other values for the launch decisions of csrc/cuda/tuning.h, each on the cases that it affects.

    python -m benchmarks.tune [--device cuda] [--only PATTERN] [--seconds S] [--json FILE]

One number changes at a time. All its values take turns on the same logits, forward and backward, with a copy of them.
The table has `copies`, the ratio of medians, and a star at the least of a row. A question mark says that the value in
use is within the noise of the least: half the distance between two measurements of that value. Results of the loss do
not depend on the numbers (tests/test_cuda_on_cpu.py). This command does not write them; tuning.h is edited by hand.

Records: number, value, in_use, case, shape, dtype, layout, median_ms, min_ms, max_ms, copies.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable

import torch

from cross_entropy_ext.functional import cross_entropy
from cross_entropy_ext.runtime import _C

from . import command_line
from .command_line import Item
from .shapes import BF16, Case, make_inputs
from .tables import Table
from .timing import Timed, copying, measure, sets_of_logits, step

KiB = 1 << 10

# Rows from 512 bytes to 16 KiB, in both types, where one kernel or another may be the faster.
SHORT_ROWS = [
    Case("rows of 512 B", cuda=(262_144, 128), quick=(64, 128)),
    Case("rows of 1 KB", cuda=(131_072, 256), quick=(64, 256)),
    Case("rows of 2 KB, bfloat16", cuda=(65_536, 1000), quick=(64, 1000), dtype=BF16),
    Case("rows of 4 KB", cuda=(65_536, 1000), quick=(64, 1000)),
]
ROWS = [
    Case("rows of 4 KB", cuda=(65_536, 1000), quick=(64, 1000)),
    Case("rows of 8 KB, bfloat16", cuda=(16_384, 4096), quick=(16, 4096), dtype=BF16),
    Case("rows of 16 KB", cuda=(16_384, 4096), quick=(16, 4096)),
    Case("rows of 16 KB, bfloat16", cuda=(16_384, 8192), quick=(16, 8192), dtype=BF16),
]
LONG_ROWS = [
    Case("rows of 62 KB, bfloat16", cuda=(8192, 32_000), quick=(4, 32_000), dtype=BF16),
    Case("rows of 98 KB, bfloat16", cuda=(8192, 50_257), quick=(4, 50_257), dtype=BF16),
    Case("rows of 250 KB, bfloat16", cuda=(8192, 128_256), quick=(2, 128_256), dtype=BF16),
    Case("rows of 500 KB, bfloat16", cuda=(4096, 256_000), quick=(2, 256_000), dtype=BF16),
]
FEW_CLASSES = [
    Case("10 classes", cuda=(262_144, 10), quick=(256, 10)),
    Case("19 classes, channels_last", cuda=(8, 19, 512, 1024), quick=(1, 19, 16, 32), layout="channels_last"),
    Case("150 classes, channels_last", cuda=(8, 150, 256, 256), quick=(1, 150, 16, 16), layout="channels_last"),
]
IMAGES = [
    Case("19 classes", cuda=(8, 19, 512, 1024), quick=(1, 19, 16, 32)),
    Case("19 classes, bfloat16", cuda=(8, 19, 512, 1024), quick=(1, 19, 16, 32), dtype=BF16),
    Case("150 classes", cuda=(8, 150, 256, 256), quick=(1, 150, 16, 16)),
    Case("150 classes, bfloat16", cuda=(8, 150, 256, 256), quick=(1, 150, 16, 16), dtype=BF16),
    Case("4 classes", cuda=(2, 4, 128, 128, 128), quick=(1, 4, 8, 8, 8)),
]

# number: values to try, on which cases
NUMBERS: dict[str, tuple[tuple[int, ...], list[Case]]] = {
    "row_blocks": ((1, 2, 3, 4), LONG_ROWS),
    "warp_row_bytes": ((1 * KiB, 2 * KiB, 4 * KiB, 8 * KiB, 16 * KiB), ROWS),
    "small_row_bytes": ((256, 512, 1 * KiB, 2 * KiB, 4 * KiB), SHORT_ROWS),
    "small_tile_bytes": ((2 * KiB, 4 * KiB, 8 * KiB, 16 * KiB), FEW_CLASSES),
    "small_rows_of_thread": ((1, 2, 4, 8, 16), FEW_CLASSES),
    "spatial_blocks": ((2, 3, 4, 5, 6, 8), IMAGES),
}

Tune = Callable[[str, int], int]  # sets a number, and returns its old value


def with_number(tune: Tune, name: str, value: int, run: Callable) -> Callable:
    def set_and_run(logits: torch.Tensor) -> object:
        before = tune(name, value)
        try:
            return run(logits)
        finally:
            tune(name, before)

    return set_and_run


def measured(
    tune: Tune, name: str, values: tuple[int, ...], case: Case, shape: tuple[int, ...], device: str, seconds: float
) -> list[dict]:
    """A record for each value, and a second one for that in use."""
    inputs = make_inputs(case, shape, device)
    sets = sets_of_logits(case, inputs, device)
    leaves = [logits.detach().requires_grad_() for logits in sets]
    run = step(cross_entropy, inputs, True)
    in_use = tune(name, 1)
    tune(name, in_use)
    timed = [
        Timed(str(value), with_number(tune, name, value, run), leaves) for value in (*sorted({*values, in_use}), in_use)
    ]
    copy = copying(sets)
    measure([*timed, copy], device, time.monotonic() + seconds)
    unit = copy.summary()["median_ms"]
    result = []
    for one in timed:
        fields = {"number": name, "value": int(one.name), "in_use": int(one.name) == in_use, **case.fields(shape)}
        found = one.summary()
        if "median_ms" in found:
            found["copies"] = found["median_ms"] / unit
        result.append({**fields, **found})
    return result


def table(records: list[dict]) -> Table:
    by_case: dict[tuple[str, str], list[dict]] = {}
    for record in records:
        by_case.setdefault((record["number"], record["case"]), []).append(record)
    rows = []
    for (number, case), found in by_case.items():
        works = [record for record in found if "copies" in record]
        used = [record["copies"] for record in works if record["in_use"]]
        least = min((record["copies"] for record in works), default=0)
        noise = (max(used) - min(used)) / 2 if used else 0
        cells = []
        for record in found:
            text = f"{record['value']}: {record['copies']:.3f}" if "copies" in record else f"{record['value']}: failed"
            star = "*" if record.get("copies") == least else ""
            close = "?" if record["in_use"] and not star and used and min(used) - least <= noise else ""
            cells.append(f"({text}{star}{close})" if record["in_use"] else text + star)
        rows.append([number, case, "  ".join(cells)])
    title = "Copies of the logits, forward and backward; (in use), * least"
    return Table(["number", "case", "by value"], rows, 3, title)


def main() -> None:
    arguments = command_line.parse(
        command_line.parser_of(
            __doc__,
            "tune",
            "small inputs, in seconds",
            "numbers",
            ("cuda",),
            {"cuda": 1.0, "quick": 1.0},
            "for each number and case",
        )
    )
    items = []
    for name, (values, cases) in NUMBERS.items():
        for case in cases if re.search(arguments.only, name) else []:
            shape = case.shape(arguments.device, arguments.quick)
            run = functools.partial(measured, _C.tune, name, values, case, shape, arguments.device, arguments.seconds)
            failed = {"number": name, "value": 0, "in_use": False, "case": case.name}
            items.append(Item(f"{name}, {case.name}", [failed], run))
    command_line.measure_all(arguments, items, lambda records: [table(records)], lambda record: True)


if __name__ == "__main__":
    main()

"""What people write around the loss, and what it is now: equal values first, then time and memory of both.

    python -m benchmarks.idioms [--device cpu|cuda] [--quick] [--only PATTERN] [--seconds S] [--json FILE]

`pairs` holds both pieces of code; what is shown of them is what is run. Times are of forward and backward, medians of
turns that `today`, `now` and a copy of the logits take, as in `benchmarks.timing`; memory is as in `benchmarks.memory`.

A second table is what `sample_weight` costs over the plain loss: the median of the ratios of neighbouring turns.

Records, a dictionary each, of which one that failed has an `error`, and one that is wrong says what is `wrong`:

    table "pairs": name, shape, dtype, which (today, now, copy); code, median_ms, min_ms, max_ms, turns, copies,
                   peak_extra_bytes, gradient_bytes
    table "cost":  name, shape, dtype, which (plain, with, copy); median_ms, min_ms, max_ms, turns, copies, and
                   of `with` over_plain
"""

from __future__ import annotations

import argparse
import functools
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import cross_entropy_ext
from cross_entropy_ext.functional import cross_entropy

from . import command_line
from . import idiom_cases as pairs
from . import records as files
from .idiom_cases import NOW, PAIRS, TODAY, Pair, Shape
from .memory import CpuPeaks, cuda_peak
from .timing import Run, Timed, count_of_sets, measure
from .values import TOLERANCE

SECONDS = {"cpu": 90.0, "cuda": 45.0, "quick": 4.0}
COSTS = ((2048, 32_000), (512, 32_000), (4, 19, 256, 512))
QUICK_COSTS = ((64, 4000), (1, 19, 32, 64))
console = Console(width=max(120, Console().width))


class Wrong:
    """What today's code gives in float64, and what of another result is not that."""

    def __init__(self, pair: Pair, drawn: list[Tensor | float]) -> None:
        logits, *rest = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in drawn]
        self.expected = pairs.step(pair.today, rest)(logits.requires_grad_())

    def __call__(self, results: tuple[Tensor, ...]) -> str:
        for place, (found, expected) in enumerate(zip(results, self.expected, strict=True)):
            error, largest = (found.double() - expected).abs().max().item(), expected.abs().max().item()
            if not error <= TOLERANCE[found.dtype] * largest:
                what = ("the loss", *["another result"] * (len(results) - 2), "the gradient")[place]
                return f"{what} is off by {error:.3g}, its largest element is {largest:.3g}"
        return ""


def leaves(logits: Tensor, device: str) -> list[Tensor]:
    return [logits.clone().requires_grad_() for _ in range(count_of_sets(logits, device))]


def copying(sets: list[Tensor]) -> Timed:
    out = torch.empty_like(sets[0])
    return Timed("copy", lambda logits: out.copy_(logits.detach()), sets)


def measured(timed: list[Timed], found: dict[str, dict], device: str, seconds: float) -> list[dict]:
    """The records, with what the turns took."""
    measure(timed, device, time.monotonic() + seconds)
    for one in timed:
        found[one.name] |= one.summary()
    unit = found["copy"].get("median_ms")
    for record in found.values():
        if unit and "median_ms" in record:
            record["copies"] = record["median_ms"] / unit
    return list(found.values())


def pair_records(pair: Pair, shape: Shape, device: str, seconds: float, peaks: CpuPeaks | None) -> list[dict]:
    drawn = pairs.draw(pair.arguments, shape, device)
    wrong, sets = Wrong(pair, drawn), leaves(drawn[0], device)
    fields = {"table": "pairs", "name": pair.name, "shape": list(shape), "dtype": "float32"}
    found, timed = {}, []
    for which in (TODAY, NOW):
        record = found[which] = {**fields, "which": which, "code": pairs.code(pair.function(which))}
        run = pairs.step(pair.function(which), drawn[1:])
        try:
            if said := wrong(run(sets[0])):
                record["wrong"] = said
            if peaks:
                record["peak_extra_bytes"] = peaks.of_made(pairs.ready, pair.name, which, shape)
            else:
                record["peak_extra_bytes"] = cuda_peak(run, sets[0])
            record["gradient_bytes"] = sets[0].numel() * sets[0].element_size()
            timed.append(Timed(which, run, sets))
        except Exception as error:
            record["error"] = files.first_line(error)
    found["copy"] = {**fields, "which": "copy"}
    del wrong  # its float64 tensors
    return measured([*timed, copying(sets)], found, device, seconds)


def train(logits: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.autograd.grad(loss(logits), logits)[0]


def cost_records(shape: Shape, device: str, seconds: float) -> list[dict]:
    """The plain loss beside the same with weights, which here are one: their gradients are equal."""
    logits, target, weight = pairs.draw(["logits", "target", "weight"], shape, device)
    sets, weight = leaves(logits, device), torch.ones_like(weight)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": lambda logits: cross_entropy(logits, target),
        "with": lambda logits: cross_entropy(logits, target, sample_weight=weight),
    }
    runs: dict[str, Run] = {name: functools.partial(train, loss=loss) for name, loss in losses.items()}
    fields = {"table": "cost", "name": "sample_weight", "shape": list(shape), "dtype": "float32"}
    found = {name: {**fields, "which": name} for name in (*runs, "copy")}
    gradients = [run(sets[0]) for run in runs.values()]
    difference = (gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()
    if not difference <= TOLERANCE[torch.float32]:
        found["with"]["wrong"] = f"the gradient is off by {difference:.3g} of its largest element"
    del gradients
    timed = [Timed(name, run, sets) for name, run in runs.items()]
    records = measured([*timed, copying(sets)], found, device, seconds)
    plain, with_weights = (one.milliseconds for one in timed)
    found["with"]["over_plain"] = statistics.median(b / a for a, b in zip(plain, with_weights, strict=True))
    return records


def tidy(device: str) -> None:
    gc.collect()
    cross_entropy_ext.empty_cache()
    if device != "cpu":
        torch.cuda.empty_cache()


def table(records: list[dict]) -> Table:
    shown = Table(box=box.SIMPLE, title="Forward and backward; memory in gradients of the logits", pad_edge=False)
    shown.add_column("what")
    shown.add_column("")
    for name in ("median ms", "min", "max", "copies", "memory", "today / now"):
        shown.add_column(name, justify="right")
    last, today = None, None
    for record in records:
        if "error" in record:
            shown.add_row(record["name"], record.get("which", ""), f"[red]{record['error'][:60]}[/]")
            continue
        key = f"{record['name']}, {'x'.join(map(str, record['shape']))}"
        if key != last:
            shown.add_section()
        cells = [f"{record[k]:.3f}" for k in ("median_ms", "min_ms", "max_ms")]
        peak, today = record.get("peak_extra_bytes"), record if record["which"] == TODAY else today
        cells.append(f"{record['copies']:.2f}" if "copies" in record else "")
        cells.append("" if peak is None else f"{peak / record['gradient_bytes']:.2f}")
        if record["which"] == NOW and "median_ms" in today:
            cells.append(f"{today['median_ms'] / record['median_ms']:.2f}")
        if "over_plain" in record:
            cells.append(f"{record['over_plain']:.3f} x plain")
        if "wrong" in record:
            cells[-1] = f"[red]{record['wrong']}[/]"
        shown.add_row(key if key != last else "", record["which"], *cells)
        last = key
    return shown


def parse_arguments() -> argparse.Namespace:
    parser = command_line.parser_of(__doc__, "idioms", "small inputs, in seconds", "pairs")
    parser.add_argument("--seconds", type=float, help="for all turns, which share them (cpu 90, cuda 45, quick 4)")
    arguments = command_line.parse(parser)
    if arguments.seconds is None:
        arguments.seconds = SECONDS["quick" if arguments.quick else arguments.device]
    return arguments


def work(arguments: argparse.Namespace, peaks: CpuPeaks | None) -> list[tuple[dict, Callable[[float], list[dict]]]]:
    """Every row: what its record says if all fails, and what measures it in so many seconds."""
    device = arguments.device
    found: list[tuple[dict, Callable[[float], list[dict]]]] = []
    for pair in PAIRS:
        shape = pair.quick if arguments.quick else pair.shape
        fields = {"table": "pairs", "name": pair.name, "shape": list(shape)}
        found.append((fields, functools.partial(pair_records, pair, shape, device, peaks=peaks)))
    for shape in QUICK_COSTS if arguments.quick else COSTS:
        fields = {"table": "cost", "name": "sample_weight", "shape": list(shape)}
        found.append((fields, functools.partial(cost_records, shape, device)))
    return [(fields, measure) for fields, measure in found if re.search(arguments.only, fields["name"])]


def main() -> None:
    arguments = parse_arguments()
    device = arguments.device
    path = arguments.json
    rows = work(arguments, CpuPeaks() if device == "cpu" else None)
    records: list[dict] = []
    complete = False
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(rows))
        try:
            for fields, measure_row in rows:
                progress.update(task, description=f"{fields['name']}, {'x'.join(map(str, fields['shape']))}")
                try:
                    records += measure_row(seconds=arguments.seconds / len(rows))
                except Exception as error:  # of the row itself, such as memory for its tensors
                    records.append({**fields, "error": files.first_line(error)})
                files.write(path, device, records, quick=arguments.quick, complete=False)
                tidy(device)
                progress.advance(task)
            complete = True
        except KeyboardInterrupt:
            pass
    files.write(path, device, records, quick=arguments.quick, complete=complete)
    console.print(table(records))
    console.print(f"{path}", highlight=False)
    sys.exit(0 if complete and not any("error" in record or "wrong" in record for record in records) else 1)


if __name__ == "__main__":
    main()

"""Compares code around the loss in PyTorch with the same in this package: equal values first, then time and memory.

    python -m benchmarks.idioms [--device cpu|cuda] [--quick] [--only PATTERN] [--seconds S] [--json FILE]

`idiom_cases` holds both pieces of code, and the tables show the lines that run. Times are of forward and backward,
medians of turns that `today`, `now` and a copy of the logits take, as in `benchmarks.timing`; memory is as in
`benchmarks.memory`. A second table is the cost of `sample_weight` over the plain loss: the median of the ratios of
neighbouring turns.

Records, a dictionary each. One that failed has an `error`, and one that is wrong says what is `wrong`:

    table "pairs": name, shape, dtype, which (today, now, copy); code, median_ms, min_ms, max_ms, turns, copies,
                   peak_extra_bytes, gradient_bytes
    table "cost":  name, shape, dtype, which (plain, with, copy); median_ms, min_ms, max_ms, turns, copies, and
                   for `with` over_plain
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from cross_entropy_ext.functional import cross_entropy

from . import command_line, idiom_cases
from . import records as files
from .command_line import Item
from .idiom_cases import NOW, PAIRS, TODAY, Pair, Shape
from .memory import CpuPeaks, cuda_peak
from .pages import Section, measured_by
from .tables import Block, Table, dimensions, duration, failures, number
from .timing import Run, Timed, add_copies, copying, count_of_sets, measure, median_ratio
from .values import TOLERANCE, difference

SECONDS = {"cpu": 90.0, "cuda": 45.0, "quick": 4.0}
COSTS = ((2048, 32_000), (512, 32_000), (4, 19, 256, 512))
QUICK_COSTS = ((64, 4000), (1, 19, 32, 64))

# ---- measuring ------------------------------------------------------------------------------------------------------


class Wrong:
    """Compares results with those of today's code in float64."""

    def __init__(self, pair: Pair, drawn: list[Tensor | float]) -> None:
        logits, *rest = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in drawn]
        self.expected = idiom_cases.step(pair.today, rest)(logits.requires_grad_())

    def __call__(self, results: tuple[Tensor, ...]) -> str:
        """Says what is wrong, or nothing."""
        names = ("the loss", *["another result"] * (len(results) - 2), "the gradient")
        for name, found, expected in zip(names, results, self.expected, strict=True):
            if wrong := difference(name, found, expected, TOLERANCE[found.dtype]):
                return wrong
        return ""


def leaves(logits: Tensor, device: str) -> list[Tensor]:
    return [logits.clone().requires_grad_() for _ in range(count_of_sets(logits, device))]


def timed_records(timed: list[Timed], found: dict[str, dict], device: str, seconds: float) -> list[dict]:
    """The records, with the times of all turns."""
    timed = [*timed, copying(timed[0].logits)] if timed else []
    measure(timed, device, time.monotonic() + seconds)
    for one in timed:
        found[one.name] |= one.summary()
    return add_copies(found)


def pair_records(pair: Pair, shape: Shape, device: str, seconds: float, peaks: CpuPeaks | None) -> list[dict]:
    drawn = idiom_cases.draw(pair.arguments, shape, device)
    wrong, sets = Wrong(pair, drawn), leaves(drawn[0], device)
    fields = {"table": "pairs", "name": pair.name, "shape": list(shape), "dtype": "float32"}
    found, timed = {}, []
    for which in (TODAY, NOW):
        record = found[which] = {**fields, "which": which, "code": idiom_cases.code(pair.function(which))}
        run = idiom_cases.step(pair.function(which), drawn[1:])
        try:
            if said := wrong(run(sets[0])):
                record["wrong"] = said
            if peaks:
                record["peak_extra_bytes"] = peaks.of_made(idiom_cases.ready, pair.name, which, shape)
            else:
                record["peak_extra_bytes"] = cuda_peak(run, sets[0])
            record["gradient_bytes"] = sets[0].numel() * sets[0].element_size()
            timed.append(Timed(which, run, sets))
        except Exception as error:
            record["error"] = files.reason(error)
    found["copy"] = {**fields, "which": "copy"}
    del wrong  # frees its float64 tensors
    return timed_records(timed, found, device, seconds)


def train(logits: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.autograd.grad(loss(logits), logits)[0]


def cost_records(shape: Shape, device: str, seconds: float) -> list[dict]:
    """The plain loss beside the same with weights of one, so that their gradients are equal."""
    logits, target, weight = idiom_cases.draw(["logits", "target", "weight"], shape, device)
    sets, weight = leaves(logits, device), torch.ones_like(weight)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": lambda logits: cross_entropy(logits, target),
        "with": lambda logits: cross_entropy(logits, target, sample_weight=weight),
    }
    runs: dict[str, Run] = {name: functools.partial(train, loss=loss) for name, loss in losses.items()}
    fields = {"table": "cost", "name": "sample_weight", "shape": list(shape), "dtype": "float32"}
    found = {name: {**fields, "which": name} for name in (*runs, "copy")}
    plain, weighted = (run(sets[0]) for run in runs.values())
    if wrong := difference("the gradient", weighted, plain, TOLERANCE[torch.float32]):
        found["with"]["wrong"] = wrong
    del plain, weighted
    timed = [Timed(name, run, sets) for name, run in runs.items()]
    records = timed_records(timed, found, device, seconds)
    found["with"]["over_plain"] = median_ratio(timed[1].milliseconds, timed[0].milliseconds)
    return records


# ---- tables ---------------------------------------------------------------------------------------------------------

Groups = dict[str, dict[str, dict]]  # name: which: record


def grouped(records: list[dict]) -> Groups:
    """The records of the pairs."""
    found: Groups = {}
    for record in records:
        if record["table"] == "pairs" and "which" in record:
            found.setdefault(record["name"], {})[record["which"]] = record
    return found


def costs_of(records: list[dict]) -> list[tuple[dict, dict]]:
    """The plain loss and the one with an argument, for each shape."""
    costs = [record for record in records if record["table"] == "cost"]
    plain = {tuple(record["shape"]): record for record in costs if record.get("which") == "plain"}
    return [(plain[tuple(record["shape"])], record) for record in costs if "over_plain" in record]


def faster(group: dict[str, dict]) -> float | None:
    times = [group.get(which, {}).get("median_ms") for which in (TODAY, NOW)]
    return times[0] / times[1] if all(times) else None


def gradients(record: dict) -> float | None:
    """The peak of memory, in sizes of the logits' gradient."""
    peak = record.get("peak_extra_bytes")
    return None if peak is None else peak / record["gradient_bytes"]


def pairs_table(groups: Groups, detail: bool = False) -> Table:
    rows = []
    for name, group in groups.items():
        cells = [name, dimensions(group[NOW])]
        for record in (group[TODAY], group[NOW], group["copy"]):
            cells.append(record.get("error") or duration(record, detail))
        cells += [number(faster(group), ".1f"), number(group[NOW].get("copies"), ".2f")]
        rows.append([*cells, *(number(gradients(group[which]), ".2f") for which in (TODAY, NOW))])
    header = ["", "logits", "today, ms", "now, ms", "copy, ms", "today / now", "copies", "memory today", "memory now"]
    return Table(header, rows, 2, "Forward and backward; memory in gradients of the logits")


def costs_table(records: list[dict], detail: bool = False) -> Table:
    rows = []
    for plain, record in costs_of(records):
        times = [duration(plain, detail), duration(record, detail)]
        rows.append([record["name"], dimensions(record), *times, f"{record['over_plain'] - 1:+.1%}"])
    return Table(["", "logits", "plain, ms", "with it, ms", "costs"], rows, 2, "The cost of an argument")


def own_failures(records: list[dict]) -> str:
    return failures((f"{record['name']}, {record.get('which', '')}", record) for record in records)


def console_blocks(records: list[dict]) -> list[Block]:
    return [pairs_table(grouped(records), True), costs_table(records, True), own_failures(records)]


# ---- pages ----------------------------------------------------------------------------------------------------------


def code_cell(lines: list[str]) -> str:
    return "<br>".join(f"`{line}`".replace("|", "\\|") for line in lines)


def usual_shape(groups: Groups) -> str:
    """The shape of most rows."""
    return statistics.mode(dimensions(group[NOW]) for group in groups.values())


def readme_table(groups: Groups) -> Table:
    usual, rows = usual_shape(groups), []
    for name, group in groups.items():
        today, now = group[TODAY], group[NOW]
        shape = "" if dimensions(now) == usual else f", {dimensions(now)}"
        both = [[duration(record), number(gradients(record), ".1f")] for record in (today, now)]
        times, memory = (" → ".join(pair) for pair in zip(*both, strict=True))
        code = [code_cell(today["code"]), code_cell(now["code"])]
        rows.append([name + shape, *code, times, number(faster(group), ".1f"), memory])
    return Table(["", "today", "now", "time, ms", "times as fast", "memory"], rows, left=3)


def code_blocks(groups: Groups) -> list[str]:
    blocks = []
    for name, group in groups.items():
        lines = [f"# {name}", *group[TODAY]["code"], "", "# now", *group[NOW]["code"]]
        blocks.append("\n".join(["```python", *lines, "```"]))
    return blocks


def blocks(device: str, result: dict) -> list[Block]:
    records = result["records"]
    groups = grouped(records)
    return [
        "Common code around the loss in PyTorch, and the same with this package. Values and gradients of both are "
        "those of today's code in float64. Forward and backward in float32, medians of interleaved turns. `copies` is "
        "the time of now in units of copying the logits. Memory is the peak on top of the arguments, in sizes of the "
        "logits' gradient.",
        pairs_table(groups),
        "The cost of an argument over the plain loss; the median of the ratios of neighbouring turns:",
        costs_table(records),
        own_failures(records),
        "<details><summary>The code</summary>",
        *code_blocks(groups),
        "</details>",
    ]


def readme(results: dict[str, dict]) -> list[Block]:
    result = results["cpu"]
    groups = grouped(result["records"])
    costs = [f"{record['over_plain'] - 1:+.0%} ({dimensions(record)})" for _, record in costs_of(result["records"])]
    text = (
        f"Forward and backward of {usual_shape(groups)} logits in float32, unless the row says otherwise. Memory is "
        "the peak on top of the arguments, in sizes of the logits' gradient; the gradient itself counts as one. "
        f"`sample_weight` costs {', '.join(costs)} over the plain loss."
    )
    return [readme_table(groups), text, measured_by(result)]


SECTION = Section("idioms", "Code around the loss", blocks, readme=readme)


def items_of(arguments: argparse.Namespace) -> list[Item]:
    device, found = arguments.device, []
    peaks = CpuPeaks() if device == "cpu" else None
    for pair in PAIRS:
        shape = pair.quick if arguments.quick else pair.shape
        found.append(("pairs", pair.name, shape, functools.partial(pair_records, pair, shape, device, peaks=peaks)))
    for shape in QUICK_COSTS if arguments.quick else COSTS:
        found.append(("cost", "sample_weight", shape, functools.partial(cost_records, shape, device)))
    found = [one for one in found if re.search(arguments.only, one[1])]
    seconds = arguments.seconds / max(1, len(found))
    return [
        Item(name, [{"table": table, "name": name, "shape": list(shape)}], functools.partial(measure, seconds=seconds))
        for table, name, shape, measure in found
    ]


def main() -> None:
    arguments = command_line.parse(
        command_line.parser_of(__doc__, "idioms", "small inputs, in seconds", "pairs", seconds=SECONDS)
    )
    command_line.measure_all(arguments, items_of(arguments), console_blocks, lambda record: True)


if __name__ == "__main__":
    main()

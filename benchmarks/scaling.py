"""How the time grows with the classes, the rows and the threads, and the cost of a call on tiny logits.

    python -m benchmarks.scaling [--device cpu|cuda] [--quick] [--only CURVE] [--json FILE]

* `classes`: a fixed number of elements, as rows (N, C) and as the planes of images (1, C, N), with C from 2 to a
  million. The work for each position changes per element.
* `rows`: N from one to many, at a classifier's C and at a language model's. Per element, the logits' place (caches,
  then memory) and the share of a call's own cost change.
* `threads`: from one to all of a CPU.
* `overhead`: logits so small that a call's own cost is all. The forward without gradients, the forward of a training
  step, and its backward are timed apart. On a GPU this is the host's time, while the device's queue takes the work.

Times are medians of turns, as in `benchmarks.timing`; the copy of the logits is the floor. On a GPU the peers are
measured too: on tiny logits, and along `classes` at a few values of C, since many compile for each.
"""

from __future__ import annotations

import functools
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from . import command_line, figures
from . import records as files
from .command_line import Item
from .pages import Section
from .providers import PEERS, Loss, Provider, forget_compiled, importable
from .shapes import Case, make_inputs
from .tables import Block, Table, dimensions, failures, number, quotient
from .timing import Timed, as_of_a_layer, copying, measure, step

CLASSES = (2, 3, 4, 6, 8, 10, 12, 16, 19, 24, 32, 48, 64, 96, 128, 150, 192, 256, 384, 512, 768, 1000, 1536, 2048, 4096)
CLASSES += (8192, 16_384, 32_000, 50_257, 65_536, 128_256, 262_144, 524_288, 2**20)
QUICK_CLASSES = (2, 19, 1000, 32_000, 2**20)
COMPARED = (2, 10, 64, 1000, 8192, 32_000, 128_256, 262_144)  # with all providers
ELEMENTS = {"cpu": 2**24, "cuda": 2**28, "quick": 2**20}
ROWS = {1000: tuple(2**k for k in range(0, 18, 1)), 32_000: tuple(2**k for k in range(0, 13, 1))}
QUICK_ROWS = {1000: (1, 64, 1024), 32_000: (1, 32)}
THREADS_CASES = {"Llama 2": (1024, 32_000), "ImageNet": (4096, 1000), "Cityscapes": (2, 19, 512, 1024)}
TINY = {"MNIST": (64, 10), "one row": (1, 98)}
CALLS = 100  # of a tiny input, for one turn


def work(device: str, quick: bool) -> Iterator[tuple[str, dict, Case, tuple[int, ...], int]]:
    """Every point: its curve, the fields of its record, its case and shape, and its threads."""
    elements, threads = ELEMENTS["quick" if quick else device], torch.get_num_threads()
    for classes in QUICK_CLASSES if quick else CLASSES:
        rows = max(1, elements // classes)
        fields = {"classes": classes, "rows": rows}
        yield "classes", {**fields, "layout": "rows"}, Case("rows"), (rows, classes), threads
        yield "classes", {**fields, "layout": "planes"}, Case("planes"), (1, classes, rows), threads
    for classes, counts in (QUICK_ROWS if quick else ROWS).items():
        for rows in counts:
            fields = {"classes": classes, "rows": rows, "layout": "rows"}
            yield "rows", fields, Case("rows"), (rows, classes), threads
    if device == "cpu":
        for name, shape in THREADS_CASES.items():
            shape = (max(1, shape[0] // 8), *shape[1:]) if quick else shape
            for count in sorted({*(2**k for k in range(10) if 2**k <= os.cpu_count()), os.cpu_count()}):
                fields = {
                    "case": name,
                    "classes": shape[1],
                    "threads": count,
                    "layout": "rows" if len(shape) == 2 else "planes",
                }
                yield "threads", fields, Case(name), shape, count


Values = tuple[float, float, float]  # the loss, the largest sum of a row's gradient, and its largest element


def values_of(one: Timed) -> Values:
    try:
        loss, grad = one.run(one.logits[0])
        return loss.item(), grad.sum(1).abs().max().item(), grad.abs().max().item()
    finally:  # other providers may use the same copy
        one.restore(0)


def disagreement(found: Values, native: Values) -> str:
    """Says what differs from the native loss, or nothing. `benchmarks.run` compares more exactly."""
    if abs(found[0] - native[0]) > 1e-3 * abs(native[0]) or abs(found[2] - native[2]) > 1e-3 * native[2]:
        return f"loss and largest gradient are {found[0]:.6g}, {found[2]:.6g}"
    if found[1] > 1e-3 * found[2]:  # over the classes it sums to zero
        return f"the gradient of a row sums to {found[1]:.3g}"
    return ""


def point(
    curve: str, fields: dict, case: Case, shape: tuple[int, ...], device: str, found: list[Provider], seconds: float
) -> list[dict]:
    """A training step and a copy at one point of a curve."""
    inputs = make_inputs(case, shape, device)
    logits = inputs.logits.requires_grad_()
    spare = logits.detach().clone() if any(provider.overwrites for provider in found) else None

    native = values_of(Timed("native", step(F.cross_entropy, inputs, True), [logits]))
    timed, said = [], {}
    for provider in found:
        try:
            own = as_of_a_layer(spare) if provider.overwrites else logits
            refill = [logits.detach()] if provider.overwrites else None
            one = Timed(provider.name, step(provider.load(), inputs, True), [own], refill)
            if wrong := disagreement(values_of(one), native):
                said[provider.name] = {"wrong": wrong}
            timed.append(one)
        except Exception as error:
            said[provider.name] = {"error": files.reason(error)}
    timed.append(copying([logits]))
    measure(timed, device, time.monotonic() + seconds)
    times = {one.name: one.summary() for one in timed}
    result = []
    for name in (*(provider.name for provider in found), "copy"):
        where = {"curve": curve, **fields, "shape": list(shape), "provider": name}
        record = where | times.get(name, {}) | said.get(name, {})
        if "median_ms" in record:
            record["ns_per_element"] = 1e6 * record["median_ms"] / logits.numel()
        result.append(record)
    return result


def timed_calls(calls: Callable[[], object]) -> tuple[float, object]:
    """Microseconds of one of CALLS calls, and their results."""
    begin = time.perf_counter()
    result = calls()
    return 1e6 * (time.perf_counter() - begin) / CALLS, result


def overhead_turn(loss: Loss, logits: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    with torch.no_grad():
        evaluation, _ = timed_calls(lambda: [loss(logits, target) for _ in range(CALLS)])
    forward, values = timed_calls(lambda: [loss(logits, target) for _ in range(CALLS)])
    backward, _ = timed_calls(lambda: [torch.autograd.grad(value, logits) for value in values])
    if logits.is_cuda:
        torch.cuda.synchronize()
    return {"forward, no gradient": evaluation, "forward": forward, "backward": backward}


def overhead(device: str, found: list[Provider], seconds: float) -> list[dict]:
    result = []
    for name, shape in TINY.items():
        inputs = make_inputs(Case(name), shape, device)
        logits, target = inputs.logits.requires_grad_(), inputs.target
        losses: dict[str, Loss] = {}
        times: dict[tuple[str, str], list[float]] = {}
        for provider in found:
            try:
                loss = provider.load()
                overhead_turn(loss, logits, target)  # compiles
                losses[provider.name] = loss
            except Exception as error:
                fields = {"curve": "overhead", "case": name, "shape": list(shape), "provider": provider.name}
                result.append({**fields, "direction": "", "error": files.reason(error)})
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for provider, loss in losses.items():
                for direction, microseconds in overhead_turn(loss, logits, target).items():
                    times.setdefault((provider, direction), []).append(microseconds)
        for (provider, direction), values in times.items():
            fields = {"curve": "overhead", "case": name, "shape": list(shape), "provider": provider}
            found_times = {"median_us": statistics.median(values), "min_us": min(values), "max_us": max(values)}
            result.append({**fields, "direction": direction, **found_times, "turns": len(values)})
        forget_compiled()
    return result


# ---- tables and pages -----------------------------------------------------------------------------------------------


def table(records: list[dict], value: str, columns: dict[str, str], form: str = "", copies: bool = False) -> Table:
    """A row for each point and a column for each provider, with `value` in nanoseconds or microseconds.

    `columns` are the headers and names of the fields that make a point. `copies` adds the ratios to a copy and to the
    native loss."""
    points: dict[tuple, dict] = {}
    for record in records:
        if value in record:
            point = tuple(str(record[name]) for name in columns.values())
            points.setdefault(point, {})[record["provider"]] = record[value]
    there = {name for values in points.values() for name in values}
    names = [name for name in ("native", "native compiled", *PEERS, "ours", "copy") if name in there]
    rows = []
    for point, values in points.items():
        row = [*point, *(number(values.get(name), form) for name in names)]
        native, ours, copy = (values.get(name) for name in ("native", "ours", "copy"))
        rows.append([*row, *([number(quotient(ours, copy), ".2f"), number(quotient(native, ours), ".2f")] * copies)])
    unit = "us" if value == "median_us" else "ns"
    header = [*columns, *(f"{name}, {unit}" for name in names), *(["copies", "speedup"] * copies)]
    return Table(header, rows, len(columns))


POINTS = {"classes": ("layout", "classes", "rows"), "rows": ("classes", "rows"), "threads": ("case", "threads")}


def curve_table(records: list[dict], curve: str, copies: bool = False) -> Table:
    chosen = [record for record in records if record["curve"] == curve]
    return table(chosen, "ns_per_element", {name: name for name in POINTS[curve]}, copies=copies)


def overhead_table(records: list[dict]) -> Table:
    chosen = [record for record in records if record["curve"] == "overhead" and "error" not in record]
    return table(chosen, "median_us", {"logits": "case", "call": "direction"}, ".1f")


# Explains the steps of a device's curves.
EXPLAINED = {
    "cpu": """Where the curves are not flat, and why:

* Fewer than 100 classes: the work for each position shows, a logarithm and a division, eight bytes of target read and
  eight of `lse` written. At two classes these are as many bytes as the logits.
* Planes of more than 160 classes: a tile of them does not fit the first-level cache, so loss and gradient each read the
  logits. The fewer positions there are, the shorter the runs of memory, down to 64 bytes.
* Few rows: a call's own cost, see below. Then the logits lie in the caches, whose end is a step, for the copy as well.
* From 64 MiB of logits on, the backward makes the gradient, from a second read. Made in the forward, it would lie in
  memory while the rest of the model's forward needs that."""
}


def blocks(device: str, result: dict) -> list[Block]:
    records = result["records"]
    threads = ["Threads, nanoseconds per element:", curve_table(records, "threads")]
    return [
        figures.link(device, "classes", "Time per element against the number of classes"),
        figures.link(device, "rows", "Time per element against the number of rows"),
        EXPLAINED.get(device, ""),
        *(threads if any(record["curve"] == "threads" for record in records) else []),
        "The cost of a call on tiny logits, in microseconds: an evaluation, and the two halves of a training step.",
        overhead_table(records),
        "<details><summary>Every point of the curves</summary>",
        curve_table(records, "classes"),
        curve_table(records, "rows"),
        "</details>",
    ]


SECTION = Section("scaling", "Scaling", blocks, draw=figures.draw_scaling)


def console_blocks(records: list[dict]) -> list[Block]:
    tables = [*(curve_table(records, curve, copies=True) for curve in POINTS), overhead_table(records)]
    named = ((f"{record['curve']}, {dimensions(record)}, {record['provider']}", record) for record in records)
    return [*(one for one in tables if one.rows), failures(named)]


def on_threads(count: int, *arguments) -> list[dict]:
    """The records of a point, measured on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return point(*arguments)
    finally:
        torch.set_num_threads(before)
        forget_compiled()


def main() -> None:
    arguments = command_line.parse(
        command_line.parser_of(
            __doc__,
            "scaling",
            "a few points of each curve",
            "curves",
            seconds={"cpu": 1.5, "cuda": 1.5, "quick": 0.2},
            of_seconds="for each point",
        )
    )
    device, quick, seconds = arguments.device, arguments.quick, arguments.seconds
    here = importable(device)
    few = [provider for provider in here if provider.name in ("ours", "native")]
    everyone = [p for p in here if p.name not in ("ours in place", "cut-cross-entropy")] if device != "cpu" else few
    items = []
    for curve, fields, case, shape, threads in work(device, quick):
        if re.search(arguments.only, curve):
            found = everyone if curve == "classes" and fields["classes"] in COMPARED else few
            failed = [{"curve": curve, **fields, "shape": list(shape), "provider": ""}]
            run = functools.partial(on_threads, threads, curve, fields, case, shape, device, found, seconds)
            items.append(Item(f"{curve}, {shape}", failed, run))
    if re.search(arguments.only, "overhead"):
        compiled = [p for p in here if p.name == "native compiled" and p not in everyone]
        run = functools.partial(overhead, device, [*everyone, *compiled], 10 * seconds)
        items.append(Item("overhead", [{"curve": "overhead", "case": "", "shape": [], "provider": ""}], run))
    command_line.measure_all(arguments, items, console_blocks, lambda record: record["provider"] in ("", "ours"))


if __name__ == "__main__":
    main()

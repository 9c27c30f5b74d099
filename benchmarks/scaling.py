"""How the time grows: with the classes, with the rows, with the threads; and what a call costs when nothing else does.

    python -m benchmarks.scaling [--device cpu|cuda] [--quick] [--only CURVE] [--json FILE]

* `classes`: a fixed number of elements, as rows (N, C) and as the planes of images (1, C, N), C from 2 to a million.
  Per element, what changes is what is done once for each position.
* `rows`: N from one to many at a classifier's C and at a language model's. Per element, what changes is where the
  logits lie (caches, then memory) and how much a call's own cost weighs.
* `threads`: from one to all of a CPU.
* `overhead`: logits so small that a call's own cost is all. Forward without gradients, forward of a training step, and
  its backward, apart. On a GPU it is the host's time, while the device's queue takes the work.

Times are medians of turns, as in `benchmarks.timing`; the copy of the logits is the floor. On a GPU the peers are there
as well: in every call, and along `classes` at a few numbers of them, since many compile for each.
"""

from __future__ import annotations

import gc
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import cross_entropy_ext

from . import command_line
from . import records as files
from .providers import PEERS, Loss, Provider, Refused, forget_compiled, importable
from .shapes import Case, make_inputs
from .timing import Timed, as_of_a_layer, measure, step

console = Console(width=max(150, Console().width))

CLASSES = (2, 3, 4, 6, 8, 10, 12, 16, 19, 24, 32, 48, 64, 96, 128, 150, 192, 256, 384, 512, 768, 1000, 1536, 2048, 4096)
CLASSES += (8192, 16_384, 32_000, 50_257, 65_536, 128_256, 262_144, 524_288, 2**20)
QUICK_CLASSES = (2, 19, 1000, 32_000, 2**20)
COMPARED = (2, 10, 64, 1000, 8192, 32_000, 128_256, 262_144)  # with everybody who is here
ELEMENTS = {"cpu": 2**24, "cuda": 2**28, "quick": 2**20}
ROWS = {1000: tuple(2**k for k in range(0, 18, 1)), 32_000: tuple(2**k for k in range(0, 13, 1))}
QUICK_ROWS = {1000: (1, 64, 1024), 32_000: (1, 32)}
THREADS_CASES = {"Llama 2": (1024, 32_000), "ImageNet": (4096, 1000), "Cityscapes": (2, 19, 512, 1024)}
TINY = {"MNIST": (64, 10), "one row": (1, 98)}
CALLS = 100  # of a tiny input, for one turn


def work(device: str, quick: bool) -> Iterator[tuple[str, dict, Case, tuple[int, ...], int]]:
    """Every point: its curve, what its record says, its inputs and its threads."""
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
    finally:  # several may have the same copy
        one.restore(0)


def disagreement(found: Values, native: Values) -> str:
    """What is not native's, or nothing: `benchmarks.run` looks closer."""
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
    out = torch.empty_like(logits)
    spare = logits.detach().clone() if any(provider.overwrites for provider in found) else None

    def copy(logits: torch.Tensor) -> None:
        with torch.no_grad():
            out.copy_(logits)

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
        except Refused as refusal:
            said[provider.name] = {"error": str(refusal)}
        except Exception as error:
            said[provider.name] = {"error": files.first_line(error)}
    timed.append(Timed("copy", copy, [logits]))
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
    """Microseconds of one of CALLS calls, and what they returned."""
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
                result.append({**fields, "direction": "", "error": files.first_line(error)})
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


def table(records: list[dict]) -> Table:
    shown = Table(box=box.SIMPLE, title="Training steps, nanoseconds for each element; calls, microseconds")
    timed = {record["provider"] for record in records if "error" not in record}
    peers = [name for name in PEERS if name in timed]
    for name in ("curve", "point", "ours", "native", "compiled", *peers, "copy", "copies", "speedup"):
        shown.add_column(name, justify="left" if name in ("curve", "point") else "right")
    points: dict[tuple, dict] = {}
    for record in records:
        names = ("case", "layout", "classes", "rows", "threads", "direction")
        key = (
            record["curve"],
            ", ".join(
                f"{record[k]} {k}" if k in ("classes", "rows", "threads") else record[k] for k in names if k in record
            ),
        )
        points.setdefault(key, {})[record["provider"]] = record.get("ns_per_element", record.get("median_us"))
    last = None
    for (curve, where), values in points.items():
        if last not in (None, curve):
            shown.add_section()
        ours, native, copy = (values.get(name) for name in ("ours", "native", "copy"))
        cells = [values.get(name) for name in ("ours", "native", "native compiled", *peers, "copy")]
        cells += [ours / copy if ours and copy else None, native / ours if ours and native else None]
        shown.add_row(
            curve if curve != last else "", where, *("" if value is None else f"{value:.3f}" for value in cells)
        )
        last = curve
    return shown


def main() -> None:
    parser = command_line.parser_of(__doc__, "scaling", "a few points of each curve", "curves")
    parser.add_argument("--seconds", type=float, help="for each point (1.5, quick 0.2)")
    arguments = command_line.parse(parser)
    device, quick = arguments.device, arguments.quick
    seconds = arguments.seconds or (0.2 if quick else 1.5)
    path = arguments.json
    here = importable(device)
    few = [provider for provider in here if provider.name in ("ours", "native")]
    everybody = [p for p in here if p.name not in ("ours in place", "cut-cross-entropy")] if device != "cpu" else few
    points = [p for p in work(device, quick) if re.search(arguments.only, p[0])]
    records: list[dict] = []
    all_threads = torch.get_num_threads()
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(points) + 1)
        for curve, fields, case, shape, threads in points:
            progress.update(task, description=f"{curve}, {tuple(shape)}")
            torch.set_num_threads(threads)
            found = everybody if curve == "classes" and fields["classes"] in COMPARED else few
            try:
                records += point(curve, fields, case, shape, device, found, seconds)
            except Exception as error:
                records.append(
                    {"curve": curve, **fields, "shape": list(shape), "provider": "", "error": files.first_line(error)}
                )
            finally:
                torch.set_num_threads(all_threads)
                forget_compiled()
                gc.collect()
                cross_entropy_ext.empty_cache()
            files.write(path, device, records, quick=quick)
            progress.advance(task)
        if re.search(arguments.only, "overhead"):
            progress.update(task, description="overhead")
            compiled = [p for p in here if p.name == "native compiled" and p not in everybody]
            records += overhead(device, [*everybody, *compiled], 10 * seconds)
        progress.advance(task)
    files.write(path, device, records, quick=quick)
    console.print(table(records))
    console.print(f"{path}", highlight=False)


if __name__ == "__main__":
    main()

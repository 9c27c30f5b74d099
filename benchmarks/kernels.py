"""Each CUDA kernel by itself: its time beside the time of a copy of as many bytes.

    python -m benchmarks.kernels [--device cuda] [--quick] [--only PATTERN] [--json FILE]
    python -m benchmarks.kernels --ncu FILE         # prints a command by which Nsight Compute writes counters to FILE
    python -m benchmarks.kernels --counters FILE    # shows these counters beside the predicted ones

CASES has a shape for each family of csrc/cuda/plan.h. A case is run in three ways: a training step, whose forward makes
the gradient; an evaluation; and the backward of reduction 'none', which has lse and reads the logits again. Each launch
is a row, in order: `count_targets` before a mean, `finish` after a sum, and in a training step's backward the loss's
kernel once more, which finds that the gradient is there.

* `floor_ms` is the time of the bytes that have to be moved (`launches` counts them), at the bandwidth of a copy of
  COPY_BYTES, measured in the same run. A kernel that moves so little that a launch takes longer has no `ratio`.
* `made_bytes` also counts the second read of a kernel that reads the logits twice. If a row or tile is still in the L2
  cache, that read does not reach memory.
* Times are the profiler's, medians of CALLS calls, on inputs that the L2 cache does not hold.

Records: case, shape, dtype, layout, target, options, kernel, launch; bytes, made_bytes, floor_ms, ratio, median_ms,
min_ms, max_ms, turns; or an `error`. The first is the copy. Those of `--counters` (counters.json): the same names, and
dram_bytes, dram_ratio, occupancy, registers, stall, ms. A write that is still in the L2 cache is not counted.
"""

from __future__ import annotations

import argparse
import collections
import csv
import functools
import itertools
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cross_entropy_ext.functional import cross_entropy

from . import command_line
from .command_line import Item
from .pages import Section
from .shapes import BF16, LLAMA2, LLAMA3, Case, Inputs, Shape, make_inputs
from .tables import Block, Table, dimensions, duration, number, red
from .timing import sets_of_logits, summary_of

COPY_BYTES = {False: 2**31, True: 2**20}  # quick or not
CALLS, WARM_UP = 20, 3
LEAST_FLOOR_MS = 1e-3  # no launch is shorter
TRAINING, EVALUATION, BACKWARD = WAYS = "training", "evaluation", "backward"
COUNT, FINISH = "count_targets", "finish"
FAR = 1.1  # ratios above are red


@dataclass(frozen=True)
class KernelCase:
    case: Case
    kernel: str  # by its name in csrc/cuda
    plan: dict  # the decisions of csrc/cuda/plan.cpp
    reads: int = 1  # how often the kernel reads the logits

    @property
    def name(self) -> str:
        return self.case.name


def rows(name: str, shape: Shape, quick: Shape, team: str, copied: bool = True, reads: int = 1, **more) -> KernelCase:
    plan = {"family": "rows", "team": team, "copied": copied}
    return KernelCase(Case(name, None, shape, quick, **more), "rows", plan, reads)


def spatial(name: str, shape: Shape, quick: Shape, vectors: bool, copied: bool, reads: int = 1, **more) -> KernelCase:
    plan = {"family": "spatial", "vectors": vectors, "copied": copied}
    return KernelCase(Case(name, None, shape, quick, **more), "spatial", plan, reads)


def other(name: str, shape: Shape, quick: Shape, kernel: str, reads: int = 1, **more) -> KernelCase:
    return KernelCase(Case(name, None, shape, quick, **more), kernel, {"family": kernel}, reads)


CASES = [
    other("small rows", (262_144, 10), (4096, 10), "small_rows"),
    other("small rows, many", (4_194_304, 10), (8192, 10), "small_rows"),
    other("small rows, channels_last", (8, 19, 512, 1024), (1, 19, 32, 64), "small_rows", layout="channels_last"),
    rows("rows by a warp", (65_536, 1000), (64, 1000), "warp"),
    rows("rows by a warp, bfloat16", (16_384, 4096), (64, 4096), "warp", dtype=BF16),
    rows("rows by a warp, channels_last", (8, 1000, 256, 256), (1, 1000, 8, 8), "warp", layout="channels_last"),
    rows("rows by a block", (8192, LLAMA2), (16, LLAMA2), "block", dtype=BF16),
    rows("rows by a block, label smoothing", (8192, LLAMA2), (16, LLAMA2), "block", dtype=BF16, label_smoothing=0.1),
    rows("rows by a block, probabilities", (8192, LLAMA2), (16, LLAMA2), "block", dtype=BF16, target="probabilities"),
    rows("rows by a cluster", (8192, LLAMA3), (8, LLAMA3), "cluster", dtype=BF16),
    rows("rows uncopied", (1024, 2**20), (4, 2**20), "block", copied=False, reads=2, dtype=BF16),
    spatial("spatial copied", (8, 19, 512, 1024), (1, 19, 32, 64), True, True),
    spatial("spatial copied, 150 classes", (8, 150, 256, 256), (1, 150, 16, 32), True, True),
    spatial("spatial copied, bfloat16", (8, 19, 512, 1024), (1, 19, 32, 64), True, True, dtype=BF16),
    spatial("spatial uncopied", (4, 4096, 128, 128), (1, 4096, 8, 8), True, False, 2),
    spatial("spatial without vectors", (8, 19, 511, 1023), (1, 19, 31, 63), False, False, 2),
    other("strided, by a warp", (16_384, 1000, 4), (16, 1000, 4), "strided", 2),
    other("strided, by a block", (4096, 8192, 4), (4, 8192, 4), "strided", 2),
]


# ---- predictions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    kernel: str
    what: str
    bytes: int = 0  # that it has to move
    made: int = 0  # that it moves as it is made


def launches(one: KernelCase, shape: Shape, way: str) -> list[Launch]:
    """The launches of a call, in order, with the bytes of each."""
    elements, size = math.prod(shape), one.case.dtype.itemsize
    positions, logits = elements // shape[1], elements * size
    soft = one.case.target == "probabilities"
    targets = logits if soft else 8 * positions
    saved = (3 if soft else 2) * 4 * positions  # lse in two parts, and of probabilities their sum
    again = (one.reads - 1) * logits
    if way == BACKWARD:
        moved = 2 * logits + targets + saved + size * positions  # a gradient of the loss for each position
        return [Launch(one.kernel, "backward", moved, moved)]
    finish = Launch(FINISH, "after")
    if way == EVALUATION:
        moved = logits + targets + saved
        return [Launch(one.kernel, "forward", moved, moved), finish]
    moved = 2 * logits + targets  # with a gradient there is nothing to save
    made = Launch(one.kernel, "forward with gradient", moved, moved + again)
    count = [] if soft else [Launch(COUNT, "before", targets, targets)]  # probabilities all count
    return [*count, made, finish, Launch(one.kernel, "handed over")]


# ---- measuring ------------------------------------------------------------------------------------------------------


def calls_of(inputs: Inputs, sets: list[Tensor], way: str, count: int) -> list[Callable[[], object]]:
    """The calls of a way, each on the next set of logits."""
    target, options = inputs.target, inputs.options

    def train(logits: Tensor) -> Tensor:
        return torch.autograd.grad(cross_entropy(logits, target, **options), logits)[0]

    def evaluate(logits: Tensor) -> Tensor:
        with torch.no_grad():
            return cross_entropy(logits, target, **options)

    def backward(loss: Tensor, logits: Tensor, upstream: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits, upstream)[0]

    chosen = [sets[number % len(sets)] for number in range(count)]
    if way != BACKWARD:
        return [functools.partial(train if way == TRAINING else evaluate, logits) for logits in chosen]
    losses = [cross_entropy(logits, target, **options, reduction="none") for logits in chosen]
    ones = torch.ones_like(losses[0])
    return [functools.partial(backward, *pair, ones) for pair in zip(losses, chosen, strict=True)]


def tensors(one: KernelCase, shape: Shape, device: str, several: bool) -> tuple[Inputs, list[Tensor]]:
    inputs = make_inputs(one.case, shape, device)
    sets = sets_of_logits(one.case, inputs, device) if several else [inputs.logits]
    return inputs, [tensor.requires_grad_() for tensor in sets]


def kernel_of(name: str) -> str:
    """The name in csrc/cuda of one of our kernels, demangled or not; others keep theirs."""
    found = re.search(r"\bxent::(?:\w+::)*(\w+)\s*[<(]|^_ZN4xent3gpu\d+([a-z_]+)", name)
    return next(filter(None, found.groups())) if found else name


def profiled(calls: list[Callable[[], object]], kept: int) -> list[tuple[str, float]]:
    """The kernels that the device ran in these calls, in order, and their times in milliseconds."""
    results: collections.deque = collections.deque(maxlen=kept)  # so that gradients get other memory each time
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for call in calls:
            results.append(call())
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type != torch.autograd.DeviceType.CPU]
    on_device.sort(key=lambda event: event.time_range.start)
    return [(kernel_of(event.name), event.time_range.elapsed_us() / 1e3) for event in on_device]


def copy_record(device: str, quick: bool) -> dict:
    """The bandwidth of a copy on this device."""
    source = torch.empty(COPY_BYTES[quick], dtype=torch.uint8, device=device).fill_(1)
    out = torch.empty_like(source)
    calls = [lambda: out.copy_(source)] * (CALLS + WARM_UP)
    found = [milliseconds for _, milliseconds in profiled(calls, 0)][WARM_UP:]
    record = {"case": "copy", "kernel": "copy", "launch": "copy", "bytes": 2 * source.numel(), **summary_of(found)}
    return {**record, "gb_per_s": record["bytes"] / record["median_ms"] / 1e6}


def way_records(one: KernelCase, shape: Shape, way: str, device: str, gb_per_s: float) -> list[dict]:
    inputs, sets = tensors(one, shape, device, several=True)
    expected, kept = launches(one, shape, way), len(sets) if len(sets) > 1 else 0
    for call in calls_of(inputs, sets, way, WARM_UP):
        call()
    found = [pair for pair in profiled(calls_of(inputs, sets, way, CALLS), kept) if pair[0] in OURS]
    names = [launch.kernel for launch in expected] * CALLS
    if [name for name, _ in found] != names:
        raise RuntimeError(
            f"launched {collections.Counter(name for name, _ in found)}, not {collections.Counter(names)}"
        )
    records = []
    for place, launch in enumerate(expected):
        record = {**one.case.fields(shape), "kernel": launch.kernel, "launch": launch.what, "way": way}
        record |= {"bytes": launch.bytes, "made_bytes": launch.made, "floor_ms": launch.bytes / gb_per_s / 1e6}
        record |= summary_of([milliseconds for _, milliseconds in found[place :: len(expected)]])
        record["ratio"] = record["median_ms"] / record["floor_ms"] if record["floor_ms"] > LEAST_FLOOR_MS else None
        records.append(record)
    return records


OURS = {COUNT, FINISH, "sum_weights", *(one.kernel for one in CASES)}


# ---- Nsight Compute's counters --------------------------------------------------------------------------------------

SECTIONS = ("MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")
READ, WRITTEN, TIME = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
REGISTERS = "launch__registers_per_thread"
STALLS = "smsp__average_warps_issue_stalled_*_per_issue_active.ratio"
STALL = re.compile(STALLS.replace(".", r"\.").replace("*", r"(\w+?)"))
UNITS = {"kbyte": 1e3, "mbyte": 1e6, "gbyte": 1e9}
UNITS |= {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3}  # to milliseconds
UNITS |= {"nsecond": 1e-6, "usecond": 1e-3, "msecond": 1.0, "second": 1e3}


def ncu_command(arguments: argparse.Namespace) -> str:
    """The command for one launch of each, as `--once` runs them. The clocks stay as they are."""
    parts = ["ncu", "--clock-control none", "--target-processes all"]
    parts += ["--kernel-name-base demangled", "--kernel-name regex:xent"]
    parts += [f"--section {section}" for section in SECTIONS]
    parts += [f"--metrics {','.join((READ, WRITTEN, TIME, OCCUPANCY, REGISTERS))}"]
    parts += [f"--page raw --print-units base --csv --force-overwrite --log-file {shlex.quote(arguments.ncu)}"]
    parts += [f"{shlex.quote(sys.executable)} -m benchmarks.kernels --once"]
    parts += ["--quick"] * arguments.quick + [f"--only {shlex.quote(arguments.only)}"] * bool(arguments.only)
    return " ".join(parts)


def run_once(cases: list[KernelCase], arguments: argparse.Namespace) -> None:
    for one in cases:
        for way in WAYS:
            inputs, sets = tensors(one, one.case.shape("cuda", arguments.quick), arguments.device, several=False)
            for call in calls_of(inputs, sets, way, 1):
                call()
            torch.cuda.synchronize()
            del inputs, sets
            command_line.tidy(arguments.device)


def once(cases: list[KernelCase], quick: bool) -> Iterator[tuple[KernelCase, Shape, Launch]]:
    """The launches of `run_once`, in order."""
    for one in cases:
        shape = one.case.shape("cuda", quick)
        for way in WAYS:
            if way == BACKWARD:  # its forward is launched, too
                yield one, shape, Launch(one.kernel, "forward, for each position")
                yield one, shape, Launch(FINISH, "after")
            for launch in launches(one, shape, way):
                yield one, shape, launch


def counted(path: Path) -> list[tuple[str, dict[str, float]]]:
    """The rows of ncu's table in their order: kernel, and the metrics in bytes and milliseconds."""
    lines = path.read_text().splitlines()
    begin = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        raise ValueError(f"{path} has no table: {lines[-1] if lines else 'it is empty'}")
    table = list(csv.DictReader(line for line in lines[begin:] if line.startswith('"')))
    units, found = table[0], []
    for row in table[1:]:
        metrics = {}
        for name, value in row.items():
            unit = UNITS.get((units.get(name) or "").lower(), 1.0)
            if "__" in name and re.fullmatch(r"-?[\d,]*\.?\d+(e[+-]?\d+)?", value or "", re.IGNORECASE):
                metrics[name] = float(value.replace(",", "")) * unit
        found.append((kernel_of(row["Kernel Name"]), metrics))
    return found


def counter_records(rows: list[tuple[str, dict]], cases: list[KernelCase], quick: bool) -> list[dict]:
    expected, records = list(once(cases, quick)), []
    names = [launch.kernel for _, _, launch in expected]
    if [name for name, _ in rows] != names[: len(rows)]:  # it may have been stopped
        raise ValueError(f"these are not the launches of --once: {[name for name, _ in rows][:8]}, not {names[:8]}")
    for (_, metrics), (one, shape, launch) in zip(rows, expected, strict=False):
        stalls = {found[1]: value for name, value in metrics.items() if (found := STALL.search(name))}
        stalls.pop("selected", None)  # it is no stall
        moved = metrics.get(READ, math.nan) + metrics.get(WRITTEN, math.nan)
        record = {**one.case.fields(shape), "kernel": launch.kernel, "launch": launch.what, "bytes": launch.bytes}
        record |= {"dram_bytes": None if math.isnan(moved) else moved, "ms": metrics.get(TIME)}
        record["dram_ratio"] = moved / launch.bytes if launch.bytes and not math.isnan(moved) else None
        record |= {"occupancy": metrics.get(OCCUPANCY), "registers": metrics.get(REGISTERS)}
        worst = max(stalls, key=stalls.__getitem__, default=None)
        record |= {"stall": worst, "stall_cycles": stalls.get(worst)}
        records.append(record)
    return records


# ---- tables and pages -----------------------------------------------------------------------------------------------


def where(record: dict) -> list[str]:
    logits = f"{dimensions(record)} {record['dtype']}" if "shape" in record else "-"
    return [record["case"], logits, record["launch"], f"`{record['kernel']}`"]


def table(records: list[dict], detail: bool = False) -> Table:
    rows = []
    for record in records:
        if "error" in record:
            rows.append([*where(record), record["error"], "-", "-", "-"])
            continue
        ratio = record.get("ratio")
        cells = [f"{record['bytes'] / 2**20:.1f}", duration(record, detail, ".4f")]
        cells.append(number(record.get("floor_ms"), ".4f"))
        rows.append([*where(record), *cells, red(number(ratio, ".2f"), detail and ratio is not None and ratio > FAR)])
    header = ["case", "logits", "launch", "kernel", "MiB", "ms", "floor, ms", "time / floor"]
    return Table(header, rows, 4, "Kernels; the floor is a copy of as many bytes")


def counters_table(records: list[dict]) -> Table:
    rows = []
    for record in records:
        moved = None if record["dram_bytes"] is None else record["dram_bytes"] / 2**20
        case, _, launch, kernel = where(record)
        cells = [case, launch, kernel, number(record["ms"], ".4f")]
        cells += [number(moved, ".1f"), number(record["dram_ratio"], ".3f"), number(record["occupancy"], ".0f")]
        cells.append(number(record["registers"], ".0f"))
        rows.append([*cells, f"{record['stall']} {record['stall_cycles']:.1f}" if record["stall"] else "-"])
    header = ["case", "launch", "kernel", "ms", "DRAM, MiB", "/ predicted", "occupancy, %", "registers"]
    return Table([*header, "longest stall, cycles"], rows, 3, "Counters of Nsight Compute")


def blocks(device: str, result: dict) -> list[Block]:
    return [
        "Each kernel's time by the profiler, and its floor: the bytes that it has to move at the bandwidth of the copy "
        "in the first row. A training step has the launches from `before` to `handed over`, the last of which finds "
        "that the gradient is there.",
        table(result["records"]),
    ]


def counters_blocks(device: str, result: dict) -> list[Block]:
    return [
        "One launch of each by Nsight Compute: bytes of memory over the predicted ones, without writes that are still "
        "in the L2 cache; active warps; registers of a thread; and the longest wait of a warp, for an instruction.",
        counters_table(result["records"]),
    ]


SECTION = Section("kernels", "Each kernel", blocks, only="gpu")
COUNTERS_SECTION = Section("counters", "Each kernel's counters", counters_blocks, only="gpu")

# ---- the command ----------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = command_line.parser_of(__doc__, "kernels", "small inputs, in seconds", "cases", ("cuda",))
    parser.add_argument("--ncu", metavar="FILE", help="print the command line of Nsight Compute, and no more")
    parser.add_argument("--once", action="store_true", help="what that command runs: each kernel once, no times")
    parser.add_argument("--counters", type=Path, help="the table that it wrote")
    if "--ncu" in sys.argv:  # needs no GPU
        return parser.parse_args()
    if any(argument.startswith("--counters") for argument in sys.argv):
        parser.set_defaults(part="counters")
    return command_line.parse(parser)


def main() -> None:
    arguments = parse_arguments()
    device, quick = arguments.device, arguments.quick
    cases = [one for one in CASES if re.search(arguments.only, one.name)]
    if arguments.ncu:
        print(ncu_command(arguments))
    elif arguments.once:
        run_once(cases, arguments)
    elif arguments.counters:
        records = counter_records(counted(arguments.counters), cases, quick)
        command_line.measure_all(arguments, [], lambda found: [counters_table(found)], lambda record: True, records)
    else:
        copy = copy_record(device, quick)
        items = []
        for one, way in itertools.product(cases, WAYS):
            shape = one.case.shape("cuda", quick)
            failed = {**one.case.fields(shape), "kernel": one.kernel, "launch": way, "way": way}
            measure = functools.partial(way_records, one, shape, way, device, copy["gb_per_s"])
            items.append(Item(f"{one.name}, {way}", [failed], measure))
        tables = functools.partial(table, detail=True)
        command_line.measure_all(arguments, items, lambda found: [tables(found)], lambda record: True, [copy])


if __name__ == "__main__":
    main()

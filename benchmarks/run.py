"""Every loss on every input, side by side: time, bytes per second and memory.

    python -m benchmarks.run [--device cpu|cuda] [--quick] [--only PATTERN] [--without PATTERN] [--seconds S]
                             [--json FILE]

* `shapes` lists the inputs, `providers` the losses. `copy` copies the logits, one read and one write: no loss with a
  gradient of its own can be much faster. `copies` is a time in units of the copy's.
* `timing` says how time is measured, `memory` how the peak is. `values` compares every provider with float64 first. The
  record of a provider that fails has an `error`. One that is wrong is timed, and its record says what is `wrong`.
* Directions: `forward+backward` is a training step, `forward` an evaluation without gradients, and on a GPU `backward`
  the backward alone, which has little to do if the forward made the gradient.
* `bytes` is what has to be moved: logits and targets once, and for the backward the gradient once. A backward alone has
  none, since its bytes depend on what the forward saved.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import time
from collections.abc import Callable

import torch

from . import command_line, figures, limits
from . import records as files
from .command_line import Item
from .memory import CpuPeaks, cuda_peak
from .pages import Section, measured_by
from .providers import PEERS, Loss, Provider, forget_compiled, importable
from .records import Refused
from .shapes import CASES, Case, make_inputs
from .tables import Block, Table, dimensions, failures, number, quotient, red, said
from .timing import Timed, add_copies, as_of_a_layer, copying, halves, measure, sets_of_logits, step
from .values import Expected

TRAINING, EVALUATION, BACKWARD = "forward+backward", "forward", "backward"
DIRECTIONS = {"cpu": (TRAINING, EVALUATION), "cuda": (TRAINING, EVALUATION, BACKWARD)}
SECONDS = {"cpu": 300.0, "cuda": 150.0, "quick": 14.0}
SHORT = {TRAINING: "fwd+bwd", EVALUATION: "fwd", BACKWARD: "bwd"}
OWN = ("", "ours", "ours in place")  # the providers whose failure is the command's
QUICK_COMPILED = "ImageNet"
LARGE = 1_000_000  # elements, from which on memory and copies are compared

Groups = dict[tuple[str, str], dict[str, dict]]  # (case, direction): provider: record


# ---- measuring ------------------------------------------------------------------------------------------------------


def wanted_providers(
    case: Case, direction: str, found: list[Provider], arguments: argparse.Namespace
) -> list[Provider]:
    """The providers of a direction. A quick run compiles in one case only, because that takes seconds."""
    compiled = not arguments.quick or (direction == TRAINING and case.name == QUICK_COMPILED)
    wanted = {"ours in place": direction != EVALUATION, "native compiled": compiled}
    return [provider for provider in found if wanted.get(provider.name, True)]


class Subject:
    """A case's tensors, their expected values, and the losses that were loaded for them."""

    def __init__(self, case: Case, shape: tuple[int, ...], device: str) -> None:
        self.case, self.shape, self.device = case, shape, device
        self.inputs = make_inputs(case, shape, device)
        self.sets = sets_of_logits(case, self.inputs, device)
        self.expected = Expected(self.inputs)
        self.loss_of: Callable[[Provider], Loss] = functools.cache(lambda provider: provider.load())


class Measurement:
    """All providers on one subject in one direction."""

    def __init__(self, subject: Subject, direction: str, peaks: CpuPeaks | None) -> None:
        self.subject, self.case, self.shape, self.device = subject, subject.case, subject.shape, subject.device
        self.inputs, self.sets, self.expected = subject.inputs, subject.sets, subject.expected
        self.copies: list[torch.Tensor] = []  # of the sets, for all providers that overwrite them
        self.direction, self.peaks = direction, peaks
        self.backward = direction != EVALUATION
        self.records: dict[str, dict] = {}
        self.timed: list[Timed] = []

    def record(self, provider: str, direction: str) -> dict:
        self.records[provider] = {**self.case.fields(self.shape), "provider": provider, "direction": direction}
        return self.records[provider]

    def leaves(self, overwrites: bool) -> list[torch.Tensor]:
        """The sets as leaves of a graph, or copies that are no leaves for a provider that overwrites them."""
        if overwrites and not self.copies:
            self.copies = [tensor.clone(memory_format=torch.preserve_format) for tensor in self.sets]
        if overwrites and self.backward:
            return [as_of_a_layer(tensor) for tensor in self.copies]
        return [tensor.detach().requires_grad_(self.backward) for tensor in (self.copies if overwrites else self.sets)]

    def timed_of(self, provider: Provider) -> Timed:
        """The provider as `timing` runs it in this direction."""
        loss, overwrites = self.subject.loss_of(provider), provider.overwrites  # some overwrite in the forward
        run, prepare = step(loss, self.inputs, self.backward), None
        if self.direction == BACKWARD:
            prepare, run = halves(loss, self.inputs)
        return Timed(provider.name, run, self.leaves(overwrites), self.sets if overwrites else None, prepare)

    def add(self, provider: Provider) -> None:
        """Checks a provider's values, measures its memory, and gets it ready for its turns."""
        record = self.record(provider.name, self.direction)
        one = None
        try:
            one = self.timed_of(provider)
            for _ in range(2):  # the first compiles
                wrong = self.expected.wrong(*one.run(one.prepared(0)))
                one.restore(0)
                if wrong:
                    record["wrong"] = wrong
            if self.peaks:
                record["peak_extra_bytes"] = self.peaks.of(self.case, self.shape, provider.name, self.backward)
            elif self.direction != BACKWARD:  # its forward's is the step's
                record["peak_extra_bytes"] = cuda_peak(one.run, one.logits[0])
            self.timed.append(one)
        except Exception as error:
            record["error"] = files.reason(error)
        finally:
            if one:
                one.restore(0)

    def add_copy(self) -> None:
        record = self.record("copy", "copy")
        try:
            self.timed.append(copying(self.sets))
            record["peak_extra_bytes"] = 0
        except Exception as error:
            record["error"] = files.reason(error)

    def run(self, deadline: float) -> list[dict]:
        measure(self.timed, self.device, deadline)
        logits, target = self.inputs.logits, self.inputs.target
        size, read = logits.numel() * logits.element_size(), target.numel() * target.element_size()
        for one in self.timed:
            record = self.records[one.name]
            record |= one.summary()
            if "median_ms" in record and (one.name == "copy" or self.direction != BACKWARD):
                record["bytes"] = 2 * size if one.name == "copy" else size + read + size * self.backward
                record["gb_per_s"] = record["bytes"] / record["median_ms"] / 1e6
        return add_copies(self.records)


class Shares:
    """Divides the time that is left among the directions that are left."""

    def __init__(self, seconds: float, count: int) -> None:
        self.deadline, self.left = time.monotonic() + seconds, count

    def next(self, device: str) -> float:
        """The deadline of the next direction. A CPU takes a few turns even if no time is left."""
        now = time.monotonic()
        share = max(0.0, self.deadline - now) / self.left
        self.left -= 1
        if now > self.deadline and device != "cpu":
            raise Refused(command_line.NO_TIME)
        return now + share


def case_records(
    case: Case, found: list[Provider], arguments: argparse.Namespace, shares: Shares, peaks: CpuPeaks | None
) -> list[dict]:
    """All directions of a case, on the same tensors."""
    device, records, subject = arguments.device, [], None
    shape = case.shape(device, arguments.quick)
    for direction in DIRECTIONS[device]:
        try:
            deadline = shares.next(device)
            subject = subject or Subject(case, shape, device)
            measurement = Measurement(subject, direction, peaks)
            for provider in wanted_providers(case, direction, found, arguments):
                measurement.add(provider)
            measurement.add_copy()
            records += measurement.run(deadline)
        except Exception as error:  # of the case itself, such as memory for its inputs
            failed = {**case.fields(shape), "provider": "", "direction": direction}
            records.append({**failed, "error": files.reason(error)})
        if device == "cpu" or direction == DIRECTIONS[device][-1]:
            forget_compiled()
        command_line.tidy(device)
    return records


# ---- tables ---------------------------------------------------------------------------------------------------------


def grouped(records: list[dict]) -> Groups:
    """The records by case and direction. A copy belongs to the case it was measured with."""
    groups: Groups = {}
    key = None
    for record in records:
        if record["direction"] != "copy":
            key = record["case"], record["direction"]
        groups.setdefault(key, {})[record["provider"]] = record
    return groups


def long_table(records: list[dict]) -> Table:
    """A row for each record, with all that was measured."""
    rows = []
    for (case, direction), providers in grouped(records).items():
        for name, record in providers.items():
            cells = [f"{case}, {SHORT[direction]}", name]
            if "error" in record:
                rows.append([*cells, red(record["error"][:60])])
                continue
            cells += [f"{record[key]:.4f}" for key in ("median_ms", "min_ms", "max_ms")]
            cells += [number(record.get("gb_per_s"), ".1f"), number(record.get("copies"), ".2f")]
            peak = record.get("peak_extra_bytes")
            cells.append(red(record["wrong"]) if "wrong" in record else number(peak and peak / 2**20, ".1f"))
            rows.append(cells)
    header = ["case, direction", "provider", "median ms", "min", "max", "GB/s", "copies", "extra MiB"]
    return Table(header, rows, 2, "Medians; copies: in units of the time to copy the logits")


def elements(record: dict) -> int:
    return math.prod(record["shape"])


def shape_of(record: dict) -> str:
    text = f"{dimensions(record)} {record['dtype']}"
    text += f", {record['layout']}" if record["layout"] != "contiguous" else ""
    text += ", probabilities" if record["target"] == "probabilities" else ""
    return text + (f", {record['options']}" if record["options"] else "")


def peers_with(groups: Groups, field: str) -> list[str]:
    return [name for name in PEERS if any(field in providers.get(name, {}) for providers in groups.values())]


def direction_table(groups: Groups, direction: str) -> Table:
    """A row for each case, with the times of all providers."""
    in_place = ["ours in place"] if direction != EVALUATION else []
    names = ["native", "native compiled", *peers_with(groups, "median_ms"), "ours", *in_place]
    rows = []
    for (case, this), providers in groups.items():
        if this != direction or "ours" not in providers:
            continue
        time = {name: record.get("median_ms") for name, record in providers.items()}
        cells = [case, shape_of(providers["ours"]), *(number(time.get(name)) for name in [*names, "copy"])]
        cells += [number(quotient(time.get(name), time["ours"]), ".1f") for name in ("native", "native compiled")]
        cells += [number(quotient(time.get(name), time.get("copy")), ".2f") for name in ("ours", *in_place)]
        rows.append(cells)
    header = ["case", "logits", *(f"{name}, ms" for name in [*names, "copy"]), "native / ours", "compiled / ours"]
    return Table([*header, "copies", *(["copies, in place"] if in_place else [])], rows, left=2)


def memory_table(groups: Groups) -> Table:
    names = ("native", "native compiled", *peers_with(groups, "peak_extra_bytes"), "ours", "ours in place")
    rows = []
    for (case, direction), providers in groups.items():
        if direction != TRAINING or "ours" not in providers or elements(providers["ours"]) < LARGE:
            continue
        peaks = [providers.get(name, {}).get("peak_extra_bytes") for name in names]
        size = elements(providers["ours"]) * (2 if "16" in providers["ours"]["dtype"] else 4)
        cells = [case, f"{size / 2**20:.0f}"]
        rows.append([*cells, *("-" if peak is None else f"{peak / size:.2f}" for peak in peaks)])
    return Table(["case", "logits, MiB", *names], rows)


# ---- pages ----------------------------------------------------------------------------------------------------------


def ratios(groups: Groups, direction: str, over: str, of: str = "ours") -> list[float]:
    """How many times longer `over` takes than `of`, for each case with both."""
    found = []
    for (_, this), providers in groups.items():
        records = [providers.get(name, {}) for name in (over, of)]
        times = [None if "wrong" in record else record.get("median_ms") for record in records]
        if this == direction and all(times):
            found.append(times[0] / times[1])
    return found


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def large_float32(groups: Groups, name: str) -> list[float]:
    """The `copies` of a provider's training steps in float32, for large cases."""
    steps = [providers.get(name, {}) for (_, direction), providers in groups.items() if direction == TRAINING]
    steps = [record for record in steps if "copies" in record and record["dtype"] == "float32"]
    return [record["copies"] for record in steps if elements(record) >= LARGE]


def summary(result: dict) -> str:
    groups = grouped(result["records"])
    native = ratios(groups, TRAINING, "native")
    if not native:
        return "No training step was measured next to the native loss."

    def speedup(found: list[float], over: str, count: str = "") -> str:
        return f"{geometric_mean(found):.1f}x over {over} ({min(found):.1f}x to {max(found):.1f}x{count})"

    parts = [speedup(native, "eager PyTorch")]
    if compiled := ratios(groups, TRAINING, "native compiled"):
        parts.append(speedup(compiled, "`torch.compile`"))
    for peer in PEERS:
        if found := ratios(groups, TRAINING, peer):
            parts.append(speedup(found, peer, f", {len(found)} cases"))
    text = f"Geometric-mean speedup over {len(native)} forward + backward cases: {', '.join(parts)}."
    fresh, in_place = large_float32(groups, "ours"), large_float32(groups, "ours in place")
    if not fresh or not in_place:
        return text
    return (
        f"{text} In float32, from a million logits on, a training step takes {min(fresh):.1f} to {max(fresh):.1f} "
        f"times as long as a copy of the logits, and {min(in_place):.1f} to {max(in_place):.1f} times with "
        "`inplace=True`."
    )


def refusals(groups: Groups) -> str:
    """Why peers lack a training step or have a wrong one, and in which cases."""
    cases: dict[tuple[str, str], list[str]] = {}
    for (case, direction), providers in groups.items():
        for name, record in providers.items():
            if direction == TRAINING and name in PEERS and said(record):
                reason = record.get("error") or "other values than float64's: " + record["wrong"]
                cases.setdefault((name, reason), []).append(case)
    return failures(
        (
            (name, {"error": f"{reason} ({'; '.join(found) if len(found) < 4 else f'{len(found)} cases'})"})
            for (name, reason), found in cases.items()
        ),
        "Peers that have no time of a training step, or another value:",
    )


def own_failures(groups: Groups) -> str:
    return failures(
        (f"{case}, {direction}, {name}", record)
        for (case, direction), providers in groups.items()
        for name, record in providers.items()
        if name not in PEERS
    )


def blocks(device: str, result: dict) -> list[Block]:
    groups, on_gpu = grouped(result["records"]), device != "cpu"
    found: list[Block] = [summary(result)]
    if on_gpu:
        found += ["Limits on an H200:", limits.table(limits.of_folder(files.RESULTS / device))]
    found += [
        "Medians of interleaved turns. `copies` is the time of ours in units of copying the logits, one read and one "
        "write. In place means `inplace=True`.",
        figures.link(device, "run", "Time in units of a copy of the logits"),
        "#### Training: forward and backward",
        direction_table(groups, TRAINING),
        "#### Evaluation: forward without gradients",
        direction_table(groups, EVALUATION),
    ]
    if on_gpu:
        found += [
            "#### The backward alone",
            "The forward before it is not timed. If the forward made the gradient, little is left to do.",
            direction_table(groups, BACKWARD),
        ]
    found += [
        "#### Memory",
        "The peak of a training step on top of the logits, in sizes of the logits.",
        memory_table(groups),
    ]
    return [*found, own_failures(groups), refusals(groups)]


def readme(results: dict[str, dict]) -> list[Block]:
    """The head of the README."""
    found: list[Block] = []
    for device, result in results.items():
        title = "Time of forward and backward in units of a copy of the logits"
        found += [figures.link(device, "run", title, "docs/benchmarks"), summary(result), measured_by(result)]
    more = "All cases, scaling, whole models, memory and accuracy: [docs/benchmarks.md](docs/benchmarks.md)."
    return [*found, more]


SECTION = Section("run", "Every case", blocks, draw=figures.draw_run, readme=readme)


def main() -> None:
    arguments = command_line.parse(
        command_line.parser_of(__doc__, "run", "small inputs, under a minute", "cases", seconds=SECONDS, without=True)
    )
    device = arguments.device
    cases = [case for case in CASES if case.shape(device, arguments.quick) and re.search(arguments.only, case.name)]
    found = [provider for provider in importable(device) if not re.search(arguments.without, provider.name)]
    shares = Shares(arguments.seconds, len(cases) * len(DIRECTIONS[device]))
    peaks = CpuPeaks() if device == "cpu" else None
    items = []
    for case in cases:
        fields = {**case.fields(case.shape(device, arguments.quick)), "provider": "", "direction": TRAINING}
        measure = functools.partial(case_records, case, found, arguments, shares, peaks)
        items.append(Item(case.name, [fields], measure))

    def tables(records: list[dict]) -> list[Block]:
        checked = [limits.table(limits.of_run({"records": records}), detail=True)] if device != "cpu" else []
        return [long_table(records), *checked]

    command_line.measure_all(arguments, items, tables, lambda record: record["provider"] in OWN)


if __name__ == "__main__":
    main()

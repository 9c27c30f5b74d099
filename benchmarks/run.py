"""Every loss on every input, side by side: time, bytes per second and memory, and a table.

    python -m benchmarks.run [--device cpu|cuda] [--quick] [--only PATTERN] [--without PATTERN] [--seconds S]
                             [--json FILE]

* `shapes` lists the inputs, `providers` who is measured. `copy` copies the logits, one read and one write: no loss with
  a gradient of its own can be much faster, and its time is the unit of the column `copies`.
* `timing` says how time is measured, `memory` what the peak is; `values` compares every provider with float64 first.
  One that fails is a record with its error. One that is wrong is timed, and its record says what is `wrong`.
* Directions: `forward+backward` is a training step, `forward` an evaluation without gradients, and on a GPU `backward`
  the backward alone. Who makes the gradient in the forward has little left to do there.
* `bytes` is what has to be moved: logits and targets once, and for the backward the gradient once. A backward alone has
  none: what it has to move depends on what the forward left.

Records are written after every case, so that a stop loses one case at most.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import cross_entropy_ext

from . import command_line, limits
from . import records as files
from .memory import CpuPeaks, cuda_peak
from .providers import Loss, Provider, Refused, forget_compiled, importable
from .shapes import CASES, Case, Inputs, make_inputs, make_logits
from .timing import Timed, as_of_a_layer, count_of_sets, halves, measure, step
from .values import Expected

TRAINING, EVALUATION, BACKWARD = "forward+backward", "forward", "backward"
DIRECTIONS = {"cpu": (TRAINING, EVALUATION), "cuda": (TRAINING, EVALUATION, BACKWARD)}
SECONDS = {"cpu": 300.0, "cuda": 150.0, "quick": 14.0}
SHORT = {TRAINING: "fwd+bwd", EVALUATION: "fwd", BACKWARD: "bwd"}
QUICK_COMPILED = "ImageNet"
console = Console(width=max(150, Console().width))


def wanted_providers(
    case: Case, direction: str, found: list[Provider], arguments: argparse.Namespace
) -> list[Provider]:
    """Compiling takes seconds: a quick run shows in one case that it works."""
    compiled = not arguments.quick or (direction == TRAINING and case.name == QUICK_COMPILED)
    wanted = {"ours in place": direction != EVALUATION, "native compiled": compiled}
    return [provider for provider in found if wanted.get(provider.name, True)]


def sets_of_logits(case: Case, inputs: Inputs, device: str) -> list[torch.Tensor]:
    """One, or on a GPU as many as fill its L2 cache four times."""
    shape = tuple(inputs.logits.shape)
    count = count_of_sets(inputs.logits, device)
    return [inputs.logits, *(make_logits(case, shape, device, seed) for seed in range(2, count + 1))]


class Subject:
    """A case's tensors, what is right for them, and who was loaded for them."""

    def __init__(self, case: Case, shape: tuple[int, ...], device: str) -> None:
        self.case, self.shape, self.device = case, shape, device
        self.inputs = make_inputs(case, shape, device)
        self.sets = sets_of_logits(case, self.inputs, device)
        self.expected = Expected(self.inputs)
        self.losses: dict[str, Loss] = {}

    def loss_of(self, provider: Provider) -> Loss:
        """Once for all directions: what was compiled in one serves the others."""
        if provider.name not in self.losses:
            self.losses[provider.name] = provider.load()
        return self.losses[provider.name]


class Measurement:
    """All providers on one subject in one direction."""

    def __init__(self, subject: Subject, direction: str, peaks: CpuPeaks | None) -> None:
        self.subject, self.case, self.shape, self.device = subject, subject.case, subject.shape, subject.device
        self.inputs, self.sets, self.expected = subject.inputs, subject.sets, subject.expected
        self.copies: list[torch.Tensor] = []  # of the sets, for all that overwrite them
        self.direction, self.peaks = direction, peaks
        self.backward = direction != EVALUATION
        self.records: dict[str, dict] = {}
        self.timed: list[Timed] = []

    def record(self, provider: str, direction: str) -> dict:
        self.records[provider] = {**self.case.fields(self.shape), "provider": provider, "direction": direction}
        return self.records[provider]

    def leaves(self, overwrites: bool) -> list[torch.Tensor]:
        """The sets as leaves of a graph; or copies, which are no leaves, for who overwrites them."""
        if overwrites and not self.copies:
            self.copies = [tensor.clone(memory_format=torch.preserve_format) for tensor in self.sets]
        if overwrites and self.backward:
            return [as_of_a_layer(tensor) for tensor in self.copies]
        return [tensor.detach().requires_grad_(self.backward) for tensor in (self.copies if overwrites else self.sets)]

    def timed_of(self, provider: Provider) -> Timed:
        """What a turn of this direction calls."""
        loss, overwrites = self.subject.loss_of(provider), provider.overwrites  # some do so without a backward
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
        except Refused as refusal:
            record["error"] = str(refusal)
        except Exception as error:
            record["error"] = files.first_line(error)
        finally:
            if one:
                one.restore(0)

    def add_copy(self) -> None:
        record = self.record("copy", "copy")
        try:
            out = torch.empty_like(self.sets[0])
        except Exception as error:
            record["error"] = files.first_line(error)
            return
        record["peak_extra_bytes"] = 0
        self.timed.append(Timed("copy", out.copy_, self.sets))

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
        unit = self.records["copy"].get("median_ms")
        for record in self.records.values():
            if unit and "median_ms" in record:
                record["copies"] = record["median_ms"] / unit
        return list(self.records.values())


def measure_direction(
    subject: Subject,
    direction: str,
    found: list[Provider],
    arguments: argparse.Namespace,
    deadline: float,
    peaks: CpuPeaks | None,
) -> list[dict]:
    measurement = Measurement(subject, direction, peaks)
    for provider in wanted_providers(subject.case, direction, found, arguments):
        measurement.add(provider)
    measurement.add_copy()
    return measurement.run(deadline)


def tidy(device: str) -> None:
    gc.collect()
    cross_entropy_ext.empty_cache()
    if device != "cpu":
        torch.cuda.empty_cache()


def table(records: list[dict]) -> Table:
    shown = Table(box=box.SIMPLE, title="Medians; copies: in units of the time to copy the logits", pad_edge=False)
    shown.add_column("case, direction", overflow="fold")
    shown.add_column("provider")
    for name in ("median ms", "min", "max", "GB/s", "copies", "extra MiB"):
        shown.add_column(name, justify="right")
    last = None
    for record in records:
        key = record["case"], record["direction"]
        if record["direction"] != "copy" and key != last:
            shown.add_section()
        name = f"{key[0]}, {SHORT[key[1]]}" if record["direction"] != "copy" and key != last else ""
        last = key if record["direction"] != "copy" else last
        if "error" in record:
            shown.add_row(name, record["provider"], f"[red]{record['error'][:60]}[/]")
            continue
        peak = record.get("peak_extra_bytes")
        cells = [f"{record[k]:.4f}" for k in ("median_ms", "min_ms", "max_ms")]
        copies = f"{record['copies']:.2f}" if "copies" in record else ""
        rate = f"{record['gb_per_s']:.1f}" if "gb_per_s" in record else ""
        cells += [rate, copies, "" if peak is None else f"{peak / 2**20:.1f}"]
        if "wrong" in record:
            cells.append(f"[red]{record['wrong']}[/]")
        shown.add_row(name, record["provider"], *cells[:6])
    return shown


def parse_arguments() -> argparse.Namespace:
    parser = command_line.parser_of(__doc__, "run", "small inputs, under a minute", "cases")
    parser.add_argument("--seconds", type=float, help="for all cases, which share them (cpu 300, cuda 150, quick 14)")
    parser.add_argument("--without", default="^$", help="regular expression on the names of providers to leave out")
    arguments = command_line.parse(parser)
    if arguments.seconds is None:
        arguments.seconds = SECONDS["quick" if arguments.quick else arguments.device]
    return arguments


def main() -> None:
    arguments = parse_arguments()
    device = arguments.device
    path = arguments.json
    deadline = time.monotonic() + arguments.seconds
    cases = [case for case in CASES if case.shape(device, arguments.quick) and re.search(arguments.only, case.name)]
    found = [provider for provider in importable(device) if not re.search(arguments.without, provider.name)]
    directions = DIRECTIONS[device]
    peaks = CpuPeaks() if device == "cpu" else None
    records: list[dict] = []
    stopped = False
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(cases) * len(directions))
        try:
            for done, case in enumerate(cases):
                subject = None
                for place, direction in enumerate(directions):
                    progress.update(task, description=f"{case.name}, {direction}")
                    now = time.monotonic()
                    shape = case.shape(device, arguments.quick)
                    failed = {**case.fields(shape), "provider": "", "direction": direction}
                    share = max(0.0, deadline - now) / (len(directions) * (len(cases) - done) - place)
                    if now > deadline and device != "cpu":
                        records.append({**failed, "error": "no time left"})
                        continue
                    try:
                        subject = subject or Subject(case, shape, device)
                        records += measure_direction(subject, direction, found, arguments, now + share, peaks)
                    except Exception as error:  # of the case itself, such as memory for its inputs
                        records.append({**failed, "error": files.first_line(error)})
                    files.write(path, device, records, quick=arguments.quick, complete=False)
                    if device == "cpu" or place == len(directions) - 1:
                        forget_compiled()
                    tidy(device)
                    progress.advance(task)
        except KeyboardInterrupt:
            stopped = True
    complete = not stopped and not any(record.get("error") == "no time left" for record in records)
    files.write(path, device, records, quick=arguments.quick, complete=complete)
    console.print(table(records))
    if device != "cpu":
        console.print(limits.table(limits.of_run({"records": records})))
    console.print(f"{path}", highlight=False)
    ours = [record for record in records if record["provider"] in ("", "ours", "ours in place")]
    sys.exit(0 if complete and not any("error" in record or "wrong" in record for record in ours) else 1)


if __name__ == "__main__":
    main()

"""Native eager against ours on the CPU: forward + backward, interleaved runs in one process, medians.

    python -m benchmarks.cpu [--only PATTERN] [--seconds 4] [--json FILE]

Each case runs both losses in turns of 10 ms, A B A B ..., so that both meet the same machine. In shorter turns each
would also pay for what the other leaves behind: caches and address translations, flushed by the memory it gave back.
Values are compared before anything is timed. `copy` is the time to copy the logits, which no loss with a gradient of
its own can beat by much.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import cross_entropy_ext
from cross_entropy_ext.functional import cross_entropy


@dataclass
class Case:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    soft: bool = False
    ignored: float = 0.0
    weighted: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    backward: bool = True
    options: dict = field(default_factory=dict)
    ours: dict = field(default_factory=dict)

    def inputs(self) -> tuple[Tensor, Tensor, dict]:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(self.shape, generator=generator).mul_(3).to(self.dtype)
        logits = logits.contiguous(memory_format=self.memory_format)
        classes, positions = self.shape[1], (self.shape[0], *self.shape[2:])
        if self.soft:
            target = torch.randn(self.shape, generator=generator).softmax(1).to(self.dtype)
        else:
            target = torch.randint(classes, positions, generator=generator)
            if self.ignored:
                target[torch.rand(positions, generator=generator) < self.ignored] = -100
        options = dict(self.options)
        if self.weighted:
            options["weight"] = torch.rand(classes, generator=generator).to(self.dtype)
        return logits, target, options


CASES = [
    Case("2048 x 32000 fp32", (2048, 32000)),
    Case("2048 x 32000 bf16", (2048, 32000), torch.bfloat16),
    Case("2048 x 32000 fp32, label_smoothing=0.1", (2048, 32000), options={"label_smoothing": 0.1}),
    Case("2048 x 32000 fp32, inplace=True", (2048, 32000), ours={"inplace": True}),
    Case("2048 x 32000 fp32, forward only", (2048, 32000), backward=False),
    Case("1024 x 5000 fp32, weights, ignored", (1024, 5000), weighted=True, ignored=0.2),
    Case("512 x 8192 fp32, soft targets", (512, 8192), soft=True),
    Case("(4, 19, 256, 512) fp32 NCHW", (4, 19, 256, 512)),
    Case("(4, 19, 256, 512) fp32 channels_last", (4, 19, 256, 512), memory_format=torch.channels_last),
    Case("256 x 1000 fp32", (256, 1000)),
    Case("64 x 10 fp32", (64, 10)),
]


def step(loss: Callable, logits: Tensor, target: Tensor, backward: bool, **options) -> Callable[[], None]:
    """One training step of the loss alone. The logits are a non-leaf, as a model's are."""
    if not backward:

        def run() -> None:
            with torch.no_grad():
                loss(logits, target, **options)

    else:
        leaf = logits.detach().requires_grad_()

        def run() -> None:
            leaf.grad = None
            loss(leaf, target, **options).backward()

    return run


def check(case: Case, logits: Tensor, target: Tensor, options: dict) -> None:
    results = []
    for loss, extras in ((F.cross_entropy, {}), (cross_entropy, case.ours)):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, target, **options, **extras)
        value.backward()
        results.append((value.detach().double(), leaf.grad.double()))
    (native, native_grad), (ours, our_grad) = results
    torch.testing.assert_close(ours, native, rtol=2e-2, atol=1e-4, msg=f"{case.name}: wrong loss")
    assert (our_grad - native_grad).abs().max() <= 2e-2 * native_grad.abs().max(), f"{case.name}: wrong gradient"


def interleaved(runs: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Seconds of a run, a mean over each turn of 10 ms, all in turn until the time is up."""
    turn = 10e-3
    repeats: dict[str, int] = {}
    for name, run in runs.items():
        run()
        before, count = time.perf_counter(), 0
        while time.perf_counter() - before < turn:
            run()
            count += 1
        repeats[name] = count
    times: dict[str, list[float]] = {name: [] for name in runs}
    started, turns = time.perf_counter(), 0
    while turns < 7 or time.perf_counter() - started < seconds:
        for name, run in runs.items():
            before = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - before) / repeats[name])
        turns += 1
    return times


def measure(case: Case, seconds: float) -> dict:
    logits, target, options = case.inputs()
    check(case, logits, target, options)
    out = torch.empty_like(logits)
    times = interleaved(
        {
            "native": step(F.cross_entropy, logits, target, case.backward, **options),
            "ours": step(cross_entropy, logits.clone(), target, case.backward, **options, **case.ours),
            "copy": lambda: out.copy_(logits),
        },
        seconds,
    )
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    ratios = sorted(n / o for n, o in zip(times["native"], times["ours"], strict=True))
    return {
        "case": case.name,
        **{f"{name}_ms": value for name, value in medians.items()},
        "speedup": medians["native"] / medians["ours"],
        "speedup_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        "runs": len(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression on the cases' names")
    parser.add_argument("--seconds", type=float, default=4, help="for each case")
    parser.add_argument("--json", help="write the records to this file")
    arguments = parser.parse_args()

    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        **cross_entropy_ext.build_info(),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{'forward + backward, medians in ms':42}{'native':>10}{'ours':>10}{'copy':>10}{'speedup':>10}  quartiles")
    records = []
    for case in CASES:
        if not re.search(arguments.only, case.name):
            continue
        record = measure(case, arguments.seconds)
        low, high = record["speedup_quartiles"]
        print(
            f"{record['case']:42}{record['native_ms']:10.3f}{record['ours_ms']:10.3f}{record['copy_ms']:10.3f}"
            f"{record['speedup']:9.2f}x  {low:.2f}-{high:.2f}",
            flush=True,
        )
        records.append(record)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine, "records": records}, file, indent=1)


if __name__ == "__main__":
    main()

"""The loss on a GPU against what else there is: medians of CUDA events, bytes per second, and copies of the logits.

    python -m benchmarks.gpu [--only PATTERN] [--seconds 150] [--json FILE]

Providers: ours, ours with inplace=True, native (eager), native compiled (torch.compile), Liger where it is installed,
and `copy`: out.copy_(logits), one read and one write of the logits, the unit of the last column.

* Providers take turns, call by call. Each call finds inputs that the L2 cache does not hold: there are as many sets of
  logits as fill it four times, and gradients are kept as long, so that their memory changes too.
* The device is kept busy while the host prepares a call, so that events measure the device alone. (A provider that
  waits for the device, as Liger does for its count of targets, has the host's time in its own.)
* Liger and inplace=True overwrite the logits with the gradient: they have sets of their own, refilled after each call,
  outside of the events.
* `bytes` is what has to be moved: logits and target once, and for the backward the gradient once.
* Before anything is timed, the loss is compared with float64, and the gradient on some rows. A provider that fails is a
  record with its error; one that is wrong is timed, and its record says what is `wrong`.

The records are written after every case, so a stop loses one case at most; the table comes last.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import os
import platform
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import cross_entropy_ext
from cross_entropy_ext.functional import cross_entropy

DEVICE = torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32
BOTH = ("forward+backward", "forward")
BUSY = 2_000_000  # cycles, about a millisecond: longer than a host needs to prepare a call
LEAST_CALLS = 20


@dataclass
class Case:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = BF16
    soft: bool = False
    ignored: float = 0.0
    weighted: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    options: dict = field(default_factory=dict)
    compile_forward: bool = False  # compiling takes seconds

    def logits(self, seed: int) -> Tensor:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        values = torch.empty(self.shape, dtype=self.dtype, device=DEVICE).normal_(0, 3, generator=generator)
        return values.contiguous(memory_format=self.memory_format)

    def target(self) -> tuple[Tensor, dict]:
        generator = torch.Generator(DEVICE).manual_seed(0)
        classes, positions = self.shape[1], (self.shape[0], *self.shape[2:])
        if self.soft:
            target = torch.randn(self.shape, generator=generator, device=DEVICE).softmax(1).to(self.dtype)
        else:
            target = torch.randint(classes, positions, generator=generator, device=DEVICE)
            if self.ignored:
                target[torch.rand(positions, generator=generator, device=DEVICE) < self.ignored] = -100
        options = dict(self.options)
        if self.weighted:
            options["weight"] = torch.rand(classes, generator=generator, device=DEVICE).to(self.dtype)
        return target, options


IMAGE, MANY = (8, 19, 512, 1024), (8, 150, 256, 256)
LAST = torch.channels_last
CASES = [
    Case("8192 x 128256 bf16", (8192, 128_256), compile_forward=True),
    Case("8192 x 32000 bf16", (8192, 32_000), compile_forward=True),
    Case("16384 x 4096 bf16", (16_384, 4096)),
    Case("65536 x 1000 fp32", (65_536, 1000), FP32),
    Case("262144 x 10 fp32", (262_144, 10), FP32),
    Case("(8, 19, 512, 1024) bf16", IMAGE),
    Case("(8, 19, 512, 1024) bf16 channels_last", IMAGE, memory_format=LAST),
    Case("8192 x 32000 bf16, soft targets", (8192, 32_000), soft=True),
    Case("8192 x 32000 bf16, label_smoothing=0.1", (8192, 32_000), options={"label_smoothing": 0.1}),
    Case("8192 x 32000 bf16, class weights", (8192, 32_000), weighted=True),
    Case("8192 x 32000 bf16, 30% ignored", (8192, 32_000), ignored=0.3),
    Case("(8, 150, 256, 256) bf16", MANY),
    Case("(8, 150, 256, 256) bf16 channels_last", MANY, memory_format=LAST),
    Case("(8, 19, 512, 1024) fp32", IMAGE, FP32),
    Case("(8, 19, 512, 1024) fp32 channels_last", IMAGE, FP32, memory_format=LAST),
    Case("(8, 150, 256, 256) fp32", MANY, FP32),
    Case("(8, 150, 256, 256) fp32 channels_last", MANY, FP32, memory_format=LAST),
]
OVERHEAD = "8 x 16 fp32, host"


# ---- providers ---------------------------------------------------------------------------------------------


def liger() -> Callable | None:
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        return None
    return liger_cross_entropy


def native(logits: Tensor, target: Tensor, **options) -> Tensor:
    return F.cross_entropy(logits, target, **options)


@dataclass
class Provider:
    name: str
    loss: Callable
    extras: dict = field(default_factory=dict)
    overwrites: bool = False  # the logits


def providers(case: Case, direction: str) -> list[Provider]:
    found = [Provider("ours", cross_entropy), Provider("native", F.cross_entropy)]
    if direction == "forward+backward":
        found.insert(1, Provider("ours inplace", cross_entropy, {"inplace": True}, overwrites=True))
    if direction == "forward+backward" or case.compile_forward:
        found.append(Provider("native compiled", torch.compile(native, dynamic=False, fullgraph=True)))
    if liger() and not case.soft and len(case.shape) == 2:
        found.append(Provider("liger", liger(), overwrites=direction == "forward+backward"))
    return found


class Sets:
    """Logits in as many copies as fill the L2 cache four times, used in turn."""

    def __init__(self, case: Case) -> None:
        self.source = [case.logits(0)]
        size = self.source[0].numel() * self.source[0].element_size()
        cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
        self.count = 1 + 4 * cache // size
        self.source += [case.logits(seed) for seed in range(1, self.count)]
        self.own: dict[str, list[Tensor]] = {}

    def of(self, provider: Provider) -> list[Tensor]:
        if not provider.overwrites:
            return self.source
        if provider.name not in self.own:
            self.own[provider.name] = [logits.clone() for logits in self.source]
        return self.own[provider.name]

    def refill(self, provider: Provider, index: int) -> None:
        if provider.overwrites:
            self.of(provider)[index].copy_(self.source[index])


def step(provider: Provider, target: Tensor, options: dict, backward: bool) -> Callable[[Tensor], tuple]:
    """The loss, and the gradient or None, of logits."""

    def run(logits: Tensor) -> tuple[Tensor, Tensor | None]:
        if not backward:
            with torch.no_grad():
                return provider.loss(logits, target, **options, **provider.extras), None
        leaf = logits.detach().requires_grad_()
        loss = provider.loss(leaf, target, **options, **provider.extras)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    return run


# ---- values ------------------------------------------------------------------------------------------------


class Expected:
    """The loss in float64, and the gradient of the first and the last rows or images."""

    def __init__(self, logits: Tensor, target: Tensor, options: dict) -> None:
        options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
        weight, soft = options.get("weight"), target.is_floating_point()
        wide = (lambda t: t.double()) if soft else (lambda t: t)
        if soft:
            denominator = target.numel() / target.size(1)
        else:
            counted = target[target != -100]
            denominator = float(counted.numel() if weight is None else weight[counted].sum())
        rows = max(1, 2**25 * logits.size(0) // logits.numel())
        total = 0.0
        for x, t in zip(logits.split(rows), target.split(rows), strict=True):
            total += F.cross_entropy(x.double(), wide(t), reduction="sum", **options).item()
        self.loss = total / denominator
        self.some = torch.tensor([0, -1], device=DEVICE)
        x = logits[self.some].double().requires_grad_()
        loss = F.cross_entropy(x, wide(target[self.some]), reduction="sum", **options) / denominator
        (self.grad,) = torch.autograd.grad(loss, x)
        self.tolerance = 3e-2 if logits.dtype == BF16 else 1e-4

    def wrong(self, loss: Tensor, grad: Tensor | None) -> str:
        """What is, or nothing."""
        if not abs(loss.item() - self.loss) <= self.tolerance * abs(self.loss):
            return f"the loss is {loss.item():.6g}, not {self.loss:.6g}"
        if grad is not None:
            error, largest = (grad[self.some].double() - self.grad).abs().max().item(), self.grad.abs().max().item()
            if not error <= self.tolerance * largest:
                return f"the gradient is off by {error:.3g}, its largest element is {largest:.3g}"
        return ""


# ---- time --------------------------------------------------------------------------------------------------


def one_call(function: Callable[[], object]) -> tuple[object, tuple[torch.cuda.Event, torch.cuda.Event]]:
    events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(BUSY)
    events[0].record()
    result = function()
    events[1].record()
    return result, events


def peak_extra_bytes(function: Callable[[], object]) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def measure(case: Case, direction: str, deadline: float) -> list[dict]:
    backward = direction == "forward+backward"
    target, options = case.target()
    sets = Sets(case)
    expected = Expected(sets.source[0], target, options)
    out = torch.empty_like(sets.source[0])
    records: dict[str, dict] = {}
    runs: dict[str, tuple[Provider, Callable]] = {}
    copy = Provider("copy", lambda logits: out.copy_(logits))

    for provider in providers(case, direction):
        record = {"case": case.name, "provider": provider.name, "direction": direction}
        records[provider.name] = record
        try:
            run = step(provider, target, options, backward)
            for _ in range(2):  # the first compiles
                loss, grad = run(sets.of(provider)[0])
                wrong = expected.wrong(loss, grad)
                if wrong:
                    record["wrong"] = wrong
                del loss, grad
                sets.refill(provider, 0)
            logits = sets.of(provider)[0]
            record["peak_extra_bytes"] = peak_extra_bytes(lambda run=run, logits=logits: run(logits))
            sets.refill(provider, 0)
            runs[provider.name] = provider, run
        except Exception as error:
            record["error"] = first_line(error)
            sets.own.pop(provider.name, None)
    records["copy"] = {"case": case.name, "provider": "copy", "direction": "copy", "peak_extra_bytes": 0}
    runs["copy"] = copy, lambda logits: (copy.loss(logits), None)

    gradients = {name: collections.deque(maxlen=sets.count) for name in runs}
    events: dict[str, list] = {name: [] for name in runs}
    turn = 0
    while turn < LEAST_CALLS + 3 or (time.monotonic() < deadline and turn < 400):
        index = turn % sets.count
        for name, (provider, run) in list(runs.items()):
            try:
                logits = sets.of(provider)[index]
                (_, grad), pair = one_call(lambda run=run, logits=logits: run(logits))
                gradients[name].append(None if provider.overwrites else grad)
                del grad
                sets.refill(provider, index)
                events[name].append(pair)
            except Exception as error:
                records[name]["error"] = first_line(error)
                del runs[name]
        torch.cuda.synchronize()
        turn += 1

    size = sets.source[0].numel() * sets.source[0].element_size()
    read = size + target.numel() * target.element_size()
    for name in runs:
        times = [start.elapsed_time(end) for start, end in events[name]][3:]
        moved = 2 * size if name == "copy" else read + size * backward
        median = statistics.median(times)
        records[name] |= {
            "median_ms": median,
            "min_ms": min(times),
            "max_ms": max(times),
            "calls": len(times),
            "bytes": moved,
            "gb_per_s": moved / median / 1e6,
        }
    for record in records.values():
        if "median_ms" in record:
            record["copies"] = record["median_ms"] / records["copy"]["median_ms"]
    return list(records.values())


def measure_overhead(seconds: float) -> list[dict]:
    """The host's time for a call on logits so small that nothing else matters."""
    logits = torch.randn(8, 16, device=DEVICE)
    target = torch.randint(16, (8,), device=DEVICE)
    case = Case(OVERHEAD, (8, 16), FP32)
    records, runs, times = [], {}, {}
    for direction in BOTH:
        found = [p for p in providers(case, direction) if p.name != "native compiled"]
        for provider in found:
            record = {"case": OVERHEAD, "provider": provider.name, "direction": direction, "clock": "host"}
            records.append(record)
            run = step(provider, target, {}, direction == "forward+backward")
            try:
                for _ in range(50):
                    run(logits)
                runs[provider.name, direction] = run, record
                times[provider.name, direction] = []
            except Exception as error:
                record["error"] = first_line(error)
    deadline, turn = time.monotonic() + seconds, 0
    while turn < LEAST_CALLS or time.monotonic() < deadline:
        for key, (run, _) in runs.items():
            torch.cuda.synchronize()
            before = time.perf_counter()
            for _ in range(50):  # the device's queue is longer
                run(logits)
            times[key].append((time.perf_counter() - before) / 50)
        turn += 1
    torch.cuda.synchronize()
    for key, (_, record) in runs.items():
        milliseconds = [1e3 * t for t in times[key]]
        record |= {
            "median_ms": statistics.median(milliseconds),
            "min_ms": min(milliseconds),
            "max_ms": max(milliseconds),
            "calls": 50 * len(milliseconds),
        }
    return records


# ---- results -----------------------------------------------------------------------------------------------


def machine() -> dict:
    properties = torch.cuda.get_device_properties(DEVICE)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "liger": liger() is not None,
        "python": platform.python_version(),
        **cross_entropy_ext.build_info(),
    }


def default_path(gpu: str) -> Path:
    return Path(os.environ.get("OUT") or "benchmarks/results") / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()) + ".json")


def write(path: Path, contents: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(contents, indent=1) + "\n")
    os.replace(partial, path)


def table(records: list[dict]) -> str:
    lines = [
        f"{'':45}{'':16}{'median':>9}{'min':>9}{'max':>9}{'':>8}{'':>8}{'peak extra':>12}",
        f"{'case, direction':45}{'provider':16}{'ms':>9}{'ms':>9}{'ms':>9}{'GB/s':>8}{'copies':>8}{'MiB':>12}",
    ]
    last = None
    for record in records:
        key = record["case"], record["direction"] if record["direction"] != "copy" else last and last[1]
        if key != last and last is not None:
            lines.append("")
        name = "" if key == last else f"{key[0]}, {'fwd' if key[1] == 'forward' else 'fwd+bwd'}"
        last = key
        line = f"{name:45}{record['provider']:16}"
        if "error" in record:
            line += f"  {record['error'][:70]}"
        elif "median_ms" in record:
            line += "".join(f"{record[k]:9.4f}" for k in ("median_ms", "min_ms", "max_ms"))
            if "gb_per_s" in record:
                line += f"{record['gb_per_s']:8.0f}{record['copies']:8.2f}{record['peak_extra_bytes'] / 2**20:12.1f}"
        lines.append(line + ("  WRONG: " + record["wrong"] if "wrong" in record else ""))
    return "\n".join(lines)


def stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression on the cases' names")
    parser.add_argument("--seconds", type=float, default=150, help="for all cases, which share them")
    parser.add_argument("--json", type=Path, help="default: <gpu>.json in benchmarks/results or in $OUT")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a GPU, and torch finds none.")
    if cross_entropy_ext.build_info()["cuda_archs"] is None:
        sys.exit("benchmarks.gpu needs a build with CUDA: FORCE_CUDA=1 python setup.py build_ext --inplace")
    signal.signal(signal.SIGTERM, stop)

    deadline = time.monotonic() + arguments.seconds
    about = machine()
    path = arguments.json or default_path(about["gpu"])
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    work = [(case, direction) for case in CASES for direction in BOTH if re.search(arguments.only, case.name)]
    overhead = bool(re.search(arguments.only, OVERHEAD))
    records: list[dict] = []
    complete = False
    try:
        if overhead:
            records += measure_overhead(min(3.0, arguments.seconds / 20))
            write(path, {"machine": about, "complete": False, "records": records})
        for done, (case, direction) in enumerate(work):
            started = time.monotonic()
            if started > deadline:
                print(f"no time for {case.name}, {direction}", flush=True)
                records.append({"case": case.name, "provider": "", "direction": direction, "error": "no time left"})
                continue
            share = (deadline - started) / (len(work) - done)
            try:
                records += measure(case, direction, started + share)
            except Exception as error:
                failed = {"case": case.name, "provider": "", "direction": direction, "error": first_line(error)}
                records.append(failed)
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
            write(path, {"machine": about, "complete": False, "records": records})
            print(f"{case.name}, {direction}: {time.monotonic() - started:.1f} s", flush=True)
        complete = not any(record.get("error") == "no time left" for record in records)
    except KeyboardInterrupt:
        print("stopped", flush=True)
    finally:
        write(path, {"machine": about, "complete": complete, "records": records})
        print(f"\n{table(records)}\n\n{path}", flush=True)
    ours = [record for record in records if record["provider"] in ("", "ours", "ours inplace")]
    wrong = [record for record in ours if "error" in record or "wrong" in record]
    sys.exit(1 if wrong or not complete else 0)


if __name__ == "__main__":
    main()

"""Training steps of whole models, with the native loss and with ours, eager and compiled.

    python -m benchmarks.training [--device cpu|cuda] [--quick] [--only PATTERN] [--json FILE]

The models are plain torch.nn and learn from real data, which `data` finds in installed packages: a transformer language
model with two sizes of vocabulary, a U-Net that segments photographs and ignores outlines, and a ResNet that reads
digits. A variant of a model is a loss in a mode. All else is the same for all variants, down to the seeds and batches.

* `native` is torch.nn.CrossEntropyLoss, `ours` cross_entropy_ext.CrossEntropyLoss, `ours in place` the same with
  inplace=True, which torch.compile does not use. On a GPU with `liger` installed, it trains the language models, too.
* `eager` runs one operation after another; `compiled` is torch.compile of the model and the loss together.

How to read a record:

* `step_ms`, `min_ms`, `max_ms`: zero_grad, forward, loss, backward and optimizer. Compare the medians.
* `loss_ms`, `loss_share`: from the logits to their gradient, the loss's forward and backward, and its share of the
  step, the most that another loss could save. Compiled, both are None, since the native loss is fused with its
  neighbours.
* `peak_bytes`: the most memory that training took on top of the model itself: gradients, the optimizer's state,
  activations and logits. On a CPU it is resident memory, on Linux only; on a GPU it is the allocator's.
* `final_loss`: the last step's. `difference`: the largest distance of any step's loss from that of native, eager. If
  it is beyond TOLERANCE, the record says what is `wrong`.

Every variant has a process of its own, which keeps their memory apart. They take turns, step by step, and another one
begins each round, so that other load on the machine hits all alike; all but one wait. Each process rehearses a step and
begins anew, so that neither compiling nor one-time allocations are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib.util
import itertools
import math
import multiprocessing
import os
import re
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cross_entropy_ext

from . import command_line, data, figures, tables
from . import records as files
from .command_line import Item
from .memory import reset_peak, resident
from .pages import Section
from .tables import Table, failures, number, quotient, red

NATIVE, OURS, OURS_IN_PLACE, LIGER = "native", "ours", "ours in place", "liger"
EAGER, COMPILED = "eager", "compiled"
VARIANTS = [(NATIVE, EAGER), (OURS, EAGER), (OURS_IN_PLACE, EAGER), (NATIVE, COMPILED), (OURS, COMPILED)]
# Processes take seconds to start, and longer to compile: in a quick run, one model shows that it works.
QUICK, QUICK_MOST = [(NATIVE, EAGER), (OURS, EAGER)], "language model, 32k"

SEED = 0
WARM_UP = 2  # steps that count for the losses, but not for the times
REST = 0.01  # seconds between turns, for the threads of the last one to fall asleep
# The environment of the variants' processes, where it is not set already.
#
# OpenMP's threads spin before they sleep: libgomp's for some 10 ms, libomp's for 200. They would spin into the next
# turn and, on a busy machine, on the core that the thread they wait for needs, and steps would take many times as long.
# Here they spin for a millisecond at most, enough from one loop of a step to the next.
#
# glibc returns freed memory to the system and takes it again, page by page. Depending on the heap's layout this is up
# to a fifth of a U-Net's step, and differs between processes. Here its thresholds begin at the values to which they
# adapt: the largest tensors come from the system each time, the others from memory that glibc keeps.
ENVIRONMENT = {
    "GOMP_SPINCOUNT": "3000",
    "KMP_BLOCKTIME": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
}
# In nats. Sums in another order differ in their last bits, and training carries that forward.
TOLERANCE = {"cpu": 1e-3, "cuda": 2e-2}

Batch = tuple[np.ndarray, np.ndarray]


# ------------------------------------------------------------------------------------------------------------
# The models
# ------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.project(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(hidden)
        return hidden + self.layers(hidden)


class LanguageModel(nn.Module):
    """GPT-2 made small: words (B, T) to logits (B * T, vocabulary), with one matrix for both."""

    def __init__(self, vocabulary: int, context: int, width: int, blocks: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads=width // 32) for _ in range(blocks)), nn.LayerNorm(width))
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.places, std=0.02)

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.blocks(self.words(words) + self.places)
        return F.linear(hidden.flatten(0, 1), self.words.weight)


def convolution(before: int, after: int, stride: int = 1) -> nn.Sequential:
    """Without bias, which the normalisation would remove. SiLU, since the kink of ReLU amplifies the last bit of a loss
    to a thousandth of it within 30 steps, which would hide a wrong loss."""
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.SiLU())


class UNet(nn.Module):
    """Images (B, 3, H, W) to logits (B, classes, H, W)."""

    def __init__(self, classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.down = nn.ModuleList(convolution(*pair) for pair in itertools.pairwise((3, *widths)))
        self.up = nn.ModuleList(
            convolution(above + below, above) for above, below in reversed(list(itertools.pairwise(widths)))
        )
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        kept = [self.down[0](images)]
        for layer in self.down[1:]:
            kept.append(layer(F.max_pool2d(kept[-1], 2)))
        hidden = kept.pop()
        for layer in self.up:
            hidden = layer(torch.cat([kept.pop(), F.interpolate(hidden, scale_factor=2)], 1))
        return self.head(hidden)


class Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            convolution(before, after, stride),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.short = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return F.silu(self.layers(images) + self.short(images))


class ResNet(nn.Module):
    """Images (B, 1, H, W) to logits (B, classes)."""

    def __init__(self, classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            convolution(1, widths[0]),
            *(Residual(before, after, stride=2) for before, after in itertools.pairwise(widths)),
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).mean((2, 3)))


# ------------------------------------------------------------------------------------------------------------
# What they are trained with: a new model is an entry of WORKLOADS
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """The size of a model and of its batches."""

    batch: int
    length: int  # of a text in words, or of an image's side in pixels
    steps: int
    model: dict = field(default_factory=dict)  # the model's arguments except the classes


@dataclass(frozen=True)
class Workload:
    name: str
    classes: int
    model: Callable[[int, Size], nn.Module]
    batches: Callable[[int, Size], list[Batch]]
    sizes: dict[str, Size]  # by device, and "quick" if it is part of --quick
    options: dict = field(default_factory=dict)  # of the loss
    training: Callable[..., Training] | None = None  # instead of Training
    variants: list[tuple[str, str]] | None = None  # instead of VARIANTS
    peers: tuple[str, ...] = ()  # losses that are also measured, on a GPU


def language_model(vocabulary: int, size: Size) -> nn.Module:
    return LanguageModel(vocabulary, size.length, **size.model)


def unet(classes: int, size: Size) -> nn.Module:
    return UNet(classes, **size.model)


def resnet(classes: int, size: Size) -> nn.Module:
    return ResNet(classes, **size.model)


def texts(vocabulary: int, size: Size) -> list[Batch]:
    """Words from random places, and for each the next word as its label."""
    text, random = data.words(vocabulary), np.random.default_rng(SEED)

    def batch() -> Batch:
        starts = random.integers(len(text) - size.length, size=(size.batch, 1))
        windows = text[starts + np.arange(size.length + 1)]
        return windows[:, :-1].copy(), windows[:, 1:].flatten()

    return [batch() for _ in range(size.steps)]


def crops(classes: int, size: Size) -> list[Batch]:
    """Squares of photographs from random places."""
    (images, labels), random = data.photographs(classes), np.random.default_rng(SEED)
    height, width = labels.shape[1:]

    def crop() -> Batch:
        image = random.integers(len(labels))
        top, left = random.integers(height - size.length), random.integers(width - size.length)
        square = np.s_[..., top : top + size.length, left : left + size.length]
        return images[image][square], labels[image][square]

    def batch() -> Batch:
        found = [crop() for _ in range(size.batch)]
        return np.stack([image for image, _ in found]), np.stack([label for _, label in found])

    return [batch() for _ in range(size.steps)]


def digits(classes: int, size: Size) -> list[Batch]:
    (images, labels), random = data.digits(size.length), np.random.default_rng(SEED)
    picks = [random.integers(len(labels), size=size.batch) for _ in range(size.steps)]
    return [(images[pick], labels[pick]) for pick in picks]


SMALL, LARGE, TINY = {"width": 128, "blocks": 2}, {"width": 768, "blocks": 6}, {"width": 32, "blocks": 1}
WORKLOADS = [
    Workload(
        "language model, 32k",
        32_768,
        language_model,
        texts,
        {"cpu": Size(16, 64, 24, SMALL), "cuda": Size(8, 1024, 50, LARGE), "quick": Size(4, 32, 6, TINY)},
        peers=(LIGER,),
    ),
    Workload(
        "language model, 128k",
        131_072,
        language_model,
        texts,
        {"cpu": Size(8, 64, 16, SMALL), "cuda": Size(4, 1024, 50, LARGE)},
        peers=(LIGER,),
    ),
    Workload(
        "segmentation, 19 classes",
        19,
        unet,
        crops,
        {
            "cpu": Size(4, 256, 24, {"widths": (16, 32, 64)}),
            "cuda": Size(16, 384, 50, {"widths": (64, 128, 256, 512)}),
            "quick": Size(2, 64, 6, {"widths": (8, 16)}),
        },
        {"ignore_index": data.NO_CLASS},
    ),
    Workload(
        "image classifier, 10 classes",
        10,
        resnet,
        digits,
        {
            "cpu": Size(256, 32, 30, {"widths": (16, 32, 64, 128)}),
            "cuda": Size(1024, 32, 50, {"widths": (64, 128, 256, 512)}),
            "quick": Size(32, 32, 6, {"widths": (8, 16)}),
        },
    ),
]


def make_loss(name: str, options: dict) -> nn.Module:
    if name == NATIVE:
        return nn.CrossEntropyLoss(**options)
    if name == LIGER:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        return LigerCrossEntropyLoss(**options)
    if name == OURS_IN_PLACE:
        return cross_entropy_ext.CrossEntropyLoss(**options, inplace=True)
    return cross_entropy_ext.CrossEntropyLoss(**options)


# ------------------------------------------------------------------------------------------------------------
# A variant's process
# ------------------------------------------------------------------------------------------------------------


class Clock:
    """Marks in time during a step. On a GPU they are events, so that nothing waits for the device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: dict[str, float | torch.cuda.Event] = {}
        self.synchronize()

    def synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def mark(self, name: str) -> None:
        if self.device == "cpu":
            self.marks[name] = time.perf_counter()
        else:
            self.marks[name] = torch.cuda.Event(enable_timing=True)
            self.marks[name].record()

    def milliseconds(self, first: str, last: str) -> float | None:
        """From one mark to another, or None where they were not met."""
        if first not in self.marks or last not in self.marks:
            return None
        self.synchronize()
        start, end = self.marks[first], self.marks[last]
        return 1e3 * (end - start) if self.device == "cpu" else start.elapsed_time(end)


@dataclass(frozen=True)
class Step:
    loss: float
    step_ms: float
    loss_ms: float | None


class Training:
    """A model in training, with its loss and optimizer."""

    def __init__(self, workload: Workload, size: Size, device: str, loss: str, mode: str) -> None:
        torch.manual_seed(SEED)
        self.device = device
        self.model = workload.model(workload.classes, size).to(device)
        self.criterion = make_loss(loss, workload.options).to(device)
        self.optimizer = self.make_optimizer()
        self.forward = self.forward_eager if mode == EAGER else self.forward_compiled
        self.compiled = torch.compile(self.model_and_loss, dynamic=False)

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)

    def rehearse(self, batch: Batch) -> None:
        """A step whose effect on the model is undone."""
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.step(batch)
        self.optimizer.zero_grad()
        self.model.load_state_dict(before)
        self.optimizer = self.make_optimizer()

    def forward_eager(self, inputs: Tensor, targets: Tensor, clock: Clock) -> Tensor:
        """The backward begins with the loss, whose share ends where the logits' gradient arrives at the hook."""
        logits = self.model(inputs)
        logits.register_hook(lambda _: clock.mark("gradient"))
        clock.mark("logits")
        return self.criterion(logits, targets)

    def model_and_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(self.model(inputs), targets)

    def forward_compiled(self, inputs: Tensor, targets: Tensor, clock: Clock) -> Tensor:
        return self.compiled(inputs, targets)

    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.device == "cpu" else torch.autocast("cuda", torch.bfloat16)

    def step(self, batch: Batch) -> Step:
        inputs, targets = (torch.from_numpy(array).to(self.device) for array in batch)
        clock = Clock(self.device)
        clock.mark("start")
        self.optimizer.zero_grad()
        with self.autocast():
            loss = self.forward(inputs, targets, clock)
        loss.backward()
        self.optimizer.step()
        clock.mark("end")
        return Step(loss.item(), clock.milliseconds("start", "end"), clock.milliseconds("logits", "gradient"))


class Peak:
    """The most memory that was taken since this object was made."""

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        cross_entropy_ext.empty_cache()
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(OSError, AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)
        try:
            reset_peak()
            self.before = resident("VmRSS")
        except OSError:
            self.before = None

    def bytes(self) -> int | None:
        if self.before is None:
            return None
        now = resident("VmHWM") if self.device == "cpu" else torch.cuda.max_memory_allocated()
        return now - self.before


def serve(
    connection: Connection, workload: Workload, size: Size, device: str, loss: str, mode: str, first: Batch
) -> None:
    """A variant's process: rehearses, says how many parameters there are, makes a step of each batch it is sent, and at
    None says what memory that took. An answer that is a string is an error, and the last."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends it
    try:
        training = (workload.training or Training)(workload, size, device, loss, mode)
        training.rehearse(first)
        peak = Peak(device)
        connection.send(sum(parameter.numel() for parameter in training.model.parameters()))
        while (batch := connection.recv()) is not None:
            connection.send(training.step(batch))
        connection.send(peak.bytes())
    except EOFError:  # the parent process is gone
        pass
    except Exception as error:
        connection.send(files.reason(error))


# ------------------------------------------------------------------------------------------------------------
# The process that sends the batches
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Variant:
    loss: str
    mode: str
    process: BaseProcess
    connection: Connection
    steps: list[Step] = field(default_factory=list)
    parameters: int | None = None
    peak_bytes: int | None = None
    error: str = ""

    def send(self, batch: Batch | None) -> None:
        if not self.error:
            with contextlib.suppress(OSError):  # receive() tells why
                self.connection.send(batch)

    def receive(self) -> object:
        """The answer, or None and an error."""
        if self.error:
            return None
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            answer = f"its process ended with exit code {self.process.exitcode}"
        if isinstance(answer, str):
            self.error = answer
            return None
        return answer

    def turn(self, batch: Batch) -> None:
        self.send(batch)
        if isinstance(step := self.receive(), Step):
            self.steps.append(step)

    def close(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


def start(workload: Workload, size: Size, device: str, loss: str, mode: str, first: Batch) -> Variant:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = theirs, workload, size, device, loss, mode, first
    process = context.Process(target=serve, args=arguments, daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    return Variant(loss, mode, process, ours)


def wanted(workload: Workload, quick: bool, device: str) -> list[tuple[str, str]]:
    if workload.variants:
        return workload.variants[:2] if quick else workload.variants
    if not quick:
        has_liger = device != "cpu" and importlib.util.find_spec("liger_kernel") is not None
        return [*VARIANTS, *((peer, EAGER) for peer in workload.peers if has_liger)]
    return [*QUICK, (OURS_IN_PLACE, EAGER), (OURS, COMPILED)] if workload.name == QUICK_MOST else QUICK


def measure(workload: Workload, size: Size, pairs: list[tuple[str, str]], device: str) -> list[dict]:
    """The records of these variants of a model, which take turns."""
    batches = workload.batches(workload.classes, size)
    variants = []
    try:
        for loss, mode in pairs:
            variants.append(start(workload, size, device, loss, mode, batches[0]))
        for variant in variants:
            variant.parameters = variant.receive()
        for done, batch in enumerate(batches):
            for variant in variants[done % len(pairs) :] + variants[: done % len(pairs)]:
                time.sleep(REST)
                variant.turn(batch)
        for variant in variants:
            variant.send(None)
            variant.peak_bytes = variant.receive()
        return [record(workload, variant, variants[0], batches[0], device) for variant in variants]
    finally:
        for variant in variants:
            variant.close()


def record(workload: Workload, variant: Variant, reference: Variant, batch: Batch, device: str) -> dict:
    found = {"model": workload.name, "loss": variant.loss, "mode": variant.mode}
    if variant.error:
        return {**found, "error": variant.error}
    timed = variant.steps[WARM_UP:]
    times = [step.step_ms for step in timed]
    step_ms = statistics.median(times)
    _, targets = batch
    losses_ms = [step.loss_ms for step in timed if step.loss_ms is not None]
    loss_ms = statistics.median(losses_ms) if losses_ms else None
    found |= {
        "step_ms": step_ms,
        "min_ms": min(times),
        "max_ms": max(times),
        "loss_ms": loss_ms,
        "loss_share": None if loss_ms is None else loss_ms / step_ms,
        "peak_bytes": variant.peak_bytes,
        "steps": len(timed),
        "logits_shape": [len(targets), workload.classes, *targets.shape[1:]],
        "parameters": variant.parameters,
        "final_loss": variant.steps[-1].loss,
        "difference": None,
    }
    if not reference.error:
        differences = [abs(a.loss - b.loss) for a, b in zip(variant.steps, reference.steps, strict=True)]
        worst = max(range(len(differences)), key=lambda i: math.inf if math.isnan(differences[i]) else differences[i])
        found["difference"] = differences[worst]
        if not differences[worst] <= TOLERANCE[device]:  # a NaN compares false
            found["wrong"] = f"the loss of step {worst + 1} is {differences[worst]:.1e} from native's"
    return found


# ------------------------------------------------------------------------------------------------------------
# Tables and pages
# ------------------------------------------------------------------------------------------------------------


def ratio(one: float | None, other: float | None) -> str:
    return number(quotient(one, other), ".2f")


def table(records: list[dict], detail: bool = False) -> Table:
    """A row for each variant. With `detail` it is compared with native in the same mode."""
    native = {(r["model"], r["mode"]): r for r in records if r["loss"] == NATIVE and "error" not in r}
    rows = []
    for record in records:
        row = [record["model"], f"{record['loss']}, {record['mode']}"]
        if "error" in record:
            rows.append([*row, record["error"]])
            continue
        share, peak, step = record["loss_share"], record["peak_bytes"], number(record["step_ms"])
        if detail:
            step += f" ({number(record['min_ms'])} to {number(record['max_ms'])})"
        row += [step, number(record["loss_ms"]), number(share, ".0%"), number(peak and peak / 2**20, ".0f")]
        if detail:
            base = native.get((record["model"], record["mode"]), {})
            row += [ratio(base.get(name), record[name]) for name in ("step_ms", "loss_ms")]
            row.append(ratio(peak, base.get("peak_bytes")))
            row.append(red(number(record["difference"], ".0e"), "wrong" in record))
        rows.append(row)
    header = ["model", "loss", "step, ms", "of it the loss, ms", "share", "peak, MiB"]
    header += ["step faster", "loss faster", "peak of native", "differs"] * detail
    return Table(header, rows, 2, "Training steps")


def blocks(device: str, result: dict) -> list[tables.Block]:
    return [
        "Whole training steps of small models on real data. Every variant's loss agrees with native's, step by step.",
        figures.link(device, "training", "Time of a training step, and the loss's share of it"),
        table(result["records"]),
    ]


SECTION = Section("training", "Training whole models", blocks, draw=figures.draw_training)


def main() -> None:
    parser = command_line.parser_of(__doc__, "training", "tiny models, under a minute", "models")
    run(command_line.parse(parser), WORKLOADS)


def run(arguments: argparse.Namespace, workloads: list[Workload]) -> NoReturn:
    """Measures the wanted workloads, and ends with the command's exit status."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    size = "quick" if arguments.quick else arguments.device
    items = []
    for one in workloads:
        if size in one.sizes and re.search(arguments.only, one.name):
            pairs = wanted(one, arguments.quick, arguments.device)
            failed = [{"model": one.name, "loss": loss, "mode": mode} for loss, mode in pairs]
            measured = functools.partial(measure, one, one.sizes[size], pairs, arguments.device)
            items.append(Item(one.name, failed, measured))

    def shown(records: list[dict]) -> list[tables.Block]:
        named = ((f"{record['model']}, {record['loss']}, {record['mode']}", record) for record in records)
        return [table(records, detail=True), failures(named)]

    command_line.measure_all(arguments, items, shown, lambda record: record["loss"] not in (NATIVE, LIGER))


if __name__ == "__main__":
    main()

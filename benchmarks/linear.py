"""The output layer and its loss, forward and backward: time in units of the three matrix products, and memory.

    python -m benchmarks.linear [--device cpu|cuda] [--quick] [--only PATTERN] [--without PATTERN] [--seconds S]
                                [--json FILE]

A step takes N hidden states of F features, a weight of V classes and N labels, and gives the loss and the gradients of
states and weight. Values are compared with float64 first. The providers:

* `products`: logits, and the gradients of states and weight, as three matrix products with fresh results and nothing
  between them. No loss that makes logits can be faster. Its time is the unit of the column `products`: the median of
  the ratios of neighbouring turns.
* `native`: F.linear and the native loss. `native chunked`: F.linear_cross_entropy with LinearCrossEntropyOptions().
* `linear + ours`: F.linear and our loss of its logits. `ours`: functional.linear_cross_entropy.
* `liger`, `quack`, `cut-cross-entropy`: their fused linear losses, with their own defaults, on a GPU.

Times are medians of interleaved turns, as in `benchmarks.timing`. The peak of memory is that of one step on top of
states, weight and labels, on a CPU in a process of its own for each provider; `gradient_bytes` of it are the gradients.

Records, a dictionary each. One that failed has an `error`, and one that is wrong says what is `wrong`:

    case, shape (N, F, V), dtype, provider; median_ms, min_ms, max_ms, turns, products, peak_extra_bytes, gradient_bytes
"""

from __future__ import annotations

import functools
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cross_entropy_ext.functional import cross_entropy, linear_cross_entropy

from . import command_line
from . import records as files
from .command_line import Item
from .memory import CpuPeaks, cuda_peak
from .pages import Section, measured_by
from .tables import Block, Table, dimensions, duration, number, said
from .timing import Run, Timed, measure, median_ratio
from .values import TOLERANCE, difference

Shape = tuple[int, int, int]  # states, features, classes
SECONDS = {"cpu": 150.0, "cuda": 40.0, "quick": 2.0}
PRODUCTS, NATIVE, CHUNKED, SEPARATE, OURS = "products", "native", "native chunked", "linear + ours", "ours"
LIGER, QUACK, CUT = PEERS = "liger", "quack", "cut-cross-entropy"  # on a GPU
ELEMENTS = 2**25  # of logits in float64, at once


@dataclass(frozen=True)
class Case:
    name: str
    dtype: torch.dtype
    cpu: Shape | None = None
    cuda: Shape | None = None
    quick: Shape = (64, 32, 4000)

    def shape(self, device: str, quick: bool) -> Shape | None:
        return self.quick if quick else getattr(self, device)

    def fields(self, shape: Shape) -> dict:
        return {"case": self.name, "shape": list(shape), "dtype": str(self.dtype).removeprefix("torch.")}


CASES = [
    Case("a vocabulary of 32k, float32", torch.float32, cpu=(2048, 512, 32_000)),
    Case("a vocabulary of 32k, bfloat16", torch.bfloat16, cpu=(2048, 512, 32_000)),
    Case("Llama 3's head, bfloat16", torch.bfloat16, cuda=(8192, 4096, 128_256)),
]

# ---- providers ------------------------------------------------------------------------------------------------------

Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def products(states: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        logits = torch.mm(states, weight.t())
        return torch.mm(logits, weight), torch.mm(logits.t(), states)


def trained(loss: Loss) -> Step:
    def step(states: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        value = loss(states, weight, target)
        return value, *torch.autograd.grad(value, (states, weight))

    return step


def load_native_chunked() -> Step:
    from torch.nn import LinearCrossEntropyOptions  # of torch 2.13

    options = LinearCrossEntropyOptions()
    return trained(lambda states, weight, target: F.linear_cross_entropy(states, weight, target, options=options))


def load_liger() -> Step:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(states: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        found = liger_fused_linear_cross_entropy(states, weight, target)
        return found[0] if isinstance(found, tuple) else found

    return trained(loss)


def load_quack() -> Step:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return trained(lambda states, weight, target: chunked_linear_cross_entropy(states, weight, target))


def load_cut_cross_entropy() -> Step:
    from cut_cross_entropy import linear_cross_entropy as cut

    return trained(lambda states, weight, target: cut(states, weight, target))


PROVIDERS: dict[str, Callable[[], Step]] = {
    PRODUCTS: lambda: products,
    NATIVE: lambda: trained(lambda states, weight, target: F.cross_entropy(F.linear(states, weight), target)),
    CHUNKED: load_native_chunked,
    SEPARATE: lambda: trained(lambda states, weight, target: cross_entropy(F.linear(states, weight), target)),
    OURS: lambda: trained(linear_cross_entropy),
    LIGER: load_liger,
    CUT: load_cut_cross_entropy,
    QUACK: load_quack,  # last, because it tunes itself first
}


def importable(device: str) -> list[str]:
    """The providers that this torch and the installed packages have."""
    found = []
    for name, load in PROVIDERS.items():
        if name in PEERS and device == "cpu":
            continue
        try:
            load()
        except ImportError:
            continue
        except Exception:  # it is installed; its record says why it fails
            pass
        found.append(name)
    return found


# ---- inputs and their expected values -------------------------------------------------------------------------------


def draw(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """States, weight and labels. Logits have a standard deviation of 3, as in a model that has begun to learn."""
    rows, features, classes = shape
    random = torch.Generator(device).manual_seed(0)
    states = torch.empty(rows, features, device=device).normal_(generator=random).to(dtype)
    weight = torch.empty(classes, features, device=device).normal_(0, 3 / features**0.5, generator=random).to(dtype)
    return states, weight, torch.randint(classes, (rows,), generator=random, device=device)


def ready(provider: str, shape: Shape, dtype: torch.dtype) -> tuple[Run, Tensor]:
    """A provider's step on the CPU, and its states. Another process makes both from these names."""
    states, weight, target = draw(shape, dtype, "cpu")
    weight.requires_grad_()
    step = PROVIDERS[provider]()
    return lambda states: step(states, weight, target), states.requires_grad_()


class Expected:
    """Loss and gradients in float64, a few rows of logits at a time; the gradients at some rows and classes."""

    def __init__(self, states: Tensor, weight: Tensor, target: Tensor) -> None:
        rows, classes = len(states), len(weight)
        self.rows, self.classes = ([0, size // 2, size - 1] for size in (rows, classes))
        self.tolerance = TOLERANCE[states.dtype]
        wide, total = weight.double(), 0.0
        of_states = torch.empty(len(self.rows), states.size(1), dtype=torch.double, device=states.device)
        of_weight = torch.zeros(len(self.classes), states.size(1), dtype=torch.double, device=states.device)
        pieces = max(1, ELEMENTS // classes)
        for begin in range(0, rows, pieces):
            x, y = states[begin : begin + pieces].double(), target[begin : begin + pieces]
            logits = x @ wide.t()
            total += F.cross_entropy(logits, y, reduction="sum").item()
            g = logits.softmax(1)
            g[torch.arange(len(y), device=y.device), y] -= 1
            g /= rows
            of_weight += g[:, self.classes].t() @ x
            for place, row in enumerate(self.rows):
                if begin <= row < begin + len(y):
                    of_states[place] = g[row - begin] @ wide
        self.loss, self.gradients = total / rows, (of_states, of_weight)

    def wrong(self, loss: Tensor, of_states: Tensor, of_weight: Tensor) -> str:
        """Says what is wrong, or nothing."""
        if not abs(loss.item() - self.loss) <= self.tolerance * abs(self.loss):
            return f"the loss is {loss.item():.6g}, not {self.loss:.6g}"
        found = of_states[self.rows], of_weight[self.classes]
        differences = (
            difference(f"the gradient of the {name}", some, expected, self.tolerance)
            for name, some, expected in zip(("states", "weight"), found, self.gradients, strict=True)
        )
        return next(filter(None, differences), "")


# ---- measuring ------------------------------------------------------------------------------------------------------


def peak_of(provider: str, shape: Shape, dtype: torch.dtype) -> int | None:
    """On a CPU, in a new process."""
    peaks = CpuPeaks()
    try:
        return peaks.of_made(ready, provider, shape, dtype)
    finally:
        peaks.close()


def case_records(case: Case, shape: Shape, device: str, seconds: float, names: list[str]) -> list[dict]:
    states, weight, target = draw(shape, case.dtype, device)
    expected = Expected(states, weight, target)
    states.requires_grad_()
    weight.requires_grad_()
    gradient_bytes = sum(t.numel() * t.element_size() for t in (states, weight))
    records, timed = {}, []
    for name in names:
        record = records[name] = {**case.fields(shape), "provider": name}
        try:
            step = PROVIDERS[name]()
            run = functools.partial(step, weight=weight, target=target)
            if name != PRODUCTS and (said := expected.wrong(*run(states))):
                record["wrong"] = said
            record["peak_extra_bytes"] = peak_of(name, shape, case.dtype) if device == "cpu" else cuda_peak(run, states)
            record["gradient_bytes"] = gradient_bytes
            timed.append(Timed(name, run, [states]))
        except Exception as error:
            record["error"] = files.reason(error)
        command_line.tidy(device)
    measure(timed, device, time.monotonic() + seconds)
    turns = {one.name: one.milliseconds for one in timed if not one.error}
    for one in timed:
        records[one.name] |= one.summary()
        if one.name in turns and PRODUCTS in turns:
            records[one.name]["products"] = median_ratio(turns[one.name], turns[PRODUCTS])
    return list(records.values())


# ---- tables and pages -----------------------------------------------------------------------------------------------


def grouped(records: list[dict]) -> dict[tuple[str, str], dict[str, dict]]:
    """The records by case and sizes, then by provider."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for record in records:
        found.setdefault((record["case"], dimensions(record)), {})[record["provider"]] = record
    return found


def besides(record: dict) -> float | None:
    """The memory of a step besides its gradients, in MiB."""
    peak = record.get("peak_extra_bytes")
    return None if peak is None else (peak - record["gradient_bytes"]) / 2**20


def table(records: list[dict], detail: bool = False) -> Table:
    rows = []
    for (case, sizes), providers in grouped(records).items():
        for name, record in providers.items():
            provider = name + (f": {said(record)}" if said(record) else "")
            cells = [duration(record, detail), number(record.get("products"), ".2f"), number(besides(record), ".0f")]
            rows.append([f"{case}, {sizes}", provider, *cells])
    header = ["states x features x classes", "", "step, ms", "in units of the products", "MiB besides the gradients"]
    return Table(header, rows, 2, "Forward and backward")


EXPLAINED = (
    "Forward and backward, from hidden states, weight and labels to the loss and both gradients. `products` are the "
    "three matrix products alone, which every loss that makes logits needs. Times in units of theirs are medians of "
    "the ratios of neighbouring turns. Memory is the peak of a step on top of states, weight and labels, less the two "
    "gradients."
)


def blocks(device: str, result: dict) -> list[Block]:
    return [EXPLAINED, table(result["records"])]


def readme(results: dict[str, dict]) -> list[Block]:
    return [table(results["cpu"]["records"]), EXPLAINED, measured_by(results["cpu"])]


SECTION = Section("linear", "The output layer and its loss", blocks, readme=readme)


def main() -> None:
    arguments = command_line.parse(
        command_line.parser_of(__doc__, "linear", "small inputs, in seconds", "cases", seconds=SECONDS, without=True)
    )
    device = arguments.device
    warnings.simplefilter("ignore")  # of providers that fall back
    names = [name for name in importable(device) if not re.search(arguments.without, name)]
    cases = [case for case in CASES if getattr(case, device) and re.search(arguments.only, case.name)]
    items = []
    for case in cases:
        shape, seconds = case.shape(device, arguments.quick), arguments.seconds / len(cases)
        failed = [{**case.fields(shape), "provider": ""}]
        items.append(Item(case.name, failed, functools.partial(case_records, case, shape, device, seconds, names)))
    own = ("", OURS, SEPARATE)
    command_line.measure_all(
        arguments, items, lambda records: [table(records, detail=True)], lambda record: record["provider"] in own
    )


if __name__ == "__main__":
    main()

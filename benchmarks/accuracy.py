"""The errors of each loss, on random logits and in cases where the native loss is known to be wrong.

    python -m benchmarks.accuracy [--device cpu|cuda] [--quick] [--json FILE]

*The grid* is dtype x scale (standard deviation of the logits) x number of classes. Half of the labels are drawn, half
are the class with the largest logit, as a trained model has them. Exact is float64, from the same rounded logits, by a
formula that does not cancel. Two errors for each provider, both the worst of all rows:

* loss: of reduction 'none', relative to the row's exact loss;
* gradient: of reduction 'sum', the largest error in a row relative to the row's largest exact element. That element is
  always the label's, p - 1, minus the sum of all others. It shrinks as the model gets sure of a label, and the
  subtraction p - 1 loses its digits. An error of 1 is a gradient without a correct digit: such a row teaches nothing,
  or the wrong thing. (`grad_error_overall` in the records is relative to the largest element of all rows and hides
  this: in a wrongly classified row that element is 1.)

No result can be better than the exact one rounded once to the logits' dtype, the column `rounding`. Below the smallest
normal number a dtype has fewer digits, so there errors are relative to that number.

*The cases* are values where the native loss or a peer fails, beside the exact ones. A mean over nothing is 0 / 0; no
answer to it is called wrong.

Liger runs on the CPU in Triton's interpreter, row after row in Python. It therefore gets few rows, and none in cases
that need many. The arithmetic is its kernels', with two exceptions: exp and log are numpy's, and bfloat16 results are
truncated where a GPU rounds them, which turns errors of up to 0.0039 into errors of up to 0.0078.

Records, a dictionary each, in which null stands for a number that is not finite, and `error` for an exception:

    table "grid":  dtype, scale, classes, rows, provider; loss_error, grad_error, grad_error_overall
    table "cases": case, quantity, provider; exact, exact_shown, value, shown, relative_error

`shown` is a number in a few characters, NaN and infinity included. In the grid `rounding` is among the providers.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import command_line, records
from .command_line import Item
from .pages import Section
from .providers import REGISTRY, Provider, importable
from .records import Refused
from .shapes import Inputs
from .tables import Block, Table, failures, red

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (1, 5, 20)
CLASSES = (10, 1000, 32_000, 128_256)
ROWS = 32
QUICK = {"scales": (1, 20), "classes": (10, 32_000), "rows": 8}

# In place the arithmetic is the same; compiling takes seconds for every shape; hidden states are no logits.
LEFT_OUT = ("ours in place", "native compiled", "cut-cross-entropy")
INTERPRETED_ROWS = 4096  # 2 ms each
WRONG = 0.01  # relative errors above are red


# ---- exact -------------------------------------------------------------------------------------------------


def exact(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's loss, and the gradient of their sum, in float64. An ignored row has loss and gradient 0."""
    x = logits.double()
    if target.is_floating_point():
        return exact_of_probabilities(x, target.double())
    losses, gradient = x.new_zeros(len(x)), torch.zeros_like(x)
    counts = target != -100
    x, y = x[counts], target[counts].unsqueeze(1)
    true = x.gather(1, y)
    # With r = log sum_{c != y} exp(x_c - x_y) the loss is log(1 + e^r) and p_y - 1 is -e^r / (1 + e^r). No 1 swallows
    # the others' sum: both are right at a margin of 40, where float64 knows no p_y but 1.
    others = x.scatter(1, y, -math.inf).logsumexp(1, keepdim=True) - true
    loss = torch.logaddexp(others, torch.zeros_like(others))
    losses[counts] = loss.squeeze(1)
    gradient[counts] = (x - true - loss).exp().scatter(1, y, -others.sigmoid())
    return losses, gradient


def exact_of_probabilities(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """A class of probability 0 adds nothing, also where its logit is -inf."""
    log_p = x.log_softmax(1)
    losses = -torch.where(q == 0, 0.0, q * log_p).sum(1)
    return losses, q.sum(1, keepdim=True) * log_p.exp() - q


def exact_mean(inputs: Inputs) -> tuple[Tensor, Tensor]:
    losses, gradient = exact(inputs.logits, inputs.target)
    count = int((inputs.target != -100).sum()) if not inputs.target.is_floating_point() else len(losses)
    if not count:
        return losses.new_tensor(0.0 if inputs.options.get("empty") == "zero" else math.nan), gradient
    return losses.sum() / count, gradient / count


# ---- providers ---------------------------------------------------------------------------------------------


def measured(device: str) -> list[Provider]:
    """All installed providers; on the CPU also Liger, in the interpreter. If it fails, its records say why."""
    found = [provider for provider in importable(device) if provider.name not in LEFT_OUT]
    if device == "cpu":
        found += [provider for provider in REGISTRY if provider.name == "liger"]
    return found


def check_rows(provider: Provider, rows: int, device: str) -> None:
    if device not in provider.devices and rows > INTERPRETED_ROWS:
        raise Refused(f"not run: {rows} rows take minutes in Triton's interpreter")


def forward(provider: Provider, inputs: Inputs) -> Tensor:
    check_rows(provider, len(inputs.logits), inputs.logits.device.type)
    with torch.no_grad():
        return provider.load()(inputs.logits.clone(), inputs.target, **inputs.options)


def forward_backward(provider: Provider, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The logits are the provider's own copy: some overwrite them."""
    check_rows(provider, len(inputs.logits), inputs.logits.device.type)
    logits = inputs.logits.clone().requires_grad_()
    loss = provider.load()(logits, inputs.target, **inputs.options)
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


# ---- the grid ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    dtype: torch.dtype
    scale: int
    classes: int
    rows: int

    def fields(self) -> dict:
        name = str(self.dtype).removeprefix("torch.")
        return {"table": "grid", "dtype": name, "scale": self.scale, "classes": self.classes, "rows": self.rows}

    def inputs(self, device: str) -> tuple[Tensor, Tensor]:
        """Drawn on the CPU: every device gets the same."""
        generator = torch.Generator().manual_seed(self.classes + self.scale)
        logits = torch.randn(self.rows, self.classes, generator=generator).mul_(self.scale).to(self.dtype)
        target = torch.randint(self.classes, (self.rows,), generator=generator)
        target[::2] = logits[::2].argmax(1)
        return logits.to(device), target.to(device)


def grid(quick: bool) -> list[Cell]:
    scales, classes = (QUICK["scales"], QUICK["classes"]) if quick else (SCALES, CLASSES)
    rows = QUICK["rows"] if quick else ROWS
    return [Cell(*found, rows) for found in itertools.product(DTYPES, scales, classes)]


def number(value: Tensor | float) -> float | None:
    """JSON has no NaN and no infinity."""
    value = float(value)
    return value if math.isfinite(value) else None


def errors(results: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> dict:
    """The errors that the head of this file defines."""
    smallest = torch.finfo(dtype).tiny
    (losses, gradient), (exact_losses, exact_gradient) = results, expected
    loss_error = (losses.double() - exact_losses).abs() / exact_losses.clamp_min(smallest)
    gradient_error = (gradient.double() - exact_gradient).abs().amax(1)
    largest = exact_gradient.abs().amax(1).clamp_min(smallest)
    return {
        "loss_error": number(loss_error.max()),
        "grad_error": number((gradient_error / largest).max()),
        "grad_error_overall": number(gradient_error.max() / largest.max()),
    }


def cell_records(cell: Cell, providers: list[Provider], device: str) -> list[dict]:
    logits, target = cell.inputs(device)
    expected = exact(logits, target)
    rounded = tuple(value.to(cell.dtype) for value in expected)
    found = [{**cell.fields(), "provider": "rounding", **errors(rounded, expected, cell.dtype)}]
    for provider in providers:
        record = {**cell.fields(), "provider": provider.name}
        try:
            losses = forward(provider, Inputs(logits, target, {"reduction": "none"}))
            _, gradient = forward_backward(provider, Inputs(logits, target, {"reduction": "sum"}))
            record |= errors((losses, gradient), expected, cell.dtype)
        except Exception as error:
            record["error"] = records.reason(error)
        found.append(record)
    return found


# ---- the cases ---------------------------------------------------------------------------------------------


def confident(margin: float, classes: int, dtype: torch.dtype) -> Inputs:
    """One row, whose label is ahead of all other classes by the margin."""
    logits = torch.zeros(1, classes, dtype=dtype)
    logits[0, 0] = margin
    return Inputs(logits, torch.tensor([0]))


def half_mean() -> Inputs:
    """More rows than float16 can count."""
    generator = torch.Generator().manual_seed(0)
    return Inputs(torch.randn(70_000, 4, generator=generator).half(), torch.randint(4, (70_000,), generator=generator))


def masked() -> Inputs:
    """Masks the first half of a vocabulary, which is a whole block of some kernels."""
    logits = torch.randn(2, 65_536, generator=torch.Generator().manual_seed(0))
    logits[:, :32_768] = -math.inf
    return Inputs(logits, torch.tensor([40_000, 65_535]))


def masked_probabilities() -> Inputs:
    logits = torch.tensor([[-math.inf, 1.0, 2.0, 3.0]])
    return Inputs(logits, torch.tensor([[0.0, 0.25, 0.25, 0.5]]))


def ignored(value: float, *targets: int, **options) -> Inputs:
    """Rows of 4 classes, the first of them filled with a value."""
    logits = torch.randn(len(targets), 4, generator=torch.Generator().manual_seed(0))
    logits[0] = value
    return Inputs(logits, torch.tensor(targets), options)


QUANTITIES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "loss": lambda loss, gradient, target: loss,
    "label's gradient": lambda loss, gradient, target: gradient[0, target[0]],
    "largest gradient": lambda loss, gradient, target: gradient.abs().amax(),
    "first row's largest gradient": lambda loss, gradient, target: gradient[0].abs().amax(),
}


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], Inputs]
    quantities: tuple[str, ...] = ("loss", "label's gradient")  # names of QUANTITIES

    def inputs(self, device: str) -> Inputs:
        inputs = self.make()
        return Inputs(inputs.logits.to(device), inputs.target.to(device), inputs.options)


CASES = [
    Case("float32, margin 20, 10 classes", lambda: confident(20, 10, torch.float32)),
    Case("float32, margin 40, 10 classes", lambda: confident(40, 10, torch.float32)),
    Case("bfloat16, margin 5, 2 classes", lambda: confident(5, 2, torch.bfloat16)),
    Case("float16, mean of 70,000 rows", half_mean, ("loss", "largest gradient")),
    Case("-inf in the first 32,768 of 65,536 classes", masked),
    Case("probability 0 at a logit of -inf", masked_probabilities, ("loss", "largest gradient")),
    Case("NaN in an ignored first row", lambda: ignored(math.nan, -100, 1), ("loss", "first row's largest gradient")),
    Case("mean, all ignored", lambda: ignored(1, -100, -100), ("loss", "largest gradient")),
    Case("mean, all ignored, empty='zero'", lambda: ignored(1, -100, -100, empty="zero"), ("loss", "largest gradient")),
]


def relative_error(value: float, expected: float) -> float:
    if value == expected:
        return 0.0
    return abs(value - expected) / abs(expected) if expected else math.inf


def case_records(case: Case, providers: list[Provider], device: str) -> list[dict]:
    inputs = case.inputs(device)
    expected = exact_mean(inputs)
    found = []
    for provider in providers:
        try:
            results, error = forward_backward(provider, inputs), None
        except Exception as raised:
            results, error = None, records.reason(raised)
        for name in case.quantities:
            exactly = float(QUANTITIES[name](*expected, inputs.target))
            record = {"table": "cases", "case": case.name, "quantity": name, "provider": provider.name}
            record |= {"exact": number(exactly), "exact_shown": shown(exactly)}
            if results is None:
                record["error"] = error
            else:
                value = float(QUANTITIES[name](*results, inputs.target))
                difference = number(relative_error(value, exactly))
                record |= {"value": number(value), "relative_error": difference, "shown": shown(value)}
            found.append(record)
    return found


# ---- tables and pages -----------------------------------------------------------------------------------------------


def shown(value: float) -> str:
    return f"{value:.4g}"


def is_wrong(error: float | None) -> bool:
    """An error that is not finite is a large one."""
    return error is None or error > WRONG


def grid_table(found: list[dict], detail: bool = False) -> Table:
    """A row for each cell of the grid, a column for each error and provider. With `detail` large errors are red."""
    found = [record for record in found if record["table"] == "grid" and "provider" in record]
    providers = list(dict.fromkeys(record["provider"] for record in found))
    points: dict[tuple, dict] = {}
    for record in found:
        points.setdefault((record["dtype"], record["scale"], record["classes"]), {})[record["provider"]] = record

    def cell(record: dict, name: str) -> str:
        if name not in record:
            return "-"
        error = record[name]
        return red("-" if error is None else f"{error:.1e}", detail and is_wrong(error))

    rows = [
        [
            *map(str, point),
            *(cell(of.get(name, {}), what) for what in ("loss_error", "grad_error") for name in providers),
        ]
        for point, of in points.items()
    ]
    header = ["dtype", "scale", "C", *(f"{what}, {name}" for what in ("loss", "gradient") for name in providers)]
    return Table(header, rows, 1, "Worst relative error of a row. Red: above 1%")


def cases_table(found: list[dict], detail: bool = False) -> Table:
    """A row for each quantity of a case, a column for each provider. With `detail` wrong values are red."""
    found = [record for record in found if record["table"] == "cases" and "quantity" in record]
    providers = list(dict.fromkeys(record["provider"] for record in found))
    points: dict[tuple, dict] = {}
    for record in found:
        point = record["case"], record["quantity"], record["exact_shown"]
        points.setdefault(point, {})[record["provider"]] = record

    def cell(record: dict) -> str:
        wrong = "shown" in record and record["exact"] is not None and is_wrong(record["relative_error"])
        return red(record.get("shown", "-"), detail and wrong)

    rows = [[*point, *(cell(of.get(name, {})) for name in providers)] for point, of in points.items()]
    return Table(["case", "quantity", "exact", *providers], rows, 2, "Values. Red: off by more than 1%")


def blocks(device: str, result: dict) -> list[Block]:
    return [
        "Errors against float64, for normal logits of standard deviation `scale`: of the loss of the worst row, "
        "relative; of the gradient of the worst row, relative to the row's largest element. `rounding` is the error of "
        "the exact result rounded to its dtype, the least that is possible. On a CPU Liger runs in Triton's "
        "interpreter, which truncates bfloat16 where a GPU rounds.",
        grid_table(result["records"]),
        "Where it matters:",
        cases_table(result["records"]),
    ]


SECTION = Section("accuracy", "Accuracy", blocks)


def console_blocks(found: list[dict]) -> list[Block]:
    reasons = {}  # each error once, with its case if it is not one of the grid
    for record in found:
        if "error" in record:
            reasons.setdefault((record.get("provider", ""), record["error"]), record.get("case"))
    named = ((provider + (f", {case}" if case else ""), {"error": e}) for (provider, e), case in reasons.items())
    return [grid_table(found, detail=True), cases_table(found, detail=True), failures(named)]


def main() -> None:
    arguments = command_line.parse(command_line.parser_of(__doc__, "accuracy", "fewer scales, classes and rows"))
    device = arguments.device
    if device == "cpu":
        # Triton reads it when kernels are defined: before the first import of Liger, which `providers` leaves to
        # load(), and of torch.compile's backend.
        os.environ["TRITON_INTERPRET"] = "1"
        warnings.filterwarnings("ignore", module="triton.runtime.interpreter")  # numpy's, where a kernel makes a NaN
    providers = measured(device)
    items = []
    for cell in grid(arguments.quick):
        name = f"{cell.dtype}, scale {cell.scale}, {cell.classes} classes"
        items.append(Item(name, [cell.fields()], functools.partial(cell_records, cell, providers, device)))
    for case in CASES:
        failed = {"table": "cases", "case": case.name}
        items.append(Item(case.name, [failed], functools.partial(case_records, case, providers, device)))
    command_line.measure_all(arguments, items, console_blocks, lambda record: record.get("provider", "ours") == "ours")


if __name__ == "__main__":
    main()

"""What the examples print and draw: command line, tables, figures."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from types import ModuleType

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NATIVE = "PyTorch"
OURS = "ours"
OURS_IN_PLACE = "ours, in place"

COLOURS = {NATIVE: "#8a8f98", OURS: "#0072b2", OURS_IN_PLACE: "#d55e00"}
INK = "#22262b"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": "#b5bac1",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
}

console = Console()


def parse_arguments(program: str, description: str, given: Sequence[str] | None) -> argparse.Namespace:
    """The command line that the short examples have in common."""
    parser = argparse.ArgumentParser(
        program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, in seconds")
    parser.add_argument(
        "--output", type=Path, default=Path(f"{program}.png"), help=f"the figure (default {program}.png, here)"
    )
    return parser.parse_args(given)


def pyplot() -> ModuleType:
    """matplotlib without a display; imported only where something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


@contextlib.contextmanager
def figure(path: Path, title: str, columns: int, rows: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure in this style, written to a file at the end, and its axes row by row."""
    plt = pyplot()
    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(
            rows, columns, figsize=(4.2 * columns, 0.6 + 3.4 * rows), squeeze=False, layout="constrained"
        )
        drawn.suptitle(title, fontsize=14, fontweight="bold", x=0.012, ha="left")
        yield drawn, list(axes.flat)
        save(plt, drawn, path)
    console.print(f"Figure: {path}", highlight=False)


def save(plt: ModuleType, drawn: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=130)
    plt.close(drawn)


def draw_runs(axes: Axes, title: str, unit: str, runs: dict[str, list[dict]], what: str) -> None:
    """The mean of several runs of each variant, and between which curves they all are."""
    for (name, found), colour in zip(runs.items(), COLOURS.values(), strict=False):
        points = list(zip(*(curves[what] for curves in found), strict=True))
        steps = range(1, len(points) + 1)
        axes.fill_between(steps, [*map(min, points)], [*map(max, points)], color=colour, alpha=0.2, linewidth=0)
        axes.plot(steps, [*map(mean, points)], color=colour, linewidth=2, label=name)
    axes.set_title(title)
    axes.set_xlabel(unit)
    axes.grid(True)
    axes.legend(frameon=False)


def mean_of_last(runs: list[dict], what: str, form: str = ".1%") -> str:
    return format(mean(curves[what][-1] for curves in runs), form)


def print_rows(title: str, header: Sequence[str], rows: dict[str, Sequence[str]]) -> None:
    """A table with a row for each variant."""
    table = Table(title=title)
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)


def equal_curves(curves: dict[str, list[float]], unit: str, tolerance: float) -> bool:
    """Print how far each curve is from PyTorch's, and say whether all are within the tolerance."""
    reference, all_equal = curves[NATIVE], True
    for name, curve in curves.items():
        if name == NATIVE:
            continue
        # A NaN would compare false with anything, so that "within" has to be what is asked.
        differences = [abs(a - b) for a, b in zip(curve, reference, strict=True)]
        equal = all(difference <= tolerance for difference in differences)
        all_equal &= equal
        verdict = "[green]equal to[/]" if equal else "[red]DIFFERENT FROM[/]"
        console.print(
            f"[bold]{name}[/]: {verdict} {NATIVE}'s loss in every {unit}, "
            f"largest difference {max(differences):.1e} (tolerance {tolerance:.0e})",
            highlight=False,
        )
    return all_equal


@dataclass(frozen=True)
class Summary:
    """Losses of every step, medians of the timed ones, and peak memory above the baseline."""

    losses: list[float]
    forward_ms: float
    backward_ms: float
    step_ms: float
    tokens_per_s: float
    peak_mib: float

    @property
    def loss_ms(self) -> float:
        """Time in the loss, forward and backward."""
        return self.forward_ms + self.backward_ms


def print_curves(unit: str, curves: dict[str, list[float]], every: int, tolerance: float) -> bool:
    """Print losses side by side and say whether all of them lie within the tolerance of PyTorch's."""
    reference = curves[NATIVE]
    table = Table(title=f"Mean loss by {unit} (nats)")
    table.add_column(unit, justify="right")
    for name in curves:
        table.add_column(name, justify="right")
    for i in sorted({0, *range(every - 1, len(reference), every)}):
        table.add_row(str(i + 1), *(f"{curve[i]:.6f}" for curve in curves.values()))
    console.print(table)

    return equal_curves(curves, unit, tolerance)


def print_summary(summaries: dict[str, Summary], timed_steps: int) -> None:
    """Print the comparison of times and memory, each with its ratio to PyTorch."""
    native = summaries[NATIVE]
    table = Table(
        title=f"Model (b), medians of {timed_steps} steps",
        caption="Peak memory: resident memory above that before the first step, everything included.",
        caption_justify="left",
    )
    table.add_column("")
    for name in summaries:
        table.add_column(name, justify="right", style="bold" if name != NATIVE else None)

    def row(label: str, form: str, value: Callable[[Summary], float], *, last: bool = False) -> None:
        values = map(value, summaries.values())
        table.add_row(label, *(format(v, form) for v in values), end_section=last)

    row("loss, forward (ms)", ".1f", lambda s: s.forward_ms)
    row("loss, backward (ms)", ".1f", lambda s: s.backward_ms)
    row("loss, both (ms)", ".1f", lambda s: s.loss_ms)
    row("  times faster", ".2f", lambda s: native.loss_ms / s.loss_ms, last=True)
    row("whole step (ms)", ".1f", lambda s: s.step_ms)
    row("  of it in the loss", ".0%", lambda s: s.loss_ms / s.step_ms)
    row("tokens per second", ",.0f", lambda s: s.tokens_per_s)
    row("  times as many", ".2f", lambda s: s.tokens_per_s / native.tokens_per_s, last=True)
    row("peak memory (MiB)", ",.0f", lambda s: s.peak_mib)
    row("  of PyTorch's", ".0%", lambda s: s.peak_mib / native.peak_mib)
    console.print(table)


def draw(
    path: Path, sonnet: dict[str, list[float]], summaries: dict[str, Summary], logits_mib: float, machine: str
) -> None:
    """Save the figure: both loss curves above, time in the loss, speed and memory of model (b) below."""
    plt = pyplot()
    with plt.rc_context(STYLE):
        drawn = plt.figure(figsize=(12, 8), layout="constrained")
        drawn.get_layout_engine().set(w_pad=0.12, h_pad=0.12, hspace=0.04)
        grid = drawn.add_gridspec(2, 6, height_ratios=(1.1, 1))
        drawn.suptitle(
            "Two language models, trained with PyTorch's cross-entropy loss and with ours",
            fontsize=15,
            fontweight="bold",
            x=0.012,
            ha="left",
        )

        draw_curves(drawn.add_subplot(grid[0, :3]), "(a) Sonnet 2, n-gram model", "epoch", sonnet)
        curves = {name: summary.losses for name, summary in summaries.items()}
        draw_curves(drawn.add_subplot(grid[0, 3:]), "(b) Standard library source, transformer", "step", curves)

        axes = drawn.add_subplot(grid[1, :2])
        times = {name: s.loss_ms for name, s in summaries.items()}
        _bars(axes, "(b) Time in the loss", "ms per step", times, "less")
        _split(axes, summaries)

        speeds = {name: s.tokens_per_s for name, s in summaries.items()}
        _bars(drawn.add_subplot(grid[1, 2:4]), "(b) Training speed", "tokens/s, whole step", speeds, "more")

        axes = drawn.add_subplot(grid[1, 4:])
        peaks = {name: s.peak_mib for name, s in summaries.items()}
        _bars(axes, "(b) Peak memory of training", "MiB above the baseline", peaks, "less")
        axes.axhline(logits_mib, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(2.45, logits_mib, "the logits\nalone", va="center", ha="left", fontsize=8.5)

        drawn.supxlabel(
            f"{machine}. Times are medians over steps taken in turn.",
            fontsize=8.5,
            color="#6b7178",
            x=0.012,
            ha="left",
        )
        save(plt, drawn, path)


def draw_curves(axes: Axes, title: str, unit: str, curves: dict[str, list[float]]) -> None:
    """Curves that coincide stay visible: the first is a broad band, the next a line in it, the last dots."""
    looks = (
        {"linewidth": 7, "alpha": 0.55, "solid_capstyle": "round"},
        {"linewidth": 2},
        {"linestyle": "none", "marker": "o", "markersize": 3.5},
    )
    for (name, curve), look in zip(curves.items(), looks, strict=False):
        axes.plot(range(1, len(curve) + 1), curve, color=COLOURS[name], label=name, **look)
    axes.set_title(title)
    axes.set_xlabel(unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("mean loss (nats)")
    axes.grid(True)
    axes.legend(frameon=False)


def _bars(axes: Axes, title: str, label: str, values: dict[str, float], better: str) -> None:
    """One bar per variant, with its value and its ratio to PyTorch's."""
    axes.set_title(title)
    axes.set_ylabel(f"{label} ({better} is better)")
    axes.grid(True, axis="y")
    axes.tick_params(axis="x", length=0)
    bars = axes.bar(list(values), list(values.values()), width=0.62, color=[COLOURS[name] for name in values])
    native = values[NATIVE]
    texts = [
        f"{value:,.0f}" if name == NATIVE else f"{value:,.0f}\n×{value / native:.2f}" for name, value in values.items()
    ]
    axes.bar_label(bars, texts, padding=3, fontsize=9.5, fontweight="bold")
    axes.margins(y=0.17)
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _split(axes: Axes, summaries: dict[str, Summary]) -> None:
    """Shade the forward part of each bar of times, and name its parts where there is room for both."""
    readable = 0.07 * max(summary.loss_ms for summary in summaries.values())
    for x, summary in enumerate(summaries.values()):
        axes.bar(x, summary.forward_ms, width=0.62, color="white", alpha=0.45)
        for part, bottom, height, colour in (
            ("forward", 0.0, summary.forward_ms, INK),
            ("backward", summary.forward_ms, summary.backward_ms, "white"),
        ):
            if min(summary.forward_ms, summary.backward_ms) > readable:
                axes.text(x, bottom + height / 2, part, ha="center", va="center", color=colour, fontsize=8.5)

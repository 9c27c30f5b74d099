"""Draws the SVG figures of docs/benchmarks.md and of the README.

Labels stay text; tests compare them with the results.
"""

from __future__ import annotations

import math
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
COLOURS = {  # of the providers, in the order of the bars
    "native": "#b8bec7",
    "native compiled": "#8a8f98",
    "liger": "#c99a2e",
    "quack": "#7a9a3a",
    "flash-attn": "#b06a3b",
    "apex": "#8d6bb0",
    "unsloth": "#3f9c8c",
    "ours": "#0072b2",
    "ours in place": "#56b4e9",
    "copy": "#22262b",
}
INK = "#22262b"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cross_entropy_ext",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b5bac1",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
}


def link(device: str, name: str, title: str, folder: str = "benchmarks") -> str:
    """Markdown that shows a figure, if it was drawn."""
    file = f"{device}-{name}.svg"
    return f"![{title}]({folder}/{file})" if (FOLDER / file).exists() else ""


def pyplot() -> object:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def save(plt: object, figure: object, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def bars(result: dict) -> list[tuple[str, dict[str, float]]]:
    """For each case of a million elements or more, the training steps' times in copies of the logits, by provider."""
    found: dict[str, dict[str, float]] = {}
    for record in result["records"]:
        drawn = record["direction"] == "forward+backward" and "copies" in record and record["provider"] in COLOURS
        if drawn and "wrong" not in record and math.prod(record["shape"]) >= 1_000_000:
            found.setdefault(record["case"], {})[record["provider"]] = record["copies"]
    return list(found.items())


def label(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def draw_run(device: str, result: dict, folder: Path) -> None:
    plt = pyplot()
    groups = bars(result)[::-1]
    if not groups:
        return
    providers = [name for name in COLOURS if any(name in values for _, values in groups)]
    height = 0.8 / len(providers)
    each = max(0.5, 0.11 * len(providers))  # inches of a group
    figure, axis = plt.subplots(figsize=(8.8, 1.2 + each * len(groups)), layout="constrained")
    for row, (_, values) in enumerate(groups):
        for place, name in enumerate(providers):
            if name not in values:
                continue
            y = row + 0.4 - height * (place + 0.5)
            axis.barh(y, values[name], height=height, color=COLOURS[name])
            bold = "bold" if name == "ours" else "normal"
            axis.text(values[name] * 1.02, y, label(values[name]), va="center", fontsize=6.5, fontweight=bold)
    axis.axvline(1, color=COLOURS["copy"], linewidth=0.8, linestyle=(0, (4, 3)))
    axis.set_xscale("log")
    ticks = [1, 2, 4, 8, 16, 32, 64]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(groups)), [name for name, _ in groups])
    axis.set_ylim(-0.6, len(groups) - 0.4)
    axis.tick_params(axis="y", length=0)
    axis.grid(True, axis="x")
    axis.set_xlabel("time of forward + backward; 1 is the time to copy the logits")
    patches = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in providers]
    figure.legend(patches, providers, frameon=False, ncols=len(providers), loc="outside upper right")
    save(plt, figure, folder / f"{device}-run.svg")


def draw_scaling(device: str, result: dict, folder: Path) -> None:
    plt = pyplot()
    draw_curves(plt, result, "classes", "classes", "layout", folder / f"{device}-classes.svg")
    draw_curves(plt, result, "rows", "rows", "classes", folder / f"{device}-rows.svg")


def draw_curves(plt: object, result: dict, curve: str, along: str, panels: str, path: Path) -> None:
    """Nanoseconds per element, in one panel for each value of `panels`."""
    points = [r for r in result["records"] if r["curve"] == curve and "ns_per_element" in r]
    names = list(dict.fromkeys(record[panels] for record in points))
    if not names:
        return
    figure, axes = plt.subplots(1, len(names), figsize=(8.8, 3.4), sharey=True, layout="constrained", squeeze=False)
    handles: dict[str, object] = {}
    for axis, name in zip(axes[0], names, strict=True):
        for provider in dict.fromkeys(record["provider"] for record in points):
            line = [(r[along], r["ns_per_element"]) for r in points if r["provider"] == provider and r[panels] == name]
            style = (
                {"linestyle": (0, (4, 3)), "linewidth": 1} if provider == "copy" else {"marker": "o", "markersize": 2.5}
            )
            if line:
                (handles[provider],) = axis.plot(*zip(*line, strict=True), color=COLOURS[provider], **style)
        axis.set_xscale("log", base=10)
        axis.set_yscale("log")
        axis.grid(True)
        axis.set_title(name if isinstance(name, str) else f"C = {name}", loc="left", fontsize=9)
        axis.set_xlabel(along)
    axes[0][0].set_ylabel("ns per element")
    figure.legend(handles.values(), handles, frameon=False, ncols=len(handles), loc="outside upper right")
    save(plt, figure, path)


def draw_training(device: str, result: dict, folder: Path) -> None:
    """Draws a bar for each variant, with the loss's part hatched."""
    plt = pyplot()
    measured = [record for record in result["records"] if "step_ms" in record]
    models = list(dict.fromkeys(record["model"] for record in measured))
    if not models:
        return
    figure, axes = plt.subplots(1, len(models), figsize=(8.8, 3.4), layout="constrained", squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        records = [record for record in measured if record["model"] == model]
        for x, record in enumerate(records):
            colour = COLOURS[record["loss"]]
            axis.bar(x, record["step_ms"], color=colour, width=0.7)
            if record["loss_ms"] is not None:
                axis.bar(x, record["loss_ms"], color="white", alpha=0.5, width=0.7, hatch="///", edgecolor=colour)
            axis.text(x, record["step_ms"], label(record["step_ms"]), ha="center", va="bottom", fontsize=7)
        names = [f"{r['loss']}{'' if r['mode'] == 'eager' else ', compiled'}" for r in records]
        axis.set_xticks(range(len(records)), names, rotation=40, ha="right", fontsize=7)
        axis.set_title(model, loc="left", fontsize=8.5)
    axes[0][0].set_ylabel("ms for a step; hatched: in the loss")
    save(plt, figure, folder / f"{device}-training.svg")

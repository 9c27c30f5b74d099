"""Draws a result of benchmarks.cpu: python -m benchmarks.figure benchmarks/results/cpu.json docs/cpu.svg"""

import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(source: str, destination: str) -> None:
    with open(source) as file:
        result = json.load(file)
    records = result["records"][::-1]
    labels = [record["case"] for record in records]
    figure, axis = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    positions = range(len(records))
    axis.barh(positions, [1.0] * len(records), color="#d9dde3", height=0.72, label="PyTorch")
    axis.barh(
        positions,
        [record["ours_ms"] / record["native_ms"] for record in records],
        color="#1f6f8b",
        height=0.72,
        label="cross_entropy_ext",
    )
    for y, record in zip(positions, records, strict=True):
        share = record["ours_ms"] / record["native_ms"]
        axis.text(share + 0.012, y, f"{record['speedup']:.1f}x faster", va="center", fontsize=9, color="#123b4a")
    axis.set_yticks(positions, labels, fontsize=9)
    axis.set_xlim(0, 1)
    axis.set_xlabel("time of forward + backward, native eager = 1")
    machine = result["machine"]
    axis.set_title(
        f"{machine['threads']} threads, {machine['instruction_set']}, torch {machine['torch_running']}; medians of "
        "interleaved runs",
        fontsize=9,
        loc="left",
    )
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)
    figure.legend(frameon=False, fontsize=9, loc="outside lower right", ncols=2)
    figure.savefig(destination)


if __name__ == "__main__":
    main(*sys.argv[1:])

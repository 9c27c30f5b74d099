"""Turns the result files into docs/benchmarks.md, its figures, and what the README says of them.

    python -m benchmarks.report

It measures nothing: every number comes from benchmarks/results/<device>/*.json.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from . import figures, limits
from . import records as files
from .providers import PEERS

ROOT = Path(__file__).parents[1]
PAGE, README, FIGURES = ROOT / "docs" / "benchmarks.md", ROOT / "README.md", ROOT / "docs" / "benchmarks"
BEGIN = "<!-- From here on `python -m benchmarks.report` writes. -->"
BEGIN_IDIOMS = "<!-- `python -m benchmarks.report` writes this table, too. -->"
BEGIN_LINEAR = "<!-- `python -m benchmarks.report` writes this table of the output layer, too. -->"
BEGIN_SHARDS = "<!-- `python -m benchmarks.report` writes what was measured of sharded classes, too. -->"
END = "<!-- Up to here. -->"
PARTS = ("run", "kernels", "counters", "idioms", "linear", "vocab_parallel", "scaling", "training", "frameworks")
PARTS += ("accuracy",)
ONLY = {"kernels": "gpu", "counters": "gpu", "vocab_parallel": "cpu"}  # what other devices do not have
TRAINING, EVALUATION, BACKWARD = "forward+backward", "forward", "backward"

Groups = dict[tuple[str, str], dict[str, dict]]  # (case, direction): provider: record


# ---- what the numbers say -------------------------------------------------------------------------------------------


def grouped(result: dict) -> Groups:
    """The records of a run by case and direction. A copy belongs to the case it was measured with."""
    groups: Groups = {}
    key = None
    for record in result["records"]:
        if record["direction"] != "copy":
            key = record["case"], record["direction"]
        groups.setdefault(key, {})[record["provider"]] = record
    return groups


def ratios(groups: Groups, direction: str, over: str, of: str = "ours") -> list[float]:
    """How many times longer `over` takes than `of`, case by case."""
    found = []
    for (_, this), providers in groups.items():
        records = [providers.get(name, {}) for name in (over, of)]
        times = [None if "wrong" in record else record.get("median_ms") for record in records]
        if this == direction and all(times):
            found.append(times[0] / times[1])
    return found


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def elements(record: dict) -> int:
    return math.prod(record["shape"])


def large_float32(groups: Groups, provider: str) -> list[float]:
    """Copies of the logits that a training step takes, in float32 from a million elements on."""
    return [
        providers[provider]["copies"]
        for (_, direction), providers in groups.items()
        if direction == TRAINING
        and "copies" in providers.get(provider, {})
        and providers[provider]["dtype"] == "float32"
        and elements(providers[provider]) >= 1_000_000
    ]


def described(result: dict) -> str:
    """The machine and the versions, in a sentence."""
    machine, versions = result["machine"], result["versions"]
    if "gpu" in machine:
        what = f"{machine['gpu']} (sm_{machine['capability'].replace('.', '')}), CUDA {versions['cuda']}"
    else:
        what = f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}"
    peers = [f"{name} {versions[name]}" for name in files.PACKAGES if versions.get(name)]
    return f"{what}; torch {versions['torch']}, Python {versions['python']}" + "".join(f", {peer}" for peer in peers)


def summary(result: dict) -> str:
    groups = grouped(result)
    native, compiled = ratios(groups, TRAINING, "native"), ratios(groups, TRAINING, "native compiled")
    if not native:
        return "No training step was measured next to the native loss."
    text = (
        f"Forward and backward, {len(native)} cases: {geometric_mean(native):.1f} times as fast as the native loss in "
        f"the geometric mean, {min(native):.1f} to {max(native):.1f} times"
    )
    if compiled:
        text += (
            f"; {geometric_mean(compiled):.1f} times as fast as the native loss compiled ({min(compiled):.1f} to "
            f"{max(compiled):.1f})"
        )
    for peer in PEERS:
        if found := ratios(groups, TRAINING, peer):
            text += f"; {geometric_mean(found):.1f} times as fast as {peer} ({min(found):.1f} to {max(found):.1f}"
            text += f", {len(found)} cases)"
    fresh, in_place = large_float32(groups, "ours"), large_float32(groups, "ours in place")
    if not fresh or not in_place:
        return f"{text}."
    return (
        f"{text}. From a million elements on, in float32, that is {min(fresh):.1f} to {max(fresh):.1f} times what "
        f"copying the logits takes, and {min(in_place):.1f} to {max(in_place):.1f} times with `inplace=True`."
    )


# ---- tables ---------------------------------------------------------------------------------------------------------


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> str:
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * left + "---:|" * (len(header) - left)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def number(value: float | None, form: str = "") -> str:
    """Three digits or so."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    if form:
        return format(value, form)
    return (
        f"{value:.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 1
        else f"{value:.3f}"
    )


def quotient(a: float | None, b: float | None) -> float | None:
    """Where both were measured."""
    return a / b if a and b else None


def shape_of(record: dict) -> str:
    text = "x".join(map(str, record["shape"])) + f" {record['dtype']}"
    text += f", {record['layout']}" if record["layout"] != "contiguous" else ""
    text += ", probabilities" if record["target"] == "probabilities" else ""
    return text + (f", {record['options']}" if record["options"] else "")


def run_table(groups: Groups, direction: str) -> str:
    present = [name for name in PEERS if any(name in p and "median_ms" in p[name] for p in groups.values())]
    in_place = direction != EVALUATION
    names = ["native", "native compiled", *present, "ours", *(["ours in place"] if in_place else [])]
    rows = []
    for (case, this), providers in groups.items():
        if this != direction or "ours" not in providers:
            continue
        time: Callable[[str], float | None] = lambda name, p=providers: p.get(name, {}).get("median_ms")  # noqa: E731
        cells = [case, shape_of(providers["ours"]), *(number(time(name)) for name in [*names, "copy"])]
        cells += [number(quotient(time(name), time("ours")), ".1f") for name in ("native", "native compiled")]
        for name in ("ours", *(["ours in place"] if in_place else [])):
            cells.append(number(quotient(time(name), time("copy")), ".2f"))
        rows.append(cells)
    header = [
        "case",
        "logits",
        *(f"{name}, ms" for name in [*names, "copy"]),
        "native / ours",
        "compiled / ours",
        "copies",
    ]
    return markdown_table([*header, *(["copies, in place"] if in_place else [])], rows, left=2)


def memory_table(groups: Groups) -> str:
    present = [name for name in PEERS if any("peak_extra_bytes" in p.get(name, {}) for p in groups.values())]
    names = ("native", "native compiled", *present, "ours", "ours in place")
    rows = []
    for (case, direction), providers in groups.items():
        peaks = [providers.get(name, {}).get("peak_extra_bytes") for name in names]
        if direction != TRAINING or "ours" not in providers or elements(providers["ours"]) < 1_000_000:
            continue
        size = elements(providers["ours"]) * (2 if "16" in providers["ours"]["dtype"] else 4)
        cells = [case, f"{size / 2**20:.0f}", *("-" if peak is None else f"{peak / size:.2f}" for peak in peaks)]
        rows.append(cells)
    return markdown_table(["case", "logits, MiB", *names], rows)


def failures(groups: Groups) -> str:
    said = [
        f"* {case}, {direction}, {name}: {record.get('error') or record.get('wrong')}"
        for (case, direction), providers in groups.items()
        for name, record in providers.items()
        if ("error" in record or "wrong" in record) and name not in PEERS
    ]
    return "\n".join(["What failed, or was wrong:", "", *said]) if said else ""


def refusals(groups: Groups) -> str:
    """What peers said of training steps that they did not do, or did wrong, and of how many."""
    said: dict[tuple[str, str], list[str]] = {}
    for (case, direction), providers in groups.items():
        for name, record in providers.items():
            if direction == TRAINING and name in PEERS and ("error" in record or "wrong" in record):
                reason = record.get("error") or "other values than float64's: " + record["wrong"]
                said.setdefault((name, reason), []).append(case)
    lines = [
        f"* {name}: {reason} ({'; '.join(cases) if len(cases) < 4 else f'{len(cases)} cases'})"
        for (name, reason), cases in said.items()
    ]
    return "\n".join(["Where peers have no time of a training step, or another value:", "", *lines]) if lines else ""


def limits_table(device: str) -> str:
    rows = [
        [one.what, number(one.measured, ".3f"), f"{one.most:.2f}", one.said + (f": {one.note}" if one.note else "")]
        for part, found in limits.PARTS.items()
        for one in found(files.read(device, part))
    ]
    return markdown_table(["", "measured", "at most", ""], rows)


def kernels_table(result: dict) -> str:
    rows = []
    for record in result["records"]:
        where = [record["case"], dimensions(record) + f" {record['dtype']}" if "shape" in record else "-"]
        where += [record["launch"], f"`{record['kernel']}`"]
        if "error" in record:
            rows.append([*where, record["error"], "-", "-", "-"])
            continue
        times = [number(record.get(name), ".4f") for name in ("median_ms", "floor_ms")]
        rows.append([*where, f"{record['bytes'] / 2**20:.1f}", *times, number(record.get("ratio"), ".2f")])
    header = ["case", "logits", "launch", "kernel", "MiB", "ms", "floor, ms", "time / floor"]
    return markdown_table(header, rows, left=4)


def counters_table(result: dict) -> str:
    rows = []
    for record in result["records"]:
        moved = None if record["dram_bytes"] is None else record["dram_bytes"] / 2**20
        cells = [record["case"], record["launch"], f"`{record['kernel']}`", number(record["ms"], ".4f")]
        cells += [number(moved, ".1f"), number(record["dram_ratio"], ".3f"), number(record["occupancy"], ".0f")]
        rows.append([*cells, f"{record['stall']} {record['stall_cycles']:.1f}" if record["stall"] else "-"])
    header = ["case", "launch", "kernel", "ms", "DRAM, MiB", "/ predicted", "occupancy, %", "longest stall, cycles"]
    return markdown_table(header, rows, left=3)


def pairs_of(result: dict) -> dict[str, dict[str, dict]]:
    """The records of what is written around the loss: name, then today, now and copy."""
    found: dict[str, dict[str, dict]] = {}
    for record in result["records"]:
        if record["table"] == "pairs" and "which" in record:
            found.setdefault(record["name"], {})[record["which"]] = record
    return found


def costs_of(result: dict) -> list[tuple[dict, dict]]:
    """Of each shape the plain loss, and what has a price."""
    records = [record for record in result["records"] if record["table"] == "cost" and "over_plain" in record]
    plain = {tuple(r["shape"]): r for r in result["records"] if r["table"] == "cost" and r.get("which") == "plain"}
    return [(plain[tuple(record["shape"])], record) for record in records]


def faster(group: dict[str, dict]) -> float | None:
    times = [group.get(which, {}).get("median_ms") for which in ("today", "now")]
    return times[0] / times[1] if all(times) else None


def gradients(record: dict) -> float | None:
    """The peak of memory, in gradients of the logits."""
    peak = record.get("peak_extra_bytes")
    return None if peak is None else peak / record["gradient_bytes"]


def dimensions(record: dict) -> str:
    return "x".join(map(str, record["shape"]))


def code_cell(lines: list[str]) -> str:
    return "<br>".join(f"`{line}`".replace("|", "\\|") for line in lines)


def usual_shape(groups: dict[str, dict[str, dict]]) -> str:
    """What most of the rows are measured on."""
    return statistics.mode(dimensions(group["now"]) for group in groups.values())


def idioms_table(groups: dict[str, dict[str, dict]]) -> str:
    usual, rows = usual_shape(groups), []
    for name, group in groups.items():
        today, now = group["today"], group["now"]
        shape = "" if dimensions(now) == usual else f", {dimensions(now)}"
        both = [[number(record.get("median_ms")), number(gradients(record), ".1f")] for record in (today, now)]
        cells = [" → ".join(pair) for pair in zip(*both, strict=True)]
        cells.insert(1, number(faster(group), ".1f"))
        rows.append([name + shape, code_cell(today["code"]), code_cell(now["code"]), *cells])
    return markdown_table(["", "today", "now", "time, ms", "times as fast", "memory"], rows, left=3)


def idioms_measures(groups: dict[str, dict[str, dict]]) -> str:
    rows = []
    for name, group in groups.items():
        cells = [name, dimensions(group["now"])]
        for record in (group["today"], group["now"], group["copy"]):
            cells.append(record.get("error") or number(record["median_ms"]))
        cells += [number(faster(group), ".1f"), number(group["now"].get("copies"), ".2f")]
        cells += [number(gradients(group[which]), ".2f") for which in ("today", "now")]
        rows.append(cells)
    header = ["", "logits", "today, ms", "now, ms", "copy, ms", "today / now", "copies", "memory today", "memory now"]
    return markdown_table(header, rows, left=2)


def idioms_code(groups: dict[str, dict[str, dict]]) -> str:
    blocks = []
    for name, group in groups.items():
        lines = [f"# {name}", *group["today"]["code"], "", "# now", *group["now"]["code"]]
        blocks.append("\n".join(["```python", *lines, "```"]))
    return "\n\n".join(blocks)


def costs_table(result: dict) -> str:
    rows = []
    for plain, record in costs_of(result):
        times = [number(plain["median_ms"]), number(record["median_ms"])]
        rows.append([record["name"], dimensions(record), *times, f"{record['over_plain'] - 1:+.1%}"])
    return markdown_table(["", "logits", "plain, ms", "with it, ms", "costs"], rows, left=2)


def steps_of(result: dict) -> dict[tuple[str, str], dict[str, dict]]:
    """The records of the output layer and its loss: (case, sizes), then provider."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for record in result["records"]:
        if "provider" in record:
            found.setdefault((record["case"], dimensions(record)), {})[record["provider"]] = record
    return found


def besides(record: dict) -> float | None:
    """What a step takes besides its gradients, in MiB."""
    peak = record.get("peak_extra_bytes")
    return None if peak is None else (peak - record["gradient_bytes"]) / 2**20


def linear_table(result: dict) -> str:
    rows = []
    for (case, sizes), providers in steps_of(result).items():
        for name, record in providers.items():
            said = record.get("error") or record.get("wrong")
            cells = [number(record.get("median_ms")), number(record.get("products"), ".2f")]
            cells += [number(besides(record), ".0f")]
            rows.append([f"{case}, {sizes}", name + (f": {said}" if said else ""), *cells])
    header = ["states x features x classes", "", "step, ms", "in units of the products", "MiB besides the gradients"]
    return markdown_table(header, rows, left=2)


def shards_table(result: dict) -> str:
    rows = [
        [
            f"{record['ranks']} x ({' x '.join(map(str, record['shape']))}), {record['dtype']}",
            record["provider"] + (f": {record['wrong']}" if "wrong" in record else ""),
            number(record["median_ms"]),
            number(record["speedup"], ".1f"),
        ]
        for record in result["records"]
    ]
    return markdown_table(["processes x (positions x classes of each)", "", "ms", "times as fast"], rows, left=2)


def training_table(result: dict) -> str:
    rows = []
    for record in result["records"]:
        if "error" in record:
            rows.append([record["model"], f"{record['loss']}, {record['mode']}", record["error"]])
            continue
        share, peak = record["loss_share"], record["peak_bytes"]
        rows.append(
            [
                record["model"],
                f"{record['loss']}, {record['mode']}",
                number(record["step_ms"]),
                number(record["loss_ms"]),
                "-" if share is None else f"{share:.0%}",
                "-" if peak is None else f"{peak / 2**20:.0f}",
            ]
        )
    return markdown_table(["model", "loss", "step, ms", "of it the loss, ms", "share", "peak, MiB"], rows, left=2)


def also(points: dict[tuple, dict], providers: Iterable[str]) -> list[str]:
    """Those of the providers that are at one of the points."""
    return [name for name in providers if any(name in values for values in points.values())]


def scaling_table(result: dict, curve: str, columns: list[str]) -> str:
    points: dict[tuple, dict] = {}
    for record in result["records"]:
        if record["curve"] == curve and "ns_per_element" in record:
            points.setdefault(tuple(record[name] for name in columns), {})[record["provider"]] = record[
                "ns_per_element"
            ]
    names = ("native", *also(points, ("native compiled", *PEERS)), "ours", "copy")
    rows = [[*map(str, point), *(number(values.get(name)) for name in names)] for point, values in points.items()]
    return markdown_table([*columns, *(f"{name}, ns" for name in names)], rows, left=len(columns))


def overhead_table(result: dict) -> str:
    points: dict[tuple, dict] = {}
    for record in result["records"]:
        if record["curve"] == "overhead" and "error" not in record:
            points.setdefault((record["case"], record["direction"]), {})[record["provider"]] = record["median_us"]
    names = ("native", "native compiled", *also(points, PEERS), "ours")
    rows = [[*point, *(number(values.get(name), ".1f") for name in names)] for point, values in points.items()]
    return markdown_table(["logits", "call", *(f"{name}, us" for name in names)], rows, left=2)


def grid_table(result: dict) -> str:
    providers = ("rounding", "ours", "native", "liger")
    points: dict[tuple, dict] = {}
    for record in result["records"]:
        if record["table"] == "grid":
            points.setdefault((record["dtype"], record["scale"], record["classes"]), {})[record["provider"]] = record
    rows = []
    for point, found in points.items():
        cells = [found.get(name, {}).get(what) for what in ("loss_error", "grad_error") for name in providers]
        rows.append([*map(str, point), *("-" if cell is None else f"{cell:.1e}" for cell in cells)])
    header = ["dtype", "scale", "C", *(f"{what}, {name}" for what in ("loss", "gradient") for name in providers)]
    return markdown_table(header, rows, left=1)


def cases_table(result: dict) -> str:
    providers = ("ours", "native", "liger")
    points: dict[tuple, dict] = {}
    exact: dict[tuple, str] = {}
    for record in result["records"]:
        if record["table"] == "cases":
            point = record["case"], record["quantity"]
            points.setdefault(point, {})[record["provider"]] = record.get("shown", "-")
            exact[point] = record["exact_shown"]
    rows = [[*point, exact[point], *(found.get(name, "-") for name in providers)] for point, found in points.items()]
    return markdown_table(["case", "quantity", "exact", *providers], rows, left=2)


# ---- pages ----------------------------------------------------------------------------------------------------------


def figure(device: str, name: str, title: str) -> str:
    """Where there was something to draw."""
    return f"![{title}](benchmarks/{device}-{name}.svg)" if (FIGURES / f"{device}-{name}.svg").exists() else ""


def device_page(device: str) -> list[str]:
    results = {part: files.read(device, part) for part in PARTS}
    first = next(result for result in results.values() if result)
    kind = "cpu" if device == "cpu" else "gpu"
    lines = [f"## {'CPU' if device == 'cpu' else first['machine']['gpu']}", ""]
    for part, result in results.items():
        if ONLY.get(part, kind) != kind:
            continue
        if result is None:
            lines += [f"Of `benchmarks.{part}` no result was recorded on this device.", ""]
            continue
        lines += [f"### {TITLES[part]}", "", f"`{result['command']}`, {result['date']}: {described(result)}.", ""]
        lines += [block for section in SECTIONS[part](device, result) for block in (section, "") if section]
    return lines


def run_section(device: str, result: dict) -> list[str]:
    groups = grouped(result)
    on_gpu = device != "cpu"
    return [
        summary(result),
        "What has to hold, on an H200:" if on_gpu else "",
        limits_table(device) if on_gpu else "",
        "Medians of interleaved turns. `copies` is the time of ours in units of copying the logits, one read and one "
        "write. In place means `inplace=True`.",
        figure(device, "run", "Time in units of a copy of the logits"),
        "#### Training: forward and backward",
        run_table(groups, TRAINING),
        "#### Evaluation: forward without gradients",
        run_table(groups, EVALUATION),
        "#### The backward alone" if on_gpu else "",
        "After a forward that is not timed. Who makes the gradient in the forward has little left to do."
        if on_gpu
        else "",
        run_table(groups, BACKWARD) if on_gpu else "",
        "#### Memory",
        "The peak of a training step on top of the logits, in sizes of the logits.",
        memory_table(groups),
        failures(groups),
        refusals(groups),
    ]


KERNELS = (
    "Each kernel's time by the profiler, and its floor: the bytes that it has to move at the bandwidth of the copy in "
    "the first row. A training step has the launches from `before` to `handed over`, the last of which finds that the "
    "gradient is there."
)


def kernels_section(device: str, result: dict) -> list[str]:
    return [KERNELS, kernels_table(result)]


def counters_section(device: str, result: dict) -> list[str]:
    return [
        "One launch of each by Nsight Compute: bytes of memory over what was predicted, where a write that is still in "
        "the L2 cache does not count; warps that were active; and what a warp waited for longest, for an instruction.",
        counters_table(result),
    ]


def idioms_section(device: str, result: dict) -> list[str]:
    groups = pairs_of(result)
    return [
        "What people write around the loss today, in PyTorch, and what they write now; values and gradients of both "
        "are those of today's code in float64. Forward and backward in float32, medians of interleaved turns. `copies` "
        "is the time of now in units of copying the logits. Memory is the peak on top of the arguments, in sizes of "
        "the logits' gradient.",
        idioms_measures(groups),
        "What an argument costs over the plain loss; the median of the ratios of neighbouring turns:",
        costs_table(result),
        wrong_pairs(result),
        "<details><summary>The code</summary>",
        idioms_code(groups),
        "</details>",
    ]


LINEAR = (
    "Forward and backward, from hidden states, weight and labels to the loss and both gradients. `products` are the "
    "three matrix products alone, which whoever makes logits needs; times in units of theirs are medians of the ratios "
    "of neighbouring turns. Memory is the peak of a step on top of states, weight and labels, less the two gradients."
)


def linear_section(device: str, result: dict) -> list[str]:
    return [LINEAR, linear_table(result)]


SHARDS = (
    "Forward and backward of logits whose classes are sharded over processes of this machine, which share its cores "
    "and speak by gloo, until the last of them is done. `loss_parallel` is "
    "`torch.distributed.tensor.parallel.loss_parallel` with the native loss."
)


def shards_section(device: str, result: dict) -> list[str]:
    return [SHARDS, shards_table(result)]


def wrong_pairs(result: dict) -> str:
    said = [
        f"* {record['name']}, {record.get('which', '')}: {record.get('error') or record.get('wrong')}"
        for record in result["records"]
        if "error" in record or "wrong" in record
    ]
    return "\n".join(["What failed, or was wrong:", "", *said]) if said else ""


def scaling_section(device: str, result: dict) -> list[str]:
    sections = [
        figure(device, "classes", "Time for each element against the number of classes"),
        figure(device, "rows", "Time for each element against the number of rows"),
        EXPLAINED.get(device, ""),
    ]
    if any(record["curve"] == "threads" for record in result["records"]):
        sections += ["Threads, nanoseconds for each element:", scaling_table(result, "threads", ["case", "threads"])]
    return [
        *sections,
        "What a call costs where the logits are tiny, in microseconds: one evaluation, and the two halves of a "
        "training step.",
        overhead_table(result),
        "<details><summary>Every point of the curves</summary>",
        scaling_table(result, "classes", ["layout", "classes", "rows"]),
        scaling_table(result, "rows", ["classes", "rows"]),
        "</details>",
    ]


def training_section(device: str, result: dict) -> list[str]:
    return [
        "Whole training steps of small models on real data; every variant's loss agrees with native's, step by step.",
        figure(device, "training", "Time of a training step, and the loss's share of it"),
        training_table(result),
    ]


def frameworks_section(device: str, result: dict) -> list[str]:
    return [
        "Whole training steps of transformers' models as they are, which make their loss themselves from `labels=`: "
        "with the native loss, and after `patch_torch()`. Losses agree step by step.",
        training_table(result),
    ]


def accuracy_section(device: str, result: dict) -> list[str]:
    return [
        "Errors against float64, for normal logits of standard deviation `scale`: of the loss of the worst row, "
        "relative; of the gradient of the worst row, relative to the row's largest element. `rounding` is what "
        "rounding the exact result to its dtype costs, below which no error can be. On a CPU Liger runs in Triton's "
        "interpreter, which truncates bfloat16 where a GPU rounds.",
        grid_table(result),
        "Where it matters:",
        cases_table(result),
    ]


# Where a curve has a step, and why.
EXPLAINED = {
    "cpu": """Where the curves are not flat, and why:

* Fewer than 100 classes: what is done once for each position shows, a logarithm and a division, eight bytes of target
  read and eight of `lse` written. At two classes these are as many bytes as the logits.
* Planes of more than 160 classes: a tile of them does not fit the first-level cache, so loss and gradient read the
  logits one after the other; and the fewer positions there are, the shorter the runs of memory, down to 64 bytes.
* Few rows: a call's own cost, see below. Then the logits lie in the caches, whose end is a step, for the copy as well.
* From 64 MiB of logits on, the gradient is made in the backward, from a second read: made in the forward, it would lie
  in memory while the rest of the model's forward needs that."""
}
TITLES = {
    "run": "Every case",
    "kernels": "Each kernel",
    "counters": "Each kernel's counters",
    "idioms": "What is written around the loss",
    "linear": "The output layer and its loss",
    "vocab_parallel": "Sharded classes",
    "scaling": "Scaling",
    "training": "Training whole models",
    "frameworks": "Programs that know nothing of this package",
    "accuracy": "Accuracy",
}
SECTIONS = {
    "run": run_section,
    "kernels": kernels_section,
    "counters": counters_section,
    "idioms": idioms_section,
    "linear": linear_section,
    "vocab_parallel": shards_section,
    "scaling": scaling_section,
    "training": training_section,
    "frameworks": frameworks_section,
    "accuracy": accuracy_section,
}


def devices() -> list[str]:
    """The CPU first."""
    found = sorted(path.name for path in files.RESULTS.iterdir() if path.is_dir() and any(path.glob("*.json")))
    return sorted(found, key=lambda name: (name != "cpu", name))


def page() -> str:
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks.report` from `benchmarks/results/`. `python -m benchmarks.run` measures what "
        "follows on your machine; `benchmarks.idioms`, `benchmarks.linear`, `benchmarks.vocab_parallel`, "
        "`benchmarks.scaling`, "
        "`benchmarks.training`, `benchmarks.frameworks` and `benchmarks.accuracy` do the rest.",
        "",
    ]
    for device in devices():
        lines += device_page(device)
    if devices() == ["cpu"]:
        lines += [
            "## GPU",
            "",
            "No result of a GPU was recorded yet: `make gpu` on a machine that has one does it.",
            "",
        ]
    return "\n".join(lines)


def run_block() -> str:
    """At the head of the README: GPUs first."""
    results = {device: files.read(device, "run") for device in [*devices()[1:], "cpu"]}
    shown = [
        f"![Time of forward and backward in units of a copy of the logits](docs/benchmarks/{device}-run.svg)\n\n"
        f"{summary(result)}\n\nMeasured by `{result['command']}` ({described(result)})."
        for device, result in results.items()
        if result
    ]
    return (
        f"{BEGIN}\n" + "\n\n".join(shown) + " All cases, scaling, whole models, memory and accuracy: "
        f"[docs/benchmarks.md](docs/benchmarks.md).\n{END}"
    )


def idioms_block() -> str:
    """What people write around the loss, today and now."""
    result = files.read("cpu", "idioms")
    groups = pairs_of(result)
    costs = [f"{record['over_plain'] - 1:+.0%} ({dimensions(record)})" for _, record in costs_of(result)]
    text = (
        f"Forward and backward of {usual_shape(groups)} logits in float32, unless the row says otherwise. Memory is "
        "the peak on top of the arguments, in sizes of the logits' gradient, of which the gradient itself is one. "
        f"`sample_weight` costs {', '.join(costs)} over the plain loss.\n\n"
        f"Measured by `{result['command']}` ({described(result)})."
    )
    return f"{BEGIN_IDIOMS}\n\n{idioms_table(groups)}\n\n{text}\n{END}"


def linear_block() -> str:
    """The output layer with its loss."""
    result = files.read("cpu", "linear")
    return (
        f"{BEGIN_LINEAR}\n\n{linear_table(result)}\n\n{LINEAR}\n\n"
        f"Measured by `{result['command']}` ({described(result)}).\n{END}"
    )


def shards_block() -> str:
    """The loss of sharded classes."""
    result = files.read("cpu", "vocab_parallel")
    return (
        f"{BEGIN_SHARDS}\n\n{shards_table(result)}\n\n{SHARDS}\n\n"
        f"Measured by `{result['command']}` ({described(result)}).\n{END}"
    )


def with_blocks(readme: str) -> str:
    """Anew what is between the README's marks."""
    blocks = {BEGIN: run_block, BEGIN_IDIOMS: idioms_block, BEGIN_LINEAR: linear_block, BEGIN_SHARDS: shards_block}
    for begin, block in blocks.items():
        pattern = re.escape(begin) + ".*?" + re.escape(END)
        readme = re.sub(pattern, lambda _, block=block: block(), readme, flags=re.DOTALL)
    return readme


def main() -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    for device in devices():
        for part, draw in figures.DRAWN.items():
            result = files.read(device, part)
            if result:
                draw(device, result, FIGURES)
    PAGE.write_text(page())
    README.write_text(with_blocks(README.read_text()))
    print(f"{PAGE}\n{README}")


if __name__ == "__main__":
    main()

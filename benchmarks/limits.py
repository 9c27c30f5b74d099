"""The limits on an NVIDIA H200, all in one place, beside what was measured.

    python -m benchmarks.limits [FOLDER]

* COPIES: forward and backward of a case of `benchmarks.run`, in copies of its logits. A copy is one read and one write,
  as much as a loss has to move that makes the gradient together with the loss. Probabilities have to be read as well.
* No other loss is faster, in any case, in a training step or in an evaluation.
* A call costs the host less than the native one (`benchmarks.scaling`, the curve `overhead`).
* PRODUCTS: the output layer and its loss, in units of their three matrix products (`benchmarks.linear`).

FOLDER has the result files of a GPU; the default is where the commands put them. The table also lists limits for which
nothing was measured.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from . import records as files
from .tables import Table, dimensions, number, show

COPIES = {
    "Llama 3, bfloat16": 1.10,
    "Llama 2, bfloat16": 1.10,
    "VAR, bfloat16": 1.10,
    "ImageNet": 1.10,
    "MNIST, the whole set": 1.20,
    "Cityscapes": 1.20,
    "Cityscapes, channels_last": 1.20,
    "ADE20K": 1.20,
    "ADE20K, channels_last": 1.20,
    "Llama 2, bfloat16, probabilities": 1.65,
}
PRODUCTS = {"Llama 3's head, bfloat16": 1.08}
TRAINING, EVALUATION = "forward+backward", "forward"
NO_RIVALS = ("ours", "ours in place", "copy")


@dataclass(frozen=True)
class Limit:
    what: str
    measured: float | None  # in the unit that `what` says
    most: float
    note: str = ""

    @property
    def holds(self) -> bool | None:
        return None if self.measured is None else self.measured <= self.most

    @property
    def said(self) -> str:
        return {None: "not measured", True: "holds", False: "does not hold"}[self.holds]


Groups = dict[tuple[str, str], dict[str, dict]]  # (case, direction): provider: record


def by_case(result: dict | None) -> Groups:
    """The records that are right and were timed."""
    groups: Groups = {}
    for record in (result or {"records": []})["records"]:
        if "provider" in record:
            found = groups.setdefault((record["case"], record.get("direction", "")), {})
            if "error" not in record and "wrong" not in record:
                found[record["provider"]] = record
    return groups


def of_run(result: dict | None) -> list[Limit]:
    groups = by_case(result)
    found = []
    for case, most in COPIES.items():
        record = groups.get((case, TRAINING), {}).get("ours", {})
        shape = f", {dimensions(record)} {record['dtype']}" if record else ""
        found.append(Limit(f"{case}{shape}: copies of the logits", record.get("copies"), most))
    return found + [of_others(groups, direction) for direction in (TRAINING, EVALUATION)]


def of_peers(result: dict | None) -> list[Limit]:
    """Limits of a second run of `benchmarks.run`, of providers that take long to compile."""
    groups = by_case(result)
    return [of_others(groups, direction, "peers, ") for direction in (TRAINING, EVALUATION)] if result else []


def of_others(groups: Groups, direction: str, which: str = "") -> Limit:
    """The worst case against the quickest other provider, and all cases in which ours is slower."""
    ratios = []
    for (case, this), providers in groups.items():
        others = {name: record["median_ms"] for name, record in providers.items() if name not in NO_RIVALS}
        if this == direction and others and "ours" in providers:
            quickest = min(others, key=others.__getitem__)
            ratios.append((providers["ours"]["median_ms"] / others[quickest], f"{case} ({quickest})"))
    ratios.sort(reverse=True)
    beaten = [where for ratio, where in ratios if ratio > 1]
    note = f"{len(ratios)} cases" + (f", slower in {'; '.join(beaten)}" if beaten else "")
    if ratios and not beaten:
        note += f", the nearest {ratios[0][1]}"
    what = f"{which}{direction}: ours / the quickest other, the worst case"
    return Limit(what, ratios[0][0] if ratios else None, 1.0, note)


def of_scaling(result: dict | None) -> list[Limit]:
    records = [r for r in (result or {"records": []})["records"] if r.get("curve") == "overhead"]
    found = []
    for case in dict.fromkeys(record["case"] for record in records):
        times = {
            (r["provider"], r["direction"]): r["median_us"] for r in records if r["case"] == case and "error" not in r
        }
        for name, parts in (("an evaluation", ("forward, no gradient",)), ("a training step", ("forward", "backward"))):
            both = [[times.get((provider, part)) for part in parts] for provider in ("ours", "native")]
            measured = sum(both[0]) / sum(both[1]) if all(map(all, both)) else None
            found.append(Limit(f"a call, {case}, {name}: ours / native", measured, 1.0))
    return found or [Limit("a call: ours / native", None, 1.0)]


def of_linear(result: dict | None) -> list[Limit]:
    groups = by_case(result)
    return [
        Limit(f"{case}: products", groups.get((case, ""), {}).get("ours", {}).get("products"), most)
        for case, most in PRODUCTS.items()
    ]


PARTS = {"run": of_run, "peers": of_peers, "scaling": of_scaling, "linear": of_linear}


def of_folder(folder: Path) -> list[Limit]:
    """All limits, with the results of a folder."""
    paths = {part: folder / f"{part}.json" for part in PARTS}
    results = {part: json.loads(path.read_text()) if path.exists() else None for part, path in paths.items()}
    return [limit for part, of in PARTS.items() for limit in of(results[part])]


def table(found: list[Limit], detail: bool = False) -> Table:
    rows = []
    for one in found:
        colour = {None: "dim", True: "green", False: "red"}[one.holds]
        text = (f"[{colour}]{one.said}[/]" if detail else one.said) + (f": {one.note}" if one.note else "")
        rows.append([one.what, number(one.measured, ".3f"), f"{one.most:.2f}", text])
    return Table(["", "measured", "at most", ""], rows, title="Limits on an H200")


def main() -> None:
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return
    show([table(of_folder(Path(sys.argv[1]) if sys.argv[1:] else files.folder("cuda")), detail=True)])


if __name__ == "__main__":
    main()

"""Writes docs/benchmarks.md, its figures, and the generated parts of the README.

    python -m benchmarks.report

It measures nothing: every number comes from benchmarks/results/<device>/*.json. Each suite has its own section, which
this file puts in its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from . import accuracy, figures, frameworks, idioms, kernels, linear, run, scaling, training, vocab_parallel
from . import records as files
from .pages import Section, described
from .tables import Block, Table

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
SECTIONS = [
    run.SECTION,
    kernels.SECTION,
    kernels.COUNTERS_SECTION,
    idioms.SECTION,
    linear.SECTION,
    vocab_parallel.SECTION,
    scaling.SECTION,
    training.SECTION,
    frameworks.SECTION,
    accuracy.SECTION,
]
BEGIN = "<!-- begin of {part}, written by `python -m benchmarks.report` -->"
END = "<!-- end of {part} -->"


def devices() -> list[str]:
    """The devices with results, the CPU first."""
    found = sorted(path.name for path in files.RESULTS.iterdir() if path.is_dir() and any(path.glob("*.json")))
    return sorted(found, key=lambda name: (name != "cpu", name))


def markdown(blocks: Iterable[Block]) -> str:
    return "\n\n".join(block.markdown() if isinstance(block, Table) else block for block in blocks if block)


def section_of(device: str, section: Section) -> str:
    result = files.read(device, section.part)
    if result is None:
        return f"Of `benchmarks.{section.part}` no result was recorded on this device."
    measured = f"`{result['command']}`, {result['date']}: {described(result)}."
    return markdown([f"### {section.title}", measured, *section.blocks(device, result)])


def device_page(device: str) -> list[str]:
    results = (files.read(device, section.part) for section in SECTIONS)
    title = "CPU" if device == "cpu" else next(filter(None, results))["machine"]["gpu"]
    kind = "cpu" if device == "cpu" else "gpu"
    here = [section for section in SECTIONS if section.only in ("", kind)]
    return [f"## {title}", *(section_of(device, section) for section in here)]


def page() -> str:
    found = [
        "# Benchmarks",
        "Written by `python -m benchmarks.report` from `benchmarks/results/`. Each section begins with the command "
        "that measured it.",
    ]
    for device in devices():
        found += device_page(device)
    if devices() == ["cpu"]:
        found += ["## GPU", "No result of a GPU was recorded yet: run `make gpu` on a machine that has one."]
    return markdown(found) + "\n"


def readme_part(section: Section) -> str:
    """The generated part of the README, between its markers."""
    results = {device: files.read(device, section.part) for device in [*devices()[1:], "cpu"]}
    text = markdown(section.readme({device: result for device, result in results.items() if result}))
    return f"{BEGIN.format(part=section.part)}\n\n{text}\n\n{END.format(part=section.part)}"


def with_parts(readme: str) -> str:
    """The README with each generated part replaced."""
    for section in SECTIONS:
        if section.readme:
            begin, end = (re.escape(marker.format(part=section.part)) for marker in (BEGIN, END))
            text = readme_part(section)
            readme = re.sub(f"{begin}.*?{end}", lambda _, text=text: text, readme, flags=re.DOTALL)
    return readme


def main() -> None:
    figures.FOLDER.mkdir(parents=True, exist_ok=True)
    for device in devices():
        for section in SECTIONS:
            result = files.read(device, section.part)
            if section.draw and result:
                section.draw(device, result, figures.FOLDER)
    PAGE.write_text(page())
    README.write_text(with_parts(README.read_text()))
    print(f"{PAGE}\n{README}")


if __name__ == "__main__":
    main()

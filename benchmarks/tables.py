"""A table, as the console and as the Markdown pages show it, and the numbers in its cells."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table as ConsoleTable

# A table is cut off at the console's edge: let a narrow window break its lines instead.
console = Console(width=max(200, Console().width))


@dataclass
class Table:
    header: list[str]
    rows: list[list[str]]
    left: int = 1  # this many columns hold text, the others numbers
    title: str = ""  # on the console

    def markdown(self) -> str:
        rule = "|" + "---|" * self.left + "---:|" * (len(self.header) - self.left)
        head, *lines = ("| " + " | ".join(row) + " |" for row in (self.header, *self.rows))
        return "\n".join([head, rule, *lines])

    def for_console(self) -> ConsoleTable:
        """Rows with the same first cell are one section, which shows that cell once."""
        table = ConsoleTable(box=box.SIMPLE, title=self.title, pad_edge=False)
        for place, name in enumerate(self.header):
            table.add_column(name, justify="left" if place < self.left else "right", overflow="fold")
        last = None
        for first, *rest in self.rows:
            if first != last:
                table.add_section()
            table.add_row(first if first != last else "", *rest)
            last = first
        return table


Block = Table | str


def show(blocks: Iterable[Block]) -> None:
    for block in blocks:
        if isinstance(block, Table):
            console.print(block.for_console())
        elif block:
            console.print(block, markup=False, highlight=False)


def number(value: float | None, form: str = "") -> str:
    """The number with three digits, or as `form` says; "-" for None."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    return format(value, form or (".0f" if value >= 100 else ".1f" if value >= 10 else ".2f" if value >= 1 else ".3f"))


def duration(record: dict, detail: bool = False, form: str = "") -> str:
    """The median in milliseconds. With `detail`, as on the console, the range of all turns too."""
    text = number(record.get("median_ms"), form)
    if detail and "median_ms" in record:
        text += f" ({number(record['min_ms'], form)} to {number(record['max_ms'], form)})"
    return text


def quotient(a: float | None, b: float | None) -> float | None:
    """a / b, or None if one of them was not measured."""
    return a / b if a and b else None


def dimensions(record: dict) -> str:
    return "x".join(map(str, record["shape"]))


def red(text: str, condition: bool = True) -> str:
    return f"[red]{text}[/]" if condition else text


def said(record: dict) -> str:
    """What failed or was wrong, or nothing."""
    return record.get("error") or record.get("wrong") or ""


def failures(named: Iterable[tuple[str, dict]], title: str = "What failed or was wrong:") -> str:
    """A list of the records, with their names, that have an error or are wrong."""
    lines = [f"* {name}: {said(record)}" for name, record in named if said(record)]
    return "\n".join([title, "", *lines]) if lines else ""

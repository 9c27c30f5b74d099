"""The floors of the code: imports and #includes only point down, and never in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "cross_entropy_ext"

Graph = dict[str, set[str]]

# Low to high. Files of one floor know nothing of each other, except in one folder.
CSRC_FLOORS = [["kernel"], ["host"], ["nll"], ["cpu", "cuda"], ["linear"], ["module.cpp"]]
PACKAGE_FLOORS = [
    ["_extension", "_decompositions", "_flops"],
    ["_options"],
    ["_call"],
    ["_parallel"],
    ["functional"],
    ["modules"],
    ["distributed"],
    ["patch", "runtime"],
    ["__init__"],
    ["__main__"],
]
# The emulator stands in for the CUDA toolkit's headers.
TOOLKIT = {"cuda_emulator.h"}


def find_circle(graph: Graph) -> list[str] | None:
    """Returns a circle as a path whose first and last name are the same, or None."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for target in sorted(graph.get(name, ())):
                if circle := visit(target, [*path, name]):
                    return circle
            done.add(name)
        return None

    return next((circle for name in sorted(graph) if (circle := visit(name, []))), None)


def wrong_arrows(graph: Graph, floors: list[list[str]], separator: str) -> list[str]:
    """Returns the arrows that do not point to a lower floor or into their own folder."""
    level = {name: index for index, names in enumerate(floors) for name in names}
    wrong = [f"{name} has no floor" for name in sorted(graph) if name.split(separator)[0] not in level]
    for source, targets in sorted(graph.items()):
        for target in sorted(targets):
            above, below = source.split(separator)[0], target.split(separator)[0]
            if above != below and level.get(above, 0) <= level.get(below, 0):
                wrong.append(f"{source} -> {target}")
    return wrong


def check(graph: Graph, floors: list[list[str]], separator: str) -> None:
    wrong = wrong_arrows(graph, floors, separator)
    assert not wrong, "these point up, or across: " + "; ".join(wrong)
    circle = find_circle(graph)
    assert circle is None, "a circle: " + " -> ".join(circle)


# ---- csrc ----------------------------------------------------------------------------------------


def includes(source: Path) -> Graph:
    """Maps each file of csrc to the files of csrc that it includes. A file that is not found is a mistake."""
    graph: Graph = {}
    for file in sorted(path for path in source.rglob("*") if path.suffix in {".h", ".cpp", ".inl", ".cuh", ".cu"}):
        targets = graph.setdefault(file.relative_to(source).as_posix(), set())
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', file.read_text(), re.MULTILINE):
            found = next((folder / name for folder in (file.parent, source) if (folder / name).is_file()), None)
            assert found or name in TOOLKIT, f"{file} includes {name}, which is not in csrc"
            if found:
                targets.add(found.resolve().relative_to(source.resolve()).as_posix())
    return graph


def test_csrc() -> None:
    graph = includes(ROOT / "csrc")
    assert "kernel/problem.h" in graph["host/make_problem.h"]
    check(graph, CSRC_FLOORS, "/")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"host/a.h": '#include "kernel/b.h"', "kernel/b.h": "#include <vector>"}, None),
        ({"cuda/a.cuh": '#include "b.cuh"\n#include "cuda_emulator.h"', "cuda/b.cuh": ""}, None),
        ({"host/a.h": "", "kernel/b.h": '#include "host/a.h"'}, "kernel/b.h -> host/a.h"),
        ({"cpu/a.h": "", "cuda/b.h": '#  include "cpu/a.h"'}, "cuda/b.h -> cpu/a.h"),
        ({"cpu/a.h": "", "cuda/b.h": '#include "../cpu/a.h"'}, "cuda/b.h -> cpu/a.h"),
        ({"cpu/a.h": '#include "b.h"', "cpu/b.h": '#include "a.h"'}, "cpu/a.h -> cpu/b.h -> cpu/a.h"),
        ({"cpu/a.h": '#include "b.h"'}, "includes b.h"),
        ({"extras/a.h": ""}, "no floor"),
    ],
)
def test_includes_are_found(tmp_path: Path, files: dict[str, str], message: str | None) -> None:
    write(tmp_path, files)
    if message is None:
        return check(includes(tmp_path), CSRC_FLOORS, "/")
    with pytest.raises(AssertionError, match=re.escape(message)):
        check(includes(tmp_path), CSRC_FLOORS, "/")


# ---- the package ---------------------------------------------------------------------------------


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walks everything that runs: functions too, and not what only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from (inner for part in node.orelse for inner in (part, *nodes(part)))
        else:
            yield node
            yield from nodes(node)


def imports(package: Path) -> Graph:
    """Maps each module of the package, named without the package, to the modules of it that it imports. `functional`
    is functional/__init__.py; a submodule does not count as importing the packages around it. A constant that the
    package's own __init__ assigns, its version, may be read by all."""
    modules = {}
    for file in package.rglob("*.py"):
        parts = file.relative_to(package).with_suffix("").parts
        modules[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = file
    constants = {
        target.id
        for node in ast.parse(modules["__init__"].read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def module_of(path: list[str]) -> str | None:
        """The name in `modules` of an absolute dotted path."""
        if path[0] != package.name:
            return None
        return ".".join(path[1:]) or "__init__"

    graph: Graph = {name: set() for name in modules}
    for name, file in modules.items():
        around = [package.name, *file.relative_to(package).parts[:-1]]
        for node in nodes(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found = [module_of(alias.name.split(".")) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = around[: len(around) + 1 - node.level] if node.level else []
                base += node.module.split(".") if node.module else []
                found = []
                for alias in node.names:
                    module = module_of([*base, alias.name])
                    if module not in modules:
                        module = module_of(base)
                    if module != "__init__" or alias.name not in constants:
                        found.append(module)
            else:
                continue
            assert all(module in modules for module in found if module), f"{name} imports a module that does not exist"
            graph[name].update(module for module in found if module and module != name)
    return graph


def test_package() -> None:
    graph = imports(ROOT / PACKAGE)
    assert "_extension" in graph["runtime"]
    check(graph, PACKAGE_FLOORS, ".")


CLEAN = {
    "__init__.py": '__version__ = "1"\nfrom ._extension import load\nfrom . import distributed, functional',
    "_extension.py": "import torch\nfrom importlib import import_module",
    "_options.py": "import cross_entropy_ext._extension",
    "_call.py": "from typing import TYPE_CHECKING\nfrom ._options import X\nif TYPE_CHECKING:\n    from . import patch",
    "_parallel/__init__.py": "",
    "_parallel/exchange.py": "from .._call import call",
    "_parallel/dtensor.py": "from . import exchange\nfrom .exchange import gather",
    "functional/__init__.py": "from .losses import cross_entropy\nfrom . import linear",
    "functional/losses.py": "def f():\n    from .._parallel import dtensor",
    "functional/linear.py": "from .losses import f\nfrom cross_entropy_ext._call import call",
    "modules.py": "from . import functional",
    "distributed.py": "from ._parallel.exchange import gather\nfrom .modules import Loss",
    "patch.py": "from . import functional",
    "runtime.py": "from . import __version__\nfrom ._extension import load",
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"_call.py": "from .functional import losses"}, "_call -> functional.losses"),
        ({"_call.py": "from . import functional"}, "_call -> functional"),
        ({"_call.py": "import cross_entropy_ext.modules"}, "_call -> modules"),
        ({"_call.py": "from cross_entropy_ext.modules import Loss"}, "_call -> modules"),
        ({"_call.py": "def f():\n    if True:\n        from .modules import Loss"}, "_call -> modules"),
        ({"_call.py": "if TYPE_CHECKING:\n    pass\nelse:\n    from . import modules"}, "_call -> modules"),
        ({"_call.py": "from . import load"}, "_call -> __init__"),
        ({"_call.py": "from . import __version__"}, None),
        ({"_parallel/exchange.py": "from ..functional.losses import f"}, "_parallel.exchange -> functional.losses"),
        ({"_parallel/exchange.py": "from .dtensor import shard"}, "_parallel.dtensor -> _parallel.exchange"),
        ({"functional/losses.py": "def f():\n    from . import linear"}, "functional.linear -> functional.losses"),
        ({"patch.py": "from .runtime import build_info"}, "patch -> runtime"),
        ({"linear.py": ""}, "linear has no floor"),
    ],
)
def test_imports_are_found(tmp_path: Path, changed: dict[str, str], message: str | None) -> None:
    write(tmp_path / PACKAGE, CLEAN | changed)
    if message is None:
        return check(imports(tmp_path / PACKAGE), PACKAGE_FLOORS, ".")
    with pytest.raises(AssertionError, match=re.escape(message)):
        check(imports(tmp_path / PACKAGE), PACKAGE_FLOORS, ".")


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

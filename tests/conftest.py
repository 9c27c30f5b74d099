"""Shared by all tests: the kernels that they run on, the cases that `make test` leaves out, threads, hypothesis."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from types import ModuleType

# Idle threads sleep instead of spinning: with several workers and two cores, spinning is most of what they would do.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from backends import BACKENDS, needs_emulator, put_in_place
from cuda_on_cpu import build
from hypothesis.configuration import set_hypothesis_home_dir


def pytest_configure(config: pytest.Config) -> None:
    # It keeps what it reads from loaded modules, code that torch.compile generated among them: nothing for a checkout.
    home = tempfile.TemporaryDirectory(prefix="hypothesis-")
    config.add_cleanup(home.cleanup)
    set_hypothesis_home_dir(home.name)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


# ---- backends --------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    of_compilers = any("backend" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "backend" in metafunc.fixturenames and not of_compilers:
        chosen = metafunc.definition.get_closest_marker("backends")
        names = chosen.args if chosen else BACKENDS
        marks = {"cpu": (), "emulator": needs_emulator}
        metafunc.parametrize("backend", [pytest.param(name, marks=marks[name]) for name in names], indirect=True)


@pytest.fixture(scope="session")
def emulated_kernels() -> ModuleType:
    return build.load()


@pytest.fixture
def kernels(emulated_kernels: ModuleType) -> Iterator[ModuleType]:
    """The emulated kernels, in the place of the CPU's."""
    with put_in_place(emulated_kernels):
        yield emulated_kernels


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "emulator":
        request.getfixturevalue("kernels")
    return request.param


# ---- cases that `make test` leaves out -------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as `long` the cases that `thin` leaves out: all but those on every n-th diagonal of the grid, or with n = 0
    all. Each value of a parameter stays, as long as another parameter has n values."""
    seen: dict[tuple, dict[tuple, int]] = {}  # of each test and parameter its values, numbered

    def number(item: pytest.Item, names: str | tuple[str, ...]) -> int:
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        values = seen.setdefault((item.path, item.originalname, *names), {})
        return values.setdefault(tuple(id(item.callspec.params[name]) for name in names), len(values))

    for item in items:
        thin = item.get_closest_marker("thin")
        if thin is None:
            continue
        every = thin.args[0]
        diagonal = sum(number(item, mark.args[0]) for mark in item.iter_markers("parametrize"))
        if item.callspec.params.get("backend") == "emulator":  # other cases than on the CPU
            every, diagonal = thin.kwargs.get("emulator", every), diagonal + 1
        if every == 0 or diagonal % every:
            item.add_marker("long")

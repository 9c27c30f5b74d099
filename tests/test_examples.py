"""The short examples: each runs in its quick form, shows what it says that it shows, equals PyTorch, and draws."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = ("distillation", "mixup", "segmentation", "policy_gradient")

pytest.importorskip("matplotlib", reason="the examples' extra is not installed")
pytest.importorskip("rich", reason="the examples' extra is not installed")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """An example as a module, on one thread as it sets itself where it is a program, and gone afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before, threads = set(sys.modules), torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(EXAMPLES)):
            del sys.modules[name]


def quick(module: ModuleType, folder: Path) -> object:
    """What its main program returns, after a look at the figure."""
    figure = folder / "deeper" / "figure.png"
    result = module.main(["--quick", "--output", str(figure)])
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 10_000
    assert result.equal
    return result


@pytest.mark.slow
def test_distillation(load, tmp_path):
    """Without a single three, the student recognises some after 30 epochs; from labels alone it cannot."""
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    module = load("distillation")
    result = quick(module, tmp_path)
    (alone,), (distilled,) = result.alone, result.distilled
    assert result.teacher > 0.93
    assert max(alone["hidden"]) == 0 and alone["accuracy"][-1] > 0.8
    assert distilled["hidden"][-1] > 0.2 and distilled["accuracy"][-1] > 0.85
    assert distilled["loss"][-1] < 0.1 * distilled["loss"][0]
    assert distilled["loss"] == pytest.approx(result.native["loss"], abs=module.TOLERANCE)


@pytest.mark.slow
def test_mixup(load, tmp_path):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    module = load("mixup")
    result = quick(module, tmp_path)
    (plain,), (mixed,) = result.plain, result.mixed
    assert plain["accuracy"][-1] > 0.8 and mixed["accuracy"][-1] > 0.8
    assert mixed["test loss"][-1] < 0.3 * mixed["test loss"][0]
    assert mixed["loss"][-1] > plain["loss"][-1]  # what is mixed cannot be known for sure
    assert mixed["loss"] == pytest.approx(result.native["loss"], abs=module.TOLERANCE)


@pytest.mark.slow
def test_segmentation(load, tmp_path):
    pytest.importorskip("sklearn", reason="the photograph is scikit-learn's")
    module = load("segmentation")
    result = quick(module, tmp_path)
    native, ours = result.losses.values()
    assert ours == pytest.approx(native, abs=module.TOLERANCE)
    assert sum(ours[-3:]) < 0.8 * sum(ours[:3])
    for overlaps in result.overlaps.values():
        assert len(overlaps) == module.CLASSES and sum(overlaps) / module.CLASSES > 0.2
    _, _, labels = module.photograph()
    assert 0.05 < (labels == module.UNCERTAIN).float().mean() < 0.3


def test_segmentation_counts_overlaps_by_hand(load):
    """Uncertain pixels are in no union."""
    pytest.importorskip("sklearn", reason="the photograph is scikit-learn's")
    module = load("segmentation")
    labels, predicted = torch.tensor([[0, 0, 1, module.UNCERTAIN]]), torch.tensor([[0, 1, 1, 1]])
    assert module.overlaps(predicted, labels)[:2] == [0.5, 0.5]


@pytest.mark.slow
def test_policy_gradient(load, tmp_path):
    """More reward than the first policy's, and more entropy where entropy is paid for."""
    module = load("policy_gradient")
    result = quick(module, tmp_path)
    for runs in result.runs.values():
        for run in runs:
            assert run["reward"][-1] > run["reward"][0] and run["entropy"][-1] < 1.0001 * run["entropy"][0]
            assert run[module.OURS] == pytest.approx(run[module.NATIVE], abs=module.TOLERANCE)
            assert max(run["gradients differ"]) < module.TOLERANCE
    without, bonus = ([run["entropy"][-1] for run in runs] for runs in result.runs.values())
    assert min(bonus) > max(without)


def test_policy_gradient_discounts_by_hand(load, monkeypatch):
    module = load("policy_gradient")
    monkeypatch.setattr(module, "WALKERS", 1)
    rewards, walking = torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([[True], [True], [False]])
    returns = torch.tensor([module.DISCOUNT, 1.0])
    expected = (returns - returns.mean()) / (returns.std() + 1e-6)
    assert torch.allclose(module.advantages(rewards, walking), expected)


@pytest.mark.parametrize("name", SHORT)
def test_programs_say_what_they_show(name):
    """--help is the docstring, and names the options. Nothing of matplotlib or scikit-learn is needed for it."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--help"],
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    source = (EXAMPLES / f"{name}.py").read_text()
    assert re.match(r'"""(.*)\n', source)[1] in done.stdout
    assert "--quick" in done.stdout and f"{name}.png" in done.stdout
    assert len(source.splitlines()) < 160


@pytest.mark.long
@pytest.mark.slow
def test_parallel_training(load, tmp_path):
    """On one process and on two in three ways; under torchrun, as users start it."""
    result = quick(load("parallel_training"), tmp_path)
    assert len(result.curves) == 4
    for curve in result.curves.values():
        assert curve[-1] < curve[0] - 0.5

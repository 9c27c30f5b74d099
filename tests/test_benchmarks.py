"""The benchmarks: what they measure is right, what fails is said, and what the pages claim is what was recorded."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_gpu
import torch
import torch.nn.functional as F
from cuda_on_cpu import build

from benchmarks import (
    command_line,
    figures,
    idiom_cases,
    idioms,
    kernels,
    limits,
    linear,
    pages,
    providers,
    records,
    report,
    run,
    scaling,
    shapes,
    tables,
    timing,
    values,
)
from benchmarks.idiom_cases import NOW, PAIRS, TODAY, Pair
from benchmarks.memory import CpuPeaks
from benchmarks.providers import Provider, Refused
from benchmarks.shapes import CASES, Case
from cross_entropy_ext.functional import cross_entropy

ROOT = Path(__file__).parents[1]
BOTH = ("forward+backward", "forward")

# -- the pages -----------------------------------------------------------------------------------------------


def test_readme_says_what_was_recorded():
    readme = (ROOT / "README.md").read_text()
    parts = [section.part for section in report.SECTIONS if section.readme]
    assert parts == ["run", "idioms", "linear", "vocab_parallel"]
    for marker in (report.BEGIN, report.END):
        assert [readme.count(marker.format(part=part)) for part in parts] == [1, 1, 1, 1]
    assert report.with_parts(readme) == readme, "run `python -m benchmarks.report`"


def test_page_says_what_was_recorded():
    assert report.PAGE.read_text() == report.page(), "run `python -m benchmarks.report`"


@pytest.mark.parametrize("device", [device for device in report.devices() if records.read(device, "run")])
def test_readme_figure_shows_what_was_recorded(device):
    """Its labels, in the order in which they are drawn."""
    shown = re.findall(r">([^<>]+)</text>", (figures.FOLDER / f"{device}-run.svg").read_text())
    groups = figures.bars(records.read(device, "run"))
    expected = [
        figures.label(group[name]) for _, group in reversed(groups) for name in figures.COLOURS if name in group
    ]
    assert len(expected) > (40 if device == "cpu" else 10)
    rest = iter(shown)
    missing = [text for text in expected if text not in rest]
    assert not missing, "run `python -m benchmarks.report`"
    assert {case for case, _ in groups} <= set(shown)


@pytest.mark.parametrize("changed", ["time", "machine"])
def test_pages_would_differ(changed, monkeypatch):
    """The three tests above can fail: another number, another text."""
    result = records.read("cpu", "run")
    before = run.summary(result), pages.described(result), figures.bars(result)
    if changed == "time":
        for record in result["records"]:
            if record["provider"] == "ours" and "copies" in record:
                record["copies"] *= 1.3
                record["median_ms"] *= 1.3
        assert run.summary(result) != before[0] and figures.bars(result) != before[2]
    else:
        result["machine"]["threads"] += 1
        assert pages.described(result) != before[1]


def test_every_case_was_recorded():
    """On the shapes of today, in both directions, right, and next to native and a copy."""
    groups = run.grouped(records.read("cpu", "run")["records"])
    for case in CASES:
        for direction in BOTH:
            if case.cpu is None:
                continue
            group = groups[case.name, direction]
            for name in ("ours", "native", "native compiled", "copy"):
                record = group[name]
                assert "wrong" not in record and record["median_ms"] > 0, (case.name, name, record)
                expected = json.loads(json.dumps(case.fields(case.cpu)))
                assert {key: record[key] for key in expected} == expected


def test_every_pair_was_recorded():
    """As the code is today, on today's shapes, right, and with no memory but a gradient."""
    groups = idioms.grouped(records.read("cpu", "idioms")["records"])
    assert list(groups) == [pair.name for pair in PAIRS]
    for pair in PAIRS:
        group = groups[pair.name]
        for which in (TODAY, NOW, "copy"):
            record = group[which]
            assert "wrong" not in record and record["median_ms"] > 0, record
            assert tuple(record["shape"]) == pair.shape
        for which in (TODAY, NOW):
            assert group[which]["code"] == idiom_cases.code(pair.function(which)), "run `python -m benchmarks.idioms`"
        assert idioms.gradients(group[NOW]) < 1.1 and idioms.faster(group) > 3
    costs = idioms.costs_of(records.read("cpu", "idioms")["records"])
    assert [tuple(record["shape"]) for _, record in costs] == list(idioms.COSTS)
    assert not [record for _, record in costs if "wrong" in record]


# What is promised: of the products' time, for each type.
PRODUCTS = {torch.float32: 1.15, torch.bfloat16: 1.4}


def test_every_linear_case_was_recorded():
    """On today's shapes, right, as fast as promised and with 48 MB besides the gradients."""
    groups = linear.grouped(records.read("cpu", "linear")["records"])
    assert len(groups) == len([case for case in linear.CASES if case.cpu])
    for case in linear.CASES:
        if case.cpu is None:
            continue
        group = groups[case.name, "x".join(map(str, case.cpu))]
        for name in (linear.PRODUCTS, linear.NATIVE, linear.CHUNKED, linear.SEPARATE, linear.OURS):
            record = group[name]
            assert "wrong" not in record and record["median_ms"] > 0, record
            assert {**record, **case.fields(case.cpu)} == record
        ours = group[linear.OURS]
        assert ours["products"] <= PRODUCTS[case.dtype] and linear.besides(ours) <= 48


@pytest.mark.parametrize("changed", ["products", "peak_extra_bytes", "error"])
def test_pages_would_differ_in_linear(changed, monkeypatch):
    result = records.read("cpu", "linear")
    before = report.readme_part(linear.SECTION), report.section_of("cpu", linear.SECTION)
    assert before[1] in report.page()
    record = next(r for r in result["records"] if r["provider"] == linear.OURS)
    if changed == "error":
        record["error"] = "RuntimeError: no"
    else:
        record[changed] = 2 * record[changed] + 2**21
    monkeypatch.setattr(report.files, "read", lambda device, part: result)
    assert report.readme_part(linear.SECTION) != before[0]
    assert report.section_of("cpu", linear.SECTION) != before[1]


@pytest.mark.parametrize("changed", ["time", "memory", "code", "cost"])
def test_pages_would_differ_in_idioms(changed, monkeypatch):
    result = records.read("cpu", "idioms")
    before = report.readme_part(idioms.SECTION), report.section_of("cpu", idioms.SECTION)
    assert before[1] in report.page()
    record = next(r for r in result["records"] if r.get("which") == (NOW if changed != "cost" else "with"))
    change = {"time": "median_ms", "memory": "peak_extra_bytes", "cost": "over_plain"}.get(changed)
    if change:
        record[change] *= 1.5
    else:
        record["code"][0] += " | 1"
    monkeypatch.setattr(report.files, "read", lambda device, part: result)
    after = report.readme_part(idioms.SECTION), report.section_of("cpu", idioms.SECTION)
    assert after[0] != before[0] and after[1] != before[1]
    if changed == "code":
        assert " \\| 1`" in after[0]


def test_what_failed_is_on_the_page():
    fields = {"table": "pairs", "name": "broken", "shape": [2, 3], "dtype": "float32"}
    found = [{**fields, "which": NOW, "error": "RuntimeError: no"}, {**fields, "error": "MemoryError: "}]
    assert "* broken, now: RuntimeError: no" in idioms.own_failures(found)
    assert idioms.grouped(found)["broken"].keys() == {NOW}


# -- pairs of code -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_pairs_are_equal_and_a_wrong_one_is_found(pair):
    assert inspect.signature(pair.today) == inspect.signature(pair.now)
    assert pair.shape[1:] == pair.quick[1:] or pair.quick[1] < pair.shape[1]
    logits, *rest = idiom_cases.draw(pair.arguments, (8, 50), "cpu")
    wrong = idioms.Wrong(pair, [logits, *rest])
    logits = logits.clone().requires_grad_()
    for which in (TODAY, NOW):
        results = idiom_cases.step(pair.function(which), rest)(logits)
        assert wrong(results) == ""
        assert "gradient" in wrong((*results[:-1], results[-1].roll(1, 1)))
        assert "gradient" in wrong((*results[:-1], results[-1] * float("nan")))
        assert "the loss" in wrong((results[0] * 1.01, *results[1:]))
        if len(results) > 2:
            assert "another result" in wrong((results[0], results[1] + 1, results[2]))


@pytest.mark.parametrize("which", [TODAY, NOW])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_the_code_that_is_shown_runs(pair, which):
    """The README's lines alone, with nothing but the arguments and the names that are imported."""
    function, drawn = pair.function(which), idiom_cases.draw(pair.arguments, (8, 50), "cpu")
    scope = {**vars(idiom_cases), **dict(zip(pair.arguments, drawn, strict=True))}
    shown = idiom_cases.code(function)
    exec("\n".join(shown), scope)
    found = function(*drawn)
    assert scope["loss"].equal(found[0] if isinstance(found, tuple) else found)
    assert not any("return" in line for line in shown) and max(map(len, shown)) < 100
    cell = idioms.code_cell(shown)
    assert cell.count("`") == 2 * len(shown) and "\n" not in cell


def columns_of_the_page(pair: Pair) -> dict[str, str]:
    """Both pieces of code of the README's row."""
    name = rf"\| {re.escape(pair.name)}(?:, \d+x\d+)? \| "
    today, now = re.search(name + r"(`.*?`) \| (`.*?`) \|", (ROOT / "README.md").read_text()).groups()
    return {TODAY: "\n".join(re.findall("`(.*?)`", today)), NOW: "\n".join(re.findall("`(.*?)`", now))}


# The rows whose losses all take class weights.
TAKE_WEIGHTS = (
    "z-loss",
    "softcap",
    "scaled logits",
    "distillation with labels",
    "MixUp",
    "negative log likelihood",
)


@pytest.mark.parametrize(
    ("pair", "weighted"),
    [(pair, weighted) for pair in PAIRS for weighted in (False, True) if not weighted or pair.name in TAKE_WEIGHTS],
    ids=lambda value: value.name if isinstance(value, Pair) else "weighted" if value else "",
)
def test_the_columns_of_the_page_are_equal_where_labels_are_padded(pair, weighted):
    """Both, as they are printed, on labels of which some are ignored; and with class weights in every loss."""
    drawn = dict(zip(pair.arguments, idiom_cases.draw(pair.arguments, (12, 50), "cpu"), strict=True))
    for name, ignored in (("target", slice(0, 12, 3)), ("a", [1, 4]), ("b", [2, 4]), ("indices", [0, 7])):
        if name in drawn:
            drawn[name][ignored] = -100
    if "indices" in drawn:
        drawn["indices"][3, 5:] = -100
    scope = {**vars(idiom_cases)}
    if weighted:
        weights = torch.rand(50, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 5
        for name in ("cross_entropy", "distillation_loss", "mixup_cross_entropy", "nll_loss"):
            scope[name] = functools.partial(scope[name], weight=weights)
        native = {name: functools.partial(getattr(F, name), weight=weights) for name in ("cross_entropy", "nll_loss")}
        scope["F"] = SimpleNamespace(kl_div=F.kl_div, **native)
    for name, value in drawn.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            drawn[name] = value.double()
    differentiable = (pair.arguments[0], "teacher", "probs", "advantage")
    leaves = [value.requires_grad_() for name, value in drawn.items() if name in differentiable]
    results = []
    for code in columns_of_the_page(pair).values():
        ran = {**scope, **drawn}
        exec(code, ran)
        results.append([ran["loss"], ran.get("accuracy"), *torch.autograd.grad(ran["loss"], leaves)])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-14)


# -- inputs and providers ------------------------------------------------------------------------------------


def test_cases_have_names_of_their_own_and_some_are_quick():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert sum(case.quick is not None for case in CASES) >= 8
    for case in CASES:
        for shape in filter(None, (case.cpu, case.cuda, case.quick)):
            classes = {s[1] for s in (case.cpu, case.cuda, case.quick) if s}
            assert len(classes) == 1 and len(shape) >= 2


@pytest.mark.parametrize("case", [case for case in CASES if case.quick], ids=lambda case: case.name)
def test_inputs_are_as_their_case_says(case):
    inputs = shapes.make_inputs(case, case.quick, "cpu")
    logits, target = inputs.logits, inputs.target
    assert tuple(logits.shape) == case.quick and logits.dtype == case.dtype
    assert logits.is_contiguous() == (case.layout == "contiguous" or logits.size(1) == 1)
    if case.layout != "contiguous":
        assert logits.stride(1) == 1
    if case.target == "index":
        counted = target[target != case.ignore_index]
        assert counted.min() >= 0 and counted.max() < logits.size(1)
        if target.numel() > 500:
            assert abs(1 - counted.numel() / target.numel() - case.ignored) < 0.1
    else:
        assert torch.allclose(target.float().sum(1), torch.ones(()), atol=1e-2)


def test_peers_refuse_what_they_cannot():
    logits, target = torch.randn(2, 5, 3), torch.randint(5, (2, 3))
    with pytest.raises(Refused, match="rows"):
        providers.rows(logits, target)
    with pytest.raises(Refused, match="indices"):
        providers.rows(logits, logits)
    flat, labels = providers.rows(logits.movedim(1, 2).contiguous().movedim(2, 1), target)
    assert flat.shape == (6, 5) and labels.shape == (6,)
    with pytest.raises(Refused, match="weight"):
        providers.only({"weight": 1}, "reduction")


# -- values --------------------------------------------------------------------------------------------------

VARIANTS = [
    Case("plain", (64, 10)),
    Case("ignored, weights, smoothing", (64, 10), ignored=0.3, weighted=True, label_smoothing=0.1),
    Case("none", (64, 10), reduction="none"),
    Case("sum", (64, 10), reduction="sum", ignored=0.3, ignore_index=7),
    Case("probabilities", (8, 5, 4), target="probabilities", weighted=True),
    Case("bfloat16", (8, 5, 4, 4), dtype=torch.bfloat16, layout="channels_last"),
]


@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
def test_right_values_pass_and_wrong_ones_do_not(case):
    inputs = shapes.make_inputs(case, case.cpu, "cpu")
    inputs.logits.requires_grad_()
    expected = values.Expected(inputs)
    for loss in (F.cross_entropy, cross_entropy):
        value, grad = timing.step(loss, inputs, True)(inputs.logits)
        assert expected.wrong(value, grad) == ""
        assert "loss" in expected.wrong(value * 1.1, grad)
        assert "loss" in expected.wrong(value * float("nan"), grad)
        assert "gradient" in expected.wrong(value, grad * 1.1)
        assert "gradient" in expected.wrong(value, grad.roll(1, 1))
        assert "gradient" in expected.wrong(value, grad * float("nan"))


# -- time and memory -----------------------------------------------------------------------------------------


def test_turns_alternate_and_logits_are_restored():
    calls = []

    def provider(name, overwrite):
        def call(logits):
            calls.append((name, logits[0].item()))
            time.sleep(0.011)
            if overwrite:
                logits.zero_()

        return call

    full = torch.ones(3)
    timed = [
        timing.Timed("a", provider("a", False), [full]),
        timing.Timed("b", provider("b", True), [full.clone()], [full]),
    ]
    timing.measure(timed, "cpu", 0.0)
    turns = calls[-2 * timing.LEAST_TURNS["cpu"] :]
    assert [name for name, _ in turns] == ["a", "b"] * timing.LEAST_TURNS["cpu"]
    assert all(value == 1 for _, value in turns)
    for one in timed:
        summary = one.summary()
        assert summary["turns"] == timing.LEAST_TURNS["cpu"]
        assert 11 <= summary["min_ms"] <= summary["median_ms"] <= summary["max_ms"]


def test_a_provider_that_fails_in_its_turn_leaves_the_others():
    def fails(logits):
        raise ValueError("broken\nmore")

    timed = [timing.Timed("broken", fails, [torch.ones(1)]), timing.Timed("well", torch.neg, [torch.ones(1)])]
    timing.measure(timed, "cpu", 0.0)
    assert timed[0].summary() == {"error": "ValueError: broken"}
    assert timed[1].summary()["median_ms"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_of_what_is_known():
    """Ours takes one gradient and in place nothing; the native loss keeps log-probabilities besides."""
    peaks = CpuPeaks()
    case = Case("peak", (256, 32_000))
    size = 4 * math.prod(case.cpu)
    measured = {name: peaks.of(case, case.cpu, name, True) / size for name in ("ours", "ours in place", "native")}
    assert 1 <= measured["ours"] < 1.1
    assert measured["ours in place"] < 0.1
    assert 2 < measured["native"] < 4
    assert peaks.of(case, case.cpu, "no such provider", True) is None
    peaks.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_of_a_pair():
    peaks = CpuPeaks()
    shape = (256, 32_000)
    found = {which: peaks.of_made(idiom_cases.ready, "distillation", which, shape) for which in (TODAY, NOW)}
    size = 4 * math.prod(shape)
    assert 1 <= found[NOW] / size < 1.1 and 3 < found[TODAY] / size < 6
    assert peaks.of_made(idiom_cases.ready, "no such pair", NOW, shape) is None
    assert peaks.of_made(idiom_cases.ready, "MixUp", NOW, (512, 32_000)) > size  # and goes on
    peaks.close()


# -- the output layer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_right_steps_pass_and_wrong_ones_do_not(dtype):
    states, weight, target = linear.draw((50, 16, 300), dtype, "cpu")
    expected = linear.Expected(states, weight, target)
    leaves = states.requires_grad_(), weight.requires_grad_()
    for name in (linear.NATIVE, linear.SEPARATE, linear.OURS):
        loss, *gradients = linear.PROVIDERS[name]()(*leaves, target)
        assert expected.wrong(loss, *gradients) == ""
        assert "the loss" in expected.wrong(loss * 1.1, *gradients)
        assert "states" in expected.wrong(loss, gradients[0] * 1.1, gradients[1])
        assert "weight" in expected.wrong(loss, gradients[0], gradients[1].roll(1, 0))
        assert "weight" in expected.wrong(loss, gradients[0], gradients[1] * float("nan"))
    logits, of_states, of_weight = states @ weight.t(), *linear.products(*leaves, target)
    torch.testing.assert_close(of_states, logits @ weight)
    torch.testing.assert_close(of_weight, logits.t() @ states)


def test_expected_steps_come_in_pieces(monkeypatch):
    """Where rows of logits do not fit at once: the same loss and gradients."""
    drawn = linear.draw((50, 16, 300), torch.float32, "cpu")
    whole = linear.Expected(*drawn)
    monkeypatch.setattr(linear, "ELEMENTS", 7 * 300)
    pieces = linear.Expected(*drawn)
    assert math.isclose(pieces.loss, whole.loss)
    torch.testing.assert_close(pieces.gradients, whole.gradients)


def test_a_step_that_fails_or_is_wrong_is_a_record(monkeypatch):
    def explode(states, weight, target):
        raise RuntimeError("no such thing\nat all")

    monkeypatch.setitem(linear.PROVIDERS, "explodes", lambda: explode)
    twice = linear.trained(lambda states, weight, target: 2 * F.cross_entropy(states @ weight.t(), target))
    monkeypatch.setitem(linear.PROVIDERS, "wrong", lambda: twice)
    monkeypatch.setattr(linear, "peak_of", lambda *_: None)
    names = [linear.PRODUCTS, "explodes", "wrong", linear.OURS]
    found = linear.case_records(linear.CASES[0], (16, 8, 50), "cpu", 0.0, names)
    assert [record["provider"] for record in found] == names
    assert found[1]["error"] == "RuntimeError: no such thing" and found[3]["products"] > 0
    assert found[2]["wrong"].startswith("the loss is") and found[2]["median_ms"] > 0
    failed = {"case": "a case", "shape": [1, 2, 3], "provider": "", "error": "MemoryError: "}
    tables.show([linear.table([*found, failed], detail=True)])
    text = linear.table(found).markdown()
    assert "explodes: RuntimeError: no such thing | - | - | - |" in text and "wrong: the loss is" in text


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_of_a_step():
    """Logits and their gradient are seen where there are some."""
    shape = (512, 32, 32_000)
    size, gradients = 4 * 512 * 32_000, 4 * 32 * (512 + 32_000)
    measured = {name: linear.peak_of(name, shape, torch.float32) for name in (linear.PRODUCTS, linear.NATIVE)}
    assert 0.95 * size < measured[linear.PRODUCTS] - gradients < 1.2 * size
    assert 1.9 * size < measured[linear.NATIVE] - gradients < 4 * size


# -- the commands --------------------------------------------------------------------------------------------


def run_module(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


COMMANDS = [
    "run",
    "idioms",
    "linear",
    "vocab_parallel",
    "scaling",
    "training",
    "frameworks",
    "accuracy",
    "kernels",
    "tune",
]


def json_of(command: str, *arguments: str) -> Path:
    """Where the command writes to, without running it further."""

    class Parsed(Exception):
        pass

    def stop(parser):
        raise Parsed(parse(parser).json)

    parse = command_line.parse
    module = importlib.import_module(f"benchmarks.{command}")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed) as parsed:
        patch.setattr(sys, "argv", [command, *arguments])
        patch.setattr(signal, "signal", lambda *_: None)
        patch.setattr(command_line, "parse", stop)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Test")
        patch.setattr(command_line.cross_entropy_ext, "build_info", lambda: {"cuda_archs": "900"})
        module.main()
    return parsed.value.args[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_only_a_whole_run_writes_to_the_committed_results(command, tmp_path, monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    folder = "nvidia-test" if command in ("kernels", "tune") else "cpu"
    assert json_of(command) == records.RESULTS / folder / f"{command}.json"
    beside = ROOT / "benchmarks" / "output" / folder / f"{command}.json"
    assert json_of(command, "--quick") == beside
    if command != "accuracy":
        assert json_of(command, "--only", "MNIST") == beside
    if command in ("run", "linear", "scaling", "tune"):
        assert json_of(command, "--seconds", "0.1") == beside
    if command in ("run", "linear"):
        assert json_of(command, "--without", "liger") == beside
    told = tmp_path / "told.json"
    assert json_of(command, "--quick", "--json", str(told)) == told
    monkeypatch.setenv("OUT", str(tmp_path))
    assert json_of(command) == json_of(command, "--quick") == tmp_path / folder / f"{command}.json"


def test_counters_have_a_file_of_their_own(monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    assert json_of("kernels", "--counters", "a.csv") == records.RESULTS / "nvidia-test" / "counters.json"
    assert json_of("kernels", "--counters=a.csv", "--quick").relative_to(records.OUTPUT).name == "counters.json"
    assert json_of("run", "--part", "peers") == records.RESULTS / "cpu" / "peers.json"


def test_what_is_not_committed_is_neither_tracked_nor_reported():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert f"{records.OUTPUT.relative_to(ROOT).as_posix()}/" in ignored
    for path in records.RESULTS.glob("*/*.json"):
        assert not records.read(path.parent.name, path.stem).get("quick"), path


def test_a_quick_run_leaves_the_committed_results(tmp_path, monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(records, "OUTPUT", tmp_path / "output")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["run", "--quick", "--only", "^MNIST$", "--seconds", "0.1"])
    committed = tmp_path / "results" / "cpu" / "run.json"
    records.write(committed, "cpu", [{"case": "a"}])
    before = committed.read_text()
    with pytest.raises(SystemExit) as end:
        run.main()
    assert end.value.code == 0 and committed.read_text() == before
    assert json.loads((tmp_path / "output" / "cpu" / "run.json").read_text())["quick"]


FIELDS = {"case", "shape", "dtype", "layout", "target", "provider", "direction", "median_ms", "min_ms", "max_ms"}
FIELDS |= {"bytes", "gb_per_s", "peak_extra_bytes"}


def test_run_records_everything(tmp_path):
    path = tmp_path / "run.json"
    shown = run_module("run", "--quick", "--only", "^(MNIST|n-gram)$", "--seconds", "1", "--json", str(path))
    result = json.loads(path.read_text())
    assert {"records", "machine", "versions", "command", "date"} <= set(result) and result["complete"]
    assert result["command"] == "python -m benchmarks.run --quick --only ^(MNIST|n-gram)$ --seconds 1"
    assert result["versions"]["torch"] == torch.__version__
    groups = run.grouped(result["records"])
    assert set(groups) == {(case, direction) for case in ("MNIST", "n-gram") for direction in BOTH}
    for (case, direction), group in groups.items():
        expected = {"ours", "native", "copy"} | ({"ours in place"} if "+" in direction else set())
        assert expected <= set(group)
        assert case in shown
        for name in expected:
            record = group[name]
            assert set(record) >= FIELDS and "wrong" not in record
            assert record["min_ms"] <= record["median_ms"] <= record["max_ms"]
            assert math.isclose(record["gb_per_s"], record["bytes"] / record["median_ms"] / 1e6)
            elements, positions = math.prod(record["shape"]), record["shape"][0]
            moved = {"copy": 8 * elements}.get(name, (8 if "+" in direction else 4) * elements + 8 * positions)
            assert record["bytes"] == moved


def test_idioms_record_everything(tmp_path):
    path = tmp_path / "idioms.json"
    shown = run_module("idioms", "--quick", "--only", "MixUp|sample_weight", "--seconds", "0.5", "--json", str(path))
    result = json.loads(path.read_text())
    assert result["complete"] and result["quick"]
    group = idioms.grouped(result["records"])["MixUp"]
    for record in (group[TODAY], group[NOW], group["copy"]):
        assert record["min_ms"] <= record["median_ms"] <= record["max_ms"] and "wrong" not in record
        assert math.isclose(record["copies"], record["median_ms"] / group["copy"]["median_ms"])
    assert group[NOW]["gradient_bytes"] == 4 * math.prod(group[NOW]["shape"])
    if sys.platform == "linux":
        assert 0 < idioms.gradients(group[NOW]) < idioms.gradients(group[TODAY])
    costs = idioms.costs_of(result["records"])
    assert [tuple(record["shape"]) for _, record in costs] == list(idioms.QUICK_COSTS)
    assert all(record["over_plain"] > 0 for _, record in costs)
    assert "MixUp" in shown and "with it, ms" in shown


@pytest.mark.slow
def test_linear_records_everything(tmp_path):
    path = tmp_path / "linear.json"
    shown = run_module("linear", "--quick", "--only", "32k, float32", "--seconds", "0.1", "--json", str(path))
    result = json.loads(path.read_text())
    assert result["complete"] and result["quick"]
    ((key, group),) = linear.grouped(result["records"]).items()
    assert key == ("a vocabulary of 32k, float32", "64x32x4000") and key[0] in shown
    assert {linear.PRODUCTS, linear.NATIVE, linear.SEPARATE, linear.OURS} <= set(group)
    for record in group.values():
        assert record["min_ms"] <= record["median_ms"] <= record["max_ms"] and "wrong" not in record
        assert record["gradient_bytes"] == 4 * 32 * (64 + 4000)
        if sys.platform == "linux":
            assert record["peak_extra_bytes"] > 0
    assert group[linear.PRODUCTS]["products"] == 1


def test_a_pair_that_fails_or_is_wrong_is_a_record():
    def explode(logits, target):
        raise RuntimeError("no such thing\nat all")

    pair = Pair("z", idiom_cases.z_loss_today, explode, (8, 50))
    found = {record["which"]: record for record in idioms.pair_records(pair, (8, 50), "cpu", 0.0, CpuPeaks())}
    assert found[NOW]["error"] == "RuntimeError: no such thing" and found[TODAY]["median_ms"] > 0
    pair = Pair("z", idiom_cases.z_loss_today, lambda logits, target: 2 * F.cross_entropy(logits, target), (8, 50))
    found = {record["which"]: record for record in idioms.pair_records(pair, (8, 50), "cpu", 0.0, CpuPeaks())}
    assert found[NOW]["wrong"].startswith("the loss is off") and found[NOW]["median_ms"] > 0
    failed = {"table": "pairs", "name": "a row", "error": "MemoryError: "}
    tables.show(idioms.console_blocks([*found.values(), failed]))


def test_a_provider_that_fails_is_a_record(monkeypatch):
    def explode(logits, target, **options):
        raise RuntimeError("no such thing\nat all")

    def refuse(logits, target, **options):
        raise Refused("rather not")

    extra = [
        Provider("explodes", lambda: explode),
        Provider("refuses", lambda: refuse),
        Provider("wrong", lambda: lambda logits, target, **options: 2 * F.cross_entropy(logits, target, **options)),
        Provider("broken package", lambda: 1 / 0),
    ]
    case = Case("small", (16, 10))
    measurement = run.Measurement(run.Subject(case, case.cpu, "cpu"), BOTH[0], CpuPeaks())
    for provider in [*extra, *providers.REGISTRY[:1]]:
        measurement.add(provider)
    measurement.add_copy()
    found = {record["provider"]: record for record in measurement.run(0.0)}
    assert found["explodes"]["error"] == "RuntimeError: no such thing"
    assert found["refuses"]["error"] == "rather not"
    assert found["broken package"]["error"].startswith("ZeroDivisionError")
    assert found["wrong"]["wrong"].startswith("the loss is") and found["wrong"]["median_ms"] > 0
    assert found["ours"]["median_ms"] > 0 and "wrong" not in found["ours"]
    tables.show([run.long_table(list(found.values()))])  # shows them all


def test_what_overwrites_the_logits_does_not_disturb_the_others():
    """A provider that leaves garbage in the logits, in the forward even, and ours after it."""

    def overwrites(logits, target, **options):
        value = F.cross_entropy(logits, target, **options)
        with torch.no_grad():
            logits.detach().fill_(float("nan"))
        return value

    case = Case("small", (16, 10))
    subject = run.Subject(case, case.cpu, "cpu")
    for direction in reversed(BOTH):
        measurement = run.Measurement(subject, direction, CpuPeaks())
        measurement.add(Provider("overwrites", lambda: overwrites, overwrites=True))
        measurement.add(providers.REGISTRY[0])
        measurement.add_copy()
        found = {record["provider"]: record for record in measurement.run(0.0)}
        assert "wrong" not in found["ours"] and found["ours"]["median_ms"] > 0
        if direction == "forward":
            assert "wrong" not in found["overwrites"]


def test_a_case_whose_copy_fails_is_still_shown(monkeypatch):
    case = Case("small", (16, 10))
    measurement = run.Measurement(run.Subject(case, case.cpu, "cpu"), BOTH[1], CpuPeaks())
    measurement.add(providers.REGISTRY[0])
    monkeypatch.setattr(torch, "empty_like", lambda *_: 1 / 0)
    measurement.add_copy()
    monkeypatch.undo()
    found = measurement.run(0.0)
    assert found[1]["error"].startswith("ZeroDivisionError") and "copies" not in found[0]
    tables.show([run.long_table(found)])


def test_importable_leaves_out_what_is_missing(monkeypatch):
    def missing():
        raise ImportError

    registry = [Provider("here", lambda: F.cross_entropy), Provider("missing", missing)]
    registry += [Provider("elsewhere", lambda: F.cross_entropy, devices=("cuda",)), Provider("broken", lambda: 1 / 0)]
    monkeypatch.setattr(providers, "REGISTRY", registry)
    assert [provider.name for provider in providers.importable("cpu")] == ["here", "broken"]


def test_a_stopped_write_leaves_the_last_file(tmp_path, monkeypatch):
    path = tmp_path / "deeper" / "run.json"
    records.write(path, "cpu", [{"case": "a"}])
    before = path.read_text()
    with pytest.raises(TypeError):
        records.write(path, "cpu", [{"case": object()}])
    assert path.read_text() == before


@pytest.mark.slow
def test_scaling_records_every_curve(tmp_path):
    path = tmp_path / "scaling.json"
    run_module("scaling", "--quick", "--seconds", "0.02", "--json", str(path))
    result = json.loads(path.read_text())
    found = {record["curve"] for record in result["records"]}
    assert found == {"classes", "rows", "threads", "overhead"}
    assert not [record for record in result["records"] if "error" in record]
    for record in result["records"]:
        if record["curve"] != "overhead":
            assert math.isclose(record["ns_per_element"], 1e6 * record["median_ms"] / math.prod(record["shape"]))
    assert {r["classes"] for r in result["records"] if r["curve"] == "classes"} == set(scaling.QUICK_CLASSES)


@pytest.mark.slow
def test_accuracy_runs(tmp_path):
    path = tmp_path / "accuracy.json"
    run_module("accuracy", "--quick", "--json", str(path))
    found = json.loads(path.read_text())["records"]
    assert {record["table"] for record in found} == {"grid", "cases"}
    assert not [
        record
        for record in found
        if record["provider"] in ("ours", "native") and "TypeError" not in record.get("error", "TypeError")
    ]


@pytest.mark.slow
def test_training_runs(tmp_path):
    path = tmp_path / "training.json"
    run_module("training", "--quick", "--only", "classifier|image", "--json", str(path))
    found = json.loads(path.read_text())["records"]
    assert found and not [record for record in found if "error" in record or "wrong" in record]


def test_every_case_can_be_shown():
    """A page of whatever was recorded, with failures in it."""
    case = dataclasses.replace(CASES[0])
    fields = case.fields(case.cpu)
    timed = {"median_ms": 2.0, "min_ms": 1.0, "max_ms": 3.0, "copies": 2.0, "peak_extra_bytes": None}
    groups = run.grouped(
        [
            {**fields, "provider": "ours", "direction": BOTH[0], **timed},
            {**fields, "provider": "native", "direction": BOTH[0], "error": "RuntimeError: out of memory"},
            {**fields, "provider": "copy", "direction": "copy", **timed, "median_ms": 1.0},
        ]
    )
    text = run.direction_table(groups, BOTH[0]).markdown()
    assert "| GPT-2 | 1024x50257 float32 | - | - | 2.00 | - | 1.00 | - | - | 2.00 | - |" in text
    assert "out of memory" in run.own_failures(groups)


def test_vocab_parallel_records_everything(tmp_path):
    path = tmp_path / "vocab_parallel.json"
    shown = run_module("vocab_parallel", "--quick", "--only", "float32", "--seconds", "0.2", "--json", str(path))
    found = json.loads(path.read_text())["records"]
    assert [record["provider"] for record in found] == ["ours", "ours, of a DTensor", "loss_parallel"]
    for record in found:
        assert record["shape"] == [128, 500] and record["dtype"] == "float32" and "wrong" not in record
        assert record["min_ms"] <= record["median_ms"] <= record["max_ms"] and record["turns"] >= 5
        assert record["provider"] in shown


# -- a GPU's parts, without one ------------------------------------------------------------------------------


def test_pages_of_a_gpu(tmp_path, monkeypatch):
    """Made of the CPU's records, some of them failures: a GPU comes first in the README, and has tables of its own."""
    results, gpu = tmp_path / "results", {"gpu": "NVIDIA Test", "capability": "9.0"}
    for folder, machine in (("cpu", {}), ("nvidia-test", gpu)):
        (results / folder).mkdir(parents=True)
        for path in (records.RESULTS / "cpu").glob("*.json"):
            result = json.loads(path.read_text())
            result["machine"] |= machine
            if machine and path.stem in ("training", "frameworks"):
                failed = [{key: r[key] for key in ("model", "loss", "mode")} for r in result["records"]]
                result["records"] = [{**record, "error": "OSError: no such library"} for record in failed]
            if machine and path.stem == "run":
                ours = next(r for r in result["records"] if r["provider"] == "ours")
                result["records"].insert(1, {**ours, "provider": "liger", "copies": 9.875})
                result["records"].insert(2, {**ours, "provider": "quack", "wrong": "the loss is 2, not 1"})
                result["records"].insert(3, {**ours, "direction": "backward"})
            (results / folder / path.name).write_text(json.dumps(result))
    launch = {**CASES[0].fields((2, 3)), "kernel": "rows", "launch": "forward", "bytes": 2**20, "median_ms": 0.5}
    kernel_records = [{**launch, "floor_ms": 0.25, "ratio": 2.0}, {**launch, "error": "RuntimeError: launched rows"}]
    (results / "nvidia-test" / "kernels.json").write_text(
        json.dumps({**result, "command": "a command", "records": kernel_records})
    )
    monkeypatch.setattr(records, "RESULTS", results)
    for module, name in ((report, "PAGE"), (report, "README"), (figures, "FOLDER")):
        monkeypatch.setattr(module, name, tmp_path / name)
    report.README.write_text((ROOT / "README.md").read_text())
    report.main()
    readme, page = report.README.read_text(), report.PAGE.read_text()
    assert 0 < readme.index("nvidia-test-run.svg") < readme.index("cpu-run.svg")
    ours = page[page.index("## NVIDIA Test") :]
    for text in ("Limits on an H200", "#### The backward alone", "### Each kernel", "| 0.5000 | 0.2500 | 2.00 |"):
        assert text in ours and text not in page[: page.index("## NVIDIA Test")], text
    assert "* quack: other values than float64's: the loss is 2, not 1 (GPT-2)" in ours
    assert "RuntimeError: launched rows" in ours and "OSError: no such library" in ours
    assert "nvidia-test-run.svg" in ours and "nvidia-test-training.svg" not in ours
    assert ">9.9</text>" in (figures.FOLDER / "nvidia-test-run.svg").read_text()


class Event:
    """Of a device that is done at once."""

    def __init__(self, enable_timing: bool) -> None:
        pass

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.time - self.time)


@pytest.fixture
def turns_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_no_provider_finds_the_logits_that_the_last_one_read(turns_of_a_gpu):
    sets = [torch.full((4,), float(number)) for number in range(4)]
    read = []

    def reads(logits):
        read.append(int(logits[0]))

    one, other = timing.Timed("one", reads, sets), timing.Timed("other", reads, sets)
    timing.measure([one, other], "cuda", 0.0)
    turns = timing.LEAST_TURNS["cuda"]
    assert read == [number % 4 for number in range(2 * turns)]
    assert len(one.milliseconds) == len(other.milliseconds) == turns - timing.WARM_UP["cuda"]


def test_a_backward_alone_has_its_forward_outside_of_the_clock(turns_of_a_gpu):
    case = Case("small", (16, 10))
    subject = run.Subject(case, case.cpu, "cpu")
    loss, seen = F.cross_entropy, []

    def slow(logits, target, **options):
        time.sleep(0.02)
        seen.append(logits)
        return loss(logits, target, **options)

    measurement = run.Measurement(subject, run.BACKWARD, None)
    measurement.add(Provider("slow", lambda: slow))
    measurement.device = "cuda"
    measurement.add_copy()
    found = {record["provider"]: record for record in measurement.run(0.0)}
    assert len(seen) == 2 + timing.LEAST_TURNS["cuda"]
    assert "wrong" not in found["slow"] and 0 < found["slow"]["median_ms"] < 10
    assert "bytes" not in found["slow"] and found["copy"]["bytes"] == 2 * 4 * 160
    tables.show([run.long_table(list(found.values()))])


def test_a_copy_of_the_logits_is_restored_after_an_error(turns_of_a_gpu):
    """Several that overwrite have the same one."""
    logits = torch.ones(4)
    copy = logits.clone()

    def overwrites(tensor):
        tensor.zero_()
        raise RuntimeError("half way")

    found = []
    bad = timing.Timed("bad", overwrites, [copy], [logits])
    good = timing.Timed("good", lambda tensor: found.append(tensor.sum().item()), [copy], [logits])
    timing.measure([bad, good], "cuda", 0.0)
    assert bad.summary() == {"error": "RuntimeError: half way"} and set(found) == {4.0}


def test_a_peer_that_refuses_a_layout_leaves_the_point(monkeypatch):
    def refuse(logits, target, **options):
        return F.cross_entropy(*providers.rows(logits, target), **options)

    found = [Provider("ours", lambda: cross_entropy), Provider("rows only", lambda: refuse, overwrites=True)]
    found.append(Provider("broken package", lambda: 1 / 0))
    fields = {"classes": 5, "rows": 7, "layout": "planes"}
    result = scaling.point("classes", fields, Case("planes"), (1, 5, 7), "cpu", found, 0.0)
    records = {record["provider"]: record for record in result}
    assert records["rows only"]["error"] == "takes rows of classes only"
    assert records["broken package"]["error"].startswith("ZeroDivisionError")
    assert records["ours"]["ns_per_element"] > 0 and records["copy"]["ns_per_element"] > 0
    assert [record for record in scaling.overhead("cpu", found[2:], 0.0) if "error" not in record] == []
    tables.show(scaling.console_blocks(result))


def test_limits_hold_or_do_not():
    def record(case, provider, direction=BOTH[0], **more):
        return {"case": case, "provider": provider, "direction": direction, "shape": [2, 3], "dtype": "float32", **more}

    found = limits.of_run(
        {
            "records": [
                record("ImageNet", "ours", median_ms=1.0, copies=1.1),
                record("ImageNet", "native", median_ms=3.0, copies=3.3),
                record("ImageNet", "liger", error="RuntimeError: no"),
                record("VAR, bfloat16", "ours", median_ms=2.0, copies=1.2),
                record("VAR, bfloat16", "quack", median_ms=1.9, copies=1.1),
                record("VAR, bfloat16", "unsloth", median_ms=0.1, copies=0.1, wrong="the loss is 2, not 1"),
                record("VAR, bfloat16", "copy", "copy", median_ms=1.0, copies=1.0),
            ]
        }
    )
    said = {one.what.split(",")[0].split(":")[0]: one for one in found if one.measured is not None}
    assert said["ImageNet"].holds and said["VAR"].said == "does not hold"
    beaten = said["forward+backward"]
    assert not beaten.holds and math.isclose(beaten.measured, 2 / 1.9)
    assert beaten.note == "2 cases, slower in VAR, bfloat16 (quack)"
    assert [one.said for one in found if one.measured is None] == ["not measured"] * (len(limits.COPIES) - 1)
    assert limits.of_peers(None) == []
    peers = [record("ImageNet", name, median_ms=time) for name, time in (("ours", 2.0), ("native compiled", 1.0))]
    assert [one.said for one in limits.of_peers({"records": peers})] == ["does not hold", "not measured"]
    calls = [
        {"curve": "overhead", "case": "MNIST", "provider": name, "direction": direction, "median_us": microseconds}
        for name, microseconds in (("ours", 2.0), ("native", 4.0))
        for direction in ("forward, no gradient", "forward", "backward")
    ]
    assert [one.measured for one in limits.of_scaling({"records": calls})] == [0.5, 0.5]
    (linear_limit,) = limits.of_linear({"records": [{**record("Llama 3's head, bfloat16", "ours"), "products": 1.09}]})
    assert linear_limit.holds is None  # a record of linear has no direction
    head = {"case": "Llama 3's head, bfloat16", "provider": "ours", "products": 1.09}
    assert limits.of_linear({"records": [head]})[0].said == "does not hold"
    tables.show([limits.table(found, detail=True)])


def test_every_limit_is_of_a_case():
    on_gpus = {case.name for case in CASES if case.cuda}
    assert set(limits.COPIES) <= on_gpus and set(limits.PRODUCTS) <= {case.name for case in linear.CASES if case.cuda}


@pytest.mark.skipif(build.compiler() is None, reason="the emulated kernels need a C++ compiler")
def test_kernels_that_are_measured_are_reached():
    """Each case of benchmarks.kernels gets the kernel that it names on an H200, at both of its sizes."""
    emulated = build.load()
    emulated.set_device(132, 228 << 10, 227 << 10, 8)
    for one in kernels.CASES:
        for shape in (one.case.cuda, one.case.quick):
            logits = torch.empty(shape, dtype=one.case.dtype)  # of which no page is touched
            if one.case.layout == "channels_last":
                logits = torch.empty((shape[0], *shape[2:], shape[1]), dtype=one.case.dtype).movedim(-1, 1)
            chosen = emulated.plan(logits, torch.empty((shape[0], *shape[2:]), dtype=torch.long))
            assert {name: chosen[name] for name in one.plan} == one.plan, (one.name, shape)


def test_bytes_of_a_launch():
    """By hand, for 6 positions of 4 classes."""
    plain = kernels.other("plain", (6, 4), (6, 4), "small_rows")
    count, made, finish, handed_over = kernels.launches(plain, (6, 4), kernels.TRAINING)
    assert (count.kernel, count.bytes) == ("count_targets", 6 * 8)
    assert made.bytes == made.made == 2 * 6 * 4 * 4 + 6 * 8
    assert (finish.bytes, handed_over.kernel, handed_over.bytes) == (0, "small_rows", 0)
    soft = kernels.rows("soft", (6, 4), (6, 4), "block", reads=2, dtype=torch.bfloat16, target="probabilities")
    made, *_ = kernels.launches(soft, (6, 4), kernels.TRAINING)
    assert made.bytes == 3 * 6 * 4 * 2 and made.made == made.bytes + 6 * 4 * 2
    forward, _ = kernels.launches(soft, (6, 4), kernels.EVALUATION)
    assert forward.bytes == 2 * 6 * 4 * 2 + 6 * 12
    (backward,) = kernels.launches(plain, (6, 4), kernels.BACKWARD)
    assert backward.bytes == 2 * 6 * 4 * 4 + 6 * 8 + 6 * 8 + 6 * 4


def test_names_of_kernels():
    name = "void xent::gpu::rows<xent::BFloat16, (xent::Objective)0, (xent::gpu::Team)1, true>(xent::gpu::Task)"
    assert kernels.kernel_of(name) == "rows"
    assert kernels.kernel_of("_ZN4xent3gpu13count_targetsIfEEvNS0_4TaskE") == "count_targets"
    assert kernels.kernel_of("Memcpy DtoD (Device -> Device)") == "Memcpy DtoD (Device -> Device)"


def test_counters_are_read(tmp_path):
    cases = kernels.CASES[:1]
    stalls = [kernels.STALLS.replace("*", name) for name in ("long_scoreboard", "selected")]
    columns = ["ID", "Kernel Name", kernels.READ, kernels.WRITTEN, kernels.TIME, kernels.OCCUPANCY, *stalls]
    rows = [columns, ["", "", "Kbyte", "byte", "us", "%", "inst", "inst"]]
    for number, (_, _, launch) in enumerate(kernels.once(cases, quick=True)):
        rows.append([number, f"void xent::gpu::{launch.kernel}<float>(int)", "1,024.5", 500, "7.5", "43.5", 5.25, 9.0])
    path = tmp_path / "counters.csv"
    lines = ["==PROF== Connected", *(",".join(f'"{cell}"' for cell in row) for row in rows), "==PROF== Disconnected"]
    path.write_text("\n".join(lines))
    found = kernels.counter_records(kernels.counted(path), cases, quick=True)
    assert [r["kernel"] for r in found][:4] == ["count_targets", "small_rows", "finish", "small_rows"]
    assert found[1]["dram_bytes"] == 1_025_000 and found[1]["ms"] == 0.0075 and found[1]["occupancy"] == 43.5
    assert found[1]["dram_ratio"] == 1_025_000 / found[1]["bytes"] and found[2]["dram_ratio"] is None
    assert (found[1]["stall"], found[1]["stall_cycles"], found[1]["registers"]) == ("long_scoreboard", 5.25, None)
    tables.show([kernels.counters_table(found)])
    assert "long_scoreboard" in kernels.counters_table(found).markdown()
    with pytest.raises(ValueError, match="not the launches"):
        kernels.counter_records(kernels.counted(path)[1:], cases, quick=True)
    path.write_text("==ERROR== The user does not have permission")
    with pytest.raises(ValueError, match="permission"):
        kernels.counted(path)


# -- the acceptance on a GPU, with a program in the place of Python ------------------------------------------

CAPS = {"build": 120, "smoke": 45, "benchmark": 80, "tests": 110, "memcheck": 50, "racecheck": 30, "peers": 35}
ACCEPTANCE = ["bash", str(ROOT / "benchmarks" / "gpu_acceptance.sh")]
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def acceptance(tmp_path):
    """Its environment, for a Python that shows its arguments and then does as these lines of sh say."""

    def with_python(script: str = "", **environment: str) -> dict[str, str]:
        tools = tmp_path / "tools"
        tools.mkdir()
        for name, text in {"python": f'echo "$*"\n{script}', "compute-sanitizer": 'echo "$*"'}.items():
            (tools / name).write_text(f"#!/bin/sh\n{text}\n")
            (tools / name).chmod(0o755)
        given = {"PYTHON": str(tools / "python"), "OUT": str(tmp_path / "out"), "TORCH_CUDA_ARCH_LIST": "9.0"}
        given |= {"ARCHIVE": str(tmp_path / "packed" / "all.tgz"), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
        return {k: v for k, v in os.environ.items() if k not in ("STEPS", "CASES", "TOTAL")} | given | environment

    return with_python


def accept(environment: dict[str, str], status: int) -> str:
    done = subprocess.run(ACCEPTANCE, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def states(shown: str) -> dict[str, str]:
    summary = shown[shown.rindex("step ") :]
    return dict(re.findall(r"^(\w+) +(ok|failed|out of time|no time|skipped|by a signal)", summary, re.MULTILINE))


def packed(environment: dict[str, str]) -> set[str]:
    with tarfile.open(environment["ARCHIVE"]) as archive:
        return set(archive.getnames())


@needs_bash
def test_acceptance_has_an_order_and_470_seconds(acceptance):
    environment = acceptance()
    shown = accept(environment, 0)
    caps = re.findall(r"^--- (\w+), at most (\d+) s: (.*)", shown, re.MULTILINE)
    most = {step: int(seconds) for step, seconds, _ in caps}
    assert list(most) == [*CAPS, "linear"] == list(states(shown)) and set(states(shown).values()) == {"ok"}
    assert sum(CAPS.values()) <= 470
    assert all(CAPS[step] - 1 <= most[step] <= CAPS[step] for step in CAPS)
    commands = {step: command for step, _, command in caps}
    assert "-x --timeout=30 --timeout-method=thread -m smoke" in commands["smoke"] and "expecttest" not in shown
    assert "--without ^native compiled$" in commands["benchmark"]
    seconds = int(re.search(r"--seconds (\d+)", commands["benchmark"])[1])
    assert 40 <= seconds < CAPS["benchmark"]
    left_out = re.search(r"--without (\S+ \S+)", commands["peers"])[1]
    measured = [one.name for one in providers.REGISTRY if not re.search(left_out, one.name)]
    assert {"ours", "native compiled"} <= set(measured) < {"ours", "native compiled", "liger", "liger in place"}
    chosen = re.search(r"--only (.*) --without", commands["peers"])[1]
    assert len([case for case in CASES if case.cuda and re.search(chosen, case.name)]) == 3
    assert {"summary.log", "build.log", "smoke.log", "tests-1.log"} < packed(environment)
    assert [path.name for path in Path(environment["ARCHIVE"]).parent.iterdir()] == ["all.tgz"]  # one file


@needs_bash
def test_acceptance_runs_each_test_on_the_gpu_in_one_process(acceptance):
    environment = acceptance(STEPS="tests memcheck racecheck")
    accept(environment, 0)
    out = Path(environment["OUT"])
    logs = sorted(out.glob("tests-*.log"), key=lambda path: int(path.stem[6:]))
    commands = [log.read_text() for log in logs]
    assert all("--timeout=60 --timeout-method=thread -m gpu -k" in command for command in commands)
    chosen = [re.search(r" -k (.*) tests/test_gpu.py", command)[1] for command in commands]

    def runs(expression: str, test: str) -> bool:
        return eval(re.sub(r"\b(?!(?:and|or|not)\b)\w+", lambda word: str(word[0] in test), expression))

    for test in filter(re.compile("test_").match, vars(test_gpu)):
        assert sum(runs(expression, test) for expression in chosen) == 1, test
    first = (
        "kernels_that_overlap captured_in_a_graph the_same_bits_of_large_sums several_streams a_target_out_of_bounds"
    )
    for expression, test in zip(chosen, first.split(), strict=False):
        assert runs(expression, f"test_{test}"), expression
    sanitized = (out / "racecheck.log").read_text()
    assert re.findall(r"test_sanitizer\[(.*?)-index-bfloat16\]", sanitized) == RACED
    assert set(RACED) <= test_gpu.KERNELS.keys()
    memchecked = re.search(r" -k (.*) tests/test_gpu.py", (out / "memcheck.log").read_text())[1]
    kinds = {f"sanitizer {kind} {dtype}" for kind in ("index", "smoothed", "soft") for dtype in ("bfloat16", "float32")}
    assert {kind for kind in kinds if runs(memchecked, kind)} == {"sanitizer index bfloat16", "sanitizer soft float32"}


RACED = ["small rows", "rows of a warp", "rows of a block", "rows of a cluster", "image"]


@needs_bash
def test_acceptance_goes_on_and_packs_everything(acceptance):
    """After a step that fails."""
    steps = "build tests kernels linear tune scaling idioms accuracy training frameworks benchmark"
    environment = acceptance('case "$*" in *benchmarks.linear*) exit 3 ;; esac', STEPS=steps, CASES="one|two")
    found = states(accept(environment, 1))
    assert found == {step: "failed" if step == "linear" else "ok" for step in found} and found.keys() == {
        *steps.split()
    }
    logs = {f"{step}.log" for step in steps.split() if step != "tests"} | {"summary.log"}
    assert {name for name in packed(environment) if not name.startswith("tests-")} == logs
    assert "--only one|two" in (Path(environment["OUT"]) / "benchmark.log").read_text()


HANGS = """
case "$*" in *'-m smoke'*)
  printf 'tests/test_gpu.py::test_smoke[rows of a warp-index-bfloat16] PASSED [ 10%%]\n'
  printf 'tests/test_gpu.py::test_smoke[rows of a block-index-bfloat16] '
  echo $$ >"$OUT/hanging.pid"
  sleep 100 ;;
esac
"""


@needs_bash
def test_acceptance_names_a_kernel_that_hangs_or_fails(acceptance, tmp_path):
    """And leaves the other steps their time."""
    environment = acceptance(HANGS, STEPS="smoke linear", TOTAL="20")
    began = time.monotonic()
    shown = accept(environment, 1)
    assert time.monotonic() - began < 15
    assert states(shown) == {"smoke": "out of time", "linear": "ok"}
    assert re.search(r"^smoke .* test_smoke\[rows of a block-index-bfloat16\] \|", shown, re.MULTILINE)
    failed = "tests/test_gpu.py::test_smoke[image-soft-float32] FAILED [ 20%]"
    shutil.rmtree(tmp_path / "tools")
    environment = acceptance(f"case \"$*\" in *smoke*) echo '{failed}'; echo '1 failed'; exit 1 ;; esac", STEPS="smoke")
    shown = accept(environment, 1)
    assert re.search(r"^smoke +failed .* test_smoke\[image-soft-float32\] \| 1 failed", shown, re.MULTILINE)


@needs_bash
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=lambda end: end.name)
def test_acceptance_leaves_an_archive_when_it_is_cut_short(acceptance, end):
    environment = acceptance(HANGS, STEPS="build smoke linear")
    hanging = Path(environment["OUT"]) / "hanging.pid"
    with subprocess.Popen(ACCEPTANCE, env=environment, stdout=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 60
        while not (hanging.exists() and hanging.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        running.send_signal(end)
        if end == signal.SIGKILL:
            os.kill(int(hanging.read_text()), signal.SIGTERM)
        shown = running.communicate(timeout=60)[0]
    assert {"build.log", "summary.log"} <= packed(environment)
    if end == signal.SIGTERM:
        assert running.returncode == 1 and states(shown) == {"build": "ok", "stopped": "by a signal"}
        assert "smoke.log" in packed(environment)


@needs_bash
def test_acceptance_without_a_gpu_says_so(acceptance):
    environment = acceptance("exit 1", PATH=f"/usr/bin{os.pathsep}/bin")
    assert "No Python here has a torch that finds a GPU" in accept(environment, 1)
    assert packed(environment) == {"summary.log"}


def test_smoke_runs_each_kernel(monkeypatch):
    """Against itself, on the CPU: a mistake in it does not wait for a GPU to be found."""
    monkeypatch.setattr(test_gpu, "DEVICE", torch.device("cpu"))
    for kernel, kind in itertools.product(test_gpu.KERNELS, ("index", "smoothed", "soft", "general")):
        test_gpu.test_smoke(kernel, kind, torch.bfloat16)
    for name in test_gpu.TARGETS:
        test_gpu.test_every_target(name, "image", torch.float32)


SMOKE = {
    "small rows": {"family": "small_rows"},
    "small rows, odd": {"family": "small_rows"},
    "small rows, strided": {"family": "small_rows"},
    "rows of a warp": {"family": "rows", "team": "warp", "copied": True},
    "rows of a warp, odd": {"family": "rows", "team": "warp", "copied": True},
    "rows of a block": {"family": "rows", "team": "block", "copied": True},
    "rows of a cluster": {"family": "rows", "team": "cluster", "copied": True},
    "rows past shared memory": {"family": "rows", "team": "block", "copied": False},
    "image": {"family": "spatial", "vectors": True, "copied": True},
    "image of many classes": {"family": "spatial", "vectors": True, "copied": True},
    "image of classes past shared memory": {"family": "spatial", "vectors": True, "copied": False},
    "odd image": {"family": "spatial", "vectors": False},
    "odd image of many classes": {"family": "spatial", "vectors": False},
    "channels_last": {"family": "small_rows"},
    "strided": {"family": "strided", "team": "warp"},
    "strided, many classes": {"family": "strided", "team": "block"},
}


@pytest.mark.skipif(build.compiler() is None, reason="the emulated kernels need a C++ compiler")
def test_smoke_reaches_the_kernels_that_it_names():
    emulated = build.load()
    emulated.set_device(132, 228 << 10, 227 << 10, 8)
    assert SMOKE.keys() == test_gpu.KERNELS.keys()
    for name, (shape, placed) in test_gpu.KERNELS.items():
        for dtype in (torch.bfloat16, torch.float32):
            logits = placed(torch.zeros(shape, dtype=dtype))
            chosen = emulated.plan(logits, torch.empty((shape[0], *shape[2:]), dtype=torch.long))
            assert {key: chosen[key] for key in SMOKE[name]} == SMOKE[name], (name, dtype)

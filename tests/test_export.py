"""Graphs that leave PyTorch: an export has one operator of ours, its decompositions none, nor has a graph of forward
and backward, nor ONNX; and what they compute is the loss. Compilers keep the fused operators."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import oracle_linear
import oracle_targets
import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from cases import generator
from oracle import Exact
from oracle_targets import Upstream
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch.export.experimental import _export_forward_backward
from torch.export.graph_signature import InputKind

from cross_entropy_ext import CrossEntropyLoss, CrossEntropyStats, patch_torch
from cross_entropy_ext import functional as ext

CLASSES = 5
OUTPUTS = ("loss", "lse", "target_log_prob", "entropy", "z_loss")
EXTRAS = {"z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.5}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator("export", *shape))


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, generator=generator("export", *shape)) + 0.1


def labels(*shape: int, ignored: int | None = -100) -> Tensor:
    target = torch.randint(CLASSES, shape, generator=generator("export", *shape))
    if ignored is not None:
        target[1] = ignored
    return target


def masked(n: int) -> Tensor:
    return normal(n, CLASSES).index_fill(1, torch.tensor([2]), -torch.inf)


def unmasked(n: int) -> Tensor:
    target = labels(n)
    return torch.where(target == 2, 3, target)


CLASS_WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.0, 1.5])


@dataclass
class Case:
    """A call with so many positions, whose first tensor a gradient is asked of."""

    function: str
    tensors: Callable[[int], dict[str, Tensor]]
    options: dict[str, object] = field(default_factory=dict)

    def reference(self, tensors: dict[str, Tensor]) -> dict[str, Exact]:
        tensors, options, head = dict(tensors), dict(self.options), None
        if self.function == "nll_loss":
            x, weight = tensors["input"].detach().double().requires_grad_(), options["weight"].double()
            loss = F.nll_loss(x, tensors["target"], weight)
            return {"loss": Exact(loss.detach(), loss), "input": Exact(torch.autograd.grad(loss, x)[0], loss)}
        function = self.function.removeprefix("linear_")
        if function != self.function:
            head = [tensors.pop("input").double(), tensors.pop("linear_weight").double()]
            tensors = {"input": oracle_linear.logits_of(*head, tensors.pop("linear_bias").double()), **tensors}
        upstream = Upstream(loss=torch.ones(()))
        exact = getattr(oracle_targets, function)(**tensors, **options, upstream=upstream)
        if head is not None:
            gradient = exact["input"].value
            exact["input"] = Exact(gradient @ head[1], gradient)
        return exact


CASES = {
    "labels": Case("cross_entropy", lambda n: {"input": normal(n, CLASSES), "target": labels(n)}),
    "short labels": Case("cross_entropy", lambda n: {"input": normal(n, CLASSES), "target": labels(n).to(torch.int16)}),
    "every option": Case(
        "cross_entropy",
        lambda n: {"input": normal(n, CLASSES, 3), "target": labels(n, 3, ignored=2)},
        {"weight": CLASS_WEIGHT, "label_smoothing": 0.1, "ignore_index": 2, "reduction": "none"},
    ),
    "classes without weight are masked": Case(
        "cross_entropy",
        lambda n: {"input": masked(n), "target": unmasked(n)},
        {"weight": CLASS_WEIGHT, "label_smoothing": 0.1},
    ),
    "probabilities": Case(
        "cross_entropy",
        lambda n: {"input": normal(n, CLASSES), "target": normal(n, CLASSES).softmax(1)},
        {"label_smoothing": 0.1, "weight": CLASS_WEIGHT},
    ),
    "improbable classes are masked": Case(
        "cross_entropy", lambda n: {"input": masked(n), "target": masked(n).softmax(1)}, {"reduction": "sum"}
    ),
    "extras": Case(
        "cross_entropy",
        lambda n: {"input": normal(n, CLASSES), "target": labels(n), "sample_weight": uniform(n)},
        {"denominator": 3.0, **EXTRAS},
    ),
    "statistics": Case(
        "cross_entropy_with_stats",
        lambda n: {"input": normal(n, CLASSES), "target": labels(n)},
        {"reduction": "sum", **EXTRAS},
    ),
    "pairs": Case(
        "sparse_cross_entropy",
        lambda n: {"input": normal(n, CLASSES), "indices": labels(n, 2), "probs": uniform(n, 2)},
    ),
    "mixup": Case(
        "mixup_cross_entropy",
        lambda n: {"input": normal(n, CLASSES), "target_a": labels(n), "target_b": labels(n).flip(0)},
        {"lam": 0.3},
    ),
    "teacher": Case(
        "distillation_loss",
        lambda n: {"student_logits": normal(n, CLASSES), "teacher_logits": normal(n + 1, CLASSES)[1:]},
        {"temperature": 2.0},
    ),
    "teacher and labels": Case(
        "distillation_loss",
        lambda n: {"student_logits": normal(n, CLASSES), "teacher_logits": 2 * normal(n, CLASSES), "target": labels(n)},
        {"temperature": 2.0, "alpha": 0.7},
    ),
    "log-probabilities": Case(
        "nll_loss",
        lambda n: {"input": normal(n, CLASSES).log_softmax(1), "target": labels(n)},
        {"weight": CLASS_WEIGHT},
    ),
    "linear": Case(
        "linear_cross_entropy",
        lambda n: {
            "input": normal(n, 6),
            "linear_weight": normal(CLASSES, 6),
            "linear_bias": normal(CLASSES),
            "target": labels(n),
        },
    ),
    "linear with statistics": Case(
        "linear_cross_entropy_with_stats",
        lambda n: {
            "input": normal(n, 6),
            "linear_weight": normal(CLASSES, 6),
            "linear_bias": normal(CLASSES),
            "target": labels(n),
        },
        EXTRAS,
    ),
}
every_case = pytest.mark.parametrize("name", CASES)
# Of each kind one, for what takes seconds.
few = pytest.mark.parametrize(
    "name", ["improbable classes are masked", "every option", "statistics", "pairs", "teacher and labels", "linear"]
)


class Model(nn.Module):
    """A loss whose first tensors may be parameters."""

    def __init__(self, case: Case, **parameters: Tensor) -> None:
        super().__init__()
        self.case, self.names = case, [name for name in case.tensors(4) if name not in parameters]
        self.parts = nn.ParameterDict(parameters)

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        named = {**dict(self.parts.items()), **dict(zip(self.names, tensors, strict=True))}
        result = getattr(ext, self.case.function)(**named, **self.case.options)
        return tuple(result) if isinstance(result, CrossEntropyStats) else result


def operators(graph: torch.fx.GraphModule) -> list[torch._ops.OpOverload]:
    nodes = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    return [target for target in nodes if isinstance(target, torch._ops.OpOverload)]


def ours(graph: torch.fx.GraphModule) -> list[str]:
    return [str(op) for op in operators(graph) if op.namespace == "cross_entropy_ext"]


def not_core(graph: torch.fx.GraphModule) -> list[str]:
    """But for what export itself adds beside each cast of a program, ours or not."""
    own = torch.ops.aten._assert_tensor_metadata.default
    return [str(op) for op in operators(graph) if torch.Tag.core not in op.tags and op is not own]


def assert_exact(found: object, exact: dict[str, Exact], logits: Tensor | None = None) -> None:
    results = found if isinstance(found, (tuple, list)) else (found,)
    for name, result in zip(OUTPUTS, results, strict=False):
        value = exact[name].value
        assert tuple(result.shape) == tuple(value.shape), name
        torch.testing.assert_close(torch.as_tensor(result).double(), value, rtol=2e-6, atol=2e-6, msg=name)
    if len(results) > len(OUTPUTS):  # the gap is 0 at the largest logit, and all are -1 where nothing is read
        gaps, argmax = exact["argmax"].value, torch.as_tensor(results[-1])
        assert torch.equal(argmax, torch.where(gaps[:, 0] < 0, -1, gaps.argmin(1)))


def exported(case: Case, strict: bool = False) -> torch.export.ExportedProgram:
    tensors = tuple(case.tensors(4).values())
    batch = torch.export.Dim("batch", min=2, max=1024)
    fixed = {"linear_weight", "linear_bias"}
    shapes = tuple(None if name in fixed else {0: batch} for name in case.tensors(4))
    return torch.export.export(Model(case), tensors, dynamic_shapes=(shapes,), strict=strict)


@pytest.mark.thin(3)
@every_case
def test_decompositions(name: str) -> None:
    """An export has one operator of ours, whatever is decomposed otherwise; its decompositions are core ATen's."""
    case = CASES[name]
    program = exported(case)
    assert len(ours(program.graph_module)) == 1
    assert ours(program.run_decompositions({}).graph_module) == ours(program.graph_module)
    decomposed = program.run_decompositions()
    assert not not_core(decomposed.graph_module)
    for n in (4, 7):
        tensors = case.tensors(n)
        for p in (program, decomposed):
            assert_exact(p.module()(*tensors.values()), case.reference(tensors))


def test_decompositions_of_a_choice() -> None:
    """A table with no entry for a loss leaves it; an entry may be one's own."""
    program = exported(CASES["labels"])
    op = torch.ops.cross_entropy_ext.cross_entropy.default
    table = torch.export.default_decompositions()
    own = {op: lambda logits, target, *_, **__: logits.sum()}
    decomposed = program.run_decompositions({**table, **own})
    assert operators(decomposed.graph_module) == [torch.ops.aten.sum.dim_IntList]
    del table[op]
    assert ours(program.run_decompositions(table).graph_module) == [str(op)]
    assert not ours(program.run_decompositions().graph_module)


def run_joint(program: torch.export.ExportedProgram, *inputs: Tensor) -> tuple[Tensor, ...]:
    values, remaining = {**program.state_dict, **program.constants}, iter(inputs)
    arguments = [
        next(remaining) if spec.kind is InputKind.USER_INPUT else values[spec.target]
        for spec in program.graph_signature.input_specs
    ]
    return program.graph_module(*arguments)


@pytest.mark.parametrize(
    "name",
    [
        "classes without weight are masked",
        "probabilities",
        "statistics",
        "pairs",
        "teacher",
        "log-probabilities",
        "linear",
    ],
)
def test_joint_graph(name: str) -> None:
    """Forward and backward in one graph: neither has an operator of ours, and the gradient is right."""
    case = CASES[name]
    tensors = case.tensors(4)
    first, *others = tensors
    model = Model(case, **{first: tensors[first]})
    loss_alone = model if "stat" not in name else First(model)
    program = torch.export.export(loss_alone, tuple(tensors[other] for other in others))
    assert len(ours(program.graph_module)) == 1
    joint = _export_forward_backward(program)
    assert not ours(joint.graph_module) and not not_core(joint.graph_module)
    with torch.no_grad():
        loss, gradient = run_joint(joint, *(tensors[other] for other in others))
    exact = case.reference(tensors)
    assert_exact(loss, exact)
    torch.testing.assert_close(gradient.double(), exact[first].value, rtol=2e-6, atol=2e-6)


class First(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(*tensors)[0]


def test_joint_graph_of_a_function() -> None:
    case = CASES["teacher"]
    tensors = case.tensors(4)
    leaves, model = [tensor.requires_grad_() for tensor in tensors.values()], Model(case)
    graph = aot_export_joint_simple(lambda *tensors: (model(*tensors),), leaves, trace_joint=True)
    assert not ours(graph)
    with torch.no_grad():
        loss, *gradients = torch.utils._pytree.tree_leaves(graph(leaves, [torch.ones(())]))
    exact = case.reference(tensors)
    assert_exact(loss, exact)
    for name, gradient in zip(tensors, gradients, strict=True):
        torch.testing.assert_close(gradient.double(), exact[name].value, rtol=2e-6, atol=2e-6)


# -- ONNX ----------------------------------------------------------------------------------------------------


def as_onnx(model: nn.Module, example: tuple[Tensor, ...], path: Path, dynamo: bool, fixed: tuple[int, ...] = ()):
    """The exported model as a function of other tensors, run by onnxruntime."""
    runtime = pytest.importorskip("onnxruntime", reason="the clients' extra is not installed")
    pytest.importorskip("onnxscript", reason="the clients' extra is not installed")
    names = [f"tensor{i}" for i in range(len(example))]
    if dynamo:
        batch = torch.export.Dim("batch", min=2, max=1024)
        shapes = tuple(None if i in fixed else {0: batch} for i in range(len(example)))
        options = {"dynamic_shapes": (shapes,), "external_data": False, "verbose": False}
    else:
        options = {"dynamic_axes": {name: {0: "batch"} for i, name in enumerate(names) if i not in fixed}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter is deprecated, and warns of what it made constant
        torch.onnx.export(model, example, path, input_names=names, dynamo=dynamo, opset_version=18, **options)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*tensors: Tensor) -> list[Tensor]:
        inputs = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.as_tensor(result) for result in session.run(None, inputs)]

    return run


exporters = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])


@pytest.mark.thin(2)
@exporters
@few
def test_onnx(name: str, dynamo: bool, tmp_path: Path) -> None:
    """Both exporters make a model that onnxruntime runs, for another batch, too."""
    case = CASES[name]
    fixed = tuple(i for i, key in enumerate(case.tensors(4)) if key.startswith("linear_"))
    run = as_onnx(Model(case), tuple(case.tensors(4).values()), tmp_path / "model.onnx", dynamo, fixed)
    for n in (4, 7):
        tensors = case.tensors(n)
        assert_exact(run(*tensors.values()), case.reference(tensors))


@exporters
def test_onnx_of_a_patched_model(dynamo: bool, tmp_path: Path) -> None:
    tensors = normal(4, CLASSES), labels(4)
    with patch_torch():
        loss = nn.CrossEntropyLoss(label_smoothing=0.1)
        run = as_onnx(Varargs(loss), tensors, tmp_path / "model.onnx", dynamo)
    (found,) = run(*tensors)
    torch.testing.assert_close(found, F.cross_entropy(*tensors, label_smoothing=0.1))


class Varargs(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.module(*tensors)


# -- and what stays ------------------------------------------------------------------------------------------


def test_jit_trace_has_the_operator() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        trace = torch.jit.trace(CrossEntropyLoss(), (normal(4, CLASSES), labels(4)))
    assert "cross_entropy_ext::cross_entropy" in str(trace.inlined_graph)
    assert trace(normal(7, CLASSES), labels(7)) == ext.cross_entropy(normal(7, CLASSES), labels(7))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["labels", "linear"])
def test_compilers_keep_the_operators(name: str, backend: str) -> None:
    """After an export, in inference, and in training."""
    case = CASES[name]
    exported(case).run_decompositions()
    torch._dynamo.reset()
    tensors = tuple(case.tensors(4).values())
    function = torch.compile(Model(case), backend=backend, fullgraph=True)
    with torch._inductor.config.patch(fx_graph_cache=False):
        for context in (torch.enable_grad, torch.inference_mode):
            with context():
                leaf = tensors[0].clone().requires_grad_(context is torch.enable_grad)
                function(leaf, *tensors[1:])
                with torch.profiler.profile() as profile:
                    function(leaf, *tensors[1:])
            seen = {event.key for event in profile.key_averages()}
            assert any("cross_entropy_ext::" in key for key in seen) and "aten::_log_softmax" not in seen
            assert "cross_entropy_ext::_composite" not in seen

"""The loss under the compilers: torch.compile, AOTAutograd, compiled autograd, torch.export and
AOTInductor. One graph, one operator of ours in it, the same values, and no recompilation for another batch
size."""

from __future__ import annotations

import io
import math
import operator

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
import torch.nn.functional as F
from cases import numbered
from differentiable import (
    SAMPLES,
    alike,
    cast_like,
    close,
    cross_entropy,
    every_sample,
    grads,
    labels,
    named,
    native,
    normal,
    same,
    soft,
    weights,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from cross_entropy_ext import CrossEntropyLoss, functional

OP = torch.ops.cross_entropy_ext.cross_entropy.default
WEIGHTED = torch.ops.cross_entropy_ext.cross_entropy.weight
FORWARD = torch.ops.cross_entropy_ext._forward.default
BACKWARD = torch.ops.cross_entropy_ext._backward.default

backends = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
few = named("mean", "none", "weights_smoothing_ignored", "kdim", "transposed", "soft_weights_smoothing", "no_batch")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No test profits or suffers from the graphs of another, or of a build of this package before the
    present one."""
    torch._dynamo.reset()
    functorch, inductor = torch._functorch.config, torch._inductor.config
    with functorch.patch(enable_autograd_cache=False), inductor.patch(fx_graph_cache=False):
        yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **kwargs):
    return torch.compile(function, backend=backend, **{"fullgraph": True, "dynamic": True, **kwargs})


# -- torch.compile -------------------------------------------------------------------------------------------


@pytest.mark.thin(2)
@backends
@every_sample
def test_compiled_equals_eager(sample, backend):
    """Every target, option and layout, forward and backward, in one graph: equal to eager."""
    logits, target, options = sample.make()
    function = compiled(lambda x, t, **options: cross_entropy(x, t, **options), backend)
    expected = grads(cross_entropy, logits, target, options)
    alike(grads(function, logits, target, options), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        alike(grads(function, logits, target, options), expected)


@backends
@pytest.mark.parametrize(
    "extras",
    [
        {"loss_dtype": torch.float32},
        {"loss_dtype": torch.float64, "reduction": "none"},
        {"empty": "zero"},
        {"ignore_index": 3},
        {"size_average": False},
        {"reduce": False},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:size_average and reduce args")
def test_compiled_extras(extras, backend):
    """The arguments that the samples do not set, on half logits."""
    logits, target = normal(6, 7).bfloat16(), labels(7, 6)
    function = compiled(lambda x, t: cross_entropy(x, t, **extras), backend)
    alike(
        grads(function, logits, target, {}),
        grads(lambda x, t: cross_entropy(x, t, **extras), logits, target, {}),
    )


def test_compiled_empty_and_ignored():
    """No positions, and none that counts, at sizes that the compiler has guards for."""
    for empty in ("nan", "zero"):
        function = compiled(lambda x, t, empty=empty: cross_entropy(x, t, empty=empty))
        for logits, target in ((normal(0, 5), labels(5, 0)), (normal(3, 5), torch.full((3,), -100))):
            expected = grads(lambda x, t, e=empty: cross_entropy(x, t, empty=e), logits, target, {})
            close(grads(function, logits, target, {}), expected)


@backends
def test_fused_with_a_model(backend):
    """Elementwise work before and after the loss is compiled around it."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5)).double()
    loss = CrossEntropyLoss(weights(5), label_smoothing=0.1)

    def objective(x, t):
        logits = body(x)
        return loss(logits, t) * 2 + 1e-2 * logits.logsumexp(1).square().mean()

    x, t = normal(7, 6), labels(5, 7, ignored=True)
    found = []
    for function in (objective, compiled(objective, backend)):
        body.zero_grad()
        value = function(x, t)
        value.backward()
        found.append((value.detach(), *(p.grad.clone() for p in body.parameters())))
    close(found[1], found[0])


@pytest.mark.parametrize("name", ["labels", "probabilities", "pixels", "channels_last", "transposed"])
def test_no_recompilation_for_another_size(name):
    """dynamic=True: one frame serves every batch, class count and picture."""
    build = {
        "labels": lambda n, c: (normal(n, c), labels(c, n, ignored=True)),
        "probabilities": lambda n, c: (normal(n, c), soft(n, c)),
        "pixels": lambda n, c: (normal(n, c, n + 1, c + 2), labels(c, n, n + 1, c + 2)),
        "channels_last": lambda n, c: (
            normal(n, c, n + 1, c + 2).to(memory_format=torch.channels_last),
            labels(c, n, n + 1, c + 2),
        ),
        "transposed": lambda n, c: (normal(n, n + 1, c).transpose(1, 2), labels(c, n, n + 1)),
    }[name]
    counter = CompileCounterWithBackend("eager")
    options = {"label_smoothing": 0.1}
    counted = compiled(lambda x, t: cross_entropy(x, t, **options), counter)
    function = compiled(lambda x, t: cross_entropy(x, t, **options))
    for n, c in ((4, 7), (9, 5), (2, 11), (33, 3)):
        logits, target = build(n, c)
        expected = grads(cross_entropy, logits, target, options)
        with torch._dynamo.config.patch(error_on_recompile=n != 4):
            close(grads(counted, logits, target, {}), expected)
            close(grads(function, logits, target, {}), expected)
    assert counter.frame_count == 1


def test_automatic_dynamic_shapes():
    """dynamic=None, the default: the second size makes a dynamic frame, which is the last."""
    counter = CompileCounterWithBackend("eager")
    function = compiled(lambda x, t: cross_entropy(x, t), counter, dynamic=None)
    for n in (4, 9, 2, 33, 16):
        logits, target = normal(n, 5), labels(5, n)
        same(grads(function, logits, target, {}), grads(cross_entropy, logits, target, {}))
    assert counter.frame_count == 2


@backends
@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_training(backend, inplace):
    """Model and loss in one graph, for several batches of different size: the losses and parameters of
    eager."""
    data = [(normal(n, 6), labels(7, n)) for n in (8, 8, 5, 12)]
    runs = []
    for compile_it in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 7)).double()
        criterion = CrossEntropyLoss(label_smoothing=0.05, inplace=inplace)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

        def objective(x, t, model=model, criterion=criterion):
            return criterion(model(x), t)

        function = compiled(objective, backend) if compile_it else objective
        history = []
        for x, t in data:
            optimizer.zero_grad()
            loss = function(x, t)
            loss.backward()
            optimizer.step()
            history.append((loss.detach(), *(p.detach().clone() for p in model.parameters())))
        runs.append(history)
    close(runs[1], runs[0], tolerance=1e-11)


@pytest.mark.thin(2)
@backends
@named("mean", "row_slices", "transposed", "channels_last", "soft_weights_smoothing")
def test_compiled_inplace(sample, backend):
    """Under a compiler inplace may be out of place, and is right in every case: logits made inside and
    outside."""
    logits, target, options = sample.make()

    def inside(x, t):
        return cross_entropy(x * 1.0, t, **options, inplace=True)

    def outside(x, t):
        return cross_entropy(x, t, **options, inplace=True)

    expected = grads(cross_entropy, logits, target, options)
    for function in (inside, outside):
        for _ in range(2):
            x = cast_like(logits.clone(memory_format=torch.preserve_format), torch.float64)
            close(grads(compiled(function, backend), x, target, {}), expected)


@backends
def test_metrics_of_the_logits(backend):
    """What a compiled step computes from the logits after an in-place loss is what it would be without."""

    def step(w, x, t, inplace):
        logits = x @ w
        loss = cross_entropy(logits, t, inplace=inplace)
        return loss, logits.argmax(1), logits

    w, x, t = normal(6, 5), normal(8, 6), labels(5, 8)
    found = []
    for inplace in (False, True):
        leaf = w.detach().requires_grad_()
        loss, best, logits = compiled(step, backend)(leaf, x, t, inplace)
        logits = logits.detach().clone()
        loss.backward()
        found.append((loss.detach(), best, logits, leaf.grad))
    close(found[1], found[0])
    close(found[0][2], x @ w)


@backends
def test_compiled_autocast(backend):
    """bfloat16 logits of a linear layer under autocast: a float32 loss from half logits, as in eager."""
    torch.manual_seed(0)
    layer, x, t = nn.Linear(16, 9), torch.randn(8, 16), labels(9, 8)

    def objective(x, t):
        with torch.autocast("cpu", torch.bfloat16):
            logits = layer(x)
            return cross_entropy(logits, t, label_smoothing=0.1), logits

    found = []
    for function in (objective, compiled(objective, backend)):
        layer.zero_grad()
        loss, logits = function(x, t)
        assert loss.dtype == torch.float32 and logits.dtype == torch.bfloat16
        loss.backward()
        found.append((loss.detach(), layer.weight.grad.clone()))
        exact = native(logits.detach().double(), t, label_smoothing=0.1)
        torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], found[0], rtol=2**-7, atol=2**-7)
    with torch.autocast("cpu", torch.bfloat16):  # autocast around the compiled function
        loss, _ = compiled(lambda x, t: (cross_entropy(layer(x), t), 0), backend)(x, t)
    assert loss.dtype == torch.float32


def test_compiled_checkpoint():
    """Activation checkpointing inside a compiled graph runs the loss again in the backward."""
    w, x, t = normal(6, 5), normal(8, 6), labels(5, 8)

    def head(w):
        return cross_entropy(x @ w, t, label_smoothing=0.1)

    plain, leaf = w.detach().requires_grad_(), w.detach().requires_grad_()
    head(plain).backward()
    compiled(lambda w: checkpoint(head, w, use_reentrant=False))(leaf).backward()
    close(leaf.grad, plain.grad)


def test_compiled_without_grad():
    """no_grad and inference_mode, and a module that is evaluated after it was trained."""
    logits, target = normal(4, 5).requires_grad_(), labels(5, 4)
    function = compiled(lambda x, t: cross_entropy(x, t))
    expected = cross_entropy(logits, target).detach()
    assert function(logits, target).requires_grad
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            loss = function(logits, target)
            assert not loss.requires_grad
            same(loss.clone(), expected)


@backends
def test_out_of_range_label(backend):
    """The same IndexError in eager and compiled code, for labels and ignored ones next to them."""
    function = compiled(lambda x, t: cross_entropy(x, t), backend)
    for bad in (7, -1, 5, 2**40):
        target = torch.tensor([0, -100, bad, 1])
        for f in (cross_entropy, function):
            with pytest.raises(IndexError, match=rf"Target {bad} is out of bounds\."):
                f(normal(4, 5), target)
            with pytest.raises(IndexError, match=rf"Target {bad} is out of bounds\."):
                f(normal(4, 5).requires_grad_(), target)
    close(
        function(normal(4, 5) * 0, torch.tensor([0, -100, 4, 1])).exp(),
        torch.tensor(5.0, dtype=torch.float64),
    )


def test_wrong_shapes_while_tracing():
    """What is wrong with the shapes is said in native's words, behind the compiler's own."""
    for logits, target, message in (
        (normal(3, 4), labels(4, 2), r"Expected input batch_size \(3\) to match target batch_size \(2\)"),
        (normal(2, 3, 4), labels(3, 2, 5), r"Expected target size \[2, 4\], got \[2, 5\]"),
    ):
        with pytest.raises(Exception, match=message):
            compiled(lambda x, t: cross_entropy(x, t), dynamic=False)(logits, target)


# -- what AOTAutograd makes of it ----------------------------------------------------------------------------


def traced(function, *arguments):
    """The forward and the backward graph that AOTAutograd hands to a compiler."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    torch.compile(function, backend=backend, fullgraph=True)(*arguments).sum().backward()
    return graphs


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


@named("mean", "none", "weights_smoothing_ignored", "kdim", "channels_last", "transposed", "soft")
def test_traced_graphs(sample):
    """One _forward, one _backward, and between them the logits, the target and one number or three per
    position."""
    torch.manual_seed(0)
    logits, target, options = sample.make()
    wide = torch.cat([logits] * 40, 1).detach()  # so many classes that what has a row's size cannot hide
    if target.is_floating_point():
        target = torch.cat([target] * 40, 1)
    options = {k: torch.cat([v] * 40) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    forward, backward = traced(lambda x, t: cross_entropy(x, t, **options), wide.requires_grad_(), target)
    assert targets(forward).count(FORWARD) == 1 and BACKWARD not in targets(forward)
    assert targets(backward).count(BACKWARD) == 1 and FORWARD not in targets(backward)
    assert not any("softmax" in str(t) or "exp" in str(t) for t in targets(forward) + targets(backward))
    (output,) = (node for node in forward.graph.nodes if node.op == "output")
    saved = [node for node in output.args[0][1:] if isinstance(node, torch.fx.Node) and node.op != "placeholder"]
    positions = wide.numel() // wide.size(1) if wide.dim() > 1 else 1
    assert sum(node.meta["val"].numel() for node in saved) <= 3 * positions + 1


def test_traced_double_use():
    """make_fx: the operators appear by name, and the traced program computes the same for other data."""
    from torch.fx.experimental.proxy_tensor import make_fx

    logits, target = normal(4, 5), labels(5, 4)

    def step(x, t):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(cross_entropy(x, t, label_smoothing=0.1), x)[0]

    graph = make_fx(step)(logits, target)
    assert any("cross_entropy_ext" in str(t) for t in targets(graph))
    logits, target = normal(4, 5), labels(5, 4)
    close(graph(logits, target), step(logits, target))


# -- compiled autograd ---------------------------------------------------------------------------------------


@few
def test_compiled_autograd_of_an_eager_graph(sample):
    """The graph is recorded in eager mode; its backward is captured whole, with ours in it."""
    logits, target, options = sample.make()
    expected = grads(cross_entropy, logits, target, options)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    for dynamic in (False, True):
        torch._dynamo.reset()
        graphs.clear()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend, fullgraph=True, dynamic=dynamic)):
            close(grads(cross_entropy, logits, target, options), expected)
        assert len(graphs) == 1


@backends
def test_compiled_autograd_of_a_step(backend):
    """A training step with its backward under the compiler, the backward as one graph, for several batch
    sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5)).double()

    def step(x, t):
        loss = cross_entropy(model(x), t, label_smoothing=0.1)
        loss.backward()
        return loss.detach()

    for n in (7, 4, 9):
        x, t = normal(n, 6), labels(5, n)
        model.zero_grad()
        expected = (step(x, t), *(p.grad.clone() for p in model.parameters()))
        model.zero_grad()
        with torch._dynamo.config.patch(compiled_autograd=True, compiled_autograd_kwargs_override={"fullgraph": True}):
            loss = torch.compile(step, backend=backend)(x, t)
        close((loss, *(p.grad for p in model.parameters())), expected)


def test_compiled_autograd_inplace():
    """inplace=True recorded in eager mode, the backward compiled: the right gradient."""
    logits, target = normal(4, 5), labels(5, 4)
    expected = grads(cross_entropy, logits, target, {})
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        leaf = logits.detach().requires_grad_()
        loss = cross_entropy(leaf * 1, target, inplace=True)
        (g,) = torch.autograd.grad(loss, leaf, torch.full((), 0.5, dtype=torch.float64))
    close((loss.detach(), g), expected[:2])


# -- torch.export and AOTInductor ----------------------------------------------------------------------------


class Head(nn.Module):
    """A linear layer, a layout and the loss."""

    def __init__(self, classes, **options):
        super().__init__()
        self.layer = nn.Linear(6, classes).double()
        self.loss = CrossEntropyLoss(**options)

    def forward(self, x, target):
        logits = self.layer(x)
        return self.loss(logits.transpose(1, 2) if logits.dim() == 3 else logits, target)


HEADS = {
    "labels": ({}, lambda n: labels(5, n, ignored=True), lambda n: normal(n, 6)),
    "options": (
        {
            "weight": torch.linspace(0.5, 1.5, 5).double(),
            "label_smoothing": 0.1,
            "ignore_index": 2,
            "reduction": "none",
        },
        lambda n: labels(5, n),
        lambda n: normal(n, 6),
    ),
    "probabilities": ({"label_smoothing": 0.1}, lambda n: soft(n, 5), lambda n: normal(n, 6)),
    "tokens": ({"reduction": "sum"}, lambda n: labels(5, n, 3), lambda n: normal(n, 3, 6)),
    "extras": (
        {"loss_dtype": torch.float32, "empty": "zero", "inplace": True},
        lambda n: labels(5, n),
        lambda n: normal(n, 6),
    ),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_export(name, strict):
    """One node of ours, a dynamic batch, saved and loaded again, and decompositions that leave the value
    alone."""
    options, target, inputs = HEADS[name]
    model = Head(5, **options).eval()
    batch = torch.export.Dim("batch", min=2, max=1024)
    program = torch.export.export(model, (inputs(4), target(4)), dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    found = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert found.count(WEIGHTED if "weight" in options else OP) == 1
    assert not any("softmax" in str(t) or "nll_loss" in str(t) or "aten.cross_entropy" in str(t) for t in found)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded, decomposed = torch.export.load(buffer), program.run_decompositions()
    for n in (4, 7, 33):
        x, t = inputs(n), target(n)
        with torch.no_grad():
            expected = model(x, t)
            for p in (program, loaded):
                same(p.module()(x, t), expected)
            alike(decomposed.module()(x, t), expected)
    x, t = inputs(3), target(3)  # what comes back can be trained
    found = []
    for module in (model, program.module()):
        module.zero_grad()
        module(x, t).sum().backward()
        found.append([p.grad.clone() for p in module.parameters()])
    close(found[1], found[0])


def test_export_for_inference_names():
    """The operator in an exported graph has the arguments that a reader expects."""
    program = torch.export.export(Head(5, ignore_index=2), (normal(4, 6), labels(5, 4)))
    (node,) = (n for n in program.graph.nodes if n.target is OP)
    options = ["reduction", "ignore_index", "label_smoothing", "loss_dtype", "empty_is_zero", "inplace"]
    for op, tensors in ((OP, ["logits", "target"]), (WEIGHTED, ["logits", "target", "weight"])):
        assert [argument.name for argument in op._schema.arguments] == [*tensors, *options]
    assert 2 in (*node.args, *node.kwargs.values())


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", ["labels", "options"])
def test_aot_inductor(name, tmp_path):
    """A package compiled ahead of time, loaded, and run for batch sizes that it has not seen."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:  # InvalidCxxCompiler
        pytest.skip(f"no C++ compiler for AOTInductor: {error}")
    options, target, inputs = HEADS[name]
    model = Head(5, **options).eval()
    batch = torch.export.Dim("batch", min=2, max=1024)
    with torch.no_grad():
        program = torch.export.export(model, (inputs(4), target(4)), dynamic_shapes=({0: batch}, {0: batch}))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "head.pt2"))
        run = torch._inductor.aoti_load_package(package)
        for n in (4, 7, 33):
            x, t = inputs(n), target(n)
            close(run(x, t), model(x, t))


# -- numbers that change from call to call, and numbers in tensors -------------------------------------------


def calls_of_numbers():
    """(our loss, and the same in native operations) of a number, with tensors that require a gradient."""
    torch.manual_seed(0)
    x, z, h, w = (normal(*size).requires_grad_() for size in ((6, 5), (6, 5), (6, 4), (5, 4)))
    b, y, q, c = normal(5).requires_grad_(), labels(5, 6, ignored=True), soft(6, 5), weights(5)
    kept, ext = y != -100, functional

    def logits_loss(x, scale=1.0, z_loss=0.0, smoothing=0.0):
        loss = F.cross_entropy(x * scale, y, reduction="none", label_smoothing=smoothing)
        return (loss + z_loss * (x * scale).logsumexp(1).square())[kept].mean()

    def of_stats(x, scale):
        p = (x * scale).log_softmax(1)[kept]
        found = logits_loss(x, scale), (x * scale).logsumexp(1)[kept], (p.exp() * p).sum(1)
        return found[0] + found[1].sum() + found[2].square().sum()

    def our_stats(stats):
        return stats.loss + stats.lse.sum() + stats.entropy.square().sum()

    def distilled(t):
        return t * t * F.kl_div((x / t).log_softmax(1)[kept], (z / t).softmax(1)[kept], reduction="batchmean")

    def all_distilled(t):
        return t * t * F.kl_div((x / t).log_softmax(1), (z / t).softmax(1), reduction="batchmean")

    def linear(h, v, **options):
        return ext.linear_cross_entropy(h, w, y, linear_bias=b, logit_scale=v, **options)

    def mixed(share):
        return share * distilled(2.0) + (1 - share) * logits_loss(x)

    return {
        "temperature": (lambda t: ext.distillation_loss(x, z, temperature=t), all_distilled),
        "alpha": (lambda a: ext.distillation_loss(x, z, y, temperature=2.0, alpha=a), mixed),
        "z_loss": (lambda v: ext.cross_entropy(x, y, z_loss=v), lambda v: logits_loss(x, z_loss=v)),
        "softcap": (
            lambda v: ext.cross_entropy(x, y, softcap=v),
            lambda v: logits_loss(v * (x / v).tanh()),
        ),
        "logit_scale": (lambda v: ext.cross_entropy(x, y, logit_scale=v), lambda v: logits_loss(x, v)),
        "label_smoothing": (
            lambda v: ext.cross_entropy(x, y, c, label_smoothing=v),
            lambda v: F.cross_entropy(x, y, c, label_smoothing=float(v)),
        ),
        "probabilities": (
            lambda v: ext.cross_entropy(x, q, label_smoothing=v),
            lambda v: -((1 - v) * q + v / 5).mul(x.log_softmax(1)).sum(1).mean(),
        ),
        "stats": (lambda v: our_stats(ext.cross_entropy_with_stats(x, y, logit_scale=v)), lambda v: of_stats(x, v)),
        "sparse": (
            lambda v: ext.sparse_cross_entropy(x, y[:, None], c[None, :1].expand(6, 1), logit_scale=v),
            lambda v: c[0] * logits_loss(x, v),
        ),
        "linear": (
            lambda v: linear(h, v, z_loss=v, label_smoothing=v),
            lambda v: logits_loss(F.linear(h, w, b), v, v, float(v)),
        ),
        "linear_none": (
            lambda v: linear(h, v, reduction="none").sum(),
            lambda v: logits_loss(F.linear(h, w, b), v) * kept.sum(),
        ),
        "linear_stats": (
            lambda v: our_stats(ext.linear_cross_entropy_with_stats(h, w, y, linear_bias=b, logit_scale=v)),
            lambda v: of_stats(F.linear(h, w, b), v),
        ),
    }, (x, z, h, w, b)


NUMBERS = list(calls_of_numbers()[0])


def gradients_of(loss, tensors, **options):
    return [loss, *torch.autograd.grad(loss, tensors, allow_unused=True, **options)]


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_change(name):
    """Two compilations for any number of values, zero among them, and the values of native operations."""
    calls, tensors = calls_of_numbers()
    ours, expected = calls[name]
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(ours, backend=counter, fullgraph=True)
    for value in (1.0, 0.25, 0.75, 0.5, 0.0):
        if value == 0 and name in ("temperature", "softcap"):
            continue
        close(gradients_of(function(value), tensors), gradients_of(expected(value), tensors), 1e-11)
    assert counter.frame_count <= 2
    if name not in ("logit_scale", "stats", "sparse", "linear_none", "linear_stats"):
        with pytest.raises((ValueError, RuntimeError), match="must be"):
            function(-0.5)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_in_tensors(name):
    """A scalar tensor of any real type is its value, compiled and in eager."""
    calls, tensors = calls_of_numbers()
    ours, expected = calls[name]
    for value in (torch.tensor(0.5), torch.tensor(1), torch.tensor(0.25, dtype=torch.float64)):
        close(gradients_of(ours(value), tensors), gradients_of(expected(value.double()), tensors), 1e-11)
    function = compiled(ours, dynamic=None)
    for value in (torch.tensor(0.5), torch.tensor(0.25)):
        close(gradients_of(function(value), tensors), gradients_of(expected(value.double()), tensors), 1e-11)
    with pytest.raises(
        (ValueError, TypeError), match=r"must be (a number or a scalar tensor|float)"
    ):  # or native's own
        ours(torch.ones(2))


MASKED_NUMBERS = {
    "temperature": lambda v, x, z, t: functional.distillation_loss(x, z, temperature=v),
    "temperature, ce": lambda v, x, z, t: functional.distillation_loss(x, z, temperature=v, kind="ce"),
    "temperature, labels": lambda v, x, z, t: functional.distillation_loss(x, z, t, temperature=v, alpha=0.5),
    "softcap": lambda v, x, z, t: functional.cross_entropy(x, t, softcap=v),
    "logit_scale": lambda v, x, z, t: functional.cross_entropy(x, t, logit_scale=v),
}


@pytest.mark.parametrize("name", MASKED_NUMBERS)
def test_masked_classes_have_no_part_in_gradients_of_numbers(name):
    """A class at -inf adds nothing to the gradient of a number, where native operations have zero times infinity."""
    x, z, t = normal(4, 6), normal(4, 6), torch.tensor([0, 1, 3, 5])
    x[:, 2] = z[:, 2] = -math.inf
    function, step = MASKED_NUMBERS[name], 1e-5
    number = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(function(number, x, z, t), number)
    quotient = (function(2 + step, x, z, t) - function(2 - step, x, z, t)) / (2 * step)
    close(found, quotient, 1e-8)


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", [n for n in NUMBERS if n not in ("label_smoothing", "linear")])
def test_gradients_of_numbers(name):
    """First and second derivatives of every number, eager and compiled, at zero, too; as of native operations."""
    calls, tensors = calls_of_numbers()
    ours, expected = calls[name]
    for value in (0.7, 0.0):
        if value == 0 and name in ("temperature", "softcap"):
            continue
        number = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        of = (*tensors, number)
        found, exact = (gradients_of(f(number), of, create_graph=True) for f in (ours, expected))
        close(found, exact, 1e-11)
        if name in ("logit_scale", "linear_none"):  # without a graph: the kernels' own, in chunks
            close(gradients_of(ours(number), of), exact, 1e-11)
        close(gradients_of(compiled(ours)(number), of), exact, 1e-9)
        found, exact = (
            torch.autograd.grad(sum(g.square().sum() for g in gs[1:] if g is not None), of, allow_unused=True)
            for gs in (found, exact)
        )
        close(found, exact, 1e-9)


def test_gradient_of_the_scale_alone():
    """Of frozen logits or a frozen layer; a class of -inf adds nothing; in bfloat16; with inplace."""
    scale = torch.tensor(1.5, requires_grad=True)
    x, y, h, w = torch.randn(300, 7), labels(7, 300), torch.randn(40, 4), torch.randn(7, 4)
    masked = x.clone()
    masked[:, 3], y[y == 3] = -torch.inf, 2
    for logits, dtype, tolerance in ((x, None, 1e-6), (masked, None, 1e-6), (x, torch.bfloat16, 1e-2)):
        kept = logits[:, [0, 1, 2, 4, 5, 6]] if logits is masked else logits
        label = y - (y > 3).long() if logits is masked else y
        (found,) = torch.autograd.grad(cross_entropy(logits.to(dtype), y, logit_scale=scale), scale)
        (exact,) = torch.autograd.grad(F.cross_entropy(kept.to(dtype).double() * scale, label), scale)
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)
    (found,) = torch.autograd.grad(functional.linear_cross_entropy(h, w, y[:40], logit_scale=scale), scale)
    (exact,) = torch.autograd.grad(F.cross_entropy(h @ w.t() * scale, y[:40]), scale)
    torch.testing.assert_close(found, exact)
    leaf = x.clone().requires_grad_()
    copy = leaf * 1
    found = torch.autograd.grad(cross_entropy(copy, y, logit_scale=scale, inplace=True), (leaf, scale))
    exact = torch.autograd.grad(F.cross_entropy(leaf * scale, y), (leaf, scale))
    torch.testing.assert_close(found, exact)
    assert torch.equal(copy, leaf)
    loss = CrossEntropyLoss(logit_scale=nn.Parameter(torch.tensor(2.0)))
    loss(x, y).backward()
    assert loss.logit_scale.grad != 0 and "logit_scale" in dict(loss.named_parameters())


def test_transforms_of_numbers():
    """vmap over a temperature; grad, jvp and forward mode by a scale."""
    x, z, y = normal(6, 5), normal(6, 5), labels(5, 6)
    values, one = torch.tensor([1.0, 2.0, 3.0]).double(), torch.ones((), dtype=torch.float64)
    found = torch.vmap(lambda t: functional.distillation_loss(x, z, temperature=t))(values)
    close(found, torch.stack([functional.distillation_loss(x, z, temperature=float(t)) for t in values]))
    ours = lambda s: cross_entropy(x, y, logit_scale=s)  # noqa: E731
    exact = torch.func.grad(lambda s: F.cross_entropy(x * s, y))(one)
    close(torch.func.grad(ours)(one), exact)
    close(torch.func.jvp(ours, (one,), (one,))[1], exact)
    with torch.autograd.forward_ad.dual_level():
        dual = ours(torch.autograd.forward_ad.make_dual(one, one))
        close(torch.autograd.forward_ad.unpack_dual(dual).tangent, exact)


# -- with real tensors beside the fake ones, where PyTorch checks what operators do ---------------------------


def checked_calls():
    """A loss of every kind, with and without what is optional: (function, its tensors)."""
    x, h, w = normal(6, 5), normal(6, 4), normal(5, 4)
    y, pairs = labels(5, 6, ignored=True), labels(5, 6, 2)
    s, c = torch.rand(6).double(), weights(5)
    ext = functional
    return {
        "cross_entropy": (ext.cross_entropy, (x, y)),
        "none": (lambda x, y: ext.cross_entropy(x, y, reduction="none"), (x, y)),
        "weight": (lambda x, y, c: ext.cross_entropy(x, y, c, label_smoothing=0.1), (x, y, c)),
        "probabilities": (lambda x, q: ext.cross_entropy(x, q, label_smoothing=0.1), (x, soft(6, 5))),
        "sample_weight": (lambda x, y, s: ext.cross_entropy(x, y, sample_weight=s, z_loss=0.1), (x, y, s)),
        "stats": (ext.cross_entropy_with_stats, (x, y)),
        "stats_weight": (ext.cross_entropy_with_stats, (x, y, c)),
        "sparse": (ext.sparse_cross_entropy, (x, pairs, torch.rand(6, 2).double())),
        "distillation": (ext.distillation_loss, (x, normal(6, 5))),
        "nll_loss": (ext.nll_loss, (x, y)),
        "nll_loss_weight": (ext.nll_loss, (x, y, c)),
        "linear": (ext.linear_cross_entropy, (h, w, y)),
        "linear_bias": (lambda h, w, y, b: ext.linear_cross_entropy(h, w, y, linear_bias=b), (h, w, y, normal(5))),
        "linear_stats": (ext.linear_cross_entropy_with_stats, (h, w, y)),
    }


CHECKED = list(checked_calls())


def losses_and_gradient(function, tensors):
    """Its differentiable results, and the gradient of the first tensor for a one of each."""
    leaf = tensors[0].detach().requires_grad_()
    results = function(leaf, *tensors[1:])
    results = [r for r in (results if isinstance(results, tuple) else (results,)) if r.requires_grad]
    return [*results, *torch.autograd.grad(sum(r.sum() for r in results), leaf)]


@pytest.mark.parametrize("name", CHECKED)
def test_propagated_real_tensors(name):
    """The operators of a forward and of a backward are run as they are traced, and write to nothing."""
    function, tensors = checked_calls()[name]
    expected = losses_and_gradient(function, tensors)
    with torch._functorch.config.patch(fake_tensor_propagate_real_tensors=True):
        found = losses_and_gradient(compiled(function, dynamic=None), tensors)
        with torch.inference_mode():
            alone = compiled(function, dynamic=None)(*tensors)
    close(found, expected)
    close((alone if isinstance(alone, tuple) else (alone,))[0], expected[0].detach())


@pytest.mark.parametrize("name", CHECKED)
def test_draft_export(name):
    """A program with one operator of ours, and nothing to report about it."""

    class Model(nn.Module):
        def forward(self, *tensors):
            results = function(*tensors)
            return tuple(results) if isinstance(results, tuple) else results

    function, tensors = checked_calls()[name]
    program = torch.export.draft_export(Model(), tensors)
    assert program._report.successful()
    assert sum("cross_entropy_ext" in str(node.target) for node in program.graph.nodes) == 1
    same(program.module()(*tensors), Model()(*tensors))


# -- the operators themselves --------------------------------------------------------------------------------


@pytest.mark.thin(2)
@every_sample
def test_opcheck_public(sample):
    """Schema, fake kernels, autograd registration and dynamic AOT dispatch of the public operator."""
    logits, target, options = sample.make(torch.float32)
    reduction = {"none": 0, "mean": 1, "sum": 2}[options.pop("reduction", "mean")]
    arguments = {"reduction": reduction, **options}
    op = WEIGHTED if "weight" in options else OP
    torch.library.opcheck(op, (logits.detach().requires_grad_(), target), arguments)
    if target.is_floating_point():
        torch.library.opcheck(op, (logits, target.requires_grad_()), arguments)


@pytest.mark.thin(2)
@few
def test_opcheck_private(sample):
    """The same of the operators that a compiled graph holds."""
    logits, target, options = sample.make()
    reduction = {"none": 0, "mean": 1, "sum": 2}[options.pop("reduction", "mean")]
    weight, smoothing = options.get("weight"), options.get("label_smoothing", 0.0)
    options = numbered(reduction, -100, smoothing, loss_dtype=7)
    others = (target, [weight])
    loss, lse, denominator = FORWARD(logits, *others, *options)
    torch.library.opcheck(FORWARD, (logits, *others, *options))
    saved = (*others, lse, denominator, *options)
    for wanted in ([True, False], [True, True], [False, True]):
        if wanted[1] and not target.is_floating_point():
            continue
        torch.library.opcheck(BACKWARD, (torch.rand_like(loss), torch.ones(()), logits, *saved, wanted))
    if wanted[0] or not target.is_floating_point():
        upstream = torch.rand_like(loss).requires_grad_()
        torch.library.opcheck(
            BACKWARD, (upstream, torch.ones(()), logits.detach().requires_grad_(), *saved, [True, False])
        )
    inplace = torch.ops.cross_entropy_ext._backward_.default
    copy = logits.clone(memory_format=torch.preserve_format)
    torch.library.opcheck(inplace, (torch.rand_like(loss), torch.ones(()), copy, *saved, False))


def test_operators_are_named():
    """Profiles and graphs show the package's name, and nothing else is registered there."""
    names = {
        n.split("::")[1].partition(".")[0]
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("cross_entropy_ext::")
    }
    public = {"cross_entropy", "general_cross_entropy", "cross_entropy_with_stats", "nll_loss"}
    public |= {"linear_cross_entropy", "linear_cross_entropy_with_stats"}
    assert names >= public | {"_forward", "_backward"}
    assert all(n in public or n.startswith("_") for n in names)
    with torch.profiler.profile() as profile:
        grads(cross_entropy, *SAMPLES[0].make())
    seen = {event.key for event in profile.key_averages()}
    assert {
        "cross_entropy_ext::cross_entropy",
        "cross_entropy_ext::_forward_backward",
    } <= seen


def test_operator_from_an_fx_graph():
    """The operator is called directly, with its defaults, as a transformation that writes graphs would."""
    graph = torch.fx.Graph()
    x, t = graph.placeholder("x"), graph.placeholder("t")
    loss = graph.call_function(OP, (x, t))
    graph.output((loss, graph.call_function(operator.mul, (loss, 2))))
    logits, target = normal(4, 5), labels(5, 4)
    close(torch.fx.GraphModule({}, graph)(logits, target)[1], 2 * native(logits, target))

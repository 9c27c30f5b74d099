"""What autograd may ask of the loss: first, second and third derivatives, graphs kept, reused, checkpointed
and walked from several threads, modified tensors noticed, and `inplace=True`, whose gradient takes the
logits' place."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from functools import partial

import pytest
import torch
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
    soft_samples,
    weights,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from cross_entropy_ext import CrossEntropyLoss, functional
from cross_entropy_ext.functional import cross_entropy_with_stats

HALF = (torch.float16, torch.bfloat16)
ONE = torch.tensor(1.0, dtype=torch.float64)

pytestmark = pytest.mark.usefixtures("backend")


def differentiable_inputs(sample):
    """(function of the tensors that can be differentiated, those tensors)"""
    logits, target, options = sample.make()
    tensors = [logits.detach().requires_grad_()]
    weight = options.pop("weight", None)
    if target.is_floating_point():
        tensors.append(target.requires_grad_())
        if weight is not None:
            tensors.append(weight.requires_grad_())

    def function(x, q=target, w=weight):
        return cross_entropy(x, q, w, **options)

    return function, tensors


# -- derivatives ---------------------------------------------------------------------------------------------


@pytest.mark.thin(1, emulator=2)
@every_sample
def test_gradcheck(sample):
    function, tensors = differentiable_inputs(sample)
    assert torch.autograd.gradcheck(function, tensors, check_batched_grad=True, check_undefined_grad=True)


@pytest.mark.thin(1, emulator=3)
@every_sample
def test_gradgradcheck(sample):
    function, tensors = differentiable_inputs(sample)
    assert torch.autograd.gradgradcheck(function, tensors, check_batched_grad=True)


@every_sample
def test_gradients_equal_native(sample):
    logits, target, options = sample.make()
    close(grads(cross_entropy, logits, target, options), grads(native, logits, target, options))


@pytest.mark.thin(1, emulator=3)
@every_sample
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_smaller_types(sample, dtype):
    """The gradient has the logits' type, and is the float64 one but for the roundings of that type."""
    logits, target, options = sample.make(dtype)
    loss, dx, dq = grads(cross_entropy, logits, target, options)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=dtype).view(loss.shape).double()
    wide_target = target.double() if target.is_floating_point() else target
    expected = grads(native, cast_like(logits, torch.float64), wide_target, wide, upstream)
    assert dx.dtype == dtype and (dq is None or dq.dtype == dtype)
    for actual, reference in zip((loss, dx, dq), expected, strict=True):
        if reference is not None:
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(actual.double(), reference, rtol=4 * eps, atol=4 * eps)


@every_sample
def test_gradient_keeps_the_layout(sample):
    """Native returns a contiguous gradient for every layout; ours lies in memory as the logits do."""
    logits, target, options = sample.make()
    gradient = grads(cross_entropy, logits, target, options)[1]
    order = sorted(range(logits.dim()), key=lambda d: logits.stride(d))
    assert order == sorted(range(logits.dim()), key=lambda d: gradient.stride(d))


@named("mean", "weights_smoothing_ignored", "none", "soft_weights_smoothing", "channels_last")
def test_third_derivative(sample):
    logits, target, options = sample.make()
    found = []
    for loss_function in (cross_entropy, native):
        x = logits.detach().requires_grad_()
        y = loss_function(x, target, **options).sum()
        for power in (2, 3, 1):  # functions of the derivative whose own derivatives do not vanish
            (y,) = torch.autograd.grad(y, x, create_graph=True)
            y = (y**power).sum() if y.dim() else y
        found.append(torch.autograd.grad(y, x)[0])
    close(*found, tolerance=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_derivatives_in_smaller_types(dtype):
    """A gradient penalty on half logits: the derivative of the derivative has their type, too."""
    logits, target = normal(4, 5).to(dtype), labels(5, 4)
    found = []
    for x, loss_function in ((logits, cross_entropy), (logits.double(), native)):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss_function(x, target, label_smoothing=0.1), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum() * 8, x)[0])
    assert found[0].dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[0].double(), found[1], rtol=8 * eps, atol=4 * eps)


def test_derivatives_beside_infinities():
    """Ignored rows that hold NaN and classes masked with -inf have derivatives of zero, of the first
    order and above."""
    logits, target = normal(4, 5), torch.tensor([1, -100, 3, 0])
    logits[1], logits[2, 4] = float("nan"), float("-inf")

    def reference(x):
        """Native, on the rows that count, without the masked class."""
        parts = [native(x[i, :classes], target[i]) for i, classes in ((0, 5), (2, 4), (3, 5))]
        return sum(parts) / len(parts)

    found = []
    for loss_function in (lambda x: cross_entropy(x, target), reference):
        x = logits.detach().requires_grad_()
        loss = loss_function(x)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append((loss.detach(), g.detach(), torch.autograd.grad(g.square().sum(), x)[0]))
    close(*found)


def test_gradient_of_an_empty_mean():
    """A mean over nothing: native's NaN or the zero that was asked for, and a gradient of zero with
    either."""
    for empty, value in (("nan", float("nan")), ("zero", 0.0)):
        for logits, target in ((normal(0, 5), labels(5, 0)), (normal(3, 5), torch.full((3,), -100))):
            for inplace in (False, True):
                leaf = logits.detach().requires_grad_()
                loss = cross_entropy(leaf * 1, target, empty=empty, inplace=inplace)
                loss.backward()
                close(loss.detach(), torch.tensor(value, dtype=torch.float64))
                close(leaf.grad, torch.zeros_like(logits))
    leaf = normal(3, 5).requires_grad_()  # weights of zero: 0 / 0 as well
    cross_entropy(leaf, labels(5, 3), torch.zeros(5, dtype=torch.float64), empty="zero").backward()
    close(leaf.grad, torch.zeros(3, 5, dtype=torch.float64))


def test_gradient_of_an_empty_mean_twice():
    """The second walk makes the gradient anew, with the options of the first: weights of zero would give 0 / 0."""
    for classes in (5, 50, 5000):
        leaf = normal(3, classes).requires_grad_()
        loss = cross_entropy(leaf, labels(classes, 3), torch.zeros(classes, dtype=torch.float64), empty="zero")
        for _ in range(2):
            (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            same(gradient, torch.zeros_like(leaf))


def test_gradient_of_a_mean_whose_targets_weigh_nothing():
    """Others' weights still make a loss with label smoothing: that is infinite, not empty, and so is each gradient."""
    for classes in (3, 50, 5000):
        weight = torch.ones(classes, dtype=torch.float64)
        weight[0] = 0
        leaf = normal(2, classes).requires_grad_()
        loss = cross_entropy(leaf, torch.zeros(2, dtype=torch.long), weight, label_smoothing=0.1, empty="zero")
        assert loss.isposinf()
        first, second, third = (
            torch.autograd.grad(loss, leaf, torch.tensor(g).double(), retain_graph=True)[0] for g in (1.0, 1.0, 0.3)
        )
        assert first.isinf().all()
        same(first, second)
        same(first, third)

    # Where that loss is zero, the mean is over nothing again; where it is NaN, its gradient is that of 0 / 0 whichever
    # way it is made.
    logits = torch.tensor([[-2000.0, 0.0], [-3000.0, 1.0]], dtype=torch.float64)
    for rows, weight, value in ((logits, [0.0, 1.0], 0.0), (logits - torch.inf, [0.0, 0.0], float("nan"))):
        leaf = torch.cat([rows, logits]).requires_grad_()
        target, weight = torch.zeros(4, dtype=torch.long), torch.tensor(weight, dtype=torch.float64)
        loss = cross_entropy(leaf, target, weight, label_smoothing=0.1, empty="zero")
        close(loss.detach(), torch.tensor(value, dtype=torch.float64))
        first, second, third = (
            torch.autograd.grad(loss, leaf, torch.tensor(g).double(), retain_graph=True)[0] for g in (1.0, 1.0, 0.5)
        )
        same(first, second)
        same(first, third)
        assert value != value or not first.any()


def test_class_indices_have_no_gradient():
    logits, target = normal(3, 4), labels(4, 3)
    inputs, options = (logits, target, []), numbered(loss_dtype=7)
    loss, lse, denominator = torch.ops.cross_entropy_ext._forward(*inputs, *options)
    with pytest.raises(RuntimeError, match="class indices have no gradient"):
        torch.ops.cross_entropy_ext._backward(loss, denominator, *inputs, lse, denominator, *options, [True, True])


def test_inplace_leaves_a_lazy_copys_source_alone():
    source = normal(3, 4)
    before = source.clone()
    cross_entropy(torch._lazy_clone(source).requires_grad_(), labels(4, 3), inplace=True).backward()
    same(source, before)


def test_autograd_functional():
    """The functions of torch.autograd.functional are users of double backward with leaves of their own
    making."""
    logits, target, weight = normal(3, 4), labels(4, 3), weights(4)
    for transform in (torch.autograd.functional.hessian, torch.autograd.functional.jacobian):
        close(
            transform(lambda x: cross_entropy(x, target, weight, label_smoothing=0.1), logits),
            transform(lambda x: native(x, target, weight, label_smoothing=0.1), logits),
        )
    v = normal(3, 4)
    for transform in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        close(
            transform(lambda x: cross_entropy(x, target), logits, v)[1],
            transform(lambda x: native(x, target), logits, v)[1],
        )


@named("mean", "weights_smoothing_ignored", "kdim", "soft_kdim")
def test_gradient_penalty(sample):
    """create_graph, a function of the gradient added to the loss, then an ordinary backward."""
    logits, target, options = sample.make()
    found = []
    for loss_function in (cross_entropy, native):
        w = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        x = logits * w
        loss = loss_function(x, target, **options)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + 10 * g.square().sum()).backward()
        found.append(w.grad)
    close(*found)


# -- upstream gradients and reuse of the graph ---------------------------------------------------------------


@every_sample
def test_retained_graph(sample):
    """A second walk through the same graph gives the same bits; the one after the last raises."""
    logits, target, options = sample.make()
    x = logits.detach().requires_grad_()
    loss = cross_entropy(x, target, **options).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, x)
    same(second, kept)
    same(first, kept)  # the second walk wrote somewhere else
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        torch.autograd.grad(loss, x)


@named("none", "mean", "kdim_none", "soft_weights_smoothing")
def test_different_grad_outputs(sample):
    """One graph, several upstream gradients: nothing of the first may be left in what is saved."""
    logits, target, options = sample.make()
    x, y = logits.detach().requires_grad_(), logits.detach().requires_grad_()
    ours, theirs = cross_entropy(x, target, **options), native(y, target, **options)
    for factor in (1.0, -3.0, 0.0, 1e-3):
        upstream = torch.randn_like(theirs) * factor
        close(
            torch.autograd.grad(ours, x, upstream, retain_graph=True)[0],
            torch.autograd.grad(theirs, y, upstream, retain_graph=True)[0],
        )


def test_grad_output_layouts():
    """The upstream gradient of reduction='none' comes as autograd made it: expanded, transposed, sliced,
    reversed."""
    logits, target = normal(2, 3, 4, 5), labels(3, 2, 4, 5, ignored=True)
    wide = normal(2, 4, 10)
    uses = {
        "expanded scalar": lambda loss: loss.sum(),
        "expanded row": lambda loss: (loss.sum(0) * wide[0, :, :5]).sum(),
        "transposed": lambda loss: (
            loss.transpose(1, 2).contiguous() * wide[..., :5].transpose(1, 2).contiguous()
        ).sum(),
        "every second": lambda loss: (loss * wide[..., ::2]).sum(),
        "reversed": lambda loss: (loss.flip(2) * wide[..., 5:]).sum(),
    }
    for use in uses.values():
        found = []
        for loss_function in (cross_entropy, native):
            x = logits.detach().requires_grad_()
            found.append(torch.autograd.grad(use(loss_function(x, target, reduction="none")), x)[0])
        close(*found)
    strides = (
        wide[..., ::2],
        wide[..., :5].expand(2, 4, 5),
        torch.ones((), dtype=torch.float64).expand(2, 4, 5),
    )
    for upstream in (*strides, normal(4, 5, 2).permute(2, 0, 1)):
        a, b = (grads(f, logits, target, {"reduction": "none"}, upstream)[1] for f in (cross_entropy, native))
        close(a, b)


def test_several_losses_on_the_same_logits():
    """Two heads' worth of losses share the logits: saved tensors are shared, gradients are not."""
    logits, first, second, probabilities = normal(4, 5), labels(5, 4), labels(5, 4, ignored=True), soft(4, 5)
    found = []
    for loss_function in (cross_entropy, native):
        x = logits.detach().requires_grad_()
        total = (
            loss_function(x, first)
            + 2 * loss_function(x, second, label_smoothing=0.1)
            + loss_function(x, probabilities)
        )
        found.append(torch.autograd.grad(total + x.square().sum(), x)[0])
    close(*found)


@soft_samples
def test_only_the_soft_target_needs_a_gradient(sample):
    logits, target, options = sample.make()
    found = []
    for loss_function in (cross_entropy, native):
        q = target.detach().requires_grad_()
        found.append(torch.autograd.grad(loss_function(logits, q, **options).sum(), q)[0])
    close(*found)


def test_weight_gradients():
    """Probabilities: the class weights have a gradient, alone or with others. Labels: native's error,
    whatever else needs one."""
    logits, q, weight = normal(2, 3, 4), soft(2, 3, 4), weights(3)
    for needs_others in (False, True):
        found = []
        for loss_function in (cross_entropy, native):
            x, p, w = (
                t.detach().requires_grad_(n) for t, n in ((logits, needs_others), (q, needs_others), (weight, True))
            )
            loss = loss_function(x, p, w, label_smoothing=0.2)
            found.append(torch.autograd.grad(loss, [t for t in (w, x, p) if t.requires_grad]))
        close(*found)
    for x, target, name in (
        (normal(2, 3), labels(3, 2), "nll_loss_forward"),
        (logits, labels(3, 2, 4), "nll_loss2d_forward"),
    ):
        for needs_logits in (False, True):
            with pytest.raises(RuntimeError) as error:
                cross_entropy(x.detach().requires_grad_(needs_logits), target, nn.Parameter(weight))
            assert str(error.value).startswith(
                f"The function '{name}' is not differentiable with respect to argument 'weight'. "
                "This input cannot have requires_grad True."
            )
    with torch.no_grad():  # nothing is recorded, so nothing is wrong
        x, target = normal(2, 3), labels(3, 2)
        close(cross_entropy(x, target, nn.Parameter(weight)), native(x, target, weight))


# -- modes ---------------------------------------------------------------------------------------------------


@every_sample
def test_without_grad(sample):
    """The loss has the same bits in every grad mode, and records a graph in none but the first."""
    logits, target, options = sample.make()
    x = logits.detach().requires_grad_()
    recorded = cross_entropy(x, target, **options)
    assert recorded.requires_grad and recorded.grad_fn is not None
    for mode in (torch.no_grad(), torch.inference_mode(), torch.set_grad_enabled(False)):
        with mode:
            loss = cross_entropy(x, target, **options)
        assert not loss.requires_grad and loss.grad_fn is None
        same(loss.clone(), recorded.detach())
    assert not cross_entropy(logits.detach(), target, **options).requires_grad


def test_inference_tensors():
    """Tensors made in inference mode can be evaluated, and cannot be saved for a backward; both as native."""
    with torch.inference_mode():
        logits, target, q = normal(3, 4), labels(4, 3), soft(3, 4)
    same(cross_entropy(logits, target), cross_entropy(logits.clone(), target.clone()))
    for saved in (target, q):
        for loss_function in (native, cross_entropy):
            with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
                loss_function(normal(3, 4).requires_grad_(), saved)


def test_enable_grad_inside_no_grad():
    x = normal(3, 4).requires_grad_()
    with torch.no_grad(), torch.enable_grad():
        loss = cross_entropy(x, torch.tensor([1, 2, 0]))
    close(torch.autograd.grad(loss, x)[0], grads(native, x, torch.tensor([1, 2, 0]), {}, ONE)[1])


@every_sample
def test_deterministic_mode(sample):
    """Same bits, no error and no warning under use_deterministic_algorithms."""
    logits, target, options = sample.make()
    plain = grads(cross_entropy, logits, target, options)
    before, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            strict = grads(cross_entropy, logits, target, options)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
    same(strict, plain)


def test_anomaly_mode():
    """Anomaly mode finds nothing wrong in a good gradient, and names our node for a NaN in it."""
    logits, target = normal(3, 4), torch.tensor([1, 2, 0])
    with warnings.catch_warnings(), torch.autograd.detect_anomaly():
        warnings.simplefilter("ignore")  # that anomaly mode is slow
        x = logits.detach().requires_grad_()
        close(torch.autograd.grad(cross_entropy(x, target), x)[0], grads(native, logits, target, {}, ONE)[1])
        logits[1, 1] = float("nan")
        x = logits.requires_grad_()
        with pytest.raises(RuntimeError, match="returned nan values in its 0th output"):
            cross_entropy(x, target).backward()


# -- hooks, checkpoints, saved tensors -----------------------------------------------------------------------


@every_sample
def test_save_on_cpu(sample):
    logits, target, options = sample.make()
    plain = grads(cross_entropy, logits, target, options)
    with torch.autograd.graph.save_on_cpu():
        packed = grads(cross_entropy, logits, target, options)
    alike(packed, plain)


def coarse(value):
    """Of a tensor that has a fraction, 8 bits."""
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.bfloat16().to(value.dtype) if is_float else value


@every_sample
def test_hooks_that_lose_precision(sample):
    """The gradient is that of the tensors that the hooks return, and nothing is lost besides."""
    logits, target, options = sample.make()
    with torch.autograd.graph.saved_tensors_hooks(coarse, lambda t: t):
        found = grads(cross_entropy, logits, target, options)
    options = {name: coarse(value) for name, value in options.items()}
    alike(found[1:], grads(cross_entropy, coarse(logits), coarse(target), options)[1:])


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", ["statistics", "linear", "linear_half", "linear_statistics", "nll"])
def test_hooks_that_lose_precision_of_relatives(name, reduction):
    x, w, t = normal(7, 4), normal(5, 4), labels(5, 7, ignored=True)
    upstream = normal(7) if reduction == "none" else torch.tensor(0.75, dtype=torch.float64)
    if name == "linear_half":
        x, w = x.half(), w.half()

    def step(x, w):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        if name == "statistics":
            stats = cross_entropy_with_stats(x, t.clamp(max=3), reduction=reduction)
            outputs, ones = (stats.loss, stats.entropy, stats.lse), torch.ones_like(stats.lse)
            return torch.autograd.grad(outputs, x, (upstream, ones, ones))
        if name == "nll":  # linear, but for its denominator
            weight = torch.tensor([0.7, 0.3, 0.1, 0.9], dtype=torch.float64)
            loss = functional.nll_loss(x, t.clamp(max=3), coarse(weight), reduction=reduction)
            return torch.autograd.grad(loss, x, upstream)
        if name == "linear_statistics":
            stats = functional.linear_cross_entropy_with_stats(x, w, t, reduction=reduction)
            return torch.autograd.grad((stats.loss, stats.entropy), (x, w), (upstream, torch.ones_like(stats.entropy)))
        loss = functional.linear_cross_entropy(x, w, t, reduction=reduction)
        return torch.autograd.grad(loss, (x, w), upstream.to(loss.dtype))

    with torch.autograd.graph.saved_tensors_hooks(coarse, lambda t: t):
        found = step(x, w)
    alike(found, step(coarse(x), coarse(w)))


@pytest.mark.parametrize("use_reentrant", [True, False])
@named("mean", "none", "weights_smoothing_ignored", "kdim", "transposed", "soft_weights_smoothing")
def test_checkpoint(sample, use_reentrant):
    """The forward is run again in the backward; same bits."""
    logits, target, options = sample.make()
    for inplace in (False, True):
        head = partial(
            lambda w, inplace: cross_entropy(logits * w, target, **options, inplace=inplace), inplace=inplace
        )
        found = []
        for wrapped in (False, True):
            w = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
            loss = checkpoint(head, w, use_reentrant=use_reentrant) if wrapped else head(w)
            loss.sum().backward()
            found.append((loss.detach(), w.grad))
        alike(*found)


def test_tensor_hooks():
    """Hooks on the logits, on the loss and on the leaf run once, see the gradient, and may change it."""
    logits, target = normal(4, 5), labels(5, 4)

    def step(loss_function):
        leaf = logits.detach().requires_grad_()
        x, seen = leaf * 1, []
        loss = loss_function(x, target, reduction="none")
        x.retain_grad()
        x.register_hook(lambda g: g * 2)
        loss.register_hook(lambda g: seen.append(g) or g + 1)
        leaf.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        loss.grad_fn.register_hook(lambda inputs, outputs: seen.append(outputs[0]))
        loss.grad_fn.register_prehook(lambda outputs: seen.append(outputs[0]))
        loss.sum().backward()
        return leaf.grad, x.grad, *seen

    close(step(cross_entropy), step(native))


def test_multi_grad_hook_and_graph_nodes():
    """The node reports its next functions, so that graph walkers (DDP, viz, get_gradient_edge) find the
    logits."""
    x, q = normal(3, 4).requires_grad_(), soft(3, 4).requires_grad_()
    loss = cross_entropy(x, q)
    reached = [n.variable for n, _ in loss.grad_fn.next_functions if n is not None]
    assert any(v is x for v in reached) and any(v is q for v in reached)
    calls = []
    torch.autograd.graph.register_multi_grad_hook((x, q), lambda g: calls.append([t.clone() for t in g]))
    loss.backward(retain_graph=True)
    same(calls[0][0], x.grad)
    same(calls[0][1], q.grad)
    y = x * 1
    edge = torch.autograd.graph.get_gradient_edge(y)
    same(torch.autograd.grad(cross_entropy(y, q), edge)[0], x.grad)


# -- the version counter -------------------------------------------------------------------------------------

MODIFIED = "has been modified by an inplace operation"


def test_modified_between_forward_and_backward():
    """Whatever the backward reads again (logits, target, weight) must not have changed since the forward."""
    cases = {
        "logits": lambda x, t, q, w: (x, cross_entropy(x, t)),
        "labels": lambda x, t, q, w: (t, cross_entropy(x, t)),
        "probabilities": lambda x, t, q, w: (q, cross_entropy(x, q)),
        "weights": lambda x, t, q, w: (w, cross_entropy(x, t, w)),
    }
    for build in cases.values():
        x = normal(4, 5).requires_grad_() * 1
        changed, loss = build(x, labels(5, 4), soft(4, 5), weights(5))
        with torch.no_grad():
            changed.mul_(1)
        with pytest.raises(RuntimeError, match=MODIFIED):
            loss.backward()


def test_modified_after_the_backward():
    """After the backward everything may change, and the gradient that was returned does not change with
    it."""
    x, t, w = normal(4, 5).requires_grad_(), labels(5, 4), weights(5)
    loss = cross_entropy(x, t, w)
    loss.backward()
    kept = x.grad.clone()
    with torch.no_grad():
        x.zero_(), t.zero_(), w.zero_()
    same(x.grad, kept)


def test_inputs_are_never_modified():
    for sample in SAMPLES:
        logits, target, options = sample.make()
        before = [copy.deepcopy(v) for v in (logits, target, options)]
        grads(cross_entropy, logits, target, options)
        same(logits, before[0])
        same(target, before[1])
        for key, value in options.items():
            assert torch.equal(value, before[2][key]) if isinstance(value, torch.Tensor) else value == before[2][key]


# -- threads -------------------------------------------------------------------------------------------------


def in_threads(count, function):
    """function(i) in `count` threads that start together; the results in order, and the first exception if
    there was one."""
    results, errors, start = [None] * count, [], threading.Barrier(count)

    def body(i):
        try:
            start.wait(30)
            results[i] = function(i)
        except BaseException as error:  # handed to the caller
            errors.append(error)

    threads = [threading.Thread(target=body, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("inplace", [False, True])
def test_graphs_of_several_threads(inplace):
    """Each thread has a graph of its own; the results are those of one thread, bit for bit."""
    problems = [(normal(64, 500 + 8 * i), labels(500, 64, ignored=True)) for i in range(4)]

    def step(i):
        found = []
        for _ in range(5):
            x = problems[i][0].detach().clone().requires_grad_() * 1
            loss = cross_entropy(x, problems[i][1], label_smoothing=0.1, inplace=inplace)
            found.append(torch.autograd.grad(loss, x)[0].clone())
        return found

    alone = [step(i) for i in range(4)]
    same(in_threads(4, step), alone)


def test_one_graph_walked_by_several_threads():
    """A retained graph is read-only: several threads walk it at the same time with different upstream
    gradients."""
    x = normal(64, 300).requires_grad_()
    loss = cross_entropy(x, labels(300, 64), reduction="none", label_smoothing=0.1)
    upstream = [normal(64) for _ in range(4)]
    expected = [torch.autograd.grad(loss, x, u, retain_graph=True)[0] for u in upstream]
    same(in_threads(4, lambda i: torch.autograd.grad(loss, x, upstream[i], retain_graph=True)[0]), expected)


def test_accumulation_from_several_threads():
    """Hogwild: the threads share one parameter and accumulate into its gradient."""
    w = normal(20, 30).requires_grad_()
    data = [(normal(16, 20), labels(30, 16)) for _ in range(4)]
    for inputs, target in data:
        cross_entropy(inputs @ w, target).backward()
    expected, w.grad = w.grad, None
    in_threads(4, lambda i: cross_entropy(data[i][0] @ w, data[i][1], inplace=True).backward())
    close(w.grad, expected)


# -- the module ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["pickle", "deepcopy", "torch.save"])
def test_module_copies(protocol):
    """A copy has the options, the extras and a weight of its own, and gives the same bits."""
    weight = weights(5).float()
    module = CrossEntropyLoss(
        weight,
        ignore_index=3,
        reduction="sum",
        label_smoothing=0.1,
        loss_dtype=torch.float64,
        empty="zero",
        inplace=True,
    )
    if protocol == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    elif protocol == "deepcopy":
        twin = copy.deepcopy(module)
    else:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert type(twin) is CrossEntropyLoss and repr(twin) == repr(module)
    assert twin.weight is not module.weight and twin.weight.data_ptr() != module.weight.data_ptr()
    assert twin.state_dict().keys() == module.state_dict().keys() == {"weight"}
    x, t = normal(6, 5).float(), torch.tensor([0, 3, 1, 4, 2, 0])
    same(twin(x, t), module(x, t))
    assert twin(x, t).dtype == torch.float64
    assert CrossEntropyLoss(empty="zero")(x[:0], t[:0]) == 0


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 3}, {"weight": True}], ids=str)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_equals_native(options, optimizer):
    """The same model trained with both losses has the same loss and the same parameters after every step."""
    if "weight" in options:
        options = {"weight": weights(7)}
    runs = []
    for module in (
        CrossEntropyLoss(**options),
        CrossEntropyLoss(**options, inplace=True),
        nn.CrossEntropyLoss(**options),
    ):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 7)).double()
        step = optimizer(model.parameters(), lr=0.05)
        history = []
        for _ in range(12):
            x, t = normal(9, 6), labels(7, 9)
            step.zero_grad()
            loss = module(model(x), t)
            loss.backward()
            step.step()
            history.append((loss.detach(), *(p.detach().clone() for p in model.parameters())))
        runs.append(history)
    for ours in runs[:2]:
        close(ours, runs[2], tolerance=1e-9)


def test_loss_as_a_layer():
    """The module inside another module: moved, converted and frozen with it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.loss = nn.Linear(4, 5), CrossEntropyLoss(weights(5).float())

        def forward(self, x, t):
            return self.loss(self.body(x), t)

    model = Model().double().train()
    assert model.loss.weight.dtype == torch.float64 and not list(model.loss.parameters())
    x, t = normal(3, 4), labels(5, 3)
    close(model(x, t), native(model.body(x), t, model.loss.weight))


# -- inplace: the gradient takes the logits' storage ---------------------------------------------------------


def step_on(base, view, target, options, scale=1.0, **extras):
    """One step in which the logits are `view` of a non-leaf with base's layout: (loss, d base, the logits
    after it and before)."""
    leaf = base.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    whole = leaf.clone(memory_format=torch.preserve_format)
    logits = view(whole)
    loss = cross_entropy(logits, target, **options, **extras)
    before = logits.detach().clone()
    (loss.sum() * scale).backward()
    return loss.detach(), leaf.grad, logits.detach(), before


INPLACE = [s for s in SAMPLES if s.name != "small_labels"]


@pytest.mark.thin(1, emulator=4)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("sample", INPLACE, ids=lambda s: s.name)
def test_inplace_equals_plain(sample, dtype):
    """Every target, option, layout and type: same loss, same gradient, bit for bit; and the logits' storage
    holds it."""
    logits, target, options = sample.make(dtype)
    for scale in (1.0, 1024.0):  # a gradient scaler's
        loss, plain, kept, before = step_on(logits, lambda x: x, target, options, scale)
        same(kept, before)
        taken = step_on(logits, lambda x: x, target, options, scale, inplace=True)
        same(taken[0], loss)
        alike(taken[1], plain)
        same(taken[3], before)  # nothing happens before the backward: metrics read from the logits are right
        alike(taken[2], plain)  # and the backward leaves the gradient where the logits were


def test_inplace_bumps_the_version():
    x = normal(3, 4).requires_grad_() * 1
    loss = cross_entropy(x, labels(4, 3), inplace=True)
    version = x._version
    loss.backward()
    assert x._version > version


# what the logits are of a larger tensor: that tensor, the view, the target
VIEWS = {
    "last_column_cut_off": (lambda: normal(4, 6), lambda x: x[:, :-1], lambda: labels(5, 4)),
    "padded_vocabulary": (
        lambda: normal(2, 3, 8),
        lambda x: x[..., :5].transpose(1, 2),
        lambda: labels(5, 2, 3),
    ),
    "shifted_by_one_token": (
        lambda: normal(2, 4, 5),
        lambda x: x[:, :-1].transpose(1, 2),
        lambda: labels(5, 2, 3),
    ),
    "flattened": (lambda: normal(2, 4, 5), lambda x: x.view(-1, 5), lambda: labels(5, 8)),
    "every_second_row": (lambda: normal(8, 5), lambda x: x[::2], lambda: labels(5, 4)),
    "every_second_class": (lambda: normal(4, 10), lambda x: x[:, ::2], lambda: labels(5, 4)),
    "crop_of_an_image": (lambda: normal(2, 3, 6, 6), lambda x: x[:, :, 1:5, 2:5], lambda: labels(3, 2, 4, 3)),
    "crop_channels_last": (
        lambda: normal(2, 3, 6, 6).to(memory_format=torch.channels_last),
        lambda x: x[:, :, 1:5, 2:5],
        lambda: labels(3, 2, 4, 3),
    ),
    "one_row": (lambda: normal(4, 5), lambda x: x[2], lambda: torch.tensor(1)),
    "unsqueezed": (lambda: normal(4, 5), lambda x: x.unsqueeze(-1), lambda: labels(5, 4, 1)),
}
# several logits in one place
SHARED = {
    "expanded_rows": (lambda: normal(1, 5), lambda x: x.expand(4, 5), lambda: labels(5, 4)),
    "expanded_classes": (lambda: normal(4, 1), lambda x: x.expand(4, 5), lambda: labels(5, 4)),
    "expanded_pixels": (
        lambda: normal(2, 3, 1, 1),
        lambda x: x.expand(2, 3, 4, 2),
        lambda: labels(3, 2, 4, 2),
    ),
    "overlapping_windows": (lambda: normal(9), lambda x: x.unfold(0, 5, 2), lambda: labels(5, 3)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_inplace_on_views(name):
    """A view of a larger tensor: the gradient takes the view's place, and nothing outside the view is
    written."""
    torch.manual_seed(0)
    base, view, target = VIEWS[name]
    whole, t = base(), target()
    loss, plain, *_ = step_on(whole, view, t, {})
    leaf = whole.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    full = leaf.clone(memory_format=torch.preserve_format)
    taken = cross_entropy(view(full), t, inplace=True)
    same(taken.detach(), loss)
    taken.backward()
    alike(leaf.grad, plain)
    inside = torch.zeros_like(whole, dtype=torch.bool)
    view(inside).fill_(True)
    same(full.detach()[~inside], whole[~inside])
    alike(view(full.detach()), view(plain))


@pytest.mark.parametrize("name", SHARED)
def test_inplace_on_shared_memory(name):
    """Several logits in one place: there is no room for their gradients, so a fresh one is made and the
    logits stay."""
    torch.manual_seed(0)
    base, view, target = SHARED[name]
    whole, t = base(), target()
    _, plain, *_ = step_on(whole, view, t, {})
    _, gradient, logits, before = step_on(whole, view, t, {}, inplace=True)
    alike(gradient, plain)
    same(logits, before)


class PassedOn(torch.autograd.Function):
    """An identity that hands its input's memory on, in the way that `how` says."""

    @staticmethod
    def forward(ctx, x, how):
        return how(x)

    @staticmethod
    def backward(ctx, g):
        return g, None


# What the logits are of a parameter (4, 6), in its memory.
OF_A_LEAF = {
    "itself": lambda z: z,
    "slice": lambda z: z[:, :5],
    "view": lambda z: z.view(2, 2, 6).flatten(0, 1),
    "transposed": lambda z: z.T[:4],
    "identity": nn.Identity(),
    "flatten": lambda z: nn.Flatten()(z.view(4, 2, 3)),
    "dropout": nn.Dropout().eval(),
    "chain": lambda z: nn.Flatten()(nn.Dropout().eval()(nn.Identity()(z[:, 1:])))[:, :4],
    "contiguous": lambda z: z.contiguous().to(z.dtype),
    "detached": lambda z: z.detach().requires_grad_(),
    "data": lambda z: z.data.requires_grad_(),
    "function": lambda z: PassedOn.apply(z, lambda x: x),
    "function, detached": lambda z: PassedOn.apply(z, torch.Tensor.detach)[:, :5],
    "function, data": lambda z: PassedOn.apply(PassedOn.apply(z, lambda x: x.data)[:, 1:], lambda x: x.data),
}


@pytest.mark.parametrize("name", OF_A_LEAF)
def test_inplace_leaves_a_leaf_alone(name):
    """No node asks for a leaf's values again, but the user keeps them: the gradient has memory of its own."""
    logits, t = normal(4, 6), labels(4, 4)

    def gradient(function, **options):
        leaf = nn.Parameter(logits.clone())
        x = OF_A_LEAF[name](leaf)
        result = function(x, t, **options)
        (result if isinstance(result, torch.Tensor) else result.loss + result.entropy.sum()).backward()
        same(leaf.detach(), logits)
        of = leaf if leaf.grad is not None else x  # of an alias, which is a leaf itself
        assert of.grad.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr()
        return of.grad

    for function in (cross_entropy, cross_entropy_with_stats, partial(cross_entropy, label_smoothing=0.1, z_loss=0.1)):
        expected = gradient(function)
        same(gradient(function, inplace=True), expected)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            alike(gradient(function, inplace=True), expected)


def test_inplace_on_a_leaf():
    """A leaf's gradient accumulates into one that is already there, and every backward has one."""
    logits, t = normal(4, 5), labels(5, 4)
    expected = grads(cross_entropy, logits, t, {}, ONE)[1]
    leaf = logits.clone().requires_grad_()
    leaf.grad = torch.ones_like(leaf)
    cross_entropy(leaf, t, inplace=True).backward()
    close(leaf.grad, expected + 1)
    loss = cross_entropy(leaf, t, inplace=True)
    for _ in range(2):
        loss.backward(retain_graph=True)
    close(leaf.grad, 3 * expected + 1)


def test_inplace_gradient_accumulation():
    """Micro-batches whose gradients meet in one parameter."""
    weight, data = normal(6, 5), [(normal(4, 6), labels(5, 4)) for _ in range(3)]
    found = []
    for inplace in (False, True):
        w = weight.detach().clone().requires_grad_()
        for x, t in data:
            (cross_entropy(x @ w, t, inplace=inplace) / 3).backward()
        found.append(w.grad)
    alike(*found)


def test_inplace_needs_a_recorded_graph():
    """Nothing is taken where no gradient of the logits is made."""
    logits, t, q = normal(4, 5), labels(5, 4), soft(4, 5)
    kept = logits.clone()
    with torch.no_grad():
        cross_entropy(logits.requires_grad_(), t, inplace=True)
    with torch.inference_mode():
        cross_entropy(logits, t, inplace=True)
    logits = logits.detach()
    p = q.requires_grad_()
    version = logits._version
    cross_entropy(logits, p, inplace=True).backward()  # only the target's gradient
    same(logits, kept)
    assert logits._version == version
    close(p.grad, grads(native, kept, q.detach(), {}, ONE)[2])


def test_inplace_without_a_gradient_of_the_logits():
    """A backward that is asked for the target's gradient alone has none to put into the logits, and
    leaves them."""
    x, q = normal(4, 5).requires_grad_() * 1, soft(4, 5).requires_grad_()
    kept = x.detach().clone()
    (g,) = torch.autograd.grad(cross_entropy(x, q, inplace=True), q)
    close(g, grads(native, kept, q.detach(), {}, ONE)[2])
    same(x.detach(), kept)


def test_inplace_noticed_by_earlier_readers():
    """An operation that saved the logits, or whose saved output they are, and is differentiated later,
    raises."""
    t = labels(5, 4)
    for reader in (torch.square, torch.sin, lambda x: x.logsumexp(1)):
        x = normal(4, 5).requires_grad_() * 1
        other = reader(x).sum()
        cross_entropy(x, t, inplace=True).backward()
        with pytest.raises(RuntimeError, match=MODIFIED):
            other.backward()
    for activation in (torch.tanh, torch.exp, torch.relu, torch.sigmoid):
        # the node that made the logits needs them back: an error, never a wrong gradient
        loss = cross_entropy(activation(normal(4, 5).requires_grad_()), t, inplace=True)
        with pytest.raises(RuntimeError, match=MODIFIED):
            loss.backward()


def test_inplace_with_a_regulariser():
    """The logits used twice in one loss: right, or an error; which of them depends on the order of the
    graph."""
    logits, t = normal(4, 5), labels(5, 4)
    expected = grads(lambda x, t: native(x, t) + x.square().mean(), logits, t, {}, ONE)[1]
    leaf = logits.detach().requires_grad_()
    x = leaf * 1
    (
        cross_entropy(x, t, inplace=True) + x.square().mean()
    ).backward()  # the later node runs first: the logits are still there
    close(leaf.grad, expected)
    leaf = logits.detach().requires_grad_()
    x = leaf * 1
    with pytest.raises(RuntimeError, match=MODIFIED):
        (x.square().mean() + cross_entropy(x, t, inplace=True)).backward()
    expected = grads(lambda x, t: native(x, t) + x[1:].mean(), logits, t, {}, ONE)[1]
    for first in (True, False):  # what saves nothing of the logits may stand on either side
        leaf = logits.detach().requires_grad_()
        x = leaf * 1
        total = x[1:].mean() if first else 0
        total = total + cross_entropy(x, t, inplace=True)
        (total if first else total + x[1:].mean()).backward()
        close(leaf.grad, expected)


def test_inplace_twice_on_the_same_logits():
    """The second of two in-place losses finds the logits gone, and says so."""
    x = normal(4, 5).requires_grad_() * 1
    t = labels(5, 4)
    total = cross_entropy(x, t, inplace=True) + cross_entropy(x, t, inplace=True, label_smoothing=0.1)
    with pytest.raises(RuntimeError, match=MODIFIED):
        total.backward()


def test_inplace_second_backward():
    x = normal(4, 5).requires_grad_() * 1
    loss = cross_entropy(x, labels(5, 4), inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss.backward()


@named("mean", "weights_smoothing_ignored", "transposed", "soft")
def test_inplace_with_create_graph(sample):
    """The graph of the gradient needs the logits, so the gradient is a fresh tensor; second derivatives are
    right."""
    logits, target, options = sample.make()
    kept = logits.clone()
    found = []
    for extras in ({}, {"inplace": True}):
        x = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        (g,) = torch.autograd.grad(cross_entropy(x, target, **options, **extras), x, create_graph=True)
        same(x.detach(), kept)
        found.append((g.detach(), *torch.autograd.grad(g.square().sum(), x)))
    alike(*found)


def test_inplace_hooks_and_saved_tensor_hooks():
    """Hooks see the gradient; saved-tensor hooks hand back copies, and then it is a copy that is taken or
    nothing at all."""
    logits, t = normal(4, 5), labels(5, 4)
    expected = grads(cross_entropy, logits, t, {}, ONE)[1]
    leaf = logits.detach().requires_grad_()
    x, seen = leaf * 1, []
    x.retain_grad()
    x.register_hook(lambda g: seen.append(g.clone()))
    cross_entropy(x, t, inplace=True).backward()
    for found in (leaf.grad, x.grad, seen[0]):
        alike(found, expected)
    with torch.autograd.graph.save_on_cpu():
        leaf = logits.detach().requires_grad_()
        cross_entropy(leaf * 1, t, inplace=True).backward()
    alike(leaf.grad, expected)


@pytest.mark.parametrize("shape", [(65, 7), (600, 7), (65, 70)])
def test_inplace_target_in_the_same_memory(shape):
    """Probabilities that share memory with the logits are read before they are overwritten, or the gradient
    is a fresh one."""
    base, w, k = normal(*shape), torch.tensor(1.0, dtype=torch.float64), min(shape)
    pairs = {
        "the logits themselves": lambda x: (x, x.detach()),
        "shifted by one row": lambda x: (x[:-1], x[1:].detach()),
        "shifted back": lambda x: (x[1:], x[:-1].detach()),
        "transposed": lambda x: (x[:k, :k], x[:k, :k].t().detach()),
    }
    for pair in pairs.values():
        found = []
        for inplace in (False, True):
            leaf = base.detach().requires_grad_()
            x, q = pair(leaf * w)
            cross_entropy(x, q, inplace=inplace).backward()
            found.append(leaf.grad)
        alike(found[1], found[0])


def test_loss_dtype_gradients():
    """A float32 loss of half logits: the upstream gradient is float32, the gradient has the logits' type."""
    for dtype in HALF:
        logits, t = normal(8, 50).to(dtype), labels(50, 8, ignored=True)
        for inplace in (False, True):
            leaf = logits.detach().requires_grad_()
            loss = cross_entropy(leaf * 1, t, loss_dtype=torch.float32, inplace=inplace)
            assert loss.dtype == torch.float32
            (loss * 64).backward()
            wide = logits.double().requires_grad_()
            reference = native(wide, t)
            (reference * 64).backward()
            torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=1e-6)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=eps, atol=eps)

"""Everything that transforms, wraps or intercepts tensors: torch.func, forward-mode AD, batched gradients,
subclasses, modes, fake and meta tensors, negative and conjugate views. Each gives what native gives."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import torch.autograd.forward_ad as fwad
from differentiable import (
    close,
    cross_entropy,
    every_sample,
    grads,
    labels,
    named,
    native,
    normal,
    soft,
    soft_samples,
    weights,
)
from torch import nn
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cross_entropy_ext import CrossEntropyLoss
from cross_entropy_ext import functional as ext

BOTH = (cross_entropy, native)
few = named("mean", "none", "weights_smoothing_ignored", "kdim", "transposed", "soft_weights_smoothing", "no_batch")


def both(function):
    """function of our loss must equal function of the native one."""
    close(*(function(loss) for loss in BOTH))


# -- torch.func ----------------------------------------------------------------------------------------------


@every_sample
def test_func_grad(sample):
    logits, target, options = sample.make()
    both(lambda f: grad(lambda x: f(x, target, **options).sum())(logits))


@soft_samples
def test_func_grad_of_the_target(sample):
    logits, target, options = sample.make()
    both(lambda f: grad(lambda q, x: f(x, q, **options).sum(), argnums=(0, 1))(target, logits))


@few
def test_func_jacobians(sample):
    """Both modes give one Jacobian, native's."""
    logits, target, options = sample.make()
    both(lambda f: jacrev(lambda x: f(x, target, **options))(logits))
    both(lambda f: jacfwd(lambda x: f(x, target, **options))(logits))


@few
def test_func_hessian(sample):
    """Forward over reverse, reverse over reverse, reverse over forward."""
    logits, target, options = sample.make()
    both(lambda f: hessian(lambda x: f(x, target, **options))(logits))
    both(lambda f: jacrev(jacrev(lambda x: f(x, target, **options)))(logits))
    both(lambda f: jacrev(jacfwd(lambda x: f(x, target, **options)))(logits))


@every_sample
def test_func_products(sample):
    """jvp, vjp and linearize, through the logits."""
    logits, target, options = sample.make()
    tangent = torch.randn_like(logits)
    both(lambda f: jvp(lambda x: f(x, target, **options), (logits,), (tangent,)))
    both(lambda f: linearize(lambda x: f(x, target, **options), logits)[1](tangent))
    cotangent = torch.randn_like(native(logits, target, **options))
    both(lambda f: vjp(lambda x: f(x, target, **options), logits)[1](cotangent))


def test_func_third_derivative():
    logits, target = normal(4), torch.tensor(1)
    both(lambda f: jacfwd(jacrev(jacrev(lambda x: f(x, target))))(logits))


def test_functional_call():
    """Gradients with respect to a model's parameters, and one per example."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    inputs, target = normal(7, 4), labels(5, 7)
    modules = (CrossEntropyLoss(weights(5)), nn.CrossEntropyLoss())
    modules[1].weight = modules[0].weight

    def whole(module, p):
        return module(functional_call(model, p, (inputs,)), target)

    def single(module, p, x, t):
        return module(functional_call(model, p, (x.unsqueeze(0),)), t.unsqueeze(0))

    close(*(list(grad(lambda p, m=m: whole(m, p))(parameters).values()) for m in modules))
    per_example = [
        vmap(grad(lambda p, x, t, m=m: single(m, p, x, t)), in_dims=(None, 0, 0))(parameters, inputs, target)
        for m in modules
    ]
    close(*(list(g.values()) for g in per_example))


# name: logits, target, in_dims, options
BATCHES = {
    "logits only": (lambda: normal(3, 4, 5), lambda: labels(5, 4), (0, None), {}),
    "labels only": (lambda: normal(4, 5), lambda: labels(5, 3, 4), (None, 0), {}),
    "both": (lambda: normal(3, 4, 5), lambda: labels(5, 3, 4, ignored=True), (0, 0), {}),
    "batch is dimension 1": (lambda: normal(4, 3, 5), lambda: labels(5, 4, 3), (1, 1), {}),
    "batch is last": (lambda: normal(4, 5, 3), lambda: labels(5, 3, 4), (-1, 0), {}),
    "no batch inside": (lambda: normal(3, 5), lambda: labels(5, 3), (0, 0), {}),
    "no batch, none": (lambda: normal(3, 5), lambda: labels(5, 3), (0, 0), {"reduction": "none"}),
    "pixels": (lambda: normal(2, 2, 3, 2, 2), lambda: labels(3, 2, 2, 2, 2), (0, 0), {}),
    "sum": (lambda: normal(3, 4, 5), lambda: labels(5, 3, 4), (0, 0), {"reduction": "sum"}),
    "smoothing": (lambda: normal(3, 4, 5), lambda: labels(5, 3, 4), (0, 0), {"label_smoothing": 0.1}),
    "soft": (lambda: normal(3, 4, 5), lambda: soft(3, 4, 5), (0, 0), {}),
    "soft target only": (lambda: normal(4, 5), lambda: soft(3, 4, 5), (None, 0), {"reduction": "none"}),
    "soft, no batch inside": (lambda: normal(3, 5), lambda: normal(3, 5), (0, 0), {"label_smoothing": 0.1}),
}


@pytest.mark.parametrize("name", BATCHES)
def test_vmap(name):
    """Values, and gradients per example; in one piece and in chunks."""
    logits, target, in_dims, options = BATCHES[name]
    logits, target = logits(), target()
    both(lambda f: vmap(lambda x, t: f(x, t, **options), in_dims)(logits, target))
    both(lambda f: vmap(lambda x, t: f(x, t, **options), in_dims, chunk_size=2)(logits, target))
    both(lambda f: vmap(grad(lambda x, t: f(x, t, **options).sum()), in_dims)(logits, target))
    both(lambda f: grad(lambda x: vmap(lambda x, t: f(x, t, **options), in_dims)(x, target).sum())(logits))


def test_vmap_of_weights():
    """An ensemble of class weights; with labels and with probabilities."""
    logits, weight = normal(4, 5), torch.rand(3, 5, dtype=torch.float64) + 0.5
    for target in (labels(5, 4), soft(4, 5)):
        both(lambda f, t=target: vmap(lambda w: f(logits, t, w, reduction="sum"))(weight))
        both(lambda f, t=target: vmap(lambda x, w: f(x, t, w, label_smoothing=0.1), (None, 0))(logits, weight))


def test_vmap_nested():
    logits, target = normal(2, 3, 4, 5), labels(5, 3, 4)
    both(lambda f: vmap(vmap(f), (0, None))(logits, target))
    both(lambda f: vmap(vmap(f, (0, None)), (0, None))(logits, target[0]))


def test_vmap_compares_per_example():
    """vmap must equal a loop, with the denominators of each example and not of the batch."""
    logits, target, weight = normal(3, 6, 5), labels(5, 3, 6, ignored=True), weights(5)
    for options in ({}, {"reduction": "sum", "weight": weight, "label_smoothing": 0.2}):
        loop = torch.stack([cross_entropy(x, t, **options) for x, t in zip(logits, target, strict=True)])
        close(vmap(lambda x, t, o=options: cross_entropy(x, t, **o))(logits, target), loop)


def test_extras_survive_the_transforms():
    """loss_dtype, empty and inplace mean the same inside a transform as outside."""
    x, t = normal(3, 4).float(), torch.full((3,), -100)
    assert grad(lambda x: cross_entropy(x, t, empty="zero"))(x).eq(0).all()
    assert vmap(lambda x, t: cross_entropy(x, t, empty="zero"))(x, t).eq(0).all()
    assert vmap(lambda x, t: cross_entropy(x, t))(x, t).isnan().all()
    assert jvp(lambda x: cross_entropy(x, t, empty="zero"), (x,), (x,))[0] == 0
    t = torch.tensor([1, 3, 0])
    loss = vmap(lambda x, t: cross_entropy(x.bfloat16(), t, loss_dtype=torch.float32))(x, t)
    assert loss.dtype == torch.float32
    exact = native(x.bfloat16().double(), t, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=2**-8, atol=2**-8)
    kept = x.clone()
    gradient = grad(lambda x: cross_entropy(x, t, inplace=True))(x)
    torch.testing.assert_close(gradient, grad(lambda x: native(x, t))(x))
    close(x, kept)


def test_extras_survive_the_native_fallback():
    """So do they where a subclass, or a tensor that our kernels do not take, is handed to the native loss."""
    x, ignored = normal(3, 4).float(), torch.full((3,), -100)
    tagged = x.as_subclass(Tagged)
    assert cross_entropy(tagged, ignored, empty="zero") == 0
    assert cross_entropy(tagged, ignored).isnan()
    loss = cross_entropy(tagged, torch.tensor([1, 3, 0]), loss_dtype=torch.float64)
    assert loss.dtype == torch.float64 and type(loss) is Tagged
    assert cross_entropy(x, ignored, label_smoothing=0, empty="zero") == 0  # an int, where a float is usual
    assert cross_entropy(x, torch.tensor([1, 3, 0]), label_smoothing=1, loss_dtype=torch.float64).dtype == torch.float64
    sparse = x.softmax(1).to_sparse()
    assert cross_entropy(x, sparse, loss_dtype=torch.float64).dtype == torch.float64


def test_errors_inside_transforms():
    """A wrong shape is the same error inside vmap and grad as outside."""
    x, t = normal(3, 4), labels(4, 2)
    for transform in (lambda f: grad(f)(x, t), lambda f: vmap(f, (0, None))(x.expand(2, 3, 4), t)):
        with pytest.raises(ValueError, match=r"Expected input batch_size \(3\) to match target batch_size \(2\)"):
            transform(cross_entropy)


def test_functionalize():
    logits, target = normal(4, 5), labels(5, 4)
    both(lambda f: functionalize(lambda x: f(x, target))(logits))
    both(lambda f: functionalize(grad(lambda x: f(x.clone().mul_(2), target)))(logits))


# -- forward-mode AD and batched gradients -------------------------------------------------------------------


@every_sample
def test_forward_ad(sample):
    """Dual logits, dual target, dual weight, all at once."""
    logits, target, options = sample.make()
    weight = options.pop("weight", None)
    found = []
    for loss in BOTH:
        with fwad.dual_level():
            x, t, w = fwad.make_dual(logits, logits.cos()), target, weight
            if target.is_floating_point():
                t = fwad.make_dual(target, target.square())
                w = None if weight is None else fwad.make_dual(weight, weight.sqrt())
            found.append(tuple(fwad.unpack_dual(loss(x, t, w, **options))))
    close(*found)
    assert found[0][1] is not None


@soft_samples
def test_forward_ad_of_the_target_only(sample):
    logits, target, options = sample.make()
    found = []
    for loss in BOTH:
        with fwad.dual_level():
            found.append(tuple(fwad.unpack_dual(loss(logits, fwad.make_dual(target, target.square()), **options))))
    close(*found)


@few
def test_forward_over_reverse(sample):
    """A Hessian-vector product: the backward is run on dual tensors."""
    logits, target, options = sample.make()
    found = []
    for loss in BOTH:
        with fwad.dual_level():
            x = fwad.make_dual(logits.detach().requires_grad_(), logits.square())
            (g,) = torch.autograd.grad(loss(x, target, **options).sum(), x, create_graph=True)
            found.append(tuple(v.detach() for v in fwad.unpack_dual(g)))
    close(*found)


def test_forward_ad_of_the_upstream_gradient():
    """The graph is recorded on plain tensors and walked with a dual upstream gradient."""
    logits, target, u = normal(4, 5), labels(5, 4), normal(4)
    found = []
    for loss in BOTH:
        x = logits.detach().requires_grad_()
        y = loss(x, target, reduction="none")
        with fwad.dual_level():
            (g,) = torch.autograd.grad(y, x, fwad.make_dual(u, u.square()))
            found.append(tuple(v.detach() for v in fwad.unpack_dual(g)))
    close(*found)


@every_sample
def test_batched_gradients(sample):
    """is_grads_batched: the backward sees a batch of upstream gradients."""
    logits, target, options = sample.make()
    found = []
    for loss in BOTH:
        x = logits.detach().requires_grad_()
        y = loss(x, target, **options)
        torch.manual_seed(1)
        upstream = normal(3, *y.shape)
        found.append(torch.autograd.grad(y, x, upstream, is_grads_batched=True))
    close(*found)


def test_vectorized_jacobians():
    logits, target = normal(4, 5), labels(5, 4)
    for options in ({"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}):
        both(
            lambda f, o=options: torch.autograd.functional.jacobian(
                lambda x: f(x, target, reduction="none"), logits, **o
            )
        )
    both(lambda f: torch.autograd.functional.hessian(lambda x: f(x, target), logits, vectorize=True))


# -- subclasses and modes ------------------------------------------------------------------------------------


class Tagged(torch.Tensor):
    """A subclass that only has a name."""


@pytest.mark.parametrize("tagged", [(0,), (1,), (0, 1), (2,)], ids=str)
def test_plain_subclass(tagged):
    """A subclass in any argument comes back as that subclass, as from native; so does its gradient."""
    for target in (labels(5, 4), soft(4, 5)):
        found = []
        for loss in BOTH:
            arguments = [normal(4, 5), target, weights(5)]
            torch.manual_seed(0)
            arguments[0] = normal(4, 5)
            arguments[2] = weights(5)
            arguments = [v.as_subclass(Tagged) if i in tagged else v for i, v in enumerate(arguments)]
            arguments[0].requires_grad_()
            y = loss(*arguments)
            assert type(y) is Tagged
            y.backward()
            assert type(arguments[0].grad) is type(native_grad_type(arguments[0]))
            found.append((y.detach().as_subclass(torch.Tensor), arguments[0].grad.as_subclass(torch.Tensor)))
        close(*found)


def native_grad_type(x):
    """A gradient that native gives a tensor like x."""
    twin = x.detach().requires_grad_()
    native(twin, torch.zeros(len(x), dtype=torch.long)).backward()
    return twin.grad


def test_parameters_are_not_subclasses():
    """nn.Parameter and nn.Buffer go the fast way and give plain tensors."""
    x, w = nn.Parameter(normal(4, 5)), nn.Buffer(weights(5))
    y = cross_entropy(x, torch.tensor([0, 1, 2, 3]), w)
    assert type(y) is torch.Tensor
    close(y, native(x, torch.tensor([0, 1, 2, 3]), w))


def test_torch_function_override():
    """A tensor-like with __torch_function__ decides what happens, and is handed the native function or
    ours."""

    class Recorder:
        calls: list = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.calls.append((func, args, kwargs))
            return "mine"

    assert cross_entropy(Recorder(), torch.tensor([1])) == "mine"
    assert cross_entropy(normal(1, 3), Recorder(), label_smoothing=0.1) == "mine"
    assert len(Recorder.calls) == 2 and all("cross_entropy" in str(call[0]) for call in Recorder.calls)


def test_wrapper_subclass():
    """A subclass with __torch_dispatch__ (two tensors in one) goes through, forward and backward."""
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    a, b, target = normal(4, 5), normal(4, 5), labels(5, 4)
    for options in ({}, {"label_smoothing": 0.1, "weight": weights(5)}, {"reduction": "none"}):
        found = []
        for loss in BOTH:
            x = two_tensor(a.clone(), b.clone()).requires_grad_()
            y = loss(x, target, **options)
            y.sum().backward()
            found.append((y.a.detach(), y.b.detach(), x.grad.a, x.grad.b))
        close(*found)
        close(found[0][:2], (native(a, target, **options), native(b, target, **options)))


@pytest.fixture
def one_rank_mesh():
    """A process group of one process, without a network."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without distributed or gloo")
    if torch.distributed.is_initialized():
        pytest.skip("a process group exists already")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    except RuntimeError as error:
        pytest.skip(f"gloo found no network interface: {error}")
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_dtensor(one_rank_mesh):
    """A replicated DTensor gives native's loss and gradient, as a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    logits, target = normal(4, 5), labels(5, 4, ignored=True)
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}):
        x = distribute_tensor(logits, one_rank_mesh, [Replicate()]).requires_grad_()
        y = cross_entropy(x, distribute_tensor(target, one_rank_mesh, [Replicate()]), **options)
        assert isinstance(y, DTensor)
        y.sum().backward()
        plain = logits.detach().requires_grad_()
        expected = native(plain, target, **options)
        expected.sum().backward()
        close(y.full_tensor().detach(), expected.detach())
        close(x.grad.full_tensor(), plain.grad)


def test_torch_function_modes():
    """A mode sees the call, by a name that says what it is; a device context (a mode too) changes nothing."""

    class Watch(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(getattr(func, "__name__", func)))
            return func(*args, **(kwargs or {}))

    logits, target, weight = normal(4, 5).requires_grad_(), labels(5, 4), weights(5)
    expected = native(logits, target, weight, label_smoothing=0.1)
    with Watch() as mode:
        actual = cross_entropy(logits, target, weight, label_smoothing=0.1)
    close(actual, expected)
    assert any("cross_entropy" in name for name in mode.seen)
    for device in ("meta", "cpu"):
        with torch.device(device):
            close(cross_entropy(logits, target, weight, label_smoothing=0.1), expected)
            (g,) = torch.autograd.grad(cross_entropy(logits, target, weight), logits)
        close(g, torch.autograd.grad(native(logits, target, weight), logits)[0])


def test_torch_dispatch_mode():
    """A profiler-like mode sees named operators in forward and backward, and changes nothing."""

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    logits, target = normal(4, 5), labels(5, 4)
    with Watch() as mode:
        actual = grads(cross_entropy, logits, target, {})
    close(actual, grads(native, logits, target, {}))
    assert any("cross_entropy" in name for name in mode.seen)


def test_default_dtype():
    """Nothing inside takes torch's default dtype for its own."""
    logits, target = normal(4, 5).float(), labels(5, 4)
    expected = cross_entropy(logits, target, label_smoothing=0.1)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.float16):
            torch.set_default_dtype(dtype)
            actual = cross_entropy(logits, target, label_smoothing=0.1)
            close(actual, expected, tolerance=0)
    finally:
        torch.set_default_dtype(before)


# -- fake, meta, negative, sparse, complex -------------------------------------------------------------------


def described(t):
    return t.shape, t.dtype, t.device.type


@every_sample
def test_meta_tensors(sample):
    """Shapes, types and device without data; the gradient has the layout of the logits."""
    logits, target, options = sample.make()
    options = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    x = logits.to("meta").requires_grad_()
    y = cross_entropy(x, target.to("meta"), **options)
    assert described(y) == described(native(x, target.to("meta"), **options))
    (g,) = torch.autograd.grad(y.sum(), x)
    assert described(g) == described(x)


@every_sample
def test_fake_tensors(sample):
    """Under FakeTensorMode the metadata is that of the real result, strides included."""
    from torch._subclasses import FakeTensor, FakeTensorMode

    logits, target, options = sample.make()
    real = cross_entropy(logits.detach().requires_grad_(), target, **options)
    real_gradient = grads(cross_entropy, logits, target, options)[1]
    mode = FakeTensorMode()
    x = mode.from_tensor(logits.detach().requires_grad_())
    options = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with mode:
        y = cross_entropy(x, mode.from_tensor(target), **options)
        assert y.requires_grad
        (g,) = torch.autograd.grad(y.sum(), x)
    for fake, tensor in ((y, real), (g, real_gradient)):
        assert isinstance(fake, FakeTensor)
        assert described(fake) == described(tensor) and fake.stride() == tensor.stride()


def test_fake_errors():
    """Shapes are checked without data, with the same message."""
    from torch._subclasses import FakeTensorMode

    with (
        FakeTensorMode(),
        pytest.raises(ValueError, match=r"Expected input batch_size \(3\) to match target"),
    ):
        cross_entropy(torch.randn(3, 4), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("which", ["logits", "target", "weight", "upstream"])
def test_negative_views(which):
    """A tensor whose sign is a bit in its metadata, not in its memory."""

    def negative(t):
        view = torch.complex(torch.zeros_like(t), -t).conj().imag
        assert view.is_neg() and torch.equal(view, t)
        return view

    q = normal(4, 5)
    tensors = {"logits": normal(4, 5), "target": q, "weight": weights(5), "upstream": normal(4)}

    def step(loss, tensors):
        x = tensors["logits"].detach().requires_grad_()
        q = tensors["target"].detach().requires_grad_()
        y = loss(x, q, tensors["weight"], reduction="none", label_smoothing=0.1)
        return y.detach(), *(g.resolve_neg() for g in torch.autograd.grad(y, (x, q), tensors["upstream"]))

    close(step(cross_entropy, {**tensors, which: negative(tensors[which])}), step(native, tensors))
    if which == "logits":
        for target in (labels(5, 4), labels(5, 4).to(torch.uint8)):
            x = negative(tensors["logits"])
            close(grads(cross_entropy, x, target, {}), grads(native, tensors["logits"], target, {}))
            base = tensors["logits"].clone()  # in place: the gradient is right wherever it is put
            view = torch.complex(torch.zeros_like(base), -base).requires_grad_()
            (g,) = torch.autograd.grad(cross_entropy((view * 1).conj().imag, target, inplace=True), view)
            close(g.imag, -grads(native, base, target, {}, torch.tensor(1.0, dtype=torch.float64))[1])


def test_sparse_soft_target():
    """Sparse probabilities work in native, and so here."""
    logits, q = normal(4, 5), soft(4, 5)
    q[:, ::2] = 0
    for options in ({}, {"reduction": "sum"}):
        both(lambda f, o=options: f(logits, q.to_sparse(), **o))
        close(cross_entropy(logits, q.to_sparse(), **options), native(logits, q, **options))


def test_complex_weight():
    """Probabilities take a weight of any type; a complex one makes a complex loss, as in native."""
    logits, q, w = normal(4, 5), soft(4, 5), torch.complex(weights(5), normal(5))
    found = []
    for loss in BOTH:
        x = logits.detach().requires_grad_()
        y = loss(x, q, w)
        assert y.dtype == torch.complex128
        found.append((y.detach(), torch.autograd.grad(y.real, x)[0]))
    close(*found)


def test_refused_layouts():
    """What native refuses (sparse and nested logits) is refused with an error, not read as if it were
    dense."""
    for build in (
        lambda: normal(4, 5).to_sparse(),
        lambda: torch.nested.nested_tensor([normal(2, 5), normal(3, 5)]),
    ):
        for loss in BOTH:
            with pytest.raises((RuntimeError, NotImplementedError)):
                loss(build(), labels(5, 4))


def test_zero_tensors():
    """ZeroTensor, which forward AD makes for tangents that are zero, has no memory at all."""
    zero = torch._efficientzerotensor((4, 5), dtype=torch.float64)
    target = labels(5, 4)
    close(cross_entropy(zero, target), native(torch.zeros(4, 5, dtype=torch.float64), target))
    x = normal(4, 5).requires_grad_()
    y = cross_entropy(x, target, reduction="none")
    upstream = torch._efficientzerotensor((4,), dtype=torch.float64)
    (g,) = torch.autograd.grad(y, x, upstream)
    assert g.eq(0).all()


# -- transforms under the compiler ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: grad(f),
        lambda f: vmap(f),
        lambda f: vmap(grad(f)),
        lambda f: lambda x, t: jvp(lambda x: f(x, t), (x,), (x,))[1],
        lambda f: lambda x, t: jacrev(lambda x: f(x, t))(x),
    ],
    ids=["grad", "vmap", "vmap_grad", "jvp", "jacrev"],
)
def test_compiled_transforms(transform):
    """torch.compile of a transform of the loss, in one graph."""
    torch._dynamo.reset()
    logits, target = normal(4, 5), labels(5, 4)
    if transform(native) is not None:
        expected = transform(native)(logits, target)
        compiled = torch.compile(lambda x, t: transform(cross_entropy)(x, t), fullgraph=True, backend="aot_eager")
        close(compiled(logits, target), expected)
    torch._dynamo.reset()


def test_batched_gradients_in_place():
    """They have no storage to compare: inplace has no effect."""
    x, t, upstream = normal(3, 5).requires_grad_(), labels(5, 3), normal(2)
    found, expected = (
        torch.autograd.grad(ext.cross_entropy(x * 1, t, inplace=i), x, upstream, is_grads_batched=True)
        for i in (True, False)
    )
    close(found, expected)


# -- other tracers -------------------------------------------------------------------------------------------


def test_symbolic_trace_and_jit_trace():
    """torch.fx.symbolic_trace and torch.jit.trace of a model that ends in the loss: right for another
    batch."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.loss = (
                nn.Linear(4, 5).double(),
                CrossEntropyLoss(weights(5), label_smoothing=0.1),
            )

        def forward(self, x, t):
            return self.loss(self.layer(x), t)

    model, x, t = Model(), normal(3, 4), labels(5, 3)
    close(torch.fx.symbolic_trace(model)(x, t), model(x, t))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        trace = torch.jit.trace(model, (normal(7, 4), labels(5, 7)))
    close(trace(x, t), model(x, t))


CONSTANT = {"classes": weights(5), "layer": normal(6, 5), "bias": normal(6)}
TRACED = {
    "z-loss": lambda x, t, s: ext.cross_entropy(x, t, z_loss=0.1),
    "sample weights": lambda x, t, s: ext.cross_entropy(x, t, CONSTANT["classes"], sample_weight=s),
    "an integer for a number": lambda x, t, s: ext.cross_entropy(x, t, label_smoothing=0),
    "statistics": lambda x, t, s: ext.cross_entropy_with_stats(x, t, sample_weight=s).entropy,
    "teacher": lambda x, t, s: ext.distillation_loss(x, x.detach() * 2, t, alpha=0.5, sample_weight=s),
    "mixture": lambda x, t, s: ext.mixup_cross_entropy(x, t, t.flip(0), 0.3, sample_weight=s),
    "layer": lambda x, t, s: ext.linear_cross_entropy(
        x, CONSTANT["layer"], t, linear_bias=CONSTANT["bias"], sample_weight=s
    ),
}


@pytest.mark.parametrize("name", TRACED)
def test_jit_trace_of_every_loss(name):
    """Lists of optional tensors are nodes of the graph, too: it is right for other tensors."""
    function, inputs = TRACED[name], lambda n: (normal(n, 5), labels(5, n), weights(n))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        trace = torch.jit.trace(function, inputs(7), check_trace=False)
    assert "cross_entropy_ext::" in str(trace.graph)
    others = inputs(7)
    close(trace(*others), function(*others))


@pytest.mark.parametrize("name", ["target", "weight", "sample weight", "teacher", "probs"])
def test_symbolic_trace_of_any_argument(name):
    """torch.fx records the loss where only one argument, on its own or in a list, is a proxy."""
    x, t, s, w, indices = normal(3, 5), labels(5, 3), weights(3), weights(5), labels(5, 3, 2)
    function, argument = {
        "target": (lambda t: ext.cross_entropy(x, t, z_loss=0.1), t),
        "weight": (lambda w: ext.cross_entropy(x, t, w, z_loss=0.1), w),
        "sample weight": (lambda s: ext.cross_entropy(x, t, sample_weight=s), s),
        "teacher": (lambda z: ext.distillation_loss(x, z), normal(3, 5)),
        "probs": (lambda q: ext.sparse_cross_entropy(x, indices, q), soft(3, 2)),
    }[name]
    close(torch.fx.symbolic_trace(function)(argument), function(argument))

"""Bugs that were found, each with the smallest input that showed it."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import numbered
from oracle import reference
from test_memory import needs_resident, run_alone
from torch.func import vmap

import cross_entropy_ext
from cross_entropy_ext.functional import cross_entropy


@pytest.mark.parametrize("shape", [(6, 4), (2, 19, 5, 5), (2, 64, 5, 5), (6, 40)])
def test_an_infinite_weight_of_a_class_that_no_target_has(shape: tuple[int, ...]) -> None:
    """weight = 1 / counts, a class without samples, and ignored positions: 0 * inf must not get into the mean."""
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.ones(shape[1])
    weight[0] = math.inf
    target = torch.randint(1, shape[1], (shape[0], *shape[2:]))
    target[0] = -100
    torch.testing.assert_close(cross_entropy(x, target, weight), F.cross_entropy(x, target, weight))


@pytest.mark.parametrize(
    ("shape", "one_hot", "smoothing", "scale"),
    [
        ((8, 4097), True, 0.1, 1.0),
        ((8, 32000), True, 0.1, 1.0),
        ((8, 1000), True, 0.2, 1.0),
        ((1, 32000, 20), True, 0.1, 1.0),
        ((1, 32000, 20), False, 0.0, 0.01),
        ((4, 2000), False, 0.0, 0.01),
    ],
)
def test_many_equal_probabilities(shape: tuple[int, ...], one_hot: bool, smoothing: float, scale: float) -> None:
    """A long sum of equal terms rounds the same way each time; up to 78 units in the last place were lost."""
    torch.manual_seed(0)
    x = torch.randn(shape) * scale
    if one_hot:
        labels = torch.randint(shape[1], (shape[0], *shape[2:]))
        target = F.one_hot(labels, shape[1]).movedim(-1, 1).float()
    else:
        target = torch.full(shape, 1 / shape[1])
    exact = F.cross_entropy(x.double(), target.double(), label_smoothing=smoothing).item()
    unit = torch.finfo(torch.float32).eps * 2 ** math.floor(math.log2(exact))
    error = abs(cross_entropy(x, target, label_smoothing=smoothing).item() - exact) / unit
    native = abs(F.cross_entropy(x, target, label_smoothing=smoothing).item() - exact) / unit
    assert error <= native + 2


def test_autocast_checks_and_keeps_the_options() -> None:
    x, target = torch.randn(3, 4, 5), torch.zeros(3, 5, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        for bad in (-0.1, math.nan):
            with pytest.raises(RuntimeError, match="label_smoothing must be between"):
                cross_entropy(x, target, label_smoothing=bad)
        # A weight of this shape is native's to judge.
        assert cross_entropy(x, target, torch.rand(1, 4), loss_dtype=torch.float64).dtype == torch.float64
        float8 = torch.rand(3, 4, 5).to(torch.float8_e4m3fn)
        torch.testing.assert_close(cross_entropy(x, float8), F.cross_entropy(x, float8))


@pytest.mark.parametrize("transposed", [False, True], ids=["classes_contiguous", "positions_contiguous"])
def test_in_place_beside_a_target_in_the_same_memory(transposed) -> None:
    """Of more positions than are read before the first are written: a tile of 256."""
    torch.manual_seed(0)
    x, found = torch.rand(600, 600), []
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        logits = (leaf * 1).t() if transposed else leaf * 1
        cross_entropy(logits, logits.detach().t(), reduction="sum", inplace=inplace).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


def test_in_place_looks_at_the_targets_before_it_writes() -> None:
    logits = torch.randn(5, 7, requires_grad=True) * 1
    target = torch.arange(5)
    loss = cross_entropy(logits, target, inplace=True)
    before = logits.detach().clone()
    target.numpy()[3] = 9  # behind autograd's back
    with pytest.raises(IndexError, match=r"Target 9 is out of bounds\."):
        loss.backward()
    assert torch.equal(logits, before)


def test_an_infinite_probability_among_many_classes() -> None:
    torch.manual_seed(0)
    for shape in ((2, 64, 9), (2, 64), (2, 20, 9)):
        x, target = torch.randn(shape), torch.rand(shape)
        target[0, 3] = math.inf
        assert cross_entropy(x, target) == F.cross_entropy(x, target) == math.inf


def test_nothing_is_zero_for_the_fallbacks_too() -> None:
    x, target, weight = torch.randn(6, 4), torch.randint(4, (6,)), torch.zeros(4)
    assert cross_entropy(x, target, weight, empty="zero") == 0
    assert vmap(lambda x, t: cross_entropy(x, t, weight, empty="zero"))(x, target).eq(0).all()

    class Subclass(torch.Tensor):
        pass

    leaf = torch.randn(6, 4, requires_grad=True)
    loss = cross_entropy(leaf.as_subclass(Subclass), target, weight, empty="zero")
    assert loss == 0
    assert torch.autograd.grad(loss, leaf)[0].eq(0).all()


def test_the_fallback_counts_what_the_kernels_count() -> None:
    """Labels that are ignored have no weight; and where the total is zero, but not the loss, nothing is hidden."""
    torch.manual_seed(0)
    x, target, weight = torch.randn(6, 4), torch.tensor([1, -100, 2, -100, 0, 1]), torch.rand(4) + 0.5

    def both(weight: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
        fallback = vmap(lambda x: cross_entropy(x, target, weight, empty="zero"))(x[None])[0]
        return [fallback, cross_entropy(x, target, weight, empty="zero")]

    torch.testing.assert_close(*both(weight, target))
    found, expected = both(torch.tensor([1.0, -1, 2, 2]), torch.tensor([0, 1, 0, 1, 1, 0]))
    assert found == expected and found.isinf()


def test_a_float32_weight_goes_with_half_logits_alone() -> None:
    """Native asks for the logits' type; only a float32 loss of less wide logits makes an exception."""
    x, target, weight = torch.randn(6, 4), torch.tensor([1, 2, 0, 3, 1, 2]), torch.rand(4) + 0.5
    half = cross_entropy(x.bfloat16(), target, weight, loss_dtype=torch.float32)
    torch.testing.assert_close(half, F.cross_entropy(x.bfloat16().float(), target, weight))
    for loss_dtype in (None, torch.float32):
        with pytest.raises(RuntimeError, match="Double"):
            cross_entropy(x.double(), target, weight, loss_dtype=loss_dtype)


def test_private_operators_refuse_what_they_would_misread() -> None:
    ops = torch.ops.cross_entropy_ext
    x, target = torch.randn(6, 4), torch.tensor([1, 2, -100, 3, 1, 2])
    inputs, options, one = (x, target, []), numbered(), torch.ones(())
    _, lse, denominator = ops._forward(*inputs, *options)
    rest = (denominator, *inputs, lse, denominator, *options)
    assert all(g.numel() == 0 for g in ops._backward(one, *rest, [False, False]))
    with pytest.raises(RuntimeError, match="grad_output of type"):
        ops._backward(torch.ones((), dtype=torch.int32), *rest, [True, False])
    for other in (lse[:1], torch.cat([lse, lse]), lse.double(), lse.t().contiguous().t()):
        with pytest.raises(RuntimeError, match="lse is not what _forward returned"):
            ops._backward(one, denominator, *inputs, other, denominator, *options, [True, False])
    with pytest.raises(RuntimeError, match="grad_statistics are not those"):
        ops._backward(one, torch.zeros(3, 6), *inputs, lse, denominator, *options, [True, False])
    with pytest.raises(RuntimeError, match="loss_dtype must be"):
        ops._forward(*inputs, *numbered(loss_dtype=3))
    with pytest.raises(RuntimeError, match="got 3 integers"):
        ops._forward(*inputs, options[0][:3], options[1])
    with pytest.raises(RuntimeError, match="reduction must be"):
        ops.cross_entropy(x, target, 7)


def test_a_gradient_that_cannot_be_scaled_is_not_kept() -> None:
    """The forward's gradient, rounded to bfloat16, is of no use for a third of it; it was kept as long as the loss."""
    losses = []
    for _ in range(4):
        leaf = torch.randn(256, 8192).bfloat16().requires_grad_()
        losses.append(cross_entropy(leaf, torch.randint(8192, (256,))))
        (losses[-1] / 3).backward()
        leaf.grad = None
        del leaf
    kept = cross_entropy_ext.empty_cache()
    losses.clear()
    assert kept and cross_entropy_ext.empty_cache() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [2.0**16, 2.0**40, -(2.0**16), -(2.0**40)])
@pytest.mark.parametrize("margin", [80, 86, 88])
def test_the_smallest_gradients_survive_a_loss_scale(dtype, scale, margin) -> None:
    """The forward's gradient had lost their bits, or them: they are subnormal until they are scaled."""
    logits = torch.zeros(2048, 64)
    logits[:, 1::2] = -margin
    logits, target, scale = logits.to(dtype), torch.zeros(2048, dtype=torch.long), torch.tensor(scale)
    exact = torch.autograd.grad(F.cross_entropy(x := logits.double().requires_grad_(), target), x, scale.double())[0]
    found = torch.autograd.grad(cross_entropy(x := logits.clone().requires_grad_(), target), x, scale.to(dtype))[0]
    torch.testing.assert_close(found.double(), exact, rtol=4e-6 if dtype == torch.float32 else 2**-8, atol=2**-149)


@pytest.mark.parametrize("shape", [(4000, 7), (256, 64), (16, 5000)])
def test_a_gradient_in_bfloat16_is_rounded_once(shape) -> None:
    """A third of the forward's gradient, itself rounded to bfloat16, would be wrong in a quarter of the elements."""
    torch.manual_seed(0)
    x, target, third = torch.randn(shape).bfloat16(), torch.randint(shape[1], shape[:1]), torch.tensor(1 / 3)
    leaf = x.clone().requires_grad_()
    (cross_entropy(leaf, target, loss_dtype=torch.float32) * third).backward()
    exact = reference(x, target, grad_output=third)["input"].value.bfloat16()
    assert leaf.grad.eq(exact).double().mean() >= 0.98


@pytest.mark.parametrize(("rows", "classes"), [(5000, 5), (200, 64), (20, 5000)])
def test_inplace_with_a_grad_output_in_the_same_memory(rows, classes) -> None:
    """Rows that were already written were read as the grad_output of those to come."""
    x, target = torch.randn(rows, classes), torch.randint(classes, (rows,))
    found = []
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        logits = leaf * 1
        loss = cross_entropy(logits, target, reduction="none", inplace=inplace)
        loss.backward(logits.detach().flatten()[:rows])
        found.append(leaf.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["index", "smoothed", "soft"])
@pytest.mark.parametrize(("rows", "classes"), [(5000, 5), (200, 64), (20, 5000)])
def test_inplace_with_class_weights_in_the_same_memory(rows, classes, kind) -> None:
    """The first row, once written, would be read as the weights of the rows to come."""
    torch.manual_seed(0)
    x, target = torch.rand(rows, classes) + 0.5, torch.randint(classes, (rows,))
    if kind == "soft":
        target = torch.randn(rows, classes).softmax(1)
    options = {"reduction": "sum", "label_smoothing": 0.0 if kind == "index" else 0.1}
    found = []
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        logits = leaf * 1
        cross_entropy(logits, target, logits.detach()[0], **options, inplace=inplace).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


@needs_resident
def test_a_small_gradient_in_a_large_buffer_gives_its_tail_back() -> None:
    result = run_alone("""
        def gradient(rows):
            x = torch.zeros(rows, 8192, requires_grad=True)
            return torch.autograd.grad(cross_entropy(x, torch.zeros(rows, dtype=torch.long)), x)[0]
        large = gradient(2048)
        del large
        before = resident()
        small = gradient(32)
        result = before - resident()
    """)
    assert result > 50 * 2**20


def test_torchscript_does_not_drop_what_it_does_not_have() -> None:
    x, target = torch.randn(6, 4), torch.randint(4, (6,))
    assert torch.jit.script(cross_entropy_ext.CrossEntropyLoss())(x, target) == F.cross_entropy(x, target)
    with pytest.raises(Exception, match="TorchScript"):
        torch.jit.script(cross_entropy_ext.CrossEntropyLoss(empty="zero"))(x, target)

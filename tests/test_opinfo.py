"""PyTorch's own samples for cross_entropy and CrossEntropyLoss, run against ours with the same arguments."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import arithmetic_of, assert_as_exact, reference
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from cross_entropy_ext import CrossEntropyLoss
from cross_entropy_ext import functional as ext

OP = next(op for op in op_db if op.name == "nn.functional.cross_entropy")
MODULE = next(module for module in module_db if module.module_cls is torch.nn.CrossEntropyLoss)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def differentiable_of(input: Tensor, args: tuple, kwargs: dict) -> list[Tensor]:
    return [t for t in (input, *args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]


def same_as_native(ours: object, native: object, input: Tensor, args: tuple, kwargs: dict) -> None:
    """Loss and all gradients: as exact as native against the oracle, and as close to native as PyTorch's own
    tests ask for (in halves native is the one that is further off: the oracle decides alone)."""
    torch.manual_seed(0)
    expected, result = native(input, *args, **kwargs), ours(input, *args, **kwargs)
    wide = result.dtype in (torch.float32, torch.float64)
    assert result.dtype == expected.dtype and result.shape == expected.shape
    if wide:
        torch.testing.assert_close(result, expected, equal_nan=True)
    leaves = differentiable_of(input, args, kwargs)
    if not leaves:
        assert not result.requires_grad
        return
    grad_output = torch.randn_like(expected)
    found = torch.autograd.grad(result, leaves, grad_output, allow_unused=True)
    wanted = torch.autograd.grad(expected, leaves, grad_output, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if wide and one is not None:
            torch.testing.assert_close(one, other, equal_nan=True)
    target, *rest = args
    weight = kwargs.get("weight", rest[0] if rest else None)
    options = {k: v for k, v in kwargs.items() if k in ("ignore_index", "reduction", "label_smoothing")}
    exact = reference(input, target, weight, grad_output=grad_output, **options)
    arithmetic = arithmetic_of(input)
    assert_as_exact(result, exact["loss"], expected, arithmetic=arithmetic, name="loss")
    assert_as_exact(found[0], exact["input"], wanted[0], arithmetic=arithmetic, name="gradient")


@dtypes
def test_op_samples(dtype: torch.dtype) -> None:
    samples = list(OP.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) >= 15, "PyTorch's samples are not there: nothing was tested"
    for sample in samples:
        same_as_native(ext.cross_entropy, F.cross_entropy, sample.input, sample.args, sample.kwargs)


@dtypes
def test_op_samples_without_gradients(dtype: torch.dtype) -> None:
    for sample in OP.sample_inputs("cpu", dtype, requires_grad=False):
        same_as_native(ext.cross_entropy, F.cross_entropy, sample.input, sample.args, sample.kwargs)


@dtypes
def test_op_samples_noncontiguous(dtype: torch.dtype) -> None:
    for sample in OP.sample_inputs("cpu", dtype, requires_grad=True):
        strided = sample.noncontiguous()
        same_as_native(ext.cross_entropy, F.cross_entropy, strided.input, strided.args, strided.kwargs)


@dtypes
def test_op_reference_samples(dtype: torch.dtype) -> None:
    for sample in OP.reference_inputs("cpu", dtype, requires_grad=True):
        same_as_native(ext.cross_entropy, F.cross_entropy, sample.input, sample.args, sample.kwargs)


def test_op_error_inputs() -> None:
    """None are listed in torch 2.13. A later version may list some, and then they count."""
    if OP.error_inputs_func is None:
        pytest.skip("this torch lists no error inputs for cross_entropy")
    for error in OP.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            ext.cross_entropy(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("training", [True, False])
@dtypes
def test_module_samples(dtype: torch.dtype, training: bool) -> None:
    samples = MODULE.module_inputs_func(MODULE, "cpu", dtype, requires_grad=True, training=training)
    assert len(samples) >= 50, "PyTorch's samples are not there: nothing was tested"
    for sample in samples:
        constructor, forward = sample.constructor_input, sample.forward_input
        native = torch.nn.CrossEntropyLoss(*constructor.args, **constructor.kwargs).to(dtype).train(training)
        ours = CrossEntropyLoss(*constructor.args, **constructor.kwargs).to(dtype).train(training)
        assert repr(ours) == repr(native)
        assert ours.state_dict().keys() == native.state_dict().keys()
        input, *args = forward.args
        kwargs = {
            "reduction": native.reduction,
            "ignore_index": native.ignore_index,
            "label_smoothing": native.label_smoothing,
        }
        same_as_native(
            lambda x, *a, m=ours, **k: m(x, a[0]),
            lambda x, *a, m=native, **k: m(x, a[0]),
            input,
            (args[0], native.weight),
            kwargs,
        )
        if sample.reference_fn is not None and dtype in (torch.float32, torch.float64):
            # PyTorch's reference in Python, in the sample's own dtype: in halves it rounds after every step.
            expected = sample.reference_fn(copy.deepcopy(native), input.detach(), *(a.detach() for a in args))
            torch.testing.assert_close(ours(input, *args), expected, equal_nan=True)


@pytest.mark.skipif(MODULE.module_error_inputs_func is None, reason="this torch has no such samples")
def test_module_error_inputs() -> None:
    errors = MODULE.module_error_inputs_func(MODULE, "cpu", torch.float32, requires_grad=False, training=True)
    assert errors, "PyTorch's samples are not there: nothing was tested"
    for error in errors:
        sample = error.module_error_input
        constructor, forward = sample.constructor_input, sample.forward_input
        with pytest.raises(error.error_type, match=error.error_regex):
            CrossEntropyLoss(*constructor.args, **constructor.kwargs)(*forward.args, **forward.kwargs)

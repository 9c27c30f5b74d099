"""Native's contract line by line: shapes, dtypes, errors and their order, deprecated arguments, the module;
and every difference that this package makes on purpose."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, INTEGERS, generator, name_of
from oracle import check, reference, same_strides, storage_bytes
from torch import Tensor, nn

import cross_entropy_ext
from cross_entropy_ext import CrossEntropyLoss
from cross_entropy_ext import functional as ext

inf, nan = float("inf"), float("nan")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(shape)).to(dtype)


def long(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


def outcome(function: Callable, *args: object, **kwargs: object) -> tuple[type, str] | Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error).split("\n")[0]


def assert_same_outcome(*args: object, **kwargs: object) -> tuple[type, str] | Tensor:
    """The same error, type and first line, or the same result; and after an error every argument as it was,
    and usable."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.device.type == "cpu"]
    before = [storage_bytes(t).clone() for t in tensors]
    native, ours = outcome(F.cross_entropy, *args, **kwargs), outcome(ext.cross_entropy, *args, **kwargs)
    if isinstance(native, Tensor) or isinstance(ours, Tensor):
        assert isinstance(native, Tensor) and isinstance(ours, Tensor), f"native: {native}, ours: {ours}"
        torch.testing.assert_close(ours, native, equal_nan=True)
    else:
        assert ours == native
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(storage_bytes(tensor), old)
    return ours


def assert_error(error: type, message: str, *args: object, **kwargs: object) -> None:
    """Literally this error, and native's own."""
    assert assert_same_outcome(*args, **kwargs) == (error, message)


# ------------------------------------------------------------------------------------------------------------
# Shapes.


@pytest.mark.parametrize(
    "shape",
    [(3,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 2), (2, 3, 1, 4, 1, 2), (0, 3), (2, 3, 0)],
    ids=str,
)
def test_every_shape(shape: tuple[int, ...]) -> None:
    positions = (shape[0], *shape[2:]) if len(shape) > 1 else ()
    target = torch.randint(3, positions, generator=generator(1))
    for t in (target, (2 * randn(*shape)).softmax(1 if len(shape) > 1 else 0)):
        for reduction in ("mean", "sum", "none"):
            loss = ext.cross_entropy(randn(*shape), t, reduction=reduction)
            assert loss.shape == (positions if reduction == "none" else ())
            assert loss.is_contiguous()
            check(randn(*shape), t, reduction=reduction)


def test_one_label_for_a_single_row_may_have_a_dimension() -> None:
    """(C,) logits with a (1,) target: native's forward takes it, and its shape is native's."""
    for reduction in ("mean", "sum", "none"):
        assert isinstance(assert_same_outcome(randn(3), torch.tensor([1]), reduction=reduction), Tensor)
    assert_same_outcome(randn(3), torch.tensor([1]), label_smoothing=0.1)
    x = randn(3).requires_grad_()
    loss = outcome(ext.cross_entropy, x, torch.tensor([1]))
    assert isinstance(loss, Tensor)
    try:
        (grad,) = torch.autograd.grad(loss, x)
    except RuntimeError:
        return  # native's backward raises; a gradient, if there is one, must be right
    assert torch.allclose(grad, reference(x, torch.tensor(1))["input"].value.float())


def test_the_shapes_alone_choose_between_labels_and_probabilities() -> None:
    assert_error(
        RuntimeError,
        "Expected floating point type for target with class probabilities, got Long",
        randn(1),
        long(1),
    )
    assert_error(
        RuntimeError,
        "Expected floating point type for target with class probabilities, got Long",
        randn(2, 3),
        long(2, 3),
    )
    for dtype, name in [
        (torch.int32, "Int"),
        (torch.uint8, "Byte"),
        (torch.bool, "Bool"),
        (torch.complex64, "ComplexFloat"),
    ]:
        assert_error(
            RuntimeError,
            f"Expected floating point type for target with class probabilities, got {name}",
            randn(2, 3),
            torch.zeros(2, 3, dtype=dtype),
        )


# ------------------------------------------------------------------------------------------------------------
# Dtypes.


@pytest.mark.parametrize("soft_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_promotion(dtype: torch.dtype, soft_dtype: torch.dtype) -> None:
    """Labels: the logits' dtype. Probabilities: logits, target and weight are promoted, integer weights not
    counting."""
    logits, soft = randn(4, 5, dtype=dtype).requires_grad_(), randn(4, 5).softmax(1).to(soft_dtype)
    assert ext.cross_entropy(logits, torch.arange(4)).dtype == dtype
    for weight_dtype in [None, *DTYPES, torch.int64, torch.bool, torch.complex64]:
        weight = None if weight_dtype is None else torch.ones(5, dtype=weight_dtype)
        for reduction in ("mean", "none"):
            for e in (0.0, 0.1):
                options = {"reduction": reduction, "label_smoothing": e}
                native, ours = (
                    outcome(F.cross_entropy, logits, soft, weight, **options),
                    outcome(ext.cross_entropy, logits, soft, weight, **options),
                )
                if not isinstance(native, Tensor):
                    assert ours == native
                    continue
                assert isinstance(ours, Tensor), ours
                assert ours.dtype == native.dtype, f"weight {weight_dtype}"
                tolerance = 4 * max(torch.finfo(d).eps for d in (dtype, soft_dtype))
                torch.testing.assert_close(ours, native, rtol=tolerance, atol=tolerance)


def test_a_weight_for_labels_has_the_logits_dtype() -> None:
    assert_error(
        RuntimeError,
        "expected scalar type Float but found Double",
        randn(2, 3),
        long(2),
        torch.ones(3, dtype=torch.double),
    )
    assert_error(
        RuntimeError,
        "expected scalar type Double but found Float",
        randn(2, 3).double(),
        long(2),
        torch.ones(3),
    )
    for dtype in DTYPES:
        for weight in [*DTYPES, torch.int64, torch.bool]:
            for shape in [(3,), (2, 3), (2, 3, 4), (2, 3, 4, 5)]:
                target = long(*((shape[0], *shape[2:]) if len(shape) > 1 else ()))
                for e in (0.0, 0.1):
                    if weight != dtype:
                        assert_same_outcome(
                            randn(*shape, dtype=dtype), target, torch.ones(3, dtype=weight), label_smoothing=e
                        )


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast(half: torch.dtype) -> None:
    """Half logits are read as they are, the arithmetic and the loss are fp32, the gradient is half; fp64
    stays."""
    logits = randn(6, 9, dtype=half).requires_grad_()
    target, weight = torch.tensor([0, 1, 2, -100, 4, 8]), torch.rand(9, generator=generator(0))
    objectives = [
        (target, None),
        (target, weight),
        (target, weight.to(half)),
        (logits.detach().float().softmax(1), None),
    ]
    objectives += [
        (logits.detach().float().softmax(1).to(half), weight),
        (logits.detach().double().softmax(1), None),
    ]
    for t, w in objectives:
        for e in (0.0, 0.1):
            for reduction in ("mean", "none"):
                with torch.autocast("cpu", dtype=half):
                    loss = ext.cross_entropy(logits, t, w, label_smoothing=e, reduction=reduction)
                    native = F.cross_entropy(logits, t, w, label_smoothing=e, reduction=reduction)
                assert loss.dtype == native.dtype == (torch.float64 if t.dtype == torch.float64 else torch.float32)
                torch.testing.assert_close(loss, native, rtol=1e-6, atol=1e-6)
                (grad,) = torch.autograd.grad(loss.sum(), logits)
                (wanted,) = torch.autograd.grad(native.sum(), logits)
                assert grad.dtype == half
                torch.testing.assert_close(grad, wanted)
    with torch.autocast("cpu", dtype=half):
        assert ext.cross_entropy(randn(6, 9).double(), target).dtype == torch.float64
        assert ext.cross_entropy(randn(6, 9), target).dtype == torch.float32
        assert CrossEntropyLoss(weight)(logits, target).dtype == torch.float32
        assert_error(RuntimeError, "expected scalar type Double but found Float", randn(6, 9).double(), target, weight)
    with torch.autocast("cpu", dtype=half, enabled=False):
        assert ext.cross_entropy(logits, target).dtype == half


def test_autocast_keeps_no_wide_copy_of_the_logits() -> None:
    """Difference 9: what is saved for the backward holds no fp32 tensor of the logits' size."""
    logits, saved = randn(64, 999, dtype=torch.bfloat16).requires_grad_(), []
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        ext.cross_entropy(logits, long(64))
    large = [t for t in saved if t.numel() >= logits.numel()]
    assert [t.dtype for t in large] == [torch.bfloat16] and large[0].data_ptr() == logits.data_ptr()


# ------------------------------------------------------------------------------------------------------------
# Errors.

SMOOTHING = "label_smoothing must be between 0.0 and 1.0. Got: "


def test_errors_of_shapes() -> None:
    x = randn(2, 3)
    assert_error(ValueError, "Expected input batch_size (2) to match target batch_size (3).", x, long(3))
    assert_error(ValueError, "Expected input batch_size (2) to match target batch_size (0).", x, long())
    assert_error(ValueError, "For 1D input, 1D target must have size 1, but got target size: 2", randn(3), long(2))
    for input, target in [(x, long(2, 1)), (x, randn(2, 4)), (randn(3), long(1, 1)), (x, long(2, 3, 1))]:
        assert_error(RuntimeError, "0D or 1D target tensor expected, multi-target not supported", input, target)
    assert_error(RuntimeError, "Expected target size [2, 4], got [2, 5]", randn(2, 3, 4), long(2, 5))
    assert_error(RuntimeError, "Expected target size [2, 4], got [2]", randn(2, 3, 4), long(2))
    assert_error(RuntimeError, "Expected target size [2, 4, 5, 6], got [2, 4, 5]", randn(2, 3, 4, 5, 6), long(2, 4, 5))
    spatial = "only batches of spatial targets supported (3D tensors) but got targets of dimension: "
    assert_error(RuntimeError, spatial + "2", randn(2, 3, 4, 5), long(2, 4))
    assert_error(RuntimeError, spatial + "4", randn(2, 3, 4, 5), long(2, 4, 5, 1))
    assert_error(
        RuntimeError,
        "size mismatch (got input: [2, 3, 4, 5] , target: [2, 5, 4]",
        randn(2, 3, 4, 5),
        long(2, 5, 4),
    )


SHAPES = [
    (),
    (1,),
    (2,),
    (3,),
    (0,),
    (2, 3),
    (3, 2),
    (2, 1),
    (1, 3),
    (0, 3),
    (2, 0),
    (2, 3, 4),
    (2, 4),
    (3, 4),
    (2, 3, 1),
    (2, 3, 0),
]
SHAPES += [
    (2, 3, 4, 5),
    (2, 4, 5),
    (2, 5, 4),
    (2, 3, 5),
    (3, 4, 5),
    (2, 3, 4, 5, 2),
    (2, 4, 5, 2),
    (2, 4, 5, 1),
    (1, 1),
    (1, 1, 1),
    (1, 3, 1, 1),
]


@pytest.mark.parametrize("e", [0.0, 0.1])
def test_every_pair_of_shapes_does_what_it_does_in_native(e: float) -> None:
    """Each pair is accepted with native's result or refused with native's error; with a weight of either
    length too."""
    accepted = 0
    for shape, target_shape in itertools.product(SHAPES, SHAPES):
        for weight in (None, torch.ones(3), torch.ones(2), torch.ones(1, 3)):
            for target in (long(*target_shape), randn(*target_shape)):
                accepted += isinstance(assert_same_outcome(randn(*shape), target, weight, label_smoothing=e), Tensor)
    assert accepted > 50


def test_errors_of_weights() -> None:
    rows = "weight tensor should be defined either for all 3 classes or no classes"
    rows += " but got weight tensor of shape: [2]"
    assert_error(RuntimeError, rows, randn(2, 3), long(2), torch.ones(2))
    assert_error(RuntimeError, rows, randn(3), long(), torch.ones(2))
    assert_error(
        RuntimeError,
        "weight tensor should be defined either for all or no classes",
        randn(2, 3, 4),
        long(2, 4),
        torch.ones(2),
    )
    assert_error(RuntimeError, "cross_entropy: " + rows, randn(2, 3), randn(2, 3), torch.ones(2))
    assert_error(RuntimeError, "cross_entropy: " + rows, randn(2, 3, 4), randn(2, 3, 4), torch.ones(2))
    for shape in [(1, 3), (3, 1), (1, 1, 3), (1, 2), (2, 3), (0,), ()]:
        for input, target in [
            (randn(2, 3), long(2)),
            (randn(2, 3, 4), long(2, 4)),
            (randn(2, 3, 4, 5), long(2, 4, 5)),
            (randn(2, 3), randn(2, 3)),
        ]:
            for e in (0.0, 0.1):
                assert_same_outcome(input, target, torch.ones(shape), label_smoothing=e)


def test_a_weight_for_labels_cannot_have_a_gradient() -> None:
    for shape, name in [
        ((3,), "nll_loss"),
        ((2, 3), "nll_loss"),
        ((2, 3, 4), "nll_loss2d"),
        ((2, 3, 4, 5), "nll_loss2d"),
    ]:
        target = long(*((shape[0], *shape[2:]) if len(shape) > 1 else ()))
        message = (
            f"The function '{name}_forward' is not differentiable with respect to argument 'weight'."
            " This input cannot have requires_grad True."
        )
        for weight in (torch.ones(3, requires_grad=True), nn.Parameter(torch.ones(3))):
            for x in (randn(*shape), randn(*shape).requires_grad_()):
                assert_error(RuntimeError, message, x, target, weight)
                assert_same_outcome(x, target, weight, label_smoothing=0.1)
            with torch.no_grad():
                assert isinstance(assert_same_outcome(randn(*shape), target, weight), Tensor)


def test_errors_of_dtypes() -> None:
    for dtype, name in [
        (torch.bool, "Bool"),
        (torch.float32, "Float"),
        (torch.float64, "Double"),
        (torch.uint16, "UInt16"),
        (torch.uint32, "UInt32"),
    ]:
        error, message = assert_same_outcome(randn(2, 3), torch.zeros(2, dtype=dtype))
        assert error is RuntimeError
        assert message in (
            f"expected target dtype to be Long or Byte, but got {name}",
            f"expected scalar type Long but found {name}",  # torch 2.11
        )
        assert_same_outcome(randn(2, 3), torch.zeros(2, dtype=dtype), label_smoothing=0.1)
    for dtype in (torch.bool, torch.float32):
        for shape in [(3,), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 2)]:
            target = torch.zeros((shape[0], *shape[2:]) if len(shape) > 1 else (), dtype=dtype)
            assert not isinstance(assert_same_outcome(randn(*shape), target), Tensor)
    for dtype, name in [
        (torch.complex64, "ComplexFloat"),
        (torch.int64, "Long"),
        (torch.bool, "Bool"),
        (torch.float8_e4m3fn, "Float8_e4m3fn"),
    ]:
        assert_error(
            NotImplementedError,
            f"\"log_softmax_lastdim_kernel_impl\" not implemented for '{name}'",
            torch.zeros(2, 3).to(dtype),
            long(2),
        )
        assert_same_outcome(torch.zeros(2, 3, 4).to(dtype), long(2, 4))
        assert_same_outcome(torch.zeros(2, 3).to(dtype), torch.zeros(2, 3))


def test_errors_of_options() -> None:
    x, y = randn(2, 3), long(2)
    assert_error(RuntimeError, SMOOTHING + "1.5", x, y, label_smoothing=1.5)
    assert_error(RuntimeError, SMOOTHING + "inf", x, y, label_smoothing=inf)
    assert_error(RuntimeError, SMOOTHING + "1.5", x, x, label_smoothing=1.5)
    for ignore_index in (0, 1, 255):
        assert_error(
            RuntimeError,
            "ignore_index is not supported for floating point target",
            x,
            x,
            ignore_index=ignore_index,
        )
    assert isinstance(assert_same_outcome(x, x, ignore_index=-1), Tensor)
    for reduction in ("batchmean", "Mean", "", None, 1):
        assert_error(ValueError, f"{reduction} is not a valid value for reduction", x, y, reduction=reduction)


@pytest.mark.parametrize("label", [3, -1, -101, 7, 2**31, 2**40, -(2**63)])
def test_labels_out_of_bounds(label: int) -> None:
    for shape in [(3,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 2)]:
        target = torch.zeros((shape[0], *shape[2:]) if len(shape) > 1 else (), dtype=torch.long)
        target.view(-1)[-1] = label
        for reduction in ("mean", "sum", "none"):
            for e in (0.0, 0.1):
                with (
                    pytest.raises(IndexError, match=f"^Target {label} is out of bounds\\.")
                    if e == 0
                    else pytest.raises((IndexError, RuntimeError))
                ):
                    ext.cross_entropy(randn(*shape), target, reduction=reduction, label_smoothing=e)
            assert outcome(F.cross_entropy, randn(*shape), target, reduction=reduction) == (
                IndexError,
                f"Target {label} is out of bounds.",
            )
        assert isinstance(assert_same_outcome(randn(*shape), target, ignore_index=label), Tensor)


def test_labels_out_of_bounds_among_many() -> None:
    """Wherever it is, also beside good ones in other threads' shares; the call after it works."""
    logits = randn(5000, 7)
    for place in (0, 1, 2499, 4999):
        target = long(5000)
        target[place] = 7
        for dtype in (torch.int64, torch.int32, torch.uint8):
            with pytest.raises(IndexError, match=r"^Target 7 is out of bounds\."):
                ext.cross_entropy(logits, target.to(dtype))
        check(logits[:50], long(50))


def test_labels_out_of_bounds_are_named_in_any_layout() -> None:
    """The message reads the label where the target's strides and offset say it is; elsewhere are others."""
    storage = torch.arange(10, 58).view(4, 3, 4)
    for view in (storage, storage[1:, 1:, 1:], storage.transpose(1, 2), storage.permute(2, 0, 1)[::2, 1:]):
        for place in (0, view.numel() // 2, view.numel() - 1):
            good = torch.where(torch.arange(view.numel()).view(view.shape) == place, view, 0)
            target = torch.empty_strided(storage.shape, storage.stride(), dtype=torch.long).fill_(-1)
            target = target.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(good)
            with pytest.raises(IndexError, match=rf"^Target {good.max()} is out of bounds\."):
                ext.cross_entropy(randn(view.size(0), 7, *view.shape[1:]), target)


def test_labels_out_of_bounds_of_narrow_dtypes_are_named() -> None:
    """Native writes a uint8 label as a raw byte, which fails to decode."""
    with pytest.raises(IndexError, match=r"^Target 156 is out of bounds\."):
        ext.cross_entropy(randn(2, 3), torch.tensor([0, 156], dtype=torch.uint8))
    with pytest.raises(IndexError, match=r"^Target -100 is out of bounds\."):
        ext.cross_entropy(randn(2, 3), torch.tensor([0, -100], dtype=torch.int8), ignore_index=5)


def test_uint8_labels_are_not_ignored_by_wrapping_around() -> None:
    """-100 is 156 in uint8, and label 156 of 200 classes is a label."""
    logits = randn(2, 200)
    check(logits, torch.tensor([0, 156], dtype=torch.uint8))
    check(logits, torch.tensor([0, 44], dtype=torch.uint8), ignore_index=300)


def test_errors_of_argument_kinds() -> None:
    x, y = randn(2, 3), long(2)
    kind = "cross_entropy_loss(): argument '{}' (position {}) must be {}, not {}"
    assert_error(TypeError, kind.format("target", 2, "Tensor", "list"), x, [0, 1])
    assert_error(TypeError, kind.format("target", 2, "Tensor", "NoneType"), x, None)
    assert_error(TypeError, kind.format("target", 2, "Tensor", "int"), x, 0)
    assert_error(TypeError, kind.format("input", 1, "Tensor", "numpy.ndarray"), x.numpy(), y)
    assert_error(TypeError, kind.format("weight", 3, "Tensor", "list"), x, y, [1.0, 1.0, 1.0])
    assert_error(TypeError, kind.format("ignore_index", 5, "int", "NoneType"), x, y, ignore_index=None)
    assert_error(TypeError, kind.format("ignore_index", 5, "int", "float"), x, y, ignore_index=1.0)
    for beyond in (2**63, -(2**63) - 1, 2**70):
        with pytest.raises(Exception) as native_error:
            F.cross_entropy(x, y, ignore_index=beyond)
        with pytest.raises(type(native_error.value), match=str(native_error.value)):
            ext.cross_entropy(x, y, ignore_index=beyond)
    assert_error(TypeError, kind.format("label_smoothing", 6, "float", "str"), x, y, label_smoothing="0.1")
    assert_error(TypeError, kind.format("label_smoothing", 6, "float", "NoneType"), x, y, label_smoothing=None)
    values = [
        None,
        "mean",
        1,
        1.5,
        True,
        [0],
        (0,),
        {},
        object,
        np.zeros(2),
        np.float64(0.5),
        np.int64(1),
        1 + 2j,
    ]
    for value in values:
        assert_same_outcome(x, value)
        assert_same_outcome(value, y)
        assert_same_outcome(x, y, value)
        assert_same_outcome(x, y, ignore_index=value)
        if not (isinstance(value, float) and value < 0):
            assert_same_outcome(x, y, label_smoothing=value)
    for arguments in [(), (x,), (None, None), ([1.0], [0])]:
        assert outcome(ext.cross_entropy, *arguments)[0] is TypeError
    with pytest.raises(TypeError):
        ext.cross_entropy(x, y, None, None, -100, None, "mean", 0.0, torch.float32)  # the extras are keyword-only
    with pytest.raises(TypeError):
        ext.cross_entropy(x, y, no_such_option=1)


def test_scalars_may_be_tensors_where_native_takes_them() -> None:
    x, y = randn(2, 3), long(2)
    for ignore_index in (torch.tensor(1), torch.tensor([1])):
        assert_same_outcome(x, y, ignore_index=ignore_index)
    for e in (torch.tensor(0.25), torch.tensor([0.25]), torch.tensor(1)):
        assert_same_outcome(x, y, label_smoothing=e)


def test_errors_of_devices() -> None:
    for arguments in [
        (randn(2, 3), long(2).to("meta")),
        (randn(2, 3).to("meta"), long(2)),
        (randn(2, 3), long(2), torch.ones(3, device="meta")),
    ]:
        ours = outcome(ext.cross_entropy, *arguments)
        assert not isinstance(ours, Tensor) and ours[0] is RuntimeError and "device" in ours[1]


def test_errors_of_the_extras() -> None:
    x, y = randn(2, 3), long(2)
    for empty in ("one", "", None, 0):
        with pytest.raises((ValueError, TypeError)):
            ext.cross_entropy(x, y, empty=empty)
    for loss_dtype in (torch.int64, torch.bool, torch.complex64, "float32"):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            ext.cross_entropy(x, y, loss_dtype=loss_dtype)


# Order. Each fault alone gives its own error; together, the one that native looks at first.
INDEX_FAULTS = {
    "reduction": {"reduction": "Mean"},
    "smoothing": {"label_smoothing": 1.5},
    "some smoothing": {"label_smoothing": 0.25},
    "input dtype": {"input": lambda x: x.long()},
    "batch": {"target": lambda y: torch.cat([y, y[:1]])},
    "target rank": {"target": lambda y: y.unsqueeze(-1)},
    "target dtype": {"target_dtype": torch.bool},
    "float target": {"target_dtype": torch.float64},
    "weight length": {"weight": torch.ones(2)},
    "weight dtype": {"weight_dtype": torch.double},
    "weight gradient": {"weight_grad": True},
    "label": {"label": 9},
}
SOFT_FAULTS = {
    "reduction": {"reduction": "Mean"},
    "smoothing": {"label_smoothing": 1.5},
    "ignore_index": {"ignore_index": 0},
    "input dtype": {"input": lambda x: x.long()},
    "target dtype": {"target_dtype": torch.long},
    "weight length": {"weight": torch.ones(2)},
}


def with_faults(shape: tuple[int, ...], soft: bool, faults: list[dict]) -> tuple[tuple, dict] | None:
    settings: dict = {}
    for fault in faults:
        if settings.keys() & fault.keys():
            return None  # both about the same argument
        settings |= fault
    options = {name: settings[name] for name in ("reduction", "label_smoothing", "ignore_index") if name in settings}
    x = settings.get("input", lambda x: x)(randn(*shape))
    y = randn(*shape).softmax(1) if soft else long(shape[0], *shape[2:])
    if "label" in settings:
        y.view(-1)[0] = settings["label"]
    y = settings.get("target", lambda y: y)(y).to(settings.get("target_dtype", y.dtype))
    w = settings.get("weight")
    if "weight_dtype" in settings or "weight_grad" in settings:
        w = (torch.ones(3) if w is None else w).to(settings.get("weight_dtype", torch.float32)).clone()
        w.requires_grad_(settings.get("weight_grad", False))
    return (x, y, w), options


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 2, 2, 2)], ids=str)
def test_order_of_checks(shape: tuple[int, ...], soft: bool) -> None:
    """Every pair and every triple of faults: type and first line of what native raises."""
    faults, different = SOFT_FAULTS if soft else INDEX_FAULTS, []
    for count in (1, 2, 3):
        for names in itertools.combinations(faults, count):
            made = with_faults(shape, soft, [faults[name] for name in names])
            if made is None:
                continue
            args, options = made
            native, ours = (
                outcome(F.cross_entropy, *args, **options),
                outcome(ext.cross_entropy, *args, **options),
            )
            if isinstance(native, Tensor) and isinstance(ours, Tensor):
                torch.testing.assert_close(ours, native, equal_nan=True)
            elif isinstance(native, Tensor) or isinstance(ours, Tensor) or ours != native:
                different.append(f"{' + '.join(names)}: ours {ours}, native {native}")
    assert not different, f"{len(different)} differ:\n" + "\n".join(different)


def test_smoothing_is_checked_before_the_batch_size() -> None:
    """PyTorch's test_nn relies on it."""
    assert_error(RuntimeError, SMOOTHING + "1.2", randn(3, 4), torch.arange(4), label_smoothing=1.2)


def test_reduction_is_checked_first() -> None:
    assert_error(
        ValueError,
        "Mean is not a valid value for reduction",
        randn(3, 4),
        torch.arange(4),
        reduction="Mean",
        label_smoothing=1.2,
    )


def test_an_error_leaves_the_graph_usable() -> None:
    x = randn(4, 3).requires_grad_()
    loss = ext.cross_entropy(x, torch.tensor([0, 1, 2, 0]))
    with pytest.raises(IndexError):
        ext.cross_entropy(x, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError):
        ext.cross_entropy(x, long(5))
    loss.backward()
    exact = reference(x, torch.tensor([0, 1, 2, 0]))["input"].value.float()
    assert torch.allclose(x.grad, exact, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------
# Deprecated arguments.


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_size_average_and_reduce(size_average: bool | None, reduce: bool | None) -> None:
    x, y = randn(4, 3), torch.tensor([0, 1, 2, -100])
    if size_average is None and reduce is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(
                ext.cross_entropy(x, y, None, None, -100, None), ext.cross_entropy(x, y, reduction="mean")
            )
        return
    name = "none" if reduce is False else ("sum" if size_average is False else "mean")
    message = f"size_average and reduce args will be deprecated, please use reduction='{name}' instead."
    with pytest.warns(UserWarning) as caught:
        loss = ext.cross_entropy(x, y, size_average=size_average, reduce=reduce, reduction="overridden")
    assert [str(warning.message) for warning in caught] == [message]
    assert torch.equal(loss, ext.cross_entropy(x, y, reduction=name))
    with pytest.warns(UserWarning) as caught:
        module = CrossEntropyLoss(None, size_average, -100, reduce)
    assert [str(warning.message) for warning in caught] == [message]
    assert module.reduction == name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(module(x, y), loss)


def test_elementwise_mean() -> None:
    x, y = randn(4, 3), torch.tensor([0, 1, 2, -100])
    with pytest.warns(UserWarning) as caught:
        loss = ext.cross_entropy(x, y, reduction="elementwise_mean")
    assert str(caught[0].message) == "reduction='elementwise_mean' is deprecated. Please use reduction='mean' instead."
    assert torch.equal(loss, ext.cross_entropy(x, y))


# ------------------------------------------------------------------------------------------------------------
# The module.


def test_the_module_is_native_to_look_at() -> None:
    ours, native = CrossEntropyLoss(), nn.CrossEntropyLoss()
    assert repr(ours) == repr(native) == "CrossEntropyLoss()"
    assert isinstance(ours, nn.CrossEntropyLoss)
    assert ours.__constants__ == native.__constants__ == ["ignore_index", "reduction", "label_smoothing"]
    assert ours.weight is None and not ours.state_dict() and not list(ours.parameters())
    assert list(dict(ours.named_buffers())) == list(dict(native.named_buffers()))
    assert cross_entropy_ext.CrossEntropyLoss is CrossEntropyLoss
    weight = torch.rand(3)
    ours, native = CrossEntropyLoss(weight), nn.CrossEntropyLoss(weight)
    assert repr(nn.Sequential(ours)) == repr(nn.Sequential(native))
    assert list(ours.state_dict()) == list(native.state_dict()) == ["weight"]
    ours.load_state_dict(nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0])).state_dict())
    assert ours.weight.tolist() == [1, 2, 3]
    assert ours.half().weight.dtype == torch.float16
    assert ours.to(torch.double).weight.dtype == torch.float64
    assert ours.to("meta").weight.device.type == "meta"


def test_the_module_takes_natives_arguments() -> None:
    """By place and by name, and does with them what the function does."""
    x, y, weight = randn(4, 3).requires_grad_(), torch.tensor([0, 1, 2, 1]), torch.rand(3)
    options = {"weight": weight, "ignore_index": 1, "reduction": "none", "label_smoothing": 0.2}
    ours, native = CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    for name in ("ignore_index", "reduction", "label_smoothing"):
        assert getattr(ours, name) == getattr(native, name) == options[name]
    torch.testing.assert_close(ours(x, y), native(x, y))
    assert torch.equal(ours(x, y), ext.cross_entropy(x, y, **options))
    assert torch.equal(ours(input=x, target=y), ours(x, y))
    by_place = CrossEntropyLoss(weight, None, 1, None, "none", 0.2)
    assert torch.equal(by_place(x, y), ours(x, y))
    by_place.label_smoothing = 0.0  # attributes are read when called
    assert torch.equal(by_place(x, y), ext.cross_entropy(x, y, weight, ignore_index=1, reduction="none"))


def test_the_constructor_checks_nothing_and_forward_does() -> None:
    x, y = randn(2, 3), long(2)
    for options in (
        {"reduction": "foo"},
        {"label_smoothing": 2},
        {"weight": torch.ones(7)},
        {"ignore_index": 0.5},
    ):
        native, ours = nn.CrossEntropyLoss(**options), CrossEntropyLoss(**options)
        assert outcome(ours, x, y) == outcome(native, x, y)
    with pytest.raises(TypeError):
        CrossEntropyLoss(None, None, -100, None, "mean", 0.0, torch.float32)  # the extras are keyword-only


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_the_module_can_be_copied(copied: Callable) -> None:
    module = CrossEntropyLoss(
        torch.rand(3),
        ignore_index=2,
        reduction="sum",
        label_smoothing=0.1,
        loss_dtype=torch.float64,
        empty="zero",
    )
    other = copied(module)
    x, y = randn(4, 3), torch.tensor([0, 1, 2, 1])
    assert type(other) is CrossEntropyLoss
    assert torch.equal(other(x, y), module(x, y)) and other(x, y).dtype == torch.float64
    assert other.__dict__.keys() == module.__dict__.keys()


def test_a_subclass_can_add_to_it() -> None:
    class Scaled(CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return 3 * super().forward(input, target)

    x, y = randn(4, 3), torch.tensor([0, 1, 2, 1])
    assert torch.equal(Scaled()(x, y), 3 * CrossEntropyLoss()(x, y))


def test_tensor_subclasses_are_native() -> None:
    class Mine(Tensor):
        pass

    x, y = randn(4, 3), torch.tensor([0, 1, 2, 1])
    loss = ext.cross_entropy(x.as_subclass(Mine), y)
    assert type(loss) is Mine
    torch.testing.assert_close(loss.as_subclass(Tensor), F.cross_entropy(x, y))


def test_other_kinds_of_tensors() -> None:
    """meta, inference, sparse: what native makes of them."""
    meta = ext.cross_entropy(randn(2, 3, 4).to("meta"), long(2, 4).to("meta"), reduction="none")
    assert meta.device.type == "meta" and meta.shape == (2, 4)
    with torch.inference_mode():
        x = randn(4, 3)
        assert torch.allclose(ext.cross_entropy(x, long(4)), F.cross_entropy(x, long(4)))
    sparse = torch.rand(2, 3, generator=generator(0)).to_sparse()
    torch.testing.assert_close(ext.cross_entropy(randn(2, 3), sparse), F.cross_entropy(randn(2, 3), sparse))
    assert outcome(ext.cross_entropy, sparse, long(2)) == outcome(F.cross_entropy, sparse, long(2))


# ------------------------------------------------------------------------------------------------------------
# What differs on purpose (DESIGN: semantics), one test each, with native's behaviour beside it: when native
# changes, these tell.


@pytest.mark.parametrize("integer", [d for d in INTEGERS if d != torch.int64], ids=name_of)
def test_difference_1_labels_of_any_integer_dtype(integer: torch.dtype) -> None:
    for shape in [(3,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 2, 2, 2)]:
        target = torch.randint(3, (shape[0], *shape[2:]) if len(shape) > 1 else (), generator=generator(0))
        for weight, e in [(None, 0.0), (torch.rand(3), 0.0), (None, 0.1), (torch.rand(3), 0.1)]:
            ours = ext.cross_entropy(randn(*shape), target.to(integer), weight, label_smoothing=e)
            assert torch.equal(ours, ext.cross_entropy(randn(*shape), target, weight, label_smoothing=e))
        if integer != torch.uint8:
            assert outcome(F.cross_entropy, randn(*shape), target.to(integer))[0] is RuntimeError


def test_difference_2_nothing_times_infinity_is_nothing() -> None:
    x, q = torch.tensor([[0.0, -inf, 1.0]]), torch.tensor([[0.25, 0.0, 0.75]])
    assert F.cross_entropy(x, q).isnan()
    assert ext.cross_entropy(x, q).item() == pytest.approx(0.563262, rel=1e-5)


def test_difference_3_ignored_positions_are_not_read() -> None:
    x, y = torch.tensor([[0.0, nan, 1.0], [0.0, 1.0, 2.0]], requires_grad=True), torch.tensor([-100, 0])
    (native,) = torch.autograd.grad(F.cross_entropy(x, y), x)
    (ours,) = torch.autograd.grad(ext.cross_entropy(x, y), x)
    assert native[0].isnan().all() and (ours[0] == 0).all()
    assert torch.allclose(ours[1], native[1])


def test_difference_4_half_sums_are_exact() -> None:
    x, y = torch.zeros(70_000, 4, dtype=torch.float16, requires_grad=True), long(70_000)
    assert F.cross_entropy(x, y).isnan()
    loss = ext.cross_entropy(x, y)
    assert loss.item() == pytest.approx(1.386294, rel=2**-11)
    (grad,) = torch.autograd.grad(loss * 4096, x)
    expected = torch.tensor([-0.75, 0.25, 0.25, 0.25]) * 4096 / 70_000
    assert torch.allclose(grad.float(), expected.expand(70_000, 4), rtol=2**-10)


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((2, 3, 4, 5), torch.channels_last), ((2, 3, 4, 5, 6), torch.channels_last_3d)],
    ids=["2d", "3d"],
)
def test_difference_5_the_gradient_has_the_inputs_format(
    shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    x = randn(*shape).contiguous(memory_format=memory_format).requires_grad_()
    for target in (long(shape[0], *shape[2:]), randn(*shape).softmax(1)):
        (grad,) = torch.autograd.grad(ext.cross_entropy(x, target), x)
        assert grad.is_contiguous(memory_format=memory_format) and not grad.is_contiguous()
        assert torch.allclose(grad, reference(x, target)["input"].value.float(), rtol=1e-4, atol=1e-6)
    transposed = randn(2, 4, 9).transpose(1, 2).requires_grad_()
    (grad,) = torch.autograd.grad(ext.cross_entropy(transposed, long(2, 4)), transposed)
    assert same_strides(grad, transposed)


def test_difference_6_deterministic_and_never_an_error() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        for shape in [(5, 3), (2, 3, 4), (2, 3, 40, 50)]:
            x = randn(*shape).requires_grad_()
            y = torch.randint(3, (shape[0], *shape[2:]), generator=generator(0))
            results = [torch.autograd.grad(ext.cross_entropy(x, y), x)[0] for _ in range(3)]
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
            assert results[0].abs().sum() > 0
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("e", [-0.1, -1e-30, -inf, nan])
def test_difference_7_smoothing_below_zero_is_an_error(e: float) -> None:
    """Native takes it for 0."""
    for target in (long(2), randn(2, 3).softmax(1)):
        assert isinstance(outcome(F.cross_entropy, randn(2, 3), target, label_smoothing=e), Tensor)
        with pytest.raises(RuntimeError, match=r"^label_smoothing must be between 0\.0 and 1\.0\. Got: "):
            ext.cross_entropy(randn(2, 3), target, label_smoothing=e)
        with pytest.raises(RuntimeError, match=r"^label_smoothing must be between 0\.0 and 1\.0\. Got: "):
            CrossEntropyLoss(label_smoothing=e)(randn(2, 3), target)
    assert torch.equal(
        ext.cross_entropy(randn(2, 3), long(2), label_smoothing=-0.0), ext.cross_entropy(randn(2, 3), long(2))
    )

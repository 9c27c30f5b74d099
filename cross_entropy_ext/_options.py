"""The options of the losses: defaults, checks, and packing for the operators.

:class:`Options` is the table. An option that is a number has its bounds in `_BOUNDS`. Everything above hands options on
as one object, so a new option is a field here, a row of bounds, and an argument of the public functions.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # ATen's numbers
LOSS_DTYPES = {None: -1, torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}  # at::ScalarType's
EMPTY = ("nan", "zero")
_KINDS = {None: 0, "pairs": 3, "teacher": 4}  # csrc/kernel/problem.h: TargetKind


class CrossEntropyStats(NamedTuple):
    """Loss and statistics from one pass over logits (N, C, d1, ..., dK).

    All but ``loss`` and ``z_loss`` have one element per position, (N, d1, ..., dK), and are 0 where it is ignored
    (``argmax`` is -1, or -2 where ``ignore_index`` is -1, so it never equals a padded label). They describe the logits
    after ``logit_scale`` and ``softcap``, without class weights and smoothing, in float32, or in float64 if the logits
    or probabilities are.
    """

    loss: Tensor
    """As :func:`cross_entropy` returns it."""
    lse: Tensor
    """The logarithm of the sum of exponentials, in nats. Differentiable."""
    target_log_prob: Tensor
    """The log-softmax at the target; for probabilities q, the sum of q log softmax. Differentiable.

    For probabilities that the loss weights or smooths, it takes a second pass.
    """
    entropy: Tensor
    """The entropy of the softmax, -sum p log p, in nats. Differentiable."""
    z_loss: Tensor
    """The share of ``z_loss`` in ``loss``, reduced alike."""
    argmax: Tensor
    """The class of the largest logit, int64; the first of equal ones.

    ``(stats.argmax == target)[target != ignore_index].float().mean()`` is the accuracy.
    """


class Tensors(NamedTuple):
    """The tensors of a loss, in the operators' order."""

    input: Tensor
    target: Tensor
    weight: Tensor | None = None
    companion: Tensor | None = None
    sample_weight: Tensor | None = None
    denominator: float | Tensor | None = None


class Options(NamedTuple):
    """The options of a loss that are not tensors, with their defaults."""

    reduction: str = "mean"
    ignore_index: int = -100
    loss_dtype: torch.dtype | None = None
    empty: str = "nan"
    # Numbers, in the order of csrc/host/cross_entropy.h: Options::Number.
    label_smoothing: float | Tensor = 0.0
    z_loss: float | Tensor = 0.0
    softcap: float | Tensor | None = None
    logit_scale: float | Tensor = 1.0
    temperature: float | Tensor = 1.0
    alpha: float | Tensor = 1.0
    # Flags.
    inplace: bool = False
    statistics: bool = False
    kl: bool = False
    kind: str | None = None
    dim: int = 1

    def __str__(self) -> str:
        """Shows the options that are not the defaults."""
        pairs = zip(self._fields, self, Options(), strict=True)
        return ", ".join(f"{name}={value}" for name, value, default in pairs if value != default) or "no options"

    def transform(self, logits: Tensor) -> Tensor:
        """Applies ``logit_scale`` and ``softcap``, which are numbers here."""
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


OF_NUMBERS = slice(Options._fields.index("label_smoothing"), Options._fields.index("inplace"))
_OF_EXTRAS = slice(OF_NUMBERS.start + 1, OF_NUMBERS.stop)
NUMBERS = Options._fields[OF_NUMBERS]
_SOFTCAP, _SCALE = NUMBERS.index("softcap"), NUMBERS.index("logit_scale")
_EXTRA_DEFAULTS = Options()[_OF_EXTRAS]
_FLOATS = [float] * len(NUMBERS)

_BOUNDS: dict[str, tuple[Callable[[float], bool], type[Exception], str]] = {
    "label_smoothing": (lambda x: 0 <= x <= 1, RuntimeError, "must be between 0.0 and 1.0. Got:"),
    "z_loss": (lambda x: 0 <= x < math.inf, ValueError, "must be a finite number of at least 0, but got"),
    "softcap": (lambda x: 0 < x < math.inf, ValueError, "must be None or a finite number above 0, but got"),
    "logit_scale": (lambda x: abs(x) < math.inf, ValueError, "must be a finite number, but got"),
    "alpha": (lambda x: 0 <= x <= 1, ValueError, "must be between 0 and 1, but got"),
    "lam": (lambda x: 0 <= x <= 1, ValueError, "must be in [0, 1], but got"),
    "denominator": (
        lambda x: x != 0 and abs(x) < math.inf,
        ValueError,
        "must be a finite number other than 0, or a tensor, but got",
    ),
}

# What the tensors are called in messages.
_NAMES = {
    None: Tensors._fields,
    "pairs": ("input", "indices", "weight", "probs", "sample_weight", "denominator"),
    "teacher": ("student_logits", "teacher_logits", "weight", "target", "sample_weight", "denominator"),
}


# ---- checks ---------------------------------------------------------------------------------------------------------


def is_tensor(value: object) -> bool:
    """Returns True for a tensor, and for a proxy of torch.fx that stands for one."""
    return isinstance(value, Tensor) or hasattr(type(value), "__torch_function__")


def check_tensors(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not is_tensor(tensor):
            raise TypeError(f"{name} must be a tensor, but got {tensor!r}")


def check_loss_dtype(loss_dtype: torch.dtype | None) -> None:
    if loss_dtype is not None and not isinstance(loss_dtype, torch.dtype):
        raise TypeError(
            f"loss_dtype must be None, torch.float16, torch.bfloat16, torch.float32 or torch.float64, "
            f"but got {loss_dtype!r}"
        )
    if loss_dtype not in LOSS_DTYPES:
        raise RuntimeError(f"loss_dtype must be float16, bfloat16, float32 or float64. Got: {loss_dtype}")


def check_denominator(denominator: float | Tensor | None, reduction: str) -> None:
    if denominator is not None and reduction != "mean":
        raise ValueError("denominator is what reduction 'mean' divides by, but got another one")


def check_bounds(name: str, value: float) -> float:
    """Returns a number that is within its bounds."""
    accepts, error, requirement = _BOUNDS[name]
    if not accepts(value):
        raise error(f"{name} {requirement} {value}")
    return value


def check_options(options: Options) -> None:
    """Checks the options that are not numbers."""
    if options.empty not in EMPTY:
        raise ValueError(f"empty must be 'nan' or 'zero', but got {options.empty!r}")
    if isinstance(options.ignore_index, bool):
        raise TypeError(f"ignore_index must be an integer, but got {options.ignore_index}")
    if not -(2**63) <= operator.index(options.ignore_index) < 2**63:
        raise ValueError(f"ignore_index must be an integer of 64 bits, but got {options.ignore_index}")
    if options.loss_dtype is not None:
        check_loss_dtype(options.loss_dtype)


def checked(tensors: Tensors, options: Options) -> Tensors:
    """Returns the tensors as operators take them. Raises for wrong types and for wrong options but numbers."""
    check_options(options)
    input, target, weight, companion, sample_weight, denominator = tensors
    for place, tensor in enumerate((input, target, weight, companion, sample_weight)):
        if not isinstance(tensor, Tensor):
            name = _NAMES[options.kind][place]
            if tensor is not None or place < 2 or name == "probs":
                check_tensors(**{name: tensor})
    if isinstance(sample_weight, Tensor) and not (sample_weight.is_floating_point() or sample_weight.is_complex()):
        sample_weight = sample_weight.to(arithmetic_type(input))
    if denominator is not None:
        denominator = as_denominator(denominator, input)
    return Tensors(input, target, weight, companion, sample_weight, denominator)


def number(name: str, value: float) -> float:
    """Returns a number of any kind as a float (or a symbolic one)."""
    if isinstance(value, bool) and name != "label_smoothing":  # native accepts this one
        raise TypeError(f"{name} must be a number, but got {value}")
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return value + 0.0
    if isinstance(value, numbers.Real):  # NumPy's
        return float(value)
    if isinstance(value, Tensor) and value.dim() == 0:
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must be a number here, or a tensor that requires no gradient")
        return float(value)
    raise TypeError(f"{name} must be a number, but got {value!r}")


def number_or_tensor(name: str, value: float | Tensor) -> float | Tensor:
    """Returns a number; or a scalar tensor unread, if it is traced or transformed, or is to get a gradient."""
    if not isinstance(value, Tensor):
        return number(name, value)
    if value.dim() != 0 or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(
            f"{name} must be a number or a scalar tensor of a real type, but got {value.dtype} of shape "
            f"{tuple(value.shape)}"
        )
    differentiated = value.requires_grad and torch.is_grad_enabled()
    return float(value) if is_readable(value) and not differentiated else value


def checked_numbers(options: Options) -> Options:
    """Returns options whose numbers are floats; or scalar tensors, as `number_or_tensor` leaves them."""
    given = {name: getattr(options, name) for name in NUMBERS if not (name == "softcap" and options.softcap is None)}
    return options._replace(**{name: number_or_tensor(name, value) for name, value in given.items()})


def known_numbers(options: Options) -> Options:
    """Returns options whose numbers are floats within their bounds."""
    known = {}
    for name in NUMBERS:
        value = getattr(options, name)
        if name in _BOUNDS and not (name == "softcap" and value is None):
            known[name] = check_bounds(name, number(name, value))
    return options._replace(**known)


def as_denominator(denominator: float | Tensor, input: Tensor) -> Tensor:
    """Returns a mean's denominator as a float64 scalar, on the device of the logits if it is a number."""
    if not isinstance(denominator, Tensor):
        if is_tensor(denominator):
            return denominator
        denominator = check_bounds("denominator", number("denominator", denominator))
        return torch.ones((), dtype=torch.float64, device=input.device) * denominator
    if denominator.is_complex():
        raise ValueError(f"denominator must be a number or a tensor of a real type, but got {denominator.dtype}")
    return denominator.to(torch.float64)


# ---- numbers that have no value yet ---------------------------------------------------------------------------------


def is_readable(value: Tensor) -> bool:
    """Returns True for a tensor whose value can be read: no compiler traces and no transform batches it."""
    if _is_dynamo_compiling() or type(value) not in (Tensor, torch.nn.Parameter):
        return False
    transformed = torch._C._functorch.is_functorch_wrapped_tensor(value) or forward_ad._current_level >= 0
    return not transformed and torch._C._len_torch_dispatch_stack() == 0


def is_known(value: float | Tensor) -> bool:
    """Returns True if a number has its value: no tensor, and not left open by a compiler."""
    if isinstance(value, Tensor):
        return False
    if not _is_dynamo_compiling() and not isinstance(value, (torch.SymFloat, torch.SymInt)):
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value  # takes a while to import

    return has_static_value(value)


def is_default(value: float | Tensor | None, default: float | None) -> bool:
    """Returns True if a number is known to be its default.

    A number that a compiler leaves open is not compared, because each answer would compile the call again; unless all
    numbers are open from the first call on.
    """
    if value is None or default is None:
        return value is default
    if isinstance(value, Tensor):
        return False
    return bool(value == default) if is_known(value) or _leaves_all_open() else False


def has_extras(options: Options) -> bool:
    """Returns True if a number that PyTorch's own loss does not have may differ from its default."""
    return not all(map(is_default, options[_OF_EXTRAS], _EXTRA_DEFAULTS))


def _leaves_all_open() -> bool:
    """Returns True under ``torch.compile(dynamic=True)``."""
    return not torch._dynamo.config.assume_static_by_default


_leaves_all_open._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result, without its imports


def _in_tensor(value: float | Tensor) -> Tensor:
    """Returns a number as the operators take it if it has no value yet: a scalar in the host's memory."""
    if isinstance(value, Tensor):
        return value.to("cpu", torch.float64)
    return torch.ones((), dtype=torch.float64) * value  # torch.compile traces this for any number


# ---- packing --------------------------------------------------------------------------------------------------------

# Numbers that `cross_entropy` has no arguments for.
TEMPERATURE, ALPHA = Options()[Options._fields.index("temperature") : OF_NUMBERS.stop]


def _prepared(tensors: Tensors, options: Options) -> tuple[Tensors, list[float], list[Tensor | None]]:
    """Checks everything, and returns tensors, numbers, and in their order those that have no value yet as tensors."""
    tensors = checked(tensors, options)
    values = _values(options)
    in_tensors, is_capped = [], options.softcap is not None
    if _is_dynamo_compiling() or [*map(type, values)] != _FLOATS:
        values = [number_or_tensor(name, value) for name, value in zip(NUMBERS, values, strict=True)]
        in_tensors = [None if is_known(value) else _in_tensor(value) for value in values]
        scale = in_tensors[_SCALE]
        wide = tensors.input.dtype != torch.float16
        if _is_dynamo_compiling() and scale is not None and scale.requires_grad and wide:
            # The gradient of a zero is a quotient of zeros, for which eager takes another path than a graph may.
            in_tensors[_SCALE] = scale + (scale == 0) * 2.0**-40
        is_capped = is_capped and in_tensors[_SOFTCAP] is None
        values = [value if tensor is None else 0.0 for value, tensor in zip(values, in_tensors, strict=True)]
    if is_capped:
        check_bounds("softcap", values[_SOFTCAP])
    return tensors, values, in_tensors


def packed(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor, list[Tensor | None], list[int], list[float]]:
    """Returns (logits, target, others, integers, numbers), as private operators and the compiled module take them."""
    tensors, values, in_tensors = _prepared(tensors, options)
    integers = _integers(options, F._Reduction.get_enum(options.reduction), 0, 0)
    return (*tensors[:2], as_list(*tensors[2:], *in_tensors), integers, values)


def named(tensors: Tensors, options: Options) -> dict[str, object]:
    """Returns the arguments of a public operator that are not its defaults, by name; but for logits and target."""
    tensors, values, in_tensors = _prepared(tensors, options)
    _, _, weight, companion, sample_weight, denominator = tensors
    arguments = {
        "weight": weight,
        "pair_probs" if options.kind == "pairs" else "labels": companion,
        "sample_weight": sample_weight,
        "denominator": denominator,
        "loss_dtype": options.loss_dtype,
    }
    arguments |= {f"{name}_tensor": tensor for name, tensor in zip(NUMBERS, in_tensors, strict=bool(in_tensors))}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    defaults = 0.0, *(0.0 if default is None else default for default in _EXTRA_DEFAULTS)
    for name, value, default in zip(NUMBERS, values, defaults, strict=True):
        if value != default and f"{name}_tensor" not in arguments:
            arguments[name] = value
    flags = {
        "empty_is_zero": options.empty == "zero",
        "inplace": bool(options.inplace),
        "teacher": options.kind == "teacher",
        "kl": options.kl,
    }
    reduction = F._Reduction.get_enum(options.reduction)
    if reduction != REDUCTIONS["mean"]:
        arguments["reduction"] = reduction
    if options.ignore_index != -100:
        arguments["ignore_index"] = operator.index(options.ignore_index)
    return arguments | {name: True for name, flag in flags.items() if flag}


def packed_numbers(options: Options, shard) -> tuple[list[int], list[float]]:
    """Returns (integers, numbers) for the classes from `shard.begin` on, of `shard.total`. Numbers are known."""
    return _integers(options, REDUCTIONS[options.reduction], shard.begin, shard.total), _values(options)


def _values(options: Options) -> list[float | Tensor]:
    values = [*options[OF_NUMBERS]]
    if values[_SOFTCAP] is None:
        values[_SOFTCAP] = 0.0
    return values


def _integers(options: Options, reduction: int, begin: int, total: int) -> list[int]:
    flags = (options.empty == "zero") | bool(options.inplace) << 1 | options.statistics << 2 | options.kl << 3
    flags |= _KINDS[options.kind] << 4
    return [reduction, operator.index(options.ignore_index), LOSS_DTYPES[options.loss_dtype], flags, begin, total]


def as_list(*tensors: Tensor | None) -> list[Tensor | None]:
    """Returns optional tensors as the operators take them: up to the last that there is."""
    others = [*tensors]
    while others and others[-1] is None:
        others.pop()
    return others


# ---- arguments that are resolved before anything is called ----------------------------------------------------------


def reduction_name(reduction: str) -> str:
    """Returns the reduction without PyTorch's deprecated name for ``'mean'``."""
    return tuple(REDUCTIONS)[F._Reduction.get_enum(reduction)]


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """Returns the reduction that the deprecated arguments mean. One of them is not None."""
    reduction = "mean"
    if reduce is not None and not reduce:
        reduction = "none"
    elif size_average is not None and not size_average:
        reduction = "sum"
    if not torch.compiler.is_compiling():  # compilers cannot trace a warning
        warnings.warn(
            f"size_average and reduce args will be deprecated, please use reduction='{reduction}' instead.",
            stacklevel=3,
        )
    return reduction


def classes_at_one(dim: int, **tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns views of logits, and of other tensors with as many dimensions, whose classes are at 1 (or 0 of 1-d)."""
    check_tensors(**tensors)
    dims = next(iter(tensors.values())).dim()
    return tuple(t.movedim(dim, min(1, dims - 1)) if t.dim() == dims else t for t in tensors.values())


def class_dim(logits: Tensor) -> int:
    return 1 if logits.dim() > 1 else 0


def positions_of(logits: Tensor) -> torch.Size:
    """Returns (N, d1, ..., dK) for logits (N, C, d1, ..., dK)."""
    dim = class_dim(logits)
    return logits.shape[:dim] + logits.shape[dim + 1 :]


# ---- types ----------------------------------------------------------------------------------------------------------


def widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def arithmetic_type(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def loss_type(logits: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """Returns the dtype that `cross_entropy` gives a loss without ``loss_dtype``."""
    types = [logits.dtype]
    if target.is_floating_point():
        types += [target.dtype] if weight is None else [target.dtype, weight.dtype]
    if torch.is_autocast_enabled(logits.device.type):
        types = [widened(dtype) for dtype in types]
    result = types[0]
    for dtype in types[1:]:
        result = torch.promote_types(result, dtype)
    return result


# ---- the options of an output layer ---------------------------------------------------------------------------------

if hasattr(nn, "LinearCrossEntropyOptions"):
    LinearCrossEntropyOptions = nn.LinearCrossEntropyOptions
else:

    @dataclasses.dataclass(frozen=True)
    class LinearCrossEntropyOptions:
        """The fields of :class:`torch.nn.LinearCrossEntropyOptions`, for a torch that does not have it.

        ``batch_chunk_size`` and ``chunking_method`` choose how many positions a chunk has. Gradients are always summed
        in float32 or better, and a second backward is always possible.
        """

        allow_retain_graph: bool = False
        batch_chunk_size: int | None = None
        chunking_method: str | None = "auto"
        acc_policy: str = "auto"
        acc_dtype: torch.dtype | None = None

        def __post_init__(self) -> None:
            method, size = self.chunking_method, self.batch_chunk_size
            if self.acc_policy not in ("accurate", "balanced", "compact", "auto"):
                raise ValueError(f"invalid acc_policy: {self.acc_policy!r}")
            if method not in (None, "auto"):
                name, _, factor = method.partition(":")
                if name != "aspect_ratio" or (":" in method and not (factor.isdigit() and int(factor) > 0)):
                    raise ValueError(f"invalid chunking_method: {method!r}")
            if size is not None and not (isinstance(size, int) and size > 0):
                raise ValueError(f"batch_chunk_size must be positive int or None, got {size!r}")


def size_of_chunk(options: LinearCrossEntropyOptions | None, positions: int, classes: int, features: int) -> int:
    """Returns the number of positions that the options ask for; 0 leaves it to the operator."""
    if options is None:
        return 0
    if not isinstance(options, LinearCrossEntropyOptions):
        raise TypeError(f"options must be None or LinearCrossEntropyOptions, but got {options!r}")
    method, size = options.chunking_method, options.batch_chunk_size
    if method is None:
        return size or positions
    if method == "auto":
        return size or 0
    factor, ratio = int(method.partition(":")[2] or 1), -(-classes // max(1, features))
    power = 1 << max(0, -(-positions // max(1, ratio)) - 1).bit_length()
    chosen = max(1, min(power // factor, positions))
    if size is not None and size != chosen:
        raise ValueError(
            f"batch_chunk_size (={size}) and chunking_method ('{method}') give different chunk sizes "
            f"({size} vs {chosen}); pass only one."
        )
    return chosen

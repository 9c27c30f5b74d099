"""Cross entropy of logits whose classes are sharded over the processes of a `torch.distributed` group.

A rank r that has some of the classes finds, of each position, lse_r (of its own logits), A_r = sum a_c and
L_r = sum a_c (lse_r - x_c) over them. With the lse of all classes

    loss = sum_r L_r + A_r (lse - lse_r)

of which every term is one of a sum without cancellation. So ranks exchange a few numbers for each position, once, and
in float64, in which a confident position's loss is as small as it is; and what the backward needs it has then.
"""

from __future__ import annotations

import copy
import ctypes
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..functional.linear import LinearCrossEntropyOptions, size_of_chunk
from ..functional.losses import (
    _EMPTY,
    _LOSS_DTYPES,
    _REDUCTIONS,
    CrossEntropyStats,
    _as_list,
    _classes_at_one,
    _divisor,
    _number,
    check_loss_dtype,
    check_tensors,
    loss_type,
)
from ..modules import _EXTRAS, CrossEntropyLoss, _shown

__all__ = [
    "VocabParallelCrossEntropyLoss",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_cross_entropy_with_stats",
    "vocab_parallel_linear_cross_entropy",
]

_ops = torch.ops.cross_entropy_ext
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def vocab_parallel_cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    loss_dtype: torch.dtype | None = None,
    empty: str = "nan",
    denominator: float | Tensor | None = None,
    dim: int = 1,
) -> Tensor:
    r"""Cross entropy of logits whose classes are sharded over a group, each process with logits of its own classes:
    :func:`cross_entropy_ext.functional.cross_entropy` of all of them side by side.

    Every rank of the group calls it, with the same options, and gets the same loss, bit for bit. There is one
    all-gather, of 32 bytes for each position and rank, and none in the backward, whose gradient is that of the local
    logits. It has no second derivative, and is not for torch.func.

    Args:
        local_logits: (N, C_r, d1, ..., dK) or (C_r): the logits of this rank's classes, in float16, bfloat16, float32
            or float64 and with any strides. Ranks have consecutive classes, in their order in the group.
        target: the same on every rank, class indices of shape (N, d1, ..., dK) or () among all C classes, of any
            integer dtype; or, sharded as the logits and of their shape, probabilities of the local classes, which may
            require a gradient.
        group: whose ranks have the shards; None for all processes.
        shard_sizes: the number of classes of each rank, of which some may be 0. Default: all have as many as this one.
        weight: one factor per class, of all of them: (C). May not require a gradient.
        sample_weight: a factor for each position, the same on every rank. May not require a gradient.
        denominator: what ``'mean'`` divides by instead of its own denominator, a number or a scalar tensor.
        ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, loss_dtype, empty: as for
            :func:`cross_entropy_ext.functional.cross_entropy`; smoothing is over all C classes. A number in a tensor
            may not require a gradient.
        dim: the dimension of the classes in local logits and probabilities: -1 for (B, T, C_r).

    Returns:
        A scalar, or for ``reduction='none'`` a loss for each position; in the logits' dtype, promoted with
        probabilities and their weights (float32 for half logits under autocast), or ``loss_dtype``.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``.
        ValueError, RuntimeError, TypeError: arguments that are wrong, or not the same on every rank; shards of
            different sizes without ``shard_sizes``.

    What one rank finds wrong is raised on every rank, with the number of that rank. On a CUDA device, where nothing
    waits for the host, the others have a loss of NaN instead; and a target out of range is reported as all of them are
    (:func:`cross_entropy_ext.check_errors`), on every rank.

    Ranks send checksums of what has to be the same on all of them; a difference is an error, or NaN. Labels have to be
    equal. Class weights and sample weights may differ by about 1/256 of their norm, a denominator by about a millionth,
    and the states of :func:`vocab_parallel_linear_cross_entropy` by about 1/16 of their norm: each rank makes these on
    its own, and rounding is no error. Smaller differences pass unseen. A tensor with an infinity or NaN is not
    compared. Checksums take 0.03 ms of a CPU for 2048 class indices, where forward and backward of 8000 classes take
    33 ms, and 0.5 ms for states of 2048 x 512.

    It is an error, too, to hand all classes on every rank instead of each rank's own. This is seen by logits that are
    the same on every rank, bit for bit, though not all equal, while every label is among the first rank's classes, or
    the probabilities of each rank sum up to one. It is not seen for probabilities with a ``label_smoothing`` above
    0.999, of which next to nothing is left. ``shard_sizes`` says that they are shards nevertheless.

    Where ranks have different numbers of positions, the collective is none: the group's backend or this function raises
    an error, and gloo may end the process with one; ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` names the shapes. If a rank
    ends, the others get the backend's error.
    """
    return _results(
        local_logits,
        target,
        (weight, sample_weight, denominator),
        group,
        shard_sizes,
        _Options(
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            loss_dtype=loss_dtype,
            empty=empty,
            statistics=False,
            dim=dim,
        ),
    )[0]


def vocab_parallel_cross_entropy_with_stats(
    local_logits: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    loss_dtype: torch.dtype | None = None,
    empty: str = "nan",
    denominator: float | Tensor | None = None,
    dim: int = 1,
) -> CrossEntropyStats:
    """The same, and statistics of all classes' softmax: :class:`cross_entropy_ext.functional.CrossEntropyStats`.

    Takes the arguments of :func:`vocab_parallel_cross_entropy`, and has one exchange as well, of 72 bytes for each
    position and rank. ``lse``, ``target_log_prob`` and ``entropy`` are differentiable; ``argmax`` is among all classes.

    Raises:
        As :func:`vocab_parallel_cross_entropy`.
    """
    return CrossEntropyStats(
        *_results(
            local_logits,
            target,
            (weight, sample_weight, denominator),
            group,
            shard_sizes,
            _Options(
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                softcap=softcap,
                logit_scale=logit_scale,
                loss_dtype=loss_dtype,
                empty=empty,
                statistics=True,
                dim=dim,
            ),
        )
    )


def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    local_weight: Tensor,
    target: Tensor,
    *,
    local_bias: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    loss_dtype: torch.dtype | None = None,
    empty: str = "nan",
    denominator: float | Tensor | None = None,
) -> Tensor:
    r"""Cross entropy of an output layer whose weight is sharded over a group by classes; no rank ever has all of its
    own logits: :func:`cross_entropy_ext.functional.linear_cross_entropy` of all shards together.

    The logits are made twice, a chunk of positions at a time: in the forward for what the ranks exchange, which is that
    of :func:`vocab_parallel_cross_entropy`, and in the backward for the gradients. There the gradient of the input,
    which each rank needs whole, is summed over the group: the one collective of a backward, which every rank has to
    run.

    Args:
        input: (N, F), (B, ..., F) or (F), the same on every rank.
        local_weight: (C_r, F), the rows of this rank's classes.
        target: class indices of shape (N), (B, ...) or () among all C classes, the same on every rank; or probabilities
            of the local classes, (N, C_r), (B, ..., C_r) or (C_r).
        local_bias: (C_r).
        options: as for :func:`cross_entropy_ext.functional.linear_cross_entropy`.
        group, shard_sizes, weight, ...: as for :func:`vocab_parallel_cross_entropy`.

    Returns, Raises:
        As :func:`vocab_parallel_cross_entropy`.
    """
    layer = _Layer(input, local_weight, local_bias, options)
    (loss,) = _results(
        None,
        target,
        (weight, sample_weight, denominator),
        group,
        shard_sizes,
        _Options(
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            loss_dtype=loss_dtype,
            empty=empty,
            statistics=False,
        ),
        layer,
    )
    return loss.reshape(layer.batch) if reduction == "none" else loss


class VocabParallelCrossEntropyLoss(CrossEntropyLoss):
    """:func:`vocab_parallel_cross_entropy` as a module, with the buffers and the state_dict of
    :class:`cross_entropy_ext.CrossEntropyLoss`.

    Example:
        >>> criterion = VocabParallelCrossEntropyLoss(group=tensor_parallel_group, ignore_index=0)
        >>> loss = criterion(hidden @ my_rows_of_the_head.T, target)
        >>> loss.backward()
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        group: dist.ProcessGroup | None = None,
        shard_sizes: Sequence[int] | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        loss_dtype: torch.dtype | None = None,
        empty: str = "nan",
        dim: int = 1,
    ) -> None:
        super().__init__(
            weight,
            size_average,
            ignore_index,
            reduce,
            reduction,
            label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            loss_dtype=loss_dtype,
            empty=empty,
            dim=dim,
        )
        self.group = group
        self.shard_sizes = shard_sizes

    def __deepcopy__(self, memo: dict) -> VocabParallelCrossEntropyLoss:
        """With the same group, which is the processes' and cannot be copied."""
        memo[id(self.group)] = self.group
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        result.__dict__ = copy.deepcopy(self.__dict__, memo)
        return result

    def extra_repr(self) -> str:
        sizes = [] if self.shard_sizes is None else [f"shard_sizes={self.shard_sizes}"]
        return ", ".join([*_shown(self, _EXTRAS), *sizes])

    def forward(
        self,
        local_logits: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of local logits (C_r), (N, C_r) or (N, C_r, d1, ..., dK) against indices among all classes, or
        probabilities of the local ones."""
        return vocab_parallel_cross_entropy(
            local_logits,
            target,
            group=self.group,
            shard_sizes=self.shard_sizes,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            loss_dtype=self.loss_dtype,
            empty=self.empty,
            denominator=denominator,
            dim=self.dim,
        )


# ---- what every rank has to know of the others' errors --------------------------------------------------------------

# Before the numbers: what went wrong, positions, classes, a checksum of the options, which have to be the same
# everywhere, and the error's message, or else the options in words. Then checksums of tensors.
_TEXT = 224
_FIELDS = struct.Struct(f"=qqqq{_TEXT}s")
_HEADER = _FIELDS.size // 8
_ERRORS = (None, IndexError, ValueError, TypeError, NotImplementedError, RuntimeError)
_UNKNOWN = -1


# Tensors that have to be the same on every rank, and by how much of their norm they may differ: labels not at all,
# others by rounding. States are the last of many computations, which each rank repeats, and not to the last bit.
_SAME = {"target": 0.0, "weight": 2**-8, "sample_weight": 2**-8, "denominator": 2**-20, "input": 2**-4}
_PROJECTIONS = 3
_CHECKSUMS = len(_SAME) * (_PROJECTIONS + 1)


def _noise(count: int, device: torch.device) -> Tensor:
    """The same pseudo-random integers on every rank."""
    noise = torch.arange(1, count + 1, device=device) * 0x1E3779B97F4A7C15
    return noise * (noise >> 29)


def _directions(count: int, device: torch.device) -> Tensor:
    """The same pseudo-random numbers in [-1, 1) on every rank, in float64."""
    return _noise(count, device).double() * 2.0**-63


@torch.no_grad()
def checksums(tensors: dict[str, Tensor | None], device: torch.device) -> Tensor:
    """Of each of `_SAME` that is given, a few numbers: of integers one, which is exact; of others projections on fixed
    directions, and the norm. Of states (N, F) what is projected is their product with one vector of length F."""
    sums = torch.zeros(len(_SAME), _PROJECTIONS + 1, dtype=torch.float64, device=device)
    for i, name in enumerate(_SAME):
        values = tensors.get(name)
        if values is None:
            continue
        if not values.is_floating_point():
            values = values.contiguous()
            if _reads_reports(device):
                sums[i, 0] = zlib.crc32(ctypes.string_at(values.data_ptr(), values.nbytes))
            else:
                values = values.view(-1).long() * _noise(values.numel(), device)
                sums[i, 0] = values.sum() & (1 << 52) - 1  # exact in float64
            continue
        if name == "input":
            values = values @ _directions(values.size(1), device).to(values.dtype)
        values = values.reshape(-1).double()
        sums[i, :-1] = _directions(_PROJECTIONS * values.numel(), device).view(_PROJECTIONS, -1) @ values
        sums[i, -1] = values.norm()
    return sums.view(-1)


def _different(sums: Tensor) -> Tensor:
    """(ranks, tensors): whether a rank's tensor is another than that of the first. What is not finite is not judged."""
    sums = sums.view(len(sums), len(_SAME), _PROJECTIONS + 1)
    distance = (sums[..., :-1] - sums[:1, :, :-1]).abs().amax(-1)
    norm = torch.maximum(sums[..., -1], sums[:1, :, -1])
    return distance > norm * norm.new_tensor(list(_SAME.values()))


@dataclass
class _Report:
    """Of one rank to the others. `classes`: of its shard, where all have to be the same size. `checksums`: if any."""

    positions: int
    classes: int = _UNKNOWN
    agreement: str = ""
    error: Exception | None = None
    checksums: Tensor | None = None

    def packed(self) -> bytearray:
        kind = next((i for i, kind in enumerate(_ERRORS) if kind and isinstance(self.error, kind)), len(_ERRORS) - 1)
        text = self.agreement if self.error is None else str(self.error)
        checksum = zlib.crc32(self.agreement.encode())
        fields = (0 if self.error is None else kind, self.positions, self.classes, checksum)
        return bytearray(_FIELDS.pack(*fields, text.encode(errors="replace")[:_TEXT]))


def _reads_reports(device: torch.device) -> bool:
    """Whether the host may look at what it has received: it would have to wait for any other device."""
    return device.type == "cpu"


def exchange(
    report: _Report,
    length: int,
    fill: Callable[[Tensor], None] | None,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Tensor:
    """One all-gather of `length` float64 numbers of each rank, which `fill` writes: (ranks, length), in rank order.

    Raises on every rank what `fill` or `report` has of an error on any of them. Where the host does not read reports,
    the numbers of ranks that have an error, or disagree with this one, are NaN instead; and those of all ranks, where
    checksums differ.
    """
    send = torch.empty(_HEADER + _CHECKSUMS + length, dtype=torch.float64, device=device)
    if report.error is None:
        try:
            fill(send[_HEADER + _CHECKSUMS :])
            if report.checksums is not None:
                send[_HEADER : _HEADER + _CHECKSUMS].copy_(report.checksums)
        except Exception as error:
            report.error = error
    if report.error is not None:
        send.fill_(torch.nan)
    reads = _reads_reports(device)
    if reads:
        send[:_HEADER].copy_(torch.frombuffer(report.packed(), dtype=torch.float64))
    elif report.error is None:
        send[0].fill_(zlib.crc32(f"{report.positions} {report.classes} {report.agreement}".encode()))
    received = send.new_empty(dist.get_world_size(group) * send.numel())
    try:
        _all_gather(received, send, group)
    except Exception as failure:
        if report.error is not None:
            raise report.error from failure
        raise
    if report.error is not None and not reads:
        raise report.error
    received = received.view(-1, send.numel())
    numbers = received[:, _HEADER + _CHECKSUMS :]
    if reads:
        _raise_reported(received, report, group)
        return numbers
    agrees = received[:, :1] == send[:1]
    if report.checksums is not None:
        agrees &= ~_different(received[:, _HEADER : _HEADER + _CHECKSUMS]).any()
    return torch.where(agrees, numbers, torch.nan)


def _all_gather(received: Tensor, send: Tensor, group: dist.ProcessGroup | None) -> None:
    if hasattr(dist, "all_gather_single"):  # the name since torch 2.13
        dist.all_gather_single(received, send, group)
    else:
        dist.all_gather_into_tensor(received, send, group)


def _raise_reported(received: Tensor, mine: _Report, group: dist.ProcessGroup | None) -> None:
    """Whatever ranks have reported, or are seen to disagree about: the same error on all of them."""
    fields = received.view(torch.int64)[:, : _HEADER - _TEXT // 8].tolist()
    kinds, positions, classes, checksums = zip(*fields, strict=True)
    name = [f"rank {dist.get_global_rank(group or dist.group.WORLD, r)}" for r in range(len(fields))]

    def texts() -> list[str]:
        raw = received.contiguous().view(torch.uint8)[:, _FIELDS.size - _TEXT : _FIELDS.size].tolist()
        return [bytes(text).rstrip(b"\0").decode(errors="replace") for text in raw]

    def different(values: tuple[int, ...]) -> str:
        return ", ".join(f"{value} on {rank}" for value, rank in zip(values, name, strict=True))

    if any(n != mine.positions for n in positions):
        raise ValueError(f"ranks have different numbers of positions: {different(positions)}") from mine.error
    known = [n for n in classes if n != _UNKNOWN]
    if any(n != known[0] for n in known):
        raise ValueError(
            f"ranks have different numbers of classes: {different(classes)}; pass all of them as shard_sizes"
        ) from mine.error
    if mine.error is not None:
        raise mine.error
    for rank, kind in enumerate(kinds):
        if kind:
            raise _ERRORS[kind](f"{name[rank]}: {texts()[rank]}")
    if any(checksum != checksums[0] for checksum in checksums):
        other = next(r for r, checksum in enumerate(checksums) if checksum != checksums[0])
        one, another = texts()[0], texts()[other]
        raise ValueError(f"ranks disagree: {name[0]} has {one}, and {name[other]} {another}")
    sums = received[:, _HEADER : _HEADER + _CHECKSUMS]
    if mine.checksums is None or torch.equal(sums, sums[:1].expand_as(sums)):
        return
    different = _different(sums)
    if different.any():
        rank, tensor = different.nonzero()[0].tolist()
        raise ValueError(
            f"ranks disagree: {list(_SAME)[tensor]} has to be the same on every rank of the group, "
            f"but {name[rank]} has another than {name[0]}"
        )


# ---- options --------------------------------------------------------------------------------------------------------


def positions_of(logits: Tensor) -> torch.Size:
    """(N, d1, ..., dK) of logits (N, C, d1, ..., dK)."""
    dim = class_dim(logits)
    return logits.shape[:dim] + logits.shape[dim + 1 :]


def class_dim(logits: Tensor) -> int:
    return 1 if logits.dim() > 1 else 0


@dataclass(frozen=True)
class _Options:
    """What is no tensor."""

    reduction: str
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    loss_dtype: torch.dtype | None
    empty: str
    statistics: bool
    dim: int = 1

    def __str__(self) -> str:
        """What is not as it is without being asked for."""
        usual = _Options("mean", -100, 0.0, 0.0, None, 1.0, None, "nan", False)
        return (
            ", ".join(
                f"{name}={value}"
                for (name, value), other in zip(vars(self).items(), vars(usual).values(), strict=True)
                if value != other
            )
            or "no options"
        )

    def checked(self) -> None:
        F._Reduction.get_enum(self.reduction)
        if not 0 <= _number("label_smoothing", self.label_smoothing) <= 1:
            raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {self.label_smoothing}")
        if not 0 <= _number("z_loss", self.z_loss) < float("inf"):
            raise ValueError(f"z_loss must be a finite number of at least 0, but got {self.z_loss}")
        if not abs(_number("logit_scale", self.logit_scale)) < float("inf"):
            raise ValueError(f"logit_scale must be a finite number, but got {self.logit_scale}")
        if self.softcap is not None and not 0 < _number("softcap", self.softcap) < float("inf"):
            raise ValueError(f"softcap must be None or a finite number above 0, but got {self.softcap}")
        check_loss_dtype(self.loss_dtype)
        if self.empty not in _EMPTY:
            raise ValueError(f"empty must be 'nan' or 'zero', but got {self.empty!r}")

    def numbered(
        self,
        shard: _Shard,
        reduction: str,
        loss_dtype: torch.dtype,
        *,
        smoothed: bool = True,
        z_loss: bool = False,
        statistics: bool = False,
    ) -> tuple[list[int], list[float]]:
        """As the private operators take them."""
        flags = statistics << 2
        return (
            [_REDUCTIONS[reduction], self.ignore_index, _LOSS_DTYPES[loss_dtype], flags, shard.begin, shard.total],
            [
                float(self.label_smoothing) * smoothed,
                float(self.z_loss) * z_loss,
                float(self.softcap or 0),
                float(self.logit_scale),
                1.0,
                1.0,
            ],
        )


@dataclass(frozen=True)
class _Shard:
    """The classes [begin, begin + size) of `total`."""

    begin: int
    size: int
    total: int

    @classmethod
    def of(cls, size: int, sizes: Sequence[int] | None, rank: int, ranks: int) -> _Shard:
        if sizes is None:
            return cls(rank * size, size, ranks * size)
        sizes = [int(n) for n in sizes]
        if len(sizes) != ranks or min(sizes) < 0:
            raise ValueError(f"shard_sizes must be the numbers of classes of {ranks} ranks, but got {sizes}")
        if sizes[rank] != size:
            raise ValueError(f"local_logits have {size} classes, but shard_sizes {sizes[rank]} for this rank")
        return cls(sum(sizes[:rank]), size, sum(sizes))


# ---- one position's factor, and the mean's denominator --------------------------------------------------------------


def sum_in_order(values: Tensor) -> Tensor:
    """Of a vector; the same bits for any number of threads, between which a sum of more than 32768 would be divided."""
    while values.numel() > 1 << 14:
        pieces = F.pad(values, (0, -values.numel() % (1 << 10))).view(-1, 1 << 10)
        values = pieces.sum(1)
    return values.sum()


def positions_that_count(target: Tensor, ignore_index: int) -> Tensor | None:
    """Of class indices: those that are not ignored. None: all."""
    return None if target.is_floating_point() else target.reshape(-1).long() != ignore_index


def denominator_of_mean(
    target: Tensor, positions: int, valid: Tensor | None, weight: Tensor | None, sample_weight: Tensor | None
) -> Tensor:
    """The sum of w_y s over the positions that count, and for probabilities of s; a float64 scalar."""
    if valid is None:
        if sample_weight is None:
            return torch.full((), positions, dtype=torch.float64, device=target.device)
        return sum_in_order(sample_weight.reshape(-1).double())
    if weight is None and sample_weight is None:
        return valid.sum().double()
    parts = valid.double()
    if weight is not None:  # a class out of range is an error elsewhere, and must be none here
        parts = weight.double()[target.reshape(-1).long().clamp(0, weight.numel() - 1)]
    if sample_weight is not None:
        parts = parts * sample_weight.reshape(-1)
    return sum_in_order(torch.where(valid, parts, 0.0))


def ratio_of_denominators(denominator: Tensor, of_classes: Tensor, label_smoothing: float, empty: str) -> Tensor:
    """By what class weights are multiplied where a z-loss has a mean of its own: csrc/cross_entropy.h, KernelInputs."""
    ratio = denominator / of_classes
    if empty == "nan":
        return ratio
    nothing = of_classes == 0
    return torch.where(nothing & (denominator == 0) if label_smoothing else nothing, 1.0, ratio)


def zero_is_one(denominator: Tensor, total: Tensor, empty: str) -> Tensor:
    """What a sum is divided by, so that a mean over nothing is what it is to be."""
    return denominator if empty == "nan" else torch.where((denominator == 0) & (total == 0), 1.0, denominator)


# ---- the kernels ----------------------------------------------------------------------------------------------------


def _forward(logits, target, weight, numbered):
    return _ops._forward.default(logits, target, _as_list(weight), *numbered)


def _backward(grad_output, grad_statistics, logits, target, weight, sample_weight, lse, denominator, numbered, wanted):
    inputs = logits, target, _as_list(weight, None, sample_weight)
    if grad_statistics is None:
        grad_statistics = denominator  # any scalar
    return _ops._backward.default(grad_output, grad_statistics, *inputs, lse, denominator, *numbered, wanted)


# ---- the loss -------------------------------------------------------------------------------------------------------

# What ranks exchange of each position, in float64: lse_r, as the sum of two numbers, A_r and L_r. And for statistics of
# the shard's softmax its entropy, sum q_c (x_c - lse_r) and sum q_c of the target q, the largest logit and its class.
_ROWS, _ROWS_WITH_STATISTICS = 4, 9


@dataclass(frozen=True)
class _Problem:
    options: _Options
    shard: _Shard
    group: dist.ProcessGroup | None
    report: _Report
    arithmetic: torch.dtype
    loss_dtype: torch.dtype
    soft: bool

    @property
    def asks_twice(self) -> bool:
        """The log-probability is of probabilities as they are: where they are weighted or smoothed for the loss, the
        kernel has to be asked once more."""
        return self.options.statistics and self.soft and (self.weighted or self.options.label_smoothing != 0)

    weighted: bool = False

    def numbered(self, reduction: str, **more: bool) -> tuple[list[int], list[float]]:
        return self.options.numbered(self.shard, reduction, torch.float64, **more)


def _results(local_logits, target, others, group, shard_sizes, options, layer=None) -> tuple[Tensor, ...]:
    if not dist.is_available():
        raise RuntimeError("this PyTorch was built without torch.distributed")
    if torch.compiler.is_dynamo_compiling():  # whose collectives are not these: a break in the graph
        return torch.compiler.disable(_eager_results)(local_logits, target, others, group, shard_sizes, options, layer)
    return _eager_results(local_logits, target, others, group, shard_sizes, options, layer)


def _eager_results(local_logits, target, others, group, shard_sizes, options, layer) -> tuple[Tensor, ...]:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("this process is not in the group")
    parts = None
    try:
        if options.dim != 1:
            local_logits, target = _classes_at_one(options.dim, local_logits=local_logits, target=target)
        if layer is not None:
            weight, sample_weight, denominator = others
            local_logits, target, sample_weight, parts = layer.flat(target, sample_weight)
            others = weight, sample_weight, denominator
        problem, tensors = _checked(local_logits, target, *others, group, shard_sizes, options, parts, rank, ranks)
    except Exception as error:
        if layer is not None:
            positions, classes, device = layer.batch, None, layer.input.device
        elif isinstance(local_logits, Tensor):
            positions = positions_of(local_logits) if local_logits.dim() else torch.Size()
            known = local_logits.dim() > 0 and shard_sizes is None
            classes = local_logits.size(class_dim(local_logits)) if known else None
            device = local_logits.device
        else:
            raise
        report_error(error, positions.numel(), classes, options.statistics, group, device)
    if parts is not None:
        return (_VocabParallelLinear.apply(*tensors, problem, *parts),)
    return _VocabParallel.apply(*tensors, problem)


def report_error(
    error: Exception,
    positions: int,
    classes: int | None,
    statistics: bool,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> NoReturn:
    """Raises an error of this rank, after the exchange in which the others are."""
    rows = _ROWS_WITH_STATISTICS if statistics else _ROWS
    report = _Report(positions, _UNKNOWN if classes is None else classes, error=error)
    exchange(report, rows * positions, None, group, device)
    raise error


class _Layer:
    """An output layer of which this rank has a part, as it was given."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None, options: LinearCrossEntropyOptions | None):
        if not isinstance(input, Tensor) or input.dim() == 0:
            raise ValueError(f"input must be a tensor of shape (..., features), but got {input!r}")
        self.input, self.weight, self.bias, self.options = input, weight, bias, options
        self.batch = input.shape[:-1]

    def flat(self, target: Tensor, sample_weight: Tensor | None) -> tuple:
        """A stand-in for the logits, with their shape and no memory; target and sample_weight for it; the layer's
        tensors and the size of a chunk."""
        input, weight, bias = self.input, self.weight, self.bias
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != input.shape[-1]:
            shape = tuple(weight.shape) if isinstance(weight, Tensor) else weight
            raise ValueError(f"local_weight must be (classes, {input.shape[-1]}), as the input is, but got {shape}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"local_bias must have one element for each of the {len(weight)} classes of local_weight, "
                f"but got the shape {tuple(bias.shape)}"
            )
        tensors = [input.reshape(self.batch.numel(), input.shape[-1]), weight, bias]
        if torch.is_autocast_enabled(input.device.type):  # as linear is
            dtype = torch.get_autocast_dtype(input.device.type)
            tensors = [t if t is None else t.to(dtype) for t in tensors]
        for name, tensor in (("local_weight", tensors[1]), ("local_bias", tensors[2])):
            if tensor is not None and (tensor.dtype, tensor.device) != (tensors[0].dtype, input.device):
                raise ValueError(
                    f"{name} must be of the input's type and on its device, but is {tensor.dtype} on {tensor.device}"
                )
        shape = self.batch.numel(), len(weight)
        if isinstance(target, Tensor):
            dense = target.is_floating_point()
            if tuple(target.shape) == ((*self.batch, len(weight)) if dense else tuple(self.batch)):  # else an error
                target = target.reshape(shape if dense else -1)
        if isinstance(sample_weight, Tensor) and sample_weight.shape == self.batch:
            sample_weight = sample_weight.reshape(-1)
        logits = tensors[0].detach().new_empty(()).expand(shape)
        return logits, target, sample_weight, (*tensors, size_of_chunk(self.options, *shape, input.shape[-1]))


def _checked(local_logits, target, weight, sample_weight, denominator, group, shard_sizes, options, layer, rank, ranks):
    """The problem, and the tensors as the kernels take them. Raises for everything but targets out of range."""
    check_tensors(local_logits=local_logits, target=target)
    check_devices(local_logits, target=target, weight=weight, sample_weight=sample_weight, denominator=denominator)
    options.checked()
    if local_logits.dim() == 0 or local_logits.dtype not in _LOSS_DTYPES:
        raise ValueError(
            "local_logits must be a tensor of float16, bfloat16, float32 or float64 with a class dimension, but got "
            f"{local_logits.dtype} of shape {tuple(local_logits.shape)}"
        )
    positions = positions_of(local_logits)
    shard = _Shard.of(local_logits.size(class_dim(local_logits)), shard_sizes, rank, ranks)
    if shard.total == 0:
        raise ValueError("there are no classes on any rank")
    soft = target.is_floating_point()
    if soft:
        if target.shape != local_logits.shape:
            raise ValueError(
                f"probabilities must have the shape of local_logits, {tuple(local_logits.shape)}, "
                f"but got {tuple(target.shape)}"
            )
        if options.ignore_index >= 0:
            raise RuntimeError("ignore_index is not supported for floating point target")
    elif target.dtype not in _INTEGERS:
        raise ValueError(f"target must be class indices or probabilities, but got {target.dtype}")
    elif target.shape != positions:
        raise ValueError(
            f"target must have a class for each position, {tuple(positions)}, but got the shape {tuple(target.shape)}"
        )
    loss_dtype = options.loss_dtype or loss_type(local_logits, target, weight)
    double = local_logits.dtype == torch.float64
    if soft:
        double = double or torch.float64 in (target.dtype, None if weight is None else weight.dtype)
    arithmetic = torch.float64 if double else torch.float32
    if weight is not None:
        weight = _constant("weight", weight, torch.Size([shard.total]), arithmetic)
    if sample_weight is not None:
        sample_weight = _constant("sample_weight", sample_weight, positions, None)
        if not sample_weight.is_floating_point():
            sample_weight = sample_weight.to(arithmetic)
    described = "a tensor" if isinstance(denominator, Tensor) else denominator
    if denominator is not None:
        if options.reduction != "mean":
            raise ValueError("denominator is what reduction 'mean' divides by, but got another one")
        denominator = _constant("denominator", _divisor(denominator, local_logits), torch.Size(), None)
    sizes = [shard.size] * ranks if shard_sizes is None else [int(n) for n in shard_sizes]
    differentiates = layer is not None and layer[0].requires_grad and torch.is_grad_enabled()
    agreement = (
        f"{sizes if ranks <= 8 else hash(tuple(sizes))} classes, positions {tuple(positions)}, {local_logits.dtype}, "
        f"{options}, target of {target.dtype}, {'no weight' if weight is None else f'weight of {weight.dtype}'}, "
        f"{'no ' if sample_weight is None else ''}sample_weight, denominator={described}"
        f"{', an input with a gradient' if differentiates else ''}"
    )
    same = {"weight": weight, "sample_weight": sample_weight, "denominator": denominator}
    same |= {"target": None if soft else target, "input": None if layer is None else layer[0]}
    report = _Report(
        positions.numel(),
        _UNKNOWN if shard_sizes is not None else shard.size,
        agreement,
        checksums=checksums(same, local_logits.device) if ranks > 1 else None,
    )
    problem = _Problem(options, shard, group, report, arithmetic, loss_dtype, soft, weight is not None)
    return problem, (local_logits, target, weight, sample_weight, denominator)


def check_devices(logits: Tensor, **others: object) -> None:
    for name, tensor in others.items():
        if isinstance(tensor, Tensor) and tensor.device != logits.device:
            raise ValueError(f"{name} must be on the device of the logits, {logits.device}, not {tensor.device}")


def _constant(name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.is_complex():
        raise TypeError(f"{name} must be a tensor of a real type, but got {tensor!r}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {tuple(shape)}, but got {tuple(tensor.shape)}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} may not require a gradient where classes are sharded")
    return tensor.detach() if dtype is None else tensor.detach().to(dtype)


def _ones(weight: Tensor | None) -> Tensor | None:
    """No weights, of the same type, which arithmetic may follow."""
    return None if weight is None else torch.ones_like(weight)


def _fill_rows(rows: Tensor, problem: _Problem, logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    """What this rank has to tell: (rows, positions). Raises IndexError for a target that is no class."""
    statistics, shard = problem.options.statistics, problem.shard
    if shard.size == 0:
        rows.zero_()
        rows[0].fill_(-torch.inf)
        if statistics:
            rows[7].fill_(-torch.inf)
        return
    losses, saved, _ = _forward(logits, target, weight, problem.numbered("none", statistics=statistics))
    rows[:3].copy_(saved[:3])
    rows[3].copy_(losses.view(-1))
    if not statistics:
        return
    rows[4:6].copy_(saved[3:5])
    if problem.asks_twice:
        losses, saved_alone, _ = _forward(logits, target, _ones(weight), problem.numbered("none", smoothed=False))
        torch.neg(losses.view(-1), out=rows[5])
        rows[6].copy_(saved_alone[2])
    elif problem.soft:
        rows[6].copy_(saved[2])
    else:
        local = target.reshape(-1).long() - shard.begin
        rows[6].copy_((local >= 0) & (local < shard.size))
    argmax = saved[5].view(torch.int64 if saved.dtype == torch.float64 else torch.int32).long()
    dim = class_dim(logits)
    index = argmax.clamp(min=0).view(positions_of(logits)).unsqueeze(dim)
    largest = logits.gather(dim, index).reshape(-1).double() * problem.options.logit_scale
    if problem.options.softcap is not None:
        largest = problem.options.softcap * (largest / problem.options.softcap).tanh()
    rows[7].copy_(largest)
    rows[8].copy_(argmax + shard.begin)


_MOST_SMOOTHING_TO_JUDGE = 0.999  # of probabilities, whose sums are known up to rounding


def _refused_if_gathered(rows: Tensor, problem: _Problem, target: Tensor, valid: Tensor | None) -> Tensor:
    """What is exchanged; but an error, or NaN where the host does not wait, if every rank has handed all classes.

    Their logits are then the same on every rank, to the last bit. Labels are all among the classes of the first rank.
    Probabilities sum up to one on every rank, where shards of them do so on all ranks together; smoothing near 1, which
    makes them all equal, leaves no trace of that. Shards may be alike for another reason: a layer that starts with
    zeros makes logits that are all equal.
    """
    reads, ranks, smoothing = _reads_reports(rows.device), len(rows), float(problem.options.label_smoothing)
    if (problem.soft and smoothing > _MOST_SMOOTHING_TO_JUDGE) or (reads and not torch.equal(rows[0, :2], rows[1, :2])):
        return rows
    first, log_size = rows[0], math.log(max(problem.shard.size, 1))
    alike = (rows[:, :2] == first[:2]).flatten(0, 1).all(0)
    if problem.soft:
        alike &= rows[:, 2].sum(0) - smoothing > (1 - smoothing) * (1 + ranks) / 2
    else:
        alike &= target.reshape(-1).long() < problem.shard.size
    distinct = (first[3] - first[2] * log_size).abs() > 1e-3 * log_size * first[2]
    if valid is not None:
        alike, distinct = alike | ~valid, distinct & valid
    gathered = alike.all() & distinct.any()
    if not reads:
        return torch.where(gathered, torch.nan, rows)
    if gathered:
        raise ValueError(
            f"every rank has the same logits, and all targets are among their {problem.shard.size} classes: each rank "
            "has to hand the logits of its own classes, not of all of them. If there are "
            f"{problem.shard.total} classes, pass shard_sizes"
        )
    return rows


class _Combined:
    """What the rows of all ranks, (ranks, rows, positions), say of all classes."""

    def __init__(self, rows: Tensor) -> None:
        lse, self.mass_of_ranks, losses = rows[:, :2], rows[:, 2], rows[:, 3]
        # Relative to the largest of them, whose own exponential is one: what the others add to it is known to the last
        # bit, however small.
        top = lse[:, 0].argmax(0, keepdim=True)
        self.largest = lse.gather(0, top.unsqueeze(1).expand(1, 2, -1))[0]
        behind = (lse - self.largest).sum(1)
        self.beyond = behind.exp().scatter_(0, top, 0.0).sum(0).log1p()
        self.above = self.beyond - behind  # lse - lse_r
        self.low = self.largest[1] + self.beyond
        self.lse = self.largest[0] + self.low
        self.losses = self._shifted(losses, self.mass_of_ranks).sum(0)
        self.rows = rows

    def _shifted(self, sums: Tensor, masses: Tensor) -> Tensor:
        """Sums of a_c (lse_r - x_c), of masses sum a_c, with the lse of all classes in the place of lse_r."""
        return torch.where(masses == 0, sums, sums + masses * self.above)

    def saved(self, dtype: torch.dtype, rows: int) -> Tensor:
        """The rows that the backward reads, with lse split into its rounding and the rest."""
        saved = torch.empty(rows, self.lse.numel(), dtype=dtype, device=self.lse.device)
        saved[0].copy_(self.lse)
        saved[1].copy_((self.largest[0] - saved[0]) + self.low)
        saved[2].copy_(self.mass_of_ranks.sum(0))
        return saved

    def entropy(self) -> Tensor:
        share = (-self.above).exp()  # of a rank, in the softmax
        return torch.where(share == 0, 0.0, share * (self.rows[:, 4] + self.above)).sum(0)

    def target_log_prob(self) -> Tensor:
        return -self._shifted(-self.rows[:, 5], self.rows[:, 6]).sum(0)

    def argmax(self) -> Tensor:
        first = self.rows[:, 7].argmax(0, keepdim=True)
        return self.rows[:, 8].gather(0, first)[0].long()


class _Loss:
    """The loss of all classes, after an exchange of what `fill` writes of this rank's. Positions are flat, in float64.

    `weight` and `divide_by` are the class weights of the backward, and what it divides by.
    """

    def __init__(self, problem, logits, target, weight, sample_weight, denominator, fill) -> None:
        options, positions = problem.options, positions_of(logits)
        rows = _ROWS_WITH_STATISTICS if options.statistics else _ROWS
        received = exchange(
            problem.report,
            rows * positions.numel(),
            lambda send: fill(send.view(rows, -1)),
            problem.group,
            logits.device,
        )
        received = received.view(len(received), rows, positions.numel())
        self.valid, self.sample_weight = positions_that_count(target, options.ignore_index), sample_weight
        if problem.report.classes != _UNKNOWN and not problem.weighted and len(received) > 1:
            received = _refused_if_gathered(received, problem, target, self.valid)
        self.found = found = _Combined(received)
        losses, self.weight = found.losses, weight
        counted = positions.numel(), self.valid
        if options.z_loss != 0:
            self.of_z = options.z_loss * found.lse.square()
            if options.reduction == "mean" and denominator is None and self.valid is not None and weight is not None:
                denominator = denominator_of_mean(target, *counted, None, sample_weight)
                of_classes = denominator_of_mean(target, *counted, weight, sample_weight)
                ratio = ratio_of_denominators(denominator, of_classes, options.label_smoothing, options.empty)
                losses, self.weight = losses * ratio, (weight.double() * ratio).to(weight.dtype)
            losses = losses + self.of_z
        self.losses = losses = self.weighted(losses)
        if options.reduction == "none":
            total, divide_by = losses.view(positions), torch.ones((), dtype=torch.float64, device=logits.device)
        else:
            total, divide_by = sum_in_order(losses), denominator
            if options.reduction == "sum":
                divide_by = total.new_ones(())
            elif denominator is None:
                divide_by = denominator_of_mean(target, *counted, weight, sample_weight)
            if options.reduction == "mean":
                divide_by = zero_is_one(divide_by, total, options.empty)
                total = total / divide_by
        self.divide_by, self.loss = divide_by, total.to(problem.loss_dtype)

    def weighted(self, values: Tensor) -> Tensor:
        """By positions; nothing of one that is ignored, or weighs nothing."""
        if self.sample_weight is None:
            return values if self.valid is None else torch.where(self.valid, values, 0.0)
        s = self.sample_weight.reshape(-1).double()
        counts = s != 0 if self.valid is None else self.valid & (s != 0)
        return torch.where(counts, values * s, 0.0)


class _VocabParallel(torch.autograd.Function):
    """(loss, lse, target_log_prob, entropy, z_loss, argmax), or the loss alone."""

    @staticmethod
    def forward(ctx, logits, target, weight, sample_weight, denominator, problem):
        options, positions = problem.options, positions_of(logits)
        made = _Loss(
            problem,
            logits,
            target,
            weight,
            sample_weight,
            denominator,
            lambda rows: _fill_rows(rows, problem, logits, target, weight),
        )
        loss, found, valid, weight, divide_by = made.loss, made.found, made.valid, made.weight, made.divide_by

        saved = found.saved(problem.arithmetic, 6 if options.statistics else 3)
        ctx.problem, tensors = problem, [logits, target, weight, sample_weight, divide_by, saved]
        ctx.set_materialize_grads(False)
        if not options.statistics:
            ctx.save_for_backward(*tensors, None)
            return (loss,)

        def statistic(values: Tensor, otherwise: float = 0) -> Tensor:
            values = values if valid is None else torch.where(valid, values, otherwise)
            return values.view(positions)

        entropy = found.entropy()
        saved[3].copy_(entropy)
        if problem.asks_twice:
            alone = saved[:3].clone()
            alone[2].copy_(found.rows[:, 6].sum(0))
        ctx.save_for_backward(*tensors, alone if problem.asks_twice else None)
        z_loss = torch.zeros_like(made.losses) if options.z_loss == 0 else made.weighted(made.of_z)
        z_loss = z_loss.view(positions) if options.reduction == "none" else sum_in_order(z_loss) / divide_by
        argmax = statistic(found.argmax(), -2 if options.ignore_index == -1 else -1)
        z_loss = z_loss.to(problem.loss_dtype)
        ctx.mark_non_differentiable(z_loss, argmax)
        lse, log_prob, entropy = (
            statistic(values).to(problem.arithmetic) for values in (found.lse, found.target_log_prob(), entropy)
        )
        return loss, lse, log_prob, entropy, z_loss, argmax

    @staticmethod
    def backward(ctx, *grads):
        with torch.no_grad():
            gradients = _VocabParallel.gradients(ctx, *grads)
        if torch.is_grad_enabled():  # a graph of the backward is being made
            of = ctx.saved_tensors[:2]
            gradients = [g if g is None else _Final.apply(g, *of, *grads) for g in gradients]
        return (*gradients, None, None, None, None)

    @staticmethod
    def gradients(ctx, grad, *of_statistics) -> list[Tensor | None]:
        """Of the logits, and of probabilities."""
        problem = ctx.problem
        logits, target, weight, sample_weight, denominator, saved, alone = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:2])
        if problem.shard.size == 0:
            gradients = torch.zeros_like(logits), torch.zeros_like(target)
            return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]
        options, positions = problem.options, positions_of(logits)
        rows = [g if g is None else g.reshape(-1).to(saved.dtype) for g in of_statistics[:3]]  # lse, log-prob, entropy
        of_log_prob = None
        if problem.asks_twice and rows[1] is not None:
            of_log_prob, rows[1] = rows[1], None
        stacked = None
        if any(row is not None for row in rows):
            stacked = torch.stack([torch.zeros_like(saved[0]) if row is None else row for row in rows])
        if grad is None:
            # Of the statistics alone: nothing, and not divided by a denominator that may be zero.
            grad = saved.new_zeros(positions if options.reduction == "none" else ())
            denominator = torch.ones_like(denominator)
        gradients = _backward(
            grad,
            stacked,
            logits,
            target,
            weight,
            sample_weight,
            saved,
            denominator,
            problem.numbered(options.reduction, z_loss=True, statistics=options.statistics),
            wanted,
        )
        if of_log_prob is not None:
            more = _backward(
                -of_log_prob.view(positions),
                None,
                logits,
                target,
                _ones(weight),
                None,
                alone,
                torch.ones_like(denominator),
                problem.numbered("none", smoothed=False),
                wanted,
            )
            gradients = [one + other for one, other in zip(gradients, more, strict=True)]
        return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]


class _Final(torch.autograd.Function):
    """A gradient that may be used, but not differentiated: of what it was made of."""

    @staticmethod
    def forward(ctx, gradient: Tensor, *of: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        raise RuntimeError("cross entropy over shards of the classes has no second derivative")


class _VocabParallelLinear(torch.autograd.Function):
    """The loss of logits that are made a chunk at a time, for what is exchanged, and once more for their gradient."""

    @staticmethod
    def forward(
        ctx, logits, target, weight, sample_weight, denominator, problem, input, linear_weight, linear_bias, chunk
    ):
        layer = input, linear_weight, linear_bias

        def fill(rows: Tensor) -> None:
            if problem.shard.size == 0:
                return _fill_rows(rows, problem, logits, target, weight)
            given = input, linear_weight, _as_list(linear_bias), target, _as_list(weight)
            losses, saved, _ = _ops._linear_forward.default(*given, *problem.numbered("none"), chunk)
            rows[:3].copy_(saved)
            rows[3].copy_(losses.view(-1))

        made = _Loss(problem, logits, target, weight, sample_weight, denominator, fill)
        ctx.problem, ctx.chunk = problem, chunk
        ctx.save_for_backward(
            *layer, target, made.weight, sample_weight, made.divide_by, made.found.saved(problem.arithmetic, 3)
        )
        return made.loss

    @staticmethod
    def backward(ctx, grad):
        with torch.no_grad():
            of_input, of_weight, of_bias, of_target = _VocabParallelLinear.gradients(ctx, grad)
        gradients = [None, of_target, None, None, None, None, of_input, of_weight, of_bias, None]
        if torch.is_grad_enabled():
            of = ctx.saved_tensors[:4]
            gradients = [g if g is None else _Final.apply(g, *of, grad) for g in gradients]
        return tuple(gradients)

    @staticmethod
    def gradients(ctx, grad) -> list[Tensor | None]:
        """Of input, weight, bias, and probabilities."""
        problem = ctx.problem
        input, linear_weight, linear_bias, target, weight, sample_weight, denominator, saved = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[place] for place in (6, 7, 8, 1)]
        layer = input, linear_weight, linear_bias
        if problem.shard.size == 0:
            gradients = [
                torch.zeros_like(of) if want else None for of, want in zip((*layer, target), wanted, strict=True)
            ]
        else:
            given = input, linear_weight, _as_list(linear_bias), target, _as_list(weight, None, sample_weight)
            numbered = problem.numbered(problem.options.reduction, z_loss=True)
            gradients = _ops._linear_backward.default(
                grad, denominator, *given, saved, denominator, *numbered, ctx.chunk, wanted
            )
            gradients = list(gradients)
        if wanted[0]:  # of which each rank has what its classes contribute
            total = gradients[0].to(torch.promote_types(input.dtype, torch.float32))
            dist.all_reduce(total, group=problem.group)
            gradients[0] = total.to(input.dtype)
        return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]

"""What ranks say to each other: their numbers, in one all-gather, and in the same one their errors.

An error of one rank is raised on every rank, with the number of that rank. If the host does not read what it has
received (on a CUDA device it would have to wait), the other ranks get NaN instead.
"""

from __future__ import annotations

import ctypes
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

# Before the numbers: the kind of error, positions, classes, a checksum of the options, which have to be the same on
# every rank, and the error's message, or else the options in words. Then checksums of tensors.
_TEXT = 224
_FIELDS = struct.Struct(f"=qqqq{_TEXT}s")
_HEADER = _FIELDS.size // 8
_ERRORS = (None, IndexError, ValueError, TypeError, NotImplementedError, RuntimeError)
UNKNOWN = -1

# Tensors that have to be the same on every rank, and by how much of their norm they may differ: labels not at all,
# others by rounding. States are the last of many computations, which each rank repeats, and not to the last bit.
_SAME = {"target": 0.0, "weight": 2**-8, "sample_weight": 2**-8, "denominator": 2**-20, "input": 2**-4}
_PROJECTIONS = 3
_CHECKSUMS = len(_SAME) * (_PROJECTIONS + 1)


def reads_reports(device: torch.device) -> bool:
    """Returns True if the host may look at what it has received: for any other device it would have to wait."""
    return device.type == "cpu"


@dataclass
class Report:
    """What a rank says of itself. ``classes``: of its shard, if all shards have to be of the same size."""

    positions: int
    classes: int = UNKNOWN
    agreement: str = ""
    error: Exception | None = None
    checksums: Tensor | None = None

    def packed(self) -> bytearray:
        kind = next((i for i, kind in enumerate(_ERRORS) if kind and isinstance(self.error, kind)), len(_ERRORS) - 1)
        text = self.agreement if self.error is None else str(self.error)
        checksum = zlib.crc32(self.agreement.encode())
        fields = (0 if self.error is None else kind, self.positions, self.classes, checksum)
        return bytearray(_FIELDS.pack(*fields, text.encode(errors="replace")[:_TEXT]))


def gather(
    report: Report,
    length: int,
    fill: Callable[[Tensor], None] | None,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Tensor:
    """Gathers `length` float64 numbers of each rank, which `fill` writes: (ranks, length), in rank order.

    Raises on every rank an error of `fill` or in `report` on any of them. If the host does not read reports, the
    numbers of ranks that have an error, or disagree with this one, are NaN instead; and all numbers, if checksums
    differ.
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
    reads = reads_reports(device)
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


def raise_everywhere(
    error: Exception, report: Report, length: int, group: dist.ProcessGroup | None, device: torch.device
) -> NoReturn:
    """Raises an error of this rank, after the exchange that the other ranks are in."""
    report.error = error
    gather(report, length, None, group, device)
    raise error


def _all_gather(received: Tensor, send: Tensor, group: dist.ProcessGroup | None) -> None:
    if hasattr(dist, "all_gather_single"):  # the name since torch 2.13
        dist.all_gather_single(received, send, group)
    else:
        dist.all_gather_into_tensor(received, send, group)


def _raise_reported(received: Tensor, mine: Report, group: dist.ProcessGroup | None) -> None:
    """Raises the same error on all ranks for what any of them has reported, or what they disagree about."""
    fields = received.view(torch.int64)[:, : _HEADER - _TEXT // 8].tolist()
    kinds, positions, classes, agreements = zip(*fields, strict=True)
    name = [f"rank {dist.get_global_rank(group or dist.group.WORLD, r)}" for r in range(len(fields))]

    def text(rank: int) -> str:
        raw = received[rank].contiguous().view(torch.uint8)[_FIELDS.size - _TEXT : _FIELDS.size].tolist()
        return bytes(raw).rstrip(b"\0").decode(errors="replace")

    def listed(values: tuple[int, ...]) -> str:
        return ", ".join(f"{value} on {rank}" for value, rank in zip(values, name, strict=True))

    if any(n != mine.positions for n in positions):
        raise ValueError(f"ranks have different numbers of positions: {listed(positions)}") from mine.error
    known = [n for n in classes if n != UNKNOWN]
    if any(n != known[0] for n in known):
        raise ValueError(
            f"ranks have different numbers of classes: {listed(classes)}; pass all of them as shard_sizes"
        ) from mine.error
    if mine.error is not None:
        raise mine.error
    for rank, kind in enumerate(kinds):
        if kind:
            raise _ERRORS[kind](f"{name[rank]}: {text(rank)}")
    for rank, agreement in enumerate(agreements):
        if agreement != agreements[0]:
            raise ValueError(f"ranks disagree: {name[0]} has {text(0)}, and {name[rank]} {text(rank)}")
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


# ---- checksums of tensors -------------------------------------------------------------------------------------------


@torch.no_grad()
def checksums(tensors: dict[str, Tensor | None], device: torch.device) -> Tensor:
    """Returns a few numbers for each of `_SAME` that is given.

    Integers have one, which is exact. Others have projections on fixed directions, and the norm. Of states (N, F) the
    product with one vector of length F is projected.
    """
    sums = torch.zeros(len(_SAME), _PROJECTIONS + 1, dtype=torch.float64, device=device)
    for i, name in enumerate(_SAME):
        values = tensors.get(name)
        if values is None:
            continue
        if not values.is_floating_point():
            values = values.contiguous()
            if reads_reports(device):
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


def _noise(count: int, device: torch.device) -> Tensor:
    """Returns the same pseudo-random integers on every rank."""
    noise = torch.arange(1, count + 1, device=device) * 0x1E3779B97F4A7C15
    return noise * (noise >> 29)


def _directions(count: int, device: torch.device) -> Tensor:
    """Returns the same pseudo-random numbers in [-1, 1) on every rank, in float64."""
    return _noise(count, device).double() * 2.0**-63


def _different(sums: Tensor) -> Tensor:
    """Returns (ranks, tensors): True for a tensor that differs from the first rank's. One not finite is not judged."""
    sums = sums.view(len(sums), len(_SAME), _PROJECTIONS + 1)
    distance = (sums[..., :-1] - sums[:1, :, :-1]).abs().amax(-1)
    norm = torch.maximum(sums[..., -1], sums[:1, :, -1])
    return distance > norm * norm.new_tensor(list(_SAME.values()))

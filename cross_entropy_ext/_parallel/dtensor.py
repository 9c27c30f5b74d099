"""Cross entropy of DTensors, wherever their shards are.

Positions are independent of each other: each rank has the losses of its own, of which a reduction is one small exchange
between the ranks whose positions differ. Classes that are sharded are `distributed.vocab_parallel_cross_entropy`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..functional.losses import (
    _EMPTY,
    CrossEntropyStats,
    check_loss_dtype,
    cross_entropy,
    cross_entropy_with_stats,
    loss_type,
)
from .vocabulary import (
    _Report,
    check_devices,
    checksums,
    class_dim,
    denominator_of_mean,
    exchange,
    positions_of,
    positions_that_count,
    report_error,
    sum_in_order,
    vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy_with_stats,
    vocab_parallel_linear_cross_entropy,
    zero_is_one,
)

__all__ = ["linear_loss", "on_mesh", "results"]

_REDUCTIONS = ("none", "mean", "sum")  # in ATen's order
_NUMBERS = ("label_smoothing", "z_loss", "softcap", "logit_scale")


@dataclass(frozen=True)
class _Layout:
    """Where the logits' shards are: on each dimension of the mesh nothing, or one dimension of the logits is split."""

    mesh: dist.DeviceMesh
    dims: tuple[int | None, ...]  # of the logits, for each of the mesh
    class_dim: int

    @classmethod
    def of(cls, input: DTensor) -> _Layout:
        """As near to the placements that there are as is understood here."""
        dims: list[int | None] = []
        classes = class_dim(input)
        for placement in input.placements:
            dim = placement.dim % input.dim() if type(placement) is Shard else None
            dims.append(None if dim == classes and classes in dims else dim)
        return cls(input.device_mesh, tuple(dims), classes)

    def placements(self) -> list[Replicate | Shard]:
        return [Replicate() if dim is None else Shard(dim) for dim in self.dims]

    def placements_of_positions(self) -> list[Replicate | Shard]:
        """Of a tensor without the dimension of classes."""
        return [
            Replicate() if dim in (None, self.class_dim) else Shard(dim - (dim > self.class_dim)) for dim in self.dims
        ]

    @property
    def axis_of_classes(self) -> int | None:
        return self.dims.index(self.class_dim) if self.class_dim in self.dims else None

    def groups_of_positions(self) -> list[dist.ProcessGroup]:
        return [
            self.mesh.get_group(axis)
            for axis, dim in enumerate(self.dims)
            if dim not in (None, self.class_dim) and self.mesh.size(axis) > 1
        ]

    def local(self, tensor: Tensor, placements: list[Replicate | Shard]) -> Tensor:
        """This rank's part of it. A plain tensor is the whole, and the same on every rank."""
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        if tuple(tensor.placements) != tuple(placements):
            tensor = tensor.redistribute(self.mesh, placements)
        local = tensor.to_local(grad_placements=placements)
        return _Waited.apply(local) if isinstance(local, AsyncCollectiveTensor) else local

    def number(self, value: float | Tensor | None) -> float | Tensor | None:
        """An option, with tensors as plain ones. Every rank has the same; the losses of all positions depend on it."""
        if not isinstance(value, Tensor):
            return value
        if isinstance(value, DTensor):
            value = self.local(value, [Replicate()] * self.mesh.ndim)
        if not (value.requires_grad and torch.is_grad_enabled()):
            return value
        return _OnEveryRank.apply(value.double(), self.groups_of_positions(), self.mesh.device_type)

    def shard_sizes(self, classes: int) -> list[int]:
        """As DTensor splits them: like torch.chunk, with nothing for ranks that are left over."""
        ranks = self.mesh.size(self.axis_of_classes)
        most = -(-classes // ranks)
        return [max(0, min(most, classes - rank * most)) for rank in range(ranks)]


def results(input: DTensor, target: Tensor, **arguments) -> Tensor | CrossEntropyStats:
    """`functional.cross_entropy`, or with `statistics` `functional.cross_entropy_with_stats`, of logits in a DTensor.

    Takes their arguments, tensors as DTensors or as the whole of them, the same on every rank: plain labels and weights
    that differ are an error wherever ranks exchange something. Logits may be sharded along their classes on one
    dimension of the mesh, and along positions on others, evenly or not; what is placed otherwise is redistributed. The
    results are DTensors: scalars Replicate, and what has an element for each position sharded as the positions are. The
    logits' gradient is placed as they are. ``inplace`` is without effect.

    A number may be a scalar tensor that requires a gradient, as a learned ``logit_scale`` is, unless classes are
    sharded. The ranks with other positions then sum its gradient, in a collective of the backward, which every rank has
    to run.

    Errors are raised on every rank, as `distributed.vocab_parallel_cross_entropy` says; but where there is nothing to
    exchange (whole classes, and ``reduction='none'``), an error is its own rank's alone.
    """
    if torch.compiler.is_dynamo_compiling():  # whose collectives are not these: a break in the graph
        return torch.compiler.disable(_results)(input, target, **arguments)
    return _results(input, target, **arguments)


def _results(
    input: DTensor,
    target: Tensor,
    *,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    denominator: Tensor | None,
    reduction: str,
    empty: str,
    loss_dtype: torch.dtype | None,
    statistics: bool,
    **options,
) -> Tensor | CrossEntropyStats:
    reduction = _REDUCTIONS[F._Reduction.get_enum(reduction)]
    layout = _Layout.of(input)
    positions, soft = positions_of(input), target.is_floating_point()
    everywhere, of_positions = [Replicate()] * layout.mesh.ndim, layout.placements_of_positions()
    groups = layout.groups_of_positions() if reduction != "none" else []
    logits = layout.local(input, layout.placements())
    options |= {name: layout.number(options[name]) for name in _NUMBERS if name in options}
    z_loss = options.get("z_loss", 0.0)
    # Class weights are in the denominator of the cross entropy and not in that of the z-loss: then there are two sums.
    apart = bool(z_loss != 0) and reduction == "mean" and denominator is None and weight is not None and not soft

    # Each rank's own part, of which sums stay in float64 to be rounded once.
    error = found = sums_of_plain = None
    try:
        if empty not in _EMPTY:
            raise ValueError(f"empty must be 'nan' or 'zero', but got {empty!r}")
        check_loss_dtype(loss_dtype)
        if denominator is not None and reduction != "mean":
            raise ValueError("denominator is what reduction 'mean' divides by, but got another one")
        if apart and not 0 <= z_loss < math.inf:  # else the loss itself is asked for
            raise ValueError(f"z_loss must be a finite number of at least 0, but got {float(z_loss)}")
        others = {"weight": weight, "sample_weight": sample_weight, "denominator": denominator}
        check_devices(logits, target=target, **others)
        _check_shape("target", target, input.shape if soft else positions)
        _check_shape("sample_weight", sample_weight, positions)
        _check_shape("denominator", denominator, torch.Size())
        _check_gradients(layout, others, options)
        plain = {"weight": weight, "denominator": denominator}
        if layout.axis_of_classes is None:  # else those who have the same positions compare what is theirs
            plain |= {"target": None if soft else target, "sample_weight": sample_weight}
        plain = {name: None if isinstance(tensor, DTensor) else tensor for name, tensor in plain.items()}
        sums_of_plain = checksums(plain, logits.device) if groups else None
        target = layout.local(target, layout.placements() if soft else of_positions)
        if weight is not None:
            weight = layout.local(weight, everywhere)
        if sample_weight is not None:
            sample_weight = layout.local(sample_weight, of_positions)
        if isinstance(denominator, DTensor):
            denominator = layout.local(denominator, everywhere)
        loss_dtype = loss_dtype or loss_type(logits, target, weight)
    except Exception as raised:
        error = raised
    options |= {"weight": weight, "sample_weight": sample_weight}
    options |= {"reduction": "none", "loss_dtype": loss_dtype}
    if reduction != "none":
        options |= {"reduction": "sum", "loss_dtype": torch.float64}
    if apart:
        options["z_loss"] = 0.0
    try:
        if layout.axis_of_classes is not None:
            found = _of_shards(layout, input, logits, target, statistics or apart, options, error)
        elif error is not None:
            raise error
        elif statistics or apart:
            found = cross_entropy_with_stats(logits, target, **options)
        else:
            found = (cross_entropy(logits, target, **options),)
    except Exception as raised:
        if not groups:
            raise
        error = raised

    def whole(value: Tensor) -> DTensor:
        shape, stride = positions, torch.empty(positions, device="meta").stride()
        return DTensor.from_local(value, layout.mesh, of_positions, run_check=False, shape=shape, stride=stride)

    if reduction == "none":
        return CrossEntropyStats(*map(whole, found)) if statistics else whole(found[0])

    def of_z_loss() -> Tensor:
        if not apart:
            return found[4] if statistics else torch.zeros_like(found[0])
        terms = z_loss * found[1].double().square()  # lse, which is zero where positions are ignored
        if sample_weight is not None:
            counts = positions_that_count(target, options["ignore_index"]).view(target.shape)
            terms = terms * torch.where(counts, sample_weight, 0.0)
        return sum_in_order(terms.reshape(-1))

    def parts() -> Tensor:
        counted = target, positions_of(logits).numel(), positions_that_count(target, options["ignore_index"])
        counts = [
            denominator_of_mean(*counted, of_classes, sample_weight)
            for of_classes in ((weight, None) if apart else (weight,))
        ]
        return torch.stack([found[0].detach(), own_z_loss.detach(), *counts])

    own_z_loss = None if error else of_z_loss()
    sums = None if error else parts()
    for group in groups:
        report = _Report(0, agreement=f"reduction={reduction}", error=error, checksums=sums_of_plain)
        try:
            sums = exchange(
                report, 4 if apart else 3, lambda send, sums=sums: send.copy_(sums), group, logits.device
            ).sum(0)
        except Exception as raised:
            error = raised
    if error is not None:
        raise error
    total, total_z_loss, divide_by, *divide_z_by = sums.unbind()
    if reduction == "sum":
        divide_by = torch.ones_like(total)
    else:
        divide_by = zero_is_one(divide_by if denominator is None else denominator, total, empty)
    divide_z_by = zero_is_one(divide_z_by[0], total_z_loss, empty) if apart else divide_by
    share, result, of_z = found[0] / divide_by, total / divide_by, total_z_loss / divide_z_by
    if apart:
        share, result = share + own_z_loss / divide_z_by, result + of_z

    def scalar(value: Tensor) -> DTensor:
        return DTensor.from_local(value, layout.mesh, everywhere, run_check=False)

    loss = scalar(_SumOfRanks.apply(share, result.to(loss_dtype), groups))
    if not statistics:
        return loss
    _, *of_each, _, argmax = found
    return CrossEntropyStats(loss, *map(whole, of_each), scalar(of_z.to(loss_dtype)), whole(argmax))


def _of_shards(
    layout: _Layout,
    input: DTensor,
    logits: Tensor,
    target: Tensor,
    statistics: bool,
    options: dict,
    error: Exception | None,
) -> tuple[Tensor, ...]:
    group = layout.mesh.get_group(layout.axis_of_classes)
    if error is not None:
        report_error(error, positions_of(logits).numel(), None, statistics, group, logits.device)
    function = vocab_parallel_cross_entropy_with_stats if statistics else vocab_parallel_cross_entropy
    found = function(
        logits,
        target,
        group=group,
        shard_sizes=layout.shard_sizes(input.size(layout.class_dim)),
        **options,
    )
    return found if statistics else (found,)


def linear_loss(
    input: DTensor, linear_weight: DTensor, target: Tensor, *, linear_bias: Tensor | None, **arguments
) -> DTensor | None:
    """`functional.linear_cross_entropy` of a weight (C, F) whose classes are sharded over a mesh of one dimension, and
    of an input that every rank has whole: a scalar, or a loss for each position, Replicate. None for what else there
    is, of which the layer's logits are to be made.
    """
    mesh, whole = linear_weight.device_mesh, [Replicate()]
    if mesh.ndim != 1 or tuple(linear_weight.placements) != (Shard(0),):
        return None
    if any(isinstance(t, DTensor) and tuple(t.placements) != (Replicate(),) for t in (input, target)):
        return None
    layout = _Layout(mesh, (0,), 0)  # of the weight, whose classes come first
    for name in ("weight", "sample_weight", "denominator"):
        if isinstance(arguments[name], DTensor):
            arguments[name] = layout.local(arguments[name], whole)
    arguments |= {name: layout.number(arguments[name]) for name in _NUMBERS}
    loss = vocab_parallel_linear_cross_entropy(
        layout.local(input, whole),
        layout.local(linear_weight, layout.placements()),
        layout.local(target, [Shard(target.dim() - 1)] if target.is_floating_point() else whole),
        local_bias=None if linear_bias is None else layout.local(linear_bias, layout.placements()),
        group=mesh.get_group(),
        shard_sizes=layout.shard_sizes(linear_weight.size(0)),
        **arguments,
    )
    return DTensor.from_local(loss, mesh, whole, run_check=False)


def on_mesh(tensor: Tensor | None, like: DTensor) -> Tensor | None:
    """A plain tensor, which every rank has whole, as the DTensor that it is to others."""
    if tensor is None or isinstance(tensor, DTensor):
        return tensor
    return DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


def _check_shape(name: str, tensor: Tensor | None, shape: torch.Size) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {tuple(shape)}, but got {tuple(tensor.shape)}")


def _check_gradients(layout: _Layout, others: dict[str, Tensor | None], options: dict) -> None:
    if not torch.is_grad_enabled():
        return
    for name, tensor in others.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} may not require a gradient where the logits are a DTensor")
    for name in _NUMBERS if layout.axis_of_classes is not None else ():
        if isinstance(options.get(name), Tensor) and options[name].requires_grad:
            raise ValueError(f"{name} may not require a gradient where the logits are a DTensor with sharded classes")


class _Waited(torch.autograd.Function):
    """What a collective has left, where it may be under way yet."""

    @staticmethod
    def forward(ctx, tensor: AsyncCollectiveTensor) -> Tensor:
        return tensor.wait()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class _SumOfRanks(torch.autograd.Function):
    """The reduced loss, of which this rank has a share."""

    @staticmethod
    def forward(ctx, share: Tensor, loss: Tensor, groups: list[dist.ProcessGroup]) -> Tensor:
        ctx.groups = groups
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        # A second derivative sums over the ranks, too: every rank's share gets the same gradient.
        return _OnEveryRank.apply(grad.double(), ctx.groups, grad.device.type), None, None


class _OnEveryRank(torch.autograd.Function):
    """A scalar that is the same on every rank. Its gradient is the sum of those that the ranks of `groups` have."""

    @staticmethod
    def forward(ctx, scalar: Tensor, groups: list[dist.ProcessGroup], device_type: str) -> Tensor:
        ctx.groups, ctx.device_type = groups, device_type
        return scalar.view_as(scalar)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _SumOverRanks.apply(grad, ctx.groups, ctx.device_type), None, None


class _SumOverRanks(torch.autograd.Function):
    """The sum of a scalar of each rank. All ranks go on with it in the same way."""

    @staticmethod
    def forward(ctx, part: Tensor, groups: list[dist.ProcessGroup], device_type: str) -> Tensor:
        total = part.to(device_type, copy=True)
        for group in groups:
            dist.all_reduce(total, group=group)
        return total.to(part.device)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None

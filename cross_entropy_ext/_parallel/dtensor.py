"""Cross entropy of DTensors, wherever their shards are.

Positions are independent of each other: each rank computes the losses of its own, and a reduction is one small exchange
between the ranks whose positions differ. Sharded classes are those of vocabulary.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .. import _call
from .._options import (
    NUMBERS,
    CrossEntropyStats,
    LinearCrossEntropyOptions,
    Options,
    Tensors,
    check_bounds,
    check_denominator,
    checked,
    checked_numbers,
    class_dim,
    loss_type,
    positions_of,
    reduction_name,
)
from . import exchange, vocabulary
from .vocabulary import check_devices, denominator_of_mean, safe_denominator, sum_in_order, valid_mask


@dataclass(frozen=True)
class _Layout:
    """Where the logits' shards are: on each dimension of the mesh nothing, or one dimension of the logits is split."""

    mesh: dist.DeviceMesh
    dims: tuple[int | None, ...]  # of the logits, for each of the mesh
    class_dim: int

    @classmethod
    def of(cls, input: DTensor) -> _Layout:
        """Returns the nearest layout to the placements of a DTensor that is understood here."""
        dims: list[int | None] = []
        classes = class_dim(input)
        for placement in input.placements:
            dim = placement.dim % input.dim() if type(placement) is Shard else None
            dims.append(None if dim == classes and classes in dims else dim)
        return cls(input.device_mesh, tuple(dims), classes)

    def placements(self) -> list[Replicate | Shard]:
        return [Replicate() if dim is None else Shard(dim) for dim in self.dims]

    def placements_of_positions(self) -> list[Replicate | Shard]:
        """Returns the placements of a tensor without the dimension of classes."""
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
        """Returns this rank's part of a tensor. A plain tensor is the whole, and the same on every rank."""
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        if tuple(tensor.placements) != tuple(placements):
            tensor = tensor.redistribute(self.mesh, placements)
        local = tensor.to_local(grad_placements=placements)
        return _Waited.apply(local) if isinstance(local, AsyncCollectiveTensor) else local

    def numbers(self, options: Options) -> Options:
        return options._replace(**{name: self._number(getattr(options, name)) for name in NUMBERS})

    def _number(self, value: float | Tensor | None) -> float | Tensor | None:
        """Returns an option as a plain tensor. It is the same on every rank, and all losses depend on it."""
        if not isinstance(value, Tensor):
            return value
        if isinstance(value, DTensor):
            value = self.local(value, [Replicate()] * self.mesh.ndim)
        if not (value.requires_grad and torch.is_grad_enabled()):
            return value
        return _OnEveryRank.apply(value.double(), self.groups_of_positions(), self.mesh.device_type)

    def shard_sizes(self, classes: int) -> list[int]:
        """Returns the sizes of DTensor's shards: those of torch.chunk, and 0 for ranks that are left over."""
        ranks = self.mesh.size(self.axis_of_classes)
        most = -(-classes // ranks)
        return [max(0, min(most, classes - rank * most)) for rank in range(ranks)]

    def local_tensors(self, tensors: Tensors) -> Tensors:
        """Returns this rank's parts of all tensors but the logits. A plain denominator stays as it is."""
        everywhere, of_positions = [Replicate()] * self.mesh.ndim, self.placements_of_positions()
        _, target, weight, _, sample_weight, denominator = tensors
        return tensors._replace(
            target=self.local(target, self.placements() if target.is_floating_point() else of_positions),
            weight=None if weight is None else self.local(weight, everywhere),
            sample_weight=None if sample_weight is None else self.local(sample_weight, of_positions),
            denominator=self.local(denominator, everywhere) if isinstance(denominator, DTensor) else denominator,
        )


def loss(tensors: Tensors, options: Options) -> Tensor | CrossEntropyStats:
    """Returns the loss of logits in a DTensor, or with ``options.statistics`` all of CrossEntropyStats.

    Other tensors are DTensors or the whole of them, the same on every rank: plain labels and weights that differ are an
    error wherever ranks exchange something. Logits may be sharded along their classes on one dimension of the mesh, and
    along positions on others, evenly or not; other placements are redistributed. The results are DTensors: scalars
    Replicate, and one element per position sharded as the positions are. The logits' gradient is placed as they are.
    ``inplace`` is without effect.

    A number may be a scalar tensor that requires a gradient, as a learned ``logit_scale`` is, unless classes are
    sharded. The ranks with other positions then sum its gradient, in a collective of the backward, which every rank has
    to run.

    Errors are raised on every rank, as `distributed.vocab_parallel_cross_entropy` says; but if there is nothing to
    exchange (whole classes, and ``reduction='none'``), an error is its own rank's alone.
    """
    tensors, options = checked(tensors, options), checked_numbers(options)._replace(inplace=False)
    if torch.compiler.is_dynamo_compiling():  # whose collectives are not these: a break in the graph
        return torch.compiler.disable(_eager_loss)(tensors, options)
    return _eager_loss(tensors, options)


def _eager_loss(tensors: Tensors, options: Options) -> Tensor | CrossEntropyStats:
    input = tensors.input
    layout, positions, statistics = _Layout.of(input), positions_of(input), options.statistics
    options = layout.numbers(options)._replace(reduction=reduction_name(options.reduction))
    everywhere, of_positions = [Replicate()] * layout.mesh.ndim, layout.placements_of_positions()
    groups = layout.groups_of_positions() if options.reduction != "none" else []
    logits, soft = layout.local(input, layout.placements()), tensors.target.is_floating_point()
    # Class weights are in the denominator of the cross entropy and not in that of the z-loss: then there are two sums.
    is_mean = options.reduction == "mean" and tensors.denominator is None
    apart = bool(options.z_loss != 0) and is_mean and tensors.weight is not None and not soft

    # Each rank's own part. Sums stay in float64, to be rounded once.
    error = found = sums_of_plain = None
    local, loss_dtype = tensors._replace(input=logits), options.loss_dtype
    try:
        if apart:  # else it is the loss that checks it
            check_bounds("z_loss", float(options.z_loss))
        check_denominator(tensors.denominator, options.reduction)
        check_devices(local)
        _check_shape("target", tensors.target, input.shape if soft else positions)
        _check_shape("sample_weight", tensors.sample_weight, positions)
        _check_shape("denominator", tensors.denominator, torch.Size())
        _check_gradients(layout, tensors, options)
        sums_of_plain = exchange.checksums(_plain(layout, tensors), logits.device) if groups else None
        local = layout.local_tensors(local)
        loss_dtype = loss_dtype or loss_type(logits, local.target, local.weight)
    except Exception as raised:
        error = raised
    own = options._replace(loss_dtype=loss_dtype, empty="nan", statistics=statistics or apart)
    if options.reduction != "none":
        own = own._replace(reduction="sum", loss_dtype=torch.float64)
    if apart:
        own = own._replace(z_loss=0.0)
    try:
        found = _own_part(layout, input, local, own, error)
    except Exception as raised:
        if not groups:
            raise
        error = raised

    def whole(value: Tensor) -> DTensor:
        shape, stride = positions, torch.empty(positions, device="meta").stride()
        return DTensor.from_local(value, layout.mesh, of_positions, run_check=False, shape=shape, stride=stride)

    if options.reduction == "none":
        return CrossEntropyStats(*map(whole, found)) if statistics else whole(found)

    own_loss = own_z_loss = sums = None
    if error is None:
        own_loss = found.loss if own.statistics else found
        own_z_loss = found.z_loss if statistics else torch.zeros_like(own_loss)
        valid = valid_mask(local.target, options.ignore_index)
        if apart:
            terms = options.z_loss * found.lse.double().square()  # lse is zero where positions are ignored
            if local.sample_weight is not None:
                terms = terms * torch.where(valid.view(local.target.shape), local.sample_weight, 0.0)
            own_z_loss = sum_in_order(terms.reshape(-1))
        counted = local.target, positions_of(logits).numel(), valid
        counts = [denominator_of_mean(*counted, local.weight, local.sample_weight)]
        if apart:
            counts.append(denominator_of_mean(*counted, None, local.sample_weight))
        sums = torch.stack([own_loss.detach(), own_z_loss.detach(), *counts])
    for group in groups:
        agreement = f"reduction={options.reduction}"
        report = exchange.Report(0, agreement=agreement, error=error, checksums=sums_of_plain)
        length = 4 if apart else 3
        try:
            received = exchange.gather(report, length, lambda send, own=sums: send.copy_(own), group, logits.device)
            sums = received.sum(0)
        except Exception as raised:
            error = raised
    if error is not None:
        raise error
    total, total_z_loss, denominator, *of_z_loss = sums.unbind()
    if options.reduction == "sum":
        denominator = torch.ones_like(total)
    else:
        given = denominator if local.denominator is None else local.denominator
        denominator = safe_denominator(given, total, options.empty)
    of_z_loss = safe_denominator(of_z_loss[0], total_z_loss, options.empty) if apart else denominator
    share, result, z_loss = own_loss / denominator, total / denominator, total_z_loss / of_z_loss
    if apart:
        share, result = share + own_z_loss / of_z_loss, result + z_loss

    def scalar(value: Tensor) -> DTensor:
        return DTensor.from_local(value, layout.mesh, everywhere, run_check=False)

    loss = scalar(_SumOfRanks.apply(share, result.to(loss_dtype), groups))
    if not statistics:
        return loss
    found = found._replace(loss=loss, z_loss=scalar(z_loss.to(loss_dtype)))
    return found._replace(**{name: whole(getattr(found, name)) for name in _AT_POSITIONS})


_AT_POSITIONS = ("lse", "target_log_prob", "entropy", "argmax")


def _own_part(
    layout: _Layout, input: DTensor, local: Tensors, options: Options, error: Exception | None
) -> Tensor | CrossEntropyStats:
    """Returns the loss of this rank's positions. If classes are sharded, an error is told to those who share them."""
    if layout.axis_of_classes is None:
        if error is not None:
            raise error
        return _call.loss(local._replace(denominator=None), options)
    group = layout.mesh.get_group(layout.axis_of_classes)
    if error is not None:
        report = exchange.Report(positions_of(local.input).numel(), error=error)
        vocabulary.raise_everywhere(report, options.statistics, group, local.input.device)
    sizes = layout.shard_sizes(input.size(layout.class_dim))
    return vocabulary.loss(local._replace(denominator=None), options, group, sizes)


def _plain(layout: _Layout, tensors: Tensors) -> dict[str, Tensor | None]:
    """Returns the tensors that are to be the same on every rank, as nothing else makes them."""
    plain = {"weight": tensors.weight, "denominator": tensors.denominator}
    if layout.axis_of_classes is None:  # else those who have the same positions compare what is theirs
        target = None if tensors.target.is_floating_point() else tensors.target
        plain |= {"target": target, "sample_weight": tensors.sample_weight}
    return {name: None if isinstance(tensor, DTensor) else tensor for name, tensor in plain.items()}


def linear_loss(
    layer: tuple[DTensor, DTensor, Tensor | None],
    tensors: Tensors,
    options: Options,
    linear_options: LinearCrossEntropyOptions | None,
) -> DTensor | None:
    """Returns the loss of a layer (input, weight, bias) whose classes are sharded over a mesh of one dimension, with an
    input that every rank has whole: a scalar, or a loss for each position, Replicate.

    Returns None for other placements, for which the layer's logits are to be made.
    """
    input, weight, bias = layer
    mesh, whole = weight.device_mesh, [Replicate()]
    if mesh.ndim != 1 or tuple(weight.placements) != (Shard(0),):
        return None
    if any(isinstance(t, DTensor) and tuple(t.placements) != (Replicate(),) for t in (input, tensors.target)):
        return None
    layout = _Layout(mesh, (0,), 0)  # of the weight, whose classes come first
    others = {name: getattr(tensors, name) for name in ("weight", "sample_weight", "denominator")}
    others = {name: layout.local(t, whole) if isinstance(t, DTensor) else t for name, t in others.items()}
    of_target = [Shard(tensors.target.dim() - 1)] if tensors.target.is_floating_point() else whole
    local_layer = vocabulary.Layer(
        layout.local(input, whole),
        layout.local(weight, layout.placements()),
        None if bias is None else layout.local(bias, layout.placements()),
        linear_options,
    )
    local = Tensors(None, layout.local(tensors.target, of_target), **others)
    sizes = layout.shard_sizes(weight.size(0))
    loss = vocabulary.loss(local, layout.numbers(options), mesh.get_group(), sizes, local_layer)
    return DTensor.from_local(loss, mesh, whole, run_check=False)


def on_mesh(tensor: Tensor | None, like: DTensor) -> Tensor | None:
    """Returns a plain tensor, which every rank has whole, as a DTensor."""
    if tensor is None or isinstance(tensor, DTensor):
        return tensor
    return DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


def _check_shape(name: str, tensor: Tensor | None, shape: torch.Size) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {tuple(shape)}, but got {tuple(tensor.shape)}")


def _check_gradients(layout: _Layout, tensors: Tensors, options: Options) -> None:
    if not torch.is_grad_enabled():
        return
    for name in ("weight", "sample_weight", "denominator"):
        tensor = getattr(tensors, name)
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} may not require a gradient where the logits are a DTensor")
    for name in NUMBERS if layout.axis_of_classes is not None else ():
        value = getattr(options, name)
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name} may not require a gradient where the logits are a DTensor with sharded classes")


class _Waited(torch.autograd.Function):
    """Waits for a collective that may be under way yet."""

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

"""The loss of logits whose classes are sharded over a group, and its gradient.

A rank r finds, of each position, lse_r of its own logits, A_r = sum a_c and L_r = sum a_c (lse_r - x_c) over its own
classes. With the lse of all classes

    loss = sum_r L_r + A_r (lse - lse_r)

in which every term belongs to a sum without cancellation. So ranks exchange a few numbers for each position, once, and
in float64, in which a confident position's loss keeps its size; the backward needs nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import _call
from .._options import (
    LOSS_DTYPES,
    CrossEntropyStats,
    LinearCrossEntropyOptions,
    Options,
    Tensors,
    as_denominator,
    check_denominator,
    check_options,
    check_tensors,
    class_dim,
    classes_at_one,
    known_numbers,
    loss_type,
    positions_of,
    size_of_chunk,
)
from . import exchange

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# The rows that ranks exchange, with a number in float64 for each position: lse_r as the sum of two, A_r, L_r.
_LSE, _LSE_REST, _MASS, _LOSS = range(4)
# With statistics, of the shard's softmax and the bare target q: the entropy, sum q_c (x_c - lse_r), sum q_c, and the
# largest logit with its class. The backward is given the entropy in the same row.
_ENTROPY, _LOG_PROB, _TARGET_MASS, _LARGEST, _ARGMAX = range(4, 9)


def _count_of_rows(statistics: bool) -> int:
    return _ARGMAX + 1 if statistics else _LOSS + 1


def loss(
    tensors: Tensors,
    options: Options,
    group: dist.ProcessGroup | None,
    shard_sizes: Sequence[int] | None,
    layer: Layer | None = None,
) -> Tensor | CrossEntropyStats:
    """Returns the loss of local logits, or with ``options.statistics`` all of CrossEntropyStats.

    A layer makes its own logits: ``tensors.input`` is None.
    """
    if not dist.is_available():
        raise RuntimeError("this PyTorch was built without torch.distributed")
    # Dynamo's collectives are not these: a break in the graph.
    run = torch.compiler.disable(_eager_loss) if torch.compiler.is_dynamo_compiling() else _eager_loss
    results = run(tensors, options, group, shard_sizes, layer)
    return CrossEntropyStats(*results) if options.statistics else results[0]


def _eager_loss(tensors, options, group, shard_sizes, layer) -> tuple[Tensor, ...]:
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not in the group")
    local_logits, target, weight, _, sample_weight, denominator = tensors
    parts = None
    try:
        if options.dim != 1:
            local_logits, target = classes_at_one(options.dim, local_logits=local_logits, target=target)
        if layer is not None:
            local_logits, target, sample_weight, parts = layer.flat(target, sample_weight)
        tensors = Tensors(local_logits, target, weight, None, sample_weight, denominator)
        problem, tensors = _checked(tensors, options, group, shard_sizes, parts)
    except Exception as error:
        if layer is not None:
            positions, classes, device = layer.batch, exchange.UNKNOWN, layer.input.device
        elif isinstance(local_logits, Tensor):
            positions = positions_of(local_logits) if local_logits.dim() else torch.Size()
            known = local_logits.dim() > 0 and shard_sizes is None
            classes = local_logits.size(class_dim(local_logits)) if known else exchange.UNKNOWN
            device = local_logits.device
        else:
            raise
        report = exchange.Report(positions.numel(), classes, error=error)
        raise_everywhere(report, options.statistics, group, device)
    if parts is not None:
        return (_VocabParallelLinear.apply(*tensors, problem, *parts),)
    return _VocabParallel.apply(*tensors, problem)


def raise_everywhere(
    report: exchange.Report, statistics: bool, group: dist.ProcessGroup | None, device: torch.device
) -> NoReturn:
    """Raises the error in a report of this rank, after the exchange that the other ranks are in."""
    exchange.gather(report, _count_of_rows(statistics) * report.positions, None, group, device)
    raise report.error


# ---- arguments ------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class _Problem:
    options: Options  # with plain numbers
    shard: _Shard
    group: dist.ProcessGroup | None
    report: exchange.Report
    arithmetic: torch.dtype
    loss_dtype: torch.dtype
    soft: bool
    weighted: bool

    @property
    def needs_second_pass(self) -> bool:
        """The log-probability is that of bare probabilities: if the loss weights or smooths them, the kernel has to run
        once more."""
        return self.options.statistics and self.soft and (self.weighted or self.options.label_smoothing != 0)

    @property
    def of_gradients(self) -> Options:
        """The options of a kernel of this shard that makes gradients."""
        return self.options._replace(loss_dtype=torch.float64, empty="nan")

    @property
    def of_positions(self) -> Options:
        """The options of a kernel of this shard that makes losses, without the z-loss, which needs all classes."""
        return self.of_gradients._replace(reduction="none", z_loss=0.0)

    @property
    def of_second_pass(self) -> Options:
        return self.of_positions._replace(label_smoothing=0.0, statistics=False)


class Layer:
    """An output layer of which this rank has a part, as it was given."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None, options: LinearCrossEntropyOptions | None):
        if not isinstance(input, Tensor) or input.dim() == 0:
            raise ValueError(f"input must be a tensor of shape (..., features), but got {input!r}")
        self.input, self.weight, self.bias, self.options = input, weight, bias, options
        self.batch = input.shape[:-1]

    def flat(self, target: Tensor, sample_weight: Tensor | None) -> tuple:
        """Returns a placeholder of the logits, with their shape and no memory; target and sample_weight for it; and the
        layer's tensors and the size of a chunk."""
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


def _checked(tensors: Tensors, options: Options, group, shard_sizes, layer) -> tuple[_Problem, tuple]:
    """Returns the problem, and the tensors as the kernels take them. Raises for all but targets out of range."""
    local_logits, target, weight, _, sample_weight, denominator = tensors
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    check_tensors(local_logits=local_logits, target=target)
    check_devices(tensors)
    F._Reduction.get_enum(options.reduction)
    check_options(options)
    options = known_numbers(options)
    if local_logits.dim() == 0 or local_logits.dtype not in LOSS_DTYPES:
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
        check_denominator(denominator, options.reduction)
        denominator = _constant("denominator", as_denominator(denominator, local_logits), torch.Size(), None)
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
    report = exchange.Report(
        positions.numel(),
        exchange.UNKNOWN if shard_sizes is not None else shard.size,
        agreement,
        checksums=exchange.checksums(same, local_logits.device) if ranks > 1 else None,
    )
    problem = _Problem(options, shard, group, report, arithmetic, loss_dtype, soft, weight is not None)
    return problem, (local_logits, target, weight, sample_weight, denominator)


def check_devices(tensors: Tensors) -> None:
    for name, tensor in zip(tensors._fields, tensors, strict=True):
        if isinstance(tensor, Tensor) and tensor.device != tensors.input.device:
            raise ValueError(f"{name} must be on the device of the logits, {tensors.input.device}, not {tensor.device}")


def _constant(name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.is_complex():
        raise TypeError(f"{name} must be a tensor of a real type, but got {tensor!r}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {tuple(shape)}, but got {tuple(tensor.shape)}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} may not require a gradient where classes are sharded")
    return tensor.detach() if dtype is None else tensor.detach().to(dtype)


# ---- one position's factor, and the mean's denominator --------------------------------------------------------------


def sum_in_order(values: Tensor) -> Tensor:
    """Sums a vector with the same bits for any number of threads, which would divide one of more than 32768."""
    while values.numel() > 1 << 14:
        pieces = F.pad(values, (0, -values.numel() % (1 << 10))).view(-1, 1 << 10)
        values = pieces.sum(1)
    return values.sum()


def valid_mask(target: Tensor, ignore_index: int) -> Tensor | None:
    """Returns True for flat class indices that are not ignored. None: all."""
    return None if target.is_floating_point() else target.reshape(-1).long() != ignore_index


def denominator_of_mean(
    target: Tensor, positions: int, valid: Tensor | None, weight: Tensor | None, sample_weight: Tensor | None
) -> Tensor:
    """Returns the sum of w_y s over the valid positions, for probabilities of s, as a float64 scalar."""
    if valid is None:
        if sample_weight is None:
            return torch.full((), positions, dtype=torch.float64, device=target.device)
        return sum_in_order(sample_weight.reshape(-1).double())
    if weight is None and sample_weight is None:
        return valid.sum().double()
    parts = valid.double()
    if weight is not None:  # a class out of range is an error elsewhere
        parts = weight.double()[target.reshape(-1).long().clamp(0, weight.numel() - 1)]
    if sample_weight is not None:
        parts = parts * sample_weight.reshape(-1)
    return sum_in_order(torch.where(valid, parts, 0.0))


def ratio_of_denominators(denominator: Tensor, of_classes: Tensor, label_smoothing: float, empty: str) -> Tensor:
    """Returns the factor of class weights if the z-loss has a mean of its own; as csrc/host/make_problem.cpp."""
    ratio = denominator / of_classes
    if empty == "nan":
        return ratio
    nothing = of_classes == 0
    return torch.where(nothing & (denominator == 0) if label_smoothing else nothing, 1.0, ratio)


def safe_denominator(denominator: Tensor, total: Tensor, empty: str) -> Tensor:
    """Returns a mean's denominator, or one if the mean is over nothing and that is to be zero."""
    return denominator if empty == "nan" else torch.where((denominator == 0) & (total == 0), 1.0, denominator)


# ---- what ranks exchange --------------------------------------------------------------------------------------------


def _ones(weight: Tensor | None) -> Tensor | None:
    """Returns no weights, in a type that arithmetic may depend on."""
    return None if weight is None else torch.ones_like(weight)


def _fill_rows(rows: Tensor, problem: _Problem, logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    """Writes this rank's (rows, positions). Raises IndexError for a target that is no class."""
    options, shard = problem.options, problem.shard
    if shard.size == 0:
        _fill_without_classes(rows)
        return
    losses, saved, _ = _call.shard_forward(logits, target, weight, problem.of_positions, shard)
    rows[: _MASS + 1].copy_(saved[: _MASS + 1])
    rows[_LOSS].copy_(losses.view(-1))
    if not options.statistics:
        return
    rows[_ENTROPY : _LOG_PROB + 1].copy_(saved[3:5])
    if problem.needs_second_pass:
        losses, saved_alone, _ = _call.shard_forward(logits, target, _ones(weight), problem.of_second_pass, shard)
        torch.neg(losses.view(-1), out=rows[_LOG_PROB])
        rows[_TARGET_MASS].copy_(saved_alone[_MASS])
    elif problem.soft:
        rows[_TARGET_MASS].copy_(saved[_MASS])
    else:
        local = target.reshape(-1).long() - shard.begin
        rows[_TARGET_MASS].copy_((local >= 0) & (local < shard.size))
    argmax = saved[5].view(torch.int64 if saved.dtype == torch.float64 else torch.int32).long()
    dim = class_dim(logits)
    index = argmax.clamp(min=0).view(positions_of(logits)).unsqueeze(dim)
    rows[_LARGEST].copy_(options.transform(logits.gather(dim, index).reshape(-1).double()))
    rows[_ARGMAX].copy_(argmax + shard.begin)


def _fill_without_classes(rows: Tensor) -> None:
    rows.zero_()
    rows[_LSE].fill_(-torch.inf)
    if len(rows) > _LARGEST:
        rows[_LARGEST].fill_(-torch.inf)


_MOST_SMOOTHING_TO_JUDGE = 0.999  # of probabilities, whose sums are known up to rounding


def _refused_if_gathered(rows: Tensor, problem: _Problem, target: Tensor, valid: Tensor | None) -> Tensor:
    """Returns what is exchanged; but an error, or NaN if the host does not wait, if every rank has handed all classes.

    Then logits are the same on every rank, to the last bit, and labels are all among the classes of the first rank.
    Probabilities sum up to one on every rank, instead of on all ranks together; smoothing near 1, which makes them all
    equal, hides that. Equal logits are not judged: a layer that starts with zeros makes them.
    """
    reads, ranks, smoothing = exchange.reads_reports(rows.device), len(rows), problem.options.label_smoothing
    if problem.soft and smoothing > _MOST_SMOOTHING_TO_JUDGE:
        return rows
    if reads and not torch.equal(rows[0, :_MASS], rows[1, :_MASS]):
        return rows
    first, log_size = rows[0], math.log(max(problem.shard.size, 1))
    alike = (rows[:, :_MASS] == first[:_MASS]).flatten(0, 1).all(0)
    if problem.soft:
        alike &= rows[:, _MASS].sum(0) - smoothing > (1 - smoothing) * (1 + ranks) / 2
    else:
        alike &= target.reshape(-1).long() < problem.shard.size
    distinct = (first[_LOSS] - first[_MASS] * log_size).abs() > 1e-3 * log_size * first[_MASS]
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
    """Sums over all classes, from the rows of all ranks, (ranks, rows, positions)."""

    def __init__(self, rows: Tensor) -> None:
        lse, self.mass_of_ranks, losses = rows[:, :_MASS], rows[:, _MASS], rows[:, _LOSS]
        # Relative to the largest of them, whose exponential is one, the others' sum is exact however small it is.
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
        """Puts the lse of all classes in the place of lse_r in sums of a_c (lse_r - x_c), of masses sum a_c."""
        return torch.where(masses == 0, sums, sums + masses * self.above)

    def saved(self, dtype: torch.dtype, rows: int) -> Tensor:
        """Returns the rows that the backward reads, with lse split into its rounding and the rest."""
        saved = torch.empty(rows, self.lse.numel(), dtype=dtype, device=self.lse.device)
        saved[_LSE].copy_(self.lse)
        saved[_LSE_REST].copy_((self.largest[0] - saved[_LSE]) + self.low)
        saved[_MASS].copy_(self.mass_of_ranks.sum(0))
        return saved

    def entropy(self) -> Tensor:
        share = (-self.above).exp()  # of a rank, in the softmax
        return torch.where(share == 0, 0.0, share * (self.rows[:, _ENTROPY] + self.above)).sum(0)

    def target_log_prob(self) -> Tensor:
        return -self._shifted(-self.rows[:, _LOG_PROB], self.rows[:, _TARGET_MASS]).sum(0)

    def argmax(self) -> Tensor:
        first = self.rows[:, _LARGEST].argmax(0, keepdim=True)
        return self.rows[:, _ARGMAX].gather(0, first)[0].long()


# ---- the loss -------------------------------------------------------------------------------------------------------


class _Loss:
    """The loss of all classes, after an exchange of the rows that `fill` writes. Positions are flat, in float64.

    `weight` and `denominator` are the class weights and the divisor of the backward.
    """

    def __init__(self, problem: _Problem, tensors: Tensors, fill: Callable[[Tensor], None]) -> None:
        options, report = problem.options, problem.report
        logits, target, weight, _, self.sample_weight, denominator = tensors
        rows, self.positions = _count_of_rows(options.statistics), positions_of(logits)
        received = exchange.gather(
            report,
            rows * report.positions,
            lambda send: fill(send.view(rows, -1)),
            problem.group,
            logits.device,
        )
        received = received.view(len(received), rows, report.positions)
        self.valid = valid_mask(target, options.ignore_index)
        if report.classes != exchange.UNKNOWN and not problem.weighted and len(received) > 1:
            received = _refused_if_gathered(received, problem, target, self.valid)
        self.found = found = _Combined(received)
        losses, self.weight = found.losses, weight
        counted = target, report.positions, self.valid
        self.of_z = None
        if options.z_loss != 0:
            self.of_z = options.z_loss * found.lse.square()
            if options.reduction == "mean" and denominator is None and self.valid is not None and weight is not None:
                denominator = denominator_of_mean(*counted, None, self.sample_weight)
                of_classes = denominator_of_mean(*counted, weight, self.sample_weight)
                ratio = ratio_of_denominators(denominator, of_classes, options.label_smoothing, options.empty)
                losses, self.weight = losses * ratio, (weight.double() * ratio).to(weight.dtype)
            losses = losses + self.of_z
        losses = self._weighted(losses)
        if options.reduction != "mean":
            denominator = torch.ones((), dtype=torch.float64, device=logits.device)
        elif denominator is None:
            denominator = denominator_of_mean(*counted, weight, self.sample_weight)
        total = losses.view(self.positions) if options.reduction == "none" else sum_in_order(losses)
        if options.reduction == "mean":
            denominator = safe_denominator(denominator, total, options.empty)
            total = total / denominator
        self.denominator, self.loss = denominator, total.to(problem.loss_dtype)

    def _weighted(self, values: Tensor) -> Tensor:
        """Multiplies by sample weights. Positions that are ignored, or weigh nothing, give 0."""
        if self.sample_weight is None:
            return values if self.valid is None else torch.where(self.valid, values, 0.0)
        s = self.sample_weight.reshape(-1).double()
        counts = s != 0 if self.valid is None else self.valid & (s != 0)
        return torch.where(counts, values * s, 0.0)

    def statistics(self, problem: _Problem) -> CrossEntropyStats:
        options, found, nothing = problem.options, self.found, torch.zeros_like(self.found.lse)

        def at_positions(values: Tensor, otherwise: float = 0) -> Tensor:
            values = values if self.valid is None else torch.where(self.valid, values, otherwise)
            return values.view(self.positions)

        z_loss = nothing if self.of_z is None else self._weighted(self.of_z)
        z_loss = z_loss.view(self.positions) if options.reduction == "none" else sum_in_order(z_loss) / self.denominator
        return CrossEntropyStats(
            self.loss,
            at_positions(found.lse).to(problem.arithmetic),
            at_positions(found.target_log_prob()).to(problem.arithmetic),
            at_positions(found.entropy()).to(problem.arithmetic),
            z_loss.to(problem.loss_dtype),
            at_positions(found.argmax(), -2 if options.ignore_index == -1 else -1),
        )


class _VocabParallel(torch.autograd.Function):
    """CrossEntropyStats, or the loss alone."""

    @staticmethod
    def forward(ctx, logits, target, weight, sample_weight, denominator, problem):
        tensors = Tensors(logits, target, weight, None, sample_weight, denominator)
        made = _Loss(problem, tensors, lambda rows: _fill_rows(rows, problem, logits, target, weight))
        statistics, found = problem.options.statistics, made.found
        saved = found.saved(problem.arithmetic, 6 if statistics else 3)
        alone = None
        if problem.needs_second_pass:
            alone = saved[:3].clone()
            alone[_MASS].copy_(found.rows[:, _TARGET_MASS].sum(0))
        ctx.problem = problem
        ctx.save_for_backward(logits, target, made.weight, sample_weight, made.denominator, saved, alone)
        ctx.set_materialize_grads(False)
        if not statistics:
            return (made.loss,)
        saved[3].copy_(found.entropy())
        results = made.statistics(problem)
        ctx.mark_non_differentiable(results.z_loss, results.argmax)
        return tuple(results)

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
        """Returns the gradients of the logits, and of probabilities."""
        problem = ctx.problem
        logits, target, weight, sample_weight, denominator, saved, alone = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:2])
        if problem.shard.size == 0:
            return _zeros_if((logits, target), wanted)
        rows = [g if g is None else g.reshape(-1).to(saved.dtype) for g in of_statistics[:3]]  # lse, log-prob, entropy
        of_log_prob = None
        if problem.needs_second_pass and rows[1] is not None:
            of_log_prob, rows[1] = rows[1], None
        stacked = None
        if any(row is not None for row in rows):
            stacked = torch.stack([torch.zeros_like(saved[_LSE]) if row is None else row for row in rows])
        positions = positions_of(logits)
        if grad is None:
            # The loss has no gradient, and the statistics' is not divided by a denominator that may be zero.
            grad = saved.new_zeros(positions if problem.options.reduction == "none" else ())
            denominator = torch.ones_like(denominator)
        gradients = _call.shard_backward(
            (grad, stacked),
            (logits, target, weight, sample_weight),
            (saved, denominator),
            problem.of_gradients,
            problem.shard,
            wanted,
        )
        if of_log_prob is not None:
            more = _call.shard_backward(
                (-of_log_prob.view(positions), None),
                (logits, target, _ones(weight), None),
                (alone, torch.ones_like(denominator)),
                problem.of_second_pass,
                problem.shard,
                wanted,
            )
            gradients = [one + other for one, other in zip(gradients, more, strict=True)]
        return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]


class _VocabParallelLinear(torch.autograd.Function):
    """The loss of logits that are made a chunk at a time, for what is exchanged, and once more for their gradient."""

    @staticmethod
    def forward(
        ctx, logits, target, weight, sample_weight, denominator, problem, input, linear_weight, linear_bias, chunk
    ):
        layer = input, linear_weight, linear_bias

        def fill(rows: Tensor) -> None:
            if problem.shard.size == 0:
                _fill_without_classes(rows)
                return
            losses, saved, _ = _call.shard_linear_forward(
                layer, target, weight, problem.of_positions, problem.shard, chunk
            )
            rows[: _MASS + 1].copy_(saved)
            rows[_LOSS].copy_(losses.view(-1))

        made = _Loss(problem, Tensors(logits, target, weight, None, sample_weight, denominator), fill)
        ctx.problem, ctx.chunk = problem, chunk
        saved = made.found.saved(problem.arithmetic, 3)
        ctx.save_for_backward(*layer, target, made.weight, sample_weight, made.denominator, saved)
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
        """Returns the gradients of input, weight, bias, and probabilities."""
        problem = ctx.problem
        input, linear_weight, linear_bias, target, weight, sample_weight, denominator, saved = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[place] for place in (6, 7, 8, 1)]
        layer = input, linear_weight, linear_bias
        if problem.shard.size == 0:
            gradients = _zeros_if((*layer, target), wanted)
        else:
            gradients = _call.shard_linear_backward(
                grad,
                layer,
                (target, weight, sample_weight),
                (saved, denominator),
                problem.of_gradients,
                problem.shard,
                ctx.chunk,
                wanted,
            )
        gradients = [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]
        if wanted[0]:  # each rank has the contribution of its classes
            total = gradients[0].to(torch.promote_types(input.dtype, torch.float32))
            dist.all_reduce(total, group=problem.group)
            gradients[0] = total.to(input.dtype)
        return gradients


def _zeros_if(tensors: Sequence[Tensor | None], wanted: list[bool]) -> list[Tensor | None]:
    return [torch.zeros_like(tensor) if want else None for tensor, want in zip(tensors, wanted, strict=True)]


class _Final(torch.autograd.Function):
    """A gradient that has no derivative of its own, with respect to the tensors it was made of."""

    @staticmethod
    def forward(ctx, gradient: Tensor, *of: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        raise RuntimeError("cross entropy over shards of the classes has no second derivative")

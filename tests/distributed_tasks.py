"""What the ranks of `processes.Pool` do. Each task is called on every rank of the world; those that are not among the
first `ranks`, whose group it is for, have nothing to do."""

from __future__ import annotations

import copy
import os
import sys
from contextlib import nullcontext

import processes
import torch
import torch.distributed as dist
from oracle import same_strides
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import cross_entropy_ext
from cross_entropy_ext import LinearCrossEntropyOptions, functional
from cross_entropy_ext._parallel import exchange
from cross_entropy_ext.distributed import (
    VocabParallelCrossEntropyLoss,
    vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy_with_stats,
    vocab_parallel_linear_cross_entropy,
)

GROUPS: dict[int, dist.ProcessGroup] = {}
MESHES: dict[tuple[int, ...], DeviceMesh] = {}
KEPT: dict[str, object] = {}  # between a forward and its backward

PLACEMENTS = {"R": Replicate(), "P": Partial(), **{f"S{d}": Shard(d) for d in range(4)}}


def prepare(ranks: int) -> None:
    for n in range(1, ranks + 1):
        GROUPS[n] = dist.new_group(list(range(n)))
        MESHES[(n,)] = DeviceMesh("cpu", list(range(n)))
    MESHES[(2, 2)] = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicas", "shards"))


def is_idle(ranks: int) -> bool:
    return dist.get_rank() >= ranks


def shard_of(tensor: Tensor, sizes: list[int]) -> Tensor:
    """A view of this rank's classes."""
    rank = dist.get_rank()
    return tensor.narrow(1 if tensor.dim() > 1 else 0, sum(sizes[:rank]), sizes[rank])


def same_bits(one: Tensor, other: Tensor) -> bool:
    as_bytes = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*as_bytes)


def named(outputs) -> dict[str, Tensor]:
    return {"loss": outputs} if isinstance(outputs, Tensor) else outputs._asdict()


def call(ranks: int, sizes: list[int], even: bool, statistics: bool, arguments: dict, options: dict) -> dict | None:
    """Forward of this rank's shard."""
    if is_idle(ranks):
        return None
    logits, target = (arguments[name].detach() for name in ("input", "target"))
    soft = target.is_floating_point()
    local = shard_of(logits, sizes).requires_grad_()
    local_target = shard_of(target, sizes).requires_grad_() if soft else target
    others = {name: value for name, value in arguments.items() if name not in ("input", "target")}
    function = vocab_parallel_cross_entropy_with_stats if statistics else vocab_parallel_cross_entropy
    outputs = named(
        function(local, local_target, group=GROUPS[ranks], shard_sizes=None if even else sizes, **others, **options)
    )
    KEPT["call"] = outputs, [local] + [local_target] * soft
    return {name: value.detach() for name, value in outputs.items()}


def backward(ranks: int, upstream: dict[str, Tensor]) -> list[Tensor] | None:
    """Gradients of this rank's shards of logits and, where there are some, probabilities."""
    if is_idle(ranks):
        return None
    outputs, leaves = KEPT["call"]
    names = [name for name in outputs if outputs[name].requires_grad and name in upstream]
    grads = torch.autograd.grad([outputs[n] for n in names], leaves, [upstream[n] for n in names], retain_graph=True)
    again = torch.autograd.grad([outputs[n] for n in names], leaves, [upstream[n] for n in names])
    for one, other, leaf in zip(grads, again, leaves, strict=True):
        assert same_bits(one, other), "a second backward differs"
        assert same_strides(one, torch.empty_like(leaf))
    return list(grads)


# ---- an output layer whose weight is sharded -------------------------------------------------------------------------


def in_chunks(size: int) -> cross_entropy_ext.LinearCrossEntropyOptions:
    return cross_entropy_ext.LinearCrossEntropyOptions(batch_chunk_size=size, chunking_method=None)


def linear(ranks: int, sizes: list[int], arguments: dict, options: dict, chunk: int) -> tuple | None:
    """Loss, gradients of the input and of this rank's weight and bias (and probabilities), twice; and collectives."""
    if is_idle(ranks):
        return None
    arguments = {name: value.detach() for name, value in arguments.items()}
    rank = dist.get_rank()
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    input, target = arguments.pop("input").requires_grad_(), arguments.pop("target")
    weight, bias = (arguments.pop(name)[mine].requires_grad_() for name in ("linear_weight", "linear_bias"))
    leaves = [input, weight, bias]
    if target.is_floating_point():
        target = target[..., mine].requires_grad_()
        leaves.append(target)
    with Collectives() as forward:
        loss = vocab_parallel_linear_cross_entropy(
            input,
            weight,
            target,
            local_bias=bias,
            group=GROUPS[ranks],
            shard_sizes=sizes,
            options=in_chunks(chunk),
            **arguments,
            **options,
        )
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    with Collectives() as backward:
        grads = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, upstream)
    assert all(same_bits(one, other) for one, other in zip(grads, again, strict=True)), "a second backward differs"
    return loss.detach(), list(grads), forward.calls, backward.calls


def linear_of_dtensors(ranks: int, arguments: dict, options: dict, wrapped: bool) -> tuple | None:
    """The module with a weight whose classes are sharded, as parallelize_module shards a layer's."""
    if is_idle(ranks):
        return None
    mesh = MESHES[(ranks,)]
    input, target = arguments["input"].detach().requires_grad_(), arguments["target"]
    given = DTensor.from_local(input, mesh, [Replicate()], run_check=False) if wrapped else input
    head = cross_entropy_ext.LinearCrossEntropyLoss(6, 11, bias=True, **options)
    with torch.no_grad():
        head.linear.weight.copy_(arguments["linear_weight"])
        head.linear.bias.copy_(arguments["linear_bias"])
    parallelize_module(head.linear, mesh, ColwiseParallel())
    loss = head(given, target)
    assert isinstance(loss, DTensor) and loss.placements == (Replicate(),)
    loss.sum().backward()
    return loss.full_tensor().detach(), input.grad, *(p.grad.full_tensor() for p in head.linear.parameters())


def linear_of_placed_states(ranks: int) -> None:
    """Plain states that parallelize_module has been told the placement of: of each rank some, as in sequence
    parallelism."""
    if is_idle(ranks):
        return
    torch.manual_seed(0)
    alone, states, target = cross_entropy_ext.LinearCrossEntropyLoss(6, 11), torch.randn(8, 6), torch.arange(8)
    head = copy.deepcopy(alone)
    parallelize_module(head.linear, MESHES[(ranks,)], ColwiseParallel(input_layouts=Shard(0)))
    mine = states.chunk(ranks)[dist.get_rank()].clone().requires_grad_()
    loss, expected = head(mine, target), alone(states.requires_grad_(), target)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.full_tensor(), expected)
    torch.testing.assert_close(mine.grad, states.grad.chunk(ranks)[dist.get_rank()])
    torch.testing.assert_close(head.linear.weight.grad.full_tensor(), alone.linear.weight.grad)


def linear_without_whole_logits(ranks: int) -> int | None:
    """The largest tensor that a step makes, in elements."""
    if is_idle(ranks):
        return None

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    torch.manual_seed(0)
    input, weight = torch.randn(512, 8, requires_grad=True), torch.randn(4000 * ranks, 8).chunk(ranks)[dist.get_rank()]
    weight.requires_grad_()
    with Largest() as largest:
        vocab_parallel_linear_cross_entropy(
            input, weight, torch.arange(512), group=GROUPS[ranks], options=in_chunks(64)
        ).backward()
    return largest.elements


# ---- ranks with data of their own ------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 6)
        self.head = cross_entropy_ext.LinearCrossEntropyLoss(6, 11, bias=True)

    def forward(self, input: Tensor, target: Tensor, **options) -> Tensor:
        return self.head(self.body(input), target, **options)


def wrapped(model: Model, way: str, ranks: int) -> nn.Module:
    mesh = MESHES[(2, 2)] if way == "hsdp" else MESHES[(ranks,)]
    if way == "ddp":
        return DistributedDataParallel(model, process_group=GROUPS[ranks])
    if way in ("layers", "layers and model", "hsdp"):
        for module in list(model.modules()):
            if isinstance(module, nn.Linear):
                fully_shard(module, mesh=mesh)
    elif way == "head":
        fully_shard(model.head, mesh=mesh)
    if way in ("model", "layers and model", "head"):
        fully_shard(model, mesh=mesh)
    return model


def data_parallel(ranks: int, way: str) -> None:
    """Micro-batches of different lengths, other ones on each rank, whose losses have one mean over the tokens of all:
    gradients as in one process that has everything."""
    if is_idle(ranks):
        return
    torch.manual_seed(0)
    model, others, rank = Model(), Model(), dist.get_rank()
    others.load_state_dict(model.state_dict())
    batches = []  # of every rank, micro-batch by micro-batch
    for n in range(2 * ranks):
        target = torch.randint(11, (2, 2 + n))
        target[0, n:] = -100
        batches.append((torch.randn(2, 2 + n, 5), target))
    tokens = sum((target != -100).sum() for _, target in batches)
    inputs, targets = (torch.cat([part.flatten(0, 1) for part in parts]) for parts in zip(*batches, strict=True))
    expected = others(inputs, targets)
    expected.backward()

    model = wrapped(model, way, ranks)
    mine, total = batches[2 * rank : 2 * rank + 2], torch.zeros(())
    for i, (input, target) in enumerate(mine):
        loss = model(input, target, denominator=tokens / ranks)
        assert type(loss) is Tensor
        alone = functional.linear_cross_entropy(
            others.body(input), others.head.linear.weight, target, linear_bias=others.head.linear.bias
        )
        torch.testing.assert_close(loss * tokens / ranks, alone * (target != -100).sum())
        with model.no_sync() if way == "ddp" and i == 0 else nullcontext():
            loss.backward()
        total += loss.detach() / ranks
    dist.all_reduce(total, group=GROUPS[ranks])
    torch.testing.assert_close(total, expected.detach())
    for parameter, other in zip(model.parameters(), others.parameters(), strict=True):
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        torch.testing.assert_close(grad, other.grad)


def mixed(ranks: int) -> dict[str, str] | None:
    """What is raised where a plain tensor of this rank meets a weight that is sharded."""
    if is_idle(ranks):
        return None
    weight = wrapped(Model(), "layers", ranks).head.linear.weight
    rank, messages = dist.get_rank(), {}
    for positions in ("as many on each rank", "others"):  # of which gloo would end the process, if it heard of them
        n = 4 if positions != "others" else 4 + rank
        hidden, target = torch.full((n, 6), float(rank)), torch.arange(n)
        pairs = target.unsqueeze(1), torch.ones(n, 1)
        two = DTensor.from_local(torch.zeros(11, 6), MESHES[(ranks,)], [Replicate()], run_check=False)
        for name, call in {
            "linear": lambda: functional.linear_cross_entropy(hidden, weight, target),  # noqa: B023
            "stats": lambda: functional.linear_cross_entropy_with_stats(hidden, weight, target),  # noqa: B023
            "pairs": lambda: functional.linear_sparse_cross_entropy(hidden, weight, *pairs),  # noqa: B023
            "replicated": lambda: functional.linear_cross_entropy(hidden, two, target),  # noqa: B023
            "weight": lambda: functional.linear_cross_entropy(two[:4], torch.zeros(11, 6), target[:4]),  # noqa: B023
            "logits": lambda: functional.cross_entropy(hidden, two[0, :1].expand(n, 6)),  # noqa: B023
        }.items():
            try:
                call()
                messages[f"{name}, {positions}"] = "none"
            except Exception as error:
                messages[f"{name}, {positions}"] = f"{type(error).__name__}: {error}"
    return messages


# ---- what is done between the ranks ----------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Which collectives there are, and how many bytes each rank sends."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.calls.append((func._schema.name, min(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """What is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def collectives(ranks: int, positions: int, statistics: bool, options: dict) -> tuple | None:
    if is_idle(ranks):
        return None
    torch.manual_seed(dist.get_rank())
    logits = torch.randn(positions, 5, requires_grad=True)
    target = torch.arange(positions) % (5 * ranks)
    function = vocab_parallel_cross_entropy_with_stats if statistics else vocab_parallel_cross_entropy
    with Collectives() as forward:
        outputs = named(function(logits, target, group=GROUPS[ranks], **options))
    with Collectives() as backward:
        sum(value.double().sum() for value in outputs.values() if value.requires_grad).backward()
    return forward.calls, backward.calls


def dtensor_collectives(mesh: tuple[int, ...], placements: list[str], reduction: str) -> tuple | None:
    mesh = MESHES[mesh]
    if mesh.get_coordinate() is None:
        return None
    logits = distribute_tensor(torch.ones(6, 8), mesh, [PLACEMENTS[p] for p in placements]).requires_grad_()
    target = torch.arange(6)
    with Collectives() as forward:
        loss = functional.cross_entropy(logits, target, reduction=reduction)
    upstream = torch.ones_like(loss)
    with Collectives() as backward:
        loss.backward(upstream)
    return forward.calls, backward.calls


# ---- DTensors --------------------------------------------------------------------------------------------------------


def call_dtensor(
    mesh: tuple[int, ...],
    placements: list[str],
    statistics: bool,
    wrapped: bool,
    arguments: dict[str, Tensor],
    options: dict,
) -> dict | None:
    """As `call`, of a DTensor; `wrapped`: whatever else is a tensor is one as well. Gives results as a whole."""
    mesh = MESHES[mesh]
    if mesh.get_coordinate() is None:
        return None
    placements = [PLACEMENTS[p] for p in placements]

    def distributed_tensor(tensor: Tensor, placements: list) -> DTensor:
        if any(p.is_partial() for p in placements):
            whole = [Replicate() if p.is_partial() else p for p in placements]
            local = distribute_tensor(tensor, mesh, whole).to_local()
            return DTensor.from_local(local / mesh.size(), mesh, placements, run_check=False)
        return distribute_tensor(tensor, mesh, placements)

    given = {name: tensor.detach() for name, tensor in arguments.items()}
    leaves = {"input": distributed_tensor(given["input"], placements)}
    if given["target"].is_floating_point():
        leaves["target"] = distributed_tensor(given["target"], placements) if wrapped else given["target"]
    elif wrapped:  # sharded as nobody needs it
        given["target"] = distribute_tensor(given["target"], mesh, [Shard(0)] + [Replicate()] * (mesh.ndim - 1))
    if wrapped:
        for name in ("weight", "sample_weight"):  # in one order, for there is a broadcast
            if name in given:
                given[name] = distribute_tensor(given[name], mesh, [Replicate()] * mesh.ndim)
    given |= {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    function = functional.cross_entropy_with_stats if statistics else functional.cross_entropy
    outputs = named(function(**given, **options))
    where = {
        name: [type(p).__name__[0] + str(getattr(p, "dim", "")) for p in v.placements] for name, v in outputs.items()
    }
    KEPT["dtensor"] = outputs, leaves
    return {name: value.detach().full_tensor() for name, value in outputs.items()}, where


def backward_dtensor(mesh: tuple[int, ...], upstream: dict[str, Tensor]) -> list[Tensor] | None:
    mesh = MESHES[mesh]
    if mesh.get_coordinate() is None:
        return None
    outputs, leaves = KEPT["dtensor"]
    names = [name for name in outputs if outputs[name].requires_grad and name in upstream]
    given = [distribute_tensor(upstream[name], mesh, outputs[name].placements) for name in names]
    grads = torch.autograd.grad([outputs[name] for name in names], list(leaves.values()), given)
    for grad, leaf in zip(grads, leaves.values(), strict=True):
        if isinstance(leaf, DTensor) and not any(p.is_partial() for p in leaf.placements):
            assert grad.placements == leaf.placements
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]


def colwise(ranks: int) -> None:
    """The last layer of a model that was parallelized, and the loss's module, as if there were one process; also where
    the layer's output goes to other places."""
    if is_idle(ranks):
        return
    torch.manual_seed(0)
    head, x, target = nn.Linear(6, 13), torch.randn(5, 6), torch.tensor([0, 12, -100, 7, 3])
    criterion = cross_entropy_ext.CrossEntropyLoss(torch.rand(13), label_smoothing=0.1, z_loss=1e-3)
    native = nn.CrossEntropyLoss(criterion.weight)
    expected, expected_native = criterion(head(x), target), native(head(x), target)
    expected.backward()
    for output in (None, Replicate(), Shard(0)):
        plan = ColwiseParallel(output_layouts=output, use_local_output=False)
        sharded = parallelize_module(copy.deepcopy(head), MESHES[(ranks,)], plan)
        sharded.zero_grad()
        with Operators() as ours:
            loss = criterion(sharded(x), target)
        assert abs(loss.item() - expected.item()) < 1e-6
        assert any("cross_entropy_ext" in name for name in ours.names)
        assert not any("log_softmax" in name for name in ours.names)
        loss.backward()
        for parameter, other in zip(sharded.parameters(), head.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), other.grad)
        with cross_entropy_ext.patch_torch():
            assert abs(native(sharded(x), target).item() - expected_native.item()) < 1e-6


def under_way(ranks: int) -> None:
    """Logits that a collective has not finished yet are waited for, and are the kernels' nevertheless."""
    if is_idle(ranks):
        return
    logits, target = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    leaf = DTensor.from_local(logits / ranks, MESHES[(ranks,)], [Partial()], run_check=False).requires_grad_()
    summed = leaf.redistribute(placements=[Replicate()], async_op=True)
    assert type(summed.to_local()) is not Tensor
    with Operators() as ours:
        loss = functional.cross_entropy(summed, target)
    assert "cross_entropy_ext::_forward" in ours.names
    whole = logits.clone().requires_grad_()
    expected = functional.cross_entropy(whole, target)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss.to_local(), expected)
    torch.testing.assert_close(leaf.grad.redistribute(placements=[Replicate()]).to_local(), whole.grad)


# ---- errors ----------------------------------------------------------------------------------------------------------


def failing(ranks: int, kind: str, culprit: int) -> str | None:
    """What a rank raises where `culprit` does something wrong; and that the next call is right again."""
    if is_idle(ranks):
        return None
    guilty = dist.get_rank() == culprit
    logits, target = torch.zeros(3, 4), torch.arange(3)
    arguments: dict = {"local_logits": logits, "target": target, "group": GROUPS[ranks]}
    wrong = {
        "target": {"target": torch.tensor([0, 4 * ranks + 3, 1])},
        "shape": {"target": torch.zeros(2, dtype=torch.long)},
        "target type": {"target": torch.zeros(3, dtype=torch.bool)},
        "logits type": {"local_logits": torch.zeros(3, 4, dtype=torch.long)},
        "weight": {"weight": torch.ones(3)},
        "weight needs a gradient": {"weight": torch.ones(4 * ranks, requires_grad=True)},
        "sample_weight": {"sample_weight": torch.ones(4)},
        "denominator": {"reduction": "sum", "denominator": 2.0},
        "softcap": {"softcap": -1.0},
        "z_loss": {"z_loss": float("nan")},
        "smoothing": {"label_smoothing": 1.5},
        "reduction": {"reduction": "median"},
        "empty": {"empty": "one"},
        "loss_dtype": {"loss_dtype": torch.int32},
        "probabilities": {"target": torch.zeros(3, 5)},
        "ignored probabilities": {"target": torch.zeros(3, 4), "ignore_index": 1},
        "classes": {"local_logits": torch.zeros(3, 5)},
        "shard_sizes": {"shard_sizes": [1] * ranks},
        "another device": {"target": torch.arange(3, device="meta")},
        "disagreement": {"label_smoothing": 0.1},
    }
    expected = vocab_parallel_cross_entropy(**arguments)
    message = None
    try:
        vocab_parallel_cross_entropy(**arguments | (wrong[kind] if guilty else {}))
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    assert torch.equal(vocab_parallel_cross_entropy(**arguments), expected)
    return message


def disagreeing(ranks: int, kind: str, culprit: int, unread: bool) -> str | float | None:
    """What a rank raises, or else its loss, where a tensor of `culprit` differs a little from the others'."""
    if is_idle(ranks):
        return None
    rank, classes = dist.get_rank(), 5 * ranks
    g = torch.Generator().manual_seed(0)
    target = torch.randint(classes, (37,), generator=g)
    input, weight = torch.randn(37, 6, generator=g), torch.randn(classes, 6, generator=g)
    others = {"weight": torch.rand(classes, generator=g), "sample_weight": torch.rand(37, generator=g)}
    others["denominator"] = torch.tensor(30.0)
    linear = kind.startswith("linear")
    if rank == culprit:
        match kind.split()[-1]:
            case "label":
                target[3] = (target[3] + 1) % classes
            case "order":
                target = target.flip(0)
            case "weight" | "sample_weight" | "denominator":
                others[kind] = others[kind] + torch.eye(others[kind].numel() or 1)[0].reshape(others[kind].shape)
            case "states":
                input = torch.randn(37, 6, generator=torch.Generator().manual_seed(1))
            case "rounding":
                input = input * (1 + 1e-3 * torch.randn(37, 6, generator=g))
                others = {name: value * (1 + 1e-7 * torch.rand((), generator=g)) for name, value in others.items()}
                others["denominator"] = torch.tensor(30.0)
            case "infinity":
                input[2, 1] = torch.inf
    reads = exchange.reads_reports
    exchange.reads_reports = lambda device: not unread
    mine = weight.chunk(ranks)[rank]
    try:
        if linear:
            loss = vocab_parallel_linear_cross_entropy(input, mine, target, group=GROUPS[ranks], **others)
        else:
            loss = vocab_parallel_cross_entropy(
                torch.randn(37, 5, generator=torch.Generator().manual_seed(rank)), target, group=GROUPS[ranks], **others
            )
        return loss.item()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        exchange.reads_reports = reads


def gathered(ranks: int, kind: str, unread: bool, smoothing: float = 0.0) -> str | float | None:
    """Where every rank hands the same logits: all of them, or, rightly, its own."""
    if is_idle(ranks):
        return None
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(6, 5, generator=g), torch.tensor([0, 4, -100, 1, 3, 3])
    input, rows = torch.randn(6, 8, generator=g), torch.randn(5, 8, generator=g)
    options: dict = {"group": GROUPS[ranks], "label_smoothing": smoothing}
    match kind:
        case "probabilities":
            target = torch.randn(6, 5, generator=g).softmax(1)
        case "ignored":
            logits[2] = torch.arange(5) + dist.get_rank()  # nobody reads these
        case "narrow":
            logits *= 0.1
        case "sizes are given":
            options["shard_sizes"] = [5] * ranks
        case "of another shard":
            target[1] = 5
        case "all equal":
            logits.fill_(3.0)
        case "zeros with a bias":
            rows.zero_()
        case "nothing counts":
            target.fill_(-100)
        case "one position differs":
            logits[5, 0] += dist.get_rank()
        case "probabilities of shards":
            target = torch.full((6, 5), 1 / (5 * ranks))
        case "probabilities of the first shard":
            target = torch.randn(6, 5, generator=g).softmax(1) * (dist.get_rank() == 0)
    reads = exchange.reads_reports
    exchange.reads_reports = lambda device: not unread
    try:
        if kind in ("linear", "zeros with a bias"):
            return vocab_parallel_linear_cross_entropy(
                input, rows, target, local_bias=torch.full((5,), 0.5), **options
            ).item()
        return vocab_parallel_cross_entropy(logits, target, **options).item()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        exchange.reads_reports = reads


def labels_of_dtensors(mesh: tuple[int, ...], placements: list[str], reduction: str) -> str | None:
    """What is raised where plain labels beside a DTensor differ on the last rank."""
    mesh = MESHES[mesh]
    if mesh.get_coordinate() is None:
        return None
    logits, target = distribute_tensor(torch.zeros(4, 6), mesh, [PLACEMENTS[p] for p in placements]), torch.arange(4)
    target[3] += dist.get_rank() // 3
    try:
        functional.cross_entropy(logits, target, reduction=reduction)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def failing_linear(ranks: int, kind: str, culprit: int) -> str | None:
    """The same of the sharded output layer, for what is found before anything is exchanged."""
    if is_idle(ranks):
        return None
    guilty = dist.get_rank() == culprit
    arguments: dict = {"input": torch.ones(3, 5), "local_weight": torch.ones(4, 5), "target": torch.arange(3)}
    arguments["group"] = GROUPS[ranks]
    wrong = {
        "weight": {"local_weight": torch.ones(4, 6)},
        "dimensions": {"local_weight": torch.ones(4, 2, 5)},
        "type": {"local_weight": torch.ones(4, 5, dtype=torch.double)},
        "bias": {"local_bias": torch.ones(3)},
        "no target": {"target": None},
        "chunk": {"options": LinearCrossEntropyOptions(batch_chunk_size=2, chunking_method="aspect_ratio")},
        "a gradient": {"input": torch.ones(3, 5, requires_grad=True)},
    }
    message = None
    try:
        vocab_parallel_linear_cross_entropy(**arguments | (wrong[kind] if guilty else {}))
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    assert vocab_parallel_linear_cross_entropy(**arguments).isfinite()
    return message


def other_sizes(ranks: int) -> str | None:
    """Of shards, on one rank, with the same number of classes in all."""
    if is_idle(ranks):
        return None
    rank = dist.get_rank()
    try:
        sizes = [2, 4] if rank == 0 else [3, 3]
        vocab_parallel_cross_entropy(torch.ones(4, sizes[rank]), torch.arange(4), group=GROUPS[2], shard_sizes=sizes)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def failing_dtensor(mesh: tuple[int, ...], placements: list[str], kind: str, everybody: bool) -> str | None:
    """What is raised where everybody, or the last rank, does something wrong; and that the next call is right again."""
    mesh = MESHES[mesh]
    if mesh.get_coordinate() is None:
        return None
    logits = distribute_tensor(torch.zeros(4, 6), mesh, [PLACEMENTS[p] for p in placements])
    target, learned = torch.arange(4), torch.ones((), requires_grad=True)
    wrong = {
        "a class that is none": {"target": torch.tensor([0, 1, 2, 6])},  # in a position that not every rank has
        "labels elsewhere": {"target": torch.arange(4, device="meta")},
        "probabilities elsewhere": {"target": torch.zeros(4, 6, device="meta")},
        "weight elsewhere": {"target": target, "weight": torch.ones(6, device="meta")},
        "sample_weight elsewhere": {"target": target, "sample_weight": torch.ones(4, device="meta")},
        "shape": {"target": torch.arange(5)},
        "sample_weight": {"target": target, "sample_weight": torch.ones(3)},
        "weight that learns": {"target": target, "weight": torch.ones(6, requires_grad=True)},
        "z_loss": {"target": target, "weight": torch.ones(6), "z_loss": -0.1},
        "z_loss in a tensor": {"target": target, "weight": torch.ones(6), "z_loss": torch.tensor(-0.5)},
        "z_loss is no number": {"target": target, "weight": torch.ones(6), "z_loss": float("nan")},
        "logit_scale that learns": {"target": target, "logit_scale": learned},
        "z_loss that learns": {"target": target, "weight": torch.ones(6), "z_loss": learned},
    }[kind]
    guilty, message = everybody or mesh.get_rank() == 3, None
    try:
        functional.cross_entropy(logits, **(wrong if guilty else {"target": target}))
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    torch.testing.assert_close(
        functional.cross_entropy(logits, target).full_tensor(), torch.tensor(6.0).log(), check_dtype=False
    )
    return message


def learned_numbers(mesh: tuple[int, ...], placements: list[str], shape: tuple[int, ...], wrapped: bool) -> None:
    """Scalar tensors that require a gradient get the one that they have beside the whole logits, on every rank."""
    mesh = MESHES[mesh]
    if mesh.get_coordinate() is None:
        return
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(shape, generator=g, dtype=torch.double)
    labels = torch.randint(shape[1], shape[:1] + shape[2:], generator=g)
    if shape[0] > 1:
        labels[0] = -100
    others = {
        "weight": torch.rand(shape[1], generator=g, dtype=torch.double),
        "sample_weight": torch.rand(labels.shape, generator=g),
    }
    numbers = {"label_smoothing": 0.1, "z_loss": 0.2, "softcap": 5.0, "logit_scale": 1.5}
    probabilities = torch.randn(shape, generator=g, dtype=torch.double).softmax(1)

    def run(input: Tensor, whole: bool, target: Tensor, options: dict) -> list[Tensor]:
        leaves = {name: torch.tensor(value, requires_grad=True) for name, value in numbers.items()}
        given = leaves
        if wrapped and not whole:
            given = {name: distribute_tensor(leaf, mesh, [Replicate()] * mesh.ndim) for name, leaf in leaves.items()}
            leaves = given = {name: leaf.detach().requires_grad_() for name, leaf in given.items()}
        results = []
        for function in (functional.cross_entropy, functional.cross_entropy_with_stats):
            outputs = named(function(input, target, **options, **given))
            total = 0.0
            for i, name in enumerate(("loss", "lse", "entropy")):
                if name in outputs:
                    upstream = torch.linspace(0.5 + i, 1.5, outputs[name].numel(), dtype=torch.double)
                    upstream = upstream.view(outputs[name].shape)
                    upstream = upstream if whole else distribute_tensor(upstream, mesh, outputs[name].placements)
                    total = total + (outputs[name] * upstream).sum()
            results += torch.autograd.grad(total, [input, *leaves.values()])
        if not whole and wrapped:
            assert all(grad.placements == (Replicate(),) * mesh.ndim for grad in results[1:5] + results[6:])
        return [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in results]

    for target in (labels, probabilities):
        for options in (
            {},
            others,
            {"weight": others["weight"]},
            {"reduction": "sum", **others},
            {"reduction": "none"},
        ):
            expected = run(logits.clone().requires_grad_(), True, target, options)
            sharded = distribute_tensor(logits, mesh, [PLACEMENTS[p] for p in placements]).requires_grad_()
            for ours, right in zip(run(sharded, False, target, options), expected, strict=True):
                torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-7)


def unread_reports(ranks: int, wrong: str | None) -> tuple[str | None, float] | None:
    """As on a device that the host does not wait for."""
    if is_idle(ranks):
        return None
    reads = exchange.reads_reports
    exchange.reads_reports = lambda device: False
    guilty = wrong if dist.get_rank() == 0 else None
    logits = torch.zeros(3, 5 if guilty == "classes" else 4)
    target = torch.tensor([0, 99 if guilty == "target" else 1, 2])
    try:
        loss = vocab_parallel_cross_entropy(logits, target, group=GROUPS[ranks])
        return None, loss.item()
    except Exception as error:
        return type(error).__name__, float("nan")
    finally:
        exchange.reads_reports = reads


# ---- the rest of PyTorch ---------------------------------------------------------------------------------------------


def second_derivative(ranks: int) -> str | None:
    if is_idle(ranks):
        return None
    torch.manual_seed(dist.get_rank())
    logits = torch.randn(3, 4, requires_grad=True)
    loss = vocab_parallel_cross_entropy(logits, torch.arange(3), group=GROUPS[ranks])
    grad = torch.autograd.grad(loss, logits, create_graph=True)[0]
    try:
        grad.sum().backward()
    except RuntimeError as error:
        return str(error)
    return None


def second_derivative_of_dtensors(ranks: int) -> None:
    """Whole classes have one, of a square of the loss as well, and of a number that learns."""
    if is_idle(ranks):
        return
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(5, 4, generator=g, dtype=torch.double), torch.arange(5) % 4

    def second(input: Tensor, power: int) -> list[Tensor]:
        scale = torch.tensor(1.5, dtype=torch.double, requires_grad=True)
        of_one = torch.autograd.grad(functional.cross_entropy(input, target) ** power, input, create_graph=True)[0]
        learned = functional.cross_entropy(input, target, logit_scale=scale) ** power
        of_scale = torch.autograd.grad(learned, scale, create_graph=True)[0] ** power
        grads = torch.autograd.grad((of_one * of_one).sum(), input) + torch.autograd.grad(of_scale, [input, scale])
        return [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]

    for power in (1, 2):
        expected = second(logits.clone().requires_grad_(), power)
        found = second(distribute_tensor(logits, MESHES[(ranks,)], [Shard(0)]).requires_grad_(), power)
        for ours, right in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, right)


def compiled(ranks: int) -> None:
    """torch.compile breaks the graph at the loss, and goes on behind it; for DTensors as well."""
    if is_idle(ranks):
        return
    group, mesh, target = GROUPS[ranks], MESHES[(ranks,)], torch.arange(3)

    def step(x: Tensor) -> Tensor:
        return 2 * vocab_parallel_cross_entropy(x * 3, target, group=group)

    def step_of_dtensor(x: Tensor) -> Tensor:
        return 2 * functional.cross_entropy(x * 3, target).to_local()

    torch.manual_seed(dist.get_rank())
    local = torch.randn(3, 4)
    for function, x in (
        (step, local),
        (step_of_dtensor, distribute_tensor(torch.randn(3, 7), mesh, [Shard(1)])),
    ):
        results = []
        for run in (function, torch.compile(function, backend="aot_eager")):
            leaf = x.detach().requires_grad_()
            loss = run(leaf)
            loss.backward()
            results.append((loss, leaf.grad.to_local() if isinstance(leaf, DTensor) else leaf.grad))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


def autocast(ranks: int) -> list[torch.dtype] | None:
    if is_idle(ranks):
        return None
    torch.manual_seed(dist.get_rank())
    logits, target = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True), torch.arange(3)
    weight = torch.ones(4 * ranks, dtype=torch.bfloat16)
    of_dtensor = distribute_tensor(torch.randn(3, 8, dtype=torch.bfloat16), MESHES[(ranks,)], [Shard(0)])
    with torch.autocast("cpu", torch.bfloat16):
        loss = vocab_parallel_cross_entropy(logits, target, group=GROUPS[ranks], weight=weight)
        other = functional.cross_entropy(of_dtensor, target, weight=torch.ones(8, dtype=torch.bfloat16))
    loss.backward()
    return [loss.dtype, logits.grad.dtype, other.dtype]


def mixture_of_dtensors(ranks: int) -> None:
    """MixUp of logits on a mesh has the loss and the gradients of whole logits, with padding and weights."""
    if is_idle(ranks):
        return
    mesh, generator = MESHES[(ranks,)], torch.Generator().manual_seed(0)
    whole = torch.randn(5, 6, 3, generator=generator)
    a, b = (torch.randint(6, (5, 3), generator=generator) for _ in range(2))
    a[0], b[1, 1] = -100, -100
    weight, sample_weight = torch.rand(6, generator=generator) + 0.1, torch.rand(5, 3, generator=generator)

    def run(logits: Tensor, reduction: str, options: dict) -> list[Tensor]:
        logits, lam = logits.requires_grad_(), torch.tensor(0.3, requires_grad=True)
        loss = functional.mixup_cross_entropy(logits, a, b, lam, weight, reduction=reduction, **options)
        found = (loss, *torch.autograd.grad(loss.sum(), (logits, lam)))
        return [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in found]

    for placement in (Replicate(), Shard(0), Shard(1), Shard(2)):
        for reduction in ("mean", "sum", "none"):
            for options in ({}, {"z_loss": 0.1, "label_smoothing": 0.1, "sample_weight": sample_weight}):
                expected = run(whole.clone(), reduction, options)
                found = run(distribute_tensor(whole, mesh, [placement]), reduction, options)
                for one, other in zip(found, expected, strict=True):
                    torch.testing.assert_close(one, other)
    logits = distribute_tensor(whole, mesh, [Shard(0)])
    try:
        functional.mixup_cross_entropy(logits, a, b, torch.rand(5))
    except ValueError as error:
        assert "lam must be a number or a real scalar tensor" in str(error)
    else:
        raise AssertionError("a share for each sample was taken")


def module(ranks: int) -> None:
    if is_idle(ranks):
        return
    torch.manual_seed(0)
    logits, weight, target = torch.randn(3, 4 * ranks), torch.rand(4 * ranks), torch.tensor([0, -100, 4 * ranks - 1])
    options = {"label_smoothing": 0.1, "softcap": 3.0, "reduction": "sum"}
    criterion = VocabParallelCrossEntropyLoss(weight, group=GROUPS[ranks], shard_sizes=[4] * ranks, **options)
    plain = cross_entropy_ext.CrossEntropyLoss(weight, **options)
    assert criterion.state_dict().keys() == plain.state_dict().keys()
    assert copy.deepcopy(criterion).group is criterion.group and copy.deepcopy(criterion).weight is not criterion.weight
    s = torch.rand(3)
    local = shard_of(logits, [4] * ranks)
    torch.testing.assert_close(criterion(local, target, sample_weight=s), plain(logits, target, sample_weight=s))
    # Classes at another dimension, of a shard and of DTensors with the classes or the positions in shards.
    moved = VocabParallelCrossEntropyLoss(weight, group=GROUPS[ranks], shard_sizes=[4] * ranks, dim=0, **options)
    assert torch.equal(moved(local.T, target), criterion(local, target))
    for dim in (0, 1):
        whole = distribute_tensor(logits.T.contiguous(), MESHES[(ranks,)], [Shard(dim)]).requires_grad_()
        loss = functional.cross_entropy(whole, target, weight, dim=0, **options)
        torch.testing.assert_close(loss.full_tensor(), plain(logits, target))
        (gradient,) = torch.autograd.grad(loss, whole)
        assert gradient.placements == whole.placements and gradient.shape == whole.shape
    criterion.reduction = plain.reduction = "mean"
    for denominator in (5, torch.tensor(2.5)):
        loss = criterion(local, target, denominator=denominator)
        torch.testing.assert_close(loss, plain(logits, target, denominator=denominator))


def in_one_process_of_another_length(rank: int, ranks: int, port: int) -> None:
    """Ends with 0 if the call succeeds."""
    processes.join_world(rank, ranks, port)
    try:
        vocab_parallel_cross_entropy(torch.zeros(90 + 10 * rank, 4), torch.zeros(90 + 10 * rank, dtype=torch.long))
    except Exception:
        sys.exit(3)


def beside_one_that_dies(rank: int, ranks: int, port: int) -> None:
    processes.join_world(rank, ranks, port)
    arguments = torch.zeros(90, 4), torch.zeros(90, dtype=torch.long)
    vocab_parallel_cross_entropy(*arguments)
    if rank == 1:
        os._exit(9)
    try:
        vocab_parallel_cross_entropy(*arguments)
    except RuntimeError:
        sys.exit(3)

"""Logits whose classes are sharded over processes: `vocab_parallel_cross_entropy` beside PyTorch's `loss_parallel`.

    python -m benchmarks.vocab_parallel [--quick] [--only PATTERN] [--seconds S] [--json FILE]

Four processes of this machine share its cores evenly and communicate by gloo. Each has the logits of its own classes;
all have the same targets. First, losses and gradients are compared. Times are of forward and backward, until the last
process is done, medians of turns that the providers take one after the other.

Records, a dictionary each: provider, dtype, ranks, shape (of one process), median_ms, min_ms, max_ms, turns, speedup
(over `loss_parallel`, the median of the ratios of neighbouring turns); and what is `wrong`, if anything.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel

from cross_entropy_ext.distributed import vocab_parallel_cross_entropy
from cross_entropy_ext.functional import cross_entropy

from . import command_line
from .command_line import Item
from .pages import Section, measured_by
from .tables import Block, Table, duration, number, said
from .timing import median_ratio, summary_of
from .values import TOLERANCE, difference

RANKS = 4
SHAPE, QUICK_SHAPE = (2048, 8000), (128, 500)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SECONDS = {"cpu": 60.0, "quick": 2.0}
LEAST_TURNS = 5
THEIRS = "loss_parallel"


def providers(mesh: dist.DeviceMesh) -> dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Functions from local logits and targets to the loss and the gradient of these logits."""

    def ours(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss = vocab_parallel_cross_entropy(logits, target, group=mesh.get_group())
        return loss, torch.autograd.grad(loss, logits)[0]

    def of_dtensor(loss: Callable[[DTensor, Tensor], DTensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        def train(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            value = loss(DTensor.from_local(logits, mesh, [Shard(1)], run_check=False), target)
            return value.to_local(), torch.autograd.grad(value, logits)[0]

        return train

    ours_of_dtensor, theirs_of_dtensor = of_dtensor(cross_entropy), of_dtensor(F.cross_entropy)

    def theirs(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        with loss_parallel():
            return theirs_of_dtensor(logits, target)

    return {"ours": ours, "ours, of a DTensor": ours_of_dtensor, THEIRS: theirs}


def fields(provider: str, dtype: str, shape: tuple[int, int]) -> dict:
    return {"provider": provider, "dtype": dtype, "ranks": RANKS, "shape": list(shape)}


def measure(shape: tuple[int, int], name: str, seconds: float) -> list[dict]:
    """Runs on each of the processes, all of which return the same records."""
    rank, (rows, classes), dtype = dist.get_rank(), shape, DTYPES[name]
    runs = providers(init_device_mesh("cpu", (RANKS,)))
    random = torch.Generator().manual_seed(rank)
    logits = torch.randn(rows, classes, generator=random).mul_(2).to(dtype).requires_grad_()
    target = torch.randint(RANKS * classes, (rows,), generator=torch.Generator().manual_seed(0))

    records = {which: fields(which, name, shape) for which in runs}
    expected = runs[THEIRS](logits, target)
    for which, run in runs.items():
        for what, found, right in zip(("loss", "gradient"), run(logits, target), expected, strict=True):
            if wrong := difference(f"the {what}", found, right, 2 * TOLERANCE[dtype]):
                records[which]["wrong"] = wrong

    times: dict[str, list[float]] = {which: [] for which in runs}
    begin = time.monotonic()
    done = torch.zeros(())
    while not done or len(times[THEIRS]) < LEAST_TURNS:
        for which, run in runs.items():
            dist.barrier()
            before = time.perf_counter()
            run(logits, target)
            took = torch.tensor(1e3 * (time.perf_counter() - before))
            dist.all_reduce(took, dist.ReduceOp.MAX)
            times[which].append(took.item())
        done.fill_(time.monotonic() > begin + seconds)
        dist.broadcast(done, 0)
    for which, record in records.items():
        record |= {**summary_of(times[which]), "speedup": median_ratio(times[THEIRS], times[which])}
    return list(records.values())


def work(rank: int, shape: tuple[int, int], name: str, seconds: float, results) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // RANKS))
    dist.init_process_group("gloo", init_method="env://", rank=rank, world_size=RANKS)
    found = measure(shape, name, seconds)
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def measured(shape: tuple[int, int], name: str, seconds: float) -> list[dict]:
    """The records of a dtype, from new processes."""
    results = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(work, (shape, name, seconds, results), nprocs=RANKS)
    return results.get()


def table(records: list[dict], detail: bool = False) -> Table:
    rows = []
    for record in records:
        sizes = f"{record['ranks']} x ({' x '.join(map(str, record['shape']))}), {record['dtype']}"
        provider = record["provider"] + (f": {said(record)}" if said(record) else "")
        rows.append([sizes, provider, duration(record, detail), number(record.get("speedup"), ".1f")])
    header = ["processes x (positions x classes of each)", "", "ms", "times as fast"]
    return Table(header, rows, 2, "Forward and backward")


EXPLAINED = (
    "Forward and backward of logits whose classes are sharded over processes of this machine, until the last of them "
    "is done. They share its cores and communicate by gloo. `loss_parallel` is "
    "`torch.distributed.tensor.parallel.loss_parallel` with the native loss."
)


def blocks(device: str, result: dict) -> list[Block]:
    return [EXPLAINED, table(result["records"])]


def readme(results: dict[str, dict]) -> list[Block]:
    return [table(results["cpu"]["records"]), EXPLAINED, measured_by(results["cpu"])]


SECTION = Section("vocab_parallel", "Sharded classes", blocks, only="cpu", readme=readme)


def main() -> None:
    arguments = command_line.parse(
        command_line.parser_of(__doc__, "vocab_parallel", "small logits", "dtypes", ("cpu",), SECONDS)
    )
    names = [name for name in DTYPES if re.search(arguments.only, name)]
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29531")
    shape, items = QUICK_SHAPE if arguments.quick else SHAPE, []
    for name in names:
        run = functools.partial(measured, shape, name, arguments.seconds / len(names))
        items.append(Item(name, [fields("", name, shape)], run))
    command_line.measure_all(arguments, items, lambda records: [table(records, detail=True)], lambda record: True)


if __name__ == "__main__":
    main()

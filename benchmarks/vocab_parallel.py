"""Logits whose classes are sharded over processes: `vocab_parallel_cross_entropy` beside PyTorch's `loss_parallel`.

    python -m benchmarks.vocab_parallel [--quick] [--only PATTERN] [--seconds S] [--json FILE]

Four processes of this machine and gloo, which share its cores evenly. Each has the logits of its own classes, and the
same targets. Times are of forward and backward, until the last process is done, medians of turns that the providers
take one after the other; before, their losses and gradients are compared.

Records, a dictionary each: provider, dtype, ranks, shape (of one process), median_ms, min_ms, max_ms, turns, speedup
(over `loss_parallel`, the median of the ratios of neighbouring turns); and, if it is so, what is `wrong`.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel

from cross_entropy_ext.distributed import vocab_parallel_cross_entropy
from cross_entropy_ext.functional import cross_entropy

from . import command_line
from . import records as files
from .values import TOLERANCE

RANKS = 4
SHAPE, QUICK_SHAPE = (2048, 8000), (128, 500)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEAST_TURNS = 5
THEIRS = "loss_parallel"


def providers(mesh: dist.DeviceMesh) -> dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """From local logits and targets the loss, and the gradient of these logits."""

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


def measure(shape: tuple[int, int], name: str, seconds: float) -> list[dict]:
    """On one of the processes, all of which return the same."""
    rank, (rows, classes), dtype = dist.get_rank(), shape, DTYPES[name]
    runs = providers(init_device_mesh("cpu", (RANKS,)))
    random = torch.Generator().manual_seed(rank)
    logits = torch.randn(rows, classes, generator=random).mul_(2).to(dtype).requires_grad_()
    target = torch.randint(RANKS * classes, (rows,), generator=torch.Generator().manual_seed(0))

    records = {which: {"provider": which, "dtype": name, "ranks": RANKS, "shape": list(shape)} for which in runs}
    expected = runs[THEIRS](logits, target)
    for which, run in runs.items():
        for what, found, right in zip(("loss", "gradient"), run(logits, target), expected, strict=True):
            error, largest = (found.double() - right.double()).abs().max(), right.double().abs().max()
            if not error <= 2 * TOLERANCE[dtype] * largest:
                records[which]["wrong"] = f"the {what} differs by {error:.3g}, the largest element is {largest:.3g}"

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
        record |= {"median_ms": statistics.median(times[which]), "min_ms": min(times[which])}
        record |= {"max_ms": max(times[which]), "turns": len(times[which])}
        record["speedup"] = statistics.median(b / a for a, b in zip(times[which], times[THEIRS], strict=True))
    return list(records.values())


def work(rank: int, shape: tuple[int, int], names: list[str], seconds: float, results) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // RANKS))
    dist.init_process_group("gloo", init_method="env://", rank=rank, world_size=RANKS)
    found = [record for name in names for record in measure(shape, name, seconds / len(names))]
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def table(records: list[dict]) -> Table:
    shown = Table(box=box.SIMPLE, title=f"Forward and backward on {RANKS} processes, milliseconds")
    for name in ("dtype", "of each process", "provider", "median", "min", "max", "speedup"):
        shown.add_column(name, justify="left" if name in ("dtype", "provider") else "right")
    for record in records:
        cells = [f"{record[k]:.2f}" for k in ("median_ms", "min_ms", "max_ms", "speedup")]
        if "wrong" in record:
            cells[-1] = f"[red]{record['wrong']}[/]"
        shown.add_row(record["dtype"], "x".join(map(str, record["shape"])), record["provider"], *cells)
    return shown


def main() -> None:
    parser = command_line.parser_of(__doc__, "vocab_parallel", "small logits", "dtypes")
    parser.add_argument("--seconds", type=float, help="for all turns (60, quick 2)")
    arguments = command_line.parse(parser)
    if arguments.device != "cpu":
        parser.error("it measures processes on a CPU")
    seconds = arguments.seconds or (2.0 if arguments.quick else 60.0)
    names = [name for name in DTYPES if re.search(arguments.only, name)]
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29531")
    results = multiprocessing.get_context("spawn").SimpleQueue()
    shape = QUICK_SHAPE if arguments.quick else SHAPE
    multiprocessing.spawn(work, (shape, names, seconds, results), nprocs=RANKS)
    records = results.get()
    path = arguments.json
    files.write(path, "cpu", records, quick=arguments.quick)
    console = Console(width=max(120, Console().width))
    console.print(table(records))
    console.print(f"{path}", highlight=False)


if __name__ == "__main__":
    main()

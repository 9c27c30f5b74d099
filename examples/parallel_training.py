"""Train one small language model on one process, and on two in three ways: the curve is the same.

    python examples/parallel_training.py                                # all of it: starts the others by itself
    torchrun --nproc-per-node 2 examples/parallel_training.py --way ddp # one of them: ddp, tensor or fsdp

Sentences differ in length, so ranks and micro-batches differ in how many tokens they have. A mean of each
would weigh the tokens of a short batch more; what is wanted is one mean over all tokens of a step,

    loss = criterion(hidden, target, denominator=tokens_of_the_step / ranks)

where the denominator is a tensor on the device that nothing waits for. DDP and FSDP average gradients over
the ranks: so it is the tokens of all ranks, divided by their number. With tensor parallelism each process
has the output layer's rows for a part of the vocabulary, and its logits are a DTensor sharded by classes:
the same loss, no context manager.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import stdlib_text
import torch
import torch.distributed as dist
from report import INK, console, figure, print_rows
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from cross_entropy_ext import CrossEntropyLoss, LinearCrossEntropyLoss

SEED = 3
PAD = -100
PROCESSES = 2
# On the difference to one process's loss in any step, in nats: sums are taken in another order.
TOLERANCE = 2e-4

ONE = "one process"
WAYS = {"ddp": "data parallel (DDP)", "tensor": "tensor parallel head (DTensor)", "fsdp": "sharded (FSDP2)"}


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a step."""

    vocabulary: int = 4095  # which two processes cannot share evenly
    width: int = 64
    context: int = 48
    sentences: int = 16  # of a micro-batch, all processes together
    micro_batches: int = 2
    steps: int = 60


QUICK = Shape(vocabulary=511, width=32, context=16, sentences=8, steps=8)


class Model(nn.Module):
    """A causal transformer of one block, whose output layer and loss are one module."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.words = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Parameter(0.02 * torch.randn(shape.context, shape.width))
        self.block = nn.TransformerEncoderLayer(
            shape.width, nhead=4, dim_feedforward=4 * shape.width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(shape.width)
        self.head = LinearCrossEntropyLoss(shape.width, shape.vocabulary, ignore_index=PAD)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(shape.context))

    def hidden(self, words: Tensor) -> Tensor:
        """(N, T, width) for words (N, T)."""
        hidden = self.words(words) + self.places
        return self.norm(self.block(hidden, src_mask=self.mask, is_causal=True))

    def forward(self, words: Tensor, target: Tensor, denominator: Tensor) -> Tensor:
        """What the words (N, T) add to the mean over all tokens of a step."""
        return self.head(self.hidden(words), target, denominator=denominator)


class TensorParallelModel(Model):
    """The same with logits that are sharded by classes: no process has those of the others."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.loss = CrossEntropyLoss(ignore_index=PAD)

    def forward(self, words: Tensor, target: Tensor, denominator: Tensor) -> Tensor:
        logits = self.head.linear(self.hidden(words).flatten(0, 1))
        return self.loss(logits, target.flatten(), denominator=denominator)


def batches(shape: Shape) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """For each step its micro-batches: words and the words after them (N, T). Sentences end early, at random."""
    tokens = torch.tensor(stdlib_text.load(shape.vocabulary).tokens)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(shape.steps):
        micro_batches = []
        for _ in range(shape.micro_batches):
            starts = torch.randint(len(tokens) - shape.context - 1, (shape.sentences, 1), generator=generator)
            windows = tokens[starts + torch.arange(shape.context + 1)].long()
            length = torch.randint(1, shape.context + 1, (shape.sentences, 1), generator=generator)
            target = windows[:, 1:].masked_fill(torch.arange(shape.context) >= length, PAD)
            micro_batches.append((windows[:, :-1], target))
        yield micro_batches


def train(way: str | None, shape: Shape) -> list[float]:
    """The loss of each step; of one process for all, or of this one among others."""
    torch.manual_seed(SEED)  # the same start everywhere
    torch.set_num_threads(1)
    model: nn.Module = TensorParallelModel(shape) if way == "tensor" else Model(shape)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if way else (0, 1)
    if way == "ddp":
        model = DistributedDataParallel(model)
    elif way:
        mesh = init_device_mesh("cpu", (ranks,))
        if way == "tensor":
            parallelize_module(model.head.linear, mesh, ColwiseParallel(use_local_output=False))
        else:
            fully_shard(model.block, mesh=mesh)
            fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    shares_data = way in ("ddp", "fsdp")
    curve = []
    for micro_batches in batches(shape):
        if shares_data:
            micro_batches = [(words[rank::ranks], target[rank::ranks]) for words, target in micro_batches]
        tokens = sum((target != PAD).sum() for _, target in micro_batches).double()
        if shares_data:
            dist.all_reduce(tokens)
            tokens /= ranks  # the gradient is to be the ranks' sum, and they take their mean
        optimizer.zero_grad()
        total = torch.zeros(())
        for words, target in micro_batches:
            loss = model(words, target, tokens)
            loss.backward()
            loss = loss.detach()
            total += loss.full_tensor() if isinstance(loss, DTensor) else loss
        if shares_data:
            dist.all_reduce(total)
            total /= ranks
        optimizer.step()
        curve.append(total.item())
    return curve


def start(way: str, quick: bool, folder: Path) -> list[float]:
    """Train on several processes, as torchrun starts them."""
    file = folder / f"{way}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    command += [__file__, "--way", way, "--curve", str(file), *(["--quick"] if quick else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment)
    return json.loads(file.read_text())


@dataclass(frozen=True)
class Result:
    """Every way's curve, by its name."""

    curves: dict[str, list[float]]

    def difference(self, name: str) -> float:
        """The largest to one process in any step; NaN if any is."""
        pairs = zip(self.curves[name], self.curves[ONE], strict=True)
        return torch.tensor([abs(a - b) for a, b in pairs]).max().item()

    @property
    def equal(self) -> bool:
        return all(self.difference(name) <= TOLERANCE for name in self.curves)


def compare(quick: bool, output: Path) -> Result:
    """Train in every way, print the curves and draw them."""
    shape = QUICK if quick else Shape()
    with tempfile.TemporaryDirectory() as folder:
        curves = {ONE: train(None, shape)}
        for way, name in WAYS.items():
            curves[name] = start(way, quick, Path(folder))
    result = Result(curves)
    rows = {
        name: (f"{curve[0]:.6f}", f"{curve[-1]:.6f}", f"{result.difference(name):.1e}")
        for name, curve in curves.items()
    }
    print_rows(
        f"Loss of {shape.steps} steps, in nats (tolerance {TOLERANCE:.0e})",
        ("", "first", "last", "largest difference"),
        rows,
    )
    with figure(output, "One model, trained in four ways", columns=1) as (_, (axes,)):
        for (name, curve), (style, width) in zip(
            curves.items(), (("-", 6.0), ("-", 2.5), ("--", 2.0), (":", 2.0)), strict=True
        ):
            first = name == ONE
            axes.plot(range(1, len(curve) + 1), curve, style, linewidth=width, label=name, alpha=0.4 if first else 1)
        axes.set_xlabel("step")
        axes.set_ylabel("mean loss over all tokens (nats)", color=INK)
        axes.grid(True)
        axes.legend(frameon=False, fontsize=8.5)
    console.print("All curves are the same." if result.equal else "[red]The curves are DIFFERENT.[/]")
    return result


def main(given: Sequence[str] | None = None) -> Result | None:
    """One way of several processes, or all ways."""
    parser = argparse.ArgumentParser(
        "parallel_training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, in seconds")
    parser.add_argument("--output", type=Path, default=Path("parallel_training.png"), help="the figure")
    parser.add_argument("--way", choices=WAYS, help="this one alone, under torchrun")
    parser.add_argument("--curve", type=Path, help="where it writes the losses")
    arguments = parser.parse_args(given)
    if arguments.way is None:
        return compare(arguments.quick, arguments.output)
    dist.init_process_group("gloo")
    curve = train(arguments.way, QUICK if arguments.quick else Shape())
    if dist.get_rank() == 0:
        console.print(f"{WAYS[arguments.way]}: {curve[0]:.6f} -> {curve[-1]:.6f}", highlight=False)
        if arguments.curve:
            arguments.curve.write_text(json.dumps(curve))
    dist.destroy_process_group()
    return None


if __name__ == "__main__":
    result = main()
    sys.exit(result is not None and not result.equal)

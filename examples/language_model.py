"""Train two language models with PyTorch's cross-entropy loss and with ours, and compare.

Switching a program over is one line,

    from cross_entropy_ext import CrossEntropyLoss    # instead of: from torch.nn import CrossEntropyLoss

and nothing else changes: same arguments, same raw logits, same numbers. Part (a) shows that on a tiny model
of a Shakespeare sonnet. Part (b) shows what it saves where the vocabulary is large, on a model of the source
text of Python's standard library, and what `inplace=True` saves on top of it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import random
import re
import resource
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import report
import stdlib_text
import torch
from report import NATIVE, OURS, OURS_IN_PLACE, console
from torch import Tensor, nn
from tqdm import tqdm

from cross_entropy_ext import CrossEntropyLoss

SEED = 2

# From the same start and on the same data the losses are equal but for rounding: sums are taken in another
# order, and training carries the difference forward. Tolerances are on |loss - PyTorch's loss|, in nats.
SONNET_TOLERANCE = 1e-5
STDLIB_TOLERANCE = 1e-3


def make_loss(name: str) -> nn.Module:
    """The loss function of each column of this comparison."""
    if name == NATIVE:
        return nn.CrossEntropyLoss()
    return CrossEntropyLoss(inplace=name == OURS_IN_PLACE)


# ------------------------------------------------------------------------------------------------------------
# (a) An n-gram model of a sonnet
# ------------------------------------------------------------------------------------------------------------

SONNET_2 = """
When forty winters shall besiege thy brow,
And dig deep trenches in thy beauty's field,
Thy youth's proud livery, so gazed on now,
Will be a tatter'd weed, of small worth held:
Then being ask'd where all thy beauty lies,
Where all the treasure of thy lusty days,
To say, within thine own deep-sunken eyes,
Were an all-eating shame and thriftless praise.
How much more praise deserv'd thy beauty's use,
If thou couldst answer 'This fair child of mine
Shall sum my count and make my old excuse,'
Proving his beauty by succession thine!
This were to be new made when thou art old,
And see thy blood warm when thou feel'st it cold.
"""


class NGramModel(nn.Module):
    """Scores every word as the successor of a few context words."""

    def __init__(self, vocabulary_size: int, context: int = 2, embedding_size: int = 10, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.layers = nn.Sequential(
            nn.Linear(context * embedding_size, hidden), nn.ReLU(), nn.Linear(hidden, vocabulary_size)
        )

    def forward(self, words: Tensor) -> Tensor:
        """Raw logits (N, vocabulary) for context words (N, context)."""
        return self.layers(self.embedding(words).flatten(1))


def train_sonnet(name: str, epochs: int) -> list[float]:
    """Mean loss of each epoch, one SGD step per n-gram."""
    words = re.findall(r"[a-z][a-z'-]*", SONNET_2.lower())
    index = {word: i for i, word in enumerate(sorted(set(words)))}
    windows = torch.tensor([index[word] for word in words]).unfold(0, 3, 1)

    torch.manual_seed(SEED)
    model = NGramModel(len(index))
    loss_function = make_loss(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)

    curve = []
    for _ in tqdm(range(epochs), desc=f"(a) sonnet, {name}", unit="epoch", disable=None):
        total = 0.0
        for window in windows.split(1):
            optimizer.zero_grad()
            loss = loss_function(model(window[:, :2]), window[:, 2])
            loss.backward()
            optimizer.step()
            total += loss.item()
        curve.append(total / len(windows))
    return curve


# ------------------------------------------------------------------------------------------------------------
# (b) A word-level transformer of the standard library's source
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Sizes of model (b) and of its batches."""

    batch: int = 16
    context: int = 64
    vocabulary: int = 32768
    width: int = 96
    blocks: int = 1

    @property
    def positions(self) -> int:
        """Rows of the logits: predictions made per step."""
        return self.batch * self.context

    @property
    def logits_mib(self) -> float:
        """Size of one logits tensor in fp32."""
        return self.positions * self.vocabulary * 4 / 2**20


class CausalModel(nn.Module):
    """A small causal transformer over words."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.words = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Parameter(0.02 * torch.randn(shape.context, shape.width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                shape.width,
                nhead=4,
                dim_feedforward=4 * shape.width,
                dropout=0.0,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(shape.blocks)
        )
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(shape.context))

    def forward(self, words: Tensor) -> Tensor:
        """Raw logits (N * T, vocabulary) for words (N, T)."""
        hidden = self.words(words) + self.places
        for block in self.blocks:
            hidden = block(hidden, src_mask=self.mask, is_causal=True)
        return self.head(self.norm(hidden).flatten(0, 1))


@dataclass(frozen=True)
class Step:
    """What one training step reports: its loss and its times in seconds."""

    loss: float
    loss_forward: float
    loss_backward: float
    whole: float


@dataclass
class Run:
    """All steps of one variant, and its peak memory above the baseline in MiB."""

    steps: list[Step] = field(default_factory=list)
    peak_mib: float = 0.0

    def summary(self, positions: int, warm_up: int) -> report.Summary:
        """Medians over the steps after the warm-up."""
        timed = self.steps[warm_up:]
        return report.Summary(
            losses=[step.loss for step in self.steps],
            forward_ms=1e3 * median(step.loss_forward for step in timed),
            backward_ms=1e3 * median(step.loss_backward for step in timed),
            step_ms=1e3 * median(step.whole for step in timed),
            tokens_per_s=positions / median(step.whole for step in timed),
            peak_mib=self.peak_mib,
        )


def train_step(model: nn.Module, loss_function: nn.Module, optimizer: torch.optim.Optimizer, words: Tensor) -> Step:
    """One ordinary training step with a clock on the loss.

    The backward pass begins with the loss, whose share ends when the logits' gradient arrives at the hook.
    """
    start = time.perf_counter()
    optimizer.zero_grad()
    logits = model(words[:, :-1])
    targets = words[:, 1:].flatten()
    arrivals: list[float] = []
    logits.register_hook(lambda _: arrivals.append(time.perf_counter()))

    before_forward = time.perf_counter()
    loss = loss_function(logits, targets)
    after_forward = time.perf_counter()
    loss.backward()
    optimizer.step()
    end = time.perf_counter()
    return Step(loss.item(), after_forward - before_forward, arrivals[0] - after_forward, end - start)


def worker(connection: Connection, name: str, shape: Shape) -> None:
    """Body of one variant's process: a training step for each batch received, until None comes."""
    torch.manual_seed(SEED)
    model = CausalModel(shape)
    loss_function = make_loss(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)

    baseline, _ = memory_mib()
    while (batch := connection.recv()) is not None:
        connection.send(train_step(model, loss_function, optimizer, torch.tensor(batch)))
    _, peak = memory_mib()
    connection.send(peak - baseline)


def memory_mib() -> tuple[float, float]:
    """Resident memory of this process now, and the most it has ever been.

    On Linux both come from /proc/self/status, as ru_maxrss there may count the process that started this one.
    Elsewhere both are ru_maxrss (bytes on macOS, KiB on other systems): before the first step little has been
    freed, so that the peak so far stands in for what is resident now.
    """
    try:
        status = Path("/proc/self/status").read_text()
        now, peak = (re.search(rf"^{key}:\s*(\d+) kB", status, re.MULTILINE) for key in ("VmRSS", "VmHWM"))
        if now and peak:
            return int(now[1]) / 1024, int(peak[1]) / 1024
    except OSError:
        pass
    unit = 2**20 if sys.platform == "darwin" else 2**10
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return highest, highest


def start_workers(shape: Shape) -> dict[str, Connection]:
    """Start a process for every variant, which keeps their memory apart."""
    # libomp's threads would spin for 200 ms after their work and disturb the process whose turn is next.
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    for name in (NATIVE, OURS, OURS_IN_PLACE):
        connections[name], theirs = context.Pipe()
        context.Process(target=worker, args=(theirs, name, shape), daemon=True).start()
        theirs.close()
    return connections


def train_stdlib(
    connections: dict[str, Connection], corpus: stdlib_text.Corpus, shape: Shape, steps: int
) -> dict[str, Run]:
    """Train all variants on the same batches, one step at a time in turn.

    Taking turns, and beginning each round with another one, lets other load on the machine hit all alike.
    """
    runs = {name: Run() for name in connections}
    draw = random.Random(SEED)
    window = shape.context + 1
    order = list(runs)
    with tqdm(range(steps), desc="(b) stdlib, all three in turn", unit="step", disable=None) as progress:
        for _ in progress:
            starts = [draw.randrange(len(corpus.tokens) - window) for _ in range(shape.batch)]
            batch = [corpus.tokens[start : start + window].tolist() for start in starts]
            for name in order:
                connections[name].send(batch)
                runs[name].steps.append(connections[name].recv())
            order.append(order.pop(0))
            progress.set_postfix(loss=f"{runs[OURS].steps[-1].loss:.3f}")

    for name, run in runs.items():
        connections[name].send(None)
        run.peak_mib = connections[name].recv()
    return runs


# ------------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train two language models with PyTorch's loss and with ours.")
    parser.add_argument("--steps", type=int, help="training steps of model (b), at least 2 (default 30, quick 5)")
    parser.add_argument("--quick", action="store_true", help="a few seconds of everything; times mean little")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "output" / "language_model.png",
        help="where to save the figure (default examples/output/language_model.png)",
    )
    arguments = parser.parse_args()
    if arguments.steps is None:
        arguments.steps = 5 if arguments.quick else 30
    if arguments.steps < 2:
        parser.error("--steps must be at least 2")
    return arguments


def main() -> int:
    """Run both parts; the exit status is 1 if any loss differs by more than its tolerance."""
    arguments = parse_arguments()
    started = time.perf_counter()
    machine = (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, "
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, "
        f"load average {os.getloadavg()[0]:.1f} at the start"
    )
    console.print(machine, highlight=False)

    console.rule("(a) n-gram model of Sonnet 2")
    epochs = 10 if arguments.quick else 100
    sonnet = {name: train_sonnet(name, epochs) for name in (NATIVE, OURS)}
    equal = report.print_curves("epoch", sonnet, every=epochs // 10, tolerance=SONNET_TOLERANCE)

    console.rule("(b) transformer of the standard library's source text")
    shape = Shape(batch=4, width=32) if arguments.quick else Shape()
    connections = start_workers(shape)
    corpus = stdlib_text.load(shape.vocabulary)
    console.print(
        f"{corpus.files:,} files, {len(corpus.tokens):,} tokens, {len(corpus.vocabulary):,} classes "
        f"(covering {corpus.coverage:.2%} of the text). Logits: {shape.batch} x {shape.context} = "
        f"{shape.positions:,} rows x {shape.vocabulary:,} classes in fp32, {shape.logits_mib:.0f} MiB.",
        highlight=False,
    )
    runs = train_stdlib(connections, corpus, shape, arguments.steps)
    warm_up = min(3, arguments.steps // 2)
    summaries = {name: run.summary(shape.positions, warm_up) for name, run in runs.items()}
    losses = {name: summary.losses for name, summary in summaries.items()}
    equal &= report.print_curves("step", losses, every=max(1, arguments.steps // 10), tolerance=STDLIB_TOLERANCE)
    report.print_summary(summaries, timed_steps=arguments.steps - warm_up)

    report.draw(arguments.output, sonnet, summaries, shape.logits_mib, machine)
    console.print(f"Figure: {arguments.output}. Took {time.perf_counter() - started:.0f} s.", highlight=False)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())

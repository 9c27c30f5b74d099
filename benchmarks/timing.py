"""How time is measured: all providers take turns on the same machine, and medians are compared.

On a CPU a turn is 10 ms of calls, or one call that takes longer. In shorter turns each provider would also pay for what
the other leaves behind: caches and address translations, flushed by the memory it gave back.

On a GPU a turn is one call between two events, and finds inputs that the L2 cache does not hold: there are as many sets
of logits as fill it four times, and gradients are kept as long, so that their memory changes too. The device is kept
busy while the host prepares the call, so that the events measure the device alone. (A provider that waits for the
device, as some do for a count of targets, has the host's time in its own.)

A provider that overwrites the logits has logits of its own, made again before each turn, outside of the clock.
"""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .providers import Loss
from .records import first_line
from .shapes import Inputs

TURN = 10e-3  # seconds
LEAST_TURNS = {"cpu": 7, "cuda": 23}
MOST_TURNS = 400
WARM_UP = {"cpu": 0, "cuda": 3}
BUSY = 2_000_000  # cycles, about a millisecond: longer than a host needs to prepare a call

Run = Callable[[Tensor], object]


def step(loss: Loss, inputs: Inputs, backward: bool) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """The loss, and the gradient or None, of logits: what a training step, or an evaluation, does with them."""
    target, options = inputs.target, inputs.options
    upstream = None  # a gradient for each position, where there is a loss for each
    if options.get("reduction") == "none":
        upstream = torch.ones(target.shape, dtype=inputs.logits.dtype, device=target.device)

    def evaluate(logits: Tensor) -> tuple[Tensor, None]:
        with torch.no_grad():
            return loss(logits, target, **options), None

    def train(logits: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(logits, target, **options)
        return value, torch.autograd.grad(value, logits, upstream)[0]

    return train if backward else evaluate


def count_of_sets(logits: Tensor, device: str) -> int:
    """Of logits that a provider gets in turn: one, or on a GPU as many as fill its L2 cache four times."""
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(64, -(-4 * cache // (logits.numel() * logits.element_size()))))


@dataclass
class Timed:
    """A provider among others: what a turn calls, and what its turns took."""

    name: str
    run: Run
    logits: list[Tensor]  # one set, or several in turn; leaves that require a gradient where there is one
    refill: list[Tensor] | None = None  # what they held, where the provider overwrites them
    milliseconds: list[float] = field(default_factory=list)
    error: str = ""

    def restore(self, index: int) -> None:
        if self.refill is not None:
            with torch.no_grad():
                self.logits[index].copy_(self.refill[index])

    def summary(self) -> dict:
        if self.error:
            return {"error": self.error}
        return {
            "median_ms": statistics.median(self.milliseconds),
            "min_ms": min(self.milliseconds),
            "max_ms": max(self.milliseconds),
            "turns": len(self.milliseconds),
        }


def measure(timed: list[Timed], device: str, deadline: float) -> None:
    """Fills in `milliseconds`, until `deadline` on time.monotonic's clock but a few turns at least."""
    turn_of = _cpu_turns(timed) if device == "cpu" else _cuda_turns(timed)
    turns = 0
    while turns < LEAST_TURNS[device] or (time.monotonic() < deadline and turns < MOST_TURNS):
        next(turn_of)
        turns += 1
    for one in timed:
        if device != "cpu":
            one.milliseconds = [start.elapsed_time(end) for start, end in one.milliseconds]
        one.milliseconds = one.milliseconds[WARM_UP[device] :]


def _guarded(one: Timed, function: Callable[[], object]) -> object:
    if one.error:
        return None
    try:
        return function()
    except Exception as error:
        one.error = first_line(error)
        return None


def _cpu_turns(timed: list[Timed]) -> Iterator[None]:
    repeats: dict[str, int] = {}

    def calibrate(one: Timed) -> None:
        one.run(one.logits[0])
        one.restore(0)
        before, count = time.perf_counter(), 0
        while time.perf_counter() - before < TURN:
            one.run(one.logits[0])
            count += 1
        repeats[one.name] = count

    def turn(one: Timed) -> None:
        one.restore(0)
        run, logits, count = one.run, one.logits[0], repeats[one.name]
        before = time.perf_counter()
        for _ in range(count):
            run(logits)
        one.milliseconds.append(1e3 * (time.perf_counter() - before) / count)

    for one in timed:
        _guarded(one, lambda one=one: calibrate(one))
    while True:
        for one in timed:
            _guarded(one, lambda one=one: turn(one))
        yield


def _cuda_turns(timed: list[Timed]) -> Iterator[None]:
    kept = {one.name: collections.deque(maxlen=len(one.logits)) for one in timed}
    turns = 0

    def turn(one: Timed, index: int) -> None:
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(BUSY)
        events[0].record()
        result = one.run(one.logits[index])
        events[1].record()
        kept[one.name].append(None if one.refill is not None else result)
        one.restore(index)
        one.milliseconds.append(events)  # read when the device has finished

    while True:
        for one in timed:
            _guarded(one, lambda one=one, turns=turns: turn(one, turns % len(one.logits)))
        torch.cuda.synchronize()
        turns += 1
        yield

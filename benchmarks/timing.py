"""How time is measured: all providers take turns on the same machine, and medians are compared.

On a CPU a turn is 10 ms of calls, or one call that takes longer. In shorter turns each provider would also pay for what
the other leaves behind: caches and address translations, flushed by the memory it gave back.

On a GPU a turn is one call between two events, and finds inputs that the L2 cache does not hold: there are as many sets
of logits as fill it four times, every call takes the next one, and gradients are kept as long, so that their memory
changes too. The device is kept busy while the host prepares the call, so that the events measure the device alone. (A
provider that waits for the device, as some do for a count of targets, has the host's time in its own.)

A provider that overwrites the logits has a copy of them, made again after each turn, outside of the clock. A backward
alone has its forward before each turn, outside of the clock as well.
"""

from __future__ import annotations

import collections
import itertools
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
Made = tuple[Tensor, Tensor]  # logits, and their loss


class _Made(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anything: Tensor, logits: Tensor) -> Tensor:
        return logits.data

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None]:
        return None, None


def as_of_a_layer(logits: Tensor) -> Tensor:
    """The same memory as the result of a graph, as a model has it: a leaf is nothing that a loss overwrites."""
    return _Made.apply(torch.zeros((), device=logits.device, requires_grad=True), logits)


def step(loss: Loss, inputs: Inputs, backward: bool) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """The loss, and the gradient or None, of logits: what a training step, or an evaluation, does with them."""
    forward_of, backward_of = halves(loss, inputs)

    def evaluate(logits: Tensor) -> tuple[Tensor, None]:
        with torch.no_grad():
            return loss(logits, inputs.target, **inputs.options), None

    return (lambda logits: backward_of(forward_of(logits))) if backward else evaluate


def halves(loss: Loss, inputs: Inputs) -> tuple[Callable[[Tensor], Made], Callable[[Made], tuple[Tensor, Tensor]]]:
    """A training step in two: from the logits to the loss, and from there to loss and gradient."""
    target, options = inputs.target, inputs.options
    upstream = None  # a gradient for each position, where there is a loss for each
    if options.get("reduction") == "none":
        upstream = torch.ones(target.shape, dtype=inputs.logits.dtype, device=target.device)

    def forward(logits: Tensor) -> Made:
        return logits, loss(logits, target, **options)

    def backward(made: Made) -> tuple[Tensor, Tensor]:
        logits, value = made
        return value, torch.autograd.grad(value, logits, upstream)[0]

    return forward, backward


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
    prepare: Callable[[Tensor], object] | None = None  # on a GPU: makes of the logits what is run, outside of the clock
    milliseconds: list[float] = field(default_factory=list)
    error: str = ""

    def prepared(self, index: int) -> object:
        return self.prepare(self.logits[index]) if self.prepare else self.logits[index]

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
    # One set fills the cache more than four times already, and several gradients of it might not fit the device.
    kept = {one.name: collections.deque(maxlen=len(one.logits) if len(one.logits) > 1 else 0) for one in timed}
    calls = itertools.count()

    def turn(one: Timed) -> None:
        index = next(calls) % len(one.logits)  # not the one that the provider before has left in the cache
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        try:
            found = one.prepared(index)
            torch.cuda._sleep(BUSY)
            events[0].record()
            result = one.run(found)
            events[1].record()
        finally:  # others may have the same copy
            one.restore(index)
        kept[one.name].append(None if one.refill is not None else result)
        one.milliseconds.append(events)  # read when the device has finished

    while True:
        for one in timed:
            _guarded(one, lambda one=one: turn(one))
        torch.cuda.synchronize()
        yield

"""How time is measured: all providers take turns on the same machine, and medians are compared.

On a CPU a turn is 10 ms of calls, or one longer call. In shorter turns each provider would also pay for the state that
the last one leaves: caches and address translations, flushed by the memory that it gave back.

On a GPU a turn is one call between two events, on inputs that the L2 cache does not hold. There are enough sets of
logits to fill it four times; each call takes the next one, and gradients are kept as long, so that their memory changes
too. The device is kept busy while the host prepares the call, so that the events measure the device alone. (The time of
a provider that waits for the device, for example to count targets, includes the host's.)

A provider that overwrites the logits gets a copy of them, restored after each turn. A backward alone has its forward
before each turn. Neither is inside the clock.
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
from .records import reason
from .shapes import Case, Inputs, make_logits

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
    """The same memory as the result of a graph, as in a model: a loss does not overwrite a leaf."""
    return _Made.apply(torch.zeros((), device=logits.device, requires_grad=True), logits)


def step(loss: Loss, inputs: Inputs, backward: bool) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """A training step, from logits to the loss and its gradient; or an evaluation, whose gradient is None."""
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


def sets_of_logits(case: Case, inputs: Inputs, device: str) -> list[Tensor]:
    """The inputs' logits, and on a GPU more of them, as many as `count_of_sets` says."""
    shape, count = tuple(inputs.logits.shape), count_of_sets(inputs.logits, device)
    return [inputs.logits, *(make_logits(case, shape, device, seed) for seed in range(2, count + 1))]


def count_of_sets(logits: Tensor, device: str) -> int:
    """How many sets of logits a provider gets in turn: one, or on a GPU as many as fill its L2 cache four times."""
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(64, -(-4 * cache // (logits.numel() * logits.element_size()))))


@dataclass
class Timed:
    """A provider among others: the function that a turn calls, and the times of its turns."""

    name: str
    run: Run
    logits: list[Tensor]  # one set, or several in turn; leaves that require a gradient if there is a backward
    refill: list[Tensor] | None = None  # their values, if the provider overwrites them
    prepare: Callable[[Tensor], object] | None = None  # on a GPU: makes the argument of `run`, outside the clock
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
        return summary_of(self.milliseconds)


def summary_of(milliseconds: list[float]) -> dict:
    return {
        "median_ms": statistics.median(milliseconds),
        "min_ms": min(milliseconds),
        "max_ms": max(milliseconds),
        "turns": len(milliseconds),
    }


def median_ratio(mine: list[float], others: list[float]) -> float:
    """The median of the ratios of neighbouring turns."""
    return statistics.median(a / b for a, b in zip(mine, others, strict=True))


def copying(sets: list[Tensor]) -> Timed:
    """Copies the logits, one read and one write."""
    return Timed("copy", torch.empty_like(sets[0]).copy_, [logits.detach() for logits in sets])


def add_copies(records: dict[str, dict]) -> list[dict]:
    """The records by provider, with `copies`: their times in units of the copy's."""
    unit = records["copy"].get("median_ms")
    for record in records.values():
        if unit and "median_ms" in record:
            record["copies"] = record["median_ms"] / unit
    return list(records.values())


def measure(timed: list[Timed], device: str, deadline: float) -> None:
    """Takes turns until `deadline` on time.monotonic's clock, but a few at least, and fills in `milliseconds`."""
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
        one.error = reason(error)
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
        index = next(calls) % len(one.logits)  # never the set that the last provider left in the cache
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        try:
            found = one.prepared(index)
            torch.cuda._sleep(BUSY)
            events[0].record()
            result = one.run(found)
            events[1].record()
        finally:  # other providers may use the same copy
            one.restore(index)
        kept[one.name].append(None if one.refill is not None else result)
        one.milliseconds.append(events)  # measure() reads them when the device has finished

    while True:
        for one in timed:
            _guarded(one, lambda one=one: turn(one))
        torch.cuda.synchronize()
        yield

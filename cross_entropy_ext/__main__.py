"""`python -m cross_entropy_ext`: how this copy was built, whether it is right, and how fast it is here.

The check takes a few seconds. It holds values and gradients against the native loss computed in float64:
the error may be at most the native loss's own in the same dtype, plus one rounding. If it is more, the
exit status is 1.
"""

import sys
from collections.abc import Callable, Iterable
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as native

from . import build_info
from .functional import cross_entropy

Options = dict[str, Any]


def cases() -> Iterable[tuple[str, Tensor, Tensor, Options]]:
    """Name, logits, target and options: every dtype, layout and kind of target, and the options mixed in."""
    random = torch.Generator().manual_seed(0)

    def logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
        return (scale * torch.randn(shape, generator=random)).to(dtype)

    def index(classes: int, *shape: int, ignored: float = 0.0) -> Tensor:
        target = torch.randint(classes, shape, generator=random)
        return target.masked_fill(torch.rand(shape, generator=random) < ignored, -100)

    def soft(*shape: int) -> Tensor:
        return logits(*shape).softmax(dim=1)

    def weight(classes: int) -> Tensor:
        return torch.rand(classes, generator=random) + 0.5

    yield "float32", logits(129, 5003), index(5003, 129), {}
    yield "float64", logits(65, 1000, dtype=torch.float64), index(1000, 65), {}
    yield "bfloat16", logits(64, 32000, dtype=torch.bfloat16), index(32000, 64), {}
    yield "float16", logits(64, 4097, dtype=torch.float16), index(4097, 64), {"reduction": "none"}
    yield "confident", logits(64, 1000, scale=30.0), index(1000, 64), {"reduction": "none"}
    yield "one row", logits(1000), index(1000), {}
    yield "few classes", logits(1000, 10), index(10, 1000, ignored=0.3), {"reduction": "sum"}
    yield "weights, ignored rows", logits(256, 777), index(777, 256, ignored=0.3), {"weight": weight(777)}
    yield "label smoothing", logits(64, 5000), index(5000, 64, ignored=0.1), {"label_smoothing": 0.1}
    yield "soft targets", logits(64, 1000), soft(64, 1000), {"label_smoothing": 0.1, "weight": weight(1000)}
    yield "NCHW", logits(2, 19, 65, 63), index(19, 2, 65, 63, ignored=0.1), {"weight": weight(19)}
    yield (
        "channels last",
        logits(2, 19, 65, 63).to(memory_format=torch.channels_last),
        index(19, 2, 65, 63),
        {"label_smoothing": 0.1},
    )
    yield "transposed (B, V, T)", logits(4, 33, 1500).transpose(1, 2), index(1500, 4, 33), {}
    yield "slice of rows", logits(64, 3000)[::2, 7:2500], index(2493, 32), {"reduction": "none"}


def loss_and_gradient(
    loss: Callable[..., Tensor], logits: Tensor, target: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    value = loss(logits, target, **options)
    # A different factor for every position, so that none can be taken for another's.
    factor = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype, device=value.device).view_as(value)
    return value.detach(), torch.autograd.grad(value, logits, factor)[0]


def in_float64(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def wrong(logits: Tensor, target: Tensor, options: Options) -> str | None:
    """What is wrong with our result for this case, if anything."""
    exact = loss_and_gradient(
        native, in_float64(logits), in_float64(target), {name: in_float64(x) for name, x in options.items()}
    )
    theirs = loss_and_gradient(native, logits, target, options)
    ours = loss_and_gradient(cross_entropy, logits, target, options)
    for what, x, y, reference in zip(("loss", "gradient"), ours, theirs, exact, strict=True):
        if x.dtype != y.dtype or x.shape != y.shape:
            return f"{what} is {x.dtype} {tuple(x.shape)}, native's is {y.dtype} {tuple(y.shape)}"
        error, native_error = ((z.double() - reference).abs().max().item() for z in (x, y))
        # One rounding of the result, and the few that the float64 reference itself has gone through.
        rounding = torch.finfo(x.dtype).eps + 8 * torch.finfo(torch.float64).eps
        if not error <= native_error + rounding * reference.abs().max().item():
            return f"{what} is off by {error:.1e}, native by {native_error:.1e}"
    return None


def seconds(loss: Callable[..., Tensor], logits: Tensor, target: Tensor) -> float:
    def synchronize() -> None:
        if logits.is_cuda:
            torch.cuda.synchronize()

    synchronize()
    start = perf_counter()
    loss_and_gradient(loss, logits, target, {})
    synchronize()
    return perf_counter() - start


def speed(device: str) -> str:
    """Medians of interleaved runs, so that whatever else the machine does meets both alike."""
    logits = torch.randn(512, 32000, device=device)
    target = torch.randint(32000, (512,), device=device)
    runs = [(seconds(native, logits, target), seconds(cross_entropy, logits, target)) for _ in range(6)]
    theirs, ours = (1e3 * median(times) for times in zip(*runs[1:], strict=True))  # the first run warms up
    return f"{ours:.1f} ms, native {theirs:.1f} ms: {theirs / ours:.1f} times as fast"


def main() -> int:
    info = build_info()
    width = max(map(len, info))
    for name, value in info.items():
        print(f"{name:{width}}  {value}")

    devices = ["cpu"]
    if info["cuda_archs"] is not None and torch.cuda.is_available():
        devices.append("cuda")
    failures = 0
    for device in devices:
        print(f"\nvalues and gradients on {device}, against the native loss in float64:")
        for name, logits, target, options in cases():
            on_device = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in options.items()}
            problem = wrong(logits.to(device), target.to(device), on_device)
            failures += problem is not None
            print(f"  {name:24}{problem or 'ok'}")
        print(f"forward and backward, 512 x 32000 float32 on {device}: {speed(device)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

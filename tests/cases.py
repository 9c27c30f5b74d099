"""What the values are checked on, and why each is there.
 A `Case` is a shape of the logits and a way to lay them out in memory; an `Objective` is a target and
options. The tests take the product with the dtypes. Whatever lies in a storage around the view is poison
(NaN, or a class that does not exist), so that a read outside the view shows in the values, and `oracle.check`
compares whole storages, so that a write outside shows too.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def generator(*key: object) -> torch.Generator:
    """Every case has its own numbers, the same in every run, however the tests are chosen and ordered."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def place(
    value: Tensor,
    *,
    order: Sequence[int] | None = None,
    step: dict[int, int] | None = None,
    margin: dict[int, int] | None = None,
    offset: int = 0,
) -> Tensor:
    """A view equal to 'value': dimensions stored in 'order' (outermost first), every 'step'-th element of a
    dimension, 'margin' elements cut off at both its ends, the storage starting 'offset' elements late;
    everything around it poison."""
    order = list(order) if order is not None else list(range(value.dim()))
    step, margin = step or {}, margin or {}
    sizes = [value.size(d) * step.get(d, 1) + 2 * margin.get(d, 0) for d in order]
    poison = float("nan") if value.is_floating_point() else torch.iinfo(value.dtype).max
    view = torch.full((offset + prod(sizes) + 1,), poison, dtype=value.dtype)[offset : offset + prod(sizes)].view(sizes)
    for position, d in enumerate(order):
        view = view.narrow(position, margin.get(d, 0), value.size(d) * step.get(d, 1))
        view = view[(slice(None),) * position + (slice(None, None, step.get(d, 1)),)]
    view = view.permute([order.index(d) for d in range(value.dim())])
    return view.copy_(value)


def expand(value: Tensor, *dimensions: int) -> Tensor:
    """'value' with its first slice repeated along 'dimensions', by strides of 0."""
    small = value
    for d in dimensions:
        small = small.narrow(d, 0, 1)
    return small.clone(memory_format=torch.contiguous_format).expand_as(value)


def negated(value: Tensor) -> Tensor:
    """A view with the negative bit set, as the imaginary part of a conjugate has it: its bytes hold
    -value."""
    return torch._neg_view(-value)


@dataclass(frozen=True)
class Case:
    id: str
    reason: str
    shape: tuple[int, ...]
    layout: Callable[[Tensor], Tensor] = Tensor.contiguous

    def logits(self, dtype: torch.dtype, spread: float = 3.0) -> Tensor:
        values = torch.randn(self.shape, generator=generator(self.id, dtype), dtype=torch.double) * spread
        return self.layout(values.to(dtype))


@dataclass(frozen=True)
class Objective:
    id: str
    reason: str
    reduction: str
    soft: bool = False
    weighted: bool = False
    label_smoothing: float = 0.0
    ignored: bool = False

    def target(self, logits: Tensor, key: object) -> Tensor:
        random = generator(self.id, key)
        axis = 1 if logits.dim() > 1 else 0
        if self.soft:
            return torch.randn(logits.shape, generator=random, dtype=torch.double).softmax(axis).to(logits.dtype)
        positions = [size for d, size in enumerate(logits.shape) if d != axis]
        target = torch.randint(max(logits.size(axis), 1), positions, generator=random)
        if self.ignored:
            target[torch.rand(positions, generator=random) < 0.3] = -100
        return target

    def weight(self, logits: Tensor, key: object) -> Tensor | None:
        if not self.weighted:
            return None
        classes = logits.size(1 if logits.dim() > 1 else 0)
        return (0.25 + torch.rand(classes, generator=generator(key), dtype=torch.double)).to(logits.dtype)

    def options(self) -> dict[str, object]:
        return {"reduction": self.reduction, "label_smoothing": self.label_smoothing}


OBJECTIVES = [
    Objective("index-mean", "what nearly everyone calls, with ignored rows", "mean", ignored=True),
    Objective("index-none", "one loss and one grad_output per position", "none"),
    Objective(
        "smoothed-weighted-mean",
        "every term of a_c at once, and the weighted denominator, which PyTorch's own samples never combine",
        "mean",
        weighted=True,
        label_smoothing=0.1,
        ignored=True,
    ),
    Objective(
        "soft-sum",
        "probabilities: a second operand as large as the logits, with a gradient",
        "sum",
        soft=True,
    ),
    Objective(
        "soft-weighted-smoothed-none",
        "probabilities with gradients to input, target and weight",
        "none",
        soft=True,
        weighted=True,
        label_smoothing=0.1,
    ),
]


def class_counts() -> list[Case]:
    reasons = {
        1: "one class: softmax is 1, loss and gradient are exactly 0",
        2: "two classes: fewer than any vector holds",
        3: "odd and smaller than every vector",
        7: "one less than 8 fp32 in AVX2",
        8: "exactly one AVX2 vector of fp32, AVX-512 of fp64",
        9: "one AVX2 vector and one left over",
        15: "one less than 16 fp32 in AVX-512",
        16: "exactly one AVX-512 vector of fp32",
        17: "one AVX-512 vector and one left over",
        31: "one less than 32 halves in AVX-512",
        32: "exactly one AVX-512 vector of halves",
        33: "one vector of halves and one left over",
        63: "one less than four vectors: an unrolled loop and all of its tail",
        64: "exactly four vectors, no tail",
        65: "four vectors and one",
        127: "int8's last class index",
        128: "one more class than int8 can name",
        129: "eight vectors and one",
        255: "uint8's last class index",
        257: "sixteen vectors and one",
        1000: "ImageNet: not a multiple of 16",
        1023: "a block of 1024 less one",
        1025: "a block of 1024 and one",
        2047: "a block of 2048 less one",
        2048: "exactly a block of 2048",
        2049: "a block of 2048 and one",
        4097: "past 4096 elements: past 16 KiB of fp32",
        5000: "several blocks and a ragged rest",
        32000: "a language model's vocabulary: a row past the first-level cache",
        65537: "past 16 bits",
    }
    return [Case(f"classes-{c}", reason, (2 if c > 4096 else 3, c)) for c, reason in reasons.items()]


def row_counts() -> list[Case]:
    reasons = {
        0: "no rows: a mean over nothing",
        1: "one row: nothing to share out",
        2: "fewer rows than threads or vector lanes",
        7: "an odd number of rows",
        100: "more rows than one piece of work",
        1031: "a prime number of rows, several pieces of work",
    }
    return [Case(f"rows-{n}", reason, (n, 19)) for n, reason in reasons.items()]


def inner_sizes() -> list[Case]:
    reasons = {
        0: "no positions though there are rows",
        1: "class stride 1 in disguise: (N, C, 1)",
        2: "fewer positions than a vector",
        3: "odd, smaller than a vector",
        15: "a vector of fp32 less one",
        16: "exactly a vector of fp32",
        17: "a vector of fp32 and one",
        31: "a vector of halves less one",
        63: "a cache line of halves twice, less one",
        127: "a tile of 128 less one",
        128: "exactly a tile of 128",
        129: "a tile of 128 and one",
        1000: "many tiles and a ragged rest",
    }
    cases = [Case(f"inner-{d}", reason, (2, 5, d)) for d, reason in reasons.items()]
    cases.append(
        Case(
            "inner-wide",
            "many classes, strided, with a ragged inner size: tiles in both directions",
            (2, 260, 37),
        )
    )
    return cases


def ranks() -> list[Case]:
    return [
        Case("rank-1", "no batch dimension: classes are dimension 0", (11,)),
        Case("rank-1-single", "no batch dimension and one class", (1,)),
        Case("rank-3", "a sequence: (N, C, d)", (2, 5, 3)),
        Case("rank-4", "an image: (N, C, H, W)", (2, 3, 4, 5)),
        Case("rank-5", "a volume: (N, C, D, H, W)", (2, 3, 4, 5, 6)),
        Case("rank-6", "more dimensions than any native kernel has", (2, 3, 2, 3, 1, 4)),
        Case(
            "rank-10",
            "as many as nobody uses: every size must be found by arithmetic",
            (2, 3, 1, 2, 1, 3, 2, 1, 1, 2),
        ),
        Case("rank-4-no-rows", "an empty batch of images", (0, 3, 4, 5)),
        Case("rank-4-no-width", "images of width 0", (2, 3, 4, 0)),
        Case("rank-4-one-class", "one class per pixel", (2, 1, 3, 4)),
        Case("rank-4-one-position", "sizes 1 everywhere: strides without a meaning", (1, 3, 1, 1)),
    ]


def layouts() -> list[Case]:
    wide, sequence, image, volume = (5, 37), (3, 21, 20), (3, 7, 6, 10), (2, 5, 3, 4, 6)
    return [
        Case(
            "row-slice",
            "columns cut from a wider matrix: rows not adjacent, poison between",
            wide,
            lambda v: place(v, margin={1: 3}),
        ),
        Case("class-step", "every other column: class stride 2", wide, lambda v: place(v, step={1: 2})),
        Case("row-step", "every other row", wide, lambda v: place(v, step={0: 2})),
        Case("both-steps", "no stride is 1", wide, lambda v: place(v, step={0: 3, 1: 2}, margin={1: 1})),
        Case(
            "transposed",
            "a (C, N) matrix seen as (N, C): classes strided",
            wide,
            lambda v: place(v, order=(1, 0)),
        ),
        Case("misaligned", "starts one element off: no vector is aligned", wide, lambda v: place(v, offset=1)),
        Case(
            "misaligned-rows",
            "an odd row pitch: every row is aligned differently",
            (9, 64),
            lambda v: place(v, margin={1: 1}, offset=1),
        ),
        Case("expanded-batch", "the same row for every sample: batch stride 0", wide, lambda v: expand(v, 0)),
        Case("expanded-classes", "one logit for all classes: class stride 0", wide, lambda v: expand(v, 1)),
        Case("expanded-both", "one number: all strides 0", wide, lambda v: expand(v, 0, 1)),
        Case("negated", "the negative bit set: the bytes hold -x", wide, negated),
        Case("vector-step", "a (C,) input with stride 2", (11,), lambda v: place(v, step={0: 2}, offset=1)),
        Case(
            "sequence-last",
            "(B, T, V) logits transposed to (B, V, T): class stride 1",
            sequence,
            lambda v: place(v, order=(0, 2, 1)),
        ),
        Case(
            "sequence-shifted",
            "a language model's logits[:, :-1].transpose(1, 2): positions cut off, class stride 1",
            sequence,
            lambda v: place(v, order=(0, 2, 1), margin={2: 1}),
        ),
        Case(
            "sequence-time-first",
            "(T, B, V) permuted to (B, V, T)",
            sequence,
            lambda v: place(v, order=(2, 0, 1)),
        ),
        Case(
            "sequence-class-first",
            "(V, B, T) permuted to (B, V, T): classes outermost",
            sequence,
            lambda v: place(v, order=(1, 0, 2)),
        ),
        Case(
            "sequence-batch-last",
            "(V, T, B): the batch has stride 1",
            sequence,
            lambda v: place(v, order=(1, 2, 0)),
        ),
        Case("sequence-misaligned", "inner stride 1, one element off", sequence, lambda v: place(v, offset=1)),
        Case(
            "channels-last",
            "channels_last: class stride 1 under three dimensions",
            image,
            lambda v: place(v, order=(0, 2, 3, 1)),
        ),
        Case(
            "channels-last-format",
            "channels_last as PyTorch makes it",
            image,
            lambda v: v.contiguous(memory_format=torch.channels_last),
        ),
        Case(
            "cropped",
            "a cropped image: rows not adjacent, poison between",
            image,
            lambda v: place(v, margin={2: 1, 3: 2}),
        ),
        Case(
            "cropped-channels-last",
            "a cropped channels_last image",
            image,
            lambda v: place(v, order=(0, 2, 3, 1), margin={2: 1, 3: 2}),
        ),
        Case(
            "channels-last-slice",
            "some channels of a channels_last image",
            image,
            lambda v: place(v, order=(0, 2, 3, 1), margin={1: 3}),
        ),
        Case("width-step", "every other pixel: inner stride 2", image, lambda v: place(v, step={3: 2})),
        Case(
            "image-transposed",
            "height and width exchanged: inner stride is not the last",
            image,
            lambda v: place(v, order=(0, 1, 3, 2)),
        ),
        Case("image-batch-last", "(C, H, W, N)", image, lambda v: place(v, order=(1, 2, 3, 0))),
        Case(
            "expanded-image",
            "one pixel for the whole image: inner strides 0",
            image,
            lambda v: expand(v, 2, 3),
        ),
        Case(
            "expanded-width",
            "one column repeated: only the innermost stride is 0",
            image,
            lambda v: expand(v, 3),
        ),
        Case(
            "channels-last-3d",
            "channels_last_3d",
            volume,
            lambda v: v.contiguous(memory_format=torch.channels_last_3d),
        ),
        Case(
            "permuted-5d",
            "five dimensions in an order no format has",
            volume,
            lambda v: place(v, order=(3, 1, 4, 0, 2)),
        ),
        Case(
            "permuted-5d-steps",
            "the same with steps and margins: nothing collapses",
            volume,
            lambda v: place(v, order=(3, 1, 4, 0, 2), step={4: 2, 0: 2}, margin={2: 1, 1: 1}, offset=1),
        ),
    ]


CASES = class_counts() + row_counts() + inner_sizes() + ranks() + layouts()

# Layouts of an index target (and, with the classes added, of probabilities) against those of an image's
# logits.
IMAGE_LAYOUTS = {
    "contiguous": Tensor.contiguous,
    "transposed": lambda v: place(v, order=(*range(v.dim() - 2), v.dim() - 1, v.dim() - 2)),
    "cropped": lambda v: place(v, margin={v.dim() - 1: 2, v.dim() - 2: 1}),
    "step": lambda v: place(v, step={v.dim() - 1: 2}),
    "misaligned": lambda v: place(v, offset=1),
    "expanded": lambda v: expand(v, v.dim() - 1),
    "expanded-batch": lambda v: expand(v, 0),
}


def numbered(
    reduction: int = 1, ignore_index: int = -100, label_smoothing: float = 0.0, loss_dtype: int = 6
) -> tuple[list[int], list[float]]:
    """The options of the plain loss as the private operators take them; `loss_dtype` is an at::ScalarType."""
    return [reduction, ignore_index, loss_dtype, 0, 0, 0], [label_smoothing, 0.0, 0.0, 1.0, 1.0, 1.0]


def grad_output_for(logits: Tensor, reduction: str, key: object) -> Tensor:
    """Neither one nor constant: a missing or misplaced factor shows."""
    positions = [size for d, size in enumerate(logits.shape) if d != (1 if logits.dim() > 1 else 0)]
    return torch.randn(positions if reduction == "none" else (), generator=generator("grad_output", key))

"""The inputs that are measured, named after what they come from. A new one is a line in CASES.

A shape is (N, C) or (N, C, d1, ..., dK): positions and classes as they occur in training, on a CPU smaller where the
native loss would take seconds. The layout says how it lies in memory:

* `contiguous`: as torch.empty(shape) does;
* `channels_last`: classes are neighbours, as convolutions like it;
* `transposed`: a language or speech model's (B, T, V), passed as logits.transpose(1, 2), so classes are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

Shape = tuple[int, ...]
FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    name: str
    cpu: Shape | None = None
    cuda: Shape | None = None
    quick: Shape | None = None  # where it has one, it is part of --quick
    dtype: torch.dtype = FP32
    layout: str = "contiguous"
    target: str = "index"  # or "probabilities"
    ignored: float = 0.0  # share of the targets
    ignore_index: int = -100
    weighted: bool = False
    label_smoothing: float = 0.0
    reduction: str = "mean"

    def shape(self, device: str, quick: bool = False) -> Shape | None:
        return self.quick if quick else getattr(self, device)

    @property
    def options(self) -> dict:
        """The arguments of the loss that are not its default, but for the weights, which are a tensor."""
        found = {"ignore_index": self.ignore_index} if self.ignore_index != -100 else {}
        if self.label_smoothing:
            found["label_smoothing"] = self.label_smoothing
        if self.reduction != "mean":
            found["reduction"] = self.reduction
        return found

    def fields(self, shape: Shape) -> dict:
        """What a record says of its case."""
        options = [f"{name}={value}" for name, value in self.options.items()]
        options += ["weight"] * self.weighted + [f"{self.ignored:.0%} ignored"] * bool(self.ignored)
        return {
            "case": self.name,
            "shape": list(shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": self.layout,
            "target": self.target,
            "options": ", ".join(options),
        }


@dataclass
class Inputs:
    """The arguments of one loss."""

    logits: Tensor
    target: Tensor
    options: dict = field(default_factory=dict)  # as keyword arguments, with the weights

    @property
    def positions(self) -> int:
        return self.logits.numel() // self.logits.size(1)


def make_logits(case: Case, shape: Shape, device: str, seed: int = 0) -> Tensor:
    """Normal with a standard deviation of 3, as of a model that has begun to learn."""
    generator = torch.Generator(device).manual_seed(seed)
    if case.layout == "transposed":
        stored = (shape[0], *shape[2:], shape[1])
        values = torch.empty(stored, dtype=case.dtype, device=device).normal_(0, 3, generator=generator)
        return values.movedim(-1, 1)
    values = torch.empty(shape, dtype=case.dtype, device=device).normal_(0, 3, generator=generator)
    if case.layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    return values


def make_inputs(case: Case, shape: Shape, device: str) -> Inputs:
    logits = make_logits(case, shape, device)
    generator = torch.Generator(device).manual_seed(1)
    positions = (shape[0], *shape[2:])
    if case.target == "probabilities":
        values = torch.empty(shape, device=device).normal_(generator=generator)
        target = values.softmax(1).to(case.dtype)
    else:
        target = torch.randint(shape[1], positions, generator=generator, device=device)
        if case.ignored:
            target[torch.rand(positions, generator=generator, device=device) < case.ignored] = case.ignore_index
    options = case.options
    if case.weighted:
        options["weight"] = torch.rand(shape[1], generator=generator, device=device).to(case.dtype) + 0.5
    return Inputs(logits, target, options)


# Language models: N tokens and the vocabulary of the model's name. Llama 2's is also Mistral's and T5's size; its cases
# show what options cost, a distillation's probabilities among them.
GPT2, LLAMA2, LLAMA3, GEMMA, GEMMA3, BERT = 50_257, 32_000, 128_256, 256_000, 262_144, 30_522

CASES = [
    Case("GPT-2", (1024, GPT2), (8192, GPT2), (64, GPT2)),
    Case("GPT-2, bfloat16", (1024, GPT2), (8192, GPT2), dtype=BF16),
    Case("GPT-2, transposed", (8, GPT2, 128), (8, GPT2, 1024), (4, GPT2, 16), layout="transposed"),
    Case("GPT-2, reduction none", (1024, GPT2), (8192, GPT2), reduction="none"),
    Case("Llama 2", (2048, LLAMA2)),
    Case("Llama 2, bfloat16", (2048, LLAMA2), (8192, LLAMA2), (64, LLAMA2), dtype=BF16),
    Case("Llama 2, label smoothing", (2048, LLAMA2), label_smoothing=0.1),
    Case("Llama 2, probabilities", (1024, LLAMA2), target="probabilities"),
    Case("Llama 2, class weights", (2048, LLAMA2), weighted=True),
    Case("Llama 2, 30% ignored", (2048, LLAMA2), ignored=0.3),
    Case("Llama 2, bfloat16, label smoothing", (2048, LLAMA2), (8192, LLAMA2), dtype=BF16, label_smoothing=0.1),
    Case("Llama 2, bfloat16, probabilities", (1024, LLAMA2), (8192, LLAMA2), dtype=BF16, target="probabilities"),
    Case("Llama 2, bfloat16, class weights", (2048, LLAMA2), (8192, LLAMA2), dtype=BF16, weighted=True),
    Case("Llama 2, bfloat16, 30% ignored", (2048, LLAMA2), (8192, LLAMA2), dtype=BF16, ignored=0.3),
    Case("Llama 3", (512, LLAMA3)),
    Case("Llama 3, bfloat16", (512, LLAMA3), (8192, LLAMA3), dtype=BF16),
    Case("Gemma, bfloat16", (256, GEMMA), (4096, GEMMA), dtype=BF16),
    Case("Gemma 3, bfloat16", cuda=(4096, GEMMA3), dtype=BF16),
    Case("8 billion logits, bfloat16", cuda=(65_536, 131_072), dtype=BF16),
    Case("BERT, 85% ignored", (2048, BERT), (8192, BERT), (64, BERT), ignored=0.85),
    # A codebook of images instead of a vocabulary.
    Case("VAR", (2048, 4096), (16_384, 4096), (256, 4096)),
    Case("VAR, bfloat16", (2048, 4096), (16_384, 4096), dtype=BF16),
    # Classifiers of images: a batch, or on a GPU as many as keep it busy.
    Case("ImageNet", (256, 1000), (65_536, 1000), (256, 1000)),
    Case("ImageNet, bfloat16", (256, 1000), (65_536, 1000), dtype=BF16),
    Case("ImageNet, label smoothing", (256, 1000), label_smoothing=0.1),
    Case("ImageNet, MixUp probabilities", (256, 1000), (65_536, 1000), (256, 1000), target="probabilities"),
    Case("ImageNet-21k", (256, 21_841), (8192, 21_841)),
    Case("MNIST", (64, 10), quick=(64, 10)),
    Case("MNIST, the whole set", (60_000, 10), (262_144, 10), (6000, 10)),
    # Segmentation at the sizes of their crops; Cityscapes marks what belongs to no class by 255.
    Case("Cityscapes", (4, 19, 512, 1024), (8, 19, 512, 1024), (1, 19, 128, 256), ignored=0.1, ignore_index=255),
    Case("Cityscapes, channels_last", (4, 19, 512, 1024), (8, 19, 512, 1024), layout="channels_last"),
    Case("Cityscapes, bfloat16", (4, 19, 512, 1024), (8, 19, 512, 1024), dtype=BF16),
    Case(
        "Cityscapes, bfloat16, channels_last",
        (4, 19, 512, 1024),
        (8, 19, 512, 1024),
        dtype=BF16,
        layout="channels_last",
    ),
    Case(
        "Cityscapes, class weights",
        (4, 19, 512, 1024),
        (8, 19, 512, 1024),
        weighted=True,
        ignored=0.1,
        ignore_index=255,
    ),
    Case("ADE20K", (4, 150, 256, 256), (8, 150, 256, 256), (1, 150, 64, 64)),
    Case("ADE20K, channels_last", (4, 150, 256, 256), (8, 150, 256, 256), (1, 150, 64, 64), layout="channels_last"),
    Case("ADE20K, bfloat16", (4, 150, 256, 256), (8, 150, 256, 256), dtype=BF16),
    Case("ADE20K, bfloat16, channels_last", (4, 150, 256, 256), (8, 150, 256, 256), dtype=BF16, layout="channels_last"),
    # Tumours in volumes: four classes, five dimensions.
    Case("BraTS", (2, 4, 128, 128, 128), (2, 4, 128, 128, 128), (1, 4, 32, 32, 32)),
    # Letters of speech, frame by frame, as models that also train with CTC give them.
    Case("wav2vec 2.0 letters", (16, 32, 1500), (32, 32, 1500), (4, 32, 300), layout="transposed"),
    # A word at a time, the language model of examples/language_model.py.
    Case("n-gram", (1, 98), quick=(1, 98)),
]

"""Scikit-learn's 1797 handwritten digits of 8 x 8, half of them to learn from and half for tests; and how to learn."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Curves = dict[str, list[float]]  # a value for each epoch


@dataclass(frozen=True)
class Digits:
    """Pixels (N, 64) from 0 to 1, and the digits that they show."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, some: slice | Tensor) -> Digits:
        return Digits(self.images[some], self.labels[some])

    def __len__(self) -> int:
        return len(self.labels)


def load() -> tuple[Digits, Digits]:
    """For training and for tests, in a fixed order that has nothing to do with who wrote them."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    every = Digits(torch.from_numpy(images).float()[order] / 16, torch.from_numpy(labels).long()[order])
    return every[: len(every) // 2], every[len(every) // 2 :]


def perceptron(*widths: int) -> nn.Sequential:
    """Layers of these numbers of units, the last of which are raw logits.

    SiLU, as ReLU's kink makes much of a difference in the last bit, which no two ways to write a loss are without.
    """
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def logits(model: nn.Module, digits: Digits) -> Tensor:
    return model(digits.images)


def accuracy(model: nn.Module, digits: Digits) -> float:
    return (logits(model, digits).argmax(1) == digits.labels).float().mean().item()


def train(
    make: Callable[[], nn.Module],
    count: int,
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    epochs: int,
    seed: int = 0,
    measures: dict[str, Callable[[nn.Module], float]] | None = None,
) -> tuple[nn.Module, Curves]:
    """A model trained on `count` images, and its mean loss and measures after each epoch.

    `loss_of` takes the model and which of the images are the batch.
    """
    torch.manual_seed(seed)
    model, measures = make(), measures or {}
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    curves: Curves = {"loss": [], **{name: [] for name in measures}}
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(count).split(64):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch) / count
        curves["loss"].append(total)
        for name, measure in measures.items():
            curves[name].append(measure(model))
    return model, curves

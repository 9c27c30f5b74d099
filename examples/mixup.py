"""A convolutional network on few of scikit-learn's digits, without and with MixUp.

    python examples/mixup.py [--quick] [--output FIGURE]

MixUp (arXiv 1710.09412) trains on mixtures of two images each, whose loss is the same mixture of the losses of both
labels. Of 200 images a network is soon too sure: its loss on the test set rises while its accuracy stays. With MixUp it
remains modest, and gets more of them right.

`mixup_cross_entropy` reads the logits once for both labels, with a share of each image's own. Written out in PyTorch,
`in_pytorch`, it is the same curve.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import digits
import report
import torch
import torch.nn.functional as F
from digits import Curves
from report import NATIVE, OURS
from torch import Tensor, nn

from cross_entropy_ext.functional import cross_entropy, mixup_cross_entropy

IMAGES = 200
ALPHA = 0.4  # shares are drawn from a beta distribution, mostly near 0 or 1
TOLERANCE = 1e-3  # of losses below 3: rounding, which training carries forward


def in_pytorch(logits: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    both = [F.cross_entropy(logits, labels, reduction="none") for labels in (first, second)]
    return (share * both[0] + (1 - share) * both[1]).mean()


def network() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.SiLU(), nn.Flatten()),
        nn.Linear(32 * 4 * 4, 10),
    )


@dataclass(frozen=True)
class Result:
    plain: list[Curves]  # of a network for each seed
    mixed: list[Curves]
    native: Curves  # of the first with MixUp once more, with the loss written in PyTorch
    equal: bool


def run(quick: bool) -> Result:
    every, test = digits.load()
    few = every[:IMAGES]
    measures = {
        "accuracy": lambda model: digits.accuracy(model, test),
        "test loss": lambda model: cross_entropy(digits.logits(model, test), test.labels).item(),
    }

    def plain(model: nn.Module, batch: Tensor) -> Tensor:
        return cross_entropy(model(few.images[batch]), few.labels[batch])

    def mixed_with(loss: Callable) -> Callable[[nn.Module, Tensor], Tensor]:
        def mixed(model: nn.Module, batch: Tensor) -> Tensor:
            other = batch[torch.randperm(len(batch))]
            share = torch.distributions.Beta(ALPHA, ALPHA).sample((len(batch),))
            images = torch.lerp(few.images[other], few.images[batch], share.unsqueeze(1))
            return loss(model(images), few.labels[batch], few.labels[other], share)

        return mixed

    def train(loss_of: Callable[[nn.Module, Tensor], Tensor], seed: int) -> Curves:
        return digits.train(network, len(few), loss_of, 20 if quick else 100, seed, measures)[1]

    seeds = range(1 if quick else 3)
    without, mixed = ([train(loss, seed) for seed in seeds] for loss in (plain, mixed_with(mixup_cross_entropy)))
    native = train(mixed_with(in_pytorch), 0)
    equal = report.equal_curves({NATIVE: native["loss"], OURS: mixed[0]["loss"]}, "epoch", TOLERANCE)
    return Result(without, mixed, native, equal)


def main(given: Sequence[str] | None = None) -> Result:
    arguments = report.parse_arguments("mixup", __doc__, given)
    result = run(arguments.quick)
    networks = {"without": result.plain, "with MixUp": result.mixed}
    rows = {}
    for name, curves in networks.items():
        rows[name] = [report.mean_of_last(curves, "accuracy"), report.mean_of_last(curves, "test loss", ".3f")]
    report.print_rows(f"Learnt from {IMAGES} images", ["", "accuracy on the test set", "loss on it"], rows)
    with report.figure(arguments.output, f"Digits learnt from {IMAGES} images, without and with MixUp", 3) as (_, axes):
        report.draw_curves(axes[0], "Loss", "epoch", {NATIVE: result.native["loss"], OURS: result.mixed[0]["loss"]})
        report.draw_runs(axes[1], "Accuracy on the test set", "epoch", networks, "accuracy")
        axes[1].set_ylim(0.8, 1)
        report.draw_runs(axes[2], "Loss on the test set", "epoch", networks, "test loss")
        axes[2].set_ylim(0, 1)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices too small to be shared
    sys.exit(0 if main().equal else 1)

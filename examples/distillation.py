"""A small student learns a digit that it has never seen, from what its teacher thinks of the others.

    python examples/distillation.py [--quick] [--output FIGURE]

The experiment of Hinton et al. (arXiv 1503.02531, section 3) on scikit-learn's digits. The student has 2410 parameters,
the teacher 35 times as many, and the student is not shown a single three. Alone, it takes every three for something
else. Distilled, it learns from the teacher's softened probabilities too, in which some eights and nines are a little
bit of a three, and that is enough to recognise most.

`DistillationLoss` makes both softmaxes, the divergence and the labels' cross entropy in one pass. Written out in
PyTorch, `in_pytorch`, it is the same curve.
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
from torch import Tensor

from cross_entropy_ext import CrossEntropyLoss, DistillationLoss

HIDDEN = 3  # the digit that the student is not shown
TEMPERATURE, ALPHA = 8.0, 0.9
TEACHER, STUDENT = (64, 256, 256, 10), (64, 32, 10)  # units of each layer
TOLERANCE = 1e-3  # of losses from 30 to 0.3: rounding, which training carries forward

hard_loss = CrossEntropyLoss()
distillation_loss = DistillationLoss(temperature=TEMPERATURE, alpha=ALPHA)


def alone(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return hard_loss(student, labels)


def in_pytorch(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    divergence = F.kl_div(
        (student / TEMPERATURE).log_softmax(1), (teacher / TEMPERATURE).softmax(1), reduction="batchmean"
    )
    return ALPHA * TEMPERATURE**2 * divergence + (1 - ALPHA) * F.cross_entropy(student, labels)


@dataclass(frozen=True)
class Result:
    teacher: float  # its accuracy
    alone: list[Curves]  # of a student for each seed
    distilled: list[Curves]
    native: Curves  # of the first distilled one once more, with the loss written in PyTorch
    equal: bool


def run(quick: bool) -> Result:
    every, test = digits.load()
    shown, threes = every[every.labels != HIDDEN], test[test.labels == HIDDEN]
    measures = {
        "accuracy": lambda model: digits.accuracy(model, test),
        "hidden": lambda model: digits.accuracy(model, threes),
    }
    teacher, _ = digits.train(
        lambda: digits.perceptron(*TEACHER),
        len(every),
        lambda model, batch: hard_loss(model(every.images[batch]), every.labels[batch]),
        epochs=20,
    )
    known = digits.logits(teacher, shown)

    def student(loss: Callable[[Tensor, Tensor, Tensor], Tensor], seed: int) -> Curves:
        def loss_of(model: torch.nn.Module, batch: Tensor) -> Tensor:
            return loss(model(shown.images[batch]), known[batch], shown.labels[batch])

        make = lambda: digits.perceptron(*STUDENT)  # noqa: E731
        return digits.train(make, len(shown), loss_of, 30 if quick else 60, seed, measures)[1]

    seeds = range(1 if quick else 3)
    by_labels, distilled = ([student(loss, seed) for seed in seeds] for loss in (alone, distillation_loss))
    native = student(in_pytorch, 0)
    equal = report.equal_curves({NATIVE: native["loss"], OURS: distilled[0]["loss"]}, "epoch", TOLERANCE)
    return Result(measures["accuracy"](teacher), by_labels, distilled, native, equal)


def main(given: Sequence[str] | None = None) -> Result:
    arguments = report.parse_arguments("distillation", __doc__, given)
    result = run(arguments.quick)
    students = {"student alone": result.alone, "student distilled": result.distilled}
    rows = {"teacher": [f"{result.teacher:.1%}", ""]}
    for name, curves in students.items():
        rows[name] = [report.mean_of_last(curves, "accuracy"), report.mean_of_last(curves, "hidden")]
    report.print_rows("Accuracy on the test set", ["", "all digits", "threes, never shown"], rows)
    with report.figure(arguments.output, "A student that was never shown a three", 3) as (_, axes):
        report.draw_curves(axes[0], "Loss", "epoch", {NATIVE: result.native["loss"], OURS: result.distilled[0]["loss"]})
        report.draw_runs(axes[1], "Accuracy", "epoch", students, "accuracy")
        axes[1].axhline(result.teacher, color=report.INK, linewidth=1, linestyle=(0, (4, 3)))
        axes[1].text(1, result.teacher, "teacher", va="bottom", fontsize=8.5)
        report.draw_runs(axes[2], "Accuracy on threes", "epoch", students, "hidden")
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices too small to be shared
    sys.exit(0 if main().equal else 1)

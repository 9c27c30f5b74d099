"""A photograph segmented by a small network that sees no colour: class weights, and pixels that belong to no class.

    python examples/segmentation.py [--quick] [--output FIGURE]

The photograph is scikit-learn's china.jpg. Nobody has labelled it, so the labels are what colour tells: six clusters
of the blurred colours, and 255 where a pixel's second nearest cluster is almost as near, as along outlines and in haze.
The network sees brightness only, and has to tell sky from water by what is around. It learns from the left two thirds
of the picture and is judged by the rest.

The clusters are not equally large. `weight` makes rare classes count as much as frequent ones, so that in few steps
they are learnt too, and `ignore_index=255` leaves out what is uncertain. `nn.CrossEntropyLoss` with the same arguments
gives the same curve.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import report
import torch
import torch.nn.functional as F
from report import NATIVE, OURS
from torch import Tensor, nn

from cross_entropy_ext import CrossEntropyLoss

CLASSES, UNCERTAIN = 6, 255
CROP, BATCH = 48, 8
TOLERANCE = 1e-3  # of losses below 2: rounding, which training carries forward


def photograph() -> tuple[Tensor, Tensor, Tensor]:
    """Colours (3, H, W), brightness (1, H, W) and labels (H, W)."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.datasets import load_sample_image

    colours = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1) / 255
    colours = F.avg_pool2d(colours, 2)
    pixels = F.avg_pool2d(colours, 5, stride=1, padding=2, count_include_pad=False).flatten(1).T.numpy()
    distances = torch.from_numpy(MiniBatchKMeans(CLASSES, random_state=0, n_init=3).fit(pixels).transform(pixels))
    nearest = distances.topk(2, largest=False)
    uncertain = nearest.values[:, 0] > 0.7 * nearest.values[:, 1]
    labels = nearest.indices[:, 0].masked_fill(uncertain, UNCERTAIN).view(colours.shape[1:])
    brightness = colours.mean(0, keepdim=True)
    return colours, (brightness - brightness.mean()) / brightness.std(), labels


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, padding=2), nn.SiLU()),
        *(nn.Conv2d(16, 16, 5, padding=4, dilation=2), nn.SiLU()),
        nn.Conv2d(16, CLASSES, 1),
    )


def train(image: Tensor, labels: Tensor, loss: nn.Module, steps: int, seed: int) -> tuple[nn.Module, list[float]]:
    """A network trained on random crops, and the loss of each step."""
    torch.manual_seed(seed)
    model, losses = network(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    for _ in range(steps):
        corners = zip(*(torch.randint(size - CROP, (BATCH,)).tolist() for size in labels.shape), strict=True)
        crops = [(..., slice(y, y + CROP), slice(x, x + CROP)) for y, x in corners]
        optimizer.zero_grad()
        value = loss(model(torch.stack([image[crop] for crop in crops])), torch.stack([labels[crop] for crop in crops]))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return model, losses


def overlaps(predicted: Tensor, labels: Tensor) -> list[float]:
    """Of each class, the intersection of prediction and labels over their union, where labels are certain."""
    certain = labels != UNCERTAIN
    found = []
    for c in range(CLASSES):
        both, any_of_them = ((predicted == c) & (labels == c)).sum(), ((predicted == c) & certain | (labels == c)).sum()
        found.append((both / any_of_them.clamp_min(1)).item())
    return found


@dataclass(frozen=True)
class Result:
    losses: dict[str, list[float]]  # with class weights: PyTorch's and ours
    overlaps: dict[str, list[float]]  # without and with class weights, of each class, the mean of all seeds
    predicted: dict[str, Tensor]  # of the first seed
    equal: bool


def run(image: Tensor, labels: Tensor, cut: int, counts: Tensor, quick: bool) -> Result:
    """Columns before `cut` are learnt from, the others judged; `counts` are the classes' numbers of pixels."""
    options = {"ignore_index": UNCERTAIN, "weight": counts.sum() / (CLASSES * counts)}
    losses = {"no weights": CrossEntropyLoss(ignore_index=UNCERTAIN), "class weights": CrossEntropyLoss(**options)}
    shown, steps = (image[..., :cut], labels[:, :cut]), 20 if quick else 60
    predicted, found = {}, {}
    for name, loss in losses.items():
        runs = [train(*shown, loss, steps, seed) for seed in range(1 if quick else 3)]
        with torch.no_grad():
            predictions = [model(image.unsqueeze(0)).argmax(1)[0] for model, _ in runs]
        each = [overlaps(prediction[:, cut:], labels[:, cut:]) for prediction in predictions]
        predicted[name], found[name] = predictions[0], [*map(mean, zip(*each, strict=True))]
    _, native = train(*shown, nn.CrossEntropyLoss(**options), steps, 0)
    curves = {NATIVE: native, OURS: runs[0][1]}
    return Result(curves, found, predicted, report.equal_curves(curves, "step", TOLERANCE))


def main(given: Sequence[str] | None = None) -> Result:
    arguments = report.parse_arguments("segmentation", __doc__, given)
    colours, image, labels = photograph()
    cut = labels.size(1) * 2 // 3
    counts = labels[:, :cut][labels[:, :cut] != UNCERTAIN].bincount(minlength=CLASSES)
    result = run(image, labels, cut, counts, arguments.quick)
    order = counts.argsort().tolist()
    shares = [f"{counts[c] / counts.sum():.0%}" for c in order]
    rows = {name: [f"{mean(v):.3f}", *(f"{v[c]:.2f}" for c in order)] for name, v in result.overlaps.items()}
    report.print_rows("Intersection over union, by the classes' shares of pixels", ["", "mean", *shares], rows)

    clusters = torch.stack([colours[:, labels == c].mean(1) for c in range(CLASSES)] + [torch.ones(3)])
    with report.figure(arguments.output, "A photograph segmented, and judged right of the line", 3, 2) as (_, axes):
        paint = lambda classes: clusters[classes.clamp_max(CLASSES)]  # noqa: E731
        pictures = {"What the network sees": image[0], "Labels; white: uncertain": paint(labels)}
        pictures |= {f"Predicted, {name}": paint(prediction) for name, prediction in result.predicted.items()}
        for axis, (title, picture) in zip((*axes[:2], *axes[3:5]), pictures.items(), strict=True):
            axis.imshow(picture.numpy(), cmap="gray")
            axis.axvline(cut, color=report.INK, linewidth=1)
            axis.set_title(title)
            axis.set_axis_off()
        report.draw_curves(axes[2], "Loss with class weights", "step", result.losses)
        for place, (name, values) in enumerate(result.overlaps.items()):
            heights, colour = [values[c] for c in order], list(report.COLOURS.values())[place]
            axes[5].bar([x + 0.4 * place for x in range(CLASSES)], heights, 0.4, color=colour, label=name)
        axes[5].set_xticks([x + 0.2 for x in range(CLASSES)], shares)
        axes[5].set_xlabel("class, by its share of pixels")
        axes[5].set_title("Intersection over union")
        axes[5].legend(loc="lower right")
    return result


if __name__ == "__main__":
    sys.exit(0 if main().equal else 1)

"""Real data that installed packages bring along, so that nothing is downloaded.

* Text: the Python source of the standard library, but for its tests, and of torch. Its words are identifiers, runs of
  digits and single signs: 11 million of them, 170 thousand different ones, as unevenly frequent as words are.
* Photographs: the two that come with scikit-learn. Their classes are clusters of colours, with outlines that belong to
  none, as in PASCAL VOC.
* Digits: scikit-learn's 1797 handwritten ones, 8 x 8, enlarged to 32 x 32.
"""

from __future__ import annotations

import functools
import re
import sysconfig
from array import array
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

WORD = re.compile(r"[^\W\d]\w*|\d+|[^\w\s]")
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
NO_CLASS = 255


@functools.cache
def ranked_words() -> np.ndarray:
    """The text, each word as its rank by frequency: 1 is the most frequent."""
    numbers: dict[str, int] = {}
    text = array("i")
    for path in _sources():
        words = WORD.findall(path.read_text(encoding="utf-8", errors="replace"))
        text.extend([numbers.setdefault(word, len(numbers)) for word in words])
    frequencies = np.bincount(text)
    ranks = np.empty(len(frequencies), np.int64)
    ranks[np.argsort(-frequencies, kind="stable")] = np.arange(1, len(frequencies) + 1)
    return ranks[np.frombuffer(text, np.int32)]


def words(vocabulary: int) -> np.ndarray:
    """The text in a vocabulary of the most frequent words; 0 is every other."""
    ranks = ranked_words()
    return np.where(ranks < vocabulary, ranks, 0)


def _sources() -> list[Path]:
    library, package = Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent
    found = [path.relative_to(library) for path in library.rglob("*.py")]
    kept = [library / path for path in sorted(found) if LEFT_OUT.isdisjoint(path.parts)]
    return kept + sorted(package.rglob("*.py"))


def photographs(classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Colours (image, 3, height, width), normalised, and the class of each pixel, or NO_CLASS on an outline."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.datasets import load_sample_images

    colours = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2).float()
    colours = (colours - colours.mean((0, 2, 3), keepdim=True)) / colours.std((0, 2, 3), keepdim=True)
    # Blurred, so that the clusters are areas rather than specks.
    blurred = F.avg_pool2d(colours, 9, stride=1, padding=4, count_include_pad=False)
    pixels = blurred.movedim(1, -1).reshape(-1, 3).numpy()
    clusters = MiniBatchKMeans(classes, random_state=0, n_init=1).fit(pixels[::16]).predict(pixels)
    labels = clusters.astype(np.int64).reshape(len(colours), *colours.shape[2:])
    outlines = np.zeros(labels.shape, bool)
    outlines[:, :, 1:] |= labels[:, :, 1:] != labels[:, :, :-1]
    outlines[:, 1:, :] |= labels[:, 1:, :] != labels[:, :-1, :]
    labels[outlines] = NO_CLASS
    return colours.contiguous().numpy(), labels


def digits(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (image, 1, size, size) with values from 0 to 1, and their digits."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float().div(16).unsqueeze(1)
    enlarged = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return enlarged.numpy(), found.target.astype(np.int64)

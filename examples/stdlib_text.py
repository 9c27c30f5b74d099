"""A training text that every machine with Python has: the source of its standard library."""

from __future__ import annotations

import re
import sysconfig
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

UNKNOWN = "<unk>"

_TOKEN = re.compile(r"[^\W\d]\w*|\d+|[^\w\s]")
_INSTALLED = frozenset({"site-packages", "dist-packages", "__pycache__"})
_TESTS = frozenset({"test", "tests", "idle_test"})


@dataclass(frozen=True)
class Corpus:
    """A text as vocabulary indices; index 0 stands for every token outside the vocabulary."""

    tokens: array[int]
    vocabulary: list[str]
    files: int
    coverage: float


def load(vocabulary_size: int) -> Corpus:
    """Read and tokenise the standard library and number its most frequent tokens.

    Words, runs of digits and single punctuation characters are tokens; white space is dropped.
    The library's own tests are left out unless a cut-down installation has too few words without them.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    counts: Counter[str] = Counter()
    texts: list[list[str]] = []
    for skipped in (_INSTALLED | _TESTS, _INSTALLED):
        texts = [_TOKEN.findall(_read(path)) for path in _sources(root, skipped)]
        counts = Counter()
        for text in texts:
            counts.update(text)
        if len(counts) >= vocabulary_size:
            break
    else:
        raise RuntimeError(
            f"{root} has {len(counts):,} distinct tokens; a vocabulary of {vocabulary_size:,} was asked for"
        )

    # Ties in frequency are broken by spelling, so that one Python version always gives one vocabulary.
    ranked = sorted(counts, key=lambda token: (-counts[token], token))
    vocabulary = [UNKNOWN, *ranked[: vocabulary_size - 1]]
    index = {token: i for i, token in enumerate(vocabulary)}
    tokens = array("i", (index.get(token, 0) for text in texts for token in text))
    return Corpus(tokens, vocabulary, len(texts), 1 - tokens.count(0) / len(tokens))


def _sources(root: Path, skipped: frozenset[str]) -> list[Path]:
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(paths) if skipped.isdisjoint(path.parts)]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")

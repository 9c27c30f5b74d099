"""What is written around the loss today, in PyTorch, and what it is now.

A new row is two functions and a line in PAIRS. Both take the same arguments, the first of which gets the gradient, and
return the loss and whatever else they are for. Today's is the shortest that is right, also where labels are padded with
`ignore_index`. Arguments are drawn by their names. The lines of a function, but for the last one that returns, are what
the README shows.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cross_entropy_ext.functional import (
    cross_entropy,
    cross_entropy_with_stats,
    distillation_loss,
    mixup_cross_entropy,
    nll_loss,
    sparse_cross_entropy,
)

Shape = tuple[int, ...]
TODAY, NOW = "today", "now"

# ---- the functions --------------------------------------------------------------------------------------------------


def z_loss_today(logits, target):
    z_loss = logits.logsumexp(1)[target != -100].square().mean()
    loss = F.cross_entropy(logits, target) + 1e-4 * z_loss
    return loss


def z_loss_now(logits, target):
    loss = cross_entropy(logits, target, z_loss=1e-4)
    return loss


def softcap_today(logits, target):
    loss = F.cross_entropy(30 * torch.tanh(logits / 30), target)
    return loss


def softcap_now(logits, target):
    loss = cross_entropy(logits, target, softcap=30)
    return loss


def logit_scale_today(logits, target):
    loss = F.cross_entropy(0.5 * logits, target)
    return loss


def logit_scale_now(logits, target):
    loss = cross_entropy(logits, target, logit_scale=0.5)
    return loss


def sample_weight_today(logits, target, weight):
    losses = F.cross_entropy(logits, target, reduction="none")
    loss = (weight * losses).sum() / weight[target != -100].sum()
    return loss


def sample_weight_now(logits, target, weight):
    loss = cross_entropy(logits, target, sample_weight=weight)
    return loss


def statistics_today(logits, target, advantage):
    valid, log_p = target != -100, logits.log_softmax(1)
    log_prob = log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(1)
    accuracy = (logits.argmax(1) == target)[valid].float().mean()
    loss = -(advantage * log_prob + 0.01 * entropy)[valid].mean()
    return loss, accuracy


def statistics_now(logits, target, advantage):
    valid, stats = target != -100, cross_entropy_with_stats(logits, target)
    log_prob, entropy = stats.target_log_prob, stats.entropy
    accuracy = (stats.argmax == target)[valid].float().mean()
    loss = -(advantage * log_prob + 0.01 * entropy)[valid].mean()
    return loss, accuracy


def distillation_today(student, teacher, T):
    log_p, q = (student / T).log_softmax(1), (teacher / T).softmax(1)
    loss = T**2 * F.kl_div(log_p, q, reduction="batchmean")
    return loss


def distillation_now(student, teacher, T):
    loss = distillation_loss(student, teacher, temperature=T)
    return loss


def distillation_with_labels_today(student, teacher, target, T):
    log_p, q = (student / T).log_softmax(1), (teacher / T).softmax(1)
    distilled = T**2 * F.kl_div(log_p, q, reduction="none").sum(1)[target != -100].mean()
    loss = 0.9 * distilled + 0.1 * F.cross_entropy(student, target)
    return loss


def distillation_with_labels_now(student, teacher, target, T):
    loss = distillation_loss(student, teacher, target, temperature=T, alpha=0.9)
    return loss


def top_k_teacher_today(student, indices, probs):
    valid = indices != -100
    log_p = student.log_softmax(1).gather(1, indices.clamp(min=0))
    loss = -(valid * probs * log_p).sum(1)[valid.any(1)].mean()
    return loss


def top_k_teacher_now(student, indices, probs):
    loss = sparse_cross_entropy(student, indices, probs)
    return loss


def mixup_today(logits, a, b, lam):
    loss = lam * F.cross_entropy(logits, a) + (1 - lam) * F.cross_entropy(logits, b)
    return loss


def mixup_now(logits, a, b, lam):
    loss = mixup_cross_entropy(logits, a, b, lam)
    return loss


def nll_today(log_probs, target):
    loss = F.nll_loss(log_probs, target)
    return loss


def nll_now(log_probs, target):
    loss = nll_loss(log_probs, target)
    return loss


# ---- which, on what -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    name: str
    today: Callable
    now: Callable
    shape: Shape = (512, 32_000)
    quick: Shape = (64, 4000)

    @property
    def arguments(self) -> list[str]:
        return list(inspect.signature(self.today).parameters)

    def function(self, which: str) -> Callable:
        return {TODAY: self.today, NOW: self.now}[which]


PAIRS = [
    Pair("z-loss", z_loss_today, z_loss_now),
    Pair("softcap", softcap_today, softcap_now),
    Pair("scaled logits", logit_scale_today, logit_scale_now),
    Pair("per-token weights", sample_weight_today, sample_weight_now),
    Pair("log-probability, entropy, accuracy", statistics_today, statistics_now),
    Pair("distillation", distillation_today, distillation_now),
    Pair("distillation with labels", distillation_with_labels_today, distillation_with_labels_now),
    Pair("a teacher's 16 best classes", top_k_teacher_today, top_k_teacher_now),
    Pair("MixUp", mixup_today, mixup_now, (1024, 1000), (256, 1000)),
    Pair("negative log likelihood", nll_today, nll_now),
]


def code(function: Callable) -> list[str]:
    """The function's own lines, but for the one that returns."""
    lines = inspect.getsource(function).splitlines()
    body = textwrap.dedent("\n".join(lines[1:])).splitlines()
    return [line for line in body if not line.startswith("return ")]


# ---- their arguments ------------------------------------------------------------------------------------------------


def _logits(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.empty(shape).normal_(0, 3, generator=generator)


def _classes(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)


def _positions(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.rand((shape[0], *shape[2:]), generator=generator)


def _best(shape: Shape, generator: torch.Generator) -> torch.return_types.topk:
    return _logits(shape, generator).softmax(1).topk(16, 1)


ARGUMENTS: dict[str, Callable[[Shape, torch.Generator], Tensor | float]] = {
    "logits": _logits,
    "student": _logits,
    "log_probs": lambda shape, generator: _logits(shape, generator).log_softmax(1),
    "teacher": _logits,
    "target": _classes,
    "a": _classes,
    "b": _classes,
    "weight": _positions,
    "advantage": lambda shape, generator: _positions(shape, generator) - 0.5,
    "indices": lambda shape, generator: _best(shape, generator).indices,
    "probs": lambda shape, generator: _best(shape, generator).values,
    "T": lambda shape, generator: 4.0,
    "lam": lambda shape, generator: 0.3,
}
SEEDS = {"teacher": 1, "indices": 1, "probs": 1, "target": 2, "a": 2, "b": 3, "weight": 4, "advantage": 5}


def draw(names: list[str], shape: Shape, device: str) -> list[Tensor | float]:
    found = [ARGUMENTS[name](shape, torch.Generator().manual_seed(SEEDS.get(name, 0))) for name in names]
    return [value.to(device) if isinstance(value, Tensor) else value for value in found]


def step(function: Callable, rest: list[Tensor | float]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Forward and backward, of the first argument: what the function returns, and the gradient."""

    def run(logits: Tensor) -> tuple[Tensor, ...]:
        found = function(logits, *rest)
        loss, *others = found if isinstance(found, tuple) else (found,)
        return loss, *others, torch.autograd.grad(loss, logits)[0]

    return run


def ready(name: str, which: str, shape: Shape) -> tuple[Callable[[Tensor], tuple[Tensor, ...]], Tensor]:
    """By name, for another process: what is called on the CPU, and with which tensor."""
    pair = next(pair for pair in PAIRS if pair.name == name)
    logits, *rest = draw(pair.arguments, shape, "cpu")
    return step(pair.function(which), rest), logits.requires_grad_()

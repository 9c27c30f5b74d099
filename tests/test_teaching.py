"""The numbers of the teaching material: each worked by hand, so that the loss is anchored to something
outside this repository."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cross_entropy_ext import CrossEntropyLoss
from cross_entropy_ext.functional import cross_entropy


def three_digits(value: float) -> object:
    return pytest.approx(value, abs=5.1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("logits", "label", "loss"),
    [
        ((2, 1, 0.1), 0, 0.417),  # log(e^2 + e^1 + e^0.1) - 2
        ((1, 2), 1, 0.313),  # log(1 + e^-1)
        ((-1, 1), 1, 0.127),  # log(1 + e^-2)
        ((2, 1, -1), 1, 1.349),  # the second best class is the label
        ((0.5, 2.5, -0.5), 1, 0.170),  # a confident and right guess
    ],
)
def test_logits_and_a_label(logits: tuple[float, ...], label: int, loss: float, dtype: torch.dtype) -> None:
    x = torch.tensor(logits, dtype=dtype, requires_grad=True)
    by_hand = math.log(sum(math.exp(z) for z in logits)) - logits[label]
    assert by_hand == three_digits(loss)
    for form in (cross_entropy, lambda *arguments: CrossEntropyLoss()(*arguments)):
        alone = form(x, torch.tensor(label))
        assert alone.item() == pytest.approx(by_hand, rel=1e-6)
        assert form(x[None], torch.tensor([label])).item() == alone.item()
        one_hot = torch.nn.functional.one_hot(torch.tensor(label), len(logits)).to(dtype)
        assert form(x, one_hot).item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize(("logits", "label"), [((2, 1, 0.1), 0), ((1, 2), 1), ((2, 1, -1), 1), ((0.5, 2.5, -0.5), 2)])
def test_the_gradient_is_p_minus_y(logits: tuple[float, ...], label: int) -> None:
    z = torch.tensor(logits, dtype=torch.double, requires_grad=True)
    cross_entropy(z, torch.tensor(label)).backward()
    total = sum(math.exp(v) for v in logits)
    expected = [math.exp(v) / total - (i == label) for i, v in enumerate(logits)]
    assert z.grad.tolist() == pytest.approx(expected, rel=1e-12)
    assert z.grad[label] < 0 and z.grad.sum().item() == pytest.approx(0, abs=1e-15)


def test_the_gradient_for_probabilities_is_p_minus_q() -> None:
    z = torch.tensor([2.0, 1.0, 0.1], dtype=torch.double, requires_grad=True)
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.double)
    cross_entropy(z, q).backward()
    assert torch.allclose(z.grad, z.detach().softmax(0) - q, rtol=1e-12)


P, Q = (0.7, 0.2, 0.1), (0.6, 0.3, 0.1)


def cross_entropy_of(p: tuple[float, ...], q: tuple[float, ...]) -> float:
    """H(p, q): the logits are log q, so that softmax gives q back."""
    return cross_entropy(torch.tensor(q, dtype=torch.double).log(), torch.tensor(p, dtype=torch.double)).item()


def test_two_distributions() -> None:
    assert cross_entropy_of(P, Q) == three_digits(0.829)
    assert cross_entropy_of(P, Q) == pytest.approx(-sum(p * math.log(q) for p, q in zip(P, Q, strict=True)), rel=1e-12)


def test_cross_entropy_is_entropy_plus_divergence() -> None:
    """H(P, Q) = H(P) + KL(P || Q): least, and equal to the entropy, where Q is P; and not symmetric."""
    entropy = -sum(p * math.log(p) for p in P)
    divergence = sum(p * math.log(p / q) for p, q in zip(P, Q, strict=True))
    assert cross_entropy_of(P, Q) == pytest.approx(entropy + divergence, rel=1e-12)
    assert cross_entropy_of(P, P) == pytest.approx(entropy, rel=1e-12)
    assert cross_entropy_of(P, P) < cross_entropy_of(P, Q) != pytest.approx(cross_entropy_of(Q, P))


@pytest.mark.parametrize(("temperature", "loss"), [(2.0, 1.039), (1.0, 0.893)])
def test_a_student_and_its_teacher(temperature: float, loss: float) -> None:
    """Cross entropy of softmax(teacher / T) with softmax(student / T). The softer, the nearer to log 3."""
    teacher, student = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.5, 1.0, 0.5])
    ours = cross_entropy(student / temperature, (teacher / temperature).softmax(0))
    assert ours.item() == three_digits(loss)
    assert ours.item() < math.log(3)


def test_binary_cross_entropy_is_the_case_of_two_classes() -> None:
    """One logit z for 'yes' is the pair (0, z): log(1 + e^-z) if yes, log(1 + e^z) if no."""
    z = torch.tensor([-3.0, -0.5, 0.0, 2.0, 12.0], dtype=torch.double)
    for label in (0, 1):
        pairs = torch.stack([torch.zeros_like(z), z], 1).requires_grad_()
        y = torch.full((5,), label)
        ours = cross_entropy(pairs, y, reduction="none")
        binary = torch.nn.functional.binary_cross_entropy_with_logits(z, y.double(), reduction="none")
        assert torch.allclose(ours, binary, rtol=1e-12, atol=0)
        (gradient,) = torch.autograd.grad(ours.sum(), pairs)
        assert torch.allclose(gradient[:, 1], z.sigmoid() - label, rtol=1e-10, atol=0)
        assert torch.allclose(gradient[:, 0], -gradient[:, 1], rtol=1e-10, atol=0)


def test_a_guess_costs_log_of_the_number_of_classes() -> None:
    """The loss of an untrained network: the first thing to look at."""
    for classes in (2, 10, 1000, 50257):
        assert cross_entropy(torch.zeros(3, classes), torch.tensor([0, 1, classes - 1])).item() == pytest.approx(
            math.log(classes)
        )


def test_a_common_offset_changes_nothing() -> None:
    z = torch.tensor([2.0, 1.0, 0.0])
    for offset in (1.0, -8.0, 1024.0):
        assert cross_entropy(z + offset, torch.tensor(0)).item() == pytest.approx(
            cross_entropy(z, torch.tensor(0)).item(), rel=1e-6
        )


def test_smoothing_by_hand() -> None:
    """e of the label's probability is shared by all classes, the label's own included: e / C, not e / (C -
    1)."""
    z, e = torch.tensor([2.0, 1.0, 0.1], dtype=torch.double), 0.3
    losses = [cross_entropy(z, torch.tensor(c)).item() for c in range(3)]
    expected = (1 - e) * losses[0] + e * sum(losses) / 3
    assert cross_entropy(z, torch.tensor(0), label_smoothing=e).item() == pytest.approx(expected, rel=1e-12)


def test_a_mean_of_a_batch_by_hand() -> None:
    """(0.417 + 1.349) / 2, and with class weights (1, 3): (1 * 0.417 + 3 * 1.349) / (1 + 3)."""
    logits, labels = torch.tensor([[2, 1, 0.1], [2, 1, -1]]), torch.tensor([0, 1])
    assert cross_entropy(logits, labels).item() == three_digits((0.417 + 1.349) / 2)
    weighted: Tensor = cross_entropy(logits, labels, torch.tensor([1.0, 3.0, 9.0]))
    assert weighted.item() == three_digits((0.417 + 3 * 1.349) / 4)

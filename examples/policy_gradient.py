"""A policy that finds the far, large reward because its loss pays for entropy.

    python examples/policy_gradient.py [--quick] [--output FIGURE]

A grid of 11 x 11, and a walker that begins in the middle and slips now and then. Two steps away there is a reward of
1, in a corner one of 5, and either ends the walk. Policy gradients (REINFORCE) find the near one at once; where that
makes the policy sure of itself too soon, it never gets to the corner again. The loss of each action is

    -advantage * log p(action) - BONUS * entropy

of which `cross_entropy_with_stats` gives both, differentiable, from one read of the logits and with one gradient. The
same loss of `log_softmax`, `gather` and `exp`, `in_pytorch`, is computed beside it on every batch, and compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import report
import torch
from report import NATIVE, OURS
from torch import Tensor

from cross_entropy_ext.functional import cross_entropy_with_stats

SIZE, ACTIONS = 11, torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])
START, NEAR, FAR = (SIZE // 2, SIZE // 2), (SIZE // 2, SIZE // 2 - 2), (SIZE - 1, SIZE - 1)
WALKERS, TIME, SLIPS, DISCOUNT = 12, 40, 0.1, 0.97
BONUS = 0.3
TOLERANCE = 1e-5  # of losses of about 0.3, and of gradients of at most that

Loss = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def ours(logits: Tensor, actions: Tensor, advantage: Tensor, bonus: float) -> tuple[Tensor, Tensor]:
    """The loss, and the mean entropy."""
    stats = cross_entropy_with_stats(logits, actions)
    entropy = stats.entropy.mean()
    return -(advantage * stats.target_log_prob).mean() - bonus * entropy, entropy


def in_pytorch(logits: Tensor, actions: Tensor, advantage: Tensor, bonus: float) -> tuple[Tensor, Tensor]:
    log_p = logits.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    return -(advantage * log_p.gather(1, actions.unsqueeze(1)).squeeze(1)).mean() - bonus * entropy, entropy


def walk(policy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, actions, rewards and who still walks, each (TIME, WALKERS). A policy has logits for each state."""
    place, walking, trace = torch.tensor(START).expand(WALKERS, 2), torch.ones(WALKERS, dtype=torch.bool), []
    for _ in range(TIME):
        state = place[:, 0] * SIZE + place[:, 1]
        action = policy[state].softmax(1).multinomial(1).squeeze(1)
        taken = torch.where(torch.rand(WALKERS) < SLIPS, torch.randint(len(ACTIONS), (WALKERS,)), action)
        place = (place + ACTIONS[taken]).clamp(0, SIZE - 1)
        reward = (place == torch.tensor(NEAR)).all(1) * 1.0 + (place == torch.tensor(FAR)).all(1) * 5.0
        trace.append((state, action, reward * walking, walking))
        walking = walking & (reward == 0)
    return tuple(torch.stack(part) for part in zip(*trace, strict=True))


def advantages(rewards: Tensor, walking: Tensor) -> Tensor:
    """Of each step that was walked: the discounted rewards after it, normalised."""
    after, returns = torch.zeros(WALKERS), []
    for reward in rewards.flip(0):
        after = reward + DISCOUNT * after
        returns.insert(0, after)
    walked = torch.stack(returns)[walking]
    return (walked - walked.mean()) / (walked.std() + 1e-6)


def train(bonus: float, updates: int, seed: int) -> dict[str, list[float]]:
    """Mean reward, entropy, both losses and the distance of both gradients, update by update."""
    torch.manual_seed(seed)
    policy = torch.zeros(SIZE * SIZE, len(ACTIONS), requires_grad=True)
    optimizer = torch.optim.Adam([policy], lr=0.3)
    curves: dict[str, list[float]] = {name: [] for name in ("reward", "entropy", NATIVE, OURS, "gradients differ")}
    for _ in range(updates):
        states, actions, rewards, walking = walk(policy.detach())
        arguments = actions[walking], advantages(rewards, walking), bonus
        native, _ = in_pytorch(policy[states[walking]], *arguments)
        loss, entropy = ours(policy[states[walking]], *arguments)
        (expected,) = torch.autograd.grad(native, policy)
        (policy.grad,) = torch.autograd.grad(loss, policy)
        optimizer.step()
        values = rewards.sum(0).mean(), entropy, native, loss, (policy.grad - expected).abs().max()
        for curve, value in zip(curves.values(), values, strict=True):
            curve.append(value.item())
    return curves


@dataclass(frozen=True)
class Result:
    runs: dict[str, list[dict[str, list[float]]]]  # a run for each seed, with a bonus and without
    equal: bool


def run(quick: bool) -> Result:
    found = {}
    for name, bonus in (("no bonus", 0.0), ("entropy bonus", BONUS)):
        found[name] = [train(bonus, 40 if quick else 150, seed) for seed in range(2 if quick else 8)]
    first = found["entropy bonus"][0]
    equal = report.equal_curves({NATIVE: first[NATIVE], OURS: first[OURS]}, "update", TOLERANCE)
    furthest = max(max(run["gradients differ"]) for runs in found.values() for run in runs)
    report.console.print(f"Gradients differ by {furthest:.1e} at most.", highlight=False)
    return Result(found, equal and furthest < TOLERANCE)


def main(given: Sequence[str] | None = None) -> Result:
    arguments = report.parse_arguments("policy_gradient", __doc__, given)
    result = run(arguments.quick)
    rows = {}
    for name, runs in result.runs.items():
        arrived = sum(run["reward"][-1] > 2.5 for run in runs)
        means = [report.mean_of_last(runs, what, ".2f") for what in ("reward", "entropy")]
        rows[name] = [*means, f"{arrived} of {len(runs)}"]
    report.print_rows("After the last update", ["", "mean reward", "entropy, nats", "found the corner"], rows)
    with report.figure(arguments.output, "A near reward of 1, and a far one of 5", 3) as (_, axes):
        first = result.runs["entropy bonus"][0]
        report.draw_curves(axes[0], "Loss, one run", "update", {NATIVE: first[NATIVE], OURS: first[OURS]})
        report.draw_runs(axes[1], "Mean reward of a walk", "update", result.runs, "reward")
        report.draw_runs(axes[2], "Entropy of the policy (nats)", "update", result.runs, "entropy")
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors too small to be shared
    sys.exit(0 if main().equal else 1)

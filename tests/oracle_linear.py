"""Linear + cross entropy in plain float64, in PyTorch's own operations, and how exact it has to be.

With logits l = x W^T + b and their gradient G from `oracle_targets`,

    dx = G W        dW = G^T x        db = sum over positions of G

and a sum of products is as inexact as the sum of their magnitudes, which is `Exact.scale` here. A BLAS rounds a matrix
product to the type of its operands: so may be the logits, and G between two products, as native's are.

The pass rule is `oracle.py`'s, both halves. *As native*: the largest error of the loss and of every gradient is at most
that of `F.linear` and the native loss in the same type, plus one rounding of the result and one of the arithmetic; that
results are rounded between the products earns no allowance here. *Element by element*: a few roundings of whatever is
rounded, at the magnitude of the terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import compositions
import oracle_targets
import torch
import torch.nn.functional as F
from oracle import ROUNDINGS, Exact, arithmetic_of, assert_as_exact, spacing_of_nothing, storage_bytes
from oracle_targets import OUTPUTS, STATISTICS, Upstream, assert_argmax
from torch import Tensor

# The loss of the logits that a function with a linear layer is.
LOSSES = {
    "linear_cross_entropy": "cross_entropy",
    "linear_cross_entropy_with_stats": "cross_entropy_with_stats",
    "linear_sparse_cross_entropy": "sparse_cross_entropy",
}
# What native has an argument for.
NATIVE = {"weight", "reduction", "ignore_index", "label_smoothing"}
LEAVES = ("input", "linear_weight", "linear_bias", "target", "probs")


def matrix(linear_weight: Tensor) -> Tensor:
    """(C, d1, ..., dK, F) as (C d1 ... dK, F)."""
    return linear_weight.flatten(0, -2)


def logits_of(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """(N, C, d1, ..., dK) or (C)."""
    bias = None if linear_bias is None else linear_bias.flatten()
    return F.linear(input, matrix(linear_weight), bias).unflatten(-1, linear_weight.shape[:-1])


@dataclass
class Call:
    """One call of a function by name, with its tensors by theirs; of `options` none is a tensor."""

    name: str
    tensors: dict[str, Tensor]
    options: dict[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, arguments: tuple[Tensor, ...], options: dict[str, object]) -> Call:
        targets = ("indices", "probs") if LOSSES[name] == "sparse_cross_entropy" else ("target",)
        tensors = dict(zip(("input", "linear_weight", *targets), arguments, strict=True))
        tensors |= {key: value for key, value in options.items() if isinstance(value, Tensor)}
        others = {key: value for key, value in options.items() if not isinstance(value, Tensor) and value is not None}
        return cls(name, tensors, others)

    @property
    def lead(self) -> tuple[int, ...]:
        """The input's dimensions but for its features."""
        return tuple(self.tensors["input"].shape[:-1])

    def flat(self, value: Tensor) -> Tensor:
        """(B, T, ...) as (B T, ...), where an input is (B, T, F)."""
        return value.flatten(0, len(self.lead) - 1) if len(self.lead) > 1 and value.dim() else value

    def shaped(self, value: Tensor) -> Tensor:
        """And back."""
        return value.unflatten(0, self.lead) if len(self.lead) > 1 and value.dim() else value

    def of_logits(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, object]]:
        """The arguments of the loss of logits, but for these."""
        by_position = {"target", "indices", "probs", "sample_weight"}
        others = {k: v for k, v in tensors.items() if k in ("weight", "denominator")}
        options = {k: v for k, v in self.options.items() if k != "options"}
        return {k: self.flat(v) for k, v in tensors.items() if k in by_position} | others, options

    def is_native(self) -> bool:
        known = set(LEAVES[:4]) | NATIVE | {"options"}
        return self.name == "linear_cross_entropy" and (self.tensors.keys() | self.options.keys()) <= known

    def composed(self, arithmetic: torch.dtype) -> Callable[..., Tensor | tuple]:
        """F.linear and the native loss; or, with what native has not, that of the logits in the arithmetic's type."""

        def function(**tensors: Tensor) -> Tensor | tuple:
            logits = logits_of(self.flat(tensors["input"]), tensors["linear_weight"], tensors.get("linear_bias"))
            targets, options = self.of_logits(tensors)
            if self.is_native():
                target = targets.pop("target")
                target = target if target.is_floating_point() else target.long()
                return self.outputs(F.cross_entropy(logits, target, **targets, **options))
            wide = {k: v.to(arithmetic) if v.is_floating_point() else v for k, v in targets.items()}
            return self.outputs(getattr(compositions, LOSSES[self.name])(logits.to(arithmetic), **wide, **options))

        return function

    def outputs(self, results: Tensor | tuple) -> dict[str, Tensor]:
        results = {"loss": results} if isinstance(results, Tensor) else results._asdict()
        return {name: self.shaped(value) for name, value in results.items()}

    def run(
        self, function: Callable[..., Tensor | tuple | dict], upstream: Upstream, wanted: tuple[str, ...]
    ) -> dict[str, Tensor]:
        """Outputs, and gradients of what is wanted, from fresh leaves that share the arguments' storage and strides."""
        tensors = {name: value.detach().requires_grad_(name in wanted) for name, value in self.tensors.items()}
        outputs = function(**tensors)
        if not isinstance(outputs, dict):
            outputs = {"loss": outputs} if isinstance(outputs, Tensor) else outputs._asdict()
        used = {name: g for name in OUTPUTS if (g := getattr(upstream, name)) is not None}
        gradients = torch.autograd.grad(
            [outputs[name] for name in used],
            [tensors[name] for name in wanted],
            [g.to(outputs[name].dtype).expand_as(outputs[name]) for name, g in used.items()],
        )
        return {name: value.detach() for name, value in outputs.items()} | dict(zip(wanted, gradients, strict=True))

    def exact(self, upstream: Upstream, between: torch.dtype | None) -> dict[str, Exact]:
        """`between`: the type that logits and their gradient are rounded to, or None where they are not."""
        eps = torch.finfo(arithmetic_of(self.tensors["input"])).eps
        rounded, nothing = (torch.finfo(between).eps / eps, spacing_of_nothing(between) / eps) if between else (0, 0)
        upstream = Upstream(**{name: g if g is None else self.flat(g) for name, g in vars(upstream).items()})
        x, weight = self.flat(self.tensors["input"]).detach().double(), self.tensors["linear_weight"].detach().double()
        bias = self.tensors.get("linear_bias")
        bias = None if bias is None else bias.detach().double()
        logits = logits_of(x, weight, bias)
        magnitudes = logits_of(x.abs(), weight.abs(), None if bias is None else bias.abs())
        targets, options = self.of_logits(self.tensors)
        options.pop("loss_dtype", None)
        found = getattr(oracle_targets, LOSSES[self.name])(
            logits, **targets, **options, noise=magnitudes + rounded * logits.abs(), upstream=upstream
        )
        g = found.pop("input")
        g.scale = g.scale + rounded * g.value.abs() + nothing
        g = Exact(*(v.reshape(-1, matrix(weight).size(0)) for v in (g.value, g.scale)))
        rows, w = x.reshape(-1, x.size(-1)), matrix(weight)
        size = g.scale + g.value.abs()
        found["input"] = Exact((g.value @ w).view_as(x), (size @ w.abs()).view_as(x))
        found["linear_weight"] = Exact((g.value.T @ rows).view_as(weight), (size.T @ rows.abs()).view_as(weight))
        if bias is not None:
            found["linear_bias"] = Exact(g.value.sum(0).view_as(bias), size.sum(0).view_as(bias))
        same = {"linear_weight", "linear_bias", "weight", "denominator"}
        return {
            name: e if name in same else Exact(self.shaped(e.value), self.shaped(e.scale)) for name, e in found.items()
        }


def check_call(
    function: Callable,
    *arguments: Tensor,
    upstream: Upstream | Tensor | None = None,
    wanted: tuple[str, ...] = LEAVES,
    reason: str = "",
    between: torch.dtype | None = None,
    **options: object,
) -> dict[str, Tensor]:
    """Outputs and gradients pass the rule and have the dtypes of what they are of; no argument was written to. Returns
    them. `between`: the type of the matrix products and so of all their results, if it is not the input's."""
    name = function.__name__
    call = Call.of(name, arguments, options)
    wanted = tuple(n for n in wanted if n in call.tensors and call.tensors[n].is_floating_point())
    upstream = torch.ones(()) if upstream is None else upstream
    upstream = upstream if isinstance(upstream, Upstream) else Upstream(upstream)
    arithmetic = arithmetic_of(call.tensors["input"])

    def ours(**tensors: Tensor) -> object:
        first = [tensors.pop(n) for n in list(tensors)[: len(arguments)]]
        return function(*first, **tensors, **call.options)

    before = {n: storage_bytes(t).clone() for n, t in call.tensors.items()}
    results = call.run(ours, upstream, wanted)
    for n, old in before.items():
        assert torch.equal(storage_bytes(call.tensors[n]), old), f"{n}'s storage was written to ({reason})"
    native = call.run(call.composed(arithmetic), upstream, wanted)
    if call.is_native():
        assert results["loss"].dtype == native["loss"].dtype, f"loss is {results['loss'].dtype} ({reason})"

    seen = {n: g.to(results[n].dtype) for n in OUTPUTS if (g := getattr(upstream, n)) is not None}
    exact = call.exact(Upstream(**seen), between or call.tensors["input"].dtype)
    strict = call.exact(Upstream(**seen), None)
    for n, result in results.items():
        where = f"{n} ({reason})" if reason else n
        if n == "argmax":
            assert_argmax(result, exact[n], ROUNDINGS * torch.finfo(arithmetic).eps, where)
            continue
        if n in call.tensors:
            assert result.dtype == call.tensors[n].dtype, where
        elif n in STATISTICS and n != "z_loss":
            assert result.dtype == arithmetic, where
        assert_as_exact(result, exact[n], native[n], arithmetic=arithmetic, name=where, as_native=False)
        assert_as_native(result, strict[n], native[n], arithmetic, between or result.dtype, where)
    return results


def assert_as_native(
    result: Tensor, exact: Exact, native: Tensor, arithmetic: torch.dtype, rounding: torch.dtype, name: str
) -> None:
    """The rule's first half. `rounding`: the type that a result is rounded to."""
    finite = exact.value.isfinite() & native.isfinite()
    if not finite.any():
        return
    value, scale = exact.value[finite], exact.scale[finite]
    error, others = ((t.detach().double()[finite] - value).abs().max() for t in (result, native))
    # In float64 the reference is itself rounded.
    noise = (ROUNDINGS if arithmetic == torch.float64 else 1) * torch.finfo(arithmetic).eps * scale.max()
    limit = others + torch.finfo(rounding).eps * value.abs().max() + noise + spacing_of_nothing(result.dtype)
    assert error <= limit, f"{name}: largest error {error:.3g}; native's {others:.3g}, limit {limit:.3g}"

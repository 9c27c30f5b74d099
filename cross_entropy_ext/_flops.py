"""The matrix products of the linear forms, for torch.utils.flop_counter.

They are counted like those of ``F.linear`` and its backward, in the operator that makes them. A forward that makes the
gradients, too, has three. A product that a backward makes again, to save memory, is not counted. So a step has the same
count in either form.
"""

import importlib.util
import math
import sys

import torch

_NAME = "torch.utils.flop_counter"


def _of_layer(input, linear_weight) -> int:
    """Count one product between input (N, F) and weight (C, d1, ..., dK, F), or one gradient of either."""
    return 2 * input[0] * math.prod(linear_weight)


def _forward(input, linear_weight, *_, **__) -> int:
    return _of_layer(input, linear_weight)


def _forward_backward(input, linear_weight, *others, **_) -> int:
    wanted = others[-1]
    return _of_layer(input, linear_weight) * (1 + sum(wanted[:2]))


def _backward(grad_output, grad_statistics, input, linear_weight, *others, **_) -> int:
    wanted = others[-1]
    return _of_layer(input, linear_weight) * sum(wanted[:2])


def _register() -> None:
    register = sys.modules[_NAME].register_flop_formula
    ops = torch.ops.cross_entropy_ext
    register([ops.linear_cross_entropy, ops.linear_cross_entropy_with_stats, ops._linear_forward])(_forward)
    register(ops._linear_forward_backward)(_forward_backward)
    register(ops._linear_backward)(_backward)


class _Finder:
    """Registers the formulas once the counter is imported: it imports triton, which takes longer than this package."""

    def find_spec(self, name, path=None, target=None):
        if name != _NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register
        return spec


def register_flop_formulas() -> None:
    """Let torch.utils.flop_counter know the operators, now or when somebody imports it."""
    if _NAME in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())

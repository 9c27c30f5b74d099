"""patch_torch(): who gets this package's losses while it is in effect, and that afterwards nobody does."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import inspect
import io
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from differentiable import cross_entropy, every_sample, grads
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cross_entropy_ext import functional, is_patched, patch_torch, unpatch_torch

# In a tuple, where the patch does not reach them.
NATIVE = (F.cross_entropy, F.nll_loss)
NATIVE_LINEAR = (getattr(F, "linear_cross_entropy", None),)  # of torch 2.13
has_linear = pytest.mark.skipif(NATIVE_LINEAR == (None,), reason="this torch has no linear_cross_entropy")
FROM_IMPORTS = (
    "from torch.nn import CrossEntropyLoss, NLLLoss\nfrom torch.nn.functional import cross_entropy, nll_loss\n"
)
OP = torch.ops.cross_entropy_ext.cross_entropy.default


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """Every test begins and ends with PyTorch as it is, and finds the compiler new."""
    torch._dynamo.reset()
    yield
    for _ in range(100):
        unpatch_torch()
    assert is_native()


def is_native() -> bool:
    return (F.cross_entropy, F.nll_loss) == NATIVE and (getattr(F, "linear_cross_entropy", None),) == NATIVE_LINEAR


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of this package's functions, one for each time that they are called."""
    made: list[str] = []

    def recorded(name: str) -> Callable[..., Tensor]:
        function = getattr(functional, name)

        @functools.wraps(function)
        def record(*arguments: object, **options: object) -> Tensor:
            made.append(name)
            return function(*arguments, **options)

        return record

    for name in ("cross_entropy", "nll_loss", "linear_cross_entropy"):
        monkeypatch.setattr(functional, name, recorded(name))
    return made


@pytest.fixture
def make_module(tmp_path: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a source text as a module, as any other that somebody wrote."""
    names = []

    def make(source: str) -> ModuleType:
        names.append(f"a_client_{len(names)}")
        (tmp_path / f"{names[-1]}.py").write_text(source)
        return importlib.import_module(names[-1])

    sys.path.insert(0, str(tmp_path))
    yield make
    sys.path.remove(str(tmp_path))
    for name in names:
        sys.modules.pop(name, None)


def problem() -> tuple[Tensor, Tensor]:
    """Log-probabilities, which both losses take."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 9, generator=generator).log_softmax(1), torch.randint(9, (6,), generator=generator)


# -- Everything that looks them up ---------------------------------------------------------------------------


class Weighted(nn.CrossEntropyLoss):
    """What people derive."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


FROM_BEFORE = (nn.CrossEntropyLoss(), nn.NLLLoss(), Weighted())
LOOKUPS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "F.cross_entropy": ("cross_entropy", lambda x, t: F.cross_entropy(x, t)),
    "torch.nn.functional.cross_entropy": ("cross_entropy", lambda x, t: torch.nn.functional.cross_entropy(x, t)),
    "nn.CrossEntropyLoss": ("cross_entropy", lambda x, t: nn.CrossEntropyLoss()(x, t)),
    "nn.modules.CrossEntropyLoss": ("cross_entropy", lambda x, t: nn.modules.CrossEntropyLoss()(x, t)),
    "nn.modules.loss.CrossEntropyLoss": ("cross_entropy", lambda x, t: nn.modules.loss.CrossEntropyLoss()(x, t)),
    "an instance": ("cross_entropy", FROM_BEFORE[0]),
    "a subclass": ("cross_entropy", FROM_BEFORE[2]),
    "F.nll_loss": ("nll_loss", lambda x, t: F.nll_loss(x, t)),
    "nn.NLLLoss": ("nll_loss", lambda x, t: nn.NLLLoss()(x, t)),
    "an instance of NLLLoss": ("nll_loss", FROM_BEFORE[1]),
}


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_everything_that_looks_them_up(lookup: str, calls: list[str]) -> None:
    name, loss = LOOKUPS[lookup]
    expected = loss(*problem())
    assert not calls
    with patch_torch():
        found = loss(*problem())
        assert calls == [name]
    loss(*problem())
    assert calls == [name]
    torch.testing.assert_close(found, expected)


@has_linear
@pytest.mark.parametrize("chunked", [False, True])
def test_the_output_layer_and_its_loss(chunked: bool, calls: list[str]) -> None:
    """The function and the class, made before or while patched; with native's options, and its gradients."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=2, chunking_method=None) if chunked else None
    x, target = problem()
    before = nn.LinearCrossEntropyLoss(9, 5, bias=True, options=options)
    inputs = [x.requires_grad_(), before.linear.weight, before.linear.bias]

    def losses() -> list[Tensor]:
        function = F.linear_cross_entropy(x, inputs[1], target % 5, linear_bias=inputs[2], options=options)
        since = nn.LinearCrossEntropyLoss(9, 5, bias=True, options=options)
        since.load_state_dict(before.state_dict())
        found = [function, before(x, target % 5), since(x, target % 5)]
        return [*found, *torch.autograd.grad(function, inputs)]

    expected = losses()
    with patch_torch():
        found = losses()
        assert calls == ["linear_cross_entropy"] * 3 and type(before) is nn.LinearCrossEntropyLoss
        assert F.linear_cross_entropy.__module__ == "cross_entropy_ext.patch"
        with pytest.raises(RuntimeError, match="ignore_index cannot be specified"):
            F.linear_cross_entropy(x, inputs[1], x[:, :5], ignore_index=0)
    torch.testing.assert_close(found, expected)


@has_linear
def test_the_output_layer_is_intercepted_recorded_and_compiled() -> None:
    """As the losses: a mode and a subclass see what F has, a graph of torch.fx records native's, and one compilation
    each is enough."""
    x, target = problem()
    weight = torch.randn(5, 9)
    expected = F.linear_cross_entropy(x, weight, target % 5)

    def step(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, weight, target, reduction="sum")

    class Module(nn.Module):
        def forward(self, x, weight, target):
            return step(x, weight, target)

    class Halving(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            return result / 2 if function is F.linear_cross_entropy else result

    with patch_torch():
        with Halving():
            torch.testing.assert_close(F.linear_cross_entropy(x, weight, target % 5), expected / 2)
        found = F.linear_cross_entropy(x.as_subclass(Named), weight, target % 5)
        assert type(found) is Named
        torch.testing.assert_close(found.as_subclass(Tensor), expected)
        graph = torch.fx.symbolic_trace(Module())
        assert NATIVE_LINEAR[0] in [node.target for node in graph.graph.nodes]
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, weight, target % 5), 6 * expected)
    torch.testing.assert_close(graph(x, weight, target % 5), 6 * expected)
    torch.testing.assert_close(compiled(x, weight, target % 5), 6 * expected)


@pytest.mark.parametrize("imported", ["before", "while patched"])
def test_from_imports(imported: str, calls: list[str], make_module: Callable[[str], ModuleType]) -> None:
    """`from torch.nn.functional import cross_entropy`, too, whenever it was."""
    client = make_module(FROM_IMPORTS) if imported == "before" else None
    with patch_torch():
        client = client or make_module(FROM_IMPORTS)
        client.cross_entropy(*problem())
        client.nll_loss(*problem())
        client.CrossEntropyLoss()(*problem())
        client.NLLLoss()(*problem())
    assert calls == ["cross_entropy", "nll_loss"] * 2
    assert (client.cross_entropy, client.nll_loss) == NATIVE
    assert (client.CrossEntropyLoss, client.NLLLoss) == (nn.CrossEntropyLoss, nn.NLLLoss)


def test_a_name_bound_anew_between_two_patches(calls: list[str], make_module: Callable[[str], ModuleType]) -> None:
    """Every call of patch_torch searches, also where another is in effect."""
    client = make_module("cross_entropy = None")
    with patch_torch():
        client.cross_entropy = NATIVE[0]
        with patch_torch():
            client.cross_entropy(*problem())
    assert calls == ["cross_entropy"] and client.cross_entropy is NATIVE[0]


def test_what_others_change_in_between_is_left(make_module: Callable[[str], ModuleType]) -> None:
    def somebody_elses(*arguments: object) -> str:
        return "somebody else's"

    client = make_module(FROM_IMPORTS)
    with patch_torch():
        client.cross_entropy = somebody_elses
        del client.nll_loss
    assert client.cross_entropy is somebody_elses and not hasattr(client, "nll_loss")


def test_a_replacement_kept_elsewhere_is_native_again(calls: list[str]) -> None:
    with patch_torch():
        kept = functools.partial(F.cross_entropy, reduction="sum"), {"nll": F.nll_loss}
        kept[0](*problem()), kept[1]["nll"](*problem())
    assert calls == ["cross_entropy", "nll_loss"]
    assert torch.equal(kept[0](*problem()), F.cross_entropy(*problem(), reduction="sum"))
    assert torch.equal(kept[1]["nll"](*problem()), F.nll_loss(*problem()))
    assert len(calls) == 2


def test_modules_that_load_when_they_are_asked(tmp_path: Path) -> None:
    """Neither patching nor undoing it asks them, and what is no module at all is passed over."""
    path = tmp_path / "a_lazy_client.py"
    path.write_text("raise AssertionError('this was not to be loaded')")
    spec = importlib.util.spec_from_file_location("a_lazy_client", path)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    lazy = importlib.util.module_from_spec(spec)
    sys.modules.update(a_lazy_client=lazy, not_a_module=object(), blocked=None)
    try:
        spec.loader.exec_module(lazy)
        with patch_torch():
            pass
    finally:
        for name in ("a_lazy_client", "not_a_module", "blocked"):
            del sys.modules[name]


# -- Nothing else changes ------------------------------------------------------------------------------------


@every_sample
def test_values_and_gradients(sample) -> None:
    """The patched function is this package's, bit for bit."""
    logits, target, options = sample.make()
    expected = grads(cross_entropy, logits, target, options)
    with patch_torch():
        found = grads(F.cross_entropy, logits, target, options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", pytest.param("linear_cross_entropy", marks=has_linear)])
def test_the_functions_look_the_same(name: str) -> None:
    def look() -> tuple[inspect.Signature, str, str]:
        function = getattr(F, name)
        return inspect.signature(function), function.__doc__, function.__name__

    expected = look()
    with patch_torch():
        assert look() == expected


@pytest.mark.parametrize(
    "arguments",
    [
        (problem()[0], problem()[1], None, None, -100, None, "median"),
        (problem()[0], problem()[1][:3]),
        (problem()[0], problem()[1] + 9),
        (problem()[0], "a string"),
        ([[1.0, 2.0]], [1]),
        (problem()[0],),
        (*problem(), torch.ones(4)),
        (*problem(), None, None, -100, None, "mean", 1.5),
    ],
    ids=["reduction", "shapes", "no class", "string", "lists", "too few", "weight", "smoothing"],
)
def test_errors_are_the_same(arguments: tuple) -> None:
    def message() -> tuple[type, str]:
        with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)) as caught:
            F.cross_entropy(*arguments)
        return caught.type, str(caught.value).splitlines()[0]

    expected = message()
    with patch_torch():
        assert message() == expected


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
def test_arguments_of_the_package_stay_the_packages() -> None:
    """Who writes them has a name for this package; the patched function takes what native takes."""
    with patch_torch(), pytest.raises(TypeError, match="unexpected keyword argument 'loss_dtype'"):
        F.cross_entropy(*problem(), loss_dtype=torch.float64)
    with patch_torch():
        assert F.cross_entropy(*problem(), reduce=False).shape == (6,)


def test_classes_are_what_they_were() -> None:
    before = nn.CrossEntropyLoss(), nn.NLLLoss()
    with patch_torch():
        since = nn.CrossEntropyLoss(), nn.NLLLoss()
        for losses in (before, since):
            assert type(losses[0]) is nn.CrossEntropyLoss and type(losses[1]) is nn.NLLLoss
            assert isinstance(losses[0], nn.CrossEntropyLoss) and isinstance(losses[1], nn.NLLLoss)
        assert isinstance(Weighted(), nn.CrossEntropyLoss) and isinstance(before[0], nn.modules.loss._WeightedLoss)
    assert type(since[0]) is nn.CrossEntropyLoss


def test_pickles() -> None:
    """What is pickled while patched does not depend on it, nor on this package."""
    loss, derived = nn.CrossEntropyLoss(torch.ones(9), ignore_index=3), Weighted(label_smoothing=0.1)
    expected = pickle.dumps(loss)
    with patch_torch():
        assert pickle.dumps(loss) == expected and b"cross_entropy_ext" not in expected
        kept = pickle.dumps([loss, derived, nn.CrossEntropyLoss])
        file = io.BytesIO()
        torch.save(nn.ModuleList([loss, derived]), file)
        assert copy.deepcopy(derived).label_smoothing == 0.1
        function = pickle.loads(pickle.dumps(F.cross_entropy))
        assert function is F.cross_entropy
    loaded, _, cls = pickle.loads(kept)
    assert type(loaded) is cls is nn.CrossEntropyLoss and loaded.ignore_index == 3
    file.seek(0)
    assert isinstance(torch.load(file, weights_only=False)[1], Weighted)


# -- Calls, contexts, threads --------------------------------------------------------------------------------


def test_one_call_undoes_those_before() -> None:
    """A cell of a notebook that runs again patches once."""
    for _ in range(3):
        patch_torch()
        assert is_patched() and not is_native()
    unpatch_torch()
    assert is_native() and not is_patched()
    unpatch_torch()  # nothing to undo
    with patch_torch():
        assert not is_native()
    assert is_native()


def test_contexts_are_not_undone_by_calls() -> None:
    """A `with` lasts as long as it does, whatever is called in it and how often."""
    patch_torch()
    with patch_torch():
        patch_torch()
        unpatch_torch()
        assert is_patched()
        with patch_torch():
            pass
        assert is_patched() and not is_native()
    assert is_native()


def test_a_patched_loss_is_told_from_a_native_one() -> None:
    assert (F.cross_entropy.__module__, F.nll_loss.__module__) == ("torch.nn.functional",) * 2
    with patch_torch():
        assert (F.cross_entropy.__module__, F.nll_loss.__module__) == ("cross_entropy_ext.patch",) * 2


def test_contexts_end_in_any_order() -> None:
    first, second, third = patch_torch(), patch_torch(), patch_torch()
    for level in (second, first):
        with level:
            pass
        assert not is_native()
    with third:
        pass
    assert is_native()


def test_a_context_undoes_its_own_call_only() -> None:
    patch_torch()
    with patch_torch():
        unpatch_torch()  # the inner one, which has nothing left to undo
        assert not is_native()
    assert not is_native()
    unpatch_torch()
    assert is_native()


def test_a_context_that_raises() -> None:
    with pytest.raises(ZeroDivisionError), patch_torch():
        1 / 0  # noqa: B018
    assert is_native()


def test_a_context_is_for_once() -> None:
    level = patch_torch()
    with level:
        pass
    with pytest.raises(RuntimeError, match="has been undone"), level:
        pass
    assert is_native()


def test_threads(calls: list[str]) -> None:
    """Each is patched for as long as it wants to be, and right for as long as it is not."""
    expected = F.cross_entropy(*problem())
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        choose = random.Random(seed)
        try:
            for _ in range(30):
                with contextlib.ExitStack() as stack:
                    for _ in range(choose.randrange(3)):
                        stack.enter_context(patch_torch())
                        before = len(calls)
                        torch.testing.assert_close(nn.CrossEntropyLoss()(*problem()), expected)
                        assert len(calls) > before
                torch.testing.assert_close(F.cross_entropy(*problem()), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and is_native()


# -- Those who intercept, record and compile -----------------------------------------------------------------


class Named(Tensor):
    """A subclass that does nothing but to be one."""


def test_what_the_package_hands_to_native_comes_to_native() -> None:
    """Subclasses, and arguments that only PyTorch's parser understands: its own fallbacks are not patched."""
    logits, target = problem()
    for arguments in (
        (logits.as_subclass(Named), target),
        (logits, target, torch.ones(9).as_subclass(Named)),
        (logits, target, None, None, -100, None, "mean", 1),
    ):
        expected = F.cross_entropy(*arguments)
        with patch_torch():
            found = F.cross_entropy(*arguments)
        assert type(found) is type(expected)
        torch.testing.assert_close(found, expected)


class Doubling(TorchFunctionMode):
    """Twice the loss, known by the name that it has."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        return 2 * result if function in (F.cross_entropy, F.nll_loss) else result


class Doubled(Tensor):
    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        result = super().__torch_function__(function, types, arguments, options)
        return 2 * result.as_subclass(Tensor) if function in (F.cross_entropy, F.nll_loss) else result


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_torch_function(name: str, calls: list[str]) -> None:
    """Who intercepts the function by its name sees it, once, and all its arguments."""
    logits, target = problem()
    expected = 2 * getattr(F, name)(logits, target, reduction="sum")
    for arguments, mode in (((logits, target), Doubling()), ((logits.as_subclass(Doubled), target), None)):
        with mode or contextlib.nullcontext():
            torch.testing.assert_close(getattr(F, name)(*arguments, reduction="sum"), expected)
            with patch_torch():
                torch.testing.assert_close(getattr(F, name)(*arguments, reduction="sum"), expected)
            torch.testing.assert_close(getattr(F, name)(*arguments, reduction="sum"), expected)
    assert calls == [name, name]
    with patch_torch(), torch.device("cpu"):  # a mode that changes nothing
        getattr(F, name)(logits, target)
    assert calls == [name, name, name]


def test_transforms(calls: list[str]) -> None:
    logits, target = problem()
    with patch_torch():
        gradient = torch.func.vmap(torch.func.grad(lambda x, t: F.cross_entropy(x, t)))(logits, target)
    torch.testing.assert_close(gradient, logits.softmax(1) - F.one_hot(target, 9))
    assert calls


def scripted(x: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(x, t, label_smoothing=0.1) + F.nll_loss(x, t)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_native() -> None:
    """There is no Python in it to call, and so no patch either."""
    expected = scripted(*problem())
    with patch_torch():
        function, module = torch.jit.script(scripted), torch.jit.script(nn.CrossEntropyLoss())
        torch.testing.assert_close(function(*problem()), expected, rtol=0, atol=0)
        torch.testing.assert_close(module(*problem()), nn.CrossEntropyLoss()(*problem()))
        operators = str(function.inlined_graph) + str(module.inlined_graph)
    assert "aten::cross_entropy_loss" in operators and "cross_entropy_ext" not in operators


def test_fx_records_a_name(calls: list[str]) -> None:
    """Recorded while patched or not, a graph looks the function up when it runs."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(x, t) + F.nll_loss(x, t)

    graphs = [torch.fx.symbolic_trace(model)]
    with patch_torch():
        graphs.append(torch.fx.symbolic_trace(model))
    for graph in graphs:
        assert set(NATIVE) <= {node.target for node in graph.graph.nodes}
        del calls[:]
        graph(*problem())
        assert not calls
        with patch_torch():
            graph(*problem())
        assert calls == ["cross_entropy", "nll_loss"]


# -- torch.compile -------------------------------------------------------------------------------------------


class Graphs:
    """A backend that keeps what AOTAutograd makes of the graphs: the operators that run in the end."""

    def __init__(self) -> None:
        self.graphs: list[set[object]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.aot_autograd import make_boxed_func

        def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
            self.graphs.append({node.target for node in graph.graph.nodes if node.op == "call_function"})
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=keep)(graph, inputs)

    def ours(self) -> bool:
        """Whether the last graph has an operator of this package."""
        return any(getattr(operator, "namespace", "") == "cross_entropy_ext" for operator in self.graphs[-1])


def constructs(x: Tensor, t: Tensor) -> Tensor:
    return nn.CrossEntropyLoss(label_smoothing=0.1)(x, t)


COMPILED = {
    "function": lambda x, t: F.cross_entropy(x, t, label_smoothing=0.1),
    "module": nn.CrossEntropyLoss(),
    "subclass": Weighted(),
}


@pytest.mark.parametrize("first", ["native", "patched"])
@pytest.mark.parametrize("name", ["function", "module", "subclass"])
def test_compiled(name: str, first: str) -> None:
    """In one graph; compiled anew when the patch begins or ends, and only then; both are kept."""
    backend = Graphs()
    function = torch.compile(COMPILED[name], backend=backend, fullgraph=True)
    expected = COMPILED[name](*problem())
    for turn, patched in enumerate([first == "patched", first == "native"] * 2):
        with patch_torch() if patched else contextlib.nullcontext():
            torch.testing.assert_close(function(*problem()), expected)
            if turn < 2:
                assert len(backend.graphs) == turn + 1 and backend.ours() == patched
            with patch_torch() if patched else contextlib.nullcontext():  # two at a time are no reason
                function(*problem())
    assert len(backend.graphs) == 2


def test_compiled_gradients() -> None:
    logits, target = problem()
    logits.requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(3 * logits, target), logits)
    function = torch.compile(lambda x, t: F.cross_entropy(3 * x, t), fullgraph=True, dynamic=True, backend="aot_eager")
    with patch_torch():
        (found,) = torch.autograd.grad(function(logits, target), logits)
    torch.testing.assert_close(found, expected)


def test_compiled_nll_loss() -> None:
    function = torch.compile(nn.NLLLoss(), fullgraph=True, backend="aot_eager")
    expected = nn.NLLLoss()(*problem())
    with patch_torch():
        torch.testing.assert_close(function(*problem()), expected)
    torch.testing.assert_close(function(*problem()), expected)


def test_a_compiled_function_that_constructs_the_loss() -> None:
    """torch.compile has a rule of its own for the class, which does not look at the function again: what is compiled
    stays, and is right, until it is told to forget."""
    backend = Graphs()
    function = torch.compile(constructs, backend=backend, fullgraph=True)
    expected = constructs(*problem())
    for patched in (False, True, False):
        torch.compiler.reset()
        with patch_torch() if patched else contextlib.nullcontext():
            torch.testing.assert_close(function(*problem()), expected)
            assert backend.ours() == patched
    with patch_torch():
        torch.testing.assert_close(function(*problem()), expected)
    assert len(backend.graphs) == 3


def test_compiled_under_a_mode() -> None:
    """The patched function asks the mode. The native one asks it or not, by what torch has compiled before."""

    def compiled() -> Callable[..., Tensor]:
        return torch.compile(lambda x, t: F.cross_entropy(x, t), fullgraph=True, backend="aot_eager")

    function, expected = compiled(), 2 * F.cross_entropy(*problem())
    with patch_torch(), Doubling():
        torch.testing.assert_close(function(*problem()), expected)
    with Doubling():
        torch.testing.assert_close(function(*problem()), compiled()(*problem()))


PATCH_FIRST = """
import torch, sys, torch.nn.functional as F
from cross_entropy_ext import patch_torch, unpatch_torch
assert "torch._dynamo" not in sys.modules
native = [F.cross_entropy]
patch_torch()
targets = []
def backend(graph, inputs):
    targets.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
    return graph.forward
function = torch.compile(lambda x, t: F.cross_entropy(x, t), backend=backend, fullgraph=True)
x, t = torch.randn(4, 5), torch.randint(5, (4,))
function(x, t)
unpatch_torch()
function(x, t)
assert targets == [[torch.ops.cross_entropy_ext.cross_entropy.default], native], targets
from torch.utils.flop_counter import flop_registry
assert torch.ops.cross_entropy_ext.linear_cross_entropy in flop_registry
"""


def test_patched_before_the_compiler_is_imported() -> None:
    """The compiler keeps a table of torch's functions by their names: ours must not get into it."""
    done = subprocess.run([sys.executable, "-c", PATCH_FIRST], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_export() -> None:
    with patch_torch():
        program = torch.export.export(nn.CrossEntropyLoss(), problem())
    assert OP in {node.target for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(*problem()), F.cross_entropy(*problem()))

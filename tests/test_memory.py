"""Memory: what a step takes at its peak, what it keeps between forward and backward, and the pages of large
gradients, which are kept from step to step, bounded, never shared with a gradient that is alive, and given
back when asked."""

from __future__ import annotations

import copy
import gc
import io
import json
import os
import random
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path

import pytest
import torch
from differentiable import close, cross_entropy, grads, labels, native, same
from torch.utils.checkpoint import checkpoint

import cross_entropy_ext

MIB = 2**20
HUGE_PAGE = 2 * MIB  # what a large gradient's size is rounded up to


@pytest.fixture(autouse=True)
def empty_cache():
    """Every test begins with nothing kept."""
    gc.collect()
    cross_entropy_ext.empty_cache()
    yield
    cross_entropy_ext.empty_cache()


def run_alone(body: str, **environment: str):
    """What `body` leaves in `result`, run in a process of its own, where nothing else takes or frees
    memory."""
    prelude = """
        import gc, json, random, sys
        import torch
        import torch.nn.functional as F
        import cross_entropy_ext
        from cross_entropy_ext.functional import cross_entropy

        MIB = 2**20

        def status(field):
            with open("/proc/self/status") as lines:
                return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

        def resident():
            return status("VmRSS:")

        def reset_peak():
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")

        def peak():
            return status("VmHWM:")
    """
    script = textwrap.dedent(prelude) + textwrap.dedent(body) + "\njson.dump(result, sys.stdout)\n"
    root = str(Path(cross_entropy_ext.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2", **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def can_reset_peak() -> bool:
    """Linux, and a kernel that lets a process reset its own peak."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        with open("/proc/self/status") as file:
            return "VmHWM:" in file.read()
    except OSError:
        return False


SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")
needs_peak = pytest.mark.skipif(
    SANITIZED or not can_reset_peak(),
    reason="the peak can be measured and reset by /proc on Linux only, and says nothing with a sanitizer's quarantine",
)
needs_resident = pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc on Linux only"
)


# -- the peak of one step ------------------------------------------------------------------------------------

# case: the most that forward + backward may take on top of what is there, in sizes of the logits
SLACK = 0.06  # thread stacks, lse, the rounding of an allocation to a huge page
PEAKS = {
    "labels": 1 + SLACK,
    "labels, smoothing, weights": 1 + SLACK,
    "labels, none": 1 + SLACK,
    "labels, ignored": 1 + SLACK,
    "bfloat16": 1 + SLACK,
    "float64": 1 + SLACK,
    "autocast": 1 + SLACK,
    "soft target": 1 + SLACK,
    "soft target with a gradient": 2 + SLACK,
    "pixels": 1 + SLACK,
    "pixels, channels_last": 1 + SLACK,
    "tokens, transposed": 1 + SLACK,
    "row slices": 1 + SLACK,
    "inplace": SLACK,
    "inplace, view": SLACK,
    "inplace, bfloat16": SLACK,
    "inplace, smoothing, weights": SLACK,
    "inplace, channels_last": SLACK,
    "inplace, soft target": SLACK,
    "no grad": SLACK,
    "no grad, pixels": SLACK,
}


@needs_peak
def test_peak_of_a_step():
    """One gradient per tensor that has one; in place and without grad nothing. No copy for any dtype or
    layout."""
    peaks = run_alone("""
        class Layer(torch.autograd.Function):  # its result is no leaf, and takes no memory
            @staticmethod
            def forward(ctx, anything, logits):
                return logits.data

            @staticmethod
            def backward(ctx, grad):
                return None, grad

        def measure(logits, target, view=lambda x: x, loss=cross_entropy, grad=True, q_grad=False, **options):
            # one small step for what is allocated once
            cross_entropy(torch.randn(8, 8, requires_grad=True), torch.arange(8)).backward()
            size = view(logits).numel() * logits.element_size()
            x = Layer.apply(torch.ones((), requires_grad=True), logits) if grad else logits
            if q_grad:
                target.requires_grad_()
            gc.collect()
            cross_entropy_ext.empty_cache()
            reset_peak()
            before = resident()
            with torch.set_grad_enabled(grad):
                y = loss(view(x), target, **options)
            if grad:
                found = torch.autograd.grad(y.sum(), [t for t in (x, target) if t.requires_grad])
            return (peak() - before) / size

        N, C = 2048, 8192  # 64 MiB in float32
        flat = lambda dtype=torch.float32: torch.randn(N, C).to(dtype)
        y = lambda *size, classes=C: torch.randint(classes, size)
        image = lambda: torch.randn(4, 64, 256, 256)
        w = torch.rand(C) + 0.5
        inplace = {"inplace": True}
        result = {
            "native": measure(flat(), y(N), loss=F.cross_entropy),
            "labels": measure(flat(), y(N)),
            "labels, smoothing, weights": measure(flat(), y(N), weight=w, label_smoothing=0.1),
            "labels, none": measure(flat(), y(N), reduction="none"),
            "labels, ignored": measure(flat(), y(N), ignore_index=3),
            "bfloat16": measure(flat(torch.bfloat16), y(N)),
            "float64": measure(flat(torch.float64), y(N)),
            "soft target": measure(flat(), flat().softmax(1)),
            "soft target with a gradient": measure(flat(), flat().softmax(1), q_grad=True),
            "pixels": measure(image(), y(4, 256, 256, classes=64)),
            "pixels, channels_last": measure(
                image().to(memory_format=torch.channels_last), y(4, 256, 256, classes=64)
            ),
            "tokens, transposed": measure(torch.randn(2, N // 2, C).transpose(1, 2), y(2, N // 2)),
            "row slices": measure(torch.randn(N, C + 64)[:, :C], y(N)),
            "inplace": measure(flat(), y(N), **inplace),
            "inplace, view": measure(
                torch.randn(2, N // 2, C), y(N), view=lambda x: x.view(-1, C), **inplace
            ),
            "inplace, bfloat16": measure(flat(torch.bfloat16), y(N), **inplace),
            "inplace, smoothing, weights": measure(flat(), y(N), weight=w, label_smoothing=0.1, **inplace),
            "inplace, channels_last": measure(
                image().to(memory_format=torch.channels_last), y(4, 256, 256, classes=64), **inplace
            ),
            "inplace, soft target": measure(flat(), flat().softmax(1), **inplace),
            "no grad": measure(flat(), y(N), grad=False),
            "no grad, pixels": measure(image(), y(4, 256, 256, classes=64), grad=False),
        }
        with torch.autocast("cpu", torch.bfloat16):
            result["autocast"] = measure(flat(torch.bfloat16), y(N))
    """)
    assert {case: peaks[case] for case, limit in PEAKS.items() if peaks[case] > limit} == {}
    assert peaks["native"] > 2 and peaks["labels"] > 0.9  # the measurement sees what it is for


# -- between forward and backward ----------------------------------------------------------------------------


def saved_tensors(function):
    """Every tensor that autograd saves while function runs."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = function()
    return saved, loss


def draw(kind, dtype=torch.float32):
    """(logits, target, options): at least 256 classes, so that no tensor of a row's size can hide."""
    torch.manual_seed(0)
    n, c = 32, 256
    logits = torch.randn(n, c).to(dtype)
    options = {"weight": torch.rand(c).to(dtype), "label_smoothing": 0.1} if kind == "options" else {}
    if kind == "soft":
        return logits, torch.randn(n, c).softmax(1).to(dtype), options
    if kind == "pixels":
        return (
            torch.randn(2, c, 4, 4).to(dtype).to(memory_format=torch.channels_last),
            labels(c, 2, 4, 4),
            options,
        )
    if kind == "none":
        options["reduction"] = "none"
    return logits, labels(c, n, ignored=kind == "ignored"), options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["labels", "options", "none", "ignored", "soft", "pixels"])
def test_saved_tensors(kind, dtype):
    """Of the logits' size only the logits (and a soft target) are saved, as they are; else a few numbers
    per row."""
    logits, target, options = draw(kind, dtype)
    logits.requires_grad_()
    saved, _ = saved_tensors(lambda: cross_entropy(logits, target, **options))
    inputs = {t.data_ptr() for t in (logits, target, *options.values()) if isinstance(t, torch.Tensor)}
    positions = logits.numel() // logits.size(1)
    own = [t for t in saved if t.data_ptr() not in inputs]
    assert sum(t.numel() * t.element_size() for t in own) <= positions * 8 * 3 + 64
    assert any(t.data_ptr() == logits.data_ptr() for t in saved)


def test_saved_under_autocast():
    """Half logits are read as they are: no float32 copy of them is saved, or made."""
    logits, target, _ = draw("labels", torch.bfloat16)
    logits.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        saved, loss = saved_tensors(lambda: cross_entropy(logits, target))
    assert loss.dtype == torch.float32
    assert all(t.data_ptr() == logits.data_ptr() for t in saved if t.numel() >= logits.numel())


def test_saved_tensors_are_released():
    """After the backward, or when the loss goes unused, nothing of the graph stays alive."""

    class Holder:
        def __init__(self, tensor):
            self.tensor = tensor

    for walk in (True, False):
        alive = []

        def pack(tensor, alive=alive):
            holder = Holder(tensor)
            alive.append(weakref.ref(holder))
            return holder

        x, t, _ = draw("labels")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
            loss = cross_entropy(x.requires_grad_(), t)
        assert alive and all(ref() is not None for ref in alive)
        if walk:
            loss.backward()
        else:
            del loss
        assert all(ref() is None for ref in alive)


def test_no_reference_cycles():
    """Logits, loss and gradient are freed by reference counting alone."""
    gc.collect()
    gc.disable()
    try:
        x, t, _ = draw("labels")
        x = x.requires_grad_() * 1
        loss = cross_entropy(x, t, inplace=True)
        loss.backward()
        refs = [weakref.ref(x), weakref.ref(loss)]
        del x, loss
        assert all(ref() is None for ref in refs)
    finally:
        gc.enable()


# -- the pages of large gradients ----------------------------------------------------------------------------


def gradient(rows=512, classes=2048, dtype=torch.float32, seed=0):
    """A gradient of 4 MiB by default, and the logits and labels that it is of."""
    torch.manual_seed(seed)
    x = torch.randn(rows, classes).to(dtype).requires_grad_()
    t = torch.randint(classes, (rows,))
    (g,) = torch.autograd.grad(cross_entropy(x, t), x)
    return g, x.detach(), t


def expected(x, t):
    """The float64 gradient, from its formula."""
    g = x.double().softmax(1)
    g[torch.arange(len(t)), t] -= 1
    return g / len(t)


def check(g, x, t):
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(g.double(), expected(x, t), rtol=4 * eps, atol=4 * eps / len(t))


@needs_resident
def test_freed_pages_are_used_again():
    """The second step's gradient lies where the first one's did, and faults in no page of its own."""
    result = run_alone("""
        import resource

        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

        def step(x, t):
            return torch.autograd.grad(cross_entropy(x, t), x)[0]

        x, t = torch.randn(2048, 8192, requires_grad=True), torch.randint(8192, (2048,))
        addresses, counts = [], []
        for _ in range(6):
            before = faults()
            g = step(x, t)
            counts.append(faults() - before)
            addresses.append(g.data_ptr())
            del g
        held = resident()
        freed = cross_entropy_ext.empty_cache()
        result = {
            "addresses": len(set(addresses)),
            "faults": min(counts[1:]),
            "freed": freed,
            "fallen": held - resident(),
            "again": cross_entropy_ext.empty_cache(),
        }
    """)
    assert result["addresses"] == 1
    assert result["faults"] < 64 * MIB / 4096 / 8  # of 16384 small pages
    assert 64 * MIB <= result["freed"] <= 64 * MIB + HUGE_PAGE
    assert result["fallen"] >= 0.9 * 64 * MIB
    assert result["again"] == 0


def test_empty_cache_counts_bytes():
    """It returns what was kept, leaves alone what is in use, and has nothing more to give the second time."""
    assert cross_entropy_ext.empty_cache() == 0
    g, x, t = gradient()
    assert cross_entropy_ext.empty_cache() == 0  # in use
    check(g, x, t)
    del g
    assert 4 * MIB <= cross_entropy_ext.empty_cache() <= 4 * MIB + HUGE_PAGE
    assert cross_entropy_ext.empty_cache() == 0
    g, x, t = gradient(seed=1)  # and the next step begins anew
    check(g, x, t)


def test_small_gradients_are_not_kept():
    """Only large gradients are worth it."""
    for _ in range(3):
        gradient(rows=64, classes=64)
    assert cross_entropy_ext.empty_cache() == 0


def test_kept_pages_are_bounded():
    """Freed and live gradients together never take more than live ones alone once did, in any order of
    sizes."""
    result = run_alone("""
        random.seed(0)
        page = 2 * MIB
        rounded = lambda g: -(-g.numel() * g.element_size() // page) * page
        live, peak_live, worst = [], 0, 0
        for _ in range(100):
            if live and (random.random() < 0.5 or len(live) > 4):
                live.pop(random.randrange(len(live)))
            else:
                x = torch.zeros(random.choice([64, 96, 128, 150, 192, 256, 320]), 8192, requires_grad=True)
                t = torch.zeros(len(x), dtype=torch.long)
                live.append(torch.autograd.grad(cross_entropy(x, t), x)[0])
            held = sum(map(rounded, live))
            peak_live = max(peak_live, held)
            if random.random() < 0.1:
                worst = max(worst, cross_entropy_ext.empty_cache() + held - peak_live)
        live.clear()
        worst = max(worst, cross_entropy_ext.empty_cache() - peak_live)
        result = {"worst": worst, "peak": peak_live}
    """)
    assert result["peak"] > 16 * MIB
    assert result["worst"] <= 0


def test_kept_pages_are_bounded_after_smaller_gradients():
    """Two gradients that would fit into what one larger one left: not one in all of it and one beside it."""
    result = run_alone("""
        def step(megabytes):
            x = torch.zeros(megabytes * 32, 8192, requires_grad=True)
            return torch.autograd.grad(cross_entropy(x, torch.zeros(len(x), dtype=torch.long)), x)[0]

        large = step(40)
        del large
        small = [step(22)]
        small.append(step(18))
        small.clear()
        result = cross_entropy_ext.empty_cache()
    """)
    assert result <= 40 * MIB


@needs_resident
def test_kept_pages_are_bounded_in_resident_memory():
    """The same seen from outside: a growing and then shrinking batch leaves no more than its largest
    gradients."""
    result = run_alone("""
        t = torch.randint(8192, (2048,))
        leaf = [torch.randn(n, 8192, requires_grad=True) for n in (512, 1024, 1536, 2048)]
        base = resident()
        for z in leaf + leaf[::-1] + leaf:
            g = torch.autograd.grad(cross_entropy(z, t[: len(z)]), z)[0]
            del g
        result = {"grown": resident() - base}
    """)
    assert result["grown"] <= 64 * MIB * 1.1  # the largest gradient, 2048 x 8192 float32


@needs_peak
def test_peak_of_many_steps():
    """Ten steps of a model take no more at their peak than the first."""
    result = run_alone("""
        w = torch.randn(64, 8192, requires_grad=True)
        def step(seed):
            torch.manual_seed(seed)
            h, t = torch.randn(2048, 64), torch.randint(8192, (2048,))
            loss = cross_entropy(h @ w, t)
            loss.backward()
            w.grad = None
        reset_peak()
        step(0)
        step(1)
        first = peak()
        for seed in range(2, 12):
            step(seed)
        result = {"first": first, "last": peak()}
    """)
    assert result["last"] <= result["first"] + 8 * MIB


@needs_peak
def test_peak_under_ddp():
    """A model that returns its loss and its logits: a gradient less than native. If DDP looks for unused parameters,
    it copies the logits after the forward, where both losses have memory of their own: then no more than native."""
    peaks = run_alone("""
        import torch.distributed as dist

        class Model(torch.nn.Linear):
            def forward(self, states, target, loss):
                logits = super().forward(states)
                return loss(logits, target), logits

        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        states, target = torch.randn(1024, 16), torch.randint(8192, (1024,))

        def measure(loss, find_unused_parameters):
            model = torch.nn.parallel.DistributedDataParallel(
                Model(16, 8192), find_unused_parameters=find_unused_parameters
            )
            model(states, target, loss)[0].backward()
            gc.collect()
            cross_entropy_ext.empty_cache()
            reset_peak()
            before = resident()
            model(states, target, loss)[0].backward()
            return (peak() - before) / (4 * 1024 * 8192)  # in sizes of the logits

        losses = {"native": F.cross_entropy, "ours": cross_entropy}
        result = {name: [measure(loss, find) for find in (False, True)] for name, loss in losses.items()}
        dist.destroy_process_group()
    """)
    assert peaks["native"] == pytest.approx([3, 3], abs=0.2)
    assert peaks["ours"] == pytest.approx([2, 3], abs=0.2)


# -- a gradient belongs to whoever holds it ------------------------------------------------------------------


def test_kept_gradients_are_not_overwritten():
    """Gradients that are still held, wholly or by a view, survive any number of later steps."""
    g, x, t = gradient()
    whole = g.clone()
    held = {
        "tensor": (gradient(seed=1)[0],),
        "slice": (gradient(seed=2)[0][5:9],),
        "detached": (gradient(seed=3)[0].detach(),),
        "numpy": (gradient(seed=4)[0].numpy(),),
        "dlpack": (torch.utils.dlpack.to_dlpack(gradient(seed=5)[0]),),
        "storage": (gradient(seed=6)[0].untyped_storage(),),
        "memoryview": (memoryview(gradient(seed=7)[0].numpy()),),
    }
    steps = [gradient(seed=10 + i) for i in range(3)]
    for i in range(20, 26):
        other, *_ = gradient(seed=i)
        assert other.data_ptr() != g.data_ptr()
    same(g, whole)
    check(g, x, t)
    for step in steps:
        check(*step)

    def fresh(seed):
        return gradient(seed=seed)[0]

    same(held["tensor"][0], fresh(1))
    same(held["slice"][0], fresh(2)[5:9])
    same(held["detached"][0], fresh(3))
    same(torch.from_numpy(held["numpy"][0]), fresh(4))
    same(torch.utils.dlpack.from_dlpack(held["dlpack"][0]), fresh(5))
    same(torch.tensor([], dtype=torch.float32).set_(held["storage"][0], 0, (512, 2048)), fresh(6))
    same(torch.frombuffer(held["memoryview"][0], dtype=torch.float32).view(512, 2048), fresh(7))


def test_accumulated_gradients():
    """x.grad made from our pages is added to, zeroed and set to None like any other."""
    _, x, t = gradient()
    one = grads(native, x, t, {}, torch.tensor(1.0))[1]
    x.requires_grad_()
    for steps in (1, 2, 3):
        cross_entropy(x, t).backward()
        torch.testing.assert_close(x.grad, one * steps, rtol=1e-5, atol=1e-9)
    x.grad.zero_()
    cross_entropy(x, t).backward()
    torch.testing.assert_close(x.grad, one, rtol=1e-5, atol=1e-9)
    x.grad = None
    cross_entropy(x, t).backward()
    torch.testing.assert_close(x.grad, one, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["resize_", "storage_resize", "share_memory", "save", "deepcopy", "set_data", "pinned"]
)
def test_gradients_are_ordinary_tensors(name):
    """What can be done with a native gradient's storage can be done with ours (FSDP resizes, processes
    share it)."""
    g = gradient()[0]
    kept = g.clone()
    if name == "resize_":
        g.resize_(513, 2048)
        same(g[:512], kept)
    elif name == "storage_resize":
        size = g.untyped_storage().size()
        g.untyped_storage().resize_(0)
        g.untyped_storage().resize_(size)
        g.copy_(kept)
        same(g, kept)
    elif name == "share_memory":
        try:
            same(g.share_memory_(), kept)
        except RuntimeError as error:
            if "shared memory" in str(error) or "shm" in str(error):
                pytest.skip(f"no shared memory on this machine: {error}")
            raise
    elif name == "save":
        buffer = io.BytesIO()
        torch.save(g, buffer)
        buffer.seek(0)
        same(torch.load(buffer), kept)
    elif name == "deepcopy":
        twin = copy.deepcopy(g)
        g.zero_()
        same(twin, kept)
    elif name == "set_data":
        p = torch.nn.Parameter(torch.zeros_like(kept))
        p.grad = g
        torch.optim.SGD([p], lr=1.0).step()
        same(p.detach(), -kept)
    else:
        assert not g.is_pinned()
        assert g.untyped_storage().size() == kept.numel() * 4  # no more than the tensor, for torch.save
    del g
    check(*gradient(seed=1))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)], ids=str)
def test_changing_types_and_sizes(order):
    """Pages go from one dtype and size to another: larger, smaller, barely different, and back."""
    kinds = [
        (512, 2048, torch.float32),
        (256, 2048, torch.float64),
        (512, 4096, torch.bfloat16),
        (515, 2053, torch.float32),
    ]
    for i in order * 2:
        g, x, t = gradient(*kinds[i], seed=i)
        assert g.shape == x.shape and g.dtype == x.dtype and g.is_contiguous()
        check(g, x, t)


def test_layouts_in_kept_pages():
    """Pages that held rows hold pixels next, in either memory format."""
    torch.manual_seed(0)
    image, target = torch.randn(2, 21, 320, 330), labels(21, 2, 320, 330, ignored=True)
    gradient()
    for memory_format in (torch.contiguous_format, torch.channels_last) * 2:
        x = image.to(memory_format=memory_format)
        g = grads(cross_entropy, x, target, {}, torch.tensor(1.0))[1]
        wide = grads(native, image.double(), target, {}, torch.tensor(1.0).double())[1]
        assert g.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(g.double(), wide, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:1].expand(64, 2048),
        lambda x: x[:, :1].expand(64, 2048),
        lambda x: x[:, :-1],
        lambda x: x[::2],
        lambda x: x.t()[:, ::2],
    ],
    ids=["expanded_rows", "expanded_classes", "cut", "every_second_row", "every_second_column"],
)
def test_a_large_gradient_has_memory_of_its_own_for_every_element(view):
    """Of logits that share addresses or leave gaps, the gradient is dense, as torch.empty_like is."""
    torch.manual_seed(0)
    x = view(torch.randn(64, 2048))
    target = labels(x.size(1), x.size(0), ignored=True)
    leaf = x.detach().requires_grad_()
    found = torch.autograd.grad(cross_entropy(leaf, target), leaf)[0]
    assert found.numel() * found.element_size() >= 2**16
    assert found.stride() == torch.empty_like(x).stride()
    wide = grads(native, x.double(), target, {}, torch.tensor(1.0).double())[1]
    torch.testing.assert_close(found.double(), wide, rtol=1e-5, atol=1e-10)


def test_threads():
    """Threads take and give back pages at the same time, and free each other's gradients; all values are
    right."""
    errors, passed_on = [], []

    def work(i):
        try:
            for step in range(4):
                g, x, t = gradient(256 + 64 * i, 2048, seed=i)
                check(g, x, t)
                if step == 2:
                    passed_on.append((g, x, t))
        except BaseException as error:  # handed to the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        cross_entropy_ext.empty_cache()
    for thread in threads:
        thread.join(120)
    assert not errors, errors
    assert len(passed_on) == 4
    for held in passed_on:
        check(*held)
    passed_on.clear()
    total = cross_entropy_ext.empty_cache()
    assert 0 < total <= 2 * sum((256 + 64 * i) * 2048 * 4 + HUGE_PAGE for i in range(4))


def test_checkpoint_and_retained_graphs_with_large_gradients():
    """Recomputation and repeated walks take pages of their own while the earlier gradient is held."""
    torch.manual_seed(0)
    x, t = torch.randn(1024, 2048, requires_grad=True), torch.randint(2048, (1024,))
    loss = cross_entropy(x, t, label_smoothing=0.1)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    second = torch.autograd.grad(loss, x)[0]
    third = torch.autograd.grad(
        checkpoint(lambda x: cross_entropy(x, t, label_smoothing=0.1), x, use_reentrant=False), x
    )[0]
    assert len({g.data_ptr() for g in (first, second, third)}) == 3
    same(second, first)
    same(third, first)
    wide = grads(native, x.double(), t, {"label_smoothing": 0.1}, torch.tensor(1.0).double())[1]
    torch.testing.assert_close(first.double(), wide, rtol=1e-5, atol=1e-10)


def test_gradient_outlives_the_interpreter_state():
    """A gradient that is alive when the process ends does no harm."""
    assert (
        run_alone("""
        x = torch.randn(2048, 2048, requires_grad=True)
        cross_entropy(x, torch.zeros(2048, dtype=torch.long)).backward()
        sys.keep = x.grad
        result = "done"
    """)
        == "done"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_fork():
    """A child has the kept pages for itself: it neither harms the parent nor waits for a lock."""
    assert run_alone(
        """
        import os
        torch.set_num_threads(1)
        def step(seed):
            torch.manual_seed(seed)
            x, t = torch.randn(2048, 2048, requires_grad=True), torch.randint(2048, (2048,))
            return torch.autograd.grad(cross_entropy(x, t), x)[0]
        kept = step(0)
        copy = kept.clone()
        step(1)  # freed at once: pages are kept when the child begins
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            good = torch.equal(step(0), copy) and cross_entropy_ext.empty_cache() > 0
            os._exit(0 if good else 1)
        again = torch.equal(step(0), copy)
        _, status_ = os.waitpid(child, 0)
        result = [os.waitstatus_to_exitcode(status_), again, torch.equal(kept, copy)]
        """,
        OMP_NUM_THREADS="1",
    ) == [0, True, True]


def test_values_do_not_depend_on_the_pages():
    """A gradient in fresh pages and one in used ones have the same bits."""
    random.seed(0)
    fresh, x, t = gradient()
    fresh = fresh.clone()
    used = gradient()[0]
    used.fill_(float("nan"))
    del used
    again = gradient()[0]
    same(again, fresh)
    close(again.double().sum(1), torch.zeros(512, dtype=torch.float64), tolerance=1e-8)
    check(again, x, t)

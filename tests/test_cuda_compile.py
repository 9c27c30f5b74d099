"""The CUDA code as its compilers see it, on machines without a GPU: what the kernels of each architecture use of a
multiprocessor, which instructions they are made of, and that the host code fits torch's CUDA headers.

A unit is all kernels of one type and one kind of target, for one architecture. UNITS has every type, every kind and
every architecture; `make kernels` (XENT_COMPILE_ALL=1) has all their combinations, and takes a quarter of an hour.
`make test` has the units in FEW, which take half a minute each. The kernels in TIGHT are compiled alone, which takes
seconds. A build with CUDA warns of what spills (setup.py).
"""

from __future__ import annotations

import fcntl
import functools
import importlib.metadata
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.utils.cpp_extension as cpp

CSRC = Path(__file__).parent.parent / "csrc"
CUDA = CSRC / "cuda"


# ---- tools -----------------------------------------------------------------------------------------------------------


def nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    return shutil.which("nvcc", path=os.pathsep.join([*(f"{home}/bin" for home in homes if home), os.environ["PATH"]]))


def cuobjdump() -> str | None:
    """The package's tools lie beside each other in a folder that is on no PATH."""
    try:
        files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    packaged = [str(file.locate()) for file in files if file.stem == "cuobjdump" and "bin" in file.parts]
    return next(filter(os.path.exists, packaged), shutil.which("cuobjdump"))


@functools.cache
def architectures() -> set[int]:
    listed = subprocess.run([nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return {int(number) for number in re.findall(r"compute_(\d+)$", listed, re.MULTILINE)}


def toolkit_headers() -> list[str]:
    """What nvcc adds to the include path; it may be a script that calls another in the toolkit."""
    said = run(nvcc(), "--dryrun", "-E", CUDA / "launch.cu")
    return re.findall(r'"-I([^"]+)"', re.search(r"^#\$ INCLUDES=(.*)$", said, re.MULTILINE)[1])


needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="there is no nvcc on the PATH or in CUDA_HOME")
needs_cuobjdump = pytest.mark.skipif(
    nvcc() is None or cuobjdump() is None, reason="needs nvcc, and cuobjdump (pip install nvidia-cuda-cuobjdump)"
)


def run(*command: str | Path) -> str:
    """What it prints, on either stream. A failure shows that and the command."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{said}"
    return said


def options_of_setup(compiler: str) -> list[str]:
    """What setup.py passes to it, as far as it says so literally."""
    return re.findall(r'"([^"]+)"', re.search(rf'"{compiler}": \[(.*)\]', (CSRC.parent / "setup.py").read_text())[1])


# ---- units -----------------------------------------------------------------------------------------------------------

TYPES = {"float16": "xent::Float16", "bfloat16": "xent::BFloat16", "float32": "float", "float64": "double"}
KINDS = {"index": "kIndex", "smoothed": "kSmoothedIndex", "soft": "kProbabilities", "general": "kGeneral"}


class Unit(NamedTuple):
    arch: int
    type: str
    kind: str

    def __str__(self) -> str:
        return f"sm_{self.arch}-{self.type}-{self.kind}"


UNITS = [
    Unit(90, "bfloat16", "index"),
    Unit(90, "bfloat16", "smoothed"),
    Unit(90, "bfloat16", "soft"),
    Unit(90, "float32", "index"),
    Unit(90, "float32", "soft"),
    Unit(90, "float64", "index"),
    Unit(80, "bfloat16", "index"),
    Unit(86, "float16", "soft"),
    Unit(100, "float32", "smoothed"),
    Unit(120, "float64", "soft"),
    Unit(90, "bfloat16", "general"),
    Unit(90, "float64", "general"),
    Unit(80, "float32", "general"),
]
if os.environ.get("XENT_COMPILE_ALL") == "1":
    UNITS = [Unit(*unit) for unit in itertools.product((90, 80, 86, 89, 100, 120), TYPES, KINDS)]

FEW = [Unit(90, "bfloat16", "index"), Unit(80, "float32", "general")]


def each(units: list[Unit]) -> pytest.MarkDecorator:
    cases = [pytest.param(unit, marks=() if unit in FEW else pytest.mark.long) for unit in units]
    return pytest.mark.parametrize("unit", cases, ids=str)


each_unit = each(UNITS)
# Whose instructions are looked at: in names of their own they differ from one architecture to the next.
each_unit_of_sm_90 = each([unit for unit in UNITS if unit.arch == 90])
# And whose loops: what a general task asks for is a loop within them, or a division.
each_plain_unit_of_sm_90 = each([unit for unit in UNITS if unit.arch == 90 and unit.kind != "general"])


def all_kernels(unit: Unit) -> str:
    parameters = f"{TYPES[unit.type]}, xent::Objective::{KINDS[unit.kind]}"
    return f"template xent::gpu::Status xent::gpu::launch_kind<{parameters}>(const Task&, const Plan&, void*);\n"


def rows_of_a_warp(unit: Unit) -> str:
    parameters = f"{TYPES[unit.type]}, xent::Objective::{KINDS[unit.kind]}, xent::gpu::Team::kWarp, true"
    return f"template __global__ void xent::gpu::rows<{parameters}>(const __grid_constant__ xent::gpu::Task);\n"


def compile_unit(unit: Unit, folder: Path, kernels: Callable[[Unit], str] = all_kernels) -> None:
    """Writes a .cubin, and beside it what ptxas says of each kernel."""
    source, unfinished = folder / f"{unit}.cu", folder / f"{unit}.unfinished"
    source.write_text('#include "cuda/kernels.cuh"\n' + kernels(unit))
    options = [*options_of_setup("nvcc"), f"-arch=sm_{unit.arch}", f"-I{CSRC}", "--resource-usage"]
    said = run(nvcc(), *options, "-cubin", "-o", unfinished, source)
    (folder / f"{unit}.txt").write_text(said)
    unfinished.rename(folder / f"{unit}.cubin")


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Unit], Path]:
    """Where a unit has been compiled, by whichever worker asked first. One that would have to wait for another's
    compiles what a later test will ask for."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "cuda_units"
    folder.mkdir(exist_ok=True)
    later = {item.callspec.params.get("unit") for item in request.session.items if hasattr(item, "callspec")}

    def is_there(unit: Unit) -> bool:
        return (folder / f"{unit}.cubin").exists()

    def compile_here(unit: Unit, *, wait: bool) -> bool:
        """Unless another worker is at it."""
        with open(folder / f"{unit}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if not is_there(unit):
                compile_unit(unit, folder)
        return True

    def get(unit: Unit) -> Path:
        if unit.arch not in architectures():
            pytest.skip(f"this nvcc knows no sm_{unit.arch}")
        if not is_there(unit) and not compile_here(unit, wait=False):
            waiting = [u for u in UNITS if u in later and u.arch in architectures() and not is_there(u)]
            next((u for u in waiting if u != unit and compile_here(u, wait=False)), None)
            compile_here(unit, wait=True)
        return folder / f"{unit}.cubin"

    return get


# ---- kernels ---------------------------------------------------------------------------------------------------------

# Those that have been a register or two short, where their unit is not in UNITS: rows of a warp.
TIGHT = [
    Unit(100, "bfloat16", "index"),
    Unit(120, "bfloat16", "smoothed"),
]

TEAMS = ("warp", "block", "cluster")
MANGLED = re.compile(
    r"_ZN4xent3gpu\d+(?P<family>rows|small_rows|spatial|strided)I"
    r"(?P<types>(?:NS_\d+B?Float16E|[fd])+)LNS_9ObjectiveE(?P<kind>\d)E"
    r"(?:LNS0_4TeamE(?P<team>\d)E)?(?:Li(?P<together>\d+)E)?(?:Lb(?P<copied>\d)E)?"
)


class Kernel(NamedTuple):
    """One instantiation. `variant` is what BOUNDS and INSTRUCTIONS distinguish."""

    variant: str
    arithmetic: str  # float or double
    kind: str
    together: int  # positions of a thread (spatial)

    @classmethod
    def of(cls, mangled: str) -> Kernel | None:
        """None for those around the loss, which are no templates of a type."""
        match = MANGLED.match(mangled)
        if match is None:
            assert re.match(r"_ZN4xent3gpu\d+(finish|count_targets|sum_weights)", mangled), f"unknown kernel {mangled}"
            return None
        family, together = match["family"], int(match["together"] or 1)
        if family == "rows":
            variant = f"rows of a {TEAMS[int(match['team'])]}" if match["copied"] == "1" else "rows, direct"
        elif family == "spatial":
            variant = "spatial" + (", copied" if match["copied"] == "1" else ", direct" if together > 1 else ", single")
        elif family == "strided":
            variant = f"strided of a {TEAMS[int(match['team'])]}"
        else:
            variant = "small rows"
        return cls(
            variant, "double" if match["types"][-1] == "d" else "float", tuple(KINDS)[int(match["kind"])], together
        )

    def __str__(self) -> str:
        return f"{self.variant} <{self.arithmetic}, {self.kind}, {self.together}>"


class Usage(NamedTuple):
    registers: int
    shared: int  # bytes, static
    stack: int  # bytes, of a thread
    spills: int  # bytes, stored and loaded


def usage_of(cubin: Path) -> Iterator[tuple[Kernel, Usage]]:
    parts = re.split(r"Compiling entry function '(\w+)'", cubin.with_suffix(".txt").read_text())[1:]
    for mangled, text in zip(parts[::2], parts[1::2], strict=True):
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text).groups()
        )
        shared = re.search(r"(\d+) bytes smem", text)
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        if kernel := Kernel.of(mangled):
            yield kernel, Usage(registers, int(shared[1]) if shared else 0, stack, stores + loads)


# ---- what they use of a multiprocessor -------------------------------------------------------------------------------


class Multiprocessor(NamedTuple):
    """CUDA Programming Guide, "Compute Capabilities". All have 64 K registers."""

    threads: int
    blocks: int
    shared: int

    def resident(self, threads: int, registers: int, shared: int) -> int:
        """Blocks at a time. Each warp gets registers by the 256, each block 1 KB of shared memory more than it asks."""
        warps = threads // 32
        by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
        return min(by_registers, self.threads // threads, self.blocks, self.shared // (shared + 1024))


MULTIPROCESSORS = {
    80: Multiprocessor(2048, 32, 164 << 10),
    86: Multiprocessor(1536, 16, 100 << 10),
    89: Multiprocessor(1536, 24, 100 << 10),
    90: Multiprocessor(2048, 32, 228 << 10),
    100: Multiprocessor(2048, 32, 228 << 10),
    120: Multiprocessor(1536, 24, 100 << 10),
}


class Bound(NamedTuple):
    variant: str
    arithmetic: str
    only: str | int | None  # the kind, or how many positions a thread has
    threads: int
    registers: int  # of a thread, at most
    blocks: int  # on a multiprocessor at a time, at least


# As the launch bounds, plan.h's *_resident(). The first line that fits.
BOUNDS = [
    Bound("small rows", "float", "smoothed", 128, 168, 3),
    Bound("small rows", "float", None, 128, 128, 4),
    Bound("small rows", "double", None, 128, 255, 2),
    Bound("rows of a warp", "float", "index", 128, 80, 6),
    Bound("rows of a warp", "float", "general", 128, 128, 4),
    Bound("rows of a warp", "float", None, 128, 96, 5),
    Bound("rows of a warp", "double", "general", 128, 255, 2),
    Bound("rows of a warp", "double", None, 128, 168, 3),
    Bound("rows of a block", "float", "index", 256, 80, 3),
    Bound("rows of a block", "float", None, 256, 128, 2),
    Bound("rows of a block", "double", "general", 256, 255, 1),
    Bound("rows of a block", "double", None, 256, 128, 2),
    Bound("rows of a cluster", "float", "index", 256, 80, 3),
    Bound("rows of a cluster", "float", None, 256, 128, 2),
    Bound("rows of a cluster", "double", "general", 256, 255, 1),
    Bound("rows of a cluster", "double", None, 256, 128, 2),
    Bound("rows, direct", "float", None, 256, 128, 2),
    Bound("rows, direct", "double", None, 256, 255, 1),
    Bound("spatial, copied", "float", 4, 128, 128, 4),
    Bound("spatial, copied", "float", "soft", 128, 168, 3),
    Bound("spatial, copied", "float", 8, 128, 128, 4),
    Bound("spatial, copied", "double", 2, 128, 255, 2),
    Bound("spatial, direct", "float", 4, 128, 128, 4),
    Bound("spatial, direct", "float", 8, 128, 168, 3),
    Bound("spatial, direct", "double", 2, 128, 255, 2),
    Bound("spatial, single", "float", None, 128, 128, 4),
    Bound("spatial, single", "double", None, 128, 255, 2),
    Bound("strided of a warp", "float", None, 128, 128, 4),
    Bound("strided of a warp", "double", None, 128, 255, 2),
    Bound("strided of a block", "float", None, 256, 128, 2),
    Bound("strided of a block", "double", None, 256, 255, 1),
]


def bound_of(kernel: Kernel) -> Bound:
    like = (kernel.variant, kernel.arithmetic)
    return next(b for b in BOUNDS if b[:2] == like and b.only in (None, kernel.kind, kernel.together))


@needs_nvcc
@each_unit
def test_compiles_without_a_spill(unit: Unit, compiled) -> None:
    """A stack would be local memory, which is device memory: as dear as the logits that are read once."""
    kernels = dict(usage_of(compiled(unit)))
    assert {kernel.variant for kernel in kernels} == {
        bound.variant for bound in BOUNDS if unit.kind != "general" or re.match("rows|strided", bound.variant)
    }
    spilled = {str(kernel): usage for kernel, usage in kernels.items() if usage.spills or usage.stack}
    assert not spilled


@needs_nvcc
@pytest.mark.parametrize("unit", TIGHT, ids=str)
def test_tight_kernels_compile_without_a_spill(unit: Unit, tmp_path: Path) -> None:
    if unit.arch not in architectures():
        pytest.skip(f"this nvcc knows no sm_{unit.arch}")
    compile_unit(unit, tmp_path, rows_of_a_warp)
    ((kernel, usage),) = usage_of(tmp_path / f"{unit}.cubin")
    bound = bound_of(kernel)
    assert kernel.variant == "rows of a warp" and usage.registers <= bound.registers
    assert not usage.spills and not usage.stack


@needs_nvcc
@each_unit
def test_registers_and_resident_blocks(unit: Unit, compiled) -> None:
    """As BOUNDS says, but for the shared memory that is asked for at the launch: that is plan.cpp's."""
    wrong = []
    for kernel, usage in usage_of(compiled(unit)):
        bound = bound_of(kernel)
        blocks = MULTIPROCESSORS[unit.arch].resident(bound.threads, usage.registers, usage.shared)
        if usage.registers > bound.registers or blocks < bound.blocks:
            wrong.append(f"{kernel}: {blocks} blocks, {usage}, {bound}")
    assert not wrong, "\n".join(wrong)


# Copied through shared memory: tuning.h's number of blocks that are to share it.
SHARED_BY = {
    "rows of a block": "row_blocks",
    "rows of a cluster": "row_blocks",
    "spatial, copied": "spatial_blocks",
}


def constant(name: str) -> int:
    """Of plan.cpp or tuning.h."""
    text = "".join((CUDA / file).read_text() for file in ("plan.cpp", "tuning.h"))
    return eval(re.search(rf"\w+ {name} = ([\d <]+);", text)[1])


@needs_nvcc
@each_unit
def test_resident_blocks_with_copies(unit: Unit, compiled) -> None:
    """With the most shared memory that plan.cpp prefers to ask for: what it leaves aside has to be enough for the
    kernel's own arrays and the kilobyte of the system, or a block fewer than planned is resident."""
    multiprocessor, wrong = MULTIPROCESSORS[unit.arch], []
    for kernel, usage in usage_of(compiled(unit)):
        if kernel.variant not in SHARED_BY:
            continue
        bound, sharing = bound_of(kernel), constant(SHARED_BY[kernel.variant])
        copies = (multiprocessor.shared // sharing - constant("kOverheadBytes")) // 16 * 16
        blocks = multiprocessor.resident(bound.threads, usage.registers, usage.shared + copies)
        if blocks < min(sharing, bound.blocks):
            wrong.append(f"{kernel}: {blocks} blocks, {usage}, {bound}, {copies=}")
    assert not wrong, "\n".join(wrong)


# ---- what they are made of -------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    address: int
    predicated: bool
    name: str
    target: int | None  # of a branch


class Loop(NamedTuple):
    """An innermost one: from its first instruction to the branch back."""

    instructions: list[Instruction]

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, i.name)) for i in self.instructions)

    def shortest_path(self, through: str = "") -> list[str] | None:
        """Its fewest instructions from beginning to end, one of which is called `through`: what happens to most
        elements, with a jump over what happens to few. All branches but the last lead forward."""
        index = {i.address: at for at, i in enumerate(self.instructions)}
        best: list[list[list[str] | None]] = [[None, None] for _ in self.instructions]  # without `through`, with it
        best[0][0] = []
        for at, instruction in enumerate(self.instructions):
            passes = bool(through) and re.match(through, instruction.name) is not None
            for seen, path in enumerate(best[at]):
                if path is None:
                    continue
                now, extended = int(seen or passes), [*path, instruction.name]
                if at == len(self.instructions) - 1:
                    best[at][seen] = extended
                    if now != seen:
                        best[at][now] = extended
                    continue
                ahead = index.get(instruction.target) if instruction.name == "BRA" else None
                falls_through = instruction.predicated or instruction.name not in ("BRA", "EXIT")
                for following in ([ahead] if ahead else []) + [at + 1] * falls_through:
                    if following > at and (best[following][now] is None or len(extended) < len(best[following][now])):
                        best[following][now] = extended
        return best[-1][1] if through else best[-1][0]


class Code(NamedTuple):
    instructions: list[Instruction]

    def names(self) -> Counter[str]:
        return Counter(i.name for i in self.instructions)

    def innermost_loops(self) -> list[Loop]:
        ends: dict[int, int] = {}
        for i in self.instructions:
            if i.name == "BRA" and i.target is not None and i.target < i.address:
                ends[i.target] = max(i.address, ends.get(i.target, 0))
        loops = [
            (first, last)
            for first, last in ends.items()
            if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in ends.items())
        ]
        return [Loop([i for i in self.instructions if first <= i.address <= last]) for first, last in sorted(loops)]


@functools.cache
def disassembled(cubin: Path) -> dict[Kernel, Code]:
    kernels = {}
    for part in run(cuobjdump(), "-sass", cubin).split("Function : ")[1:]:
        found = re.findall(r"/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ +)?([A-Z][\w.]*) *([^;]*);", part)
        instructions = []
        for address, predicate, name, operands in found:
            target = re.search(r"(?:^|[ ,])0x([0-9a-f]+) *$", operands) if name == "BRA" else None
            instructions.append(Instruction(int(address, 16), bool(predicate), name, target and int(target[1], 16)))
        if kernel := Kernel.of(part.split(maxsplit=1)[0]):
            kernels[kernel] = Code(instructions)
    return kernels


COPY, FROM_COPY, LOAD, STORE = r"LDGSTS\.E\.BYPASS\.128$", r"LDS\.128$", r"LDG\.E\.128", r"STG\.E\.EF\.128$"
EXP = r"MUFU\.EX2$|DFMA$"

# Of each variant: what there has to be, together in one loop, and what there must not be anywhere. 128 are the bits of
# one thread's transaction; EF is "evict first", for a gradient that is not read again by its kernel.
INSTRUCTIONS = {
    "small rows": ([(COPY,), (FROM_COPY, STORE)], []),
    "rows of a warp": ([(COPY,), (FROM_COPY, EXP), (FROM_COPY, EXP, STORE)], [r"UCGABAR"]),
    "rows of a block": ([(COPY,), (FROM_COPY, EXP), (FROM_COPY, EXP, STORE)], [r"UCGABAR"]),
    "rows of a cluster": ([(COPY,), (FROM_COPY, EXP), (FROM_COPY, EXP, STORE)], []),
    "rows, direct": ([(LOAD, EXP), (LOAD, EXP, STORE)], [r"LDGSTS", r"UCGABAR"]),
    "spatial, copied": ([(COPY,), (FROM_COPY, EXP), (FROM_COPY, EXP, STORE)], []),
    "spatial, direct": ([(LOAD, EXP), (LOAD, EXP, STORE)], [r"LDGSTS"]),
    "spatial, single": ([], [r"LDGSTS", LOAD]),
    "strided of a warp": ([], [r"LDGSTS", LOAD]),
    "strided of a block": ([], [r"LDGSTS", LOAD]),
}


@needs_cuobjdump
@each_plain_unit_of_sm_90
def test_transactions(unit: Unit, compiled) -> None:
    """16 bytes for each thread at a time, in the kernels that promise it."""
    for kernel, code in disassembled(compiled(unit)).items():
        together, absent = INSTRUCTIONS[kernel.variant]
        loops = code.innermost_loops()
        for patterns in together:
            assert any(all(loop.count(p) for p in patterns) for loop in loops), f"{kernel} has no loop of {patterns}"
        for pattern in absent:
            assert not any(re.match(pattern, name) for name in code.names()), f"{kernel} has {pattern}"


@needs_cuobjdump
@each_unit_of_sm_90
def test_no_local_memory_and_no_atomics(unit: Unit, compiled) -> None:
    """Atomic additions would make sums depend on the order of blocks. Who reports a bad target is settled by one
    compare-and-swap, of an integer."""
    for kernel, code in disassembled(compiled(unit)).items():
        found = {name for name in code.names() if re.match(r"LDL|STL|RED(?!UX)|ATOM", name)}
        assert found <= {"ATOMG.E.CAS.STRONG.GPU"}, kernel


@needs_cuobjdump
@each_plain_unit_of_sm_90
def test_loops_over_classes(unit: Unit, compiled) -> None:
    """Where exponentials are taken there is no call (a 64-bit division is one), and in float nothing in double but to
    convert what is read or written as double."""
    for kernel, code in disassembled(compiled(unit)).items():
        if kernel.arithmetic == "double":
            continue
        loops = [loop for loop in code.innermost_loops() if loop.count(r"MUFU\.EX2")]
        if kernel.variant == "small rows":  # unrolled
            assert not loops
            continue
        assert len(loops) >= 2, f"{kernel}: one loop to sum, one for the gradient"
        for loop in loops:
            found = {i.name for i in loop.instructions if re.match(r"CALL|D(ADD|MUL|FMA|SETP)|MUFU\.(?!EX2)", i.name)}
            assert not found, kernel


class Most(NamedTuple):
    """Instructions for a vector of 16 bytes in shared memory: to sum it, and to make its gradient."""

    to_sum: int
    to_differentiate: int


# Each a tenth above what it is today.
PER_VECTOR = {
    ("bfloat16", "index"): {"rows": Most(61, 52), "spatial": Most(59, 73)},
    ("bfloat16", "smoothed"): {"rows": Most(97, 65), "spatial": Most(85, 85)},
    ("bfloat16", "soft"): {"rows": Most(165, 138), "spatial": Most(166, 169)},
    ("float32", "index"): {"rows": Most(29, 25), "spatial": Most(28, 38)},
    ("float32", "soft"): {"rows": Most(86, 78), "spatial": Most(85, 100)},
}


@needs_cuobjdump
@pytest.mark.parametrize(
    "variant", ["rows of a warp", "rows of a block", "rows of a cluster", "spatial, copied"], ids=lambda v: v
)
@each([Unit(90, *key) for key in PER_VECTOR])
def test_instructions_of_a_vector(unit: Unit, variant: str, compiled) -> None:
    """One exponential for each element in each of the two loops, and little else: while an H200 moves 16 bytes in and
    16 out, it has time for some 200 instructions of a thread."""
    elements, most = 8 if unit.type == "bfloat16" else 4, PER_VECTOR[unit.type, unit.kind][re.split("[ ,]", variant)[0]]
    code = disassembled(compiled(unit))[
        Kernel(variant, "float", unit.kind, elements if variant.startswith("spatial") else 1)
    ]
    loops = [loop for loop in code.innermost_loops() if loop.count(FROM_COPY) and loop.count(EXP)]
    gradients = [loop for loop in loops if loop.count(STORE)]
    sums = [loop for loop in loops if not loop.count(STORE)]
    assert sums and gradients
    for loops, through, most_of_vector in (
        (sums, "", most.to_sum),
        (gradients, STORE, most.to_differentiate),
    ):
        for loop in loops:
            path, vectors = loop.shortest_path(through), loop.count(FROM_COPY)
            assert path.count("MUFU.EX2") == elements * vectors
            assert len(path) <= most_of_vector * vectors, f"{len(path) / vectors}: {Counter(path)}"


# ---- what is compiled with them --------------------------------------------------------------------------------------


@needs_nvcc
def test_files_link(tmp_path: Path) -> None:
    """launch.cu, nll.cu and two that stand for the kernels' files, with their headers and nothing else: what a header
    defines for everyone would be there twice. The first two, sums and sparse gradients, spill nothing either."""
    alone = tmp_path / "headers.cu"
    alone.write_text('#include "cuda/kernels.cuh"\n')
    options = [*options_of_setup("nvcc"), "-arch=sm_80", f"-I{CSRC}", "--resource-usage"]
    objects = [tmp_path / name for name in ("launch.o", "nll.o", "headers.o", "again.o")]
    for file in objects[:2]:
        said = run(nvcc(), *options, "-c", "-o", file, (CUDA / file.name).with_suffix(".cu"))
        assert set(re.findall(r"(\d+) bytes (?:stack|spill)", said)) == {"0"}
    run(nvcc(), *options, "-c", "-o", objects[2], alone)
    shutil.copy(*objects[2:])
    run("ld", "-r", "-o", tmp_path / "all.o", *objects)


@needs_nvcc
@pytest.mark.parametrize("file", sorted([*CUDA.glob("*.cpp"), CSRC / "module.cpp"]), ids=lambda file: file.name)
def test_host_code_compiles(file: Path) -> None:
    """A CPU wheel has torch's CUDA headers too, but for one that says how a CUDA build was configured."""
    options = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    macros = ["-DWITH_CUDA", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    python = sysconfig.get_path("include")
    includes = [f"-isystem{path}" for path in (*cpp.include_paths(), python, *toolkit_headers())]
    run(*shlex.split(cpp.get_cxx_compiler()), *options, *macros, *includes, f"-I{CSRC}", file)


def included_by(file: Path) -> Iterator[tuple[Path, str]]:
    """What it includes, and what those of our own headers include that it reaches."""
    pending, seen = [file], {file}
    while pending:
        current = pending.pop()
        for name in re.findall(r'^\s*#\s*include\s*["<]([^">]+)[">]', current.read_text(), re.MULTILINE):
            yield current, name
            for own in (current.parent / name, CSRC / name):
                if own.is_file() and own.resolve() not in seen:
                    seen.add(own.resolve())
                    pending.append(own.resolve())


@pytest.mark.parametrize("file", sorted([*CUDA.glob("*.cu"), *CUDA.glob("*.cuh")]), ids=lambda file: file.name)
def test_kernels_know_no_torch(file: Path) -> None:
    """nvcc takes minutes for torch's headers; and kernels without them run in an emulator."""
    known = [name for _, name in included_by(file)]
    assert known
    assert not [name for name in known if re.match(r"(torch|ATen|c10|pybind11|Python)\b", name)]

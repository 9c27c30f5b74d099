"""The emulator that runs CUDA kernels on the CPU: each kind of bug that it is to find is planted in a kernel, and has
to be reported, by what the tables say. In right kernels nothing may be."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "cuda_on_cpu" / "planted_bugs.cpp"

FLAGS = ["-std=c++20", "-O1", "-g0", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing", "-pthread"]
PROGRAMS = {
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-fsanitize=thread"],
    "plain": [],
    "ucontext": ["-O0", "-DEMULATOR_UCONTEXT"],  # how fibers are switched where the processor is no x86-64
}
BUILDS = PROGRAMS | {"library": ["-O0", "-fPIC", "-shared"]}

SYNCTHREADS, SHUFFLE = (rf"{name} at \S+planted_bugs\.cpp:\d+" for name in ("__syncthreads", "__shfl_xor_sync"))

# By the emulator, in every build.
ERRORS = {
    "divergent_barrier": f"{SYNCTHREADS}: divergent, others are in {SYNCTHREADS}",
    "deadlock": rf"deadlock:\n  32 threads wait in {SYNCTHREADS}, first .* thread 0\n  32 threads wait in __syncwarp",
    "mask_lacks_caller": f"thread 16: {SHUFFLE}: the mask lacks the calling lane, 16",
    "mask_names_exited": f"thread 0: {SHUFFLE}: the mask names lanes that have exited",
    "exit_while_awaited": f"thread 31: exits while others of its warp wait for it in {SHUFFLE}",
    "divergent_shuffle": f"{SHUFFLE}: divergent, others are in {SHUFFLE}",
    "lane_outside_mask": f"{SHUFFLE}: reads lane 16, which the mask lacks",
    "width_of_three": f"{SHUFFLE}: the width is no power of 2",
    "misaligned_copy": r"cp\.async at \S+: misaligned, an address is no multiple of 16",
    "copy_to_global": r"cp\.async at \S+: not an address in this block's shared memory",
    "copy_never_awaited": "exits without having waited for its asynchronous copies",
    "map_of_exited_block": r"block \(1,0,0\) thread \d+: map_shared_rank at \S+: block 0 of the cluster has exited",
    "kernel_never_awaited": "a kernel has ended and not waited for the one that it overlaps",
    "too_much_static": r"big at \S+: more than 48 KiB of shared arrays",
    "launch_from_kernel": "launch: from within a kernel",
    "outside_of_kernels": "called outside of a kernel",
}

# By results, where no sanitizer is.
WRONG_RESULTS = [
    "missing_barrier",
    "missing_second_barrier",
    "missing_syncwarp",
    "missing_cluster_barrier",
    "missing_last_cluster_barrier",
    "late_copy",
    "copy_into_used_memory",
    "kernel_awaited_late",
]

# By ASan and UBSan.
MEMORY_ERRORS = {
    "shared_overrun": "heap-buffer-overflow",
    "shared_overread": "heap-buffer-overflow",
    "dynamic_overrun": "heap-buffer-overflow",
    "global_out_of_bounds": "heap-buffer-overflow",
    "missing_last_cluster_barrier": "heap-use-after-free",
    "misaligned_vector": "misaligned address",
}

# By TSan, whatever the order. Copies that are made early belong to odd seeds.
RACES = {
    "missing_barrier": 0,
    "missing_second_barrier": 0,
    "missing_syncwarp": 0,
    "shuffle_for_syncwarp": 0,
    "missing_cluster_barrier": 0,
    "missing_last_cluster_barrier": 0,
    "copy_into_used_memory": 1,
    "race_between_blocks": 0,
    "missing_fence": 0,
}

RIGHT = [
    "right_shuffles",
    "right_shuffles_of_integers",
    "right_votes",
    "right_partial_warp",
    "right_warp",
    "right_atomics",
    "right_fences",
    "right_copies",
    "right_vectors",
    "right_clusters",
    "right_overlap",
    "right_indices",
    "right_after_errors",
    "right_os_threads",
    "right_limits",
]

Run = Callable[..., subprocess.CompletedProcess]


def execute(*command: object) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    for sanitizer in ("ASAN", "UBSAN", "TSAN"):
        environment[f"{sanitizer}_OPTIONS"] = "symbolize=0"  # which takes longer than the cases themselves
    command = [str(word) for word in command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def make(program: Path, flags: list[str]) -> None:
    """What g++ makes of planted_bugs.cpp, or nothing if it has not got the sanitizers."""
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
    empty = program.with_suffix(".empty")
    empty.with_suffix(".cpp").write_text("int main() {}\n")
    if execute("g++", *sanitizers, empty.with_suffix(".cpp"), "-o", empty).returncode or execute(empty).returncode:
        return
    part = program.with_suffix(".part")
    result = execute("g++", *FLAGS, *flags, SOURCE, "-o", part)
    assert result.returncode == 0, result.stderr
    part.rename(program)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The builds. The workers of pytest-xdist share them, and the work of making them."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent
    programs = {build: directory / f"planted_bugs_{build}" for build in BUILDS}
    for wait in (fcntl.LOCK_NB, 0):
        for build in BUILDS:
            with open(programs[build].with_suffix(".lock"), "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | wait)
                except BlockingIOError:  # another worker is at it
                    continue
                if not programs[build].exists():
                    make(programs[build], BUILDS[build])
    return programs


@pytest.fixture(scope="session")
def run(programs: dict[str, Path]) -> Run:
    """run(build, *arguments)"""

    def run(build: str, *arguments: object) -> subprocess.CompletedProcess:
        if not programs[build].exists():
            pytest.skip(f"g++ makes no programs that run with {BUILDS[build]}")
        return execute(programs[build], *arguments)

    return run


def assert_reported(result: subprocess.CompletedProcess, what: str) -> None:
    assert result.returncode != 0
    assert re.search(what, result.stdout + result.stderr), result.stdout + result.stderr


def test_every_case_is_expected_somewhere(run: Run) -> None:
    cases = run("plain", "list").stdout.split()
    assert sorted(cases) == sorted({*ERRORS, *WRONG_RESULTS, *MEMORY_ERRORS, *RACES, *RIGHT})


@pytest.mark.parametrize("build", PROGRAMS)
@pytest.mark.parametrize("bug", ERRORS)
def test_emulator_reports(run: Run, build: str, bug: str) -> None:
    assert_reported(run(build, bug), f"^error .*{ERRORS[bug]}")


@pytest.mark.parametrize("bug", WRONG_RESULTS)
def test_some_order_gives_wrong_results(run: Run, bug: str) -> None:
    assert_reported(run("plain", bug), "^wrong result")


@pytest.mark.parametrize("bug", ["shared_overrun", "dynamic_overrun"])
def test_overrun_is_noticed_without_asan(run: Run, bug: str) -> None:
    assert_reported(run("plain", bug), "^error .*: written past the end of this shared memory")


@pytest.mark.parametrize("bug", MEMORY_ERRORS)
def test_asan_or_ubsan_reports(run: Run, bug: str) -> None:
    assert_reported(run("asan", bug), MEMORY_ERRORS[bug])


@pytest.mark.parametrize("order", ["in_order", "reversed", "starve_warp"])
@pytest.mark.parametrize("bug", RACES)
def test_tsan_reports(run: Run, bug: str, order: str) -> None:
    assert_reported(run("tsan", bug, order, RACES[bug]), "ThreadSanitizer: data race")


@pytest.mark.parametrize("build", PROGRAMS)
@pytest.mark.parametrize("case", RIGHT)
def test_right_kernels_pass(run: Run, build: str, case: str) -> None:
    result = run(build, case)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.usefixtures("programs")
def test_atomic_sum_of_floats_does_not_compile() -> None:
    result = execute("g++", *FLAGS, "-fsyntax-only", "-DPLANT_FLOAT_ATOMIC", SOURCE)
    assert result.returncode != 0
    assert "static assertion failed: atomics are for integers" in result.stderr


def test_in_a_shared_library(programs: dict[str, Path]) -> None:
    library = ctypes.CDLL(str(programs["library"]))
    outcomes = {}

    def call(case: str) -> None:
        arguments = [b"planted_bugs", case.encode()]
        outcomes[case] = library.main(len(arguments), (ctypes.c_char_p * len(arguments))(*arguments))

    for case in ["right_after_errors", "right_clusters", "deadlock", "right_os_threads"]:
        thread = threading.Thread(target=call, args=[case])
        thread.start()
        thread.join()
    assert outcomes == {"right_after_errors": 0, "right_clusters": 0, "deadlock": 1, "right_os_threads": 0}

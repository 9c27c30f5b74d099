"""The package around the loss: what it says of itself, and what it says when something is missing."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cross_entropy_ext

RUNNING = ".".join(torch.__version__.split(".")[:2])
# An editable install would find the binary in the source tree.
IMPORT_FROM_HERE = """
import sys
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
import cross_entropy_ext
"""
HERE = Path(cross_entropy_ext.__file__).parent
ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path, timeout: int = 300) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=timeout)


def test_build_info() -> None:
    info = cross_entropy_ext.build_info()
    assert info["version"] == cross_entropy_ext.__version__ == importlib.metadata.version("cross_entropy_ext")
    assert info["torch_running"] == torch.__version__
    assert info["torch_built_for"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert info["instruction_set"] in ("AVX512", "AVX2", "baseline")
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert cross_entropy_ext.check_errors() is None


def test_everything_is_at_the_top() -> None:
    """The functions, too, and no name that is promised is missing."""
    functions = [name for name in cross_entropy_ext.functional.__all__ if name.islower()]
    assert "cross_entropy" in functions and {*functions, "is_patched"} <= {*cross_entropy_ext.__all__}
    assert all(getattr(cross_entropy_ext, name) is getattr(cross_entropy_ext.functional, name) for name in functions)
    assert all(hasattr(cross_entropy_ext, name) for name in cross_entropy_ext.__all__)


def test_self_check(tmp_path: Path) -> None:
    """`python -m cross_entropy_ext` compares with the native loss and says so by its exit status."""
    done = run("-m", "cross_entropy_ext", cwd=tmp_path if HERE.parent != ROOT else ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert cross_entropy_ext.__version__ in done.stdout


@pytest.mark.parametrize(
    ("binary", "says"),
    [
        (None, "cross_entropy_ext is not built"),
        (
            "_C_torch_1_99",
            f"was built for torch 1.99, but torch {RUNNING} is installed",
        ),
        ("broken", "does not load into torch"),
    ],
)
def test_a_binary_that_does_not_fit(tmp_path: Path, binary: str | None, says: str) -> None:
    """One sentence, with the command that mends it."""
    package = tmp_path / "cross_entropy_ext"
    shutil.copytree(HERE, package, ignore=shutil.ignore_patterns("*.so", "*.dylib", "__pycache__"))
    (source,) = HERE.glob(f"_C_torch_{RUNNING.replace('.', '_')}.*")
    if binary == "broken":
        (package / source.name).write_bytes(b"not a library")
    elif binary:
        shutil.copy(source, package / source.name.replace(source.name.split(".")[0], binary))
    done = run("-c", IMPORT_FROM_HERE, cwd=tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError") and says in last and "pip install" in last


@pytest.mark.long
@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    """Both models, shortened; exit status 0 only if the losses of every step agree."""
    pytest.importorskip("matplotlib", reason="the examples' extra is not installed")
    figure = tmp_path / "figure.png"
    done = run(str(ROOT / "examples" / "language_model.py"), "--quick", "--output", str(figure), cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_what_the_compiler_keeps_belongs_to_these_operators() -> None:
    """A cache on disk of another version of the operators is not used; a tag that the user set stays."""
    code = "import torch, cross_entropy_ext; print(torch.compiler.config.cache_key_tag)"
    environment = {**os.environ, "TORCH_COMPILE_CACHE_KEY_TAG": "mine-"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert re.fullmatch("mine-cross_entropy_ext-[0-9a-f]{16}", ran.stdout.strip())

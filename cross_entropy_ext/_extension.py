"""Finds and loads the compiled half of the package.

A binary fits the torch that it was compiled against, so its file name says which: `_C_torch_2_13.*.so`.
Binaries for several versions of torch may lie side by side; the running one picks its own.
"""

import hashlib
import sys
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

PREFIX = "_C_torch_"
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def load() -> ModuleType:
    """Import the binary that was built for the running torch, which registers the operators, and return it.

    Raises ImportError, saying in one sentence what is wrong and how to mend it, when torch is missing, or
    a binary for it, or when the binary does not load.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            "cross_entropy_ext needs PyTorch, which is not installed: run `pip install torch`."
        ) from error

    running = ".".join(torch.__version__.split(".")[:2])
    module = PREFIX + running.replace(".", "_")
    try:
        return import_module(f"{__package__}.{module}")
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.{module}":
            raise
        raise ImportError(_why_missing(running)) from None
    except ImportError as error:
        raise ImportError(
            f"cross_entropy_ext's binary for torch {running} does not load into torch {torch.__version__}: "
            f"{error}; in its source directory, rebuild it with `{REBUILD}`."
        ) from error


def tag_compile_caches() -> None:
    """Let what torch.compile keeps on disk belong to the operators as they are now.

    Its key knows the public operators by name alone, while what is kept calls the private ones with the arguments that
    they had when it was compiled.
    """
    import torch

    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{__package__}::"))
    schemas = "".join(str(torch._C._get_schema(*name.partition(".")[::2])) for name in names)
    torch.compiler.config.cache_key_tag += f"{__package__}-{hashlib.sha256(schemas.encode()).hexdigest()[:16]}"


def _why_missing(running: str) -> str:
    """The sentence for a package without a binary for torch `running`."""
    here = Path(__file__).parent
    built = {path.name.partition(".")[::2] for path in here.glob(f"{PREFIX}*.*")}
    loadable = {stem for stem, suffix in built if f".{suffix}" in EXTENSION_SUFFIXES}
    if not built:
        return f"cross_entropy_ext is not built: in its source directory, run `{REBUILD}`."
    if not loadable:
        return (
            f"cross_entropy_ext was not built for this Python ({sys.implementation.cache_tag}); "
            f"in its source directory, rebuild it with `{REBUILD}`."
        )
    versions = sorted(stem.removeprefix(PREFIX).replace("_", ".") for stem in loadable)
    return (
        f"cross_entropy_ext was built for torch {' and '.join(versions)}, but torch {running} is installed; "
        f"in its source directory, rebuild it with `{REBUILD}`."
    )

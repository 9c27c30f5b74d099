"""Builds the package's one binary, cross_entropy_ext/_C_torch_<major>_<minor>; pyproject.toml says the rest.

A binary fits the torch that it was compiled against, so its name says which, and torch has to be there first:

    pip install --no-build-isolation .

Environment:  CXX           the C++20 compiler (default: c++)
              FORCE_CUDA=1  build the CUDA kernels or fail;  FORCE_CPU=1  leave them out
              DEBUG=1       symbols, and little optimization
              SANITIZE=address,undefined  checks of these sanitizers
              MAX_JOBS      how many files are compiled at a time
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob

from setuptools import setup

try:
    import torch
    import torch.utils.cpp_extension as cpp
except ModuleNotFoundError as error:
    sys.exit(
        f"cross_entropy_ext is compiled against the torch it will run with, and none is here ({error}): "
        "run `pip install torch setuptools ninja`, then `pip install --no-build-isolation .`"
    )

OLDEST_TORCH = (2, 11)
TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])
if TORCH < OLDEST_TORCH:
    sys.exit("cross_entropy_ext needs torch {}.{} or newer, not {}.".format(*OLDEST_TORCH, torch.__version__))

# The nvcc on the PATH may be a script, and its folder's parent no toolkit: nvcc itself knows where that is.
if torch.version.cuda and shutil.which("nvcc") and not glob(f"{cpp.CUDA_HOME}/include/cuda_runtime.h"):
    said = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    toolkit = re.search("TOP=(.*)", said)
    if not toolkit:
        sys.exit(
            f"cross_entropy_ext cannot find nvcc's toolkit: set CUDA_HOME. `nvcc --dryrun` printed: {said.strip()}"
        )
    cpp.CUDA_HOME = os.path.realpath(toolkit[1])

DEBUG = os.environ.get("DEBUG") == "1"
SANITIZE = os.environ.get("SANITIZE", "")
FORCE_CUDA = os.environ.get("FORCE_CUDA") == "1"
FORCE_CPU = os.environ.get("FORCE_CPU") == "1"

# A CUDA torch and its toolkit are enough; a GPU is not asked for.
WITH_CUDA = bool(torch.version.cuda and cpp.CUDA_HOME) and not FORCE_CPU
KINDS = ("cpp", "cu") if WITH_CUDA else ("cpp",)
SOURCES = [
    path for kind in KINDS for path in glob(f"csrc/**/*.{kind}", recursive=True) if WITH_CUDA or "/cuda/" not in path
]
if FORCE_CUDA and not WITH_CUDA:
    sys.exit(
        "FORCE_CUDA=1 needs a CUDA torch, its toolkit and no FORCE_CPU=1, but here is "
        f"torch {torch.__version__}, CUDA_HOME={cpp.CUDA_HOME}, {FORCE_CPU=}."
    )

# pip puts ninja beside this Python, which is on the PATH only in an activated environment.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
if WITH_CUDA and "TORCH_CUDA_ARCH_LIST" not in os.environ:  # those that the toolkit knows, and PTX for all others
    nvcc = shutil.which("nvcc", path=os.pathsep.join([f"{cpp.CUDA_HOME}/bin", os.environ["PATH"]])) or "nvcc"
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    wanted = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
    archs = [arch for arch in wanted if f"compute_{arch.replace('.', '')}" in known]
    if archs:
        os.environ["TORCH_CUDA_ARCH_LIST"] = (";".join(archs) + "+PTX").replace("9.0;", "9.0+PTX;")

# No -march: each instruction set has its kernels, chosen at run time. No -fopenmp: threads are libtorch's.
OPTIMIZATION = ["-O1", "-g", "-fno-omit-frame-pointer"] if DEBUG or SANITIZE else ["-O3", "-g0"]
CHECKS = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-wrapv"] if SANITIZE else []
# -isystem, so that only our own code is warned about.
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", *(f"-isystem{path}" for path in cpp.include_paths())]
FLAGS = {
    "cxx": ["-std=c++20", "-fvisibility=hidden", *OPTIMIZATION, *CHECKS, *WARNINGS],
    # A spill is local memory, as dear as the logits: every kernel that is built is looked at.
    "nvcc": ["-std=c++20", "-O3", "-Xcompiler=-fvisibility=hidden,-Wno-psabi", "-Xptxas=-warn-spills"],
}

# Each torch and each kind of build has its own objects. What goes into the wheel is
# gathered in a folder that starts empty, so that nothing of an earlier build gets in.
KIND = ["debug"] * DEBUG + SANITIZE.replace(",", " ").split()
BUILD = "-".join([f"build/{sys.implementation.cache_tag}-torch-{torch.__version__}", *KIND])
shutil.rmtree(f"{BUILD}/lib", ignore_errors=True)


class build_ext(cpp.BuildExtension):  # setuptools looks options up by the name of the class
    def build_extensions(self):
        compiler = shlex.split(cpp.get_cxx_compiler())[0]
        if not shutil.which(compiler):
            sys.exit(f"cross_entropy_ext needs a C++20 compiler, and finds no `{compiler}`: set CXX to one.")
        super().build_extensions()


extension = (cpp.CUDAExtension if WITH_CUDA else cpp.CppExtension)(
    "cross_entropy_ext._C_torch_{}_{}".format(*TORCH),
    sources=sorted(source for source in SOURCES if not source.endswith(".cuh")),
    depends=glob("csrc/**/*.*", recursive=True),  # only asked where there is no ninja
    include_dirs=[os.path.abspath("csrc")],
    define_macros=[("WITH_CUDA", None)] * WITH_CUDA,
    extra_compile_args=FLAGS,
    extra_link_args=CHECKS,
)
setup(
    ext_modules=[extension],
    cmdclass={"build_ext": build_ext},
    options={"build": {"build_lib": f"{BUILD}/lib"}, "build_ext": {"build_temp": f"{BUILD}/objects"}},
)

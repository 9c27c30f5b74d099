"""Measurements of the loss against others. `python -m benchmarks.run --help` is where to begin."""

import os
import sys

if "torch" not in sys.modules:  # which loads OpenMP's runtime, which reads this
    # Threads that may share a core wait for each other as long as the system's scheduler lets one of them run:
    # milliseconds, in which any loss is done.
    os.environ.setdefault("OMP_PROC_BIND", "true")

    # The runtime then binds this process's first thread, and a process started from it would get that one core for all
    # of its own.
    if hasattr(os, "sched_setaffinity"):
        cores = os.environ.setdefault("BENCHMARKS_CORES", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
        os.sched_setaffinity(0, map(int, cores.split(",")))

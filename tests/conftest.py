"""Shared by all tests: how many threads a test process may use."""

import os

# Idle threads sleep instead of spinning: with several workers and two cores, spinning is most of what they would do.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch


def pytest_configure() -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))

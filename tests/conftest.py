"""Shared by all tests: how many threads a test process may use, and where hypothesis may write."""

import os
import tempfile

# Idle threads sleep instead of spinning: with several workers and two cores, spinning is most of what they would do.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir


def pytest_configure(config: pytest.Config) -> None:
    # It keeps what it reads from loaded modules, code that torch.compile generated among them: nothing for a checkout.
    home = tempfile.TemporaryDirectory(prefix="hypothesis-")
    config.add_cleanup(home.cleanup)
    set_hypothesis_home_dir(home.name)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))

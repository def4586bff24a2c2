"""Fixtures for all tests."""

from __future__ import annotations

import pytest
import torch

import crossvit_kernels as ck


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def cpu_backend() -> str:
    """The name of the compiled backend, or a skip that says why it is missing."""
    backends = ck.backends()
    if not backends["cpu"]:
        pytest.skip(backends.reasons["cpu"])
    return "cpu"


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)

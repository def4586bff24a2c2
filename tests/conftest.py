"""Fixtures for all tests."""

from __future__ import annotations

import pytest
import torch

import crossvit_kernels as ck
from crossvit_kernels import extension


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


def _isa_levels() -> list[str]:
    return extension._C.usable_isas() if extension._C else []


@pytest.fixture(params=_isa_levels())
def isa_level(request: pytest.FixtureRequest):
    """Each instruction-set level that this processor has, in use during the test."""
    active = extension._C.active_isa()
    extension._C.use_isa(request.param)
    assert extension._C.active_isa() == request.param
    yield request.param
    extension._C.use_isa(active)


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)

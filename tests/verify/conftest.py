"""Every call is verified at first use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from broken_kernels import Broken

import crossvit_kernels as ck
from crossvit_kernels.ops.operator import OPERATIONS
from crossvit_kernels.verify import state


@pytest.fixture(autouse=True)
def _at_first_use(cpu_backend: str) -> Iterator[None]:
    state.forget()
    with ck.verification("first", trust_evidence=False):
        yield
    state.forget()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    if request.param in ("triton", "cuda"):
        request.getfixturevalue(f"{request.param}_device")
    return str(request.param)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Broken]:
    def breaks(name: str, backend: str, **faults: Any) -> Broken:
        backends = OPERATIONS[name].backends
        module = Broken(backends[backend], **faults)
        monkeypatch.setitem(backends, backend, module)
        return module

    return breaks

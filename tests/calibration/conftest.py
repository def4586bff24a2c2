"""Each test of calibration has a file of its own, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crossvit_kernels.calibration import measure, store
from crossvit_kernels.verify import state


@pytest.fixture(autouse=True)
def path(cpu_backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file, in a folder of the test's."""
    path = tmp_path / "of the user" / "calibrated.json"
    monkeypatch.setenv(store.ENVIRONMENT_VARIABLE, str(path))
    monkeypatch.setattr(measure, "_MOST_ROUNDS", 3)
    threads = torch.get_num_threads()
    store.forget()
    state.forget()
    yield path
    torch.set_num_threads(threads)
    store.batch_invariant(False)
    monkeypatch.delenv(store.ENVIRONMENT_VARIABLE)
    store.forget()
    state.forget()

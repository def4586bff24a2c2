"""Loads the programs of bench/ as modules, for tests."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
#: Facts of the environment in a result file.
FACTS = {"commit", "dirty", "date", "device", "dtype", "python", "torch", "triton", "threads"}

Rows = dict[tuple[str, str], dict[str, Any]]


@contextmanager
def program(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[ModuleType]:
    """Load a program with fixed ceilings and one thread.

    On a busy machine, threads would wait for each other longer than such small sizes take.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module(name)
    measure = importlib.import_module("measure")
    ceilings = measure.Ceilings(1e10, 2**28, 1e11, 2048, "float32")
    monkeypatch.setattr(measure, "measure_ceilings", lambda device, dtype: ceilings)
    try:
        yield module
    finally:
        torch.set_num_threads(threads)
        for path in BENCH.glob("*.py"):
            sys.modules.pop(path.stem, None)


def run(bench: ModuleType, path: Path, *arguments: str) -> tuple[int, Rows]:
    """Run a program; return its exit code, and the result rows by contender and mode."""
    code = bench.main([*arguments, "--json", str(path)])
    document = json.loads(path.read_text())
    assert set(document["environment"]) >= FACTS
    return code, {(row["contender"], row["mode"]): row for row in document["results"]}

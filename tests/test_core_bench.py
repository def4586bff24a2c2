"""bench/core_bench.py: a contender is timed only if its output and gradients are right."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from bench_programs import program, run
from torch import Tensor

TINY = shlex.split("--channels 32 --batch 2 --tokens 9 --device cpu --no-compile --repeats 3")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with program(monkeypatch, "core_bench") as module:
        yield module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_are_right(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    code, rows = run(bench, tmp_path / "r.json", *TINY, "--dtype", dtype)
    assert code == 0
    for name in ("eager", "ours (auto)"):
        assert set(rows[name, "forward"]["errors"]) == {"m"}
        assert set(rows[name, "train"]["errors"]) == {"m", "grad u", "grad x"}
        assert rows[name, "train"]["median_ms"] > 0 and rows[name, "train"]["share_of_copy"] > 0
    forward, train = capsys.readouterr().out.splitlines()[-2:]
    assert forward.startswith("Fastest forward: ") and "attention_core" in forward
    assert train.startswith("Fastest with backward: ") and "attention_core" in train


@pytest.mark.parametrize("which", ["u", "x"])
def test_wrong_gradient_is_not_timed(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    which: str,
) -> None:
    """The output is right; one gradient is 1 % too large."""

    def more(t: Tensor, name: str) -> Tensor:
        return t + (t - t.detach()) / 100 if name == which else t

    def spoiled(name: str):
        return lambda u, x, weights: bench.eager(more(u, "u"), more(x, "x"), weights)

    monkeypatch.setattr(bench, "our_backend", spoiled)
    code, rows = run(bench, tmp_path / "r.json", *TINY, "--backends", "auto")
    assert code == 1
    assert rows["ours (auto)", "forward"]["median_ms"] > 0
    wrong = rows["ours (auto)", "train"]
    assert wrong["status"] == "wrong" and wrong["reason"].startswith(f"grad {which}: RMS error")
    assert "median_ms" not in wrong
    assert "ERROR: C 32, batch 2, with backward: ours (auto): wrong" in capsys.readouterr().err

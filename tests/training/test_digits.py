"""The example that trains on handwritten digits, for two epochs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch, trainer: None) -> Iterator[ModuleType]:
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("digits")
    sys.modules.pop("digits", None)


@pytest.mark.slow
def test_fused_and_eager_learn_alike(
    digits: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], restore_threads: None
) -> None:
    """From one seed to one accuracy; their losses differ by rounding."""
    words = ["--output", str(tmp_path), "--epochs", "2", "--workers", "0"]
    assert digits.main([*words, "--min-accuracy", "40"]) == 0
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    rows = {
        mode: digits.read_table(tmp_path / mode / "epochs.csv")[-1] for mode in ("fused", "eager")
    }
    assert float(rows["fused"]["val_top1"]) == pytest.approx(
        float(rows["eager"]["val_top1"]), abs=1
    )
    assert float(rows["fused"]["train_loss"]) == pytest.approx(
        float(rows["eager"]["train_loss"]), rel=1e-4
    )
    assert "fused: " in capsys.readouterr().out
    # The runs are finished: nothing is trained again.
    assert digits.main([*words, "--min-accuracy", "100.1"]) == 1

"""The example programs, on small inputs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def digits(monkeypatch) -> Iterator[ModuleType]:
    for package in ("sklearn", "rich", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("digits")
    sys.modules.pop("digits", None)


@pytest.mark.slow
def test_digits_fused_and_eager_learn_alike(digits, tmp_path, capsys, restore_threads):
    picture = tmp_path / "curves.png"
    arguments = ["--epochs", "2", "--output", str(picture)]
    assert digits.main([*arguments, "--min-accuracy", "0.2"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "fused: " in printed and "eager, a rounding away: " in printed
    arguments += ["--epochs", "1", "--mode", "fused", "--min-accuracy", "1.01"]
    assert digits.main(arguments) == 1


@pytest.mark.slow
def test_digits_curves_are_the_same(digits, restore_threads):
    """In float64 rounding errors stay small for the length of a test."""
    options = digits.parse(["--epochs", "2", "--dtype", "float64"])
    torch.set_num_threads(options.threads)
    data = digits.load(0, torch.float64)
    torch.manual_seed(0)
    start = digits.CrossViT(digits.SMALL, in_chans=1, num_classes=10, drop_path_rate=0.1).double()
    runs = []
    for fused in (True, False):
        model = digits.copy.deepcopy(start).set_fused(fused)
        runs.append(digits.train(model, data, options, "test"))
    assert max(digits.apart(*runs)) < 1e-9
    assert runs[0].losses[-1] < 0.9 * runs[0].losses[0]

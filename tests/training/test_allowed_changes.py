"""Runs that continue with other options, as --allow-changes permits."""

from __future__ import annotations

import csv
import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
import training_runs as runs

from crossvit.train import main
from crossvit.training import run as module
from crossvit.training import state
from crossvit.training.records import STEPS, Table

pytestmark = pytest.mark.usefixtures("trainer")

FIRST = "--workers 0 --epochs 1 --warmup-epochs 0 --ema-decay 0"
SECOND = "--epochs 2 --allow-changes"


@pytest.fixture(autouse=True)
def _one_thread(restore_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "finished"
    assert main(runs.arguments(data, output, FIRST)) == 0
    return output


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_changed_hyper_parameters_are_used(data: Path, output: Path) -> None:
    more = "--weight-decay 0.3 --opt-eps 1e-5"
    assert main(runs.arguments(data, output, FIRST, SECOND, more)) == 0
    groups = state.Checkpoints(output / "checkpoints", 1).load_latest()["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
    assert {group["eps"] for group in groups} == {1e-5}


def test_averages_begin_with_the_weights(data: Path, output: Path) -> None:
    before = state.Checkpoints(output / "checkpoints", 1).load_latest()["model"]
    assert main(runs.arguments(data, output, FIRST, SECOND, "--ema-decay 0.99999")) == 0
    averaged = state.Checkpoints(output / "checkpoints", 1).load_latest()["ema"]
    for key, t in before.items():
        assert torch.allclose(averaged[key], t, rtol=0, atol=1e-6), key


@pytest.mark.parametrize("more", ["--opt sgd", "--model-args dims=16,16 num_heads=2,2 img_size=24"])
def test_what_cannot_change(data: Path, output: Path, more: str, capsys) -> None:
    assert main(runs.arguments(data, output, FIRST, SECOND, more)) == 1
    message = capsys.readouterr().err
    assert "are of another model or optimizer" in message and message.count("\n") == 1


def test_files_that_cannot_be_written_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path, capsys
) -> None:
    """The exported weights and the tables, as the checkpoints are."""

    def full(*unused: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    table = Table(tmp_path / "steps.csv", STEPS, 0)
    monkeypatch.setattr(csv.DictWriter, "writerow", full)
    with pytest.raises(OSError, match=r"steps\.csv: no space left on the disk"):
        table.add({"step": 0})
    table.close()
    monkeypatch.undo()
    monkeypatch.setattr(module, "save_checkpoint", full)
    assert main(runs.arguments(data, tmp_path / "run", FIRST)) == 1
    assert "best.safetensors: no space left on the disk" in capsys.readouterr().err

"""Workers that are killed, and checkpoints that are damaged after they were written."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import training_runs as runs

from crossvit.training import state
from crossvit.training.sources import open_source

pytestmark = pytest.mark.usefixtures("trainer")


def kill_a_worker(step: int) -> None:
    """Kill a process that reads images when a step begins, as a system short of memory does.

    Another one is stopped, as if it waited for a lock of the one that was killed.
    """
    from crossvit.training.engine import Engine

    original = Engine.step

    def kills(self: Engine, batches: Any, epoch: int, number: int, *more: Any) -> Any:
        if number == step:
            workers = [p for p in multiprocessing.active_children() if p.daemon]
            os.kill(workers[0].pid, signal.SIGSTOP)
            os.kill(workers[1].pid, signal.SIGKILL)
        return original(self, batches, epoch, number, *more)

    Engine.step = kills


@pytest.mark.slow
def test_a_killed_worker_ends_the_run(data: Path, tmp_path: Path) -> None:
    """In a process of its own, as what happens at its end is tested."""
    script = (
        "import sys, test_damage; test_damage.kill_a_worker(5); from crossvit.train import main"
    )
    options = runs.arguments(data, tmp_path / "run", "--workers 2 --save-every 1")
    ended = subprocess.run(
        [sys.executable, "-c", f"{script}; sys.exit(main(sys.argv[1:]))", *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(
        "crossvit.train: a process that reads images was killed"
    )
    assert state.Checkpoints(tmp_path / "run/checkpoints", 3).load_latest()["step"] >= 4


def test_damaged_checkpoints_do_not_outlive_later_ones(tmp_path: Path) -> None:
    checkpoints = state.Checkpoints(tmp_path, keep=3)
    for step in range(1, 6):
        checkpoints.save(step, {"step": step})
    for step in (4, 5):
        (tmp_path / f"step-{step:08d}.pt").write_bytes(b"damaged")
    fewer = state.Checkpoints(tmp_path, keep=1)
    assert fewer.load_latest()["step"] == 3
    path = fewer.save(4, {"step": 4})
    assert fewer.paths() == [path] and fewer.load_latest()["step"] == 4


def test_a_tar_file_names_its_classes(data: Path, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "val.tar", "w") as file:
        file.add(data / "val", ".")
    assert open_source(str(tmp_path / "val.tar")).class_names == ["class0", "class1", "class2"]

"""Workers that are killed, and checkpoints that are damaged after they were written."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import training_runs as runs

from crossvit.training import state
from crossvit.training.sources import open_source

pytestmark = pytest.mark.usefixtures("trainer")


def kill_a_worker(when: str) -> None:
    """Kill a process that reads images, as a system short of memory does: at a step or a save.

    Another one is stopped, as if it waited for a lock of the one that was killed.
    """
    from crossvit.training.engine import Engine

    def kill() -> None:
        workers = [p for p in multiprocessing.active_children() if p.daemon]
        os.kill(workers[0].pid, signal.SIGSTOP)
        os.kill(workers[1].pid, signal.SIGKILL)

    original = Engine.step

    def kills(self: Engine, batches: Any, epoch: int, number: int, *more: Any) -> Any:
        if number == 5:
            kill()
        return original(self, batches, epoch, number, *more)

    if when == "step":
        Engine.step = kills
    else:
        while_saving(5, kill)


def interrupt_twice() -> None:
    """Press Ctrl-C twice while the first checkpoint is written."""

    def press() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    while_saving(1, press)


def while_saving(count: int, act: Any) -> None:
    """Act in the middle of torch's writer, at the count-th checkpoint."""
    original, seen = state._torch_save, 0

    class File(io.BytesIO):
        def write(self, data: Any) -> int:
            nonlocal act
            if act is not None:
                act, done = None, act
                done()
                time.sleep(1)  # handlers run here
            return super().write(data)

    def save(content: dict[str, Any], file: Any) -> None:
        nonlocal seen
        seen += 1
        if seen < count:
            original(content, file)
        else:
            original(content, whole := File())
            file.write(whole.getvalue())

    state._torch_save = save


def run_with(damage: str, data: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """Train in a process of its own, as what happens at its end is tested."""
    script = f"import sys, test_damage; test_damage.{damage}; from crossvit.train import main"
    options = runs.arguments(data, output, "--workers 2 --save-every 1")
    return subprocess.run(
        [sys.executable, "-c", f"{script}; sys.exit(main(sys.argv[1:]))", *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("when", ["step", "save"])
def test_a_killed_worker_ends_the_run(when: str, data: Path, tmp_path: Path) -> None:
    ended = run_with(f"kill_a_worker({when!r})", data, tmp_path / "run")
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(
        "crossvit.train: a process that reads images was killed"
    )
    assert state.Checkpoints(tmp_path / "run/checkpoints", 3).load_latest()["step"] >= 4


@pytest.mark.slow
def test_interrupted_while_a_checkpoint_is_written(data: Path, tmp_path: Path) -> None:
    ended = run_with("interrupt_twice()", data, tmp_path / "run")
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("crossvit.train: interrupted")
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001.pt"]


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

"""Two processes train as one with twice the batch; and how they end together."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import training_runs as runs
from accuracy import assert_within_rule
from torch import Tensor

from crossvit import Config, CrossViT
from crossvit.training import state
from crossvit.training.engine import Engine
from crossvit.training.records import read_table

pytestmark = pytest.mark.usefixtures("trainer")


def keep_first_step(path: str) -> None:
    """Write the first step's inputs, parameters and unsharded gradients, by rank 0."""
    from crossvit.training.distributed import whole

    prepare, update = Engine._prepare, Engine._update
    kept: dict[str, Any] = {"batches": []}

    def keeps_batch(self: Engine, *arguments: Any) -> tuple[Tensor, Tensor]:
        prepared = prepare(self, *arguments)
        kept["batches"].append(prepared)
        return prepared

    def keeps_gradients(self: Engine, norm: Tensor, step: int) -> None:
        named = dict(self.model.named_parameters())
        gradients = {name: whole(p.grad).clone() for name, p in named.items()}
        weights = {name: whole(p).detach().clone() for name, p in named.items()}
        if step == 0 and self.processes.first:
            torch.save(kept | {"gradients": gradients, "weights": weights}, path)
        update(self, norm, step)

    Engine._prepare, Engine._update = keeps_batch, keeps_gradients


def first_step(data: Path, output: Path, more: str, processes: int) -> dict[str, Any]:
    command = runs.arguments(data, output, runs.TWO_STEPS, more)
    path = f"{output}.step"
    codes = runs.run(command, keep_first_step, path, processes=processes)
    assert codes == [0] * processes, "\n".join(
        runs.printed(output, rank) for rank in range(processes)
    )
    return torch.load(path, weights_only=True)


def gradients(step: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Eager mode's, of the batches that one process saw."""
    config = Config((8, 16), (2, 2), (1, 1), (2.0, 2.0), num_blocks=1, img_size=24)
    model = CrossViT(config, num_classes=3).to(dtype)
    model.load_state_dict(step["weights"])
    for x, targets in step["batches"]:
        loss = F.cross_entropy(model(x.to(dtype)), targets, label_smoothing=0.1)
        (loss / len(step["batches"])).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def one_process(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("runs") / "one"
    return output, first_step(data, output, "", 1)


def assert_same_run(data: Path, output: Path, one: tuple[Path, dict], more: str, n: int) -> None:
    """Gradients by the accuracy rule; the accuracy of the uneven validation is exact."""
    step = first_step(data, output, more, n)
    exact, eager = (gradients(one[1], dtype) for dtype in (torch.float64, torch.float32))
    for name, expected in exact.items():
        # The gradient of a key's bias is 0, and rounding errors of others' sizes.
        floor = 1e-6 * max(g.abs().max().item() for g in exact.values())
        assert_within_rule(
            step["gradients"][name], eager[name], expected, name, absolute_floor=floor
        )
    rows = [read_table(run / "epochs.csv")[0] for run in (output, one[0])]
    assert rows[0]["val_top1"] == rows[1]["val_top1"]
    assert float(rows[0]["val_loss"]) == pytest.approx(float(rows[1]["val_loss"]), rel=1e-5)
    names = "checkpoints/step-00000002.pt"
    actual, expected = (state.load(run / names)["model"] for run in (output, one[0]))
    for name, t in expected.items():
        torch.testing.assert_close(actual[name], t, rtol=1e-3, atol=1e-3, msg=name)


def test_data_parallel(data: Path, one_process: tuple[Path, dict], tmp_path: Path) -> None:
    assert_same_run(data, tmp_path / "ddp", one_process, "", 2)


def test_sharded(data: Path, one_process: tuple[Path, dict], tmp_path: Path) -> None:
    assert_same_run(data, tmp_path / "fsdp", one_process, "--fsdp", 2)


def test_frozen_parameters(data: Path, tmp_path: Path) -> None:
    """Nothing waits for the gradients of frozen parameters, which stay as they are."""
    more = (runs.TWO_STEPS, "--freeze blocks.* pos_embed_*")
    output = tmp_path / "frozen"
    codes = runs.run(runs.arguments(data, output, *more), processes=2)
    assert codes == [0, 0], runs.printed(output)
    weights = state.load(output / "checkpoints/step-00000002.pt")
    torch.manual_seed(0)
    start = make_start()
    for name, t in start.named_parameters():
        same = torch.equal(weights["model"][name], t)
        assert same == name.startswith(("blocks.", "pos_embed_")), name


def make_start() -> CrossViT:
    """The model of ``runs.TINY`` as a run with seed 0 initialises it."""
    from crossvit.training.randomness import seed_all

    seed_all(0)
    config = Config((8, 16), (2, 2), (1, 1), (2.0, 2.0), num_blocks=1, img_size=24)
    return CrossViT(config, num_classes=3)


def tell_to_stop(step: int, rank: int) -> None:
    """Send SIGTERM to one of the processes when it begins a step."""
    original = Engine.step

    def told(self: Engine, batches: Any, epoch: int, number: int, stop: Any) -> Any:
        if number == step and self.processes.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches, epoch, number, stop)

    Engine.step = told


def test_all_stop_when_one_is_told(data: Path, tmp_path: Path) -> None:
    """The step is saved, the exit code says so, and one process may continue what two began."""
    output = tmp_path / "told"
    command = runs.arguments(data, output, runs.PLAIN)
    codes = runs.run(command, tell_to_stop, 2, 1, processes=2)
    assert codes == [75, 75], runs.printed(output)
    assert "stopped after step 3, which is saved" in runs.printed(output)
    assert runs.run(command, processes=1) == [0], runs.printed(output)
    assert "continues after step 3" in runs.printed(output)


@pytest.mark.slow
def test_torchrun_ends_all_with_the_error_of_one(tmp_path: Path) -> None:
    """One process meets an unreadable image; the other waits for it in the same step."""
    folder = runs.make_images(tmp_path / "images")
    (folder / "train/class1/3.png").write_bytes(b"no image")
    words = runs.arguments(folder, tmp_path / "run", "--workers 0")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launcher, "-m", "crossvit.train", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode != 0
    assert re.search(r"\[rank \d\] unreadable image: .*class1/3.png", ended.stderr), ended.stderr

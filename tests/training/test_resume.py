"""A run that is killed and started again ends as one that never was."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import training_runs as runs

from crossvit import load_model
from crossvit.training import state
from crossvit.training.records import read_table

pytestmark = pytest.mark.usefixtures("trainer")

SIGKILLED = -9


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert runs.run(command(data, output)) == [0], runs.printed(output)
    return output


def command(data: Path, output: Path) -> list[str]:
    return runs.arguments(data, output, "--save-every 2 --log-every 1")


def assert_same(actual: Path, expected: Path) -> None:
    """Bitwise: parameters, averaged weights, the optimizer, exports; and what was recorded."""
    name = "checkpoints/step-00000012.pt"
    a, b = state.load(actual / name), state.load(expected / name)
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys()
        for key, t in b[part].items():
            assert torch.equal(a[part][key], t), f"{part}: {key}"
    moments = b["optimizer"]["state"]
    assert len(moments) == len(b["model"])
    for key, values in moments.items():
        for moment, t in values.items():
            assert torch.equal(a["optimizer"]["state"][key][moment], t), f"{key}: {moment}"
    for file in ("last.safetensors", "best.safetensors"):
        exports = [load_model(run / file).state_dict() for run in (actual, expected)]
        for key, t in exports[1].items():
            assert torch.equal(exports[0][key], t), f"{file}: {key}"
    assert (actual / "steps.csv").read_text() == (expected / "steps.csv").read_text()
    measured = ("images_per_s", "data_wait", "seconds", "memory_mb")
    rows = [read_table(run / "epochs.csv") for run in (actual, expected)]
    assert len(rows[0]) == len(rows[1]) == 3
    for row, other in zip(*rows, strict=True):
        for column in row.keys() - set(measured):
            assert row[column] == other[column], column


def test_killed_twice(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """At a random step, and in the write of a checkpoint."""
    output, step = tmp_path / "killed", random.SystemRandom().randrange(3, 9)
    print("killed before step", step)
    kill_and_continue(data, output, (runs.die_before_step, step), (runs.die_while_writing, 1, 0.5))
    assert_same(output, uninterrupted)


@pytest.mark.slow
def test_killed_at_random_moments(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """At two random steps, in a write of a checkpoint, after another, and in an evaluation."""
    first, second = sorted(random.SystemRandom().sample(range(1, 11), 2))
    share = random.SystemRandom().random()
    print("killed at steps", first, second, "and with", share, "of a checkpoint written")
    output = tmp_path / "killed"
    kill_and_continue(
        data,
        output,
        (runs.die_before_step, first),
        (runs.die_while_writing, 1, share),
        (runs.die_before_step, second),
        (runs.die_after_writing, 2),
        (runs.die_while_evaluating, 1),
    )
    assert_same(output, uninterrupted)


def kill_and_continue(data: Path, output: Path, *hooks: tuple) -> None:
    """Kill a run once with each hook, which it may outlive if it got further, then let it end."""
    codes = []
    for hook in hooks:
        codes += runs.run(command(data, output), *hook)
        assert codes[-1] in (SIGKILLED, 0), runs.printed(output)
        for path in (output / "checkpoints").glob("*.pt"):
            state.load(path)  # whole, whenever the process died
    assert codes.count(SIGKILLED) >= 2
    assert runs.run(command(data, output)) == [0], runs.printed(output)
    assert "continues after step" in runs.printed(output)
    assert not list((output / "checkpoints").glob(".*"))


def test_a_finished_run_is_left_alone(data: Path, uninterrupted: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*.pt")}
    assert runs.run(command(data, uninterrupted)) == [0]
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*.pt")}
    assert len(before) == 3  # the last ones
    assert "finished" in runs.printed(uninterrupted)


def test_the_best_is_a_model(uninterrupted: Path) -> None:
    model = load_model(uninterrupted / "best.safetensors")
    logits = model.eval()(torch.randn(1, 3, 24, 24))
    assert logits.shape == (1, 3) and logits.isfinite().all()

"""What all benchmarks share: verdicts, the commit of a result, checks before anything is timed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "bench"))


def test_the_verdict_in_plain_words() -> None:
    verdict = importlib.import_module("report").verdict

    def row(contender: str, ms: float) -> dict[str, object]:
        return {"contender": contender, "median_ms": ms, "times_eager": 40 / ms}

    rows = [row("eager", 40.0), row("SDPA", 10.0), row("ours (cpu)", 2.0)]
    assert verdict("forward", rows, "times_eager") == (
        "forward: ours (cpu) is fastest, 2 ms, 20x eager and 5x the next best (SDPA)."
    )
    slower = [*rows[:2], row("ours (cpu)", 20.0), {"contender": "declined"}]
    assert verdict("forward", slower, "times_eager") == (
        "forward: SDPA is fastest, 10 ms, 4x eager; ours (cpu) has 0.5x its speed (20 ms)."
    )
    assert verdict("train", [], "times_eager") == "train: nothing was timed."


def test_results_name_their_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = importlib.import_module("measure")
    facts = measure.environment(torch.device("cpu"))
    if facts["commit"] is not None:  # not in a source distribution
        assert len(facts["commit"]) == 40 and facts["uncommitted_changes"] in (True, False)
    monkeypatch.setenv("PATH", "")
    assert measure.commit() == {"commit": None, "uncommitted_changes": None}


def test_a_wrong_gradient_is_not_timed() -> None:
    core_bench = importlib.import_module("core_bench")

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, x):
            with torch.enable_grad():
                ctx.inputs = u.detach().requires_grad_(), x.detach().requires_grad_()
                ctx.m = core_bench.eager(*ctx.inputs)
            return ctx.m.detach()

        @staticmethod
        def backward(ctx, dm):
            du, dx = torch.autograd.grad(ctx.m, ctx.inputs, dm)
            return du, dx * 1.01

    options = core_bench.parse(["--batch", "2", "--channels", "16", "--tokens", "5"])
    point = core_bench.Point(options, 16, 2)
    assert point.judge(Wrong.apply, "forward")["status"] == "ok"
    outcome = point.judge(Wrong.apply, "train")
    assert outcome["status"] == "wrong" and outcome["reason"].startswith("dx: ")


@pytest.mark.usefixtures("cpu_backend")
def test_block_bench_with_frozen_weights(capsys: pytest.CaptureFixture[str]) -> None:
    block_bench = importlib.import_module("block_bench")
    arguments = "--tokens 5 --batch 2 --models Ti --branches S --no-compile --repeats 2 --frozen"
    assert block_bench.main(arguments.split()) == 0
    shown = capsys.readouterr().out
    assert "ours (cpu)" in shown and "is fastest" in shown

"""bench/fusion_bench.py: its output, and that it does not time wrong results."""

from __future__ import annotations

import csv
import importlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import bench_programs
import pytest
import torch
from bench_programs import BENCH, FACTS, Rows, program
from torch import Tensor

import crossvit_kernels as ck

TINY = shlex.split("--tokens 9 --dim 32 --heads 2 --batch 2 --device cpu --no-compile --repeats 3")
PYTORCH = ["eager", "SDPA", "absorbed", "absorbed, SDPA"]
COMPILED = ["eager, compiled", "absorbed, compiled"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with program(monkeypatch, "fusion_bench") as module:
        yield module


@pytest.fixture
def contenders(bench: ModuleType) -> ModuleType:
    """The module with the program's contenders."""
    return importlib.import_module("fusion_contenders")


def run(bench: ModuleType, path: Path, *arguments: str) -> tuple[int, Rows]:
    return bench_programs.run(bench, path, *TINY, *arguments)


def test_program_writes_every_contender(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv")]
    done = subprocess.run(
        [sys.executable, str(BENCH / "fusion_bench.py"), *TINY, *files],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "r.json").read_text())
    assert set(document["environment"]) >= FACTS
    assert document["environment"]["device"]
    assert document["environment"]["torch"].startswith(torch.__version__.split("+")[0])
    assert document["ceilings"]["copy_bytes_per_second"] > 0

    ours = ["ours (auto)", *(["ours (cpu)"] if ck.backends()["cpu"] else []), "ours (library)"]
    rows = {(row["contender"], row["mode"]): row for row in document["results"]}
    assert set(rows) == {
        (name, mode) for name in [*PYTORCH, *COMPILED, *ours] for mode in ("forward", "train")
    }
    for (name, mode), row in rows.items():
        if name in COMPILED:
            assert row["status"] == "skipped" and "median_ms" not in row
        elif name in PYTORCH or row["status"] == "ok":
            check_measured(row, mode)
            assert name in done.stdout

    forward, train = done.stdout.splitlines()[-2:]
    assert forward.startswith("Fastest forward: ") and "cross_attention_fusion" in forward
    assert train.startswith("Fastest with backward: ") and "cross_attention_fusion" in train

    with (tmp_path / "r.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["contender"] for line in lines] == [r["contender"] for r in document["results"]]
    assert float(lines[0]["median_ms"]) == document["results"][0]["median_ms"]


def check_measured(row: dict[str, Any], mode: str) -> None:
    assert row["status"] == "ok", row["reason"]
    assert row["rounds"] == 3
    assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
    assert row["speedup_over_eager"] > 0
    assert row["share_of_copy"] > 0
    assert row["extra_peak_bytes"] > 0
    assert 0 < row["error"] < 1e-4
    assert 0 < row["eager_error"] < 1e-4
    assert len(row["errors"]) == (1 if mode == "forward" else 3 + len(ck.FusionWeights._fields))


def broken_output(eager: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: eager(*arguments) * 1.001


def broken_gradient(eager: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A contender with the right output, whose tokens' gradient is 1 % too large."""
    return lambda cls, tokens, *rest: eager(cls, tokens + (tokens - tokens.detach()) / 100, *rest)


@pytest.mark.parametrize(
    ("breakage", "mode", "result"),
    [(broken_output, "forward", "output"), (broken_gradient, "train", "grad tokens")],
)
def test_wrong_answer_is_not_timed(
    bench: ModuleType,
    contenders: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    breakage: Callable[..., Any],
    mode: str,
    result: str,
) -> None:
    eager = contenders.eager
    monkeypatch.setattr(contenders, "our_backend", lambda name: breakage(eager))
    code, rows = run(bench, tmp_path / "r.json", "--backends", "reference", "--mode", mode)
    row = rows["ours (reference)", mode]
    assert code == 1
    assert row["status"] == "wrong" and row["reason"].startswith(f"{result}: RMS error")
    assert "median_ms" not in row
    assert f"ours (reference): wrong: {result}" in capsys.readouterr().err
    assert rows["eager", mode]["median_ms"] > 0


def test_failing_baseline_leaves_the_others(
    bench: ModuleType,
    contenders: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def fail(*_: Any) -> Tensor:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(contenders, "sdpa", fail)
    code, rows = run(bench, tmp_path / "r.json", "--mode", "forward", "--backends", "none")
    assert code == 0
    assert rows["SDPA", "forward"]["status"] == "failed"
    assert rows["SDPA", "forward"]["reason"] == "RuntimeError: no such kernel"
    assert rows["absorbed", "forward"]["status"] == "ok"


@pytest.mark.slow
def test_sweep_and_plot(bench: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sweeps = ["--sweep", "tokens=5,9", "--sweep", "batch=1,2", "--backends", "none"]
    plot = tmp_path / "sweep.png"
    code = bench.main([*TINY, *sweeps, "--csv", str(tmp_path / "r.csv"), "--plot", str(plot)])
    assert code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "r.csv").open(newline="") as file:
        points = {(int(row["tokens"]), int(row["batch"])) for row in csv.DictReader(file)}
    assert points == {(5, 2), (9, 2), (9, 1)}


def test_not_a_number_is_wrong(bench: ModuleType) -> None:
    exact = torch.randn(4, 8, dtype=torch.float64)
    tolerance = bench.measure.Tolerance(exact, bench.measure.Error(1e-7, 3e-7), torch.float32)
    right = bench.measure.judge([exact.float()], {"output": tolerance})
    assert right["status"] == "ok"
    wrong = bench.measure.judge([exact.float().fill_(float("nan"))], {"output": tolerance})
    assert wrong["status"] == "wrong"
    missing = bench.measure.judge([None], {"output": tolerance})
    assert missing["reason"] == "output: missing"


@pytest.mark.slow
def test_both_fusions_of_a_block(bench: ModuleType, tmp_path: Path) -> None:
    backend = "triton" if ck.backends()["triton"] else "reference"
    code, rows = run(bench, tmp_path / "r.json", "--pair-tokens", "4", "--backends", backend)
    ours = [f"ours ({backend})"]
    assert code == 0
    assert set(rows) == {(name, "forward") for name in [*PYTORCH, *COMPILED, *ours]}
    for name in [*PYTORCH, *ours]:
        row = rows[name, "forward"]
        assert row["status"] == "ok" and set(row["errors"]) == {"output", "output of the other"}
        assert row["pair_tokens"] == 4 and row["tokens"] == 9


def test_frozen_weights(bench: ModuleType, tmp_path: Path) -> None:
    """Only the gradients of the inputs, or of a head, are computed and checked."""
    code, rows = run(bench, tmp_path / "r.json", "--frozen")
    assert code == 0
    for name in [*PYTORCH, "ours (auto)"]:
        assert set(rows[name, "frozen"]["errors"]) == {"output", "grad cls", "grad tokens"}
        assert set(rows[name, "heads"]["errors"]) == {"output", "grad head"}
        assert rows[name, "frozen"]["median_ms"] > 0 and rows[name, "heads"]["median_ms"] > 0


def test_wrong_gradient_with_frozen_weights_is_not_timed(
    bench: ModuleType, contenders: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spoiled = broken_gradient(contenders.eager)
    monkeypatch.setattr(contenders, "our_backend", lambda name: spoiled)
    code, rows = run(bench, tmp_path / "r.json", "--backends", "reference", "--frozen")
    assert code == 1
    row = rows["ours (reference)", "frozen"]
    assert row["status"] == "wrong" and row["reason"].startswith("grad tokens: RMS error")
    assert rows["ours (reference)", "heads"]["status"] == "ok"


def test_floor_is_the_tokens(contenders: ModuleType) -> None:
    shape = contenders.Shape(401, 1024, 192, 384, 6, torch.bfloat16)
    tokens = 1024 * 400 * 192 * 2
    assert tokens < shape.floor_bytes("forward") < 1.05 * tokens
    assert 3 * tokens < shape.floor_bytes("train") < 1.05 * 3 * tokens
    both = contenders.Shape(401, 1024, 192, 384, 6, torch.bfloat16, pair_tokens=197)
    assert both.token_bytes == tokens + 1024 * 196 * 384 * 2
    assert both.floor_bytes("forward") > both.token_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dim 32 --heads 3", "--dim 32 is no multiple of --heads 3"),
        ("--tokens 1", "at least one patch"),
        ("--pair-tokens 1", "at least one patch"),
        ("--pair-tokens 9 --frozen", "--pair-tokens: both fusions at once"),
        ("--frozen --mode train", "not allowed with argument"),
        ("--pair-tokens 9 --mode train", "--pair-tokens: both fusions at once"),
        ("--tokens many", "expected a positive whole number, got 'many'"),
        ("--sweep width=1,2", "expected tokens=N,N,... or batch=B,B,..."),
        ("--device tpu", "expected auto, cpu, cuda or cuda:N"),
        ("--backends fpga", "--backends fpga: expected one of"),
    ],
)
def test_bad_argument_is_explained(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err

"""Shared code of the benchmarks: environment, command line, closing lines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bench_programs import BENCH, FACTS, program

PROGRAMS = ("fusion_bench", "core_bench", "block_bench", "model_bench", "gpu_suite")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with program(monkeypatch, "core_bench"):
        yield sys.modules["environment"]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with program(monkeypatch, "core_bench"):
        yield sys.modules["report"]


def git(folder: Path, *arguments: str) -> str:
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *author, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit(environment: ModuleType, tmp_path: Path) -> None:
    unknown = {"commit": None, "dirty": None}
    assert environment.commit(tmp_path) == unknown  # no repository
    git(tmp_path, "init")
    assert environment.commit(tmp_path) == unknown  # no commit yet
    (tmp_path / "file").write_text("one")
    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "bench/results/old.json").write_text("{}")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert environment.commit(tmp_path) == {"commit": head, "dirty": False}
    (tmp_path / "bench/results/old.json").write_text("{1: 2}")
    assert environment.commit(tmp_path) == {"commit": head, "dirty": False}
    (tmp_path / "file").write_text("two")
    assert environment.commit(tmp_path) == {"commit": head, "dirty": True}
    assert environment.commit(tmp_path / "bench") == unknown  # of another project


def test_commit_without_git(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.commit() == {"commit": None, "dirty": None}


def test_facts_of_a_run(environment: ModuleType) -> None:
    facts = environment.environment(torch.device("cpu"), "bfloat16")
    assert set(facts) >= FACTS
    assert facts["torch"] == torch.__version__ and facts["dtype"] == "bfloat16"
    assert facts["date"][:2] == "20" and facts["device"] and facts["device_type"] == "cpu"


def row(name: str, ms: float, ours: bool = False, status: str = "ok") -> dict[str, Any]:
    if status != "ok":
        return {"contender": name, "ours": ours, "status": status}
    times = {"median_ms": ms, "speedup_over_eager": 48 / ms}
    return {"contender": name, "ours": ours, "status": status, **times}


EAGER, SDPA = row("eager", 48.0), row("absorbed, SDPA", 8.53)
CLOSING = [
    (
        [EAGER, SDPA, row("ours (auto)", 1.66, True), row("ours (cpu)", 1.6, True)],
        "fusion, 1.66 ms, 29x eager and 5.1x the next best (this algorithm on SDPA).",
    ),
    (
        [EAGER, SDPA, row("ours (auto)", 9.0, True)],
        "this algorithm on SDPA, 8.53 ms, 5.6x eager; fusion is second, 9 ms, 0.95x of its speed.",
    ),
    (
        [EAGER, SDPA, row("ours (auto)", 60.0, True)],
        "this algorithm on SDPA, 8.53 ms, 5.6x eager; fusion is third, 60 ms, 0.14x of its speed.",
    ),
    (
        [EAGER, row("ours (auto)", 60.0, True)],
        "eager, 48 ms; fusion is second, 60 ms, 0.80x of its speed.",
    ),
    (
        [EAGER, row("ours (auto)", 32.0, True)],
        "fusion, 32 ms, 1.50x eager, the only other contender.",
    ),
    (
        [EAGER, SDPA, row("ours (auto)", 1.0, True, "wrong")],
        "this algorithm on SDPA, 8.53 ms, 5.6x eager; fusion was not timed.",
    ),
    ([row("eager", 1.0, status="failed")], "nothing was timed."),
]


@pytest.mark.parametrize(("rows", "expected"), CLOSING)
def test_closing_line(report: ModuleType, rows: list[dict[str, Any]], expected: str) -> None:
    words = {"absorbed, SDPA": "this algorithm on SDPA"}
    points = [report.Point("batch 1", rows)]
    text = report.closing("forward", points, "fusion", "ours (auto)", words)
    assert text == f"Fastest forward: {expected}"


def test_closing_line_of_many_sizes(report: ModuleType) -> None:
    first, second = (
        report.Point(f"batch {n}", [EAGER, SDPA, row("ours (auto)", ms, True)])
        for n, ms in ((1, 10.0), (64, 2.0))
    )
    words = {"absorbed, SDPA": "this algorithm on SDPA"}
    assert report.closing("forward", [first, second], "fusion", "ours (auto)", words) == (
        "Forward, 2 sizes: fusion is fastest at 1, 4.8x to 24x eager, at worst 0.85x the best "
        "other (this algorithm on SDPA; batch 1)."
    )
    assert "is fastest at all, 24x to 24x eager, at least 4.3x the best other" in report.closing(
        "forward", [second, second], "fusion", "ours (auto)", words
    )


@pytest.mark.parametrize("name", PROGRAMS)
def test_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with program(monkeypatch, name) as bench:
        with pytest.raises(SystemExit) as stopped:
            bench.main(["--help"])
        assert stopped.value.code == 0
        wrong = ["--secondz", "1"] if name == "gpu_suite" else ["--repeatz", "1"]
        meant = wrong[0].replace("z", "s")
        for arguments, message in (
            (wrong, f"unknown argument {wrong[0]} 1; is {meant} meant?"),
            (["--qqq"], "unknown argument --qqq\n"),
            (wrong[:1] if name == "gpu_suite" else ["--js", "a"], "is --"),
        ):
            given = ["out", *arguments] if name == "gpu_suite" else arguments
            with pytest.raises(SystemExit) as stopped:
                bench.main(given)
            assert stopped.value.code == 2
            assert message in capsys.readouterr().err


@pytest.mark.slow
def test_no_launch_is_timed_that_was_not_counted() -> None:
    code = (
        "import host_bench; f = {n: [0] * c for n, c in host_bench.EXPECTED_LAUNCHES.items()}\n"
        "host_bench.check(f, f)\n"
        "for wrong in ({**f, 'forward': []}, {**f, 'forward': [1]}):\n"
        "    try: host_bench.check(wrong, f)\n"
        "    except RuntimeError as e: assert str(e).startswith('forward: '), e\n"
        "    else: raise SystemExit('accepted')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCH, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr

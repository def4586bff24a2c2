"""bench/gpu_suite.py: a dry run on a CPU, to find mistakes without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from bench_programs import program


@pytest.fixture
def suite(monkeypatch):
    with program(monkeypatch, "gpu_suite") as module:
        yield module


@pytest.mark.slow
def test_dry_run(suite, tmp_path, capsys) -> None:
    assert suite.main([str(tmp_path), "--dry-run"]) == 0, capsys.readouterr().out
    stages = json.loads((tmp_path / "stages.json").read_text())
    fusions = "fusion-Ti-S", "fusion-Ti-pair"
    for name in ("imports", "tests", "sanitizer", "core", *fusions, "blocks-Ti"):
        assert stages[name]["status"] == 0
    assert stages["models-crossvit_tiny_240"]["status"] == stages["paper-tables"]["status"] == 0
    blocks = json.loads((tmp_path / "blocks-Ti.json").read_text())["results"]
    assert {"ours (auto)", "ours (cpu)", "ours (triton, lean)"} <= {r["contender"] for r in blocks}
    rows = json.loads((tmp_path / "core.json").read_text())["results"]
    assert {r["mode"] for r in rows} == {"forward", "train"}
    assert {r["contender"] for r in rows if r["status"] != "ok"} == {"eager, compiled"}
    assert all(r["median_ms"] > 0 and r["floor_bytes"] > 0 for r in rows if r["status"] == "ok")
    capsys.readouterr()
    assert suite.main([str(tmp_path), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("done before") == len(stages)


def test_on_a_gpu_every_width_is_measured(suite, tmp_path) -> None:
    stages = {stage.name: stage for stage in suite.stages(tmp_path, dry=False)}
    names = ("Ti", "15", "B", "9", "18")
    assert {f"fusion-{n}-{b}" for n in names for b in ("S", "L", "pair")} <= set(stages)
    assert {f"blocks-{name}" for name in ("Ti", "15", "B", "9", "18")} <= set(stages)
    models = [name for name in stages if name.startswith("models-")]
    assert len(models) == 2 * 9 + 2  # the first model also without its compiled baselines
    assert "max-autotune" in stages["models-crossvit_9_dagger_240-train"].command
    assert ("compile" in stages) == torch.cuda.is_available()
    assert "--compile-budget" in stages["fusion-15-S"].command
    assert "--no-compile" in stages["fusion-9-L"].command
    assert "--throughput" in stages["paper-tables"].command
    assert "batch=1,8,64,256,1024" in stages["fusion-15-L"].command


@pytest.mark.slow
def test_a_stage_that_fails_or_hangs_does_not_stop_the_others(suite, tmp_path, monkeypatch) -> None:
    def command(code: str) -> tuple[str, ...]:
        return (sys.executable, "-c", code)

    shortened = [
        suite.Stage("bad", command("raise SystemExit(3)"), 60),
        suite.Stage("slow", command("import time; time.sleep(60)"), 1),
        suite.Stage("good", command("print('here')"), 60),
    ]
    monkeypatch.setattr(suite, "stages", lambda out, dry: shortened)
    assert suite.main([str(tmp_path)]) == 1
    stages = json.loads((tmp_path / "stages.json").read_text())
    assert [stages[s.name]["status"] for s in shortened] == [3, 124, 0]
    assert (tmp_path / "good.log").read_text() == "here\n"
    shortened[0] = suite.Stage("bad", command("pass"), 60)
    assert suite.main([str(tmp_path), "--only", "bad"]) == 1  # slow is still unfinished
    assert json.loads((tmp_path / "stages.json").read_text())["bad"]["status"] == 0


def test_stages_of_a_group_run_at_the_same_time(suite, tmp_path, monkeypatch) -> None:
    """Each waits for the other's file."""
    code = (
        "import pathlib, time, sys; own, other = map(pathlib.Path, sys.argv[1:]); own.touch()\n"
        "while not other.exists(): time.sleep(0.01)"
    )
    files = [str(tmp_path / name) for name in ("first", "second")]
    together = [
        suite.Stage(Path(own).name, (sys.executable, "-c", code, own, other), 60, "both")
        for own, other in (files, files[::-1])
    ]
    monkeypatch.setattr(suite, "stages", lambda out, dry: together)
    assert suite.main([str(tmp_path)]) == 0


def test_timed_stages_run_alone(suite, tmp_path) -> None:
    timed = {"core", "kernel-times", "blocks-15", "fusion-15-S", "models-crossvit_15_240-train"}
    stages = {stage.name: stage for stage in suite.stages(tmp_path, dry=False)}
    assert timed <= set(stages) and not any(stages[name].group for name in timed)


def test_kernels_of_passes(monkeypatch) -> None:
    """Nothing counts that is not between marks: warm-up, the flush of the L2."""
    with program(monkeypatch, "kernel_times") as module:
        once = ["fill", "spin_kernel(long)", "a", "b", "spin_kernel(long)"]
        names = ["warm-up", *once, *once, "other"]
        kernels = [module.Kernel(name, 10 * i, 10 * i + i) for i, name in enumerate(names)]
        found = list(module.passes(kernels))
        assert [[k.name for k in one] for one in found] == [["a", "b"], ["a", "b"]]
        row = module.times_of(found)
        assert row["passes"] == 2 and row["kernels"][0] == {"kernel": "a", "microseconds": 5.5}
        assert row["span_microseconds"] == 16.5
        of_pass = dict.fromkeys(("model", "operation", "direction", "channels", "batch"), 1)
        of_pass |= {"backend": "triton", "dtype": "bf16", "config": ""}
        modelled = [
            {**of_pass, "kernel": "a", "modelled": {"microseconds": time, "floor": 1}}
            for time in (3, 4)
        ]
        names = "void a<float>(int)", "a_backward", "a"
        row = {**of_pass, "kernels": [{"kernel": name} for name in names]}
        module.put_beside([row], modelled)
    assert [kernel.get("modelled") for kernel in row["kernels"]] == [3, None, 4]


def test_inputs_are_filled_in_their_layout(monkeypatch) -> None:
    with program(monkeypatch, "kernel_times") as module:
        workload = next(w for w in module.workloads("9", module.DTYPES["bf16"], 2))
        inputs = workload.inputs()
        real = module.filled(inputs, workload.operation, torch.device("cpu"))
        assert real.x.stride() == inputs.x.stride() and real.x.dtype == torch.bfloat16
        assert real.x.float().std() > 0.9
        outputs, _ = module.pass_of(workload, "cpu", torch.device("cpu"))()
    assert all(t.isfinite().all() for t in outputs)

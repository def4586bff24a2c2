"""bench/model_bench.py: its output, and that it does not time wrong results."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from bench_programs import FACTS, program

QUICK = ["--models", "crossvit_tiny_240", "--img-size", "48", "--batch", "2", "--device", "cpu"]
QUICK += ["--min-time", "0", "--no-compile"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with program(monkeypatch, "model_bench") as module:
        yield module


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_files_and_table(bench, tmp_path, capsys, dtype):
    pytest.importorskip("matplotlib")
    paths = {kind: tmp_path / f"models.{kind}" for kind in ("json", "csv", "png")}
    outputs = ["--json", str(paths["json"]), "--csv", str(paths["csv"])]
    outputs += ["--plot", str(paths["png"])]
    assert bench.main([*QUICK, *outputs, "--dtype", dtype]) == 0
    document = json.loads(paths["json"].read_text())
    rows = document["results"]
    assert {(row["mode"], row["contender"]) for row in rows} == {
        (mode, contender)
        for mode in ("inference", "train")
        for contender in ("ours, eager", "ours, fused")
    }
    for row in rows:
        assert row["status"] == "ok" and row["images_per_second"] > 0
        assert row["images_per_second"] == pytest.approx(2e3 / row["median_ms"])
        assert row["extra_peak_bytes"] > 0 and row["rounds"] >= 5
    with paths["csv"].open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    assert set(document["environment"]) >= FACTS and document["environment"]["dtype"] == dtype
    printed = capsys.readouterr().out
    inference, training = printed.splitlines()[-2:]
    assert inference.startswith("Fastest inference: ") and "CrossViT, fused" in inference
    assert training.startswith("Fastest training: ") and "CrossViT, fused" in training
    assert "48 x 48" in printed and "ours, fused" in printed


@pytest.mark.slow
def test_a_wrong_model_is_not_timed(bench, monkeypatch, tmp_path, capsys):
    make = bench.crossvit.create_model

    def spoiled(*args, use_fused=False, **options):
        model = make(*args, use_fused=use_fused, **options)
        if use_fused:
            model.forward_head = lambda features: 1.001 * type(model).forward_head(model, features)
        return model

    monkeypatch.setattr(bench.crossvit, "create_model", spoiled)
    path = tmp_path / "models.json"
    assert bench.main([*QUICK, "--json", str(path)]) == 1
    rows = json.loads(path.read_text())["results"]
    for row in rows:
        assert (row["status"] == "wrong") == (row["contender"] == "ours, fused")
        assert ("median_ms" in row) == (row["status"] == "ok")
    assert "ERROR: crossvit_tiny_240" in capsys.readouterr().err


@pytest.mark.slow
def test_a_wrong_gradient_of_one_parameter_is_not_timed(bench, monkeypatch, tmp_path):
    """The logits and all gradients but one are right."""
    make = bench.crossvit.create_model

    def spoiled(*args, use_fused=False, **options):
        model = make(*args, use_fused=use_fused, **options)
        if use_fused:
            b = model.norm[0].bias

            def forward_head(features):
                # The sum over classes of cross-entropy's gradient is zero: change one class.
                shift = torch.eye(1, 1000) * 1e-2 * (b - b.detach()).sum()
                return type(model).forward_head(model, features) + shift

            model.forward_head = forward_head
        return model

    monkeypatch.setattr(bench.crossvit, "create_model", spoiled)
    path = tmp_path / "models.json"
    assert bench.main([*QUICK, "--mode", "train", "--json", str(path)]) == 1
    rows = {row["contender"]: row for row in json.loads(path.read_text())["results"]}
    assert rows["ours, eager"]["status"] == "ok"
    wrong = rows["ours, fused"]
    assert wrong["status"] == "wrong" and "median_ms" not in wrong
    assert wrong["reason"].startswith("grad norm.0.bias: ") and "; " not in wrong["reason"]


def test_arguments(bench, capsys):
    options = bench.parse(["--paper", "--models", "crossvit_9*_240"])
    assert options.models == ["crossvit_9_240", "crossvit_9_dagger_240"]
    assert (options.batch, options.repeats) == ([64], 100)
    for wrong in (["--models", "resnet50"], ["--batch", "0"]):
        with pytest.raises(SystemExit):
            bench.parse(wrong)
    assert "resnet50" in capsys.readouterr().err


def test_timm_is_measured_where_it_is_installed(bench, tmp_path):
    pytest.importorskip("timm")
    arguments = ["--models", "crossvit_tiny_240", "--batch", "1", "--device", "cpu"]
    arguments += ["--mode", "inference", "--min-time", "0", "--no-compile"]
    path = tmp_path / "models.json"
    assert bench.main([*arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]
    assert [row["contender"] for row in rows] == ["timm, eager", "ours, eager", "ours, fused"]
    assert all(row["status"] == "ok" for row in rows)

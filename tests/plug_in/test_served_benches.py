"""bench/heads_bench.py and bench/zoo_bench.py on small inputs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bench_programs import FACTS, program
from torch import nn

pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("cpu_backend")
QUICK = ("--device", "cpu", "--no-compile", "--min-time", "0.01", "--batch", "2")


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with program(monkeypatch, "heads_bench") as module:
        from timm.layers import AttentionPoolLatent

        small = {
            f"{queries} queries": module.Head(
                lambda n=queries: AttentionPoolLatent(48, num_heads=3, latent_len=n), ((9, 48),)
            )
            for queries in (1, 16)
        }
        monkeypatch.setattr(module, "heads", lambda: small)
        yield module


def test_heads(heads: ModuleType, tmp_path: Path) -> None:
    path, table = tmp_path / "r.json", tmp_path / "r.md"
    assert heads.main([*QUICK, "--json", str(path), "--markdown", str(table)]) == 0
    document = json.loads(path.read_text())
    assert set(document["environment"]) >= FACTS
    rows = {(r["head"], r["mode"], r["contender"]): r for r in document["results"]}
    assert len(rows) == 6  # 16 queries are not served
    assert all(r["median_ms"] > 0 and r["speedup"] > 0 for r in rows.values())
    lines = table.read_text().splitlines()
    assert lines[0] == "| head | own forward | compiled | served |"
    assert "own: 16 queries of head dim 16" in lines[4] and len(lines) == 8


def test_a_wrong_head_is_not_timed(
    heads: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from crossvit_kernels.plug_in import calls

    right = calls.pool
    monkeypatch.setattr(calls, "pool", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    path = tmp_path / "r.json"
    assert (
        heads.main([*QUICK, "--only", "1 queries", "--mode", "forward", "--json", str(path)]) == 1
    )
    own, wrong = json.loads(path.read_text())["results"]
    assert own["status"] == "ok" and wrong["status"] == "not timed" and "median_ms" not in wrong
    assert "largest error" in wrong["reason"]


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The program, with small models."""
    import timm

    def create(name: str, **options: Any) -> nn.Module:
        small = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3}
        return make(name, **{**small, **options})

    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    with program(monkeypatch, "zoo_bench") as module:
        small = {"num_hidden_layers": 1, "hidden_size": 48, "intermediate_size": 96}
        for name, value in small.items():
            monkeypatch.setitem(module.zoo_models.WIDTH, name, value)
        yield module


def test_zoo(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("transformers")
    path, kept = tmp_path / "r.json", tmp_path / "kept.jsonl"
    models = ["vit_base_patch16_siglip_224", "transformers SigLIP"]
    arguments = [*QUICK, "--cpu-time", "--size", "32", "--json", str(path), "--resume", str(kept)]
    assert zoo.main([*arguments, "--models", models[0]]) == 0
    kept.write_text(kept.read_text() + '{"key": {"devi')  # killed while it wrote
    assert zoo.main([*arguments, "--models", *models]) == 0
    results = json.loads(path.read_text())["results"]
    assert [r["model"] for r in results] == [name for name in models for _ in range(3)]
    rows = {r["contender"]: r for r in results if r["model"] == models[0]}
    assert list(rows) == ["own forward", "served", "measured"]
    assert rows["served"]["modules"] == "1 Block, 1 AttentionPoolLatent"
    assert results[4]["modules"] == "1 SiglipEncoderLayer, 1 SiglipMultiheadAttentionPoolingHead"
    assert all(r["median_ms"] > 0 for r in results)
    assert "slower than its own forward by more than 3 %: " in capsys.readouterr().out

    def never(*args: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(zoo, "measured", never)
    assert zoo.main([*arguments, "--models", *models]) == 0
    assert json.loads(path.read_text())["results"] == results
    for other in (["--batch", "3"], ["--min-time", "0.02"], ["--no-example"]):
        with pytest.raises(AssertionError, match="measured again"):
            zoo.main([*arguments, "--models", models[0], *other])
    commit = {"commit": "another", "dirty": False}
    monkeypatch.setattr(zoo.served.environment, "commit", lambda: commit)
    with pytest.raises(AssertionError, match="measured again"):
        zoo.main([*arguments, "--models", models[0]])


def test_an_unknown_model_of_the_zoo(zoo: ModuleType, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        zoo.main(["--models", "transformers SigLIP 3"])
    assert "no model 'transformers SigLIP 3'; --list prints" in capsys.readouterr().err


def test_the_zoo_is_of_models_that_exist(zoo: ModuleType) -> None:
    import timm

    assert len(zoo.zoo_models.TIMM) >= 30 and len(zoo.zoo_models.TRANSFORMERS) >= 10
    assert [name for name in zoo.zoo_models.TIMM if not timm.is_model(name)] == []


def test_transformers_of_the_zoo_are_served(zoo: ModuleType) -> None:
    import argparse

    import torch

    import crossvit_kernels as ck

    pytest.importorskip("transformers")
    options = argparse.Namespace(device=torch.device("cpu"), dtype="float32", size=None)
    for name in zoo.zoo_models.TRANSFORMERS:
        name = f"{zoo.zoo_models.PREFIX}{name}"
        size = zoo.zoo_models.size_of(name, options)
        model = zoo.zoo_models.build(name, size, options)
        assert ck.accelerate(model).served, name
        with torch.no_grad():
            model(*zoo.zoo_models.inputs(name, size, 1, options))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_forms_of_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from crossvit import Config, CrossViT

    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    small = {"dims": (32, 64), "num_heads": (2, 2), "depths": (1, 1), "mlp_ratios": (2.0, 2.0)}
    config = Config(**small, num_blocks=1, img_size=48)
    path = tmp_path / "r.json"
    with program(monkeypatch, "serving_bench") as bench:
        monkeypatch.setattr(bench, "create_model", lambda name, **k: CrossViT(config, **k))
        assert bench.main([*QUICK, "--batch", "1", "3", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]
    assert [r["contender"] for r in rows] == 2 * ["own forward", "fused", "onnxruntime"]
    assert all(r["median_ms"] > 0 for r in rows)

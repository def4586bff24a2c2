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


def test_zoo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import timm

    def create(name: str, **options: Any) -> nn.Module:
        small = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3}
        return make(name, **small, **options)

    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    path = tmp_path / "r.json"
    with program(monkeypatch, "zoo_bench") as zoo:
        name = "vit_base_patch16_siglip_224"
        assert (
            zoo.main(
                [
                    *QUICK,
                    "--example",
                    "--cpu-time",
                    "--models",
                    name,
                    "--size",
                    "32",
                    "--json",
                    str(path),
                ]
            )
            == 0
        )
    rows = {r["contender"]: r for r in json.loads(path.read_text())["results"]}
    assert list(rows) == ["own forward", "served", "measured"]
    assert rows["served"]["modules"] == "1 Block, 1 AttentionPoolLatent"
    assert all(r["median_ms"] > 0 for r in rows.values())

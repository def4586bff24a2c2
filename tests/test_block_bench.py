"""bench/block_bench.py: what it times, and that it first checks every gradient."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bench_programs import program, run
from torch import Tensor

import crossvit_kernels as ck

TINY = shlex.split("--branches S --tokens 5 --batch 2 --device cpu --no-compile --repeats 1")
BASELINES = {"eager", "timm-like", "eager, compiled", "timm-like, compiled"}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with program(monkeypatch, "block_bench") as module:
        yield module


@pytest.fixture
def contenders(bench: ModuleType) -> ModuleType:
    import block_contenders

    return block_contenders


def test_what_users_get_is_timed(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The default backend and keep, whatever the environment sets."""
    seen: list[tuple[Any, Any]] = []
    msa = ck.layernorm_msa

    def spy(*arguments: Any, **options: Any) -> Tensor:
        seen.append((options["backend"], options["keep"]))
        return msa(*arguments, **options)

    monkeypatch.setenv("CROSSVIT_KERNELS_BACKEND", "reference")
    monkeypatch.setattr(ck, "layernorm_msa", spy)
    code, rows = run(bench, tmp_path / "r.json", *TINY)
    assert code == 0
    usable = ["ours (library)", *(["ours (cpu)"] if ck.backends()["cpu"] else [])]
    assert {name for name, _ in rows} == {*BASELINES, "ours (auto)", *usable}
    assert ("auto", "fast") in seen
    for mode in ("forward", "train"):
        row = rows["ours (auto)", mode]
        assert row["status"] == "ok" and row["median_ms"] > 0 and row["times_timm"] > 0
        assert row["ran"] == f"layernorm_ffn: {'cpu' if ck.backends()['cpu'] else 'reference'}"
        assert "ran" not in rows["timm-like", mode]
    last = capsys.readouterr().out.splitlines()[-4:]
    assert [line.partition(":")[0] for line in last] == [
        "Fastest forward",
        "Fastest with backward",
    ] * 2
    assert all(("layernorm_msa" in line) or ("layernorm_ffn" in line) for line in last)


@pytest.mark.parametrize("part", ["msa", "ffn", "block"])
def test_every_gradient_is_checked(
    bench: ModuleType, contenders: ModuleType, tmp_path: Path, part: str
) -> None:
    code, rows = run(bench, tmp_path / "r.json", *TINY, "--parts", part, "--mode", "train")
    assert code == 0
    weights = {"msa": ck.MsaWeights._fields, "ffn": ck.FfnWeights._fields}
    if part == "block":
        names = [f"{half}.{field}" for half, fields in weights.items() for field in fields]
    else:
        names = list(weights[part])
    expected = {"y", "grad x", *(f"grad {name}" for name in names)}
    assert set(rows["ours (auto)", "train"]["errors"]) == expected


@pytest.mark.parametrize("field", ck.FfnWeights._fields)
def test_wrong_gradient_of_a_weight_is_not_timed(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, field: str
) -> None:
    """The output and the gradient of x are right; one weight's gradient is 1 % too large."""
    ffn = ck.layernorm_ffn

    def spoiled(x: Tensor, w: ck.FfnWeights, *arguments: Any, backend: str) -> Tensor:
        if backend == "auto":
            t = getattr(w, field)
            w = w._replace(**{field: t + (t - t.detach()) / 100})
        return ffn(x, w, *arguments, backend=backend)

    monkeypatch.setattr(ck, "layernorm_ffn", spoiled)
    code, rows = run(bench, tmp_path / "r.json", *TINY, "--parts", "ffn")
    assert code == 1
    row = rows["ours (auto)", "train"]
    assert row["status"] == "wrong" and row["reason"].startswith(f"grad {field}: ")
    assert "median_ms" not in row
    assert rows["ours (auto)", "forward"]["median_ms"] > 0


@pytest.mark.parametrize("part", ["msa", "ffn", "block"])
def test_frozen_weights(bench: ModuleType, tmp_path: Path, part: str) -> None:
    code, rows = run(bench, tmp_path / "r.json", *TINY, "--parts", part, "--frozen")
    assert code == 0
    for name in ("eager", "timm-like", "ours (auto)"):
        assert set(rows[name, "frozen"]["errors"]) == {"y", "grad x"}
        assert set(rows[name, "heads"]["errors"]) == {"y", "grad head"}
        assert rows[name, "frozen"]["median_ms"] > 0 and rows[name, "heads"]["median_ms"] > 0


def test_frozen_inputs_require_what_is_trained(contenders: ModuleType) -> None:
    sizes = contenders.BlockSize("", 2, 3, 8, 2, 16)
    device = torch.device("cpu")
    for mode, (needs_dx, needs_dw) in contenders.TRAINED.items():
        inputs = contenders.make_inputs("block", sizes, mode, device, torch.float32)
        assert inputs.sets[0][0].requires_grad == needs_dx
        assert {w.requires_grad for w in inputs.weights.values()} == {needs_dw}
        assert inputs.head.requires_grad == (mode == "heads")


def test_few_rows(bench: ModuleType) -> None:
    options = bench.parse(["--preset", "few-rows", "--device", "cpu"])
    sizes = [(s.channels, s.tokens, s.batch, s.heads, s.hidden) for s in bench.sizes(options)]
    assert sizes == [(c, n, 1, c // 64, 4 * c) for c in (768, 1024) for n in (50, 100, 200, 400)]
    assert options.parts == ["block"] and options.mode == "forward"
    options = bench.parse(["--preset", "few-rows", "--tokens", "9", "--device", "cpu"])
    assert [s.tokens for s in bench.sizes(options)] == [9, 9]


def test_timm_like_is_timms_block(contenders: ModuleType) -> None:
    timm_block = pytest.importorskip("timm.models.vision_transformer").Block
    torch.manual_seed(0)
    block = timm_block(dim=24, num_heads=3, mlp_ratio=2, qkv_bias=True)
    torch.nn.init.normal_(block.norm1.weight)

    def of(*layers: Any) -> Sequence[Tensor]:
        return [t for layer in layers for t in (layer.weight, layer.bias)]

    block.norm1.eps = block.norm2.eps = 1e-6
    weights = of(block.norm1, block.attn.qkv, block.attn.proj)
    weights = [*weights, *of(block.norm2, block.mlp.fc1, block.mlp.fc2)]
    sizes = contenders.BlockSize("", 2, 5, 24, 3, 48)
    x = torch.randn(2, 5, 24)
    for call in (contenders.timm_like("block", sizes), contenders.ours("block", sizes, "auto")):
        torch.testing.assert_close(call(x, weights), block(x))


def test_floor_counts_what_is_computed(contenders: ModuleType) -> None:
    sizes = contenders.BlockSize("", 2, 100, 64, 1, 256)
    rows, c = 200, 64
    linears, attention = 24 * rows * c * c, 4 * rows * 100 * c
    assert sizes.flop("block", "forward") == sizes.flop("block", "heads") == linears + attention
    assert sizes.flop("block", "train") == 3 * (linears + attention)
    assert sizes.flop("block", "frozen") == 2 * linears + 3 * attention

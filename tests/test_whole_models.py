"""bench/whole_models.py: what it adds up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from bench_programs import program

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def whole_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """With a composition whose products take 1 us, attention 100, and passes 10,000 a column."""
    pytest.importorskip("triton")
    with program(monkeypatch, "whole_models") as module:
        monkeypatch.setattr(module, "product", lambda block, columns, terms: 1.0)
        monkeypatch.setattr(module, "flash_attention", lambda block: 100.0)
        monkeypatch.setattr(module, "memory_pass", lambda block, columns: 1e4 * columns)
        yield module


def modelled(backend: str, operation: str, direction: str, channels: int) -> list[float]:
    rows = [
        row
        for path in ("h200.json", "h200_blocks.json")
        for row in json.loads((BENCH / "results/model" / path).read_text())["rows"]
        if (row["backend"], row["operation"], row["direction"]) == (backend, operation, direction)
        and (row["model"], row["channels"], row["batch"]) == ("15", channels, 256)
        and (path == "h200.json") != operation.startswith("layernorm")
    ]
    assert rows
    return [row["modelled"]["microseconds"] for row in rows]


def test_inference_adds_up(whole_models: ModuleType) -> None:
    """CrossViT-15's three multi-scale blocks: one S block, five L blocks, two fusions in each."""
    parts = {label: sides for label, *sides in whole_models.model("15", 256, False)}
    kernels = [
        us
        for half in ("layernorm_msa", "layernorm_ffn")
        for us in modelled("triton", half, "forward", 384)
    ]
    ours, composed = parts["blocks L"]
    assert ours == pytest.approx((15 * sum(kernels), 15 * len(kernels)))
    # Two passes of 4 C and GELU's of 2 F; qkv, projection, fc1, fc2; attention.
    assert composed == pytest.approx((15 * (1e4 * (8 * 384 + 2 * 1152) + 4 + 100), 15 * 8))
    fusion = modelled("cuda", "cross_attention_fusion", "forward", 192)
    ours, composed = parts["fusions S"]
    assert ours == pytest.approx((3 * sum(fusion), 3 * len(fusion)))
    assert composed == pytest.approx((3 * (1e4 * 4 * 192 + 1), 3 * (3 + 12)))
    ours, composed = parts["embedding"]
    assert ours == composed
    # The resize, patches twice, the products, and tokens in two passes of two.
    passes = 3 * 3 * (12**2 + 16**2) + 4 * (192 + 384)
    assert ours == pytest.approx((1e4 * passes + 2, 2 * (3 + 2)))


def test_training_adds_products_of_both_sides(whole_models: ModuleType) -> None:
    inference = {label: sides for label, *sides in whole_models.model("15", 256, False)}
    training = {label: sides for label, *sides in whole_models.model("15", 256, True)}
    for branch, channels, blocks, ffn in (("S", 192, 3, "forward"), ("L", 384, 15, "training")):
        before, after = inference[f"blocks {branch}"], training[f"blocks {branch}"]
        kernels = [
            us
            for half in ("layernorm_msa", "layernorm_ffn")
            for us in modelled("triton", half, "backward", channels)
        ]
        # L's FFN keeps its hidden units.
        kernels += modelled("triton", "layernorm_ffn", ffn, channels)
        kernels += [-us for us in modelled("triton", "layernorm_ffn", "forward", channels)]
        # The gradient of the hidden units is no product of cuBLAS's.
        added = after[0].us - before[0].us
        sums = 1e4 * 12 * channels
        assert added == pytest.approx(blocks * (sum(kernels) + 7 + sums), rel=1e-6)
        # qkv 3 C, projection C, fc1 F, fc2 C; LayerNorms 12 C; delta 2 C; GELU 3 F.
        columns = (5 + 12 + 2) * channels + 4 * 3 * channels
        added = after[1].us - before[1].us
        assert added == pytest.approx(blocks * (1e4 * columns + 250 + 8), rel=1e-6)


def test_gluon_multiplies_in_backward(whole_models: ModuleType) -> None:
    """The gradients of what three layers read are in its launches, not cuBLAS's."""
    block = whole_models.blocks_of("15", 256)[1][1]
    (ours, composed), (of_gluon, same) = (
        whole_models.block_backward(block, variant) for variant in ("", ":gluon")
    )
    assert composed == same
    document = json.loads((BENCH / "results/model/h200_gluon.json").read_text())
    launches = [
        row["modelled"]["microseconds"]
        for row in document["rows"]
        if (row["model"], row["channels"], row["direction"]) == ("15", 384, "backward")
    ]
    kernels = [
        us
        for half in ("layernorm_msa", "layernorm_ffn")
        for us in modelled("triton", half, "backward", 384)
    ]
    assert of_gluon.us - ours.us == pytest.approx(sum(launches) - sum(kernels) - 3)
    assert of_gluon.launches == ours.launches and len(launches) == len(kernels) + 3


@pytest.mark.parametrize("images, variant", [([64, 256], ""), ([256], ":gluon")])
def test_every_model_has_its_kernels(
    whole_models: ModuleType, images: list[int], variant: str
) -> None:
    rows = list(whole_models.rows(images, variant))
    assert len(rows) == 6 * len(images) * 2
    assert all(row["ours_ms"] > 0 for row in rows)

"""torchvision's and open_clip's models before and after ``accelerate``."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from zoo_cases import assert_served_equals_own, randomised

import crossvit_kernels as ck

pytestmark = pytest.mark.usefixtures("cpu_backend")
BLOCK, POOL = ("layernorm_msa", "layernorm_ffn"), ("attention_pool",)


def served(report: Any) -> Counter[tuple[str, ...]]:
    return Counter(row.serves for row in report.rows if row.serves)


def torchvision_vit(**options: Any) -> nn.Module:
    vision_transformer = pytest.importorskip("torchvision.models.vision_transformer")
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "num_classes": 5}
    width = {"hidden_dim": 48, "mlp_dim": 96}
    return randomised(vision_transformer.VisionTransformer(**sizes, **width, **options))


def test_torchvision() -> None:
    inputs = {"x": torch.randn(2, 3, 32, 32, dtype=torch.float32)}
    report = assert_served_equals_own(torchvision_vit(), inputs)
    assert served(report) == {BLOCK: 2}


def test_dropout_of_torchs_attention(caplog) -> None:
    model = torchvision_vit(attention_dropout=0.2)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float32)
    assert served(ck.accelerate(model, backend="cpu")) == {BLOCK: 2}
    model.train()(x)
    assert {r.getMessage() for r in caplog.records} == {
        "EncoderBlock: self_attention has dropout of 0.2 in training; "
        "its own forward runs, not fused"
    }
    report = ck.accelerate(model, backend="cpu", training=True)
    assert served(report) == {("layernorm_ffn",): 2}
    assert "self_attention has dropout of 0.2 in training" in str(report)


def test_attention_without_biases() -> None:
    model = torchvision_vit()
    for block in model.encoder.layers:
        block.self_attention = nn.MultiheadAttention(48, 3, bias=False, batch_first=True)
    inputs = {"x": torch.randn(2, 3, 32, 32, dtype=torch.float32)}
    assert served(assert_served_equals_own(randomised(model), inputs)) == {BLOCK: 2}


def open_clip_modules() -> dict[str, Any]:
    transformer = pytest.importorskip("open_clip.transformer")
    resnet = pytest.importorskip("open_clip.modified_resnet")
    return {
        "block": (transformer.ResidualAttentionBlock(48, 3), (2, 9, 48), BLOCK),
        "LayerScale": (
            transformer.ResidualAttentionBlock(48, 3, ls_init_value=0.1),
            (2, 9, 48),
            BLOCK,
        ),
        "quick": (
            transformer.ResidualAttentionBlock(48, 3, act_layer=transformer.QuickGELU),
            (2, 9, 48),
            BLOCK,
        ),
        "pooler": (transformer.AttentionalPooler(48, 32, 3, n_queries=2), (2, 9, 32), POOL),
        "256 queries": (transformer.AttentionalPooler(48, 48, 3), (2, 9, 48), ()),
        "pool 2d": (resnet.AttentionPool2d(3, 48, 3, 7), (2, 48, 3, 3), POOL),
    }


@pytest.mark.parametrize(
    "name", ["block", "LayerScale", "quick", "pooler", "256 queries", "pool 2d"]
)
def test_open_clip(name: str) -> None:
    module, shape, serves = open_clip_modules()[name]
    x = torch.randn(shape, dtype=torch.float32)
    report = assert_served_equals_own(randomised(module), {"x": x})
    assert report.rows[0].serves == serves, str(report)


def test_a_masked_block_of_open_clip() -> None:
    block, shape, _ = open_clip_modules()["block"]
    x = torch.randn(shape, dtype=torch.float32)
    mask = torch.full((9, 9), -torch.inf, dtype=torch.float32, device="cpu").triu_(1)
    expected = block(x, attn_mask=mask)
    ck.accelerate(block, backend="cpu")
    torch.testing.assert_close(block(x, attn_mask=mask), expected)

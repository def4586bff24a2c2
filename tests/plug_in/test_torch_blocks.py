"""torchvision's and open_clip's models before and after ``accelerate``."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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


def torchvision_block() -> nn.Module:
    vision_transformer = pytest.importorskip("torchvision.models.vision_transformer")
    return randomised(vision_transformer.EncoderBlock(3, 48, 96, 0.0, 0.0))


def open_clip_block() -> nn.Module:
    return randomised(open_clip_modules()["block"][0])


@pytest.mark.parametrize(("make", "name"), [(torchvision_block, "input"), (open_clip_block, "q_x")])
def test_arguments_by_name(make: Any, name: str) -> None:
    block, x = make(), torch.randn(2, 9, 48, dtype=torch.float32)
    own = block(x)
    assert ck.accelerate(block, backend="cpu").rows[0].serves == BLOCK
    served = block(x)
    assert not torch.equal(served, own)
    assert torch.equal(block(**{name: x}), served)
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        assert torch.equal(compiled(**{name: x}), served)
    torch._dynamo.reset()
    with pytest.raises(TypeError, match="unknown"):
        block(**{name: x}, unknown=x)


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
        "cross-attention": (
            transformer.ResidualAttentionBlock(48, 3, is_cross_attention=True),
            (2, 9, 48),
            (),
        ),
        "batch second": (
            transformer.ResidualAttentionBlock(48, 3, batch_first=False),
            (2, 9, 48),
            BLOCK[1:],
        ),
        "custom": (transformer.CustomResidualAttentionBlock(48, 3), (2, 9, 48), ()),
        "custom, with norms": (
            transformer.CustomResidualAttentionBlock(48, 3, scale_attn=True, qk_norm=True),
            (2, 9, 48),
            (),
        ),
        "pooler": (transformer.AttentionalPooler(48, 32, 3, n_queries=2), (2, 9, 32), POOL),
        "256 queries": (transformer.AttentionalPooler(48, 48, 3), (2, 9, 48), ()),
        "pool 2d": (resnet.AttentionPool2d(3, 48, 3, 7), (2, 48, 3, 3), POOL),
    }


@pytest.mark.parametrize(
    "name",
    [
        "block",
        "LayerScale",
        "quick",
        "cross-attention",
        "batch second",
        "custom",
        "custom, with norms",
        "pooler",
        "256 queries",
        "pool 2d",
    ],
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


def test_keys_of_another_sequence_in_a_block_of_open_clip() -> None:
    block = open_clip_block()
    q, k = (torch.randn(2, n, 48, dtype=torch.float32) for n in (9, 5))
    expected = block(q, k, k)
    assert ck.accelerate(block, backend="cpu").rows[0].serves == BLOCK
    assert torch.equal(block(q, k, k), expected)
    mask = torch.full((9, 9), -torch.inf, dtype=torch.float32, device="cpu").triu_(1)
    own = type(block).forward(block, q, None, None, mask)
    assert torch.equal(block(q, None, None, mask), own)  # as checkpoints call it


def encoded(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    encodings = model.encode_image(inputs["image"]), model.encode_text(inputs["text"])
    return torch.cat(encodings, dim=-1)


#: Options of open_clip's image tower, and what serves its modules.
TOWERS: dict[str, tuple[dict[str, Any], dict[tuple[str, ...], int]]] = {
    "vit": ({}, {BLOCK: 4}),
    "pool": (
        {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 4},
        {BLOCK: 4, POOL: 1},
    ),
    "qk-norm": ({"qk_norm": True}, {BLOCK: 2}),
    "resnet": ({"layers": (1, 1, 1, 1), "width": 16}, {BLOCK: 2, POOL: 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("tower", TOWERS)
def test_models_of_open_clip(tower: str, quick_gelu: bool) -> None:
    clip = pytest.importorskip("open_clip.model")
    options, serves = TOWERS[tower]
    sizes = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
    words = {"context_length": 9, "vocab_size": 20, "width": 48, "heads": 3, "layers": 2}
    model = clip.CLIP(48, {**sizes, **options}, words, quick_gelu=quick_gelu)
    inputs = {
        "image": torch.randn(2, 3, 32, 32, dtype=torch.float32),
        "text": torch.randint(1, 19, (2, 9), dtype=torch.int64, device="cpu"),
    }
    report = assert_served_equals_own(randomised(model), inputs, encoded)
    assert served(report) == serves, str(report)

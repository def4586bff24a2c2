"""transformers' models before and after ``accelerate``, with random weights and small images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from zoo_cases import assert_served_equals_own, randomised

import crossvit_kernels as ck

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("cpu_backend")

BLOCK, POOL = ("layernorm_msa", "layernorm_ffn"), ("attention_pool",)
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
}
IMAGES = {"image_size": 32, "patch_size": 8}


def images(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size, dtype=torch.float32)}


def videos() -> dict[str, Tensor]:
    return {"pixel_values_videos": torch.randn(2, 4, 3, 32, 32, dtype=torch.float32)}


def frames() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 4, 3, 32, 32, dtype=torch.float32)}


def noisy() -> dict[str, Tensor]:
    return {**images(), "noise": torch.linspace(0, 1, 32, dtype=torch.float32).view(2, 16)}


def sounds() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 32, 16, dtype=torch.float32)}


def packed() -> dict[str, Tensor]:
    """SigLIP 2's patches, of which an image has fewer than the other."""
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 8:] = 0
    return {
        "pixel_values": torch.randn(2, 16, 192, dtype=torch.float32),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[4, 4], [2, 4]], dtype=torch.int64),
    }


def words() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[1, 2, 3, 4, 9], [4, 3, 2, 5, 9]], dtype=torch.int64)}


class Case(NamedTuple):
    """A model, its configuration, inputs, what serves it, a reason that it gives."""

    model: str
    config: str
    options: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    serves: dict[tuple[str, ...], int]
    reason: str = ""


TEXT = {**SIZES, "vocab_size": 10, "max_position_embeddings": 8, "eos_token_id": 9}
VIT = {**SIZES, **IMAGES}
FAST = [
    Case("ViTModel", "ViTConfig", VIT, images, {BLOCK: 2}),
    Case("SiglipVisionModel", "SiglipVisionConfig", VIT, images, {BLOCK: 2, POOL: 1}),
    Case(
        "Siglip2VisionModel",
        "Siglip2VisionConfig",
        {**SIZES, "num_patches": 16, "patch_size": 8},
        packed,
        {BLOCK: 2, POOL: 1},
    ),
    Case("CLIPVisionModel", "CLIPVisionConfig", VIT, images, {BLOCK: 2}),
    Case(
        "CLIPTextModel",
        "CLIPTextConfig",
        {**TEXT, "hidden_act": "gelu"},
        words,
        {("layernorm_ffn",): 2},
        "layernorm_msa: causal",
    ),
    Case("Dinov2Model", "Dinov2Config", VIT, images, {BLOCK: 2}),
    Case(
        "VJEPA2ForVideoClassification",
        "VJEPA2Config",
        {
            **SIZES,
            "crop_size": 32,
            "patch_size": 8,
            "frames_per_clip": 4,
            "num_pooler_layers": 1,
            "pred_hidden_size": 48,
            "pred_num_attention_heads": 3,
            "pred_num_hidden_layers": 1,
        },
        videos,
        {POOL: 1},
        "RoPE",
    ),
    Case("Aimv2VisionModel", "Aimv2VisionConfig", VIT, images, {POOL: 1}, "RMSNorm"),
]
SLOW = [
    Case("DeiTModel", "DeiTConfig", VIT, images, {BLOCK: 2}),
    Case("ViTForImageClassification", "ViTConfig", {**VIT, "qkv_bias": False}, images, {BLOCK: 2}),
    Case("ViTMSNModel", "ViTMSNConfig", VIT, images, {BLOCK: 2}),
    Case("IJepaModel", "IJepaConfig", VIT, images, {BLOCK: 2}),
    Case(
        "VivitModel",
        "VivitConfig",
        {**SIZES, "image_size": 32, "num_frames": 4, "tubelet_size": [2, 8, 8]},
        frames,
        {BLOCK: 2},
    ),
    Case(
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {**VIT, "hidden_act": "gelu"},
        images,
        {BLOCK: 2},
    ),
    Case("MetaClip2VisionModel", "MetaClip2VisionConfig", VIT, images, {BLOCK: 2}),
    Case("SiglipTextModel", "SiglipTextConfig", TEXT, words, {BLOCK: 2}),
    Case("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", VIT, images, {BLOCK: 2}),
    Case("OwlViTVisionModel", "OwlViTVisionConfig", VIT, images, {BLOCK: 2}),
    Case("OwlViTTextModel", "OwlViTTextConfig", TEXT, words, {BLOCK[1:]: 2}, "causal"),
    Case("Owlv2VisionModel", "Owlv2VisionConfig", VIT, images, {BLOCK: 2}),
    Case("Owlv2TextModel", "Owlv2TextConfig", TEXT, words, {BLOCK[1:]: 2}, "causal"),
    Case("CLIPSegVisionModel", "CLIPSegVisionConfig", VIT, images, {BLOCK: 2}),
    Case("CLIPSegTextModel", "CLIPSegTextConfig", TEXT, words, {BLOCK[1:]: 2}, "causal"),
    Case("MetaClip2TextModel", "MetaClip2TextConfig", TEXT, words, {BLOCK[1:]: 2}, "causal"),
    Case("ViTMAEModel", "ViTMAEConfig", {**VIT, "mask_ratio": 0.0}, noisy, {BLOCK: 2}),
    Case(
        "ASTModel",
        "ASTConfig",
        {**SIZES, "patch_size": 8, "num_mel_bins": 16, "max_length": 32},
        sounds,
        {BLOCK: 2},
    ),
    Case("AltCLIPVisionModel", "AltCLIPVisionConfig", VIT, images, {BLOCK: 2}),
    Case("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", VIT, images, {BLOCK: 2}),
    Case(
        "RadioModel",
        "RadioConfig",
        {**SIZES, "image_size": 32, "patch_size": 8, "max_resolution": 32},
        images,
        {BLOCK: 2},
    ),
    Case("Tipsv2VisionModel", "Tipsv2VisionConfig", VIT, images, {BLOCK: 2}),
    Case(
        "ViTModel",
        "ViTConfig",
        {**VIT, "hidden_act": "gelu_new"},
        images,
        {BLOCK: 2},
    ),
    Case("ViTModel", "ViTConfig", {**VIT, "hidden_act": "swish"}, images, {BLOCK: 2}),
    Case(
        "Dinov2Model",
        "Dinov2Config",
        {**VIT, "use_swiglu_ffn": True},
        images,
        {BLOCK[:1]: 2},
        "layernorm_ffn: mlp is a Dinov2SwiGLUFFN",
    ),
    Case("BeitModel", "BeitConfig", VIT, images, {}, "relative position bias"),
    Case(
        "SwinModel",
        "SwinConfig",
        {
            **IMAGES,
            "patch_size": 4,
            "window_size": 4,
            "embed_dim": 12,
            "depths": [1, 1],
            "num_heads": [1, 2],
        },
        images,
        {},
        "windowed",
    ),
    Case("YolosModel", "YolosConfig", {**VIT, "image_size": [32, 32]}, images, {}, "no adapter"),
    Case("BertModel", "BertConfig", {**SIZES, "vocab_size": 10}, words, {}, "norms after"),
]


def build(case: Case, **more: Any) -> Any:
    config = getattr(transformers, case.config)(**{**case.options, **more})
    return randomised(getattr(transformers, case.model)(config))


@pytest.mark.parametrize(
    "case",
    [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)],
    ids=lambda case: case.model,
)
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_outputs_and_gradients(case: Case, attention: str) -> None:
    model = build(case, attn_implementation=attention)
    report = assert_served_equals_own(model, case.inputs())
    served = Counter(row.serves for row in report.rows if row.serves)
    assert served == case.serves, str(report)
    reasons = {reason for row in report.rows for reason in row.reasons}
    assert any(case.reason in reason for reason in reasons or {""}), str(report)


def test_causal_attention_is_never_served() -> None:
    """The class is that of vision models, and without padding there is no mask."""
    model = build(next(c for c in FAST if c.model == "CLIPTextModel"))
    assert "causal" in str(ck.accelerate(model, backend="cpu"))
    (layer, *_) = model.encoder.layers
    ck.restore(model)
    x = torch.randn(2, 5, 48, dtype=torch.float32)
    expected = layer(x, None, is_causal=True)
    layer.self_attn.config = transformers.CLIPVisionConfig(attn_implementation="sdpa")
    assert ck.accelerate(layer, backend="cpu").rows[0].serves == BLOCK
    torch.testing.assert_close(layer(x, None, is_causal=True), expected)
    assert not torch.allclose(layer(x, None), expected)


def test_outputs_of_inner_layers(caplog) -> None:
    """transformers collects them by hooks, which attention then has."""
    case = next(c for c in FAST if c.model == "ViTModel")
    model, inputs = build(case, attn_implementation="eager"), case.inputs()
    options = {"output_hidden_states": True, "output_attentions": True}
    before = model(**inputs, **options)
    ck.accelerate(model, backend="cpu")
    after = model(**inputs, **options)
    assert len(after.hidden_states) == 3 and len(after.attentions) == 2
    for name in ("hidden_states", "attentions"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_dropout_and_checkpointing(caplog) -> None:
    case = next(c for c in FAST if c.model == "ViTModel")
    model = build(case, hidden_dropout_prob=0.1)
    assert len(ck.accelerate(model, backend="cpu").served) == 2
    assert "dropout of 0.1 in training" in str(ck.accelerate(model, backend="cpu", training=True))
    model = build(case)
    ck.accelerate(model, backend="cpu", training=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()(**case.inputs()).last_hidden_state.sum().backward()
    assert {r.getMessage() for r in caplog.records} == {
        "ViTLayer: gradient checkpointing; its own forward runs, not fused"
    }


@pytest.mark.parametrize("kind", [torch.int64, torch.bool])
def test_siglip_2_pools_an_image_without_a_patch_to_its_mean(kind: torch.dtype) -> None:
    module = pytest.importorskip("transformers.models.siglip2.modeling_siglip2")
    config = transformers.Siglip2VisionConfig(**SIZES, attn_implementation="sdpa")
    head = randomised(module.Siglip2MultiheadAttentionPoolingHead(config)).double()
    x, mask = torch.randn(3, 7, 48, dtype=torch.float64), torch.ones(3, 7, dtype=kind)
    mask[1], mask[2, 3:] = 0, 0
    before = head(x, mask.long())
    assert ck.accelerate(head).served == [""]
    torch.testing.assert_close(head(x, mask), before, rtol=1e-9, atol=1e-9)

"""timm's architectures before and after ``accelerate``, with random weights and small images."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from zoo_cases import assert_served_equals_own, randomised

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("cpu_backend")

BLOCK, POOL, FUSION = (
    ("layernorm_msa", "layernorm_ffn"),
    ("attention_pool",),
    ("cross_attention_fusion",),
)


class Case(NamedTuple):
    """A model: its name, image size, what serves how many modules, a reason, options."""

    name: str
    size: int
    serves: dict[tuple[str, ...], int]
    reason: str = ""
    options: dict[str, Any] | None = None  # None: a small vision transformer


SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}

FAST = [
    Case("vit_tiny_patch16_224", 32, {BLOCK: 2}),
    Case("vit_base_patch16_siglip_224", 32, {BLOCK: 2, POOL: 1}),
    Case("vit_base_patch16_clip_quickgelu_224", 32, {BLOCK: 2}),
    Case("vit_small_patch14_dinov2", 28, {BLOCK: 2}),
    Case("cait_xxs24_224", 32, {POOL: 2}, "talking heads"),
    Case("xcit_nano_12_p16_224", 32, {POOL: 2}, "over channels"),
]
SLOW = [
    Case("volo_d1_224", 64, {POOL: 2}, "outlook", {"img_size": 64}),
    Case("deit_tiny_distilled_patch16_224", 32, {BLOCK: 2}),
    Case("deit3_small_patch16_224", 32, {BLOCK: 2}),
    Case("vit_base_patch16_siglip_gap_224", 32, {BLOCK: 2}),
    Case("vit_so400m_patch14_siglip_224", 28, {BLOCK: 2, POOL: 1}),
    Case("vit_base_patch32_siglip_256", 64, {BLOCK: 2, POOL: 1}),
    Case("vit_base_patch16_clip_224", 32, {BLOCK: 2}),
    Case("vit_small_patch14_reg4_dinov2", 28, {BLOCK: 2}),
    Case("vit_tiny_r_s16_p8_224", 64, {BLOCK: 2}),
    Case("vit_medium_patch16_gap_256", 32, {BLOCK: 2}),
    Case("vit_betwixt_patch16_reg4_gap_256", 32, {BLOCK: 2}),
    Case("vit_dlittle_patch16_reg1_gap_256", 32, {BLOCK[1:]: 2}, "attn is a DiffAttention"),
    Case("vit_small_patch16_36x1_224", 32, {BLOCK: 2}),
    Case("vit_small_patch16_18x2_224", 32, {}, "in parallel"),
    Case("vit_base_patch16_rpn_224", 32, {}, "norms after"),
    Case("vit_relpos_small_patch16_224", 32, {}, "relative position bias"),
    Case("samvit_base_patch16", 64, {}, "relative position bias"),
    Case("beit_base_patch16_224", 32, {}, "relative position bias"),
    Case("eva02_tiny_patch14_224", 28, {}, "RoPE"),
    Case("eva_large_patch14_196", 28, {BLOCK: 2}),
    Case("aimv2_large_patch14_224", 28, {}, "RmsNorm"),
    Case("flexivit_small", 32, {BLOCK: 2}),
    Case("crossvit_9_240", 240, {FUSION: 1, BLOCK: 3}, "", {"depth": ((1, 2, 0),)}),
    Case("crossvit_9_dagger_240", 240, {FUSION: 1, BLOCK: 2}, "", {"depth": ((1, 1, 0),)}),
    Case("crossvit_15_240", 240, {FUSION: 1, BLOCK: 2}, "", {"depth": ((1, 1, 0),)}),
    Case("xcit_tiny_12_p16_224", 32, {POOL: 2}, "over channels"),
    Case("pit_ti_224", 64, {BLOCK: 12}, "", {"img_size": 64}),
    Case("pit_ti_distilled_224", 64, {BLOCK: 12}, "", {"img_size": 64}),
    Case("convit_tiny", 224, {}, "gated positional", {"depth": 2}),
    Case(
        "swin_tiny_patch4_window7_224",
        64,
        {},
        "windowed",
        {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 3, 4), "img_size": 64},
    ),
    Case("mobilevit_xxs", 64, {BLOCK: 9}, "", {}),
    Case("mobilevitv2_050", 64, {}, "no adapter", {}),
    Case("tnt_s_patch16_224", 224, {}, "inside patches", {"depth": 1}),
    Case("edgenext_xx_small", 64, {}, "over channels", {}),
    Case("pvt_v2_b0", 64, {}, "reduced map", {}),
    Case("convnext_atto", 64, {}, "", {}),
]


@pytest.mark.parametrize(
    "case",
    [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)],
    ids=lambda case: case.name,
)
def test_outputs_and_gradients(case: Case) -> None:
    options = {**SMALL, "img_size": case.size} if case.options is None else case.options
    model = randomised(timm.create_model(case.name, num_classes=7, **options))
    report = assert_served_equals_own(
        model, {"x": torch.randn(2, 3, case.size, case.size, dtype=torch.float32)}
    )
    served = Counter(row.serves for row in report.rows if row.serves)
    assert served == case.serves, str(report)
    reasons = {reason for row in report.rows for reason in row.reasons}
    assert any(case.reason in reason for reason in reasons or {""}), str(report)


def modules() -> dict[str, tuple[Any, tuple[int, ...]]]:
    from timm.layers import AttentionPool2d, AttentionPoolLatent
    from timm.models import cait, volo

    norm = {"norm_layer": nn.LayerNorm}
    latent = {"num_heads": 3, **norm}
    return {
        "latents": (AttentionPoolLatent(48, latent_len=4, **latent), (2, 9, 48)),
        "latents, mean": (
            AttentionPoolLatent(48, latent_len=2, pool_type="avg", **latent),
            (2, 9, 48),
        ),
        "no projections": (
            AttentionPoolLatent(48, q_proj=False, out_features=0, **latent),
            (2, 9, 48),
        ),
        "positions": (
            AttentionPoolLatent(48, pos_embed="abs", feat_size=9, **latent),
            (2, 9, 48),
        ),
        "2d": (AttentionPool2d(48, feat_size=3, head_dim=16), (2, 48, 3, 3)),
        "2d, separate": (
            AttentionPool2d(48, feat_size=(3, 5), head_dim=16, qkv_separate=True, out_features=7),
            (2, 48, 3, 5),
        ),
        "2d, class token": (
            AttentionPool2d(48, feat_size=3, head_dim=16, class_token=True, out_features=0),
            (2, 48, 3, 3),
        ),
        "2d, another size": (AttentionPool2d(48, feat_size=3, head_dim=16), (2, 48, 4, 4)),
        "class attention": (cait.ClassAttn(48, 3, qkv_bias=True), (2, 9, 48)),
        "class block": (volo.ClassBlock(48, 3), (2, 9, 48)),
    }


@pytest.mark.parametrize("name", modules())
def test_modules_alone(name: str) -> None:
    module, shape = modules()[name]
    x = torch.randn(shape, dtype=torch.float32)
    report = assert_served_equals_own(randomised(module), {"x": x})
    assert report.served == [""] and report.rows[0].serves == POOL


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"qk_norm": True, "norm_layer": nn.LayerNorm}, "qk-norm (q_norm)"),
        ({"latent_len": 16}, "16 queries of head dim 16: keys and values are cheaper"),
    ],
)
def test_why_not(options: dict[str, Any], reason: str) -> None:
    import crossvit_kernels as ck

    pool = timm.layers.AttentionPoolLatent(48, num_heads=3, **options)
    assert ck.accelerate(pool).declined == {"": reason}


@pytest.mark.parametrize("fused_attn", [True, False])
def test_a_mask_of_keys(fused_attn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bool or added to scores; whatever does more than leave keys out is the pool's own."""
    import crossvit_kernels as ck
    from crossvit_kernels.plug_in import calls

    masks = []
    pool_of_calls = calls.pool

    def watched(*args: Any, key_mask: torch.Tensor, **options: Any) -> Any:
        masks.append(key_mask)
        return pool_of_calls(*args, key_mask=key_mask, **options)

    monkeypatch.setattr(calls, "pool", watched)
    pool = randomised(timm.layers.AttentionPoolLatent(48, num_heads=3, latent_len=2))
    pool.fused_attn = fused_attn
    served = copy.deepcopy(pool)
    ck.accelerate(served)
    x = torch.randn(2, 9, 48, dtype=torch.float32)
    mask = torch.rand(2, 1, 1, 9, dtype=torch.float32) < 0.5
    mask[..., 0] = True
    lowest = torch.finfo(torch.float32).min
    added = [torch.where(mask, 0.0, value) for value in (-torch.inf, lowest, -1e4)]
    keys = [*added, added[0].expand(2, 1, 2, 9), added[0].expand(2, 1, 2, 9).contiguous()]
    for given in [*keys, *([mask] if fused_attn else [])]:
        torch.testing.assert_close(served(x, attn_mask=given), pool(x, attn_mask=given))
        assert torch.equal(masks.pop(), mask[:, 0, 0]) and not masks
    none = torch.where(torch.tensor([True, False]).view(2, 1, 1, 1) & mask, 0.0, -1e4)
    differ = added[0].repeat(1, 1, 2, 1)
    differ[:, :, 1, 1:] = -torch.inf
    differ[:, :, 0] = 0
    own = [torch.where(mask, 0.0, -9.0), torch.where(mask, 0.5, -1e4), none, differ]
    for given in [*own, *([] if fused_attn else [mask])]:
        assert torch.equal(served(x, attn_mask=given), pool(x, attn_mask=given))
    assert not masks

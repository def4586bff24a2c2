"""What a mask means depends on what computes attention, and so does attention without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo_cases import assert_served_equals_own, outcome, randomised

import crossvit_kernels as ck

pytestmark = pytest.mark.usefixtures("cpu_backend")
SIZES = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 64}


def siglip_2_head(implementation: str | None) -> Any:
    transformers = pytest.importorskip("transformers")
    module = pytest.importorskip("transformers.models.siglip2.modeling_siglip2")
    config = transformers.Siglip2VisionConfig(**SIZES)
    config._attn_implementation_internal = implementation
    assert config._attn_implementation == implementation
    return randomised(module.Siglip2MultiheadAttentionPoolingHead(config))


def padding(what: str) -> Tensor:
    mask = torch.ones(3, 7, dtype=torch.int64, device="cpu")
    if what != "nothing padded":
        mask[1, 3:] = 0
    if what == "an image of padding":
        mask[2] = 0
    return mask


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 7, 48, generator=generator, dtype=torch.float32)


@pytest.mark.parametrize("what", ["nothing padded", "padded", "an image of padding"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masks_of_siglip_2_are_served(implementation: str, what: str) -> None:
    inputs = {"x": tokens(), "mask": padding(what)}
    head = siglip_2_head(implementation)
    report = assert_served_equals_own(head, inputs)
    assert report.served == [""]
    with torch.no_grad():
        own = head(*inputs.values())
        ck.accelerate(head, backend="cpu")
        served = head(*inputs.values())
    torch.testing.assert_close(served, own, rtol=1e-4, atol=1e-4)
    assert not torch.equal(served, own)


@pytest.mark.parametrize("what", ["nothing padded", "padded", "an image of padding"])
@pytest.mark.parametrize("implementation", [None, "flash_attention_2", "flash_attention_3"])
def test_masks_of_siglip_2_that_mean_something_else(implementation: str, what: str) -> None:
    """None makes no mask, flash attention one of shape [B, N], repeated for other images."""
    head = siglip_2_head(implementation)
    inputs = {"x": tokens(), "mask": padding(what)}
    own, without = outcome(head, inputs), outcome(head, {"x": tokens()})
    assert ck.accelerate(head, backend="cpu").served == [""]
    actual = outcome(head, inputs)
    assert own.keys() == actual.keys()
    assert all(torch.equal(actual[name], own[name]) for name in own)
    served = outcome(head, {"x": tokens()})["output"]
    torch.testing.assert_close(served, without["output"], rtol=1e-4, atol=1e-4)
    assert not torch.equal(served, without["output"])


def test_a_mask_that_siglip_2_does_not_take() -> None:
    head = siglip_2_head("flash_attention_2")
    ck.accelerate(head, backend="cpu")
    head.config._attn_implementation_internal = "sdpa"  # it counts when the head is called
    own = type(head).forward(head, tokens(), padding("padded"))
    torch.testing.assert_close(head(tokens(), padding("padded")), own, rtol=1e-4, atol=1e-4)
    transformers = pytest.importorskip("transformers")
    siglip = transformers.models.siglip.modeling_siglip
    config = transformers.SiglipVisionConfig(**SIZES)
    first = siglip.SiglipMultiheadAttentionPoolingHead(config)
    ck.accelerate(first, backend="cpu")
    with pytest.raises(TypeError, match="positional argument"):
        first(tokens(), padding("padded"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning")
def test_flex_attention_has_no_mask_for_siglip_2() -> None:
    """Making its mask compiles a kernel."""
    head = siglip_2_head("flex_attention")
    ck.accelerate(head, backend="cpu")
    with pytest.raises(AttributeError, match="BlockMask"):
        head(tokens(), padding("padded"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_padding_in_16_bits(dtype: torch.dtype) -> None:
    """Under autocast transformers' mask overflows: an image of padding becomes NaN there."""
    head, x, mask = siglip_2_head("eager"), tokens(), padding("an image of padding")
    exact = head.double()(x.double(), mask)
    head.float()
    ck.accelerate(head, backend="cpu")
    with torch.no_grad(), torch.autocast("cpu", dtype):
        own, served = type(head).forward(head, x, mask), head(x, mask)
    assert own[2].isnan().all()
    torch.testing.assert_close(served.double(), exact, rtol=0.02, atol=0.05)
    with torch.no_grad():
        served = head.to(dtype)(x.to(dtype), mask)
    torch.testing.assert_close(served.double(), exact, rtol=0.02, atol=0.05)


def halved(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
    scores = (q @ k.transpose(2, 3) * kwargs["scaling"]).softmax(dim=-1)
    return (scores @ v / 2).transpose(1, 2), None


@pytest.fixture
def of_ones_own() -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.AttentionInterface.register("halved", halved)
    yield "halved"
    del transformers.AttentionInterface._global_mapping["halved"]


def test_attention_of_ones_own_in_a_pooler(of_ones_own: str, caplog: Any) -> None:
    transformers = pytest.importorskip("transformers")
    module = pytest.importorskip("transformers.models.vjepa2.modeling_vjepa2")
    config = transformers.VJEPA2Config(**SIZES, num_pooler_layers=1)
    config._attn_implementation = "sdpa"
    pooler = randomised(module.VJEPA2AttentivePooler(config))
    expected = pooler(tokens())
    assert "" in ck.accelerate(pooler, backend="cpu").served
    torch.testing.assert_close(pooler(tokens()), expected, rtol=1e-4, atol=1e-4)
    config._attn_implementation = of_ones_own
    other = pooler(tokens())
    assert torch.equal(other, type(pooler).forward(pooler, tokens()))
    assert not torch.allclose(other, expected, 1e-2, 1e-2)
    assert [r.getMessage() for r in caplog.records if "halved" in r.getMessage()] == [
        "VJEPA2AttentivePooler: attention is computed by 'halved'; its own forward runs, not fused"
    ]
    assert "halved" in ck.accelerate(pooler, backend="cpu").declined[""]


def test_a_layer_that_becomes_causal() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(**SIZES)
    config._attn_implementation = "sdpa"
    layer = randomised(transformers.models.siglip.modeling_siglip.SiglipEncoderLayer(config))
    ck.accelerate(layer, backend="cpu")
    before = layer(tokens(), None)
    layer.self_attn.is_causal = True
    own = type(layer).forward(layer, tokens(), None)
    assert not torch.allclose(own, before, 1e-2, 1e-2)
    torch.testing.assert_close(layer(tokens(), None), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("empty", [True, False])
def test_masks_of_a_pool_of_timm(fused: bool, empty: bool) -> None:
    """Without torch's fused attention, timm adds True and False to the pool's scores."""
    layers = pytest.importorskip("timm.layers")
    pool = randomised(layers.AttentionPoolLatent(48, num_heads=3))
    pool.fused_attn = fused
    mask = padding("an image of padding" if empty else "padded").bool()[:, None, None]
    expected = pool(tokens(), mask)
    assert ck.accelerate(pool, backend="cpu").served == [""]
    torch.testing.assert_close(pool(tokens(), mask), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_padded_patches_of_naflex(fused: bool) -> None:
    timm = pytest.importorskip("timm")
    sizes = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    model = randomised(timm.create_model("naflexvit_base_patch16_map", **sizes))
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    grid = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]], dtype=torch.int64)
    inputs = {
        "patches": torch.randn(2, 6, 768, dtype=torch.float32),
        "patch_coord": grid.repeat(2, 1, 1),
        "patch_valid": torch.ones(2, 6, dtype=torch.bool, device="cpu"),
    }
    inputs["patch_valid"][1, 4:] = False

    def call(model: Any, given: dict[str, Tensor]) -> Any:
        return model(given["patches"], given["patch_coord"], given["patch_valid"])

    assert len(assert_served_equals_own(model, inputs, call).served) == 3

"""Modules converted from timm's and transformers': the same function, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_cases import assert_agree, outcome
from torch import Tensor, nn

from crossvit_kernels.modules import (
    AttentiveProbe,
    ClassAttention,
    CrossAttentionFusion,
    MAPHead,
    TransformerBlock,
)

pytestmark = pytest.mark.usefixtures("cpu_backend")

C, HEADS, B, N = 24, 3, 3, 11
BACKENDS = [None, "reference"]


def randomised(module: nn.Module) -> nn.Module:
    """Randomise parameters, LayerNorms included; float64 and evaluation mode."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module.double().eval()


def tokens() -> Tensor:
    return torch.randn(B, N, C, dtype=torch.float64, requires_grad=True)


def assert_same_function(ours: nn.Module, theirs: nn.Module) -> None:
    x = tokens()
    assert not ours.training and next(ours.parameters()).dtype == torch.float64
    actual, expected = outcome(ours, x), outcome(theirs, x)
    keys = ("output", "input 0")
    assert_agree({k: actual[k] for k in keys}, {k: expected[k] for k in keys})


def timm_block(**options: Any) -> nn.Module:
    vit = pytest.importorskip("timm.models.vision_transformer")
    return randomised(vit.Block(C, HEADS, qkv_bias=True, mlp_ratio=50 / C, **options))


def timm_pool(**options: Any) -> nn.Module:
    layers = pytest.importorskip("timm.layers")
    options = {"norm_layer": nn.LayerNorm, **options}
    return randomised(layers.AttentionPoolLatent(C, num_heads=HEADS, **options))


def act(name: str) -> type[nn.Module]:
    return getattr(pytest.importorskip("timm.layers"), name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["GELU", "GELUTanh", "QuickGELU"])
def test_timm_block(name: str, backend: str | None) -> None:
    block = timm_block(act_layer=act(name))
    block.norm1.eps, block.norm2.eps = 1e-3, 1e-5
    assert_same_function(TransformerBlock.from_timm(block, backend), block)


def test_rates_of_a_timm_block() -> None:
    block = TransformerBlock.from_timm(timm_block(drop_path=0.3, attn_drop=0.2).train())
    assert block.training and (block.drop_path, block.attn_drop) == (0.3, 0.2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"qk_norm": True}, "q_norm"),
        ({"scale_attn_norm": True}, "attn: has norm"),
        ({"scale_mlp_norm": True}, "mlp: has norm"),
        ({"act_layer": nn.ReLU}, "act = ReLU"),
        ({"proj_drop": 0.1}, "proj_drop"),
        ({"proj_bias": False}, "no bias in proj"),
        ({"norm_layer": nn.RMSNorm}, "norm1: expected a LayerNorm"),
    ],
)
def test_timm_blocks_of_other_functions_are_refused(options: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TransformerBlock.from_timm(timm_block(**options))


@pytest.mark.parametrize("path", ["", "attn", "attn.qkv", "norm1", "mlp.act"])
def test_sources_that_run_something_else_are_refused(path: str) -> None:
    """A hook may change a layer's output, and would be lost."""
    block = timm_block()
    layer = block.get_submodule(path)
    hook = layer.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match=rf"^Block{'.' * bool(path)}{path} has hooks"):
        TransformerBlock.from_timm(block)
    hook.remove()
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    with pytest.raises(ValueError, match="has a forward of its own"):
        TransformerBlock.from_timm(block)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["GELU", "GELUTanh", "QuickGELU"])
def test_timm_latent_pool(name: str, backend: str | None) -> None:
    pool = timm_pool(act_layer=act(name))
    assert_same_function(MAPHead.from_timm(pool, backend), pool)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"norm_layer": None}, "norm: expected a LayerNorm"),
        ({"latent_len": 2}, "2 latents"),
        ({"qk_norm": True}, "q_norm"),
        ({"pos_embed": "abs", "feat_size": N}, "position embedding"),
        ({"pool_type": ""}, "pools ''"),
        ({"out_features": 12}, "other widths"),
        ({"out_features": 0}, "no MLP"),
        ({"latent_dim": 12}, "other widths"),
        ({"q_proj": False}, "q: expected an nn.Linear"),
    ],
)
def test_timm_pools_of_other_functions_are_refused(options: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MAPHead.from_timm(timm_pool(**options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_timm_class_attention(backend: str | None) -> None:
    cait = pytest.importorskip("timm.models.cait")
    attention = randomised(cait.ClassAttn(C, HEADS, qkv_bias=True))
    assert_same_function(ClassAttention.from_timm(attention, backend), attention)
    with pytest.raises(ValueError, match="proj_drop"):
        ClassAttention.from_timm(cait.ClassAttn(C, HEADS, proj_drop=0.1))


@pytest.mark.parametrize("branch", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_timm_fusion(branch: int, backend: str | None) -> None:
    crossvit = pytest.importorskip("timm.models.crossvit")
    shared = ((1, 1), (1, 1, 0), (2, 3), (2.0, 2.0))
    block = randomised(crossvit.MultiScaleBlock((16, C), *shared, drop_path=[0.0] * 2))
    x = [torch.randn(B, N, 16).double(), tokens().detach()]
    encoded = [blocks(t) for blocks, t in zip(block.blocks, x, strict=True)]
    fusion = CrossAttentionFusion.from_timm(block, branch, backend)
    actual = fusion(encoded[branch][:, 0], encoded[1 - branch][:, 1:])
    torch.testing.assert_close(actual, block(x)[branch][:, 0], rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="branch"):
        CrossAttentionFusion.from_timm(block, 2)
    block.projs[branch][1] = nn.ReLU()
    with pytest.raises(ValueError, match=rf"projs\.{branch}: has another activation"):
        CrossAttentionFusion.from_timm(block, branch)


def siglip_head(version: str, **options: Any) -> nn.Module:
    name = f"siglip{version.lower()}"
    module = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    sizes = {"hidden_size": C, "num_attention_heads": HEADS, "intermediate_size": 50}
    config = getattr(module, f"Siglip{version}VisionConfig")(**sizes, **options)
    config._attn_implementation = "sdpa"
    head = getattr(module, f"Siglip{version}MultiheadAttentionPoolingHead")
    return randomised(head(config))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu", "quick_gelu", "gelu_new"])
@pytest.mark.parametrize("version", ["", "2"])
def test_transformers_map_head(version: str, act: str, backend: str | None) -> None:
    head = siglip_head(version, hidden_act=act)
    assert_same_function(MAPHead.from_transformers(head, backend), head)


def test_transformers_map_head_of_another_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mlp: has activation_fn = ReLU"):
        MAPHead.from_transformers(siglip_head("", hidden_act="relu"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_without_a_token(backend: str | None) -> None:
    """SigLIP 2 in transformers returns the mean of its values; "zeros" the projection's bias."""
    head = siglip_head("2")
    key_mask = torch.rand(B, N) < 0.5
    key_mask[0], key_mask[1] = True, False
    x = tokens()
    converted = MAPHead.from_transformers(head, backend)
    assert converted.empty == "mean"
    actual, expected = converted(x, key_mask), head(x, key_mask.long())
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, expected)]
    # There scores that round to one number still have gradients; here a mean is a mean.
    torch.testing.assert_close(*(g[::2] for g in gradients), rtol=1e-9, atol=1e-9)
    assert torch.equal(gradients[0][1], gradients[0][1, :1].expand(N, C))

    zeros = MAPHead(C, HEADS, hidden_dim=50, backend=backend).double()
    zeros.load_state_dict(converted.state_dict())
    bias = zeros.attention.out_proj.bias
    nothing = bias + zeros.mlp(zeros.layernorm(bias))
    torch.testing.assert_close(zeros(x, key_mask)[1], nothing, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(zeros(x, key_mask)[::2], expected[::2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transformers_probe(backend: str | None) -> None:
    vjepa2 = pytest.importorskip("transformers.models.vjepa2.modeling_vjepa2")
    sizes = {"hidden_size": C, "num_attention_heads": HEADS}
    config = vjepa2.VJEPA2Config(**sizes, num_pooler_layers=0)
    config._attn_implementation = "sdpa"
    pooler = randomised(vjepa2.VJEPA2AttentivePooler(config))
    probe, x = AttentiveProbe.from_transformers(pooler, backend), tokens()
    torch.testing.assert_close(probe(x)[:, 0], pooler(x), rtol=1e-10, atol=1e-10)
    config.num_pooler_layers = 1
    with pytest.raises(ValueError, match="1 self-attention layers"):
        AttentiveProbe.from_transformers(vjepa2.VJEPA2AttentivePooler(config))


@pytest.mark.parametrize(
    "convert",
    [
        TransformerBlock.from_timm,
        MAPHead.from_timm,
        MAPHead.from_transformers,
        ClassAttention.from_timm,
        AttentiveProbe.from_transformers,
        lambda module: CrossAttentionFusion.from_timm(module, 0),
    ],
)
def test_other_modules_are_refused(convert: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(TypeError, match=r"expected a .*, found torch\.nn\.modules\.linear\.Linear"):
        convert(nn.Linear(C, C))


@pytest.mark.parametrize("name", ["act", "empty"])
def test_unknown_options_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected one of .* found 'relu'"):
        MAPHead(C, HEADS, **{name: "relu"})
    with pytest.raises(ValueError, match="act: expected one of"):
        TransformerBlock(C, HEADS, act="relu")

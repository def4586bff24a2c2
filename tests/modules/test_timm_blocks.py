"""TransformerBlock in timm's vision transformers, and what it has besides a CrossViT's block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from crossvit_kernels.modules import TransformerBlock

timm = pytest.importorskip("timm")

SIZES = {"img_size": 28, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


@pytest.mark.parametrize(
    ("name", "scaled"),
    [
        ("deit3_small_patch16_224", True),
        ("vit_small_patch14_dinov2", True),
        ("vit_tiny_patch16_224", False),
        ("vit_base_patch16_clip_quickgelu_224", False),
    ],
)
def test_models(name: str, scaled: bool, caplog) -> None:
    """timm's keys, and outputs and gradients of timm's blocks, in fused halves."""
    options = {**SIZES, "img_size": 28 if "14" in name else 32}
    theirs, ours = (
        timm.create_model(name, **options, **given).double().eval()
        for given in ({}, {"block_fn": TransformerBlock})
    )
    assert all(type(block) is TransformerBlock for block in ours.blocks)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ("blocks.0.ls1.gamma" in ours.state_dict()) == scaled
    if scaled:
        for block, other in zip(ours.blocks, theirs.blocks, strict=True):
            assert torch.equal(block.ls2.gamma, other.ls2.gamma)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, options["img_size"], options["img_size"], dtype=torch.float64)
    results = []
    for model in (ours, theirs):
        y = model(x)
        y.sin().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([y.detach(), *gradients])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": True}, "qk_norm: TransformerBlock cannot compute qk_norm=True"),
        ({"scale_mlp_norm": True}, "scale_mlp_norm"),
        ({"proj_drop": 0.1}, "proj_drop"),
        ({"mlp_layer": nn.Linear}, "mlp_layer"),
        ({"attn_layer": "diff"}, "attn_layer"),
        ({"act_layer": nn.ReLU}, "act_layer: expected one of .* found ReLU"),
        ({"norm_layer": nn.RMSNorm}, "norm_layer: expected one that makes a LayerNorm"),
    ],
)
def test_what_a_block_cannot_compute(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerBlock(32, 2, **options)
    with pytest.raises(TypeError, match="TransformerBlock has no argument 'heads'"):
        TransformerBlock(32, 2, heads=2)


def both(block: TransformerBlock, *arguments: Any, **options: Any) -> list[torch.Tensor]:
    results = []
    for backend in (None, "reference"):
        block.backend = backend
        results.append(block(*arguments, **options))
    return results


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
def test_activations_are_fused(act: str, caplog) -> None:
    block = TransformerBlock(32, 2, act=act, init_values=0.5)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(*both(block, x), rtol=1e-4, atol=1e-5)
    assert not caplog.records
    block.backend = None
    block.mlp.act.register_forward_hook(lambda *_: None)
    block(x)
    assert "mlp.act has hooks" in caplog.text


def test_key_mask_and_cls() -> None:
    block = TransformerBlock(32, 2, init_values=0.5, proj_bias=False)
    assert block.mlp.fc1.bias is None and block.attn.proj.bias is None
    x, cls, mask = torch.randn(2, 5, 32), torch.randn(2, 32), torch.rand(2, 5) < 0.6
    ours, eager = both(block, x, cls, key_mask=mask)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    block.backend = None
    assert not torch.allclose(block(x, cls), ours)


def test_a_replaced_layer_scale_is_called(caplog) -> None:
    block, x = TransformerBlock(32, 2, init_values=0.5), torch.randn(2, 5, 32)
    expected = block(x)
    block.ls1 = nn.Identity()
    with torch.no_grad():
        block.ls2.gamma.zero_()
    assert not torch.allclose(block(x), expected)
    assert "ls1 is a torch.nn.modules.linear.Identity" in caplog.text
    torch.testing.assert_close(block(x), x + block.attn(block.norm1(x)))


def test_layer_scale_in_float32_beside_16_bits() -> None:
    """With autocast as in eager mode; without it the layers run one by one."""
    block = TransformerBlock(32, 2, init_values=0.5)
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = both(block, x)
    assert ours.dtype == eager.dtype == torch.float32
    torch.testing.assert_close(ours, eager, rtol=0.05, atol=0.05)
    block.bfloat16().ls2.float()
    ours, eager = both(block, x)
    assert ours.dtype == eager.dtype == torch.float32
    torch.testing.assert_close(ours, eager, rtol=0.05, atol=0.05)


def test_from_timm_with_layer_scale() -> None:
    from timm.models.vision_transformer import Block

    theirs = Block(32, 2, qkv_bias=True, init_values=0.3, act_layer=nn.SiLU).double()
    nn.init.normal_(theirs.ls1.gamma)
    ours = TransformerBlock.from_timm(theirs)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_device_and_dtype() -> None:
    block = TransformerBlock(32, 2, init_values=0.5, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in block.parameters()} == {("meta", torch.bfloat16)}

"""Adapters on a whole model, against timm's CrossViT with the same adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from crossvit import Config, CrossViT, attention_maps, load_checkpoint

pytestmark = pytest.mark.usefixtures("cpu_backend")

TINY = Config(
    dims=(32, 64), num_heads=(2, 2), depths=(1, 2), mlp_ratios=(2.0, 2.0), num_blocks=2, img_size=48
)


def timm_model() -> nn.Module:
    crossvit = pytest.importorskip("timm.models.crossvit")
    return crossvit.CrossVit(
        img_size=48,
        img_scale=(1.0, 1.0),
        patch_size=TINY.patch_sizes,
        embed_dim=TINY.dims,
        depth=((1, 2, 0),) * 2,
        num_heads=TINY.num_heads,
        mlp_ratio=(2.0, 2.0, 1.0),
        num_classes=7,
    )


def pair(fused: bool) -> tuple[CrossViT, nn.Module]:
    theirs = timm_model()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = CrossViT(TINY, use_fused=fused, num_classes=7)
    load_checkpoint(ours, theirs.state_dict())
    return ours.double().eval(), theirs.double().eval()


def logits_and_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    logits = model(x)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(logits.square().sum(), list(trained.values()))
    return {"logits": logits.detach(), **dict(zip(trained, gradients, strict=True))}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("fused", [True, False])
def test_lora_with_trained_heads(fused: bool) -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = pair(fused)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    plain = ours(x)
    config = {
        "target_modules": ["qkv", "fc1", "wk"],
        "modules_to_save": ["head.0", "head.1"],
        "init_lora_weights": False,
    }
    ours, theirs = (
        peft.get_peft_model(m, peft.LoraConfig(**config)).double().eval() for m in (ours, theirs)
    )
    ours.load_state_dict(theirs.state_dict())
    actual = logits_and_gradients(ours, x)
    assert_equal(actual, logits_and_gradients(theirs, x))
    assert not torch.allclose(actual["logits"], plain)
    adapters = [gradient for name, gradient in actual.items() if "lora" in name]
    assert len(adapters) == 2 * 2 * (2 * 3 + 2) and all(g.any() for g in adapters)
    # Merged, they are the weights of plain layers.
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(x), actual["logits"], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("fused", [True, False])
def test_hooks_on_every_linear_layer_and_convolution(fused: bool) -> None:
    ours, theirs = pair(fused)
    for model in (ours, theirs):
        for layer in model.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.register_forward_hook(lambda layer, args, y: y * 1.5)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    assert_equal(logits_and_gradients(ours, x), logits_and_gradients(theirs, x))


def test_frozen_weights(cpu_backend: str) -> None:
    """Gradients of the heads only, and of the image."""
    ours, theirs = pair(True)
    for model in (ours, theirs):
        model.requires_grad_(False).get_classifier().requires_grad_(True)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    assert_equal(logits_and_gradients(ours, x), logits_and_gradients(theirs, x))


def test_attention_maps_keep_every_mode_and_see_adapters() -> None:
    model = CrossViT(TINY, use_fused=True, num_classes=7, drop_path_rate=0.5).train()
    model.blocks[0].eval()
    model.norm[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    x = torch.randn(2, 3, 48, 48)
    plain = attention_maps(model, x)
    assert {name: module.training for name, module in model.named_modules()} == modes

    changed = copy.deepcopy(model)
    qkv, wk = model.blocks[0].blocks[1][1].attn.qkv, model.blocks[1].fusion[0].attn.wk
    qkv.register_forward_hook(lambda layer, args, y: y * 2)
    wk.register_forward_hook(lambda layer, args, y: y * 2)
    with torch.no_grad():
        for layer in (
            changed.blocks[0].blocks[1][1].attn.qkv,
            changed.blocks[1].fusion[0].attn.wk,
        ):
            layer.weight.mul_(2), layer.bias.mul_(2)
    actual, expected = attention_maps(model, x), attention_maps(changed, x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(actual[1].fusion[0][0], plain[1].fusion[0][0], atol=1e-4)

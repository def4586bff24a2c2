"""The plain vision transformer (DeiT) against timm's, and fused against eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_cases import compare, randomised
from torch.utils.flop_counter import FlopCounterMode

from crossvit import (
    VisionTransformer,
    VitConfig,
    attention_maps,
    count_macs,
    create_model,
    list_models,
    load_checkpoint,
    load_model,
    save_checkpoint,
)

TINY = VitConfig(dim=32, num_heads=2, depth=2, mlp_ratio=2.0, patch_size=8, img_size=32)
X = (2, 3, 32, 32)


def tiny(fused: bool = True, **options: Any) -> VisionTransformer:
    return randomised(VisionTransformer(TINY, use_fused=fused, num_classes=7, **options))


@pytest.mark.parametrize("name", list_models("deit*"))
def test_agrees_with_timm(name: str) -> None:
    """Logits, features and every gradient, under the rule of a float64 model of timm's."""
    timm = pytest.importorskip("timm")
    options = {"num_classes": 10, "drop_path_rate": 0.1, "depth": 2}
    theirs = timm.create_model(name, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.02 * torch.randn_like(p))
    ours = load_checkpoint(create_model(name, use_fused=True, **options), theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [block.drop_path for block in ours.blocks] == [0.0, pytest.approx(0.1)]
    theirs, ours, x = theirs.double().eval(), ours.double().eval(), torch.randn(1, 3, 224, 224)
    x = x.double()
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x))
    logits = [model(x) for model in (ours, theirs)]
    torch.testing.assert_close(*logits)
    gradients = [
        torch.autograd.grad(y.square().sum(), list(model.parameters()))
        for y, model in zip(logits, (ours, theirs), strict=True)
    ]
    for key, actual, expected in zip(dict(ours.named_parameters()), *gradients, strict=True):
        scale = expected.abs().max().item() or 1.0
        torch.testing.assert_close(actual / scale, expected / scale, rtol=1e-6, atol=1e-8, msg=key)


def test_the_same_names_as_timm() -> None:
    timm = pytest.importorskip("timm")
    assert set(list_models("deit*")) <= set(timm.list_models("deit*"))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_fused_equals_eager(autocast: bool) -> None:
    compare(tiny(drop_path_rate=0.3).train(), 32, batch=3, autocast=autocast)


def test_features_and_heads() -> None:
    model, x = tiny(img_size=(32, 40)).eval(), torch.randn(2, 3, 32, 40)
    logits, features = model(x), model.forward_features(x)
    assert features.shape == (2, 1 + 4 * 5, 32)
    torch.testing.assert_close(model.forward_head(features), logits)
    maps = model.forward_feature_maps(x)
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), features[:, 1:])
    cls = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(cls, features[:, 0])
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), cls)
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    assert model(torch.randn(2, 3, 50, 50)).shape == (2, 32)  # resized


def test_settings_change_nothing() -> None:
    model = tiny(drop_path_rate=0.5).train()
    x, grads = torch.randn(X), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    torch.testing.assert_close(*grads)
    model.set_fused(backend="cpu", keep="lean")
    assert {(block.backend, block.keep) for block in model.blocks} == {("cpu", "lean")}
    with pytest.raises(ValueError, match="eager"):
        model.set_fused(False, backend="cpu")


@pytest.mark.slow
def test_in_torchs_tools() -> None:
    model, x = tiny().eval(), torch.randn(X)
    eager = copy.deepcopy(model).set_fused(False)
    expected = eager(x)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (torch.randn(3, *X[1:]),), dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    per_image = torch.vmap(lambda image: model(image.unsqueeze(0))[0])(x)
    torch.testing.assert_close(per_image, expected, rtol=1e-5, atol=1e-5)
    assert model(x[:0]).shape == (0, 7)
    for module in (model, eager):
        module.blocks[0].mlp.fc1.register_forward_hook(lambda layer, args, y: y * 2)
    torch.testing.assert_close(model(x), eager(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x), expected)


def test_macs_are_those_that_torch_counts() -> None:
    model = tiny(False).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, *X[1:]))
    assert 2 * count_macs(model) == counter.get_total_flops()


def test_checkpoints(tmp_path) -> None:
    pytest.importorskip("safetensors")
    model, path = tiny(img_size=(32, 64), qkv_bias=False).eval(), tmp_path / "model.safetensors"
    save_checkpoint(model, path)
    loaded = load_model(path, use_fused=True).eval()
    x = torch.randn(2, 3, 32, 64)
    assert loaded.config == model.config and torch.equal(loaded(x), model(x))
    assert load_model(path, img_size=48).grid_sizes == [(6, 6)]  # resized from 4 x 8
    state = {f"module.{key}": t for key, t in tiny().state_dict().items()}
    other = tiny()
    load_checkpoint(other, {"model": state})
    torch.testing.assert_close(other.pos_embed, state["module.pos_embed"])
    with pytest.raises(ValueError, match="num_classes=7"):
        load_checkpoint(VisionTransformer(TINY, num_classes=3), {"model": state})
    replaced = VisionTransformer(TINY, num_classes=3)
    load_checkpoint(replaced, {"model": state}, replace_head=True)
    with pytest.raises(ValueError, match=r"grid_sizes: expected .*1 in all"):
        load_checkpoint(other, state, grid_sizes=[(4, 4), (4, 4)])
    with pytest.raises(ValueError, match="it looks like deit_small_patch16_224"):
        small = create_model("deit_small_patch16_224", num_classes=7).state_dict()
        load_checkpoint(create_model("deit_tiny_patch16_224", num_classes=7), small)


def test_bad_input() -> None:
    with pytest.raises(
        ValueError, match=r"x: expected shape \[B, 3, H, W\], found \[2, 1, 32, 32\]"
    ):
        tiny()(torch.randn(2, 1, 32, 32))
    with pytest.raises(TypeError, match="depths"):
        VisionTransformer(TINY, depths=3)
    with pytest.raises(ValueError, match="img_size: expected positive sizes"):
        VisionTransformer(TINY, img_size=0)
    with pytest.raises(TypeError, match=r"img_size: expected an int or \(h, w\), found"):
        VisionTransformer(TINY, img_size=((32, 32), (32, 32)))
    with pytest.raises(ValueError, match="depth: expected more than 0, found 0"):
        VisionTransformer(TINY, depth=0)
    with pytest.raises(TypeError, match=r"patch_size: expected integers, found \(16, 16\)"):
        VisionTransformer(TINY, patch_size=(16, 16))
    with pytest.raises(TypeError, match="model: expected a CrossViT"):
        attention_maps(tiny(), torch.randn(X))

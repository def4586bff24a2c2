"""Features of every block in timm's convention, and grids that follow the images."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from accuracy import assert_within_rule
from torch import Tensor

from crossvit import Config, CrossViT, load_checkpoint, load_model, save_checkpoint
from crossvit.configs import VitConfig
from crossvit.embed import resize_position_embedding
from crossvit.vit import VisionTransformer

TINY = Config(
    dims=(32, 64), num_heads=(2, 2), depths=(1, 2), mlp_ratios=(2.0, 2.0), num_blocks=3, img_size=48
)


@pytest.fixture
def tiny() -> CrossViT:
    return CrossViT(TINY, use_fused=True, num_classes=7).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 48, 48)


# forward_intermediates


def test_features_are_the_tokens_after_each_block(tiny, x):
    final, features = tiny.forward_intermediates(x, return_prefix_tokens=True)
    assert all(map(torch.equal, final, tiny.forward_features(x)))
    branches = tiny.embed(x)
    for k, block in enumerate(tiny.blocks):
        branches = block(*branches)
        for b, branch in enumerate(branches):
            feature, cls = features[3 * b + k]
            height, width = tiny.grid_sizes[b]
            assert feature.shape == (2, TINY.dims[b], height, width) and feature.is_contiguous()
            assert torch.equal(feature[..., 0, 1], branch.patches[:, 1])
            assert torch.equal(feature.flatten(2).transpose(1, 2), branch.patches)
            assert torch.equal(cls, branch.tokens()[:, :1])


def test_the_last_features_with_norm_are_the_feature_maps(tiny, x):
    features = tiny.forward_intermediates(x, indices=[2, 5], norm=True, intermediates_only=True)
    for feature, expected in zip(features, tiny.forward_feature_maps(x), strict=True):
        torch.testing.assert_close(feature, expected)


def test_forms_of_the_result(tiny, x):
    """The names and nesting of timm's VisionTransformer."""
    final, features = tiny.forward_intermediates(x)
    tokens = tiny.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    for token, feature in zip(tokens, features, strict=True):
        assert torch.equal(token, feature.flatten(2).transpose(1, 2))
    result = tiny.forward_intermediates(x, output_dict=True, return_prefix_tokens=True)
    assert set(result) == {"image_features", "image_intermediates", "image_intermediates_prefix"}
    assert all(map(torch.equal, result["image_features"], final))
    assert all(map(torch.equal, result["image_intermediates"], features))
    assert [tuple(t.shape) for t in result["image_intermediates_prefix"]] == [
        (2, 1, dim) for dim in (32, 32, 32, 64, 64, 64)
    ]
    only = tiny.forward_intermediates(x, output_dict=True, intermediates_only=True)
    assert set(only) == {"image_intermediates"}


@pytest.mark.parametrize(
    ("indices", "numbers"),
    [(None, range(6)), (2, [4, 5]), ([0, -1], [0, 5]), ((-6, 3), [0, 3]), ([4, 1, 4], [1, 4])],
)
def test_indices_are_those_of_timm(tiny, x, indices, numbers):
    every = tiny.forward_intermediates(x, intermediates_only=True)
    chosen = tiny.forward_intermediates(x, indices=indices, intermediates_only=True)
    assert len(chosen) == len(list(numbers))
    assert all(torch.equal(f, every[n]) for f, n in zip(chosen, numbers, strict=True))


def test_stop_early_skips_blocks(tiny, x):
    ran = []
    for k, block in enumerate(tiny.blocks):
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
    late = tiny.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    assert ran == [0, 1, 2]
    early = tiny.forward_intermediates(x, indices=[1, 3], stop_early=True, intermediates_only=True)
    assert ran == [0, 1, 2, 0, 1]
    assert all(map(torch.equal, early, late))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"indices": 7}, ValueError, "expected 1 to 6 features, found 7"),
        ({"indices": 0}, ValueError, "found 0"),
        ({"indices": [6]}, ValueError, "expected -6 to 5, found 6"),
        ({"indices": [-7]}, ValueError, "found -7"),
        ({"indices": []}, ValueError, "at least one"),
        ({"indices": [0.5]}, TypeError, "expected ints, found 0.5"),
        ({"output_fmt": "NHWC"}, ValueError, "expected 'NCHW' or 'NLC', found 'NHWC'"),
    ],
)
def test_bad_requests_are_refused(tiny, x, options, error, message):
    with pytest.raises(error, match=message):
        tiny.forward_intermediates(x, **options)


@pytest.mark.parametrize(
    ("changes", "reductions"),
    [
        ({}, [12, 12, 12, 120 / 7, 120 / 7, 120 / 7]),
        ({"img_size": ((48, 48), (48, 48))}, [12, 12, 12, 16, 16, 16]),
        ({"img_size": ((48, 48), (96, 96))}, [12, 12, 12, 8, 8, 8]),
    ],
)
def test_feature_info(changes, reductions):
    with torch.device("meta"):
        info = CrossViT(TINY, **changes).feature_info
    assert [entry["reduction"] for entry in info] == reductions
    assert [entry["num_chs"] for entry in info] == [32] * 3 + [64] * 3
    assert [(e["branch"], e["block"]) for e in info] == [(b, k) for b in (0, 1) for k in range(3)]
    assert [e["module"] for e in info] == ["blocks.0", "blocks.1", "blocks.2"] * 2


@pytest.mark.parametrize("norm", [False, True])
def test_pruned_models_have_the_same_features(tiny, x, norm):
    expected = tiny.forward_intermediates(x, [1, 3], norm=norm, intermediates_only=True)
    pruned = copy.deepcopy(tiny)
    indices = pruned.prune_intermediate_layers([1, 3], prune_norm=not norm)
    assert indices == [1, 2] and len(pruned.blocks) == pruned.config.num_blocks == 2
    features = pruned.forward_intermediates(x, indices, norm=norm, intermediates_only=True)
    assert all(map(torch.equal, features, expected))
    names = dict(pruned.named_parameters())
    assert not any(name.startswith(("blocks.2", "head")) for name in names)
    assert any(name.startswith("norm") for name in names) == norm
    assert pruned(x).shape == (2, 96)


@pytest.mark.parametrize("norm", [False, True])
def test_timm_wraps_the_model(tiny, x, norm):
    features = pytest.importorskip("timm.models._features")
    expected = tiny.forward_intermediates(x, [2, 4], norm=norm, intermediates_only=True)
    net = features.FeatureGetterNet(copy.deepcopy(tiny), out_indices=[2, 4], norm=norm)
    assert net.feature_info.channels() == [32, 64]
    assert net.feature_info.reduction() == [12, 120 / 7]
    assert all(map(torch.equal, net(x), expected))


def test_gradients_of_features(x):
    """Of all features at once, fused and eager, under the accuracy rule."""
    model = CrossViT(TINY, num_classes=0)

    def run(dtype: torch.dtype, fused: bool) -> list[Tensor]:
        copied = copy.deepcopy(model).to(dtype).set_fused(fused)
        features = copied.forward_intermediates(x.to(dtype), intermediates_only=True)
        loss = sum((i + 1) * f.square().mean() for i, f in enumerate(features))
        parameters = [p for n, p in copied.named_parameters() if not n.startswith("norm")]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        # Nothing reads the CLS after the last fusion, and key biases cancel.
        return [*features, *(g for g in gradients if g is not None and g.dim() > 1)]

    exact = run(torch.float64, fused=False)
    eager, fused = (run(torch.float32, fused=fused) for fused in (False, True))
    assert len(fused) > 60
    for i, results in enumerate(zip(fused, eager, exact, strict=True)):
        assert_within_rule(*results, f"result {i}")


@pytest.mark.parametrize("fusion", ["none", "all", "class", "pairwise", "without CLS"])
def test_every_fusion_scheme_has_features(x, fusion):
    changes = {"cls_token": False} if fusion == "without CLS" else {"fusion": fusion}
    model = CrossViT(TINY, use_fused=True, dynamic_img_size=True, num_classes=7, **changes).eval()
    x = torch.randn(2, 3, 72, 60)
    features = model.forward_intermediates(x, [2, 5], return_prefix_tokens=True, norm=True)[1]
    assert isinstance(features[0], tuple) == (fusion != "without CLS")
    maps = [f[0] if isinstance(f, tuple) else f for f in features]
    for feature, expected in zip(maps, model.forward_feature_maps(x), strict=True):
        torch.testing.assert_close(feature, expected)
    assert [tuple(m.shape[2:]) for m in maps] == [(6, 5), (5, 4)]
    of_size = CrossViT(TINY, img_size=(72, 60), num_classes=7, **changes)
    expected = load_checkpoint(of_size, model.state_dict()).set_fused().eval()(x)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("embed", ["conv", "t2t"])
def test_every_embedding_follows_the_images(embed):
    model = CrossViT(TINY, embed=embed, dynamic_img_size=True, num_classes=7).eval()
    of_size = CrossViT(TINY, embed=embed, img_size=(72, 60), num_classes=7)
    x = torch.randn(1, 3, 72, 60)
    expected = load_checkpoint(of_size, model.state_dict()).eval()(x)
    torch.testing.assert_close(model(x), expected)


def test_gradient_checkpointing_keeps_features(tiny, x):
    expected = tiny.forward_intermediates(x, intermediates_only=True)
    tiny.set_grad_checkpointing()
    features = tiny.forward_intermediates(x, intermediates_only=True)
    assert all(map(torch.equal, features, expected))
    features[2].sum().backward()
    assert tiny.patch_embed[0].proj.weight.grad.abs().sum() > 0


# dynamic_img_size


def dynamic(model: CrossViT, **changes: object) -> CrossViT:
    """The model with a grid that follows the images."""
    other = CrossViT(model.config, dynamic_img_size=True, num_classes=7, **changes)
    other.load_state_dict(model.state_dict())
    return other.set_fused(model.use_fused).eval()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "eager"])
@pytest.mark.parametrize("size", [(48, 48), (72, 60), (24, 36), (50, 61)])
def test_it_is_the_model_of_the_images_size(tiny, size, fused):
    """Whose position embeddings load_checkpoint resizes."""
    of_size = load_checkpoint(CrossViT(TINY, img_size=size, num_classes=7), tiny.state_dict())
    of_size.set_fused(fused).eval()
    model = dynamic(tiny.set_fused(fused))
    x = torch.randn(2, 3, *size)
    assert model.grid_sizes_of(x) == of_size.grid_sizes
    assert torch.equal(model(x), of_size(x))
    for feature, expected in zip(
        model.forward_feature_maps(x), of_size.forward_feature_maps(x), strict=True
    ):
        assert torch.equal(feature, expected)
    features = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(f.shape[2:]) for f in features[::3]] == of_size.grid_sizes


def test_the_default_resizes_the_images(tiny):
    x = torch.randn(2, 3, 72, 60)
    resized = torch.nn.functional.interpolate(x, (48, 48), mode="bicubic", align_corners=False)
    assert tiny.grid_sizes_of(x) == tiny.grid_sizes
    torch.testing.assert_close(tiny(x), tiny((resized, resized)))


def test_a_pair_of_images_has_its_own_sizes(tiny):
    model = dynamic(tiny)
    pair = torch.randn(2, 3, 36, 60), torch.randn(2, 3, 32, 64)
    assert model.grid_sizes_of(pair) == [(3, 5), (2, 4)]
    sizes = {"img_size": ((36, 60), (32, 64))}
    expected = load_checkpoint(CrossViT(TINY, num_classes=7, **sizes), tiny.state_dict())
    assert torch.equal(model(pair), expected.set_fused().eval()(pair))
    with pytest.raises(ValueError, match=r"expected images of \(48, 64\).*found.*40, 64"):
        model((pair[0], torch.randn(2, 3, 40, 64)))
    with pytest.raises(ValueError, match=r"expected shape \[B, 3, H, W\]"):
        model(torch.randn(2, 3, 0, 48))


def test_the_ratio_of_the_branches_is_the_models(tiny):
    for sizes, image, expected in (
        (48, (240, 480), [(240, 480), (224, 448)]),
        (((48, 48), (48, 48)), (96, 144), [(96, 144), (96, 144)]),
        (((24, 48), (48, 48)), (60, 60), [(60, 60), (128, 64)]),
    ):
        with torch.device("meta"):
            model = CrossViT(TINY, img_size=sizes, dynamic_img_size=True)
            assert model.image_sizes(torch.empty(1, 3, *image)) == expected


def test_position_embeddings_are_resized_as_in_timm(tiny):
    resample = pytest.importorskip("timm.layers").resample_abs_pos_embed
    for old, new in (((4, 4), (6, 5)), ((3, 5), (2, 4))):
        embedding = torch.randn(1, 1 + old[0] * old[1], 8)
        ours = resize_position_embedding(embedding, old, new)
        torch.testing.assert_close(ours, resample(embedding, new, old, num_prefix_tokens=1))


def test_resizing_keeps_float64():
    embedding = torch.randn(1, 1 + 6, 4, dtype=torch.float64, requires_grad=True)
    resize = lambda e: resize_position_embedding(e, (2, 3), (3, 4))  # noqa: E731
    assert resize(embedding).dtype == torch.float64
    assert torch.autograd.gradcheck(resize, embedding)


def test_saved_models_stay_dynamic(tiny, tmp_path):
    pytest.importorskip("safetensors")
    model = dynamic(tiny)
    save_checkpoint(model, tmp_path / "model.safetensors")
    x = torch.randn(1, 3, 72, 60)
    loaded = load_model(tmp_path / "model.safetensors", use_fused=True).eval()
    assert torch.equal(loaded(x), model(x))
    fixed = load_model(tmp_path / "model.safetensors", dynamic_img_size=False)
    assert fixed.grid_sizes_of(x) == [(4, 4), (3, 3)]


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_backend")
def test_one_graph_for_every_size():
    counter = torch._dynamo.testing.CompileCounter()
    model = dynamic(CrossViT(TINY, num_blocks=1, use_fused=True, num_classes=7))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for size in ((72, 60), (60, 84), (108, 72)):  # a side as the model's has another graph
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


# The plain vision transformer


@pytest.fixture
def deit() -> VisionTransformer:
    config = VitConfig(dim=64, num_heads=2, depth=3, patch_size=16, img_size=48)
    return VisionTransformer(config, use_fused=True, num_classes=7).eval()


def test_a_plain_transformer_has_features_and_follows_images(deit):
    model = VisionTransformer(deit.config, dynamic_img_size=True, num_classes=7).eval()
    model.load_state_dict(deit.state_dict())
    x = torch.randn(2, 3, 60, 33)
    of_size = VisionTransformer(deit.config, img_size=(60, 33), num_classes=7).eval()
    load_checkpoint(of_size, deit.state_dict())
    torch.testing.assert_close(model(x), of_size(x))
    final, features = model.forward_intermediates(x, [0, 2], norm=True)
    torch.testing.assert_close(features[1], of_size.forward_feature_maps(x))
    assert features[0].shape == (2, 64, 4, 3)
    torch.testing.assert_close(final, of_size.forward_features(x))
    x = torch.randn(2, 3, 60, 60)  # resized otherwise
    assert deit.forward_feature_maps(x).shape == (2, 64, 3, 3)
    indices = model.prune_intermediate_layers([0], prune_norm=True)
    assert indices == [0] and model.config.depth == len(model.blocks) == 1
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 64)


def test_features_of_a_plain_transformer_are_timms():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("deit_tiny_patch16_224", depth=2, dynamic_img_size=True).eval()
    ours = VisionTransformer("deit_tiny_patch16_224", depth=2, dynamic_img_size=True).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 96, 64)
    for options in (
        {"indices": [0, -1], "norm": True},
        {"indices": 1, "output_fmt": "NLC", "stop_early": True},
        {"return_prefix_tokens": True, "output_dict": True},
        {"intermediates_only": True},
    ):
        pairs = (m.forward_intermediates(x, **options) for m in (ours, theirs))
        torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-4)
    for ours_info, info in zip(ours.feature_info, theirs.feature_info, strict=True):
        assert {key: ours_info[key] for key in info} == info

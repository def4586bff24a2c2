"""The model family: sizes of the paper, kinds of input, settings."""

from __future__ import annotations

import pytest
import torch

from crossvit import (
    Config,
    CrossViT,
    VisionTransformer,
    attention_maps,
    count_macs,
    create_model,
    list_models,
)
from crossvit.configs import branch_sizes, named_config
from crossvit.embed import resize_position_embedding

# Name: parameters, multiply-accumulates in G; the paper rounds both further.
PAPER = {
    "crossvit_tiny_240": (7_014_800, 1.563),
    "crossvit_small_240": (26_856_272, 5.616),
    "crossvit_base_240": (105_025_232, 21.191),
    "crossvit_9_240": (8_553_296, 1.841),
    "crossvit_15_240": (27_528_464, 5.791),
    "crossvit_18_240": (43_271_408, 9.031),
    "crossvit_9_dagger_240": (8_776_592, 1.979),
    "crossvit_15_dagger_240": (28_209_008, 6.112),
    "crossvit_18_dagger_240": (44_266_976, 9.473),
    "crossvit_15_dagger_408": (28_500_080, 21.399),
    "crossvit_18_dagger_408": (44_606_560, 32.409),
    "crossvit_18_dagger_504": (44_887_904, 56.602),
    # Table 6, and section 4.3 without CLS
    "crossvit_small_none": (23_738_960, 5.350),
    "crossvit_small_class": (24_186_512, 5.350),
    "crossvit_small_pairwise": (24_186_512, 5.527),
    "crossvit_small_all": (26_854_544, 7.583),
    "crossvit_small_nocls": (26_855_120, 5.588),
    "crossvit_18_t2t": (43_548_604, 12.462),
    "crossvit_18_t2t_performer": (43_549_372, 9.511),
    # Table 2
    "deit_tiny_patch16": (5_717_416, 1.254),
    "deit_small_patch16": (22_050_664, 4.599),
    "deit_base_patch16": (86_567_656, 17.564),
}

TINY = Config(
    dims=(32, 64), num_heads=(2, 2), depths=(1, 2), mlp_ratios=(2.0, 2.0), num_blocks=2, img_size=48
)


@pytest.fixture
def tiny() -> CrossViT:
    return CrossViT(TINY, use_fused=True, num_classes=7).eval()


# Name: parameters in M without pos_embed, multiply-accumulates in G.
ABLATIONS = {
    "crossvit_small_patch8": (26.658, 6.731),
    "crossvit_small_width384": (31.404, 7.697),
    "crossvit_small_n2": (28.038, 6.333),
    "crossvit_small_l2": (28.926, 5.618),
    "crossvit_small_l2_reread": (28.926, 5.881),
    "crossvit_small_k6m2": (31.156, 6.599),
}


def create_model_on_meta(name):
    with torch.device("meta"):
        return create_model(name)


def num_parameters(model, but=()):
    return sum(p.numel() for name, p in model.named_parameters() if name not in but)


@pytest.mark.parametrize("name", PAPER)
def test_parameters_and_macs_are_the_papers(name):
    model = create_model_on_meta(name)
    parameters, giga = PAPER[name]
    assert num_parameters(model) == parameters
    assert round(count_macs(model) / 1e9, 3) == giga


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_have_the_papers_parameters_and_macs(name):
    model = create_model_on_meta(name)
    without_positions = num_parameters(model, but=model.position_embeddings)
    assert (round(without_positions / 1e6, 3), round(count_macs(model) / 1e9, 3)) == ABLATIONS[name]


def test_names():
    assert list_models("crossvit_small*_240") == [
        f"crossvit_{name}_240"
        for name in (
            "small", "small_none", "small_class", "small_pairwise", "small_all", "small_width384",
            "small_n2", "small_l2", "small_l2_reread", "small_k6m2", "small_nocls",
        )
    ]  # fmt: skip
    assert list_models("*_9_*_240") == ["crossvit_9_dagger_240"]
    assert CrossViT(use_fused=True).config == named_config("crossvit_15")
    with pytest.raises(ValueError, match=r"crossvit_16.* did you mean crossvit_1[58]"):
        create_model("crossvit_16")
    with pytest.raises(TypeError, match="width"):
        CrossViT(TINY, width=3)


@pytest.mark.parametrize(
    ("img_size", "expected"),
    [
        (240, ((240, 240), (224, 224))),
        (408, ((408, 408), (384, 384))),
        (504, ((504, 504), (480, 480))),
        (224, ((228, 228), (224, 224))),
        (256, ((264, 264), (240, 240))),
        ((240, 480), ((240, 480), (224, 448))),
        (((24, 36), (32, 48)), ((24, 36), (32, 48))),
    ],
)
def test_branch_sizes(img_size, expected):
    assert branch_sizes(img_size, (12, 16)) == expected


@pytest.mark.parametrize(
    ("img_size", "error"),
    [
        (0, ValueError),
        ((24, -12), ValueError),
        (((24, 36), (32, 40)), ValueError),
        ("a", TypeError),
    ],
)
def test_bad_sizes_are_refused(img_size, error):
    with pytest.raises(error, match="img_size"):
        branch_sizes(img_size, (12, 16))


@pytest.mark.parametrize("img_size", [48, (24, 60), ((36, 24), (16, 48))])
@pytest.mark.parametrize("fused", [True, False])
def test_any_image_size(img_size, fused):
    model = CrossViT(TINY, img_size=img_size, in_chans=1, num_classes=5, use_fused=fused).eval()
    sizes = [embed.img_size for embed in model.patch_embed]
    assert model(torch.randn(2, 1, *sizes[0])).shape == (2, 5)
    maps = model.forward_feature_maps(torch.randn(2, 1, *sizes[0]))
    assert [tuple(m.shape) for m in maps] == [
        (2, dim, *grid) for dim, grid in zip(model.config.dims, model.grid_sizes, strict=True)
    ]


def test_one_image_or_two_ready_made(tiny):
    x = torch.randn(2, 3, 48, 48)
    l_size = tiny.patch_embed[1].img_size
    resized = torch.nn.functional.interpolate(x, size=l_size, mode="bicubic", align_corners=False)
    assert torch.equal(tiny(x), tiny((x, resized)))
    with pytest.raises(ValueError, match="for this branch"):
        tiny((x, x[..., :-1]))
    with pytest.raises(ValueError, match="expected shape"):
        tiny(x[:, :1])
    with pytest.raises(ValueError, match="pair"):
        tiny((x,))
    with pytest.raises(ValueError, match="pair of them, found NoneType"):
        tiny(None)
    with pytest.raises(ValueError, match=r"pair of them, found \[Tensor, NoneType\]"):
        tiny((x, None))
    with pytest.raises(ValueError, match="as many images for both branches"):
        tiny((x[:1], resized))


def test_a_pair_of_unequal_batches_is_refused_without_fusion_as_well():
    model = CrossViT(TINY, fusion="none", num_blocks=1)
    x = torch.randn(2, 3, 48, 48)
    with pytest.raises(ValueError, match=r"found \[1, 3, 48, 48\] and \[2, 3, 48, 48\]"):
        model((x[:1], x))


def test_counts_and_maps_of_wrapped_models(tiny):
    wrapped = torch.nn.DataParallel(tiny)
    assert count_macs(wrapped) == count_macs(tiny)
    assert len(attention_maps(wrapped, torch.randn(1, 3, 48, 48))) == len(tiny.blocks)
    for function in (count_macs, lambda model: attention_maps(model, torch.randn(1, 3, 48, 48))):
        with pytest.raises(TypeError, match=r"model: expected a CrossViT.*found torch\.nn.*Linear"):
            function(torch.nn.Linear(2, 2))


def test_a_number_of_classes_of_another_type_changes_nothing(tiny):
    before = tiny.num_classes
    with pytest.raises(TypeError):
        tiny.reset_classifier("a")
    assert tiny.num_classes == before


def test_heads_and_features(tiny):
    x = torch.randn(2, 3, 48, 48)
    logits = tiny(x)
    features = tiny.forward_features(x)
    torch.testing.assert_close(tiny.forward_head(features), logits)
    small, large = tiny.forward_branches(x)
    torch.testing.assert_close((small + large) / 2, logits)
    tiny.reset_classifier(3)
    assert tiny(x).shape == (2, 3)
    tiny.reset_classifier(0)
    pre_logits = torch.cat([t[:, 0] for t in features], dim=1)
    torch.testing.assert_close(tiny(x), pre_logits)


def test_no_weight_decay_names_parameters(tiny):
    names = dict(tiny.named_parameters())
    assert tiny.no_weight_decay() <= set(names)
    assert all(names[name].dim() == 3 for name in tiny.no_weight_decay())


def test_gradient_checkpointing_changes_nothing():
    model = CrossViT(TINY, use_fused=True, drop_path_rate=0.5, num_classes=7).train()
    x = torch.randn(4, 3, 48, 48)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_drop_path_is_that_of_the_released_code():
    model = CrossViT("crossvit_9", drop_path_rate=0.1, img_size=48)
    steps = torch.linspace(0, 0.1, 9).tolist()
    for k, block in enumerate(model.blocks):
        rates = steps[3 * k : 3 * k + 3]
        assert [b.drop_path for b in block.blocks[0]] == rates[:1]
        assert [b.drop_path for b in block.blocks[1]] == rates
        assert block.drop_path == rates[-1]


@pytest.mark.parametrize("reread", [False, True])
def test_two_cross_attention_blocks(reread):
    model = CrossViT(TINY, cross_depth=2, reread_patches=reread, num_blocks=1, num_classes=7)
    block = model.blocks[0]
    cls = torch.randn(2, 32)
    patches = torch.randn(2, 9, 64, requires_grad=True)
    y = block.projs[0](cls).unsqueeze(1)
    for index, cross in enumerate(block.fusion[0]):
        seen = torch.cat([y, patches], dim=1) if index == 0 or reread else y
        normed, a = cross.norm1(seen), cross.attn
        q, k, v = (
            w(t).unflatten(2, (2, 32)).transpose(1, 2)
            for w, t in ((a.wq, normed[:, :1]), (a.wk, normed), (a.wv, normed))
        )
        pooled = ((q @ k.transpose(2, 3)) / 32**0.5).softmax(-1) @ v
        y = y + a.proj(pooled.transpose(1, 2).flatten(2))
    expected = block.revert_projs[0](y[:, 0])
    for fused in (False, True):
        model.set_fused(fused)
        torch.testing.assert_close(block.fuse(0, cls, patches), expected)


@pytest.mark.parametrize(("cross_depth", "fused"), [(1, True), (1, False), (2, True)])
def test_attention_maps(cross_depth, fused):
    model = CrossViT(TINY, cross_depth=cross_depth, use_fused=fused, drop_path_rate=0.5)
    x = torch.randn(2, 3, 48, 48)
    tokens = [1 + height * width for height, width in model.grid_sizes]
    maps = attention_maps(model, x)
    assert model.training and len(maps) == model.config.num_blocks
    for attention in maps:
        assert [len(of_branch) for of_branch in attention.self_attention] == [1, 2]
        for b in (0, 1):
            assert attention.self_attention[b][0].shape == (2, 2, tokens[b], tokens[b])
            first, *later = attention.fusion[b]
            assert first.shape == (2, 2, tokens[1 - b]) and len(later) == cross_depth - 1
            for weights in (*attention.self_attention[b], first, *later):
                torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_attention_maps_are_those_of_the_forward_pass():
    model = CrossViT(TINY, use_fused=True, num_blocks=1).eval()
    x = torch.randn(2, 3, 48, 48)
    block = model.blocks[0]
    small, large = (block.encode(b, branch) for b, branch in enumerate(model.embed(x)))
    (weights,) = attention_maps(model, x)[0].fusion[0]
    y = block.projs[0](small.cls)
    cross = block.fusion[0]
    seen = cross.norm1(torch.cat([y.unsqueeze(1), large.patches], dim=1))
    v = cross.attn.wv(seen).unflatten(2, (2, 32))
    pooled = torch.einsum("bhn,bnhd->bhd", weights, v).flatten(1)
    expected = block.revert_projs[0](y + cross.attn.proj(pooled))
    torch.testing.assert_close(block.fuse(0, small.cls, large.patches), expected)


def test_names_of_other_architectures():
    assert isinstance(create_model("deit_tiny_patch16_224", img_size=32), VisionTransformer)
    with pytest.raises(ValueError, match=r"deit_tiny_patch16_224.*create_model"):
        CrossViT("deit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"crossvit_9.*create_model"):
        VisionTransformer("crossvit_9")


def test_set_fused(tiny):
    with pytest.raises(ValueError, match="eager"):
        tiny.set_fused(False, backend="cpu")
    tiny.set_fused(True, backend="cpu")
    assert {m.backend for m in tiny.modules() if hasattr(m, "backend")} == {"cpu"}
    tiny.set_fused(keep="lean")
    assert {m.keep for m in tiny.modules() if hasattr(m, "keep")} == {"lean"}
    with pytest.raises(ValueError, match="keep: expected 'fast' or 'lean', found 'most'"):
        tiny.set_fused(keep="most")


def test_position_embedding_is_resized():
    embedding = torch.randn(1, 1 + 6, 4)
    assert resize_position_embedding(embedding, (2, 3), (2, 3)) is embedding
    resized = resize_position_embedding(embedding, (2, 3), (4, 5))
    assert resized.shape == (1, 21, 4)
    assert torch.equal(resized[:, 0], embedding[:, 0])
    flat = torch.ones(1, 7, 4)
    torch.testing.assert_close(
        resize_position_embedding(flat, (2, 3), (4, 5)), torch.ones(1, 21, 4)
    )

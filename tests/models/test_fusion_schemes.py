"""The paper's fusion schemes and the other forms of cross-attention (Tables 6, 7)."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from model_cases import SCHEMES, TINY, compare, randomised
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import crossvit_kernels as ck
from crossvit import (
    Config,
    CrossViT,
    attention_maps,
    count_macs,
    create_model,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from crossvit.fusion import Branch

X = (2, 3, 48, 48)


def scheme(name: str, fused: bool = True, **changes: object) -> CrossViT:
    options = {**SCHEMES[name], **changes}
    return randomised(CrossViT(TINY, num_classes=7, use_fused=fused, **options))


def plain_mean(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Patches [B, N, C] of a square grid resized to another one."""
    side = round(x.shape[1] ** 0.5)
    image = x.transpose(1, 2).reshape(x.shape[0], -1, side, side)
    return F.interpolate(image, size=size, mode="bilinear").flatten(2).transpose(1, 2)


# Equations, with PyTorch's layers


def fused_branches(model: CrossViT, branches: list[Tensor]) -> list[Tensor]:
    """All tokens of both branches after the fusion of the first multi-scale block."""
    grids = model.grid_sizes
    inputs = [Branch(x, None, grid) for x, grid in zip(branches, grids, strict=True)]
    return [branch.tokens() for branch in model.blocks[0].fuse_branches(*inputs)]


@pytest.fixture
def branches() -> list[Tensor]:
    """Tokens of both branches of TINY, CLS first."""
    return [torch.randn(2, 1 + 16, 32, dtype=torch.float64) for _ in range(1)] + [
        torch.randn(2, 1 + 9, 64, dtype=torch.float64)
    ]


@pytest.mark.parametrize("fused", [True, False])
def test_class_token_fusion_is_eq_3(branches, fused) -> None:
    model = scheme("class", fused).double().eval()
    block, (small, large) = model.blocks[0], branches
    f, g = block.projs[0], block.revert_projs[0]
    total = f(small[:, 0]) + large[:, 0]
    expected = [torch.cat([g(total)[:, None], small[:, 1:]], 1)]
    expected += [torch.cat([total[:, None], large[:, 1:]], 1)]
    torch.testing.assert_close(fused_branches(model, branches), expected)


@pytest.mark.parametrize("fused", [True, False])
def test_pairwise_fusion_is_eq_4(branches, fused) -> None:
    model = scheme("pairwise", fused).double().eval()
    block, (small, large) = model.blocks[0], branches
    f, g = block.projs[0], block.revert_projs[0]
    y = f(small)
    cls = y[:, :1] + large[:, :1]
    expected = [
        g(torch.cat([cls, y[:, 1:] + plain_mean(large[:, 1:], (4, 4))], 1)),
        torch.cat([cls, plain_mean(y[:, 1:], (3, 3)) + large[:, 1:]], 1),
    ]
    torch.testing.assert_close(fused_branches(model, branches), expected)


@pytest.mark.parametrize("fused", [True, False])
def test_all_attention_fusion_is_eq_2(branches, fused) -> None:
    model = scheme("all", fused).double().eval()
    block, (small, large) = model.blocks[0], branches
    attn = block.fusion.attn
    msa = nn.MultiheadAttention(64, 2, batch_first=True, dtype=torch.float64)
    msa.load_state_dict(
        {
            "in_proj_weight": attn.qkv.weight,
            "in_proj_bias": attn.qkv.bias,
            "out_proj.weight": attn.proj.weight,
            "out_proj.bias": attn.proj.bias,
        }
    )
    y = torch.cat([block.projs[1](large), block.projs[0](small)], 1)
    normed = block.fusion.norm1(y)
    o = y + msa(normed, normed, normed, need_weights=False)[0]
    expected = [block.revert_projs[0](o[:, 10:]), block.revert_projs[1](o[:, :10])]
    torch.testing.assert_close(fused_branches(model, branches), expected)


def test_cross_attention_without_cls_adds_to_every_patch() -> None:
    model = scheme("no cls").double().eval()
    same = scheme("l2", cross_depth=1).double().eval()
    block, reference = model.blocks[0], same.blocks[0]
    reference.load_state_dict(block.state_dict())
    small, large = torch.randn(2, 16, 32).double(), torch.randn(2, 9, 64).double()
    new = block.fuse_branches(
        Branch(small, None, (4, 4), False), Branch(large, None, (3, 3), False)
    )
    updates = reference.fuse(0, small.mean(1), large), reference.fuse(1, large.mean(1), small)
    for branch, x, update in zip(new, (small, large), updates, strict=True):
        torch.testing.assert_close(branch.tokens(), x + update[:, None])
    images = torch.randn(X).double()
    features = model.forward_features(images)
    assert [f.shape[1] for f in features] == [16, 9]
    logits = sum(model.head[b](features[b].mean(1)) for b in (0, 1)) / 2
    torch.testing.assert_close(model(images), logits)
    torch.testing.assert_close(model.forward_head(features), logits)
    torch.testing.assert_close(sum(model.forward_branches(images)) / 2, logits)
    assert [m.shape for m in model.forward_feature_maps(images)] == [(2, 32, 4, 4), (2, 64, 3, 3)]
    assert model.no_weight_decay() == {"pos_embed_0", "pos_embed_1"}


def test_cross_attention_without_projections() -> None:
    model = scheme("no projections").double().eval()
    block = model.blocks[0]
    cls, patches = torch.randn(2, 64).double(), torch.randn(2, 9, 64).double()
    expected = block.fusion[0](torch.cat([cls[:, None], patches], 1))[:, 0]
    torch.testing.assert_close(block.fuse(0, cls, patches), expected)
    assert not any("projs" in key for key in model.state_dict())


# Fused against eager


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", SCHEMES)
def test_fused_equals_eager(name: str, autocast: bool) -> None:
    model = scheme(name, depths=(1, 1), drop_path_rate=0.3).train()
    compare(model, 48, autocast=autocast)


@pytest.mark.parametrize("name", ["no projections", "l2", "all"])
@pytest.mark.slow_on_cpu
def test_fused_equals_eager_on_triton(name: str, triton_device: str) -> None:
    model = scheme(name, num_blocks=1, depths=(1, 1)).train()
    compare(model, 48, backend="triton", device=triton_device)


OPERATIONS = {
    "none": {"layernorm_msa", "layernorm_ffn"},
    "all": {"layernorm_msa", "layernorm_ffn"},
    "no projections": {"layernorm_msa", "layernorm_ffn", "cross_attention_fusion"},
    "l2": {"layernorm_msa", "layernorm_ffn", "cross_attention_fusion"},
    "l2 reread": {"layernorm_msa", "layernorm_ffn", "cross_attention_fusion"},
    "no cls": {"layernorm_msa", "layernorm_ffn", "cross_attention_fusion"},
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_the_kernels_run(name: str, cpu_backend: str) -> None:
    model = scheme(name).eval()
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(torch.randn(X))
    calls: dict[str, int] = {}
    for event in profile.events():
        if event.name.startswith("crossvit_kernels::"):
            operation = event.name.removeprefix("crossvit_kernels::").removesuffix("_forward")
            calls[operation] = calls.get(operation, 0) + 1
    assert calls.keys() == OPERATIONS[name]
    # Three transformer blocks in each of two multi-scale blocks.
    assert calls["layernorm_msa"] == 6 + (2 if name == "all" else 0)
    if "cross_attention_fusion" in calls:
        assert calls["cross_attention_fusion"] == 4 * model.config.cross_depth


@pytest.mark.parametrize("name", SCHEMES)
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    model = scheme(name, num_blocks=1, drop_path_rate=0.5).train()
    x, grads = torch.randn(X), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    torch.testing.assert_close(*grads)


# torch's tools


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairwise", "all", "no cls"])
def test_compiles_for_every_batch(name: str) -> None:
    torch._dynamo.reset()
    model = scheme(name, num_blocks=1, depths=(1, 1)).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.set_grad_enabled(name == "all"):
        compiled(torch.randn(X))
        x = torch.randn(5, *X[1:])
        with torch.compiler.set_stance("fail_on_recompile"):
            logits = compiled(x)
        torch.testing.assert_close(logits, model(x), rtol=1e-5, atol=1e-5)
    if logits.requires_grad:
        logits.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["class", "pairwise", "all", "no projections", "l2", "no cls"])
def test_export_with_a_dynamic_batch(name: str) -> None:
    model = scheme(name, num_blocks=1, depths=(1, 1)).eval()
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (torch.randn(X),), dynamic_shapes=shapes)
    x = torch.randn(5, *X[1:])
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_hooks_and_transforms(name: str) -> None:
    model = scheme(name, num_blocks=1).double().eval()
    x = torch.randn(X, dtype=torch.float64)
    eager = copy.deepcopy(model).set_fused(False)
    per_image = torch.vmap(lambda image: model(image.unsqueeze(0))[0])(x)
    torch.testing.assert_close(per_image, eager(x))
    for module in (*model.modules(), *eager.modules()):
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda layer, args, y: y * 1.5)
    torch.testing.assert_close(model(x), eager(x))
    assert not torch.allclose(model(x), per_image)
    assert model(x[:0]).shape == (0, 7)
    assert model.to("meta")(x.to("meta")).shape == (2, 7)


@pytest.mark.parametrize("name", SCHEMES)
def test_macs_are_those_that_torch_counts(name: str) -> None:
    with torch.device("meta"):
        model = scheme(name, fused=False).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.randn(1, *X[1:]))
    assert 2 * count_macs(model) == counter.get_total_flops()


@pytest.mark.parametrize("name", SCHEMES)
def test_checkpoints(name: str, tmp_path) -> None:
    pytest.importorskip("safetensors")
    model = scheme(name, img_size=(48, 64)).eval()
    save_checkpoint(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors").eval()
    assert loaded.config == model.config
    x = torch.randn(2, 3, 48, 64)
    assert torch.equal(loaded(x), copy.deepcopy(model).set_fused(False)(x))
    larger = CrossViT(model.config, num_classes=7, img_size=(72, 96), use_fused=True)
    load_checkpoint(larger, tmp_path / "model.safetensors")
    assert torch.equal(larger.norm[0].weight, model.norm[0].weight)
    with pytest.raises(ValueError, match="does not fit the model"):
        load_checkpoint(CrossViT(TINY, num_classes=7), model.state_dict())


def test_checkpoints_without_biases_of_qkv_but_the_embeddings(tmp_path) -> None:
    pytest.importorskip("safetensors")
    options = {"embed": "t2t", "t2t_layers": "performer", "num_blocks": 1, "img_size": 48}
    model = CrossViT(TINY, num_classes=7, qkv_bias=False, **options).eval()
    save_checkpoint(model, tmp_path / "model.safetensors")
    x = torch.randn(X)
    assert torch.equal(load_model(tmp_path / "model.safetensors").eval()(x), model(x))


@pytest.mark.parametrize("embed", ["conv", "t2t"])
def test_checkpoints_of_other_patch_sizes_are_refused(embed: str, tmp_path) -> None:
    pytest.importorskip("safetensors")
    save_checkpoint(CrossViT(TINY, num_classes=7, embed=embed), tmp_path / "model.safetensors")
    other = CrossViT(TINY, num_classes=7, embed=embed, patch_sizes=(16, 8))
    with pytest.raises(ValueError, match=r"patch_sizes: the checkpoint's is \(12, 16\)"):
        load_checkpoint(other, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": "pairwise"}, "fusion: the checkpoint's is 'class', the model's 'pairwise'"),
        ({"num_heads": (4, 2)}, r"num_heads: the checkpoint's is \(2, 2\), the model's \(4, 2\)"),
    ],
)
def test_what_shapes_do_not_show_is_refused(changes: dict, message: str, tmp_path) -> None:
    pytest.importorskip("safetensors")
    save_checkpoint(scheme("class"), tmp_path / "model.safetensors")
    other = scheme("class", **changes)
    before = other.norm[0].weight.clone()
    with pytest.raises(ValueError, match=message):
        load_checkpoint(other, tmp_path / "model.safetensors")
    assert torch.equal(other.norm[0].weight, before)


def test_descriptions_from_before_there_were_embeddings(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    model, path = scheme("l2 reread", embed="conv"), tmp_path / "model.safetensors"
    save_checkpoint(model, path)
    with safetensors.safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["crossvit"])
    new = ("embed", "fusion", "projections", "cls_token", "t2t_layers", "reread_patches")
    config = {key: v for key, v in description["config"].items() if key not in new}
    description |= {"config": {**config, "conv_stem": True}, "reread_patches": True}
    save_file(model.state_dict(), path, {"crossvit": json.dumps(description)})
    assert load_model(path).config == model.config


@pytest.mark.parametrize("name", SCHEMES)
def test_attention_maps(name: str) -> None:
    model = scheme(name, num_blocks=1)
    (maps,) = attention_maps(model, torch.randn(X))
    tokens = [model.num_prefix_tokens + h * w for h, w in model.grid_sizes]
    assert [maps.self_attention[b][0].shape[-1] for b in (0, 1)] == tokens
    if name == "all":
        keys = [[sum(tokens)], [sum(tokens)]]
    elif model.config.fusion == "cross":
        later = {"l2": [1], "l2 reread": None}.get(name, [])
        patches = [n - model.num_prefix_tokens for n in tokens]
        keys = [[1 + n, *([1 + n] if later is None else later)] for n in reversed(patches)]
    else:
        keys = [[], []]
    assert [[weights.shape[-1] for weights in of_branch] for of_branch in maps.fusion] == keys
    for weights in (*maps.fusion[0], *maps.fusion[1]):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_attention_maps_of_all_attention_are_those_of_each_cls() -> None:
    model = scheme("all", num_blocks=1).double().eval()
    x = torch.randn(X, dtype=torch.float64)
    block = model.blocks[0]
    small, large = (block.encode(b, branch) for b, branch in enumerate(model.embed(x)))
    y = torch.cat([block.projs[1](large.x), block.projs[0](small.x)], 1)
    v = block.fusion.attn.qkv(block.fusion.norm1(y))[..., 128:].unflatten(2, (2, 32))
    (maps,) = attention_maps(model, x)
    new = block.fuse_branches(small, large)
    for b, row in ((0, large.x.shape[1]), (1, 0)):
        pooled = torch.einsum("bhn,bnhd->bhd", maps.fusion[b][0], v).flatten(1)
        o = y[:, row] + block.fusion.attn.proj(pooled)
        torch.testing.assert_close(new[b].cls, block.revert_projs[b](o))


# Misfits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": "sum"}, "fusion: expected one of cross, none, all, .*, found 'sum'"),
        ({"embed": "linear"}, "embed: expected one of .*, found 'linear'"),
        ({"fusion": "all", "cross_depth": 2}, "cross_depth=2: .*fusion='all'"),
        ({"fusion": "none", "reread_patches": True}, "reread_patches=True: .*fusion='none'"),
        ({"fusion": "class", "projections": False}, "projections=False: .*fusion='class'"),
        ({"projections": False}, r"projections=False: .*dims=\(32, 64\)"),
        ({"fusion": "class", "cls_token": False}, "cls_token=False: .*fusion='class'"),
        ({"fusion": "pairwise", "cls_token": False}, "cls_token=False: .*fusion='pairwise'"),
        ({"fusion": "all", "cls_token": False}, "cls_token=False: .*fusion='all'"),
        ({"reread_patches": True}, "reread_patches=True: .*found cross_depth=1"),
        ({"num_classes": -1}, "num_classes: expected 0 or more, found -1"),
        ({"cross_depth": 0}, "cross_depth: expected more than 0, found 0"),
        ({"num_blocks": 0}, "num_blocks: expected more than 0, found 0"),
        ({"dims": (32, -64)}, r"dims: expected more than 0, found \(32, -64\)"),
        ({"patch_sizes": (0, 16)}, r"patch_sizes: expected more than 0, found \(0, 16\)"),
        ({"mlp_ratios": (0.0, 2.0)}, r"mlp_ratios: expected more than 0, found \(0.0, 2.0\)"),
        ({"depths": (-1, 2)}, r"depths: expected 0 or more, .*found \(-1, 2\)"),
        ({"depths": (0, 0)}, r"depths: .*not twice 0, found \(0, 0\)"),
    ],
)
def test_options_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossViT(TINY, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": ("a", "b")}, r"depths: expected integers, found \('a', 'b'\)"),
        ({"num_classes": 2.0}, "num_classes: expected an integer, found 2.0"),
        ({"depth": 3}, "unknown argument .depth.; did you mean depths"),
        ({"dims": (32,)}, r"dims: expected a pair, found \(32,\)"),
        ({"num_heads": 2}, "num_heads: expected a pair, found 2"),
        ({"patch_sizes": (12.0, 16.0)}, "patch_sizes: expected integers, found"),
        ({"num_blocks": 1.5}, "num_blocks: expected integers, found 1.5"),
        ({"mlp_ratios": ("3", 3)}, "mlp_ratios: expected numbers, found"),
    ],
)
def test_options_of_another_type(changes: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        CrossViT(TINY, **changes)


def test_backends_are_named() -> None:
    model = create_model("crossvit_small_all", img_size=48, use_fused=True, backend="cpu")
    assert model.blocks[0].fusion.backend == "cpu"
    assert isinstance(model.config, Config) and ck.backends()["reference"]

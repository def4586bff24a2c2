"""Patch embeddings: the dagger stem for other patch sizes, tokens-to-token modules."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from model_cases import TINY, compare, randomised
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from crossvit import CrossViT, count_macs, load_model, save_checkpoint
from crossvit.configs import stem_strides
from crossvit.embed import PatchEmbed
from crossvit.t2t import TokensToToken

X = (2, 3, 48, 48)
LAYERS = ("transformer", "performer")


@pytest.mark.parametrize(
    ("patch_size", "strides"),
    [
        (4, (4, 1, 1)), (6, (3, 2, 1)), (8, (4, 2, 1)), (12, (4, 3, 1)), (14, (7, 2, 1)),
        (16, (4, 2, 2)), (24, (4, 3, 2)), (32, (4, 4, 2)), (13, None),
    ],
)  # fmt: skip
def test_stems_of_other_patch_sizes(patch_size: int, strides: tuple[int, ...] | None) -> None:
    assert stem_strides(patch_size) == strides
    if strides is None:
        return
    size = (2 * patch_size, 3 * patch_size)
    for embed in (
        PatchEmbed(size, patch_size, 3, 16, conv_stem=True),
        TokensToToken(size, patch_size, 3, 16),
    ):
        assert embed.grid_size == (2, 3)
        assert embed(torch.randn(1, 3, *size)).shape == (1, 6, 16)
    convolutions = [layer for layer in embed.modules() if isinstance(layer, nn.Conv2d)]
    assert all(conv.kernel_size >= conv.stride for conv in convolutions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed": "conv", "patch_sizes": (11, 16)}, r"embed='conv': .*patch_sizes=\(11, 16\)"),
        ({"embed": "t2t", "patch_sizes": (12, 22)}, r"embed='t2t': .*patch_sizes=\(12, 22\)"),
        ({"embed": "conv", "dims": (30, 64)}, r"embed='conv': .*dims=\(30, 64\)"),
        ({"t2t_layers": "performer"}, "t2t_layers='performer': .*embed='patch'"),
        ({"t2t_layers": "linear"}, "t2t_layers: expected one of transformer, performer"),
    ],
)
def test_options_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossViT(TINY, **changes)


# Tokens-to-token


def plain_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """A token layer by T2T-ViT's equations."""
    q, k, v = layer.attn.qkv(layer.norm1(x)).split(64, dim=-1)
    if hasattr(layer.attn, "features"):
        w, m = layer.attn.features, len(layer.attn.features)
        q, k = (
            torch.exp(torch.einsum("bti,mi->btm", t, w) - (t * t).sum(-1, keepdim=True) / 2)
            / m**0.5
            for t in (q, k)
        )
        norm = torch.einsum("bti,bi->bt", q, k.sum(dim=1))[..., None]
        pooled = torch.einsum("btm,bsm,bsd->btd", q, k, v) / (norm + 1e-8)
    else:
        pooled = torch.softmax(q @ k.mT * x.shape[-1] ** -0.5, dim=-1) @ v
    x = v + layer.attn.proj(pooled)
    return x + layer.mlp(layer.norm2(x))


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(("patch_size", "strides"), [(16, (4, 2, 2)), (12, (4, 3, 1))])
def test_tokens_to_token(layers: str, patch_size: int, strides: tuple[int, int, int]) -> None:
    embed = randomised(TokensToToken((48, 96), patch_size, 3, 24, layers).double())
    x = torch.randn(2, 3, 48, 96, dtype=torch.float64)
    unfolded, (height, width) = x, (48, 96)
    for layer, kernel, padding, stride in (
        (embed.attention1, 7, 2, strides[0]),
        (embed.attention2, 3, 1, strides[1]),
    ):
        height, width = height // stride, width // stride
        tokens = F.unfold(unfolded, kernel, padding=padding, stride=stride).transpose(1, 2)
        tokens = plain_layer(layer, tokens)
        unfolded = tokens.transpose(1, 2).reshape(2, 64, height, width)
    expected = embed.project(F.unfold(unfolded, 3, padding=1, stride=strides[2]).transpose(1, 2))
    torch.testing.assert_close(embed(x), expected)
    for layer in (embed.attention1, embed.attention2):
        layer.backend = "reference"
    torch.testing.assert_close(embed(x), expected)


def t2t(layers: str, fused: bool = True, **changes: object) -> CrossViT:
    options = {"num_blocks": 1, "depths": (1, 1), "embed": "t2t", "t2t_layers": layers, **changes}
    return randomised(CrossViT(TINY, num_classes=7, use_fused=fused, **options))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("layers", LAYERS)
def test_fused_equals_eager(layers: str, autocast: bool) -> None:
    compare(t2t(layers), 48, autocast=autocast)


@pytest.mark.slow
@pytest.mark.parametrize("layers", LAYERS)
def test_in_torchs_tools(layers: str) -> None:
    model = t2t(layers).eval()
    assert {layer.backend for layer in (model.patch_embed[0].attention1, model.blocks[0])} == {None}
    x = torch.randn(X)
    expected = copy.deepcopy(model).set_fused(False)(x)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (x[:1].repeat(3, 1, 1, 1),), dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    per_image = torch.vmap(lambda image: model(image.unsqueeze(0))[0])(x)
    torch.testing.assert_close(per_image, expected, rtol=1e-5, atol=1e-5)
    assert model(x[:0]).shape == (0, 7)


@pytest.mark.parametrize("embed", ["conv", *LAYERS])
def test_macs_and_checkpoints(embed: str, tmp_path) -> None:
    pytest.importorskip("safetensors")
    changes = {"embed": "conv", "t2t_layers": "transformer"} if embed == "conv" else {}
    model = t2t("transformer" if embed == "conv" else embed, fused=False, **changes).eval()
    x = torch.randn(1, *X[1:])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        expected = model(x)
    assert 2 * count_macs(model) == counter.get_total_flops()
    save_checkpoint(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors").eval()
    assert loaded.config == model.config and torch.equal(loaded(x), expected)


@pytest.mark.parametrize("layers", ["transformer", "performer"])
def test_tokens_to_token_on_meta(layers: str) -> None:
    with torch.device("meta"):
        embed = TokensToToken((24, 36), 12, 3, 32, layers)
        assert embed(torch.empty(2, 3, 24, 36)).shape == (2, 6, 32)

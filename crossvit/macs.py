"""Multiply-accumulate operations: the "FLOPs" of the paper's tables."""

from __future__ import annotations

from typing import Any

from torch import nn

from crossvit.checkpoint_targets import unwrap
from crossvit.configs import Config
from crossvit.embed import PatchEmbed
from crossvit.t2t import TOKEN_DIM, PerformerAttention, TokensToToken
from crossvit.vit import VisionTransformer


def count_macs(model: nn.Module) -> int:
    """Count the multiply-accumulates of one image in eager mode, including attention's products.

    Counted as in the paper: with keys and values in the fusions, without LayerNorm, softmax, GELU
    and the resizing of images and tokens. The fused path needs fewer.

    Args:
        model: It may be wrapped as for ``load_checkpoint``.

    Raises:
        TypeError: The model is not one of this package.
    """
    return _count(unwrap(model))


def _count(model: Any) -> int:
    if isinstance(model, VisionTransformer):
        c, (height, width) = model.config.dim, model.grid_sizes[0]
        block = _transformer_block(1 + height * width, c, model.config.mlp_ratio)
        return _embedding(model.patch_embed) + model.config.depth * block + c * model.num_classes
    config = model.config
    tokens = [model.num_prefix_tokens + height * width for height, width in model.grid_sizes]
    macs = config.num_blocks * _FUSIONS[config.fusion](config, tokens)
    for b, (n, c) in enumerate(zip(tokens, config.dims, strict=True)):
        block = _transformer_block(n, c, config.mlp_ratios[b])
        macs += config.num_blocks * config.depths[b] * block
        macs += _embedding(model.patch_embed[b])
        macs += c * model.num_classes
    return macs


def _transformer_block(n: int, c: int, mlp_ratio: float) -> int:
    return _self_attention(n, c) + 2 * n * c * int(c * mlp_ratio)


def _self_attention(n: int, c: int) -> int:
    """Projections, scores and weighted sum of n tokens."""
    return 4 * n * c * c + 2 * n * n * c


def _no_fusion(config: Config, tokens: list[int]) -> int:
    return 0


def _all_attention(config: Config, tokens: list[int]) -> int:
    """f and g of all tokens of both branches, and their attention at the width of L."""
    c = config.dims[1]
    lifts = sum(2 * n * dim * c for n, dim in zip(tokens, config.dims, strict=True))
    return lifts + _self_attention(sum(tokens), c)


def _class_token(config: Config, tokens: list[int]) -> int:
    """f and g of the S branch, for its CLS."""
    return 2 * config.dims[0] * config.dims[1]


def _pairwise(config: Config, tokens: list[int]) -> int:
    """f and g of the S branch, for all of its tokens."""
    return 2 * tokens[0] * config.dims[0] * config.dims[1]


def _cross_attention(config: Config, tokens: list[int]) -> int:
    """f and g, and L times: q and output for one row, k and v for all, scores and weighted sum."""
    macs = 0
    for b in (0, 1):
        # The query's row and the other branch's patches.
        n, c = tokens[1 - b] + (0 if config.cls_token else 1), config.dims[1 - b]
        rows = [n] + [n if config.reread_patches else 1] * (config.cross_depth - 1)
        macs += 2 * config.dims[b] * c * config.projections
        macs += sum(2 * c * c + 2 * row * c * c + 2 * row * c for row in rows)
    return macs


_FUSIONS = {
    "none": _no_fusion,
    "all": _all_attention,
    "class": _class_token,
    "pairwise": _pairwise,
    "cross": _cross_attention,
}


def _embedding(embed: PatchEmbed | TokensToToken) -> int:
    height, width = embed.img_size
    if isinstance(embed, TokensToToken):
        return _tokens_to_token(embed)
    macs = 0
    for layer in embed.proj.modules():
        if isinstance(layer, nn.Conv2d):
            (kh, kw), (sh, sw) = layer.kernel_size, layer.stride
            ph, pw = (int(p) for p in layer.padding)
            height, width = (height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1
            macs += height * width * layer.out_channels * layer.in_channels * kh * kw
    return macs


def _tokens_to_token(embed: TokensToToken) -> int:
    (height, width), macs, d = embed.img_size, 0, TOKEN_DIM
    layers = (embed.attention1, embed.attention2)
    for split, layer in zip(embed.soft_splits, layers, strict=False):
        height, width = height // split.stride, width // split.stride
        n = height * width
        macs += n * (layer.attn.qkv.weight.numel() + 3 * d * d)  # and the output, the MLP
        if isinstance(layer.attn, PerformerAttention):
            m = len(layer.attn.features)
            macs += 4 * n * d * m + n * m  # features, both products, their norm
        else:
            macs += 2 * n * n * d
    return macs + embed.grid_size[0] * embed.grid_size[1] * embed.project.weight.numel()

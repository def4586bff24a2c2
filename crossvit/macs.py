"""Multiply-accumulate operations: the "FLOPs" of the paper's tables."""

from __future__ import annotations

from torch import nn

from crossvit.embed import PatchEmbed
from crossvit.model import CrossViT


def count_macs(model: CrossViT) -> int:
    """Count the multiply-accumulates of one image in eager mode, including attention's products.

    Counted as in the paper: with keys and values in the fusions, without LayerNorm, softmax, GELU
    and the resizing of the image. The fused path needs fewer.
    """
    config = model.config
    tokens = [1 + height * width for height, width in model.grid_sizes]
    macs = sum(_patch_embedding(model, b) for b in (0, 1))
    for b, (n, c) in enumerate(zip(tokens, config.dims, strict=True)):
        hidden = int(c * config.mlp_ratios[b])
        block = n * (4 * c * c + 2 * c * hidden) + 2 * n * n * c
        macs += config.num_blocks * config.depths[b] * block
        macs += config.num_blocks * _fusion(
            model, b, cls_dim=c, c=config.dims[1 - b], n=tokens[1 - b]
        )
        macs += c * model.num_classes
    return macs


def _fusion(model: CrossViT, b: int, cls_dim: int, c: int, n: int) -> int:
    """f and g, and L times: q and output for one row, k and v for n, scores and weighted sum."""
    reread = model.blocks[0].reread_patches
    rows = [n] + [n if reread else 1] * (model.config.cross_depth - 1)
    return 2 * cls_dim * c + sum(2 * c * c + 2 * row * c * c + 2 * row * c for row in rows)


def _patch_embedding(model: CrossViT, b: int) -> int:
    embed: PatchEmbed = model.patch_embed[b]
    height, width = embed.img_size
    macs = 0
    for layer in embed.proj.modules():
        if isinstance(layer, nn.Conv2d):
            (kh, kw), (sh, sw) = layer.kernel_size, layer.stride
            ph, pw = (int(p) for p in layer.padding)
            height, width = (height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1
            macs += height * width * layer.out_channels * layer.in_channels * kh * kw
    return macs

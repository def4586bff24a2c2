"""Attention weights of a CrossViT, for looking at them: what the fused path never forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from crossvit.fusion import Branch, MultiScaleBlock
from crossvit.model import CrossViT
from crossvit_kernels.modules import TransformerBlock


class BlockAttention(NamedTuple):
    """The attention weights of one multi-scale block, each row a distribution; pairs are (S, L).

    Rows and columns are in token order: the CLS, then patches row by row.
    """

    #: Of each transformer block of either branch, [B, h, 1 + N, 1 + N].
    self_attention: tuple[list[Tensor], list[Tensor]]
    #: Of each cross-attention block: a branch's CLS (column 0) over the other branch's patches,
    #: [B, h, 1 + N_other] at the other branch's h.
    fusion: tuple[list[Tensor], list[Tensor]]


@torch.no_grad()
def attention_maps(model: CrossViT, x: Tensor | Sequence[Tensor]) -> list[BlockAttention]:
    """Attention weights of all multi-scale blocks, as in evaluation mode.

    Args:
        model: In whichever mode; dropout and drop path are not applied.
        x: Images as ``CrossViT.forward`` takes them.

    Returns:
        One entry for each multi-scale block. ``model.grid_sizes`` tells how a branch's patches
        make an image: ``maps[-1].fusion[0][0][..., 1:].unflatten(-1, model.grid_sizes[1])`` is
        where the S branch's last fusion looks, [B, h, height, width].
    """
    training = model.training
    model.eval()
    try:
        branches = model.embed(x)
        maps = []
        for block in model.blocks:
            maps.append(_block_attention(block, *branches))
            branches = block(*branches)
        return maps
    finally:
        model.train(training)


def _block_attention(block: MultiScaleBlock, small: Branch, large: Branch) -> BlockAttention:
    self_attention: tuple[list[Tensor], list[Tensor]] = ([], [])
    encoded = []
    for b, branch in enumerate((small, large)):
        tokens = branch.tokens()
        for layer in block.blocks[b]:
            self_attention[b].append(_self_attention(layer, tokens))
            tokens = layer(tokens)
        encoded.append(Branch(tokens))
    fusion = tuple(
        _fusion_attention(block, b, encoded[b].cls, encoded[1 - b].patches) for b in (0, 1)
    )
    return BlockAttention(self_attention, (fusion[0], fusion[1]))


def _self_attention(layer: TransformerBlock, x: Tensor) -> Tensor:
    qkv = layer.attn.qkv(layer.norm1(x)).unflatten(-1, (3, layer.num_heads, -1))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


def _fusion_attention(block: MultiScaleBlock, b: int, cls: Tensor, patches: Tensor) -> list[Tensor]:
    weights: list[Tensor] = []
    block.cross_attend(b, block.projs[b](cls), patches, weights)
    return weights

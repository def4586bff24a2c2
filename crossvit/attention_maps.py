"""Attention weights of a CrossViT for inspection; the fused path never forms them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from crossvit.fusion import Branch, MultiScaleBlock
from crossvit.model import CrossViT
from crossvit_kernels.modules import TransformerBlock
from crossvit_kernels.modules.layers import attention_weights


class BlockAttention(NamedTuple):
    """Attention weights of one multi-scale block, each row a distribution; pairs are (S, L).

    Rows and columns are in token order: the CLS, then patches row by row.
    """

    #: Of each transformer block of either branch, [B, h, 1 + N, 1 + N].
    self_attention: tuple[list[Tensor], list[Tensor]]
    #: Of each cross-attention block: a branch's CLS (column 0) over the other branch's patches,
    #: [B, h, 1 + N_other] at the other branch's h.
    fusion: tuple[list[Tensor], list[Tensor]]


@torch.no_grad()
def attention_maps(model: CrossViT, x: Tensor | Sequence[Tensor]) -> list[BlockAttention]:
    """Return the attention weights of all multi-scale blocks, as in evaluation mode.

    Args:
        model: In either mode; dropout and drop path are not applied. Layers, and so their
            hooks, are called more often than in ``forward``.
        x: Images as ``CrossViT.forward`` takes them.

    Returns:
        One entry for each multi-scale block. ``model.grid_sizes`` gives the layout of a
        branch's patches: ``maps[-1].fusion[0][0][..., 1:].unflatten(-1, model.grid_sizes[1])`` is
        where the S branch's last fusion looks, [B, h, height, width].
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        branches = model.embed(x)
        maps = []
        for block in model.blocks:
            maps.append(_block_attention(block, *branches))
            branches = block(*branches)
        return maps
    finally:
        for module, training in modes:  # frozen layers may differ from the model
            module.training = training


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
        block.cross_attention_weights(b, encoded[b].cls, encoded[1 - b].patches) for b in (0, 1)
    )
    return BlockAttention(self_attention, (fusion[0], fusion[1]))


def _self_attention(layer: TransformerBlock, x: Tensor) -> Tensor:
    attn = layer.attn
    q, k, _ = attn.qkv(layer.norm1(x)).chunk(3, dim=-1)
    return attention_weights(q, k, attn.num_heads, attn.scale)

"""Attention weights of a CrossViT for inspection; the fused path never forms them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crossvit.checkpoint_targets import unwrap
from crossvit.fusion import Branch, MultiScaleBlock
from crossvit.model import CrossViT
from crossvit_kernels.modules.layers import self_attention_weights


class BlockAttention(NamedTuple):
    """Attention weights of one multi-scale block, each row a distribution; pairs are (S, L).

    Rows and columns are in token order: the CLS, then patches row by row. Without CLS tokens,
    self-attention has patches only; in the fusions the query is their mean.
    """

    #: Of each transformer block of either branch, [B, h, 1 + N, 1 + N].
    self_attention: tuple[list[Tensor], list[Tensor]]
    #: Of each cross-attention block: a branch's CLS (column 0) over the other branch's patches,
    #: [B, h, 1 + N_other] at the other branch's h. All-attention: its CLS over the tokens of L and
    #: then those of S, [B, h, (1 + N_L) + (1 + N_S)]. Other fusions have no attention.
    fusion: tuple[list[Tensor], list[Tensor]]


@torch.no_grad()
def attention_maps(model: nn.Module, x: Tensor | Sequence[Tensor]) -> list[BlockAttention]:
    """Return the attention weights of all multi-scale blocks, as in evaluation mode.

    Args:
        model: A CrossViT, which may be wrapped as for ``load_checkpoint``, in either mode; dropout
            and drop path are not applied. Layers, and so their hooks, are called more often than
            in ``forward``.
        x: Images as ``CrossViT.forward`` takes them.

    Returns:
        One entry for each multi-scale block. ``model.grid_sizes_of(x)`` has the layout of each
        branch's patches: with ``grids`` so, where the S branch's last fusion looks is
        ``maps[-1].fusion[0][0][..., 1:].unflatten(-1, grids[1])``, [B, h, height, width].

    Raises:
        TypeError: The model is a VisionTransformer, or none of this package.
    """
    core = unwrap(model)
    if not isinstance(core, CrossViT):
        raise TypeError(
            "model: expected a CrossViT, found a VisionTransformer, which has no fusions"
        )
    modes = [(module, module.training) for module in core.modules()]
    core.eval()
    try:
        branches = core.embed(x)
        maps = []
        for block in core.blocks:
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
            self_attention[b].append(self_attention_weights(layer, tokens))
            tokens = layer(tokens)
        encoded.append(branch.with_tokens(tokens))
    return BlockAttention(self_attention, block.fusion_attention(*encoded))

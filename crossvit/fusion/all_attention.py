"""All-attention fusion (Eq. 2): all tokens of both branches attend to each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crossvit.backbone import EPS
from crossvit.configs import Config
from crossvit.fusion.block import MultiScaleBlock
from crossvit.fusion.branch import Branch
from crossvit_kernels.modules import SelfAttentionBlock
from crossvit_kernels.modules.layers import lift, self_attention_weights


class AllAttentionBlock(MultiScaleBlock):
    """A multi-scale block with all-attention fusion, at the width and heads of the L branch.

    ``y = [f_l(x_l) || f_s(x_s)], o = y + MSA(LN(y)), z_i = g_i(o_i)``, as printed: z has no
    residual. The attention runs on ``layernorm_msa``. The paper's parameters (27.7 M for
    CrossViT-S) are 0.9 M more than these, which is two more linear layers of the L branch's width
    per block; its FLOPs are those of this module. The arguments are those of ``MultiScaleBlock``.
    """

    fusion: Any

    def __init__(
        self,
        config: Config,
        drop_paths: list[float],
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__(config, drop_paths, qkv_bias, attn_drop)
        large = config.dims[1]
        self.projs = nn.ModuleList(lift(dim, large, EPS) for dim in config.dims)
        self.fusion = SelfAttentionBlock(
            large, config.num_heads[1], qkv_bias, EPS, attn_drop, drop_paths[-1]
        )
        self.revert_projs = nn.ModuleList(lift(large, dim, EPS) for dim in config.dims)

    def fuse_branches(self, small: Branch, large: Branch) -> tuple[Branch, Branch]:
        o = self.fusion(self._joined(small, large))
        num_large = large.x.shape[1]
        return (
            small.with_tokens(self.revert_projs[0](o[:, num_large:])),
            large.with_tokens(self.revert_projs[1](o[:, :num_large])),
        )

    def _joined(self, small: Branch, large: Branch) -> Tensor:
        """All tokens at the L branch's width, [B, (1 + N_L) + (1 + N_S), C_L]."""
        return torch.cat([self.projs[1](large.tokens()), self.projs[0](small.tokens())], dim=1)

    def fusion_attention(self, small: Branch, large: Branch) -> tuple[list[Tensor], list[Tensor]]:
        """Attention weights of each branch's CLS over the L branch's tokens, then the S branch's.

        Returns:
            One tensor for each branch (S, L), [B, h, (1 + N_L) + (1 + N_S)].
        """
        weights = self_attention_weights(self.fusion, self._joined(small, large))
        return [weights[:, :, large.x.shape[1]]], [weights[:, :, 0]]

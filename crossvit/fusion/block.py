"""The multi-scale transformer encoder (Figure 2), without its fusion."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from crossvit.backbone import EPS
from crossvit.configs import Config
from crossvit.fusion.branch import Branch
from crossvit_kernels.graphs import side_by_side
from crossvit_kernels.modules import TransformerBlock, plain_layers

_FIRST_BLOCK = plain_layers.layers({"0": TransformerBlock})


class MultiScaleBlock(nn.Module):
    """One multi-scale encoder: the transformer blocks of both branches, then their fusion.

    A subclass is a fusion scheme. It names f ``projs`` and g ``revert_projs``, as timm does, and
    indexes them by branch.

    Args:
        config: The architecture.
        drop_paths: A rate for each transformer block of the deeper branch, and L more if L > 1;
            fusions use the last.
        qkv_bias: Whether query, key and value projections have biases.
        attn_drop: Attention dropout.
    """

    blocks: Any  # ModuleLists, indexed by branch
    projs: Any
    revert_projs: Any

    def __init__(
        self,
        config: Config,
        drop_paths: list[float],
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.backend: str | None = None
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                TransformerBlock(
                    config.dims[b],
                    config.num_heads[b],
                    mlp_ratio=config.mlp_ratios[b],
                    qkv_bias=qkv_bias,
                    eps=EPS,
                    attn_drop=attn_drop,
                    drop_path=drop_paths[i],
                )
                for i in range(config.depths[b])
            )
            for b in (0, 1)
        )

    def forward(self, small: Branch, large: Branch) -> tuple[Branch, Branch]:
        """Return the branches after one multi-scale block."""
        small, large = side_by_side(
            lambda: self.encode(0, small), lambda: self.encode(1, large), like=small.x
        )
        return self.fuse_branches(small, large)

    def encode(self, b: int, branch: Branch) -> Branch:
        """Apply the transformer blocks of branch b (Eq. 1)."""
        x, new_cls = branch.x, branch.new_cls
        if new_cls is not None:
            # Hooks, and modules that replace the block, get plain tokens.
            _, reason = plain_layers.find(self.blocks[b]._modules, _FIRST_BLOCK)
            if reason is not None:
                x, new_cls = branch.tokens(), None
        for block in self.blocks[b]:
            x, new_cls = block(x) if new_cls is None else block(x, new_cls), None
        return branch.with_tokens(x, new_cls)

    def fuse_branches(self, small: Branch, large: Branch) -> tuple[Branch, Branch]:
        """Return the encoded branches after their fusion; both are read as before it."""
        raise NotImplementedError

    def fusion_attention(self, small: Branch, large: Branch) -> tuple[list[Tensor], list[Tensor]]:
        """Attention weights of each branch's CLS in each attention of the fusion, [B, h, keys]."""
        return [], []


class UnfusedBlock(MultiScaleBlock):
    """No fusion: the branches meet only in the mean of their logits (Table 6, "None")."""

    def fuse_branches(self, small: Branch, large: Branch) -> tuple[Branch, Branch]:
        return small, large

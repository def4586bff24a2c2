"""Cross-attention fusion and the multi-scale block (the paper's section 3.3, Figures 2 and 4).

A branch is its tokens x [B, 1 + N, C] and, after a fusion, a new CLS that stands in for row 0 of x,
which saves a copy of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import crossvit_kernels as ck
from crossvit.configs import Config
from crossvit_kernels.graphs import side_by_side
from crossvit_kernels.modules import CrossAttentionBlock, TransformerBlock, plain_layers
from crossvit_kernels.modules.base import calls_layers
from crossvit_kernels.modules.fusion import (
    FusionLayers,
    attend_to_patches,
    block_drop_path,
    fuse_layer_by_layer,
)
from crossvit_kernels.modules.layers import attention_weights, lift

EPS = 1e-6  # of every LayerNorm

_FIRST_BLOCK = plain_layers.layers({"0": TransformerBlock})


class Branch(NamedTuple):
    """The tokens of a branch; ``new_cls``, if any, stands in for row 0."""

    x: Tensor  # [B, 1 + N, C]
    new_cls: Tensor | None = None  # [B, C]

    @property
    def cls(self) -> Tensor:
        """[B, C]."""
        return self.x[:, 0] if self.new_cls is None else self.new_cls

    @property
    def patches(self) -> Tensor:
        """[B, N, C], a view."""
        return self.x[:, 1:]

    def tokens(self) -> Tensor:
        """[B, 1 + N, C] in one tensor; a copy if there is a new CLS."""
        if self.new_cls is None:
            return self.x
        return torch.cat([self.new_cls.unsqueeze(1), self.patches], dim=1)


class MultiScaleBlock(nn.Module):
    """One multi-scale transformer encoder: both branches' blocks, then both fusions (Figure 2).

    Args:
        config: The architecture.
        drop_paths: A rate for each transformer block of the deeper branch, and L more if L > 1;
            fusions use the last.
        qkv_bias: Whether query, key and value projections have biases.
        attn_drop: Attention dropout.
        reread_patches: With L > 1, whether every cross-attention block reads the patches. In the
            released code the later blocks see only the CLS.
    """

    blocks: Any  # ModuleLists like the next three, indexed by branch
    projs: Any  # f
    fusion: Any
    revert_projs: Any  # g

    def __init__(
        self,
        config: Config,
        drop_paths: list[float],
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        reread_patches: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.cross_depth, self.reread_patches = config.cross_depth, reread_patches
        self.backend: str | None = None
        dims = config.dims
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                TransformerBlock(
                    dims[b],
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
        # Fusion b updates branch b's CLS and runs at the width of the other branch.
        self.projs = nn.ModuleList(lift(dims[b], dims[1 - b], EPS) for b in (0, 1))
        self.fusion = nn.ModuleList(
            self._cross_attention(
                dims[1 - b], self.num_heads[1 - b], qkv_bias, attn_drop, drop_paths[-1]
            )
            for b in (0, 1)
        )
        self.revert_projs = nn.ModuleList(lift(dims[1 - b], dims[b], EPS) for b in (0, 1))

    def _cross_attention(self, dim: int, num_heads: int, qkv_bias: bool, *rates: float) -> Any:
        blocks = [
            CrossAttentionBlock(dim, num_heads, qkv_bias, EPS, *rates)
            for _ in range(self.cross_depth)
        ]
        if self.cross_depth == 1:  # no index in released checkpoints
            return blocks[0]
        return nn.Sequential(*blocks)

    @property
    def drop_path(self) -> float:
        """Drop path rate of the fusions."""
        return float(self._cross_attention_blocks()[0].drop_path)

    @drop_path.setter
    def drop_path(self, rate: float) -> None:
        for block in self._cross_attention_blocks():
            block.drop_path = rate

    @property
    def attn_drop(self) -> float:
        """Attention dropout rate of the fusions."""
        return float(self._cross_attention_blocks()[0].attn.attn_drop)

    @attn_drop.setter
    def attn_drop(self, rate: float) -> None:
        for block in self._cross_attention_blocks():
            block.attn.attn_drop = rate

    def _cross_attention_blocks(self) -> list[Any]:
        if self.cross_depth == 1:
            return list(self.fusion)
        return [block for blocks in self.fusion for block in blocks]

    def forward(self, small: Branch, large: Branch) -> tuple[Branch, Branch]:
        """Return the branches after one multi-scale block, each with a new CLS."""
        small, large = side_by_side(
            lambda: self.encode(0, small), lambda: self.encode(1, large), like=small.x
        )
        # Both fusions read the branches from before fusion.
        inputs = (small.cls, large.patches), (large.cls, small.patches)
        first, second = (self._fused_inputs(b, *inputs[b]) for b in (0, 1))
        if first is not None and second is not None and first.options == second.options:
            new: Sequence[Tensor] = ck.cross_attention_fusion_pair(
                first.inputs, second.inputs, backend=self.backend, **first.options
            )
        else:
            new = side_by_side(
                lambda: self._fuse(0, *inputs[0], first),
                lambda: self._fuse(1, *inputs[1], second),
                like=small.x,
            )
        return Branch(small.x, new[0]), Branch(large.x, new[1])

    def encode(self, b: int, branch: Branch) -> Branch:
        """Apply the transformer blocks of branch b (Eq. 1)."""
        x, new_cls = branch
        if new_cls is not None:
            # Hooks, and modules that replace the block, get plain tokens.
            _, reason = plain_layers.find(self.blocks[b]._modules, _FIRST_BLOCK)
            if reason is not None:
                x, new_cls = branch.tokens(), None
        for block in self.blocks[b]:
            x, new_cls = block(x) if new_cls is None else block(x, new_cls), None
        return Branch(x, new_cls)

    def fuse(self, b: int, cls: Tensor, patches: Tensor) -> Tensor:
        """Compute branch b's new CLS from its CLS [B, C] and the other's patches (Eq. 5-7)."""
        return self._fuse(b, cls, patches, self._fused_inputs(b, cls, patches))

    def _fuse(self, b: int, cls: Tensor, patches: Tensor, fused: _FusedCall | None) -> Tensor:
        if fused is not None:
            options = {**fused.inputs._asdict(), **fused.options}
            return ck.cross_attention_fusion(**options, backend=self.backend)
        if self.cross_depth > 1:
            return self._fuse_repeatedly(b, cls, patches)
        return fuse_layer_by_layer(cls, patches, *self._parts(b).values())

    def _parts(self, b: int) -> dict[str, nn.Module]:
        return {
            "proj": self.projs[b],
            "fusion": self.fusion[b],
            "revert_proj": self.revert_projs[b],
        }

    def _fused_inputs(self, b: int, cls: Tensor, patches: Tensor) -> _FusedCall | None:
        """The inputs of the fused operation for branch b; None if layers must be called."""
        if self.cross_depth > 1:
            return None
        modules = self._parts(b)
        layers = FusionLayers.find(modules, read=self.backend != "reference")
        reason = layers.reason and f"fusion of branch {b}: {layers.reason}"
        if calls_layers(self, self.backend, reason):
            return None
        assert layers.weights is not None
        scale = block_drop_path(self.fusion[b], cls)
        return _FusedCall(
            ck.FusionInputs(cls, patches, layers.weights, layers.num_heads, scale),
            {"eps": layers.eps, "dropout_p": layers.dropout_p},
        )

    def _fuse_repeatedly(self, b: int, cls: Tensor, patches: Tensor) -> Tensor:
        """L > 1: several cross-attentions between one f and one g."""
        y, blocks = self.projs[b](cls).unsqueeze(1), self.fusion[b]
        if not self.reread_patches and plain_layers.why_not_plain(
            blocks, nn.Sequential, self.cross_depth
        ):
            y, blocks = blocks(torch.cat([y, patches], dim=1)), ()
        for index, block in enumerate(blocks):
            y = attend_to_patches(y, self._patches_seen(index, patches), block, self.backend)
        new_cls: Tensor = self.revert_projs[b](y[:, 0])
        return new_cls

    def _patches_seen(self, index: int, patches: Tensor) -> Tensor:
        """The patches that cross-attention block ``index`` reads."""
        return patches if index == 0 or self.reread_patches else patches[:, :0]

    def cross_attention_weights(self, b: int, cls: Tensor, patches: Tensor) -> list[Tensor]:
        """Attention weights of branch b's CLS [B, C] in each cross-attention, [B, h, 1 + N]."""
        y = self.projs[b](cls).unsqueeze(1)
        blocks = [self.fusion[b]] if self.cross_depth == 1 else list(self.fusion[b])
        maps = []
        for index, block in enumerate(blocks):
            tokens = torch.cat([y, self._patches_seen(index, patches)], dim=1)
            normed, attn = block.norm1(tokens), block.attn
            q, k = attn.wq(normed[:, :1]), attn.wk(normed)
            weights = attention_weights(q, k, attn.num_heads, attn.scale)
            maps.append(weights[:, :, 0])
            if index + 1 < len(blocks):
                y = block(tokens)
        return maps


class _FusedCall(NamedTuple):
    inputs: ck.FusionInputs
    options: dict[str, Any]

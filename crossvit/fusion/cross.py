"""Cross-attention fusion (Eq. 5-7, Figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import crossvit_kernels as ck
from crossvit.backbone import EPS
from crossvit.configs import Config
from crossvit.fusion.block import MultiScaleBlock
from crossvit.fusion.branch import Branch
from crossvit_kernels.graphs import side_by_side
from crossvit_kernels.modules import CrossAttentionBlock, plain_layers
from crossvit_kernels.modules.base import calls_layers
from crossvit_kernels.modules.fusion import (
    FusionLayers,
    attend_to_patches,
    block_drop_path,
    fuse_layer_by_layer,
)
from crossvit_kernels.modules.layers import attention_weights, lift


class CrossFusionBlock(MultiScaleBlock):
    """A multi-scale block with cross-attention fusion: each CLS reads the other branch's patches.

    Without CLS tokens the query is the mean of the branch's own patches, and the result is added to
    each of them (``Branch``). A fused operation computes each cross-attention, the first with f and
    the last with g. The arguments are those of ``MultiScaleBlock``.
    """

    fusion: Any  # a ModuleList, indexed by branch

    def __init__(
        self,
        config: Config,
        drop_paths: list[float],
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__(config, drop_paths, qkv_bias, attn_drop)
        self.num_heads = config.num_heads
        self.cross_depth, self.reread_patches = config.cross_depth, config.reread_patches
        dims = config.dims

        def project(dim_in: int, dim_out: int) -> nn.Module:
            return lift(dim_in, dim_out, EPS) if config.projections else nn.Identity()

        # Fusion b updates branch b's CLS and runs at the width of the other branch.
        self.projs = nn.ModuleList(project(dims[b], dims[1 - b]) for b in (0, 1))
        self.fusion = nn.ModuleList(
            self._cross_attention(
                dims[1 - b], self.num_heads[1 - b], qkv_bias, attn_drop, drop_paths[-1]
            )
            for b in (0, 1)
        )
        self.revert_projs = nn.ModuleList(project(dims[1 - b], dims[b]) for b in (0, 1))

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
        return [block for b in (0, 1) for block in self._blocks_of(b)]

    def _blocks_of(self, b: int) -> list[Any]:
        """The cross-attention blocks of branch b."""
        return [self.fusion[b]] if self.cross_depth == 1 else list(self.fusion[b])

    def fuse_branches(self, small: Branch, large: Branch) -> tuple[Branch, Branch]:
        inputs = (small.cls, large.patches), (large.cls, small.patches)
        first, second = (self._fused_calls(b, *inputs[b]) for b in (0, 1))
        if first is not None and second is not None and _options(first) == _options(second):
            new: Sequence[Tensor] = (small.cls, large.cls)
            for one, other in zip(first, second, strict=True):
                new = ck.cross_attention_fusion_pair(
                    one.inputs._replace(cls=new[0]),
                    other.inputs._replace(cls=new[1]),
                    backend=self.backend,
                    **one.options,
                )
        else:
            new = side_by_side(
                lambda: self._fuse(0, *inputs[0], first),
                lambda: self._fuse(1, *inputs[1], second),
                like=small.x,
            )
        return small.with_cls(new[0]), large.with_cls(new[1])

    def fuse(self, b: int, cls: Tensor, patches: Tensor) -> Tensor:
        """Compute branch b's new CLS from its CLS [B, C] and the other's patches (Eq. 5-7)."""
        return self._fuse(b, cls, patches, self._fused_calls(b, cls, patches))

    def _fuse(self, b: int, cls: Tensor, patches: Tensor, fused: list[_FusedCall] | None) -> Tensor:
        if fused is not None:
            for call in fused:
                options = {**call.inputs._asdict(), **call.options, "cls": cls}
                cls = ck.cross_attention_fusion(**options, backend=self.backend)
            return cls
        if self.cross_depth > 1:
            return self._fuse_in_steps(b, cls, patches)
        return fuse_layer_by_layer(cls, patches, *self._parts(b)[0].values())

    def _parts(self, b: int) -> list[dict[str, nn.Module]]:
        """f, cross-attention and g of each operation; the identity where another has f or g."""
        blocks, f, g = self._blocks_of(b), self.projs[b], self.revert_projs[b]
        last = len(blocks) - 1
        return [
            {
                "proj": _IDENTITY if index else f,
                "fusion": block,
                "revert_proj": g if index == last else _IDENTITY,
            }
            for index, block in enumerate(blocks)
        ]

    def _why_not_blocks(self, b: int) -> str | None:
        """Why the cross-attention blocks cannot be taken from their Sequential, or None."""
        if self.cross_depth == 1:
            return None
        return plain_layers.why_not_plain(self.fusion[b], nn.Sequential, self.cross_depth)

    def _fused_calls(self, b: int, cls: Tensor, patches: Tensor) -> list[_FusedCall] | None:
        """The operations of branch b, for its first CLS; None if layers must be called."""
        if (reason := self._why_not_blocks(b)) is not None:
            calls_layers(self, self.backend, f"fusion of branch {b}: it {reason}")
            return None
        calls = []
        for index, modules in enumerate(self._parts(b)):
            layers = FusionLayers.find(modules, read=self.backend != "reference")
            reason = layers.reason and f"fusion of branch {b}: {layers.reason}"
            if calls_layers(self, self.backend, reason):
                return None
            assert layers.weights is not None
            tokens = self._patches_seen(index, patches)
            inputs = ck.FusionInputs(cls, tokens, layers.weights, layers.num_heads)
            calls.append(_FusedCall(inputs, {"eps": layers.eps, "dropout_p": layers.dropout_p}))
        for index, block in enumerate(self._blocks_of(b)):
            if (scale := block_drop_path(block, cls)) is not None:
                inputs = calls[index].inputs._replace(residual_scale=scale)
                calls[index] = calls[index]._replace(inputs=inputs)
        return calls

    def _fuse_in_steps(self, b: int, cls: Tensor, patches: Tensor) -> Tensor:
        """f, each cross-attention, g."""
        y, blocks = self.projs[b](cls).unsqueeze(1), self.fusion[b]
        if not self.reread_patches and self._why_not_blocks(b):
            y, blocks = blocks(torch.cat([y, patches], dim=1)), ()
        for index, block in enumerate(blocks):
            y = attend_to_patches(y, self._patches_seen(index, patches), block, self.backend)
        new_cls: Tensor = self.revert_projs[b](y[:, 0])
        return new_cls

    def _patches_seen(self, index: int, patches: Tensor) -> Tensor:
        """The patches that cross-attention block ``index`` reads."""
        return patches if index == 0 or self.reread_patches else patches[:, :0]

    def fusion_attention(self, small: Branch, large: Branch) -> tuple[list[Tensor], list[Tensor]]:
        """Attention weights of each branch's query in each cross-attention, [B, h, 1 + N]."""
        return (
            self._cross_attention_weights(0, small.cls, large.patches),
            self._cross_attention_weights(1, large.cls, small.patches),
        )

    def _cross_attention_weights(self, b: int, cls: Tensor, patches: Tensor) -> list[Tensor]:
        y = self.projs[b](cls).unsqueeze(1)
        blocks = self._blocks_of(b)
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


_IDENTITY = nn.Identity()


def _options(calls: list[_FusedCall]) -> list[dict[str, Any]]:
    return [call.options for call in calls]

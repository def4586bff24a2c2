"""Cross-attention fusion and the multi-scale block (the paper's section 3.3, Figures 2 and 4).

A branch is a pair of its tokens x [B, 1 + N, C] and its CLS: where a fusion has made a new CLS,
that stands in for row 0 of x, and x is not copied to hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import crossvit_kernels as ck
from crossvit.configs import Config
from crossvit_kernels.graphs import side_by_side
from crossvit_kernels.modules import TransformerBlock, drop_path_scale

EPS = 1e-6  # of every LayerNorm


class Branch(NamedTuple):
    """The tokens of a branch; ``new_cls``, where there is one, stands in for row 0."""

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
        """[B, 1 + N, C] in one tensor, which costs a copy where there is a new CLS."""
        if self.new_cls is None:
            return self.x
        return torch.cat([self.new_cls.unsqueeze(1), self.patches], dim=1)


class CrossAttention(nn.Module):
    """The projections of Eq. 6."""

    def __init__(self, dim: int, qkv_bias: bool) -> None:
        super().__init__()
        self.wq = nn.Linear(dim, dim, bias=qkv_bias)
        self.wk = nn.Linear(dim, dim, bias=qkv_bias)
        self.wv = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)


class CrossAttentionBlock(nn.Module):
    """LayerNorm and cross-attention: the parameters of the update in Eq. 7."""

    def __init__(self, dim: int, qkv_bias: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = CrossAttention(dim, qkv_bias)

    def parts(self) -> list[Any]:
        """Weight and bias of LayerNorm, W_q, W_k, W_v and the output projection."""
        a = self.attn
        layers = (self.norm1, a.wq, a.wk, a.wv, a.proj)
        return [t for layer in layers for t in (layer.weight, layer.bias)]


def projection(dim_in: int, dim_out: int) -> nn.Sequential:
    """f or g: LayerNorm -> GELU -> Linear."""
    return nn.Sequential(nn.LayerNorm(dim_in, eps=EPS), nn.GELU(), nn.Linear(dim_in, dim_out))


class MultiScaleBlock(nn.Module):
    """One multi-scale transformer encoder: both branches' blocks, then both fusions (Figure 2).

    Args:
        config: The architecture.
        drop_paths: A rate for each transformer block of the deeper branch, and L more where
            L > 1; fusions take the last.
        qkv_bias: Whether query, key and value projections have biases.
        attn_drop: Attention dropout.
        reread_patches: With L > 1, whether every cross-attention block reads the patches. The
            released code's later blocks see the CLS alone.
    """

    blocks: Any  # ModuleLists, as are the next three: branch b's at index b
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
        self.num_heads, self.attn_drop, self.drop_path = config.num_heads, attn_drop, drop_paths[-1]
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
        # Fusion b belongs to branch b's CLS and runs at the width of the other branch.
        self.projs = nn.ModuleList(projection(dims[b], dims[1 - b]) for b in (0, 1))
        self.fusion = nn.ModuleList(self._cross_attention(dims[1 - b], qkv_bias) for b in (0, 1))
        self.revert_projs = nn.ModuleList(projection(dims[1 - b], dims[b]) for b in (0, 1))

    def _cross_attention(self, dim: int, qkv_bias: bool) -> nn.Module:
        if self.cross_depth == 1:  # released checkpoints have no index here
            return CrossAttentionBlock(dim, qkv_bias)
        return nn.Sequential(*(CrossAttentionBlock(dim, qkv_bias) for _ in range(self.cross_depth)))

    def forward(self, small: Branch, large: Branch) -> tuple[Branch, Branch]:
        """The branches after one multi-scale block, each with a new CLS."""
        small, large = side_by_side(
            lambda: self.encode(0, small), lambda: self.encode(1, large), like=small.x
        )
        # Both fusions read what was there before fusion.
        inputs = (small.cls, large.patches), (large.cls, small.patches)
        if self.cross_depth == 1:
            first, second = (self._inputs(b, *inputs[b]) for b in (0, 1))
            new: Sequence[Tensor] = ck.cross_attention_fusion_pair(first, second, **self._options())
        else:
            fusions = (lambda: self.fuse(0, *inputs[0])), (lambda: self.fuse(1, *inputs[1]))
            new = side_by_side(*fusions, like=small.x)
        return Branch(small.x, new[0]), Branch(large.x, new[1])

    def encode(self, b: int, branch: Branch) -> Branch:
        """The transformer blocks of branch b (Eq. 1)."""
        x, new_cls = branch
        for block in self.blocks[b]:
            x, new_cls = block(x, new_cls), None
        return Branch(x, new_cls)

    def fuse(self, b: int, cls: Tensor, patches: Tensor) -> Tensor:
        """The new CLS of branch b from its CLS [B, C] and the other branch's patches (Eq. 5-7)."""
        if self.cross_depth > 1:
            return self._fuse_repeatedly(b, cls, patches)
        inputs = self._inputs(b, cls, patches)._asdict()
        return ck.cross_attention_fusion(**inputs, **self._options())

    def _inputs(self, b: int, cls: Tensor, patches: Tensor) -> ck.FusionInputs:
        f, g = self.projs[b], self.revert_projs[b]
        before, after = (
            [t for layer in (p[0], p[2]) for t in (layer.weight, layer.bias)] for p in (f, g)
        )
        return ck.FusionInputs(
            cls,
            patches,
            ck.FusionWeights(*before, *self.fusion[b].parts(), *after),
            self.num_heads[1 - b],
            drop_path_scale(len(cls), self.drop_path, self.training, like=cls),
        )

    def _options(self) -> dict[str, Any]:
        dropout_p = self.attn_drop if self.training else 0.0
        return {"eps": EPS, "dropout_p": dropout_p, "backend": self.backend}

    def _fuse_repeatedly(self, b: int, cls: Tensor, patches: Tensor) -> Tensor:
        """L > 1: cross-attention after cross-attention between one f and one g."""
        new_cls: Tensor = self.revert_projs[b](self.cross_attend(b, self.projs[b](cls), patches))
        return new_cls

    def cross_attend(
        self, b: int, y: Tensor, patches: Tensor, attention: list[Tensor] | None = None
    ) -> Tensor:
        """Y + CA(LN([y || patches])) (Eq. 7), L times: y [B, C] is f of branch b's CLS.

        Attention weights [B, h, 1 + N] are appended to ``attention``, if given.
        """
        y = y.unsqueeze(1)
        cross_attentions = [self.fusion[b]] if self.cross_depth == 1 else self.fusion[b]
        for index, block in enumerate(cross_attentions):
            norm_weight, norm_bias, *projections = block.parts()
            update: Any = ck.attention_pool(
                y,
                patches if index == 0 or self.reread_patches else patches[:, :0],
                *projections,
                num_heads=self.num_heads[1 - b],
                include_query=True,
                query_norm=(norm_weight, norm_bias),
                token_norm=(norm_weight, norm_bias),
                norm_eps=EPS,
                dropout_p=self.attn_drop if self.training else 0.0,
                return_weights=attention is not None,
                backend=self.backend,
            )
            if attention is not None:
                update, weights = update
                attention.append(weights[:, 0])
            scale = drop_path_scale(len(y), self.drop_path, self.training, like=y)
            y = y + (update if scale is None else update * scale.view(-1, 1, 1))
        return y[:, 0]

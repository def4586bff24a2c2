"""Tokens-to-token embedding (T2T-ViT, ICCV 2021) for a branch of a CrossViT (section 4.3).

    soft split, token layer, soft split, token layer, soft split, linear projection

A soft split makes a token of all pixels, or tokens, of an overlapping window. Names of parameters
are T2T-ViT's, with timm's for the layers of a block.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossvit.configs import Size, stem_strides
from crossvit_kernels.modules import plain_layers
from crossvit_kernels.modules.blocks import FeedForwardHalf
from crossvit_kernels.modules.layers import Mlp, attend

TOKEN_DIM = 64
_EPS = 1e-5  # of T2T-ViT's LayerNorms here, unlike those of the blocks


class SoftSplit(NamedTuple):
    """Windows that become tokens."""

    kernel_size: int
    stride: int
    padding: int

    def __call__(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to tokens [B, (H / stride) (W / stride), C kernel_size^2]."""
        return F.unfold(x, self.kernel_size, 1, self.padding, self.stride).transpose(1, 2)


def soft_splits(patch_size: int) -> tuple[SoftSplit, SoftSplit, SoftSplit]:
    """Return the three splits of a patch size: 16 pixels have T2T-ViT's, 12 CrossViT's.

    Raises:
        ValueError: There are none.
    """
    strides = stem_strides(patch_size)
    if strides is None:
        raise ValueError(f"t2t: no three strides multiply to a patch of {patch_size}")
    first, *others = strides
    second, third = (SoftSplit(4, 4, 0) if s == 4 else SoftSplit(3, s, 1) for s in others)
    return SoftSplit(7, first, 2 if first > 2 else 3), second, third


class TokensToToken(nn.Module):
    """Embeds an image as patch tokens.

    Args:
        img_size: (H, W) of the image, multiples of patch_size. Only records the size: other
            multiples work as well.
        patch_size: P.
        in_chans: Channels of the image.
        dim: C.
        layers: "transformer" or "performer".

    Raises:
        ValueError: The patch size has no soft splits.
    """

    def __init__(
        self, img_size: Size, patch_size: int, in_chans: int, dim: int, layers: str = "transformer"
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = img_size, patch_size
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.soft_splits = soft_splits(patch_size)
        widths = [
            channels * split.kernel_size**2
            for channels, split in zip(
                (in_chans, TOKEN_DIM, TOKEN_DIM), self.soft_splits, strict=True
            )
        ]
        self.attention1 = TokenLayer(widths[0], layers)
        self.attention2 = TokenLayer(widths[1], layers)
        self.project = nn.Linear(widths[2], dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, in_chans, H, W] to patch tokens [B, N, C]."""
        layers = (self.attention1, self.attention2)
        for split, layer in zip(self.soft_splits, layers, strict=False):
            grid = (x.shape[2] // split.stride, x.shape[3] // split.stride)
            x = layer(split(x)).transpose(1, 2).unflatten(2, grid)
        return cast(Tensor, self.project(self.soft_splits[2](x)))


class TokenLayer(FeedForwardHalf):
    """A transformer block of width 64 that reads wider tokens.

    Fused, attention is PyTorch's ``scaled_dot_product_attention``, and ``layernorm_ffn`` the rest;
    a second derivative of the former needs eager mode.

    Args:
        dim_in: Width of the tokens read.
        layers: "transformer" or "performer".
        backend: As in ``crossvit_kernels.modules``.
    """

    attn: Any  # it may be replaced

    def __init__(self, dim_in: int, layers: str, backend: str | None = None) -> None:
        super().__init__(TOKEN_DIM, 1, backend)
        self.norm1 = nn.LayerNorm(dim_in, eps=_EPS)
        if layers == "performer":
            self.attn = PerformerAttention(dim_in)
        else:
            self.attn = TokenAttention(dim_in)
        self.norm2 = nn.LayerNorm(TOKEN_DIM, eps=_EPS)
        self.mlp = Mlp(TOKEN_DIM, TOKEN_DIM)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, N, dim_in] to [B, N, 64]."""
        eager = self.backend == "reference" or plain_layers.is_transformed()
        return self.feed_forward(self.attn(self.norm1(x), eager))


class TokenAttention(nn.Module):
    """Self-attention with one head whose residual is its values, as they have the new width."""

    def __init__(self, dim_in: int) -> None:
        super().__init__()
        self.scale = dim_in**-0.5  # T2T-ViT's: of the width read
        self.qkv = nn.Linear(dim_in, 3 * TOKEN_DIM, bias=False)
        self.proj = nn.Linear(TOKEN_DIM, TOKEN_DIM)

    def forward(self, x: Tensor, eager: bool) -> Tensor:
        """Map x [B, N, dim_in] to [B, N, 64]; eager forms the attention weights."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if eager:
            pooled = attend(q, k, v, 1, self.scale)
        else:
            q, k, values = (t.unsqueeze(1) for t in (q, k, v))
            pooled = F.scaled_dot_product_attention(q, k, values, scale=self.scale).squeeze(1)
        return v + cast(Tensor, self.proj(pooled))


class PerformerAttention(nn.Module):
    """Attention by positive random features (Performer), linear in N; the residual is the values.

    Attributes:
        features: The random features, orthogonal, which are not trained.
    """

    features: Tensor

    def __init__(self, dim_in: int, num_features: int = TOKEN_DIM // 2) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim_in, 3 * TOKEN_DIM)
        self.proj = nn.Linear(TOKEN_DIM, TOKEN_DIM)
        features = nn.init.orthogonal_(self.proj.weight.new_empty(num_features, TOKEN_DIM))
        self.register_buffer("features", features * math.sqrt(num_features))

    def forward(self, x: Tensor, eager: bool) -> Tensor:
        """Map x [B, N, dim_in] to [B, N, 64]; there is one form for fused and eager."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        with _without_autocast(x.device.type):  # the exponentials need their range
            q, k = self._features_of(q), self._features_of(k)
            norm = q @ k.sum(dim=1).unsqueeze(-1) + 1e-8
            pooled = (q @ (k.transpose(1, 2) @ v.to(k.dtype))) / norm
        return v + cast(Tensor, self.proj(pooled.to(v.dtype)))

    def _features_of(self, x: Tensor) -> Tensor:
        """``exp(w x - |x|^2 / 2) / sqrt(m)`` of x [B, N, 64], [B, N, m]; at most exp(m / 2)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        exponent = x @ self.features.to(x.dtype).T - x.square().sum(dim=-1, keepdim=True) / 2
        return exponent.exp() / math.sqrt(len(self.features))


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()  # meta has none

"""The layers that the modules own, as callable modules in eager PyTorch.

They run if ``backend`` is "reference", and if kernels may not read the parameters (see
``plain_layers``). Hooks, adapters and replaced layers work, as every layer is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossvit_kernels import checks


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``: the GELU of the first CLIP models."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, of any shape."""
        return x * torch.sigmoid(1.702 * x)


#: By the names of the modules' ``act``.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    scale: float,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Softmax attention with h heads.

    Args:
        q: [B, Q, D].
        k: [B, N, D].
        v: [B, N, D_v].
        num_heads: h.
        scale: Factor of the scores; a plain number, as torch.jit.trace turns one computed from a
            shape into float32.
        dropout_p: Dropout of the weights.
        mask: bool [B, N], True where a key is attended to; a fully masked image pools to 0.

    Returns:
        [B, Q, D_v].
    """
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-2, -1) * scale
    if mask is None:
        weights = scores.softmax(dim=-1)
    else:
        attended = mask[:, None, None]
        scores = scores.masked_fill(~attended, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1) * attended
    return (F.dropout(weights, dropout_p) @ v).transpose(1, 2).flatten(2)


def attention_weights(q: Tensor, k: Tensor, num_heads: int, scale: float) -> Tensor:
    """Return the weights of ``attend``, [B, h, Q, N], without dropout and mask."""
    q, k = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k))
    return (q @ k.transpose(-2, -1) * scale).softmax(dim=-1)


def self_attention_weights(block: Any, x: Tensor) -> Tensor:
    """Return the weights of a block's self-attention, without dropout.

    Args:
        block: Has timm's ``norm1`` and ``attn``.
        x: Tokens [B, N, C].

    Returns:
        [B, h, N, N].
    """
    attn = block.attn
    q, k, _ = attn.qkv(block.norm1(x)).chunk(3, dim=-1)
    return attention_weights(q, k, attn.num_heads, attn.scale)


def drop_path_scale(batch: int, drop_path: float, training: bool, like: Tensor) -> Tensor | None:
    """Return the factor of each image's residual update: drop path (stochastic depth).

    Args:
        batch: B.
        drop_path: Probability that an image's update is dropped, in [0, 1).
        training: Whether updates are dropped at all.
        like: A tensor with the dtype and device of the factors.

    Returns:
        [B], each 0 or 1 / (1 - drop_path), from torch's generator; None if all are 1.

    Raises:
        ValueError: drop_path is not in [0, 1).
    """
    checks.probability("drop_path", drop_path)
    if not training or drop_path == 0:
        return None
    keep = 1 - drop_path
    return like.new_empty(batch).bernoulli_(keep) / keep


def add_update(x: Tensor, update: Tensor, scale: Tensor | None) -> Tensor:
    """Return ``x + scale * update``: both [B, N, C], scale [B] or None."""
    return x + (update if scale is None else update * scale.to(update.dtype).view(-1, 1, 1))


class LayerScale(nn.Module):
    """A factor per channel, with timm's name ``gamma``."""

    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.full_like(nn.LayerNorm(dim).weight, init_values))

    def forward(self, x: Tensor) -> Tensor:
        """Scale x [..., C]."""
        return x * self.gamma


class Attention(nn.Module):
    """Base class of attention modules: heads, and dropout of the weights in training."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0) -> None:
        super().__init__()
        checks.heads(num_heads, dim=dim)
        checks.probability("attn_drop", attn_drop)
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.scale = self._scale = (dim // num_heads) ** -0.5

    @property
    def dropout_p(self) -> float:
        """The current dropout rate of the weights."""
        return self.attn_drop if self.training else 0.0


class SelfAttention(Attention):
    """Self-attention with one projection for q, k and v: timm's ``Attention``."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool, attn_drop: float, proj_bias: bool = True
    ) -> None:
        super().__init__(dim, num_heads, attn_drop)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Map x [B, N, C], key_mask bool [B, N] to [B, N, C]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if key_mask is not None:  # masked tokens' contents, even NaN, must not propagate
            k, v = (t.masked_fill(~key_mask.unsqueeze(-1), 0) for t in (k, v))
        heads = attend(q, k, v, self.num_heads, self.scale, self.dropout_p, key_mask)
        out: Tensor = self.proj(heads)
        return out


class Mlp(nn.Module):
    """Linear, activation, Linear.

    Args:
        dim: C, the width of input and output.
        hidden_dim: Hidden units.
        act: A key of ``ACTIVATIONS``.
        bias: Whether both layers have biases.

    Raises:
        ValueError: There is no such activation.
    """

    def __init__(self, dim: int, hidden_dim: int, act: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        checks.one_of("act", act, tuple(ACTIVATIONS))
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.act = ACTIVATIONS[act]()
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., C] to [..., C]."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class CrossAttention(Attention):
    """Row 0 attends to all rows (CrossViT, Eq. 6): timm's ``crossvit.CrossAttention``."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, attn_drop: float) -> None:
        super().__init__(dim, num_heads, attn_drop)
        self.wq = nn.Linear(dim, dim, bias=qkv_bias)
        self.wk = nn.Linear(dim, dim, bias=qkv_bias)
        self.wv = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, 1 + N, C] to [B, 1, C]."""
        q, k, v = self.wq(x[:, :1]), self.wk(x), self.wv(x)
        out: Tensor = self.proj(attend(q, k, v, self.num_heads, self.scale, self.dropout_p))
        return out


class CrossAttentionBlock(nn.Module):
    """``x_0 + CA(LN(x))`` (CrossViT, Eq. 7): timm's ``crossvit.CrossAttentionBlock``.

    Args:
        dim: C.
        num_heads: h, which divides C.
        qkv_bias: Whether query, key and value projections have biases.
        eps: LayerNorm's.
        attn_drop: Attention dropout in training.
        drop_path: Probability in training that an image's update is dropped.

    Raises:
        ValueError: num_heads does not divide dim, or a rate is not in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        eps: float = 1e-6,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        checks.probability("drop_path", drop_path)
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = CrossAttention(dim, num_heads, qkv_bias, attn_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, 1 + N, C] to the updated row 0, [B, 1, C]."""
        scale = drop_path_scale(x.shape[0], self.drop_path, self.training, like=x)
        return add_update(x[:, :1], self.attn(self.norm1(x)), scale)


def lift(dim_in: int, dim_out: int, eps: float = 1e-6) -> nn.Sequential:
    """Return the f or g of a fusion: LayerNorm, GELU, Linear."""
    return nn.Sequential(nn.LayerNorm(dim_in, eps=eps), nn.GELU(), nn.Linear(dim_in, dim_out))


class ProbeAttention(Attention):
    """Queries attend to tokens: V-JEPA's ``CrossAttention``."""

    proj: nn.Linear | None

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, out_proj: bool) -> None:
        super().__init__(dim, num_heads)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim) if out_proj else None

    def forward(self, queries: Tensor, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Map queries [B, Q, C], x [B, N, C], key_mask bool [B, N] to [B, Q, C]."""
        k, v = self.kv(x).chunk(2, dim=-1)
        out = attend(self.q(queries), k, v, self.num_heads, self.scale, self.dropout_p, key_mask)
        return out if self.proj is None else self.proj(out)


class ProbeBlock(nn.Module):
    """V-JEPA's ``CrossAttentionBlock``: only the tokens are normalised before attention."""

    def __init__(
        self, dim: int, num_heads: int, hidden_dim: int, qkv_bias: bool, out_proj: bool, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.xattn = ProbeAttention(dim, num_heads, qkv_bias, out_proj)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden_dim)

    def forward(self, queries: Tensor, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Map queries [B, Q, C], x [B, N, C], key_mask bool [B, N] to [B, Q, C]."""
        mask = () if key_mask is None else (key_mask,)
        queries = queries + self.xattn(queries, self.norm1(x), *mask)
        out: Tensor = queries + self.mlp(self.norm2(queries))
        return out


def init_linears(module: nn.Module) -> None:
    """Initialise linear layers as vision transformers do; LayerNorms already start as identity."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

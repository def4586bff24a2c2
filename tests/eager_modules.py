"""The modules that ours replace, in plain PyTorch with the same parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Widths of the tokens and the CLS, and heads, of all modules.
C, C_CLS, HEADS = 24, 40, 3


class DropPath(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, update: Tensor) -> Tensor:  # [B, rows, C]
        if self.rate == 0 or not self.training:
            return update
        kept = update.new_empty(update.shape[0], 1, 1).bernoulli_(1 - self.rate)
        return update * kept / (1 - self.rate)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention per head over [B, rows, C] tensors; returns the concatenated heads."""
    outputs = []
    for q_h, k_h, v_h in zip(
        q.chunk(heads, dim=-1), k.chunk(heads, dim=-1), v.chunk(heads, dim=-1), strict=True
    ):
        scores = q_h @ k_h.mT / q_h.shape[-1] ** 0.5
        outputs.append(scores.softmax(dim=-1) @ v_h)
    return torch.cat(outputs, dim=-1)


class EagerCrossAttention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Linear(C, C, bias=bias) for _ in range(3))
        self.proj = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(self.wq(x[:, :1]), self.wk(x), self.wv(x), HEADS))


class EagerCrossAttentionBlock(nn.Module):
    def __init__(self, bias: bool, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(C, eps=1e-6)
        self.attn = EagerCrossAttention(bias)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] + self.drop_path(self.attn(self.norm1(x)))


class EagerFusion(nn.Module):
    def __init__(self, bias: bool = True, drop_path: float = 0.0, projections: bool = True) -> None:
        super().__init__()
        self.fusion = EagerCrossAttentionBlock(bias, drop_path)
        if not projections:
            self.proj, self.revert_proj = nn.Identity(), nn.Identity()
            return
        self.proj = nn.Sequential(nn.LayerNorm(C_CLS, eps=1e-6), nn.GELU(), nn.Linear(C_CLS, C))
        self.revert_proj = nn.Sequential(nn.LayerNorm(C, eps=1e-6), nn.GELU(), nn.Linear(C, C_CLS))

    def forward(self, cls: Tensor, tokens: Tensor) -> Tensor:
        joined = torch.cat([self.proj(cls).unsqueeze(1), tokens], dim=1)
        return self.revert_proj(self.fusion(joined))[:, 0]


class EagerMlp(nn.Module):
    def __init__(self, hidden: int, approximate: str = "none") -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, hidden), nn.Linear(hidden, C)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class EagerSelfAttention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(C, 3 * C, bias=bias), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(*self.qkv(x).chunk(3, dim=-1), HEADS))


class EagerBlock(nn.Module):
    def __init__(self, bias: bool = True, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C, eps=1e-6), nn.LayerNorm(C, eps=1e-6)
        self.attn = EagerSelfAttention(bias)
        self.mlp = EagerMlp(2 * C)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, cls: Tensor | None = None) -> Tensor:
        if cls is not None:
            x = torch.cat([cls.unsqueeze(1), x[:, 1:]], dim=1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class EagerMapHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, C))
        self.attention = nn.MultiheadAttention(C, HEADS, batch_first=True)
        self.layernorm = nn.LayerNorm(C, eps=1e-6)
        self.mlp = EagerMlp(50, approximate="tanh")

    def forward(self, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
        probe = self.probe.repeat(tokens.shape[0], 1, 1)
        ignored = None if key_mask is None else ~key_mask
        pooled, _ = self.attention(probe, tokens, tokens, key_padding_mask=ignored)
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class EagerClassAttention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(C, C, bias=bias) for _ in range(3))
        self.proj = nn.Linear(C, C)

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        return self.proj(attend(self.q(x[:, :1]), self.k(x), self.v(x), HEADS))


class EagerAttentionPool2d(nn.Module):
    def __init__(self, positions: int, output_dim: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(1 + positions, C))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(C, C) for _ in range(3))
        self.c_proj = nn.Linear(C, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).permute(2, 0, 1)  # [H W, B, C]
        rows = torch.cat([rows.mean(dim=0, keepdim=True), rows])
        rows = rows + self.positional_embedding.unsqueeze(1)
        q, k, v = self.q_proj, self.k_proj, self.v_proj
        pooled, _ = F.multi_head_attention_forward(
            *(rows, rows, rows, C, HEADS),
            in_proj_weight=None,
            in_proj_bias=torch.cat([q.bias, k.bias, v.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            need_weights=False,
            use_separate_proj_weight=True,
            q_proj_weight=q.weight,
            k_proj_weight=k.weight,
            v_proj_weight=v.weight,
        )
        return pooled[0]


class EagerProbeAttention(nn.Module):
    def __init__(self, bias: bool, out_proj: bool) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(C, C, bias=bias), nn.Linear(C, 2 * C, bias=bias)
        self.proj = nn.Linear(C, C) if out_proj else nn.Identity()

    def forward(self, queries: Tensor, x: Tensor) -> Tensor:
        return self.proj(attend(self.q(queries), *self.kv(x).chunk(2, dim=-1), HEADS))


class EagerProbeBlock(nn.Module):
    def __init__(self, bias: bool, out_proj: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.xattn = EagerProbeAttention(bias, out_proj)
        self.mlp = EagerMlp(3 * C)

    def forward(self, queries: Tensor, x: Tensor) -> Tensor:
        queries = queries + self.xattn(queries, self.norm1(x))
        return queries + self.mlp(self.norm2(queries))


class EagerProbe(nn.Module):
    def __init__(self, num_queries: int = 1, bias: bool = True, out_proj: bool = True) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.randn(1, num_queries, C))
        self.cross_attention_block = EagerProbeBlock(bias, out_proj)

    def forward(self, tokens: Tensor) -> Tensor:
        queries = self.query_tokens.repeat(tokens.shape[0], 1, 1)
        return self.cross_attention_block(queries, tokens)

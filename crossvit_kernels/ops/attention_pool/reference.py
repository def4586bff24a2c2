"""attention_pool in plain PyTorch, with materialised keys and values: the reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crossvit_kernels.ops.attention_core.reference import without_masked
from crossvit_kernels.ops.attention_pool.parameters import Norm, PoolCall, PoolParameters


def attention_pool(
    query: Tensor,
    tokens: Tensor,
    parameters: PoolParameters,
    call: PoolCall,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return (out [B, Q, C_out], weights [B, Q, h, keys] or None); query [B or 1, Q, C_q]."""
    p = parameters
    query = query.expand(tokens.shape[0], -1, -1)
    keys = tokens = without_masked(tokens, key_mask)
    if call.include_query:
        keys = torch.cat([query, tokens], dim=1)
        key_mask = None if key_mask is None else F.pad(key_mask, (query.shape[1], 0), value=True)
    keys = normalize(keys, p.token_norm, p.norm_eps)

    q = _heads(project_query(query, p), call.num_heads)
    k = _heads(F.linear(keys, p.w_k, p.b_k), call.num_heads)
    v = _heads(F.linear(keys, p.w_v, p.b_v), call.num_heads)
    scores = q @ k.transpose(-2, -1) * call.scale
    if key_mask is None:
        weights = scores.softmax(dim=-1)
    else:
        attended = key_mask[:, None, None]
        # finfo.min rather than -inf: a fully masked image pools to 0, not to NaN.
        scores = scores.masked_fill(~attended, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1) * attended
    pooled = (F.dropout(weights, call.dropout_p) @ v).transpose(1, 2).flatten(2)
    out = project_out(pooled, p)
    return out, weights.transpose(1, 2) if call.return_weights else None


def normalize(x: Tensor, norm: Norm | None, eps: float) -> Tensor:
    return x if norm is None else F.layer_norm(x, x.shape[-1:], norm[0], norm[1], eps)


def project_query(query: Tensor, p: PoolParameters) -> Tensor:
    query = normalize(query, p.query_norm, p.norm_eps)
    return query if p.w_q is None else F.linear(query, p.w_q, p.b_q)


def project_out(pooled: Tensor, p: PoolParameters) -> Tensor:
    return pooled if p.w_o is None else F.linear(pooled, p.w_o, p.b_o)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """Split [B, N, D] into heads [B, h, N, D / h]."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(1, 2)

"""attention_pool over attention_core: W_k is absorbed into the query, W_v applied after pooling.

    u_qh = gamma * (W_k,h^T q_qh)       o_qh = W_v,h (gamma * m_qh + beta) + b_v,h

b_k and beta's term in the keys shift all scores of a query alike: softmax drops them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossvit_kernels.ops.attention_core import op as core
from crossvit_kernels.ops.attention_core import reference as core_reference
from crossvit_kernels.ops.attention_core.reference import CoreInputs
from crossvit_kernels.ops.attention_pool.parameters import PoolCall, PoolParameters
from crossvit_kernels.ops.attention_pool.reference import project_out, project_query


def attention_pool(
    query: Tensor,
    tokens: Tensor,
    parameters: PoolParameters,
    call: PoolCall,
    key_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Compute reference.attention_pool on a backend of attention_core."""
    p = parameters
    batch, channels = tokens.shape[0], tokens.shape[2]
    num_queries, num_heads = query.shape[1], call.num_heads
    norm_eps = None if p.token_norm is None else p.norm_eps
    gamma, beta = p.token_norm or (None, None)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads))

    tokens, key_mask, extra_token = _keys(query, tokens, key_mask, call.include_query)
    q = split(project_query(query, p)) * call.scale
    u = torch.einsum("bqhd,hdc->bqhc", q, p.w_k.unflatten(0, (num_heads, -1)))
    u = u.flatten(1, 2) if gamma is None else u.flatten(1, 2) * gamma
    inputs = CoreInputs(u, tokens, key_mask, extra_token)
    m, lse = core.attention_core(inputs, norm_eps, backend)

    z = m if gamma is None else m * gamma
    z = z if beta is None else z + beta
    z = z.view(batch, num_queries, num_heads, channels)
    o = torch.einsum("bqhc,hdc->bqhd", z, p.w_v.unflatten(0, (num_heads, -1)).to(z.dtype))
    if p.b_v is not None:
        o = o + p.b_v.view(num_heads, -1).to(o.dtype)
    if key_mask is not None:  # a fully masked image pools to 0
        o = o * (lse > -torch.inf).view(batch, num_queries, num_heads, 1)
    pooled = o.flatten(2)
    if p.b_k is not None:
        # b_k's gradient is zero rather than None: distributed training waits for every gradient.
        pooled = pooled + p.b_k.sum() * 0
    out = project_out(pooled, p)
    if not call.return_weights:
        return out, None
    weights = core_reference.attention_weights(u, tokens, lse, norm_eps, key_mask, extra_token)
    return out, weights.to(out.dtype).unflatten(1, (num_queries, num_heads))


def _keys(
    query: Tensor, tokens: Tensor, key_mask: Tensor | None, include_query: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (tokens, key_mask, extra_token); a single query becomes the extra token, uncopied."""
    if not include_query:
        return tokens, key_mask, None
    query = query.expand(tokens.shape[0], -1, -1)
    if query.shape[1] == 1 and query.dtype == tokens.dtype:
        return tokens, key_mask, query[:, 0]
    if key_mask is not None:
        key_mask = torch.nn.functional.pad(key_mask, (query.shape[1], 0), value=True)
    return torch.cat([query, tokens], dim=1), key_mask, None

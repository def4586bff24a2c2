"""attention_pool: dispatch. Its kernels are those of attention_core, and so is its autograd."""

from __future__ import annotations

from torch import Tensor

from crossvit_kernels.backends import choose, register_operation
from crossvit_kernels.ops import library
from crossvit_kernels.ops.attention_core import op as core
from crossvit_kernels.ops.attention_pool import absorbed, reference
from crossvit_kernels.ops.attention_pool.parameters import PoolCall, PoolParameters

register_operation("attention_pool", tuple(core.BACKENDS))


def attention_pool(
    query: Tensor,
    tokens: Tensor,
    parameters: PoolParameters,
    call: PoolCall,
    key_mask: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """(out, weights or None) on the chosen backend; see functional.attention_pool."""
    not_fused = library.why_not_fused(
        query,
        tokens,
        key_mask,
        *parameters.tensors(),
        dropout_p=call.dropout_p,
    )
    num_queries, head_dim = query.shape[1], parameters.w_k.shape[0] // call.num_heads
    name = choose(
        "attention_pool",
        backend,
        core.BACKENDS,
        tokens.device,
        lambda module: not_fused or module.why_not(tokens),
        # A score row costs C multiply-adds a token; head_dim rows cost as much as keys and values.
        prefer_reference=num_queries >= head_dim,
    )
    if name == "reference":
        return reference.attention_pool(query, tokens, parameters, call, key_mask)
    return absorbed.attention_pool(query, tokens, parameters, call, key_mask, name)

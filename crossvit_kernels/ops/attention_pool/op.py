"""The dispatch of attention_pool. Kernels and autograd are those of attention_core."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crossvit_kernels.backends import choose, register_operation, why_not_fused
from crossvit_kernels.calibration.store import Call
from crossvit_kernels.ops.attention_core.op import OPERATION as CORE
from crossvit_kernels.ops.attention_core.reference import CoreInputs
from crossvit_kernels.ops.attention_pool import absorbed, reference
from crossvit_kernels.ops.attention_pool.parameters import PoolCall, PoolParameters
from crossvit_kernels.ops.describe import described
from crossvit_kernels.verify import state

register_operation("attention_pool", tuple(CORE.backends))


def attention_pool(
    query: Tensor,
    tokens: Tensor,
    parameters: PoolParameters,
    call: PoolCall,
    key_mask: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Return (out, weights or None) on the chosen backend; see functional.attention_pool."""
    tensors = query, tokens, key_mask, *parameters.tensors()
    not_fused = why_not_fused(tensors, call.dropout_p)
    num_queries, head_dim = query.shape[1], parameters.w_k.shape[0] // call.num_heads

    def describe_call() -> Call:
        def run(values: Any, backend: str) -> Tensor:
            query, tokens, tensors, norms, key_mask, _ = values
            again = PoolParameters._make((*tensors, *norms, parameters.norm_eps))
            return attention_pool(query, tokens, again, call, key_mask, backend)[0]

        norms = parameters.query_norm, parameters.token_norm
        values = query, tokens, parameters[:8], norms, key_mask, call.num_heads
        return described("attention_pool", tokens, values, run)

    name = choose(
        "attention_pool",
        backend,
        CORE.backends,
        tokens.device,
        lambda module: not_fused or module.why_not(CoreInputs(query, tokens, key_mask, None)),
        prefer_reference=keys_are_cheaper(num_queries, head_dim, tokens.device),
        is_retired=lambda backend: f"{CORE.name}/{backend}" in state.retired_names,
        call=None if not_fused else describe_call,
    )
    if name == "reference":
        return reference.attention_pool(query, tokens, parameters, call, key_mask)
    return absorbed.attention_pool(query, tokens, parameters, call, key_mask, name)


def keys_are_cheaper(num_queries: int, head_dim: int, device: torch.device) -> bool:
    """Whether computing keys and values is cheaper than one row of u per query and head.

    A row costs C multiply-adds per token, so head_dim queries cost as much as keys and values. On a
    CPU torch's matrix products run at 2.5 times the rate of a token pass.
    """
    return num_queries >= head_dim * (0.4 if device.type == "cpu" else 1.0)

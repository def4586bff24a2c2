"""transformers: the pooling heads of SigLIP, SigLIP 2, V-JEPA 2 and AIMv2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crossvit_kernels.backends import needs_grad
from crossvit_kernels.modules import plain_layers
from crossvit_kernels.modules.pooling import attention_weights
from crossvit_kernels.plug_in import calls, looking
from crossvit_kernels.plug_in.recipe import Declined, Part, Recipe, never

# SigLIP's: torch's attention; what follows is called as ever.

#: Implementations with which SigLIP 2's head makes a mask of padding, for torch's attention: one of
#: scores. None makes no mask, flash attention's gets mixed up between images, flex has none for it.
_MASKED = {"eager", "sdpa"}


def _check_map(head: Any) -> None:
    attention = looking.torch_attention(head, "attention")
    weights = attention_weights(attention, attention.out_proj)
    if reason := plain_layers.why_not_tensors([head.probe, *weights]):
        raise Declined(reason)
    looking.require_pool(weights[2], head.probe.shape[1], attention.num_heads)


def _live_map(head: Any) -> str | None:
    return looking.why_not_torch_attention(head.attention, "attention")


def _call_map(
    head: Any,
    parts: list[bool],
    backend: str | None,
    hidden_state: Any,
    attention_mask: Any = None,
    *others: Any,
    **more: Any,
) -> Tensor | str:
    attention = head.attention
    if others or more or not calls.fits(hidden_state, attention.in_proj_weight):
        return ""
    key_mask, weights = None, attention_weights(attention, attention.out_proj)
    if attention_mask is not None:  # SigLIP 2's: [B, N] of 0 and 1, or of bool
        if looking.implementation(head) not in _MASKED:
            return ""
        if not isinstance(attention_mask, Tensor) or attention_mask.is_floating_point():
            return ""
        if attention_mask.shape != hidden_state.shape[:2]:
            return ""
        key_mask = attention_mask.to(hidden_state.device) != 0
        empty = ~key_mask.any(dim=1, keepdim=True)
        if needs_grad(hidden_state, head.probe, *weights):
            # There, its own attention gives gradients to the scores of a fully masked image.
            if not calls.can_look_at(empty, may_wait=True) or bool(empty.any()):
                return ""
        elif not calls.can_look_at(empty) or bool(empty.any()):
            # It pools to the mean of its values: any weights give the mean token's.
            mean = hidden_state.mean(dim=1, keepdim=True)
            hidden_state = torch.where(empty.unsqueeze(-1), mean, hidden_state)
            key_mask = key_mask | empty
    y = calls.pool(
        head.probe,
        hidden_state,
        weights,
        backend,
        num_heads=attention.num_heads,
        key_mask=key_mask,
    )
    if isinstance(y, str):
        return y
    return (y + head.mlp(head.layernorm(y)))[:, 0]


def _map_head(target: str) -> Recipe:
    parts = (Part("attention_pool", ("attention",), _check_map, _live_map, never),)
    return Recipe(target, parts, _call_map)


# V-JEPA 2's: the cross-attention of its pooler. LayerNorm and MLP after it are called as ever.


def _check_probe(pooler: Any) -> None:
    start = "transformers.models.vjepa2.modeling_vjepa2.VJEPA2PoolerCrossAttention"
    layer = looking.child(pooler, "cross_attention_layer", f"{start}Layer")
    looking.only(layer, "cross_attention_layer", "layer_norm1", "cross_attn", "layer_norm2", "mlp")
    looking.norm(layer, "layer_norm1")
    attn = looking.child(layer, "cross_attn", start)
    looking.only(attn, "cross_attn", "q_proj", "k_proj", "v_proj")
    for name in ("q_proj", "k_proj", "v_proj"):
        looking.linear(attn, name)
    weights = _probe_weights(attn)
    if reason := plain_layers.why_not_tensors([pooler.query_tokens, *weights]):
        raise Declined(reason)
    looking.require_pool(weights[2], pooler.query_tokens.shape[1], attn.num_heads)


def _live_probe(pooler: Any) -> str | None:
    layer = pooler.cross_attention_layer
    attn = layer.cross_attn
    if attn.dropout > 0 and attn.training:
        return f"cross_attn has dropout of {attn.dropout} in training"
    if why := looking.why_not_implementation(attn):
        return why
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return "gradient checkpointing"
    dim = looking.shape_of(attn.q_proj)[0]
    return looking.why_not_heads(attn, attn.num_heads, dim, "cross_attn")


def _probe_weights(attn: Any) -> list[Any]:
    return [*plain_layers.parameters(attn.q_proj, attn.k_proj, attn.v_proj), None, None]


def _call_probe(
    pooler: Any, parts: list[bool], backend: str | None, hidden_state: Any, *a: Any, **k: Any
) -> Tensor | str:
    layer = pooler.cross_attention_layer
    if a or k or not calls.fits(hidden_state, layer.layer_norm1.weight):
        return ""
    for self_attention in pooler.self_attention_layers:
        hidden_state = self_attention(hidden_state, attention_mask=None)[0]
    norm = layer.layer_norm1
    update = calls.pool(
        pooler.query_tokens,
        hidden_state,
        _probe_weights(layer.cross_attn),
        backend,
        num_heads=layer.cross_attn.num_heads,
        token_norm=(norm.weight, norm.bias),
        norm_eps=norm.eps,
    )
    if isinstance(update, str):
        return update
    y: Tensor = pooler.query_tokens + update
    return (y + layer.mlp(layer.layer_norm2(y))).squeeze(1)


# AIMv2's: the query is a parameter.


def _check_aim(head: Any) -> None:
    looking.only(head, "", "k_proj", "v_proj", "output_proj")
    weights = _aim_weights(head)
    for name in ("k_proj", "v_proj", "output_proj"):
        looking.linear(head, name)
    if reason := plain_layers.why_not_tensors([head.cls_token, *weights]):
        raise Declined(reason)
    looking.require_pool(weights[2], 1, head.num_heads)


def _live_aim(head: Any) -> str | None:
    return looking.why_not_heads(head, head.num_heads, looking.shape_of(head.k_proj)[0], "it")


def _aim_weights(head: Any) -> list[Any]:
    return [None, None, *plain_layers.parameters(head.k_proj, head.v_proj, head.output_proj)]


def _call_aim(
    head: Any, parts: list[bool], backend: str | None, hidden_states: Any, *a: Any, **k: Any
) -> Tensor | str:
    if a or k or not calls.fits(hidden_states, head.k_proj.weight):
        return ""
    weights = _aim_weights(head)
    y = calls.pool(head.cls_token, hidden_states, weights, backend, num_heads=head.num_heads)
    return y if isinstance(y, str) else y[:, 0]


RECIPES = (
    _map_head("transformers.models.siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead"),
    _map_head("transformers.models.siglip2.modeling_siglip2.Siglip2MultiheadAttentionPoolingHead"),
    Recipe(
        "transformers.models.vjepa2.modeling_vjepa2.VJEPA2AttentivePooler",
        (Part("attention_pool", ("cross_attention_layer",), _check_probe, _live_probe, never),),
        _call_probe,
    ),
    Recipe(
        "transformers.models.aimv2.modeling_aimv2.Aimv2AttentionPoolingHead",
        (
            Part(
                "attention_pool",
                ("k_proj", "v_proj", "output_proj"),
                _check_aim,
                _live_aim,
                never,
            ),
        ),
        _call_aim,
    ),
)

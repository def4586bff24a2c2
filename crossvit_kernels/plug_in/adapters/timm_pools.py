"""timm: pooling heads and class attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from crossvit_kernels.modules import plain_layers
from crossvit_kernels.plug_in import calls, looking
from crossvit_kernels.plug_in.recipe import Declined, Part, Recipe, never


def _pool_part(
    reads: tuple[str, ...],
    check: Callable[[Any], None],
    live: Callable[[Any], str | None],
    pays: Callable[[Tensor, Any], bool] | None = None,
) -> tuple[Part, ...]:
    return (Part("attention_pool", reads, check, live, never, pays),)


# AttentionPoolLatent: what follows attention is called as ever.


def _check_latent(pool: Any) -> None:
    looking.only(pool, "", "q", "kv", "proj", "norm", "mlp")
    if not isinstance(pool._modules.get("q"), torch.nn.Identity):
        looking.linear(pool, "q")
    kv = looking.linear(pool, "kv")
    if not isinstance(pool._modules.get("proj"), torch.nn.Identity):
        looking.linear(pool, "proj")
    inner = kv.weight.shape[0] // 2
    if reason := plain_layers.why_not_tensors([pool.latent, *plain_layers.parameters(kv)]):
        raise Declined(reason)
    looking.require_pool(kv.weight[:inner], pool.latent_len, pool.num_heads)


def _live_latent(pool: Any) -> str | None:
    inner = looking.shape_of(pool.kv)[0] // 2
    return looking.why_not_heads(pool, pool.num_heads, inner, "it")


def _latent_weights(pool: Any) -> list[Any]:
    w_k, w_v = pool.kv.weight.chunk(2)
    b_k, b_v = (None, None) if pool.kv.bias is None else pool.kv.bias.chunk(2)
    q, proj = pool.q, pool.proj
    w_q, b_q = (None, None) if isinstance(q, torch.nn.Identity) else (q.weight, q.bias)
    w_o, b_o = (None, None) if isinstance(proj, torch.nn.Identity) else (proj.weight, proj.bias)
    return [w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o]


def _call_latent(
    pool: Any, parts: list[bool], backend: str | None, x: Any, attn_mask: Any = None, **more: Any
) -> Tensor | str:
    if more or not calls.fits(x, pool.kv.weight):
        return ""
    key_mask = None
    if attn_mask is not None:
        keys = calls.kept_by(attn_mask)
        if keys is None and getattr(pool, "fused_attn", False):
            keys = attn_mask  # of bool; otherwise True and False are added to scores
        key_mask = calls.key_mask_of(keys, x, pool.latent_len)
        if key_mask is None:
            return ""
    if pool.pos_embed is not None:
        x = x + pool.pos_embed.unsqueeze(0).to(x.dtype)
    y = calls.pool(
        pool.latent,
        x,
        _latent_weights(pool),
        backend,
        num_heads=pool.num_heads,
        key_mask=key_mask,
    )
    if isinstance(y, str):
        return y
    y = pool.proj_drop(y)
    if pool.mlp is not None:
        y = y + pool.mlp(pool.norm(y))
    if pool.pool == "token":
        return y[:, 0]
    return y.mean(1) if pool.pool == "avg" else y


LATENT = Recipe(
    "timm.layers.attention_pool.AttentionPoolLatent",
    _pool_part(("q", "kv", "q_norm", "k_norm", "proj"), _check_latent, _live_latent),
    _call_latent,
)


# AttentionPool2d: the mean and all positions, with learned position embeddings.


def _check_2d(pool: Any) -> None:
    looking.only(pool, "", "q", "k", "v", "qkv", "proj")
    for name in ("q", "k", "v") if pool.qkv is None else ("qkv",):
        looking.linear(pool, name)
    if not isinstance(pool.proj, torch.nn.Identity):
        looking.linear(pool, "proj")
    if pool.pool_type != "token":
        raise Declined(f"it pools {pool.pool_type!r}, keeping all positions")
    if reason := plain_layers.why_not_tensors([pool.pos_embed, *_weights_2d(pool)]):
        raise Declined(reason)
    looking.require_pool(_weights_2d(pool)[2], 1, pool.num_heads)


def _live_2d(pool: Any) -> str | None:
    inner = pool.embed_dim
    if pool.qkv is not None and looking.shape_of(pool.qkv)[0] != 3 * inner:
        return f"qkv has {looking.shape_of(pool.qkv)[0]} features"
    return looking.why_not_heads(pool, pool.num_heads, inner, "it")


def _weights_2d(pool: Any) -> list[Any]:
    proj = pool.proj
    w_o, b_o = (None, None) if isinstance(proj, torch.nn.Identity) else (proj.weight, proj.bias)
    if pool.qkv is None:
        return [*plain_layers.parameters(pool.q, pool.k, pool.v), w_o, b_o]
    weights = pool.qkv.weight.chunk(3)
    biases = (None,) * 3 if pool.qkv.bias is None else pool.qkv.bias.chunk(3)
    return [t for pair in zip(weights, biases, strict=True) for t in pair] + [w_o, b_o]


def _call_2d(
    pool: Any, parts: list[bool], backend: str | None, x: Any, pre_logits: Any = False, **more: Any
) -> Tensor | str:
    if more or pre_logits is not False or not calls.fits(x, pool.pos_embed, 4, 1):
        return ""
    if tuple(x.shape[2:]) != tuple(pool.feat_size):  # embeddings are resampled
        return ""
    embedding = pool.pos_embed.to(x.dtype)
    tokens = x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
    if pool.cls_token is None:
        query = tokens.mean(dim=1, keepdim=True) + embedding[:1]
    else:
        query = (pool.cls_token + embedding[:1]).expand(x.shape[0], -1, -1)
    y = calls.pool(
        query,
        tokens + embedding[1:],
        _weights_2d(pool),
        backend,
        num_heads=pool.num_heads,
        include_query=True,
    )
    return y if isinstance(y, str) else y[:, 0]


POOL_2D = Recipe(
    "timm.layers.attention_pool2d.AttentionPool2d",
    _pool_part(("q", "k", "v", "qkv", "drop", "proj"), _check_2d, _live_2d),
    _call_2d,
)


# Class attention: CaiT's (and XCiT's) alone, CaiT's and VOLO's with their LayerNorm.

_CLASS = ("q", "k", "v", "attn_drop", "proj", "proj_drop")


def _class_weights(attn: Any) -> list[Any]:
    if "kv" not in attn._modules:
        return plain_layers.parameters(attn.q, attn.k, attn.v, attn.proj)
    w_k, w_v = attn.kv.weight.chunk(2)
    b_k, b_v = (None, None) if attn.kv.bias is None else attn.kv.bias.chunk(2)
    return [attn.q.weight, attn.q.bias, w_k, b_k, w_v, b_v, attn.proj.weight, attn.proj.bias]


def _check_class(attn: Any) -> None:
    keys = ("kv",) if "kv" in attn._modules else ("k", "v")
    looking.only(attn, "", "q", *keys, "proj")
    for name in ("q", *keys, "proj"):
        looking.linear(attn, name)
    weights = _class_weights(attn)
    if reason := plain_layers.why_not_tensors(weights):
        raise Declined(reason)
    looking.require_pool(weights[2], 1, attn.num_heads)


def _live_class(attn: Any) -> str | None:
    return looking.why_not_heads(attn, attn.num_heads, looking.shape_of(attn.q)[0], "it")


def _call_class(
    attn: Any, parts: list[bool], backend: str | None, x: Any, *others: Any, **more: Any
) -> Tensor | str:
    if others or more or not calls.fits(x, attn.q.weight):
        return ""
    weights = _class_weights(attn)
    return calls.pool(x[:, :1], x, weights, backend, num_heads=attn.num_heads)


CLASS_ATTENTION = Recipe(
    "timm.models.cait.ClassAttn",
    _pool_part(_CLASS, _check_class, _live_class, looking.class_attention_pays),
    _call_class,
)
VOLO_ATTENTION = Recipe(
    "timm.models.volo.ClassAttention",
    _pool_part(
        ("q", "kv", "attn_drop", "proj", "proj_drop"),
        _check_class,
        _live_class,
        looking.class_attention_pays,
    ),
    _call_class,
)


def _check_class_block(block: Any) -> None:
    looking.norm(block, "norm1")
    attn = looking.child(
        block, "attn", "timm.models.cait.ClassAttn", "timm.models.volo.ClassAttention"
    )
    _check_class(attn)


def _live_class_block(block: Any) -> str | None:
    return _live_class(block.attn)


def _norms(block: Any) -> dict[str, Any]:
    affine = (block.norm1.weight, block.norm1.bias)
    return {"query_norm": affine, "token_norm": affine, "norm_eps": block.norm1.eps}


def _call_cait(
    block: Any, parts: list[bool], backend: str | None, x: Any, x_cls: Any, **more: Any
) -> Tensor | str:
    weight = block.norm1.weight
    if more or not calls.fits(x, weight) or not calls.fits(x_cls, weight):
        return ""
    if x_cls.shape != (x.shape[0], 1, x.shape[2]) or x_cls.dtype != x.dtype:
        return ""
    update = calls.pool(
        x_cls,
        x,
        _class_weights(block.attn),
        backend,
        num_heads=block.attn.num_heads,
        include_query=True,
        **_norms(block),
    )
    if isinstance(update, str):
        return update
    x_cls = x_cls + block.drop_path(block.gamma_1 * update)
    return x_cls + block.drop_path(block.gamma_2 * block.mlp(block.norm2(x_cls)))


CAIT_BLOCK = Recipe(
    "timm.models.cait.LayerScaleBlockClassAttn",
    _pool_part(
        ("norm1", "attn"), _check_class_block, _live_class_block, looking.class_attention_pays
    ),
    _call_cait,
)


def _call_volo(
    block: Any, parts: list[bool], backend: str | None, x: Any, *others: Any, **more: Any
) -> Tensor | str:
    if others or more or not calls.fits(x, block.norm1.weight):
        return ""
    cls = x[:, :1]
    weights = _class_weights(block.attn)
    heads = block.attn.num_heads
    update = calls.pool(cls, x, weights, backend, num_heads=heads, **_norms(block))
    if isinstance(update, str):
        return update
    cls = cls + block.drop_path1(update)
    cls = cls + block.drop_path2(block.mlp(block.norm2(cls)))
    return torch.cat([cls, x[:, 1:]], dim=1)


VOLO_BLOCK = Recipe(
    "timm.models.volo.ClassBlock",
    _pool_part(
        ("norm1", "attn"), _check_class_block, _live_class_block, looking.class_attention_pays
    ),
    _call_volo,
)

RECIPES = (LATENT, POOL_2D, CLASS_ATTENTION, VOLO_ATTENTION, CAIT_BLOCK, VOLO_BLOCK)

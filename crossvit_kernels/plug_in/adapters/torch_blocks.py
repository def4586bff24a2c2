"""Blocks and pools around torch's attention and OpenAI's CLIP: torchvision and open_clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from crossvit_kernels.modules import plain_layers
from crossvit_kernels.modules.pooling import attention_weights
from crossvit_kernels.ops.layernorm_ffn.reference import FfnWeights
from crossvit_kernels.ops.layernorm_msa.reference import MsaWeights
from crossvit_kernels.plug_in import calls, looking
from crossvit_kernels.plug_in.adapters.halves import ffn_part, msa_part
from crossvit_kernels.plug_in.recipe import Declined, Part, Recipe, never

_Attend = Callable[[Any, Tensor, Any], Any]
_Feed = Callable[[Any, Tensor], Any]


def _recipe(
    target: str,
    names: tuple[str, str, str],
    attention_extras: tuple[str, ...],
    mlp_extras: tuple[str, ...],
    fc: tuple[str, str, str],
    attend: _Attend,
    feed: _Feed,
) -> Recipe:
    """Return the recipe of a block.

    Args:
        target: Its class.
        names: Of norm, attention, norm.
        attention_extras: Other children of the first half.
        mlp_extras: Of the second half, besides ``mlp``.
        fc: Names of Linear, activation, Linear in ``mlp``.
        attend: Computes the first half as the library does, with a mask or None, where only the
            second is served.
        feed: Computes the second half likewise.
    """
    norm1, attn, norm2 = names

    def check_attention(block: Any) -> None:
        looking.only(block, "", *names, "mlp", *mlp_extras)
        looking.norm(block, norm1)
        looking.torch_attention(block, attn)

    def live_attention(block: Any) -> str | None:
        return looking.why_not_torch_attention(block._modules[attn], attn)

    def msa_weights(block: Any) -> MsaWeights:
        norm, attention = block._modules[norm1], block._modules[attn]
        out = attention.out_proj
        projections = (attention.in_proj_weight, attention.in_proj_bias, out.weight, out.bias)
        return MsaWeights(norm.weight, norm.bias, *projections)

    def check_mlp(block: Any) -> None:
        looking.only(block, "", *names, "mlp", *attention_extras)
        looking.norm(block, norm2)
        looking.only(block.mlp, "mlp", *fc)
        looking.linear(block.mlp, fc[0], bias=True)
        looking.linear(block.mlp, fc[2], bias=True)
        looking.gelu(block.mlp._modules.get(fc[1]), f"mlp.{fc[1]}")

    def ffn_weights(block: Any) -> FfnWeights:
        layers = block.mlp._modules
        norm = block._modules[norm2]
        return FfnWeights(*plain_layers.parameters(norm, layers[fc[0]], layers[fc[2]]))

    def call(
        block: Any,
        parts: list[bool],
        backend: str | None,
        x: Any,
        *others: Any,
        attn_mask: Any = None,
        **more: Any,
    ) -> Tensor | str:
        for value in (*others, *more.values()):
            if value is not None:
                return ""
        if not calls.fits(x, block._modules[norm1].weight):
            return ""
        serves_attention = parts[0] and attn_mask is None
        if not serves_attention and not parts[1]:
            return ""
        y: Any
        if serves_attention:
            heads, eps = block._modules[attn].num_heads, block._modules[norm1].eps
            y = calls.msa(x, msa_weights(block), heads, eps, backend)
            if isinstance(y, str):
                return y
        else:
            y = attend(block, x, attn_mask)
        if parts[1]:
            return calls.ffn(y, ffn_weights(block), block._modules[norm2].eps, backend)
        return feed(block, y)

    return Recipe(
        target,
        (
            msa_part(
                (norm1, attn, *attention_extras),
                check_attention,
                msa_weights,
                lambda block: block._modules[attn].num_heads,
                live_attention,
            ),
            ffn_part((norm2, "mlp", *mlp_extras), check_mlp, ffn_weights),
        ),
        call,
    )


def _torchvision_attend(block: Any, x: Tensor, mask: Any) -> Any:
    y = block.ln_1(x)
    y, _ = block.self_attention(y, y, y, need_weights=False, attn_mask=mask)
    return block.dropout(y) + x


def _open_clip_attend(block: Any, x: Tensor, mask: Any) -> Any:
    return x + block.ls_1(block.attention(q_x=block.ln_1(x), attn_mask=mask))


TORCHVISION = _recipe(
    "torchvision.models.vision_transformer.EncoderBlock",
    ("ln_1", "self_attention", "ln_2"),
    ("dropout",),
    (),
    ("0", "1", "3"),
    _torchvision_attend,
    lambda block, x: x + block.mlp(block.ln_2(x)),
)
OPEN_CLIP = _recipe(
    "open_clip.transformer.ResidualAttentionBlock",
    ("ln_1", "attn", "ln_2"),
    ("ls_1",),
    ("ls_2",),
    ("c_fc", "gelu", "c_proj"),
    _open_clip_attend,
    lambda block, x: x + block.ls_2(block.mlp(block.ln_2(x))),
)


# CLIP's pool of a feature map, in open_clip and in OpenAI's package.

_POOL_2D = ("q_proj", "k_proj", "v_proj", "c_proj")


def _pool_weights(pool: Any) -> list[Any]:
    return plain_layers.parameters(pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj)


def _check_pool(pool: Any) -> None:
    looking.only(pool, "", *_POOL_2D)
    for name in _POOL_2D:
        looking.linear(pool, name, bias=True)
    weights = _pool_weights(pool)
    if reason := plain_layers.why_not_tensors([pool.positional_embedding, *weights]):
        raise Declined(reason)
    looking.require_pool(weights[2], 1, pool.num_heads)


def _live_pool(pool: Any) -> str | None:
    return looking.why_not_heads(pool, pool.num_heads, looking.shape_of(pool.k_proj)[0], "it")


def _call_pool(
    pool: Any, parts: list[bool], backend: str | None, x: Any, *others: Any, **more: Any
) -> Tensor | str:
    if others or more or not calls.fits(x, pool.positional_embedding, 4, 1):
        return ""
    if 1 + x.shape[2] * x.shape[3] != pool.positional_embedding.shape[0]:
        return ""
    embedding = pool.positional_embedding.to(x.dtype)
    tokens = x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
    y = calls.pool(
        tokens.mean(dim=1, keepdim=True) + embedding[:1],
        tokens + embedding[1:],
        _pool_weights(pool),
        backend,
        num_heads=pool.num_heads,
        include_query=True,
    )
    return y if isinstance(y, str) else y[:, 0]


def _pool_2d(target: str) -> Recipe:
    parts = (Part("attention_pool", _POOL_2D, _check_pool, _live_pool, never),)
    return Recipe(target, parts, _call_pool)


# CoCa's pooler: attention over tokens of another width, both normalised before.


def _check_pooler(pooler: Any) -> None:
    looking.only(pooler, "", "attn", "ln_q", "ln_k")
    norm = looking.norm(pooler, "ln_k")
    if looking.norm(pooler, "ln_q").eps != norm.eps:
        raise Declined("its LayerNorms have different eps")
    attn = looking.child(pooler, "attn", "torch.nn.modules.activation.MultiheadAttention")
    if attn.bias_k is not None or attn.add_zero_attn or not attn.batch_first:
        raise Declined("attn adds keys of its own, or is not batch_first")
    weights = _pooler_weights(attn)
    if reason := plain_layers.why_not_tensors([pooler.query, *weights]):
        raise Declined(reason)
    looking.require_pool(weights[2], pooler.query.shape[0], attn.num_heads)


def _live_pooler(pooler: Any) -> str | None:
    return looking.why_not_torch_attention(pooler.attn, "attn")


def _pooler_weights(attn: Any) -> list[Any]:
    if attn.in_proj_weight is not None:
        return attention_weights(attn, attn.out_proj)
    biases = (None,) * 3 if attn.in_proj_bias is None else attn.in_proj_bias.chunk(3)
    weights = (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight)
    projections = [t for pair in zip(weights, biases, strict=True) for t in pair]
    return [*projections, *plain_layers.parameters(attn.out_proj)]


def _call_pooler(
    pooler: Any, parts: list[bool], backend: str | None, x: Any, *others: Any, **more: Any
) -> Tensor | str:
    q, k = pooler.ln_q, pooler.ln_k
    if others or more or not calls.fits(x, k.weight):
        return ""
    return calls.pool(
        pooler.query.unsqueeze(0),
        x,
        _pooler_weights(pooler.attn),
        backend,
        num_heads=pooler.attn.num_heads,
        query_norm=(q.weight, q.bias),
        token_norm=(k.weight, k.bias),
        norm_eps=k.eps,
    )


POOLER = Recipe(
    "open_clip.transformer.AttentionalPooler",
    (Part("attention_pool", ("attn", "ln_q", "ln_k"), _check_pooler, _live_pooler, never),),
    _call_pooler,
)

RECIPES = (
    TORCHVISION,
    OPEN_CLIP,
    _pool_2d("open_clip.modified_resnet.AttentionPool2d"),
    _pool_2d("clip.model.AttentionPool2d"),
    POOLER,
)

"""Blocks and pools around torch's attention and OpenAI's CLIP: torchvision and open_clip."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from crossvit_kernels.modules import plain_layers
from crossvit_kernels.modules.pooling import attention_weights
from crossvit_kernels.ops.layernorm_msa.reference import MsaWeights
from crossvit_kernels.plug_in import calls, looking
from crossvit_kernels.plug_in.adapters.halves import Blocks, Half
from crossvit_kernels.plug_in.recipe import Declined, Part, Recipe, never


class TorchBlocks(Blocks):
    """Blocks around ``nn.MultiheadAttention``, whose MLP has one of a few classes."""

    mlps: tuple[str, ...] = ("torchvision.models.vision_transformer.MLPBlock",)

    def check_attention(self, block: Any) -> None:
        looking.torch_attention(block, self.attention.body)

    def check_mlp(self, block: Any) -> None:
        looking.child(block, self.mlp.body, *self.mlps)

    def live_attention(self, block: Any) -> str | None:
        path = self.attention.body
        return looking.why_not_torch_attention(block._modules[path], path)

    def msa_weights(self, block: Any) -> MsaWeights:
        norm = block._modules[self.attention.norm]
        attention = block._modules[self.attention.body]
        out = attention.out_proj
        projections = (attention.in_proj_weight, attention.in_proj_bias, out.weight, out.bias)
        return MsaWeights(norm.weight, norm.bias, *projections)

    def attend(self, block: Any, normed: Tensor, mask: Any) -> Any:
        """Return attention's update as the library's forward computes it."""
        attention = block._modules[self.attention.body]
        return attention(normed, normed, normed, need_weights=False, attn_mask=mask)[0]

    def call(
        self,
        block: Any,
        found: list[Any],
        backend: str | None,
        x: Any,
        *others: Any,
        attn_mask: Any = None,
        **more: Any,
    ) -> Tensor | str:
        """Serve a block; a mask, of queries and keys, is for the library's attention."""
        for value in (*others, *more.values()):
            if value is not None:
                return ""
        if not calls.fits(x, block._modules[self.attention.norm].weight):
            return ""

        def attend(normed: Tensor) -> Any:
            return self.attend(block, normed, attn_mask)

        return self.run(block, found, backend, x, attend, attn_mask is None)


class OpenClipBlocks(TorchBlocks):
    """open_clip's, which converts masks."""

    mlps = ("torch.nn.modules.container.Sequential",)

    def attend(self, block: Any, normed: Tensor, mask: Any) -> Any:
        return block.attention(q_x=normed, attn_mask=mask)


TORCHVISION = TorchBlocks(
    Half("ln_1", "self_attention", ("dropout",)), Half("ln_2", "mlp"), ("0", "1", "3")
).recipe("torchvision.models.vision_transformer.EncoderBlock")
OPEN_CLIP = OpenClipBlocks(
    Half("ln_1", "attn", ("ls_1",)), Half("ln_2", "mlp", ("ls_2",)), ("c_fc", "gelu", "c_proj")
).recipe("open_clip.transformer.ResidualAttentionBlock")


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

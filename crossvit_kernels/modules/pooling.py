"""Pooling heads: one or a few queries over all tokens."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from crossvit_kernels import checks, functional
from crossvit_kernels.modules import converters, plain_layers
from crossvit_kernels.modules.base import FusedModule, check_layers
from crossvit_kernels.modules.layers import (
    Mlp,
    ProbeAttention,
    ProbeBlock,
    attend,
    init_linears,
)
from crossvit_kernels.ops.layernorm_ffn.reference import FfnWeights

_MAP_LAYERS = plain_layers.layers(
    {"attention": nn.MultiheadAttention, "attention.out_proj": NonDynamicallyQuantizableLinear}
)
_CLASS_LAYERS = plain_layers.layers(dict.fromkeys(("q", "k", "v", "proj"), nn.Linear))
_NORM_LAYERS = plain_layers.layers({"norm": nn.LayerNorm})
_POOL_2D_LAYERS = plain_layers.layers(
    dict.fromkeys(("q_proj", "k_proj", "v_proj", "c_proj"), nn.Linear)
)
_PROBE: dict[str, type[nn.Module]] = {
    "cross_attention_block": ProbeBlock,
    "cross_attention_block.norm1": nn.LayerNorm,
    "cross_attention_block.xattn": ProbeAttention,
    "cross_attention_block.xattn.q": nn.Linear,
    "cross_attention_block.xattn.kv": nn.Linear,
    "cross_attention_block.norm2": nn.LayerNorm,
    "cross_attention_block.mlp": Mlp,
    "cross_attention_block.mlp.fc1": nn.Linear,
    "cross_attention_block.mlp.act": nn.GELU,
    "cross_attention_block.mlp.fc2": nn.Linear,
}
_PROBE_LAYERS = plain_layers.layers(_PROBE)
_PROBE_LAYERS_WITH_PROJECTION = plain_layers.layers(
    {**_PROBE, "cross_attention_block.xattn.proj": nn.Linear}
)


class MAPHead(FusedModule):
    """SigLIP's pooling head: a learned probe attends to all tokens, then an MLP with a residual.

    Replaces transformers' ``SiglipMultiheadAttentionPoolingHead`` and SigLIP 2's, and timm's
    ``AttentionPoolLatent`` as its SigLIP models use it.

    Args:
        hidden_dim: Hidden units of the MLP; None for 4 C.
        act: The MLP's activation: SigLIP's "gelu_tanh", or "gelu", which is timm's default, or
            "quick_gelu".
        empty: What a fully masked image pools to: "zeros", so that only the projection's bias is
            left, or the "mean" of the values of all its tokens, as SigLIP 2 in transformers. "mean"
            costs a copy of the tokens if there is a mask. The other arguments are described in
            ``crossvit_kernels.modules``.

    Raises:
        ValueError: num_heads does not divide dim, or act or empty is unknown.
    """

    attention: Any  # it may be replaced

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int | None = None,
        eps: float = 1e-6,
        backend: str | None = None,
        act: str = "gelu_tanh",
        empty: str = "zeros",
    ) -> None:
        super().__init__(dim, num_heads, backend)
        checks.one_of("empty", empty, ("zeros", "mean"))
        self.empty = empty
        self.probe = nn.Parameter(torch.empty(1, 1, dim))
        # Initialises its own in_proj.
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, 4 * dim if hidden_dim is None else hidden_dim, act)
        nn.init.xavier_uniform_(self.probe)
        std = dim**-0.5 / 0.8796  # truncation at 2 std reduces the std to 0.8796 std
        nn.init.trunc_normal_(self.attention.out_proj.weight, std=std, a=-2 * std, b=2 * std)
        for layer in (self.mlp.fc1, self.mlp.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    @classmethod
    def from_timm(cls, pool: nn.Module, backend: str | None = None) -> MAPHead:
        """Convert timm's ``AttentionPoolLatent``, weights, activation and eps included.

        Args:
            pool: The pool; its mode, dtype and device are kept.
            backend: Name of a backend, or None.

        Raises:
            ValueError: The pool computes what this head cannot: several latents, a position
                embedding, a norm of queries and keys, no norm before the MLP, other widths.
            TypeError: pool is not such a module.
        """
        options, state = converters.timm_latent_pool(pool)
        return converters.load(cls(**options, backend=backend), state, pool)

    @classmethod
    def from_transformers(cls, head: nn.Module, backend: str | None = None) -> MAPHead:
        """Convert transformers' ``Siglip[2]MultiheadAttentionPoolingHead``, weights included.

        ``empty`` becomes "mean" for SigLIP 2's, which takes a mask.

        Args:
            head: The head; its mode, dtype and device are kept.
            backend: Name of a backend, or None.

        Raises:
            ValueError: Its activation is none of ours.
            TypeError: head is not such a module.
        """
        options, state = converters.transformers_map_head(head)
        return converters.load(cls(**options, backend=backend), state, head)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, empty={self.empty!r}"

    def forward(self, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Map tokens [B, N, C], key_mask bool [B, N] (True = attend) to [B, C]."""
        if key_mask is not None and self.empty == "mean":
            tokens, key_mask = self._means_of_empty(tokens, key_mask)
        x = self._attend(tokens, key_mask)
        update: Tensor = self.mlp(self.layernorm(x))
        return x + update

    def _means_of_empty(self, tokens: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Let a fully masked image attend to its mean token: any weights give the mean value."""
        self._check(tokens, key_mask)
        empty = ~key_mask.any(dim=1, keepdim=True)
        mean = tokens.mean(dim=1, keepdim=True)
        return torch.where(empty.unsqueeze(-1), mean, tokens), key_mask | empty

    def _attend(self, tokens: Tensor, key_mask: Tensor | None) -> Tensor:
        """Return what the probe attends to, projected, [B, C]."""
        layers, reason = plain_layers.find(self._modules, _MAP_LAYERS)
        if reason is None:
            reason = _why_not_simple(layers[0], self.num_heads)
        weights: list[Any] = []
        if reason is None and self.backend != "reference":
            weights = attention_weights(*layers)
            reason = plain_layers.why_not_tensors(weights)
        if self._calls_layers(reason):
            self._check(tokens, key_mask)
            if reason is None:
                check_layers("tokens", tokens, [layers[0]])
            return self._attend_by_layers(tokens, key_mask)
        return self._pool(self.probe, tokens, weights, key_mask=key_mask)[:, 0]

    def _attend_by_layers(self, tokens: Tensor, key_mask: Tensor | None) -> Tensor:
        if tokens.shape[0] == 0:  # not supported by torch's attention
            tokens = torch.cat([tokens, tokens.new_zeros(1, *tokens.shape[1:])])
            return self._attend_by_layers(tokens, None)[:0]
        probe = self.probe.expand(tokens.shape[0], -1, -1)
        if key_mask is None:
            pooled, _ = self.attention(probe, tokens, tokens)
            return cast(Tensor, pooled)[:, 0]
        tokens = tokens.masked_fill(~key_mask.unsqueeze(-1), 0)  # even NaN
        empty = ~key_mask.any(dim=1, keepdim=True)
        ignored = ~(key_mask | empty)  # softmax over no keys is NaN
        pooled, _ = self.attention(probe, tokens, tokens, key_padding_mask=ignored)
        bias = getattr(getattr(self.attention, "out_proj", None), "bias", None)
        bias = pooled.new_zeros(()) if bias is None else bias.to(pooled.dtype)
        return torch.where(empty, bias, cast(Tensor, pooled)[:, 0])

    def _check(self, tokens: Tensor, key_mask: Tensor | None) -> None:
        checks.tensor("tokens", tokens, "B", "N", self.dim)
        if tokens.shape[1] == 0:
            raise ValueError("tokens: expected at least one token, found none")
        checks.key_mask(key_mask, tokens)


def attention_weights(attention: nn.MultiheadAttention, out_proj: nn.Module) -> list[Any]:
    """Return the weights as attention_pool takes them; views keep the type of their base."""
    assert attention.in_proj_weight is not None
    w_q, w_k, w_v = attention.in_proj_weight.chunk(3)
    b_q = b_k = b_v = None
    if attention.in_proj_bias is not None:
        b_q, b_k, b_v = attention.in_proj_bias.chunk(3)
    return [w_q, b_q, w_k, b_k, w_v, b_v, *plain_layers.parameters(out_proj)]


def _why_not_simple(attention: nn.MultiheadAttention, num_heads: int) -> str | None:
    """Return what torch's attention does besides projections and softmax, or None."""
    if attention.num_heads != num_heads:
        return f"attention has {attention.num_heads} heads"
    if attention.in_proj_weight is None:
        return "attention has keys or values of another width"
    if attention.bias_k is not None or attention.bias_v is not None or attention.add_zero_attn:
        return "attention adds keys of its own"
    if attention.dropout > 0 and attention.training:
        return "attention has dropout"
    return None


class ClassAttention(FusedModule):
    """CaiT's class attention: row 0 attends to all rows, including itself.

    Replaces timm's ``cait.ClassAttn``. The arguments are described in
    ``crossvit_kernels.modules``.

    Raises:
        ValueError: num_heads does not divide dim, or attn_drop is not in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend, attn_drop=attn_drop)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        init_linears(self)

    @classmethod
    def from_timm(cls, attention: nn.Module, backend: str | None = None) -> ClassAttention:
        """Convert timm's ``cait.ClassAttn``, weights included.

        Args:
            attention: The module; its mode, dtype and device are kept.
            backend: Name of a backend, or None.

        Raises:
            ValueError: It drops features after its projection, or has another scale.
            TypeError: attention is not such a module.
        """
        options, state = converters.timm_class_attention(attention)
        return converters.load(cls(**options, backend=backend), state, attention)

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Map x [B, 1 + N, C] to [B, 1, C]; norm, if given, is a LayerNorm of x to fuse."""
        layers, reason = plain_layers.find(self._modules, _CLASS_LAYERS)
        if reason is None and norm is not None:
            _, reason = plain_layers.find({"norm": norm}, _NORM_LAYERS)
        weights: list[Any] = []
        if reason is None and self.backend != "reference":
            weights = plain_layers.parameters(*layers)
            reason = plain_layers.why_not_tensors(weights)
        dropout_p = self.attn_drop if self.training else 0.0
        if self._calls_layers(reason):
            checks.tensor("x", x, "B", "1 + N", self.dim)
            if x.shape[1] == 0:
                raise ValueError("x: expected row 0, found no rows")
            if reason is None:
                check_layers("x", x, layers)
            x = x if norm is None else norm(x)
            q, k, v = self.q(x[:, :1]), self.k(x), self.v(x)
            out: Tensor = self.proj(attend(q, k, v, self.num_heads, self.scale, dropout_p))
            return out
        affine = None if norm is None else (norm.weight, norm.bias)
        eps = 1e-6 if norm is None else norm.eps
        norms = {"query_norm": affine, "token_norm": affine, "norm_eps": eps}
        return self._pool(x[:, :1], x, weights, dropout_p=dropout_p, **norms)


class AttentionPool2d(FusedModule):
    """CLIP's pooling of a feature map: the mean of all positions attends to itself and to them.

    Replaces ``AttentionPool2d`` in the ``ModifiedResNet`` of CLIP and open_clip.

    Args:
        size: (H, W) of the feature map, or one number for both.
        output_dim: C_out; None for C. The other arguments are described in
            ``crossvit_kernels.modules``.

    Raises:
        ValueError: num_heads does not divide dim; or, in a call, x has another shape.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        dim: int,
        num_heads: int,
        output_dim: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend)
        height, width = self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.positional_embedding = nn.Parameter(torch.empty(1 + height * width, dim))
        self.k_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.c_proj = nn.Linear(dim, dim if output_dim is None else output_dim)
        nn.init.normal_(self.positional_embedding, std=dim**-0.5)
        for layer in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=dim**-0.5)

    def extra_repr(self) -> str:
        return f"size={self.size}, {super().extra_repr()}"

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W], preferably in channels_last format, to [B, C_out]."""
        checks.tensor("x", x, "B", self.dim, *self.size)
        embedding = self.positional_embedding.to(x.dtype)
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
        query = tokens.mean(dim=1, keepdim=True) + embedding[:1]
        tokens = tokens + embedding[1:]
        layers, reason = plain_layers.find(self._modules, _POOL_2D_LAYERS)
        weights: list[Any] = []
        if reason is None and self.backend != "reference":
            weights = plain_layers.parameters(*layers)
            reason = plain_layers.why_not_tensors(weights)
        if self._calls_layers(reason):
            if reason is None:
                check_layers("x", x, layers)
            rows = torch.cat([query, tokens], dim=1)
            q, k, v = self.q_proj(query), self.k_proj(rows), self.v_proj(rows)
            out: Tensor = self.c_proj(attend(q, k, v, self.num_heads, self.scale))
            return out[:, 0]
        return self._pool(query, tokens, weights, include_query=True)[:, 0]


class AttentiveProbe(FusedModule):
    """V-JEPA's attentive pooler: one cross-attention block with learned queries.

    Replaces ``AttentivePooler(depth=1)`` of V-JEPA and, with ``out_proj=False``, of V-JEPA 2. The
    LayerNorm before attention is on the tokens alone; both residuals come from the queries.

    Args:
        num_queries: Q.
        mlp_ratio: Hidden units of the MLP per channel.
        out_proj: Whether attention has an output projection. The other arguments are described
            in ``crossvit_kernels.modules``.

    Raises:
        ValueError: num_heads does not divide dim.
    """

    cross_attention_block: Any  # it may be replaced

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_queries: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        out_proj: bool = True,
        eps: float = 1e-5,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend)
        self.query_tokens = nn.Parameter(torch.empty(1, num_queries, dim))
        hidden_dim = int(dim * mlp_ratio)
        block = ProbeBlock(dim, num_heads, hidden_dim, qkv_bias, out_proj, eps)
        self.cross_attention_block = block
        nn.init.trunc_normal_(self.query_tokens, std=0.02)
        init_linears(self)
        for layer in (block.xattn.proj, block.mlp.fc2):
            if layer is not None:  # it feeds the residual stream
                layer.weight.data /= 2**0.5

    @classmethod
    def from_transformers(cls, pooler: nn.Module, backend: str | None = None) -> AttentiveProbe:
        """Convert the cross-attention of transformers' ``VJEPA2AttentivePooler``.

        Args:
            pooler: The pooler; its mode, dtype and device are kept. This probe
                returns [B, 1, C] where the pooler returns [B, C].
            backend: Name of a backend, or None.

        Raises:
            ValueError: It has self-attention layers, another activation or attention dropout.
            TypeError: pooler is not such a module.
        """
        options, state = converters.transformers_probe(pooler)
        return converters.load(cls(**options, backend=backend), state, pooler)

    def forward(self, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Map tokens [B, N, C], key_mask bool [B, N] (True = attend) to [B, Q, C]."""
        block = self.cross_attention_block
        projected = getattr(getattr(block, "xattn", None), "proj", None) is not None
        expected = _PROBE_LAYERS_WITH_PROJECTION if projected else _PROBE_LAYERS
        layers, reason = plain_layers.find(self._modules, expected)
        ffn_weights = None
        if reason is None and self.backend != "reference":
            _, norm1, attention, q, kv, norm2, _, fc1, _, fc2, *proj = layers
            ffn_weights = FfnWeights(*plain_layers.parameters(norm2, fc1, fc2))
            reason = plain_layers.why_not_weights(ffn_weights)
        if self._calls_layers(reason):
            return self._call_layers(tokens, key_mask, layers if reason is None else [])
        assert ffn_weights is not None
        w_k, w_v = kv.weight.chunk(2)
        b_k, b_v = (None, None) if kv.bias is None else kv.bias.chunk(2)
        w_o, b_o = plain_layers.parameters(*proj) if proj else (None, None)
        update = self._pool(
            self.query_tokens,
            tokens,
            [q.weight, q.bias, w_k, b_k, w_v, b_v, w_o, b_o],
            key_mask=key_mask,
            token_norm=(norm1.weight, norm1.bias),
            norm_eps=norm1.eps,
            dropout_p=attention.dropout_p,
        )
        x = self.query_tokens + update
        return functional.layernorm_ffn(x, ffn_weights, norm2.eps, backend=self.backend)

    def _call_layers(self, tokens: Tensor, key_mask: Tensor | None, layers: list[Any]) -> Tensor:
        checks.tensor("tokens", tokens, "B", "N", self.dim)
        if tokens.shape[1] == 0:
            raise ValueError("tokens: expected at least one token, found none")
        checks.key_mask(key_mask, tokens)
        check_layers("tokens", tokens, layers)
        queries = self.query_tokens.expand(tokens.shape[0], -1, -1)
        if key_mask is None:
            return cast(Tensor, self.cross_attention_block(queries, tokens))
        tokens = tokens.masked_fill(~key_mask.unsqueeze(-1), 0)  # even NaN
        return cast(Tensor, self.cross_attention_block(queries, tokens, key_mask))

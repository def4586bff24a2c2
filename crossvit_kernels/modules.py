"""nn.Modules over the public functions, with the parameter names of the modules they replace.

State dicts load unchanged in both directions, and new parameters are initialised as there. What the
modules share:

- ``num_heads`` divides ``dim``, the width C of the tokens; ``eps`` is that of every LayerNorm;
  ``qkv_bias`` gives the query, key and value projections biases.
- ``attn_drop`` is attention dropout in training, which the reference runs. ``drop_path`` is the
  probability in training that an image's residual update is dropped.
- ``backend`` names a backend for all calls and may be set at any time; None leaves the choice to
  ``use_backend``, the environment and the input. A call that a named backend cannot run, and
  inputs that do not fit, raise what the function in ``crossvit_kernels.functional`` raises.
- Sub-modules of fused parts only hold parameters: their forward and hooks on it do not run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossvit_kernels import checks, functional
from crossvit_kernels.ops.cross_attention.weights import FusionWeights
from crossvit_kernels.ops.layernorm_ffn.weights import FfnWeights
from crossvit_kernels.ops.layernorm_msa.weights import MsaWeights


def drop_path_scale(batch: int, drop_path: float, training: bool, like: Tensor) -> Tensor | None:
    """The factor of each image's residual update: drop path (stochastic depth).

    Args:
        batch: B.
        drop_path: Probability that an image's update is dropped, in [0, 1).
        training: Whether updates are dropped at all.
        like: A tensor of the dtype and device that the factors take.

    Returns:
        [B], each 0 or 1 / (1 - drop_path), from torch's generator; None where all are 1.

    Raises:
        ValueError: drop_path is not in [0, 1).
    """
    checks.probability("drop_path", drop_path)
    if not training or drop_path == 0:
        return None
    keep = 1 - drop_path
    return like.new_empty(batch).bernoulli_(keep) / keep


class _FusedModule(nn.Module):
    """The settings that modules share."""

    attn_drop = drop_path = 0.0

    def __init__(self, dim: int, num_heads: int, backend: str | None, **rates: float) -> None:
        super().__init__()
        checks.heads(num_heads, dim=dim)
        self.dim, self.num_heads, self.backend = dim, num_heads, backend
        for name, rate in rates.items():
            checks.probability(name, rate)
            setattr(self, name, rate)

    def extra_repr(self) -> str:
        shown = ("dim", "num_heads", "attn_drop", "drop_path", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)

    def _residual_scale(self, x: Tensor) -> Tensor | None:
        return drop_path_scale(x.shape[0], self.drop_path, self.training, like=x)

    def _pool(self, query: Tensor, tokens: Tensor, weights: list[Any], **options: Any) -> Tensor:
        pooled = functional.attention_pool(
            query, tokens, *weights, num_heads=self.num_heads, backend=self.backend, **options
        )
        return cast(Tensor, pooled)


class CrossAttentionFusion(_FusedModule):
    """One CrossViT fusion: the CLS of a branch attends to the other branch's patch tokens.

    Replaces the entries for one branch of ``projs``, ``fusion`` (a ``CrossAttentionBlock``) and
    ``revert_projs`` in timm's ``crossvit.MultiScaleBlock``: here ``proj``, ``fusion`` and
    ``revert_proj``.

    Args:
        dim_own: C_own, the width of the branch that owns the CLS.
        dim: C, the width of the other branch, at which attention runs. num_heads is that
            branch's, too. The other arguments are described at the top of this file.

    Raises:
        ValueError: num_heads does not divide dim, or a rate is not in [0, 1).
    """

    def __init__(
        self,
        dim_own: int,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        eps: float = 1e-6,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend, attn_drop=attn_drop, drop_path=drop_path)
        self.dim_own, self.eps = dim_own, eps
        qkv = {name: nn.Linear(dim, dim, bias=qkv_bias) for name in ("wq", "wk", "wv")}
        attn = _Parts(**qkv, proj=nn.Linear(dim, dim))
        norm_own, norm, norm_back = (nn.LayerNorm(c, eps=eps) for c in (dim_own, dim, dim))
        self.proj = nn.Sequential(norm_own, nn.GELU(), nn.Linear(dim_own, dim))
        self.fusion = _Parts(norm1=norm, attn=attn)
        self.revert_proj = nn.Sequential(norm_back, nn.GELU(), nn.Linear(dim, dim_own))
        _init_linears(self)

    def extra_repr(self) -> str:
        return f"dim_own={self.dim_own}, {super().extra_repr()}"

    def weights(self) -> FusionWeights:
        """The parameters as ``functional.cross_attention_fusion`` takes them."""
        norm, attn = self.fusion.norm1, self.fusion.attn
        layers = (self.proj[0], self.proj[2], norm, attn.wq, attn.wk, attn.wv, attn.proj)
        return FusionWeights(*_weights(*layers, self.revert_proj[0], self.revert_proj[2]))

    def forward(self, cls: Tensor, tokens: Tensor) -> Tensor:
        """Cls [B, C_own], tokens [B, N, C] without the other CLS -> new cls [B, C_own]."""
        return functional.cross_attention_fusion(
            cls,
            tokens,
            self.weights(),
            self.num_heads,
            eps=self.eps,
            residual_scale=self._residual_scale(cls),
            dropout_p=self.attn_drop if self.training else 0.0,
            backend=self.backend,
        )


class TransformerBlock(_FusedModule):
    """A pre-norm transformer block. Replaces timm's ``vision_transformer.Block``.

    Args:
        mlp_ratio: Hidden units of the feed-forward network per channel.
        keep: What training keeps for backward on a GPU, "fast" or "lean": see
            ``functional.layernorm_msa``. The other arguments are described at the top of this
            file; drop_path applies to either half by itself.

    Raises:
        ValueError: num_heads does not divide dim, or a rate is not in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        eps: float = 1e-6,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        keep: str = "fast",
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend, attn_drop=attn_drop, drop_path=drop_path)
        self.eps, self.keep = eps, keep
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = _Parts(qkv=nn.Linear(dim, 3 * dim, bias=qkv_bias), proj=nn.Linear(dim, dim))
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = _mlp(dim, int(dim * mlp_ratio))
        _init_linears(self)

    def forward(self, x: Tensor, cls: Tensor | None = None) -> Tensor:
        """X [B, N, C] -> y [B, N, C]; cls [B, C], if given, stands in for row 0 of x."""
        y = functional.layernorm_msa(
            x,
            MsaWeights(*_weights(self.norm1, self.attn.qkv, self.attn.proj)),
            self.num_heads,
            eps=self.eps,
            residual_scale=self._residual_scale(x),
            cls=cls,
            dropout_p=self.attn_drop if self.training else 0.0,
            keep=self.keep,
            backend=self.backend,
        )
        weights = FfnWeights(*_weights(self.norm2, self.mlp.fc1, self.mlp.fc2))
        scale = self._residual_scale(y)
        return functional.layernorm_ffn(y, weights, self.eps, scale, self.backend)


class MAPHead(_FusedModule):
    """SigLIP's pooling head: a learned probe attends to all tokens, then an MLP with a residual.

    Replaces transformers' ``SiglipMultiheadAttentionPoolingHead``.

    Args:
        hidden_dim: Hidden units of the MLP; None for 4 C. The other arguments are described at
            the top of this file.

    Raises:
        ValueError: num_heads does not divide dim.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int | None = None,
        eps: float = 1e-6,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend)
        self.probe = nn.Parameter(torch.empty(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, num_heads)  # initialises its in_proj itself
        self.layernorm = nn.LayerNorm(dim, eps=eps)
        self.mlp = _mlp(dim, 4 * dim if hidden_dim is None else hidden_dim)
        nn.init.xavier_uniform_(self.probe)
        std = dim**-0.5 / 0.8796  # a cut at two deviations makes the deviation 0.8796 of itself
        nn.init.trunc_normal_(self.attention.out_proj.weight, std=std, a=-2 * std, b=2 * std)
        for layer in (self.mlp.fc1, self.mlp.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Tokens [B, N, C], key_mask bool [B, N] (True = attend) -> [B, C]."""
        w_q, w_k, w_v = self.attention.in_proj_weight.chunk(3)
        b_q, b_k, b_v = self.attention.in_proj_bias.chunk(3)
        weights = [w_q, b_q, w_k, b_k, w_v, b_v, *_weights(self.attention.out_proj)]
        x = self._pool(self.probe, tokens, weights, key_mask=key_mask)[:, 0]
        update = self.mlp.fc2(F.gelu(self.mlp.fc1(self.layernorm(x)), approximate="tanh"))
        return x + cast(Tensor, update)


class ClassAttention(_FusedModule):
    """CaiT's class attention: row 0 attends to all rows, itself among them.

    Replaces timm's ``cait.ClassAttn``. The arguments are described at the top of this file.

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
        _init_linears(self)

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """X [B, 1 + N, C] -> [B, 1, C]; norm, if given, is a LayerNorm of x to be fused."""
        affine = None if norm is None else (norm.weight, norm.bias)
        norms = {"query_norm": affine, "token_norm": affine, "norm_eps": norm.eps if norm else 1e-6}
        weights = _weights(self.q, self.k, self.v, self.proj)
        dropout_p = self.attn_drop if self.training else 0.0
        return self._pool(x[:, :1], x, weights, dropout_p=dropout_p, **norms)


class AttentionPool2d(_FusedModule):
    """CLIP's pooling of a feature map: the mean position attends to itself and all positions.

    Replaces ``AttentionPool2d`` in the ``ModifiedResNet`` of CLIP and open_clip.

    Args:
        size: (H, W) of the feature map, or one number for both.
        output_dim: C_out; None for C. The other arguments are described at the top of this file.

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
        height, width = (size, size) if isinstance(size, int) else size
        self.positional_embedding = nn.Parameter(torch.empty(1 + height * width, dim))
        self.k_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.c_proj = nn.Linear(dim, dim if output_dim is None else output_dim)
        nn.init.normal_(self.positional_embedding, std=dim**-0.5)
        for layer in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """X [B, C, H, W], best in channels_last memory format -> [B, C_out]."""
        positions = self.positional_embedding.shape[0] - 1
        if x.dim() != 4 or x.shape[1] != self.dim or x.shape[2] * x.shape[3] != positions:
            expected = f"[B, {self.dim}, H, W] with H * W = {positions}"
            raise ValueError(f"x: expected shape {expected}, found {list(x.shape)}")
        embedding = self.positional_embedding.to(x.dtype)
        tokens = x.flatten(2).transpose(1, 2).contiguous()
        query = tokens.mean(dim=1, keepdim=True) + embedding[:1]
        weights = _weights(self.q_proj, self.k_proj, self.v_proj, self.c_proj)
        return self._pool(query, tokens + embedding[1:], weights, include_query=True)[:, 0]


class AttentiveProbe(_FusedModule):
    """V-JEPA's attentive pooler: one cross-attention block whose queries are learned.

    Replaces ``AttentivePooler(depth=1)`` of V-JEPA and, with ``out_proj=False``, of V-JEPA 2. The
    LayerNorm before attention is on the tokens alone; both residuals come from the queries.

    Args:
        num_queries: Q.
        mlp_ratio: Hidden units of the MLP per channel.
        out_proj: Whether attention has an output projection. The other arguments are described
            at the top of this file.

    Raises:
        ValueError: num_heads does not divide dim.
    """

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
        self.eps = eps
        self.query_tokens = nn.Parameter(torch.empty(1, num_queries, dim))
        xattn = _Parts(
            q=nn.Linear(dim, dim, bias=qkv_bias),
            kv=nn.Linear(dim, 2 * dim, bias=qkv_bias),
            proj=nn.Linear(dim, dim) if out_proj else None,
        )
        mlp = _mlp(dim, int(dim * mlp_ratio))
        norm1, norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.cross_attention_block = _Parts(norm1=norm1, xattn=xattn, norm2=norm2, mlp=mlp)
        nn.init.trunc_normal_(self.query_tokens, std=0.02)
        _init_linears(self)
        for layer in (self.cross_attention_block.xattn.proj, self.cross_attention_block.mlp.fc2):
            if layer is not None:  # it feeds the residual stream
                layer.weight.data /= 2**0.5

    def forward(self, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Tokens [B, N, C], key_mask bool [B, N] (True = attend) -> [B, Q, C]."""
        block = self.cross_attention_block
        q, kv, proj = block.xattn.q, block.xattn.kv, block.xattn.proj
        w_k, w_v = kv.weight.chunk(2)
        b_k, b_v = (None, None) if kv.bias is None else kv.bias.chunk(2)
        w_o, b_o = (None, None) if proj is None else (proj.weight, proj.bias)
        update = self._pool(
            self.query_tokens,
            tokens,
            [q.weight, q.bias, w_k, b_k, w_v, b_v, w_o, b_o],
            key_mask=key_mask,
            token_norm=(block.norm1.weight, block.norm1.bias),
            norm_eps=self.eps,
        )
        ffn_weights = FfnWeights(*_weights(block.norm2, block.mlp.fc1, block.mlp.fc2))
        x = self.query_tokens + update
        return functional.layernorm_ffn(x, ffn_weights, self.eps, backend=self.backend)


class _Parts(nn.Module):
    """Sub-modules by name: a level in the keys of a state dict."""

    def __init__(self, **parts: nn.Module | None) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def _mlp(dim: int, hidden_dim: int) -> _Parts:
    return _Parts(fc1=nn.Linear(dim, hidden_dim), fc2=nn.Linear(hidden_dim, dim))


def _weights(*layers: Any) -> list[Any]:
    """Weight and bias of each layer, one after another; a bias may be None."""
    return [p for layer in layers for p in (layer.weight, layer.bias)]


def _init_linears(module: nn.Module) -> None:
    """The initialisation of vision transformers; a LayerNorm begins as the identity by itself."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

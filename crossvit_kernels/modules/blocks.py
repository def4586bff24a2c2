"""The transformer block, and its first half alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crossvit_kernels import checks, functional
from crossvit_kernels.modules import converters, plain_layers
from crossvit_kernels.modules.base import FusedModule, check_layers, unit_stride
from crossvit_kernels.modules.layers import Mlp, SelfAttention, add_update, init_linears
from crossvit_kernels.ops.layernorm_ffn.reference import FfnWeights
from crossvit_kernels.ops.layernorm_msa.reference import MsaWeights

_MSA_LAYERS = plain_layers.layers(
    {
        "norm1": nn.LayerNorm,
        "attn": SelfAttention,
        "attn.qkv": nn.Linear,
        "attn.proj": nn.Linear,
    }
)
_FFN_LAYERS = plain_layers.layers(
    {
        "norm2": nn.LayerNorm,
        "mlp": Mlp,
        "mlp.fc1": nn.Linear,
        "mlp.act": nn.GELU,
        "mlp.fc2": nn.Linear,
    }
)


class SelfAttentionHalf(FusedModule):
    """The first half of a transformer block, with timm's names."""

    attn: Any  # it may be replaced

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool,
        eps: float,
        attn_drop: float,
        drop_path: float,
        keep: str,
        backend: str | None,
    ) -> None:
        super().__init__(dim, num_heads, backend, drop_path=drop_path)
        self.keep = keep
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = SelfAttention(dim, num_heads, qkv_bias, attn_drop)

    @property
    def attn_drop(self) -> float:
        """Attention dropout in training."""
        return float(self.attn.attn_drop)

    @attn_drop.setter
    def attn_drop(self, rate: float) -> None:
        self.attn.attn_drop = rate

    def _msa(self, x: Tensor, cls: Tensor | None) -> Tensor:
        layers, reason = plain_layers.find(self._modules, _MSA_LAYERS)
        weights = None
        if reason is None and self.backend != "reference":
            norm, attn, qkv, proj = layers
            weights = MsaWeights(*plain_layers.parameters(norm, qkv, proj))
            reason = plain_layers.why_not_weights(weights)
            if reason is None and weights.qkv_weight.shape[0] != 3 * self.dim:
                reason = f"attn.qkv has {weights.qkv_weight.shape[0]} features"
        if self._calls_layers(reason):
            self._check(x, cls, layers if reason is None else [])
            scale = self._residual_scale(x)
            if cls is not None:
                x = torch.cat([cls.unsqueeze(1).to(x.dtype), x[:, 1:]], dim=1)
            return add_update(x, self.attn(self.norm1(x)), scale)
        assert weights is not None
        return functional.layernorm_msa(
            unit_stride(x),
            weights,
            attn.num_heads,
            eps=norm.eps,
            residual_scale=self._residual_scale(x),
            cls=cls,
            dropout_p=attn.dropout_p,
            keep=self.keep,
            backend=self.backend,
        )

    def _check(self, x: Tensor, cls: Tensor | None, layers: list[Any]) -> None:
        checks.tensor("x", x, "B", "N", self.dim)
        checks.optional_tensor("cls", cls, x.shape[0], self.dim)
        if cls is not None and x.shape[1] == 0:
            raise ValueError("cls: x has no row 0 that it could stand in for")
        checks.same_device_and_dtype("x", x, cls=cls)
        checks.one_of("keep", self.keep, ("fast", "lean"))
        check_layers("x", x, layers)


class SelfAttentionBlock(SelfAttentionHalf):
    """``x + MSA(LN(x))``: a transformer block without its feed-forward network.

    Args:
        keep: See ``functional.layernorm_msa``. The other arguments are described in
            ``crossvit_kernels.modules``.

    Raises:
        ValueError: num_heads does not divide dim, or a rate is not in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        eps: float = 1e-6,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        keep: str = "fast",
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, eps, attn_drop, drop_path, keep, backend)
        init_linears(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, N, C] to y [B, N, C]."""
        return self._msa(x, None)


class FeedForwardHalf(FusedModule):
    """The second half of a transformer block, with timm's names ``norm2`` and ``mlp``."""

    norm2: Any  # they may be replaced
    mlp: Any

    def feed_forward(self, x: Tensor) -> Tensor:
        """Return ``x + FFN(LN(x))``, x [B, N, C]."""
        layers, reason = plain_layers.find(self._modules, _FFN_LAYERS)
        weights = None
        if reason is None and self.backend != "reference":
            norm, _, fc1, _, fc2 = layers
            weights = FfnWeights(*plain_layers.parameters(norm, fc1, fc2))
            reason = plain_layers.why_not_weights(weights)
        scale = self._residual_scale(x)
        if self._calls_layers(reason):
            return add_update(x, self.mlp(self.norm2(x)), scale)
        assert weights is not None
        return functional.layernorm_ffn(x, weights, norm.eps, scale, self.backend)


class TransformerBlock(SelfAttentionHalf, FeedForwardHalf):
    """A pre-norm transformer block. Replaces timm's ``vision_transformer.Block``.

    Args:
        mlp_ratio: Hidden units of the feed-forward network per channel.
        keep: What training keeps for backward on a GPU, "fast" or "lean": see
            ``functional.layernorm_msa``.
        act: The activation: "gelu", its approximation "gelu_tanh", or CLIP's "quick_gelu". Kernels
            exist for "gelu"; with the others that half runs layer by layer. The other arguments are
            described in ``crossvit_kernels.modules``; drop_path applies to each half separately.

    Raises:
        ValueError: num_heads does not divide dim, a rate is not in [0, 1), or act is unknown.
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
        act: str = "gelu",
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, eps, attn_drop, drop_path, keep, backend)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act)
        init_linears(self)

    @classmethod
    def from_timm(cls, block: nn.Module, backend: str | None = None) -> TransformerBlock:
        """Convert timm's ``vision_transformer.Block``, weights, activation and eps included.

        Args:
            block: The block; its mode, dtype and device are kept.
            backend: Name of a backend, or None.

        Raises:
            ValueError: The block computes what this one cannot: layer scale, a norm of queries and
                keys, another activation, dropout of features.
            TypeError: block is not such a module.
        """
        options, state = converters.timm_block(block)
        eps2 = options.pop("eps2")
        converted = cls(**options, backend=backend)
        converted.norm2.eps = eps2
        return converters.load(converted, state, block)

    def forward(self, x: Tensor, cls: Tensor | None = None) -> Tensor:
        """Map x [B, N, C] to y [B, N, C]; cls [B, C], if given, replaces row 0 of x."""
        return self.feed_forward(self._msa(x, cls))

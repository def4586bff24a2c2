"""The transformer block, and its first half alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from crossvit_kernels import checks, functional
from crossvit_kernels.modules import converters, plain_layers
from crossvit_kernels.modules.base import FusedModule, check_layers, unit_stride
from crossvit_kernels.modules.layers import (
    LayerScale,
    Mlp,
    QuickGELU,
    SelfAttention,
    add_update,
    init_linears,
)
from crossvit_kernels.ops.layernorm_ffn.reference import OPTIONAL as FFN_OPTIONAL
from crossvit_kernels.ops.layernorm_ffn.reference import FfnWeights
from crossvit_kernels.ops.layernorm_msa.reference import OPTIONAL as MSA_OPTIONAL
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
        "mlp.fc2": nn.Linear,
    }
)
_LAYER_SCALES = {name: plain_layers.layers({name: LayerScale}) for name in ("ls1", "ls2")}


def _find_scale(children: Any, name: str, weights: Any) -> tuple[Tensor | None, str | None]:
    """Return the vector of a half's LayerScale, if it has one, and why kernels may not read it."""
    if name not in children:
        return None, None
    found, reason = plain_layers.find(children, _LAYER_SCALES[name])
    if reason is not None:
        return None, reason
    scale = found[0].gamma
    return scale, plain_layers.why_not_scale(scale, weights)


def _find_activation(layer: Any) -> tuple[str, str | None]:
    """Return the name of an activation, and why it is not one that kernels have."""
    name = {nn.SiLU: "silu", QuickGELU: "quick_gelu"}.get(type(layer), "gelu")
    if type(layer) is nn.GELU and layer.approximate == "tanh":
        name = "gelu_tanh"
        reason = plain_layers.why_not_called_plainly(layer)
    else:
        kind = type(layer) if name != "gelu" else nn.GELU
        reason = plain_layers.why_not_plain(layer, kind)
    return name, None if reason is None else f"mlp.act {reason}"


class SelfAttentionHalf(FusedModule):
    """The first half of a transformer block, with timm's names."""

    attn: Any  # they may be replaced
    ls1: Any

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
        proj_bias: bool = True,
        norm_bias: bool = True,
        init_values: float | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend, drop_path=drop_path)
        self.keep = keep
        self.norm1 = nn.LayerNorm(dim, eps=eps, bias=norm_bias)
        self.attn = SelfAttention(dim, num_heads, qkv_bias, attn_drop, proj_bias)
        if init_values:
            self.ls1 = LayerScale(dim, init_values)

    @property
    def attn_drop(self) -> float:
        """Attention dropout in training."""
        return float(self.attn.attn_drop)

    @attn_drop.setter
    def attn_drop(self, rate: float) -> None:
        self.attn.attn_drop = rate

    def _msa(self, x: Tensor, cls: Tensor | None, key_mask: Tensor | None = None) -> Tensor:
        layers, reason = plain_layers.find(self._modules, _MSA_LAYERS)
        weights = layer_scale = None
        if reason is None and self.backend != "reference":
            norm, attn, qkv, proj = layers
            weights = MsaWeights(*plain_layers.parameters(norm, qkv, proj))
            reason = plain_layers.why_not_weights(weights, MSA_OPTIONAL)
            if reason is None:
                layer_scale, reason = _find_scale(self._modules, "ls1", weights)
            if reason is None and weights.qkv_weight.shape[0] != 3 * self.dim:
                reason = f"attn.qkv has {weights.qkv_weight.shape[0]} features"
        if self._calls_layers(reason):
            self._check(x, cls, layers if reason is None else [])
            scale = self._residual_scale(x)
            if cls is not None:
                x = torch.cat([cls.unsqueeze(1).to(x.dtype), x[:, 1:]], dim=1)
            mask = () if key_mask is None else (key_mask,)
            update = self.attn(self.norm1(x), *mask)
            if "ls1" in self._modules:
                update = self.ls1(update)
            return add_update(x, update, scale)
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
            layer_scale=layer_scale,
            key_mask=key_mask,
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
    ls2: Any
    keep = "fast"

    def feed_forward(self, x: Tensor) -> Tensor:
        """Return ``x + FFN(LN(x))``, x [B, N, C]."""
        layers, reason = plain_layers.find(self._modules, _FFN_LAYERS)
        weights = layer_scale = None
        if reason is None and self.backend != "reference":
            norm, mlp, fc1, fc2 = layers
            activation, reason = _find_activation(mlp.act)
            weights = FfnWeights(*plain_layers.parameters(norm, fc1, fc2))
            reason = reason or plain_layers.why_not_weights(weights, FFN_OPTIONAL)
            if reason is None:
                layer_scale, reason = _find_scale(self._modules, "ls2", weights)
        scale = self._residual_scale(x)
        if self._calls_layers(reason):
            update = self.mlp(self.norm2(x))
            if "ls2" in self._modules:
                update = self.ls2(update)
            return add_update(x, update, scale)
        assert weights is not None
        given = x, weights, norm.eps, scale, self.backend
        return functional.layernorm_ffn(*given, activation, layer_scale, self.keep)


class TransformerBlock(SelfAttentionHalf, FeedForwardHalf):
    """A pre-norm transformer block. Replaces timm's ``vision_transformer.Block``.

    ``timm.create_model(name, block_fn=TransformerBlock)`` builds a vision transformer of these
    blocks, with timm's parameter names: the arguments after ``init_values`` are timm's.

    Args:
        mlp_ratio: Hidden units of the feed-forward network per channel.
        keep: What training keeps for backward on a GPU, "fast" or "lean": see
            ``functional.layernorm_msa`` and ``functional.layernorm_ffn``.
        act: The activation: "gelu", its approximation "gelu_tanh", CLIP's "quick_gelu", or "silu".
            The other arguments are described in ``crossvit_kernels.modules``; drop_path applies to
            each half separately.
        init_values: If given and not 0, the initial value of both halves' LayerScale.
        act_layer: Replaces act: a function that makes the activation's module.
        norm_layer: Replaces eps: a function of dim that makes a LayerNorm, with a bias or without.
        proj_bias: Whether the layers after attention have biases.
        device: Where the parameters are.
        dtype: Their dtype.
        unused: timm's other arguments, which must ask for nothing: no norm of queries and keys, no
            dropout of features, no other kind of attention or MLP.

    Raises:
        ValueError: num_heads does not divide dim, a rate is not in [0, 1), act is unknown, or an
            argument asks for what this block cannot compute.
        TypeError: There is no such argument.
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
        init_values: float | None = None,
        act_layer: Callable[[], nn.Module] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        proj_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unused: Any,
    ) -> None:
        converters.refuse_timm_options(unused)
        norm_bias = True
        if norm_layer is not None:
            eps, norm_bias = converters.norm_options(norm_layer, dim)
        if act_layer is not None:
            act = converters.made_activation(act_layer)
        super().__init__(
            *(dim, num_heads, qkv_bias, eps, attn_drop, drop_path, keep, backend),
            *(proj_bias, norm_bias, init_values),
        )
        self.norm2 = nn.LayerNorm(dim, eps=eps, bias=norm_bias)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act, proj_bias)
        if init_values:
            self.ls2 = LayerScale(dim, init_values)
        init_linears(self)
        self.to(device, dtype)

    @classmethod
    def from_timm(cls, block: nn.Module, backend: str | None = None) -> TransformerBlock:
        """Convert timm's ``vision_transformer.Block``: weights, LayerScale, activation and eps.

        Args:
            block: The block; its mode, dtype and device are kept.
            backend: Name of a backend, or None.

        Raises:
            ValueError: The block computes what this one cannot: a norm of queries and keys, another
                activation, dropout of features.
            TypeError: block is not such a module.
        """
        options, state = converters.timm_block(block)
        eps2 = options.pop("eps2")
        converted = cls(**options, backend=backend)
        converted.norm2.eps = eps2
        return converters.load(converted, state, block)

    def forward(
        self, x: Tensor, cls: Tensor | None = None, key_mask: Tensor | None = None
    ) -> Tensor:
        """Map x [B, N, C] to y [B, N, C].

        cls [B, C], if given, replaces row 0 of x; key_mask bool [B, N] is True where a token is
        attended to.
        """
        return self.feed_forward(self._msa(x, cls, key_mask))

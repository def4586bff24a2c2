"""The fusion of one CrossViT branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crossvit_kernels import checks, functional
from crossvit_kernels.modules import converters, plain_layers
from crossvit_kernels.modules.base import FusedModule, calls_layers, check_layers
from crossvit_kernels.modules.layers import (
    CrossAttention,
    CrossAttentionBlock,
    add_update,
    drop_path_scale,
    init_linears,
    lift,
)
from crossvit_kernels.ops.cross_attention.reference import FusionWeights, absent_weights

_LIFT = {"": nn.Sequential, ".0": nn.LayerNorm, ".1": nn.GELU, ".2": nn.Linear}
_CROSS_ATTENTION: dict[str, type[nn.Module]] = {
    "fusion": CrossAttentionBlock,
    "fusion.norm1": nn.LayerNorm,
    "fusion.attn": CrossAttention,
    **{f"fusion.attn.{name}": nn.Linear for name in ("wq", "wk", "wv", "proj")},
}
_CROSS_ATTENTION_LAYERS = plain_layers.layers(_CROSS_ATTENTION)
_NO_LIFT = (None,) * 4


def _lift_layers(name: str, is_identity: bool) -> dict[str, type[nn.Module]]:
    if is_identity:
        return {name: nn.Identity}
    return {f"{name}{key}": kind for key, kind in _LIFT.items()}


#: By whether f and g are the identity.
_FUSION_LAYERS = {
    (no_f, no_g): plain_layers.layers(
        {
            **_lift_layers("proj", no_f),
            **_CROSS_ATTENTION,
            **_lift_layers("revert_proj", no_g),
        }
    )
    for no_f in (False, True)
    for no_g in (False, True)
}


class FusionLayers(NamedTuple):
    """The layers of one fusion, as a fused operation uses them."""

    weights: FusionWeights | None
    eps: float
    num_heads: int
    dropout_p: float
    reason: str | None  # why weights are None
    plain: list[Any]  # the layers up to the first that is not plain

    @classmethod
    def find(cls, children: Mapping[str, nn.Module | None], read: bool = True) -> FusionLayers:
        """Find the layers in ``proj``, ``fusion`` and ``revert_proj``; f and g may be Identity.

        Args:
            children: The three, by these names.
            read: Whether to read the parameters, which computes those that are parametrized.
        """
        no_f, no_g = (
            isinstance(children.get(name), nn.Identity) for name in ("proj", "revert_proj")
        )
        layers, reason = plain_layers.find(children, _FUSION_LAYERS[no_f, no_g])
        if reason is not None:
            return cls(None, 0.0, 1, 0.0, reason, layers)
        end_of_f = 1 if no_f else len(_LIFT)
        f, rest = layers[:end_of_f], layers[end_of_f:]
        _, norm, attn, wq, wk, wv, out, *g = rest
        eps = norm.eps
        if any(lift[1].eps != eps for lift in (f, g) if len(lift) > 1):
            return cls(None, 0.0, 1, 0.0, "its LayerNorms have different eps", layers)
        weights = None
        if read:
            weights = FusionWeights(
                *_lift_parameters(f),
                *plain_layers.parameters(norm, wq, wk, wv, out),
                *_lift_parameters(g),
            )
            reason = plain_layers.why_not_weights(weights, absent_weights(weights))
        return cls(weights, eps, attn.num_heads, attn.dropout_p, reason, layers)


def _lift_parameters(layers: list[Any]) -> Sequence[Any]:
    """The parameters of f or g from its layers; None for each if it is the identity."""
    return plain_layers.parameters(layers[1], layers[3]) if len(layers) > 1 else _NO_LIFT


def fuse_layer_by_layer(
    cls: Tensor, tokens: Tensor, proj: nn.Module, fusion: nn.Module, revert_proj: nn.Module
) -> Tensor:
    """Map cls [B, C_cls] and tokens [B, N, C] to the new CLS [B, C_cls], calling every layer."""
    checks.tensor("cls", cls, "B", "C_cls")
    checks.tensor("tokens", tokens, cls.shape[0], "N", "C")
    checks.same_device_and_dtype("cls", cls, tokens=tokens)
    y = fusion(torch.cat([proj(cls).unsqueeze(1), tokens], dim=1))
    new_cls: Tensor = revert_proj(y[:, 0])
    return new_cls


def attend_to_patches(
    y: Tensor, patches: Tensor, block: CrossAttentionBlock, backend: str | None
) -> Tensor:
    """Return ``y + CA(LN([y || patches]))``, by ``attention_pool`` if the block's layers are plain.

    Args:
        y: [B, 1, C].
        patches: [B, N, C]; with N = 0 the layers are called, on one row per image.
        block: The block that computes it.
        backend: Name of a backend, or None.

    Returns:
        [B, 1, C].
    """
    layers, reason = plain_layers.find({"fusion": block}, _CROSS_ATTENTION_LAYERS)
    # A row alone attends to itself with weight 1: the layers' gradients of q and k are exactly 0.
    if calls_layers(block, backend, reason) or patches.shape[1] == 0:
        return block(torch.cat([y, patches], dim=1))
    _, norm, attn, *projections = layers
    affine = (norm.weight, norm.bias)
    scale = block_drop_path(block, y)
    update: Any = functional.attention_pool(
        y,
        patches,
        *plain_layers.parameters(*projections),
        num_heads=attn.num_heads,
        include_query=True,
        query_norm=affine,
        token_norm=affine,
        norm_eps=norm.eps,
        dropout_p=attn.dropout_p,
        backend=backend,
    )
    return add_update(y, update, scale)


def block_drop_path(block: CrossAttentionBlock, like: Tensor) -> Tensor | None:
    """Return the factors [B] of the block's update, or None; like [B, ...]."""
    return drop_path_scale(like.shape[0], block.drop_path, block.training, like=like)


class CrossAttentionFusion(FusedModule):
    """One CrossViT fusion: the CLS of a branch attends to the other branch's patch tokens.

    Replaces the entries for one branch of ``projs``, ``fusion`` (a ``CrossAttentionBlock``) and
    ``revert_projs`` in timm's ``crossvit.MultiScaleBlock``: here ``proj``, ``fusion`` and
    ``revert_proj``.

    Args:
        dim_own: C_cls, the width of the branch that owns the CLS.
        dim: C, the width of the other branch, at which attention runs. num_heads is also that
            branch's. The other arguments are described in ``crossvit_kernels.modules``.
        projections: Whether there are f and g (Eq. 5-7); False makes both the identity.

    Raises:
        ValueError: num_heads does not divide dim, a rate is not in [0, 1), or there are no
            projections between different widths.
    """

    proj: nn.Module
    fusion: Any
    revert_proj: nn.Module

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
        projections: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, backend)
        if not projections and dim_own != dim:
            raise ValueError(f"dim_own: expected dim, {dim}, without projections, found {dim_own}")
        self.dim_own = dim_own
        self.proj = lift(dim_own, dim, eps) if projections else nn.Identity()
        self.fusion = CrossAttentionBlock(dim, num_heads, qkv_bias, eps, attn_drop, drop_path)
        self.revert_proj = lift(dim, dim_own, eps) if projections else nn.Identity()
        init_linears(self)

    @classmethod
    def from_timm(
        cls, block: nn.Module, branch: int, backend: str | None = None
    ) -> CrossAttentionFusion:
        """Convert one branch's fusion of timm's ``crossvit.MultiScaleBlock``, weights included.

        Args:
            block: The MultiScaleBlock.
            branch: The branch whose CLS the fusion updates, 0 or 1.
            backend: Name of a backend, or None.

        Raises:
            ValueError: The source computes what this module cannot, e.g. with another activation.
            TypeError: block is not such a module.
        """
        options, state = converters.timm_fusion(block, branch)
        return converters.load(cls(**options, backend=backend), state, block)

    @property
    def attn_drop(self) -> float:
        """Attention dropout in training."""
        return float(self.fusion.attn.attn_drop)

    @attn_drop.setter
    def attn_drop(self, rate: float) -> None:
        self.fusion.attn.attn_drop = rate

    @property
    def drop_path(self) -> float:
        """Probability in training that an image's update is dropped."""
        return float(self.fusion.drop_path)

    @drop_path.setter
    def drop_path(self, rate: float) -> None:
        self.fusion.drop_path = rate

    def extra_repr(self) -> str:
        return f"dim_own={self.dim_own}, {super().extra_repr()}"

    def weights(self) -> FusionWeights:
        """Return the parameters as ``functional.cross_attention_fusion`` takes them.

        Raises:
            ValueError: They do not determine what the layers compute, e.g. if one has hooks.
        """
        layers = FusionLayers.find(self._modules)
        if layers.weights is None or layers.reason is not None:
            raise ValueError(f"weights: {layers.reason}")
        return layers.weights

    def forward(self, cls: Tensor, tokens: Tensor) -> Tensor:
        """Map cls [B, C_cls] and tokens [B, N, C], without their CLS, to the new CLS [B, C_cls]."""
        layers = FusionLayers.find(self._modules, read=self.backend != "reference")
        if self._calls_layers(layers.reason):
            if layers.reason is None:
                checks.tensor("cls", cls, "B", self.dim_own)
                checks.tensor("tokens", tokens, cls.shape[0], "N", self.dim)
                check_layers("cls", cls, layers.plain)
            return fuse_layer_by_layer(cls, tokens, self.proj, self.fusion, self.revert_proj)
        assert layers.weights is not None
        return functional.cross_attention_fusion(
            cls,
            tokens,
            layers.weights,
            layers.num_heads,
            eps=layers.eps,
            residual_scale=block_drop_path(self.fusion, cls),
            dropout_p=layers.dropout_p,
            backend=self.backend,
        )

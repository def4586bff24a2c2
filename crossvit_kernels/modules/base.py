"""Shared by the modules: settings, and the choice between a fused call and their layers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from crossvit_kernels import checks, functional
from crossvit_kernels.backends import check_name
from crossvit_kernels.modules import plain_layers
from crossvit_kernels.modules.layers import drop_path_scale


def calls_layers(owner: nn.Module, backend: str | None, reason: str | None) -> bool:
    """Whether a call goes through the layers rather than to a fused operation.

    Args:
        owner: The called module, for the message.
        backend: Its backend.
        reason: Why its layers' parameters do not determine what they compute; None if they do.

    Raises:
        ValueError: There is no such backend.
    """
    if backend is not None:
        check_name(backend)
    if backend == "reference" or plain_layers.is_transformed():
        return True
    if reason is not None:
        plain_layers.report(owner, reason)
    return reason is not None


def check_layers(name: str, x: Tensor, layers: list[Any]) -> None:
    """Check that x has the device and dtype of the parameters of plain layers.

    Parametrized ones are skipped: reading their weights would compute them.
    """
    owned = {
        f"{type(layer).__name__}.{key}": p
        for layer in layers
        for key, p in layer._parameters.items()
    }
    checks.same_device_and_dtype(name, x, **owned)


def unit_stride(x: Any) -> Any:
    """Return tokens with contiguous channels, unlike ``map.flatten(2).transpose(1, 2)``."""
    strided = isinstance(x, Tensor) and x.layout == torch.strided and x.dim() == 3
    return x.contiguous() if strided and x.stride(-1) != 1 else x


class FusedModule(nn.Module):
    """Base class with the settings that the modules share."""

    attn_drop = drop_path = 0.0

    def __init__(self, dim: int, num_heads: int, backend: str | None, **rates: float) -> None:
        super().__init__()
        checks.heads(num_heads, dim=dim)
        self.dim, self.num_heads, self.backend = dim, num_heads, backend
        self.scale = self._scale = (dim // num_heads) ** -0.5  # of the scores
        for name, rate in rates.items():
            checks.probability(name, rate)
            setattr(self, name, rate)

    def extra_repr(self) -> str:
        shown = ("dim", "num_heads", "attn_drop", "drop_path", "backend")
        return ", ".join(f"{name}={getattr(self, name, None)!r}" for name in shown)

    def _residual_scale(self, x: Tensor) -> Tensor | None:
        return drop_path_scale(x.shape[0], self.drop_path, self.training, like=x)

    def _calls_layers(self, reason: str | None) -> bool:
        if reason is None and self.scale != self._scale:
            reason = f"has scale={self.scale}"
        return calls_layers(self, self.backend, reason)

    def _pool(self, query: Tensor, tokens: Tensor, weights: list[Any], **options: Any) -> Tensor:
        pooled = functional.attention_pool(
            query,
            unit_stride(tokens),
            *weights,
            num_heads=self.num_heads,
            backend=self.backend,
            **options,
        )
        return cast(Tensor, pooled)

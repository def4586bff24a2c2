"""masked_mean in plain PyTorch: the mean of an image's unmasked tokens, 0 if there are none."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MaskedMeanInputs(NamedTuple):
    """The arguments of ``masked_mean``."""

    x: Tensor  # [B, N, C]
    key_mask: Tensor | None  # bool [B, N], True for tokens to include


def masked_mean(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """X [B, N, C] -> the mean [B, C]."""
    if key_mask is None:
        return x.mean(dim=1)
    kept = x.masked_fill(~key_mask.unsqueeze(-1), 0)
    return kept.sum(dim=1) / key_mask.sum(dim=1, keepdim=True).clamp(min=1)

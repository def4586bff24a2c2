"""masked_mean on a CPU: one product each way, without copying the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from masked_mean.reference import MaskedMeanInputs


class Saved(NamedTuple):
    """What forward saves for backward."""

    weights: Tensor  # [B, 1, N]: 1 / number of unmasked tokens, 0 for masked ones


def why_not(inputs: MaskedMeanInputs) -> str | None:
    if inputs.x.device.type != "cpu":
        return f"the tokens are on {inputs.x.device}, not on a CPU"
    return "there are no tokens" if inputs.x.shape[1] == 0 else None


def empty_saved(inputs: MaskedMeanInputs, keep: str) -> Saved:
    x = inputs.x
    return Saved(x.new_empty(x.shape[0], 1, x.shape[1]))


def forward(inputs: MaskedMeanInputs, eps: float | None, keep: str) -> tuple[Tensor, Saved | None]:
    x, key_mask = inputs
    if key_mask is None:
        key_mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    else:
        x = x.masked_fill(~key_mask.unsqueeze(-1), 0)  # their values have no effect
    weights = (key_mask / key_mask.sum(dim=1, keepdim=True).clamp(min=1)).unsqueeze(1).to(x.dtype)
    return torch.bmm(weights, x)[:, 0].clone(), Saved(weights) if keep else None


def backward(
    douts: Sequence[Tensor],
    inputs: MaskedMeanInputs,
    saved: Saved,
    eps: float | None,
    wanted: Any,
) -> MaskedMeanInputs:
    (dy,) = douts
    return MaskedMeanInputs(saved.weights.transpose(1, 2) * dy.unsqueeze(1), None)

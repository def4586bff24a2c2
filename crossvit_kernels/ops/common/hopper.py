"""The limits of the variant "gluon": blocks with layers on Hopper's tensor cores."""

from __future__ import annotations

from typing import Any

import torch

from crossvit_kernels.ops.common import sm90_linear, sm90_wide


def why_not(inputs: Any) -> str | None:
    """Return why no layer of layernorm_msa or layernorm_ffn runs there, or None."""
    x, weights = inputs.x, inputs.weights
    first, last = weights[2], weights[4]  # qkv's and the projection's, or fc1's and fc2's
    reason = sm90_linear.why_not(x, first)
    return reason and (sm90_wide.why_not(x, last) and reason)


def is_proven(device: torch.device) -> bool:
    """Whether all kernels that the variant runs are known to end on a device."""
    return sm90_linear.is_proven(device) and sm90_wide.is_proven(device)

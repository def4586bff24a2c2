"""attention_core in plain PyTorch: the reference definition.

xhat_n = (x_n - mean_n) / sqrt(var_n + eps)
s_rn   = u_r . xhat_n
p_r    = softmax_n(s_r)        lse_r = log sum_n exp(s_rn)
m_r    = sum_n p_rn xhat_n
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class CoreInputs(NamedTuple):
    """The arguments of ``attention_core`` except norm_eps."""

    u: Tensor  # [B, R, C] or [1, R, C], in accumulate_dtype of x
    x: Tensor  # [B, N, C]
    key_mask: Tensor | None  # bool [B, N]
    extra_token: Tensor | None  # [B, C]


def normalized_tokens(x: Tensor, extra_token: Tensor | None, norm_eps: float | None) -> Tensor:
    """Return xhat [B, N, C], or [B, 1 + N, C] with the extra token first."""
    if extra_token is not None:
        x = torch.cat([extra_token.unsqueeze(1), x], dim=1)
    return x if norm_eps is None else F.layer_norm(x, x.shape[-1:], eps=norm_eps)


def without_masked(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Return x with masked tokens zeroed: their contents, even NaN, must not propagate."""
    return x if key_mask is None else x.masked_fill(~key_mask.unsqueeze(-1), 0)


def full_mask(key_mask: Tensor | None, extra_token: Tensor | None) -> Tensor | None:
    """Return the mask [B, 1 + N] including the extra token, which is always attended to."""
    if key_mask is None or extra_token is None:
        return key_mask
    return F.pad(key_mask, (1, 0), value=True)


def attention_core(
    u: Tensor,
    x: Tensor,
    norm_eps: float | None,
    key_mask: Tensor | None = None,
    extra_token: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (m, lse): u [B or 1, R, C], x [B, N, C] -> m [B, R, C], lse [B, R].

    If the mask leaves a query nothing to attend to, m is 0 and lse is -inf.
    """
    x, mask = without_masked(x, key_mask), full_mask(key_mask, extra_token)
    xhat = normalized_tokens(x, extra_token, norm_eps)
    scores = u @ xhat.to(u.dtype).transpose(-2, -1)
    if mask is None:
        weights = scores.softmax(dim=-1)
        lse = torch.logsumexp(_in_statistics_dtype(scores), dim=-1)
    else:
        attended = mask.unsqueeze(1)
        # finfo.min rather than -inf: a fully masked row must not give NaN in backward.
        scores = scores.masked_fill(~attended, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1) * attended
        lse = torch.logsumexp(_in_statistics_dtype(scores), dim=-1)
        lse = lse.masked_fill(~attended.any(dim=-1), -torch.inf)
    return weights @ xhat.to(weights.dtype), lse


def attention_weights(
    u: Tensor,
    x: Tensor,
    lse: Tensor,
    norm_eps: float | None,
    key_mask: Tensor | None = None,
    extra_token: Tensor | None = None,
) -> Tensor:
    """Return p [B, R, N] (1 + N with an extra token) from the lse that attention_core returned.

    Scores are computed in the precision of lse, regardless of autocast: exp needs it.
    """
    x, mask = without_masked(x, key_mask), full_mask(key_mask, extra_token)
    if extra_token is not None:
        extra_token = extra_token.to(lse.dtype)
    with torch.autocast(x.device.type, enabled=False):
        xhat = normalized_tokens(x.to(lse.dtype), extra_token, norm_eps)
        scores = u.to(lse.dtype) @ xhat.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), -torch.inf)
        lse = lse.masked_fill(lse == -torch.inf, 0)
    return (scores - lse.unsqueeze(-1)).exp().to(u.dtype)


def _in_statistics_dtype(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()

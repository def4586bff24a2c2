"""attention_core on the compiled extension: one pass over the tokens each way, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.extension import _C


def why_not(x: Tensor) -> str | None:
    """Why the CPU kernel cannot take tokens x; None where it can."""
    if extension.missing:
        return extension.missing
    if x.device.type != "cpu":
        return f"the tokens are on {x.device}, not on a CPU"
    if x.dtype not in extension.DTYPE_CODES:
        return f"it has no code for {x.dtype} tokens"
    return None


def forward(
    u: Tensor,
    x: Tensor,
    key_mask: Tensor | None,
    extra_token: Tensor | None,
    norm_eps: float | None,
    m_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(m, lse) as in reference.py; u, m and lse in ``extension.accumulate_dtype(x)``.

    m_out: memory for m, [B, R, C] with any strides that end in 1.
    """
    batch, num_rows, channels = x.shape[0], u.shape[1], x.shape[2]
    u, x = extension.unit_stride(u), extension.unit_stride(x)
    m = u.new_empty(batch, num_rows, channels) if m_out is None else m_out
    lse = u.new_empty(batch, num_rows)
    if m.numel():
        _C.attention_core_forward(
            problem=extension.core_problem(x, extra_token, num_rows, norm_eps),
            x=extension.tokens(x, extra_token),
            u=extension.rows(u.expand(batch, -1, -1)),
            mask=extension.mask(key_mask),
            m=extension.rows(m),
            lse=lse.data_ptr(),
        )
    return m, lse


def backward(
    dm: Tensor,
    dlse: Tensor | None,
    u: Tensor,
    x: Tensor,
    key_mask: Tensor | None,
    extra_token: Tensor | None,
    m: Tensor,
    lse: Tensor,
    norm_eps: float | None,
    du_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(du, dx, dextra_token); du is per image, [B, R, C], also where u is shared."""
    batch, num_rows, channels = m.shape
    u, x, dm = extension.unit_stride(u), extension.unit_stride(x), extension.unit_stride(dm)
    dlse = None if dlse is None else dlse.contiguous()  # alive until the kernel returns
    du = torch.empty_like(m) if du_out is None else du_out
    dx = x.new_empty(x.shape)
    dextra = None if extra_token is None else x.new_empty(batch, channels)
    if m.numel():
        _C.attention_core_backward(
            problem=extension.core_problem(x, extra_token, num_rows, norm_eps),
            x=extension.tokens(x, extra_token),
            u=extension.rows(u.expand(batch, -1, -1)),
            mask=extension.mask(key_mask),
            m=extension.rows(m),
            lse=lse.data_ptr(),
            dm=extension.rows(dm),
            dlse=extension.optional(dlse),
            du=extension.rows(du),
            dx=extension.tokens(dx, dextra),
        )
    return du, dx, dextra

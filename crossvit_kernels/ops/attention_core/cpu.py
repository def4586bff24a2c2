"""attention_core on the CPU kernels of the extension: one token pass per direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.backends import accumulate_dtype
from crossvit_kernels.extension import _C
from crossvit_kernels.ops.attention_core.reference import CoreInputs


def why_not(inputs: CoreInputs) -> str | None:
    return why_not_tokens(inputs.x)


def why_not_tokens(x: Tensor) -> str | None:
    """Return why the CPU kernel cannot take tokens x, or None."""
    if reason := extension.why_not_cpu_kernels(x):
        return reason
    if x.dtype not in extension.DTYPE_CODES:
        return f"it has no code for {x.dtype} tokens"
    return None


def forward_pass(
    u: Tensor,
    x: Tensor,
    key_mask: Tensor | None,
    extra_token: Tensor | None,
    norm_eps: float | None,
    m_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (m, lse) as in reference.py; u, m and lse in ``accumulate_dtype(x)``.

    m_out: memory for m, [B, R, C], with unit stride along C.
    """
    batch, num_rows, channels = x.shape[0], u.shape[1], x.shape[2]
    u, x, extra_token = _unit_strides(u, x, extra_token)
    m = u.new_empty(batch, num_rows, channels) if m_out is None else m_out
    lse = u.new_empty(batch, num_rows)
    if m.numel():
        args, dtype = extension.Arguments(x.device), accumulate_dtype(x)
        _C.attention_core_forward(
            problem=extension.core_problem(x, extra_token, num_rows, norm_eps),
            x=args.tokens(x, extra_token),
            u=args.rows(u.expand(batch, -1, -1), dtype),
            mask=args.mask(key_mask),
            m=args.rows(m, dtype),
            lse=args.pointer(lse, dtype),
        )
    return m, lse


def backward_pass(
    dm: Tensor,
    dlse: Tensor | None,
    u: Tensor,
    x: Tensor,
    key_mask: Tensor | None,
    extra_token: Tensor | None,
    m: Tensor,
    lse: Tensor,
    norm_eps: float | None,
    wants_dx: bool = True,
    du_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (du, dx, dextra_token); du is per image, [B, R, C], even if u is shared."""
    batch, num_rows, channels = m.shape
    u, x, dm, m, extra_token = _unit_strides(u, x, dm, m, extra_token)
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()  # alive until the kernel returns
    du = torch.empty_like(m) if du_out is None else du_out
    dx = x.new_empty(x.shape) if wants_dx else None
    dextra = None if extra_token is None else x.new_empty(batch, channels)
    if m.numel():
        args, dtype = extension.Arguments(x.device), accumulate_dtype(x)
        _C.attention_core_backward(
            problem=extension.core_problem(x, extra_token, num_rows, norm_eps),
            x=args.tokens(x, extra_token),
            u=args.rows(u.expand(batch, -1, -1), dtype),
            mask=args.mask(key_mask),
            m=args.rows(m, dtype),
            lse=args.pointer(lse, dtype),
            dm=args.rows(dm, dtype),
            dlse=args.pointer(dlse, dtype),
            du=args.rows(du, dtype),
            dx=args.token_gradients(dx, dextra, x.dtype),
        )
    return du, dx, dextra


def _unit_strides(*tensors: Tensor | None) -> Any:
    return [None if t is None else extension.unit_stride(t) for t in tensors]

"""attention_core on Triton: launches of its kernels."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crossvit_kernels.gpu import launcher
from crossvit_kernels.gpu.tables import Candidate, Candidates, Table
from crossvit_kernels.ops.attention_core import configs
from crossvit_kernels.ops.attention_core.configs import Shape, TokenPass, candidates
from crossvit_kernels.ops.attention_core.reference import CoreInputs

if TYPE_CHECKING:
    from types import ModuleType


def why_not(inputs: CoreInputs) -> str | None:
    return launcher.why_not(inputs.x)


def kernels() -> ModuleType:
    """Import on first use: Triton is slow to import and may be missing."""
    from crossvit_kernels.ops.attention_core import triton_kernels

    return triton_kernels


def forward_pass(
    u: Tensor,
    x: Tensor,
    key_mask: Tensor | None,
    extra_token: Tensor | None,
    norm_eps: float | None,
    *,
    gain: Tensor | None = None,
    table: Table[TokenPass] = configs.FORWARD,
    split_size: int | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (m, lse) as in reference.py, both in float32; u in float32.

    gain [C] multiplies u; split_size is the number of tokens per program, if not the table's; out
    is memory for m, with aligned rows, and lse.
    """
    batch, num_tokens, channels = x.shape
    num_rows = u.shape[1]
    m, lse = out or (u.new_empty(batch, num_rows, channels), u.new_empty(batch, num_rows))
    if not m.numel():
        return m, lse
    u, x = launcher.aligned_rows(u), launcher.aligned_rows(x)
    extra = None if extra_token is None else launcher.aligned_rows(extra_token)
    launch_configs = candidates(table, x, num_rows, norm_eps is not None, split_size)
    shape = _shape_of(launch_configs)
    rows, num_splits = shape.rows, shape.num_splits(x.shape[1])
    m_out, sums, peaks = m, lse, None
    if num_splits > 1:
        m_out = m.new_empty(batch * num_splits, num_rows, channels)
        sums = m.new_empty(batch, num_splits, num_rows)
        peaks = m.new_empty(batch, num_splits, num_rows)
    blocks = -(-num_rows // rows)
    launcher.start(
        kernels().attention_core_forward,
        (batch, num_splits, blocks),
        (u, gain, x, extra, key_mask, m_out, sums, peaks),
        (
            num_tokens,
            u.stride(0) if u.shape[0] > 1 else 0,
            u.stride(1),
            x.stride(0),
            x.stride(1),
            0 if extra is None else extra.stride(0),
            *((0, 0) if key_mask is None else key_mask.stride()),
            m_out.stride(0),
            m_out.stride(1),
        ),
        launch_configs,
        eps=norm_eps or 0.0,
    )
    if num_splits > 1:
        launcher.start(
            kernels().attention_core_merge,
            (batch, shape.num_chunks, blocks),
            (m_out, sums, peaks, m, lse),
            (num_splits, m.stride(0), m.stride(1)),
            _merge(shape),
        )
    return m, lse


def _shape_of(configs: Candidates) -> Shape:
    """Return the preferred shape; rows, splits and chunks are the same for all candidates."""
    shape: Shape = configs[0].constants[0]
    return shape


@functools.cache
def _merge(shape: Shape) -> Candidates:
    return Candidates((Candidate((shape,), {"num_warps": 4, "num_stages": 1}),))


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
    *,
    wants_dx: bool = True,
    gain: Tensor | None = None,
    table: Table[TokenPass] = configs.BACKWARD,
    split_size: int | None = None,
    out: tuple[Tensor, Tensor | None, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (du, dx, dextra_token); du is per image, [B, R, C], even if u is shared.

    gain and split_size as in forward_pass; out is memory for du and dextra, in float32, and for dx,
    contiguous, or None if dx is not wanted.
    """
    batch, num_rows, channels = m.shape
    du_out, dx_out, dextra_out = out or (None, None, None)
    wants_dx = wants_dx if out is None else dx_out is not None
    launch_configs = candidates(table, x, num_rows, norm_eps is not None, split_size)
    shape = _shape_of(launch_configs)
    rows, num_splits = shape.rows, shape.num_splits(x.shape[1])
    # If the queries take several launches, dx accumulates in float32.
    dtype = x.dtype if num_rows <= rows else torch.float32
    dx = None
    if wants_dx:
        usable = dx_out is not None and dx_out.dtype == dtype
        dx = dx_out if usable else x.new_empty(x.shape, dtype=dtype)
    dextra = dextra_out
    if dextra is None and extra_token is not None:
        dextra = m.new_empty(batch, channels)
    if num_splits > 1 or du_out is None:
        du = m.new_empty(batch, num_splits, num_rows, channels)
    else:
        du = du_out.unsqueeze(1)
    if m.numel():
        u, x, dm = launcher.aligned_rows(u), launcher.aligned_rows(x), launcher.aligned_rows(dm)
        extra = None if extra_token is None else launcher.aligned_rows(extra_token)
        dlse = None if dlse is None else dlse.contiguous()
        for row in range(0, num_rows, rows):
            launcher.start(
                kernels().attention_core_backward,
                (batch, num_splits, 1),
                (u, dm, gain, m, lse, dlse, x, extra, key_mask, du, dx, dextra),
                (
                    x.shape[1],
                    row,
                    u.stride(0) if u.shape[0] > 1 else 0,
                    u.stride(1),
                    dm.stride(0),
                    dm.stride(1),
                    m.stride(0),
                    m.stride(1),
                    x.stride(0),
                    x.stride(1),
                    0 if extra is None else extra.stride(0),
                    *((0, 0) if key_mask is None else key_mask.stride()),
                    du.stride(0),
                    du.stride(2),
                    *((0, 0) if dx is None else dx.stride()[:2]),
                    0 if dextra is None else dextra.stride(0),
                ),
                launch_configs,
                (row > 0,),
                eps=norm_eps or 0.0,
            )
    if dx is not None and dx_out is not None and dx is not dx_out:
        dx = dx_out.copy_(dx)
    if extra_token is not None and dextra is not None:
        dextra = dextra.to(extra_token.dtype)
    total = du[:, 0] if num_splits == 1 else torch.sum(du, dim=1, out=du_out)
    return total, None if dx is None else dx.to(x.dtype), dextra

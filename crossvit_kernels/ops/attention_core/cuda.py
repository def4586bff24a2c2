"""attention_core on the CUDA kernels of the extension: one token pass per direction."""

from __future__ import annotations

import torch
from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.extension import Multiprocessors, Problem
from crossvit_kernels.gpu import launcher
from crossvit_kernels.ops.attention_core.reference import CoreInputs


def why_not(inputs: CoreInputs) -> str | None:
    x = inputs.x
    if reason := why_not_tokens(x):
        return reason
    assert extension.cuda_kernels is not None
    shared_bytes = extension.cuda_kernels.functions.attention_core_shared_bytes
    needed = shared_bytes[extension.DTYPE_CODES[x.dtype]][x.shape[-1] // 16 - 1]
    return why_not_shared_bytes(needed, x)


def why_not_tokens(x: Tensor) -> str | None:
    """Return why no CUDA kernel with a token pass can take x, shared memory aside, or None."""
    if reason := extension.why_not_cuda_kernels(x):
        return reason
    channels = x.shape[-1]
    if channels % 16:
        return f"{channels} channels are no multiple of 16"
    if channels > WIDEST:
        return f"{channels} channels are more than {WIDEST}"
    return None


WIDEST = 1536


def why_not_shared_bytes(needed: int, x: Tensor) -> str | None:
    """Return why a block on x's device cannot have this much shared memory, or None."""
    available = extension.shared_bytes_of_block(x)
    if needed <= available:
        return None
    return f"it needs {needed} bytes of shared memory, of which a block there has {available}"


#: Bytes of workspace in which blocks that share an image may store partials: 8 rows times C floats
#: per 16 tokens. Where that is not enough, no blocks share an image.
MOST_SHARED_PARTIALS = 16 << 20


def blocks_of_image(problem: Problem, sms: Multiprocessors, backward: bool = False) -> int:
    """Return how many blocks of a cluster share an image's tokens: 8 where all run at once, else 1.

    By the cycle model, 2 or 4 take longer to exchange partials than they save. Results are bitwise
    independent of it.
    """
    if not sms.have_clusters:
        return 1
    assert extension.cuda_kernels is not None
    functions = extension.cuda_kernels.functions
    batch, num_tokens = problem[:2]
    splits = -(-num_tokens // functions.attention_core_split_tokens)
    blocks = 8
    if num_tokens < 16 * blocks or blocks * splits * batch > sms.number:
        return 1  # most batches: two calls of the extension less
    alone, shared = (functions.attention_core_workspaces(problem, b)[backward] for b in (1, blocks))
    return blocks if 4 * (shared - alone) <= MOST_SHARED_PARTIALS else 1


def forward_pass(
    u: Tensor,
    x: Tensor,
    key_mask: Tensor | None,
    extra_token: Tensor | None,
    norm_eps: float | None,
) -> tuple[Tensor, Tensor]:
    """Return (m, lse) as in reference.py, both in float32; u in float32."""
    batch, num_rows, channels = x.shape[0], u.shape[1], x.shape[2]
    m, lse = u.new_empty(batch, num_rows, channels), u.new_empty(batch, num_rows)
    if m.numel():
        assert extension.cuda_kernels is not None
        functions = extension.cuda_kernels.functions
        u, x = launcher.aligned_rows(u), launcher.aligned_rows(x)
        extra_token = None if extra_token is None else launcher.aligned_rows(extra_token)
        problem = extension.core_problem(x, extra_token, num_rows, norm_eps)
        blocks = blocks_of_image(problem, extension.multiprocessors(x.device))
        workspace = m.new_empty(functions.attention_core_workspaces(problem, blocks)[0])
        args, float32 = extension.Arguments(x.device), torch.float32
        functions.attention_core_forward(
            problem=problem,
            x=args.tokens(x, extra_token),
            u=args.rows(u.expand(batch, -1, -1), float32),
            mask=args.mask(key_mask),
            m=args.rows(m, float32),
            lse=args.pointer(lse, float32),
            blocks=blocks,
            workspace=args.pointer(workspace, float32),
            place=extension.place(x),
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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (du, dx, dextra_token); du is per image, [B, R, C], even if u is shared."""
    batch, num_rows, channels = m.shape
    du, dx = torch.empty_like(m), x.new_empty(x.shape) if wants_dx else None
    dextra = None if extra_token is None else x.new_empty(batch, channels)
    if m.numel():
        assert extension.cuda_kernels is not None
        functions = extension.cuda_kernels.functions
        u, x, dm = map(launcher.aligned_rows, (u, x, dm))
        extra_token = None if extra_token is None else launcher.aligned_rows(extra_token)
        m = launcher.aligned_rows(m)
        # Must stay alive until the kernel is launched.
        dlse = None if dlse is None else dlse.contiguous()
        problem = extension.core_problem(x, extra_token, num_rows, norm_eps)
        blocks = blocks_of_image(problem, extension.multiprocessors(x.device), backward=True)
        workspace = m.new_empty(functions.attention_core_workspaces(problem, blocks)[1])
        args, float32 = extension.Arguments(x.device), torch.float32
        functions.attention_core_backward(
            problem=problem,
            x=args.tokens(x, extra_token),
            u=args.rows(u.expand(batch, -1, -1), float32),
            mask=args.mask(key_mask),
            m=args.rows(m, float32),
            lse=args.pointer(lse, float32),
            dm=args.rows(dm, float32),
            dlse=args.pointer(dlse, float32),
            du=args.rows(du, float32),
            dx=args.token_gradients(dx, dextra, x.dtype),
            blocks=blocks,
            workspace=args.pointer(workspace, float32),
            place=extension.place(x),
        )
    return du, dx, dextra

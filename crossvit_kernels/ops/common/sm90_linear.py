"""Linear layers on Hopper's tensor cores: when they run, and their launches."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossvit_kernels import extension, supported
from crossvit_kernels.calibration import store
from crossvit_kernels.gpu import launcher, tables
from crossvit_kernels.ops.common.configs import FEW_ROWS, VARIANTS

_DTYPES = (torch.bfloat16, torch.float16)
_SIDE = 64
#: Of more, the tiles times the SMs may pass 2^31.
_MOST_ROWS = 2**25
#: Rows of more channels do not fit the registers.
WIDEST = 384
#: More biases do not fit shared memory.
_MOST_COLUMNS = 2048

#: (device, Triton) on which the kernel is known to end, as it must wherever it runs by itself: a
#: wrong barrier would hang. Thousands of launches, alone on the GPU and beside another process, had
#: the right values (bench/results/nvidia-h100-80gb-hbm3). No barrier has changed since; GELU and
#: LayerNorm's statistics have, which were only executed from their PTX.
PROVEN: frozenset[tuple[str, str]] = frozenset({("NVIDIA H100 80GB HBM3", "3.6")})


def has_gluon() -> bool:
    """Whether the installed Triton has it; does not import Triton."""
    spec = importlib.util.find_spec("triton")
    folders = spec.submodule_search_locations or () if spec else ()
    return any((Path(folder) / "experimental" / "gluon").is_dir() for folder in folders)


class Recorded(NamedTuple):
    """A launch as it was asked for: the arguments of ``start``."""

    kernel: Any
    arguments: tuple[Any, ...]
    tiles: int


# Evaluated once, as in launcher.
_HAS_GLUON = has_gluon()
# Compiled kernels; None for those that do not fit or spill.
_known: dict[tuple[Any, ...], Any] = {}


@dataclasses.dataclass(frozen=True)
class Sm90Shape(tables.Constants):
    """Constants of the kernel, called c there.

    Attributes:
        channels: K.
        columns: N.
        norm: Whether x is normalised.
        gelu: Whether GELU is applied.
        residual: Whether r is added.
        consumers: Groups of warps with 64 rows each.
    """

    channels: int
    columns: int
    norm: bool = False
    gelu: bool = False
    residual: bool = False
    consumers: int = 2

    @property
    def boxes(self) -> int:
        """Tiles of 64 channels of a row."""
        return self.channels // _SIDE

    @property
    def tiles(self) -> int:
        """Tiles of 64 columns."""
        return self.columns // _SIDE

    @property
    def together(self) -> int:
        """Tiles of W in a stage of the ring: they share a barrier."""
        return max(g for g in (1, 2, 3) if self.boxes % g == 0)

    @property
    def stages(self) -> int:
        """Stages of the ring: 96 KiB, 72 if residuals need room as well."""
        return (9 if self.residual else 12) // self.together


def why_not(x: Tensor, weight: Tensor) -> str | None:
    """Return why the kernel does not multiply x by weight [N, K]^T, or None."""
    if reason := why_no_gluon(x, weight):
        return reason
    columns, channels = weight.shape
    if channels % _SIDE or channels > WIDEST:
        return f"{channels} channels are no multiple of {_SIDE} up to {WIDEST}"
    if columns % _SIDE or columns > _MOST_COLUMNS:
        return f"{columns} columns are no multiple of {_SIDE} up to {_MOST_COLUMNS}"
    return None


def why_no_gluon(x: Tensor, weight: Tensor) -> str | None:
    """Return why no kernel for Hopper's tensor cores takes x and weight, or None."""
    if not _HAS_GLUON:
        return "this Triton has no Gluon"
    if _compute_capability(x) != 90:
        return f"the tokens are on {x.device}, not on a GPU of compute capability 9.0"
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        return f"tokens and weights are {x.dtype} and {weight.dtype}, not both of a 16-bit type"
    return None


def _compute_capability(x: Tensor) -> int:
    """Return that of x's GPU, or of the one that a recording is for; 0 without one of NVIDIA's."""
    if launcher.is_recording():
        return tables.sm(x.device)
    if not x.is_cuda or torch.version.hip:
        return 0
    return extension.compute_capability(x.device)


def is_on_another_gpu(index: int) -> bool:
    """Whether a tensor's GPU is not the current one."""
    return not launcher.is_recording() and index != torch.cuda.current_device()


def device_and_version(device: torch.device) -> tuple[str, str]:
    """Return a device's name and the installed Triton, as PROVEN has them."""
    version = ".".join((supported.installed_version("triton") or "").split(".")[:2])
    return tables.device_name(device), version


@functools.cache
def is_proven(device: torch.device) -> bool:
    """Whether the kernel is known to end on a device, with the installed Triton."""
    return device_and_version(device) in PROVEN


def chosen(a: Tensor, weight: Tensor) -> bool:
    """Whether the kernel multiplies a [B, N, K] by weight [N, K]^T.

    By itself it does so from FEW_ROWS rows on, on devices where it has run (PROVEN), and for K of
    more than 128: narrower layers were not measured.
    """
    return is_wanted(a, weight, why_not, is_proven)


def is_wanted(
    a: Tensor,
    weight: Tensor,
    why_not: Callable[[Tensor, Tensor], str | None],
    is_proven: Callable[[torch.device], bool],
) -> bool:
    """Whether a kernel with these limits is to multiply a [B, N, K] by weight [N, K]^T."""
    asked_for, (batch, num_tokens, _) = VARIANTS.asked_for, a.shape
    num_rows = batch * num_tokens
    if asked_for == "auto":
        if num_rows <= FEW_ROWS or store.is_batch_invariant() or weight.shape[1] <= 128:
            return False
    elif asked_for != "gluon":
        return False
    if not 0 < num_rows <= _MOST_ROWS or why_not(a, weight) is not None:
        return False
    return asked_for == "gluon" or is_proven(a.device)


def linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm: tuple[Tensor, Tensor | None] | None = None,
    eps: float = 0.0,
    statistics: tuple[Tensor, Tensor] | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor | None:
    """Return act(LN(a) W^T + b) + r [B, N, W's rows] for a [B, N, W's columns], of 16 bits.

    Returns None if the kernel spills registers here, or if TMA cannot read a tensor.

    Args:
        a: [B, N, K].
        weight: [W's rows, K].
        bias: [W's rows] or None.
        norm: LayerNorm's weight and bias [K], which may be None; without it a is multiplied as it
            is.
        eps: LayerNorm's.
        statistics: mean and rstd [B, N], which are written.
        gelu: Whether GELU is applied.
        residual: r [B, N, W's rows].
    """
    if not can_read(a, weight, residual):
        return None
    index = a.get_device()
    if is_on_another_gpu(index):
        with torch.cuda.device(index):
            return linear(
                a,
                weight,
                bias,
                norm=norm,
                eps=eps,
                statistics=statistics,
                gelu=gelu,
                residual=residual,
            )
    from crossvit_kernels.gpu.gluon import tile
    from crossvit_kernels.ops.common.triton_sm90_kernels import sm90_linear as kernel

    batch, num_tokens, channels = a.shape
    num_rows, columns = batch * num_tokens, weight.shape[0]
    y = a.new_empty(batch, num_tokens, columns)
    c = _shape(channels, columns, norm is not None, gelu, residual is not None)
    y_tiles = tile(y, num_rows, columns, columns)
    r_tiles = y_tiles
    if residual is not None:
        r_tiles = tile(residual, num_rows, columns, residual.stride(1))
    gamma, beta = norm or (weight, None)
    arguments = (
        tile(a, num_rows, channels, a.stride(1)),
        tile(weight, columns, channels, weight.stride(0)),
        y_tiles,
        r_tiles,
        bias,
        gamma,
        beta,
        *(statistics or (None, None)),
        num_rows,
        float(eps),
        c,
    )
    tiles = -(-num_rows // (_SIDE * c.consumers)) * c.tiles
    key = index, c, a.dtype, statistics is None, *kinds(bias, gamma, beta)
    return y if start(kernel, arguments, key, index, tiles) else None


def kinds(*tensors: Tensor | None) -> tuple[tuple[torch.dtype, int] | None, ...]:
    """Return what Triton's own key holds of tensors: see launcher."""
    return tuple(None if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors)


def start(
    kernel: Any, arguments: tuple[Any, ...], key: tuple[Any, ...], index: int, tiles: int
) -> bool:
    """Launch a kernel of a program each SM, or fewer; whether it compiles, fits and spills nothing.

    Args:
        kernel: The kernel.
        arguments: All of its arguments.
        key: Everything by which Triton distinguishes the kernels it compiles, and the device.
        index: The device.
        tiles: Tiles of the result.
    """
    if launcher.is_recording():
        launcher.record(Recorded(kernel, arguments, tiles))
        return True
    if key not in _known:
        _known[key] = _compiled(kernel, arguments)
    compiled = _known[key]
    if compiled is None:
        return False
    if launcher.launched is not None:
        launcher.launched.add(kernel.__name__)
    programs = min(_num_sms(index), tiles)
    if launcher.can_launch_directly(compiled) and not launcher.changes_kernels(kernel):
        compiled[(programs, 1, 1)](*arguments)
    else:
        kernel[(programs,)](*arguments, num_warps=4)
    return True


def _compiled(kernel: Any, arguments: tuple[Any, ...]) -> Any:
    """Return the compiled kernel, or None if it does not compile, does not fit, or spills."""
    try:
        compiled = kernel.warmup(*arguments, num_warps=4, grid=(1,))
        compiled._init_handles()
        return None if compiled.n_spills else compiled
    except Exception:  # of an untested Triton: other kernels run instead
        return None


@functools.cache
def _shape(*constants: Any) -> Sm90Shape:
    return Sm90Shape(*constants)


@functools.cache
def _num_sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def can_read(a: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
    """Whether TMA can read the tensors of a layer."""
    return all(_is_tiled(t) for t in (a, residual) if t is not None) and _is_aligned(weight)


def _is_aligned(t: Tensor) -> bool:
    return t.data_ptr() % 16 == 0 and t.stride(-1) == 1 and t.stride(-2) % 8 == 0


def _is_tiled(t: Tensor) -> bool:
    """Whether t [B, N, C] is a matrix [B N, C] in memory that TMA can read."""
    return _is_aligned(t) and (t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1))

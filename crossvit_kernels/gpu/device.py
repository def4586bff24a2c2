"""Whether Triton can run here, and what every launch needs: a sm, aligned rows."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: Rows begin at multiples of so many elements: 16-byte loads of 16-bit tokens.
ALIGN = 8

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 1536


# Found once: torch.compile traces why_not, and looks neither for files nor into caches.
_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

#: Triton's interpreter computes nonsense in bfloat16; who puts that right may say so here.
interpreter_has_bfloat16 = False


def installed() -> bool:
    return _INSTALLED


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU (TRITON_INTERPRET=1 at the start)."""
    return _INTERPRETING


def missing() -> str | None:
    """Why no Triton kernel can run here; None where one can."""
    if not installed():
        return "triton is not installed"
    if interpreting() or torch.cuda.is_available():
        return None
    return "torch finds no GPU (TRITON_INTERPRET=1 runs kernels in Triton's interpreter)"


def why_not(x: Tensor) -> str | None:
    """Why kernels over tokens x [B, N, C] cannot run; None where they can."""
    if not installed():
        return "triton is not installed"
    if not x.is_cuda and not (interpreting() and x.is_cpu):
        return f"the tokens are on {x.device}, not on a GPU"
    if x.dtype not in _DTYPES:
        return f"it has no code for {x.dtype} tokens"
    if x.dtype == torch.bfloat16 and interpreting() and not interpreter_has_bfloat16:
        return "Triton's interpreter has no bfloat16"
    if x.shape[-1] % ALIGN:
        return f"{x.shape[-1]} channels are no multiple of {ALIGN}"
    if x.shape[-1] > _WIDEST:
        return f"{x.shape[-1]} channels are more than {_WIDEST}"
    return None


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are formed: as torch is told to."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"


@functools.cache
def device_name(device: torch.device) -> str:
    """As torch gives it; "interpreter" on a CPU, "meta" where there is no memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "meta" if device.type == "meta" else "interpreter"


# What tensors without memory stand for.
_sm_of_meta = 0


@contextmanager
def as_if_on(sm_of_meta: int) -> Iterator[None]:
    """Take tensors on the meta device for tensors on a sm, 90 for 9.0."""
    global _sm_of_meta
    previous, _sm_of_meta = _sm_of_meta, sm_of_meta
    sm.cache_clear()
    try:
        yield
    finally:
        _sm_of_meta = previous
        sm.cache_clear()


@functools.cache
def sm(device: torch.device) -> int:
    """Compute capability, 90 for 9.0; on others than NVIDIA's the tables' default."""
    if device.type == "meta":
        return _sm_of_meta
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def aligned_rows(t: Tensor) -> Tensor:
    """t [..., C], or a copy of it where its rows are not contiguous or not aligned."""
    *outer, last = t.stride()
    if last == 1 and not t.data_ptr() % (ALIGN * t.element_size()):
        for stride in outer:
            if stride % ALIGN:
                break
        else:
            return t
    return t.clone(memory_format=torch.contiguous_format)


def contiguous(parameters: Any) -> Any:
    """A NamedTuple of tensors or None, copies in place of those that are not contiguous."""
    try:
        if all(map(Tensor.is_contiguous, parameters)):  # in C: there are many, and host time counts
            return parameters
    except TypeError:  # None
        pass
    return type(parameters)(*(None if t is None else t.contiguous() for t in parameters))

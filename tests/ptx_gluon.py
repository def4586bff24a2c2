"""The Gluon kernel for sm_90, executed from its PTX where it would be launched on a GPU.

    python tests/ptx_gluon.py [FAULT ...]

injects faults into its PTX, one at a time, and prints how many are found.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import sys
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import ptx
import torch
from accuracy import assert_within_rule
from ptx.tensor_map import decode
from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.gpu import launcher
from crossvit_kernels.ops.common import sm90_linear, sm90_wide

#: Few, so that each has several tiles, and one begins within a row of them.
_NUM_SMS = 2
#: Compiled kernels: by types and by what differs in Triton's key.
_compiled: dict[Any, tuple[str, int]] = {}


class Launch(NamedTuple):
    """A launch: values are those of the PTX's parameters."""

    name: str
    text: str
    shared_bytes: int
    grid: tuple[int, ...]
    threads: int
    tensors: list[Tensor]
    values: list[Any]


def tensor_map(described: Any) -> ptx.TensorMap:
    """Return what the driver makes of a Gluon descriptor."""
    size = described.base.element_size()
    rows, columns = described.block_shape
    widest = described.layout.swizzle_byte_width // size  # Triton copies wider boxes in parts
    return ptx.TensorMap(
        described.base.data_ptr(),
        tuple(described.shape[::-1]),
        tuple(stride * size for stride in described.strides[-2::-1]),
        (min(columns, widest), rows),
        size,
        described.layout.swizzle_byte_width,
    )


def flat(arguments: tuple[Any, ...]) -> tuple[list[Tensor], list[Any]]:
    """Return the tensors of a launch and the values of the PTX's parameters."""
    tensors, values = [], []
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
            values.append(np.uint64(argument.data_ptr()))
        elif hasattr(argument, "block_shape"):
            tensors.append(argument.base)
            values.append(tensor_map(argument).encode())
            values += [np.int32(n) for n in argument.shape]
            values += [np.int64(n) for n in argument.strides]
        elif isinstance(argument, int | float):
            values.append(np.int32(argument) if isinstance(argument, int) else np.float32(argument))
    return tensors, values


def _text(kernel: Any, arguments: tuple[Any, ...]) -> tuple[str, int]:
    """Return a launch's PTX and bytes of shared memory."""
    import no_device  # noqa: F401  # Triton compiles for what it says

    kinds = [
        (a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else type(a) for a in arguments[:-1]
    ]
    key = repr((kernel.__name__, arguments[0].base.dtype, *kinds, arguments[-1]))
    if key not in _compiled:
        compiled = kernel.warmup(*arguments, num_warps=4, grid=(1,))
        _compiled[key] = compiled.asm["ptx"], compiled.metadata.shared
    return _compiled[key]


@contextlib.contextmanager
def executing(run: Callable[[Launch], None]) -> Iterator[None]:
    """Let run execute the kernel's launches on CPU tensors."""

    def compiled(kernel: Any, arguments: tuple[Any, ...]) -> Any:
        text, shared_bytes = _text(kernel, arguments)
        threads = int(re.search(r"\.reqntid (\d+)", text)[1])

        class Compiled:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def launch(*arguments: Any) -> None:
                    values = flat(arguments)
                    run(Launch(kernel.__name__, text, shared_bytes, grid, threads, *values))

                return launch

        return Compiled()

    def why_not(x: Tensor, weight: Tensor) -> str | None:
        on_gpu: Any = types.SimpleNamespace(is_cuda=True, device=x.device, dtype=x.dtype)
        return original(on_gpu, weight)

    original = sm90_linear.why_no_gluon
    with (
        mock.patch.object(sm90_linear, "why_no_gluon", why_not),
        mock.patch.object(sm90_linear, "_compiled", compiled),
        mock.patch.object(sm90_linear, "_known", {}),
        mock.patch.object(sm90_linear, "_num_sms", lambda index: _NUM_SMS),
        mock.patch.object(extension, "compute_capability", lambda device: 90),
        mock.patch.object(launcher, "can_launch_directly", lambda compiled: True),
        mock.patch.object(torch.cuda, "current_device", lambda: -1),  # as a CPU tensor's
    ):
        yield


def check(dtype: torch.dtype, form: str, channels: int, columns: int, rows: int) -> None:
    """Check a layer of the kernel under the accuracy rule.

    Args:
        dtype: Of tokens and weights.
        form: Of "norm", "gelu" and "residual", those that are applied; or "wide", the kernel of any
            width, with "residual", "scaled", "transposed" and "gelu" or without.
        channels: K.
        columns: N.
        rows: M.
    """

    def made(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, dtype=torch.float32, device="cpu") * scale).to(dtype)

    x, r = 3 + made(1, rows, channels), made(1, rows, columns)
    weight, bias = made(columns, channels, scale=channels**-0.5), made(columns)
    gamma, beta = 1 + made(channels, scale=0.2), made(channels, scale=0.2)

    def expected(as_dtype: torch.dtype) -> Tensor:
        a, w, b, g, h, res = (t.to(as_dtype) for t in (x, weight, bias, gamma, beta, r))
        if "norm" in form:
            a = torch.nn.functional.layer_norm(a, a.shape[-1:], g, h, 1e-6)
        y = torch.nn.functional.linear(a, w, b)
        y = torch.nn.functional.gelu(y) if "gelu" in form else y
        return y + res if "residual" in form else y

    if "wide" in form:
        _check_wide(dtype, form, (x, weight, bias, r))
        return

    mean, rstd = (torch.empty(1, rows, dtype=torch.float32, device="cpu") for _ in range(2))
    y = sm90_linear.linear(
        x,
        weight,
        bias,
        norm=(gamma, beta) if "norm" in form else None,
        eps=1e-6,
        statistics=(mean, rstd) if "norm" in form else None,
        gelu="gelu" in form,
        residual=r if "residual" in form else None,
    )
    assert y is not None
    assert_within_rule(y, expected(dtype), expected(torch.float64), form)
    if "norm" in form:
        exact = x.double()
        torch.testing.assert_close(mean.double(), exact.mean(-1), rtol=1e-4, atol=1e-5)
        variance = exact.var(-1, unbiased=False)
        torch.testing.assert_close(rstd.double(), (variance + 1e-6).rsqrt(), rtol=1e-4, atol=0)


def _check_wide(dtype: torch.dtype, form: str, tensors: tuple[Tensor, ...]) -> None:
    """Check sm90_wide with two images of x, weight, bias and r."""
    x, weight, bias, r = tensors
    x, r = (t.view(2, -1, t.shape[2]) for t in (x, r))
    scale = torch.tensor([0.0, 1.25], dtype=torch.float32, device="cpu")

    def expected(as_dtype: torch.dtype) -> Tensor:
        a, w, b, res, s = (t.to(as_dtype) for t in (x, weight, bias, r, scale))
        y = torch.nn.functional.linear(a, w, b)
        y = torch.nn.functional.gelu(y) if "gelu" in form else y
        y = y * s[:, None, None] if "scaled" in form else y
        return y + res if "residual" in form else y

    transposed = "transposed" in form
    y = sm90_wide.linear(
        x,
        weight.t().contiguous() if transposed else weight,
        bias,
        residual=r if "residual" in form else None,
        scale=scale if "scaled" in form else None,
        transposed=transposed,
        gelu="gelu" in form,
    )
    assert y is not None
    assert_within_rule(y, expected(dtype), expected(torch.float64), form)


#: Forms to inject faults into, each in shapes that need every barrier: K, N and M.
SHAPES = {
    "plain": ((192, 320, 300), (192, 128, 520)),
    "residual": ((192, 320, 300), (192, 128, 520)),
    "wide": ((192, 192, 520), (64, 192, 520)),
    "wide transposed": ((192, 128, 900), (64, 128, 520)),
    "wide residual": ((192, 192, 300), (64, 192, 520)),
}
#: Faults of one instruction: a pattern and what replaces it.
FAULTS = {
    "proxy fence left out": (r"fence\.proxy\.async\S*;", ""),
    "wait left out": (r"mbarrier\.try_wait\S+\s+(\w+), [^;]*;", r"setp.eq.u32 \1, 0, 0;"),
    "phase inverted": (
        r"(mbarrier\.try_wait\S+\s+\w+, \[\S+\]), ([^;]*);",
        r".reg .b32 other; xor.b32 other, \2, 1; \1, other;",
    ),
    "one arrival more expected": (r"(mbarrier\.init\S+\s+\[\S+\]), 1;", r"\1, 2;"),
    "one arrival fewer expected": (r"(mbarrier\.init\S+\s+\[\S+\]), 2;", r"\1, 1;"),
    "more bytes expected": (r"(expect_tx\S+\s+_, \[\S+\]), (\d+);", r"\1, \g<2>1;"),
    "fewer bytes expected": (r"(expect_tx\S+\s+_, \[\S+\]), (\d+);", r"\1, 128;"),
    "wait for a store left out": (r"cp\.async\.bulk\.wait_group\S*\s+\d;", ""),
    "barrier left out": (r"bar(rier)?\.sync\s[^;]*;", ""),
    "wait for a product left out": (r"wgmma\.wait_group\S*\s+0;", ""),
    "arrival left out": (r"@\S+\s+mbarrier\.arrive\.shared[^;]*;", ""),
    "bulk copy one row off": (r"(\{%r\d+, %r\d+)\}\], \[(%r\d+)\];", r"\1}], [\2+128];"),
}


#: Of a tensor map.
_SWIZZLE = "swizzle left out"


def faulty(text: str, fault: str, n: int) -> str:
    """Return PTX with a fault in the n-th place from the end, if there is one."""
    pattern, replacement = FAULTS[fault]
    places = list(re.finditer(pattern, text))
    if n >= len(places):
        return text
    place = places[-1 - n]
    return text[: place.start()] + place.expand(replacement) + text[place.end() :]


def storage_of(tensor: Tensor) -> Any:
    """Return all of a tensor's memory as bytes."""
    raw = torch.empty(0, dtype=torch.uint8, device="cpu")
    return raw.set_(tensor.detach().untyped_storage()).numpy()


def without_swizzle(values: list[Any], n: int) -> list[Any]:
    """Return parameters whose n-th tensor map has no swizzle."""
    at = [place for place, value in enumerate(values) if isinstance(value, bytes)][n]
    changed = dataclasses.replace(decode(values[at]), swizzle=0)
    return [*values[:at], changed.encode(), *values[at + 1 :]]


def is_found(
    form: str,
    change: Callable[[str], str] = lambda text: text,
    change_values: Callable[[list[Any]], list[Any]] = lambda values: values,
) -> bool:
    """Whether a change of the PTX or of the parameters is a fault or makes wrong numbers.

    In any of the form's shapes, in order 0.
    """
    codes: dict[str, ptx.Kernel] = {}

    def run(launch: Launch) -> None:
        if launch.text not in codes:
            (codes[launch.text],) = ptx.kernels(change(launch.text)).values()
        code, memory = codes[launch.text], ptx.Memory()
        for tensor in launch.tensors:
            memory.add(storage_of(tensor))
        values = change_values(launch.values)
        values = [*values, *[np.uint64(0)] * (len(code.params) - len(launch.values))]
        ptx.run(code, launch.grid, launch.threads, values, memory, launch.shared_bytes)

    for shape in SHAPES[form]:
        torch.manual_seed(0)
        try:
            with executing(run):
                check(torch.bfloat16, form, *shape)
        except (ptx.Fault, AssertionError):
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = [*FAULTS, _SWIZZLE]
    parser.add_argument("faults", nargs="*", default=default, metavar="FAULT", help=str(default))
    parser.add_argument("--forms", nargs="+", default=list(SHAPES), choices=SHAPES)
    options = parser.parse_args()
    for form in options.forms:
        texts: list[str] = []
        assert not is_found(form, lambda text, texts=texts: texts.append(text) or text)
        for fault in options.faults:
            began, lines = time.perf_counter(), []
            if fault == _SWIZZLE:
                maps = range(4 if "residual" in form else 3)  # x, W, y and r
                found = sum(
                    is_found(form, change_values=partial(without_swizzle, n=n)) for n in maps
                )
                print(f"{form}, {fault}: {found} of {len(maps)}", flush=True)
                continue
            places = list(re.finditer(FAULTS[fault][0], texts[0]))[::-1]
            count = len(places)
            for n, place in enumerate(places):
                if not is_found(form, lambda text, n=n, fault=fault: faulty(text, fault, n)):
                    lines.append(texts[0].count("\n", 0, place.start()) + 1)
            took = time.perf_counter() - began
            missed = f"; not those in lines {lines}" if lines else ""
            found = f"{count - len(lines)} of {count}"
            print(f"{form}, {fault}: {found}{missed} ({took:.0f} s)", flush=True)


if __name__ == "__main__":
    main()

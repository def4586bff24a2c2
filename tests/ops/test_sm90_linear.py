"""The linear layer for sm_90 without a GPU: when it runs, and what it compiles to."""

from __future__ import annotations

import pytest
import torch
from block_cases import float_ffn, float_msa
from test_triton_launches import run_without_a_device

import crossvit_kernels as ck
from crossvit_kernels.gpu import tables
from crossvit_kernels.ops.common import sm90_linear
from crossvit_kernels.ops.common.configs import FEW_ROWS, VARIANTS
from crossvit_kernels.ops.common.sm90_linear import Sm90Shape
from crossvit_kernels.ops.operator import OPERATIONS

COMPILED = """
import tempfile
from pathlib import Path

from no_device import launched
import torch
from crossvit_kernels.gpu.gluon import tile
from crossvit_kernels.inspect import machine_code
from crossvit_kernels.inspect.model import sass
from crossvit_kernels.ops.common.sm90_linear import Sm90Shape
from crossvit_kernels.ops.common.triton_sm90_kernels import sm90_linear as kernel

def check(channels, columns, dtype=torch.bfloat16, bias=True, statistics=False, **how):
    x, w, y = (torch.zeros(n, m, dtype=dtype, device="cpu")
               for n, m in ((70, channels), (columns, channels), (70, columns)))
    c, b = Sm90Shape(channels, columns, **how), w if bias else None
    rows = torch.zeros(70, dtype=torch.float32, device="cpu") if statistics else None
    tiles = *(tile(t, *t.shape, t.stride(0)) for t in (x, w, y, y)),
    arguments = (*tiles, b, w, b, rows, rows, 70, 1e-6, c)
    compiled = kernel.warmup(*arguments, num_warps=4, grid=(1,))
    assert kernel.warmup(*arguments[:9], 64, 1e-5, c, num_warps=4, grid=(2,)) is compiled
    assert compiled.metadata.shared <= machine_code.SHARED_BYTES_OF_PROGRAM[90]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        ((_, stack_bytes),) = machine_code.usage(cubin).values()
    assert stack_bytes == 0, (channels, columns, how, stack_bytes)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    (code,) = sass.disassemble(compiled.asm["cubin"]).values()
    found = unfinished_loads(code)
    assert not found, found

def unfinished_loads(code):
    # Arrivals at an mbarrier before which loads from shared memory may not have ended. Loads set
    # scoreboards, which an arrival does not wait for by itself: TMA could write what is still to
    # be read. Loads of a warp end in order, so some set none. In program order, as no branch leaves
    # a load behind.
    pending, found = [], []
    for i in code.instructions:
        for place in reversed(range(len(pending))):
            if pending[place].write_scoreboard in i.waits_for:
                del pending[: place + 1]
                break
        if i.opcode in ("LDS", "LDSM"):
            pending.append(i)
        elif i.opcode == "MEMBAR":  # of a fence: it waits for all of them
            pending = []
        elif i.opcode == "SYNCS" and "ARRIVE" in i.modifiers and pending:
            found.append((i.index, [load.index for load in pending]))
    return found

"""
WIDTHS = (64, 128, 192, 256, 320, 384)


def test_it_declines_without_its_gpu() -> None:
    x = torch.randn(2, 9, 32)
    because = r"triton:gluon: .*(compute capability 9\.0|Gluon)"
    with pytest.raises(ValueError, match=because):
        ck.layernorm_ffn(x, float_ffn(), backend="triton:gluon")
    with pytest.raises(ValueError, match=because):
        ck.layernorm_msa(x, float_msa(), 2, backend="triton:gluon")


def test_it_is_not_chosen_where_it_never_ran() -> None:
    """Nor in any variant on another device; a block asked to use it then runs other kernels."""
    backends = OPERATIONS["layernorm_ffn"].backends
    cpu = torch.device("cpu")
    assert backends["triton:split"].is_proven(cpu) and not backends["triton:gluon"].is_proven(cpu)
    x = torch.empty(1, FEW_ROWS + 1, 384, dtype=torch.bfloat16, device="meta")
    with tables.as_if_on(90):
        for variant in VARIANTS.names:
            with VARIANTS.choose(variant):
                assert not sm90_linear.chosen(x, x[0, :384])


def test_rows_that_tma_can_read() -> None:
    x = torch.zeros(4, 6, 72, dtype=torch.bfloat16)
    assert sm90_linear._is_tiled(x[..., :64]) and sm90_linear._is_tiled(x[:1, 1:, :64])
    for other in (x[:, 1:], x[..., 1:65], x[..., ::2], x.transpose(0, 1)):
        assert not sm90_linear._is_tiled(other)


@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("residual", [False, True])
def test_the_ring(channels: int, residual: bool) -> None:
    c = Sm90Shape(channels, channels, residual=residual)
    assert c.boxes % c.together == 0
    assert c.stages > c.boxes // c.together or c.stages * c.together >= 9
    assert c.stages * c.together * 8 <= (72 if residual else 96)


@pytest.mark.parametrize(
    "channels",
    [
        pytest.param(c, marks=pytest.mark.slow if c in (192, 384) else pytest.mark.exhaustive)
        for c in WIDTHS
    ],
)
def test_it_spills_nothing(channels: int) -> None:
    pytest.importorskip("triton")
    last = "fp16" if channels == 384 else "bf16"
    run_without_a_device(
        COMPILED
        + f"dtype = {{'fp16': torch.float16, 'bf16': torch.bfloat16}}[{last!r}]\n"
        + f"check({channels}, {3 * channels}, norm=True, statistics=True)\n"
        + f"check({channels}, {3 * channels}, dtype, bias=False, norm=True)\n"
        + f"check({channels}, {4 * channels}, norm=True, gelu=True)\n"
        + f"check({channels}, {channels}, dtype, residual=True)\n"
    )


@pytest.mark.slow
def test_the_projection_spills_nothing() -> None:
    pytest.importorskip("triton")
    run_without_a_device(COMPILED + "check(192, 192, residual=True)\n")

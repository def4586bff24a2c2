"""The cycle model: copies that tensor maps describe, roles of warps, and registers they pass on."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
from sass_text import code
from test_cycle_model import run as run_compiled
from test_cycle_model_clusters import INITIALIZED

from crossvit_kernels.inspect.model import gluon_launch, sass
from crossvit_kernels.inspect.model.emulator import Block, Emulator, Trace
from crossvit_kernels.inspect.model.gpus import A100, GPUS, H200
from crossvit_kernels.inspect.model.launch import Launch
from crossvit_kernels.inspect.model.multiprocessor import Multiprocessor, Run
from crossvit_kernels.inspect.model.sm_state import MemoryShare, SharedMemory
from crossvit_kernels.inspect.model.tensor_maps import TensorMap

#: 100 rows of 80 columns of 2 bytes, with room for 96, in tiles of 64 x 64.
MAP = TensorMap(3, 100, 80, 192, (64, 64), 2)
_PLACE = 0x40


def traced(kernel: sass.Kernel, warps: int = 1, blocks: int = 1) -> Trace:
    """What blocks execute, with MAP among the parameters."""
    parameters = bytes(2 * _PLACE)
    launch = Launch(kernel, (1, 1, 1), warps, 0, 0, parameters, (), 90, tensor_maps={_PLACE: MAP})
    emulator = Emulator(kernel, launch.constants(), 1.0, launch.tensor_maps)
    trace = emulator.run([Block(n, 0, 0) for n in range(blocks)], warps)
    assert not trace.unknown_branches
    return trace


def timed(kernel: sass.Kernel, warps: int = 1, registers: int = 0) -> Run:
    """A block on a GPU that is otherwise idle."""
    sm = Multiprocessor(H200, kernel, MemoryShare.of(H200, 1, {}, {}), registers)
    return sm.run(traced(kernel, warps).warps, 1)


def tile(opcode: str, row: int, column: int) -> tuple[str, ...]:
    """Copy a tile; the barrier is at UR8."""
    store = opcode == "UTMASTG"
    place = ("UR13", "UR14") if store else ("UR14", "UR15")
    return (
        "ULDC.64 UR6, c[0x0][0x198]",
        f"UIADD3 UR10, UP0, UR6, {_PLACE:#x}, URZ",
        "UIADD3.X UR11, URZ, UR7, URZ, UP0, !UPT",
        "UMOV UR12, 0x1000",
        *(() if store else ("UMOV UR13, UR8",)),
        f"UMOV {place[0]}, {column & 0xFFFFFFFF:#x}",
        f"UMOV {place[1]}, {row & 0xFFFFFFFF:#x}",
        f"{opcode}.2D [UR12], [UR10]",
    )


@pytest.mark.parametrize("opcode", ["UTMALDG", "UTMASTG"])
@pytest.mark.parametrize(
    ("row", "column", "sectors"),
    [(0, 0, 64 * 4), (64, 0, 36 * 4), (64, 64, 36), (128, 0, 0), (0, 128, 0)],
)
def test_a_tile_moves_what_lies_in_the_matrix(
    opcode: str, row: int, column: int, sectors: int
) -> None:
    """And signals all of its bytes: the rest are zeros."""
    kernel = code("UMOV UR8, 0x400", *tile(opcode, row, column), "EXIT")
    (copy,) = (s for s in traced(kernel).warps[0][0] if s.amount)
    assert (copy.amount, copy.sectors, copy.tensor) == (64 * 64 * 2, sectors, 3)
    assert copy.barrier == (0x400 if opcode == "UTMALDG" else 0)


@pytest.mark.parametrize("announced", [8192, 8193])
def test_a_barrier_waits_for_a_tile(announced: int) -> None:
    kernel = code(
        *INITIALIZED,
        "S2R R9, SR_TID.X",
        "ISETP.NE.AND P3, PT, R9, RZ, PT",
        f"MOV R8, {announced:#x}",
        "@!P3 SYNCS.ARRIVE.TRANS64 RZ, [UR8], R8",
        *tile("UTMALDG", 0, 0),
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR8], RZ",
        "EXIT",
    )
    if announced > 8192:
        with pytest.raises(RuntimeError, match="barrier"):
            timed(kernel)
        return
    run = timed(kernel)
    assert run.cycles > H200.l2_latency + 8192 / 64
    assert run.stalls["mbarrier"] > 0.8 * run.cycles


@pytest.mark.parametrize("pending", [0, 1])
def test_warps_wait_until_stored_tiles_have_been_read(pending: int) -> None:
    kernel = code(
        *tile("UTMASTG", 0, 0),
        "UTMACMDFLUSH",
        *tile("UTMASTG", 0, 64),
        "UTMACMDFLUSH",
        f"DEPBAR.LE SB0, {pending:#x}",
        *["NOP"] * 400,
        "EXIT",
    )
    run = timed(kernel)
    assert 0 < run.cycles - 400 - (2 - pending) * 128 < 150


def test_copies_take_turns_with_other_accesses() -> None:
    shared = SharedMemory()
    shared.copy(100.0, 200.0, 8192)
    shared.catch_up(99.0)
    assert shared.free == 0.0
    shared.catch_up(150.0)
    assert 150.0 <= shared.free < 160.0
    shared.catch_up(1000.0)
    assert 200.0 <= shared.free <= 210.0


# Warps 0 and 1 write a role for each of warps 2 to 5, wait for them and jump to it; 3 is the end.
ROLES = (
    "S2R R0, SR_TID.X",
    "SHF.R.U32.HI R2, RZ, 0x5, R0",
    "ISETP.GE.U32.AND P0, PT, R2, 0x2, PT",
    "@P0 BRA `(.L_x_1)",
    "MOV R4, 0x1000201",
    "UMOV UR4, 0x400",
    "STS [UR4+0x8], R4",
    "BAR.SYNC.DEFER_BLOCKING 0x1",
    "BAR.SYNC.DEFER_BLOCKING 0x1",
    "MOV R4, 0x3030303",
    "STS [UR4+0x8], R4",
    "BAR.SYNC.DEFER_BLOCKING 0x1",
    "EXIT",
    ".L_x_1:",  # 13
    "BAR.SYNC.DEFER_BLOCKING 0x1",
    "LDS.U8 R3, [R2+0x406]",
    "SHF.L.U32 R3, R3, 0x2, RZ",
    "LDC R6, c[0x2][R3]",
    "BRX R6 -0x120",
    "NOP",  # 18
    "BRA `(.L_x_2)",
    "NOP",  # 20
    "NOP",
    "BRA `(.L_x_2)",
    ".L_x_2:",
    "BAR.SYNC.DEFER_BLOCKING 0x1",  # 23
    "BRA `(.L_x_1)",
    "EXIT",  # 25
)


def test_warps_find_their_roles_in_shared_memory() -> None:
    table = np.array([0x120, 0x140, 0x150, 0x190], np.uint32).tobytes()
    kernel = dataclasses.replace(code(*ROLES), jump_table=table)
    for block in traced(kernel, warps=6, blocks=2).warps:
        starts = [[s.instruction for s in path if s.instruction in (18, 20, 21)] for path in block]
        assert starts == [[], [], [20, 21], [21], [18], [20, 21]]
        assert all(path[-1].instruction == 25 for path in block[2:])
    assert timed(kernel, warps=6).ends
    without = code(*(line for line in ROLES if "STS" not in line))
    without = dataclasses.replace(without, jump_table=table)
    with pytest.raises(ValueError, match="depends on data"):
        traced(without, warps=6)


def test_warps_pass_by_a_barrier_they_are_not_told_to_wait_at() -> None:
    kernel = code(
        "S2R R0, SR_TID.X",
        "ISETP.LT.U32.AND P0, PT, R0, 0x40, PT",
        "@P0 BAR.SYNC.DEFER_BLOCKING 0x2, 0x40",
        "EXIT",
    )
    assert timed(kernel, warps=4).cycles < 100
    with pytest.raises(RuntimeError, match="barrier"):
        timed(code(*(line.replace("0x40", "0x60") for line in kernel_lines(kernel))), warps=2)


def kernel_lines(kernel: sass.Kernel) -> list[str]:
    """As sass_text takes them."""
    lines = []
    for i in kernel.instructions:
        guard = f"@{i.guard} " if i.guard else ""
        lines.append(f"{guard}{i.name} {', '.join(i.operands)}".strip())
    return lines


@pytest.mark.parametrize("kept", [40, 41])
def test_registers_are_taken_once_others_have_given_them_back(kept: int) -> None:
    """Two warps of 64: one takes 24 more, of the 24 that the other gives back, or of 23."""
    kernel = code(
        "S2R R0, SR_TID.X",
        "ISETP.GE.U32.AND P0, PT, R0, 0x20, PT",
        "@P0 BRA `(.L_x_1)",
        ".L_x_0:",
        "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0x58",
        "PLOP3.LUT P1, PT, PT, PT, UP0, 0x80, 0x0",
        "@!P1 BRA `(.L_x_0)",
        "EXIT",
        ".L_x_1:",
        *["NOP"] * 300,
        f"USETMAXREG.DEALLOC.CTAPOOL {kept:#x}",
        "EXIT",
    )
    if kept > 40:
        with pytest.raises(RuntimeError, match="registers"):
            timed(kernel, warps=2, registers=64)
        return
    run = timed(kernel, warps=2, registers=64)
    assert 300 < run.ends[0] < 400


def test_parameters_lie_where_the_machine_code_reads_them() -> None:
    """A map begins at a multiple of 64 in the constant bank, not among the parameters."""
    x = torch.empty(70, 384, dtype=torch.bfloat16, device="meta")
    layout = SimpleNamespace(swizzle_byte_width=128)
    described = SimpleNamespace(
        base=x, shape=(70, 384), strides=(384, 1), block_shape=[64, 128], layout=layout
    )
    parameters = gluon_launch._Parameters(sass.parameters_at(90))
    for argument in (described, described, x, 70, 1e-6):
        parameters.add(argument)
    assert [*parameters.maps] == [0x30, 0xF0]
    expected = TensorMap(0, 70, 384, 768, (64, 64), 2)
    assert {*parameters.maps.values()} == {expected}
    bank = parameters.bank
    assert int.from_bytes(bank[0xB0:0xB8], "little") == 70 | 384 << 32
    assert int.from_bytes(bank[0x188:0x190], "little") == 1 << 40  # the tensor, after both
    assert bank[0x190:0x194] == (70).to_bytes(4, "little")
    assert parameters.tensor_bytes == [70 * 384 * 2]


def test_only_hopper_has_gluon_kernels() -> None:
    assert gluon_launch.why_not(H200) is None
    assert "9.0" in (gluon_launch.why_not(A100) or "")
    assert all(gluon_launch.why_not(gpu) for gpu in GPUS.values() if gpu.compute_capability != 90)


@pytest.mark.slow
def test_a_block_of_gluon_kernels_is_modelled() -> None:
    """An image of CrossViT-15's smaller branch: every token is read, and nothing is guessed."""
    command = ("-m", "crossvit_kernels.inspect", "--model", "15", "--batch", "1", "--json")
    command += ("--backend", "triton:gluon", "--channels", "192", "--kernel", "sm90")
    rows = json.loads(run_compiled(*command))["rows"]
    forward = [row for row in rows if row["direction"] == "forward"]
    assert [row["kernel"] for row in forward] == ["sm90_linear", "sm90_wide_linear"] * 2
    for row in forward:
        assert row["backend"] == "triton:gluon"
        modelled = row["modelled"]
        assert modelled["floor"] < modelled["microseconds"] < 20
        assert not modelled["unknown_branches"] and modelled["busy"]["tensor cores"] > 0
    qkv = forward[0]["modelled"]
    assert qkv["dram_megabytes"] == pytest.approx((4 * 401 + 3 * 192) * 192 * 2 / 1e6, rel=0.03)

"""The cycle model: machine code is read, paths and addresses are found, cycles are counted."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

from sass_text import code

from crossvit_kernels import extension, supported
from crossvit_kernels.inspect.model import accesses, lanes, sass, triton_launch
from crossvit_kernels.inspect.model.divergence import Group, Step
from crossvit_kernels.inspect.model.emulator import Block, Emulator
from crossvit_kernels.inspect.model.gpus import A100, GPUS, H200
from crossvit_kernels.inspect.model.memory import pointer
from crossvit_kernels.inspect.model.multiprocessor import Multiprocessor
from crossvit_kernels.inspect.model.sm_state import MemoryShare
from crossvit_kernels.inspect.model.translator import Registers

ROOT = Path(__file__).parents[1]


def path_of(kernel: sass.Kernel, constants: dict[int, int] | None = None) -> list[int]:
    """Indices of what the first warp executes."""
    trace = Emulator(kernel, constants or {}).run([Block(0, 0, 0)], 1)
    assert not trace.unknown_branches
    return [step.instruction for step in trace.warps[0][0]]


def cycles_of(path: list[int], kernel: sass.Kernel, warps: int = 1) -> float:
    steps = [Step(index) for index in path]
    run = Multiprocessor(H200, kernel, MemoryShare.of(H200, 132, {}, {})).run([[steps] * warps], 1)
    return run.cycles


def test_reads_an_instruction() -> None:
    kernel = code(
        '//## File "/a/tiles.py", line 5 inlined at "/a/passes.py", line 7',
        '//## File "/a/passes.py", line 7',
        ".L_x_0:",
        "@!P0 IMAD.WIDE.U32 R2, R4.reuse, 0x4, R6",
        "@P0 BRA `(.L_x_0)",
        "LDSM.16.MT88.4 R8, [R3+UR4+0x40]",
        control=0x5 | 2 << 11,
    )
    first, branch, load = kernel.instructions
    assert (first.opcode, first.modifiers, first.guard) == ("IMAD", ("WIDE", "U32"), "!P0")
    assert first.operands == ("R2", "R4", "0x4", "R6")
    assert (first.stall, first.waits_for) == (5, (1,))
    assert first.source == branch.source == "tiles.py:5 < passes.py:7"
    assert first.write_scoreboard is None and first.read_scoreboard is None
    assert branch.target == 0 and load.access_bytes == 16
    assert [(loop.first, loop.last) for loop in kernel.loops] == [(0, 1)]
    assert kernel.innermost(0) == kernel.loops[0] and kernel.innermost(2) is None


@pytest.mark.parametrize("size", [1, 64, 400])
def test_a_loops_trips_follow_from_a_size(size: int) -> None:
    kernel = code(
        "MOV R2, RZ",
        ".L_x_0:",
        "IADD3 R2, R2, 0x10, RZ",
        "ISETP.GE.AND P0, PT, R2, c[0x0][0x210], PT",
        "@!P0 BRA `(.L_x_0)",
        "EXIT",
    )
    assert path_of(kernel, {0x210: size}).count(1) == -(-size // 16)


@pytest.mark.parametrize("number, divisor", [(1000, 7), (400, 400), (12345678, 401), (3, 5)])
def test_divides_as_compilers_do(number: int, divisor: int) -> None:
    """By a float's reciprocal, corrected; a loop counts the quotient."""
    kernel = code(
        "I2F.U32.RP R4, c[0x0][0x214]",
        "MUFU.RCP R4, R4",
        "IADD3 R5, R4, 0xffffffe, RZ",
        "F2I.FTZ.U32.TRUNC.NTZ R3, R5",
        "IMAD.MOV R6, RZ, RZ, -R3",
        "IMAD R7, R6, c[0x0][0x214], RZ",
        "IMAD.MOV.U32 R2, RZ, RZ, RZ",
        "IMAD.HI.U32 R3, R3, R7, R2",
        "IMAD.HI.U32 R8, R3, c[0x0][0x210], RZ",
        "IADD3 R9, -R8, RZ, RZ",
        "IMAD R9, R9, c[0x0][0x214], c[0x0][0x210]",
        "ISETP.GE.U32.AND P0, PT, R9, c[0x0][0x214], PT",
        "@P0 IADD3 R9, R9, -c[0x0][0x214], RZ",
        "@P0 IADD3 R8, R8, 0x1, RZ",
        "ISETP.GE.U32.AND P1, PT, R9, c[0x0][0x214], PT",
        "@P1 IADD3 R8, R8, 0x1, RZ",
        f"ISETP.EQ.U32.AND P2, PT, R8, {number // divisor:#x}, PT",
        "@P2 EXIT",
        "NOP",
        "EXIT",
    )
    assert 18 not in path_of(kernel, {0x210: number, 0x214: divisor})


def test_numbers_of_64_bits_and_their_carries() -> None:
    kernel = code(
        "IADD3 R2, P0, RZ, -0x1, RZ",
        "IADD3 R2, P0, R2, 0x2, RZ",  # 2**32 + 1: carries
        "IADD3.X R3, RZ, RZ, RZ, P0, !PT",
        "IADD3 R4, P1, R2, -R2, RZ",  # without a borrow: carries
        "IADD3.X R5, R3, ~R3, RZ, P1, !PT",
        "SHF.R.U64 R6, R2, 0x1, R3",
        "LEA R8, P2, R2, RZ, 0x4",
        "LEA.HI.X R9, R2, RZ, R3, 0x4, P2",
        "STG.E [R2.64], R4",
        "EXIT",
    )
    emulator = Emulator(kernel, {})
    group = Group(Registers({}), [0], [])
    emulator._memory.start([0])
    emulator._run(group, {})
    bank = group.registers.banks["R"]
    assert bank[2:10] == [1, 1, 0, 0, 1 << 31, bank[7], 16, 16]


def test_warps_and_lanes_go_their_own_ways() -> None:
    kernel = code(
        "S2R R0, SR_TID.X",
        "BSSY B0, `(.L_x_1)",
        "ISETP.GE.AND P0, PT, R0, 0x30, PT",  # half of the second warp
        "@P0 BRA `(.L_x_0)",
        "NOP",
        "BRA `(.L_x_1)",
        ".L_x_0:",
        "MOV R1, R0",
        ".L_x_1:",
        "BSYNC B0",
        "EXIT",
    )
    trace = Emulator(kernel, {}).run([Block(0, 0, 0)], 3)
    paths = [[step.instruction for step in warp] for warp in trace.warps[0]]
    labels = {i.opcode: i.index for i in kernel.instructions}
    below, above = labels["NOP"], labels["MOV"]
    assert [(below in path, above in path) for path in paths] == [
        (True, False),
        (True, True),
        (False, True),
    ]
    assert all(path[-1] == labels["EXIT"] for path in paths)


def test_lanes_that_skip_code_without_a_convergence_barrier_wait_behind_it() -> None:
    kernel = code(
        "S2R R0, SR_TID.X",
        "MOV R6, 0x0",
        f"MOV R7, {pointer(0) >> 32:#x}",
        "IMAD.WIDE R2, R0, 0x20, R6",
        "ISETP.GE.AND P0, PT, R0, 0x30, PT",  # half of the second warp
        "@P0 BRA `(.L_x_1)",
        "IADD3 R1, R0, 0x8, RZ",
        ".L_x_0:",
        "STG.E desc[UR4][R2.64], R1",
        "ISETP.GE.AND P1, PT, R1, 0x30, PT",
        "IADD3 R1, R1, 0x10, RZ",
        "@!P1 BRA `(.L_x_0)",  # the higher the lane, the fewer stores
        ".L_x_1:",
        "STG.E desc[UR4][R2.64], R0",
        "EXIT",
    )
    trace = Emulator(kernel, {}).run([Block(0, 0, 0)], 2)
    sectors = [[step.sectors for step in warp if step.sectors] for warp in trace.warps[0]]
    assert sectors == [[32, 32, 24, 8, 32], [16, 8, 32]]


@pytest.mark.parametrize("exits, sectors", [(0x8, [8, 24]), (0x10, [16, 16])])
def test_lanes_that_wait_outlive_those_that_end(exits: int, sectors: list[int]) -> None:
    """Half of the lanes wait behind code in which some or all of the others end."""
    kernel = code(
        "S2R R0, SR_TID.X",
        "MOV R6, 0x0",
        f"MOV R7, {pointer(0) >> 32:#x}",
        "IMAD.WIDE R2, R0, 0x20, R6",
        "ISETP.GE.AND P0, PT, R0, 0x10, PT",
        "@P0 BRA `(.L_x_1)",
        f"ISETP.GE.AND P1, PT, R0, {exits:#x}, PT",
        "@!P1 STG.E desc[UR4][R2.64], R0" if exits == 0x8 else "STG.E desc[UR4][R2.64], R0",
        "@!P1 EXIT",
        ".L_x_1:",
        "STG.E desc[UR4][R2.64], R0",
        "EXIT",
    )
    trace = Emulator(kernel, {}).run([Block(0, 0, 0)], 1)
    assert [step.sectors for step in trace.warps[0][0] if step.sectors] == sectors


def test_an_unknown_branch_is_reported() -> None:
    kernel = code(
        "LDG.E R2, desc[UR4][R4.64]",
        "ISETP.GE.AND P0, PT, R2, 0x1, PT",
        "@P0 BRA `(.L_x_0)",
        "NOP",
        ".L_x_0:",
        "EXIT",
    )
    trace = Emulator(kernel, {}).run([Block(0, 0, 0)], 1)
    assert sum(trace.unknown_branches.values()) == 1


@pytest.mark.parametrize("share, falls", [(1.0, [1] * 8), (0.5, [1, 0] * 4), (0.0, [0] * 8)])
def test_a_branch_on_data_falls_through_as_often_as_is_known(
    share: float, falls: list[int]
) -> None:
    kernel = code(
        "MOV R2, RZ",
        ".L_x_1:",
        "LDG.E R3, desc[UR4][R4.64]",
        "ISETP.GE.AND P0, PT, R3, 0x1, PT",
        "@P0 BRA `(.L_x_0)",
        "NOP",
        ".L_x_0:",
        "IADD3 R2, R2, 0x1, RZ",
        "ISETP.GE.AND P1, PT, R2, 0x8, PT",
        "@!P1 BRA `(.L_x_1)",
        "EXIT",
    )
    trace = Emulator(kernel, {}, share).run([Block(0, 0, 0)], 1)
    path = [step.instruction for step in trace.warps[0][0]]
    labels = {i.opcode: i.index for i in kernel.instructions}
    each = [n for n, index in enumerate(path) if index == labels["LDG"]]
    assert [int(path[n + 3] == labels["NOP"]) for n in each] == falls


@pytest.mark.parametrize(
    "guard, branch", [("P0", "BRA `(.L_x_0)"), ("!P0", "EXIT"), ("P0", "BRA `(.L_x_1)")]
)
def test_unlikely_lines_are_not_executed(guard: str, branch: str) -> None:
    """Whether they follow the branch, or an exit, or are what it leads to."""
    unlikely = ('//## File "kernels.py", line 7 inlined at "passes.py", line 12', "NOP")
    likely = ('//## File "kernels.py", line 7 inlined at "passes.py", line 8', "MOV R2, RZ", "EXIT")
    first, second = (likely, unlikely) if branch.endswith("1)") else (unlikely, likely)
    kernel = code(
        '//## File "passes.py", line 5',
        "LDG.E R3, desc[UR4][R4.64]",
        "ISETP.GE.AND P0, PT, R3, 0x1, PT",
        f"@{guard} {branch}",
        *first,
        ".L_x_0:",
        ".L_x_1:",
        *second,
    )
    trace = Emulator(kernel, {}, unlikely=frozenset({"passes.py:12"})).run([Block(0, 0, 0)], 1)
    path = [kernel.instructions[step.instruction].opcode for step in trace.warps[0][0]]
    assert "NOP" not in path and ("MOV" in path) == (branch != "EXIT")
    assert not trace.unknown_branches


def test_unlikely_lines_of_kernels() -> None:
    lines = triton_launch.unlikely_lines()
    files = {line.split(":")[0] for line in lines}
    assert files == {"triton_forward_pass.py", "triton_backward_pass.py"}
    for file in files:
        text = (ROOT / "crossvit_kernels/ops/attention_core" / file).read_text()
        numbers = sorted(int(line.split(":")[1]) for line in lines if line.startswith(file))
        of_pass = text.splitlines()[numbers[0] - 2 : numbers[-1]]
        assert of_pass[0].endswith(":  # unlikely") and "AGAIN=True" in of_pass[-1]


@pytest.mark.parametrize(
    "stride, access_bytes, wavefronts",
    [
        (4, 4, 1), (8, 4, 2), (128, 4, 32), (132, 4, 1), (0, 4, 1), (2, 2, 1),
        (8, 8, 2), (16, 16, 4), (128, 16, 32), (144, 16, 4),
    ],
)  # fmt: skip
def test_bank_conflicts(stride: int, access_bytes: int, wavefronts: int) -> None:
    addresses = np.arange(32)[None] * stride
    found = accesses.shared_wavefronts(addresses, access_bytes, np.ones((1, 32), bool))
    assert found.tolist() == [wavefronts]


def test_sectors_of_a_load_and_hits_of_its_repetition() -> None:
    kernel = code(
        "S2R R0, SR_TID.X",
        "MOV R6, 0x0",
        f"MOV R7, {pointer(0) >> 32:#x}",
        "IMAD.WIDE R2, R0, 0x10, R6",
        "LDG.E.128 R8, desc[UR4][R2.64]",
        "LDG.E.128 R8, desc[UR4][R2.64]",
        "IMAD.WIDE R2, R0, 0x80, R6",
        "STG.E desc[UR4][R2.64], R8",
        "EXIT",
    )
    trace = Emulator(kernel, {}).run([Block(0, 0, 0)], 1)
    moved = [tuple(step[1:4]) for step in trace.warps[0][0] if step.wavefronts]
    assert moved == [(4, 16, 0), (4, 0, 0), (32, 32, 0)]


def test_a_chain_of_dependent_ffmas_takes_their_stall_counts() -> None:
    kernel = code(*["FFMA R0, R0, R1, R2"] * 100, "EXIT", control=0x4)
    assert cycles_of([*range(101)], kernel) == pytest.approx(4 * 100, abs=5)
    # Four warps of a sub-partition fill each other's gaps.
    assert cycles_of([*range(101)], kernel, warps=16) == pytest.approx(4 * 100, abs=10)


def test_special_functions_are_bound_by_their_pipe() -> None:
    kernel = code(*["MUFU.EX2 R0, R1"] * 100, "EXIT")
    assert cycles_of([*range(101)], kernel) == pytest.approx(8 * 100, abs=10)
    assert cycles_of([*range(101)], kernel, warps=8) == pytest.approx(16 * 100, abs=20)


def test_a_sub_partition_issues_one_instruction_a_cycle() -> None:
    kernel = code(*["NOP"] * 100, "EXIT")
    assert cycles_of([*range(101)], kernel, warps=8) == pytest.approx(2 * 101, abs=2)


def test_a_scoreboard_holds_back_what_waits_for_it() -> None:
    load = code("LDS R0, [R1]", "EXIT").instructions[0]
    made = code("LDS R0, [R1]", "FADD R2, R0, R0", "EXIT")
    waits = dataclasses.replace(made.instructions[1], waits_for=(0,))
    load = dataclasses.replace(load, write_scoreboard=0)
    kernel = sass.Kernel("made", (load, waits, made.instructions[2]))
    steps = [Step(0, 1), Step(1), Step(2)]
    run = Multiprocessor(H200, kernel, MemoryShare.of(H200, 132, {}, {})).run([[steps]], 1)
    assert 29 <= run.cycles <= 35
    assert run.stalls.most_common(1)[0][0] == "shared memory"


def test_a_barrier_waits_for_all_warps() -> None:
    kernel = code("BAR.SYNC.DEFER_BLOCKING 0x0", *["NOP"] * 50, "EXIT")
    early, late = [Step(0), Step(51)], [*(Step(n) for n in range(1, 51)), Step(0), Step(51)]
    run = Multiprocessor(H200, kernel, MemoryShare.of(H200, 132, {}, {})).run([[early, late]], 1)
    assert run.cycles > 50 and run.stalls["barrier"] >= 49


def test_a_barrier_that_waits_for_ever_is_an_error() -> None:
    kernel = code("BAR.SYNC.DEFER_BLOCKING 0x1, 0x80", "EXIT")
    one = [[[Step(0), Step(1)]]]
    with pytest.raises(RuntimeError, match="barrier"):
        Multiprocessor(H200, kernel, MemoryShare.of(H200, 132, {}, {})).run(one, 1)


def test_matrix_products_reach_the_tensor_cores_rate() -> None:
    """Two groups of four warps, each its wgmma one after the other, as of a 128 x 256 tile."""
    kernel = code(*["HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"] * 40, "EXIT")
    cycles = cycles_of([*range(41)], kernel, warps=8)
    assert cycles == pytest.approx(2 * 40 * 128, rel=0.05)


def test_integers_are_words() -> None:
    assert lanes.shift(("R", "S32", "HI"), 0, 4, 0x80000000) == 0xF8000000
    assert lanes.shift(("L", "U32"), 0x80000001, 1, 0) == 2
    assert lanes.sign_extend(("U32",), 0x1234, 8) == 0x34
    assert lanes.permute(0x44332211, 0x5410, 0x88776655) == 0x66552211
    assert lanes.lookup(0xFE, 1, 2, 4) == 7
    array = np.array([[1 << 31]])
    assert lanes.shift(("R", "U64"), array, 31, array).tolist() == [[1]]


def test_gpus_are_consistent() -> None:
    assert {*GPUS} == {"A100", "RTX4090", "H100", "H200", "B200"}
    assert A100.tensor_flops == pytest.approx(312e12, rel=0.01)
    assert GPUS["H100"].tensor_flops * 1.83 / 1.755 == pytest.approx(989e12, rel=0.01)


COPY = """
import json, sys
sys.path.insert(0, "bench")
import torch
import model_validation as validation
from crossvit_kernels.inspect.model.estimate import estimate
from crossvit_kernels.inspect.model.gpus import GPUS
gpu = GPUS["H200"]
found = estimate(validation.copy(gpu).launch, gpu)
print(json.dumps([found.microseconds, found.floor, found.bound_by, found.unknown_branches]))
"""


def run(*command: str) -> str:
    """In a process whose kernels are compiled, not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_copy_is_bound_by_dram() -> None:
    microseconds, floor, bound_by, unknown = json.loads(run("-c", COPY))
    assert floor == pytest.approx(microseconds, rel=0.15) and floor <= microseconds
    assert bound_by == "DRAM" and not unknown


WITH_CUDA = pytest.param("cuda", marks=pytest.mark.skipif(
    not extension.cuda_architectures(), reason="needs the extension with CUDA"
))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", WITH_CUDA])
def test_a_launch_is_modelled_at_its_real_size(backend: str) -> None:
    """One image of CrossViT-15's smaller branch: every token is read once."""
    command = ("-m", "crossvit_kernels.inspect", "--model", "15", "--batch", "1", "--json")
    command += ("--backend", backend)
    found = json.loads(run(*command, "--channels", "192", "--kernel", "attention_core_forward"))
    assert found["what"] == "a model of machine code, not a measurement"
    (row,) = found["rows"]
    assert row["backend"] == backend
    assert (row["operation"], row["direction"], row["tokens"]) == ("attention_core", "forward", 401)
    modelled = row["modelled"]
    least = (400 * 192 * 2 + 2 * 6 * 192 * 4) / 1e6
    assert modelled["dram_megabytes"] == pytest.approx(least, rel=0.02)
    assert modelled["floor"] < modelled["microseconds"] < 100
    assert len(modelled["unknown_branches"]) <= (backend == "cuda") and modelled["waits_at"]


@pytest.mark.slow
def test_no_kernel_is_modelled_slower_than_committed() -> None:
    """A change that makes one slower has to say so, by a new table."""
    table = json.loads((ROOT / "bench/results/model/h200.json").read_text())
    if table["versions"]["triton"] != supported.installed_version("triton"):
        pytest.skip(f"the table is of Triton {table['versions']['triton']}")
    kept: dict[tuple, list[float]] = {}  # in the order of their launches
    for row in table["rows"]:
        kept.setdefault(_key(row), []).append(row["modelled"]["microseconds"])
    command = ("-m", "crossvit_kernels.inspect", "--model", "--batch", "64", "--json")
    found = json.loads(run(*command, "--kernel", "attention_core"))["rows"]
    found += json.loads(run(*command, "--kernel", "linear", "--channels", "192"))["rows"]
    # Attention at C = 192 runs its projection as a kernel of its own; the core is also a part of a
    # fusion's backward at 384.
    assert len([row for row in found if row["backend"] == "triton"]) == 7
    for row in found:
        assert row["backend"] == "cuda" or not row["modelled"]["unknown_branches"]
        assert row["modelled"]["microseconds"] <= 1.05 * kept[_key(row)].pop(0), row


def _key(row: dict) -> tuple:
    names = ("backend", "operation", "direction", "channels", "batch", "dtype", "kernel")
    return tuple(row[name] for name in names)

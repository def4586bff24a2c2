"""The cycle model: clusters, mbarriers, bulk copies, named barriers and tensor memory."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from sass_text import code

from crossvit_kernels import extension
from crossvit_kernels.inspect.model import cuda_launch, sass
from crossvit_kernels.inspect.model.emulator import Block, Emulator, Trace
from crossvit_kernels.inspect.model.gpus import B200, GPUS, H200, Gpu
from crossvit_kernels.inspect.model.launch import Launch
from crossvit_kernels.inspect.model.mbarriers import Mbarrier
from crossvit_kernels.inspect.model.memory import pointer
from crossvit_kernels.inspect.model.multiprocessor import Multiprocessor, Run
from crossvit_kernels.inspect.model.sm_state import MemoryShare


def traced(kernel: sass.Kernel, warps: int = 1, rank: int = 0) -> Trace:
    """What one block executes."""
    trace = Emulator(kernel, {}).run([Block(0, 0, 0, rank)], warps)
    assert not trace.unknown_branches
    return trace


def timed(kernel: sass.Kernel, warps: int = 1, gpu: Gpu = H200) -> Run:
    """That block on a GPU that is otherwise idle."""
    share = MemoryShare.of(gpu, 1, {}, {})
    return Multiprocessor(gpu, kernel, share).run(traced(kernel, warps).warps, 1)


#: The registers UR4 and UR5 of a barrier for one arrival, and UR8, its address.
INITIALIZED = (
    "UMOV UR4, 0x1",
    "UIADD3 UR4, -UR4, 0x100000, URZ",
    "USHF.L.U32 UR5, UR4, 0xb, URZ",
    "USHF.L.U32 UR4, UR4, 0x1, URZ",
    "UMOV UR8, 0x400",
    "SYNCS.EXCH.64 URZ, [UR8], UR4",
)

# Each of 16 lanes copies a row of 384 bytes, one after the other, as compilers have it.
ROWS = (
    "S2R R0, SR_TID.X",
    f"MOV R5, {pointer(0) >> 32:#x}",
    "IMAD R4, R0, 0x180, RZ",
    "IMAD R6, R0, 0x190, RZ",
    "MOV R7, 0x400",
    "UMOV UR10, 0x18",
    "ISETP.LT.AND P0, PT, R0, 0x10, PT",
    "@!P0 BRA `(.L_x_1)",
    ".L_x_0:",
    "@P0 ELECT P1, URZ, PT",
    "@P1 R2UR UR12, R4",
    "@P1 R2UR UR13, R5",
    "@P1 R2UR UR14, R6",
    "@P1 R2UR UR15, R7",
    "@P1 PLOP3.LUT P0, PT, P1, PT, PT, 0x8, 0x0",
    "PLOP3.LUT P1, PT, PT, PT, PT, 0x8, 0x0",
    "UBLKCP.S.G [UR14], [UR12], UR10",
    "@P0 BRA.U.ANY `(.L_x_0)",
    ".L_x_1:",
)


def test_each_lane_copies_its_row() -> None:
    kernel = code(*ROWS, "EXIT")
    copies = [s for s in traced(kernel).warps[0][0] if s.amount]
    assert [(s.amount, s.sectors, s.tensor, s.barrier) for s in copies] == [
        (384, 12, 0, 0x400)
    ] * 16


@pytest.mark.parametrize("rows", [16, 12])
def test_a_barrier_waits_for_the_bytes_it_was_told_of(rows: int) -> None:
    """Twelve rows more than announced would never be waited for; four fewer, never end it."""
    expect = (f"MOV R8, {384 * 16:#x}", "SYNCS.ARRIVE.TRANS64 RZ, [UR8], R8")
    wait = "SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR8], RZ"
    copied = [line.replace("0x10, PT", f"{rows:#x}, PT") for line in ROWS]
    one = ("S2R R9, SR_TID.X", "ISETP.NE.AND P3, PT, R9, RZ, PT")
    kernel = code(
        *INITIALIZED, *one, expect[0], f"@!P3 {expect[1]}", *copied, wait, "@!P2 NOP", "EXIT"
    )
    if rows < 16:
        with pytest.raises(RuntimeError, match="barrier"):
            timed(kernel)
        return
    run = timed(kernel)
    assert run.cycles > H200.l2_latency
    assert run.stalls["mbarrier"] > H200.l2_latency / 2


def test_phases_alternate() -> None:
    barrier = Mbarrier(count=2)
    assert barrier.end_of(0, now=0.0) is None
    assert not barrier.update(10.0, arrivals=1, announced=64)
    assert not barrier.update(20.0, arrivals=1)
    assert barrier.update(50.0, copied=64)
    assert barrier.end_of(0, now=30.0) == 50.0  # ends later
    assert barrier.end_of(0, now=60.0) == 60.0  # has ended
    assert barrier.end_of(1, now=60.0) is None  # the next has not begun to


def test_stores_to_other_blocks_take_the_clusters_network() -> None:
    """Each rank's address has the rank in its bits 24 to 31; one's own is local."""
    kernel = code(
        "S2R R2, SR_SWINHI",
        "S2R R0, SR_TID.X",
        "LEA R8, R0, 0x400, 0x2",
        "MOV R5, R2",
        "MOV R3, RZ",
        ".L_x_0:",
        "PRMT R4, R3, 0x654, R8",
        "ST.E desc[UR6][R4.64], R9",
        "IADD3 R3, R3, 0x1, RZ",
        "ISETP.GE.AND P0, PT, R3, 0x8, PT",
        "@!P0 BRA `(.L_x_0)",
        "EXIT",
    )
    stores = [s for s in traced(kernel, rank=3).warps[0][0] if s.wavefronts]
    assert [s.remote for s in stores] == [128, 128, 128, 0, 128, 128, 128, 128]
    assert all(s.sectors == 0 for s in stores)


def test_a_fence_waits_for_stores_and_a_cluster_for_all_warps() -> None:
    sync = ("MEMBAR.ALL.GPU", "UCGABAR_ARV", "UCGABAR_WAIT", "EXIT")
    address = (f"MOV R3, {pointer(0) >> 32:#x}", "MOV R2, RZ")
    alone, stored = timed(code(*sync)), timed(code(*address, "STG.E [R2.64], R4", *sync))
    assert 200 < alone.cycles < 500
    assert stored.cycles > alone.cycles + 50
    late = (
        "S2R R0, SR_TID.X",
        "ISETP.LT.AND P0, PT, R0, 0x20, PT",
        "@P0 BRA `(.L_x_0)",
        *["NOP"] * 1000,
        ".L_x_0:",
    )
    assert timed(code(*late, *sync), warps=4).cycles > alone.cycles + 900


def test_warps_of_a_named_barrier_wait_for_each_other_alone() -> None:
    """Barrier 1 of warps 0 and 1, barrier 2 of 2 and 3, in a register with the count."""
    kernel = code(
        "S2R R0, SR_TID.X",
        "SHF.R.U32.HI R1, RZ, 0x6, R0",
        "IADD3 R1, R1, 0x400001, RZ",
        "BAR.SYNC.DEFER_BLOCKING R1, R1",
        "EXIT",
    )
    paths = traced(kernel, warps=4).warps[0]
    assert [(p[3].barrier, p[3].amount) for p in paths] == [(1, 64), (1, 64), (2, 64), (2, 64)]
    assert timed(kernel, warps=4).cycles < 100
    with pytest.raises(RuntimeError, match="barrier"):
        timed(kernel, warps=3)


def test_votes_and_elections() -> None:
    kernel = code(
        "S2R R0, SR_LANEID",
        "ISETP.GE.AND P0, PT, R0, 0x1c, PT",
        "VOTE.ANY R1, P1, P0",
        "VOTEU.ALL UP0, P0",
        "POPC R2, R1",
        "ISETP.EQ.AND P2, PT, R2, 0x4, P1",
        "PLOP3.LUT P2, PT, P2, PT, UP0, 0x40, 0x4",  # and not all
        "@P0 ELECT P3, URZ, PT",
        "BSSY B0, `(.L_x_1)",
        "ISETP.EQ.AND P4, PT, R0, 0x1c, P3",
        "@!P4 BRA `(.L_x_1)",
        "@P2 BRA `(.L_x_1)",
        "NOP",
        ".L_x_1:",
        "BSYNC B0",
        "EXIT",
    )
    path = [s.instruction for s in traced(kernel).warps[0][0]]
    assert 11 in path and 12 not in path  # lane 28 alone gets there, and goes on


def test_products_in_tensor_memory_reach_the_rate() -> None:
    """128 x 256 x 16: 128 cycles; a commit arrives when all of them are done."""
    product = "UTCHMMA gdesc[UR12], gdesc[UR14], tmem[UR6], tmem[UR30], idesc[UR31], UPT"
    idesc = 8 << 24 | 32 << 17
    kernel = code(
        *INITIALIZED,
        f"UMOV UR31, {idesc:#x}",
        *[product] * 40,
        "UTCBAR [UR8], URZ",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], RZ",
        "EXIT",
    )
    run = timed(kernel, gpu=B200)
    assert run.cycles == pytest.approx(40 * 128, rel=0.05)
    assert run.busy["tensor cores"] > 0.9


def test_clusters_fill_what_a_gpus_parts_leave() -> None:
    assert H200.multiprocessors_for(1) == sum(H200.gpcs) == 132
    assert H200.multiprocessors_for(8) == 128
    assert sum(B200.gpcs) == B200.multiprocessors


def test_a_tensors_views_share_its_number() -> None:
    import torch

    whole = torch.empty(4, 10, dtype=torch.bfloat16, device="meta")
    addresses = cuda_launch.Addresses()
    assert addresses(whole[:, 1:]) == pointer(0) + 2
    assert addresses(torch.empty(3, device="meta")) == pointer(1)
    assert addresses(whole[:, 1:]) == pointer(0) + 2
    assert addresses.tensor_bytes == (4 * 9 * 2, 12)


def test_names_of_symbols() -> None:
    symbol = "_ZN8crossvit4core4cuda12_GLOBAL__N_17forwardINS0_4PlanIfLi1EEEEEvNS0_6ParamsE"
    assert cuda_launch.function_name(symbol) == "forward"


needs_cuda = pytest.mark.skipif(
    not extension.cuda_architectures(), reason="needs the extension with CUDA"
)


# Operation -> its kernels' name.
WITH_CLUSTERS = {"attention_core": "attention_core", "cross_attention_fusion": "cross_attention"}


def launches(gpu: Gpu, batch: int, direction: str) -> list[Launch]:
    from crossvit_kernels.inspect.ahead_of_time import DTYPES
    from crossvit_kernels.inspect.model.workloads import workloads

    return [
        launch
        for workload in workloads("15", DTYPES["bf16"], batch)
        if workload.operation.name in WITH_CLUSTERS and workload.direction == direction
        for launch, _ in workload.launches("cuda", gpu)
    ]


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_would_be_launched_is_recorded(direction: str) -> None:
    """Both operations at both widths; clusters where the GPU has them."""
    found = launches(H200, 1, direction)
    names = [f"{name}_{direction}" for name in WITH_CLUSTERS.values()] * 2
    assert [launch.kernel.name for launch in found] == names
    assert all(launch.cluster == 8 and launch.num_blocks == 8 for launch in found)
    assert all(launch.registers <= 255 and launch.shared_bytes < 228 << 10 for launch in found)
    assert extension.cuda_kernels is not None and extension.cuda_kernels.device_type == "cuda"
    assert all(launch.cluster == 1 for launch in launches(GPUS["A100"], 1, direction))

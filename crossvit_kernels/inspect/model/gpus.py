"""State what GPUs can do, in bytes, cycles and operations.

Sources: NVIDIA's data sheets and white papers for sizes and peaks (A100: "NVIDIA A100 Tensor Core
GPU Architecture"; H100: "NVIDIA H100 Tensor Core GPU Architecture"; H200: its data sheet), and W.
Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via
Microbenchmarking", 2024 (arXiv 2402.13499) for latencies, the L2's throughput and the share of the
peak that mma.sync reaches on Hopper.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: As on the command line.
        compute_capability: 90 for 9.0.
        multiprocessors: Streaming multiprocessors (SMs).
        clock: Cycles a second that it sustains.
        dram_bytes_per_second: Of the data sheet.
        achievable_dram: The share of it that a copy reaches.
        l2_bytes_per_cycle: Of all SMs together.
        l2_bytes: Its size.
        tensor_macs: Multiply-adds in 16 bits of an SM in a cycle; float32 as TF32 has half.
        mma_share: The share of it that mma.sync reaches; wgmma reaches all.
        fp32_lanes: FFMA of a sub-partition in a cycle, in lanes.
        l1_latency: Cycles of a load that hits the L1.
        l2_latency: Of one that hits the L2.
        dram_latency: Of one that misses it.
        gpcs: SMs of each graphics processing cluster, in which a cluster of blocks lies.
        cluster_latency: Cycles from one SM's shared memory to another's; 0 where there is no way.
        cluster_bytes_per_cycle: That an SM sends to others.
    """

    name: str
    compute_capability: int
    multiprocessors: int
    clock: float
    dram_bytes_per_second: float
    achievable_dram: float
    l2_bytes_per_cycle: float
    l2_bytes: int
    tensor_macs: int
    mma_share: float
    fp32_lanes: int
    l1_latency: int
    l2_latency: int
    dram_latency: int
    gpcs: tuple[int, ...] = ()
    cluster_latency: int = 0
    cluster_bytes_per_cycle: float = 0.0

    def multiprocessors_for(self, cluster: int) -> int:
        """SMs that clusters of so many blocks can fill."""
        if cluster == 1:
            return self.multiprocessors
        return sum(gpc // cluster * cluster for gpc in self.gpcs)

    @property
    def dram_bytes_per_cycle(self) -> float:
        """That a copy reaches."""
        return self.dram_bytes_per_second * self.achievable_dram / self.clock

    @property
    def tensor_flops(self) -> float:
        """Of products in 16 bits, a second, at the clock it sustains."""
        return 2 * self.tensor_macs * self.multiprocessors * self.clock

    @property
    def exponentials(self) -> float:
        """Special functions a second: 16 of an SM in a cycle on all of these."""
        return 16 * self.multiprocessors * self.clock


A100 = Gpu(
    name="A100",
    compute_capability=80,
    multiprocessors=108,
    clock=1.41e9,  # boost: 312 TFLOP/s
    dram_bytes_per_second=2.039e12,  # 80 GB, SXM
    achievable_dram=0.88,
    l2_bytes_per_cycle=2189,  # Luo et al.; the white paper has 5120 for reads of both halves
    l2_bytes=40 << 20,
    tensor_macs=1024,
    mma_share=1.0,
    fp32_lanes=16,
    l1_latency=38,
    l2_latency=262,
    dram_latency=466,
)
H100 = Gpu(
    name="H100",
    compute_capability=90,
    multiprocessors=132,  # SXM
    clock=1.755e9,  # under load; the peak of 989 TFLOP/s is at 1.83 GHz, boost is up to 1.98
    dram_bytes_per_second=3.35e12,
    achievable_dram=0.90,
    l2_bytes_per_cycle=4472,
    l2_bytes=50 << 20,
    tensor_macs=2048,
    mma_share=0.63,
    fp32_lanes=32,
    l1_latency=41,
    l2_latency=263,
    dram_latency=479,
    gpcs=(16,) * 6 + (18,) * 2,  # 132 of 144; how many lack where differs from chip to chip
    cluster_latency=180,
    cluster_bytes_per_cycle=14.1,  # 3.27 TB/s of all SMs, Luo et al.
)
#: The same chip with faster memory.
H200 = dataclasses.replace(H100, name="H200", dram_bytes_per_second=4.8e12, achievable_dram=0.88)

RTX_4090 = Gpu(
    name="RTX4090",  # "NVIDIA Ada GPU Architecture"; throughput and latencies from Luo et al.
    compute_capability=89,
    multiprocessors=128,
    clock=2.52e9,  # boost: 165 TFLOP/s with sums in float32
    dram_bytes_per_second=1.008e12,
    achievable_dram=0.92,
    l2_bytes_per_cycle=1622,
    l2_bytes=72 << 20,
    tensor_macs=256,
    mma_share=1.0,
    fp32_lanes=32,
    l1_latency=43,
    l2_latency=273,
    dram_latency=542,
)
#: NVIDIA's data sheet has sizes, DRAM and the peak of 2.25 PFLOP/s. The rest are estimates: an L2
#: as fast for each SM as an H100's, latencies of two dies, and mma.sync at an A100's rate.
B200 = Gpu(
    name="B200",
    compute_capability=100,
    multiprocessors=148,
    clock=1.85e9,
    dram_bytes_per_second=8e12,
    achievable_dram=0.87,
    l2_bytes_per_cycle=5014,
    l2_bytes=126 << 20,
    tensor_macs=4096,
    mma_share=0.25,
    fp32_lanes=32,
    l1_latency=41,
    l2_latency=300,
    dram_latency=650,
    gpcs=(18,) * 6 + (20,) * 2,
    cluster_latency=180,
    cluster_bytes_per_cycle=14.1,
)

GPUS = {gpu.name: gpu for gpu in (A100, RTX_4090, H100, H200, B200)}

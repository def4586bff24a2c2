"""Data-parallel training over two processes gives the gradients of the whole batch."""

from __future__ import annotations

import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crossvit_kernels.modules import CrossAttentionFusion, TransformerBlock


class Model(nn.Module):
    """A block, then the fusion of a CLS with its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.block = TransformerBlock(24, 3)
        self.fusion = CrossAttentionFusion(16, 24, 3)

    def forward(self, cls: Tensor, x: Tensor) -> Tensor:
        return self.fusion(cls, self.block(x)[:, 1:])


def make() -> tuple[Model, Tensor, Tensor]:
    torch.manual_seed(0)
    return Model().double(), torch.randn(4, 16).double(), torch.randn(4, 9, 24).double()


def gradients(model: nn.Module, cls: Tensor, x: Tensor) -> list[Tensor]:
    model(cls, x).square().mean().backward()
    return [p.grad for p in model.parameters()]


def worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        model, cls, x = make()
        part = slice(2 * rank, 2 * rank + 2)
        # find_unused_parameters stays off: k_bias must have its (zero) gradient.
        parallel = DistributedDataParallel(model)
        for actual, expected in zip(
            gradients(parallel, cls[part], x[part]), gradients(*make()), strict=True
        ):
            torch.testing.assert_close(actual, expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_distributed_data_parallel(cpu_backend: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(f"{folder}/store",), nprocs=2)

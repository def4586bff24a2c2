"""Data-parallel and sharded training, compared with the gradients of the whole batch."""

from __future__ import annotations

import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from crossvit import Config, CrossViT
from crossvit.fusion import MultiScaleBlock
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
        rows = slice(2 * rank, 2 * rank + 2)
        # find_unused_parameters is off: k_bias must have its (zero) gradient.
        parallel = DistributedDataParallel(model)
        for actual, expected in zip(
            gradients(parallel, cls[rows], x[rows]), gradients(*make()), strict=True
        ):
            torch.testing.assert_close(actual, expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_distributed_data_parallel(cpu_backend: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(f"{folder}/store",), nprocs=2)


TINY = Config((32, 64), (2, 2), depths=(1, 2), mlp_ratios=(2.0, 2.0), num_blocks=1, img_size=48)
WRAPPED = [(), (TransformerBlock,), (MultiScaleBlock,), (nn.Linear,)]


def make_crossvit(fused: bool) -> CrossViT:
    torch.manual_seed(0)
    return CrossViT(TINY, use_fused=fused, num_classes=7)


def logits_and_gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and the gradient of the image, which passes through every layer."""
    x = x.clone().requires_grad_()
    logits = model(x)
    logits.square().sum().backward()
    return logits, x.grad


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("data",))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("fused", [True, False])
def test_sharded_models(fused: bool, one_process, cpu_backend: str) -> None:
    """Both of torch's implementations, with models, blocks and single layers as units."""
    x = torch.randn(2, 3, 48, 48)
    expected = logits_and_gradient(make_crossvit(fused), x)
    for units in WRAPPED:
        for use_orig_params in (True, False):
            model = FullyShardedDataParallel(
                make_crossvit(fused),
                use_orig_params=use_orig_params,
                auto_wrap_policy=ModuleWrapPolicy(set(units)) if units else None,
                device_id=torch.device("cpu"),
            )
            actual = logits_and_gradient(model, x)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        model = make_crossvit(fused)
        for module in reversed(list(model.modules())):
            if isinstance(module, (*units, CrossViT)):
                fully_shard(module, mesh=one_process)
        actual = logits_and_gradient(model, x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

"""The processes of a run, started by torchrun or alone, and how a model is spread over them."""

from __future__ import annotations

import dataclasses
import datetime
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crossvit.backbone import Backbone
from crossvit.fusion import MultiScaleBlock
from crossvit_kernels.modules import TransformerBlock


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    def sums(self, *values: float) -> list[float]:
        """Add numbers over all processes, in float64; every process gets the same results."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.world_size > 1:
            dist.barrier()


def start_processes(device: str | None, fsdp: bool) -> Processes:
    """Join the processes that torchrun started; without torchrun there is one.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:1``; None for the GPU of this process, if there is one.
        fsdp: Whether one process alone needs a group as well.

    Raises:
        ValueError: The device is unusable.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        chosen = torch.empty(0, dtype=torch.float32, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name}: {str(error).splitlines()[0]}") from error
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1 or fsdp:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        options: dict[str, Any] = {"timeout": datetime.timedelta(minutes=10)}
        if world_size == 1:
            options |= {"store": _local_store(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, **options)
    return Processes(rank, world_size, chosen)


def stop_processes() -> None:
    """Leave the group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def shard(model: Backbone, processes: Processes) -> None:
    """Spread a model's parameters, gradients and optimizer state over the processes (FSDP2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    for module in reversed(list(model.modules())):
        if isinstance(module, (TransformerBlock, MultiScaleBlock, Backbone)):
            fully_shard(module, mesh=mesh)


def replicate(model: Backbone, processes: Processes) -> nn.Module:
    """Let several processes average their gradients (DDP); one process gets the model itself."""
    if processes.world_size == 1:
        return model
    devices = [processes.device] if processes.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        model, device_ids=devices, gradient_as_bucket_view=True
    )


def accumulating(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Exchange gradients only after the last backward pass of a step."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    set_sync: Any = getattr(model, "set_requires_gradient_sync", None)  # of FSDP2
    if set_sync is not None:
        set_sync(last)
    return nullcontext()


def whole(t: Any) -> Tensor:
    """A tensor without its sharding."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t  # of a DTensor


def _local_store() -> Any:
    return vars(dist)["HashStore"]()

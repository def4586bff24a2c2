"""Top-1 and top-5 accuracy of a model and of each of its branches (the paper's Table 6)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from crossvit.checkpoint_targets import unwrap_any

#: Target of images that are not counted: unreadable ones, and those that fill up a batch.
NOT_COUNTED = -1
_TOP = (1, 5)


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Percentage of images whose class is the first, or among the first five, of a prediction."""

    top1: float
    top5: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results of ``evaluate``, over all processes.

    Attributes:
        images: Number of images that were counted.
        unreadable: Number of images that could not be read, which count nowhere.
        problems: What the loader said of those of this process.
        loss: Mean cross-entropy of the mean of both heads, in nats.
        mean: Accuracy of the mean of both heads, the model's prediction.
        small: Accuracy of the head of the S branch alone; None for a model without branches.
        large: Accuracy of the head of the L branch alone; None likewise.
    """

    images: int
    unreadable: int
    problems: list[str]
    loss: float
    mean: Accuracy
    small: Accuracy | None
    large: Accuracy | None


@torch.no_grad()  # tensors of inference mode that fully_shard keeps could not be trained
def evaluate(
    model: nn.Module,
    loader: Iterable[Sequence[Any]],
    *,
    dtype: torch.dtype | None = None,
    distributed: bool = True,
) -> Evaluation:
    """Compute the accuracy of a model, and of each branch by itself, on labelled images.

    The heads' logits are averaged in float32, whatever the dtype. Equal logits are ranked by class
    number. The model runs without torch.compile; afterwards its modules are back in the mode they
    were in. If it is sharded by ``fully_shard``, all processes need equally many batches.

    Args:
        model: A CrossViT, which may be wrapped by torch.compile, DistributedDataParallel or
            ``fully_shard``; or another module that makes logits [B, num_classes] of images.
        loader: Batches of images [B, C, H, W] and targets, int64 [B], of which -1 does not count;
            a third item, if any, lists what was unreadable, further ones are not used.
        dtype: Autocast to it (bfloat16 or float16); None for no autocast.
        distributed: If a process group is initialised, sum over its processes, each of which calls
            this with its own share of the images.

    Raises:
        ValueError: There are no labelled images, a target is no class of the model, the model has
            no heads, or logits are not finite.
        TypeError: The model is sharded by FullyShardedDataParallel, which hides its branches.
    """
    forward, num_heads = _forward(model)
    device = next(model.parameters()).device
    totals = _Totals(num_heads, device)
    with _evaluation_mode(model):
        for images, targets, *others in loader:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = forward(images.to(device, non_blocking=True))
            _check_targets(targets, logits[0])
            totals.add(logits, targets.to(device, non_blocking=True))
            totals.problems += others[0] if others else []
    totals.unreadable = len(totals.problems)
    if distributed and dist.is_available() and dist.is_initialized():
        totals.all_reduce()
    return totals.result()


class _Totals:
    """Sums over images; counts are exact, as they are far below 2^53."""

    def __init__(self, num_heads: int, device: torch.device) -> None:
        # [images, images with logits that are not finite, loss]
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.hits = torch.zeros(num_heads, len(_TOP), dtype=torch.float64, device=device)
        self.problems: list[str] = []
        self.unreadable = 0

    def add(self, logits: Sequence[Tensor], targets: Tensor) -> None:
        """Add a batch: the logits of each head, [B, num_classes], and int64 targets [B]."""
        counted = targets != NOT_COUNTED
        targets = targets.clamp(min=0)
        finite = torch.stack([t.isfinite().all(dim=1) for t in logits]).all(dim=0)
        losses = F.cross_entropy(logits[0], targets, reduction="none")
        loss = losses.where(counted, 0).sum(dtype=torch.float64)
        self.sums += torch.stack([counted.sum(), (counted & ~finite).sum(), loss])
        ranks = torch.stack([_ranks(t, targets) for t in logits])
        for i, k in enumerate(_TOP):
            self.hits[:, i] += ((ranks < k) & counted).sum(dim=1)

    def all_reduce(self) -> None:
        """Sum over all processes."""
        unreadable = self.sums.new_tensor([self.unreadable])
        flat = torch.cat([self.sums, self.hits.flatten(), unreadable])
        dist.all_reduce(flat)
        self.sums, self.unreadable = flat[:3], int(flat[-1])
        self.hits = flat[3:-1].view_as(self.hits)

    def result(self) -> Evaluation:
        images, not_finite, loss = self.sums.tolist()
        if images == 0:
            unreadable = f"; {self.unreadable} could not be read" if self.unreadable else ""
            raise ValueError(f"loader: has no labelled images{unreadable}")
        if not_finite:
            raise ValueError(
                f"the model's logits are not finite for {not_finite:.0f} of {images:.0f} images"
            )
        mean, *branches = [Accuracy(*(100 * n / images for n in row)) for row in self.hits.tolist()]
        small, large = branches or (None, None)
        loss /= images
        return Evaluation(int(images), self.unreadable, self.problems, loss, mean, small, large)


def _ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """The number of classes that come before the target; int64 [B]."""
    own = logits.gather(1, targets[:, None])
    classes = torch.arange(logits.shape[1], dtype=torch.int64, device=logits.device)
    before = (logits == own) & (classes < targets[:, None])
    return ((logits > own) | before).sum(dim=1)


def _forward(model: nn.Module) -> tuple[Callable[[Tensor], list[Tensor]], int]:
    """A function that makes float32 logits of images, one of each head, and their number."""
    core = unwrap_any(model)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise TypeError("model: expected one sharded by fully_shard, found one by FSDP1")
    if getattr(core, "num_classes", None) == 0:
        raise ValueError("model: has no heads: num_classes is 0")
    if not hasattr(core, "forward_branches"):
        return lambda images: [core(images).float()], 1
    if dist.is_available() and "forward_branches" not in vars(core):
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(core, "forward_branches")

    def heads(images: Tensor) -> list[Tensor]:
        small, large = (logits.float() for logits in core.forward_branches(images))
        return [(small + large) / 2, small, large]

    return heads, 3


def _check_targets(targets: Tensor, logits: Tensor) -> None:
    wrong = targets[(targets < NOT_COUNTED) | (targets >= logits.shape[1])]
    if len(wrong):
        raise ValueError(
            f"target: expected a class of the model, from 0 to {logits.shape[1] - 1}, or "
            f"{NOT_COUNTED} for none, found {int(wrong[0])}"
        )


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, then each module back in its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

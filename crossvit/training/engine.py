"""Optimizer steps: forward and backward passes of a global batch, and the update."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossvit.backbone import Backbone
from crossvit.training.build import Augmentation, Schedule
from crossvit.training.data import Batch, Loader
from crossvit.training.distributed import Processes, accumulating, whole
from crossvit.training.randomness import seed_all
from crossvit.training.recipes import Recipe


class Diverged(RuntimeError):
    """Too many steps in a row had no finite loss or gradient."""


class StepResult(NamedTuple):
    """One step, over all processes.

    Attributes:
        loss: Mean over the global batch.
        grad_norm: Of all gradients, before clipping.
        finite: Whether both are finite; if not, the step changed nothing.
        unreadable: Images that others replaced.
        stop: Whether a process was told to stop.
        waited: Seconds that this process waited for its batches.
    """

    loss: float
    grad_norm: float
    finite: bool
    unreadable: int
    stop: bool
    waited: float


@dataclasses.dataclass
class Engine:
    """Trains a model step by step; has no state but the model's, the optimizer's and the average's.

    Attributes:
        model: The model, for its parameters.
        parallel: The model as it is called: itself, or in DDP.
        optimizer: From ``make_optimizer``.
        schedule: Learning rate of each step.
        ema: timm's average of the weights, or None.
        augmentation: Of batches.
        recipe: Gives smoothing and clipping.
        processes: This process among all.
        autocast: Dtype of forward passes; None for that of the parameters.
        accumulation: Forward and backward passes per step.
        seed: Of the run.
        channels_last: Memory format of images.
    """

    model: Backbone
    parallel: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    ema: Any
    augmentation: Augmentation
    recipe: Recipe
    processes: Processes
    autocast: torch.dtype | None
    accumulation: int
    seed: int
    channels_last: bool = False
    problems: list[str] = dataclasses.field(default_factory=list)

    def step(
        self, batches: Iterator[Batch], epoch: int, step: int, stop: Callable[[], bool]
    ) -> StepResult:
        """Train on the next global batch.

        Args:
            batches: This process's; ``accumulation`` are taken.
            epoch: Number of the epoch.
            step: Number of the step in the run. Everything random follows from it.
            stop: Says whether this process was told to stop; asked at the end of the step.
        """
        self.schedule.set(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        waited, unreadable, device = 0.0, 0, self.processes.device
        for turn in range(self.accumulation):
            start = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - start
            unreadable += len(batch.problems)
            self.problems += batch.problems
            key = (epoch, step, turn, self.processes.rank)
            x, targets = self._prepare(batch, key)
            with accumulating(self.parallel, last=turn == self.accumulation - 1):
                seed_all(self.seed, *key, 2)  # drop path and dropout
                with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
                    logits = self.parallel(x)
                loss = self._loss(logits.float(), targets)
                (loss / self.accumulation).backward()
            loss_sum += loss.detach()
        norm = self._gradient_norm()
        world_size = self.processes.world_size
        sums = self.processes.sums(
            loss_sum.item() / self.accumulation / world_size, unreadable, float(stop())
        )
        finite = bool(torch.isfinite(norm)) and abs(sums[0]) < float("inf")
        if finite:
            self._update(norm, step)
        return StepResult(sums[0], norm.item(), finite, int(sums[1]), sums[2] > 0, waited)

    def _prepare(self, batch: Batch, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        device = self.processes.device
        images = batch.images.to(device, non_blocking=True)
        targets = batch.targets.to(device, non_blocking=True)
        x, targets = self.augmentation(images, targets, batch.positions.tolist(), key)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, targets

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        # Mixed targets are distributions, which are smoothed already.
        smoothing = self.recipe.smoothing if targets.dim() == 1 else 0.0
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def _gradient_norm(self) -> Tensor:
        """The norm of all gradients, which is the same in all processes.

        Raises:
            ValueError: A parameter has no gradient; processes would wait for each other's.
        """
        gradients = []
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                if p.grad is None:
                    raise ValueError(f"{name} takes no part in the loss; exclude it with --freeze")
                gradients.append(p.grad)
        return whole(nn.utils.get_total_norm(gradients)).float()

    def _update(self, norm: Tensor, step: int) -> None:
        if self.recipe.clip_grad:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            nn.utils.clip_grads_with_norm_(trained, self.recipe.clip_grad, norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model, step=step + 1 if self.recipe.ema_warmup else None)


def endless(loader: Loader, epoch: int, first: int) -> Iterator[Batch]:
    """The batches of an epoch from one on; a stream that ends early starts again."""
    loader.start(epoch, first)
    empty = False
    while not empty:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        loader.start(epoch)
    raise ValueError("data: the training images end before the epoch does, and give no batch")

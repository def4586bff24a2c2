"""Accuracy and loss on the validation images while a model trains."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from crossvit.training.data import NOT_COUNTED, Loader
from crossvit.training.distributed import Processes


class Metrics(NamedTuple):
    """Over all processes' images, each counted once.

    Attributes:
        loss: Mean cross-entropy.
        top1: Share of images whose most likely class is right, from 0 to 1.
        top5: Share of images with the right class among the five most likely.
        images: Number of images.
        unreadable: Number of images that could not be read.
    """

    loss: float
    top1: float
    top5: float
    images: int
    unreadable: int


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader, processes: Processes, autocast: torch.autocast
) -> tuple[Metrics, list[str]]:
    """Evaluate a model on this process's batches, and add up over the processes.

    Returns:
        The metrics, and what this process could not read.
    """
    was_training = model.training
    model.eval()
    device = processes.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    problems: list[str] = []
    for batch in loader:
        problems += batch.problems
        targets = batch.targets.to(device, non_blocking=True)
        with autocast:
            logits = model(batch.images.to(device, non_blocking=True))
        logits = logits.float()
        counted = targets != NOT_COUNTED
        right = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        losses = F.cross_entropy(logits, targets, ignore_index=NOT_COUNTED, reduction="none")
        # Padding may be NaN in a model that diverged; 0 times NaN would be NaN.
        losses = losses.masked_fill(~counted, 0.0)
        terms = [losses, right[:, 0] & counted, right.any(dim=1) & counted, counted]
        sums += torch.stack([term.sum(dtype=torch.float64) for term in terms])
    model.train(was_training)
    loss, top1, top5, images, unreadable = processes.sums(*sums.tolist(), len(problems))
    if not images:
        raise ValueError("data: none of the validation images can be read")
    metrics = Metrics(loss / images, top1 / images, top5 / images, int(images), int(unreadable))
    return metrics, problems

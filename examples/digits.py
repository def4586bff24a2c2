"""Train a small CrossViT on scikit-learn's handwritten digits, fused and eager, and compare.

    pip install -e ".[examples]" && python examples/digits.py

Both runs have the same initial parameters, images and dropped paths, so their losses differ only by
rounding. Training amplifies rounding errors; a third run measures how much: eager mode from
parameters that are one rounding away. Prints the held-out accuracies and the distance of the loss
curves, and draws them.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from crossvit import Config, CrossViT

#: 8 x 8 pixels: 16 patches of 2 x 2 for the S branch and 4 of 4 x 4 for the L branch.
SMALL = Config(
    dims=(48, 96),
    num_heads=(3, 3),
    depths=(1, 2),
    mlp_ratios=(2.0, 2.0),
    num_blocks=2,
    patch_sizes=(2, 4),
    img_size=((8, 8), (8, 8)),
)


NUDGED = "eager, a rounding away"


class Data(NamedTuple):
    """Images [B, 1, 8, 8] with mean 0 and spread 1, and their digits [B]."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


class Curves(NamedTuple):
    """Losses and accuracies of one training."""

    losses: list[float]  # per step
    accuracies: list[float]  # held out, after each epoch
    seconds: float


def load(seed: int, dtype: torch.dtype) -> Data:
    """Load the digits, holding out a fifth of each class."""
    images, digits = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=dtype).view(-1, 1, 8, 8)
    train, test = train_test_split(range(len(x)), test_size=0.2, stratify=digits, random_state=seed)
    mean, spread = x[train].mean(), x[train].std()
    x, y = (x - mean) / spread, torch.tensor(digits)
    return Data(x[train], y[train], x[test], y[test])


def jiggled(x: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale and shift each image a little."""
    angle, stretch, right, down = torch.randn(4, len(x), generator=generator, dtype=x.dtype)
    cos, sin = (angle * 0.12).cos(), (angle * 0.12).sin()
    zoom = (stretch * 0.06).exp()
    rows = [zoom * cos, -zoom * sin, right * 0.08, zoom * sin, zoom * cos, down * 0.08]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(x.shape), False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def optimizer_for(model: CrossViT, lr: float) -> torch.optim.AdamW:
    """AdamW without weight decay for biases, norms, position embeddings and CLS tokens."""
    spared = model.no_weight_decay()
    decayed, others = [], []
    for name, p in model.named_parameters():
        (others if p.dim() <= 1 or name in spared else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Learning rate factor: linear warm-up, then cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@torch.no_grad()
def accuracy(model: CrossViT, x: Tensor, y: Tensor) -> float:
    model.eval()
    return (model(x).argmax(dim=1) == y).double().mean().item()


def train(model: CrossViT, data: Data, options: argparse.Namespace, name: str) -> Curves:
    """Train with AdamW; the seed determines everything random."""
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)  # drop path
    device = next(model.parameters()).device
    test_x, test_y = data.test_x.to(device), data.test_y.to(device)
    batches = len(data.train_x) // options.batch
    steps = options.epochs * batches
    optimizer = optimizer_for(model, options.lr)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule(step, steps, warmup=min(steps // 10 + 1, 100))
    )
    losses, accuracies = [], []
    text = "{task.description} loss {task.fields[loss]:.4f}, held out {task.fields[accuracy]:.1%}"
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    start = time.perf_counter()
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=steps, loss=math.nan, accuracy=0.0)
        for _ in range(options.epochs):
            model.train()
            order = torch.randperm(len(data.train_x), generator=generator)
            for batch in order[: batches * options.batch].view(batches, -1):
                x, y = jiggled(data.train_x[batch], generator), data.train_y[batch]
                loss = F.cross_entropy(model(x.to(device)), y.to(device), label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rates.step()
                losses.append(loss.item())
                progress.update(task, advance=1, loss=losses[-1])
            accuracies.append(accuracy(model, test_x, test_y))
            progress.update(task, accuracy=accuracies[-1])
    return Curves(losses, accuracies, time.perf_counter() - start)


def apart(a: Curves, b: Curves) -> list[float]:
    """Relative difference of two runs' losses at each step."""
    return [abs(x - y) / y for x, y in zip(a.losses, b.losses, strict=True)]


def epoch_means(losses: Sequence[float], epochs: int) -> list[float]:
    steps = len(losses) // epochs
    return [sum(losses[i : i + steps]) / steps for i in range(0, len(losses), steps)]


def draw(path: Path, runs: dict[str, Curves], title: str) -> None:
    """Draw loss and accuracy of fused and eager, and the distance of their losses."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.suptitle(title)
    loss, difference, held_out = figure.subplots(1, 3)
    for name, style in (("fused", "-"), ("eager", "--")):
        if name in runs:
            epochs = range(1, len(runs[name].accuracies) + 1)
            loss.plot(epochs, epoch_means(runs[name].losses, len(epochs)), style, label=name)
            held_out.plot(epochs, runs[name].accuracies, style, label=name)
    loss.set(title="training loss, mean of an epoch", xlabel="epoch")
    held_out.set(title="held-out accuracy", xlabel="epoch", ylim=(0.8, 1.0))
    difference.set(title="relative difference of the loss", xlabel="step", yscale="log")
    for name, colour in ((NUDGED, "tab:gray"), ("fused", "tab:blue")):
        if name in runs and "eager" in runs:
            values = apart(runs[name], runs["eager"])
            difference.plot(values, color=colour, linewidth=0.7, label=f"{name} to eager")
    for axes in (loss, difference, held_out):
        if axes.lines:
            axes.legend()
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def report_difference(runs: dict[str, Curves]) -> None:
    print("losses apart from eager's, at most:")
    for name in ("fused", NUDGED):
        values = apart(runs[name], runs["eager"])
        early = max(values[: max(len(values) // 10, 1)])
        pairs = zip(runs[name].losses, runs["eager"].losses, strict=True)
        absolute = max(abs(x - y) for x, y in pairs)
        print(
            f"  {name}: {absolute:.1e}; relative {max(values):.1e}, "
            f"{early:.1e} in the first tenth of the steps"
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mode", choices=("both", "fused", "eager"), default="both")
    add("--epochs", type=int, default=40)
    add("--batch", type=int, default=64)
    add("--lr", type=float, default=5e-4)
    add("--drop-path", type=float, default=0.05)
    add("--seed", type=int, default=0)
    add("--dtype", choices=("float32", "float64"), default="float32")
    add("--device", type=torch.device, default="cpu")
    add("--threads", type=int, default=1, help="more do not help such a small model")
    add("--min-accuracy", type=float, default=0.97, help="held out; the exit code is 1 below it")
    add("--output", type=Path, default=Path("digits.png"), metavar="PATH.png")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or not 1 <= options.batch <= 1437:
        parser.error("--epochs and --batch: expected at least 1, and a batch of at most 1437")
    if options.threads < 1:
        parser.error("--threads: expected at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    data = load(options.seed, dtype)
    torch.manual_seed(options.seed)
    start = CrossViT(SMALL, in_chans=1, num_classes=10, drop_path_rate=options.drop_path)
    start.to(options.device, dtype)
    parameters = sum(p.numel() for p in start.parameters())
    print(
        f"{parameters} parameters, {len(data.train_x)} digits to learn, {len(data.test_x)} held out"
    )
    modes = ("fused", "eager", NUDGED) if options.mode == "both" else (options.mode,)
    runs = {}
    for mode in modes:
        model = copy.deepcopy(start).set_fused(mode == "fused")
        if mode == NUDGED:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + torch.finfo(dtype).eps)
        runs[mode] = train(model, data, options, mode)
    for mode, run in runs.items():
        print(f"{mode}: {run.accuracies[-1]:.2%} held out, {run.seconds:.0f} s")
    if options.mode == "both":
        report_difference(runs)
    draw(options.output, runs, f"CrossViT with {parameters} parameters on digits, {options.dtype}")
    print(f"curves in {options.output}")
    return 0 if all(r.accuracies[-1] >= options.min_accuracy for r in runs.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Train a small CrossViT on scikit-learn's handwritten digits, fused and eager, and compare.

    pip install -e ".[train,examples]" && python examples/digits.py

Writes the digits as images into a folder and trains on it with a recipe of its own, as
``python -m crossvit.train`` does. Both runs have the same initial parameters, images and dropped
paths, so their losses differ only by rounding. Training amplifies rounding errors; a third run
measures how much: eager mode from parameters that are one rounding away. Prints the held-out
accuracies and the distance of the loss curves, and draws them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from crossvit import save_checkpoint
from crossvit.train import main as train
from crossvit.training import build
from crossvit.training.plots import draw
from crossvit.training.recipes import IMAGENET, Recipe
from crossvit.training.records import read_table

#: 8 x 8 pixels: 16 patches of 2 x 2 for the S branch and 4 of 4 x 4 for the L branch.
SMALL = {
    "dims": (48, 96),
    "num_heads": (3, 3),
    "depths": (1, 2),
    "mlp_ratios": (2.0, 2.0),
    "num_blocks": 2,
    "patch_sizes": (2, 4),
    "img_size": ((8, 8), (8, 8)),
}

#: Digits have no colours and no mirror images, and are too small to erase or to mix.
DIGITS = dataclasses.replace(
    IMAGENET,
    name="digits",
    global_batch=64,
    lr=1.5e-3,
    lr_batch=0,
    epochs=16,
    warmup_epochs=2,
    schedule_per="step",
    min_lr=0.0,
    drop_path=0.05,
    mixup=0.0,
    cutmix=0.0,
    reprob=0.0,
    auto_augment="",
    color_jitter=0.0,
    hflip=0.0,
    scale=(0.7, 1.0),
    ratio=(0.85, 1.18),
    interpolation="bilinear",
    crop_pct=1.0,
    mean=(0.305,),
    std=(0.376,),
)

NUDGED = "eager, a rounding away"


def write_images(folder: Path) -> None:
    """Write the digits as images, a fifth of each class to validate."""
    pixels, digits = load_digits(return_X_y=True)
    indices = range(len(pixels))
    train_indices, _ = train_test_split(indices, test_size=0.2, stratify=digits, random_state=0)
    training = set(train_indices)
    for i, (values, digit) in enumerate(zip(pixels, digits, strict=True)):
        path = folder / ("train" if i in training else "val") / str(digit) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((values.reshape(8, 8) * (255 / 16)).round().astype("uint8"))
        image.save(path)


def nudged_start(recipe: Recipe, seed: int, path: Path) -> None:
    """Write the parameters that a run starts from, each one rounding away."""
    model = build.make_model(
        "crossvit_tiny", recipe, num_classes=10, in_chans=1, seed=seed, changes=SMALL
    )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + torch.finfo(p.dtype).eps)
    save_checkpoint(model, path)


def run(mode: str, recipe: Path, options: argparse.Namespace) -> Path:
    """Train, or continue, one of the runs; return its folder.

    Raises:
        SystemExit: Training failed; it has printed why.
    """
    folder: Path = options.output / mode
    words = ["--data", str(options.output / "images"), "--in-chans", "1", "--recipe", str(recipe)]
    words += ["--model", "crossvit_tiny", "--model-args", *(f"{k}={v}" for k, v in SMALL.items())]
    words += ["--output", str(folder), "--seed", str(options.seed), "--log-every", "1"]
    words += ["--device", options.device, "--workers", str(options.workers)]
    words += ["--amp", "off"]
    if mode != "fused":
        words.append("--eager")
    if mode == NUDGED:
        words += ["--checkpoint", str(options.output / "nudged.safetensors")]
    if code := train(words):
        raise SystemExit(code)
    return folder


def report(runs: dict[str, Path]) -> float:
    """Print accuracies and differences of the losses; return the lowest accuracy, in percent."""
    accuracies = {}
    for mode, folder in runs.items():
        accuracies[mode] = float(read_table(folder / "epochs.csv")[-1]["val_top1"])
        print(f"{mode}: {accuracies[mode]:.2f} % held out")
    losses = {
        mode: [float(row["loss"]) for row in read_table(folder / "steps.csv")]
        for mode, folder in runs.items()
    }
    for mode in ("fused", NUDGED):
        apart = [abs(x - y) / y for x, y in zip(losses[mode], losses["eager"], strict=True)]
        early = max(apart[: max(len(apart) // 10, 1)])
        print(
            f"loss of {mode} apart from eager's, relative, at most: {max(apart):.1e}; "
            f"{early:.1e} in the first tenth of the steps"
        )
    return min(accuracies.values())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/digits"), metavar="DIR")
    add("--epochs", type=int, default=DIGITS.epochs)
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--workers", type=int, default=1)
    add("--threads", type=int, default=1, help="more do not help such a small model")
    add("--min-accuracy", type=float, default=97.0, help="percent; the exit code is 1 below it")
    add("--picture", type=Path, metavar="PATH.png", help="default: OUTPUT/digits.png")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.threads < 1 or options.workers < 0:
        parser.error("--epochs, --threads, --workers: expected at least 1, 1, 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    write_images(options.output / "images")
    warmup = min(DIGITS.warmup_epochs, options.epochs - 1)
    recipe = dataclasses.replace(DIGITS, epochs=options.epochs, warmup_epochs=warmup)
    path = options.output / "recipe.json"
    path.write_text(json.dumps(dataclasses.asdict(recipe), indent=2))
    nudged_start(recipe, options.seed, options.output / "nudged.safetensors")
    runs = {mode: run(mode, path, options) for mode in ("eager", "fused", NUDGED)}
    lowest = report(runs)
    picture = options.picture or options.output / "digits.png"
    draw(list(runs.values()), picture, "A small CrossViT on digits, float32")
    print(f"curves in {picture}")
    return 0 if lowest >= options.min_accuracy else 1


if __name__ == "__main__":
    sys.exit(main())

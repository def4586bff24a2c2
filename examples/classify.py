"""Print the classes that a CrossViT sees in images.

    python examples/classify.py cat.jpg --checkpoint timm/crossvit_15_240.in1k

The checkpoint is a local file, a URL or a Hugging Face hub id, in the official, timm's or our
layout; "official" downloads the weights that the paper's authors published.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps

from crossvit import CrossViT, create_model, list_models, load_checkpoint, official_url
from crossvit.transforms import eval_transform


def class_names(labels: Path | None, num_classes: int) -> list[str]:
    """Names from a file with one per line; else ImageNet's, or numbers if not 1000 classes."""
    if labels:
        names = labels.read_text().splitlines()
        if len(names) != num_classes:
            raise ValueError(f"{labels}: has {len(names)} lines for {num_classes} classes")
        return names
    if num_classes != 1000:
        return [f"class {i}" for i in range(num_classes)]
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def load_model(options: argparse.Namespace) -> CrossViT:
    model = create_model(
        options.model, use_fused=not options.eager, num_classes=options.num_classes
    )
    source = official_url(options.model) if options.checkpoint == "official" else options.checkpoint
    return load_checkpoint(model, source).to(options.device).eval()


def open_image(path: Path) -> Image.Image:
    """Open as RGB, rotated as its EXIF data says."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: {reason}") from error


def classify(options: argparse.Namespace) -> None:
    model = load_model(options)
    transform = eval_transform(
        model.patch_embed[0].img_size[0]
    )  # its error says how to install torchvision
    names = class_names(options.labels, options.num_classes)
    for path in options.images:
        x = transform(open_image(path)).unsqueeze(0).to(options.device)
        with torch.inference_mode():
            probabilities = model(x).softmax(dim=1)[0]
        top = probabilities.topk(min(options.top, len(names)))
        print(path)
        for probability, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            print(f"  {probability:6.1%}  {names[index]}")


def usable_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # unknown; missing, or not in this build of torch
        raise argparse.ArgumentTypeError(one_line(error)) from error


def one_line(error: Exception) -> str:
    """Shorten a message, such as the list of a misfit checkpoint's keys, to its first entry."""
    lines = [line.strip() for line in str(error).splitlines()]
    more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
    return " ".join(lines[:2]) + more


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE")
    add("--checkpoint", required=True, help="file, URL, hub id, or official")
    add("--model", default="crossvit_15_240", choices=list_models(), metavar="NAME")
    add("--num-classes", type=int, default=1000, help="of the checkpoint")
    add("--labels", type=Path, metavar="FILE", help="class names, one per line")
    add("--top", type=int, default=5)
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--eager", action="store_true", help="without the kernels")
    options = parser.parse_args(arguments)
    if options.top < 1 or options.num_classes < 1:
        parser.error("--top and --num-classes: expected at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        classify(options)
    except (OSError, ValueError, ImportError) as error:
        print(f"classify.py: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

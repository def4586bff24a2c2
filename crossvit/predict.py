"""Print the classes that a CrossViT sees in images.

    python -m crossvit.predict cat.jpg dog.jpg
    python -m crossvit.predict cat.jpg --model crossvit_18_dagger_408 --crop-pct 1.0 --top 3
    python -m crossvit.predict photos/*.jpg --checkpoint best.safetensors --json predictions.json

The model is crossvit_15_240 with timm's copy of the ImageNet weights, unless --model or
--checkpoint name another. Images that cannot be read are named, the others are still predicted,
and the exit status is 1. Needs torchvision; ImageNet's class names are timm's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossvit import command_line, imagenet
from crossvit.command_line import autocast_dtype, make_transform, one_line, open_model, positive
from crossvit.training.distributed import start_processes

_PROGRAM = "crossvit.predict"
_DEFAULT_MODEL = "crossvit_15_240"


class Prediction(NamedTuple):
    """One of the likeliest classes of an image."""

    class_index: int
    class_name: str
    probability: float


def open_image(path: Path, mode: str = "RGB") -> Any:
    """Open an image in a mode of PIL's, rotated as its EXIF data says.

    Raises:
        ValueError: It cannot be read; the message names the file.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert(mode)
    except Exception as error:  # decoders raise anything
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise ValueError(f"{path}: {reason}") from error


def predict(
    model: torch.nn.Module,
    images: Tensor,
    names: Sequence[str],
    top: int = 5,
    dtype: torch.dtype | None = None,
) -> list[list[Prediction]]:
    """Return the likeliest classes of each image, the likeliest first.

    Args:
        model: Makes logits [B, num_classes] of images.
        images: [B, C, H, W], on any device.
        names: Of the model's classes.
        top: How many; all classes if there are fewer.
        dtype: Autocast to it (bfloat16 or float16); None for no autocast.

    Raises:
        ValueError: The logits are not finite, or there is not a name for each class.
    """
    device = next(model.parameters()).device
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        logits = model(images.to(device)).float()
    if logits.shape[1] != len(names):
        raise ValueError(
            f"names: expected {logits.shape[1]}, one for each class, found {len(names)}"
        )
    if not logits.isfinite().all():
        raise ValueError("the model's logits are not finite")
    best = logits.softmax(dim=1).topk(min(top, len(names)))
    return [
        [Prediction(i, names[i], p) for p, i in zip(*row, strict=True)]
        for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def names_of_classes(options: argparse.Namespace, source: str, num_classes: int) -> list[str]:
    """Names from --labels or the checkpoint; else ImageNet's, or numbers if not 1000 classes."""
    names = command_line.class_names(options, source, num_classes)
    if names is not None:
        return names
    if num_classes == imagenet.NUM_CLASSES:
        try:
            return imagenet.class_names()
        except ImportError as error:
            print(f"{_PROGRAM}: classes are numbers: {error}", file=sys.stderr)
    return [f"class {i}" for i in range(num_classes)]


def _batches(
    options: argparse.Namespace, transform: Any, mode: str, unreadable: list[str]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Paths and images of each batch; unreadable ones are reported and left out."""
    paths: list[Path] = []
    images: list[Tensor] = []
    for path in options.images:
        try:
            images.append(transform(open_image(path, mode)))
            paths.append(path)
        except ValueError as error:
            print(f"{_PROGRAM}: {one_line(error)}", file=sys.stderr)
            unreadable.append(str(path))
        if len(images) == options.batch_size:
            yield paths, torch.stack(images)
            paths, images = [], []
    if images:
        yield paths, torch.stack(images)


def _command(options: argparse.Namespace) -> int:
    model, source = open_model(options, start_processes(options.device, fsdp=False).device)
    if model.in_chans not in (1, 3):
        raise ValueError(f"{source}: expected a model of 1 or 3 channels, found {model.in_chans}")
    transform = make_transform(options, model, source)
    names = names_of_classes(options, source, model.num_classes)
    results: list[dict[str, Any]] = []
    unreadable: list[str] = []
    quiet = str(options.json) == "-"
    mode = "L" if model.in_chans == 1 else "RGB"
    for paths, images in _batches(options, transform, mode, unreadable):
        rows = predict(model, images, names, options.top, autocast_dtype(options))
        for path, row in zip(paths, rows, strict=True):
            results.append({"image": str(path), "predictions": [p._asdict() for p in row]})
            if not quiet:
                print(path)
                for prediction in row:
                    print(f"  {prediction.probability:6.1%}  {prediction.class_name}")
    if options.json:
        content = {"model": options.model, "checkpoint": source, "results": results}
        command_line.write_json(options.json, {**content, "unreadable": unreadable})
    return 1 if unreadable else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {_PROGRAM}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--top", type=positive, default=5, metavar="K", help="classes of each image"
    )
    parser.add_argument(
        "--json",
        type=command_line.output_file,
        metavar="FILE",
        help="write the predictions to a file; - is standard output, in place of the text",
    )
    command_line.add_image_options(parser, batch_size=16)
    command_line.add_model_options(parser, checkpoint="timm")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(arguments)
    if options.model is None and options.checkpoint in command_line.RELEASED:
        options.model = _DEFAULT_MODEL
    return command_line.run(_PROGRAM, lambda: _command(options))


if __name__ == "__main__":
    sys.exit(main())

"""What ``python -m crossvit.evaluate`` and ``python -m crossvit.predict`` share."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from crossvit.checkpoints import load_model, read_class_names, read_normalization
from crossvit.configs import canonical_name
from crossvit.pretrained import released_weights
from crossvit.training.data import reader_died
from crossvit.transforms import CROP_PCT, IMAGENET_MEAN, IMAGENET_STD, eval_transform

_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
RELEASED = ("timm", "official")


def add_model_options(parser: argparse.ArgumentParser, checkpoint: str | None = None) -> None:
    """Add options that choose a model and how it runs; --checkpoint may have a default."""
    default = f"; default: {checkpoint}" if checkpoint else ""
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        metavar="NAME",
        help="e.g. crossvit_15_240; not needed for files written by crossvit.save_checkpoint or "
        "crossvit.train",
    )
    add(
        "--checkpoint",
        default=checkpoint,
        required=checkpoint is None,
        metavar="SOURCE",
        help="weights trained on ImageNet: timm (on the hub) or official (the authors'); or a "
        f"file, URL or hub id{default}",
    )
    add(
        "--no-ema",
        dest="use_ema",
        action="store_false",
        help="take the trained weights of a training checkpoint, not their average",
    )
    add(
        "--labels",
        type=Path,
        metavar="FILE",
        help="names of the model's classes, one per line; default: what the checkpoint records",
    )
    add(
        "--img-size",
        type=positive,
        metavar="PIXELS",
        help="side of the S branch's image, if not the model's; position embeddings are resized",
    )
    add("--eager", action="store_true", help="run layer by layer, without the fused kernels")
    add("--dtype", choices=_DTYPES, default="float32", help="16 bits: autocast")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1; default: a GPU if there is one")


def add_image_options(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Add options that choose the transform and the batch of images."""
    add = parser.add_argument_group("images").add_argument
    add(
        "--transform",
        choices=("released", "paper"),
        default="released",
        help="released code: resize to 274, crop 240, the S branch's size (default); paper's text: "
        "resize to 256, crop 224, the L branch's size",
    )
    add(
        "--crop-pct",
        type=float,
        default=CROP_PCT,
        metavar="SHARE",
        help="side of the crop over the resized image's; default: 224/256; timm: 1.0 at 408 pixels",
    )
    recorded = "of each channel; default: what the checkpoint records, else ImageNet's"
    add("--mean", type=float, nargs="+", metavar="M", help=recorded)
    add("--std", type=float, nargs="+", metavar="S", help=recorded)
    add(
        "--batch-size",
        type=positive,
        default=batch_size,
        metavar="B",
        help=f"images per process at a time; default: {batch_size}",
    )


def positive(text: str) -> int:
    """Parse an integer of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, found {text!r}")
    return int(text)


def output_file(text: str) -> Path:
    """Parse the path of a file to write, in a folder that exists, for argparse."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        problem = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise argparse.ArgumentTypeError(f"{path} {problem}")
    return path


def autocast_dtype(options: argparse.Namespace) -> torch.dtype | None:
    """Return the dtype to autocast to; None for float32."""
    return _DTYPES[options.dtype]


def open_model(options: argparse.Namespace, device: torch.device) -> tuple[Any, str]:
    """Return the model in evaluation mode, and the file, URL or hub id of its weights.

    Raises:
        ValueError: The options do not fit each other, or the model has no heads. ``load_model``
            lists the other errors.
    """
    source, name = options.checkpoint, options.model
    if source in RELEASED:
        if name is None:
            raise ValueError(f"--checkpoint {source}: needs --model, such as crossvit_15_240")
        source = released_weights(name, source)
    elif name is None and not os.path.exists(source):
        with contextlib.suppress(ValueError):
            name = canonical_name(source)  # a hub id of timm's
    changes = {} if options.img_size is None else {"img_size": options.img_size}
    fused = not options.eager
    try:
        model = load_model(source, name=name, use_ema=options.use_ema, use_fused=fused, **changes)
    except ValueError as error:
        raise ValueError(re.sub(r'name="(\w+)"', r"--model \1", str(error))) from error
    if model.num_classes == 0:
        raise ValueError(f"{source}: has no heads, so the model has no classes")
    return model.to(device).eval(), source


def class_names(options: argparse.Namespace, source: str, num_classes: int) -> list[str] | None:
    """Return the names of a model's classes, from --labels or its checkpoint; None without either.

    Raises:
        ValueError: Their number is not the model's, or they are not text.
    """
    if options.labels is None:
        return read_class_names(source)
    try:
        names = options.labels.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--labels {options.labels}: is no text in UTF-8: {error}") from error
    if len(names) != num_classes:
        raise ValueError(
            f"--labels {options.labels}: expected {num_classes} lines, one for each class of the "
            f"model, found {len(names)}"
        )
    return names


def make_transform(options: argparse.Namespace, model: Any, source: str | None = None) -> Any:
    """Return the transform of PIL images that the options choose for a model.

    Mean and standard deviation are, if not given, those that its checkpoint records, else
    ImageNet's.

    Raises:
        ValueError: There is not one mean and standard deviation for each channel, or the crop is
            larger than the image.
        ImportError: torchvision is not installed.
    """
    branches = model.patch_embed
    if not isinstance(branches, torch.nn.ModuleList):
        branches = [branches]  # of a plain ViT
    recorded = None if source is None else read_normalization(source)
    mean, std = recorded or (IMAGENET_MEAN, IMAGENET_STD)
    height, width = branches[-1 if options.transform == "paper" else 0].img_size
    return eval_transform(
        height if height == width else (height, width),  # a pair would not keep the aspect
        options.crop_pct,
        _per_channel("--mean", options.mean, mean, model.in_chans),
        _per_channel("--std", options.std, std, model.in_chans),
    )


def _per_channel(
    name: str, found: list[float] | None, default: Sequence[float], channels: int
) -> Sequence[float]:
    if found is None:  # grey: the average of the colours
        grey = channels == 1 and len(default) > 1
        return [sum(default) / len(default)] if grey else default
    if len(found) != channels:
        raise ValueError(f"{name}: expected {channels}, one for each channel, found {len(found)}")
    return found


def write_json(path: Path, content: Any) -> None:
    """Write a result; ``-`` is standard output."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
    else:
        path.write_text(text, encoding="utf-8")


def one_line(error: BaseException) -> str:
    """Shorten a message, such as the list of a misfit checkpoint's keys, to its first entry."""
    lines = [line.strip() for line in str(error).splitlines()]
    more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
    return " ".join(lines[:2]) + more


def run(program: str, command: Callable[[], int]) -> int:
    """Run a command and return its exit status: 1, after one line, for an error of its user."""
    rank = os.environ.get("RANK")
    try:
        return command()
    except (OSError, ValueError, TypeError, ImportError, torch.OutOfMemoryError) as error:
        message = one_line(error)
    except RuntimeError as error:
        message = reader_died(error)
        if not message:
            raise
    where = f"[rank {rank}] " if rank else ""
    print(f"{program}: {where}{message}", file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # The others may wait for this process, and it for them: end at once, torchrun ends them.
        os._exit(1)
    return 1

"""Draw which patches the CLS tokens of a CrossViT read in each fusion.

    python -m crossvit.attention cat.jpg --checkpoint mine.safetensors --out maps.png
    python -m crossvit.attention cat.jpg --checkpoint official --model crossvit_15_240

In a fusion the CLS of one branch attends to itself and to the other branch's patches (the paper's
Eq. 5-7). There is a column for each cross-attention, in the order in which they run, and a row for
each branch, or with --heads all for each of its heads. Bright patches are read most, in black is
what is not read; above each map is the share that the CLS keeps on itself.

Needs matplotlib and torchvision.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from crossvit.attention_maps import attention_maps
from crossvit.checkpoints import load_checkpoint, load_model, official_url
from crossvit.configs import Config, Size, named_config
from crossvit.model import CrossViT
from crossvit.transforms import IMAGENET_MEAN, IMAGENET_STD, eval_transform

#: What a map covers of the image below it.
_OPACITY = 0.7
_INCHES = 2.2  # side of a map


class FusionMap(NamedTuple):
    """What one head, or the mean of all, reads in one cross-attention.

    Attributes:
        branch: 0: the S branch's CLS reads the L branch's patches; 1: the reverse.
        block: Number of the multi-scale block.
        layer: Number of the cross-attention in its fusion.
        head: Number of the head; None for the mean.
        own_share: Attention of the CLS to itself.
        weights: Attention to the other branch's patches, [height, width].
    """

    branch: int
    block: int
    layer: int
    head: int | None
    own_share: float
    weights: Tensor


def fusion_maps(model: CrossViT, x: Tensor, heads: str = "mean") -> list[FusionMap]:
    """Return what the CLS tokens read in all fusions of one image.

    Cross-attentions that see no patches, as the later ones of a fusion in the released code, are
    left out.

    Args:
        model: A model that fuses by cross-attention.
        x: One image, [1, C, H, W].
        heads: "mean" of all heads, or "all" of them.

    Raises:
        ValueError: The model's branches are not fused by cross-attention, or x or heads are none
            of the above.
    """
    if heads not in ("mean", "all"):
        raise ValueError(f"heads: expected 'mean' or 'all', found {heads!r}")
    if x.dim() != 4 or len(x) != 1:
        raise ValueError(f"x: expected one image [1, C, H, W], found {list(x.shape)}")
    check_cross_attention(model.config)
    return list(_fusion_maps(model, x, heads))


def _fusion_maps(model: CrossViT, x: Tensor, heads: str) -> Iterator[FusionMap]:
    grids = model.grid_sizes_of(x)
    for k, attention in enumerate(attention_maps(model, x)):
        for b in (0, 1):
            for layer, weights in enumerate(attention.fusion[b]):
                if weights.shape[-1] == 1:
                    continue
                every = weights[0].float().cpu()
                for head, row in enumerate(every if heads == "all" else every.mean(0, True)):
                    number = head if heads == "all" else None
                    patches = row[1:].unflatten(0, grids[1 - b])
                    yield FusionMap(b, k, layer, number, row[0].item(), patches)


def check_cross_attention(config: Any) -> None:
    """Check that models of a configuration have cross-attention to draw.

    Raises:
        ValueError: They have none.
    """
    if not isinstance(config, Config):
        raise ValueError("the model has one branch, and so no cross-attention to draw")
    if config.fusion != "cross":
        raise ValueError(f"the model has fusion={config.fusion!r}: no cross-attention to draw")


def draw(maps: Sequence[FusionMap], image: Tensor) -> Any:
    """Draw maps over the image that they are of.

    Args:
        maps: The result of ``fusion_maps``.
        image: [H, W, 3], from 0 to 1.

    Returns:
        A matplotlib Figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure_class = _figure_class()
    columns = list(dict.fromkeys((m.block, m.layer) for m in maps))
    rows = list(dict.fromkeys((m.branch, m.head) for m in sorted(maps, key=_row)))
    layers = 1 + max(layer for _, layer in columns)
    size = (_INCHES * (1 + len(columns)), _INCHES * len(rows) + 0.6)
    figure = figure_class(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), 1 + len(columns), squeeze=False)
    height, width = image.shape[:2]
    grey = image.mean(dim=-1).numpy()
    for line in axes:
        for ax in line:
            ax.set(xticks=[], yticks=[])
    for line, (branch, head) in zip(axes, rows, strict=True):
        line[0].imshow(image.numpy())
        reader = "S reads large patches" if branch == 0 else "L reads small patches"
        line[0].set_ylabel(reader + ("" if head is None else f"\nhead {head + 1}"))
    for m in maps:
        ax = axes[rows.index((m.branch, m.head))][1 + columns.index((m.block, m.layer))]
        extent = (0, width, height, 0)
        ax.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=extent)
        ax.imshow(m.weights.numpy(), cmap="inferno", vmin=0, alpha=_OPACITY, extent=extent)
        fusion = f"fusion {m.block + 1}" + (f".{m.layer + 1}" if layers > 1 else "")
        ax.set_title(f"{fusion}, itself {m.own_share:.0%}", fontsize="small")
    return figure


def _row(m: FusionMap) -> tuple[int, int]:
    return m.branch, -1 if m.head is None else m.head


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    return Figure


# The command


def open_image(path: Path, channels: int) -> Any:
    """Open an image, rotated as its EXIF data says, in the channels of a model.

    Raises:
        ValueError: It cannot be read, or a model has neither 1 nor 3 channels.
        ImportError: Pillow is not installed.
    """
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise ValueError(f"the model has in_chans={channels}: images have 1 or 3")
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("images need Pillow: pip install pillow") from error
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert(modes[channels])
    except Exception as error:  # decoders raise anything
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: {reason}") from error


def open_model(checkpoint: str, name: str | None, img_size: int | None) -> CrossViT:
    """Make the model of a checkpoint, without heads.

    Raises:
        ValueError: The checkpoint cannot be read, does not fit, or needs a name.
    """
    options: dict[str, Any] = {"num_classes": 0}
    if img_size is not None:
        options["img_size"] = img_size
    if name is not None:
        config = named_config(name)
        check_cross_attention(config)
        source = official_url(name) if checkpoint == "official" else checkpoint
        return load_checkpoint(CrossViT(name, **options), source)
    if checkpoint == "official":
        raise ValueError("--checkpoint official needs --model NAME")
    try:
        model: Any = load_model(checkpoint, **options)
    except ValueError as error:
        if "does not describe its model" not in str(error):
            raise
        problem = "does not describe its model: name it with --model"
        raise ValueError(f"{checkpoint}: {problem}") from error
    check_cross_attention(model.config)
    return cast(CrossViT, model)


def draw_file(options: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        ValueError: The image or checkpoint cannot be used.
        OSError: A file is missing or cannot be written.
        ImportError: A package is not installed.
    """
    _figure_class()
    if not options.out.parent.is_dir():
        raise ValueError(f"--out {options.out}: there is no folder {options.out.parent}")
    if not options.image.is_file():
        raise ValueError(f"{options.image}: no such file")
    model = open_model(options.checkpoint, options.model, options.img_size).eval()
    picture = open_image(options.image, model.in_chans)
    mean, std = (
        values if model.in_chans == 3 else (sum(values) / len(values),)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    size: int | Size = model.patch_embed[0].img_size
    size = size[0] if isinstance(size, tuple) and size[0] == size[1] else size
    x = eval_transform(size, mean=mean, std=std)(picture)
    shown = x * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    shown = shown.clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3)
    figure = draw(fusion_maps(model, x.unsqueeze(0), options.heads), shown)
    figure.savefig(options.out, dpi=options.dpi)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m crossvit.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("image", type=Path, metavar="IMAGE", help="any format that Pillow reads")
    add(
        "--checkpoint",
        required=True,
        metavar="SOURCE",
        help="a file, URL or hub id; or official, the weights that the paper's authors published",
    )
    add("--out", type=Path, default=Path("maps.png"), metavar="FILE", help="default: maps.png")
    add(
        "--model",
        metavar="NAME",
        help="e.g. crossvit_15_240; files of save_checkpoint describe their model and need none",
    )
    add("--img-size", type=_positive, metavar="PIXELS", help="of the S branch's image")
    add("--heads", choices=("mean", "all"), default="mean", help="default: mean")
    add("--dpi", type=_positive, default=150, help="pixels per inch; default: 150")
    options: argparse.Namespace = parser.parse_args(arguments)
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, found {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, or 1 after a line that says what is wrong."""
    options = parse(arguments)
    try:
        draw_file(options)
    except (OSError, ValueError, TypeError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
        text = textwrap.shorten(" ".join(lines[:2]), 250, placeholder=" ...")
        print(f"crossvit.attention: {text}{more}", file=sys.stderr)
        return 1
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor

from crossvit.attention_maps import attention_maps
from crossvit.checkpoints import load_model
from crossvit.command_line import RELEASED, output_file, positive, run
from crossvit.configs import Config, Size, named_config
from crossvit.model import CrossViT
from crossvit.predict import open_image
from crossvit.pretrained import released_weights
from crossvit.transforms import IMAGENET_MEAN, IMAGENET_STD, eval_transform

_PROGRAM = "crossvit.attention"
#: Channels of a model -> mode of Pillow.
_MODES = {1: "L", 3: "RGB"}
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


def open_model(source: str, name: str | None, img_size: int | None, use_ema: bool) -> CrossViT:
    """Make the model of a checkpoint in evaluation mode.

    Raises:
        ValueError: The checkpoint cannot be read, does not fit or needs a name, or the model has no
            cross-attention. ``load_checkpoint`` lists the other errors.
    """
    if name is not None:
        check_cross_attention(named_config(name))
    if source in RELEASED:
        if name is None:
            raise ValueError(f"--checkpoint {source}: needs --model, such as crossvit_15_240")
        source = released_weights(name, source)
    changes: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    model: Any = load_model(source, name=name, use_ema=use_ema, **changes)
    check_cross_attention(model.config)
    return cast(CrossViT, model.eval())


def draw_file(options: argparse.Namespace) -> int:
    """Do what the command line says.

    Raises:
        ValueError: The image or checkpoint cannot be used.
        OSError: A file is missing or cannot be written.
        ImportError: A package is not installed.
    """
    _figure_class()
    if not options.image.is_file():
        raise ValueError(f"{options.image}: no such file")
    model = open_model(options.checkpoint, options.model, options.img_size, options.use_ema)
    if model.in_chans not in _MODES:
        raise ValueError(f"the model has in_chans={model.in_chans}: images have 1 or 3")
    picture = open_image(options.image, _MODES[model.in_chans])
    mean, std = (
        values if model.in_chans == 3 else (sum(values) / len(values),)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    height, width = model.patch_embed[0].img_size
    size: int | Size = height if height == width else (height, width)
    x = eval_transform(size, mean=mean, std=std)(picture)
    scale, shift = (x.new_tensor(values).view(-1, 1, 1) for values in (std, mean))
    shown = x * scale + shift
    shown = shown.clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3)
    figure = draw(fusion_maps(model, x.unsqueeze(0), options.heads), shown)
    figure.savefig(options.out, dpi=options.dpi)
    print(options.out)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {_PROGRAM}",
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
        help="a file, URL or hub id; or weights trained on ImageNet: timm (on the hub) or official "
        "(the authors')",
    )
    add(
        "--model",
        metavar="NAME",
        help="e.g. crossvit_15_240; not needed for files written by crossvit.save_checkpoint",
    )
    add(
        "--no-ema",
        dest="use_ema",
        action="store_false",
        help="take the trained weights of a training checkpoint, not their average",
    )
    add("--img-size", type=positive, metavar="PIXELS", help="side of the S branch's image")
    add("--heads", choices=("mean", "all"), default="mean", help="default: mean")
    add(
        "--out",
        type=output_file,
        default=Path("maps.png"),
        metavar="FILE",
        help="picture to write, in the format of its name; default: maps.png",
    )
    add("--dpi", type=positive, default=150, metavar="N", help="pixels per inch; default: 150")
    options: argparse.Namespace = parser.parse_args(arguments)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, or 1 after a line that says what is wrong."""
    options = parse(arguments)
    return run(_PROGRAM, lambda: draw_file(options))


if __name__ == "__main__":
    sys.exit(main())

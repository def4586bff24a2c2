"""The rows of the paper's tables, and the models that are measured for them.

``paper_tables.json`` has what the paper prints, a row per line:

- ``model``: its name here or in timm, null if neither has it; ``img_size`` of timm's, if not 224;
- ``gmacs`` (the paper's FLOPs, in G), ``mparams``, ``images_per_second`` (on a V100), ``top1`` in
  percent, and of one branch alone ``top1_l`` and ``top1_s``;
- ``pos_embed``: false if the paper's parameters leave position embeddings out;
- ``baseline``: the row whose throughput the row's is compared with;
- ``embedding``, ``patches``, ``dims``, ``heads``, ``K``, ``N``, ``M``, ``L``, ``r``: the
  architecture; pairs are (small, large).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import crossvit

DATA = Path(__file__).with_name("paper_tables.json")
#: Keys of a row's architecture, in the order of its columns.
ARCHITECTURE = ("embedding", "patches", "dims", "heads", "K", "N", "M", "L", "r")
#: Keys of what the paper measures.
QUANTITIES = ("mparams", "gmacs", "images_per_second", "top1", "top1_l", "top1_s")
#: The paper's words for values of ``Config.embed``.
EMBEDDINGS = {"patch": "Linear", "conv": "3 Conv."}

Printed = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Size:
    """What a model has and computes.

    Attributes:
        parameters: Number of parameters.
        position_embeddings: How many of these are position embeddings.
        macs: Multiply-accumulates of one image, including attention's products.
    """

    parameters: int
    position_embeddings: int
    macs: int


def tables() -> dict[str, dict[str, Any]]:
    """Return each table's title and rows as printed; fractions as Decimals, with all digits."""
    text = DATA.read_text(encoding="utf-8")
    loaded: dict[str, dict[str, Any]] = json.loads(text, parse_float=Decimal)
    return loaded


def is_ours(name: str) -> bool:
    return name in crossvit.list_models()


def why_missing(printed: Printed) -> str | None:
    """The reason why no model can be made for a row, or None."""
    name = printed["model"]
    if name is None:
        return "not in timm"
    if is_ours(name):
        return None
    try:
        import timm
    except ImportError:
        return "timm is not installed"
    return None if timm.is_model(name) else f"not in timm {timm.__version__}"


def make_model(name: str, use_fused: bool = False) -> nn.Module:
    """Make a model of ours or of timm in evaluation mode."""
    if is_ours(name):
        return crossvit.create_model(name, use_fused=use_fused).eval()
    import timm

    model: nn.Module = timm.create_model(name).eval()
    return model


def image_size(printed: Printed, model: nn.Module) -> tuple[int, int]:
    """(height, width) of the images passed to the row's model."""
    if not is_ours(printed["model"]):
        side = printed.get("img_size", 224)
        return side, side
    embed: Any = model.patch_embed
    size: tuple[int, int] = (embed[0] if isinstance(embed, nn.ModuleList) else embed).img_size
    return size


@functools.cache
def _size(name: str, img_size: int) -> Size:
    with torch.device("meta"):
        model = make_model(name)
        parameters = {name: p.numel() for name, p in model.named_parameters()}
        if is_ours(name):
            macs = crossvit.count_macs(model)
        else:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(torch.empty(1, 3, img_size, img_size))
            macs = counter.get_total_flops() // 2
    positions = sum(count for name, count in parameters.items() if name.startswith("pos_embed"))
    return Size(sum(parameters.values()), positions, macs)


def size_of(printed: Printed) -> Size:
    """Count what the row's model has and computes, without allocating it."""
    return _size(printed["model"], printed.get("img_size", 224))


def architecture(name: str) -> Printed:
    """The architecture of a model of ours, with the keys of ``paper_tables.json``."""
    config: Any = crossvit.configs.named_config(name)
    (heads, _), (n, m), (ratio, _) = config.num_heads, config.depths, config.mlp_ratios
    return {
        "embedding": EMBEDDINGS[config.embed],
        "patches": list(config.patch_sizes),
        "dims": list(config.dims),
        "heads": heads,
        "K": config.num_blocks,
        "N": n,
        "M": m,
        "L": config.cross_depth,
        "r": ratio,
    }


def plain(printed: Printed, measured: dict[str, Any]) -> dict[str, Any]:
    """Return a row for JSON: what the paper has, what is here, and the ratios of numbers."""
    paper = {key: float(v) if isinstance(v, Decimal) else v for key, v in printed.items()}
    here = dict(measured)
    if "fused" in here:
        here["images_per_second"] = here["fused"]
    ratios = {key: here[key] / paper[key] for key in QUANTITIES if key in here and key in paper}
    return {"paper": paper, "here": here, "ratio": ratios}

"""What timm records of a model: its architecture's name, its images, its first and last layers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

from crossvit.configs import Config, VitConfig, config_grids, list_models, named_config
from crossvit.released import released_weights
from crossvit.transforms import CROP_PCT, IMAGENET_MEAN, IMAGENET_STD

#: From this side on timm evaluates without a margin around the crop.
_NO_MARGIN = 384
_CROP_PCT = {Config: CROP_PCT, VitConfig: 0.9}


def architecture(config: Config | VitConfig) -> str | None:
    """Return the name in ``list_models`` of a configuration, at any image size; None for others.

    Of several names at different sizes the one of this size, else the first.
    """
    names = _names().get(_without_size(config), [])
    here = config_grids(config)
    return next(
        (n for n in names if config_grids(named_config(n)) == here), next(iter(names), None)
    )


def pretrained_cfg(config: Config | VitConfig, in_chans: int) -> dict[str, Any]:
    """Return timm's ``pretrained_cfg`` of an architecture, as a dict.

    ``input_size`` is (channels, height, width) of the S branch's image; ``hf_hub_id`` is there if
    weights of this architecture and size were released.
    """
    name = architecture(config)
    height, width = image_size(config)
    first_conv, classifier = _first_and_last(config)
    cfg: dict[str, Any] = {
        "architecture": name,
        "input_size": (in_chans, height, width),
        "fixed_input_size": has_one_image_size(config),
        "interpolation": "bicubic",
        "crop_pct": 1.0 if min(height, width) >= _NO_MARGIN else _CROP_PCT[type(config)],
        "crop_mode": "center",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "num_classes": 1000,
        "pool_size": None,
        "first_conv": first_conv,
        "classifier": classifier,
        "license": "apache-2.0",
    }
    if name is not None and config_grids(named_config(name)) == config_grids(config):
        with contextlib.suppress(ValueError):  # most were not released
            source = released_weights(name)
            cfg |= {"hf_hub_id": source, "tag": source.rpartition(".")[2]}
    return cfg


def image_size(config: Config | VitConfig) -> tuple[int, int]:
    """Return (height, width) of the only image, or of the S branch's, in whole patches."""
    patch = config.patch_sizes[0] if isinstance(config, Config) else config.patch_size
    height, width = config_grids(config)[0]
    return height * patch, width * patch


def has_one_image_size(config: Config | VitConfig) -> bool:
    """Whether ``img_size`` of the configuration is one size, from which both branches' follow."""
    size = config.img_size
    return isinstance(size, int) or isinstance(size[0], int)


@functools.cache
def _names() -> dict[Config | VitConfig, list[str]]:
    names: dict[Config | VitConfig, list[str]] = {}
    for name in list_models():
        names.setdefault(_without_size(named_config(name)), []).append(name)
    return names


def _without_size(config: Config | VitConfig) -> Config | VitConfig:
    pairs: Any = {k: tuple(value) for k, value in vars(config).items() if type(value) is list}
    return dataclasses.replace(config, **{**pairs, "img_size": 240})


def _first_and_last(config: Config | VitConfig) -> tuple[Any, Any]:
    """Names of the convolutions that read the images, and of the heads."""
    if isinstance(config, VitConfig):
        return "patch_embed.proj", "head"
    layer = {"patch": "proj", "conv": "proj.0", "t2t": None}[config.embed]
    first_conv = None if layer is None else tuple(f"patch_embed.{b}.{layer}" for b in (0, 1))
    return first_conv, ("head.0", "head.1")

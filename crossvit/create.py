"""Makes models of either kind."""

from __future__ import annotations

from typing import Any

from crossvit.configs import Config, VitConfig, named_config
from crossvit.model import CrossViT
from crossvit.vit import VisionTransformer


def make_model(name: str | Config | VitConfig, **options: Any) -> CrossViT | VisionTransformer:
    """Make the model of a name or configuration, with the arguments of its class.

    Raises:
        ValueError: The name is unknown or options do not fit each other.
        TypeError: An option is unknown.
    """
    config = name if isinstance(name, (Config, VitConfig)) else named_config(name)
    if isinstance(config, VitConfig):
        return VisionTransformer(config, **options)
    return CrossViT(config, **options)

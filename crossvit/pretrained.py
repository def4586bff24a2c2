"""Models by name, with released weights, as backbones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import nn

from crossvit import checkpoint_files
from crossvit.backbone import Backbone
from crossvit.checkpoints import load_checkpoint
from crossvit.configs import Config, VitConfig
from crossvit.create import make_model
from crossvit.model import CrossViT
from crossvit.released import official_url, released_weights
from crossvit.vit import VisionTransformer

__all__ = ["create_model", "official_url", "released_weights"]


@overload
def create_model(
    name: str | Config | VitConfig,
    use_fused: bool = False,
    *,
    pretrained: bool | str = False,
    checkpoint_path: str | os.PathLike[str] | None = None,
    features_only: Literal[False] = False,
    **options: Any,
) -> CrossViT | VisionTransformer: ...


@overload
def create_model(
    name: str | Config | VitConfig,
    use_fused: bool = False,
    *,
    pretrained: bool | str = False,
    checkpoint_path: str | os.PathLike[str] | None = None,
    features_only: Literal[True],
    out_indices: int | Sequence[int] | None = None,
    **options: Any,
) -> nn.Module: ...


def create_model(
    name: str | Config | VitConfig,
    use_fused: bool = False,
    *,
    pretrained: bool | str = False,
    checkpoint_path: str | os.PathLike[str] | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    **options: Any,
) -> nn.Module:
    """Make a named model, with the arguments of ``CrossViT``; DeiT's are ``VisionTransformer``.

    Args:
        name: A name from ``list_models``, or what stands for one: without a size
            (``crossvit_15``), the authors' (``crossvit_15_224``) or timm's
            (``crossvit_15_240.in1k``). Without ``pretrained`` also a configuration.
        use_fused: Run the kernels of crossvit_kernels.
        pretrained: Load the weights trained on ImageNet: True or "timm" from the Hugging Face hub,
            "official" from the authors' release. They are downloaded once and cached. Another
            ``img_size`` resizes the position embeddings; another ``num_classes`` keeps its new
            heads.
        checkpoint_path: Anything that ``load_checkpoint`` takes, loaded last.
        features_only: Return timm's ``FeatureGetterNet`` around the model, whose result is a list
            of feature maps [B, C, height, width]; needs timm.
        out_indices: With features_only: the features, numbered as in ``feature_info``. None: the
            last of each branch; of a plain vision transformer the last three.
        **options: Arguments of the model's class, e.g. ``num_classes=10``.

    Raises:
        ValueError: The name is unknown, sizes do not fit each other, or there are no such weights.
        TypeError: An argument is unknown or of another type.
        FileNotFoundError: There is no such checkpoint.
        ConnectionError: The weights are not cached and the hub or server cannot be reached.
        ImportError: The weights or features_only need a package that is not installed.
    """
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices={out_indices!r}: expected features_only=True")
    path = _locate(name, pretrained, options)  # first: it may fail, and making a model is slow
    model = make_model(name, use_fused=use_fused, **options)
    if path is not None:
        load_checkpoint(model, path, replace_head=model.num_classes != 1000)
    if checkpoint_path is not None:
        load_checkpoint(model, checkpoint_path)
    return _features_of(model, out_indices) if features_only else model


def _locate(name: Any, pretrained: bool | str, options: dict[str, Any]) -> Any:
    """The file of released weights; None without."""
    if pretrained is False:
        return None
    source = released_weights(name, pretrained)
    if (channels := options.get("in_chans", 3)) != 3:
        raise ValueError(f"in_chans: the pretrained weights are for 3, found {channels}")
    return checkpoint_files.locate(source)


def _features_of(model: Backbone, out_indices: int | Sequence[int] | None) -> nn.Module:
    """The model as timm's backbone of feature maps."""
    try:
        from timm.models._features import FeatureGetterNet
    except ImportError as error:
        raise ImportError("features_only needs timm: pip install 'crossvit-kernels[train]'") from (
            error
        )
    cfg = model.pretrained_cfg
    indices: Any = default_out_indices(model) if out_indices is None else out_indices
    net: Any = FeatureGetterNet(model, indices)
    net.pretrained_cfg = {k: v for k, v in cfg.items() if k not in ("num_classes", "classifier")}
    return net


def default_out_indices(model: Backbone) -> int | list[int]:
    """Return the features of timm's backbones: each branch's last, or of one branch the last 3."""
    num_blocks = len(model.blocks)
    if isinstance(model, CrossViT):
        return [num_blocks - 1, 2 * num_blocks - 1]
    return min(3, num_blocks)

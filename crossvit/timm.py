"""The models in timm's registry, for scripts that make theirs by ``timm.create_model``."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from crossvit import conventions
from crossvit.backbone import Backbone
from crossvit.checkpoints import to_our_layout
from crossvit.configs import list_models, named_config
from crossvit.create import make_model
from crossvit.pretrained import default_out_indices

__all__ = ["register"]

#: In front of timm's tags; alone for architectures without released weights.
TAG = "fused"
Entrypoint = Callable[..., Any]


def register() -> list[str]:
    """Add this package's models to timm's registry.

    ``timm.create_model("crossvit_15_240.fused_in1k", pretrained=True)`` then makes a ``CrossViT``
    that runs fused, with the weights and the data configuration of ``crossvit_15_240.in1k``;
    names without ``fused`` stay timm's own models. Architectures that timm does not have are called
    by their names in ``list_models``, with or without ``.fused``. ``use_fused=False`` and the
    other arguments of ``CrossViT`` are passed on. A second call changes nothing.

    Returns:
        The names, as ``timm.list_models("*.fused*", include_tags=True)`` lists them.

    Raises:
        ImportError: timm is not installed.
    """
    try:
        from timm.models import is_model, model_entrypoint
        from timm.models import list_models as list_timm
    except ImportError as error:
        raise ImportError("crossvit.timm needs timm: pip install 'crossvit-kernels[train]'") from (
            error
        )
    registered = set(list_timm(f"*.{TAG}*", include_tags=True))
    for name in list_models():
        if not any(known.startswith(f"{name}.") for known in registered):
            _add(name, model_entrypoint(name) if is_model(name) else None)
    return [
        known
        for known in list_timm(f"*.{TAG}*", include_tags=True)
        if known.partition(".")[0] in list_models()
    ]


def _add(name: str, theirs: Entrypoint | None) -> None:
    """Register a name, whose entrypoint in timm, if any, keeps its other tags."""
    from timm.models import generate_default_cfgs, register_model

    config = named_config(name)
    cfg = conventions.pretrained_cfg(config, in_chans=3)
    tag = cfg.pop("tag", None)
    ours = generate_default_cfgs({f"{name}.{TAG}_{tag}" if tag else f"{name}.{TAG}": cfg})[name]

    def create(pretrained: bool = False, pretrained_cfg: Any = None, **options: Any) -> Any:
        if theirs is not None and not _is_ours(pretrained_cfg):
            return theirs(pretrained=pretrained, pretrained_cfg=pretrained_cfg, **options)
        return _build(name, pretrained, pretrained_cfg, **options)

    if theirs is None:
        create.__name__ = create.__qualname__ = name
        module = sys.modules[__name__]
        setattr(module, name, create)
    else:
        create = functools.wraps(theirs)(create)
        module = sys.modules[theirs.__module__]
    cfgs = vars(module).setdefault("default_cfgs", {})
    if name in cfgs:
        cfgs[name].tags.extend(ours.tags)
        cfgs[name].cfgs.update(ours.cfgs)
    else:
        cfgs[name] = ours
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Overwriting", UserWarning)  # as intended
        register_model(create)


def _is_ours(pretrained_cfg: Any) -> bool:
    """Whether a tag, or the tag of a configuration, is one of ours."""
    tag = pretrained_cfg
    if isinstance(tag, Mapping):
        tag = tag.get("tag")
    elif not isinstance(tag, str):
        tag = getattr(tag, "tag", None)
    return str(tag).startswith(TAG)


def _build(name: str, pretrained: bool, pretrained_cfg: Any, **options: Any) -> Any:
    """Make one of our models by timm's rules."""
    from timm.models import build_model_with_cfg

    place = {key: options.pop(key) for key in ("device", "dtype") if key in options}
    model = build_model_with_cfg(
        functools.partial(_make, name),
        name,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_filter_fn=_filter,
        feature_cfg={"out_indices": _out_indices(name), "feature_cls": "getter"},
        **{"use_fused": True, **options},
    )
    return model.to(**place) if place else model


def _make(name: str, **options: Any) -> Backbone:
    options = {key: _tuples(value) for key, value in options.items()}
    size = options.get("img_size")
    if isinstance(size, tuple) and len(size) == 2 and size[0] == size[1]:
        options["img_size"] = size[0]
    return make_model(name, **options)


def _tuples(value: Any) -> Any:
    """Tuples for the lists of JSON."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _filter(state: Mapping[str, Any], model: Backbone) -> dict[str, Any]:
    return to_our_layout(state, model)


@functools.cache
def _out_indices(name: str) -> Any:
    with torch.device("meta"):
        return default_out_indices(make_model(name))

"""The classes of ImageNet-1k in the order of a model's logits, from timm."""

from __future__ import annotations

from typing import Any

NUM_CLASSES = 1000


def class_names() -> list[str]:
    """Return what the classes show, e.g. "tench, Tinca tinca".

    Raises:
        ImportError: timm is not installed.
    """
    info = _info()
    return [str(info.index_to_description(i)) for i in range(NUM_CLASSES)]


def wordnet_ids() -> list[str]:
    """Return the WordNet ids of the classes, the names of ImageNet's folders, e.g. n01440764.

    Raises:
        ImportError: timm is not installed.
    """
    info = _info()
    return [str(info.index_to_label_name(i)) for i in range(NUM_CLASSES)]


def _info() -> Any:
    try:
        from timm import data
    except ImportError as error:
        raise ImportError("the names of ImageNet's classes need timm: pip install timm") from error
    info: Any = data
    return info.ImageNetInfo()

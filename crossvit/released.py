"""The weights that were released for the paper's models and DeiT's: hub ids and URLs."""

from __future__ import annotations

from crossvit.configs import canonical_name, list_models

_RELEASE = "https://github.com/IBM/CrossViT/releases/download/weights-0.1"
#: Name -> file of the authors' release, which is named after the image of the L branch.
_RELEASED = {
    **{
        f"crossvit_{variant}_240": f"crossvit_{variant}_224.pth"
        for variant in ("tiny", "small", "base", "9", "15", "18")
    },
    **{f"crossvit_{n}_dagger_240": f"crossvit_{n}_dagger_224.pth" for n in (9, 15, 18)},
    **{f"crossvit_{n}_dagger_408": f"crossvit_{n}_dagger_384.pth" for n in (15, 18)},
}
#: Name -> file of DeiT's release.
_DEIT_RELEASE = "https://dl.fbaipublicfiles.com/deit"
_RELEASED_DEIT = {
    "deit_tiny_patch16_224": "deit_tiny_patch16_224-a1311bcf.pth",
    "deit_small_patch16_224": "deit_small_patch16_224-cd65a155.pth",
    "deit_base_patch16_224": "deit_base_patch16_224-b5f2ef4d.pth",
}
_SOURCES = ("timm", "official")


def released_weights(name: str, pretrained: bool | str = True) -> str:
    """Return the hub id or URL of a model's weights, trained on ImageNet.

    Args:
        name: As for ``create_model``.
        pretrained: True or "timm" for timm's copy on the Hugging Face hub, which is safetensors;
            "official" for the authors' release.

    Raises:
        ValueError: The name is unknown, ``pretrained`` is none of these, or this model's weights
            were not released.
        TypeError: An argument is of another type.
    """
    if not isinstance(pretrained, (bool, str)):
        raise TypeError(f"pretrained: expected a bool or string, found {pretrained!r}")
    if pretrained is not True and pretrained not in _SOURCES:
        expected = "True, False, 'timm' or 'official'"
        advice = "; checkpoint_path= and load_model(source, name=...) take files, URLs and hub ids"
        raise ValueError(f"pretrained: expected {expected}, found {pretrained!r}{advice}")
    if not isinstance(name, str):
        raise TypeError(f"pretrained: needs the name of a model, found {type(name).__name__}")
    name = canonical_name(name)
    if name in _RELEASED_DEIT:
        official = f"{_DEIT_RELEASE}/{_RELEASED_DEIT[name]}"
        return official if pretrained == "official" else f"timm/{name}.fb_in1k"
    if name not in _RELEASED:
        raise ValueError(f"no weights of {name!r} were released{_advice(name)}")
    return f"{_RELEASE}/{_RELEASED[name]}" if pretrained == "official" else f"timm/{name}.in1k"


def official_url(name: str) -> str:
    """Return the URL of the authors' ImageNet weights of a named model.

    Args:
        name: As for ``create_model``; released are the nine models at 240 pixels, and 15_dagger
            and 18_dagger at 408.

    Raises:
        ValueError: The name is unknown, or this model's weights were not released.
    """
    return released_weights(name, "official")


def _advice(name: str) -> str:
    """How to get weights for a size that was not released."""
    variant, _, size = name.rpartition("_")
    others = [other for other in list_models(f"{variant}_*") if other in _RELEASED]
    if not others:
        return f", only of {', '.join(_RELEASED)}"
    return f": resize those of {others[-1]} with img_size={size}"

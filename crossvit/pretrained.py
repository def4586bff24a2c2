"""Models by name, and the released weights of the paper's models."""

from __future__ import annotations

from typing import Any

from crossvit import checkpoint_files
from crossvit.checkpoints import load_checkpoint
from crossvit.configs import canonical_name, list_models
from crossvit.create import make_model
from crossvit.model import CrossViT
from crossvit.vit import VisionTransformer

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


def create_model(
    name: str, use_fused: bool = False, *, pretrained: bool | str = False, **options: Any
) -> CrossViT | VisionTransformer:
    """Make a named model, with the arguments of ``CrossViT``; DeiT's are ``VisionTransformer``.

    Args:
        name: A name from ``list_models``, or what stands for one: without a size
            (``crossvit_15``), the authors' (``crossvit_15_224``) or timm's
            (``crossvit_15_240.in1k``).
        use_fused: Run the kernels of crossvit_kernels.
        pretrained: Load the weights trained on ImageNet: True or "timm" from the Hugging Face hub,
            "official" from the authors' release. They are downloaded once and cached. Another
            ``img_size`` resizes the position embeddings; another ``num_classes`` keeps its new
            heads.
        **options: Arguments of the model's class, e.g. ``num_classes=10``.

    Raises:
        ValueError: The name is unknown, sizes do not fit each other, or there are no such weights.
        ConnectionError: The weights are not cached and the hub or server cannot be reached.
        ImportError: The weights need a package that is not installed.
    """
    if pretrained is False:
        return make_model(name, use_fused=use_fused, **options)
    source = released_weights(name, pretrained)
    if (channels := options.get("in_chans", 3)) != 3:
        raise ValueError(f"in_chans: the pretrained weights are for 3, found {channels}")
    # First, as it may fail, and making a model takes seconds.
    path = checkpoint_files.locate(source)
    model = make_model(name, use_fused=use_fused, **options)
    return load_checkpoint(model, path, replace_head=model.num_classes != 1000)


def released_weights(name: str, pretrained: bool | str = True) -> str:
    """Return the hub id or URL of a model's weights, trained on ImageNet.

    Args:
        name: As for ``create_model``.
        pretrained: True or "timm" for timm's copy on the Hugging Face hub, which is safetensors;
            "official" for the authors' release.

    Raises:
        ValueError: The name is unknown, ``pretrained`` is none of these, or this model's weights
            were not released.
    """
    if pretrained is not True and pretrained not in _SOURCES:
        expected = "True, False, 'timm' or 'official'"
        advice = "; load_model(source, name=...) takes files, URLs and hub ids"
        raise ValueError(f"pretrained: expected {expected}, found {pretrained!r}{advice}")
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

"""The models of zoo_bench: timm's by their names, transformers' in small configurations."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import served
import torch
from command_line import DTYPES

TIMM = (
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_tiny_patch16_224",
    "vit_small_patch32_224",
    "vit_small_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "vit_small_r26_s32_224",
    "vit_xsmall_patch16_clip_224",
    "vit_medium_patch32_clip_224",
    "vit_wee_patch16_reg1_gap_256",
    "vit_dwee_patch16_reg1_gap_256",
    "vit_little_patch16_reg4_gap_256",
    "vit_medium_patch16_gap_256",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
    "vit_base_patch32_siglip_256",
    "flexivit_small",
    "crossvit_tiny_240",
    "crossvit_small_240",
    "crossvit_9_240",
    "crossvit_9_dagger_240",
    "crossvit_15_240",
    "pit_ti_224",
    "pit_xs_224",
    "pit_s_224",
    "mobilevit_xxs",
    "mobilevit_xs",
    "mobilevit_s",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "xcit_tiny_12_p16_224",
    "volo_d1_224",
    "resnet50_clip",
)
#: Images of models that are made for larger ones.
SIZES = {"vit_small_patch14_dinov2": 224, "vit_small_patch14_reg4_dinov2": 224}


class Configured(NamedTuple):
    """A model of transformers.

    Attributes:
        model: Its class.
        config: The class of its configuration.
        options: Of the configuration, besides the width, depth and images of all.
        inputs: What it takes: "images", "frames", "video" or "patches" (SigLIP 2's).
        size: Of the images.
    """

    model: str
    config: str
    options: dict[str, Any]
    inputs: str = "images"
    size: int = 224


WIDTH = {
    "hidden_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "intermediate_size": 768,
}
_PATCHES = {"patch_size": 16}
_FRAMES = 4

TRANSFORMERS = {
    "ViT": Configured("ViTModel", "ViTConfig", _PATCHES),
    "DeiT": Configured("DeiTModel", "DeiTConfig", _PATCHES),
    "ViT-MSN": Configured("ViTMSNModel", "ViTMSNConfig", _PATCHES),
    "I-JEPA": Configured("IJepaModel", "IJepaConfig", _PATCHES),
    "CLIP": Configured("CLIPVisionModel", "CLIPVisionConfig", _PATCHES),
    "MetaCLIP 2": Configured("MetaClip2VisionModel", "MetaClip2VisionConfig", _PATCHES),
    "SigLIP": Configured("SiglipVisionModel", "SiglipVisionConfig", _PATCHES),
    "SigLIP 2": Configured(
        "Siglip2VisionModel", "Siglip2VisionConfig", {**_PATCHES, "num_patches": 196}, "patches"
    ),
    "DINOv2": Configured("Dinov2Model", "Dinov2Config", {"patch_size": 14}),
    "DINOv2 with registers": Configured(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"patch_size": 14}
    ),
    "TIPSv2": Configured("Tipsv2VisionModel", "Tipsv2VisionConfig", {"patch_size": 14}),
    "ViViT": Configured(
        "VivitModel",
        "VivitConfig",
        {"num_frames": _FRAMES, "tubelet_size": [2, 16, 16]},
        "frames",
        112,
    ),
    "V-JEPA 2, classified": Configured(
        "VJEPA2ForVideoClassification",
        "VJEPA2Config",
        {
            **_PATCHES,
            "frames_per_clip": _FRAMES,
            "num_pooler_layers": 1,
            "pred_hidden_size": 192,
            "pred_num_attention_heads": 3,
            "pred_num_hidden_layers": 1,
        },
        "video",
        112,
    ),
    "AIMv2": Configured("Aimv2VisionModel", "Aimv2VisionConfig", _PATCHES),
}
#: How models of transformers are named, so that they are not mistaken for timm's.
PREFIX = "transformers "
ALL = (*TIMM, *(PREFIX + name for name in TRANSFORMERS))


def size_of(name: str, options: argparse.Namespace) -> int:
    """Return the size of a model's images."""
    if options.size:
        return int(options.size)
    if name.startswith(PREFIX):
        return TRANSFORMERS[name.removeprefix(PREFIX)].size
    import timm

    return SIZES.get(name) or timm.get_pretrained_cfg(name).input_size[-1]


def build(name: str, size: int, options: argparse.Namespace) -> Any:
    """Return a model with random weights, in evaluation."""
    torch.manual_seed(0)
    if name.startswith(PREFIX):
        import transformers

        case = TRANSFORMERS[name.removeprefix(PREFIX)]
        sized = {"crop_size" if case.inputs == "video" else "image_size": size}
        sized = {} if case.inputs == "patches" else sized
        config = getattr(transformers, case.config)(**WIDTH, **sized, **case.options)
        model = getattr(transformers, case.model)(config)
    else:
        import timm

        sized = {"img_size": size} if name in SIZES else {}
        model = timm.create_model(name, num_classes=1000, **sized)
    return model.eval().to(options.device, DTYPES[options.dtype])


def inputs(name: str, size: int, batch: int, options: argparse.Namespace) -> tuple[Any, ...]:
    """Return a model's arguments for some images."""
    case = TRANSFORMERS.get(name.removeprefix(PREFIX))
    kind = "images" if case is None or not name.startswith(PREFIX) else case.inputs
    if kind == "patches":
        side = size // 16
        x = served.tensors(batch, side * side, 3 * 16 * 16, options=options)
        mask = torch.ones(batch, side * side, dtype=torch.int64, device=options.device)
        shapes = torch.tensor([[side, side]] * batch, dtype=torch.int64, device=options.device)
        return x, mask, shapes
    frames = () if kind == "images" else (_FRAMES,)
    return (served.tensors(batch, *frames, 3, size, size, options=options),)

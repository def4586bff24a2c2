"""CrossViT (ICCV 2021) on the kernels of crossvit_kernels."""

from crossvit import timm
from crossvit.attention_maps import BlockAttention, attention_maps
from crossvit.checkpoints import load_checkpoint, load_model, read_class_names, save_checkpoint
from crossvit.configs import Config, VitConfig, list_models
from crossvit.macs import count_macs
from crossvit.model import CrossViT
from crossvit.pretrained import create_model, official_url
from crossvit.vit import VisionTransformer
from crossvit_kernels import __version__

__all__ = [
    "BlockAttention",
    "Config",
    "CrossViT",
    "VisionTransformer",
    "VitConfig",
    "__version__",
    "attention_maps",
    "count_macs",
    "create_model",
    "list_models",
    "load_checkpoint",
    "load_model",
    "official_url",
    "read_class_names",
    "save_checkpoint",
    "timm",
]

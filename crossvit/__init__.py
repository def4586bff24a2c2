"""CrossViT (ICCV 2021) on the kernels of crossvit_kernels."""

from crossvit.configs import Config, list_models
from crossvit.macs import count_macs
from crossvit.model import CrossViT, create_model

__all__ = ["Config", "CrossViT", "count_macs", "create_model", "list_models"]

"""The multi-scale blocks, one class for each fusion scheme of the paper's section 3.3."""

from __future__ import annotations

from crossvit.configs import Config
from crossvit.fusion.all_attention import AllAttentionBlock
from crossvit.fusion.block import MultiScaleBlock, UnfusedBlock
from crossvit.fusion.branch import Branch
from crossvit.fusion.class_token import ClassTokenBlock
from crossvit.fusion.cross import CrossFusionBlock
from crossvit.fusion.pairwise import PairwiseBlock

__all__ = [
    "AllAttentionBlock",
    "Branch",
    "ClassTokenBlock",
    "CrossFusionBlock",
    "MultiScaleBlock",
    "PairwiseBlock",
    "UnfusedBlock",
    "make_block",
]

_BLOCKS: dict[str, type[MultiScaleBlock]] = {
    "none": UnfusedBlock,
    "all": AllAttentionBlock,
    "class": ClassTokenBlock,
    "pairwise": PairwiseBlock,
    "cross": CrossFusionBlock,
}


def make_block(
    config: Config, drop_paths: list[float], qkv_bias: bool = True, attn_drop: float = 0.0
) -> MultiScaleBlock:
    """Make the multi-scale block of ``config.fusion``; see ``MultiScaleBlock``."""
    return _BLOCKS[config.fusion](config, drop_paths, qkv_bias, attn_drop)

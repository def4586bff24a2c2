"""One file a library, or a kind of its modules; none of the libraries is imported."""

from crossvit_kernels.plug_in.adapters import (
    known,
    split_blocks,
    timm_blocks,
    timm_pools,
    torch_blocks,
    transformers_pools,
)
from crossvit_kernels.plug_in.recipe import KNOWN, add

for _adapter in (timm_blocks, timm_pools, split_blocks, transformers_pools, torch_blocks):
    add(_adapter.RECIPES)
KNOWN.update(known.REASONS)

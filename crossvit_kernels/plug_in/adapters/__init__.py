"""One file a library, or a kind of its modules; none of the libraries is imported."""

from crossvit_kernels.plug_in.adapters import known, timm_blocks, timm_pools
from crossvit_kernels.plug_in.recipe import KNOWN, add

for _adapter in (timm_blocks, timm_pools):
    add(_adapter.RECIPES)
KNOWN.update(known.REASONS)

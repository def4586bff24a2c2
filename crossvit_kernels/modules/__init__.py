"""nn.Modules over the public functions, with the parameter names of the modules they replace.

State dicts load unchanged in both directions, and new parameters are initialised as there. As a
state dict does not determine what is computed, ``from_timm`` and ``from_transformers`` read the
activation, eps and the like from a module, and reject one that computes something else. The modules
have in common:

- ``num_heads`` divides ``dim``, the width C of the tokens; ``eps`` applies to every LayerNorm;
  ``qkv_bias`` gives the query, key and value projections biases.
- ``attn_drop`` is attention dropout in training, which runs on the reference. ``drop_path`` is the
  probability in training that an image's residual update is dropped.
- ``backend`` names a backend for all calls and may be set at any time; None leaves the choice to
  ``use_backend``, the environment and the input. A call that a named backend cannot run, and
  inputs that do not fit, raise what the function in ``crossvit_kernels.functional`` raises.
- With ``backend="reference"`` every layer is called as a module, so that hooks, adapters, pruning,
  quantisation and replaced layers work. Otherwise a fused operation reads the layers' parameters.
  If a layer is not plain (another class, a hook, a forward set on the instance, a weight that is a
  tensor subclass), that half of a block, fusion or head calls its layers as well, and logs so once
  through the logger ``crossvit_kernels``. Parametrizations stay fused.
- Under torch.func's transforms, torch.jit.trace and the ONNX exporters layers are called as well.
"""

from crossvit_kernels.modules.blocks import SelfAttentionBlock, TransformerBlock
from crossvit_kernels.modules.fusion import CrossAttentionFusion
from crossvit_kernels.modules.layers import CrossAttentionBlock, drop_path_scale
from crossvit_kernels.modules.pooling import (
    AttentionPool2d,
    AttentiveProbe,
    ClassAttention,
    MAPHead,
)

__all__ = [
    "AttentionPool2d",
    "AttentiveProbe",
    "ClassAttention",
    "CrossAttentionBlock",
    "CrossAttentionFusion",
    "MAPHead",
    "SelfAttentionBlock",
    "TransformerBlock",
    "drop_path_scale",
]

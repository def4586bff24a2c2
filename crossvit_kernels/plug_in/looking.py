"""Inspects layers of other libraries, none of which is imported: classes are known by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from crossvit_kernels import extension
from crossvit_kernels.backends import backends, order
from crossvit_kernels.modules.converters import activation_name
from crossvit_kernels.modules.layers import drop_path_scale
from crossvit_kernels.ops.attention_core.op import OPERATION as CORE
from crossvit_kernels.ops.attention_core.reference import CoreInputs
from crossvit_kernels.ops.attention_pool.op import keys_are_cheaper
from crossvit_kernels.ops.common import panels
from crossvit_kernels.ops.operator import OPERATIONS
from crossvit_kernels.plug_in.recipe import Declined, name_of

_LINEARS = {
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
}
_NORMS = {
    "torch.nn.modules.normalization.LayerNorm",
    "timm.layers.norm.LayerNorm",
    "open_clip.transformer.LayerNorm",
}
_IDLE = {"torch.nn.modules.linear.Identity", "torch.nn.modules.dropout.Dropout"}
_DROP_PATHS = {"timm.layers.drop.DropPath"}
_DINOS = {
    "dinov2.modeling_dinov2.Dinov2",
    "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegisters",
    "radio.modeling_radio.Radio",
    "tipsv2.modeling_tipsv2.Tipsv2Vision",
}
#: transformers' drop path: uniform numbers, rounded.
_ROUNDED_DROP_PATHS = {f"transformers.models.{start}DropPath" for start in _DINOS}
#: The parameter of each kind of LayerScale.
_LAYER_SCALES = {
    "timm.layers.layer_scale.LayerScale": "gamma",
    "timm.models.vision_transformer.LayerScale": "gamma",  # of older releases
    "open_clip.transformer.LayerScale": "gamma",
    **{f"transformers.models.{start}LayerScale": "lambda1" for start in _DINOS},
}
#: Implementations of attention in transformers that compute the same without a mask.
_IMPLEMENTATIONS = {
    None,
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
}
#: Words for layers that change what a block computes.
_MEANINGS = (
    ("q_norm", "qk-norm"),
    ("k_norm", "qk-norm"),
    ("ls", "LayerScale"),
    ("layer_scale", "LayerScale"),
    ("gate", "a gate"),
    ("rope", "RoPE"),
    ("rel_pos", "a relative position bias"),
    ("norm", "a norm inside"),
)


def kind_of(layer: Any) -> str:
    """Return the name of a layer's class, that of the original if it is parametrized."""
    kind: type[Any] = type(layer)
    if isinstance(layer, nn.Module) and parametrize.is_parametrized(layer):
        kind = kind.__bases__[0]
    return name_of(kind)


def child(owner: nn.Module, name: str, *kinds: str) -> Any:
    """Return a child; kinds: the names of classes it may have, all if there are none."""
    layer = owner._modules.get(name)
    if layer is None:
        raise Declined(f"it has no {name}")
    if kinds and kind_of(layer) not in kinds:
        raise Declined(f"{name} is a {type(layer).__name__}")
    return layer


def norm(owner: nn.Module, name: str, bias: bool = True) -> Any:
    """Return a LayerNorm with weight; bias: whether it must have one."""
    layer = owner._modules.get(name)
    if kind_of(layer) not in _NORMS:
        raise Declined(f"{name} is a {type(layer).__name__}, not a LayerNorm")
    if layer is None or layer.weight is None or (bias and layer.bias is None):
        raise Declined(f"{name} has no weight or no bias")
    if getattr(layer, "_fast_norm", False):
        raise Declined(f"{name} is timm's fast norm")
    return layer


def linear(owner: nn.Module, name: str, bias: bool = False) -> Any:
    """Return a Linear; bias: whether it must have one."""
    layer = owner._modules.get(name)
    if kind_of(layer) not in _LINEARS:
        raise Declined(f"{name} is a {type(layer).__name__}, not an nn.Linear")
    if bias and (layer is None or layer.bias is None):
        raise Declined(f"{name} has no bias")
    return layer


def only(owner: nn.Module, path: str, *known: str) -> None:
    """Require that no other children than these do anything; path of the owner, for messages."""
    for name, layer in owner._modules.items():
        if name in known or layer is None or kind_of(layer) in _IDLE:
            continue
        meaning = next((m for start, m in _MEANINGS if name.startswith(start)), None)
        where = ".".join(filter(None, (path, name)))
        raise Declined(
            f"{meaning} ({where})" if meaning else f"{where} is a {type(layer).__name__}"
        )


def plain_attributes(owner: Any, **expected: Any) -> None:
    """Require values of attributes where the owner has them."""
    for name, value in expected.items():
        found = getattr(owner, name, value)
        if found is not value and found != value:
            raise Declined(f"{name} is {found!r}")


def activation(layer: Any, name: str) -> str:
    """Return the name of an activation that ``layernorm_ffn`` has, known by its values."""
    found = activation_name(layer)
    if found is None:
        raise Declined(f"activation {getattr(type(layer), '__name__', layer)} ({name})")
    return found


def exact_gelu(layer: Any, name: str) -> None:
    """Require that an activation is the exact GELU."""
    if (found := activation(layer, name)) != "gelu":
        raise Declined(f"activation {found} ({name})")


def is_idle(layer: Any) -> bool:
    """Whether a layer does nothing, but for dropout in training, which is watched."""
    return layer is None or kind_of(layer) in _IDLE


def layer_scale_vector(layer: Any) -> str | None:
    """Return the name of the parameter [C] of a LayerScale; None if it is none."""
    return _LAYER_SCALES.get(kind_of(layer))


def is_drop_path(layer: Any) -> bool:
    """Whether a layer is drop path whose factors ``drop_path_factors`` draws."""
    kind = kind_of(layer)
    return kind in _ROUNDED_DROP_PATHS or (kind in _DROP_PATHS and layer.scale_by_keep)


def drop_path_factors(layer: Any, x: Tensor) -> Tensor | None:
    """Return the factors [B] of a call's updates, the numbers that the layer would draw.

    Args:
        layer: timm's or transformers' drop path, or another layer or None for no factors.
        x: Tokens [B, N, C].
    """
    rate = getattr(layer, "drop_prob", None)
    if not rate or not layer.training:
        return None
    if kind_of(layer) not in _ROUNDED_DROP_PATHS:
        return drop_path_scale(x.shape[0], float(rate), True, like=x)
    keep = 1 - rate
    drawn = torch.rand((x.shape[0], 1, 1), dtype=x.dtype, device=x.device)
    return torch.floor(drawn + keep).flatten() / keep


def shape_of(layer: Any) -> tuple[int, ...]:
    """Return [out, in] of a Linear, without computing a parametrized weight."""
    weight = layer._parameters.get("weight")
    return (layer.out_features, layer.in_features) if weight is None else tuple(weight.shape)


def why_not_heads(attention: Any, num_heads: int, dim: int, path: str = "attn") -> str | None:
    """Return why attention is not h heads of C / h channels and the usual scale, or None."""
    if num_heads < 1 or dim % num_heads:
        return f"{path} has {num_heads} heads of {dim} channels in all"
    head_dim = dim // num_heads
    width = getattr(attention, "head_dim", head_dim)
    if width != head_dim:
        return f"{path} has head dim {width}, not {head_dim}"
    scale = getattr(attention, "scale", getattr(attention, "scaling", None))
    if scale is not None and abs(scale - head_dim**-0.5) > 1e-6 * head_dim**-0.5:
        return f"{path} has scale={scale}"
    return None


def implementation(owner: Any) -> Any:
    """Return the name of what computes attention in a layer of transformers, or None."""
    return getattr(getattr(owner, "config", None), "_attn_implementation", None)


def why_not_implementation(owner: Any) -> str | None:
    """Return why a layer of transformers computes something else without a mask, or None."""
    if (name := implementation(owner)) not in _IMPLEMENTATIONS:
        return f"attention is computed by {name!r}"
    return "causal" if getattr(owner, "is_causal", False) else None


def torch_attention(owner: nn.Module, name: str) -> Any:
    """Return an ``nn.MultiheadAttention`` with packed projections and no keys of its own."""
    layer = child(owner, name, "torch.nn.modules.activation.MultiheadAttention")
    if layer.in_proj_weight is None:
        raise Declined(f"{name} has keys or values of another width")
    if layer.bias_k is not None or layer.add_zero_attn:
        raise Declined(f"{name} adds keys of its own")
    if not layer.batch_first:
        raise Declined(f"{name} is not batch_first")
    linear(layer, "out_proj")
    return layer


def why_not_torch_attention(layer: Any, path: str) -> str | None:
    """Return what may change about an ``nn.MultiheadAttention``, or None."""
    if layer.dropout > 0 and layer.training:
        return f"{path} has dropout of {layer.dropout} in training"
    return why_not_heads(layer, layer.num_heads, layer.embed_dim, path)


def why_no_block_gain(norm: Any) -> str | None:
    """Return why a transformer block gains nothing where its parameters are, or None.

    On a CPU the gain is that of the extension's float32 products in forward, up to a width.

    Args:
        norm: The LayerNorm of one of its halves.
    """
    weight = norm.weight
    if weight.device.type != "cpu":
        return None
    reason = backends().reasons.get("cpu")
    if reason is None and norm.training:
        reason = "no known gain for blocks in training on a CPU"
    elif reason is None and weight.dtype != torch.float32:
        reason = f"no known gain for blocks in {weight.dtype} on a CPU"
    elif reason is None and weight.shape[0] > panels.widest():
        reason = f"no known gain for blocks wider than {panels.widest()} on this CPU"
    return reason and f"{reason} (example= measures)"


#: Rows of a call's tokens, by channels, from which torch's fast SiLU is slower.
_SILU_ROWS = 6


def block_pays(x: Tensor, found: Any) -> bool:
    """Whether a call of a half of a block on x [B, N, C] is known to be faster served.

    On a CPU the kernels repack the weights in every call, which takes at least C rows to pay.

    Args:
        x: Its tokens.
        found: What was found when it was inspected; ``activation`` is that of an MLP.
    """
    if x.device.type != "cpu":
        return True
    if torch.is_grad_enabled():
        return False
    rows = _SILU_ROWS if found.activation == "silu" else 1
    return torch.compiler.is_compiling() or x.numel() >= rows * x.shape[-1] ** 2


#: Elements of a call's tokens from which class attention gains on a CPU; overhead below.
_LEAST_TOKENS = 2**15


def class_attention_pays(x: Tensor, found: Any) -> bool:
    """Whether a call of class attention on x [B, N, C] is known to be faster served."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    return x.numel() >= _LEAST_TOKENS


def require_kernels(operation: str, inputs: Any, backend: str | None = None) -> None:
    """Require that a backend besides the reference can run a sample of the calls.

    Args:
        operation: Its name.
        inputs: The sample.
        backend: The backend that calls name, or None. Where it has no kernels for the sample's
            device, others are asked: the model may be moved. What it takes on no device
            (``why_never`` of its module) is declined all the same.
    """
    op = OPERATIONS[operation]
    device = op.tokens(inputs).device
    if device.type not in ("cpu", "cuda"):
        raise Declined(f"there are no kernels for {device.type}")
    usable, reasons = backends(), []
    names = order(operation, device)[: 1 if device.type == "cpu" else None]
    if backend in op.backends and _device_of(backend) == device.type:
        names = (backend,)
    elif reason := _why_never(op.backends.get(backend or ""), inputs):
        raise Declined(f"no kernels: {backend}: {reason}")
    for name in names:
        reason = usable.reasons.get(name)
        if reason is None and name in op.backends:
            reason = op.backends[name].why_not(inputs)
        if reason is None:
            return
        reasons.append(f"{name}: {reason}")
    raise Declined("no kernels: " + "; ".join(reasons))


def _why_never(kernels: Any, inputs: Any) -> str | None:
    why: Any = getattr(kernels, "why_never", None)
    reason: str | None = None if why is None else why(inputs)
    return reason


def _device_of(backend: str) -> str:
    """Return the type of the devices that a backend's kernels run on."""
    if backend == "cpu":
        return "cpu"
    kernels = extension.cuda_kernels
    return kernels.device_type if backend == "cuda" and kernels is not None else "cuda"


def require_pool(weight: Tensor, num_queries: int, num_heads: int) -> None:
    """Require kernels for attention_pool, and few enough queries that keys are dearer.

    Args:
        weight: Of the keys, [D, C].
        num_queries: Q.
        num_heads: h.
    """
    inner, channels = weight.shape
    if inner % num_heads:
        raise Declined(f"{num_heads} heads of {inner} channels in all")
    if keys_are_cheaper(num_queries, inner // num_heads, weight.device):
        raise Declined(
            f"{num_queries} queries of head dim {inner // num_heads}: keys and values are cheaper"
        )
    sample = weight.new_empty(1, num_queries * num_heads, channels)
    require_kernels(CORE.name, CoreInputs(sample, sample[:, :1], None, None))

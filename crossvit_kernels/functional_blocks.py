"""The public functions of transformer blocks, which ``functional`` has among the others."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from crossvit_kernels import checks
from crossvit_kernels.ops.common.activations import NAMES as ACTIVATIONS
from crossvit_kernels.ops.layernorm_ffn.op import layernorm_ffn as ffn
from crossvit_kernels.ops.layernorm_ffn.reference import OPTIONAL as FFN_OPTIONAL
from crossvit_kernels.ops.layernorm_ffn.reference import SHAPES as FFN_SHAPES
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs, FfnWeights
from crossvit_kernels.ops.layernorm_msa.op import layernorm_msa as msa
from crossvit_kernels.ops.layernorm_msa.reference import OPTIONAL as MSA_OPTIONAL
from crossvit_kernels.ops.layernorm_msa.reference import SHAPES as MSA_SHAPES
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs, MsaWeights

#: Choices of what forward keeps for backward.
KEEP = ("fast", "lean")


def layernorm_msa(
    x: Tensor,
    weights: MsaWeights,
    num_heads: int,
    eps: float = 1e-6,
    residual_scale: Tensor | None = None,
    cls: Tensor | None = None,
    dropout_p: float = 0.0,
    keep: str = "fast",
    backend: str | None = None,
    layer_scale: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """``x + residual_scale * layer_scale * MSA(LN(x))``: the first half of a transformer block.

    Args:
        x: Tokens [B, N, C], any strides with unit last.
        weights: ``MsaWeights``; biases may be None.
        num_heads: h; divides C.
        eps: LayerNorm's.
        residual_scale: [B]: factor of each image's update (drop path), or None.
        cls: [B, C]: replaces row 0 of x, so that a fused CLS needs no copy of the tokens.
        dropout_p: Attention dropout; above 0 the reference runs.
        keep: What is kept for backward besides x, on a GPU: "fast" keeps q, k, v and attention's
            output (4 B N C elements), "lean" only statistics, and recomputes the rest.
        backend: Name of a backend, or None.
        layer_scale: [C]: factor of each channel of the update (CaiT's LayerScale), or None.
        key_mask: bool [B, N], True where a token, or the cls in place of row 0, is attended to. All
            tokens are queries. If an image's mask is all False, its heads are 0 and the update is
            the last bias.

    Returns:
        y [B, N, C].

    Raises:
        ValueError: A shape, stride, device, eps, head count or keep does not fit, or the backend
            cannot run the call.
        TypeError: A dtype does not fit, or weights is not an MsaWeights.

    Source: CrossViT (ICCV 2021), Eq. 1.
    """
    checks.tensor("x", x, "B", "N", "C")
    batch, num_tokens, channels = x.shape
    checks.some_channels("x", x)
    checks.unit_stride("x", x)
    checks.optional_tensor("cls", cls, batch, channels)
    if cls is not None and num_tokens == 0:
        raise ValueError("cls: x has no row 0 that it could stand in for")
    sizes = {"C": channels, "3 C": 3 * channels}
    checks.weights(weights, MsaWeights, MSA_SHAPES, sizes, x, MSA_OPTIONAL)
    checks.same_device_and_dtype("x", x, cls=cls)
    checks.heads(num_heads, C=channels)
    checks.eps("eps", eps)
    checks.probability("dropout_p", dropout_p)
    checks.residual_scale(residual_scale, batch, x.device)
    checks.one_of("keep", keep, KEEP)
    checks.layer_scale(layer_scale, x)
    checks.key_mask(key_mask, x)
    inputs = MsaInputs(x, weights, num_heads, residual_scale, cls, layer_scale, key_mask)
    return cast(Tensor, msa(inputs, eps, keep=keep, dropout_p=dropout_p, backend=backend))


def layernorm_ffn(
    x: Tensor,
    weights: FfnWeights,
    eps: float = 1e-6,
    residual_scale: Tensor | None = None,
    backend: str | None = None,
    activation: str = "gelu",
    layer_scale: Tensor | None = None,
    keep: str = "fast",
) -> Tensor:
    """``x + residual_scale * layer_scale * FFN(LN(x))``, FFN = Linear, activation, Linear.

    Args:
        x: Tokens [B, N, C], any strides with unit last.
        weights: ``FfnWeights``, with any number F of hidden units; biases may be None.
        eps: LayerNorm's.
        residual_scale: [B]: factor of each image's update (drop path), or None.
        backend: Name of a backend, or None.
        activation: "gelu" (exact), "gelu_tanh" (its approximation), "quick_gelu" (CLIP's
            ``x sigmoid(1.702 x)``) or "silu".
        layer_scale: As in ``layernorm_msa``.
        keep: What Triton's kernels keep for backward besides x: "fast" keeps the hidden units
            before the activation (B N F elements) in float32, and for more than 256
            channels; "lean" keeps only statistics, and computes the rest again.

    Returns:
        y [B, N, C].

    Raises:
        ValueError: A shape, stride, device, eps, activation or keep does not fit, or the backend
            cannot run the call.
        TypeError: A dtype does not fit, or weights is not an FfnWeights.

    Source: CrossViT (ICCV 2021), Eq. 1.
    """
    checks.tensor("x", x, "B", "N", "C")
    checks.some_channels("x", x)
    checks.unit_stride("x", x)
    fc1 = getattr(weights, "fc1_weight", None)
    hidden = fc1.shape[0] if isinstance(fc1, Tensor) and fc1.dim() == 2 else 0
    sizes = {"C": x.shape[2], "F": hidden}
    checks.weights(weights, FfnWeights, FFN_SHAPES, sizes, x, FFN_OPTIONAL)
    checks.eps("eps", eps)
    checks.residual_scale(residual_scale, x.shape[0], x.device)
    checks.one_of("activation", activation, ACTIVATIONS)
    checks.one_of("keep", keep, KEEP)
    checks.layer_scale(layer_scale, x)
    inputs = FfnInputs(x, weights, residual_scale, activation, layer_scale)
    return cast(Tensor, ffn(inputs, eps, keep=keep, backend=backend))

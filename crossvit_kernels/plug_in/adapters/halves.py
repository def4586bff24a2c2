"""The two halves of a transformer block, as the blocks of several libraries have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from crossvit_kernels.modules import plain_layers
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs, FfnWeights
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs, MsaWeights
from crossvit_kernels.plug_in import looking
from crossvit_kernels.plug_in.recipe import Declined, Part, never


def msa_part(
    reads: tuple[str, ...],
    check: Callable[[Any], None],
    weights: Callable[[Any], MsaWeights],
    heads: Callable[[Any], int],
    live: Callable[[Any], str | None],
) -> Part:
    """Return the part ``x + MSA(LN(x))`` of a block.

    Args:
        reads: Names of its children.
        check: Raises ``Declined``; weights need not exist yet.
        weights: Returns the block's weights.
        heads: Returns h.
        live: See ``Part``.
    """

    def inspect(block: Any) -> None:
        check(block)
        if reason := live(block):
            raise Declined(reason)
        with torch.no_grad():
            w = weights(block)
        channels = w.norm_weight.shape[0]
        if w.qkv_weight.shape != (3 * channels, channels):
            raise Declined(f"attention projects to {w.qkv_weight.shape[0]} features")
        if w.out_weight.shape != (channels, channels):
            raise Declined("attention has another width inside or after")
        _require_tensors(w)
        sample = w.norm_weight.new_empty(1, 2, channels)
        looking.require_kernels("layernorm_msa", MsaInputs(sample, w, heads(block), None, None))

    def fast(block: Any) -> str | None:
        return looking.why_no_block_gain(block._modules[reads[0]])

    return Part("layernorm_msa", reads, inspect, live, fast, looking.block_pays)


def ffn_part(
    reads: tuple[str, ...],
    check: Callable[[Any], None],
    weights: Callable[[Any], FfnWeights],
    live: Callable[[Any], str | None] = never,
) -> Part:
    """Return the part ``x + FFN(LN(x))`` of a block; see ``msa_part``."""

    def inspect(block: Any) -> None:
        check(block)
        with torch.no_grad():
            w = weights(block)
        channels = w.norm_weight.shape[0]
        if w.fc1_weight.shape[1] != channels or w.fc2_weight.shape[0] != channels:
            raise Declined("the MLP has another width before or after")
        _require_tensors(w)
        sample = w.norm_weight.new_empty(1, 2, channels)
        looking.require_kernels("layernorm_ffn", FfnInputs(sample, w, None))

    def fast(block: Any) -> str | None:
        return looking.why_no_block_gain(block._modules[reads[0]])

    return Part("layernorm_ffn", reads, inspect, live, fast, looking.block_pays)


def _require_tensors(weights: Any) -> None:
    if reason := plain_layers.why_not_tensors(weights):
        raise Declined(reason)


def packed(*layers: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight [3 C, C] and bias [3 C] of the projections of q, k and v."""
    weight = torch.cat([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers]
    if all(b is None for b in biases):
        return weight, None
    present = [
        w.weight.new_zeros(w.weight.shape[0]) if b is None else b
        for w, b in zip(layers, biases, strict=True)
    ]
    return weight, torch.cat(present)


def why_not_projections(attention: Any, dim: int, *names: str) -> str | None:
    """Return why projections are not [C, C] (their heads were pruned), or None."""
    for name in names:
        shape = looking.shape_of(attention._modules[name])
        if shape != (dim, dim):
            return f"{name} has the shape {list(shape)} and not {[dim, dim]}"
    return None

"""Declares the operation masked_mean."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from crossvit_kernels.ops.flops import Flops
from crossvit_kernels.ops.operator import Operation
from masked_mean import cpu, reference
from masked_mean.reference import MaskedMeanInputs


def _reference(inputs: MaskedMeanInputs, eps: float | None, dropout_p: float) -> Tensor:
    return reference.masked_mean(*inputs)


def _empty_outputs(inputs: MaskedMeanInputs) -> tuple[Tensor]:
    batch, _, channels = inputs.x.shape
    return (inputs.x.new_empty(batch, channels),)


def _flops(shapes: Any, wanted: Any = None) -> int:
    batch, num_tokens, channels = shapes.x
    return int(2 * batch * num_tokens * channels)


masked_mean = Operation(
    "masked_mean",
    MaskedMeanInputs,
    {"cpu": cpu},
    _reference,
    _empty_outputs,
    Flops(_flops, _flops),
)

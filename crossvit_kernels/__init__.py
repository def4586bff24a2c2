"""Fused kernels for CrossViT: single-query cross-attention and transformer blocks."""

from typing import TYPE_CHECKING, Any

from crossvit_kernels.backends import backends, use_backend
from crossvit_kernels.calibration.calibrate import calibrate
from crossvit_kernels.calibration.store import batch_invariant
from crossvit_kernels.calibration.whole_model import use_calibrated_threads
from crossvit_kernels.functional import (
    attention_core,
    attention_pool,
    cross_attention_fusion,
    cross_attention_fusion_pair,
    layernorm_ffn,
    layernorm_msa,
)
from crossvit_kernels.graphs import make_graphed
from crossvit_kernels.ops.cross_attention.reference import FusionInputs, FusionWeights
from crossvit_kernels.ops.layernorm_ffn.reference import FfnWeights
from crossvit_kernels.ops.layernorm_msa.reference import MsaWeights
from crossvit_kernels.verify.state import verification

if TYPE_CHECKING:
    from crossvit_kernels.plug_in import accelerate, register_adapter, restore

__version__ = "0.1.0"

__all__ = [
    "FfnWeights",
    "FusionInputs",
    "FusionWeights",
    "MsaWeights",
    "accelerate",
    "attention_core",
    "attention_pool",
    "backends",
    "batch_invariant",
    "calibrate",
    "cross_attention_fusion",
    "cross_attention_fusion_pair",
    "layernorm_ffn",
    "layernorm_msa",
    "make_graphed",
    "register_adapter",
    "restore",
    "use_backend",
    "use_calibrated_threads",
    "verification",
]


def __getattr__(name: str) -> Any:
    """Import what few programs need when it is first used."""
    if name not in ("accelerate", "register_adapter", "restore"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from crossvit_kernels import plug_in

    return getattr(plug_in, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

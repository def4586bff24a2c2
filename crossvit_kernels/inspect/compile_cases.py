"""Every specialization of the operations' Triton kernels, recorded on tensors without memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch

from crossvit_kernels.inspect import ahead_of_time
from crossvit_kernels.inspect.ahead_of_time import CompileCase, Dtypes, empty, empty_weights
from crossvit_kernels.ops.attention_core.configs import TokenPass
from crossvit_kernels.ops.attention_core.op import OPERATION as CORE
from crossvit_kernels.ops.attention_core.reference import CoreInputs
from crossvit_kernels.ops.common import configs
from crossvit_kernels.ops.common.activations import ACTIVATIONS
from crossvit_kernels.ops.cross_attention.op import cross_attention_fusion
from crossvit_kernels.ops.cross_attention.reference import SHAPES as FUSION_SHAPES
from crossvit_kernels.ops.cross_attention.reference import FusionInputs, FusionWeights
from crossvit_kernels.ops.layernorm_ffn.op import layernorm_ffn
from crossvit_kernels.ops.layernorm_ffn.reference import SHAPES as FFN_SHAPES
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs, FfnWeights
from crossvit_kernels.ops.layernorm_msa.op import layernorm_msa
from crossvit_kernels.ops.layernorm_msa.reference import SHAPES as MSA_SHAPES
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs, MsaWeights
from crossvit_kernels.ops.operator import Operation

#: (C_cls, C, heads) of all fusions of the named models: Ti, S, B, 9, 15, 18.
WIDTHS = tuple(
    (cls_dim, channels, heads)
    for small, heads in ((96, 3), (192, 6), (384, 12), (128, 4), (224, 7))
    for cls_dim, channels in ((small, 2 * small), (2 * small, small))
)
#: (C, heads, hidden units) of all their transformer blocks.
BLOCKS = tuple(
    (channels, heads, ratio * channels)
    for channels, heads, ratio in (
        *((96, 3, 4), (192, 3, 4)),
        *((192, 6, 4), (384, 6, 4), (192, 6, 3), (384, 6, 3)),
        *((384, 12, 4), (768, 12, 4)),
        *((128, 4, 3), (256, 4, 3)),
        *((224, 7, 3), (448, 7, 3)),
    )
)

#: What a fusion may lack: f, g or both; "" for neither.
IDENTITIES = ("", "f", "g", "fg")
#: What CrossViT's blocks do without; "" is what they have.
OPTIONS = ("", "gelu_tanh", "quick_gelu", "silu", "layer_scale", "key_mask", "no_bias")

_EPS = 1e-6
#: Batches for one kernel, and for three with the fewest and the most images per program.
_BATCHES = (1, 65, 1024)


def compile_cases(
    sm: int,
    dtypes: Sequence[str],
    widths: Sequence[tuple[int, int, int]] = WIDTHS,
    blocks: Sequence[tuple[int, int, int]] = BLOCKS,
    variants: Sequence[str] = configs.VARIANTS.names,
    identities: Sequence[str] = ("",),
    options: Sequence[str] = ("",),
) -> list[CompileCase]:
    """Return every specialization that is launched for tokens of these dtypes and widths.

    Args:
        sm: Compute capability, 90 for 9.0.
        dtypes: Names in ahead_of_time.DTYPES.
        widths: (C_cls, C, heads) of fusions.
        blocks: (C, heads, hidden units) of transformer blocks.
        variants: Variants of blocks: names in configs.VARIANTS.
        identities: What fusions lack, of IDENTITIES.
        options: What blocks have besides, of OPTIONS.
    """

    def runs() -> Iterator[Callable[[], object]]:
        for name in dtypes:
            dtype = ahead_of_time.DTYPES[name]
            for channels, heads in sorted({(c, h) for _, c, h in widths}):
                yield functools.partial(_core, dtype.tokens, channels, heads)
            for cls_dim, channels, heads in widths:
                for lacking in identities:
                    yield functools.partial(_fusion, dtype, cls_dim, channels, heads, lacking)
            for channels, heads in sorted({(c, h) for c, h, _ in blocks}):
                for option in options:
                    if option not in ACTIVATIONS:
                        run = functools.partial(_msa, dtype, channels, heads, option)
                        yield from in_variants(run)
            for channels, hidden in sorted({(c, f) for c, _, f in blocks}):
                for option in options:
                    yield from in_variants(functools.partial(_ffn, dtype, channels, hidden, option))

    def in_variants(run: Callable[[], object]) -> Iterator[Callable[[], object]]:
        for variant in variants:
            yield functools.partial(_in_variant, variant, run)

    return ahead_of_time.recorded(sm, runs())


def extremes(cases: Sequence[CompileCase]) -> list[CompileCase]:
    """Keep those with most and fewest tensors of the cases that differ only in these."""
    alike: dict[Hashable, list[CompileCase]] = {}
    for case in cases:
        specialization = case.specialization
        alike.setdefault(
            (case.name, specialization.candidates, specialization.constants), []
        ).append(case)
    return [
        case
        for group in alike.values()
        for index, case in enumerate(sorted(group, key=lambda s: len(s.absent)))
        if index in (0, len(group) - 1)
    ]


def _in_variant(variant: str, run: Callable[[], object]) -> None:
    with configs.VARIANTS.choose(variant):
        run()


def _core(dtype: torch.dtype, channels: int, num_queries: int) -> None:
    """Run forward and backward over tokens [1, N, C].

    With LayerNorm in all combinations; without it, with and without a mask; and a split image.
    """
    x, many = (empty((1, n, channels), dtype) for n in (16, TokenPass.split_size + 1))
    u, mask = empty((1, num_queries, channels), torch.float32), empty((1, 16), torch.bool)
    for extra in (None, x[:, 0]):
        for key_mask in (None, mask):
            both_ways(CORE, CoreInputs(u, x, key_mask, extra), _EPS, frozen="x")
    for key_mask in (None, mask):
        both_ways(CORE, CoreInputs(u, x, key_mask, None), None, frozen="x")
    both_ways(CORE, CoreInputs(u, many, None, None), _EPS, frozen="x")


def _fusion(dtypes: Dtypes, cls_dim: int, channels: int, heads: int, lacking: str) -> None:
    """Run with and without drop path, the latter also without the tokens' gradient."""
    weights = _weights(FusionWeights, FUSION_SHAPES, {"C_cls": cls_dim, "C": channels}, dtypes)
    absent = tuple({"f": "proj_", "g": "back_"}[layer] for layer in lacking)
    weights = weights._replace(**{n: None for n in weights._fields if n.startswith(absent)})
    own = channels if "f" in lacking else cls_dim
    for batch in _BATCHES:
        cls = empty((batch, own), dtypes.tokens)
        x = empty((batch, 16, channels), dtypes.tokens)
        for scale in (None, cls.new_empty(batch)):
            inputs = FusionInputs(cls, x, weights, heads, scale)
            both_ways(
                cross_attention_fusion, inputs, _EPS, frozen="tokens" if scale is None else ""
            )


def _msa(dtypes: Dtypes, channels: int, heads: int, option: str) -> None:
    """Run inference, and training with and without drop path."""
    weights = _weights(MsaWeights, MSA_SHAPES, {"C": channels}, dtypes)
    for num_rows in (16, configs.FEW_ROWS + 1):
        x = empty((1, num_rows, channels), dtypes.tokens)
        for cls in (None, x[:, 0]):
            inputs = MsaInputs(x, weights, heads, None, cls)
            if option == "layer_scale":
                inputs = inputs._replace(layer_scale=x.new_empty(channels))
            elif option == "no_bias":
                inputs = inputs._replace(weights=_without_biases(weights))
            elif option == "key_mask":
                inputs = inputs._replace(key_mask=empty((1, num_rows), torch.bool))
            both_ways(layernorm_msa, inputs, _EPS, "")
            for keep in ("fast", "lean"):
                for scale in (None, x.new_empty(1)):
                    inputs = inputs._replace(residual_scale=scale)
                    both_ways(layernorm_msa, inputs, _EPS, keep)


def _ffn(dtypes: Dtypes, channels: int, hidden: int, option: str) -> None:
    """Run inference, and training with and without drop path."""
    weights = _weights(FfnWeights, FFN_SHAPES, {"C": channels, "F": hidden}, dtypes)
    for num_rows in (16, configs.FEW_ROWS + 1):
        x = empty((1, num_rows, channels), dtypes.tokens)
        inputs = FfnInputs(x, weights, None)
        if option in ACTIVATIONS:
            inputs = inputs._replace(activation=option)
        elif option == "layer_scale":
            inputs = inputs._replace(layer_scale=x.new_empty(channels))
        elif option == "no_bias":
            inputs = inputs._replace(weights=_without_biases(weights))
        both_ways(layernorm_ffn, inputs, _EPS, "")
        for keep in ("fast", "lean"):
            for scale in (None, x.new_empty(1)):
                both_ways(layernorm_ffn, inputs._replace(residual_scale=scale), _EPS, keep)


def both_ways(
    operation: Operation, inputs: Any, eps: float | None, keep: str = "fast", frozen: str = ""
) -> None:
    """Run Triton forward and, unless keep is "", backward, bypassing autograd and dispatch.

    Args:
        operation: The operation.
        inputs: Its inputs.
        eps: LayerNorm's.
        keep: What forward keeps; "" for no backward.
        frozen: A field; if given, backward also runs without its gradient.
    """
    triton = operation.backends["triton"]
    outputs, saved = triton.forward(inputs, eps, keep)
    if not keep:
        return
    douts = outputs if isinstance(outputs, tuple) else (outputs,)
    saved = saved or triton.Saved(*douts)
    wanted = operation.inputs([t is not None for t in operation.flat(inputs)])
    triton.backward(douts, inputs, saved, eps, wanted)
    if frozen:
        triton.backward(douts, inputs, saved, eps, wanted._replace(**{frozen: False}))


def _without_biases(weights: Any) -> Any:
    return weights._replace(**{n: None for n in weights._fields if n.endswith("_bias")})


def _weights(
    kind: Any, shapes: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int], dtypes: Dtypes
) -> Any:
    return kind(*empty_weights(shapes, sizes, dtypes))

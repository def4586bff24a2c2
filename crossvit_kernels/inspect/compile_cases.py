"""Every way in which operations launch their Triton kernels, on tensors without memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor

from crossvit_kernels.gpu import configurations, row_tiles
from crossvit_kernels.inspect import ahead_of_time
from crossvit_kernels.inspect.ahead_of_time import CompileCase, Dtypes, empty, empty_weights
from crossvit_kernels.ops.attention_core import triton as core
from crossvit_kernels.ops.cross_attention import reference as fusion_reference
from crossvit_kernels.ops.cross_attention import triton as fusion
from crossvit_kernels.ops.cross_attention.reference import FusionInputs, FusionWeights
from crossvit_kernels.ops.layernorm_ffn import reference as ffn_reference
from crossvit_kernels.ops.layernorm_ffn import triton as ffn
from crossvit_kernels.ops.layernorm_ffn.reference import FfnWeights
from crossvit_kernels.ops.layernorm_msa import reference as msa_reference
from crossvit_kernels.ops.layernorm_msa import triton as msa
from crossvit_kernels.ops.layernorm_msa.reference import MsaWeights

#: (C_own, C, heads) of all fusions of the named models: Ti, S, B, 9, 15, 18.
WIDTHS = tuple(
    (own, channels, heads)
    for small, heads in ((96, 3), (192, 6), (384, 12), (128, 4), (224, 7))
    for own, channels in ((small, 2 * small), (2 * small, small))
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

_EPS = 1e-6
#: Images that one kernel does; that three do, with as few and as many to a program as there are.
_BATCHES = (1, 65, 1024)


def compile_cases(
    chip: int,
    dtypes: Sequence[str],
    widths: Sequence[tuple[int, int, int]] = WIDTHS,
    blocks: Sequence[tuple[int, int, int]] = BLOCKS,
    forms: Sequence[str] = row_tiles.FORMS.names,
) -> list[CompileCase]:
    """Every form in which kernels are launched, for tokens of these dtypes and widths.

    Args:
        chip: Compute capability, 90 for 9.0.
        dtypes: Names in ahead_of_time.DTYPES.
        widths: (C_own, C, heads) of fusions.
        blocks: (C, heads, hidden units) of transformer blocks.
        forms: Of blocks: the names in row_tiles.FORMS.
    """

    def runs() -> Iterator[Callable[[], object]]:
        for name in dtypes:
            dtype = ahead_of_time.DTYPES[name]
            for channels, heads in sorted({(c, h) for _, c, h in widths}):
                yield functools.partial(_core, dtype.tokens, channels, heads)
            for own, channels, heads in widths:
                yield functools.partial(_fusion, dtype, own, channels, heads)
                if own < channels and (channels, own, heads) in widths:
                    yield functools.partial(_fusion_pair, dtype, own, channels, heads)
            for channels, heads in sorted({(c, h) for c, h, _ in blocks}):
                yield from in_forms(functools.partial(_msa, dtype, channels, heads))
            for channels, hidden in sorted({(c, f) for c, _, f in blocks}):
                yield from in_forms(functools.partial(_ffn, dtype, channels, hidden))

    def in_forms(run: Callable[[], object]) -> Iterator[Callable[[], object]]:
        for form in forms:
            yield functools.partial(_in_form, form, run)

    return ahead_of_time.recorded(chip, runs())


def extremes(found: Sequence[CompileCase]) -> list[CompileCase]:
    """Of a kernel's forms that differ in which tensors there are, those with most and fewest."""
    alike: dict[Hashable, list[CompileCase]] = {}
    for case in found:
        form = case.form
        alike.setdefault((case.name, form.candidates, form.constants), []).append(case)
    return [
        case
        for group in alike.values()
        for index, case in enumerate(sorted(group, key=lambda s: len(s.absent)))
        if index in (0, len(group) - 1)
    ]


def _in_form(form: str, run: Callable[[], object]) -> None:
    with row_tiles.FORMS.choose(form):
        run()


def _core(dtype: torch.dtype, channels: int, num_rows: int) -> None:
    """Forward and backward, over tokens [1, N, C] on the meta device.

    With LayerNorm in all forms; without it with and without a mask; and over an image's parts.
    """
    x, many = (empty((1, n, channels), dtype) for n in (16, configurations.TokenPass.part + 1))
    u = empty((1, num_rows, channels), torch.float32)
    mask = empty((1, 16), torch.bool)
    for extra in (None, x[:, 0]):
        for key_mask in (None, mask):
            _core_both_ways(u, x, key_mask, extra, _EPS)
    for key_mask in (None, mask):
        _core_both_ways(u, x, key_mask, None, None)
    m, lse = core.forward(u, many, None, None, _EPS)
    core.backward(m, None, u, many, None, None, m, lse, _EPS)


def _core_both_ways(
    u: Tensor, x: Tensor, key_mask: Tensor | None, extra: Tensor | None, eps: float | None
) -> None:
    m, lse = core.forward(u, x, key_mask, extra, eps)
    for wants_dx in (True, False):
        core.backward(m, lse, u, x, key_mask, extra, m, lse, eps, wants_dx)


def _fusion(dtypes: Dtypes, own: int, channels: int, heads: int) -> None:
    """Forward and backward of tensors on the meta device, with drop path and without; backward also
    without the tokens' gradient.
    """
    for batch in _BATCHES:
        cls, x, w, *_ = _fusion_inputs(batch, dtypes, own, channels, heads)
        for scale in (None, cls.new_empty(batch)):
            new_cls, saved = fusion.forward(cls, x, w, scale, heads, _EPS)
            for wants_tokens in (True, False) if scale is None else (True,):
                wanted = [True, wants_tokens, *[True] * len(w)]
                fusion.backward(new_cls, cls, x, w, scale, saved, heads, _EPS, wanted)


def _fusion_pair(dtypes: Dtypes, own: int, channels: int, heads: int) -> None:
    """Both fusions of a block, which inference does in one launch."""
    widths = (own, channels), (channels, own)
    a, b = (_fusion_inputs(1, dtypes, *of_one, heads) for of_one in widths)
    fusion.forward_pair(a, b, _EPS)


def _fusion_inputs(batch: int, dtypes: Dtypes, own: int, channels: int, heads: int) -> FusionInputs:
    weights = empty_weights(fusion_reference.SHAPES, {"C_own": own, "C": channels}, dtypes)
    cls, x = empty((batch, own), dtypes.tokens), empty((batch, 16, channels), dtypes.tokens)
    return FusionInputs(cls, x, FusionWeights(*weights), heads)


def _msa(dtypes: Dtypes, channels: int, heads: int) -> None:
    """Inference, and training with drop path and without; of tensors on the meta device."""
    w = MsaWeights(*empty_weights(msa_reference.SHAPES, {"C": channels}, dtypes))
    for num_rows in (16, row_tiles.FEW_ROWS + 1):
        x = empty((1, num_rows, channels), dtypes.tokens)
        for cls in (None, x[:, 0]):
            msa.forward(x, w, None, cls, heads, _EPS, keep="")
            for keep in ("fast", "lean"):
                for scale in (None, x.new_empty(1)):
                    y, saved = msa.forward(x, w, scale, cls, heads, _EPS, keep)
                    assert saved is not None
                    msa.backward(y, x, w, scale, cls, saved, heads, _EPS, [True] * (2 + len(w)))


def _ffn(dtypes: Dtypes, channels: int, hidden: int) -> None:
    """Inference, and training with drop path and without; of tensors on the meta device."""
    w = FfnWeights(*empty_weights(ffn_reference.SHAPES, {"C": channels, "F": hidden}, dtypes))
    for num_rows in (16, row_tiles.FEW_ROWS + 1):
        x = empty((1, num_rows, channels), dtypes.tokens)
        ffn.forward(x, w, None, _EPS, save=False)
        for scale in (None, x.new_empty(1)):
            y, saved = ffn.forward(x, w, scale, _EPS, save=True)
            assert saved is not None
            ffn.backward(y, x, w, scale, saved, _EPS, [True] * (1 + len(w)))

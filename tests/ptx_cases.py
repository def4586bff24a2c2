"""The operations' forms that run from their PTX on a CPU, and where the slow tests run which."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import accuracy
import block_cases
import core_cases
import fusion_cases
import numpy as np
import ptx
import ptx_cuda
import ptx_gluon
import torch
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels.ops.attention_core import configs as core_configs
from crossvit_kernels.ops.attention_core import triton as core_triton
from crossvit_kernels.ops.common import configs
from crossvit_kernels.ops.cross_attention import configs as fusion_configs
from crossvit_kernels.ops.cross_attention.configs import Fusion
from crossvit_kernels.ops.layernorm_ffn import configs as ffn_configs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Factor of all widths.
scale = 1

#: Checks an operation with tokens of a dtype on a backend.
Check = Callable[[torch.dtype, str], None]
#: Makes a context: a choice that the backend would make by sizes.
Choice = Callable[[], contextlib.AbstractContextManager[Any]]


class Case(NamedTuple):
    """A form of an operation.

    Attributes:
        check: Runs it under the accuracy rule.
        slow: Where slow tests run it: "80 fp32 90 bf16" is on sm_80 in float32, and so on.
    """

    check: Check
    slow: str

    @property
    def runs(self) -> list[tuple[int, str]]:
        """Architectures and dtypes of the slow tests."""
        words = self.slow.split()
        return [(int(sm), dtype) for sm, dtype in zip(words[::2], words[1::2], strict=True)]


def _judge_all(
    function: Callable[[str, torch.dtype], Tensor], dtype: torch.dtype, backend: str, name: str
) -> None:
    """Judge a function of backend and dtype by the rule, in the cases' module, as they do."""
    eager = function("reference", accuracy.eager_dtype(dtype))
    exact = function("reference", torch.float64)
    block_cases.assert_within_rule(function(backend, dtype), eager, exact, name)


def _when(check: Check, *choices: Choice) -> Check:
    def run(dtype: torch.dtype, backend: str) -> None:
        with contextlib.ExitStack() as stack:
            for choice in choices:
                stack.enter_context(choice())
            check(dtype, backend)

    return run


def _variant(name: str) -> Choice:
    """One of Triton's ways to launch a block."""
    return lambda: configs.VARIANTS.choose(name)


def _many_rows() -> Any:
    """Configurations for many rows of tokens."""
    return mock.patch.object(configs, "FEW_ROWS", 4)


def _norm_apart() -> Any:
    """LayerNorm in a kernel before the product's, as with many wide rows."""
    return mock.patch.object(configs.NORM_LINEAR, "_apart_from", 8)


def _runs_of_tiles() -> Any:
    """Programs of LayerNorm's backward that go through several tiles, as with many rows."""
    return mock.patch.object(configs, "NORM_BACKWARD_PROGRAMS", 2)


def _kept() -> Any:
    """Hidden units that forward keeps, as of wide networks."""
    return mock.patch.object(ffn_configs, "keeps_hidden", lambda *_: True)


def _in_three() -> Any:
    return fusion_configs.VARIANTS.choose("three")


def _shared_programs() -> Any:
    """Programs that several images share, as in large batches."""
    return mock.patch.object(fusion_configs, "fusion", lambda *_: Fusion(programs=1))


def _splits() -> Any:
    """Tokens that several programs share, as of images of more than 1024."""
    return mock.patch.object(
        core_triton, "candidates", lambda *args: core_configs.candidates(*args[:4], 32)
    )


def _core(
    rows: int = 3,
    tokens: int = 19,
    channels: int = 32,
    eps: float | None = 1e-6,
    **options: Any,
) -> Check:
    def run(dtype: torch.dtype, backend: str) -> None:
        inputs, mask = core_cases.make(1, tokens, rows, channels * scale, dtype, **options)
        core_cases.check_rule(inputs, mask, dtype, norm_eps=eps, backend=backend)

    return run


def _core_frozen(dtype: torch.dtype, backend: str) -> None:
    """Of the results and gradients, only m and that of the queries."""
    (u, x, _), _ = core_cases.make(1, 19, 3, 32 * scale, dtype)
    assert u is not None and x is not None

    def gradient(backend: str, as_dtype: torch.dtype) -> Tensor:
        leaf = u.to(as_dtype).requires_grad_()
        m, _ = ck.attention_core(leaf, x.to(as_dtype), backend=backend)
        (du,) = torch.autograd.grad(m.square().sum(), leaf)
        return du

    _judge_all(gradient, dtype, backend, "du")


def _fusion(batch: int = 2, **options: Any) -> Check:
    def run(dtype: torch.dtype, backend: str) -> None:
        sizes = 16 * scale, 32 * scale, 2, batch, 9
        fusion_cases.check_rule(*sizes, dtype, backend=backend, **options)

    return run


def _fusion_frozen(dtype: torch.dtype, backend: str) -> None:
    """Of the gradients, only the CLS's."""
    weights = fusion_cases.make_weights(16 * scale, 32 * scale)
    cls, tokens = (
        torch.randn(shape, dtype=torch.float64, device="cpu").to(dtype)
        for shape in ((2, 16 * scale), (2, 9, 32 * scale))
    )

    def gradient(backend: str, as_dtype: torch.dtype) -> Tensor:
        leaf, w = cls.to(as_dtype).requires_grad_(), (t.to(dtype).to(as_dtype) for t in weights)
        options: Any = {"num_heads": 2, "backend": backend}
        y = ck.cross_attention_fusion(leaf, tokens.to(as_dtype), ck.FusionWeights(*w), **options)
        (dcls,) = torch.autograd.grad(y.square().sum(), leaf)
        return dcls

    _judge_all(gradient, dtype, backend, "dcls")


def _msa(
    channels: int = 64, heads: int = 2, tokens: int = 21, batch: int = 1, **options: Any
) -> Check:
    def run(dtype: torch.dtype, backend: str) -> None:
        sizes = channels * scale, heads * scale, batch, tokens
        block_cases.check_msa(*sizes, dtype=dtype, backend=backend, **options)

    return run


def _ffn(tokens: int = 21, hidden: int = 128, batch: int = 1, **options: Any) -> Check:
    def run(dtype: torch.dtype, backend: str) -> None:
        sizes = 64 * scale, hidden * scale, batch, tokens
        block_cases.check_ffn(*sizes, dtype=dtype, backend=backend, **options)

    return run


def _msa_inference(dtype: torch.dtype, backend: str) -> None:
    """Forward without what backward needs."""
    weights = block_cases.msa_weights(64)
    x = torch.randn(1, 21, 64, dtype=torch.float64, device="cpu").to(dtype)

    def forward(backend: str, as_dtype: torch.dtype) -> Tensor:
        w = ck.MsaWeights(*(w.to(dtype).to(as_dtype) for w in weights))
        with torch.no_grad():
            return ck.layernorm_msa(x.to(as_dtype), w, 2, backend=backend)

    _judge_all(forward, dtype, backend, "y")


def _ffn_inference(activation: str) -> Check:
    """Forward without statistics, in another activation than GELU."""
    weights = block_cases.ffn_weights(64, 128)

    def run(dtype: torch.dtype, backend: str) -> None:
        x = torch.randn(1, 21, 64, dtype=torch.float64, device="cpu").to(dtype)

        def forward(backend: str, as_dtype: torch.dtype) -> Tensor:
            w = ck.FfnWeights(*(w.to(dtype).to(as_dtype) for w in weights))
            options: Any = {"activation": activation, "backend": backend}
            with torch.no_grad():
                return ck.layernorm_ffn(x.to(as_dtype), w, **options)

        _judge_all(forward, dtype, backend, "y")

    return run


def _layer(form: str, channels: int = 64, columns: int = 192) -> Check:
    def run(dtype: torch.dtype, backend: str) -> None:
        ptx_gluon.check(dtype, form, channels * scale, columns, 200)

    return run


def _device_check(dtype: torch.dtype, backend: str) -> None:
    """The sum that the extension's check of a device computes."""
    (symbol,) = (s for s in ptx_cuda.symbols() if "sum_of_indices" in s)
    out, memory = np.zeros(1, np.int32), ptx.Memory()
    ptx.run(ptx_cuda.kernel(symbol, ""), (1,), 256, [np.uint64(memory.add(out))], memory)
    assert out[0] == 256 * 255 // 2


_MSA_BIASES, _FFN_BIASES = block_cases.MSA_BIASES, block_cases.FFN_BIASES
_FUSED, _SPLIT, _LIBRARY, _GLUON = map(_variant, ("fused", "split", "library", "gluon"))
_TRAINING = {"with_cls": True, "scaled": True}
#: All keys, none, and the first; nothing else that may be absent, and a LayerScale.
_BARE = {"absent": _MSA_BIASES, "layer_scale": 0.1}
_MASKED = {"tokens": 9, "batch": 3, "masked": True, **_BARE}
#: Each kernel is met in both: on both architectures and in both types.
_ONE, _OTHER = "80 fp32 90 bf16", "80 bf16 90 fp32"
_HOPPER = "90 bf16 90 fp16"

_TRITON = {
    "attention_core": Case(_core(extra=True), _ONE),
    "attention_core_masked": Case(_core(masked=True), f"{_OTHER} 90 fp16"),
    "attention_core_of_far_means": Case(_core(extra=True, mean=30.0), "80 bf16 90 bf16"),
    "attention_core_plain": Case(_core(eps=None), "80 bf16"),
    "attention_core_frozen": Case(_core_frozen, "90 bf16"),
    "attention_core_ten_queries": Case(_core(rows=10), "90 bf16"),
    "attention_core_many_queries": Case(_core(rows=66), "80 bf16"),
    "attention_core_splits": Case(_when(_core(tokens=50), _splits), _ONE),
    "cross_attention_fusion": Case(_fusion(scaled=True), _ONE),
    "cross_attention_fusion_frozen": Case(_fusion_frozen, "80 bf16"),
    "cross_attention_fusion_three": Case(_when(_fusion(scaled=True), _in_three), "80 fp32"),
    "cross_attention_fusion_shared": Case(
        _when(_fusion(biases=False), _in_three, _shared_programs), "90 bf16"
    ),
    "cross_attention_fusion_without": Case(_fusion(1, identity="fg"), "90 fp32"),
    "cross_attention_fusion_three_without": Case(
        _when(_fusion(1, identity="fg"), _in_three), "80 bf16"
    ),
    "layernorm_ffn_fused": Case(_when(_ffn(scaled=True), _FUSED), _ONE),
    "layernorm_ffn_split": Case(_when(_ffn(scaled=True), _SPLIT), _OTHER),
    "layernorm_ffn_lean": Case(_when(_ffn(keep="lean"), _SPLIT), "80 fp32"),
    "layernorm_ffn_fused_kept": Case(_when(_ffn(), _FUSED, _kept), "80 bf16"),
    "layernorm_ffn_kept": Case(
        _when(_ffn(scaled=True), _SPLIT, _kept, _runs_of_tiles), "80 bf16 90 bf16"
    ),
    "layernorm_ffn_kept_many_rows": Case(
        _when(_ffn(absent=_FFN_BIASES), _SPLIT, _many_rows, _norm_apart, _kept), "90 bf16"
    ),
    "layernorm_ffn_bare": Case(
        _when(_ffn(absent=_FFN_BIASES, layer_scale=0.1, activation="gelu_tanh"), _FUSED),
        "80 bf16",
    ),
    "layernorm_ffn_library": Case(_when(_ffn(activation="quick_gelu"), _LIBRARY), "90 bf16"),
    "layernorm_ffn_many_rows": Case(
        _when(_ffn(absent=_FFN_BIASES, layer_scale=0.1, activation="silu"), _SPLIT, _many_rows),
        "80 bf16",
    ),
    "layernorm_ffn_norm_apart": Case(
        _when(_ffn(activation="gelu_tanh"), _SPLIT, _many_rows, _norm_apart), "90 bf16"
    ),
    **{
        f"layernorm_ffn_{name}_{way}": Case(_when(_ffn_inference(name), variant), where)
        for way, variant, name, where in (
            ("fused", _FUSED, "quick_gelu", "80 bf16"),
            ("fused", _FUSED, "silu", "90 fp32"),
            ("split", _SPLIT, "quick_gelu", "80 bf16"),
            ("split", _SPLIT, "gelu_tanh", "90 bf16"),
        )
    },
    "layernorm_msa": Case(_when(_msa(**_TRAINING), _SPLIT), _ONE),
    "layernorm_msa_lean": Case(_when(_msa(keep="lean", **_TRAINING), _SPLIT), _OTHER),
    "layernorm_msa_masked": Case(_when(_msa(keep="lean", **_MASKED), _SPLIT), "80 bf16"),
    "layernorm_msa_masked_one_head": Case(_when(_msa(heads=1, **_MASKED), _SPLIT), "90 bf16"),
    "layernorm_msa_many_rows": Case(
        _when(_msa(heads=4, **_TRAINING), _SPLIT, _many_rows, _norm_apart), "80 bf16"
    ),
    "layernorm_msa_heads_of_8": Case(_when(_msa(16, 2), _SPLIT), "80 bf16"),
    "layernorm_msa_heads_of_128": Case(_when(_msa(128, 1), _SPLIT), "90 bf16"),
    "layernorm_msa_inference": Case(_when(_msa_inference, _SPLIT), "90 bf16"),
    "sm90_linear_qkv": Case(_when(_layer("norm"), _GLUON), _HOPPER),
    "sm90_linear_projection": Case(_when(_layer("residual"), _GLUON), _HOPPER),
    "sm90_linear_fc1": Case(_when(_layer("norm gelu"), _GLUON), _HOPPER),
    "sm90_wide_linear": Case(_when(_layer("wide residual scaled", 136, 136), _GLUON), _HOPPER),
    "sm90_wide_fc1": Case(_when(_layer("wide gelu", 136, 392), _GLUON), _HOPPER),
    "sm90_wide_gradient": Case(_when(_layer("wide transposed", 136, 136), _GLUON), _HOPPER),
    "layernorm_msa_gluon": Case(_when(_msa(tokens=40), _GLUON), ""),
    "layernorm_ffn_gluon": Case(_when(_ffn(tokens=40), _GLUON), ""),
    "layernorm_ffn_gluon_wide": Case(
        _when(_ffn(tokens=40, hidden=448, batch=2, scaled=True), _GLUON), ""
    ),
}

#: In the architecture of the extension.
_CUDA = {
    "attention_core": Case(_core(extra=True), "90 bf16 90 fp32"),
    "attention_core_masked": Case(_core(masked=True), "90 bf16"),
    "attention_core_splits": Case(_core(tokens=1040, masked=True), "90 bf16"),
    "attention_core_of_crossvit_15": Case(_core(6, 401, 192), ""),
    "cross_attention_fusion": Case(_fusion(scaled=True), "90 bf16 90 fp32"),
    "layernorm_ffn": Case(_ffn(scaled=True), "90 bf16"),
    "layernorm_msa_fast": Case(_msa(**_TRAINING), "90 bf16"),
    "layernorm_msa_lean": Case(_msa(keep="lean", **_TRAINING), "90 bf16"),
    "layernorm_msa_masked": Case(_msa(**_MASKED), "90 bf16"),
    "layernorm_msa_heads_of_96": Case(_msa(96, 1), "90 bf16"),
    "layernorm_ffn_bare": Case(
        _ffn(absent=_FFN_BIASES, layer_scale=0.1, activation="gelu_tanh"), "90 bf16"
    ),
    "device_check": Case(_device_check, "90 fp32"),
}

#: By backend and name.
CASES: dict[str, dict[str, Case]] = {"triton": _TRITON, "cuda": _CUDA}

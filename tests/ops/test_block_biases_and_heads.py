"""Halves of a block without some biases, and with heads of any width, on CPU and in Triton."""

from __future__ import annotations

import pytest
import torch
from block_cases import (
    DTYPES,
    FFN_BIASES,
    MSA_BIASES,
    check_ffn,
    check_msa,
    float_ffn,
    float_msa,
    in_triton,
)

import crossvit_kernels as ck
from crossvit_kernels import MsaWeights
from crossvit_kernels.ops.common import configs

CPU_DTYPES = (torch.float64, *DTYPES)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("size", [None, 0.1])
def test_without_biases(size: float | None, dtype: torch.dtype) -> None:
    check_msa(72, 3, 3, 20, dtype, with_cls=True, absent=MSA_BIASES, layer_scale=size)
    check_ffn(72, 100, 3, 20, dtype, absent=FFN_BIASES, layer_scale=size)


@pytest.mark.parametrize("name", range(3))
def test_without_one_bias(name: int) -> None:
    check_msa(40, 5, 2, 9, torch.float32, absent=MSA_BIASES[name : name + 1])
    check_ffn(40, 88, 2, 9, torch.float32, absent=FFN_BIASES[name : name + 1])


@in_triton
def test_without_biases_in_triton(variant: str, dtype: torch.dtype, triton_device: str) -> None:
    options = {"backend": "triton", "device": triton_device}
    with configs.VARIANTS.choose(variant):
        check_msa(32, 2, 2, 9, dtype, absent=MSA_BIASES, **options)
        check_ffn(40, 88, 2, 9, dtype, absent=FFN_BIASES, layer_scale=0.1, **options)


HEAD_DIMS = (48, 72, 80, 88, 96, 128)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_heads(head_dim: int, dtype: torch.dtype) -> None:
    check_msa(2 * head_dim, 2, 2, 20, dtype)


@pytest.mark.parametrize(
    "head_dim, dtype",
    [
        *((8, torch.float32), (72, torch.bfloat16)),
        *(
            pytest.param(head_dim, dtype, marks=pytest.mark.slow_on_cpu)
            for head_dim in (24, *HEAD_DIMS)
            for dtype in DTYPES
            if dtype != torch.float32 or head_dim <= 64 or head_dim == 128
        ),
    ],
)
def test_wide_heads_in_triton(head_dim: int, dtype: torch.dtype, triton_device: str) -> None:
    """Those that are no power of two are padded."""
    options = {"backend": "triton", "device": triton_device}
    check_msa(2 * head_dim, 2, 2, 20, dtype, keep="lean", **options)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_heads_with_a_mask(dtype: torch.dtype, triton_device: str) -> None:
    options = {"backend": "triton", "device": triton_device, "masked": True}
    check_msa(96, 2, 3, 40, dtype, layer_scale=0.1, **options)


def test_triton_pads_no_heads_to_128_in_float32(triton_device: str) -> None:
    x, weights = torch.randn(1, 2, 144, device=triton_device), float_msa(144)
    weights = MsaWeights(*(w.to(triton_device) for w in weights))
    with pytest.raises(ValueError, match="triton: in float32 heads of 72 channels are none of"):
        ck.layernorm_msa(x, weights, 2, backend="triton")
    with torch.autocast(triton_device, torch.bfloat16):
        y = ck.layernorm_msa(x, weights, 2, backend="triton")
        expected = ck.layernorm_msa(x, weights, 2, backend="reference")
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_missing_weights_are_refused() -> None:
    x = torch.randn(1, 2, 32)
    with pytest.raises(TypeError, match=r"weights\.norm_weight: expected a tensor, found NoneType"):
        ck.layernorm_msa(x, float_msa()._replace(norm_weight=None), 2)
    with pytest.raises(TypeError, match=r"weights\.fc2_weight: expected a tensor, found NoneType"):
        ck.layernorm_ffn(x, float_ffn()._replace(fc2_weight=None))

"""The linear layer of any width for sm_90 on its GPU."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_within_rule
from block_cases import check_ffn, check_msa, ffn_weights
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels import FfnWeights
from crossvit_kernels.backends import watching
from crossvit_kernels.ops.common import sm90_wide
from crossvit_kernels.ops.common.configs import VARIANTS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)

GLUON = "triton:gluon"
FORMS = ("plain", "gelu", "residual", "residual scaled")


def made(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(shape, dtype=torch.float32, device="cuda") * scale).to(dtype)


@pytest.mark.parametrize(
    "channels, columns, dtype",
    [
        (64, 64, torch.bfloat16),
        (136, 200, torch.bfloat16),
        (576, 192, torch.bfloat16),
        (1152, 384, torch.bfloat16),
        (1152, 384, torch.float16),
        (1344, 448, torch.bfloat16),
        (3072, 768, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_layers(form: str, channels: int, columns: int, dtype: torch.dtype) -> None:
    """One row, one tile and part of one, fewer tiles than SMs, and many."""
    torch.manual_seed(0)
    weight = made(columns, channels, scale=channels**-0.5, dtype=dtype)
    bias = made(columns, dtype=dtype)
    for shape in ((1, 1), (1, 128), (3, 43), (7, 197), (150, 197)):
        x, r = made(*shape, channels, dtype=dtype), made(*shape, columns, dtype=dtype)
        scale = torch.randint(2, shape[:1], dtype=torch.int64, device="cuda") * 1.25

        def expected(
            as_dtype: torch.dtype, x: Tensor = x, r: Tensor = r, scale: Tensor = scale
        ) -> Tensor:
            a, w, b, res, s = (t.to(as_dtype) for t in (x, weight, bias, r, scale))
            y = torch.nn.functional.linear(a, w, b)
            y = torch.nn.functional.gelu(y) if "gelu" in form else y
            y = y * s[:, None, None] if "scaled" in form else y
            return y + res if "residual" in form else y

        options = {
            "residual": r if "residual" in form else None,
            "scale": scale if "scaled" in form else None,
            "gelu": "gelu" in form,
        }
        y = sm90_wide.linear(x, weight, bias, **options)
        assert y is not None
        assert_within_rule(y, expected(dtype), expected(torch.float64), form)
        for _ in range(3):
            assert torch.equal(sm90_wide.linear(x, weight, bias, **options), y)


@pytest.mark.parametrize(
    "channels, columns", [(64, 64), (136, 200), (384, 1152), (1152, 384), (2304, 768)]
)
def test_gradients_of_inputs(channels: int, columns: int) -> None:
    torch.manual_seed(0)
    weight = made(channels, columns, scale=channels**-0.5)
    for shape in ((1,), (300,), (3, 43), (150, 197)):
        d = made(*shape, channels)
        assert sm90_wide.input_gradient(d, weight) is None
        with VARIANTS.choose("gluon"):
            y = sm90_wide.input_gradient(d, weight)
            assert y is not None and y.shape == (*shape, columns)
            assert_within_rule(y, d @ weight, d.double() @ weight.double(), "gradient")
            for _ in range(3):
                assert torch.equal(sm90_wide.input_gradient(d, weight), y)


@pytest.mark.parametrize(
    "channels, hidden, heads, tokens, dtype",
    [
        (192, 576, 6, 401, torch.bfloat16),
        (384, 1152, 6, 197, torch.bfloat16),
        (384, 1536, 6, 197, torch.float16),
        (448, 1344, 7, 197, torch.bfloat16),
    ],
)
def test_blocks(channels: int, hidden: int, heads: int, tokens: int, dtype: torch.dtype) -> None:
    options = {"backend": GLUON, "device": "cuda"}
    for batch in (2, 50):
        for scaled in (False, True):
            check_ffn(channels, hidden, batch, tokens, dtype, scaled=scaled, **options)
            check_msa(channels, heads, batch, tokens, dtype, scaled=scaled, **options)


def test_the_same_bits_in_every_batch() -> None:
    weights = FfnWeights(*(w.to("cuda", torch.bfloat16) for w in ffn_weights(384, 1152)))
    x = made(60, 197, 384)
    with torch.no_grad(), watching() as seen:
        expected = ck.layernorm_ffn(x, weights, backend=GLUON)
        for part in (slice(0, 1), slice(31, 34), slice(20, 60)):
            y = ck.layernorm_ffn(x[part], weights, backend=GLUON)
            assert torch.equal(y, expected[part])
    assert "sm90_wide_linear" in seen


def test_when_it_is_chosen() -> None:
    """By itself only where it has run; always, if it is asked for."""
    x = torch.zeros(60, 197, 1152, device="cuda", dtype=torch.bfloat16)
    weight = x[0, :192, :]
    assert sm90_wide.chosen(x, weight) == sm90_wide.is_proven(x.device)
    with VARIANTS.choose("gluon"):
        assert sm90_wide.chosen(x[:1], weight)
        assert not sm90_wide.chosen(x.float(), weight.float())


@pytest.mark.parametrize("form", [*FORMS, "transposed"])
@pytest.mark.parametrize("channels, columns", [(576, 192), (1152, 384), (448, 64)])
def test_many_launches(form: str, channels: int, columns: int) -> None:
    """A race shows in some launches only."""
    x, weight = made(150, 197, channels), made(columns, channels)
    weight = weight.t().contiguous() if form == "transposed" else weight
    scale = torch.ones(150, dtype=torch.float32, device="cuda") if "scaled" in form else None
    options = {"residual": made(150, 197, columns) if "residual" in form else None, "scale": scale}
    options["transposed"] = form == "transposed"
    expected = sm90_wide.linear(x, weight, None, **options)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(2000):
        wrong += (sm90_wide.linear(x, weight, None, **options) != expected).any()
    assert wrong == 0

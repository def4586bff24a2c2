"""The linear layer for sm_90 on its GPU."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_within_rule
from block_cases import check_ffn, check_msa, ffn_weights, msa_weights
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels import FfnWeights, MsaWeights
from crossvit_kernels.backends import watching
from crossvit_kernels.ops.common import sm90_linear
from crossvit_kernels.ops.common.configs import VARIANTS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)

GLUON = "triton:gluon"


@pytest.mark.parametrize(
    "channels, columns, dtype",
    [
        (64, 64, torch.bfloat16),
        (320, 128, torch.bfloat16),
        (384, 1536, torch.bfloat16),
        (384, 1536, torch.float16),
    ],
)
@pytest.mark.parametrize("form", ["norm", "norm gelu", "residual", "plain"])
def test_layers(form: str, channels: int, columns: int, dtype: torch.dtype) -> None:
    """One row, one tile and part of one, fewer tiles than SMs, and many."""
    generator = torch.Generator("cuda").manual_seed(0)

    def made(*shape: int, scale: float = 1.0) -> Tensor:
        options = {"dtype": torch.float32, "device": "cuda", "generator": generator}
        return (torch.randn(shape, **options) * scale).to(dtype)

    weight, bias = made(columns, channels, scale=channels**-0.5), made(columns)
    gamma, beta = 1 + made(channels, scale=0.2), made(channels, scale=0.2)
    for shape in ((1, 1), (1, 128), (3, 43), (7, 197), (150, 197)):
        x, r = 3 + made(*shape, channels), made(*shape, columns)

        def expected(as_dtype: torch.dtype, x: Tensor = x, r: Tensor = r) -> Tensor:
            given = (t.to(as_dtype) for t in (x, weight, bias, gamma, beta, r))
            a, w, b, g, h, res = given
            if "norm" in form:
                a = torch.nn.functional.layer_norm(a, a.shape[-1:], g, h, 1e-6)
            y = torch.nn.functional.linear(a, w, b)
            if "gelu" in form:
                y = torch.nn.functional.gelu(y)
            return y + res if form == "residual" else y

        mean, rstd = (torch.empty(shape, dtype=torch.float32, device="cuda") for _ in range(2))
        options = {
            "norm": (gamma, beta) if "norm" in form else None,
            "eps": 1e-6,
            "gelu": "gelu" in form,
            "residual": r if form == "residual" else None,
            "statistics": (mean, rstd) if "norm" in form else None,
        }
        y = sm90_linear.linear(x, weight, bias, **options)
        assert y is not None
        assert_within_rule(y, expected(dtype), expected(torch.float64), form)
        for _ in range(3):
            assert torch.equal(sm90_linear.linear(x, weight, bias, **options), y)
        if "norm" in form:
            exact = x.double()
            torch.testing.assert_close(mean.double(), exact.mean(-1), rtol=1e-4, atol=1e-5)
            variance = exact.var(-1, unbiased=False)
            torch.testing.assert_close(rstd.double(), (variance + 1e-6).rsqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "channels, heads, tokens, dtype",
    [
        (192, 6, 401, torch.bfloat16),
        (384, 6, 197, torch.bfloat16),
        (384, 6, 197, torch.float16),
    ],
)
def test_blocks(channels: int, heads: int, tokens: int, dtype: torch.dtype) -> None:
    """Outputs and gradients, whose forward passes keep the kernel's mean and rstd."""
    options = {"backend": GLUON, "device": "cuda"}
    for batch in (2, 50):
        for keep in ("fast", "lean"):
            check_msa(channels, heads, batch, tokens, dtype, with_cls=True, keep=keep, **options)
        check_msa(channels, heads, batch, tokens, dtype, scaled=True, bias=False, **options)
        check_ffn(channels, 3 * channels, batch, tokens, dtype, **options)


def results(half: str, x: Tensor, weights: list[Tensor], backend: str) -> Tensor:
    with torch.no_grad():
        if half == "msa":
            return ck.layernorm_msa(x, MsaWeights(*weights), 6, backend=backend)
        return ck.layernorm_ffn(x, FfnWeights(*weights), backend=backend)


@pytest.mark.parametrize("half", ["msa", "ffn"])
def test_the_same_bits_every_time_and_in_every_batch(half: str) -> None:
    made = msa_weights(384) if half == "msa" else ffn_weights(384, 1152)
    weights = [w.to("cuda", torch.bfloat16) for w in made]
    x = torch.randn(60, 197, 384, device="cuda", dtype=torch.bfloat16)
    with watching() as seen:
        expected = results(half, x, weights, GLUON)
    assert "sm90_linear" in seen
    for _ in range(20):
        assert torch.equal(results(half, x, weights, GLUON), expected)
    for part in (slice(0, 1), slice(31, 34), slice(20, 60)):
        assert torch.equal(results(half, x[part], weights, GLUON), expected[part])


def test_when_it_is_chosen() -> None:
    """By itself with many rows, where it has run; always, if it is asked for."""
    x = torch.zeros(60, 197, 384, device="cuda", dtype=torch.bfloat16)
    weight = x[0, :64, :]
    assert sm90_linear.chosen(x, weight) == sm90_linear.is_proven(x.device)
    assert not sm90_linear.chosen(x[:1], weight)
    with VARIANTS.choose("gluon"):
        assert sm90_linear.chosen(x[:1], weight)
        assert not sm90_linear.chosen(x.float(), weight.float())
    with pytest.raises(ValueError, match="16-bit"):
        weights = [w.to("cuda", torch.float32) for w in ffn_weights(384, 1152)]
        results("ffn", x.float(), weights, GLUON)


def test_in_a_graph_and_compiled() -> None:
    weights = [w.to("cuda", torch.bfloat16) for w in ffn_weights(384, 1152)]
    x = torch.randn(8, 197, 384, device="cuda", dtype=torch.bfloat16)
    expected = results("ffn", x, weights, GLUON)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = results("ffn", x, weights, GLUON)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
    compiled = torch.compile(lambda t: results("ffn", t, weights, GLUON), fullgraph=True)
    assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("form", ["plain", "residual", "norm", "norm gelu"])
@pytest.mark.parametrize("channels, columns", [(320, 128), (384, 384)])
def test_many_launches(form: str, channels: int, columns: int) -> None:
    """A race shows in some launches only: one was found in one of 180."""
    x = torch.randn(150, 197, channels, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(columns, channels, device="cuda", dtype=torch.bfloat16)
    r = torch.randn(150, 197, columns, device="cuda", dtype=torch.bfloat16)
    options = {
        "norm": (weight[0].clone(), weight[1].clone()) if "norm" in form else None,
        "gelu": "gelu" in form,
        "residual": r if form == "residual" else None,
    }
    expected = sm90_linear.linear(x, weight, None, **options)
    exact = x.float() @ weight.float().T + (r.float() if form == "residual" else 0)
    if "norm" not in form:
        torch.testing.assert_close(expected.float(), exact, rtol=0.01, atol=0.05)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(2000):
        wrong += (sm90_linear.linear(x, weight, None, **options) != expected).any()
    assert wrong == 0

"""cross_attention_fusion in Triton: compiled if there is a GPU, else interpreted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from accuracy import assert_within_rule
from fusion_cases import (
    IDENTITIES,
    NAMED_WIDTHS,
    check_frozen_tokens,
    check_rule,
    fusion_and_gradients,
    launches,
    make_weights,
    without,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_checks import check_operators

from crossvit_kernels import FusionInputs, FusionWeights
from crossvit_kernels.modules import CrossAttentionFusion
from crossvit_kernels.ops.cross_attention import configs
from crossvit_kernels.ops.operator import OPERATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: float16 takes the way of bfloat16.
FIRST_DTYPES = (*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow_on_cpu))
FUSION = configs.fusion(configs.FORWARD, 192)


@pytest.fixture(params=["one kernel", "three kernels"])
def variant(request: pytest.FixtureRequest, monkeypatch) -> str:
    """Fix the kernel variant of a fusion for any batch."""
    choose_variant(request.param, monkeypatch)
    return request.param


def choose_variant(variant: str, monkeypatch) -> None:
    config = dataclasses.replace(FUSION, programs=2)  # so that images share programs
    monkeypatch.setattr(configs, "fusion", lambda *key: config)
    monkeypatch.setattr(configs.VARIANTS, "asked_for", variant.split()[0])


def check(*sizes: int, dtype: torch.dtype = torch.float32, **options) -> None:
    check_rule(*sizes, dtype=dtype, backend="triton", **options)


@pytest.mark.parametrize("dtype", FIRST_DTYPES)
def test_rule(variant: str, dtype: torch.dtype, triton_device: str) -> None:
    """Batches larger than a program's, widths that are no multiple of a block, no biases."""
    check(64, 96, 3, 6, 40, dtype=dtype, scaled=True, device=triton_device)
    check(120, 72, 9, 2, 33, dtype=dtype, biases=False, device=triton_device)


@pytest.mark.parametrize(
    "identity", ["fg", *(pytest.param(i, marks=pytest.mark.slow_on_cpu) for i in ("f", "g"))]
)
def test_without_f_or_g(variant: str, identity: str, triton_device: str) -> None:
    sizes = 64, 96, 3, 6, 21
    check(*sizes, scaled=True, identity=identity, device=triton_device)
    check(*sizes, dtype=torch.bfloat16, biases=False, identity=identity, device=triton_device)


@pytest.mark.slow_on_cpu
def test_frozen_tokens(variant: str, triton_device: str) -> None:
    check_frozen_tokens("triton", triton_device)


@pytest.mark.slow_on_cpu
def test_many_frozen_tokens(triton_device: str) -> None:
    check_frozen_tokens("triton", triton_device, num_tokens=4100)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("cls_dim, channels, heads", NAMED_WIDTHS)
def test_named_widths(cls_dim: int, channels: int, heads: int, triton_device: str) -> None:
    scaled = cls_dim > channels
    sizes = cls_dim, channels, heads, 2, 17
    check(*sizes, dtype=DTYPES[scaled], scaled=scaled, device=triton_device)


@pytest.mark.sanitizer
@pytest.mark.parametrize("num_tokens", [0, 1, 2])
def test_few_tokens(variant: str, num_tokens: int, triton_device: str) -> None:
    check(32, 48, 3, 3, num_tokens, device=triton_device)


@pytest.mark.slow_on_cpu
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    cls_dim=st.integers(1, 16).map(lambda i: 8 * i),
    head_dim=st.sampled_from([8, 16, 24, 32, 64]),
    heads=st.sampled_from([1, 2, 3, 7]),
    batch=st.integers(0, 6),
    num_tokens=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    biases=st.booleans(),
    scaled=st.booleans(),
)
def test_fuzz(
    variant, triton_device, cls_dim, head_dim, heads, batch, num_tokens, dtype, biases, scaled
):
    torch.manual_seed(2)
    sizes = (cls_dim, head_dim * heads, heads, batch, num_tokens)
    check(*sizes, dtype=dtype, biases=biases, scaled=scaled, device=triton_device)


def test_large_mean_small_spread(variant: str, triton_device: str) -> None:
    check(64, 96, 3, 2, 50, mean=100.0, device=triton_device)


def test_many_tokens(triton_device: str, monkeypatch) -> None:
    """Several programs share an image: on a GPU with 5000 tokens, else with fewer."""
    if triton_device == "cuda":
        return check(384, 192, 6, 3, 5000, dtype=torch.bfloat16, device=triton_device)
    monkeypatch.setattr(configs, "MANY_TOKENS", 30)
    check(40, 48, 3, 3, 37, scaled=True, device=triton_device)
    check(40, 48, 3, 2, 37, dtype=torch.float16, device=triton_device)


def fusion(
    cls: torch.Tensor, tokens: torch.Tensor, weights: FusionWeights
) -> tuple[torch.Tensor, ...]:
    return fusion_and_gradients(cls, tokens, weights, 3, "triton")


@pytest.mark.slow_on_cpu
def test_an_image_depends_on_itself_alone(triton_device: str, monkeypatch) -> None:
    """Not on its batch, nor on the kernel variant, nor on a NaN in another image."""
    weights = FusionWeights(*(w.float().to(triton_device) for w in make_weights(40, 48)))
    cls = torch.randn(7, 40, device=triton_device)
    tokens = torch.randn(7, 21, 48, device=triton_device)
    choose_variant("one kernel", monkeypatch)
    expected = fusion(cls, tokens, weights)
    poisoned = tokens.clone()
    poisoned[2, 3, 5] = torch.nan
    others = [i for i in range(7) if i != 2]
    for variant in ("one kernel", "three kernels"):
        choose_variant(variant, monkeypatch)
        for batch in (slice(0, 7), slice(5, 6)):
            for a, e in zip(fusion(cls[batch], tokens[batch], weights), expected, strict=True):
                assert torch.equal(a, e[batch])
        for a, e in zip(fusion(cls, poisoned, weights), expected, strict=True):
            assert torch.isnan(a[2]).any() and torch.equal(a[others], e[others])


def test_strided_tokens_and_cls(triton_device: str) -> None:
    """As in a model: views of [B, 1 + N, C]."""
    weights = FusionWeights(*(w.float().to(triton_device) for w in make_weights(40, 48)))
    both = torch.randn(3, 22, 48, device=triton_device), torch.randn(3, 5, 40, device=triton_device)
    views = both[1][:, 0], both[0][:, 1:]
    expected = fusion(*(t.contiguous() for t in views), weights)
    for a, e in zip(fusion(*views, weights), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.slow_on_cpu
def test_compiled_without_a_graph_break(triton_device: str) -> None:
    fusion = CrossAttentionFusion(40, 48, 3, backend="triton").to(triton_device)
    cls = torch.randn(3, 40, device=triton_device)
    tokens = torch.randn(3, 9, 48, device=triton_device)
    compiled = torch.compile(fusion, fullgraph=True, backend="aot_eager")
    out, expected = compiled(cls, tokens), fusion(cls, tokens)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out.sum(), list(fusion.parameters()))
    for a, e in zip(
        gradients, torch.autograd.grad(expected.sum(), list(fusion.parameters())), strict=True
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("identity", IDENTITIES)
def test_autocast_without_f_or_g(identity: str, triton_device: str) -> None:
    """The sum of a float32 CLS and a 16-bit update is float32, and as exact as eager's."""
    weights = make_weights(48, 48)

    def run(backend: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        w = without(FusionWeights(*(w.to(triton_device, dtype) for w in weights)), identity)
        cls, tokens = torch.randn(3, 48), torch.randn(3, 9, 48).bfloat16()
        cls, tokens = cls.to(triton_device, dtype), tokens.to(triton_device)
        if dtype == torch.float64:
            return fusion_and_gradients(cls, tokens.double(), w, 3, backend)
        with torch.autocast(triton_device, torch.bfloat16):
            return fusion_and_gradients(cls, tokens, w, 3, backend)

    exact, eager = run("reference", torch.float64), run("reference", torch.float32)
    actual = run("triton", torch.float32)
    assert [t.dtype for t in actual] == [t.dtype for t in eager]
    for name, a, e, x in zip(("new_cls", "cls", "tokens"), actual, eager, exact, strict=True):
        assert_within_rule(a, e, x, name, torch.bfloat16)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("identity", ["", *IDENTITIES])
def test_operators_are_what_they_say(identity: str, triton_device: str) -> None:
    weights = FusionWeights(*(w.float().to(triton_device) for w in make_weights(24, 16)))
    weights = without(weights, identity)
    width = 16 if "f" in identity else 24
    cls, tokens = torch.randn(3, width).to(triton_device), torch.randn(3, 5, 16).to(triton_device)
    scale = torch.rand(3, device=triton_device)
    inputs = FusionInputs(cls, tokens, weights, 4, scale)
    check_operators(OPERATIONS["cross_attention_fusion"], inputs, 1e-6, "triton")


def test_the_variant_can_be_chosen(triton_device: str, monkeypatch) -> None:
    weights = FusionWeights(*(w.float().to(triton_device) for w in make_weights(24, 24)))
    cls, tokens = torch.randn(1, 24).to(triton_device), torch.randn(1, 3, 24).to(triton_device)
    ran = launches(monkeypatch)
    for variant in ("one", "three", "auto"):
        with configs.VARIANTS.choose(variant):
            fusion(cls, tokens, weights)
    ran = [name for name in ran if "backward" not in name]
    three = ["fusion_before", "attention_core_forward", "fusion_after"]
    assert ran == ["fusion_forward", *three, "fusion_forward"]
    with pytest.raises(ValueError, match="variant: expected one of"):
        configs.VARIANTS.choose("two").__enter__()

"""cross_attention_fusion on the CPU backend against the materialised definition."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_within_rule
from fusion_cases import IDENTITIES, NAMED_WIDTHS, check_rule, make_weights, without
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels import FusionWeights

pytestmark = pytest.mark.usefixtures("cpu_backend")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls_dim, channels, heads", NAMED_WIDTHS)
def test_named_widths(cls_dim: int, channels: int, heads: int, dtype: torch.dtype) -> None:
    check_rule(
        cls_dim, channels, heads, batch=8, num_tokens=49, dtype=dtype, scaled=cls_dim > channels
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set_level(isa_level: str, dtype: torch.dtype) -> None:
    """Includes widths that are no multiple of a vector, odd widths, and odd head counts."""
    check_rule(40, 44, 4, batch=9, num_tokens=30, dtype=dtype)
    check_rule(31, 63, 9, batch=3, num_tokens=150, dtype=dtype, scaled=True, biases=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_crossvit_15_at_full_size(dtype: torch.dtype) -> None:
    check_rule(384, 192, 6, batch=4, num_tokens=400, dtype=dtype)
    check_rule(192, 384, 6, batch=4, num_tokens=196, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_mean_small_spread(dtype: torch.dtype) -> None:
    check_rule(64, 96, 3, batch=8, num_tokens=50, dtype=dtype, mean=100.0)


@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_without_f_or_g(identity: str, dtype: torch.dtype) -> None:
    """Also of widths that are no multiple of a vector."""
    check_rule(96, 192, 6, 9, 30, dtype, scaled=True, identity=identity)
    check_rule(44, 63, 9, 3, 150, dtype, biases=False, identity=identity)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("tokens_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("identity", IDENTITIES)
def test_autocast_without_f_or_g(identity: str, tokens_dtype: torch.dtype, backend: str) -> None:
    """Eager's dtypes: without both, the sum of a float32 CLS and a bfloat16 update is float32."""
    weights = without(cast(make_weights(32, 48), torch.float32), identity)
    leaves = [None if w is None else w.requires_grad_() for w in weights]
    cls = torch.randn(3, 48 if "f" in identity else 32, requires_grad=True)
    tokens = torch.randn(3, 9, 48).to(tokens_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = ck.cross_attention_fusion(cls, tokens, FusionWeights(*leaves), 6, backend=backend)
    assert out.dtype == (torch.float32 if identity == "fg" else torch.bfloat16)
    assert out.shape == (3, 48 if "g" in identity else 32)
    leaves = [cls, *(w for w in leaves if w is not None)]
    gradients = torch.autograd.grad(out.float().sum(), leaves)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_a_cls_alone_moves_neither_q_nor_k(num_tokens: int) -> None:
    """Its attention is 1 whatever they are, and AdamW would turn rounding into full steps."""
    weights = cast(make_weights(32, 48), torch.float32)
    weights = FusionWeights(*(w.requires_grad_() for w in weights))
    out = ck.cross_attention_fusion(
        torch.randn(3, 32), torch.randn(3, num_tokens, 48), weights, 6, backend="cpu"
    )
    leaves = weights.q_weight, weights.q_bias, weights.k_weight
    for gradient in torch.autograd.grad(out.square().sum(), leaves):
        assert bool(gradient.any()) == (num_tokens > 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    cls_dim=st.integers(2, 40).map(lambda i: 8 * i),
    head_dim=st.sampled_from([8, 16, 24, 32, 64]),
    heads=st.sampled_from([1, 2, 3, 6, 7, 22]),
    batch=st.integers(1, 5),
    num_tokens=st.integers(0, 80),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    biases=st.booleans(),
    scaled=st.booleans(),
    identity=st.sampled_from(["", *IDENTITIES]),
)
def test_fuzz(cls_dim, head_dim, heads, batch, num_tokens, dtype, biases, scaled, identity):
    torch.manual_seed(2)
    sizes = cls_dim, head_dim * heads, heads, batch, num_tokens
    check_rule(*sizes, dtype, biases, scaled, identity=identity)


def test_gradcheck() -> None:
    weights = make_weights(6, 8)
    inputs = [torch.randn(2, 6).double(), torch.randn(2, 5, 8).double(), *weights]
    inputs = [t.requires_grad_() for t in inputs]
    scale = torch.tensor([0.5, 2.0]).double()

    def fusion(cls: Tensor, tokens: Tensor, *w: Tensor) -> Tensor:
        return ck.cross_attention_fusion(
            cls, tokens, FusionWeights(*w), 2, residual_scale=scale, backend="cpu"
        )

    assert torch.autograd.gradcheck(fusion, inputs)


def cast(weights: FusionWeights, dtype: torch.dtype) -> FusionWeights:
    return FusionWeights(*(None if w is None else w.to(dtype) for w in weights))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_patches_the_cls_attends_to_itself(backend: str) -> None:
    weights = cast(make_weights(32, 24), torch.float32)
    cls, tokens = torch.randn(3, 32), torch.empty(3, 0, 24, requires_grad=True)
    out = ck.cross_attention_fusion(cls, tokens, weights, 3, backend=backend)
    exact = ck.cross_attention_fusion(
        cls.double(), tokens.double(), cast(weights, torch.float64), 3, backend="reference"
    )
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(out.sum(), tokens)
    assert gradient.shape == (3, 0, 24)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty_batch(backend: str) -> None:
    weights = cast(make_weights(32, 24), torch.float32)
    weights = FusionWeights(*(w.requires_grad_() for w in weights))
    cls, tokens = torch.randn(0, 32), torch.randn(0, 7, 24)
    out = ck.cross_attention_fusion(cls, tokens, weights, 3, backend=backend)
    assert out.shape == (0, 32)
    gradients = torch.autograd.grad(out.sum(), weights)
    assert all((g == 0).all() for g in gradients)


def test_a_view_of_the_other_branch() -> None:
    """x[:, 1:] of [B, 1 + N, C] is not copied, and its gradient is in the right rows."""
    weights = cast(make_weights(32, 48), torch.float32)
    cls, x = torch.randn(3, 32), torch.randn(3, 30, 48, requires_grad=True)
    out = ck.cross_attention_fusion(cls, x[:, 1:], weights, 6, backend="cpu")
    copied = ck.cross_attention_fusion(cls, x[:, 1:].contiguous(), weights, 6, backend="cpu")
    assert torch.equal(out, copied)
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert (dx[:, 0] == 0).all() and (dx[:, 1:] != 0).any()


def forward(cls: Tensor, x: Tensor, weights: FusionWeights) -> Tensor:
    return ck.cross_attention_fusion(cls, x, weights, 6, backend="cpu")


@pytest.mark.parametrize("batch", [1, 5, 37])
def test_forward_is_bitwise_the_same_whatever_the_threads(restore_threads, batch: int) -> None:
    weights = cast(make_weights(32, 48), torch.float32)
    cls, x = torch.randn(batch, 32), torch.randn(batch, 300, 48)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(forward(cls, x, weights))
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_an_image_does_not_depend_on_its_batch() -> None:
    weights = cast(make_weights(32, 48), torch.float32)
    cls, x = torch.randn(37, 32), torch.randn(37, 300, 48)
    together = forward(cls, x, weights)
    for i in (0, 8, 21, 36):
        assert torch.equal(forward(cls[i : i + 1], x[i : i + 1], weights)[0], together[i])


def test_nan_stays_in_its_image() -> None:
    weights = cast(make_weights(32, 48), torch.float32)
    cls, x = torch.randn(4, 32), torch.randn(4, 30, 48)
    clean = ck.cross_attention_fusion(cls, x, weights, 6, backend="cpu")
    x[1, 3, 5] = torch.nan
    cls[2, 0] = torch.nan
    out = ck.cross_attention_fusion(cls, x, weights, 6, backend="cpu")
    assert torch.isnan(out[[1, 2]]).all()
    torch.testing.assert_close(out[[0, 3]], clean[[0, 3]])


def test_dropped_path_keeps_the_projected_cls() -> None:
    """residual_scale 0 leaves g(f(cls))."""
    weights = cast(make_weights(32, 48), torch.float32)
    cls, x = torch.randn(2, 32), torch.randn(2, 9, 48)
    scale = torch.tensor([0.0, 1.0])
    out = ck.cross_attention_fusion(cls, x, weights, 6, residual_scale=scale, backend="cpu")
    other = ck.cross_attention_fusion(cls, x + 1, weights, 6, residual_scale=scale, backend="cpu")
    full = ck.cross_attention_fusion(cls, x, weights, 6, backend="cpu")
    assert torch.equal(out[0], other[0])
    torch.testing.assert_close(out[1], full[1])


@pytest.mark.parametrize("tokens_dtype", [torch.float32, torch.bfloat16])
def test_autocast(tokens_dtype: torch.dtype) -> None:
    """Same dtype as eager mode under autocast, no larger errors, float32 weight gradients."""
    weights = cast(make_weights(96, 192), torch.float32)
    cls, tokens = torch.randn(8, 96), torch.randn(8, 60, 192).to(tokens_dtype)
    upstream = torch.randn(8, 96)

    def run(backend: str, dtype: torch.dtype, enabled: bool) -> list[Tensor]:
        leaves = [cls.to(dtype), tokens.to(dtype) if not enabled else tokens, *weights]
        leaves = [t.detach().to(dtype if i != 1 else t.dtype) for i, t in enumerate(leaves)]
        leaves = [t.requires_grad_() for t in leaves]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = ck.cross_attention_fusion(
                leaves[0], leaves[1], FusionWeights(*leaves[2:]), 6, backend=backend
            )
        return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

    exact = run("reference", torch.float64, enabled=False)
    eager = run("reference", torch.float32, enabled=True)
    actual = run("cpu", torch.float32, enabled=True)
    names = ["new_cls", "cls", "tokens", *FusionWeights._fields]
    for name, a, e, x in zip(names, actual, eager, exact, strict=True):
        if name != "k_bias":
            assert_within_rule(a, e, x.detach(), name, dtype=torch.bfloat16)
    assert actual[0].dtype == torch.bfloat16 and actual[3].dtype == torch.float32


def test_backward_inside_autocast() -> None:
    weights = FusionWeights(
        *(w.requires_grad_() for w in cast(make_weights(32, 48), torch.float32))
    )
    cls, x = torch.randn(2, 32), torch.randn(2, 9, 48)
    with torch.autocast("cpu", torch.bfloat16):
        out = ck.cross_attention_fusion(cls, x, weights, 6, backend="cpu")
        inside = torch.autograd.grad(out.sum(), weights, retain_graph=True)
    outside = torch.autograd.grad(out.sum(), weights)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_attention_dropout_runs_the_reference() -> None:
    weights = cast(make_weights(32, 48), torch.float32)
    cls, x = torch.randn(2, 32), torch.randn(2, 90, 48)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(ck.cross_attention_fusion(cls, x, weights, 6, dropout_p=0.5))
        torch.manual_seed(5)
        results.append(
            ck.cross_attention_fusion(cls, x, weights, 6, dropout_p=0.5, backend="reference")
        )
    assert all(torch.equal(results[0], r) for r in results[1:])
    assert not torch.equal(results[0], ck.cross_attention_fusion(cls, x, weights, 6))
    with pytest.raises(ValueError, match="dropout"):
        ck.cross_attention_fusion(cls, x, weights, 6, dropout_p=0.5, backend="cpu")


def test_gradient_of_the_residual_scale_comes_from_the_reference() -> None:
    weights = cast(make_weights(32, 48), torch.float32)
    cls, x = torch.randn(2, 32), torch.randn(2, 9, 48)
    scale = torch.tensor([0.3, 1.0], requires_grad=True)
    out = ck.cross_attention_fusion(cls, x, weights, 6, residual_scale=scale)
    (gradient,) = torch.autograd.grad(out.sum(), scale)
    assert (gradient != 0).all()
    with pytest.raises(ValueError, match="residual_scale"):
        ck.cross_attention_fusion(cls, x, weights, 6, residual_scale=scale, backend="cpu")

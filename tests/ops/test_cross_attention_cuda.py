"""cross_attention_fusion in CUDA: on a GPU if there is one, else on the host shim."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_within_rule
from fusion_cases import (
    IDENTITIES,
    NAMED_WIDTHS,
    check_frozen_tokens,
    check_rule,
    fusion_and_gradients,
    make_weights,
    without,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_checks import check_operators

import crossvit_kernels as ck
from crossvit_kernels import FusionInputs, FusionWeights
from crossvit_kernels.extension import Multiprocessors
from crossvit_kernels.modules import CrossAttentionFusion
from crossvit_kernels.ops.cross_attention import cuda
from crossvit_kernels.ops.cross_attention.cuda import ClusterShape
from crossvit_kernels.ops.operator import OPERATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLUSTER_SHAPES = tuple(ClusterShape(*shape) for shape in ((1, 8), (3, 8), (4, 2), (16, 8), (2, 1)))


@pytest.fixture(params=CLUSTER_SHAPES, ids=str)
def cluster_shape(request: pytest.FixtureRequest, monkeypatch) -> ClusterShape:
    """Fix the images and blocks per cluster for any batch."""
    choose(request.param, monkeypatch)
    return request.param


def choose(cluster_shape: ClusterShape, monkeypatch) -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        cluster_shape = ClusterShape(cluster_shape.images, 1)
    monkeypatch.setattr(cuda, "cluster_shape", lambda batch, sm: cluster_shape)


def check(*sizes: int, dtype: torch.dtype = torch.float32, **options) -> None:
    check_rule(*sizes, dtype=dtype, backend="cuda", **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rule(cluster_shape: ClusterShape, dtype: torch.dtype, cuda_device: str) -> None:
    """Batches larger than a cluster's, no biases, head counts that are no power of two."""
    check(64, 96, 3, 6, 40, dtype=dtype, scaled=True, device=cuda_device)
    check(128, 80, 10, 2, 33, dtype=dtype, biases=False, device=cuda_device)


def test_frozen_tokens(cluster_shape: ClusterShape, cuda_device: str) -> None:
    check_frozen_tokens("cuda", cuda_device)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("cls_dim, channels, heads", NAMED_WIDTHS)
def test_named_widths(cls_dim: int, channels: int, heads: int, cuda_device: str) -> None:
    scaled = cls_dim > channels
    sizes = cls_dim, channels, heads, 2, 17
    check(*sizes, dtype=DTYPES[scaled], scaled=scaled, device=cuda_device)


@pytest.mark.sanitizer
@pytest.mark.parametrize("num_tokens", [0, 1, 2])
def test_few_tokens(num_tokens: int, cuda_device: str) -> None:
    check(32, 48, 3, 3, num_tokens, device=cuda_device)


def test_many_heads(cuda_device: str) -> None:
    """Many heads need several passes, which add to dx."""
    check(32, 384, 48, 2, 20, dtype=torch.bfloat16, device=cuda_device)
    check(32, 160, 20, 2, 20, device=cuda_device)


def test_wide(cuda_device: str) -> None:
    check(192, 1152, 16, 1, 20, dtype=torch.bfloat16, device=cuda_device)


@pytest.mark.slow_on_cpu
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    cls_dim=st.integers(1, 12).map(lambda i: 16 * i),
    head_dim=st.sampled_from([16, 24, 32, 64]),
    heads=st.sampled_from([1, 2, 3, 7]),
    batch=st.integers(0, 6),
    num_tokens=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    biases=st.booleans(),
    scaled=st.booleans(),
)
def test_fuzz(cuda_device, cls_dim, head_dim, heads, batch, num_tokens, dtype, biases, scaled):
    torch.manual_seed(2)
    heads += heads * head_dim % 16 // 8  # widths are multiples of 16
    sizes = (cls_dim, head_dim * heads, heads, batch, num_tokens)
    check(*sizes, dtype=dtype, biases=biases, scaled=scaled, device=cuda_device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_mean_small_spread(dtype: torch.dtype, cuda_device: str) -> None:
    check(64, 96, 3, 2, 50, dtype=dtype, mean=100.0, device=cuda_device)


def fusion(
    cls: torch.Tensor, tokens: torch.Tensor, weights: FusionWeights, heads: int = 3
) -> tuple[torch.Tensor, ...]:
    return fusion_and_gradients(cls, tokens, weights, heads, "cuda")


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize(
    "channels, heads, dtype", [(96, 3, torch.float32), (416, 13, torch.bfloat16)], ids=str
)
def test_an_image_depends_on_itself_alone(
    channels: int, heads: int, dtype: torch.dtype, cuda_device: str, monkeypatch
) -> None:
    """Not on its batch, nor on the cluster shape, nor on a NaN in another image. Warps process
    several tiles.
    """
    weights = FusionWeights(*(w.to(cuda_device, dtype) for w in make_weights(48, channels)))
    cls = torch.randn(5, 48, device=cuda_device, dtype=dtype)
    tokens = torch.randn(5, 210, channels, device=cuda_device, dtype=dtype)
    choose(ClusterShape(1, 1), monkeypatch)
    expected = fusion(cls, tokens, weights, heads)
    poisoned = tokens.clone()
    poisoned[2, 3, 5] = torch.nan
    others = [0, 1, 3, 4]
    for cluster_shape in CLUSTER_SHAPES:
        choose(cluster_shape, monkeypatch)
        for batch in (slice(0, 5), slice(4, 5)):
            results = fusion(cls[batch], tokens[batch], weights, heads)
            for a, e in zip(results, expected, strict=True):
                assert torch.equal(a, e[batch])
        for a, e in zip(fusion(cls, poisoned, weights, heads), expected, strict=True):
            assert torch.isnan(a[2]).any() and torch.equal(a[others], e[others])


def test_strided_tokens_and_cls(cuda_device: str) -> None:
    """As in a model: views of [B, 1 + N, C]; also rows at odd addresses."""
    weights = FusionWeights(*(w.float().to(cuda_device) for w in make_weights(48, 96)))
    both = torch.randn(3, 22, 96, device=cuda_device), torch.randn(3, 5, 48, device=cuda_device)
    views = both[1][:, 0], both[0][:, 1:]
    expected = fusion(*(t.contiguous() for t in views), weights)
    odd = torch.empty(3, 21, 101, device=cuda_device)[:, :, 1:97]
    odd.copy_(views[1])
    for tokens in (views[1], odd):
        for a, e in zip(fusion(views[0], tokens, weights), expected, strict=True):
            assert torch.equal(a, e)


def test_weights_at_odd_addresses(cuda_device: str) -> None:
    """As in slices of one flat tensor, which sharding makes of parameters."""
    weights = FusionWeights(*(w.float().to(cuda_device) for w in make_weights(48, 96)))
    cls, tokens = torch.randn(2, 48, device=cuda_device), torch.randn(2, 9, 96, device=cuda_device)
    flat = torch.cat([cls.new_zeros(1), *(w.flatten() for w in weights)])
    _, *pieces = flat.split([1, *(w.numel() for w in weights)])
    views = FusionWeights(*(p.view(w.shape) for p, w in zip(pieces, weights, strict=True)))
    assert views.q_weight.data_ptr() % 16 and views.q_weight.is_contiguous()
    expected = fusion(cls, tokens, weights)
    assert all(torch.equal(a, e) for a, e in zip(fusion(cls, tokens, views), expected, strict=True))


@pytest.mark.parametrize("norms", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_of_other_dtypes(norms: torch.dtype, cuda_device: str) -> None:
    """LayerNorms, biases and the CLS in float32, matrices in bfloat16, as under autocast."""
    weights = make_weights(48, 96)
    mixed = FusionWeights(
        *(w.to(torch.bfloat16 if w.ndim == 2 else norms).to(cuda_device) for w in weights)
    )
    cls = torch.randn(3, 48, device=cuda_device)
    tokens = torch.randn(3, 9, 96, device=cuda_device).bfloat16()
    with torch.autocast(cuda_device, torch.bfloat16):
        actual = fusion(cls, tokens, mixed)
        # Eager refuses a 16-bit LayerNorm on float32 input: use the same values in float32.
        widened = FusionWeights(*(w if w.ndim == 2 else w.float() for w in mixed))
        eager = fusion_and_gradients(cls, tokens, widened, 3, "reference")
    doubled = FusionWeights(*(w.double() for w in mixed))
    exact = fusion_and_gradients(cls.double(), tokens.double(), doubled, 3, "reference")
    assert [t.dtype for t in actual] == [torch.bfloat16, torch.float32, torch.bfloat16]
    for name, a, e, x in zip(("new_cls", "cls", "tokens"), actual, eager, exact, strict=True):
        assert_within_rule(a, e, x, name, torch.bfloat16)


def test_what_is_declined(cuda_device: str) -> None:
    """Some widths, fusions without f or g, and matrices of another dtype than the tokens."""
    cases = [
        (40, 96, torch.float32, "40 channels of the CLS are no multiple of 16"),
        (48, 72, torch.float32, "72 channels are no multiple of 16"),
        (1600, 96, torch.float32, "1600 channels of the CLS are more than 1536"),
        (48, 1536, torch.float32, "bytes of shared memory, of which a block there has"),
    ]
    for cls_dim, channels, dtype, reason in cases:
        weights = FusionWeights(
            *(w.float().to(cuda_device) for w in make_weights(cls_dim, channels))
        )
        cls = torch.randn(1, cls_dim, device=cuda_device)
        tokens = torch.randn(1, 2, channels, device=cuda_device).to(dtype)
        with pytest.raises(ValueError, match=f"cuda: .*{reason}"):
            ck.cross_attention_fusion(cls, tokens, weights, 3, backend="cuda")
    weights = FusionWeights(*(w.float().to(cuda_device) for w in make_weights(48, 48)))
    cls, tokens = (torch.randn(s, device=cuda_device) for s in ((1, 48), (1, 2, 48)))
    for identity in IDENTITIES:
        with pytest.raises(ValueError, match="cuda: kernels without f or g"):
            lacking = without(weights, identity)
            ck.cross_attention_fusion(cls, tokens, lacking, 3, backend="cuda")
    weights = FusionWeights(*(w.float().to(cuda_device) for w in make_weights(48, 96)))
    cls = torch.randn(1, 48).to(cuda_device, torch.bfloat16)
    tokens = torch.randn(1, 2, 96).to(cuda_device, torch.bfloat16)
    reason = r"cuda: the matrices are in torch.float16, the tokens in torch.bfloat16"
    with torch.autocast(cuda_device, torch.float16), pytest.raises(ValueError, match=reason):
        ck.cross_attention_fusion(cls, tokens, weights, 3, backend="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_tokens_under_autocast(dtype: torch.dtype, cuda_device: str) -> None:
    """Ordinary mixed precision: parameters and tokens in float32, linear layers in 16 bits."""
    inputs = torch.randn(3, 48), torch.randn(3, 9, 96), *make_weights(48, 96)

    def run(backend: str, precision: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [t.to(cuda_device, precision).requires_grad_() for t in inputs]
        cls, tokens, *weights = leaves
        mixed = torch.autocast(cuda_device, dtype, enabled=precision == torch.float32)
        with mixed:
            y = ck.cross_attention_fusion(cls, tokens, FusionWeights(*weights), 3, backend=backend)
        return y, *torch.autograd.grad(y.double().square().sum(), leaves)

    actual, eager = run("cuda", torch.float32), run("reference", torch.float32)
    exact = run("reference", torch.float64)
    assert [t.dtype for t in actual] == [t.dtype for t in eager]
    names = "new_cls", "cls", "tokens", *FusionWeights._fields
    for name, a, e, x in zip(names, actual, eager, exact, strict=True):
        assert_within_rule(a, e, x, name, dtype)


def test_compiled_without_a_graph_break(cuda_device: str) -> None:
    module = CrossAttentionFusion(48, 96, 3, backend="cuda").to(cuda_device)
    cls = torch.randn(3, 48, device=cuda_device)
    tokens = torch.randn(3, 9, 96, device=cuda_device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    outputs = compiled(cls, tokens), module(cls, tokens)
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(y.sum(), list(module.parameters())) for y in outputs]
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e)


def test_autocast(cuda_device: str) -> None:
    module = CrossAttentionFusion(48, 96, 3, backend="cuda").to(cuda_device)
    cls = torch.randn(3, 48, device=cuda_device)
    tokens = torch.randn(3, 9, 96, device=cuda_device).bfloat16()
    with torch.autocast(cuda_device, torch.bfloat16):
        out = module(cls, tokens)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().sum(), list(module.parameters()))
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)


@pytest.mark.slow_on_cpu
def test_operators_are_what_they_say(cuda_device: str) -> None:
    weights = FusionWeights(*(w.float().to(cuda_device) for w in make_weights(32, 16)))
    cls, tokens = torch.randn(3, 32, device=cuda_device), torch.randn(3, 5, 16).to(cuda_device)
    scale = torch.rand(3, device=cuda_device)
    inputs = FusionInputs(cls, tokens, weights, 2, scale)
    check_operators(OPERATIONS["cross_attention_fusion"], inputs, 1e-6, "cuda")


def test_clusters_share_the_weights_where_images_fill_the_sms(cuda_device: str) -> None:
    h200, b200, a100 = (Multiprocessors(*of) for of in ((132, True), (148, True), (108, False)))

    def shape(batch: int, sms: Multiprocessors, num_tokens: int = 196) -> ClusterShape:
        return cuda.cluster_shape((batch, num_tokens, 384, 192, 6, 1e-6), sms)

    assert shape(1, h200) == ClusterShape(1, 8)
    assert shape(32, h200) == ClusterShape(2, 8)
    assert shape(64, h200) == ClusterShape(8, 8)
    assert shape(256, h200) == ClusterShape(16, 8)
    assert shape(100_000, b200) == ClusterShape(16, 8)
    assert shape(64, a100) == ClusterShape(1, 1)
    assert shape(1024, a100) == ClusterShape(16, 1)
    assert shape(1, h200, 100_000) == ClusterShape(8, 8)  # partials would need too much memory

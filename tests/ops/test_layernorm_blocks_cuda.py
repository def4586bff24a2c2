"""layernorm_msa and layernorm_ffn in CUDA: on a GPU if there is one, else on the host shim."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_within_rule
from block_cases import check_ffn, check_msa, ffn_weights, msa_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_checks import check_operators
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels import FfnWeights, MsaWeights
from crossvit_kernels.modules import TransformerBlock
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs
from crossvit_kernels.ops.operator import OPERATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: (C, heads, mlp_ratio) of both branches of CrossViT-Ti, S, B, 9, 15 and 18.
NAMED_WIDTHS = [
    *((96, 3, 4), (192, 3, 4), (192, 6, 4), (384, 6, 3), (384, 12, 4), (768, 12, 4)),
    *((128, 4, 3), (256, 4, 3), (224, 7, 3), (448, 7, 3)),
]


def msa(*sizes: int, dtype: torch.dtype = torch.float32, **options) -> None:
    check_msa(*sizes, dtype=dtype, backend="cuda", **options)


def ffn(*sizes: int, dtype: torch.dtype = torch.float32, **options) -> None:
    check_ffn(*sizes, dtype=dtype, backend="cuda", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", ["fast", "lean"])
def test_msa(keep: str, dtype: torch.dtype, cuda_device: str) -> None:
    """Several tiles of rows, queries and keys; a CLS; drop path; no bias."""
    options = {"dtype": dtype, "keep": keep, "device": cuda_device}
    msa(96, 3, 2, 70, scaled=True, with_cls=True, **options)
    msa(64, 1, 1, 37, bias=False, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ffn(dtype: torch.dtype, cuda_device: str) -> None:
    ffn(96, 136, 2, 70, dtype=dtype, scaled=True, device=cuda_device)
    ffn(40, 88, 1, 21, dtype=dtype, device=cuda_device)


@pytest.mark.parametrize("head_dim, heads", [(8, 5), (24, 3), (40, 1), (48, 2), (56, 3)])
def test_heads_narrower_than_their_tile(head_dim: int, heads: int, cuda_device: str) -> None:
    dtype = DTYPES[heads % 3]
    msa(head_dim * heads, heads, 2, 35, dtype=dtype, with_cls=True, device=cuda_device)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("channels, heads, ratio", NAMED_WIDTHS)
def test_named_widths(channels: int, heads: int, ratio: int, cuda_device: str) -> None:
    msa(channels, heads, 2, 17, with_cls=True, dtype=torch.bfloat16, device=cuda_device)
    msa(channels, heads, 1, 18, scaled=True, device=cuda_device)
    ffn(channels, ratio * channels, 1, 17, dtype=torch.bfloat16, device=cuda_device)


@pytest.mark.slow_on_cpu
def test_widest(cuda_device: str) -> None:
    msa(1024, 16, 1, 20, dtype=torch.float16, device=cuda_device)
    ffn(1024, 64, 1, 20, dtype=torch.float16, device=cuda_device)


@pytest.mark.sanitizer
@pytest.mark.parametrize("num_tokens", [1, 2, 130])
def test_few_and_odd_tokens(num_tokens: int, cuda_device: str) -> None:
    msa(32, 2, 2, num_tokens, scaled=True, with_cls=True, device=cuda_device)
    ffn(32, 56, 2, num_tokens, scaled=True, device=cuda_device)


@pytest.mark.slow_on_cpu
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    head_dim=st.integers(1, 8).map(lambda i: 8 * i),
    heads=st.sampled_from([1, 2, 3, 5]),
    batch=st.integers(1, 4),
    num_tokens=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    scaled=st.booleans(),
    with_cls=st.booleans(),
    keep=st.sampled_from(["fast", "lean"]),
)
def test_msa_fuzz(cuda_device, head_dim, heads, batch, num_tokens, dtype, scaled, with_cls, keep):
    torch.manual_seed(3)
    options = {"scaled": scaled, "with_cls": with_cls, "keep": keep, "device": cuda_device}
    msa(head_dim * heads, heads, batch, num_tokens, dtype=dtype, **options)


@pytest.mark.slow_on_cpu
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    channels=st.integers(1, 20).map(lambda i: 8 * i),
    hidden=st.integers(1, 40).map(lambda i: 8 * i),
    batch=st.integers(1, 4),
    num_tokens=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    scaled=st.booleans(),
)
def test_ffn_fuzz(cuda_device, channels, hidden, batch, num_tokens, dtype, scaled):
    torch.manual_seed(4)
    ffn(channels, hidden, batch, num_tokens, dtype=dtype, scaled=scaled, device=cuda_device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_mean_small_spread(dtype: torch.dtype, cuda_device: str) -> None:
    msa(96, 3, 2, 30, dtype=dtype, mean=100.0, with_cls=True, device=cuda_device)
    ffn(96, 40, 2, 30, dtype=dtype, mean=100.0, device=cuda_device)


def weights_of(channels: int, device: str, dtype: torch.dtype = torch.float32) -> MsaWeights:
    return MsaWeights(*(w.to(device, dtype) for w in msa_weights(channels)))


def ffn_weights_of(channels: int, device: str, dtype: torch.dtype = torch.float32) -> FfnWeights:
    return FfnWeights(*(w.to(device, dtype) for w in ffn_weights(channels, 88)))


def with_gradients(
    x: Tensor,
    weights: MsaWeights | FfnWeights,
    cls: Tensor | None = None,
    keep: str = "fast",
) -> list[Tensor]:
    """Results and the gradients of tokens, which are this library's alone."""
    leaves = [t.detach().requires_grad_() for t in (x, cls) if t is not None]
    if isinstance(weights, FfnWeights):
        y = ck.layernorm_ffn(leaves[0], weights, backend="cuda")
    else:
        options = {"cls": [*leaves, None][1], "keep": keep, "backend": "cuda"}
        y = ck.layernorm_msa(leaves[0], weights, 3, **options)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_depends_on_itself_alone(dtype: torch.dtype, cuda_device: str) -> None:
    """Not on its batch, in bits of result and gradients, nor on a NaN in another image."""
    weights = weights_of(48, cuda_device, dtype)
    x = torch.randn(3, 37, 48, device=cuda_device, dtype=dtype)
    cls = torch.randn(3, 48, device=cuda_device, dtype=dtype)
    expected = with_gradients(x, weights, cls)
    one_by_one = [with_gradients(x[i : i + 1], weights, cls[i : i + 1]) for i in range(3)]
    for parts, whole in zip(zip(*one_by_one, strict=True), expected, strict=True):
        assert torch.equal(torch.cat(parts), whole)
    x[1, 4, 7] = torch.nan
    for actual, whole in zip(with_gradients(x, weights, cls), expected, strict=True):
        assert torch.equal(actual[[0, 2]], whole[[0, 2]])
        assert actual[1].reshape(-1, 48)[-36:].isnan().any(dim=-1).all()  # dx is 0 where cls is
    ffn_weights = ffn_weights_of(48, cuda_device, dtype)
    clean = x.nan_to_num()
    expected = with_gradients(clean, ffn_weights)
    one_by_one = [with_gradients(image[None], ffn_weights) for image in clean]
    for parts, whole in zip(zip(*one_by_one, strict=True), expected, strict=True):
        assert torch.equal(torch.cat(parts), whole)
    for actual, whole in zip(with_gradients(x, ffn_weights), expected, strict=True):
        assert torch.equal(actual[[0, 2]], whole[[0, 2]]) and actual[1, 4].isnan().all()


def test_strided_and_misaligned_tokens(cuda_device: str) -> None:
    weights = weights_of(48, cuda_device)
    x = torch.randn(10, 3, 48, device=cuda_device).transpose(0, 1)
    expected = with_gradients(x.contiguous(), weights)
    odd = torch.empty(3 * 10 * 48 + 1, device=cuda_device)[1:].view(3, 10, 48).copy_(x)
    flat = torch.cat([x.new_zeros(1), *(w.flatten() for w in weights)])
    _, *pieces = flat.split([1, *(w.numel() for w in weights)])
    views = MsaWeights(*(p.view(w.shape) for p, w in zip(pieces, weights, strict=True)))
    for tokens, of in ((x, weights), (odd, weights), (x, views)):
        for a, e in zip(with_gradients(tokens, of), expected, strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("sign", [1, -1])
def test_huge_scores_do_not_overflow(sign: int, cuda_device: str) -> None:
    """Nor do those of one sign, beside which a missing key's 0 is large or small."""
    weights = weights_of(48, cuda_device)
    weights.qkv_weight[:96] *= 1e3
    weights.qkv_bias[:48], weights.qkv_bias[48:96] = 1e3, sign * 1e3
    x = torch.randn(2, 30, 48, device=cuda_device)
    actual = with_gradients(x, weights)
    y = ck.layernorm_msa(x, weights, 3, backend="reference")
    torch.testing.assert_close(actual[0], y, rtol=1e-3, atol=1e-3)
    assert actual[1].isfinite().all()


def test_lean_gives_what_fast_gives(cuda_device: str) -> None:
    weights = weights_of(48, cuda_device)
    x = torch.randn(2, 40, 48, device=cuda_device)
    results = (with_gradients(x, weights, keep=keep) for keep in ("fast", "lean"))
    for fast, lean in zip(*results, strict=True):
        assert torch.equal(fast, lean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half", ["msa", "ffn"])
def test_float32_tokens_under_autocast(half: str, dtype: torch.dtype, cuda_device: str) -> None:
    """Ordinary mixed precision: parameters and tokens in float32, linear layers in 16 bits."""
    weights = msa_weights(48) if half == "msa" else ffn_weights(48, 88)
    inputs = [torch.randn(3, 30, 48), torch.randn(3, 48), *weights]
    if half == "ffn":
        del inputs[1]
    upstream = torch.randn(3, 30, 48, device=cuda_device)

    def run(backend: str, precision: torch.dtype) -> list[Tensor]:
        leaves = [t.to(cuda_device, precision).requires_grad_() for t in inputs]
        with torch.autocast(cuda_device, dtype, enabled=precision == torch.float32):
            if half == "msa":
                x, cls, *w = leaves
                y = ck.layernorm_msa(x, MsaWeights(*w), 3, cls=cls, backend=backend)
            else:
                y = ck.layernorm_ffn(leaves[0], FfnWeights(*leaves[1:]), backend=backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]

    actual, eager = run("cuda", torch.float32), run("reference", torch.float32)
    exact = run("reference", torch.float64)
    assert [t.dtype for t in actual] == [t.dtype for t in eager]
    names = "y", "x", *(("cls",) if half == "msa" else ()), *type(weights)._fields
    for name, *results in zip(names, actual, eager, exact, strict=True):
        if name == "qkv_bias":  # its third for k is exactly zero
            results = [torch.cat([r[:48], r[96:]]) for r in results]
        assert_within_rule(*results, name, dtype)


def test_only_wanted_gradients(cuda_device: str) -> None:
    """Frozen tokens or weights: what is computed equals what everything gives."""
    tensors = [torch.randn(2, 9, 48, device=cuda_device), *weights_of(48, cuda_device)]

    def gradients(*wanted: int) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        y = ck.layernorm_msa(leaves[0], MsaWeights(*leaves[1:]), 3, backend="cuda")
        return list(torch.autograd.grad(y.square().sum(), [leaves[i] for i in wanted]))

    everything = gradients(*range(7))
    for wanted in ((0,), (5, 6), (3,), (4,), (1, 2)):
        for index, gradient in zip(wanted, gradients(*wanted), strict=True):
            assert torch.equal(gradient, everything[index])


@pytest.mark.parametrize(
    "keep", ["fast", *(pytest.param(k, marks=pytest.mark.slow_on_cpu) for k in ("", "lean"))]
)
def test_operators_are_what_they_say(keep: str, cuda_device: str) -> None:
    x, cls = (torch.randn(*s, 32, device=cuda_device) for s in ((3, 5), (3,)))
    scale = torch.rand(3, device=cuda_device)
    inputs = MsaInputs(x, weights_of(32, cuda_device), 2, scale, cls)
    check_operators(OPERATIONS["layernorm_msa"], inputs, 1e-6, "cuda", keep)
    inputs = FfnInputs(x, ffn_weights_of(32, cuda_device), scale)
    check_operators(OPERATIONS["layernorm_ffn"], inputs, 1e-6, "cuda", keep)


@pytest.mark.slow_on_cpu
def test_compiled_without_a_graph_break(cuda_device: str) -> None:
    block = TransformerBlock(48, 3, mlp_ratio=2, backend="cuda").to(cuda_device)
    x = torch.randn(2, 9, 48, device=cuda_device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    outputs = compiled(x), block(x)
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(y.sum(), list(block.parameters())) for y in outputs]
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e)


def test_what_is_declined(cuda_device: str) -> None:
    cases = [
        (24, 2, 5, "12 channels of a head are no multiple of 8"),
        (136, 1, 5, "136 channels of a head are more than 128"),
        (1152, 18, 5, "1152 channels are more than 1024"),
        (24, 3, 0, "there are no tokens"),
    ]
    for channels, heads, num_tokens, reason in cases:
        x = torch.randn(1, num_tokens, channels, device=cuda_device)
        with pytest.raises(ValueError, match=f"cuda: .*{reason}"):
            ck.layernorm_msa(x, weights_of(channels, cuda_device), heads, backend="cuda")
    x = torch.zeros(1, 1, 24, device=cuda_device).expand(2, 2**29 + 1, 24)
    with pytest.raises(ValueError, match=f"cuda: .*{2**30 + 2} tokens are more than {2**30}"):
        ck.layernorm_msa(x, weights_of(24, cuda_device), 3, backend="cuda")
    x = torch.randn(1, 5, 24, device=cuda_device)
    with pytest.raises(ValueError, match=r"cuda: .*12 hidden units are no multiple of 8"):
        weights = FfnWeights(*(w.float().to(cuda_device) for w in ffn_weights(24, 12)))
        ck.layernorm_ffn(x, weights, backend="cuda")
    x = x.bfloat16()
    weights = weights_of(24, cuda_device)
    reason = "cuda: the matrices are in torch.float16, the tokens in torch.bfloat16"
    with torch.autocast(cuda_device, torch.float16), pytest.raises(ValueError, match=reason):
        ck.layernorm_msa(x, weights, 3, backend="cuda")

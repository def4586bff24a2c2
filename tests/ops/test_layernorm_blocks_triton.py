"""layernorm_msa and layernorm_ffn in Triton: compiled if there is a GPU, else interpreted."""

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
from crossvit_kernels.ops.common import configs, triton_linear
from crossvit_kernels.ops.layernorm_ffn import configs as ffn_configs
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs
from crossvit_kernels.ops.operator import OPERATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: float16 takes the way of bfloat16.
FIRST_DTYPES = (*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow_on_cpu))
#: (C, heads, mlp_ratio) of both branches of CrossViT-Ti, S, B, 9, 15 and 18.
NAMED_WIDTHS = [
    *((96, 3, 4), (192, 3, 4), (192, 6, 4), (384, 6, 3), (384, 12, 4), (768, 12, 4)),
    *((128, 4, 3), (256, 4, 3), (224, 7, 3), (448, 7, 3)),
]


@pytest.fixture(params=["fused", "split", "library"])
def variant(request: pytest.FixtureRequest):
    """Fix the kernel variant of a block for any number of rows."""
    with configs.VARIANTS.choose(request.param):
        yield request.param


def msa(*sizes: int, dtype: torch.dtype = torch.float32, **options) -> None:
    check_msa(*sizes, dtype=dtype, backend="triton", **options)


def ffn(*sizes: int, dtype: torch.dtype = torch.float32, **options) -> None:
    check_ffn(*sizes, dtype=dtype, backend="triton", **options)


@pytest.mark.parametrize("dtype", FIRST_DTYPES)
@pytest.mark.parametrize("keep", ["fast", "lean"])
@pytest.mark.parametrize("variant", ["split", "library"], indirect=True)
def test_msa(variant: str, keep: str, dtype: torch.dtype, triton_device: str) -> None:
    options = {"dtype": dtype, "keep": keep, "device": triton_device}
    msa(96, 3, 3, 37, scaled=True, with_cls=True, **options)
    msa(64, 4, 2, 21, bias=False, **options)


@pytest.mark.parametrize("dtype", FIRST_DTYPES)
@pytest.mark.parametrize("keep", ["fast", pytest.param("lean", marks=pytest.mark.slow_on_cpu)])
def test_ffn(variant: str, keep: str, dtype: torch.dtype, triton_device: str, monkeypatch) -> None:
    monkeypatch.setattr(ffn_configs, "keeps_hidden", lambda *_: True)  # as of wide ones
    options = {"dtype": dtype, "keep": keep, "device": triton_device}
    ffn(96, 384, 3, 37, scaled=True, **options)
    ffn(40, 88, 2, 21, **options)


@pytest.mark.parametrize("with_cls", [False, True])
def test_layernorm_before_its_product(with_cls: bool, triton_device: str, monkeypatch) -> None:
    """What wide blocks with many rows run, in inference and training."""
    monkeypatch.setattr(configs, "FEW_ROWS", 0)
    monkeypatch.setattr(configs.NORM_LINEAR, "_apart_from", 0)
    options = {"dtype": torch.bfloat16, "device": triton_device}
    with configs.VARIANTS.choose("split"):
        msa(64, 4, 2, 21, bias=not with_cls, with_cls=with_cls, **options)
        ffn(40, 88, 2, 21, **options)


@pytest.mark.parametrize("dtype, share", [(torch.float16, 0.506), (torch.bfloat16, 0.53)])
def test_gelu_in_16_bits_is_rounded_once(
    dtype: torch.dtype, share: float, triton_device: str
) -> None:
    """And the polynomial's error is a small share of that of rounding."""
    x = torch.linspace(-9, 9, 16 * 128, device=triton_device).to(dtype).view(1, -1, 16)
    one = torch.eye(16, device=triton_device, dtype=dtype)
    y = triton_linear.linear(x, one, None, "gelu").double()
    exact = torch.nn.functional.gelu(x.double())
    assert ((y - exact).abs() <= share * torch.finfo(dtype).eps * exact.abs() + 4e-7).all()


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("channels, heads, ratio", NAMED_WIDTHS)
def test_named_widths(channels: int, heads: int, ratio: int, triton_device: str) -> None:
    with configs.VARIANTS.choose("fused"):  # where the width allows
        msa(channels, heads, 2, 17, with_cls=True, dtype=torch.float16, device=triton_device)
        ffn(channels, ratio * channels, 2, 17, dtype=torch.float16, device=triton_device)


@pytest.mark.sanitizer
@pytest.mark.parametrize("num_tokens", [1, 2, pytest.param(70, marks=pytest.mark.slow_on_cpu)])
def test_few_and_odd_tokens(variant: str, num_tokens: int, triton_device: str) -> None:
    msa(32, 2, 3, num_tokens, scaled=True, with_cls=True, device=triton_device)
    ffn(32, 56, 3, num_tokens, scaled=True, device=triton_device)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_tokens", [17, 64, 65, 197, 257])
def test_whole_and_partial_tiles_of_attention(
    num_tokens: int, masked: bool, triton_device: str
) -> None:
    options = {"dtype": torch.bfloat16, "masked": masked, "device": triton_device}
    msa(64, 2, 3, num_tokens, scaled=True, layer_scale=0.1, **options)


def test_programs_with_several_tiles(variant: str, triton_device: str, monkeypatch) -> None:
    """LayerNorm's backward of many rows: each program adds up a run of them, the last a part."""
    monkeypatch.setattr(configs, "NORM_BACKWARD_PROGRAMS", 3)
    msa(48, 3, 3, 37, scaled=True, with_cls=True, device=triton_device)
    ffn(272, 24, 2, 21, scaled=True, device=triton_device)


def test_sums_beyond_float16(triton_device: str) -> None:
    """The values' bias: a sum over rows that does not fit in float16, times small factors."""
    x = torch.randn(1, 80, 32, device=triton_device, dtype=torch.float16)
    layer_scale = torch.full((32,), 1e-3, device=triton_device, dtype=torch.float16)
    drawn, gradients = msa_weights(32), {}
    for backend, dtype in (("triton", torch.float16), ("reference", torch.float64)):
        weights = MsaWeights(*(w.half().to(triton_device, dtype) for w in drawn))
        bias = weights.qkv_bias.requires_grad_()
        options = {"layer_scale": layer_scale.to(dtype), "backend": backend}
        y = ck.layernorm_msa(x.to(dtype), weights, 2, **options)
        (gradients[backend],) = torch.autograd.grad(y, bias, torch.full_like(y, 1000.0))
    values = {backend: gradient[64:].double() for backend, gradient in gradients.items()}
    torch.testing.assert_close(values["triton"], values["reference"], rtol=1e-2, atol=0.1)


def test_the_keys_bias_has_no_gradient(triton_device: str) -> None:
    weights = MsaWeights(*(w.float().to(triton_device) for w in msa_weights(32)))
    bias = weights.qkv_bias.requires_grad_()
    x = torch.randn(2, 9, 32, device=triton_device)
    y = ck.layernorm_msa(x, weights, 2, backend="triton")
    (gradient,) = torch.autograd.grad(y.square().sum(), bias)
    assert (gradient[32:64] == 0).all() and gradient[:32].any() and gradient[64:].any()


@pytest.mark.slow_on_cpu
@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    head_dim=st.sampled_from([16, 32, 64]),
    heads=st.sampled_from([1, 2, 3, 5]),
    batch=st.integers(1, 4),
    num_tokens=st.integers(2, 70),
    dtype=st.sampled_from(DTYPES),
    scaled=st.booleans(),
    with_cls=st.booleans(),
    keep=st.sampled_from(["fast", "lean"]),
)
def test_msa_fuzz(
    variant, triton_device, head_dim, heads, batch, num_tokens, dtype, scaled, with_cls, keep
):
    torch.manual_seed(3)
    sizes = (head_dim * heads, heads, batch, num_tokens)
    options = {"scaled": scaled, "with_cls": with_cls, "keep": keep, "device": triton_device}
    msa(*sizes, dtype=dtype, **options)


@pytest.mark.slow_on_cpu
@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    channels=st.integers(1, 20).map(lambda i: 8 * i),
    hidden=st.integers(2, 40).map(lambda i: 8 * i),
    batch=st.integers(1, 4),
    num_tokens=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    scaled=st.booleans(),
    keep=st.sampled_from(["fast", "lean"]),
)
def test_ffn_fuzz(variant, triton_device, channels, hidden, batch, num_tokens, dtype, scaled, keep):
    torch.manual_seed(4)
    options = {"dtype": dtype, "scaled": scaled, "keep": keep, "device": triton_device}
    ffn(channels, hidden, batch, num_tokens, **options)


def test_large_mean_small_spread(variant: str, triton_device: str) -> None:
    msa(96, 3, 2, 50, mean=100.0, with_cls=True, device=triton_device)
    ffn(96, 288, 2, 50, mean=100.0, device=triton_device)


def blocks(device: str, keep: str = "fast", channels: int = 48, hidden: int = 88):
    """Make both halves in float32, by name."""
    msa = MsaWeights(*(w.float().to(device) for w in msa_weights(channels)))
    ffn = FfnWeights(*(w.float().to(device) for w in ffn_weights(channels, hidden)))
    options = {"backend": "triton"}
    return {
        "msa": lambda x: ck.layernorm_msa(x, msa, 3, keep=keep, **options),
        "ffn": lambda x: ck.layernorm_ffn(x, ffn, **options),
    }


def with_gradient(function, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]


@pytest.mark.slow_on_cpu
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value")  # numpy
@pytest.mark.parametrize("half", ["msa", "ffn"])
def test_an_image_depends_on_itself_alone(half: str, variant: str, triton_device: str) -> None:
    """Not on its batch, nor on a NaN in another image."""
    function = blocks(triton_device)[half]
    # In the interpreter, NumPy's products depend on a row's place in its tile: use whole tiles.
    num_tokens = 37 if triton_device == "cuda" else 64
    x = torch.randn(3, num_tokens, 48, device=triton_device)
    expected = with_gradient(function, x)
    assert torch.equal(function(x), expected[0])
    one_by_one = [with_gradient(function, image[None]) for image in x]
    for actual, whole in zip(zip(*one_by_one, strict=True), expected, strict=True):
        if variant == "library" or (half == "msa" and whole is expected[1]):
            torch.testing.assert_close(torch.cat(actual), whole)  # products of torch's libraries
        else:
            assert torch.equal(torch.cat(actual), whole)
    x[1, 4, 7] = torch.nan
    for actual, whole in zip(with_gradient(function, x), expected, strict=True):
        assert torch.equal(actual[[0, 2]], whole[[0, 2]])
        assert actual[1, 4].isnan().all()
        assert half == "ffn" or actual[1].isnan().any(dim=-1).all()


@pytest.mark.parametrize("half", ["msa", "ffn"])
def test_strided_tokens(half: str, variant: str, triton_device: str) -> None:
    function = blocks(triton_device)[half]
    x = torch.randn(10, 3, 48, device=triton_device).transpose(0, 1)
    for actual, expected in zip(
        with_gradient(function, x), with_gradient(function, x.contiguous()), strict=True
    ):
        assert torch.equal(actual, expected)
    misaligned = torch.empty(3 * 10 * 48 + 1, device=triton_device)[1:].view(3, 10, 48).copy_(x)
    assert torch.equal(function(misaligned), function(x))


def test_huge_scores_do_not_overflow(variant: str, triton_device: str) -> None:
    weights = MsaWeights(*(w.float().to(triton_device) for w in msa_weights(48)))
    weights = weights._replace(qkv_weight=weights.qkv_weight * 1e4)
    x = torch.randn(2, 30, 48, device=triton_device)
    actual = ck.layernorm_msa(x, weights, 3, backend="triton")
    expected = ck.layernorm_msa(x, weights, 3, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1)  # updates are about 1e4


@pytest.mark.slow_on_cpu
def test_lean_gives_what_fast_gives(triton_device: str) -> None:
    x = torch.randn(2, 40, 48, device=triton_device)
    results = []
    for keep in ("fast", "lean"):
        torch.manual_seed(1)
        with configs.VARIANTS.choose("split"):  # backward recomputes with this variant
            results.append(with_gradient(blocks(triton_device, keep)["msa"], x))
    for fast, lean in zip(*results, strict=True):
        assert torch.equal(fast, lean)


def test_mixed_dtypes(triton_device: str) -> None:
    """As under autocast: tokens in float32, linear layers in 16 bits."""
    x, cls = (torch.randn(*s, 48, device=triton_device) for s in ((3, 30), (3,)))
    ways = {"msa": msa_weights(48), "ffn": ffn_weights(48, 88)}
    for half, weights in ways.items():
        upstream = torch.randn(x.shape, device=triton_device)

        def run(
            backend: str,
            dtype: torch.dtype,
            enabled: bool,
            half: str = half,
            weights: tuple[Tensor, ...] = weights,
            upstream: Tensor = upstream,
        ) -> list[Tensor]:
            leaves = [t.to(x.device, dtype).requires_grad_() for t in (x, cls, *weights)]
            with torch.autocast(triton_device, torch.bfloat16, enabled=enabled):
                if half == "msa":
                    w = MsaWeights(*leaves[2:])
                    y = ck.layernorm_msa(leaves[0], w, 3, cls=leaves[1], backend=backend)
                else:
                    y = ck.layernorm_ffn(leaves[0], FfnWeights(*leaves[2:]), backend=backend)
            used = leaves if half == "msa" else [leaves[0], *leaves[2:]]
            return [y.detach(), *torch.autograd.grad(y, used, upstream.to(y.dtype))]

        exact = run("reference", torch.float64, enabled=False)
        eager = run("reference", torch.float32, enabled=True)
        actual = run("triton", torch.float32, enabled=True)
        assert actual[0].dtype == torch.float32
        for i, (a, e, x64) in enumerate(zip(actual, eager, exact, strict=True)):
            assert_within_rule(a, e, x64, f"{half}, result {i}", dtype=torch.bfloat16)


@pytest.mark.parametrize("keep", ["", "fast", "lean"])
def test_opcheck(keep: str, triton_device: str) -> None:
    x, cls = (torch.randn(*s, 32, device=triton_device) for s in ((3, 5), (3,)))
    scale = torch.rand(3, device=triton_device)
    weights = MsaWeights(*(w.float().to(triton_device) for w in msa_weights(32)))
    inputs = MsaInputs(x, weights, 2, scale, cls)
    check_operators(OPERATIONS["layernorm_msa"], inputs, 1e-6, "triton", keep)
    ffn = FfnWeights(*(w.float().to(triton_device) for w in ffn_weights(32, 48)))
    check_operators(OPERATIONS["layernorm_ffn"], FfnInputs(x, ffn, scale), 1e-6, "triton", keep)


def test_why_not(triton_device: str) -> None:
    x = torch.randn(2, 5, 24, device=triton_device)
    weights = MsaWeights(*(w.float().to(triton_device) for w in msa_weights(24)))
    with pytest.raises(ValueError, match="heads of 12 channels are no multiple of 8 up to 128"):
        ck.layernorm_msa(x, weights, 2, backend="triton")
    with pytest.raises(ValueError, match="there are no tokens"):
        ck.layernorm_msa(x[:0], weights, 3, backend="triton")
    with (
        pytest.raises(ValueError, match="variant: expected one of"),
        configs.VARIANTS.choose("two"),
    ):
        pass


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("keep, share", [("lean", 0.2), ("fast", 0.6)])
def test_saved_bytes(keep: str, share: float, triton_device: str) -> None:
    """Bytes that a block saves, against eager mode: CrossViT-15's L branch, in 16 bits."""
    block = TransformerBlock(384, 6, mlp_ratio=3, keep=keep).to(triton_device, torch.float16)
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    x = torch.randn(1, 197, 384, device=triton_device, dtype=torch.float16, requires_grad=True)
    kept = {}
    for backend in ("triton", "reference"):
        block.backend = backend
        storages: dict[int, int] = {}

        def pack(t: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = block(x)  # kept alive, so that no storage is reused
        kept[backend] = sum(storages.values())
        del y
    assert kept["triton"] <= share * kept["reference"], kept

"""cross_attention_fusion_pair: one launch on Triton, else two calls; the same results."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from accuracy import assert_within_rule
from fusion_cases import launches, make_weights
from torch import Tensor
from torch.library import opcheck

import crossvit_kernels as ck
from crossvit import CrossViT
from crossvit_kernels import FusionInputs, FusionWeights
from crossvit_kernels.gpu import configurations
from crossvit_kernels.gpu.configurations import FORMS, PAIRS
from crossvit_kernels.ops.attention_core import shape
from crossvit_kernels.ops.cross_attention import triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(
    batch: int,
    own: int,
    channels: int,
    heads: int,
    num_tokens: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    biases: bool = True,
    scaled: bool = False,
) -> FusionInputs:
    """Views of [B, 1 + N, C], as a model gives them."""
    found = make_weights(own, channels, biases)
    weights = FusionWeights(*(None if t is None else t.to(device, dtype) for t in found))
    cls = torch.randn(batch, 3, own).to(device, dtype)[:, 0]
    tokens = torch.randn(batch, 1 + num_tokens, channels).to(device, dtype)[:, 1:]
    scale = torch.rand(batch).to(device) if scaled else None
    return FusionInputs(cls, tokens, weights, heads, scale)


def both(device: str, batch: int = 3, tokens: tuple[int, int] = (9, 5), **options):
    """Of a block with branches of 32 and 48 channels."""
    small, large = (batch, 32, 48, 3, tokens[0]), (batch, 48, 32, 2, tokens[1])
    return tuple(make(*sizes, device=device, **options) for sizes in (small, large))


def run(pair: tuple[FusionInputs, FusionInputs], form: str) -> tuple[Tensor, Tensor]:
    with PAIRS.choose(form):
        return ck.cross_attention_fusion_pair(*pair, backend="triton")


def cast(inputs: FusionInputs, dtype: torch.dtype) -> FusionInputs:
    weights = FusionWeights(*(None if t is None else t.to(dtype) for t in inputs.weights))
    cls, tokens = inputs.cls.to(dtype), inputs.tokens.to(dtype)
    return inputs._replace(cls=cls, tokens=tokens, weights=weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rule(dtype: torch.dtype, triton_device: str) -> None:
    pair = both(triton_device, tokens=(33, 20), dtype=dtype, scaled=True)
    exact, eager = (
        ck.cross_attention_fusion_pair(*(cast(x, t) for x in pair), backend="reference")
        for t in (torch.float64, dtype)
    )
    for a, e, x in zip(run(pair, "paired"), eager, exact, strict=True):
        assert_within_rule(a, e, x, dtype=dtype)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("own, other, heads", [(128, 256, 4), (192, 384, 6), (224, 448, 7)])
def test_named_widths(own: int, other: int, heads: int, triton_device: str) -> None:
    options = {"dtype": torch.bfloat16, "device": triton_device}
    pair = make(1, own, other, heads, 5, **options), make(1, other, own, heads, 9, **options)
    for a, e in zip(run(pair, "paired"), run(pair, "apart"), strict=True):
        assert torch.equal(a, e)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, tokens", [(1, (1, 1)), (1, (0, 40)), (5, (17, 3)), (7, (2, 33))])
def test_the_same_bits_as_two_launches(batch, tokens, dtype, triton_device, monkeypatch) -> None:
    """Batches that do not fill the programs' images, too."""
    config = dataclasses.replace(configurations.fusion("fusion forward", 90, 48), programs=2)
    monkeypatch.setattr(configurations, "fusion", lambda *key: config)
    for biases, scaled in ((True, False), (False, True)):
        pair = both(triton_device, batch, tokens, dtype=dtype, biases=biases, scaled=scaled)
        ran = launches(monkeypatch)
        paired = run(pair, "paired")
        assert ran == ["fusion_forward_pair"]
        alone = [ck.cross_attention_fusion(*x[:4], 1e-6, x[4], backend="triton") for x in pair]
        for a, b, c in zip(paired, run(pair, "apart"), alone, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
        monkeypatch.undo()
        monkeypatch.setattr(configurations, "fusion", lambda *key: config)


def test_when_one_launch_does_both(triton_device: str, monkeypatch) -> None:
    ran = launches(monkeypatch)

    def launched(pair: tuple[FusionInputs, FusionInputs]) -> list[str]:
        ran.clear()
        ck.cross_attention_fusion_pair(*pair, backend="triton")
        return ran.copy()

    one, two = ["fusion_forward_pair"], ["fusion_forward"] * 2
    three = ["fusion_before", "fusion_tokens", "fusion_after"] * 2
    pair = both(triton_device, 2)
    assert launched(pair) == one
    with FORMS.choose("three"), PAIRS.choose("paired"):
        assert launched(pair) == three
    with PAIRS.choose("apart"):
        assert launched(pair) == two
    with pytest.raises(ValueError, match="form: expected one of"):
        PAIRS.choose("one").__enter__()
    small = dataclasses.replace(configurations.fusion("fusion forward", 90, 48), pair_up_to=1)
    with monkeypatch.context() as patched:
        patched.setattr(configurations, "fusion", lambda *key: small)
        assert launched(pair) == two
        with PAIRS.choose("paired"):
            assert launched(pair) == one
    with monkeypatch.context() as patched:
        patched.setattr(triton, "_MANY_TOKENS", 8)
        assert "fusion_forward_pair" not in launched(pair)
    with monkeypatch.context() as patched:  # other launch options at one of the widths
        patched.setattr(configurations, "candidates", passes_by_width)
        found = shape.candidates("fusion forward", pair[0].tokens, 3, True)
        assert found.options["num_warps"] == 4
        assert launched(pair) == two
    other_batch = both(triton_device, 1)
    assert launched((pair[0], other_batch[1])) == two
    assert launched(both(triton_device, 0)) == []
    with torch.enable_grad():
        pair[0].cls.requires_grad_()
        assert launched(pair) == two


def passes_by_width(kernel, device, chip, channels, size):
    config = configurations.from_table(kernel, chip, channels, size)
    return (dataclasses.replace(config, num_warps=4) if channels == 48 else config,), False


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_gradients_are_those_of_two_calls(backend: str, triton_device: str) -> None:
    device = "cpu" if backend == "cpu" else triton_device
    if not ck.backends()[backend]:
        pytest.skip(ck.backends().reasons[backend])
    pair = both(device, scaled=True)
    leaves = [t.requires_grad_() for x in pair for t in (x.cls, *x.weights)]
    together = ck.cross_attention_fusion_pair(*pair, backend=backend)
    apart = [ck.cross_attention_fusion(*x[:4], 1e-6, x[4], backend=backend) for x in pair]
    found, expected = (
        torch.autograd.grad([y.square().sum() for y in new_cls], leaves)
        for new_cls in (together, apart)
    )
    for a, e in zip((*together, *found), (*apart, *expected), strict=True):
        assert torch.equal(a, e)


def test_compiled_without_a_graph_break(triton_device: str) -> None:
    pair = both(triton_device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(a: FusionInputs, b: FusionInputs) -> tuple[Tensor, Tensor]:
        return ck.cross_attention_fusion_pair(a, b, backend="triton")

    with torch.no_grad():
        for a, e in zip(compiled(*pair), run(pair, "auto"), strict=True):
            assert torch.equal(a, e)
    pair[1].tokens.requires_grad_()
    for a, e in zip(compiled(*pair), run(pair, "auto"), strict=True):
        assert torch.equal(a, e) and a.requires_grad == e.requires_grad


def test_operator_is_what_it_says(triton_device: str) -> None:
    arguments = [
        argument
        for x in both(triton_device, biases=False, scaled=True)
        for argument in (x.cls, x.tokens, list(x.weights), x.num_heads, x.residual_scale)
    ]
    operator = torch.ops.crossvit_kernels.cross_attention_fusion_pair.default
    opcheck(operator, (*arguments, 1e-6, "triton"))


def test_autocast(triton_device: str) -> None:
    pair = both(triton_device)
    with torch.autocast(triton_device, torch.bfloat16):
        together = ck.cross_attention_fusion_pair(*pair, backend="triton")
        apart = [ck.cross_attention_fusion(*x[:4], backend="triton") for x in pair]
    for a, e in zip(together, apart, strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, e)


def test_a_model_launches_both_at_once(triton_device: str, monkeypatch) -> None:
    model = CrossViT("crossvit_tiny", img_size=24, num_classes=3, num_blocks=1)
    model = model.to(triton_device).eval().set_fused(True, backend="triton")
    x = torch.randn(1, 3, 24, 24, device=triton_device)
    with torch.no_grad():
        with PAIRS.choose("apart"):
            expected = model(x)
        ran = launches(monkeypatch)
        assert torch.equal(model(x), expected)
    assert ran.count("fusion_forward_pair") == 1 and "fusion_forward" not in ran


def test_errors_name_the_fusion() -> None:
    a, b = both("cpu")
    with pytest.raises(TypeError, match="second: expected FusionInputs, found tuple"):
        ck.cross_attention_fusion_pair(a, tuple(b))
    with pytest.raises(ValueError, match=r"first\.num_heads: 5 does not divide"):
        ck.cross_attention_fusion_pair(a._replace(num_heads=5), b)
    with pytest.raises(ValueError, match=r"second\.tokens: expected shape"):
        ck.cross_attention_fusion_pair(a, b._replace(tokens=b.tokens[0]))
    weights = b.weights._replace(out_bias=None)
    with pytest.raises(TypeError, match=r"second\.weights\.out_bias: expected a tensor"):
        ck.cross_attention_fusion_pair(a, b._replace(weights=weights))
    with pytest.raises(ValueError, match="eps: expected a number >= 0"):
        ck.cross_attention_fusion_pair(a, b, eps=-1.0)

"""The modules against replicas of what they replace: names, values, gradients, training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from eager_modules import C_CLS, HEADS, C, EagerBlock, EagerFusion
from module_cases import CASES, B, Case, N, X, assert_agree, outcome, pair, random_inputs
from torch import Tensor, nn

from crossvit_kernels import modules

FUSIONS_AND_BLOCKS = {
    "fusion": (modules.CrossAttentionFusion, (C_CLS, C, HEADS), EagerFusion, CASES["fusion"]),
    "block": (modules.TransformerBlock, (C, HEADS, 2.0), EagerBlock, CASES["block"]),
}


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("cpu_backend")
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_state_dicts_are_exchangeable(name: str) -> None:
    fused, eager = CASES[name].fused(), CASES[name].eager()
    assert list(fused.state_dict().keys() ^ eager.state_dict().keys()) == []
    fused.load_state_dict(eager.state_dict(), strict=True)
    eager.load_state_dict(CASES[name].fused().state_dict(), strict=True)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_what_it_replaces(name: str, backend: str) -> None:
    case = CASES[name]
    fused, eager = pair(case, backend)
    inputs = random_inputs(case)
    assert_agree(outcome(fused, *inputs), outcome(eager, *inputs))
    with torch.no_grad():
        torch.testing.assert_close(fused(*inputs), eager(*inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_an_empty_batch(name: str, backend: str | None) -> None:
    fused, _ = pair(CASES[name], backend)
    actual = outcome(fused, *random_inputs(CASES[name], batch=0))
    assert actual["output"].shape[0] == 0
    assert not any(gradient.any() for gradient in actual.values())


def test_map_head_with_a_mask(backend: str) -> None:
    fused, eager = pair(CASES["MAP head"], backend)
    (tokens,) = random_inputs(CASES["MAP head"])
    key_mask = torch.rand(B, N) < 0.5
    key_mask[:, 3] = True
    assert_agree(outcome(fused, tokens, key_mask), outcome(eager, tokens, key_mask))


def test_probe_ignores_masked_tokens(backend: str) -> None:
    fused, _ = pair(CASES["probe"], backend)
    (tokens,) = random_inputs(CASES["probe"])
    key_mask = torch.arange(N).expand(B, N) < 7
    torch.testing.assert_close(fused(tokens, key_mask), fused(tokens[:, :7]), rtol=0, atol=1e-12)


def test_class_attention_fuses_the_layernorm_before_it(backend: str) -> None:
    fused, eager = pair(CASES["class attention"], backend)
    (x,) = random_inputs(CASES["class attention"])
    norm = nn.LayerNorm(C, eps=1e-6, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)

    class NormThenAttention(nn.Module):
        def __init__(self, attn: nn.Module) -> None:
            super().__init__()
            self.norm, self.attn = norm, attn

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, self.norm)

    assert_agree(outcome(NormThenAttention(fused), x), outcome(NormThenAttention(eager), x))


def test_memory_formats_and_strided_tokens(backend: str) -> None:
    pool, eager = pair(CASES["pool 2d"], backend)
    x = torch.randn(B, C, 3, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    torch.testing.assert_close(pool(x), eager(x), rtol=1e-10, atol=1e-10)

    fusion, eager = pair(CASES["fusion"], backend)
    branches = torch.randn(B, 1 + N, C + C_CLS, dtype=torch.float64)
    cls, tokens = branches[:, 0, :C_CLS], branches[:, 1:, C_CLS:]
    torch.testing.assert_close(fusion(cls, tokens), eager(cls, tokens), rtol=1e-10, atol=1e-10)


# Drop path and dropout


def test_drop_path_scale() -> None:
    like = torch.empty(0, dtype=torch.float64)
    scale = modules.drop_path_scale(20_000, 0.25, training=True, like=like)
    assert scale.shape == (20_000,) and scale.dtype == torch.float64
    assert set(scale.tolist()) == {0.0, 1 / 0.75}
    # The mean of n draws lies within five of its standard deviations of 1.
    assert abs(scale.mean().item() - 1) < 5 * (0.25 / 0.75 / 20_000) ** 0.5
    assert modules.drop_path_scale(4, 0.25, training=False, like=like) is None
    assert modules.drop_path_scale(4, 0.0, training=True, like=like) is None
    for rate in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="drop_path"):
            modules.drop_path_scale(4, rate, training=True, like=like)


@pytest.mark.parametrize("name", FUSIONS_AND_BLOCKS)
def test_drop_path_draws_as_the_replaced_module(name: str, backend: str) -> None:
    make, arguments, make_eager, case = FUSIONS_AND_BLOCKS[name]
    rated = Case(
        lambda: make(*arguments, drop_path=0.4), lambda: make_eager(drop_path=0.4), case.shapes
    )
    fused, eager = pair(rated, backend)
    inputs = random_inputs(case, batch=16)
    torch.manual_seed(7)
    actual = outcome(fused, *inputs)
    torch.manual_seed(7)
    assert_agree(actual, outcome(eager, *inputs))
    assert not torch.equal(actual["output"], fused(*inputs))  # another draw


@pytest.mark.parametrize("name", FUSIONS_AND_BLOCKS)
def test_nothing_is_dropped_in_evaluation(name: str) -> None:
    make, arguments, _, case = FUSIONS_AND_BLOCKS[name]
    plain = make(*arguments).eval()
    rated = make(*arguments, drop_path=0.9, attn_drop=0.9).eval()
    rated.load_state_dict(plain.state_dict())
    inputs = [torch.randn(s) for s in case.shapes]
    assert torch.equal(rated(*inputs), plain(*inputs))


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (lambda: modules.CrossAttentionFusion(C_CLS, C, HEADS, attn_drop=0.5), ((B, C_CLS), X)),
        (lambda: modules.TransformerBlock(C, HEADS, attn_drop=0.5), (X,)),
        (lambda: modules.ClassAttention(C, HEADS, attn_drop=0.5), (X,)),
    ],
    ids=["fusion", "block", "class attention"],
)
def test_attention_dropout_runs_the_reference(
    make: Callable[[], nn.Module],
    shapes: tuple[tuple[int, ...], ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, inputs, rates = make(), [torch.randn(s) for s in shapes], []
    dropout = F.dropout

    def spy(weights: Tensor, p: float) -> Tensor:
        rates.append(p)
        return dropout(weights, p)

    monkeypatch.setattr(F, "dropout", spy)  # only the reference calls it
    assert not torch.equal(module(*inputs), module(*inputs))
    assert rates == [0.5, 0.5]
    module.backend = "cpu"
    with pytest.raises(ValueError, match="cpu"):
        module(*inputs)
    module.backend = "reference"
    module.eval()
    assert torch.equal(module(*inputs), module(*inputs))
    assert rates == [0.5, 0.5, 0.0, 0.0]


# Settings


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("name", CASES)
def test_backend_can_be_switched(name: str) -> None:
    fused, _ = pair(CASES[name], None)
    inputs = random_inputs(CASES[name])
    keys = list(fused.state_dict())
    results = {}
    for backend in ("reference", "cpu", None, "reference"):
        fused.backend = backend
        assert f"backend={backend!r}" in repr(fused)
        results.setdefault(backend, []).append(fused(*inputs).detach())
    assert list(fused.state_dict()) == keys
    assert torch.equal(*results["reference"])
    assert torch.equal(results["cpu"][0], results[None][0])
    fused.backend = "cupboard"
    with pytest.raises(ValueError, match="cupboard"):
        fused(*inputs)


@pytest.mark.parametrize(
    "make",
    [
        lambda heads: modules.CrossAttentionFusion(C_CLS, C, heads),
        lambda heads: modules.TransformerBlock(C, heads),
        lambda heads: modules.MAPHead(C, heads),
        lambda heads: modules.ClassAttention(C, heads),
        lambda heads: modules.AttentionPool2d(4, C, heads),
        lambda heads: modules.AttentiveProbe(C, heads),
    ],
)
def test_construction_checks_the_heads(make: Callable[[int], nn.Module]) -> None:
    assert f"dim={C}, num_heads={HEADS}" in repr(make(HEADS))
    with pytest.raises(ValueError, match="num_heads: 5 does not divide dim = 24"):
        make(5)
    with pytest.raises(TypeError, match="num_heads"):
        make(3.0)


def test_without_projections_widths_are_equal() -> None:
    with pytest.raises(ValueError, match="dim_own: expected dim, 24, without projections"):
        modules.CrossAttentionFusion(C_CLS, C, HEADS, projections=False)


@pytest.mark.parametrize("rate", ["attn_drop", "drop_path"])
def test_construction_checks_the_rates(rate: str) -> None:
    with pytest.raises(ValueError, match=rate):
        modules.CrossAttentionFusion(C_CLS, C, HEADS, **{rate: 1.0})
    with pytest.raises(ValueError, match=rate):
        modules.TransformerBlock(C, HEADS, **{rate: -0.1})


@pytest.mark.parametrize("shape", [(B, C, 4, 4), (B, C, 5, 3), (B, C + 8, 3, 5), (B, 15, C)])
def test_pool_2d_checks_the_feature_map(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \[B, 24, 3, 5\]"):
        modules.AttentionPool2d((3, 5), C, HEADS)(torch.zeros(shape))


def test_initialisation() -> None:
    def deviation(parameter: Tensor) -> float:
        return parameter.std().item()

    vit = {
        "fusion": modules.CrossAttentionFusion(96, 192, 6),
        "block": modules.TransformerBlock(192, 6),
        "class attention": modules.ClassAttention(192, 6, qkv_bias=True),
    }
    for module in vit.values():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                assert deviation(layer.weight) == pytest.approx(0.02, rel=0.05)
                assert not layer.bias.any()
            if isinstance(layer, nn.LayerNorm):
                assert (layer.weight == 1).all() and not layer.bias.any()

    probe = modules.AttentiveProbe(192, 6, num_queries=50)
    block = probe.cross_attention_block
    assert deviation(probe.query_tokens) == pytest.approx(0.02, rel=0.05)
    for layer, std in {
        block.xattn.q: 0.02,
        block.xattn.kv: 0.02,
        block.xattn.proj: 0.02 / 2**0.5,
        block.mlp.fc1: 0.02,
        block.mlp.fc2: 0.02 / 2**0.5,
    }.items():
        assert deviation(layer.weight) == pytest.approx(std, rel=0.05)

    head = modules.MAPHead(192, 6)
    assert head.attention.in_proj_weight.abs().max() <= (6 / (4 * 192)) ** 0.5  # Xavier
    assert deviation(head.attention.out_proj.weight) == pytest.approx(192**-0.5, rel=0.05)
    assert deviation(head.mlp.fc1.weight) == pytest.approx((2 / (5 * 192)) ** 0.5, rel=0.05)
    assert 0 < head.mlp.fc2.bias.abs().max() < 1e-5

    pool = modules.AttentionPool2d(7, 192, 6)
    assert deviation(pool.positional_embedding) == pytest.approx(192**-0.5, rel=0.05)
    assert deviation(pool.c_proj.weight) == pytest.approx(192**-0.5, rel=0.05)


# torch.compile. The warning is Dynamo's about itself: it instantiates what it traces.

compiles = pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")


@compiles
@pytest.mark.parametrize("name", ["fusion", "block", "MAP head", "pool 2d", "probe"])
def test_compiles_as_one_graph(name: str, backend: str) -> None:
    fused, _ = pair(CASES[name], backend)
    inputs = random_inputs(CASES[name])
    expected = outcome(fused, *inputs)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    actual = outcome(compiled, *inputs)
    assert_agree({k.removeprefix("_orig_mod."): v for k, v in actual.items()}, expected)


@compiles
def test_drop_path_compiles(backend: str) -> None:
    fused = modules.CrossAttentionFusion(C_CLS, C, HEADS, drop_path=0.5, backend=backend)
    cls, tokens = torch.randn(16, C_CLS), torch.randn(16, N, C)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.manual_seed(7)
    expected = fused(cls, tokens)
    torch.manual_seed(7)
    torch.testing.assert_close(compiled(cls, tokens), expected)

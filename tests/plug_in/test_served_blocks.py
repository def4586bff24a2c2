"""What a served block may have: LayerScale, activations, missing biases, masks, drop path."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from zoo_cases import assert_served_equals_own, randomised

import crossvit_kernels as ck
from crossvit_kernels import functional

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("cpu_backend")
C = 48
BLOCK = ("layernorm_msa", "layernorm_ffn")


def block(**options: Any) -> Any:
    """timm's block with LayerScale, whose vectors are far from 1."""
    from timm.models.vision_transformer import Block

    return randomised(Block(C, 3, **{"qkv_bias": True, "init_values": 0.5, **options}))


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, 9, C, dtype=torch.float32)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The arguments of fused functions that ran, by name."""
    import inspect

    ran: list[dict[str, Any]] = []
    for name in BLOCK:
        function = getattr(functional, name)

        def recorded(*args: Any, _run: Any = function, **kwargs: Any) -> Any:
            ran.append(inspect.signature(_run).bind(*args, **kwargs).arguments)
            return _run(*args, **kwargs)

        monkeypatch.setattr(functional, name, recorded)
    yield ran


def activations() -> dict[str, tuple[Any, str]]:
    from timm import layers
    from transformers.activations import ACT2CLS, ACT2FN

    timms = {
        "GELU": (layers.GELU, "gelu"),
        "GELUTanh": (layers.GELUTanh, "gelu_tanh"),
        "QuickGELU": (layers.QuickGELU, "quick_gelu"),
        "SiLU": (nn.SiLU, "silu"),
        "Swish": (layers.Swish, "silu"),
        "tanh": (lambda: nn.GELU("tanh"), "gelu_tanh"),
    }
    names = {
        "gelu": "gelu",
        "gelu_python": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_python_tanh": "gelu_tanh",
        "gelu_accurate": "gelu_tanh",
        "quick_gelu": "quick_gelu",
        "silu": "silu",
        "swish": "silu",
    }
    others = {name: (lambda n=name: ACT2FN[n], ours) for name, ours in names.items()}
    return timms | {name: other for name, other in others.items() if name in ACT2CLS}


@pytest.mark.parametrize("name", ["GELU", "GELUTanh", "QuickGELU", "SiLU", "tanh", "gelu_new"])
def test_activations(name: str, calls: list[dict[str, Any]]) -> None:
    pytest.importorskip("transformers")
    layer, ours = activations()[name]
    report = assert_served_equals_own(block(act_layer=layer), {"x": tokens()})
    assert report.rows[0].serves == BLOCK
    assert calls[-1]["activation"] == ours


def test_all_names_of_activations() -> None:
    pytest.importorskip("transformers")
    from crossvit_kernels.plug_in import looking

    for name, (layer, ours) in activations().items():
        assert looking.activation(layer(), "act") == ours, name


@pytest.mark.parametrize("layer", [nn.ReLU, nn.Mish, nn.Hardswish])
def test_other_activations(layer: Any) -> None:
    report = ck.accelerate(block(act_layer=layer), backend="cpu")
    assert report.rows[0].serves == BLOCK[:1]
    assert report.rows[0].reasons == (f"layernorm_ffn: activation {layer.__name__} (mlp.act)",)


def test_an_activation_that_is_replaced(calls: list[dict[str, Any]], caplog: Any) -> None:
    """One of the same class with other settings is found again, another class is not served."""
    module, x = block(act_layer=nn.GELU), tokens()
    ck.accelerate(module, backend="cpu")
    module(x)
    module.mlp.act.approximate = "tanh"
    served = module(x)
    assert [call.get("activation") for call in calls[1::2]] == ["gelu", "gelu_tanh"]
    torch.testing.assert_close(served, type(module).forward(module, x))
    module.mlp.act = nn.ReLU()
    with caplog.at_level(logging.WARNING, "crossvit_kernels"):
        assert torch.allclose(module(x), type(module).forward(module, x), atol=1e-5)
    assert len(calls) == 5  # attention is still served
    assert [r.getMessage() for r in caplog.records] == [
        "Block: mlp.act is now a ReLU; its own forward runs, not fused"
    ]


WITHOUT: dict[str, Callable[[Any], Any]] = {
    "norm biases": lambda b: [setattr(n, "bias", None) for n in (b.norm1, b.norm2)],
    "qkv bias": lambda b: setattr(b.attn.qkv, "bias", None),
    "projection bias": lambda b: setattr(b.attn.proj, "bias", None),
    "MLP biases": lambda b: [setattr(n, "bias", None) for n in (b.mlp.fc1, b.mlp.fc2)],
    "biases": lambda b: [
        setattr(m, "bias", None) for m in b.modules() if isinstance(m, (nn.Linear, nn.LayerNorm))
    ],
}


@pytest.mark.parametrize("which", WITHOUT)
def test_without(which: str) -> None:
    module = block()
    WITHOUT[which](module)
    assert assert_served_equals_own(module, {"x": tokens()}).rows[0].serves == BLOCK


def test_gradients_of_layer_scale(calls: list[dict[str, Any]]) -> None:
    """The rule holds for each gamma alone, and a frozen one gets no gradient."""
    module, x = block(), tokens()
    module.ls1.gamma.requires_grad_(False)
    x.requires_grad_()
    module(x).square().sum().backward()
    expected = module.ls2.gamma.grad.clone()
    module.zero_grad()
    ck.accelerate(module, backend="cpu", training=True)
    module(x).square().sum().backward()
    assert calls[0]["layer_scale"] is module.ls1.gamma and module.ls1.gamma.grad is None
    assert calls[1]["layer_scale"] is module.ls2.gamma
    torch.testing.assert_close(module.ls2.gamma.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_layer_scale_under_autocast(training: bool, calls: list[Any]) -> None:
    """Its vector stays float32 beside tokens in 16 bits."""
    module, x, found = block(), tokens(), []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
            output = module(module.mlp.fc2(module.mlp.fc1(x)))  # in 16 bits
        if training:
            output.float().square().sum().backward()
            found.append([output, module.ls1.gamma.grad, module.ls2.gamma.grad])
            module.zero_grad()
        else:
            found.append([output])
        if not calls:
            ck.accelerate(module, backend="cpu", training=training)
    assert len(calls) == 2
    for expected, actual in zip(*found, strict=True):
        assert actual.dtype == expected.dtype
        scale = expected.detach().abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2 * scale)


def test_one_half_with_layer_scale() -> None:
    module = block()
    module.ls1 = nn.Identity()
    assert assert_served_equals_own(module, {"x": tokens()}).rows[0].serves == BLOCK


class Gated(nn.Module):
    """LayerScale of another library."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((C,), 0.1, dtype=torch.float32, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.tanh()


def double_gamma(module: Any) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(module.ls1, "gamma", Doubled())


#: change -> what is still served, and the warning.
CHANGES: dict[str, tuple[Callable[[Any], Any], int, str]] = {
    "hook": (
        lambda b: b.ls1.register_forward_hook(lambda m, a, output: 2 * output),
        1,
        "ls1 has hooks",
    ),
    "replaced": (lambda b: setattr(b, "ls2", Gated()), 1, "ls2 is now a Gated"),
    "removed": (lambda b: setattr(b, "ls1", nn.Identity()), 2, ""),
    "other values": (lambda b: setattr(b.ls1, "gamma", nn.Parameter(3 * b.ls1.gamma)), 2, ""),
    "parametrized": (double_gamma, 2, ""),
    "dtype": (
        lambda b: b.ls2.double(),
        1,
        "its parameters are in torch.float32 and torch.float64",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_layer_scale_that_changes(change: str, calls: list[Any], caplog: Any) -> None:
    module, x = block(), tokens()
    ck.accelerate(module, backend="cpu")
    modify, served, reason = CHANGES[change]
    modify(module)
    with caplog.at_level(logging.WARNING, "crossvit_kernels"):
        outputs = [module(x) for _ in range(2)]
    assert len(calls) == 2 * served
    for output in outputs:
        torch.testing.assert_close(output, type(module).forward(module, x))
    warning = f"Block: {reason}; its own forward runs, not fused"
    assert [r.getMessage() for r in caplog.records] == [warning] * bool(reason)


def test_another_layer_scale() -> None:
    module = block()
    module.ls1 = Gated()
    report = ck.accelerate(module, backend="cpu")
    assert report.rows[0].reasons == ("layernorm_msa: ls1 is a Gated",)


def test_copies_have_their_own_layer_scale(calls: list[Any]) -> None:
    import pickle

    module, x = block(act_layer=nn.SiLU), tokens()
    ck.accelerate(module, backend="cpu")
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        del calls[:]
        torch.testing.assert_close(other(x), expected)
        assert calls[1]["layer_scale"] is other.ls2.gamma and calls[1]["activation"] == "silu"
        assert ck.restore(other) == 1
        torch.testing.assert_close(other(x), expected)


@pytest.mark.parametrize("named", ["cuda", "cpu", "triton", None])
def test_every_backend_takes_layer_scale(named: str | None) -> None:
    assert ck.accelerate(block(), backend=named).rows[0].serves == BLOCK


@pytest.mark.parametrize("masked", [False, True])
def test_everything_a_block_may_have_in_cuda(
    masked: bool, cuda_device: str, calls: list[dict[str, Any]]
) -> None:
    """LayerScale, SiLU, no biases of projections, and a mask of keys."""
    module = block(act_layer=nn.SiLU, proj_bias=False).to(cuda_device)
    x = tokens().to(cuda_device).requires_grad_()
    mask = mask_of_keys().to(cuda_device) if masked else None
    leaves = [x, *module.parameters()]

    def run() -> list[Tensor]:
        y = module(x, attn_mask=mask)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    expected = run()
    assert ck.accelerate(module, backend="cuda").rows[0].serves == BLOCK
    for actual, own in zip(run(), expected, strict=True):
        torch.testing.assert_close(actual, own, rtol=1e-3, atol=1e-3)
    assert [call["backend"] for call in calls] == ["cuda", "cuda"]


def test_silu_of_few_rows(calls: list[dict[str, Any]]) -> None:
    """torch's SiLU is fast: the MLP is served from six times as many rows as channels."""
    for layer, batch, served in ((nn.SiLU, 31, 1), (nn.SiLU, 32, 2), (nn.GELU, 31, 2)):
        module = block(act_layer=layer)
        ck.accelerate(module)
        del calls[:]
        with torch.no_grad():
            module(tokens(batch))
        assert len(calls) == served


def mask_of_keys() -> Tensor:
    mask = torch.rand(2, 1, 1, 9, dtype=torch.float32, device="cpu") < 0.6
    mask[..., 0] = True
    return mask


MASKS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "keys": (lambda mask: mask, True),
    "keys of every query": (lambda mask: mask.expand(2, 1, 9, 9), True),
    "keys of every query, copied": (lambda mask: mask.expand(2, 1, 9, 9).contiguous(), True),
    "none of one image": (lambda mask: mask & torch.tensor([[[[True]]], [[[False]]]]), True),
    "other keys of a query": (
        lambda mask: mask.expand(2, 1, 9, 9) | torch.eye(9, dtype=torch.bool),
        False,
    ),
    "of queries": (lambda mask: mask.mT.expand(2, 1, 9, 9) | torch.eye(9).bool(), False),
    "of every head": (lambda mask: mask.expand(2, 3, 9, 9), False),
    "additive": (lambda mask: torch.where(mask, 0.0, -1e4), False),
    "for all images": (lambda mask: mask[:1], False),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind: str, calls: list[dict[str, Any]]) -> None:
    make, served = MASKS[kind]
    mask = make(mask_of_keys())
    module, x = block(), tokens()

    def call(module: Any, inputs: dict[str, Tensor]) -> Tensor:
        given = mask.to(inputs["x"].dtype) if mask.is_floating_point() else mask
        return module(inputs["x"], attn_mask=given)

    assert_served_equals_own(module, {"x": x}, call)
    assert len(calls) == 1 + served
    if served:
        assert torch.equal(calls[0]["key_mask"], mask[:, 0, 0])


def test_a_mask_without_torchs_attention(calls: list[Any]) -> None:
    """timm's own attention gives NaN where no key is left; the block decides."""
    module, x, mask = block(), tokens(), mask_of_keys()
    module.attn.fused_attn = False
    expected = module(x, attn_mask=mask)
    ck.accelerate(module, backend="cpu")
    torch.testing.assert_close(module(x, attn_mask=mask), expected)
    assert len(calls) == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_images_and_words(attention: str, calls: list[dict[str, Any]]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": C, "num_attention_heads": 3, "intermediate_size": 64}
    config = transformers.Siglip2VisionConfig(**sizes, num_hidden_layers=1, num_patches=16)
    config._attn_implementation = attention
    layer = transformers.models.siglip2.modeling_siglip2.Siglip2EncoderLayer(config)
    mask = mask_of_keys().expand(2, 1, 9, 9).contiguous()
    if attention == "eager":
        mask = torch.where(mask, 0.0, -1e9)

    def call(module: Any, inputs: dict[str, Tensor]) -> Tensor:
        given = mask.to(inputs["x"].dtype) if mask.is_floating_point() else mask
        return module(inputs["x"], given)

    report = assert_served_equals_own(randomised(layer), {"x": tokens()}, call)
    assert report.rows[0].serves == BLOCK
    assert len(calls) == 1 + (attention == "sdpa") and calls[-1]["activation"] == "gelu_tanh"


def test_drop_path_of_transformers(calls: list[dict[str, Any]]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": C, "num_attention_heads": 3, "layerscale_value": 0.5}
    config = transformers.Dinov2Config(**sizes, drop_path_rate=0.5, attn_implementation="sdpa")
    layer = randomised(transformers.models.dinov2.modeling_dinov2.Dinov2Layer(config)).train()
    x, outputs = tokens(batch=16), []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(layer(x))
        if not calls:
            ck.accelerate(layer, backend="cpu", training=True)
    assert len(calls) == 2
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[1], layer.eval()(x))
    assert len(calls) == 4 and calls[-1].get("residual_scale") is None


@pytest.mark.parametrize("strict", [False, True])
def test_export_and_compile(strict: bool) -> None:
    module, x = block(act_layer=nn.SiLU), tokens()
    ck.accelerate(module, backend="cpu")
    with torch.no_grad():
        expected = module(x)
        if strict:
            compiled = torch.compile(module, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(x), expected)
            torch._dynamo.reset()
        else:
            program = torch.export.export(module, (x,), strict=False)
            torch.testing.assert_close(program.module()(x), expected)
            targets = [str(node.target) for node in program.graph.nodes]
            assert sum("crossvit_kernels" in target for target in targets) == 2

"""Layers that are more than their parameters: hooks, adapters, pruning, other classes."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from eager_modules import C_CLS, HEADS, C
from module_cases import CASES, B, N, assert_agree, outcome, pair, random_inputs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

from crossvit_kernels import modules
from crossvit_kernels.modules import plain_layers

pytestmark = pytest.mark.usefixtures("cpu_backend")

BACKENDS = [None, "reference"]
#: Every Linear and LayerNorm of every module that the replica also calls as a module.
LAYERS = [
    (name, path)
    for name in ("fusion", "block", "MAP head", "class attention", "probe")
    for path, layer in CASES[name].eager().named_modules()
    if isinstance(layer, (nn.Linear, nn.LayerNorm, nn.MultiheadAttention))
    and "out_proj" not in path  # torch's own attention reads it
]


def twice(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return (output[0] * 2, output[1]) if isinstance(output, tuple) else output * 2


def halves(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t / 2 for t in args)


class Adapter(nn.Module):
    """LoRA in plain torch: x A^T B^T on top of a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def replace(module: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "path"), LAYERS)
def test_a_hook_on_any_layer_is_called(name: str, path: str, backend: str | None) -> None:
    ours, eager = pair(CASES[name], backend)
    inputs = random_inputs(CASES[name])
    plain = ours(*inputs)
    for module in (ours, eager):
        module.get_submodule(path).register_forward_hook(twice)
    actual = outcome(ours, *inputs)
    assert_agree(actual, outcome(eager, *inputs))
    assert not torch.allclose(actual["output"], plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["fusion", "block", "class attention", "probe"])
def test_every_layer_may_be_adapted(name: str, backend: str | None) -> None:
    ours, eager = pair(CASES[name], backend)
    for path, layer in list(eager.named_modules()):
        if isinstance(layer, nn.Linear):
            adapter = Adapter(layer)
            replace(eager, path, adapter)
            replace(ours, path, copy.deepcopy(adapter))
    inputs = random_inputs(CASES[name])
    actual = outcome(ours, *inputs)
    assert_agree(actual, outcome(eager, *inputs))
    assert all(t.any() for key, t in actual.items() if ".up." in key and ".wk." not in key)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_pre_hook(halves),
        lambda layer: layer.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,)),
        lambda layer: layer.register_full_backward_pre_hook(lambda m, go: (go[0] * 2,)),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: setattr(
            layer, "forward", lambda x: F.linear(x, layer.weight * 3, layer.bias)
        ),
        parametrizations.weight_norm,
        parametrizations.orthogonal,
    ],
    ids=["pre-hook", "backward hook", "backward pre-hook", "pruned", "forward", "norm", "ortho"],
)
def test_what_else_changes_a_layer(change, backend: str | None) -> None:
    ours, eager = pair(CASES["block"], backend)
    for module in (ours, eager):
        torch.manual_seed(3)  # some changes draw
        for path in ("attn.qkv", "mlp.fc1"):
            change(module.get_submodule(path))
    inputs = random_inputs(CASES["block"])
    assert_agree(outcome(ours, *inputs), outcome(eager, *inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_parts_may_be_replaced_or_hooked(backend: str | None) -> None:
    ours, eager = pair(CASES["block"], backend)
    ours.attn, ours.mlp = copy.deepcopy(eager.attn), copy.deepcopy(eager.mlp)
    inputs = random_inputs(CASES["block"])
    assert_agree(outcome(ours, *inputs), outcome(eager, *inputs))

    ours, eager = pair(CASES["fusion"], backend)
    for module in (ours, eager):
        for path in ("proj", "fusion", "fusion.attn", "revert_proj"):
            module.get_submodule(path).register_forward_hook(twice)
    inputs = random_inputs(CASES["fusion"])
    assert_agree(outcome(ours, *inputs), outcome(eager, *inputs))


@pytest.mark.parametrize("path", ["q_proj", "k_proj", "v_proj", "c_proj"])
def test_hooks_in_the_pool_of_feature_maps(path: str) -> None:
    """The replica reads weights, as CLIP's does: doubled weights stand for the hook."""
    ours, eager = pair(CASES["pool 2d"], None)
    ours.get_submodule(path).register_forward_hook(twice)
    with torch.no_grad():
        for parameter in eager.get_submodule(path).parameters():
            parameter.mul_(2)
    inputs = random_inputs(CASES["pool 2d"])
    torch.testing.assert_close(ours(*inputs), eager(*inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", [nn.RMSNorm(C), nn.Identity(), nn.LayerNorm(C, bias=False)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_class_attention_calls_any_norm(norm: nn.Module, backend: str | None) -> None:
    ours, eager = pair(CASES["class attention"], backend)
    (x,), norm = random_inputs(CASES["class attention"]), norm.double()
    torch.testing.assert_close(ours(x, norm), eager(x, norm), rtol=1e-10, atol=1e-10)


def test_another_eps_and_missing_biases_count() -> None:
    for backend in BACKENDS:
        ours, eager = pair(CASES["block"], backend)
        for module in (ours, eager):
            module.norm1.eps, module.norm2.eps = 0.5, 0.25
            module.mlp.fc2.bias = None
        inputs = random_inputs(CASES["block"])
        torch.testing.assert_close(ours(*inputs), eager(*inputs), rtol=1e-10, atol=1e-10)
        ours, eager = pair(CASES["fusion"], backend)
        for module in (ours, eager):
            module.fusion.norm1.eps = 0.5
        inputs = random_inputs(CASES["fusion"])
        torch.testing.assert_close(ours(*inputs), eager(*inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_quantisation(backend: str | None) -> None:
    if torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no engine for quantised layers")
    case = CASES["block"]
    ours, eager = (module.float() for module in pair(case, backend))
    ours, eager = (
        torch.ao.quantization.quantize_dynamic(module, {nn.Linear}) for module in (ours, eager)
    )
    x = torch.randn(B, N, C)
    torch.testing.assert_close(ours(x), eager(x), rtol=1e-5, atol=1e-5)


def test_weights_that_wrap_other_tensors_are_not_read() -> None:
    ours, eager = pair(CASES["block"], None)
    weight = eager.attn.qkv.weight.detach()
    ours.attn.qkv.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    layers, reason = plain_layers.find(ours._modules, ())
    assert not layers and reason is None
    reason = plain_layers.why_not_tensors([ours.attn.qkv.weight])
    assert reason == "a parameter is a TwoTensor"


# What is reported, and what stays fused


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the fused halves of a block that run."""
    from crossvit_kernels import functional

    ran: list[str] = []
    for name in ("layernorm_msa", "layernorm_ffn"):
        function = getattr(functional, name)

        def spy(*args, name=name, function=function, **kwargs):
            ran.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(functional, name, spy)
    return ran


def test_only_the_half_concerned_leaves_its_kernel(monkeypatch, caplog) -> None:
    ran = calls(monkeypatch)
    block, x = modules.TransformerBlock(C, HEADS), torch.randn(B, N, C)
    with caplog.at_level(logging.WARNING, "crossvit_kernels"):
        block(x)
        assert ran == ["layernorm_msa", "layernorm_ffn"] and not caplog.records
        handle = block.attn.qkv.register_forward_hook(twice)
        for _ in range(3):
            block(x)
        assert ran[2:] == ["layernorm_ffn"] * 3
        assert [r.getMessage() for r in caplog.records] == [
            "TransformerBlock: attn.qkv has hooks; its layers run one by one, not fused"
        ]
        handle.remove()
        block(x)
        assert ran[-2:] == ["layernorm_msa", "layernorm_ffn"]
        block.set_submodule("mlp.act", nn.ReLU())
        block(x)
        assert "mlp.act is a torch.nn.modules.activation.ReLU" in caplog.text


def test_parametrizations_stay_fused(monkeypatch, caplog) -> None:
    ran = calls(monkeypatch)
    block, x = modules.TransformerBlock(C, HEADS), torch.randn(B, N, C)
    for path in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        parametrizations.weight_norm(block.get_submodule(path))
    fused = block(x)
    assert ran == ["layernorm_msa", "layernorm_ffn"] and not caplog.records
    block.backend = "reference"
    torch.testing.assert_close(fused, block(x))


def test_eager_mode_computes_a_parametrization_once_a_call() -> None:
    class Counter(nn.Module):
        count = 0

        def forward(self, weight: Tensor) -> Tensor:
            Counter.count += 1
            return weight * 1

    block, x = modules.TransformerBlock(C, HEADS, backend="reference"), torch.randn(B, N, C)
    parametrize.register_parametrization(block.attn.qkv, "weight", Counter())
    Counter.count = 0
    block(x)
    assert Counter.count == 1


def test_global_hooks_see_all_layers() -> None:
    fusion = modules.CrossAttentionFusion(C_CLS, C, HEADS)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(m))
    try:
        fusion(torch.randn(B, C_CLS), torch.randn(B, N, C))
    finally:
        handle.remove()
    assert {m for m in fusion.modules() if isinstance(m, nn.Linear)} <= set(seen)


def test_weights_of_layers_with_hooks_are_not_handed_out() -> None:
    fusion = modules.CrossAttentionFusion(C_CLS, C, HEADS)
    assert fusion.weights().k_weight is fusion.fusion.attn.wk.weight
    fusion.fusion.attn.wk.register_forward_hook(twice)
    with pytest.raises(ValueError, match=r"fusion\.attn\.wk has hooks"):
        fusion.weights()


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["fusion", "block", "MAP head", "probe"])
def test_hooks_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    ours, eager = pair(CASES[name], None)
    for module in (ours, eager):
        for layer in module.modules():
            if isinstance(layer, nn.LayerNorm):
                layer.register_forward_hook(twice)
    inputs = random_inputs(CASES[name])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), eager(*inputs), rtol=1e-10, atol=1e-10)


# torch.func and tracing see torch's own operators


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", CASES)
def test_forward_derivatives_and_traces(name: str) -> None:
    ours, eager = pair(CASES[name], None)
    inputs = tuple(t.detach() for t in random_inputs(CASES[name]))
    tangents = tuple(torch.randn_like(t) for t in inputs)
    with sdpa_kernel(SDPBackend.MATH):  # the only one of torch's with forward derivatives
        actual, expected = (torch.func.jvp(module, inputs, tangents) for module in (ours, eager))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        traced = torch.jit.trace(ours, inputs)
    other = [torch.randn(7, *t.shape[1:], dtype=t.dtype) for t in inputs]
    torch.testing.assert_close(traced(*other), eager(*other), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["fusion", "block"])
def test_layers_of_several_dtypes(name: str) -> None:
    """LayerNorms in float32 with linear layers in bfloat16: torch runs them on a CPU."""
    ours, eager = pair(CASES[name], None)
    for module in (ours, eager):
        module.bfloat16()
        for layer in module.modules():
            if isinstance(layer, nn.LayerNorm):
                layer.float()
    inputs = [t.detach().bfloat16() for t in random_inputs(CASES[name])]
    actual, expected = ours(*inputs), eager(*inputs)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)

"""The mechanism of ``accelerate``: what stays, what falls back, and that restoring is exact."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from zoo_cases import randomised

import crossvit_kernels as ck
from crossvit_kernels.plug_in import Report, Served

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("cpu_backend")
C = 48


def vit(**options: Any) -> Any:
    """SigLIP's architecture: blocks, and a pooling head."""
    small = {"img_size": 32, "depth": 2, "embed_dim": C, "num_heads": 3, "num_classes": 5}
    return randomised(timm.create_model("vit_base_patch16_siglip_224", **small, **options))


def accelerate(model: nn.Module, **options: Any) -> Report:
    """Serve what can be served, whether that is a gain or not."""
    return ck.accelerate(model, backend="cpu", **options)


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float32)


@pytest.fixture
def calls(monkeypatch) -> Iterator[list[str]]:
    """The fused functions that ran."""
    from crossvit_kernels import functional

    ran: list[str] = []
    for name in ("layernorm_msa", "layernorm_ffn", "attention_pool", "cross_attention_fusion"):
        function = getattr(functional, name)

        def counted(*args: Any, _name: str = name, _run: Any = function, **kwargs: Any) -> Any:
            ran.append(_name)
            return _run(*args, **kwargs)

        monkeypatch.setattr(functional, name, counted)
    yield ran


ALL = ["layernorm_msa", "layernorm_ffn"] * 2 + ["attention_pool"]


def test_what_stays(calls: list[str]) -> None:
    model, x = vit(), images()
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    before, state = model(x), {k: t.clone() for k, t in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    parameters = dict(model.named_parameters())
    attributes = {m: set(m.__dict__) for m in model.modules()}
    model.blocks[0].norm1.train()
    modes = [m.training for m in model.modules()]
    report = accelerate(model)
    assert report.served == ["blocks.0", "blocks.1", "attn_pool"] and not report.declined
    assert not calls
    torch.testing.assert_close(model(x), before)
    assert calls == ALL
    assert [name for name, _ in model.named_modules()] == names
    assert [m.training for m in model.modules()] == modes
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    model(x).sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad is None
    assert model.blocks[1].attn.qkv.weight.grad is not None
    assert ck.restore(model) == 3 and ck.restore(model) == 0
    assert {m: set(m.__dict__) for m in model.modules()} == attributes
    assert torch.equal(model(x), before) and len(calls) == 2 * len(ALL)


def test_hooks_of_a_served_module_run() -> None:
    model, x = vit(), images()
    seen: list[Any] = []
    model.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    model.attn_pool.register_forward_hook(lambda m, args, output: 2 * output)
    before = model(x)
    assert len(accelerate(model).served) == 3
    torch.testing.assert_close(model(x), before)
    assert len(seen) == 2


def copies() -> dict[str, Callable[[Any], Any]]:
    def saved(model: Any) -> Any:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "torch.save": saved,
    }


@pytest.mark.parametrize("way", copies())
def test_a_copy_uses_its_own_parameters(way: str, calls: list[str]) -> None:
    model, x = vit(), images()
    accelerate(model)
    expected = model(x)
    other = copies()[way](model)
    del calls[:]
    torch.testing.assert_close(other(x), expected)
    assert calls == ALL
    served = [m for m in other.modules() if "forward" in m.__dict__]
    assert len(served) == 3 and all(m.forward.owner is m for m in served)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(other(x), expected)
    assert ck.restore(other) == 3 and ck.restore(model) == 3


def test_a_served_model_is_freed_at_once() -> None:
    import gc
    import weakref

    model = nn.Sequential(*vit().blocks)
    accelerate(model)
    block = weakref.ref(model[0])
    gc.collect()
    gc.disable()
    try:
        del model
        assert block() is None
    finally:
        gc.enable()


def prune_heads(block: Any) -> None:
    """Remove a head of attention, as libraries for structured pruning do."""
    attn = block.attn
    keep = torch.arange(3 * C).view(3, 3, 16)[:, 1:].flatten()
    attn.qkv.weight = nn.Parameter(attn.qkv.weight.detach()[keep])
    attn.qkv.bias = nn.Parameter(attn.qkv.bias.detach()[keep])
    attn.proj.weight = nn.Parameter(attn.proj.weight.detach()[:, 16:])
    attn.num_heads, attn.attn_dim = 2, 32


class Adapter(nn.Linear):
    """A layer with more to it than its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[..., :1]


def replace_projection(block: Any) -> None:
    layer = Adapter(C, C, dtype=torch.float32, device="cpu")
    layer.load_state_dict(block.attn.proj.state_dict())
    block.attn.proj = layer


def add_lora(block: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, block)


def quantise(block: Any) -> None:
    from torch.ao.nn.quantized import dynamic

    block.mlp.fc1.qconfig = torch.ao.quantization.default_dynamic_qconfig
    block.mlp.fc1 = dynamic.Linear.from_float(block.mlp.fc1)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook": (lambda b: b.attn.register_forward_hook(lambda m, a, out: 2 * out), "attn has hooks"),
    "inner hook": (
        lambda b: b.mlp.act.register_forward_pre_hook(lambda m, args: (2 * args[0],)),
        "mlp.act has hooks",
    ),
    "pruned": (lambda b: prune.l1_unstructured(b.mlp.fc1, "weight", 0.5), "mlp.fc1 has hooks"),
    "heads": (prune_heads, "attn has head dim 16, not 24"),
    "replaced": (replace_projection, "attn.proj is now a Adapter"),
    "scale": (lambda b: setattr(b.attn, "scale", 1.0), "attn has scale=1.0"),
    "forward": (
        lambda b: setattr(b.norm1, "forward", lambda x: 2 * x),
        "norm1 has a forward of its own",
    ),
    "norm": (
        lambda b: setattr(b.attn, "q_norm", nn.LayerNorm(16)),
        "attn.q_norm is now a LayerNorm",
    ),
    "quantised": (quantise, "mlp.fc1 is now a Linear"),
    "lora": (add_lora, "attn.qkv is now a Linear"),
}


@pytest.mark.parametrize(
    "change",
    [pytest.param(c, marks=pytest.mark.slow if c == "lora" else ()) for c in CHANGES],
)
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_changed_module_falls_back(change: str, caplog) -> None:
    model, x = vit(), images()
    block = model.blocks[1]
    if change in ("scale", "norm"):  # which torch's own attention ignores, or applies
        block.attn.fused_attn = False
    accelerate(model)
    modify, reason = CHANGES[change]
    modify(block)
    with caplog.at_level(logging.WARNING, "crossvit_kernels"):
        outputs = [model(x) for _ in range(3)]
    messages = [r.getMessage() for r in caplog.records]
    assert messages == [f"Block: {reason}; its own forward runs, not fused"]
    assert isinstance(block.__dict__["forward"], Served)
    ck.restore(model)
    for output in outputs:
        torch.testing.assert_close(output, model(x))


def test_a_change_that_is_undone_is_served_again(calls: list[str], caplog) -> None:
    model, x = vit(), images()
    accelerate(model)
    expected = model(x)
    hook = model.blocks[0].attn.register_forward_hook(lambda m, args, output: 2 * output)
    assert not torch.allclose(model(x), expected)
    hook.remove()
    del calls[:]
    torch.testing.assert_close(model(x), expected)
    assert calls == ALL and len(caplog.records) == 1


def test_parametrized_layers_stay_served(calls: list[str], caplog) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model, x = vit(), images()
    accelerate(model)
    parametrize.register_parametrization(model.blocks[0].attn.qkv, "weight", Doubled())
    actual = model(x)
    assert calls == ALL and not caplog.records
    ck.restore(model)
    torch.testing.assert_close(actual, model(x))


def test_dropout_in_training_is_its_own_forward(calls: list[str], caplog) -> None:
    model, x = vit(proj_drop_rate=0.1, attn_drop_rate=0.2), images()
    accelerate(model)
    model(x)
    assert calls == ALL
    del calls[:]
    model.train()
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(model(x))
        ck.restore(model)
    torch.testing.assert_close(*outputs)
    assert calls == ["attention_pool"]
    assert {r.getMessage() for r in caplog.records} == {
        "Block: attn.attn_drop is dropout of 0.2 in training; its own forward runs, not fused",
        "Block: mlp.drop1 is dropout of 0.1 in training; its own forward runs, not fused",
    }
    declined = accelerate(model, training=True).declined
    assert "dropout of 0.1 in training" in declined["blocks.0"]


def test_drop_path_drops_the_same_updates(calls: list[str]) -> None:
    model, x = vit(drop_path_rate=0.5).train(), images().repeat(4, 1, 1, 1)
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(model(x))
        if not calls:
            assert len(accelerate(model, training=True).served) == 3
    assert calls == ALL
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[1], model.eval()(x))


def test_arguments_that_are_not_served() -> None:
    block, x = vit().blocks[0], torch.randn(2, 5, C, dtype=torch.float32)
    mask = torch.zeros(5, 5, dtype=torch.float32).masked_fill_(torch.eye(5) > 0, -torch.inf)
    causal, masked = block(x, is_causal=True), block(x, attn_mask=mask)
    accelerate(block)
    torch.testing.assert_close(block(x, is_causal=True), causal)  # the second half is served
    torch.testing.assert_close(block(x, attn_mask=mask), masked)
    assert block(x[:0]).shape == (0, 5, C)
    with pytest.raises(RuntimeError):  # the block's own
        block(x[..., 1:])
    with torch.autocast("cpu", torch.bfloat16):
        actual = block(x)
        ck.restore(block)
        expected = block(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_is_converted_afterwards(dtype: torch.dtype) -> None:
    model, x = vit(), images().to(dtype)
    accelerate(model)
    model.to(dtype)
    actual = model(x)
    ck.restore(model)
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-9
    torch.testing.assert_close(actual, model(x), rtol=tolerance, atol=tolerance)


def test_a_model_with_nothing_to_serve() -> None:
    report = ck.accelerate(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    assert report.rows == () and report.served == [] and report.declined == {}
    assert "nothing to serve" in str(report)


def test_the_table() -> None:
    lines = str(accelerate(vit(qk_norm=True))).splitlines()
    assert lines[0].split() == ["module", "class", "served", "by", "why", "not"]
    why = "layernorm_msa: qk-norm (attn.q_norm)"
    assert lines[1].split(maxsplit=3) == ["blocks.0", "Block", "layernorm_ffn", why]
    assert lines[3].split() == ["attn_pool", "AttentionPoolLatent", "attention_pool"]
    assert lines[4] == "3 of 3 modules served"


def test_blocks_that_gain_nothing_on_a_cpu(monkeypatch) -> None:
    from crossvit_kernels.ops.common import panels

    model, known = vit(), ["blocks.0", "blocks.1", "attn_pool"]
    assert ck.accelerate(model).served == known
    declined = ck.accelerate(model, training=True).declined
    assert declined["blocks.0"] == (
        "no known gain for blocks in training on a CPU (example= measures)"
    )
    monkeypatch.setattr(panels, "widest", lambda: C - 1)
    report = ck.accelerate(model)
    assert report.served == ["attn_pool"]
    assert "no known gain for blocks wider than 47 on this CPU" in report.declined["blocks.0"]
    assert accelerate(model).served == known
    monkeypatch.undo()
    assert ck.accelerate(model.bfloat16()).served == ["attn_pool"]


def test_calls_that_gain_nothing_on_a_cpu(calls: list[str]) -> None:
    model, x = vit(), images()  # 4 tokens an image
    ck.accelerate(model)
    for batch, gradients, ran in ((11, False, ALL[-1:]), (12, False, ALL), (12, True, ALL[-1:])):
        with torch.set_grad_enabled(gradients):
            model(x[:1].expand(batch, -1, -1, -1))
        assert calls == ran
        del calls[:]


def test_modules_with_a_forward_of_their_own() -> None:
    model, x = vit(), images()
    own = model.blocks[0].forward
    model.blocks[0].forward = lambda x, **kwargs: own(x) + 1
    expected = model(x)
    report = accelerate(model)
    assert report.declined == {"blocks.0": "has a forward of its own"}
    torch.testing.assert_close(model(x), expected)
    assert ck.restore(model) == 2 and "forward" in model.blocks[0].__dict__


def test_accelerating_again_changes_the_backend() -> None:
    model = vit()
    for backend in ("reference", "cpu"):
        ck.accelerate(model, backend=backend)
        assert {m.forward.backend for m in [*model.blocks, model.attn_pool]} == {backend}
    assert ck.restore(model) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "metal"}, ValueError, "unknown backend 'metal'"),
        ({"budget_s": 0}, ValueError, "budget_s: expected seconds above 0, found 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ck.accelerate(nn.Linear(2, 2), **options)
    for function in (ck.accelerate, ck.restore):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, found int"):
            function(3)


def test_all_known_classes_exist() -> None:
    """A reason or an adapter for a class that has another name would never be found."""
    import importlib.util
    from pathlib import Path

    from crossvit_kernels.plug_in import looking, recipe

    older = {"timm.models.vision_transformer.LayerScale"}
    layers = ({*looking._LAYER_SCALES} - older) | looking._ROUNDED_DROP_PATHS | looking._DROP_PATHS
    missing = []
    for target in (*recipe.RECIPES, *recipe.KNOWN, *layers):
        package, _, rest = target.partition(".")
        if (spec := importlib.util.find_spec(package)) is None:
            continue
        module, _, name = rest.rpartition(".")
        path = Path(spec.origin).parent / f"{module.replace('.', '/')}.py"
        if not path.exists() or f"class {name}(" not in path.read_text():
            missing.append(target)
    assert missing == []


def test_imports_no_library() -> None:
    import subprocess
    import sys

    code = (
        "import sys, torch, crossvit_kernels as ck; assert 'crossvit_kernels.plug_in' not in "
        "sys.modules; assert callable(ck.accelerate); ck.accelerate(torch.nn.Linear(2, 2)); "
        "print({'timm', 'transformers', 'open_clip', 'torchvision'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"

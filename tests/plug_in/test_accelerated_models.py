"""Accelerated models under torch's own tools, measured with an example, and users' adapters."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_cases import randomised

import crossvit_kernels as ck
from crossvit_kernels.modules import MAPHead
from crossvit_kernels.plug_in import recipe, timing

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("cpu_backend")


def vit(**options: Any) -> Any:
    small = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    return randomised(timm.create_model("vit_base_patch16_siglip_224", **{**small, **options}))


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, dtype=torch.float32)


def operators(graph: Any) -> int:
    """Count the calls of this package's operators."""
    return sum("crossvit_kernels" in str(node.target) for node in graph.graph.nodes)


def test_compile_in_one_graph() -> None:
    model, x = vit(), images()
    counts: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        counts.append(operators(graph))
        return graph

    ck.accelerate(model, backend="cpu")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert counts == [3]
    ck.restore(model)  # is seen: the graph is traced again
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert counts == [3, 0]
    torch._dynamo.reset()


@pytest.mark.slow
def test_gradients_under_compile() -> None:
    model, x = vit(), images()
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    ck.accelerate(model, backend="cpu")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(x).square().sum(), parameters)
    for name, a, e in zip(names, actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export(strict: bool) -> None:
    model, x = vit(), images()
    ck.accelerate(model, backend="cpu")
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), expected)
    assert operators(program.graph_module) == 3
    assert program.state_dict.keys() == model.state_dict().keys()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of timm's checks
def test_jit_trace_and_transforms_run_the_modules_own_forward() -> None:
    model, x = vit(), images()
    expected = model(x)
    ck.accelerate(model, backend="cpu")
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,), check_trace=False)
        torch.testing.assert_close(traced(x), expected)
    assert "crossvit" not in str(traced.inlined_graph)
    jacobian = torch.func.jacrev(
        lambda b: torch.func.functional_call(model, {"head.bias": b}, (x,))
    )
    assert jacobian(model.head.bias.detach()).shape == (2, 5, 5)


def test_distributed_data_parallel(tmp_path) -> None:
    model, x = vit(), images()
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ck.accelerate(model, backend="cpu", training=True)
    store = torch.distributed.FileStore(os.fspath(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second step needs all gradients of the first
            model.zero_grad()
            parallel(x).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-4)
        assert ck.restore(parallel) == 2
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("training", [False, True])
def test_an_example_is_measured(training: bool, monkeypatch) -> None:
    model, x = vit(depth=2).train(), images()
    state = torch.random.get_rng_state()
    measured: list[Any] = []

    def gain(module: nn.Module, *others: Any) -> float:
        measured.append(type(module).__name__)
        real = timing_gain(module, *others)
        assert real > 0
        return 0.5 if measured[-1] == "Block" else 2.0

    timing_gain = timing._gain
    monkeypatch.setattr(timing, "_gain", gain)
    report = ck.accelerate(model, training=training, example=x, budget_s=0.2)
    assert sorted(measured) == ["AttentionPoolLatent", "Block"]  # the blocks are alike
    assert report.served == ["attn_pool"] and "(2.00x)" in str(report)
    assert report.declined["blocks.1"] == "no faster: 0.50x"
    assert [r.speedup for r in report.rows] == [0.5, 0.5, 2.0]
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert ck.restore(model) == 1


def test_an_example_that_calls_nothing() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = vit(), vit()

        def forward(self, *, images: Tensor) -> Tensor:
            return self.used(images)

    report = ck.accelerate(Both(), example={"images": images()}, budget_s=0.1)
    assert report.declined["unused.attn_pool"] == "the example does not call it"


class Head(nn.Module):
    """A user's pooling head."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.out = MAPHead(48, 3, backend="reference"), nn.Linear(48, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.out(self.pool(x))


def serve_head(module: Any, backend: str | None, x: Tensor, scale: float = 1.0) -> Any:
    """Compute the pool with a backend."""
    if scale != 1.0:
        return ""
    weights = (module.pool.attention.in_proj_weight.chunk(3), module.pool.attention.out_proj)
    (w_q, w_k, w_v), out = weights
    b_q, b_k, b_v = module.pool.attention.in_proj_bias.chunk(3)
    projections = (w_q, b_q, w_k, b_k, w_v, b_v, out.weight, out.bias)
    y = ck.attention_pool(module.pool.probe, x, *projections, num_heads=3, backend=backend)[:, 0]
    return module.out(y + module.pool.mlp(module.pool.layernorm(y)))


def test_a_users_adapter(monkeypatch) -> None:
    monkeypatch.setattr(recipe, "RECIPES", dict(recipe.RECIPES))
    head, x = randomised(Head()), torch.randn(2, 9, 48, dtype=torch.float32)
    expected, scaled = head(x), head(x, scale=2.0)
    assert not ck.accelerate(head).rows
    ck.register_adapter(Head, serve_head, reads=["pool"], why_not=lambda m: m.__dict__.get("why"))
    report = ck.accelerate(head)
    assert report.served == [""] and report.rows[0].serves == ("serve_head",)
    torch.testing.assert_close(head(x), expected)
    torch.testing.assert_close(head(x, scale=2.0), scaled)
    head.why = "too old"
    assert torch.equal(head(x), expected)
    assert ck.accelerate(head).declined == {"": "too old"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, serve_head), TypeError, "target: expected a class of modules or its name, found 3"),
        (("Head", serve_head), ValueError, r"target: expected 'module\.Class', found 'Head'"),
        ((Head, 3), TypeError, "call: expected a callable, found int"),
    ],
)
def test_bad_adapters(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ck.register_adapter(*arguments, reads=["pool"])
    with pytest.raises(ValueError, match="reads: expected names of children, found none"):
        ck.register_adapter(Head, serve_head, reads=[])


def test_a_pickle_without_its_adapter(monkeypatch) -> None:
    import pickle

    monkeypatch.setattr(recipe, "RECIPES", dict(recipe.RECIPES))
    head, x = randomised(Head()), torch.randn(2, 9, 48, dtype=torch.float32)
    ck.register_adapter(Head, serve_head, reads=["pool"])
    ck.accelerate(head)
    data = pickle.dumps(head)
    del recipe.RECIPES[recipe.name_of(Head)]
    other = pickle.loads(data)
    assert torch.equal(other(x), Head.forward(head, x)) and ck.restore(other) == 1

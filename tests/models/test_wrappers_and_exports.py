"""Models in torch's tools: exported, transformed, replicated, on other devices and dtypes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from crossvit import Config, CrossViT, attention_maps

pytestmark = pytest.mark.usefixtures("cpu_backend")

TINY = Config(
    dims=(32, 64), num_heads=(2, 2), depths=(1, 2), mlp_ratios=(2.0, 2.0), num_blocks=1, img_size=48
)
X = (2, 3, 48, 48)


@pytest.fixture(params=[True, False], ids=["fused", "eager"])
def model(request: pytest.FixtureRequest) -> CrossViT:
    return CrossViT(TINY, use_fused=request.param, num_classes=7).eval()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# Exports


@pytest.mark.parametrize(
    "dim, strict",
    [
        (Dim.DYNAMIC, False),
        pytest.param(Dim.AUTO, True, marks=pytest.mark.slow),
        (Dim("batch", min=1, max=64), False),
    ],
    ids=str,
)
def test_export_with_a_dynamic_batch(model: CrossViT, dim: object, strict: bool) -> None:
    example = (torch.randn(X),)
    program = torch.export.export(model, example, dynamic_shapes=({0: dim},), strict=strict)
    x = torch.randn(5, *X[1:])
    assert_same(program.module()(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_with_a_dynamic_batch(model: CrossViT, dynamo: bool) -> None:
    """With the exporters on torch.export and on torch.jit.trace; only torch's operators."""
    onnx, reference = pytest.importorskip("onnx"), pytest.importorskip("onnx.reference")
    x = torch.randn(X)
    if dynamo:
        pytest.importorskip("onnxscript")
        shapes = ({0: Dim("batch")},)
        program = torch.onnx.export(model, (x,), dynamic_shapes=shapes, verbose=False)
        proto = program.model_proto
    else:
        file = io.BytesIO()
        names = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
        torch.onnx.export(model, (x,), file, dynamo=False, **names)
        proto = onnx.load_from_string(file.getvalue())
    (argument,) = proto.graph.input
    assert argument.type.tensor_type.shape.dim[0].dim_param == "batch"
    x = torch.randn(5, *X[1:])
    (logits,) = reference.ReferenceEvaluator(proto).run(None, {argument.name: x.numpy()})
    assert_same(torch.from_numpy(logits), model(x).detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_outlives_its_model(model: CrossViT, tmp_path) -> None:
    x = torch.randn(5, *X[1:])
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, torch.randn(X)), tmp_path / "traced.pt")
        assert_same(torch.jit.load(tmp_path / "traced.pt")(x), model(x))


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
def test_one_graph_for_every_batch(model: CrossViT) -> None:
    torch._dynamo.reset()
    # Eager mode's graph has only PyTorch's operators: tracing it further proves nothing of ours.
    backend = "aot_eager" if model.use_fused else "eager"
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    compiled(torch.randn(X))
    x = torch.randn(5, *X[1:])
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(compiled(x), model(x))


# torch.func


def test_functional_call(model: CrossViT) -> None:
    x = torch.randn(X)
    other = {name: p * 1.5 for name, p in model.named_parameters()}
    actual = torch.func.functional_call(model, other, (x,))
    expected = copy.deepcopy(model)
    expected.load_state_dict(other)
    assert_same(actual, expected(x))


def test_an_ensemble(model: CrossViT) -> None:
    models = [CrossViT(TINY, num_classes=7).eval() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    skeleton = copy.deepcopy(model).to("meta")

    def call(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(skeleton, (p, b), (x,))

    x = torch.randn(X)
    actual = torch.vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    assert_same(actual, torch.stack([m(x) for m in models]))


def test_gradients_of_each_image(model: CrossViT) -> None:
    parameters = dict(model.named_parameters())

    def loss(p: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (image.unsqueeze(0),)).square().sum()

    x = torch.randn(X)
    actual = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, image), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(actual[name][i], gradient, rtol=1e-4, atol=1e-4)


# Copies


def replica(module: nn.Module) -> nn.Module:
    """A replica as by torch.nn.parallel.replicate: parameters are plain tensor attributes."""
    copied = module._replicate_for_data_parallel()
    for name, p in module._parameters.items():
        if p is None:
            copied._parameters[name] = None
        else:
            setattr(copied, name, p * 1.0)
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else replica(child)
    return copied


def test_replicas_and_copies(model: CrossViT) -> None:
    x = torch.randn(X)
    expected = model(x)
    copies = [replica(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in (*copies, model.share_memory()):
        assert torch.equal(other(x), expected)
    assert_same(nn.DataParallel(model)(x), expected)


def test_a_model_on_the_meta_device(model: CrossViT) -> None:
    x = torch.randn(X)
    deferred = copy.deepcopy(model).to("meta")
    assert deferred(x.to("meta")).shape == (2, 7)
    assert deferred.forward_features(x.to("meta"))[1].shape[0] == 2
    deferred.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(deferred(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(model: CrossViT, dtype: torch.dtype) -> None:
    x = torch.randn(X)
    actual = copy.deepcopy(model).to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), model(x), rtol=0.05, atol=0.05)


def test_layouts_of_images(model: CrossViT) -> None:
    x = torch.randn(X)
    expected = model(x)
    wide = torch.randn(*X[:3], 96)
    wide[..., ::2] = x
    for image in (x.to(memory_format=torch.channels_last), wide[..., ::2]):
        torch.testing.assert_close(model(image), expected)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x), expected)


def test_no_image(model: CrossViT) -> None:
    model.train()
    x = torch.randn(0, *X[1:], requires_grad=True)
    logits = model(x)
    assert logits.shape == (0, 7)
    logits.sum().backward()
    assert x.grad is not None and all(not p.grad.any() for p in model.parameters())
    assert attention_maps(model, x)[0].fusion[0][0].shape[0] == 0

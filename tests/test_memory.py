"""Memory that the fusion allocates and saves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import crossvit_kernels as ck
from crossvit_kernels import FusionInputs, FusionWeights, extension
from crossvit_kernels.ops.attention_core import cuda as core_on_cuda
from crossvit_kernels.ops.cross_attention import cpu
from crossvit_kernels.ops.cross_attention import cuda as fusion_on_cuda
from crossvit_kernels.ops.operator import OPERATIONS


@pytest.fixture(params=["cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Backends that can run tensors on a CPU here, with Triton interpreted."""
    available = ck.backends()
    if not available[request.param]:
        pytest.skip(available.reasons[request.param])
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("Triton is compiled here, for a GPU")
    return request.param


BATCH, C_CLS, C, HEADS = 4, 32, 16, 2


class Allocations(TorchDispatchMode):
    """Records the sizes, in elements, of new storages."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, Tensor):
                self.sizes.append(t.untyped_storage().nbytes() // t.element_size())
        return result


def inputs(num_tokens: int) -> tuple[Tensor, Tensor, FusionWeights]:
    shapes = [[C_CLS], [C_CLS], [C, C_CLS], [C], [C], [C]] + [[C, C], [C]] * 4
    weights = FusionWeights(
        *(torch.randn(s, requires_grad=True) for s in (*shapes, [C], [C], [C_CLS, C], [C_CLS]))
    )
    return torch.randn(BATCH, C_CLS), torch.randn(BATCH, num_tokens, C), weights


def new_storages(num_tokens: int, backward: bool) -> list[int]:
    """Sizes, in elements, of all storages that the CPU kernels' code allocates."""
    given = FusionInputs(*inputs(num_tokens), HEADS)
    with torch.no_grad():
        with Allocations() as forward:
            new_cls, saved = cpu.forward(given, 1e-6, "fast")
        if not backward:
            return forward.sizes
        with Allocations() as allocations:
            wanted = OPERATIONS["cross_attention_fusion"].inputs([True] * 21)
            cpu.backward((new_cls,), given, saved, 1e-6, wanted)
    return allocations.sizes


def test_forward_allocates_nothing_of_the_tokens_size(cpu_backend: str) -> None:
    few, many = (
        new_storages(50, backward=False),
        new_storages(5000, backward=False),
    )
    assert sorted(few) == sorted(many)
    assert max(many) < BATCH * 5000 * C // 10


def test_backward_allocates_the_token_gradient_alone(cpu_backend: str) -> None:
    few, many = new_storages(50, backward=True), new_storages(5000, backward=True)
    token_sized = [size for size in many if size >= BATCH * 5000 * C // 10]
    assert token_sized == [BATCH * 5000 * C]
    assert sum(many) - sum(few) == BATCH * (5000 - 50) * C


def saved_elements(backend: str, num_tokens: int) -> int:
    """Number of elements saved for backward, besides inputs and weights."""
    cls, tokens, weights = inputs(num_tokens)
    tokens.requires_grad_()
    known = {t.data_ptr() for t in (cls, tokens, *weights)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in known:
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ck.cross_attention_fusion(cls, tokens, weights, HEADS, backend=backend)
    return sum(kept.values())


def test_what_is_kept_does_not_grow_with_the_tokens(backend: str) -> None:
    few, many = saved_elements(backend, 50), saved_elements(backend, 700)
    assert few == many <= BATCH * (2 * HEADS * C + HEADS + 6 * C + C_CLS)


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("num_tokens", [400, 10_000, 1_000_000])
def test_partials_of_shared_images_are_bounded(batch, num_tokens, cuda_device: str) -> None:
    """On CUDA, blocks of a cluster that share an image exchange partials through memory."""
    functions, sms = extension.cuda_kernels.functions, extension.Multiprocessors(132, True)
    problem = batch, num_tokens, 384, 192, 6, 1e-6
    shape = fusion_on_cuda.cluster_shape(problem, sms)
    partials = functions.cross_attention_states(problem, (shape.images, shape.blocks))
    assert 4 * partials <= core_on_cuda.MOST_SHARED_PARTIALS
    problem = batch, num_tokens, 6, 384, True, 1e-6
    for backward in (False, True):
        blocks = core_on_cuda.blocks_of_image(problem, sms, backward)
        alone, shared = (
            functions.attention_core_workspaces(problem, b)[backward] for b in (1, blocks)
        )
        assert 4 * (shared - alone) <= core_on_cuda.MOST_SHARED_PARTIALS

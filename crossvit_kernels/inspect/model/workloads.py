"""List what to model: the operations of a CrossViT at the sizes that models run them at."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from crossvit_kernels.inspect.ahead_of_time import Dtypes, empty, empty_weights
from crossvit_kernels.inspect.model import cuda_launch, triton_launch
from crossvit_kernels.inspect.model.gpus import Gpu
from crossvit_kernels.inspect.model.launch import Launch
from crossvit_kernels.ops.attention_core.op import OPERATION as CORE
from crossvit_kernels.ops.attention_core.reference import CoreInputs
from crossvit_kernels.ops.cross_attention.op import cross_attention_fusion
from crossvit_kernels.ops.cross_attention.reference import SHAPES as FUSION_SHAPES
from crossvit_kernels.ops.cross_attention.reference import FusionInputs, FusionWeights
from crossvit_kernels.ops.layernorm_ffn.configs import keeps_hidden
from crossvit_kernels.ops.layernorm_ffn.op import layernorm_ffn
from crossvit_kernels.ops.layernorm_ffn.reference import SHAPES as FFN_SHAPES
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs, FfnWeights
from crossvit_kernels.ops.layernorm_msa.op import layernorm_msa
from crossvit_kernels.ops.layernorm_msa.reference import SHAPES as MSA_SHAPES
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs, MsaWeights
from crossvit_kernels.ops.operator import Operation

_EPS = 1e-6
#: Patches and a CLS of 240 pixels in patches of 12, and of 224 in patches of 16.
SMALL_TOKENS, LARGE_TOKENS = 20 * 20 + 1, 14 * 14 + 1


class Workload(NamedTuple):
    """A pass of an operation.

    Attributes:
        operation: The operation.
        direction: "forward", as inference runs it, "training", forward as training runs it, or
            "backward".
        batch: Images.
        tokens: Of an image.
        channels: Of a token.
        inputs: Makes its inputs, tensors without memory.
        keep: What training keeps for backward.
    """

    operation: Operation
    direction: str
    batch: int
    tokens: int
    channels: int
    inputs: Callable[[], Any]
    keep: str = "fast"

    def launches(self, backend: str, gpu: Gpu) -> list[tuple[Launch, str]]:
        """What a backend launches on a GPU; each with its configuration."""
        record = _recorder(backend, gpu)
        operation, inputs = self.operation, self.inputs()
        module = operation.backends[backend]
        keep = "" if self.direction == "forward" else self.keep
        results: list[Any] = []

        def forward() -> None:
            results.extend(module.forward(inputs, _EPS, keep))

        launches = record(forward)
        if self.direction != "backward":
            return launches()
        outputs, saved = results
        douts = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = operation.inputs([t is not None for t in operation.flat(inputs)])
        saved = saved or module.Saved(*douts)
        return record(lambda: module.backward(douts, inputs, saved, _EPS, wanted))()


#: Records what a function launches; what it returns makes the launches of these.
Recorder = Callable[[Callable[[], object]], Callable[[], list[tuple[Launch, str]]]]


def _recorder(backend: str, gpu: Gpu) -> Recorder:
    if backend.startswith("triton"):
        return functools.partial(triton_launch.recorder, gpu)
    return functools.partial(cuda_launch.recorder, gpu, cuda_launch.Addresses())


class Model(NamedTuple):
    """A CrossViT's sizes: the larger branch has twice the channels of the smaller."""

    channels: int
    heads: int
    hidden_ratio: int


#: As crossvit/configs.py has them.
MODELS = {
    "tiny": Model(96, 3, 4),
    "small": Model(192, 6, 4),
    "base": Model(384, 12, 4),
    "9": Model(128, 4, 3),
    "15": Model(192, 6, 3),
    "18": Model(224, 7, 3),
}


def workloads(name: str, dtypes: Dtypes, batch: int) -> Iterator[Workload]:
    """Every operation in both directions, for both branches of a model.

    Forward in training is apart where it takes longer: where it writes the hidden units of an FFN.

    Args:
        name: Of the model.
        dtypes: Of tokens and of linear layers.
        batch: Images.
    """
    model = MODELS[name]
    small, large = model.channels, 2 * model.channels
    for channels, own, tokens in ((small, large, SMALL_TOKENS), (large, small, LARGE_TOKENS)):
        size = batch, tokens, channels
        heads, hidden = model.heads, model.hidden_ratio * channels
        yield from _both(CORE, size, functools.partial(_core, dtypes, heads, size))
        fusion = functools.partial(_fusion, dtypes, own, heads, size)
        yield from _both(cross_attention_fusion, size, fusion)
        yield from _both(layernorm_msa, size, functools.partial(_msa, dtypes, heads, size))
        ffn = functools.partial(_ffn, dtypes, hidden, size)
        yield from _both(layernorm_ffn, size, ffn)
        if keeps_hidden(channels, dtypes.linears.itemsize):
            yield Workload(layernorm_ffn, "training", *size, ffn)


def _both(
    operation: Operation, size: tuple[int, int, int], inputs: Callable[[], Any]
) -> Iterator[Workload]:
    for direction in ("forward", "backward"):
        yield Workload(operation, direction, *size, inputs)


def _core(dtypes: Dtypes, queries: int, size: tuple[int, int, int]) -> CoreInputs:
    u = empty((size[0], queries, size[2]), torch.float32)
    return CoreInputs(u, _patches(dtypes, size), None, None)


def _fusion(dtypes: Dtypes, own: int, heads: int, size: tuple[int, int, int]) -> FusionInputs:
    weights = empty_weights(FUSION_SHAPES, {"C_cls": own, "C": size[2]}, dtypes)
    cls = empty((size[0], own), dtypes.tokens)
    return FusionInputs(cls, _patches(dtypes, size), FusionWeights(*weights), heads, None)


def _patches(dtypes: Dtypes, size: tuple[int, int, int]) -> torch.Tensor:
    """Without the CLS before them."""
    return empty(size, dtypes.tokens)[:, 1:]


def _msa(dtypes: Dtypes, heads: int, size: tuple[int, int, int]) -> MsaInputs:
    weights = MsaWeights(*empty_weights(MSA_SHAPES, {"C": size[2]}, dtypes))
    return MsaInputs(empty(size, dtypes.tokens), weights, heads, None, None)


def _ffn(dtypes: Dtypes, hidden: int, size: tuple[int, int, int]) -> FfnInputs:
    weights = FfnWeights(*empty_weights(FFN_SHAPES, {"C": size[2], "F": hidden}, dtypes))
    return FfnInputs(empty(size, dtypes.tokens), weights, None)

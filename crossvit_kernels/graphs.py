"""CUDA graphs for serving: small batches take longer to launch than to compute."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from crossvit_kernels.calibration import store

#: Up to this many images side_by_side uses two streams, unless calibrate measured what is faster. A
#: guess: on one image kernels of CrossViT-15's L branch have 24 to 72 programs, and a GPU has more
#: than 100 SMs.
FEW_IMAGES = 16


def make_graphed(
    module: nn.Module | Callable[..., Any],
    example: Tensor | Sequence[Tensor],
    warmup: int = 3,
    if_faster: bool = False,
) -> Callable[..., Any]:
    """Capture a module's inference as one CUDA graph.

    Args:
        module: What to run, in eval mode. Its parameters are read at their current addresses:
            in-place updates take effect, moving them does not.
        example: Its argument or arguments, CUDA tensors. Calls must use the same shapes and dtypes;
            strides may differ.
        warmup: Calls before the capture, in which kernels are compiled and tuned.
        if_faster: Capture nothing where ``calibrate`` found a graph to be no faster, at as many
            images or fewer; the function then runs the module.

    Returns:
        A function of the same arguments. Its next call overwrites the results: clone what must live
        longer. Concurrent calls from several streams or threads are not supported.

    Raises:
        TypeError: An example is not a tensor.
        ValueError: An example is not on a CUDA device, or warmup is below 1; in a call, the number
            of arguments, a shape, dtype or device differs from the example's.
    """
    examples = [example] if isinstance(example, Tensor) else list(example)
    for i, t in enumerate(examples):
        if not isinstance(t, Tensor):
            raise TypeError(f"example[{i}]: expected a tensor, found {type(t).__name__}")
        if t.device.type != "cuda":
            raise ValueError(f"example[{i}]: expected a CUDA tensor, found one on {t.device}")
    if not examples:
        raise ValueError("example: expected at least one tensor, found none")
    if warmup < 1:
        raise ValueError(f"warmup: expected at least 1, found {warmup}")

    device = examples[0].device
    num_images = examples[0].shape[0] if examples[0].dim() else 1
    if if_faster and store.bounded(store.settings(device, "graph"), num_images) is False:
        return torch.inference_mode()(lambda *arguments: module(*arguments))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.inference_mode():
        inputs = [t.detach().clone() for t in examples]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warmup):
                module(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        _side_stream(device)  # cannot be created while capturing
        with torch.cuda.graph(graph):
            outputs = module(*inputs)

    def call(*arguments: Tensor) -> Any:
        if len(arguments) != len(inputs):
            raise ValueError(f"expected {len(inputs)} tensors, found {len(arguments)}")
        with torch.inference_mode():
            for i, (static, t) in enumerate(zip(inputs, arguments, strict=True)):
                if (t.shape, t.dtype, t.device) != (static.shape, static.dtype, static.device):
                    raise ValueError(
                        f"argument {i}: expected {_show(static)} as the example, found {_show(t)}"
                    )
                static.copy_(t)
            graph.replay()
        return outputs

    return call


# None: as calibrate measured, else on few images.
_streams: int | None = None


@contextmanager
def streams(count: int) -> Iterator[None]:
    """Capture side_by_side's functions on one stream or on two, whatever the number of images."""
    global _streams
    previous, _streams = _streams, count
    try:
        yield
    finally:
        _streams = previous


def wants_two_streams(num_images: int, measured: Mapping[int, bool]) -> bool:
    """Decide whether two functions run side by side.

    Args:
        num_images: B.
        measured: Number of images -> whether two streams were faster.
    """
    if _streams is not None:
        return _streams == 2
    known = store.bounded(measured, num_images)
    return num_images <= FEW_IMAGES if known is None else known


def side_by_side(first: Callable[[], Any], second: Callable[[], Any], like: Tensor) -> list[Any]:
    """Return the results of two independent functions.

    While a CUDA graph of inference on few images is captured, the second runs on its own stream, so
    that the graph runs both concurrently: kernels on few images leave most of a GPU idle. Otherwise
    they run one after another.

    Args:
        first: Runs on the current stream.
        second: Its kernels must not write what the first reads or writes.
        like: A tensor [B, ...] on their device.
    """
    if (
        torch.compiler.is_compiling()
        or not like.is_cuda
        or torch.is_grad_enabled()
        or not torch.cuda.is_current_stream_capturing()
        or not wants_two_streams(like.shape[0], store.settings(like.device, "side_by_side"))
    ):
        return [first(), second()]
    current, side = torch.cuda.current_stream(like.device), _side_stream(like.device)
    if side == current:
        return [first(), second()]
    side.wait_stream(current)
    # The second is issued first: memory it frees is reused on its own stream only, and what the
    # current stream allocates and frees afterwards stays on that one.
    with torch.cuda.stream(side):
        second_result = second()
    first_result = first()
    current.wait_stream(side)
    return [first_result, second_result]


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _show(t: Tensor) -> str:
    return f"{list(t.shape)} {t.dtype} on {t.device}"

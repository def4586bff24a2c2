"""CUDA graphs for serving: small batches take the host longer to launch than the GPU to compute."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: Up to so many images side_by_side uses two streams. A guess, not measured: at one image a kernel
#: of CrossViT-15's L branch makes 24 to 72 programs, and a GPU has more than 100 multiprocessors.
FEW_IMAGES = 16


def make_graphed(
    module: nn.Module | Callable[..., Any], example: Tensor | Sequence[Tensor], warmup: int = 3
) -> Callable[..., Any]:
    """A module's inference as one CUDA graph.

    Args:
        module: What to run, in eval mode. Its parameters are read where they lie now: new values
            in place count, moving them does not.
        example: Its argument or arguments, CUDA tensors. Calls take the same shapes, strides aside,
            and dtypes.
        warmup: Calls before the capture, in which kernels are compiled and tuned.

    Returns:
        A function of the same arguments. What it returns is overwritten by its next call: clone
        what must live longer. Calls from several streams or threads at a time are not supported.

    Raises:
        TypeError: An example is no tensor.
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
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.inference_mode():
        inputs = [t.detach().clone() for t in examples]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warmup):
                module(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        _side_stream(device)  # is not to be made while capturing
        with torch.cuda.graph(graph):
            outputs = module(*inputs)

    def call(*arguments: Tensor) -> Any:
        if len(arguments) != len(inputs):
            raise ValueError(f"expected {len(inputs)} tensors, found {len(arguments)}")
        with torch.inference_mode():
            for i, (to, t) in enumerate(zip(inputs, arguments, strict=True)):
                if t.shape != to.shape or t.dtype != to.dtype or t.device != to.device:
                    raise ValueError(
                        f"argument {i}: expected {_show(to)} as the example, found {_show(t)}"
                    )
                to.copy_(t)
            graph.replay()
        return outputs

    return call


_streams = True


@contextmanager
def one_stream() -> Iterator[None]:
    """Capture side_by_side's functions one after another."""
    global _streams
    previous, _streams = _streams, False
    try:
        yield
    finally:
        _streams = previous


def side_by_side(first: Callable[[], Any], second: Callable[[], Any], like: Tensor) -> list[Any]:
    """The results of two functions that do not depend on each other.

    While a CUDA graph of inference on few images is captured, the second goes to a stream of its
    own, so that both run at the same time in the graph: kernels of few images leave most of a GPU
    idle. Otherwise they run one after another.

    Args:
        first: Runs on the current stream.
        second: Its kernels must not write what the first reads or writes.
        like: A tensor [B, ...] on their device.
    """
    if (
        torch.compiler.is_compiling()
        or not (_streams and like.is_cuda)
        or like.shape[0] > FEW_IMAGES
        or torch.is_grad_enabled()
        or not torch.cuda.is_current_stream_capturing()
    ):
        return [first(), second()]
    current, side = torch.cuda.current_stream(like.device), _side_stream(like.device)
    if side == current:
        return [first(), second()]
    side.wait_stream(current)
    # The second is issued first: memory that it frees is taken again by kernels of its own stream,
    # and what the current stream then allocates and frees is its own.
    with torch.cuda.stream(side):
        of_second = second()
    of_first = first()
    current.wait_stream(side)
    return [of_first, of_second]


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _show(t: Tensor) -> str:
    return f"{list(t.shape)} {t.dtype} on {t.device}"

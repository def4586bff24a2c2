"""A model as a whole: its runs, and the settings that are measured on it."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crossvit_kernels import graphs
from crossvit_kernels.calibration import store
from crossvit_kernels.calibration.measure import Run, kept
from crossvit_kernels.verify.compare import tensors_of

_LOG = logging.getLogger("crossvit_kernels")


def set_fused(model: nn.Module, fused: bool) -> None:
    """Set a model's modules to the kernels, or to eager mode; named backends stay."""
    if hasattr(model, "set_fused"):
        keep = next((m.keep for m in model.modules() if hasattr(m, "keep")), "fast")
        switch: Any = model.set_fused
        switch(fused, getattr(model, "backend", None) if fused else None, keep=keep)
        return
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "backend")]
    for module in modules:
        if not fused and module.backend is None:
            module.backend = "reference"
        elif fused and module.backend == "reference":
            module.backend = None


@contextlib.contextmanager
def unchanged(model: nn.Module, training: bool) -> Iterator[None]:
    """Restore modes, buffers and the random state; after an error also what the modules run, and
    the number of threads.
    """
    modes = {module: module.training for module in model.modules()}
    settings = [
        (module, name, getattr(module, name))
        for module in modes
        for name in ("backend", "use_fused")
        if hasattr(module, name)
    ]
    buffers, threads = {b: b.clone() for b in model.buffers()}, torch.get_num_threads()
    devices = sorted({t.get_device() for t in (*model.parameters(), *buffers) if t.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            model.train(training)
            yield
    except BaseException:
        for module, name, value in settings:
            setattr(module, name, value)
        torch.set_num_threads(threads)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


def run(model: Any, example: tuple[Tensor, ...], training: bool) -> object:
    """Run a model on its arguments, with backward if it is trained."""
    with torch.set_grad_enabled(training):
        outputs = model(*example)
        return backward(outputs, list(model.parameters())) if training else outputs


def backward(outputs: Any, leaves: list[Tensor]) -> object:
    """Compute gradients without adding them to ``.grad``."""
    given = tensors_of(tuple(outputs) if isinstance(outputs, list) else outputs)
    outs = [t for t in given if t.requires_grad]
    wanted = [t for t in leaves if t.requires_grad]
    if not outs or not wanted:
        return None
    grads = [torch.ones_like(t) for t in outs]
    return torch.autograd.grad(outs, wanted, grads, allow_unused=True)


def runs_of(
    model: nn.Module, example: tuple[Tensor, ...], training: bool, compare_compiled: bool
) -> dict[str, Run]:
    """Return runs of a model: "fused", "eager", and "compiled" if asked for; on a GPU without
    training also "graph" and "graph, one stream", if it can be captured.

    Only "fused" runs with ``set_fused(model, True)``; that is up to the caller.
    """
    runs: dict[str, Run] = {
        name: functools.partial(run, model, example, training) for name in ("fused", "eager")
    }
    if compare_compiled:
        runs["compiled"] = functools.partial(run, torch.compile(model), example, training)
    if not training and _are_cuda(example):
        set_fused(model, True)
        try:
            for name, count in (("graph", 2), ("graph, one stream", 1)):
                with graphs.streams(count):
                    graph = graphs.make_graphed(model, example)
                runs[name] = functools.partial(graph, *example)
        except Exception as error:
            _LOG.warning("the model could not be captured as a CUDA graph: %s", error)
            runs.pop("graph", None)
    return runs


def _are_cuda(example: tuple[Tensor, ...]) -> bool:
    return all(t.is_cuda for t in example)


def decided(seconds: Mapping[str, float]) -> dict[str, bool]:
    """Decide about graphs and streams from the times of ``runs_of``: the settings in the file."""
    if "graph" not in seconds:
        return {}
    two, one = seconds["graph"], seconds["graph, one stream"]
    return {
        "side_by_side": kept({False: one, True: two}, usual=False),
        "graph": kept({False: seconds["fused"], True: min(one, two)}, usual=False),
    }


def thread_counts() -> list[int]:
    """Return numbers of threads to try: torch's, its half, and one."""
    usual = torch.get_num_threads()
    return list(dict.fromkeys((usual, max(usual // 2, 1), 1)))


def use_calibrated_threads(num_images: int) -> int:
    """Set torch's number of threads on a CPU to what ``calibrate`` found fastest.

    Args:
        num_images: The batch; of those that were calibrated, the nearest counts.

    Returns:
        The number of threads: torch's own if nothing was calibrated.

    Raises:
        ValueError: num_images is below 1.
    """
    if num_images < 1:
        raise ValueError(f"num_images: expected at least 1, found {num_images}")
    measured = store.settings(torch.device("cpu"), "threads")
    if measured:
        nearest = min(measured, key=lambda n: abs(math.log2(max(n, 1) / num_images)))
        torch.set_num_threads(int(measured[nearest]))
    return torch.get_num_threads()

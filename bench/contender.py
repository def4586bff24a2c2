"""Contenders of a benchmark: baselines, compiled baselines, and this library's backends."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from inputs import Call, Inputs
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to compute a point's results.

    Attributes:
        name: As tables show it.
        call: The timed function of an input set's number. Before ``on``, an inputs.Call.
        results: Returns the results to judge, if they are not those of ``call(0)``.
        ours: Whether a wrong result is this library's fault.
        captured: Whether the first calls compile or capture, so that the third is judged.
        compiled: Whether it counts towards the compilation budget.
        may_decline: Whether a ValueError means that it does not support this size.
        skip: Why it is not run.
    """

    name: str
    call: Callable[..., Any]
    results: Callable[[], Sequence[Tensor | None]] | None = None
    ours: bool = False
    captured: bool = False
    compiled: bool = False
    may_decline: bool = False
    skip: str | None = None

    def on(self, inputs: Inputs) -> Contender:
        return dataclasses.replace(self, call=inputs.numbered(self.call))


def our_contender(
    backend: str, call: Call, options: argparse.Namespace, variant: str = "", **facts: Any
) -> Contender:
    """A backend of this library, or a variant of its kernels."""
    name = f"ours ({backend}, {variant})" if variant else f"ours ({backend})"
    facts = {"ours": True, "may_decline": backend not in options.named} | facts
    return Contender(name, call, **facts)


def compiled_contender(name: str, call: Call, options: argparse.Namespace) -> Contender:
    """A baseline under torch.compile."""
    skip = "--no-compile" if options.no_compile else None
    run = call if skip else _compiled(call, options)  # importing the compiler takes seconds
    return Contender(f"{name}, compiled", run, compiled=True, skip=skip)


def _compiled(call: Call, options: argparse.Namespace) -> Call:
    run = torch.compile(call, mode=options.compile_mode, dynamic=False)
    if options.device.type == "cpu":
        return run
    new_step: Callable[[], None] = torch.compiler.cudagraph_mark_step_begin

    def step(*arguments: Any) -> Any:
        new_step()  # the last call's results are no longer needed
        return run(*arguments)

    return step

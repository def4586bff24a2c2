"""Times of runs that compete, and which of them is kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

#: What is usual is replaced only by what is faster by this share.
MARGIN = 0.03
#: What is slower than the fastest by this factor in two rounds is not measured again.
_HOPELESS = 4
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 50

Run = Callable[[], object]
Name = TypeVar("Name")


def measure(
    runs: Mapping[Name, Run],
    device: torch.device,
    budget_s: float,
    prepare: Callable[[Name], object] = lambda name: None,
) -> dict[Name, float]:
    """Return the median seconds of each run, measured in turn and repeatedly.

    Args:
        runs: By name.
        device: Whose work is waited for.
        budget_s: Seconds for all; at least three rounds are measured, after one to warm up.
        prepare: Called with the name before each run, and not measured.
    """
    for name, run in runs.items():
        prepare(name)
        run()
    times: dict[Name, list[float]] = {name: [] for name in runs}
    names, end = list(runs), time.monotonic() + budget_s
    for i in range(_MOST_ROUNDS):
        if i >= _LEAST_ROUNDS and time.monotonic() > end:
            break
        for name in names if i % 2 else reversed(names):
            prepare(name)
            _wait(device)
            start = time.perf_counter()
            runs[name]()
            _wait(device)
            times[name].append(time.perf_counter() - start)
        if i == 1:
            most = _HOPELESS * min(min(found) for found in times.values())
            names = [name for name in names if min(times[name]) <= most]
    return {name: statistics.median(values) for name, values in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kept(seconds: Mapping[Name, float], usual: Name) -> Name:
    """Return the fastest, or what is usual if the fastest is not faster by the margin."""
    fastest = min(seconds, key=lambda name: seconds[name])
    return usual if seconds[usual] <= seconds[fastest] * (1 + MARGIN) else fastest

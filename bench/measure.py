"""Measuring for the benchmarks: clocks, ceilings, memory, the rule of correctness."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

#: How many times eager's own error a result may have. With 16 bits the roundings of inputs and
#: weights rule; with 32 the order of summation does, which differs between algorithms.
ERROR_FACTORS = {torch.float32: 8.0, torch.bfloat16: 2.0, torch.float16: 2.0}


class Progress:
    """Says on stderr what is running: one line that is overwritten, or a line a stage in a log."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._overwrite = sys.stderr.isatty()

    def stage(self, text: str) -> None:
        self._write(text, end="" if self._overwrite else "\n")

    def tick(self, text: str) -> None:
        """A step within a stage: too frequent for a log."""
        if self._overwrite:
            self._write(text, end="")

    def clear(self) -> None:
        if self._overwrite:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _write(self, text: str, end: str) -> None:
        seconds = f"[{time.perf_counter() - self._start:4.0f} s] "
        start = "\r\x1b[K" if self._overwrite else ""
        print(f"{start}{seconds}{text}"[:160], end=end, file=sys.stderr, flush=True)


class Error(NamedTuple):
    """Distance from the float64 result, absolute; NaN where the result is not a number."""

    rms: float
    largest: float


def error_of(result: Tensor, exact: Tensor) -> Error:
    if exact.numel() == 0:
        return Error(0.0, 0.0)
    difference = result.double() - exact
    return Error(rms(difference), difference.abs().max().item())


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


@dataclass(frozen=True)
class Tolerance:
    """What one result may be off by: a multiple of what eager is off by in the same dtype.

    Attributes:
        exact: The result in float64.
        eager: Error of the eager computation in ``dtype``.
        dtype: Of the computation under test.
        scale: Magnitude that one rounding error is relative to; None for the RMS of ``exact``.
            A gradient that is exactly zero needs it from elsewhere.
    """

    exact: Tensor
    eager: Error
    dtype: torch.dtype
    scale: float | None = None

    def objection(self, error: Error) -> str | None:
        """Why a result with this error is wrong; None if it is right."""
        factor = ERROR_FACTORS[self.dtype]
        scale = rms(self.exact) if self.scale is None else self.scale
        floor = torch.finfo(self.dtype).eps * scale
        for name, measured, bound in (
            ("RMS", error.rms, factor * self.eager.rms + floor),
            ("largest", error.largest, 2 * factor * self.eager.largest + floor),
        ):
            if not measured <= bound:  # so that NaN is an objection
                return f"{name} error {measured:.2e}, allowed {bound:.2e}"
        return None

    def relative(self, error: Error) -> float:
        scale = rms(self.exact) if self.scale is None else self.scale
        return error.rms / max(scale, sys.float_info.min)


def tolerances(
    names: Sequence[str], exact: Sequence[Tensor], eager: Sequence[Tensor], dtype: torch.dtype
) -> dict[str, Tolerance]:
    """For each result its float64 value, and the error that eager makes in the run's dtype."""
    exact = [without_zeros(name, e.detach()) for name, e in zip(names, exact, strict=True)]
    eager = [without_zeros(name, e.detach()) for name, e in zip(names, eager, strict=True)]
    allowed = {
        name: Tolerance(e, error_of(u, e), dtype)
        for name, e, u in zip(names, exact, eager, strict=True)
    }
    for name, tolerance in allowed.items():
        # Softmax drops a bias of keys: rounding in its gradient is relative to its like.
        for key, value in ((" k_bias", " v_bias"), (".wk.bias", ".wv.bias")):
            if name.endswith(key):
                scale = rms(allowed[name.removesuffix(key) + value].exact)
                allowed[name] = replace(tolerance, scale=scale)
    return allowed


def without_zeros(name: str, result: Tensor) -> Tensor:
    """What of a result is not zero by mathematics: the third of keys in a joint bias is."""
    if name.endswith(("qkv_bias", "qkv.bias")):
        q, _, v = result.chunk(3)
        return torch.cat([q, v])
    return result


def judge(results: Sequence[Tensor | None], allowed: Mapping[str, Tolerance]) -> dict[str, Any]:
    """Status ("ok" or "wrong", with the reason) and errors of a computation by its results.

    A result may be missing (None) where the exact one has a ``scale`` of its own: it is zero.
    """
    objections, errors = [], {}
    for (name, tolerance), result in zip(allowed.items(), results, strict=True):
        if result is None and tolerance.scale is not None:
            result = torch.zeros_like(tolerance.exact)
        result = None if result is None else without_zeros(name, result)
        if result is None or result.shape != tolerance.exact.shape:
            objections.append(
                f"{name}: {'missing' if result is None else f'shape {list(result.shape)}'}"
            )
            continue
        error = error_of(result, tolerance.exact)
        if (objection := tolerance.objection(error)) is not None:
            objections.append(f"{name}: {objection}")
        errors[name] = {
            "error": tolerance.relative(error),
            "eager_error": tolerance.relative(tolerance.eager),
            "largest_error": error.largest,
            "eager_largest_error": tolerance.eager.largest,
        }

    def beside_eager(name: str) -> float:
        ratio = errors[name]["error"] / max(errors[name]["eager_error"], sys.float_info.min)
        return ratio if ratio == ratio else math.inf

    # A result that is exactly zero has no relative error to show.
    worst = max((n for n in errors if allowed[n].scale is None), key=beside_eager, default=None)
    return {
        "status": "wrong" if objections else "ok",
        "reason": "; ".join(objections) or None,
        "worst_result": worst,
        "error": errors[worst]["error"] if worst else None,
        "eager_error": errors[worst]["eager_error"] if worst else None,
        "errors": errors,
    }


@dataclass
class Timing:
    """Seconds a call took: in each round, the mean over that round's calls.

    ``host`` is the time until a call had been issued to the GPU, without waiting for it.
    """

    calls_per_round: int
    seconds: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.seconds, q))

    def median_speedup(self, baseline: Timing) -> float:
        """How many times faster than the baseline, judged round by round."""
        return statistics.median(b / s for b, s in zip(baseline.seconds, self.seconds, strict=True))


class Stopwatch:
    """Times consecutive calls on one device, each with the number of the input set to use.

    On a GPU the calls queue up behind a kernel that spins until the host has issued them all, and
    events around them then read device time without the host's gaps. One counter gives all callers
    their input sets, so that no caller finds in the cache what another has just left there.
    """

    _SPIN_HZ = 2e9  # no GPU clocks higher by much, so a spin is never much too short

    def __init__(self, device: torch.device, most_calls: int | None = None) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"
        # What one round's calls should last, and how many at most: they must fit a GPU's queue.
        self._round_seconds = 0.002 if self._on_gpu else 0.02
        self._most_calls = most_calls or (8 if self._on_gpu else 50)
        self._next_set = 0

    def calls_for(self, call: Callable[[int], object]) -> tuple[int, float]:
        """How many calls fill a round, and how long the host takes to issue them."""
        self._issue(call, 10 if self._on_gpu else 2)  # warm-up
        self._wait()
        start = time.perf_counter()
        self._issue(call, 2)
        host = (time.perf_counter() - start) / 2
        self._wait()
        seconds = (time.perf_counter() - start) / 2
        calls = min(max(round(self._round_seconds / seconds), 1), self._most_calls)
        return calls, host * calls

    def time_calls(
        self, call: Callable[[int], object], calls: int, issue: float
    ) -> tuple[float, float | None]:
        """Seconds a call, and on a GPU the host's seconds a call."""
        if not self._on_gpu:
            start = time.perf_counter()
            self._issue(call, calls)
            return (time.perf_counter() - start) / calls, None
        event: Callable[..., Any] = torch.cuda.Event
        begin, end = (event(enable_timing=True) for _ in range(2))
        self._wait()
        spin: Callable[[int], None] = torch.cuda._sleep
        spin(int((1.5 * issue + 1e-4) * self._SPIN_HZ))
        begin.record()
        start = time.perf_counter()
        self._issue(call, calls)
        host = time.perf_counter() - start
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / calls, host / calls

    def _issue(self, call: Callable[[int], object], calls: int) -> None:
        for _ in range(calls):
            call(self._next_set)
            self._next_set += 1

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.device)


def round_robin(
    callers: Mapping[str, Callable[[int], object]],
    stopwatch: Stopwatch,
    *,
    min_time: float,
    repeats: int,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, Timing]:
    """Time callers in turn, round by round: other work on the machine disturbs all alike.

    Args:
        callers: Name -> function of an input set's number.
        stopwatch: Of the device they run on.
        min_time: Seconds after which no further round begins, once there are five.
        repeats: Rounds at most.
        on_round: Called with each round's number.
    """
    plan = {name: stopwatch.calls_for(call) for name, call in callers.items()}
    timings = {name: Timing(calls) for name, (calls, _) in plan.items()}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for index in range(repeats):
            if index >= 5 and time.perf_counter() - start > min_time:
                break
            on_round(index)
            for name, call in callers.items():
                seconds, host = stopwatch.time_calls(call, *plan[name])
                timings[name].seconds.append(seconds)
                if host is not None:
                    timings[name].host.append(host)
    finally:
        gc.enable()
    return timings


def extra_peak_bytes(call: Callable[[int], object], device: torch.device) -> int:
    """Most memory in use during a call above what was in use before, its results included.

    As torch's allocators count it: what a library takes for itself does not show. (Resident pages
    would tell all, but with glibc's fragmentation, which differs from run to run.)
    """
    if device.type == "cpu":
        return _extra_peak_bytes_cpu(call)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = call(0)
    torch.cuda.synchronize(device)
    del results
    return torch.cuda.max_memory_allocated(device) - before


def _extra_peak_bytes_cpu(call: Callable[[int], object]) -> int:
    with warnings.catch_warnings(), _silent_stderr():
        # Of cycles, of which there is one here; torch 2.11 says so once a process.
        warnings.filterwarnings("ignore", message=".*Profiler clears events")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            results = call(0)
    del results
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    sizes: Iterable[int] = (event["args"]["Bytes"] for event in changes)
    return max(itertools.accumulate(sizes, initial=0))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's native code announces itself there."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@dataclass(frozen=True)
class Ceilings:
    """What the device can do, measured now; a copy counts the bytes read and those written."""

    copy_bytes_per_second: float
    copy_buffer_bytes: int
    matmul_flops_per_second: float
    matmul_size: int
    matmul_dtype: str


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Fastest of several large copies and of several large square matrix products.

    The matrix product is in bfloat16 on a GPU, as its tensor cores are what a kernel could use;
    on a CPU in the dtype of the run.
    """
    on_gpu = device.type == "cuda"
    buffer_bytes, size, repeats = (2**30, 8192, 20) if on_gpu else (2**28, 2048, 10)
    matmul_dtype = torch.bfloat16 if on_gpu else dtype
    stopwatch = Stopwatch(device)

    def fastest(call: Callable[[int], object]) -> float:
        timing = round_robin({"": call}, stopwatch, min_time=2.0, repeats=repeats)[""]
        return min(timing.seconds)

    def time_copy() -> float:
        source = torch.rand(buffer_bytes // 4, device=device)
        target = torch.empty_like(source)
        return fastest(lambda _: target.copy_(source))

    def time_matmul() -> float:
        a, b = (torch.randn(size, size, device=device).to(matmul_dtype) for _ in range(2))
        product = torch.empty_like(a)
        return fastest(lambda _: torch.mm(a, b, out=product))

    copy, matmul = time_copy(), time_matmul()
    return Ceilings(
        copy_bytes_per_second=2 * buffer_bytes / copy,
        copy_buffer_bytes=buffer_bytes,
        matmul_flops_per_second=2 * size**3 / matmul,
        matmul_size=size,
        matmul_dtype=dtype_name(matmul_dtype),
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

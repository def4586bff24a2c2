"""Measuring for the benchmarks: clocks, ceilings, memory, the accuracy rule."""

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

#: Allowed error as a multiple of eager's own. In 16 bits the rounding of inputs and weights
#: dominates; in 32 the order of summation, which differs between algorithms.
ERROR_FACTORS = {torch.float32: 8.0, torch.bfloat16: 2.0, torch.float16: 2.0}


class Progress:
    """Shows on stderr what is running: one overwritten line, or one line per stage in a log."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._overwrite = sys.stderr.isatty()

    def stage(self, text: str) -> None:
        self._write(text, end="" if self._overwrite else "\n")

    def tick(self, text: str) -> None:
        """Show a step within a stage, which is too frequent for a log."""
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
    """Absolute distance from the float64 result; NaN if the result is NaN."""

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
    """Allowed error of one result: a multiple of eager's error in the same dtype.

    Attributes:
        exact: The result in float64.
        eager: Error of the eager computation in ``dtype``.
        dtype: The dtype of the computation under test.
        scale: Magnitude that one rounding error is relative to; None for the RMS of ``exact``.
            A gradient that is exactly zero needs it from elsewhere.
    """

    exact: Tensor
    eager: Error
    dtype: torch.dtype
    scale: float | None = None

    def objection(self, error: Error) -> str | None:
        """The reason why a result with this error is wrong, or None."""
        factor = ERROR_FACTORS[self.dtype]
        scale = rms(self.exact) if self.scale is None else self.scale
        floor = torch.finfo(self.dtype).eps * scale
        for name, measured, bound in (
            ("RMS", error.rms, factor * self.eager.rms + floor),
            ("largest", error.largest, 2 * factor * self.eager.largest + floor),
        ):
            if not measured <= bound:  # also catches NaN
                return f"{name} error {measured:.2e}, allowed {bound:.2e}"
        return None

    def relative(self, error: Error) -> float:
        scale = rms(self.exact) if self.scale is None else self.scale
        return error.rms / max(scale, sys.float_info.min)


def tolerances(
    names: Sequence[str], exact: Sequence[Tensor], eager: Sequence[Tensor], dtype: torch.dtype
) -> dict[str, Tolerance]:
    """The float64 value of each result, and eager's error in the run's dtype."""
    exact = [without_zeros(name, e.detach()) for name, e in zip(names, exact, strict=True)]
    eager = [without_zeros(name, e.detach()) for name, e in zip(names, eager, strict=True)]
    allowed = {
        name: Tolerance(e, error_of(u, e), dtype)
        for name, e, u in zip(names, exact, eager, strict=True)
    }
    for name, tolerance in allowed.items():
        # Softmax cancels key biases: rounding in their gradient is relative to value biases'.
        for key, value in ((" k_bias", " v_bias"), (".wk.bias", ".wv.bias")):
            if name.endswith(key):
                scale = rms(allowed[name.removesuffix(key) + value].exact)
                allowed[name] = replace(tolerance, scale=scale)
    return allowed


def without_zeros(name: str, result: Tensor) -> Tensor:
    """The entries of a result that are not exactly zero: those of keys in a joint bias are."""
    if name.endswith(("qkv_bias", "qkv.bias")):
        q, _, v = result.chunk(3)
        return torch.cat([q, v])
    return result


def judge(results: Sequence[Tensor | None], allowed: Mapping[str, Tolerance]) -> dict[str, Any]:
    """Status ("ok" or "wrong", with the reason) and errors of a computation's results.

    A result may be missing (None) if its tolerance has a ``scale``: it is zero.
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

    # A result that is exactly zero has no relative error.
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
    """Seconds per call: in each round, the mean over that round's calls.

    ``host`` is the time to issue a call to the GPU, without waiting for it.
    """

    calls_per_round: int
    seconds: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.seconds, q))

    def median_speedup(self, baseline: Timing) -> float:
        """Median over the rounds of the speedup over the baseline."""
        return statistics.median(b / s for b, s in zip(baseline.seconds, self.seconds, strict=True))


class Stopwatch:
    """Times consecutive calls on one device, each with the number of the input set to use.

    On a GPU the calls queue up behind a kernel that spins until the host has issued them all, so
    that events around them measure device time without host gaps. All callers share one counter of
    input sets, so that none finds its inputs in the cache from another's call.
    """

    _SPIN_HZ = 2e9  # about the highest clock of any GPU, so that spins are long enough

    def __init__(self, device: torch.device, most_calls: int | None = None) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"
        # Target duration of a round, and its maximum number of calls: they must fit a GPU's queue.
        self._round_seconds = 0.002 if self._on_gpu else 0.02
        self._most_calls = most_calls or (8 if self._on_gpu else 50)
        self._next_set = 0

    def calls_for(self, call: Callable[[int], object]) -> tuple[int, float]:
        """The number of calls that fill a round, and the host time to issue them."""
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
        """Seconds per call, and on a GPU the host's seconds per call."""
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
    """Time callers alternately, round by round, so that other load affects all alike.

    Args:
        callers: Name -> function of an input set's number.
        stopwatch: Stopwatch of the device they run on.
        min_time: Seconds after which no further round begins, once there are five.
        repeats: Maximum number of rounds.
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
    """Peak memory of a call above what was in use before, including its results.

    Counts torch's allocators only, not memory that libraries allocate themselves. (Resident pages
    would, but they include glibc's fragmentation, which differs from run to run.)
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
        # torch 2.11 warns once per process about profiling cycles; there is one here.
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
    """Silence stderr, where the profiler's native code announces itself."""
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
    """Measured limits of the device; a copy counts the bytes read and written."""

    copy_bytes_per_second: float
    copy_buffer_bytes: int
    matmul_flops_per_second: float
    matmul_size: int
    matmul_dtype: str


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Fastest of several large copies and of several large square matrix products.

    The matrix product is in bfloat16 on a GPU, for its tensor cores, and in the run's dtype on a
    CPU.
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

"""Contenders at the points of a benchmark: checked, timed if they are right, reported, kept.

No contender is timed whose result has not been judged. What is judged are the results of the very
call that is timed, outputs and every gradient that it computes, unless a contender says otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import environment
import measure
import report
import torch
from command_line import DTYPES
from measure import Timing, Tolerance
from torch import Tensor

#: What a user gets who names no backend.
HEADLINE = "ours (auto)"

Results = Sequence[Tensor | None]
Caller = Callable[[int], Any]


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to compute a point's results.

    Attributes:
        name: As tables show it.
        call: What is timed: a function of an input set's number.
        results: What is judged, where it is not what ``call(0)`` returns.
        ours: Whether a wrong result is this library's fault.
        captured: Whether the first calls compile or capture, so that the third is to be judged.
        compiled: Whether it counts towards the budget of compilation.
        may_decline: Whether a ValueError says that this size is not for it.
        skip: Why it is not run.
    """

    name: str
    call: Caller
    results: Callable[[], Results] | None = None
    ours: bool = False
    captured: bool = False
    compiled: bool = False
    may_decline: bool = False
    skip: str | None = None


def our_name(backend: str) -> str:
    return f"ours ({backend})"


def compiled(function: Any, options: argparse.Namespace) -> Any:
    """The function under torch.compile; itself where nothing is to be compiled."""
    if options.no_compile:  # importing the compiler takes seconds
        return function
    run = torch.compile(function, mode=options.compile_mode, dynamic=False)
    if options.device.type == "cpu":
        return run
    new_step: Callable[[], None] = torch.compiler.cudagraph_mark_step_begin

    def step(*arguments: Any) -> Any:
        new_step()  # the last call's results are done with
        return run(*arguments)

    return step


class Contest:
    """A benchmark's run: its rows, one for each contender at each point, and what became of them.

    Used as a context: what was measured before a fault or Ctrl-C is kept.

    Args:
        options: The command line, completed.
        called: What a user calls, for the last lines.
        words: Contender -> plain words, likewise.
        panels: Plots of rows, where there is a ``--plot``.
        headline: The row that the last lines are about.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        called: str,
        words: Mapping[str, str] | None = None,
        panels: Callable[[list[dict[str, Any]]], Sequence[report.Panel]] | None = None,
        headline: str = HEADLINE,
    ) -> None:
        self.options, self.called, self.words, self.panels = options, called, words or {}, panels
        self.headline = headline
        self.device: torch.device = options.device
        self.progress = measure.Progress()
        self.stopwatch = measure.Stopwatch(self.device)
        self.environment = environment.environment(self.device, options.dtype)
        self.progress.stage("measuring a large copy and a large matrix product")
        self.ceilings = measure.measure_ceilings(self.device, DTYPES[options.dtype])
        self.progress.clear()
        self.rows: list[dict[str, Any]] = []
        self._points: dict[tuple[str, str], list[report.Point]] = {}
        self._compile_seconds = 0.0

    def __enter__(self) -> Contest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.clear()
        if self.rows:
            report.save(self.options, self.document(), self.panels)

    def introduction(self) -> str:
        """Machine and ceilings, which the tables below need to be read."""
        o, c = self.options, self.ceilings
        compiler = "" if o.no_compile else f", torch.compile mode {o.compile_mode}"
        load = self.environment.get("load_average")
        return (
            f"{self.environment['device']}, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads, {o.dtype}{compiler}"
            + ("" if load is None else f"; load average before: {load}")
            + f"\nceilings: copy {c.copy_bytes_per_second / 1e9:.4g} GB/s, read + written "
            f"({c.copy_buffer_bytes / 2**20:.0f} MiB); matmul "
            f"{c.matmul_flops_per_second / 1e9:.4g} GFLOP/s ({c.matmul_dtype}, "
            f"{c.matmul_size} cubed)"
        )

    def document(self) -> dict[str, Any]:
        arguments = {name: str(value) for name, value in vars(self.options).items()}
        return {
            "benchmark": self.options.benchmark,
            "environment": self.environment,
            "arguments": arguments,
            "ceilings": dataclasses.asdict(self.ceilings),
            "results": self.rows,
        }

    def point(
        self,
        what: str,
        where: str,
        prepare: Callable[[], tuple[Sequence[Contender], Mapping[str, Tolerance]]],
        common: Mapping[str, Any],
        called: str | None = None,
    ) -> list[dict[str, Any]]:
        """Measure one point in one mode; its rows, none where memory does not suffice.

        Args:
            what: In which mode, in plain words ("forward").
            where: At which size.
            prepare: Makes contenders, and what their results may be off by.
            common: What all rows of the point have.
            called: What a user calls, where it differs from point to point.
        """
        here = f"{where}, {what}"
        self.progress.stage(f"{here}: float64 and eager results")
        try:
            rows = self._measure(here, *prepare(), common)
        except torch.OutOfMemoryError as error:
            self.progress.clear()
            print(f"\n{here}: left out: {error}", flush=True)
            return []
        self.progress.clear()
        self.rows += rows
        self._points.setdefault((what, called or self.called), []).append(report.Point(where, rows))
        if self.options.json:  # whatever happens to the rest
            report.write_json(self.options.json, self.document())
        return rows

    def finish(self) -> int:
        """Say in plain words what was fastest, and what was wrong; the exit code."""
        print()
        for (what, called), points in self._points.items():
            print(report.closing(what, points, called, self.headline, self.words))
        faults = [row for row in self.rows if row["status"] in ("wrong", "failed")]
        for row in faults:
            kind = "ERROR" if row["ours"] else "not timed"
            text = f"{kind}: {row['where']}: {row['contender']}: {row['status']}: {row['reason']}"
            print(text, file=sys.stderr)
        return 1 if any(row["ours"] for row in faults) else 0

    def _measure(
        self,
        here: str,
        contenders: Sequence[Contender],
        allowed: Mapping[str, Tolerance],
        common: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        rows, right = [], {}
        for contender in contenders:
            outcome = self._check(here, contender, allowed)
            if outcome["status"] == "ok":
                right[contender.name] = contender
            facts = {"where": here, "contender": contender.name, "ours": contender.ours}
            rows.append({**common, **facts, **outcome})
        self.progress.stage(f"{here}: timing {len(right)} contenders")
        timings = measure.round_robin(
            {name: contender.call for name, contender in right.items()},
            self.stopwatch,
            min_time=self.options.min_time,
            repeats=self.options.repeats,
            on_round=lambda index: self.progress.tick(f"{here}: round {index + 1}"),
        )
        eager = next((timings[name] for name in report.EAGER if name in timings), None)
        for row in rows:
            name = row["contender"]
            if name in timings:
                row |= figures(timings[name], eager)
                row["extra_peak_bytes"] = self._extra_peak(right[name])
        return rows

    def _check(
        self, here: str, contender: Contender, allowed: Mapping[str, Tolerance]
    ) -> dict[str, Any]:
        budget = self.options.compile_budget
        if contender.skip is not None:
            return {"status": "skipped", "reason": contender.skip}
        if contender.compiled and self._compile_seconds > budget:
            return {"status": "skipped", "reason": f"--compile-budget {budget:g} is spent"}
        say = self.progress.stage if contender.compiled else self.progress.tick
        say(f"{here}: checking {contender.name}")
        start = time.perf_counter()
        try:
            # The third call of a compiled function is the first to replay its CUDA graph.
            for _ in range(3 if contender.captured or contender.compiled else 1):
                results = contender.results() if contender.results else contender.call(0)
            return measure.judge(results, allowed)
        except Exception as error:  # whatever a compiler may raise: the others are still measured
            declined = contender.may_decline and isinstance(error, ValueError)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return {"status": "declined" if declined else "failed", "reason": reason}
        finally:
            if contender.compiled:
                self._compile_seconds += time.perf_counter() - start

    def _extra_peak(self, contender: Contender) -> int | None:
        with_graphs = self.options.compile_mode in ("max-autotune", "reduce-overhead")
        in_graphs = contender.compiled and with_graphs
        if (in_graphs or contender.captured) and self.device.type == "cuda":
            return None  # held in the graphs' own pool, before a call and after it
        return measure.extra_peak_bytes(contender.call, self.device)


def figures(timing: Timing, eager: Timing | None) -> dict[str, Any]:
    """What every benchmark's row says of times."""
    return {
        "median_ms": timing.quantile(0.5) * 1e3,
        "mean_ms": statistics.fmean(timing.seconds) * 1e3,
        "p10_ms": timing.quantile(0.1) * 1e3,
        "p90_ms": timing.quantile(0.9) * 1e3,
        "speedup_over_eager": timing.median_speedup(eager) if eager else None,
        "host_us": statistics.median(timing.host) * 1e6 if timing.host else None,
        "rounds": len(timing.seconds),
        "calls_per_round": timing.calls_per_round,
    }

"""Runs contenders at the points of a benchmark: checks, times, reports and saves.

No contender is timed before its results have been judged: the outputs and all gradients of the very
call that is timed, unless the contender overrides them.
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

import measure
import report
import torch
from command_line import DTYPES
from contender import Contender
from measure import Timing, Tolerance
from report import Row

from crossvit_kernels.backends import watching

#: The row of the default, without a named backend.
HEADLINE = "ours (auto)"


class Contest:
    """A run of a benchmark: one row for each contender at each point, with its status.

    As a context manager, it saves what was measured before a fault or Ctrl-C.

    Args:
        options: The completed command line.
        called: What users call ours, for the last lines.
        columns: Table columns besides those of all benchmarks: header -> a row's cell.
        words: Contender -> plain words, for the last lines.
        notes: Lines of the introduction.
        panels: Plots of the rows, for ``--plot``.
        headline: The contender that the last lines are about.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        called: str,
        columns: report.Columns,
        words: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
        panels: Callable[[list[Row]], Sequence[report.Panel]] | None = None,
        headline: str = HEADLINE,
    ) -> None:
        self.options, self.called, self.columns = options, called, columns
        self.words, self.notes, self.panels = words or {}, notes, panels
        self.headline = headline
        self.device: torch.device = options.device
        self.progress = measure.Progress()
        self.stopwatch = measure.Stopwatch(self.device)
        self.document = report.new_document(options)
        self.progress.stage("measuring a large copy and a large matrix product")
        self.ceilings = measure.measure_ceilings(self.device, DTYPES[options.dtype])
        self.progress.clear()
        self.rows: list[Row] = []
        self.document |= {"ceilings": dataclasses.asdict(self.ceilings), "results": self.rows}
        self._points: dict[tuple[str, str], list[report.Point]] = {}
        self._compile_seconds = 0.0

    def __enter__(self) -> Contest:
        print(self.introduction(), flush=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.clear()
        if self.rows:
            report.save(self.options, self.document, self.panels)

    def introduction(self) -> str:
        """Machine, ceilings and notes: the context of the tables below."""
        o, c, facts = self.options, self.ceilings, self.document["environment"]
        compiler = "" if o.no_compile else f", torch.compile mode {o.compile_mode}"
        load = facts.get("load_average")
        lines = [
            f"{facts['device']}, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads, {o.dtype}{compiler}"
            + ("" if load is None else f"; load average before: {load}"),
            f"ceilings: copy {c.copy_bytes_per_second / 1e9:.4g} GB/s, read + written "
            f"({c.copy_buffer_bytes / 2**20:.0f} MiB); matmul "
            f"{c.matmul_flops_per_second / 1e9:.4g} GFLOP/s ({c.matmul_dtype}, "
            f"{c.matmul_size} cubed)",
            "Error: relative RMS against float64, of the result furthest from eager's.",
        ]
        if self.device.type == "cuda":
            lines += [
                "Times are the device's; host us: until a call is issued. A graph's memory: -."
            ]
        return "\n".join([*lines, *self.notes])

    def point(
        self,
        what: str,
        where: str,
        prepare: Callable[[], tuple[Sequence[Contender], Mapping[str, Tolerance]]],
        common: Mapping[str, Any],
        *,
        title: str,
        complete: Callable[[list[Row]], None] = lambda timed_rows: None,
        called: str | None = None,
    ) -> None:
        """Measure and print one point in one mode, if there is enough memory.

        Args:
            what: The mode in plain words ("forward").
            where: The size in plain words.
            prepare: Returns the contenders and the tolerances of their results.
            common: Entries of all rows of the point.
            title: Lines above the table.
            complete: Adds what columns and files need to the rows of timed contenders.
            called: What users call ours, if it differs from point to point.
        """
        here = f"{where}, {what}"
        self.progress.stage(f"{here}: float64 and eager results")
        try:
            rows = self._measure(here, *prepare(), common)
        except torch.OutOfMemoryError as error:
            self.progress.clear()
            print(f"\n{here}: left out: {error}", flush=True)
            return
        complete(report.timed(rows))
        self.progress.clear()
        self.rows += rows
        self._points.setdefault((what, called or self.called), []).append(report.Point(where, rows))
        if self.options.json:  # whatever happens to the rest
            report.write_json(self.options.json, self.document)
        print("\n".join(["", title, report.contenders_table(self.columns, rows)]), flush=True)

    def finish(self) -> int:
        """Print in plain words what was fastest and what was wrong; return the exit code."""
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
    ) -> list[Row]:
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
        baseline = report.baseline_of(rows)
        eager = timings.get(baseline) if baseline else None
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
            # A compiled function first replays its CUDA graph in its third call.
            with watching() as ran:
                for _ in range(3 if contender.captured or contender.compiled else 1):
                    results = contender.results() if contender.results else contender.call(0)
            variants = {"ran": "; ".join(sorted(ran))} if contender.ours else {}
            return {**measure.judge(results, allowed), **variants}
        except Exception as error:  # compilers may raise anything: still measure the others
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
    """The timing entries of every benchmark's rows."""
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

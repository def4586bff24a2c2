"""Output of the benchmarks: tables, closing lines, JSON and CSV files, plots."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import environment

Row = dict[str, Any]
#: Header -> a row's cell.
Columns = Mapping[str, Callable[[Row], str]]

#: Baselines of the speedups: the first one that a benchmark has.
EAGER = ("timm, eager", "ours, eager", "eager")
RESULTS = Path(__file__).resolve().parent / "results"


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table: first column left-aligned, the others right-aligned."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        ).rstrip()
        for line in lines
    )


class Point(NamedTuple):
    """The rows of all contenders at one size."""

    where: str
    rows: list[Row]


class Verdict(NamedTuple):
    """The fastest at a point: ours, as users call it, against the best of the others."""

    ours: Row
    others: list[Row]  # fastest first

    @property
    def times_other(self) -> float:
        """Speedup over the best of the others."""
        return float(self.others[0]["median_ms"] / self.ours["median_ms"])


def closing(
    what: str, points: Sequence[Point], called: str, headline: str, words: Mapping[str, str]
) -> str:
    """One line of plain words: what was fastest, and by how much against eager and the next best.

    Args:
        what: The mode, e.g. "forward".
        points: All points measured in that mode.
        called: What users call ours.
        headline: The contender that stands for ours, if it was timed; else our fastest.
        words: Contender -> plain words; default: its name.
    """
    verdicts = [(point.where, verdict(point.rows, headline)) for point in points]
    decided = [(where, v) for where, v in verdicts if v is not None]
    if not decided:
        others = sorted(timed(points[-1].rows), key=_median)
        if not others:
            return f"Fastest {what}: nothing was timed."
        first = words.get(others[0]["contender"], others[0]["contender"])
        return f"Fastest {what}: {first}, {_figures(others[0])}; {called} was not timed."
    if len(points) == 1:
        return f"Fastest {what}: {_one(decided[0][1], called, words)}"
    return f"{what.capitalize()}, {len(points)} sizes: {_many(decided, called, words)}"


def verdict(rows: Sequence[Row], headline: str) -> Verdict | None:
    """The verdict at a point; None if nothing of ours, or nothing else, was right."""
    right = sorted(timed(rows), key=_median)
    ours = [row for row in right if row["ours"]]
    others = [row for row in right if not row["ours"]]
    if not ours or not others:
        return None
    return Verdict(next((r for r in ours if r["contender"] == headline), ours[0]), others)


def _one(v: Verdict, called: str, words: Mapping[str, str]) -> str:
    best = v.others[0]
    other = words.get(best["contender"], best["contender"])
    if v.times_other >= 1:
        if len(v.others) == 1:
            return f"{called}, {_figures(v.ours)}, the only other contender."
        return f"{called}, {_figures(v.ours)} and {times(v.times_other)} the next best ({other})."
    place = 1 + sum(row["median_ms"] < v.ours["median_ms"] for row in v.others)
    ordinal = {2: "second", 3: "third"}.get(place, f"{place}th")
    return (
        f"{other}, {_figures(best)}; {called} is {ordinal}, {v.ours['median_ms']:.3g} ms, "
        f"{times(v.times_other)} of its speed."
    )


def _many(decided: Sequence[tuple[str, Verdict]], called: str, words: Mapping[str, str]) -> str:
    won = sum(v.times_other >= 1 for _, v in decided)
    where, worst = min(decided, key=lambda pair: pair[1].times_other)
    other = words.get(worst.others[0]["contender"], worst.others[0]["contender"])
    speedups = sorted(v.ours["speedup_over_eager"] or 0.0 for _, v in decided)
    count = {0: "none", len(decided): "all"}.get(won, str(won))
    bound = "at least" if won == len(decided) else "at worst"
    return (
        f"{called} is fastest at {count}, {times(speedups[0])} to {times(speedups[-1])} eager, "
        f"{bound} {times(worst.times_other)} the best other ({other}; {where})."
    )


def times(ratio: float) -> str:
    """A ratio with its significant digits."""
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x" if ratio >= 2 else f"{ratio:.2f}x"


def _figures(row: Mapping[str, Any]) -> str:
    text = f"{row['median_ms']:.3g} ms"
    speedup = row["speedup_over_eager"]
    if speedup is None or row["contender"] in EAGER:
        return text
    return f"{text}, {times(speedup)} eager"


def timed(rows: Sequence[Row]) -> list[Row]:
    """The rows of contenders that were right, and so timed."""
    return [row for row in rows if row["status"] == "ok"]


def _median(row: Mapping[str, Any]) -> float:
    return float(row["median_ms"])


def contenders_table(columns: Columns, rows: Sequence[Row]) -> str:
    """A table of the timed contenders; below it the others with reasons, and a warning.

    Args:
        columns: Columns besides those of all benchmarks.
        rows: The rows of one point in one mode.
    """
    baseline = "timm" if baseline_of(rows) == "timm, eager" else "eager"
    every: Columns = {
        "contender": lambda row: row["contender"],
        "median ms": lambda row: f"{row['median_ms']:.4g}",
        "10-90 %": lambda row: f"{row['p10_ms']:.4g}-{row['p90_ms']:.4g}",
        **columns,
        f"vs {baseline}": lambda row: _or_dash("{:.2f}x", row["speedup_over_eager"]),
        "host us": lambda row: _or_dash("{:.0f}", row["host_us"]),
        "extra MiB": lambda row: _or_dash("{:.4g}", row["extra_peak_bytes"], 2**20),
        "error (eager's)": lambda row: f"{row['error']:.1e} ({row['eager_error']:.1e})",
    }
    lines = [[cell(row) for cell in every.values()] for row in timed(rows)]
    below = [
        f"  {row['contender']}: {row['status']}: {row['reason']}"[:400]
        for row in rows
        if row["status"] != "ok"
    ]
    if any(row["p90_ms"] > 2 * row["p10_ms"] for row in timed(rows)):
        below += ["  some times vary by more than 2x: is the machine busy with something else?"]
    return "\n".join([format_table(list(every), lines), *below])


def _or_dash(template: str, value: float | None, unit: float = 1) -> str:
    return "-" if value is None else template.format(value / unit)


def baseline_of(rows: Sequence[Row]) -> str | None:
    """The baseline of the point's speedups."""
    right = {row["contender"] for row in timed(rows)}
    return next((name for name in EAGER if name in right), None)


def new_document(options: argparse.Namespace, **measured: Any) -> dict[str, Any]:
    """A result file: which benchmark, where and how it ran, and what it measured."""
    return {
        "benchmark": options.benchmark,
        "environment": environment.environment(options.device, options.dtype),
        # Of paths the names alone: folders are the machine's own.
        "arguments": {
            name: value.name if isinstance(value, Path) else str(value)
            for name, value in vars(options).items()
        },
        **measured,
    }


def save(
    options: argparse.Namespace,
    document: Mapping[str, Any],
    panels: Callable[[list[Row]], Sequence[Panel]] | None = None,
) -> None:
    """Write the files that the command line requests."""
    rows, facts = document.get("results", []), document["environment"]
    if options.save:
        name = "-".join(filter(None, (facts["date"][:10], options.benchmark, facts["dtype"])))
        folder = RESULTS / environment.device_slug(options.device)
        write_json(folder / f"{name}.json", document)
    if options.json:
        write_json(options.json, document)
    if getattr(options, "csv", None):
        write_csv(options.csv, rows)
    if getattr(options, "plot", None) and panels:
        title = f"{options.benchmark.capitalize()}, {facts['device']}, {facts['dtype']}"
        plot(options.plot, panels(rows), title)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write all scalar values of the rows; missing ones stay empty."""
    columns = [key for row in rows for key in row if not isinstance(row[key], Mapping)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(columns)), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by strings, as JSON has no numbers for them."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


@dataclass
class Panel:
    """One plot: name -> points (x, y). Bars if there is only one x."""

    title: str
    xlabel: str
    ylabel: str
    series: dict[str, list[tuple[float, float]]]
    log_y: bool = False


def plot(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Draw panels, two in a row."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(13, 4.5 * rows), layout="constrained")
    figure.suptitle(title)
    for axes, panel in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, strict=False):
        _draw(axes, panel)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw(axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title)
    xs = sorted({x for points in panel.series.values() for x, _ in points})
    if len(xs) == 1:
        values = [points[0][1] for points in panel.series.values()]
        axes.bar_label(axes.barh(list(panel.series), values), fmt="%.3g", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(panel.ylabel)
        return
    for name, points in panel.series.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, xscale="log")
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.set_xticks([], minor=True)
    if panel.log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")

"""What the benchmarks show and keep: tables, JSON and CSV files, plots."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
from fusion_contenders import Shape

RESULTS = Path(__file__).resolve().parent / "results"


def point_table(shape: Shape, rows: list[dict[str, Any]], ceilings: measure.Ceilings) -> str:
    """Table of one point in one mode, at most 120 columns wide."""
    mode, kind, sets = (rows[0][key] for key in ("mode", "inputs", "input_sets"))
    floor, flops = shape.floor_bytes(mode), shape.flops(mode)
    floor_ms = floor / ceilings.copy_bytes_per_second * 1e3
    on_gpu = kind != "one set"
    header = ["contender", "median ms", "10-90 %", "vs eager", "GB/s", "of copy", "GFLOP/s"]
    header += ["extra MiB", *(["host us"] if on_gpu else []), "error (eager's)"]
    lines, asides = [], []
    for row in rows:
        if row["status"] != "ok":
            asides.append(f"  {row['contender']}: {row['status']}: {row['reason']}"[:400])
            continue
        extra = row["extra_peak_bytes"]
        lines.append(
            [
                row["contender"],
                f"{row['median_ms']:.4g}",
                f"{row['p10_ms']:.4g}-{row['p90_ms']:.4g}",
                f"{row['speedup_over_eager']:.2f}x",
                f"{row['achieved_gbps']:.4g}",
                f"{row['share_of_copy']:.1%}",
                f"{row['achieved_gflops']:.4g}",
                "-" if extra is None else f"{extra / 2**20:.1f}",
                *([f"{row['host_us']:.0f}"] if on_gpu else []),
                f"{row['error']:.1e} ({row['eager_error']:.1e})",
            ]
        )
    if any(row.get("p90_ms", 0) > 2 * row.get("p10_ms", 0) for row in rows):
        asides.append("  some times vary by more than 2x: is the machine busy with something else?")
    other = f" and the other fusion's {shape.pair_tokens}" if shape.pair_tokens else ""
    title = (
        f"\n{shape.tokens} tokens{other}, batch {shape.batch}, "
        f"width {shape.dim} (own {shape.own_dim}), {shape.heads} heads, "
        f"{measure.dtype_name(shape.dtype)}, {mode}\n"
        f"inputs: {kind}, {sets * shape.token_bytes / 1e6:.4g} MB of tokens; "
        f"floor: {floor / 1e6:.1f} MB, {floor_ms:.3g} ms at the copy's bandwidth; "
        f"{flops / 1e9:.3g} GFLOP absorbed"
    )
    return "\n".join([title, format_table(header, lines), *asides])


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """First column to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        ).rstrip()
        for line in lines
    )


def document(
    benchmark: str,
    options: argparse.Namespace,
    environment: Mapping[str, Any],
    ceilings: measure.Ceilings,
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What a result file holds."""
    return {
        "benchmark": benchmark,
        "environment": environment,
        "arguments": {name: str(value) for name, value in vars(options).items()},
        "ceilings": dataclasses.asdict(ceilings),
        "results": rows,
    }


def verdict(
    what: str, rows: Iterable[Mapping[str, Any]], times_eager: str, eager: str = "eager"
) -> str:
    """One line of plain words: what was fastest, and where ours stands if that is another.

    Args:
        what: Was measured: "forward", say.
        rows: Of one measurement, with "contender", "median_ms" and ``times_eager``.
        times_eager: The key of the speed relative to eager mode.
        eager: The name of that.
    """
    timed = sorted((r for r in rows if "median_ms" in r), key=lambda r: r["median_ms"])
    if not timed:
        return f"{what}: nothing was timed."
    first = timed[0]
    line = f"{what}: {first['contender']} is fastest, {first['median_ms']:.3g} ms"
    if times_eager in first and first["contender"] != eager:
        line += f", {first[times_eager]:.3g}x {eager}"
    if is_ours(first["contender"]):
        others = [r for r in timed if not is_ours(r["contender"])]
        if others and others[0]["contender"] != eager:
            ratio = others[0]["median_ms"] / first["median_ms"]
            line += f" and {ratio:.3g}x the next best ({others[0]['contender']})"
    elif ours := [r for r in timed if is_ours(r["contender"])]:
        ratio = first["median_ms"] / ours[0]["median_ms"]
        line += f"; {ours[0]['contender']} has {ratio:.2g}x its speed"
        line += f" ({ours[0]['median_ms']:.3g} ms)"
    return line + "."


def is_ours(contender: str) -> bool:
    """Whether this library's kernels run it; they do not run its model in eager mode."""
    return contender.startswith(("ours (", "ours, fused"))


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Every plain value of the rows; a column that a row lacks stays empty."""
    columns = [key for row in rows for key in row if not isinstance(row[key], Mapping)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(columns)), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _finite(value: Any) -> Any:
    """NaN and infinities as strings: JSON has no numbers for them."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


@dataclass
class Panel:
    """One plot: name -> points (x, y). With a single x in all, bars."""

    title: str
    xlabel: str
    ylabel: str
    series: dict[str, list[tuple[float, float]]]
    log_y: bool = False


def plot(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Panels two in a row."""
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

"""Curves of one or several runs: loss, accuracy, learning rate, speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossvit.training.records import read_table

_STYLES = ("-", "--", ":", "-.")


def draw(runs: Sequence[Path], path: Path, title: str = "") -> None:
    """Draw the curves of runs into one picture.

    Args:
        runs: Folders of runs. If there are several, the relative difference of their losses to the
            first one's is drawn as well.
        path: Of the picture; its suffix says the format.
        title: Above the picture.

    Raises:
        ValueError: A folder has no records yet.
        ImportError: matplotlib is not installed.
    """
    figure = _figure_class()(figsize=(12, 3.6), layout="constrained")
    epochs = {run: read_table(run / "epochs.csv") for run in runs}
    for run, rows in epochs.items():
        if not rows:
            raise ValueError(f"plot: {run} has no records of an epoch")
    figure.suptitle(title)
    loss, last, accuracy = figure.subplots(1, 3)
    for (run, rows), style in zip(epochs.items(), _STYLES * len(epochs), strict=False):
        number = [int(row["epoch"]) + 1 for row in rows]
        loss.plot(number, _column(rows, "train_loss"), style, label=run.name)
        _plot_accuracy(accuracy, number, rows, style, run.name)
    loss.set(title="training loss, mean of an epoch", xlabel="epoch")
    accuracy.set(title="held-out accuracy, %", xlabel="epoch")
    if len(runs) > 1:
        _plot_differences(last, runs)
    else:
        last.plot(number, _column(rows, "lr"))
        last.set(title="learning rate", xlabel="epoch")
    for axes in (loss, last, accuracy):
        if axes.lines:
            axes.legend() if len(runs) > 1 or axes is accuracy else None
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def check_matplotlib() -> None:
    """Check that plots can be drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    _figure_class()


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    return Figure


def _plot_accuracy(axes: Any, epochs: list[int], rows: Any, style: str, name: str) -> None:
    for column, kind in (("val_top1", ""), ("ema_top1", ", averaged weights")):
        values = _column(rows, column)
        if not all(map(math.isnan, values)):
            axes.plot(epochs, values, style, label=name + kind)


def _plot_differences(axes: Any, runs: Sequence[Path]) -> None:
    """Relative difference of the losses to the first run's, at each step that both recorded."""
    first, scale = _losses(runs[0]), "linear"
    for run in runs[1:]:
        steps = sorted(set(first) & set(losses := _losses(run)))
        values = [abs(losses[step] - first[step]) / first[step] or math.nan for step in steps]
        scale = "log" if any(value > 0 for value in values) else scale
        axes.plot(steps, values, linewidth=0.7, label=f"{run.name} to {runs[0].name}")
    axes.set(title="relative difference of the loss", xlabel="step", yscale=scale)


def _losses(run: Path) -> dict[int, float]:
    return {int(row["step"]): float(row["loss"]) for row in read_table(run / "steps.csv")}


def _column(rows: Sequence[dict[str, str]], name: str) -> list[float]:
    return [float(row[name] or "nan") for row in rows]

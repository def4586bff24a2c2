"""A progress bar where rich is installed and there is a terminal; else lines."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """Shows steps.

    Args:
        total: Number of steps.
        quiet: Show nothing.
    """

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._quiet, self._done = total, quiet, 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if not self._quiet and sys.stdout.isatty():
            try:
                from rich.progress import Progress as Bar
            except ImportError:
                return self
            self._bar = Bar()
            self._task = self._bar.add_task("calibrate", total=self._total)
            self._bar.start()
        return self

    def step(self, what: str) -> None:
        """Show what is measured next."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done - 1, description=what)
        elif not self._quiet:
            print(f"calibrate {self._done}/{self._total}: {what}", flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
            self._bar.stop()

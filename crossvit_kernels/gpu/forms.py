"""Which of several ways to do the same runs: what is asked for, or what a table says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


class Forms:
    """Names of forms, "auto" among them, and the one that is asked for.

    Args:
        variable: The environment variable that may name one.
        names: All of them.
    """

    def __init__(self, variable: str, names: tuple[str, ...]) -> None:
        self.variable, self.names = variable, names
        self._asked_for = os.environ.get(variable, "auto")

    def asked_for(self) -> str:
        """A form's name.

        Raises:
            ValueError: The environment names something else.
        """
        if self._asked_for not in self.names:
            raise ValueError(
                f"{self.variable}: expected one of {self.names}, found {self._asked_for!r}"
            )
        return self._asked_for

    @contextmanager
    def choose(self, form: str) -> Iterator[None]:
        """Run in one form, where that is possible.

        Raises:
            ValueError: form is none of the names.
        """
        if form not in self.names:
            raise ValueError(f"form: expected one of {self.names}, found {form!r}")
        previous, self._asked_for = self._asked_for, form
        try:
            yield
        finally:
            self._asked_for = previous

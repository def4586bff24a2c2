"""Which kernel variant runs: what a block of code asks for, or what tables say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Forms:
    """Names of variants, "auto" among them, and the one that is asked for.

    Args:
        *names: All but "auto".
    """

    def __init__(self, *names: str) -> None:
        self.names = ("auto", *names)
        self.asked_for = "auto"

    @contextmanager
    def choose(self, form: str) -> Iterator[None]:
        """Run one variant in the block wherever that is possible: for tests and benchmarks.

        Raises:
            ValueError: form is none of the names.
        """
        if form not in self.names:
            raise ValueError(f"form: expected one of {self.names}, found {form!r}")
        previous, self.asked_for = self.asked_for, form
        try:
            yield
        finally:
            self.asked_for = previous

"""What ``accelerate`` found."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """One module that is served, or that was recognised and declined.

    Attributes:
        path: Its path in the model; "" for the model itself.
        kind: Its class.
        serves: What computes it; empty if nothing does.
        reasons: Why it, or a part of it, is not served.
        speedup: Time of its own forward (with backward, if measured for training) over that of
            what serves it; None if it was not measured.
    """

    path: str
    kind: str
    serves: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    speedup: float | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """The modules of a model that ``accelerate`` knows; ``print`` shows a table of them.

    Attributes:
        rows: In the order of ``named_modules``.
    """

    rows: tuple[Row, ...]

    @property
    def served(self) -> list[str]:
        """Return the paths of the modules that are served."""
        return [row.path for row in self.rows if row.serves]

    @property
    def declined(self) -> dict[str, str]:
        """Return the paths of the modules of which nothing is served, with the reasons."""
        return {row.path: "; ".join(row.reasons) for row in self.rows if not row.serves}

    def __str__(self) -> str:
        if not self.rows:
            return "accelerate: nothing to serve: no module of a class that it knows"
        cells = [("module", "class", "served by", "why not")]
        for row in self.rows:
            serves = ", ".join(row.serves) or "-"
            if row.speedup is not None:
                serves += f" ({row.speedup:.2f}x)"
            cells.append((row.path or "(the model)", row.kind, serves, "; ".join(row.reasons)))
        widths = [max(len(c[i]) for c in cells) for i in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]]).rstrip()
            for line in cells
        ]
        served = len(self.served)
        return "\n".join([*lines, f"{served} of {len(self.rows)} modules served"])

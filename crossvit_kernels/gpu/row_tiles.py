"""Which configurations the kernels of a transformer block may run in, and which of its forms.

Nothing is measured on a call's way: there are tables, and gpu/tuned.py goes before them. A table
has the configuration that is preferred; smaller ones follow it for compilers that have no registers
or no shared memory for that (gpu/candidates.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager

from crossvit_kernels.gpu import tuned
from crossvit_kernels.gpu.forms import Forms

#: What runs every block that can: "fused" or "split" kernels, or split and torch's "library" for
#: the steps that it has; rather than what rows and widths suggest.
FORMS = Forms("fused", "split", "library")

#: Up to so many rows the largest tiles would leave most of a GPU's multiprocessors without any.
FEW_ROWS = 8192

#: Programs among which a linear layer's columns are divided, where its rows do not make as many.
PROGRAMS = 264


@dataclasses.dataclass(frozen=True)
class RowTile:
    """A kernel over tiles of token rows.

    Attributes:
        rows: Rows of a program.
        columns: Columns, terms, hidden units or keys of a step.
        chunk: Channels that are loaded together.
        num_warps: Warps of a program.
        num_stages: Steps whose loads are in flight.
    """

    rows: int
    columns: int
    chunk: int
    num_warps: int
    num_stages: int

    def and_smaller(self) -> tuple[RowTile, ...]:
        """Itself and what to try where it does not fit, in this order.

        They have fewer rows or stages. Neither changes the bits of a result, which steps along the
        other sizes would do.
        """
        fewer = max(self.num_stages - 1, 1)
        tried = ((1, self.num_stages), (2, self.num_stages), (1, fewer), (2, fewer), (4, fewer))
        return tuple(
            dataclasses.replace(self, rows=max(self.rows // share, 16), num_stages=stages)
            for share, stages in (*tried, (2, 1), (4, 1))
        )


# (widest, configuration), narrowest first. The width is C; a head's, where attention is alone.
_Rows = tuple[tuple[int, RowTile], ...]

_FEW = " of few rows"
_ANY = 1 << 30

# (kernel, bytes of an element): where a chip has no rows of its own.
_ROW_TILES: dict[tuple[str, int], _Rows] = {
    ("norm linear", 2): (
        (96, RowTile(128, 64, 32, 8, 2)),
        (128, RowTile(128, 64, 128, 8, 2)),
        (192, RowTile(128, 64, 64, 8, 2)),
        (224, RowTile(128, 64, 32, 8, 2)),
        (256, RowTile(128, 64, 128, 8, 2)),
        (384, RowTile(128, 64, 128, 8, 2)),
        (448, RowTile(64, 64, 64, 8, 2)),
    ),
    ("norm linear" + _FEW, 2): (
        (96, RowTile(64, 64, 32, 8, 2)),
        (128, RowTile(64, 64, 128, 8, 2)),
        (192, RowTile(64, 64, 64, 8, 2)),
        (224, RowTile(64, 64, 32, 8, 2)),
        (384, RowTile(64, 64, 128, 8, 2)),
        (448, RowTile(64, 64, 64, 8, 2)),
    ),
    ("linear", 2): ((_ANY, RowTile(128, 128, 64, 8, 3)),),
    ("linear" + _FEW, 2): ((_ANY, RowTile(64, 64, 64, 4, 3)),),
    ("linear norm backward", 2): (
        (96, RowTile(64, 64, 32, 8, 2)),
        (128, RowTile(64, 64, 128, 8, 2)),
        (192, RowTile(64, 64, 64, 8, 2)),
        (224, RowTile(64, 64, 32, 8, 2)),
        (448, RowTile(64, 64, 64, 8, 2)),
    ),
    ("norm backward", 2): (
        (768, RowTile(32, 16, 128, 8, 1)),
        (1536, RowTile(16, 16, 128, 8, 1)),
    ),
    ("attention", 2): (
        (64, RowTile(128, 64, 16, 8, 3)),
        (128, RowTile(128, 64, 16, 8, 2)),
    ),
    ("attention" + _FEW, 2): (
        (64, RowTile(64, 64, 16, 4, 3)),
        (128, RowTile(64, 64, 16, 4, 2)),
    ),
    ("attention projection", 2): (
        (96, RowTile(128, 64, 32, 8, 2)),
        (128, RowTile(128, 64, 128, 8, 2)),
        (192, RowTile(128, 64, 64, 8, 2)),
        (224, RowTile(64, 64, 32, 8, 2)),
        (384, RowTile(64, 64, 128, 8, 2)),
        (448, RowTile(64, 64, 64, 8, 2)),
    ),
    ("attention backward", 2): (
        (64, RowTile(128, 64, 16, 8, 2)),
        (128, RowTile(64, 32, 16, 8, 2)),
    ),
    ("ffn", 2): (
        (96, RowTile(128, 64, 32, 8, 2)),
        (128, RowTile(128, 64, 128, 8, 2)),
        (192, RowTile(128, 64, 64, 8, 2)),
        (224, RowTile(128, 64, 32, 8, 2)),
        (256, RowTile(128, 32, 64, 8, 2)),
        (384, RowTile(128, 32, 32, 8, 2)),
        (448, RowTile(64, 32, 64, 8, 2)),
    ),
    ("ffn hidden backward", 2): (
        (128, RowTile(128, 128, 32, 8, 3)),
        (_ANY, RowTile(128, 128, 64, 8, 3)),
    ),
    ("norm linear", 4): ((448, RowTile(32, 32, 32, 8, 1)),),
    ("linear", 4): ((_ANY, RowTile(64, 64, 32, 8, 2)),),
    ("linear norm backward", 4): ((448, RowTile(32, 16, 32, 8, 1)),),
    ("norm backward", 4): ((1536, RowTile(16, 16, 64, 8, 1)),),
    ("attention", 4): ((128, RowTile(32, 32, 16, 8, 1)),),
    ("attention projection", 4): ((192, RowTile(32, 32, 32, 8, 1)),),
    ("attention backward", 4): ((128, RowTile(32, 32, 16, 8, 1)),),
    ("ffn", 4): ((448, RowTile(32, 16, 32, 8, 1)),),
    ("ffn hidden backward", 4): ((_ANY, RowTile(32, 64, 32, 8, 1)),),
}

# (chip, kernel, bytes of an element): what differs there, by the row's widest. Smaller tiles, where
# larger ones spill registers.
_ON_CHIP: dict[tuple[int, str, int], dict[int, RowTile]] = {
    (80, "linear norm backward", 2): {
        192: RowTile(32, 64, 64, 8, 2),
        224: RowTile(32, 64, 64, 8, 2),
        448: RowTile(32, 64, 64, 8, 2),
    },
    (80, "attention projection", 2): {
        192: RowTile(32, 64, 64, 8, 2),
        448: RowTile(32, 64, 64, 8, 2),
    },
    (80, "attention backward", 2): {64: RowTile(128, 32, 16, 8, 2)},
    (80, "ffn", 2): {
        192: RowTile(64, 32, 64, 8, 2),
        224: RowTile(64, 32, 32, 8, 2),
        256: RowTile(32, 64, 64, 8, 2),
        384: RowTile(32, 64, 64, 8, 2),
        448: RowTile(32, 64, 64, 8, 2),
    },
    (80, "ffn hidden backward", 2): {_ANY: RowTile(128, 128, 32, 8, 3)},
    (100, "linear norm backward", 2): {448: RowTile(32, 64, 64, 8, 2)},
    (100, "norm linear", 2): {384: RowTile(64, 64, 128, 8, 2)},
    (100, "ffn", 2): {384: RowTile(64, 32, 64, 8, 2)},
}

# What to try before smaller ones, where the preferred configuration does not fit.
_SECOND = {("ffn hidden backward", 2): RowTile(128, 128, 32, 8, 3)}

# Widths up to which one kernel is predicted to be faster than two (docs/performance.md): wider ones
# leave room for tiles of 64 rows alone, and read weights, keys and values too often.
_FUSED_UP_TO = {"ffn": 448, "attention projection": 192}

# Widths from which torch's libraries do a step: tiles that hold whole rows get too small there.
# "attention" and "linear" may have an entry as well.
_LIBRARY_FROM = {"norm linear": 449, "linear norm backward": 449}

# And in float32 at any width: there are no tensor cores for it, and our products are plain loops.
_LIBRARY_IN_FLOAT32 = ("norm linear", "linear", "linear norm backward")

# Kernels, by their names in the tables, whose configuration a context of `only` has set.
_only: dict[str, RowTile] = {}


@contextmanager
def only(kernel: str, config: RowTile) -> Iterator[None]:
    """Run a kernel in one configuration, whatever tables and measurements say."""
    previous = _only.get(kernel)
    _only[kernel] = config
    try:
        yield
    finally:
        del _only[kernel]
        if previous:
            _only[kernel] = previous


def widest(kernel: str, element_size: int) -> int:
    """The widest that any configuration takes."""
    return _ROW_TILES[kernel, element_size][-1][0]


def name_of(kernel: str, element_size: int, few: bool) -> str:
    """A kernel's name in the tables: some have another configuration for few rows."""
    return kernel + _FEW if few and (kernel + _FEW, element_size) in _ROW_TILES else kernel


def candidates(
    kernel: str, device: str, chip: int, width: int, element_size: int, few: bool = False
) -> tuple[tuple[RowTile, ...], bool]:
    """The configurations of a kernel ("norm linear", ...), and whether the first was measured.

    Args:
        kernel: Its name in the tables.
        device: The device's name, as torch gives it.
        chip: Its compute capability, 90 for 9.0.
        width: C; that of a head, where attention is alone.
        element_size: Bytes of an element of the products.
        few: Whether there are FEW_ROWS or fewer.

    Raises:
        ValueError: The file of measurements cannot be read or holds something else.
    """
    kernel = name_of(kernel, element_size, few)
    if kernel in _only:
        return (_only[kernel],), False
    return _measured_or_from_table(kernel, device, chip, width, element_size)


@functools.cache
def _measured_or_from_table(
    kernel: str, device: str, chip: int, width: int, element_size: int
) -> tuple[tuple[RowTile, ...], bool]:
    measured = tuned.configuration(RowTile, tuned.key(kernel, device, width, element_size))
    first, *smaller = from_table(kernel, chip, width, element_size).and_smaller()
    second = _SECOND.get((kernel, element_size), first)
    table = first, second, *smaller
    return ((measured, *table), True) if measured else (table, False)


def from_table(kernel: str, chip: int, width: int, element_size: int) -> RowTile:
    """What is preferred where nothing was measured."""
    differs = _ON_CHIP.get((chip, kernel, element_size), {})
    for widest, config in _ROW_TILES[kernel, element_size]:
        if width <= widest:
            return differs.get(widest, config)
    raise ValueError(f"{kernel}: {width} columns are more than any configuration takes")


def forget() -> None:
    """Read the file of measurements again when it is next needed."""
    tuned.forget()
    _measured_or_from_table.cache_clear()


def fused(kernel: str, num_rows: int, channels: int, element_size: int) -> bool:
    """Whether one kernel ("ffn", "attention projection") does what two could.

    It saves the memory traffic between them, but has no columns to divide among multiprocessors
    when rows are few.
    """
    form = FORMS.asked_for
    if channels > widest(kernel, element_size) or form in ("split", "library"):
        return False
    if form == "fused":
        return True
    return num_rows > FEW_ROWS and channels <= _FUSED_UP_TO[kernel] and element_size == 2


def by_library(step: str, width: int, element_size: int) -> bool:
    """Whether torch's libraries do a step ("norm linear", "attention", ...) of a split block."""
    form = FORMS.asked_for
    if form == "library" or width >= _LIBRARY_FROM.get(step, width + 1):
        return True
    return form == "auto" and element_size == 4 and step in _LIBRARY_IN_FLOAT32

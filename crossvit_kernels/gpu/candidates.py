"""Which of a kernel's configurations runs: the first that spills no registers and fits the chip.

What a configuration compiles to depends on the version of Triton, on the sm, and on which of the
kernel's optional tensors there are. So tables give candidates in order of preference, and the
choice is made of what they compiled to: once for each form of a launch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Candidate(NamedTuple):
    """A configuration as a launch takes it.

    Attributes:
        constants: Values of the kernel's first constants.
        options: num_warps and num_stages.
    """

    constants: tuple[Any, ...]
    options: dict[str, int]


class Candidates:
    """Configurations of a kernel, the preferred one first.

    They are part of the key under which launches are remembered, so their hash is found once.

    Args:
        items: At least one.
        measured: The first is what tune.py measured: it runs wherever it fits.
    """

    __slots__ = ("_hash", "items", "measured")

    def __init__(self, items: tuple[Candidate, ...], measured: bool = False) -> None:
        unique = {(c.constants, *c.options.items()): c for c in items}
        self.items, self.measured = tuple(unique.values()), measured
        self._hash = hash((measured, *unique))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Candidates)
            and self.measured == other.measured
            and self.items == other.items
        )

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Candidate:
        return self.items[index]

    @property
    def options(self) -> dict[str, int]:
        """Those of the preferred one."""
        return self.items[0].options

    def __reduce__(self) -> Any:
        return Candidates, (self.items, self.measured)


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes.

    Attributes:
        registers: Of a thread; 0 where it was not loaded, as it does not fit.
        spills: Words of a thread in local memory.
        shared_bytes: Shared memory of a program.
        fits: Whether the chip has as much of everything.
    """

    registers: int
    spills: int
    shared_bytes: int
    fits: bool

    @property
    def objection(self) -> str:
        """Why to pass over the configuration; "" where nothing is wrong."""
        if not self.fits:
            return f"{self.shared_bytes} bytes of shared memory do not fit"
        return f"{self.spills} words spilled" if self.spills else ""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The candidate that runs.

    Attributes:
        index: Its place among the candidates.
        objections: Why each of those that were tried and not taken was passed over, in their order.
    """

    index: int
    objections: tuple[str, ...] = ()


def choose(candidates: Candidates, usage_of: Callable[[Candidate], Usage | None]) -> Choice:
    """The first candidate to which there is no objection; else that with the fewest spills.

    Args:
        candidates: Tried in their order, as far as needed.
        usage_of: Compiles one. None where it cannot be told what it takes: it is taken as it is.
            What it raises is an objection.
    """
    objections: list[str] = []
    spills: dict[int, int] = {}
    for index, candidate in enumerate(candidates):
        try:
            usage = usage_of(candidate)
        except Exception as error:
            objections.append(f"{type(error).__name__} while compiling")
            continue
        if usage is None or not usage.objection:
            return Choice(index, tuple(objections))
        if usage.fits and index == 0 and candidates.measured:
            return Choice(0)
        objections.append(usage.objection)
        if usage.fits:
            spills[index] = usage.spills
    # If none can run, the first says so when it is launched.
    return Choice(min(spills, key=lambda index: spills[index]) if spills else 0, tuple(objections))

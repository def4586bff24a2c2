"""Tables of configurations: which ones a kernel may run in, by width, element size and GPU.

Nothing is measured on a call's way: there are tables, and gpu/tuned.py goes before them. What a
configuration compiles to depends on the version of Triton, on the sm, and on which of the kernel's
optional tensors there are. So a table gives candidates in order of preference, of which
gpu/launcher.py takes the first that spills no registers and fits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from crossvit_kernels.gpu import tuned

Config = TypeVar("Config")
#: (widest, configuration), narrowest first.
Rows = tuple[tuple[int, Config], ...]

#: In place of a width that has no bound.
ANY = 1 << 30

#: Rows begin at multiples of so many elements: 16-byte loads of 16-bit tokens.
ALIGN = 8

_tables: list[Table[object]] = []


class Table(Generic[Config]):
    """The configurations of one kernel.

    Args:
        name: In the file of measurements.
        rows: By bytes of an element.
        alternatives: The preferred configuration and what to try where it does not fit.
        on_sm: (compute capability, bytes of an element) -> what differs there, by the row's widest;
            90 for 9.0.
    """

    def __init__(
        self,
        name: str,
        rows: Mapping[int, Rows[Config]],
        alternatives: Callable[[Config], tuple[Config, ...]],
        on_sm: Mapping[tuple[int, int], Mapping[int, Config]] | None = None,
    ) -> None:
        self.name, self._rows, self._alternatives = name, rows, alternatives
        self.on_sm = dict(on_sm or {})
        self._only: Config | None = None
        self._candidates = functools.cache(self._measured_or_from_table)
        _tables.append(self)  # type: ignore[arg-type]

    def candidates(
        self, device: str, sm: int, width: int, element_size: int
    ) -> tuple[tuple[Config, ...], bool]:
        """The configurations to try, in order, and whether the first was measured.

        Args:
            device: The device's name, as torch gives it.
            sm: Its compute capability, 90 for 9.0.
            width: C; that of a head, where attention is alone.
            element_size: Bytes of an element of the products.

        Raises:
            ValueError: The file of measurements cannot be read or holds something else, or no
                configuration is as wide.
        """
        if self._only is not None:
            return (self._only,), False
        return self._candidates(device, sm, width, element_size)

    def _measured_or_from_table(
        self, device: str, sm: int, width: int, element_size: int
    ) -> tuple[tuple[Config, ...], bool]:
        preferred = self.preferred(sm, width, element_size)
        table = self._alternatives(preferred)
        key = tuned.key(self.name, device, width, element_size)
        measured = tuned.configuration(type(preferred), key)
        return (table, False) if measured is None else ((measured, *table), True)

    def preferred(self, sm: int, width: int, element_size: int) -> Config:
        """The configuration where nothing was measured."""
        differs = self.on_sm.get((sm, element_size), {})
        for widest, config in self._rows[element_size]:
            if width <= widest:
                return differs.get(widest, config)
        raise ValueError(f"{self.name}: {width} channels are more than any configuration takes")

    def widest(self, element_size: int) -> int:
        """The widest that any configuration takes."""
        return self._rows[element_size][-1][0]

    @contextmanager
    def only(self, config: Config) -> Iterator[None]:
        """Run the kernel in one configuration, whatever tables and measurements say."""
        previous, self._only = self._only, config
        try:
            yield
        finally:
            self._only = previous


def forget() -> None:
    """Read the file of measurements again when it is next needed."""
    tuned.forget()
    for table in _tables:
        table._candidates.cache_clear()


class Forms:
    """Names of kernel variants, "auto" among them, and the one that is asked for.

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


@functools.cache
def device_name(device: torch.device) -> str:
    """As torch gives it; "interpreter" on a CPU, "meta" where there is no memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "meta" if device.type == "meta" else "interpreter"


# What tensors without memory stand for.
_sm_of_meta = 0


@contextmanager
def as_if_on(sm_of_meta: int) -> Iterator[None]:
    """Take tensors on the meta device for tensors on a sm, 90 for 9.0."""
    global _sm_of_meta
    previous, _sm_of_meta = _sm_of_meta, sm_of_meta
    sm.cache_clear()
    try:
        yield
    finally:
        _sm_of_meta = previous
        sm.cache_clear()


@functools.cache
def sm(device: torch.device) -> int:
    """Compute capability, 90 for 9.0; on others than NVIDIA's the tables' default."""
    if device.type == "meta":
        return _sm_of_meta
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are formed: as torch is told to, by the old setting or the new one.

    ``allow_tf32`` cannot be read once ``fp32_precision`` was set; this is what both set.
    """
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


class Constants(dict[str, Any]):
    """A kernel's constants in one frozen dataclass.

    It is a dict of its fields as well: Triton writes constants as JSON for
    ``knobs.runtime.jit_cache_hook``.
    """

    def __post_init__(self) -> None:
        self.update((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))  # type: ignore[arg-type]

    def __hash__(self) -> int:  # type: ignore[override]
        return hash((type(self), *self.values()))


class InChunks(Constants):
    """Constants of a kernel that holds rows of ``channels`` in chunks of ``chunk``."""

    channels: int
    chunk: int

    @property
    def num_chunks(self) -> int:
        """The last one may reach beyond the last channel."""
        return -(-self.channels // self.chunk)


@functools.cache
def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()

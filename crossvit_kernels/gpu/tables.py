"""Tables of the configurations a kernel may run in, by width, element size and GPU.

Nothing is measured during a call: configurations come from gpu/tuned.py or else from tables. What a
configuration compiles to depends on the Triton version, on the sm, and on which of the kernel's
optional tensors are present. So a table lists candidates in order of preference, and
gpu/launcher.py takes the first that fits without spilling registers.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from crossvit_kernels.gpu import tuned

Config = TypeVar("Config")
#: (largest width, configuration), narrowest first.
Rows = tuple[tuple[int, Config], ...]

#: An unbounded width.
ANY = 1 << 30

#: Rows start at multiples of this many elements: 16-byte loads of 16-bit tokens.
ALIGN = 8

_tables: list[Table[object]] = []


class Preferences(tuple[Config, ...]):
    """Configurations in order. Every launch looks them up, so the hash is computed once."""

    _hash: int

    def __new__(cls, configs: Iterable[Config]) -> Preferences[Config]:
        preferences = super().__new__(cls, configs)
        preferences._hash = tuple.__hash__(preferences)
        return preferences

    def __hash__(self) -> int:
        return self._hash


class Table(Generic[Config]):
    """The configurations of one kernel.

    Args:
        name: The kernel's name in the file of measurements.
        rows: Configurations by element size in bytes.
        alternatives: Maps the preferred configuration to itself and its fallbacks.
        on_sm: (compute capability, 90 for 9.0; element size) -> the rows that differ there, by
            their largest width.
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
        """Return the configurations to try, in order, and whether the first was measured.

        Args:
            device: The device's name, as torch reports it.
            sm: Its compute capability, 90 for 9.0.
            width: C, or the head dimension for attention alone.
            element_size: Element size of the products in bytes.

        Raises:
            ValueError: The file of measurements is unreadable or invalid, or no configuration is
                wide enough.
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
        if measured is None:
            return Preferences(table), False
        return Preferences((measured, *table)), True

    def preferred(self, sm: int, width: int, element_size: int) -> Config:
        """Return the configuration to use if nothing was measured."""
        family = sm // 10 * 10  # sm_86 has sm_80's exceptions, sm_103 those of sm_100
        overrides = self.on_sm.get((sm, element_size)) or self.on_sm.get((family, element_size), {})
        for widest, config in self._rows[element_size]:
            if width <= widest:
                return overrides.get(widest, config)
        raise ValueError(f"{self.name}: {width} channels are more than any configuration takes")

    def widest(self, element_size: int) -> int:
        """Return the largest width that any configuration supports."""
        return self._rows[element_size][-1][0]

    @contextmanager
    def only(self, config: Config) -> Iterator[None]:
        """Run the kernel in this configuration, regardless of tables and measurements."""
        previous, self._only = self._only, config
        try:
            yield
        finally:
            self._only = previous


def forget() -> None:
    """Drop all cached configurations; the file of measurements is read again on next use."""
    tuned.forget()
    for table in _tables:
        table._candidates.cache_clear()


class _OfThread(threading.local):
    variant: str | None = None


class Variants:
    """Names of kernel variants, including "auto", and the one requested.

    Args:
        *names: All but "auto".
    """

    def __init__(self, *names: str) -> None:
        self.names = ("auto", *names)
        self._of_process, self._of_thread = "auto", _OfThread()

    @property
    def asked_for(self) -> str:
        """The requested variant: that of this thread's call, or of the process."""
        return self._of_thread.variant or self._of_process

    @asked_for.setter
    def asked_for(self, variant: str) -> None:
        self._of_process = variant

    @contextmanager
    def in_this_thread(self, variant: str) -> Iterator[None]:
        """Run one variant in the block where possible, whatever other threads run."""
        previous = self._of_thread.variant
        self._of_thread.variant = variant
        try:
            yield
        finally:
            self._of_thread.variant = previous

    @contextmanager
    def choose(self, variant: str) -> Iterator[None]:
        """Run one variant in the block where possible: for tests and benchmarks.

        Raises:
            ValueError: variant is none of the names.
        """
        if variant not in self.names:
            raise ValueError(f"variant: expected one of {self.names}, found {variant!r}")
        previous, self._of_process = self._of_process, variant
        try:
            yield
        finally:
            self._of_process = previous


class Candidate(NamedTuple):
    """A configuration in the form that a launch takes.

    Attributes:
        constants: Values of the kernel's first constexpr parameters.
        options: num_warps and num_stages, and maxnreg where registers are limited.
    """

    constants: tuple[Any, ...]
    options: dict[str, int]


class Candidates:
    """Configurations of a kernel, the preferred one first.

    They are part of the key under which launches are cached, so the hash is computed once.

    Args:
        items: At least one.
        measured: Whether the first was measured by tune.py: it then runs wherever it fits.
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
        """The options of the preferred configuration."""
        return self.items[0].options

    def __reduce__(self) -> Any:
        return Candidates, (self.items, self.measured)


@functools.cache
def device_name(device: torch.device) -> str:
    """Return the name torch reports; "interpreter" for a CPU, "meta" for the meta device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "meta" if device.type == "meta" else "interpreter"


# The compute capability that tensors on the meta device stand for.
_sm_of_meta = 0


@contextmanager
def as_if_on(sm_of_meta: int) -> Iterator[None]:
    """Treat tensors on the meta device as tensors on this sm, 90 for 9.0."""
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
    """Return the compute capability, 90 for 9.0; 0, the tables' default, if not NVIDIA's."""
    if device.type == "meta":
        return _sm_of_meta
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def precision(dtype: torch.dtype) -> str:
    """Return Triton's ``input_precision`` of float32 products, following torch's settings.

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
        """Chunks of a row; the last may extend past the last channel."""
        return -(-self.channels // self.chunk)


@functools.cache
def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()

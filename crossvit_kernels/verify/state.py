"""What is to be verified in this process, what was, and what was retired."""

from __future__ import annotations

import logging
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from crossvit_kernels import identity, supported

ENVIRONMENT_VARIABLE = "CROSSVIT_KERNELS_VERIFY"
MODES = ("first", "always", "off")

_LOG = logging.getLogger("crossvit_kernels")

#: (device, software) pairs for which verification and measurements are committed: keys as
#: ``identity.key`` makes them, printed by ``python -m crossvit_kernels.verify``. No GPU yet.
EVIDENCE: frozenset[str] = frozenset()

#: operation, backend, and what kernels are compiled or chosen for.
Variant = tuple[Any, ...]


class Retired(NamedTuple):
    """A variant that does not run in this process any more.

    Attributes:
        operation: Its name.
        backend: The backend's.
        direction: "forward" or "backward".
        reason: What was wrong.
        shown: The shapes of the call.
    """

    operation: str
    backend: str
    direction: str
    reason: str
    shown: str

    def __str__(self) -> str:
        return f"{self.operation} {self.direction} on {self.backend} ({self.shown}): {self.reason}"


# The context's mode, and whether it believes evidence.
_mode: str | None = None
_believes = True
#: device -> whether its kernels are verified, as ``watches`` found; emptied when the mode changes.
watched: dict[torch.device, bool] = {}
_lock = threading.Lock()

#: Directions and details of variants that were found right: a set that only grows.
verified: set[Variant] = set()
#: (variant, direction) -> why it was retired.
retired: dict[tuple[Variant, str], Retired] = {}
_unverified: dict[tuple[Any, ...], str] = {}
#: "operation/backend" of retired variants: all that a compiler's trace asks for, as it knows no
#: sizes. Replaced, never changed, so that compiled functions are compiled again.
retired_names: frozenset[str] = frozenset()


def mode() -> str:
    """Return "first", "always" or "off".

    Raises:
        ValueError: The environment variable has another value.
    """
    value = _mode or os.environ.get(ENVIRONMENT_VARIABLE) or "first"
    if value not in MODES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected one of {MODES}, found {value!r}")
    return value


@contextmanager
def verification(mode: str, trust_evidence: bool = True) -> Iterator[None]:
    """Choose when kernels are compared with the reference, instead of CROSSVIT_KERNELS_VERIFY.

    Args:
        mode: ``"first"`` compares the first call of each kernel variant, on devices and software
            without committed evidence; ``"always"`` every call, everywhere; ``"off"`` none.
        trust_evidence: False: with ``"first"``, compare even where evidence is committed, such as
            on CPUs. The setting applies to the process, not to a thread.

    Raises:
        ValueError: mode is none of these.
    """
    global _mode, _believes
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {MODES}, found {mode!r}")
    previous, (_mode, _believes) = (_mode, _believes), (mode, trust_evidence)
    watched.clear()
    try:
        yield
    finally:
        _mode, _believes = previous
        watched.clear()


def watches(device: torch.device) -> bool:
    """Whether kernels on a device are verified; a dict look-up after the first call."""
    known = watched.get(device)
    if known is None:
        known = watched[device] = _decide(device)
    return known


def checks_again() -> bool:
    """Whether calls are compared that were found right before."""
    return mode() == "always"


def _decide(device: torch.device) -> bool:
    current = mode()
    if device.type == "meta":
        return False
    if current != "first":
        return current == "always"
    return not (_believes and evidence(device))


def evidence(device: torch.device) -> str | None:
    """Return what proves the kernels on a device with the installed software, or None."""
    if device.type == "cuda":
        return "committed" if EVIDENCE and identity.key(device) in EVIDENCE else None
    is_tested = supported.is_tested("torch", torch.__version__)
    if is_tested and platform.machine().lower() in ("x86_64", "amd64"):
        return "the test suite"
    return None


def retire(variant: Variant, what: Retired) -> None:
    """Stop running a variant in one direction, and say so once."""
    global retired_names
    with _lock:
        if (variant, what.direction) in retired:
            return
        name = f"{what.operation}/{what.backend}"
        is_first = name not in retired_names
        retired[variant, what.direction] = what
        retired_names |= {name}
    if not is_first:
        _LOG.warning("%s: retired as well", what)
        return
    _LOG.warning(
        "a kernel is wrong on this machine and was retired for this process: %s. The call's result "
        "is the reference's, and other backends run such calls from now on. Please report this "
        "message with what `python -m crossvit_kernels` prints; it ran on %s",
        what,
        environment(),
    )


def note_unverified(details: Variant, reason: str) -> None:
    """Say once that a variant could not be verified, such as for want of memory; it runs."""
    with _lock:
        is_new = details[:2] not in _unverified
        _unverified[details[:2]] = reason
    if is_new:
        (operation, backend, *_), direction = details[:2]
        _LOG.warning(
            "%s %s on %s could not be verified and runs as it is: %s",
            *(operation, direction, backend, reason),
        )


def environment() -> str:
    """Return device, driver and versions in one line, for messages."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    return f"{identity.key(device)} | {identity.software()}"


def is_retired(variant: Variant, directions: tuple[str, ...]) -> bool:
    return any((variant, direction) in retired for direction in directions)


def forget() -> None:
    """Forget what was verified and retired: the next calls are verified again."""
    global retired_names
    with _lock:
        verified.clear()
        retired.clear()
        _unverified.clear()
        retired_names = frozenset()
    watched.clear()


def report() -> list[str]:
    """Return a line for the mode, and for what was verified and retired in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    proof = evidence(device)
    lines = [
        f"verification  {mode()}; evidence for this {device.type}: {proof or 'none committed'}",
        f"verified      {len(verified)} variants in this process",
    ]
    counts: dict[str, int] = {}
    for variant in list(verified):
        name = f"{variant[0][0]} {variant[1]} on {variant[0][1]}"
        counts[name] = counts.get(name, 0) + 1
    lines += [f"              {count} of {name}" for name, count in sorted(counts.items())]
    lines += [f"retired       {entry}" for entry in list(retired.values())]
    return lines

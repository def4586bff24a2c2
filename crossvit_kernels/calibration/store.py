"""The file of measured choices: written by ``calibrate``, read when a backend is chosen."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from crossvit_kernels import identity

ENVIRONMENT_VARIABLE = "CROSSVIT_KERNELS_CALIBRATED"
FORMAT = 1
#: Up to this distance, in doublings of all sizes together, a shape takes another's choice.
FARTHEST = 2.0

_LOG = logging.getLogger("crossvit_kernels")


class Signature(NamedTuple):
    """What a choice depends on.

    Attributes:
        operation: Its name.
        training: Whether autograd records the call.
        kind: Dtypes, and which tensors are absent.
        sizes: Heads and widths; not the number of tokens and images.
        num_tokens: N.
        batch_class: See ``batch_class``.
    """

    operation: str
    training: bool
    kind: str
    sizes: tuple[int, ...]
    num_tokens: int
    batch_class: int


class Call(NamedTuple):
    """A call whose backend is to be chosen.

    Attributes:
        signature: What the choice depends on.
        values: Nested tuples of its tensors.
        run: (values, backend) -> outputs.
        device: The tokens'.
        autocast: Its dtype of matrix products, or None.
        usual: The backend that the tables choose.
    """

    signature: Signature
    values: Any
    run: Callable[[Any, str], Any]
    device: torch.device
    autocast: torch.dtype | None
    usual: str = "reference"


#: Takes the calls whose backend is chosen automatically; set while ``calibrate`` records.
recorder: Callable[[Call], None] | None = None

_is_batch_invariant = False
# device -> signature -> backend, of the file; then of shapes that were looked up.
_tables: dict[torch.device, dict[Signature, str]] = {}
_resolved: dict[tuple[torch.device, Signature], str | None] = {}
# device -> name -> number of images -> what was found faster.
_settings: dict[torch.device, dict[str, dict[int, Any]]] = {}


def batch_class(batch: int) -> int:
    """Return 0 for one image, then 1 up to 8, 2 up to 64, 3 up to 512, 4 for more."""
    return min(-(-(batch - 1).bit_length() // 3), 4) if batch > 1 else 0


def batch_invariant(enabled: bool = True) -> None:
    """Choose the same backend for a call whatever its number of images.

    Then an image's result has the same bits in every batch wherever our own kernels compute it;
    measured choices, which may differ between batches, are not used. Matrix products of torch's
    libraries may still differ. The setting applies to the process.

    Args:
        enabled: False for the default: measured choices by a coarse class of the batch.
    """
    global _is_batch_invariant
    _is_batch_invariant = bool(enabled)


def is_batch_invariant() -> bool:
    """Whether choices may not depend on the number of images."""
    return _is_batch_invariant


def file() -> Path:
    """Return the path that choices are read from and written to."""
    if os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(os.environ[ENVIRONMENT_VARIABLE])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "crossvit_kernels" / "calibrated.json"


def choice(device: torch.device, operation: str, call: Callable[[], Call]) -> str | None:
    """Return the measured backend of a call, the nearest shape's, or None."""
    if _is_batch_invariant:
        return None
    if torch.compiler.is_compiling():  # without sizes
        return _agreed(device, operation)
    table = _tables.get(device)
    if table is None:
        table = _load(device)
    if not table:
        return None
    signature = call().signature
    key = device, signature
    if key not in _resolved:
        _resolved[key] = _nearest(table, signature)
    return _resolved[key]


def _nearest(table: Mapping[Signature, str], wanted: Signature) -> str | None:
    best, chosen = FARTHEST, None
    for known, backend in table.items():
        if known[:3] != wanted[:3] or len(known.sizes) != len(wanted.sizes):
            continue
        pairs = zip(
            (*known.sizes, known.num_tokens), (*wanted.sizes, wanted.num_tokens), strict=True
        )
        distance = sum(abs(math.log2((a + 1) / (b + 1))) for a, b in pairs)
        distance += abs(known.batch_class - wanted.batch_class)
        if distance < best or (distance == best and chosen is None):
            best, chosen = distance, backend
    return chosen


def _agreed(device: torch.device, operation: str) -> str | None:
    """Return the backend of all measured shapes of an operation, or None if they differ."""
    table = _tables.get(device)
    table = _load(device) if table is None else table
    found = {backend for signature, backend in table.items() if signature.operation == operation}
    return found.pop() if len(found) == 1 else None


# torch.compile runs it and takes its result for a constant.
_agreed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def settings(device: torch.device, name: str) -> Mapping[int, Any]:
    """Return what was measured of a setting, by the number of images.

    Args:
        device: Where.
        name: "side_by_side" (whether two streams are faster than one), "graph" (whether a CUDA
            graph is faster than launching) or "threads" (the fastest number of them, on a CPU).
    """
    if device not in _settings:
        _load(device)
    return _settings[device].get(name, {})


def bounded(measured: Mapping[int, bool], num_images: int) -> bool | None:
    """Return whether something pays for so many images, or None if nothing measured says so.

    What pays for some images pays for fewer; what does not, does not for more. Where measurements
    contradict each other, that of the larger batch counts.
    """
    if num_images in measured:
        return measured[num_images]
    if any(pays and images > num_images for images, pays in measured.items()):
        return True
    if any(not pays and images < num_images for images, pays in measured.items()):
        return False
    return None


def forget() -> None:
    """Drop what was read; the file is read again on next use."""
    _tables.clear()
    _resolved.clear()
    _settings.clear()


def _load(device: torch.device) -> dict[Signature, str]:
    table: dict[Signature, str] = {}
    found: dict[str, dict[int, Any]] = {}
    if file().exists() and device.type in ("cpu", "cuda"):
        content, key = _read(), identity.key(device)
        for entry in _entries(content, key):
            table[_signature(entry)] = str(entry["choice"])
        found = _settings_of(content, key)
    _tables[device], _settings[device] = table, found
    return table


def all_settings(device: torch.device) -> dict[str, dict[int, Any]]:
    """Return all measured settings of a device and the installed software, by name."""
    return _settings_of(_read(), identity.key(device))


def entries(device: torch.device) -> list[dict[str, Any]]:
    """Return the entries of the file for a device and the installed software."""
    return _entries(_read(), identity.key(device))


def _entries(content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    try:
        found = [dict(entry) for entry in content["devices"].get(key, {}).get("entries", [])]
        for entry in found:
            _signature(entry), str(entry["choice"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        _LOG.warning("%s: not what ck.calibrate writes (%r): ignored", file(), error)
        return []
    return found


def _settings_of(content: Mapping[str, Any], key: str) -> dict[str, dict[int, Any]]:
    try:
        found = content["devices"].get(key, {}).get("settings", {})
        return {
            str(name): {int(images): value for images, value in values.items()}
            for name, values in found.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        _LOG.warning("%s: not what ck.calibrate writes (%r): ignored", file(), error)
        return {}


def _signature(entry: Mapping[str, Any]) -> Signature:
    return Signature(
        str(entry["operation"]),
        bool(entry["training"]),
        str(entry["kind"]),
        tuple(int(size) for size in entry["sizes"]),
        int(entry["num_tokens"]),
        int(entry["batch_class"]),
    )


def _read() -> dict[str, Any]:
    """Return the file's content; without one, or if it is not ours, an empty one."""
    empty: dict[str, Any] = {"format": FORMAT, "devices": {}}
    try:
        content = json.loads(file().read_text())
    except FileNotFoundError:
        return empty
    except (OSError, ValueError) as error:
        _LOG.warning("%s cannot be read (%s): ignored", file(), error)
        return empty
    is_ours = isinstance(content, dict) and content.get("format") == FORMAT
    if not is_ours or not isinstance(content.get("devices"), dict):
        _LOG.warning("%s: not what ck.calibrate of this version writes: ignored", file())
        return empty
    return content


def add(
    device: torch.device, signature: Signature, chosen: str, times: Mapping[str, float]
) -> None:
    """Add a choice to the file, in place of an earlier one for the same signature.

    Other processes may write at the same time.

    Args:
        device: The calls'.
        signature: Of the calls.
        chosen: Name of a backend.
        times: Median seconds by backend.
    """
    entry = {
        **signature._asdict(),
        "choice": chosen,
        "milliseconds": {name: round(seconds * 1e3, 4) for name, seconds in times.items()},
    }

    def change(content: dict[str, Any], key: str) -> None:
        kept = [e for e in _entries(content, key) if _signature(e) != signature]
        content["devices"][key] = {
            "entries": [*kept, entry],
            "settings": _settings_of(content, key),
        }

    _rewrite(device, change)


def set_setting(device: torch.device, name: str, num_images: int, value: bool | int) -> None:
    """Add what was measured of a setting to the file; see ``settings`` for the arguments."""

    def change(content: dict[str, Any], key: str) -> None:
        found = _settings_of(content, key)
        found.setdefault(name, {})[num_images] = value
        content["devices"][key] = {"entries": _entries(content, key), "settings": found}

    _rewrite(device, change)


def _rewrite(device: torch.device, change: Callable[[dict[str, Any], str], None]) -> None:
    """Replace the file atomically, under a lock; change(content, key) edits its content."""
    path, key = file(), identity.key(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        content = _read()
        change(content, key)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as temporary:
            json.dump(content, temporary, indent=1)
            temporary.flush()
            os.fsync(temporary.fileno())
        os.replace(temporary.name, path)
    forget()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file among processes, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

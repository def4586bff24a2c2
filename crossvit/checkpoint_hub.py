"""Downloads from the Hugging Face hub, with plain errors."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, getproxies, urlopen

INSTALL = "pip install 'crossvit-kernels[checkpoints]'"
_TIMEOUT_S = 5
_HTTP_PACKAGES = ("requests", "urllib3", "httpx", "httpx2", "httpcore")


def download(repository: str, names: Sequence[str], **options: Any) -> Path:
    """Return the first of these files that the repository has, downloaded or from the cache.

    Args:
        repository: ``owner/name``.
        names: Of files in it.
        **options: Arguments of ``huggingface_hub.hf_hub_download``, e.g. ``revision``.

    Raises:
        FileNotFoundError: There is no such repository, or it has none of these files.
        PermissionError: The repository denies access.
        ConnectionError: The hub cannot be reached, or fails, and the cache has none of these files.
        ImportError: huggingface_hub is not installed.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ImportError(
            f"{repository} is a hub id, which needs huggingface_hub: {INSTALL}"
        ) from error
    cached = _cached(repository, names, options)
    with _without_retries(probe=cached is None) as unreachable:
        for name in names:
            try:
                return Path(huggingface_hub.hf_hub_download(repository, name, **options))
            except Exception as error:
                # The error for a file not in the cache derives from that for a missing file.
                local = isinstance(error, errors.LocalEntryNotFoundError)
                if isinstance(error, errors.EntryNotFoundError) and not local:
                    continue
                reason = _reason(repository, error, unreachable, errors)
                if isinstance(reason, ConnectionError) and cached:
                    return cached
                if reason is None:
                    raise
                raise reason from error
    raise FileNotFoundError(f"{repository}: the repository has none of {', '.join(names)}")


def _cached(repository: str, names: Sequence[str], options: Mapping[str, Any]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    where = {key: options[key] for key in ("cache_dir", "revision") if key in options}
    cached = (try_to_load_from_cache(repository, name, **where) for name in names)
    return next((Path(path) for path in cached if isinstance(path, str)), None)


def _reason(
    repository: str, error: Exception, unreachable: str | None, errors: Any
) -> OSError | None:
    """The reason for a failed download as a built-in error; None for other errors."""
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(
            f"{repository}: the repository is gated: ask for access on its page, then log in "
            "(hf auth login)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"{repository}: no such repository on the hub, or a private one: log in (hf auth login)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{repository}: the repository is empty")
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return PermissionError(f"{repository}: the hub refuses access: {error}")
    cause = error.__cause__ or error
    offline = isinstance(error, errors.OfflineModeIsEnabled)
    offline |= isinstance(cause, errors.OfflineModeIsEnabled)
    if offline and unreachable is None:
        return ConnectionError(f"{repository}: not in the cache, and HF_HUB_OFFLINE is set")
    known = (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError, TimeoutError)
    if isinstance(error, known) or type(error).__module__.split(".")[0] in _HTTP_PACKAGES:
        why = unreachable or " ".join(str(cause).split())
        return ConnectionError(
            f"{repository}: not in the cache, and the hub cannot be reached; is there a network? "
            f"({why})"
        )
    return None


@contextlib.contextmanager
def _without_retries(probe: bool) -> Iterator[str | None]:
    """Keep huggingface_hub from retrying an unreachable hub six times, 24 s per file.

    Yields:
        Why the hub is unreachable, if it is; meanwhile huggingface_hub uses only its cache.
    """
    from huggingface_hub import constants

    why = _probe(constants.ENDPOINT) if probe and not constants.HF_HUB_OFFLINE else None
    if why is None:
        yield None
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield why
    finally:
        constants.HF_HUB_OFFLINE = False


def _probe(endpoint: str) -> str | None:
    """Why a server is unreachable; None if it answers at all, or might."""
    if "all" in getproxies():
        return None  # a proxy that urllib does not support
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=_TIMEOUT_S).close()
    except HTTPError as error:
        error.close()
    except URLError as error:
        # huggingface_hub may have other certificates.
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except (OSError, HTTPException):
        return None  # connected
    return None

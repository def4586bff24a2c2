"""Files of the Hugging Face hub, and why one cannot be had."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, getproxies, urlopen

INSTALL = "pip install 'crossvit-kernels[checkpoints]'"
_TIMEOUT_S = 5
_HTTP_PACKAGES = ("requests", "urllib3", "httpx", "httpx2", "httpcore")


def download(repository: str, names: Sequence[str]) -> Path:
    """The first of these files that the repository has, downloaded or from the cache.

    Raises:
        FileNotFoundError: There is no such repository, or it has none of these files.
        PermissionError: The repository does not admit this user.
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
    cached = _cached(repository, names)
    with _without_retries(probe=cached is None) as unreachable:
        for name in names:
            try:
                return Path(huggingface_hub.hf_hub_download(repository, name))
            except Exception as error:
                # A file that is not in the cache is one kind of a file that does not exist.
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


def _cached(repository: str, names: Sequence[str]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    cached = (try_to_load_from_cache(repository, name) for name in names)
    return next((Path(path) for path in cached if isinstance(path, str)), None)


def _reason(
    repository: str, error: Exception, unreachable: str | None, errors: Any
) -> OSError | None:
    """What hinders a download, in Python's own terms; None where it is something else."""
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
    """Keep huggingface_hub from asking a hub that is out of reach six times, for 24 s a file.

    Yields:
        Why the hub is out of reach, if it is; meanwhile huggingface_hub looks in its cache alone.
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
    """Why a server is out of reach; None where it answers, whatever that is, or may yet."""
    if "all" in getproxies():
        return None  # a proxy that urllib does not know
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=_TIMEOUT_S).close()
    except HTTPError as error:
        error.close()
    except URLError as error:
        # Of certificates, huggingface_hub may know more.
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except (OSError, HTTPException):
        return None  # connected
    return None

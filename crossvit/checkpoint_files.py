"""Files of tensors: found by path, URL or hub id, read safely, written whole."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor

_HUB_ID = re.compile(r"(?:hf[-_]hub:)?([\w.-]+/[\w.-]+)")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_INSTALL = "pip install 'crossvit-kernels[checkpoints]'"


def locate(source: str | os.PathLike[str]) -> Path:
    """The local file of a path, a URL or a Hugging Face hub id, downloaded where it is not local.

    Raises:
        FileNotFoundError: The source is none of them, or the hub's repository has no weights.
        ImportError: A hub id without huggingface_hub.
    """
    path, name = Path(source), str(source)
    if path.is_file():
        return path
    if urlparse(name).scheme in ("http", "https", "file"):
        return _download(name)
    if (hub_id := _HUB_ID.fullmatch(name)) and path.suffix not in _SUFFIXES:
        return _download_from_hub(hub_id[1])
    raise FileNotFoundError(f"{name}: no such file, and neither a URL nor a hub id (owner/name)")


def _download(url: str) -> Path:
    remote = Path(urlparse(url).path)
    # Many files are called model.safetensors.
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    local = Path(torch.hub.get_dir(), "checkpoints", f"{remote.stem}-{digest}{remote.suffix}")
    if not local.is_file():
        local.parent.mkdir(parents=True, exist_ok=True)
        # torch.hub takes a connection that breaks off for the end of the file.
        unchecked = local.with_name(f".{os.getpid()}.{local.name}")
        try:
            torch.hub.download_url_to_file(url, str(unchecked))
            read(unchecked)
            unchecked.replace(local)
        finally:
            unchecked.unlink(missing_ok=True)
    return local


def _download_from_hub(repository: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"{repository} is a hub id, which needs huggingface_hub: {_INSTALL}"
        ) from error
    for name in _HUB_FILES:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, name))
        except EntryNotFoundError:
            continue
    raise FileNotFoundError(f"{repository}: the repository has none of {', '.join(_HUB_FILES)}")


def read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a safetensors or a torch.save file holds, and the metadata of the former.

    Raises:
        ValueError: The file is truncated, is no checkpoint, or holds more than tensors and plain
            containers, which could run code.
        ImportError: A safetensors file without safetensors.
    """
    with path.open("rb") as file:
        start = file.read(9)
    # The length of a JSON header, and the header; a torch.save file is a zip or a pickle.
    if start[8:] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not the whole of torch's message, which advises to load it all the same.
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path}: refused, it holds more than tensors, which could run code: {found[1]}"
            ) from error
        raise _unreadable(path, error) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a state dict, found {type(content).__name__}")
    return dict(content), {}


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    safetensors = _import_safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: truncated, or no checkpoint: {error}")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """All of the file or none: a reader, or a crash, never meets half of it.

    Raises:
        ImportError: safetensors is not installed.
    """
    _import_safetensors()
    from safetensors.torch import save

    content = save(dict(tensors), metadata)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as file:  # not save_file, whose files only their owner may read
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _import_safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(f"safetensors files need safetensors: {_INSTALL}") from error
    return safetensors

"""Checkpoint files: located by path, URL or hub id, read safely, written atomically."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from crossvit import checkpoint_hub as hub

_HUB_ID = re.compile(r"(?:hf[-_]hub:)?([\w.-]+/[\w.-]+)")
_HUB_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
_INDEX = ".index.json"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".json")
_TIMEOUT_S = 30
_KINDS: dict[int, type[OSError]] = {
    401: PermissionError,
    403: PermissionError,
    404: FileNotFoundError,
    410: FileNotFoundError,
}


def locate(source: str | os.PathLike[str], **hub_options: Any) -> Path:
    """Return the local file of a path, a URL or a Hugging Face hub id, downloading it if needed.

    Args:
        source: Any of these.
        **hub_options: Arguments of ``huggingface_hub.hf_hub_download``, for a hub id.

    Raises:
        FileNotFoundError: The source is none of these, or there are no weights.
        PermissionError: The server or the hub's repository denies access.
        ConnectionError: The server or the hub cannot be reached, or fails.
        ImportError: A hub id, but huggingface_hub is not installed.
        TypeError: The source is neither a string nor a path.
    """
    if not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        advice = "; pass its state_dict()" if isinstance(source, torch.nn.Module) else ""
        raise TypeError(
            f"source: expected a path, a URL, a hub id or a state dict, found {kind}{advice}"
        )
    path, name = Path(source), str(source)
    if path.is_file():
        return path
    if path.is_dir():
        return _inside(path)
    if urlparse(name).scheme in ("http", "https", "file"):
        return _download(name)
    if (hub_id := _HUB_ID.fullmatch(name)) and path.suffix not in _SUFFIXES:
        path = hub.download(hub_id[1], _HUB_FILES, **hub_options)
        for shard in shards(path) if path.name.endswith(_INDEX) else ():
            hub.download(hub_id[1], [shard], **hub_options)
        return path
    raise FileNotFoundError(f"{name}: no such file, and neither a URL nor a hub id (owner/name)")


def _inside(folder: Path) -> Path:
    """The weights file in a folder laid out like a hub repository."""
    for name in _HUB_FILES:
        if (folder / name).is_file():
            return folder / name
    if (folder / ".metadata").is_file():
        raise FileNotFoundError(
            f"{folder}: a directory of torch.distributed.checkpoint: make one file of it with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    raise FileNotFoundError(
        f"{folder}: a directory without {', '.join(_HUB_FILES)}: name the file; a repository of "
        "the hub is hf_hub:owner/name"
    )


def _download(url: str) -> Path:
    remote = Path(urlparse(url).path)
    # Many files are called model.safetensors.
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    local = Path(torch.hub.get_dir(), "checkpoints", f"{remote.stem}-{digest}{remote.suffix}")
    if not local.is_file():
        local.parent.mkdir(parents=True, exist_ok=True)
        # A broken connection may look like the end of the file.
        unchecked = local.with_name(f".{os.getpid()}.{local.name}")
        try:
            _fetch(url, unchecked)
            read(unchecked)
            unchecked.replace(local)
        finally:
            unchecked.unlink(missing_ok=True)
    return local


def _fetch(url: str, path: Path) -> None:
    """Download a URL to a file; unlike torch.hub, with a timeout."""
    request = Request(url, headers={"User-Agent": "crossvit"})
    try:
        response = urlopen(request, timeout=_TIMEOUT_S)
    except HTTPError as error:
        error.close()
        kind = _KINDS.get(error.code, ConnectionError)
        raise kind(f"{url}: the server answers {error.code} {error.reason}") from error
    except URLError as error:
        if isinstance(error.reason, FileNotFoundError):
            raise FileNotFoundError(f"{url}: no such file") from error
        raise ConnectionError(f"{url}: cannot be reached: {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"{url}: cannot be reached: {error}") from error
    with response, path.open("wb") as file:
        length = response.headers.get("Content-Length")
        # torch.hub has a replacement if tqdm is not installed.
        tqdm = vars(torch.hub)["tqdm"]
        with tqdm(total=int(length) if length else None, unit="B", unit_scale=True) as progress:
            while chunk := _receive(response, url):
                file.write(chunk)
                progress.update(len(chunk))


def _receive(response: Any, url: str) -> bytes:
    try:
        return response.read(1 << 20)
    except IncompleteRead as error:
        return error.partial  # the whole file is checked
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"{url}: broke off: {error}") from error


def read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the content of a safetensors or torch.save file, and its metadata.

    Those of the latter are texts by name in an entry "metadata", as the trainer writes it.

    The index of a sharded checkpoint stands for all its files, which are in the same folder.

    Raises:
        FileNotFoundError: A shard is missing.
        ValueError: The file is truncated, is not a checkpoint, or holds more than tensors and plain
            containers, which could run code.
        ImportError: A safetensors file, but safetensors is not installed.
    """
    if path.name.endswith(_INDEX):
        return _read_shards(path)
    with path.open("rb") as file:
        start = file.read(9)
    # safetensors: a JSON header after its length; torch.save: a zip or a pickle.
    if start[8:] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            # timm saves its arguments as a namespace. For TorchScript, torch warns and then raises.
            warnings.filterwarnings("ignore", ".*TorchScript", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        if "TorchScript" in str(error):
            raise ValueError(
                f"{path}: a TorchScript program, which is code: save its state_dict()"
            ) from error
        raise _unreadable(path, error) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a state dict, found {type(content).__name__}")
    # Copying to another type would lose the versions and grids that modules add.
    content = content if isinstance(content, dict) else dict(content)
    return content, _texts(content.get("metadata"))


def _texts(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, Mapping):
        return {}
    return {key: text for key, text in metadata.items() if isinstance(text, str)}


def _refused(path: Path, error: pickle.UnpicklingError) -> ValueError:
    """Return an error without torch's advice to load the file anyway."""
    if not (match := re.search(r"GLOBAL ([\w.]+)", str(error))):
        return _unreadable(path, error)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # an old file: a bare pickle
        names = []
    advice = ""
    if any(name.startswith("torch.nn.modules.") for name in (*names, match[1])):
        advice = "a whole module was saved, not its state_dict(): "
    return ValueError(
        f"{path}: refused, {advice}it holds more than tensors, which could run code: {match[1]}"
    )


def _read_shards(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    content: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for name in shards(path):
        shard = path.with_name(name)
        if not shard.is_file():
            raise FileNotFoundError(f"{path}: its shard {name} is not beside it")
        tensors, shard_metadata = read(shard)
        content |= tensors
        metadata |= shard_metadata
    return content, metadata


def shards(path: Path) -> list[str]:
    """Return the file names in the index of a sharded checkpoint.

    Raises:
        ValueError: It is not such an index, or names files in other folders.
    """
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: truncated, or no index of a sharded checkpoint") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name.endswith(_INDEX):
            raise ValueError(f"{path}: expected names of files beside it, found {name!r}")
    return names


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
    """Write a file atomically: neither readers nor a crash see half of it. Equal content makes
    equal files.

    Raises:
        ImportError: safetensors is not installed.
    """
    _import_safetensors()
    from safetensors.torch import save

    content = memoryview(save(dict(tensors), metadata))
    header, data = _header(content)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open(
            "wb"
        ) as file:  # not save_file, whose files are readable by their owner only
            file.write(header)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _header(content: memoryview) -> tuple[bytes, memoryview]:
    """The header of a safetensors file with its metadata sorted, and the data after it.

    safetensors itself writes metadata in another order each time.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8 : 8 + length]))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data are aligned
    return len(text).to_bytes(8, "little") + text, content[8 + length :]


def _import_safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(f"safetensors files need safetensors: {hub.INSTALL}") from error
    return safetensors

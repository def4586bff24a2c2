"""Files, directories, URLs and hub ids that hold no checkpoint, or cannot be reached."""

from __future__ import annotations

import http.server
import json
import threading
import time
import warnings
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from crossvit import Config, CrossViT, load_checkpoint, load_model, save_checkpoint
from crossvit import checkpoint_files as files
from crossvit import checkpoint_hub as hub

safetensors_torch = pytest.importorskip("safetensors.torch")

TINY = Config(
    dims=(32, 64), num_heads=(2, 2), depths=(1, 1), mlp_ratios=(2.0, 2.0), num_blocks=1, img_size=48
)
ID = "owner/name.in1k"


def tiny() -> CrossViT:
    return CrossViT(TINY, num_classes=5).eval()


def assert_loads(source, model: CrossViT) -> None:
    loaded = load_checkpoint(tiny(), source).state_dict()
    assert all(torch.equal(t, loaded[key]) for key, t in model.state_dict().items())


def save_shards(model: CrossViT, folder: Path) -> Path:
    state = model.state_dict()
    names = sorted(state)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for name, keys in shards.items():
        safetensors_torch.save_file({key: state[key] for key in keys}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {k: n for n, keys in shards.items() for k in keys}}))
    return index


# Files


def test_shards(tmp_path):
    model = tiny()
    index = save_shards(model, tmp_path)
    assert_loads(index, model)
    assert_loads(tmp_path, model)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"its shard model-2\.safetensors"):
        load_checkpoint(tiny(), index)
    for content in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}'):
        index.write_text(content)
        with pytest.raises(ValueError, match=r"index of a sharded|files beside it"):
            load_checkpoint(tiny(), index)


def test_directories(tmp_path):
    model = tiny()
    with pytest.raises(FileNotFoundError, match=r"a directory without model\.safetensors"):
        load_checkpoint(tiny(), tmp_path)
    (tmp_path / ".metadata").touch()
    with pytest.raises(FileNotFoundError, match="dcp_to_torch_save"):
        load_model(str(tmp_path))
    save_checkpoint(model, tmp_path / "model.safetensors")
    assert_loads(tmp_path, model)


def test_whole_modules_and_programs_are_refused(tmp_path):
    model = tiny()
    torch.save({"model": model}, tmp_path / "whole.pth")
    message = r"whole\.pth: refused, a whole module was saved, not its state_dict\(\)"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tiny(), tmp_path / "whole.pth")
    with warnings.catch_warnings():  # TorchScript is deprecated
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "program.pt")
    with pytest.raises(ValueError, match=r"a TorchScript program, which is code"):
        load_checkpoint(tiny(), tmp_path / "program.pt")


def test_damaged_descriptions(tmp_path):
    state = {key: t.contiguous() for key, t in tiny().state_dict().items()}
    for text in ("{", "{}", '{"config": {"dims": [1, 2], "unknown": 3}}', "[1]"):
        safetensors_torch.save_file(state, tmp_path / "a.safetensors", {"crossvit": text})
        for load in (load_model, lambda path: load_checkpoint(tiny(), path)):
            with pytest.raises(ValueError, match="description of its model is damaged"):
                load(tmp_path / "a.safetensors")


# URLs


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/silent"):
            self.server.stop.wait(20)
            return
        if self.path.startswith("/nonsense"):
            self.wfile.write(b"nonsense\r\n\r\n")
            return
        self.send_error(int(self.path[1:4]))

    def log_message(self, *args):
        pass


@pytest.fixture
def url(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(files, "_TIMEOUT_S", 0.5)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.stop = threading.Event()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.stop.set()
        server.shutdown()
        thread.join()
    assert not list((tmp_path / "hub/checkpoints").iterdir())


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("404.pth", FileNotFoundError, "the server answers 404"),
        ("403.pth", PermissionError, "the server answers 403"),
        ("503.pth", ConnectionError, "the server answers 503"),
        ("silent.pth", ConnectionError, "cannot be reached: timed out"),
        ("nonsense.pth", ConnectionError, "cannot be reached"),
    ],
)
def test_servers_that_refuse(url, path, kind, message):
    with pytest.raises(kind, match=rf"{url}/{path}: {message}"):
        load_checkpoint(tiny(), f"{url}/{path}")


def test_servers_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        url = f"http://127.0.0.1:{server.server_port}/a.pth"
    with pytest.raises(ConnectionError, match=rf"{url}: cannot be reached: .*refused"):
        load_checkpoint(tiny(), url)
    missing = (tmp_path / "missing.pth").as_uri()
    with pytest.raises(FileNotFoundError, match=f"{missing}: no such file"):
        load_checkpoint(tiny(), missing)


# The hub


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """A fake hub that raises a test's errors and records the requested files."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    names = []

    def download(repository: str, name: str) -> str:
        names.append(name)
        if name in download.errors:
            raise download.errors[name]
        if not (tmp_path / name).is_file():
            raise huggingface_hub.errors.EntryNotFoundError("no such entry")
        return str(tmp_path / name)

    download.errors = {}
    download.names = names
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(hub, "_probe", lambda endpoint: None)
    return download


def http_error(kind: type[Exception], status: int) -> Exception:
    """An error of huggingface_hub with the response that all its versions require."""
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status} error")
    error.response = type("Response", (), {"status_code": status})()
    return error


def hub_errors() -> list:
    e = pytest.importorskip("huggingface_hub.errors")
    offline = e.LocalEntryNotFoundError("not here")
    offline.__cause__ = e.OfflineModeIsEnabled("offline")
    return [
        (e.LocalEntryNotFoundError("check your connection"), ConnectionError, "is there a network"),
        (offline, ConnectionError, "HF_HUB_OFFLINE is set"),
        (e.OfflineModeIsEnabled("offline"), ConnectionError, "HF_HUB_OFFLINE is set"),
        (ConnectionResetError("reset by peer"), ConnectionError, "reset by peer"),
        (TimeoutError("timed out"), ConnectionError, "timed out"),
        (http_error(e.HfHubHTTPError, 503), ConnectionError, "503"),
        (http_error(e.HfHubHTTPError, 401), PermissionError, "refuses access"),
        (http_error(e.RepositoryNotFoundError, 401), FileNotFoundError, "no such repository"),
        (http_error(e.GatedRepoError, 403), PermissionError, "gated"),
        (OSError(28, "No space left on device"), OSError, "No space left"),
    ]


@pytest.mark.parametrize("case", range(10))
def test_why_there_is_no_file(fake_hub, case):
    error, kind, message = hub_errors()[case]
    fake_hub.errors["model.safetensors"] = error
    with pytest.raises(kind, match=message) as raised:
        load_checkpoint(tiny(), ID)
    assert fake_hub.names == ["model.safetensors"]
    assert "none of" not in str(raised.value)
    assert kind is OSError or ID in str(raised.value)


def test_a_repository_without_weights(fake_hub):
    with pytest.raises(FileNotFoundError, match=r"has none of model\.safetensors, pytorch_model"):
        load_checkpoint(tiny(), ID)
    # The network may fail after the first answer.
    errors = pytest.importorskip("huggingface_hub.errors")
    fake_hub.errors["pytorch_model.bin"] = errors.LocalEntryNotFoundError("check your connection")
    with pytest.raises(ConnectionError):
        load_checkpoint(tiny(), ID)


def test_a_sharded_repository(fake_hub, tmp_path):
    model = tiny()
    save_shards(model, tmp_path)
    assert_loads(ID, model)
    assert fake_hub.names[-2:] == ["model-1.safetensors", "model-2.safetensors"]


def test_the_cache_serves_without_a_network(fake_hub, tmp_path, monkeypatch):
    """Also for a file that is not the first choice."""
    model, path = tiny(), tmp_path / "cached.bin"
    torch.save(model.state_dict(), path)
    import huggingface_hub

    cached = {"pytorch_model.bin": str(path)}
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda repository, name: cached.get(name)
    )
    fake_hub.errors["model.safetensors"] = huggingface_hub.errors.LocalEntryNotFoundError("no")
    assert_loads(ID, model)


def test_without_a_network_nothing_is_tried_again(monkeypatch, tmp_path):
    """The real huggingface_hub, which by default waits 24 s per file."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def unreachable(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(hub, "urlopen", unreachable)
    offline = constants.HF_HUB_OFFLINE
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"{ID}: .*is there a network\? \(Name or service"):
        load_checkpoint(tiny(), f"hf_hub:{ID}")
    assert time.monotonic() - start < 5
    assert offline == constants.HF_HUB_OFFLINE
    assert huggingface_hub.constants is constants

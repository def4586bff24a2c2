"""What leaves Python: ONNX of two images in onnxruntime, and the commands of docs/serving.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim

from crossvit import Config, CrossViT

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
TINY = Config(
    dims=(32, 64), num_heads=(2, 2), depths=(1, 1), mlp_ratios=(2.0, 2.0), num_blocks=1, img_size=48
)
BATCH = Dim("batch", min=1, max=64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_onnx_of_two_images(tmp_path: Path) -> None:
    """Each in its branch's size: nothing is resized; the batch is free."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = CrossViT(TINY, num_classes=7).eval()
    sizes = model.image_sizes(torch.empty(1, 3, 48, 48))
    pair = [torch.randn(2, 3, *size) for size in sizes]
    path = tmp_path / "pair.onnx"
    shapes = (({0: BATCH}, {0: BATCH}),)
    torch.onnx.export(model, (tuple(pair),), path, dynamic_shapes=shapes, verbose=False)
    graph = onnx.load(path).graph
    assert "Resize" not in {node.op_type for node in graph.node}
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    pair = [torch.randn(5, 3, *size) for size in sizes]
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), pair, strict=True)}
    (logits,) = session.run(None, feed)
    expected = model(pair).detach()
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


def assert_runs_in_cpp(model: CrossViT) -> None:
    """The page's program and its command: logits of the package in this folder."""
    import shutil
    import subprocess

    if shutil.which("g++") is None:
        return
    page = PAGE.read_text()
    (code,) = re.findall(r"```cpp\n(.*?)```", page, re.DOTALL)
    printed = code.replace("240, 240", "48, 48").replace("logits.argmax(1)", "logits.flatten()")
    assert printed.count("48") == 2 and "flatten" in printed
    Path("serve.cpp").write_text(printed)
    (command,) = re.findall(r"^    TORCH=.*\n    g\+\+ (?:.*\\\n)*.*$", page, re.MULTILINE)
    subprocess.run(["bash", "-ec", command], check=True)
    run = subprocess.run(["./serve"], capture_output=True, text=True, check=True)
    logits = torch.tensor([float(line) for line in run.stdout.split("[")[0].split()])
    expected = model(torch.ones(3, 3, 48, 48)).detach().flatten()
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not PAGE.exists(), reason="an installation without the source tree")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::torch.jit.TracerWarning")
def test_the_pages_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a smaller model; what they write gives the model's logits."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    smaller = code.replace("img_size=240", "img_size=48, num_blocks=1").replace(
        "240, 240", "48, 48"
    )
    assert smaller.count("48") == 3 and "240" not in smaller
    scope: dict[str, Any] = {}
    exec(compile(smaller, str(PAGE), "exec"), scope)
    assert_runs_in_cpp(scope["model"])
    expected = scope["model"](scope["x"]).detach()
    of_pair = scope["model"](scope["pair"]).detach()
    for name, reference in (
        ("logits", expected),
        ("scores", expected),
        ("fused_scores", expected),
    ):
        torch.testing.assert_close(scope[name].detach(), reference, rtol=1e-4, atol=1e-5)
    session = scope["session"]
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), scope["pair"], strict=True)}
    (logits,) = session.run(None, feed)
    torch.testing.assert_close(torch.from_numpy(logits), of_pair, rtol=1e-4, atol=1e-5)
    session = type(session)("model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: scope["x"].numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)

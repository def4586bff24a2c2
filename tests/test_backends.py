"""The choice of the backend, and the errors if one cannot run a call."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import crossvit_kernels as ck
from crossvit_kernels import extension
from crossvit_kernels.backends import NAMES, choose, order


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_backends_says_what_is_usable_and_why_not() -> None:
    available = ck.backends()
    assert set(available) == set(NAMES) and available["reference"] is True
    assert set(available.reasons) == {name for name, usable in available.items() if not usable}
    for name in available:
        assert name in str(available)
    for reason in available.reasons.values():
        assert reason in str(available)


def test_auto_takes_the_compiled_kernel(cpu_backend: str, monkeypatch) -> None:
    from crossvit_kernels.ops.attention_core import cpu

    calls = []
    forward = cpu.forward_pass
    monkeypatch.setattr(cpu, "forward_pass", lambda *a, **k: calls.append(1) or forward(*a, **k))
    u, x = torch.randn(1, 2, 8), torch.randn(1, 3, 8)
    ck.attention_core(u, x)
    ck.attention_core(u, x, backend="auto")
    assert len(calls) == 2
    ck.attention_core(u, x, backend="reference")
    with ck.use_backend("reference"):
        ck.attention_core(u, x)
        assert len(calls) == 2
        ck.attention_core(u, x, backend="cpu")  # the call's argument wins
        assert len(calls) == 3
    ck.attention_core(u, x)
    assert len(calls) == 4


def test_use_backend_nests_and_survives_errors() -> None:
    x = torch.randn(1, 3, 8)
    with pytest.raises(RuntimeError, match="inside"), ck.use_backend("cuda"):
        with ck.use_backend("reference"):
            ck.attention_core(x, x)
        with pytest.raises(ValueError, match="'cuda'"):
            ck.attention_core(x, x)
        raise RuntimeError("inside")
    ck.attention_core(x, x)
    with pytest.raises(ValueError, match="unknown backend 'tpu'"), ck.use_backend("tpu"):
        pass


def test_a_named_backend_that_cannot_run_gives_all_reasons() -> None:
    x = torch.randn(1, 3, 8)
    with pytest.raises(ValueError) as caught:
        ck.attention_core(x, x, backend="cuda")
    message = str(caught.value)
    assert "'cuda'" in message and "attention_core" in message
    assert all(f"{name}:" in message for name in NAMES)


def test_choose_prefers_the_first_that_can() -> None:
    modules = {"cuda": "slow", "cpu": "fast"}

    def chosen(name: str | None, why_not: Callable[[str], str | None], **options: bool) -> str:
        return choose("op", name, modules, torch.device("cpu"), why_not, **options)

    def can(module: str) -> None:
        return None

    assert chosen(None, can) == "cpu"
    assert chosen(None, {"fast": "no", "slow": None}.get) == "cuda"
    assert chosen(None, lambda module: "no") == "reference"
    assert chosen("auto", can, prefer_reference=True) == "reference"
    assert chosen("cpu", can, prefer_reference=True) == "cpu"
    with pytest.raises(ValueError, match=r"cuda: too wide; .*cpu: can run it"):
        chosen("cuda", {"slow": "too wide", "fast": None}.get)
    with pytest.raises(ValueError, match="triton: no kernels for this operation"):
        chosen("triton", can)


def test_environment_variable() -> None:
    code = (
        "import torch, crossvit_kernels as ck; x = torch.randn(1, 3, 8)\n"
        "try: ck.attention_core(x, x); print('ran')\n"
        "except ValueError as e: print(e)\n"
    )
    assert run_python(code, CROSSVIT_KERNELS_BACKEND="reference") == "ran\n"
    assert "'cuda' cannot run" in run_python(code, CROSSVIT_KERNELS_BACKEND="cuda")
    assert "unknown backend 'abacus'" in run_python(code, CROSSVIT_KERNELS_BACKEND="abacus")


WITHOUT_EXTENSION = """
import sys
sys.modules["crossvit_kernels._C"] = None
import torch, crossvit_kernels as ck
"""


def test_without_the_extension() -> None:
    """Import, reference and environment report work; the reason names the fix."""
    out = run_python(
        WITHOUT_EXTENSION
        + "x = torch.randn(1, 3, 8)\n"
        + "assert ck.backends()['cpu'] is False\n"
        + "ck.attention_core(x, x)\n"
        + "try: ck.attention_core(x, x, backend='cpu')\n"
        + "except ValueError as e: print(e)\n"
        + "from crossvit_kernels.__main__ import report; print(report())\n"
    )
    assert out.count("cannot be imported") >= 3 and "pip install" in out


def test_fused_models_without_the_extension() -> None:
    """Every operation of a model runs the reference, forward and backward."""
    out = run_python(
        WITHOUT_EXTENSION
        + "from crossvit import create_model\n"
        + "image = torch.rand(1, 3, 224, 224)\n"
        + "for name in 'crossvit_tiny', 'deit_tiny_patch16_224':\n"
        + "    model = create_model(name, use_fused=True).eval()\n"
        + "    fused = model(image); fused.sum().backward()\n"
        + "    torch.testing.assert_close(fused, model.set_fused(False)(image))\n"
        + "def refusal(call, *args):\n"
        + "    try: call(*args, backend='cpu')\n"
        + "    except ValueError as e: return str(e)\n"
        + "x, w = torch.rand(1, 4, 32), torch.ones(32)\n"
        + "msa = ck.MsaWeights(w, w, torch.rand(96, 32), None, torch.rand(32, 32), w)\n"
        + "ffn = ck.FfnWeights(w, w, torch.rand(64, 32), torch.rand(64), torch.rand(32, 64), w)\n"
        + "assert 'cannot be imported' in refusal(ck.layernorm_msa, x, msa, 1)\n"
        + "assert 'cannot be imported' in refusal(ck.layernorm_ffn, x, ffn)\n"
        + "print('equal')\n",
        TRITON_INTERPRET="0",
    )
    assert out == "equal\n"


def test_without_triton_and_without_a_gpu() -> None:
    out = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a)\n"
        "import crossvit_kernels as ck; print(ck.backends())",
        CUDA_VISIBLE_DEVICES="",
    )
    assert "triton is not installed" in out and "reference  usable" in out


def test_environment_report() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "crossvit_kernels"], capture_output=True, text=True, check=True
    )
    for expected in (torch.__version__, ck.__version__, "triton", "numpy", "gpu", *NAMES):
        assert expected in result.stdout


def test_import_is_light() -> None:
    """No CUDA context, no Triton, no compiler stack, no library of models."""
    run_python(
        "import sys, crossvit_kernels, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not {'triton', 'torch._dynamo'} & set(sys.modules)\n"
        "import crossvit\n"
        "crossvit.timm.register  # needs no import of its own\n"
        "assert not {'timm', 'torchvision'} & set(sys.modules)\n"
    )


def test_the_order_follows_the_chip(monkeypatch) -> None:
    assert order("attention_core", torch.device("cpu"))[0] == "cpu"
    for capability, first in ((75, "triton"), (80, "triton"), (89, "triton"), (90, "cuda")):
        monkeypatch.setattr(extension, "compute_capability", lambda device, c=capability: c)
        assert order("cross_attention_fusion", torch.device("cuda", 0))[0] == first


def test_which_code_a_device_loads() -> None:
    def loaded(*architectures: str) -> list[int]:
        capabilities = 75, 80, 86, 89, 90, 100, 103, 120
        return [extension.architecture_for(architectures, c) for c in capabilities]

    assert loaded("80", "90") == [0, 80, 80, 80, 90, 90, 90, 90]  # PTX from sm_100 on
    assert loaded("80", "90a", "100a") == [0, 80, 80, 80, 90, 100, 100, 100]
    assert loaded("90a") == [0, 0, 0, 0, 90, 90, 90, 90]
    assert loaded("80") == [0, 80, 80, 80, 80, 80, 80, 80]
    assert loaded("80", "100") == [0, 80, 80, 80, 0, 100, 100, 100]
    assert loaded("86", "89") == [0, 0, 86, 89, 89, 89, 89, 89]
    assert loaded() == [0] * 8


@pytest.mark.parametrize(
    "architectures, have_clusters", [("80", False), ("80;90", True), ("80;89", False)]
)
def test_clusters_are_those_of_the_code_that_is_loaded(
    monkeypatch, architectures, have_clusters
) -> None:
    hopper = SimpleNamespace(major=9, minor=0, multi_processor_count=114)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: hopper)
    monkeypatch.setattr(extension, "cuda_architectures", lambda: architectures.split(";"))
    device = torch.device("cuda", 0)
    found = extension.multiprocessors.__wrapped__(device)
    assert found == extension.Multiprocessors(114, have_clusters)


def test_a_device_that_fails_the_check_is_left_to_others(monkeypatch, cuda_device) -> None:
    failure = "cudaErrorInsufficientDriver"
    monkeypatch.setattr(extension, "failure_on", lambda device: failure)
    x, u = torch.randn(2, 5, 16, device=cuda_device), torch.randn(2, 3, 16, device=cuda_device)
    with pytest.raises(ValueError, match=failure):
        ck.attention_core(u, x, backend="cuda")
    m, _ = ck.attention_core(u, x)
    expected, _ = ck.attention_core(u, x, backend="reference")
    torch.testing.assert_close(m, expected, rtol=1e-4, atol=1e-4)


def test_the_check_is_a_constant_to_a_compiler(monkeypatch, cuda_device) -> None:
    def check(device: torch.device) -> str:
        return "" if extension.cpu_instruction_set() else "none"  # nothing to trace

    check._dynamo_marked_constant = extension.failure_on._dynamo_marked_constant
    monkeypatch.setattr(extension, "failure_on", check)
    x, u = torch.randn(2, 5, 16, device=cuda_device), torch.randn(2, 3, 16, device=cuda_device)
    m, _ = torch.compile(ck.attention_core, fullgraph=True, backend="eager")(u, x, backend="cuda")
    torch.testing.assert_close(m, ck.attention_core(u, x)[0], rtol=1e-4, atol=1e-4)

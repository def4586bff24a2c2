"""The library as a backend, and calibration, on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from block_cases import check_ffn, check_msa
from fusion_cases import check_rule

import crossvit_kernels as ck
from crossvit import create_model
from crossvit_kernels.calibration import store
from crossvit_kernels.verify import state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library(dtype: torch.dtype) -> None:
    on_gpu = {"backend": "library", "device": "cuda"}
    check_msa(192, 6, 3, 401, dtype, scaled=True, with_cls=True, **on_gpu)
    check_ffn(192, 576, 3, 401, dtype, scaled=True, **on_gpu)
    check_rule(384, 192, 6, 3, 400, dtype, scaled=True, **on_gpu)


def test_the_library_compiled() -> None:
    """What is kept for backward is as it was traced."""
    model = create_model("crossvit_9", use_fused=True, img_size=96, num_classes=5)
    model = model.cuda().bfloat16()
    x = torch.randn(2, 3, 96, 96, device="cuda", dtype=torch.bfloat16)
    with ck.use_backend("library"):
        expected = model(x)
        actual = torch.compile(model, backend="aot_eager")(x)
        actual.square().sum().backward()
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_calibrate(training: bool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(store.ENVIRONMENT_VARIABLE, str(tmp_path / "calibrated.json"))
    store.forget()
    state.forget()
    model = create_model("crossvit_9", use_fused=True, img_size=96, num_classes=5).cuda()
    x = torch.randn(4, 3, 96, 96, device="cuda")
    try:
        result = ck.calibrate(model, x, training=training, budget_s=10)
        assert all("library" in call.seconds for call in result.calls)
        assert result.choice in ("fused", "eager") and not state.retired
        assert set(result.settings) == (set() if training else {"graph", "side_by_side"})
        if not training:
            graphed = ck.make_graphed(model.eval(), x, if_faster=True)
            with torch.inference_mode():
                torch.testing.assert_close(graphed(x), model(x))
    finally:
        monkeypatch.undo()
        store.forget()
        state.forget()

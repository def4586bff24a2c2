"""Which steps of a block torch's libraries do: the tables, and that the backend obeys them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from block_cases import ffn_weights, msa_weights

from crossvit_kernels import FfnWeights, MsaWeights
from crossvit_kernels.gpu import launcher, tables
from crossvit_kernels.ops.common.configs import FEW_ROWS, VARIANTS
from crossvit_kernels.ops.common.library import Figures, Step
from crossvit_kernels.ops.layernorm_ffn import configs as ffn
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs
from crossvit_kernels.ops.layernorm_msa import configs as msa
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs
from crossvit_kernels.ops.operator import OPERATIONS

STEPS = {
    **{name: getattr(msa, name) for name in ("QKV", "SELF_ATTENTION", "PROJECTION")},
    **{
        name: getattr(ffn, name)
        for name in ("FC1", "FC2", "HIDDEN_GRADIENT", "KEPT_HIDDEN_GRADIENT")
    },
}
MANY = FEW_ROWS + 1


def test_figures_are_those_of_the_results() -> None:
    path = Path(__file__).parents[2] / "bench/results/model/library.json"
    document = json.loads(path.read_text())
    assert document["what"] == "a model of machine code, not a measurement"
    found: dict[str, dict[int, Figures]] = {name: {} for name in STEPS}
    for row in document["rows"]:
        found[row["step"]][row["channels"]] = Figures(row["ours"], row["library"])
    assert found == {name: dict(step.many_rows) for name, step in STEPS.items()}


def test_the_faster_one_does_a_step() -> None:
    step = Step({192: Figures(1.0, 2.0), 384: Figures(2.0, 1.0)})
    choices = {width: step.by_library(MANY, width, 2) for width in (96, 192, 193, 384, 768)}
    assert choices == {96: False, 192: False, 193: True, 384: True, 768: True}
    assert not step.by_library(FEW_ROWS, 384, 2)
    assert step.by_library(1, 96, 4)
    assert not step._replace(in_float32=False).by_library(1, 96, 4)
    for variant, expected in (("library", True), ("split", False), ("fused", False)):
        with VARIANTS.choose(variant):
            assert {step.by_library(MANY, width, 2) for width in (96, 384)} == {expected}


def launched(operation: str, channels: int, num_rows: int, keep: str = "fast") -> dict[str, bool]:
    """The kernels of forward and backward on an H100, and whether their fifth tensor is None."""

    def like(t: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(t, dtype=torch.bfloat16, device="meta")

    x = torch.empty(1, num_rows, channels, dtype=torch.bfloat16, device="meta")
    inputs: MsaInputs | FfnInputs
    if operation == "layernorm_msa":
        weights = MsaWeights(*map(like, msa_weights(channels)))
        inputs = MsaInputs(x, weights, channels // 32, None, None)
    else:
        inputs = FfnInputs(x, FfnWeights(*map(like, ffn_weights(channels, 2 * channels))), None)
    made = OPERATIONS[operation]
    triton = made.backends["triton"]
    with tables.as_if_on(90), launcher.recording_launches() as launches:
        y, saved = triton.forward(inputs, 1e-6, keep)
        wanted = made.inputs([t is not None for t in made.flat(inputs)])
        triton.backward((y,), inputs, saved, 1e-6, wanted)
    return {
        launch.specialization.kernel.fn.__name__: None in launch.specialization.tensors[4:5]
        for launch in launches
    }


@pytest.mark.parametrize("channels", [192, 384])
def test_the_backend_obeys(channels: int) -> None:
    wide = channels == 384
    assert ffn.HIDDEN_GRADIENT.by_library(MANY, channels, 2) == wide
    assert msa.QKV.by_library(MANY, channels, 4) and not msa.QKV.by_library(MANY, channels, 2)
    found = launched("layernorm_msa", channels, MANY)
    assert ("norm_linear" in found) == (not wide) and "linear" in found
    with VARIANTS.choose("library"):
        assert not {"norm_linear", "linear"} & {*launched("layernorm_msa", channels, MANY)}
    # Without the update's gradient: cuBLAS has multiplied it by W_2.
    assert launched("layernorm_ffn", channels, MANY, "lean")["ffn_hidden_backward"] == wide
    assert not launched("layernorm_ffn", channels, MANY)["ffn_hidden_backward"]
    assert "norm_linear" in launched("layernorm_msa", channels, 16)
    assert not launched("layernorm_ffn", channels, 16)["ffn_hidden_backward"]

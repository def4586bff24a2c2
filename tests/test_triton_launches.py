"""Triton launches without a GPU (no_device.py): which kernels each call compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUSIONS = """
from no_device import launched
import torch
from crossvit_kernels import FusionInputs, FusionWeights
from crossvit_kernels.ops.attention_core.reference import CoreInputs
from crossvit_kernels.inspect.compile_cases import both_ways
from crossvit_kernels.ops.operator import OPERATIONS
from fusion_cases import make_weights

def call(batch, tokens, biases=True, scaled=False):
    w = make_weights(32, 48, biases)
    w = FusionWeights(*(None if t is None else t.bfloat16() for t in w))
    cls, x = torch.randn(batch, 32).bfloat16(), torch.randn(batch, tokens + 1, 48).bfloat16()[:, 1:]
    scale = torch.ones(batch) if scaled else None
    both_ways(OPERATIONS["cross_attention_fusion"], FusionInputs(cls, x, w, 3, scale), 1e-6)
    inputs = CoreInputs(torch.randn(batch, 3, 48), x, None, None)
    both_ways(OPERATIONS["attention_core"], inputs, 1e-6)

for batch, tokens in ((1, 1), (2, 16), (64, 17), (33, 64), (1, 1030)):
    call(batch, tokens)
assert set(launched) == {
    "fusion_forward", "fusion_backward",
    "attention_core_forward", "attention_core_backward", "attention_core_merge",
}, launched.keys()
# Parts of an image are another kernel, for any number of them; nothing else is.
more = {name: len(kernels) for name, kernels in launched.items() if len(kernels) > 1}
assert set(more) <= {"attention_core_forward"} and sum(more.values()) <= 2, more
launched.clear()
call(65, 16)
call(128, 33)
# attention_core's pass, by itself and within a fusion, is compiled for each.
assert len(launched) == 6, launched
core = ("attention_core_forward", "attention_core_backward")
assert all(len(kernels) == 1 + (name in core) for name, kernels in launched.items()), launched
call(2, 3, biases=False, scaled=True)
"""

BLOCKS = """
from no_device import launched
import torch
from crossvit_kernels import FfnWeights, MsaWeights
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs
from crossvit_kernels.inspect.compile_cases import both_ways
from crossvit_kernels.ops.operator import OPERATIONS
from block_cases import ffn_weights, msa_weights

def call(batch, tokens, keep="fast", with_cls=True, scaled=False):
    x, cls = torch.randn(batch, tokens, 48).bfloat16(), torch.randn(batch, 48).bfloat16()
    cls, scale = cls if with_cls else None, torch.ones(batch) if scaled else None
    w = MsaWeights(*(t.bfloat16() for t in msa_weights(48)))
    both_ways(OPERATIONS["layernorm_msa"], MsaInputs(x, w, 3, scale, cls), 1e-6, keep)
    w = FfnWeights(*(t.bfloat16() for t in ffn_weights(48, 96)))
    both_ways(OPERATIONS["layernorm_ffn"], FfnInputs(x, w, scale), 1e-6)

for batch, tokens in ((1, 1), (2, 16), (64, 17), (33, 64)):
    call(batch, tokens)
# Called by both halves.
both = {"norm_linear", "linear", "norm_backward"}
attention_backward = {"attention_backward_queries", "attention_backward_keys"}
few = both | attention_backward | {"attention", "ffn_hidden_backward", "normalize"}
assert set(launched) == few, launched.keys()
assert all(len(kernels) == 1 + (name in both) for name, kernels in launched.items()), launched
launched.clear()
call(65, 160)
call(128, 133)
twice = {"norm_backward"}
many = twice | attention_backward | {"norm_linear", "ffn_hidden_backward", "normalize"}
assert set(launched) == many | {"attention", "linear", "ffn_forward"}, launched.keys()
assert all(len(kernels) == 1 + (name in twice) for name, kernels in launched.items())
call(2, 3, keep="lean", with_cls=False, scaled=True)
"""


INSPECTED = """
from no_device import launched
import torch
from crossvit_kernels import FfnWeights, MsaWeights
from crossvit_kernels.inspect import ahead_of_time, compile_cases
from crossvit_kernels.gpu import launcher
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs
from crossvit_kernels.inspect.compile_cases import both_ways
from crossvit_kernels.ops.operator import OPERATIONS
from block_cases import ffn_weights, msa_weights

def check(widths, blocks, *names):
    # Triton keeps a kernel under its hash: a launch compiled exactly one of those inspected.
    names_by_hash = {c.hash: c.name for _, c in launcher._known.values()}
    assert {name for name in names if name in names_by_hash.values()} == {*names}, names_by_hash
    inspected = {
        ahead_of_time.compile_for(s, "cuda", 90).hash
        for s in compile_cases.compile_cases(90, ["bf16"], widths, blocks, ["auto"])
        if s.name in names
    }
    assert {h for h, name in names_by_hash.items() if name in names} <= inspected
    launcher._known.clear()

x = torch.randn(64, 200, 96).bfloat16()
w = FfnWeights(*(t.bfloat16() for t in ffn_weights(96, 384)))
for keep in ("", "fast"):
    both_ways(OPERATIONS["layernorm_ffn"], FfnInputs(x, w, None), 1e-6, keep)
check([], [(96, 3, 384)], "ffn_forward", "ffn_hidden_backward")
w = MsaWeights(*(t.bfloat16() for t in msa_weights(96)))
for cls in (None, x[:, 0]):
    both_ways(OPERATIONS["layernorm_msa"], MsaInputs(x, w, 3, None, cls), 1e-6, "")
check([], [(96, 3, 384)], "attention", "linear")
"""


def run_without_a_device(script: str) -> None:
    """Run code in a separate process, where kernels are compiled."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "calls",
    [
        pytest.param(FUSIONS, id="fusions"),
        pytest.param(BLOCKS, id="blocks"),
        pytest.param(INSPECTED, id="inspected"),
    ],
)
def test_batch_and_tokens_are_not_compiled_in(calls: str) -> None:
    pytest.importorskip("triton")
    run_without_a_device(calls)

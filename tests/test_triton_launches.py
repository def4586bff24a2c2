"""Triton's own launcher without a GPU: all but the launch itself.

The interpreter takes another way into a kernel. Here a driver that has no device stands in for
CUDA's, and every call goes through the specialisation of arguments and the compilation that a GPU's
would go through.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAD = """
import collections, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class NoDevice:
    def get_current_device(self):
        return 0
    def get_current_stream(self, device=0):
        return 0
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

driver.set_active(NoDevice())

compiled = collections.defaultdict(dict)  # kernel -> compiled code, by identity

def watch(*modules):
    for kernel in {k for m in modules for k in vars(m).values() if hasattr(k, "do_not_specialize")}:
        if kernel.do_not_specialize:  # those that are launched
            def run(*args, grid, warmup, kernel=kernel, launch=kernel.run, **options):
                result = launch(*args, grid=grid, warmup=True, **options)
                compiled[kernel.__name__][id(result)] = result
            kernel.run = run
"""

FUSIONS = """
from crossvit_kernels import FusionWeights
from crossvit_kernels.ops.attention_core import triton as core, triton_kernels
from crossvit_kernels.ops.cross_attention import triton as fusion
from crossvit_kernels.ops.cross_attention import triton_backward_kernels, triton_forward
from fusion_cases import make_weights

watch(triton_kernels, triton_forward, triton_backward_kernels)

def call(batch, tokens, biases=True, scaled=False):
    w = make_weights(32, 48, biases)
    w = FusionWeights(*(None if t is None else t.bfloat16() for t in w))
    cls, x = torch.randn(batch, 32).bfloat16(), torch.randn(batch, tokens + 1, 48).bfloat16()[:, 1:]
    scale = torch.ones(batch) if scaled else None
    new_cls, saved = fusion.forward(cls, x, w, scale, 3, 1e-6)
    fusion.backward(new_cls, cls, x, w, scale, saved, 3, 1e-6)
    m, lse = core.forward(u := torch.randn(batch, 3, 48), x, None, None, 1e-6)
    core.backward(m, lse, u, x, None, None, m, lse, 1e-6)

for batch, tokens in ((1, 1), (2, 16), (64, 17), (33, 64), (1, 1030)):
    call(batch, tokens)
assert set(compiled) == {
    "fusion_forward", "fusion_backward",
    "attention_core_forward", "attention_core_backward", "attention_core_merge",
}, compiled.keys()
# Parts of an image are another kernel, for any number of them; nothing else is.
more = {name: len(found) for name, found in compiled.items() if len(found) > 1}
assert set(more) <= {"attention_core_forward"} and sum(more.values()) <= 2, more
compiled.clear()
call(65, 16)
call(128, 33)
assert len(compiled) == 8 and all(len(found) == 1 for found in compiled.values()), compiled
call(2, 3, biases=False, scaled=True)
"""

BLOCKS = """
from crossvit_kernels import FfnWeights, MsaWeights
from crossvit_kernels.ops.layernorm_ffn import triton as ffn, triton_kernels as ffn_kernels
from crossvit_kernels.ops.layernorm_msa import triton as msa, triton_kernels as msa_kernels
from crossvit_kernels.ops.token_layers import triton_kernels
from block_cases import ffn_weights, msa_weights

watch(triton_kernels, msa_kernels, ffn_kernels)

def call(batch, tokens, keep="fast", with_cls=True, scaled=False):
    x, cls = torch.randn(batch, tokens, 48).bfloat16(), torch.randn(batch, 48).bfloat16()
    cls, scale = cls if with_cls else None, torch.ones(batch) if scaled else None
    w = MsaWeights(*(t.bfloat16() for t in msa_weights(48)))
    y, saved = msa.forward(x, w, scale, cls, 3, 1e-6, keep)
    msa.backward(y, x, w, scale, cls, saved, 3, 1e-6)
    w = FfnWeights(*(t.bfloat16() for t in ffn_weights(48, 96)))
    y, saved = ffn.forward(x, w, scale, 1e-6, True)
    ffn.backward(y, x, w, scale, saved, 1e-6)

for batch, tokens in ((1, 1), (2, 16), (64, 17), (33, 64)):
    call(batch, tokens)
both = {"norm_linear", "linear", "linear_norm_backward"}  # called by both halves
few = both | {"attention", "attention_backward", "ffn_hidden_backward"}
assert set(compiled) == few, compiled.keys()
assert all(len(found) == 1 + (name in both) for name, found in compiled.items()), compiled
compiled.clear()
call(65, 160)
call(128, 133)
many = {"norm_linear", "linear_norm_backward", "attention_backward", "ffn_hidden_backward"}
assert set(compiled) == many | {"attention_projection", "ffn_forward"}, compiled.keys()
assert all(len(found) == 1 + (name == "linear_norm_backward") for name, found in compiled.items())
call(2, 3, keep="lean", with_cls=False, scaled=True)
"""


INSPECTED = """
from crossvit_kernels import FfnWeights
from crossvit_kernels.gpu import ahead_of_time
from crossvit_kernels.ops.layernorm_ffn import specimens, triton as ffn, triton_kernels
from block_cases import ffn_weights

watch(triton_kernels)
x, w = torch.randn(64, 200, 96).bfloat16(), ffn_weights(96, 384)
ffn.forward(x, FfnWeights(*(t.bfloat16() for t in w)), None, 1e-6, True)
(launched,) = compiled["ffn_forward"].values()
specimen = next(s for s in specimens.specimens(90, "bf16", 96, 384) if s.name == "ffn_forward")
inspected = ahead_of_time.compile_for(specimen, "cuda", 90)
assert inspected.hash == launched.hash  # under which Triton keeps it
"""


@pytest.mark.parametrize(
    "calls", [FUSIONS, BLOCKS, INSPECTED], ids=["fusions", "blocks", "inspected"]
)
def test_batch_and_tokens_are_not_compiled_in(calls: str) -> None:
    pytest.importorskip("triton")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", HEAD + calls], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr

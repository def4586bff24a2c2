"""The launcher's direct launches: the right kernel, with the arguments that Triton would pass.

Tests run in separate processes, as tests/no_device.py requires.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_triton_launches import run_without_a_device

pytest.importorskip("triton")

# Our key distinguishes kernels exactly as Triton's does: for all kinds of arguments, equal keys of
# ours mean equal keys of Triton's, and vice versa.
KEYS = """
import collections, random
import no_device
import torch, triton
from crossvit_kernels import FusionWeights
from crossvit_kernels.gpu import launcher
from crossvit_kernels.gpu.tables import Candidate, Candidates
from crossvit_kernels.ops.attention_core import triton_kernels as core
from crossvit_kernels.ops.attention_core.configs import Shape
from crossvit_kernels.ops.cross_attention import triton_forward, triton_backward
from crossvit_kernels.ops.cross_attention.configs import FusionShape

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.bool

def tensor(random):
    if random.random() < 0.1:
        return None
    dtype = random.choice(DTYPES) if random.random() < 0.2 else torch.bfloat16
    offset = random.choice((1, 2, 3, 7, 8)) if random.random() < 0.2 else 0
    made = torch.empty(16, dtype=dtype)[offset:]
    return torch.nn.Parameter(made, dtype != torch.bool) if random.random() < 0.5 else made

SIZES = 0, 1, 2, 8, 15, 16, 48, 2**31 - 1, 2**31, 2**31 + 16, 2**40
def size(random):
    return random.choice(SIZES) if random.random() < 0.3 else random.choice(SIZES[:6])

SHAPES = [Shape(3, 48, 16, 16, 16, split, True, "ieee") for split in (32, 64, 32)]
FUSIONS = [FusionShape(32, 48, 3, images, 64, 64, "ieee") for images in (1, 2, 1)]

def check(kernel, *constants, sure=150):
    names = [p.name for p in kernel.params]
    num_tensors = sum(name.endswith("_ptr") for name in names)
    num_sizes = sum(p.do_not_specialize for p in kernel.params)
    weights = sum(name == "w" for name in names)
    triton_keys, our_keys = collections.defaultdict(set), collections.defaultdict(set)
    *_, binder = kernel.device_caches[0]
    draw = random.Random(0)
    # Most calls differ in one argument from an ordinary call.
    usual = [torch.empty(16).bfloat16() for _ in range(num_tensors + 18 * weights)]
    for i in range(4 * sure):
        tensors, sizes = list(usual), [64] * num_sizes
        if i < sure:
            tensors = [tensor(draw) for _ in tensors]
            sizes = [size(draw) for _ in sizes]
        elif i % 2:
            tensors[draw.randrange(len(tensors))] = tensor(draw)
        else:
            sizes[draw.randrange(len(sizes))] = size(draw)
        ends = range(num_tensors, num_tensors + 18 * weights, 18)
        w = tuple(FusionWeights(*tensors[start : start + 18]) for start in ends)
        tensors = tuple(tensors[:num_tensors])
        values = tuple(draw.choice(c) for c in constants)
        options = {"num_warps": draw.choice((4, 8)), "num_stages": draw.choice((1, 2))}
        device = draw.choice((0, 1))
        number = (draw.choice((1e-6, 0.0, 1.0, 16.0)),) if "eps" in names else ()
        candidates = Candidates((Candidate(values[:1], options),))
        given = tensors, tuple(sizes), candidates, values[1:], w
        key, pointers = launcher._key(kernel, device, *given)
        flat = [p for group in pointers for p in (group if isinstance(group, tuple) else [group])]
        assert flat == [0 if t is None else t.data_ptr() for g in (tensors, *w) for t in g]
        arguments = *tensors, *w, *sizes, *number, *values
        _, specialization, parsed_options = binder(*arguments, debug=False, **options)
        triton_key = device, tuple(specialization), str(parsed_options)
        triton_keys[key].add(triton_key)
        our_keys[triton_key].add(key)
    assert all(len(keys) == 1 for keys in triton_keys.values()), kernel.__name__
    assert all(len(keys) == 1 for keys in our_keys.values()), kernel.__name__
    assert len(triton_keys) > sure, len(triton_keys)

S, F, ALIGN, ADD = SHAPES, FUSIONS, (8,), (False, True)
check(triton_forward.fusion_forward, S, F)
check(triton_forward.fusion_after, F)
check(triton_backward.fusion_backward, S, F)
check(triton_backward.fusion_backward_before, ALIGN, F)
check(core.attention_core_backward, S, ADD)
check(core.attention_core_merge, S)
"""

# Parameters are in start()'s order, and no size is specialised on.
PARAMETERS = """
import no_device
import triton
from crossvit_kernels.ops.attention_core import triton_kernels as core
from crossvit_kernels.ops.cross_attention import triton_backward, triton_forward
from crossvit_kernels.ops.layernorm_ffn import triton_kernels as ffn
from crossvit_kernels.ops.layernorm_msa import triton_kernels as msa
from crossvit_kernels.ops.common import triton_linear_kernels as layers

def kind(parameter):
    if parameter.is_constexpr:
        return 4
    if parameter.name.endswith("_ptr"):
        return 0
    if parameter.name == "w":
        return 1
    if parameter.name == "eps":
        return 3
    assert parameter.do_not_specialize, parameter.name
    return 2

modules = core, triton_forward, triton_backward, ffn, msa, layers
kernels = {
    k for m in modules for k in vars(m).values()
    if isinstance(k, triton.JITFunction) and k.do_not_specialize
}
assert len(kernels) > 15, kernels
for kernel in kernels:
    kinds = [kind(parameter) for parameter in kernel.params]
    assert kinds == sorted(kinds), (kernel.__name__, kinds)
"""

# The second of two equal calls launches directly, with the arguments of Triton's first launch.
ARGUMENTS = """
from no_device import launches
import json, torch, triton
from crossvit_kernels import FusionInputs, FusionWeights
from crossvit_kernels.gpu import launcher
from crossvit_kernels.ops.attention_core.reference import CoreInputs
from crossvit_kernels.ops.cross_attention import triton_forward
from fusion_cases import make_weights
from crossvit_kernels.inspect.compile_cases import both_ways
from crossvit_kernels.ops.operator import OPERATIONS

kernel = triton_forward.fusion_forward
looked, run = [], kernel.run
def watched(*args, warmup, **kwargs):
    looked.extend([1] * (not warmup))  # Triton compiles without a launch, too
    return run(*args, warmup=warmup, **kwargs)
kernel.run = watched

def call(eps=1e-6):
    launches.clear()
    start(kernel, (2, 1, 1), tensors, sizes, candidates, weights=(w,), eps=eps)
    (launch,) = launches
    return launch

start = launcher.start
captured = []
def capture(*args, **kwargs):
    captured.append((args, kwargs))
    return start(*args, **kwargs)
launcher.start = capture
w = FusionWeights(*(torch.nn.Parameter(t.bfloat16()) for t in make_weights(32, 48)))
cls, x = torch.randn(2, 32).bfloat16(), torch.randn(2, 9, 48).bfloat16()[:, 1:]
scale = torch.ones(2)
for given, biases in ((None, True), (scale, True), (None, False)):
    given_w = w if biases else w._replace(q_bias=None, k_bias=None, v_bias=None)
    both_ways(OPERATIONS["cross_attention_fusion"], FusionInputs(cls, x, given_w, 3, given), 1e-6)
mask = torch.ones(2, 8, dtype=torch.bool)
both_ways(OPERATIONS["attention_core"], CoreInputs(torch.randn(2, 3, 48), x, mask, x[:, 0]), 1e-6)
assert len(captured) == len(launches) == 8
for (args, kwargs), expected in zip(captured, list(launches), strict=True):
    looked.clear()
    start(*args, **kwargs)
    assert launches[-1] == expected and not looked

# What is not as it was goes to another kernel, or by Triton's way.
(_, grid, tensors, sizes, candidates), kwargs = captured[0]
same = call()
assert not looked and call(eps=0)[-3] == 0.0 and not looked  # an int is no other kernel
sizes = (2**31, *sizes[1:])
assert call()[2] != same[2] and len(looked) == 1
sizes = (2, *sizes[1:])
tensors = (torch.empty(65).bfloat16()[1:].view(2, 32), *tensors[1:])
assert call()[2] != same[2] and len(looked) == 2
assert call()[2] != same[2] and len(looked) == 2
tensors = captured[0][0][2]
assert call() == same and len(looked) == 2

# Parameters that are replaced, moved or cast in place are seen.
w.q_weight.data = torch.empty(48, 49).bfloat16()[:, 1:]
moved = call()
assert moved[2] != same[2] and moved[3 + 5][6] == w.q_weight.data_ptr() and len(looked) == 3
w.q_weight.data = torch.empty(48, 48).bfloat16()
moved = call()
assert moved[2] == same[2] and moved[3 + 5][6] == w.q_weight.data_ptr() and len(looked) == 3
w.q_weight.data = w.q_weight.data.half()
assert call()[2] != same[2] and len(looked) == 4

# Settings that Triton looks at, hooks and other backends.
for there, name, value in (
    (triton.knobs.runtime, "debug", True),
    (triton.knobs.compilation, "instrumentation_mode", "consan"),
):
    before = getattr(there, name)
    setattr(there, name, value)
    assert launcher.changes_kernels(kernel)
    setattr(there, name, before)
triton.knobs.runtime.debug = True
call(), call()
assert len(looked) == 6
triton.knobs.runtime.debug = False
call()
assert len(looked) == 6
hook = lambda metadata: None
for chain in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
    chain.add(hook)
    call()
    assert launcher.changes_kernels(kernel) and looked.pop() and len(looked) == 6
    chain.remove(hook)
    call()
    assert len(looked) == 6

# A hook of the cache gets all constants as JSON.
cached = []
triton.knobs.runtime.jit_cache_hook = lambda **kwargs: cached.append(kwargs["compile"])
kernel.device_caches.clear(), launcher._known.clear()
call()
triton.knobs.runtime.jit_cache_hook = None
constants = json.loads(cached[0]["specialization_data"])["constant_vals"]
assert any(isinstance(value, dict) and value.get("cls_dim") == 32 for value in constants)

hooked = []
kernel.add_pre_run_hook(lambda *args, **kwargs: hooked.append(1))
call(), call()
assert len(hooked) == 2
_, compiled = next(iter(launcher._known.values()))
assert launcher.can_launch_directly(compiled)
amd = type(compiled.metadata.target)("hip", "gfx942", 64)
compiled.metadata = compiled.metadata._replace(target=amd)
assert not launcher.can_launch_directly(compiled) and not launcher.can_launch_directly(None)
"""


# The first candidate that does not spill and fits is launched, and searched for once.
CANDIDATES = """
import no_device
from no_device import launches
import dataclasses, torch, triton
from crossvit_kernels import FfnWeights, supported
from crossvit_kernels.gpu import launcher, tables
from crossvit_kernels.ops.common.configs import RowTable, RowTile
from crossvit_kernels.ops.layernorm_ffn import configs, triton as ffn, triton_kernels
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs
from block_cases import ffn_weights

FFN = RowTable("ffn", {2: ((48, RowTile(128, 64, 32, 8, 2)),)}, fused_up_to=48)
configs.FFN = FFN
kernel = triton_kernels.ffn_forward
warmups, warmup = [], kernel.warmup
def watched(*args, **kwargs):
    warmups.append(kwargs["num_stages"])
    return warmup(*args, **kwargs)
kernel.warmup = watched

x = torch.randn(64, 200, 48).bfloat16()
w = FfnWeights(*(t.bfloat16() for t in ffn_weights(48, 96)))
PROGRAMS = {rows: 64 * 200 // rows for rows in (128, 64, 32)}

def launched(save=True):
    launches.clear()
    ffn.forward(FfnInputs(x, w, None), 1e-6, "fast" if save else "")
    (name, grid, function, *_), = launches
    assert name == "ffn_forward"
    return grid[0], function

def forget():
    launcher._known.clear()
    kernel.device_caches.clear()
    warmups.clear()

# What a kernel is said to spill, in the order in which kernels are loaded.
def spill(*words):
    forget()
    left = list(words)
    no_device.spilled = lambda name, shared: left.pop(0) if left else 0

spill()
assert launched() == launched() and launched()[0] == PROGRAMS[128] and len(warmups) == 1
spill(6)
first = launched()
assert first[0] == PROGRAMS[64] and len(warmups) == 2
assert launched() == first and len(warmups) == 2  # remembered
spill(0, 18)  # another specialization has its own choice
assert launched()[0] == PROGRAMS[128] and launched(save=False)[0] == PROGRAMS[64]
assert launched()[0] == PROGRAMS[128] and len(warmups) == 3
spill(9, 9, 9, 2, *[9] * 9)  # where all spill, the fewest
grid, _ = launched()
assert len(warmups) == 5 and warmups[3] == 1 and grid == PROGRAMS[64], (grid, warmups)

# What does not fit shared memory.
spill()
from triton.compiler import compiler
in_all = compiler.max_shared_mem(0)
launched()
(_, compiled), = launcher._known.values()
spill()
compiler.max_shared_mem = lambda device: compiled.metadata.shared - 1
assert launched()[0] == PROGRAMS[64] and len(warmups) == 2, warmups
compiler.max_shared_mem = lambda device: 100
forget()
try:
    launched()
    raise SystemExit("launched what does not fit")
except triton.OutOfResources:
    pass
compiler.max_shared_mem = lambda device: in_all

# Launch even if the search fails or a candidate does not compile.
spill(6)
init, compiler.CompiledKernel._init_handles = compiler.CompiledKernel._init_handles, None
kernel.warmup = lambda *args, **kwargs: triton.compiler.CompiledKernel  # of which nothing is known
compiler.CompiledKernel._init_handles = init
assert launched()[0] == PROGRAMS[128]
def failing(*args, num_stages, **kwargs):
    if num_stages == 2:
        raise RuntimeError("PTXAS error")
    return watched(*args, num_stages=num_stages, **kwargs)
kernel.warmup = failing
spill()
assert launched()[0] == PROGRAMS[128] and warmups == [1]
def never(*args, **kwargs):
    raise RuntimeError("no such method")
kernel.warmup = never
spill()
assert launched()[0] == PROGRAMS[128]
kernel.warmup = watched

# What was measured runs although it spills, and so does the only one.
spill(6)
tables.tuned.configuration = lambda kind, key: RowTile(32, 32, 32, 8, 2)
tables.forget()
assert launched()[0] == PROGRAMS[32] and len(warmups) == 1
spill(6)
with FFN.only(RowTile(64, 32, 32, 8, 1)):
    assert launched()[0] == PROGRAMS[64] and not warmups

# On an untested Triton, every launch is Triton's own.
spill()
supported.triton_is_tested = lambda: False
looked, run = [], kernel.run
def seen(*args, warmup, **kwargs):
    looked.append(warmup)
    return run(*args, warmup=warmup, **kwargs)
kernel.run = seen
launched(), launched(), launched()
assert looked == [True, False, False, False], looked
supported.triton_is_tested = lambda: True
launched(), launched(), launched()
assert looked == [True, False, False, False, False], looked
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(KEYS, id="keys"),
        pytest.param(PARAMETERS, id="parameters"),
        pytest.param(ARGUMENTS, id="arguments", marks=pytest.mark.slow),
        pytest.param(CANDIDATES, id="candidates", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_kernel_is_started(script: str) -> None:
    run_without_a_device(script)


@pytest.mark.slow
def test_host_time_is_measured(tmp_path: Path) -> None:
    program = Path(__file__).resolve().parents[1] / "bench/host_bench.py"
    results = tmp_path / "host.json"
    command = [sys.executable, str(program), "--rounds", "1", "--json", str(results)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(results.read_text())
    assert {"commit", "dirty", "date", "device", "dtype"} <= set(document["environment"])
    assert set(document["triton_us"]) == set(document["ours_us"])
    assert all(
        us > 0 for times in ("triton_us", "ours_us", "cuda_us") for us in document[times].values()
    )

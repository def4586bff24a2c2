"""The command that inspects GPU kernels, and what it has to find."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from crossvit_kernels.inspect import block_code, extension_code, machine_code


def inspect(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "crossvit_kernels.inspect", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )


@pytest.fixture(scope="module")
def triton_compiles() -> None:
    pytest.importorskip("triton")
    try:
        machine_code.disassembler()
    except FileNotFoundError as error:
        pytest.skip(str(error))


SPILLS = (
    "on this version of Triton every candidate of the kernel spills registers or needs too much "
    "shared memory: its table in crossvit_kernels/gpu needs a smaller one"
)


def run_python(code: str, *arguments: str) -> str:
    """Run code in a process where kernels are compiled; return its output."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def check_compiled(*arguments: str) -> list[dict]:
    result = inspect(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    return check(result.stdout)


def check(output: str) -> list[dict]:
    """Check what would be launched: no spills, tensor cores, shared memory that fits."""
    rows = json.loads(output)
    for row in rows:
        assert row["spills"] <= allowed_spills(row["kernel"], row["config"], row["arch"]), (
            SPILLS,
            row,
        )
        most = machine_code.SHARED_BYTES_OF_PROGRAM[row["arch"]]
        assert row["shared_bytes"] <= most, (SPILLS, row)
        assert 0 < row["occupancy"] <= 1 and 0 < row["registers"] <= 255, row
        if has_products(row):
            assert row["tensor_core_instructions"] > 0, row
    return rows


def allowed_spills(kernel: str, config: str, arch: int) -> int:
    """Return the instructions of local memory a kernel may have: few, and only some of CUDA's.

    Their bytes of stack and the reasons are in test_cuda_code.py.
    """
    if kernel.endswith(" (CUDA)") and config.startswith("fp32"):
        return 56
    return 16 if kernel == "cross_attention_forward (CUDA)" and arch == 80 else 0


def has_products(row: dict) -> bool:
    return row["kernel"].removesuffix(" (CUDA)") not in WITHOUT_PRODUCTS


WITHOUT_PRODUCTS = {
    *("attention_core_merge", "normalize", "norm_backward"),
    *("layer_norm_forward", "layer_norm_backward"),
}
KERNELS = {
    "attention_core_forward",
    "attention_core_merge",
    "attention_core_backward",
    *(
        f"fusion_{name}"
        for name in (
            *("forward", "before", "after"),
            *("backward", "backward_before", "backward_after"),
        )
    ),
    *("normalize", "norm_linear", "linear", "norm_backward"),
    *("attention", "attention_backward_queries", "attention_backward_keys"),
    *("ffn_forward", "ffn_hidden_backward"),
}


# Kernels that need most registers, with most and with fewest tensors, in large tiles.
A_FEW = """
import dataclasses, json
from crossvit_kernels.inspect import ahead_of_time, compile_cases
BLOCKS = (192, 6, 576), (384, 6, 1152)
cases = compile_cases.compile_cases(90, ["bf16"], [(192, 96, 3)], BLOCKS, ["auto"])
def size(case):
    return len(case.absent), case.specialization.candidates[0].constants[0].rows
chosen = []
for name in ("ffn_forward", "ffn_hidden_backward", "norm_linear", "attention_core_forward"):
    alike = sorted((s for s in cases if s.name == name), key=size)
    chosen += {s.absent: s for s in (alike[0], alike[-1])}.values()
reports = ahead_of_time.reports([(case, 90) for case in chosen], 2)
print(json.dumps([dataclasses.asdict(report) for report in reports]))
"""


@pytest.mark.usefixtures("triton_compiles")
def test_what_kernels_compile_to() -> None:
    """The wider blocks of CrossViT-15 and the tokens of CrossViT-Ti, on an H100."""
    rows = check(run_python(A_FEW))
    assert len(rows) == 8 and all(row["wide_loads"] > 0 for row in rows)
    barest = {row["kernel"]: row["absent"] for row in rows}
    assert {"mean", "rstd"} <= {*barest["ffn_forward"]} & {*barest["norm_linear"]}  # inference


# Kernels of CrossViT-15 that ask for most shared memory.
SMALL_SHARED_MEMORY = """
import dataclasses, json, sys
from crossvit_kernels.inspect import ahead_of_time, compile_cases
BLOCKS = (192, 6, 576), (384, 6, 1152)
sm = int(sys.argv[1])
cases = compile_cases.compile_cases(sm, ["bf16"], [(192, 384, 6)], BLOCKS, ["auto"])
names = "ffn_forward", "norm_linear", "attention_core_backward", "fusion_forward"
cases = [next(case for case in cases if case.name == name) for name in names]
reports = ahead_of_time.reports([(case, sm) for case in cases], 2)
print(json.dumps([dataclasses.asdict(report) for report in reports]))
"""


@pytest.mark.usefixtures("triton_compiles")
@pytest.mark.parametrize(
    "sm",
    [pytest.param("89", marks=pytest.mark.slow), pytest.param("120", marks=pytest.mark.exhaustive)],
)
def test_devices_with_99_kb_of_shared_memory(sm: str) -> None:
    """RTX 4090 and L4, RTX 5090: smaller candidates run where the preferred one does not fit."""
    assert len(check(run_python(SMALL_SHARED_MEMORY, sm))) == 4


def test_every_kernel_is_inspected() -> None:
    """Every Triton kernel, each specialization once, with the tensors of inference and training."""
    pytest.importorskip("triton")
    code = (
        "import json\n"
        "from crossvit_kernels.inspect import compile_cases\n"
        "found = compile_cases.compile_cases(90, ['bf16'])\n"
        "assert len(found) == len({(s.name, *s.specialization[1:]) for s in found})\n"
        "assert len(compile_cases.extremes(found)) < len(found) / 1.3\n"
        "print(json.dumps([(s.name, s.absent) for s in found]))\n"
    )
    absent_tensors = json.loads(run_python(code))
    absent: dict[str, set[tuple[str, ...]]] = {name: set() for name in KERNELS}
    for name, tensors in absent_tensors:
        absent[name].add(tuple(tensors))
    statistics = ("mean", "rstd")
    block = ("scale", "layer_scale")
    narrow = {(*block, *statistics, "hidden"), (*block, "hidden"), ("layer_scale", "hidden")}
    assert absent["ffn_forward"] == {*narrow, block, block[1:]}
    of_tokens = {("cls", *statistics), ("cls",), statistics, ()}
    assert absent["norm_linear"] == {(*t, "product") for t in of_tokens} | {("cls",)}
    assert absent["attention"] == {("mask", "lse"), ("mask",)}
    residual = {("cls", *block), ("cls", *block[1:]), block, block[1:]}
    assert absent["linear"] >= {(*t, "product") for t in residual}
    assert ("x", "cls", *block) in absent["linear"]
    forward = absent["attention_core_forward"]
    masked = ("gain", "extra", "mask")
    assert {(*masked, "peak"), masked, ("gain", "peak"), ("mask", "peak")} <= forward
    assert all(absent.values())


@pytest.mark.slow
@pytest.mark.usefixtures("triton_compiles")
@pytest.mark.parametrize("kernel", ["fusion_", "attention", "linear", "norm", "ffn"])
def test_what_models_compile_to(kernel: str) -> None:
    """With most and fewest tensors, at all widths; attention, slow to compile, at CrossViT-15's."""
    widths = ("--channels", "192,384") if kernel in ("fusion_", "attention") else ()
    check_compiled("--arch", "90", "--dtype", "bf16", "--quick", "--kernel", kernel, *widths)


# The first cross-attention of several, the last, and one between equal widths, in one kernel.
IDENTITIES = """
import dataclasses, json
from crossvit_kernels.inspect import ahead_of_time, compile_cases
cases = compile_cases.compile_cases(90, ["bf16"], [(384, 192, 6)], [], ["auto"], ["f", "g", "fg"])
cases = [case for case in cases if case.name in ("fusion_forward", "fusion_backward")]
reports = ahead_of_time.reports([(case, 90) for case in cases], 2)
print(json.dumps([dataclasses.asdict(report) for report in reports]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("triton_compiles")
def test_fusions_without_f_or_g_do_not_spill() -> None:
    rows = check(run_python(IDENTITIES))
    layers = ({"proj_weight"}, {"back_weight"}, {"proj_weight", "back_weight"})
    found = [{*row["absent"]} & layers[2] for row in rows if row["kernel"] == "fusion_backward"]
    assert all(layer in found for layer in layers)


# What other vision transformers have, at DeiT-S's width.
OPTIONS = """
import dataclasses, json, sys
from crossvit_kernels.inspect import ahead_of_time, compile_cases
BLOCKS = (192, 6, 768), (384, 6, 1536)
cases = compile_cases.compile_cases(
    90, ["bf16"], [], BLOCKS, ["auto", "fused"], options=sys.argv[1:]
)
before = compile_cases.compile_cases(90, ["bf16"], [], BLOCKS, ["auto", "fused"])
known = {(c.name, *c.specialization[1:]) for c in before}
cases = [c for c in cases if (c.name, *c.specialization[1:]) not in known]
cases = compile_cases.extremes(cases)
reports = ahead_of_time.reports([(case, 90) for case in cases], 2)
print(json.dumps([dataclasses.asdict(report) for report in reports]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("triton_compiles")
@pytest.mark.parametrize(
    "option", ["gelu_tanh", "quick_gelu", "silu", "layer_scale", "key_mask", "no_bias"]
)
def test_options_of_blocks_do_not_spill(option: str) -> None:
    rows = check(run_python(OPTIONS, option))
    expected = {"ffn_forward", "ffn_hidden_backward"}
    if option == "layer_scale":
        expected = {"ffn_forward", "linear"}
        assert all("layer_scale" not in r["absent"] for r in rows if r["kernel"] in expected)
    elif option == "key_mask":
        expected = {name for name in KERNELS if name.startswith("attention_b")} | {"attention"}
    elif option == "no_bias":
        expected |= {"norm_linear", "linear"}
    assert expected <= {row["kernel"] for row in rows}


# Heads of ViT-S/16 with 8 heads, SigLIP So400m, ViT-H, ViT-g and others.
HEADS = """
import dataclasses, json, sys
from crossvit_kernels.inspect import ahead_of_time, compile_cases
blocks = [(384, 8, 1), (1152, 16, 1), (1280, 16, 1), (1408, 16, 1), (1536, 16, 1), (1024, 8, 1)]
cases = compile_cases.compile_cases(90, sys.argv[1:], [], blocks, ["auto"])
cases = compile_cases.extremes([case for case in cases if case.name.startswith("attention")])
reports = ahead_of_time.reports([(case, 90) for case in cases], 2)
print(json.dumps([dataclasses.asdict(report) for report in reports]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("triton_compiles")
def test_wide_heads_do_not_spill() -> None:
    """Padded to powers of two."""
    rows = check(run_python(HEADS, "bf16"))
    assert {row["kernel"] for row in rows} == {
        n for n in KERNELS if n.startswith("attention_b")
    } | {"attention"}


@pytest.mark.exhaustive
@pytest.mark.usefixtures("triton_compiles")
@pytest.mark.parametrize("arch", ["80", "89", "90", "100", "120"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kernel", ["fusion_", "attention", "linear", "norm", "ffn"])
def test_what_kernels_compile_to_at_all_widths(kernel: str, dtype: str, arch: str) -> None:
    """All specializations in bfloat16 on sm_90; else those with most and with fewest tensors."""
    forms = () if (arch, dtype) == ("90", "bf16") else ("--quick",)
    check_compiled("--arch", arch, "--dtype", dtype, "--kernel", kernel, *forms)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("triton_compiles")
def test_portable_to_amd() -> None:
    """The kernels compile for gfx942; nothing more is known."""
    code = (
        "from crossvit_kernels.inspect import compile_cases\n"
        "from crossvit_kernels.inspect.ahead_of_time import compile_for\n"
        "widths, blocks = [(64, 96, 3)], [(96, 3, 288)]\n"
        "cases = compile_cases.compile_cases(0, ['bf16'], widths, blocks, ['auto'])\n"
        "for s in {s.name: s for s in cases}.values():\n"
        "    print(s.name, len(compile_for(s, 'hip', 'gfx942').asm['amdgcn']))\n"
    )
    printed = run_python(code)
    for kernel in (
        "fusion_backward",
        "attention_core_forward",
        "attention_backward_keys",
        "ffn_forward",
    ):
        assert f"{kernel} " in printed


@pytest.mark.slow
@pytest.mark.usefixtures("triton_compiles")
def test_inspect_prints_a_table() -> None:
    options = "--arch", "90", "--channels", "96,192", "--kernel", "core_forward", "--quick"
    result = inspect(*options)
    assert result.returncode == 0, result.stderr
    header, row, *_ = result.stdout.splitlines()
    assert header.split()[:2] == ["kernel", "configuration"]
    assert row.startswith("attention_core_forward ") and "bf16 C 96" in row
    first, *progress = result.stderr.splitlines()
    assert "kernels on Triton " in first
    # What the CUDA kernels lack may follow.
    assert any(re.match(r"inspect: (\d+) of \1, \d+ s", line) for line in progress)
    assert inspect("--arch", "75").returncode == 2
    assert inspect("--dtype", "fp8").returncode == 2


@pytest.mark.slow
@pytest.mark.usefixtures("triton_compiles")
def test_what_is_passed_over_is_shown() -> None:
    code = (
        "import sys\n"
        "from crossvit_kernels.inspect.__main__ import main\n"
        "from crossvit_kernels.ops.common.configs import RowTile\n"
        "from crossvit_kernels.ops.layernorm_ffn.configs import HIDDEN_BACKWARD\n"
        "config = RowTile(128, 128, 32, 8, 10)\n"
        "HIDDEN_BACKWARD.on_sm[90, 2] = {192: config}\n"  # the row of the table for 96 channels
        "options = '--arch', '90', '--channels', '96', '--kernel', 'ffn_hidden'\n"
        "sys.exit(main([*options, '--processes', '1']))\n"
    )
    _, _, row, passed_over, *_ = run_python(code).splitlines()  # few rows come first
    assert "64x128x32; 8 warps, 9 stages" in row
    expected = r"    passed over .* 10 stages: \d+ bytes of shared memory, .* do not fit"
    assert re.match(expected, passed_over)


@pytest.mark.usefixtures("triton_compiles")
def test_inspect_reads_the_extension() -> None:
    if 90 not in extension_code.targets():
        pytest.skip("the extension was built without CUDA, or not for sm_90")
    rows = check_compiled(
        *("--arch", "90", "--kernel", "cross_attention", "--channels", "96,192,768,1536"),
        *("--dtype", "bf16,fp32"),
    )
    configs = {row["config"] for row in rows if row["kernel"] == "cross_attention_forward (CUDA)"}
    # One in float32, with the widest block that fits sm_90's shared memory.
    bf16 = {"bf16 C <= 384, 8 rows", "bf16 C <= 1536, 8 rows"}
    assert configs == {*bf16, "fp32 C <= 1184, 8 rows"}
    assert all(row["wide_loads"] > 0 and row["shared_bytes"] > 0 for row in rows)


@pytest.mark.slow
def test_the_kernels_of_blocks_do_not_spill() -> None:
    if 90 not in extension_code.targets():
        pytest.skip("the extension was built without CUDA, or not for sm_90")
    blocks = [(192, 6, 576), (768, 12, 3072)]
    rows = list(block_code.reports(90, ["bf16", "fp16", "fp32"], blocks, ""))
    # LayerNorm and its backward, by width; four kinds of linear layers; attention, by head width.
    assert len(rows) == len({(row.kernel, row.config) for row in rows}) == 3 * (4 + 4 + 6)
    assert {row.kernel.removesuffix(" (CUDA)") for row in rows} == set(block_code.NAMES)
    assert all(row.spills <= allowed_spills(row.kernel, row.config, 90) for row in rows)
    assert all(0 < row.occupancy <= 1 for row in rows)
    products = [row for row in rows if "layer_norm" not in row.kernel]
    assert all(row.tensor_core_instructions and row.wide_loads for row in products)


@pytest.mark.slow
@pytest.mark.usefixtures("triton_compiles")
def test_inspect_without_cuda_kernels() -> None:
    code = (
        "from crossvit_kernels import extension\n"
        "from crossvit_kernels.inspect.__main__ import main\n"
        "extension.cuda_kernels = None\n"
        "raise SystemExit(main(['--kernel', 'cross_attention', '--json']))\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0 and json.loads(result.stdout) == []
    assert "no CUDA kernels: " in result.stderr


def test_occupancy() -> None:
    assert machine_code.occupancy(32, 0, 4, 90) == 1.0
    assert machine_code.occupancy(255, 1024, 8, 90) == 0.125  # by registers
    assert machine_code.occupancy(32, 120 * 1024, 4, 90) == 1 / 16  # by shared memory

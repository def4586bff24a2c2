"""The executor of PTX: single instructions against NumPy, and faults that it has to find."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import ptx
import ptx_cuda
import pytest
import torch
from ptx.memory import passes
from ptx_cases import CASES
from ptx_text import BULK, CLUSTER, COPIES, FAULTS, IN_SOME_ORDERS, REVERSE, kernel, warp_group

from crossvit_kernels import supported

_SHARED_BYTES = 4096


def run(text: str, data: np.ndarray, order: int = 0, ctas: int = 1) -> np.ndarray:
    """Run a kernel of (out, in) in CTAs of 128 threads; return out, as large as in."""
    (code,) = ptx.kernels(text).values()
    memory = ptx.Memory()
    source, out = np.ascontiguousarray(data), np.zeros_like(data)
    arguments = [np.uint64(memory.add(array)) for array in (out, source)]
    ptx.run(code, (ctas,), 128, arguments, memory, _SHARED_BYTES, order, cluster=ctas)
    return out


def unary(body: str, x: np.ndarray) -> np.ndarray:
    """Apply instructions from %r2 to %r3 to 128 words."""
    address = "mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd2, %rd3; add.s64 %rd5, %rd1, %rd3;"
    text = f"{address} ld.global.b32 %r2, [%rd4]; {body} st.global.b32 [%rd5], %r3;"
    return run(kernel(text), x.view(np.uint32))


def words(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, 128, dtype=np.uint32)


_INTEGER = {
    "add.s32 %r3, %r2, 0x7fffffff;": lambda x: x + np.uint32(0x7FFFFFFF),
    "mul.hi.u32 %r3, %r2, %r2;": lambda x: (x.astype(object) ** 2 >> 32).astype(np.uint32),
    "mul.hi.s32 %r3, %r2, 12345;": lambda x: (
        (x.view(np.int32).astype(object) * 12345 >> 32).astype(np.int32).view(np.uint32)
    ),
    "shr.s32 %r3, %r2, 40;": lambda x: (x.view(np.int32) >> 31).view(np.uint32),
    "shl.b32 %r3, %r2, 32;": lambda x: x * np.uint32(0),
    "bfe.s32 %r3, %r2, 5, 7;": lambda x: (x.view(np.int32) << 20 >> 25).view(np.uint32),
    "bfe.u32 %r3, %r2, 5, 7;": lambda x: x >> 5 & 127,
    "bfi.b32 %r3, %r2, 0, 8, 8;": lambda x: (x & 255) << 8,
    "prmt.b32 %r3, %r2, 0, 0x0123;": lambda x: x.byteswap(),
    "div.s32 %r3, %r2, 7;": lambda x: np.fix(x.view(np.int32) / 7).astype(np.int32).view(np.uint32),
    "lop3.b32 %r3, %r2, 0xff00ff, 0x12345678, 0x96;": lambda x: (
        x ^ np.uint32(0xFF00FF ^ 0x12345678)
    ),
    "popc.b32 %r3, %r2;": np.bitwise_count,
    "shf.l.wrap.b32 %r3, %r2, %r2, 9;": lambda x: x << 9 | x >> 23,
    "{ .reg .b16 a, b; mov.b32 {a, b}, %r2; mov.b32 %r3, {b, a}; }": lambda x: x << 16 | x >> 16,
}


@pytest.mark.parametrize("body", _INTEGER)
def test_integers(body: str) -> None:
    x = words()
    assert (unary(body, x) == _INTEGER[body](x)).all()


def test_floats_are_rounded_once() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(128).astype(np.float32)
    body = "mov.b32 %f1, %r2; fma.rn.f32 %f2, %f1, %f1, 0f33800000; mov.b32 %r3, %f2;"
    exact = np.array([v + np.longdouble(2.0**-24) for v in x.astype(np.longdouble) ** 2])
    assert (unary(body, x).view(np.float32) == exact.astype(np.float32)).all()


@pytest.mark.parametrize("kind, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_to_16_bits(kind: str, dtype: torch.dtype) -> None:
    x = (
        np.random.default_rng(0).standard_normal(128) * 2.0 ** np.arange(-14, 16).repeat(5)[:128]
    ).astype(np.float32)
    body = f"mov.b32 %f1, %r2; cvt.rn.{kind}x2.f32 %r3, %f1, %f1;"
    expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
    got = unary(body, x)
    assert (got & 0xFFFF == expected).all() and (got >> 16 == expected).all()


def test_floats_are_rounded_down() -> None:
    x = np.random.default_rng(0).standard_normal(128).astype(np.float32)
    body = "mov.b32 %f1, %r2; fma.rm.f32 %f2, %f1, %f1, 0fBF800000; mov.b32 %r3, %f2;"
    exact = x.astype(np.longdouble) ** 2 - 1
    near = exact.astype(np.float32)
    expected = np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)
    assert (unary(body, x).view(np.float32) == expected).all()


def test_saturation() -> None:
    x = np.array([-1.5, 0.25, 1.5, np.nan] * 32, np.float32)
    body = "mov.b32 %f1, %r2; cvt.sat.f32.f32 %f2, %f1; mov.b32 %r3, %f2;"
    assert (unary(body, x).view(np.float32) == [0, 0.25, 1, 0] * 32).all()


def test_nan_and_subnormals() -> None:
    x = np.full(128, np.nan, np.float32)
    assert (
        unary("mov.b32 %f1, %r2; add.f32 %f2, %f1, %f1; mov.b32 %r3, %f2;", x) == 0x7FFFFFFF
    ).all()
    tiny = np.full(128, 1, np.uint32)
    assert (
        unary("mov.b32 %f1, %r2; add.ftz.f32 %f2, %f1, %f1; mov.b32 %r3, %f2;", tiny) == 0
    ).all()
    assert (unary("mov.b32 %f1, %r2; add.f32 %f2, %f1, %f1; mov.b32 %r3, %f2;", tiny) == 2).all()


def test_lanes_part_and_meet_again() -> None:
    body = """
    mov.b32 %r3, 0;
    and.b32 %r4, %r1, 7;
loop:
    setp.eq.u32 %p1, %r4, 0;
    @%p1 bra done;
    add.s32 %r3, %r3, %r2;
    sub.s32 %r4, %r4, 1;
    bra loop;
done:
    shfl.sync.bfly.b32 %r3, %r3, 1, 31, -1;
    """
    x = words()
    each = x * (np.arange(128, dtype=np.uint32) & 7)
    assert (unary(body, x) == each[np.arange(128) ^ 1]).all()


def test_matrices_against_numpy() -> None:
    """ldmatrix and mma.sync of 16 x 8 x 16, one result a warp."""
    body = """
    and.b32 %r2, %r1, 31;
    shl.b32 %r3, %r1, 2;
    and.b32 %r4, %r1, 96;
    shl.b32 %r4, %r4, 5;
    mul.wide.u32 %rd3, %r1, 16;
    add.s64 %rd4, %rd2, %rd3;
    ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd4];
    shl.b32 %r9, %r2, 4;
    add.s32 %r9, %r9, %r4;
    st.shared.v4.b32 [%r9], {%r5, %r6, %r7, %r8};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r9];
    ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r14, %r15}, [%r9];
    mov.f32 %f5, 0f00000000;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4},
        {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%f5, %f5, %f5, %f5};
    add.s64 %rd5, %rd1, %rd3;
    st.global.v4.f32 [%rd5], {%f1, %f2, %f3, %f4};
    """
    data = torch.randn(4, 4, 8, 8, dtype=torch.float32, device="cpu").bfloat16()
    raw = data.view(torch.int16).numpy().view(np.uint16)
    out = run(kernel(body), raw.reshape(-1).view(np.uint32)).view(np.float32).reshape(4, 32, 4)
    for warp in range(4):
        q = data[warp].float().numpy()
        a = np.block([[q[0], q[2]], [q[1], q[3]]])
        b = np.concatenate([q[0], q[1]])
        d = a @ b
        lane = np.arange(32)
        for n in range(4):
            expected = d[lane // 4 + 8 * (n // 2), lane % 4 * 2 + n % 2]
            assert np.allclose(out[warp, :, n], expected, rtol=1e-5, atol=1e-5)


def _expected(text: str, data: np.ndarray) -> np.ndarray:
    if text is REVERSE:
        return data[::-1]
    if text is COPIES:
        return data[:128][::-1] + data[128:][::-1]
    if text is BULK:
        return data[:128] + data[128:]
    return np.concatenate([data[128:], data[:128]])


def _data(text: str) -> np.ndarray:
    if text == warp_group():
        halves = (
            torch.randn(64 * 32, dtype=torch.float32, device="cpu").bfloat16().view(torch.int16)
        )
        return halves.numpy().view(np.uint32)
    return words() if text is REVERSE else np.concatenate([words(1), words(2)])


def _product(data: np.ndarray) -> np.ndarray:
    halves = torch.from_numpy(data.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
    d = halves[:1024].reshape(64, 16) @ halves[1024:1152].reshape(8, 16).T
    thread = np.arange(128)
    row, column = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
    return np.stack([d[row + 8 * (n // 2), column + n % 2] for n in range(4)], axis=1).reshape(-1)


def _check(text: str, original: str, order: int) -> None:
    data = _data(original)
    out = run(text, data, order, ctas=2 if original is CLUSTER else 1)
    if original == warp_group():
        assert np.allclose(out[:512].view(np.float32), _product(data), rtol=1e-5, atol=1e-5)
        return
    expected = _expected(original, data)
    assert (out[: expected.size] == expected).all()


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("text", [REVERSE, COPIES, BULK, CLUSTER, warp_group()], ids=range(5))
def test_right_kernels(text: str, order: int) -> None:
    _check(text, text, order)


def _is_found(name: str, order: int) -> bool:
    text, old, new = FAULTS[name]
    assert old in text
    try:
        _check(text.replace(old, new), text, order)
    except (ptx.Fault, AssertionError):
        return True
    return False


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str) -> None:
    """By a fault of the executor, or, where only an address inside is wrong, by wrong numbers."""
    found = [_is_found(name, order) for order in range(3)]
    assert any(found) if name in IN_SOME_ORDERS else all(found)


def test_races_need_no_unlucky_order() -> None:
    text, old, new = FAULTS["barrier left out"]
    with pytest.raises(ptx.Fault, match=r"line \d+, warp \d, CTA .* race|never written"):
        run(text.replace(old, new), words())


def test_unknown_instructions_are_named() -> None:
    with pytest.raises(ptx.Unknown, match=r"line \d+: dp4a"):
        run(kernel("dp4a.u32.u32 %r2, %r1, %r1, %r1;"), words())


@pytest.mark.parametrize(
    "step, size, extra", [(4, 4, 0), (8, 4, 1), (128, 4, 31), (0, 4, 0), (16, 16, 0)]
)
def test_bank_conflicts(step: int, size: int, extra: int) -> None:
    _, added = passes(np.arange(32) * step, size, np.arange(32))
    assert added == extra


def test_counters() -> None:
    (code,) = ptx.kernels(REVERSE).values()
    memory = ptx.Memory()
    # Of torch, which aligns to 64 bytes: the number of sectors depends on it.
    arrays = [torch.zeros(128, dtype=torch.int32, device="cpu").numpy() for _ in range(2)]
    arguments = [np.uint64(memory.add(array)) for array in arrays]
    counters = ptx.run(code, (1,), 128, arguments, memory, 512)
    assert counters["sectors"] == 2 * 128 * 4 // 32
    assert counters["global bytes"] == counters["shared bytes"] == 2 * 128 * 4
    assert counters["ld"] == 4 * 4 and counters["bank conflicts"] == 0


def launch(*arguments: str, script: str = "ptx_launches.py") -> subprocess.CompletedProcess[str]:
    """Run a program of this folder in a process whose Triton compiles."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    environment["PYTHONPATH"] = str(root)
    command = [sys.executable, str(root / "tests" / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _skip_without_fences() -> None:
    if (supported.installed_version("triton") or "").startswith("3.6."):
        pytest.skip("Triton 3.6 has no fence.proxy.async between cp.async and wgmma")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sm, dtype", [("80", "fp32"), ("80", "bf16"), ("90", "fp32"), ("90", "bf16"), ("90", "fp16")]
)
def test_triton_kernels(sm: str, dtype: str) -> None:
    """Every kernel and form (test_ptx_coverage.py), in two schedules, which give the same bits."""
    if (sm, dtype) == ("90", "bf16"):
        _skip_without_fences()
    done = launch("--backend", "triton", "--slow", "--sm", sm, "--dtypes", dtype)
    assert not done.returncode, done.stdout + done.stderr
    assert done.stdout.count(": ok") == sum(
        run == (int(sm), dtype) for case in CASES["triton"].values() for run in case.runs
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "form, faults",
    [
        ("plain", ["proxy fence left out", "phase inverted"]),
        ("wide residual", ["proxy fence left out"]),
    ],
)
def test_faults_in_the_gluon_kernel(form: str, faults: list[str]) -> None:
    """Each proxy fence left out is found, as the one was that an H100 missed."""
    done = launch(*faults, "--forms", form, script="ptx_gluon.py")
    assert not done.returncode, done.stdout + done.stderr
    assert len(re.findall(r"(\b[1-9]\d*) of \1\b", done.stdout)) == len(faults), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name, case in CASES["cuda"].items() if case.runs])
def test_cuda_kernels(case: str) -> None:
    """In two schedules, which give the same bits."""
    if reason := ptx_cuda.why_not():
        pytest.skip(reason)
    done = launch(case, "--backend", "cuda", "--slow")
    assert not done.returncode, done.stdout + done.stderr
    assert done.stdout.count(": ok") == len(CASES["cuda"][case].runs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, without, cause",
    [
        ("layernorm_ffn", r"bar\.sync|barrier\.sync", "never written|a race"),
        ("layernorm_ffn", r"cp\.async\.wait_group", "never written|a race"),
        ("attention_core", r"cp\.async\.wait_group", "a race"),
        ("cross_attention_fusion", r"barrier\.cluster\.\w+", "never written|a race"),
    ],
)
def test_faults_in_cuda_kernels(case: str, without: str, cause: str) -> None:
    if reason := ptx_cuda.why_not():
        pytest.skip(reason)
    arguments = ["--dtypes", "bf16", "--orders", "1", "--without", without]
    done = launch(case, "--backend", "cuda", *arguments)
    assert done.returncode and re.search(cause, done.stdout), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "without, cause",
    [
        (r"bar\.sync", "never written|a race"),
        (r"fence\.proxy\.async", "no fence.proxy.async"),
        (r"cp\.async\.wait_group", "a race|no fence.proxy.async"),
        (r"wgmma\.wait_group", "before wgmma.wait_group"),
    ],
)
def test_faults_in_triton_kernels(without: str, cause: str) -> None:
    _skip_without_fences()
    arguments = ["--sm", "90", "--dtypes", "bf16", "--orders", "1", "--without", without]
    done = launch("layernorm_ffn_split", "--backend", "triton", *arguments)
    assert done.returncode and re.search(cause, done.stdout), done.stdout + done.stderr

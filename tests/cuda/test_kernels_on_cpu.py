"""The library's CUDA kernels on a CPU: in random orders, under sanitizers, and with faults.

tests/ops checks their results in the fixed order.
"""

from __future__ import annotations

import concurrent.futures
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import host_build
import host_compiler
import kernel_cases
import kernel_faults
import pytest
import torch
from block_cases import ffn_weights, msa_weights
from core_cases import make
from fault import BUILDS, OVERFLOW, PLAIN, RACE, Build
from fusion_cases import fusion_and_gradients, make_weights
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels import FfnWeights, FusionWeights, MsaWeights
from crossvit_kernels.ops.cross_attention import cuda
from crossvit_kernels.ops.cross_attention.cuda import ClusterShape

pytestmark = pytest.mark.slow

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def in_any_order(cuda_device: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Assert that a function's results do not depend on the order of threads and copies."""
    if cuda_device != "cpu":
        pytest.skip("a GPU takes no orders")

    def check(results: Callable[[], tuple[Tensor, ...]]) -> None:
        expected = results()
        for seed in ("1", "2", "3"):
            monkeypatch.setenv("CROSSVIT_SHIM_SEED", seed)
            for a, e in zip(results(), expected, strict=True):
                assert torch.equal(a, e), seed
            monkeypatch.delenv("CROSSVIT_SHIM_SEED")

    return check


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(2, 150, 9, 48), (1, 70, 3, 400), (1, 40, 9, 784), (1, 1100, 2, 16)], ids=str
)
def test_core_in_any_order(
    in_any_order: Callable[..., None], sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """One, four and eight warps per group; several splits of an image."""
    inputs, mask = make(*sizes, dtype, extra=True, masked=True)
    leaves = [t.to(dtype).requires_grad_() for t in inputs if t is not None]

    def results() -> tuple[Tensor, ...]:
        u, x, extra = leaves
        m, lse = ck.attention_core(u, x, 1e-6, mask, extra, backend="cuda")
        return m, lse, *torch.autograd.grad(m.square().sum() + lse.sum(), leaves)

    in_any_order(results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("cluster_shape", "sizes"),
    [(ClusterShape(2, 2), (5, 64, 96, 3, 40)), (ClusterShape(4, 4), (3, 32, 400, 10, 20))],
    ids=str,
)
def test_fusion_in_any_order(
    in_any_order: Callable[..., None],
    cluster_shape: ClusterShape,
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "cluster_shape", lambda batch, sm: cluster_shape)
    batch, cls_dim, channels, heads, num_tokens = sizes
    weights = FusionWeights(*(w.to(dtype) for w in make_weights(cls_dim, channels)))
    cls, tokens = torch.randn(batch, cls_dim), torch.randn(batch, num_tokens, channels)
    inputs = cls.to(dtype), tokens.to(dtype)
    in_any_order(lambda: fusion_and_gradients(*inputs, weights, heads, "cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(2, 70, 80, 5), (1, 40, 64, 1)], ids=str)
def test_blocks_in_any_order(
    in_any_order: Callable[..., None], sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """Heads of up to 32 channels and up to 64."""
    batch, num_tokens, channels, heads = sizes
    x = torch.randn(batch, num_tokens, channels).to(dtype).requires_grad_()
    msa = MsaWeights(*(w.to(dtype).requires_grad_() for w in msa_weights(channels)))
    ffn = FfnWeights(*(w.to(dtype).requires_grad_() for w in ffn_weights(channels, 136)))

    def results() -> tuple[Tensor, ...]:
        y = ck.layernorm_msa(x, msa, heads, backend="cuda")
        z = ck.layernorm_ffn(y, ffn, backend="cuda")
        return z, *torch.autograd.grad(z.float().square().sum(), [x, *msa, *ffn])

    in_any_order(results)


# Runs a case in a build, with a seed and a fault.
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Compiles the programs; a call waits for the requested one."""
    if reason := host_build.why_not():
        pytest.skip(reason)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        pending = {
            build: pool.submit(kernel_faults.program, build)
            for build in BUILDS
            if host_compiler.why_not(build.sanitizer) is None
        }
        folder = tmp_path_factory.mktemp("cases")
        for case in kernel_cases.CASES:
            kernel_cases.write(case, folder / case)

        def run(
            case: str,
            build: Build = PLAIN,
            seed: int | None = None,
            fault: str | None = None,
        ) -> subprocess.CompletedProcess[str]:
            if build not in pending:
                pytest.skip(str(host_compiler.why_not(build.sanitizer)))
            number = [] if fault is None else [str(kernel_faults.NUMBERS[fault])]
            arguments = [str(folder / case), *number]
            return host_compiler.run(pending[build].result(), seed, arguments=arguments)

        yield run
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def broken_runs(run: Run, request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Any]]]:
    """Runs the faults of the selected tests, two at a time, in one order after another until the
    fault shows.
    """

    def broken(name: str) -> subprocess.CompletedProcess[str]:
        fault = kernel_faults.FAULTS[name]
        for seed in (None, *range(1, 10)):
            done = run(fault.case, fault.build, seed, name)
            if done.returncode:
                break
        return done

    wanted = [item for item in request.session.items if "broken_runs" in item.fixturenames]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        names = (item.callspec.params["name"] for item in wanted)
        yield {name: pool.submit(broken, name) for name in names}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("build", BUILDS, ids=str)
@pytest.mark.parametrize("case", kernel_cases.CASES)
def test_nothing_to_report(run: Run, case: str, build: Build) -> None:
    """Correct results, with the same bits in every order."""
    fixed = run(case)
    assert fixed.returncode == 0, fixed.stdout
    for seed in (None, 1) if build.sanitizer else (1, 2, 3):
        done = run(case, build, seed)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout == fixed.stdout


@pytest.mark.parametrize("name", kernel_faults.FAULTS)
def test_a_fault_is_caught(broken_runs: dict[str, Future[Any]], name: str) -> None:
    fault, done = kernel_faults.FAULTS[name], broken_runs[name].result()
    output = done.stdout + done.stderr
    assert done.returncode != 0 and fault.says in output, output
    if fault.says in (RACE, OVERFLOW):
        # Sanitizers do not find the lines of all functions; then the function's name says where.
        where = re.escape(str(kernel_faults.changed_files()))
        assert re.search(rf"{where}/\S+:\d+|crossvit::Tile<", output), output

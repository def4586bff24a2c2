"""Fixtures for all tests. Without a GPU, Triton's kernels run in its interpreter."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # read when torch is imported
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

import host_build
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
# A wrong kernel must fail a test, not be replaced by the reference.
os.environ["CROSSVIT_KERNELS_VERIFY"] = "off"

import crossvit_kernels as ck
from crossvit_kernels import extension, supported
from crossvit_kernels.calibration import measure, store
from crossvit_kernels.gpu import tables
from crossvit_kernels.ops.common import configs
from crossvit_kernels.ops.layernorm_ffn.configs import FFN
from crossvit_kernels.verify import state


@pytest.fixture(scope="session", autouse=True)
def _first_vector_math_on_one_thread() -> None:
    """If several threads at once compute the first float64 exp and log of a process, torch's vector
    library is sometimes off by 1e-10; a first call on one thread avoids this.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.rand(64, 512, dtype=torch.float64)
    torch.logsumexp(x, dim=-1).exp_().log_()
    x.softmax(dim=-1)
    torch.set_num_threads(threads)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Select tiers; run the longest tests first, so that all processes end at the same time."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("slow_on_cpu"):
                item.add_marker(pytest.mark.slow)
    longest = (
        "test_bits_do_not_tell",  # compiles the CUDA kernels for the CPU
        "test_it_sees_reads",
        "test_dry_run",
        "test_what_kernels_compile_to",
        "test_whole_model",
        "test_a_touched_file",
        "test_fuzz",
        "test_compiles_without_graph_breaks",
        "test_one_graph_for_every_batch",
    )
    items.sort(key=lambda item: not item.name.startswith(longest))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what to do about failed tests."""
    failed = [r for kind in ("failed", "error") for r in terminalreporter.stats.get(kind, ())]
    if not failed:
        return
    terminalreporter.section("what to do")
    alone = " ".join(shlex.quote(report.nodeid) for report in failed[:3])
    for line in (
        *(f"{warning}." for warning in supported.warnings()),
        "Run what failed by itself, where nothing competes for memory and time:",
        f"    pytest -n 0 -m '' {alone}",
        "If it fails again, please report it with what it prints and what",
        "    python -m crossvit_kernels",
        "prints. Until it is mended, CROSSVIT_KERNELS_BACKEND=reference runs plain PyTorch.",
    ):
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def cpu_backend() -> str:
    """The name of the compiled backend; skips with the reason if it is missing."""
    backends = ck.backends()
    if not backends["cpu"]:
        pytest.skip(backends.reasons["cpu"])
    return "cpu"


@pytest.fixture(scope="session")
def triton_device() -> str:
    """The device of Triton's kernels; skips with the reason if they cannot run."""
    backends = ck.backends()
    if not backends["triton"]:
        pytest.skip(backends.reasons["triton"])
    if not torch.cuda.is_available():
        import interpreter

        interpreter.install()
        # In the interpreter steps cost time, not registers: use fewer, larger ones.
        configs.PROGRAMS = 4
        larger = {448: configs.RowTile(32, 64, 128, 4, 1)}
        for table in (configs.NORM_LINEAR, FFN):
            table.on_sm[tables.sm(torch.device("cpu")), 4] = larger
        return "cpu"
    return "cuda"


@pytest.fixture(scope="session")
def _cuda_kernels() -> extension.CudaKernels:
    if extension.cuda_kernels is not None and torch.cuda.is_available():
        return extension.cuda_kernels
    if reason := host_build.why_not():
        pytest.skip(reason)
    return extension.CudaKernels(host_build.functions(), "cpu")


@pytest.fixture
def cuda_device(_cuda_kernels: extension.CudaKernels, monkeypatch) -> str:
    """The device of the CUDA kernels; without a GPU, they are compiled for the CPU."""
    monkeypatch.setattr(extension, "cuda_kernels", _cuda_kernels)
    return _cuda_kernels.device_type


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU backend, its device here, and the multiple that widths must be of."""

    name: str
    device: str
    multiple: int

    def width(self, channels: int) -> int:
        """The next supported width."""
        return -(-channels // self.multiple) * self.multiple


@pytest.fixture(params=["triton", "cuda"])
def gpu(request: pytest.FixtureRequest) -> Gpu:
    """Each GPU backend."""
    device = request.getfixturevalue(f"{request.param}_device")
    return Gpu(request.param, device, {"triton": 8, "cuda": 16}[request.param])


def _isa_levels() -> list[str]:
    return extension._C.usable_isas() if extension._C else []


@pytest.fixture(params=_isa_levels())
def isa_level(request: pytest.FixtureRequest):
    """Each instruction-set level of this processor, in use during the test."""
    active = extension._C.active_isa()
    extension._C.use_isa(request.param)
    assert extension._C.active_isa() == request.param
    yield request.param
    extension._C.use_isa(active)


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def calibration_file(cpu_backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An own file of measured choices, of which nothing is left in this process."""
    path = tmp_path / "of the user" / "calibrated.json"
    monkeypatch.setenv(store.ENVIRONMENT_VARIABLE, str(path))
    monkeypatch.setattr(measure, "_MOST_ROUNDS", 3)
    threads = torch.get_num_threads()
    store.forget()
    state.forget()
    yield path
    torch.set_num_threads(threads)
    store.batch_invariant(False)
    monkeypatch.delenv(store.ENVIRONMENT_VARIABLE)
    store.forget()
    state.forget()

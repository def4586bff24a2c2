"""The machine code of the extension's CUDA kernels; needs no GPU."""

from __future__ import annotations

import functools

import pytest
import torch

from crossvit_kernels import extension
from crossvit_kernels.inspect import extension_code, machine_code
from crossvit_kernels.inspect.extension_code import Kernel
from crossvit_kernels.inspect.machine_code import Code
from crossvit_kernels.ops.attention_core import cuda as core
from crossvit_kernels.ops.attention_core.reference import CoreInputs
from crossvit_kernels.ops.cross_attention import cuda as fusion
from crossvit_kernels.ops.cross_attention.reference import FusionInputs, FusionWeights

needs_cuda_code = pytest.mark.skipif(
    not extension.cuda_kernels, reason="the extension was built without CUDA"
)


@pytest.fixture(scope="module")
def cuobjdump() -> None:
    pytest.importorskip("triton")
    try:
        machine_code.disassembler()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@functools.cache
def read(arch: int) -> dict[Kernel, Code]:
    return extension_code.read(arch)


# By default tests read one architecture's code, as each takes long.
_SLOW = [pytest.mark.slow]
ARCHITECTURES = [pytest.param(arch, marks=[] if arch == 90 else _SLOW) for arch in (80, 90, 100)]


def skip_unless_built(arch: int) -> None:
    if arch not in extension_code.targets():
        pytest.skip(f"the extension was built for {sorted(extension_code.targets())}")


#: Bytes of stack of float32 kernels whose products leave the compiler a few registers too few:
#: sums that start from zero in every k-step need four more (csrc/common/cuda/fragments.h).
STACK = {"cross_attention_backward": 24, "17attention_forward": 24, "attention_backward_keys": 16}


def allowed_stack(name: str) -> int:
    sizes = [size for kernel, size in STACK.items() if kernel in name and "PlanIf" in name]
    return max(sizes, default=0)


@needs_cuda_code
@pytest.mark.usefixtures("cuobjdump")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_registers_and_stack(arch: int) -> None:
    """No local memory but little in float32, and enough registers for all threads of a block."""
    skip_unless_built(arch)
    usage = machine_code.usage(extension.location(), extension_code.targets()[arch])
    kernels = {kernel for name in usage if (kernel := extension_code.kernel_of(name))}
    assert {kernel.name for kernel in kernels} == {*extension_code.NAMES}
    assert {kernel.dtype for kernel in kernels} == {"bf16", "fp16", "fp32"}
    for name, (registers, stack) in usage.items():
        assert stack <= allowed_stack(name), name
        assert 0 < registers <= 255, name
        if kernel := extension_code.kernel_of(name):
            threads, _ = kernel.block(arch, 16)
            assert registers * threads <= machine_code.REGISTERS, name


@pytest.mark.slow
@needs_cuda_code
@pytest.mark.usefixtures("cuobjdump")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_instructions_on_other_sms(arch: int) -> None:
    """Tensor cores and 16-byte loads, no spills; clusters, except on sm_80."""
    skip_unless_built(arch)
    for kernel, code in read(arch).items():
        report = machine_code.report(kernel.name, "", arch, code, 0, 8)
        assert not report.spills or kernel.dtype == "fp32", kernel
        assert report.tensor_core_instructions > 0, kernel
        assert report.wide_loads > 0, kernel
        assert (code.count("UCGABAR") > 0) == (arch >= 90), kernel


WIDTHS = (16, 96, 192, 208, 384, 400, 768, 784, 1024, 1152, 1408, 1536)


@pytest.fixture(params=[80, 89, 90, 100])
def sm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Treat CPU tensors as a GPU's, whose blocks may use all its shared memory."""
    functions = extension.cuda_kernels.functions
    monkeypatch.setattr(extension, "cuda_kernels", extension.CudaKernels(functions, "cpu"))
    most = machine_code.SHARED_BYTES_OF_PROGRAM[request.param]
    monkeypatch.setattr(extension, "shared_bytes_of_block", lambda x: most)
    return request.param


@needs_cuda_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_attention_core_declines_does_not_fit(dtype: torch.dtype, sm: int) -> None:
    functions, code = extension.cuda_kernels.functions, extension.DTYPE_CODES[dtype]
    for channels in WIDTHS:
        most = machine_code.SHARED_BYTES_OF_PROGRAM[sm]
        blocks = functions.attention_core_blocks(code, 8, channels, most)
        fits = all(b <= most for _, b in blocks)
        x = torch.empty(1, 1, channels, dtype=dtype)
        reason = core.why_not(CoreInputs(x, x, None, None))
        assert (reason is None) == fits, (channels, reason, blocks)
        assert fits or "shared memory" in reason


@needs_cuda_code
@pytest.mark.parametrize("blocks", [0, 3, 16])
def test_clusters_that_no_kernel_divides_by(
    blocks: int, sm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "blocks_of_image", lambda *_: blocks)
    monkeypatch.setattr(extension, "multiprocessors", lambda device: None)
    monkeypatch.setattr(extension, "place", lambda x: (0, 0))
    u, x = torch.zeros(1, 3, 48), torch.zeros(1, 40, 48)
    with pytest.raises(ValueError, match=f"expected a power of two up to 8, found {blocks}"):
        core.forward_pass(u, x, None, None, 1e-6)


@needs_cuda_code
def test_99_kb_are_enough_for_the_named_models() -> None:
    """sm_86, 89 and 120: RTX 4090 and 5090, L4, A10."""
    most = machine_code.SHARED_BYTES_OF_PROGRAM[89]
    needed = extension.cuda_kernels.functions.attention_core_shared_bytes
    for dtype, widest in ((torch.float32, 384), (torch.bfloat16, 768), (torch.float16, 768)):
        for channels in (96, 128, 192, 224, 256, 384, 448, 768):
            needs = needed[extension.DTYPE_CODES[dtype]][channels // 16 - 1]
            assert channels > widest or needs <= most, (dtype, channels)


@needs_cuda_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [2, 12])
def test_what_the_fusion_declines_does_not_fit(dtype: torch.dtype, heads: int, sm: int) -> None:
    functions, code = extension.cuda_kernels.functions, extension.DTYPE_CODES[dtype]
    most = machine_code.SHARED_BYTES_OF_PROGRAM[sm]
    weights = FusionWeights(*(torch.empty(0, dtype=dtype) for _ in FusionWeights._fields))
    declined = 0
    for channels in (c for c in WIDTHS if c % (8 * heads) == 0):
        for cls_dim in WIDTHS:
            blocks = functions.cross_attention_blocks(code, cls_dim, channels, most)
            fits = all(b <= most for _, b in blocks)
            cls = torch.empty(1, cls_dim, dtype=dtype)
            tokens = torch.empty(1, 1, channels, dtype=dtype)
            reason = fusion.why_not(FusionInputs(cls, tokens, weights, heads))
            assert (reason is None) == fits, (cls_dim, channels, reason, blocks)
            assert fits or "shared memory" in reason
            declined += not fits
    assert declined > 0 or dtype != torch.float32

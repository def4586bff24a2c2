"""The compiled extension ``_C``: whether it is available, and its arguments.

The extension does not depend on torch: a tensor is passed as a tuple of its address, dtype code and
strides in elements (csrc/bindings/).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch  # the extension runs its loops on the thread pool of a torch loaded before it
from torch import Tensor

try:
    from crossvit_kernels import _C as _C

    missing: str | None = None
except ImportError as error:  # not built, or built for another Python
    _C: Any = None  # type: ignore[no-redef]
    missing = (
        f"the compiled extension crossvit_kernels._C cannot be imported ({error}); "
        "build it with `pip install -e .` in the source tree"
    )

# csrc/common/dtype.h
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_NOTHING = 0


class CudaKernels(NamedTuple):
    """The launchers of CUDA kernels (csrc/bindings/cuda.cpp), and the device type they take."""

    functions: Any
    device_type: str


#: None if the extension has none. Tests replace it by a build of the same sources for the CPU.
cuda_kernels = CudaKernels(_C.cuda, "cuda") if _C and _C.cuda_architectures else None


def why_not_cpu_kernels(x: Tensor) -> str | None:
    """Return why no CPU kernel can take x, or None."""
    if missing:
        return missing
    return None if x.device.type == "cpu" else f"the tokens are on {x.device}, not on a CPU"


def why_not_cuda_kernels(x: Tensor) -> str | None:
    """Return why no CUDA kernel can take x, or None."""
    if cuda_kernels is None:
        return missing or NO_CUDA
    if x.device.type != cuda_kernels.device_type:
        return f"the tokens are on {x.device}, not on a CUDA device"
    if x.dtype not in DTYPE_CODES or x.dtype == torch.float64:
        return f"it has no code for {x.dtype} tokens"
    if x.is_cuda and not architecture_for(cuda_architectures(), compute_capability(x.device)):
        return f"the extension was built for {_C.cuda_architectures}, not for {x.device}"
    if failure := failure_on(x.device):
        return f"the extension's check kernel did not run on {x.device}: {failure}"
    return None


def compute_capability(device: torch.device) -> int:
    """Return the compute capability, 90 for 9.0."""
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor


def architecture_for(architectures: Sequence[str], capability: int) -> int:
    """Return which of these architectures' code a compute capability loads; 0 for none.

    Machine code runs on its own capability and, without an "a", on later ones with the same major
    number. PTX of the last, as if without its "a", serves all that come after it.
    """
    built_for = [int(name.rstrip("af")) for name in architectures]
    if capability in built_for:
        return capability
    alike = (
        number
        for number, name in zip(built_for, architectures, strict=True)
        if number // 10 == capability // 10 and number < capability and not name.endswith("a")
    )
    newest = built_for[-1] if built_for and built_for[-1] <= capability else 0
    return max(alike, default=newest)


@functools.cache
def _self_check(index: int) -> str:
    return cuda_self_check(index)


def failure_on(device: torch.device) -> str:
    """Return why kernels of the extension do not run on a device, such as an old driver, or "".

    Runs a check kernel on the device once.
    """
    if device.type != "cuda":
        return ""
    return _self_check(torch.cuda.current_device() if device.index is None else device.index)


# torch.compile runs it and takes its result for a constant. torch.compiler.assume_constant_result
# would set this, and import all of the compiler for it.
failure_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Multiprocessors(NamedTuple):
    """The properties of a device by which a kernel's work is divided.

    Attributes:
        number: Streaming multiprocessors.
        have_clusters: Whether blocks of the code that the device loads can read each other's
            shared memory.
    """

    number: int
    have_clusters: bool


class DeviceLimits(NamedTuple):
    """What launches depend on.

    Attributes:
        multiprocessors: The device's.
        shared_bytes: Maximum shared memory of a block.
    """

    multiprocessors: Multiprocessors
    shared_bytes: int


#: Of tensors on no GPU. Tests run the kernels on a CPU as on an H200.
_limits = DeviceLimits(Multiprocessors(132, True), 227 * 1024)


@functools.cache
def multiprocessors(device: torch.device) -> Multiprocessors:
    """Return those of a device."""
    if device.type != "cuda":
        return _limits.multiprocessors
    architecture = architecture_for(cuda_architectures(), compute_capability(device))
    number = torch.cuda.get_device_properties(device).multi_processor_count
    return Multiprocessors(number, architecture >= 90)


def shared_bytes_of_block(x: Tensor) -> int:
    """Return the maximum shared memory of a block on x's device."""
    if not x.is_cuda:
        return _limits.shared_bytes
    properties = torch.cuda.get_device_properties(x.device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def place(x: Tensor) -> tuple[int, int]:
    """Return where a kernel on x runs: the device index and the current stream's address."""
    if not x.is_cuda:
        return 0, _NOTHING
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


class RecordedLaunch(NamedTuple):
    """A launch of a CUDA kernel (csrc/common/cuda/recording.h).

    Attributes:
        symbol: The kernel's in the binary.
        grid: Blocks in x, y and z.
        block: Threads in x, y and z.
        shared_bytes: Dynamic shared memory of a block.
        cluster: Blocks of a cluster.
        parameters: The kernel's, as they lie in its constant bank.
    """

    symbol: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    cluster: int
    parameters: bytes


def recorded_launches(
    run: Callable[[], object], limits: DeviceLimits, address_of: Callable[[Tensor], int]
) -> list[RecordedLaunch]:
    """Return what a function would launch, with tensors on the meta device, on some GPU.

    Args:
        run: Calls backend functions of operations.
        limits: The GPU's.
        address_of: Returns the addresses that kernels are given for tensors.
    """
    global cuda_kernels, _limits, _address_of
    previous = cuda_kernels, _limits, _address_of
    functions = _C.cuda
    cuda_kernels, _limits, _address_of = CudaKernels(functions, "meta"), limits, address_of
    multiprocessors.cache_clear()
    try:
        return [RecordedLaunch(*r) for r in functions.record_launches(run, limits.shared_bytes)]
    finally:
        cuda_kernels, _limits, _address_of = previous
        multiprocessors.cache_clear()


_address_of: Callable[[Tensor], int] = Tensor.data_ptr

#: Why the extension has no CUDA kernels.
NO_CUDA = (
    "the extension was built without CUDA: there was no CUDA toolkit or no GPU, or "
    "CROSSVIT_BUILD_CUDA=0 was set; CROSSVIT_BUILD_CUDA=1 builds with it"
)


def cuda_architectures() -> list[str]:
    """Return the compute capabilities that the CUDA code was compiled for; [] without CUDA."""
    return _C.cuda_architectures.split(";") if _C and _C.cuda_architectures else []


def location() -> str:
    """Return the path of the extension."""
    return str(_C.__file__)


def cpu_instruction_set() -> str:
    """Return the instruction set of the CPU kernels: x86-64-v4 (AVX-512), x86-64-v3 or baseline."""
    return str(_C.active_isa())


def cuda_self_check(device: int) -> str:
    """Run a check kernel on a device; return "" or what went wrong."""
    failure: str = _C.cuda_self_check(device)
    return failure


#: Images, tokens with the extra one, rows of u, channels, whether tokens are LayerNorm-ed, eps.
Problem = tuple[int, int, int, int, bool, float]


def core_problem(x: Tensor, extra: Tensor | None, num_rows: int, norm_eps: float | None) -> Problem:
    """Return the sizes of an attention_core over tokens x and, if given, an extra one per image."""
    batch, num_tokens, channels = x.shape
    num_tokens += extra is not None
    return batch, num_tokens, num_rows, channels, norm_eps is not None, norm_eps or 0.0


def all_float32(*tensors: Tensor | None) -> bool:
    return all(t is None or t.dtype == torch.float32 for t in tensors)


def unit_stride(t: Tensor) -> Tensor:
    """Return t, or a copy if its rows are not contiguous (a compiler may choose such a layout)."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


class Arguments:
    """Converts the tensors of one call for the extension; all addresses come from ``pointer``.

    Args:
        device: The device that the kernel runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pointer(
        self, t: Tensor | None, dtype: torch.dtype | None = None, rows: bool = False
    ) -> int:
        """Return the address of a tensor, contiguous or with contiguous rows; null for None.

        Args:
            t: Must stay alive until the kernel is launched: keep a reference to a copy.
            dtype: The dtype the kernel expects; None if the dtype is passed along.
            rows: Whether the kernel takes all strides but the last, which is 1.

        Raises:
            ValueError: A kernel would access memory outside of the tensor's elements.
        """
        if t is None:
            return _NOTHING
        if t.device != self._device:
            raise ValueError(f"expected a tensor on {self._device}, found one on {t.device}")
        if t.dtype != dtype and (dtype is not None or t.dtype not in DTYPE_CODES):
            raise ValueError(f"expected a tensor of {dtype or 'float'} elements, found {t.dtype}")
        unit = t.stride(-1) == 1 or t.shape[-1] <= 1 if rows else t.is_contiguous()
        if not unit or t.is_neg():
            kind = "contiguous rows" if rows else "a contiguous tensor"
            raise ValueError(f"expected {kind}, found shape {[*t.shape]}, strides {t.stride()}")
        return _address_of(t)

    def rows(self, t: Tensor, dtype: torch.dtype | None = None) -> tuple[int, int, int]:
        """Convert [B, R, C] with unit stride along C, in the dtype of ``accumulate_dtype``."""
        return self.pointer(t, dtype, rows=True), t.stride(0), t.stride(1)

    def tokens(self, x: Tensor, extra: Tensor | None) -> tuple[int, int, int, int, int, int]:
        """Convert [B, N, C] and, if given, one more token [B, C] in front of each image's."""
        return (
            self.pointer(x, rows=True),
            DTYPE_CODES[x.dtype],
            x.stride(0),
            x.stride(1),
            *self._row(extra, x.dtype),
        )

    def token_gradients(
        self, dx: Tensor | None, dextra: Tensor | None, dtype: torch.dtype
    ) -> tuple[int, int, int, int, int, int]:
        """Convert the gradients of ``tokens``, in their dtype; dx is None if not wanted."""
        if dx is None:
            return _NOTHING, DTYPE_CODES[dtype], 0, 0, *self._row(dextra, dtype)
        return self.tokens(dx, dextra)

    def token_rows(
        self, x: Tensor, cls: Tensor | None
    ) -> tuple[int, int, int, int, int, int, int, int]:
        """Convert float32 [B, N, C], with row 0 replaced by cls [B, C] if given."""
        address = self.pointer(x, torch.float32, rows=True)
        return address, *x.shape, x.stride(0), x.stride(1), *self._row(cls, x.dtype)

    def _row(self, t: Tensor | None, dtype: torch.dtype) -> tuple[int, int]:
        """Convert [B, C]."""
        return self.pointer(t, dtype, rows=True), 0 if t is None else t.stride(0)

    def mask(self, key_mask: Tensor | None) -> tuple[int, int, int]:
        """Convert a bool mask [B, N] of any strides."""
        if key_mask is None:
            return _NOTHING, 0, 0
        # The extension takes both strides.
        address = self.pointer(key_mask[:, :1], torch.bool, rows=True)
        return address, key_mask.stride(0), key_mask.stride(1)

    def parameter(self, t: Tensor | None) -> tuple[int, int]:
        """Convert a contiguous tensor of any shape, with its dtype."""
        return self.pointer(t), 0 if t is None else DTYPE_CODES[t.dtype]

    def norm(
        self, weight: Tensor, bias: Tensor | None, eps: float, saved: Any
    ) -> tuple[int, int, float, int, int, int]:
        """Convert a LayerNorm; saved has normed, mean and rstd to write to, or is None."""
        out = (saved.normed, saved.mean, saved.rstd) if saved else (None, None, None)
        affine = self.linear(weight, bias)
        normed, mean, rstd = (self.pointer(t, torch.float32) for t in out)
        return *affine, eps, normed, mean, rstd

    def linear(self, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
        """Convert a weight [out, in] and its bias, in float32."""
        return self.pointer(weight, torch.float32), self.pointer(bias, torch.float32)

"""Launches of the Gluon kernels, as the model runs them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch

from crossvit_kernels.inspect import ahead_of_time, gluon_code
from crossvit_kernels.inspect.model import sass, tensor_maps
from crossvit_kernels.inspect.model.gpus import Gpu
from crossvit_kernels.inspect.model.launch import Launch
from crossvit_kernels.inspect.model.memory import pointer
from crossvit_kernels.inspect.model.tensor_maps import TensorMap
from crossvit_kernels.ops.common import sm90_linear
from crossvit_kernels.ops.common.sm90_linear import Recorded


def why_not(gpu: Gpu) -> str | None:
    """Why no Gluon kernel runs on a GPU, or None."""
    if not sm90_linear.has_gluon():
        return "this Triton has no Gluon"
    if gpu.compute_capability != gluon_code.ARCH:
        return f"they are for compute capability 9.0, not for the {gpu.name}"
    return None


class _Parameters:
    """Parameters as they lie in the constant bank.

    Attributes:
        tensor_bytes: Sizes of the tensors.
        maps: Tensor maps by their places.
    """

    def __init__(self, start: int) -> None:
        self._start, self._bank = start, bytearray()
        self._numbers: dict[int, int] = {}
        self.tensor_bytes: list[int] = []
        self.maps: dict[int, TensorMap] = {}

    def add(self, argument: Any) -> None:
        if isinstance(argument, torch.Tensor):
            self._aligned(8, struct.pack("<Q", pointer(self._number(argument))))
        elif hasattr(argument, "block_shape"):  # a tensor map, and what Triton passes with it
            place = self._aligned(tensor_maps.ALIGNMENT, bytes(tensor_maps.SIZE))
            self.maps[place] = self._map(argument)
            self._aligned(4, struct.pack(f"<{len(argument.shape)}i", *argument.shape))
            self._aligned(8, struct.pack(f"<{len(argument.strides)}q", *argument.strides))
        else:
            self._aligned(4, struct.pack("<f" if isinstance(argument, float) else "<i", argument))

    @property
    def bank(self) -> bytes:
        return bytes(self._bank + bytes(-len(self._bank) % 8 + 32))  # Triton's own are null

    def _aligned(self, alignment: int, value: bytes) -> int:
        """Append a parameter, whose place in the bank is a multiple; return where, from the first.

        The first one begins the parameters.
        """
        self._bank += bytes(-(self._start + len(self._bank)) % alignment)
        place = len(self._bank)
        self._bank += value
        return place

    def _number(self, tensor: torch.Tensor) -> int:
        """A tensor's, which it has in all parameters."""
        storage = tensor.untyped_storage()._cdata
        number = self._numbers.setdefault(storage, len(self.tensor_bytes))
        if number == len(self.tensor_bytes):
            self.tensor_bytes.append(tensor.numel() * tensor.element_size())
        return number

    def _map(self, described: Any) -> TensorMap:
        size = described.base.element_size()
        (rows, columns), (row_stride, _) = described.shape, described.strides
        box_rows, box_columns = described.block_shape
        widest = described.layout.swizzle_byte_width // size  # Triton copies wider boxes in parts
        return TensorMap(
            self._number(described.base),
            rows,
            columns,
            row_stride * size,
            (box_rows, min(box_columns, widest)),
            size,
        )


def recorded_launch(recorded: Recorded, gpu: Gpu) -> tuple[Launch, str]:
    """Of a launch that was recorded, and what it does."""
    *arguments, shape = recorded.arguments
    form = _form(recorded.kernel, arguments, shape)
    compiled = gluon_code.compiled(form)
    usage = ahead_of_time.usage_of(compiled, gpu.compute_capability)
    parameters = _Parameters(sass.parameters_at(gpu.compute_capability))
    for argument in arguments:
        if argument is not None:
            parameters.add(argument)
    (kernel,) = sass.disassemble(compiled.asm["cubin"]).values()
    launch = Launch(
        kernel=kernel,
        grid=(min(gpu.multiprocessors, recorded.tiles), 1, 1),
        num_warps=int(compiled.metadata.num_warps),
        registers=usage.registers,
        shared_bytes=usage.shared_bytes,
        parameters=parameters.bank,
        tensor_bytes=tuple(parameters.tensor_bytes),
        architecture=gpu.compute_capability,
        tensor_maps=parameters.maps,
    )
    return launch, form.describe()


def _form(kernel: Any, arguments: Sequence[Any], shape: Any) -> gluon_code.Form:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    absent = tuple(
        parameter.name.removesuffix("_ptr")
        for parameter, argument in zip(kernel.params, arguments, strict=False)
        if argument is None
    )
    return gluon_code.Form(names[arguments[0].base.dtype], shape, absent)

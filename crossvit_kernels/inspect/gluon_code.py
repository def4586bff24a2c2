"""Reports on the Gluon kernels for sm_90, in the forms that transformer blocks launch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from crossvit_kernels.inspect import ahead_of_time
from crossvit_kernels.inspect.machine_code import Report
from crossvit_kernels.ops.common import sm90_linear
from crossvit_kernels.ops.common.sm90_linear import Sm90Shape
from crossvit_kernels.ops.common.sm90_wide import WideShape

NAMES = ("sm90_linear", "sm90_wide_linear")
#: The only one that they run on.
ARCH = 90
_OF_16_BITS = ("bf16", "fp16")


class Form(NamedTuple):
    """A kernel as it is compiled: its types, its constants, and the tensors it does without."""

    dtype: str
    shape: Sm90Shape | WideShape
    absent: tuple[str, ...]

    @property
    def kernel(self) -> str:
        return NAMES[isinstance(self.shape, WideShape)]

    def describe(self) -> str:
        """Describe it, for a report."""
        c = self.shape
        steps = [
            name for name in ("norm", "gelu", "residual", "transposed") if getattr(c, name, False)
        ]
        tile = (
            f"{64 * c.consumers}x64" if isinstance(c, Sm90Shape) else f"{c.rows}x{c.tile_columns}"
        )
        layer = " ".join([f"{c.channels} to {c.columns}", *steps])
        return f"{self.dtype} {layer}, {tile}; 2 consumers, {c.stages} stages"


def forms(dtypes: Collection[str], blocks: Sequence[tuple[int, int, int]]) -> list[Form]:
    """Return the forms of blocks of these (C, heads, hidden units), for inference and training.

    Args:
        dtypes: Names in ahead_of_time.DTYPES; only those of 16 bits have some.
        blocks: Sizes of transformer blocks.
    """
    found: dict[Form, None] = {}  # each once, in order
    for dtype in (d for d in _OF_16_BITS if d in dtypes):
        for channels, _, hidden in blocks:
            for columns, gelu in ((3 * channels, False), (hidden, True)):
                if _is_narrow(channels, columns):
                    shape = Sm90Shape(channels, columns, norm=True, gelu=gelu)
                    found[Form(dtype, shape, ("mean", "rstd"))] = None
                    found[Form(dtype, shape, ())] = None
                elif channels > sm90_linear.WIDEST:
                    found[Form(dtype, WideShape(channels, columns, gelu=gelu), ("scale",))] = None
            for terms in (channels, 3 * channels, hidden):  # gradients by W_o, W_qkv and W_1
                gradient = WideShape(terms, channels, transposed=True)
                found[Form(dtype, gradient, ("bias", "scale"))] = None
            for terms in (channels, hidden):
                for absent in (("scale",), ()):
                    found[Form(dtype, WideShape(terms, channels, True), absent)] = None
                if _is_narrow(terms, channels):
                    found[Form(dtype, Sm90Shape(terms, channels, residual=True), _NO_NORM)] = None
    return list(found)


_NO_NORM = ("beta", "mean", "rstd")


def _is_narrow(channels: int, columns: int) -> bool:
    return channels % 64 == columns % 64 == 0 and channels <= sm90_linear.WIDEST


def compiled(form: Form) -> Any:
    """Return Triton's compiled kernel for sm_90, which launches find in its cache."""
    import triton
    from triton.backends.compiler import GPUTarget

    from crossvit_kernels.gpu import gluon

    kernel, c = _kernel(form.kernel), form.shape
    types: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, parameter in enumerate(kernel.params):
        name, path = parameter.name, (index,)
        if parameter.is_constexpr or name.removesuffix("_ptr") in form.absent:
            types[name], constants[path] = "constexpr", c if parameter.is_constexpr else None
            attributes.update(ahead_of_time.attributes_of_constant(path, constants[path]))
        elif name.endswith("_ptr"):
            in_float32 = name in ("mean_ptr", "rstd_ptr", "scale_ptr")
            types[name] = "*fp32" if in_float32 else f"*{form.dtype}"
            attributes[path] = [["tt.divisibility", 16]]
        elif name in ("x", "weight", "y", "r"):
            box = (gluon.SIDE, gluon.SIDE)
            types[name] = gluon.type_of_tiles(form.dtype, box)
        else:
            types[name] = "fp32" if name == "eps" else "i32"
    source = gluon.Source(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options={"num_warps": 4})


def _kernel(name: str) -> Any:
    from crossvit_kernels.ops.common import triton_sm90_kernels, triton_sm90_wide_kernels

    modules = dict(zip(NAMES, (triton_sm90_kernels, triton_sm90_wide_kernels), strict=True))
    return getattr(modules[name], name)


def inspect(form: Form) -> Report:
    """Report on a form, and whether it is launched."""
    kernel = compiled(form)
    usage = ahead_of_time.usage_of(kernel, ARCH)
    problem = ""
    if usage.spills:
        problem = f"by launches: {usage.spills} spilled words"
    elif not usage.fits:
        problem = f"by launches: {usage.shared_bytes} bytes of shared memory do not fit"
    return ahead_of_time.report_of(
        form.kernel,
        form.describe(),
        ARCH,
        kernel,
        usage,
        absent=form.absent,
        passed_over=(problem,) if problem else (),
    )


def reports(
    dtypes: Collection[str], blocks: Sequence[tuple[int, int, int]], name: str, processes: int
) -> Iterator[Report]:
    """Report on the kernels whose name contains `name`, compiling in several processes.

    Args:
        dtypes: See forms.
        blocks: See forms.
        name: What names of kernels contain.
        processes: Number of processes.
    """
    chosen = [form for form in forms(dtypes, blocks) if name in form.kernel]
    if processes == 1 or len(chosen) < 2:
        yield from map(inspect, chosen)
        return
    with ProcessPoolExecutor(min(processes, len(chosen))) as pool:
        yield from pool.map(inspect, chosen)

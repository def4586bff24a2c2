"""Arguments of any strides give the result of contiguous ones, or a ValueError."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operation_cases import OPERATIONS
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels import extension

pytestmark = pytest.mark.usefixtures("cpu_backend")
PAIRS = [(o, name) for o in OPERATIONS for name in OPERATIONS[o].shapes]


def wide(t: Tensor) -> Tensor:
    """Every other column of a wider tensor."""
    return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1).flatten(-2)[..., ::2]


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def padded(t: Tensor) -> Tensor:
    """Rows with gaps, the first at an odd address."""
    out = torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, dtype=t.dtype)
    out[..., 1:-2] = t
    return out[..., 1:-2]


def last_of_longer(t: Tensor) -> Tensor:
    """As ``torch.randn(B, C, N + 1)[:, :, :N].transpose(1, 2)`` is."""
    t = t.transpose(-1, 0) if t.dim() == 2 else t.movedim(-1, -2) if t.dim() > 2 else t
    out = torch.full((*t.shape[:-1], t.shape[-1] + 1), torch.nan, dtype=t.dtype)
    out[..., :-1] = t
    t = out[..., :-1]
    return t.transpose(-1, 0) if t.dim() == 2 else t.movedim(-1, -2) if t.dim() > 2 else t


LAYOUTS: list[Callable[[Tensor], Tensor]] = [wide, transposed, padded, last_of_longer]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "which"), PAIRS)
def test_each_argument_in_each_layout(name: str, which: str, dtype: torch.dtype) -> None:
    operation = OPERATIONS[name]

    def run(tensors: dict[str, Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        y = operation.call(*leaves)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    tensors = operation.tensors(dtype)
    expected = run(tensors)
    for layout in LAYOUTS:
        t = layout(tensors[which])
        assert torch.equal(t, tensors[which])
        try:
            actual = run(tensors | {which: t})
        except ValueError as error:
            assert which in ("x", "tokens") and "stride" in str(error), (layout, error)
            continue
        for a, b in zip(actual, expected, strict=True):
            # torch's products may sum in another order for other strides.
            assert (a - b).norm() <= 32 * torch.finfo(dtype).eps * (1 + b.norm())


@pytest.mark.parametrize("which", ["residual_scale", "cls"])
def test_expanded_vectors(which: str) -> None:
    operation = OPERATIONS["layernorm_msa"]
    tensors = operation.tensors()
    x, cls, *weights = tensors.values()
    options = {"residual_scale": torch.rand(3).double(), "cls": cls}
    expanded = options | {which: options[which][:1].expand_as(options[which])}
    contiguous = options | {which: expanded[which].contiguous()}
    actual, expected = (
        ck.layernorm_msa(x, ck.MsaWeights(*weights), 3, **o) for o in (expanded, contiguous)
    )
    assert torch.equal(actual, expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_strides_of_the_extra_token(data: st.DataObject) -> None:
    batch, rows, num_tokens, channels = (data.draw(st.integers(1, 5)) for _ in range(4))
    gaps = [data.draw(st.integers(0, 3)) for _ in range(2)]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    u, x = torch.randn(batch, rows, channels), torch.randn(batch, num_tokens, channels)
    strides = (channels * (gaps[1] + 1) + gaps[0], gaps[1] + 1)
    memory = torch.randn(batch * strides[0] + 8)
    extra = memory.as_strided((batch, channels), strides)
    actual = ck.attention_core(u, x, extra_token=extra, backend="cpu")
    expected = ck.attention_core(u, x, extra_token=extra.contiguous(), backend="cpu")
    assert all(map(torch.equal, actual, expected))


def test_pointers_of_other_memory_are_refused() -> None:
    args, x = extension.Arguments(torch.device("cpu")), torch.randn(2, 3, 4)
    assert args.pointer(x) == x.data_ptr() and args.pointer(None) == 0
    with pytest.raises(ValueError, match="contiguous tensor"):
        args.pointer(x.mT)
    with pytest.raises(ValueError, match="contiguous rows"):
        args.rows(x.mT)
    with pytest.raises(ValueError, match=r"torch\.float64 elements"):
        args.pointer(x, torch.float64)
    with pytest.raises(ValueError, match="on cpu, found one on meta"):
        args.pointer(x.to("meta"))

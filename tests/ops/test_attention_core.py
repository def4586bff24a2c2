"""attention_core's CPU kernel: the accuracy rule, gradcheck, and possible mistakes of a kernel."""

from __future__ import annotations

import pytest
import torch
from core_cases import check_expanded_gradients, check_rule, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels.ops.attention_core import reference

pytestmark = pytest.mark.usefixtures("cpu_backend")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_eps", [1e-6, None])
@pytest.mark.parametrize(
    "shape",
    [(2, 401, 6, 192), (3, 197, 6, 384), (1, 130, 3, 96), (2, 50, 7, 224), (2, 33, 22, 1408)],
    ids=str,
)
def test_rule(shape: tuple[int, ...], norm_eps: float | None, dtype: torch.dtype) -> None:
    inputs, mask = make(*shape, dtype=dtype, extra=shape[0] == 2, masked=shape[0] == 3)
    check_rule(inputs, mask, dtype, norm_eps)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 4),
    num_tokens=st.integers(1, 300),
    num_rows=st.integers(1, 50),
    channels=st.integers(1, 60).map(lambda i: 8 * i) | st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    normalized=st.booleans(),
    shared=st.booleans(),
    extra=st.booleans(),
    masked=st.booleans(),
)
def test_fuzz(batch, num_tokens, num_rows, channels, dtype, normalized, shared, extra, masked):
    torch.manual_seed(1)
    channels = max(channels, 4)  # LayerNorm of one or two channels is constant
    inputs, mask = make(
        batch, num_tokens, num_rows, channels, dtype, shared=shared, extra=extra, masked=masked
    )
    check_rule(inputs, mask, dtype, 1e-6 if normalized else None)


@pytest.mark.parametrize("norm_eps", [1e-5, None])
@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(norm_eps: float | None, shared: bool) -> None:
    (u, x, extra), mask = make(2, 5, 3, 7, torch.float64, shared=shared, extra=True, masked=True)
    leaves = [t.requires_grad_() for t in (u, x, extra)]
    assert torch.autograd.gradcheck(
        lambda *t: ck.attention_core(t[0], t[1], norm_eps, mask, t[2], backend="cpu"), leaves
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_mean_small_spread(dtype: torch.dtype) -> None:
    """Tokens with mean 100 and spread 1 keep their precision."""
    inputs, mask = make(2, 70, 4, 192, dtype, mean=100.0)
    check_rule(inputs, mask, dtype)


def test_huge_scores_do_not_overflow() -> None:
    (u, x, _), _ = make(2, 40, 3, 64)
    u, x = u.float() * 1e4, x.float()
    m, lse = ck.attention_core(u, x, backend="cpu")
    m_exact, lse_exact = reference.attention_core(u.double(), x.double(), 1e-6)
    assert torch.isfinite(m).all() and torch.isfinite(lse).all()
    torch.testing.assert_close(m.double(), m_exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double(), lse_exact, rtol=1e-6, atol=0)


def test_constant_rows_have_variance_zero() -> None:
    x = torch.full((1, 10, 32), 3.0)
    m, lse = ck.attention_core(torch.randn(1, 2, 32), x, backend="cpu")
    assert torch.equal(m, torch.zeros_like(m))
    torch.testing.assert_close(lse, torch.full_like(lse, 10.0).log())


def test_return_weights() -> None:
    (u, x, extra), mask = make(2, 20, 3, 24, torch.float64, extra=True, masked=True)
    u.requires_grad_()
    m, lse, p = ck.attention_core(u, x, 1e-6, mask, extra, return_weights=True, backend="cpu")
    assert p.shape == (2, 3, 21)
    torch.testing.assert_close(p.sum(-1), torch.ones_like(lse))
    assert (p[:, :, 1:].masked_select(~mask.unsqueeze(1)) == 0).all()
    torch.testing.assert_close(p @ reference.normalized_tokens(x, extra, 1e-6), m)
    (gradient,) = torch.autograd.grad(p.square().sum(), u)
    with ck.use_backend("reference"):
        p = ck.attention_core(u, x, 1e-6, mask, extra, return_weights=True)[2]
        torch.testing.assert_close(torch.autograd.grad(p.square().sum(), u)[0], gradient)


def test_mask_that_leaves_nothing() -> None:
    (u, x, _), _ = make(3, 9, 2, 16, torch.float64)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1] = False
    for backend in ("cpu", "reference"):
        leaves = [u.clone().requires_grad_(), x.clone().requires_grad_()]
        m, lse = ck.attention_core(*leaves, key_mask=mask, backend=backend)
        assert (m[1] == 0).all() and (lse[1] == -torch.inf).all()
        du, dx = torch.autograd.grad(m.sum(), leaves)
        assert torch.isfinite(du).all() and torch.isfinite(dx).all()
        assert (du[1] == 0).all() and (dx[1] == 0).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_masked_tokens_reach_nothing(backend: str) -> None:
    (u, x, _), mask = make(2, 60, 3, 40, masked=True)
    u, x = u.float(), x.float()
    expected = ck.attention_core(u, x, key_mask=mask, backend=backend)
    x[~mask] = torch.nan
    x.requires_grad_()
    actual = ck.attention_core(u, x, key_mask=mask, backend=backend)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    (dx,) = torch.autograd.grad(actual[0].sum(), x)
    assert (dx[~mask] == 0).all() and torch.isfinite(dx).all()


@pytest.mark.parametrize("channels", [17, 64])
def test_nan_stays_in_its_image(channels: int) -> None:
    (u, x, _), _ = make(4, 45, 5, channels)
    u, x = u.float(), x.float()
    clean_m, clean_lse = ck.attention_core(u, x, backend="cpu")
    poisoned = x.clone()
    poisoned[2, 44, 3] = torch.nan
    poisoned.requires_grad_()
    m, lse = ck.attention_core(u, poisoned, backend="cpu")
    assert torch.isnan(m[2]).all() and torch.isnan(lse[2]).all()
    others = [0, 1, 3]
    assert torch.equal(m[others], clean_m[others]) and torch.equal(lse[others], clean_lse[others])
    (dx,) = torch.autograd.grad(m[others].sum(), poisoned)
    assert torch.isfinite(dx[others]).all()


def views(x: Tensor) -> dict[str, Tensor]:
    """The values of x [B, N, C] in other memory layouts with unit stride last."""
    batch, num_tokens, channels = x.shape
    padded = torch.full((batch, num_tokens + 3, channels + 5), torch.nan, dtype=x.dtype)
    padded[:, 2:-1, 1 : channels + 1] = x
    spread = torch.full((batch, 2 * num_tokens, channels), torch.nan, dtype=x.dtype)
    spread[:, ::2] = x
    return {
        "slice": padded[:, 2:-1, 1 : channels + 1],
        "tokens first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every other token": spread[:, ::2],
    }


@pytest.mark.parametrize("layout", ["slice", "tokens first", "every other token"])
def test_strided_tokens(layout: str) -> None:
    (u, x, _), _ = make(3, 37, 4, 48)
    u, x = u.float(), x.float()
    strided = views(x)[layout]
    assert not strided.is_contiguous() and torch.equal(strided, x)
    results = []
    for tokens in (x, strided):
        tokens = tokens.detach().requires_grad_()
        m, lse = ck.attention_core(u, tokens, backend="cpu")
        results.append((m, lse, *torch.autograd.grad(m.sum(), tokens)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_expanded_gradients() -> None:
    check_expanded_gradients("cpu")


def test_strided_mask_and_broadcast_tokens() -> None:
    (u, x, _), _ = make(3, 20, 2, 16, torch.float64)
    mask = (torch.rand(20, 3) > 0.5).t()
    x = x[:1].expand(3, -1, -1)
    m, _ = ck.attention_core(u, x, key_mask=mask, backend="cpu")
    expected, _ = ck.attention_core(
        u, x.contiguous(), key_mask=mask.contiguous(), backend="reference"
    )
    torch.testing.assert_close(m, expected)


def run_all(inputs: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    m, lse = ck.attention_core(leaves[0], leaves[1], 1e-6, mask, leaves[2], backend="cpu")
    return [m, lse, *torch.autograd.grad((m, lse), leaves, (m.detach(), lse.detach()))]


@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("shared", [False, True])
def test_bitwise_the_same_whatever_the_threads(restore_threads, batch: int, shared: bool) -> None:
    inputs, mask = make(batch, 300, 6, 96, shared=shared, extra=True, masked=True)
    inputs = [t.float() for t in inputs]
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(run_all(inputs, mask))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_image_does_not_depend_on_its_batch() -> None:
    inputs, mask = make(40, 300, 6, 96, extra=True, masked=True)
    inputs = [t.float() for t in inputs]
    together = run_all(inputs, mask)
    for i in (0, 17, 39):
        alone = run_all([t[i : i + 1] for t in inputs], mask[i : i + 1])
        assert all(torch.equal(a[i], b[0]) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_level(isa_level: str, dtype: torch.dtype) -> None:
    for channels in (20, 112, 192):
        inputs, mask = make(2, 150, 5, channels, dtype, extra=True, masked=True)
        check_rule(inputs, mask, dtype)


def test_unknown_instruction_set_level() -> None:
    from crossvit_kernels.extension import _C

    with pytest.raises(ValueError, match="sse9"):
        _C.use_isa("sse9")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_read_and_written_exactly(dtype: torch.dtype) -> None:
    """m of a single raw token is that token; with u and x of 0, dx is dm."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[torch.isfinite(values)].reshape(-1, 1, 16)
    u = torch.zeros(len(values), 1, 16)
    m, _ = ck.attention_core(u, values, norm_eps=None, backend="cpu")
    assert torch.equal(m, values.float())

    x = torch.zeros_like(values).requires_grad_()
    m, _ = ck.attention_core(u, x, norm_eps=None, backend="cpu")
    (dx,) = torch.autograd.grad(m, x, values.float())
    assert torch.equal(dx, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_to_nearest_even(dtype: torch.dtype) -> None:
    g = torch.cat([torch.randn(1 << 14), torch.randn(1 << 14) * 1e-5, torch.randn(1 << 14) * 1e-8])
    g = torch.cat([g, torch.tensor([65519.9, 65520.0, 1e30, -1e30, torch.inf, 0.0, -0.0, 6e-8])])
    g = g.view(-1, 1, 8)
    x = torch.zeros_like(g, dtype=dtype).requires_grad_()
    m, _ = ck.attention_core(torch.zeros_like(g), x, norm_eps=None, backend="cpu")
    finite = torch.isfinite(g).all(-1, keepdim=True)  # an inf makes its row's dp . m a NaN
    (dx,) = torch.autograd.grad(m, x, torch.where(finite, g, 0.0))
    assert torch.equal(dx, torch.where(finite, g, 0.0).to(dtype))


def test_offsets_beyond_2_to_the_31_elements() -> None:
    """Strides of a huge allocation, of which only the rows in use are backed by memory."""
    stride = 2**31 + 64
    storage = torch.empty(2 * stride + 4096, dtype=torch.bfloat16)
    x = storage.as_strided((3, 5, 32), (stride, 32, 1))
    x.copy_(torch.randn(3, 5, 32))
    u = torch.randn(3, 2, 32)
    m, lse = ck.attention_core(u, x, backend="cpu")
    expected = ck.attention_core(u, x.contiguous(), backend="cpu")
    assert torch.equal(m, expected[0]) and torch.equal(lse, expected[1])


def test_many_tokens() -> None:
    inputs, mask = make(1, 100_000, 2, 8)
    check_rule(inputs, mask, torch.float32)


class Pooled(torch.utils.data.Dataset):
    """Runs the kernel in the worker process."""

    def __init__(self, u: Tensor, x: Tensor) -> None:
        self.u, self.x = u, x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        return ck.attention_core(self.u, self.x[i : i + 1], backend="cpu")[0][0]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_data_loader_workers_after_fork() -> None:
    (u, x, _), _ = make(6, 300, 3, 32, shared=True)
    u, x = u.float(), x.float()
    expected, _ = ck.attention_core(u, x, backend="cpu")  # the parent has used its threads
    loader = torch.utils.data.DataLoader(
        Pooled(u, x), batch_size=3, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    assert torch.equal(torch.cat(list(loader)), expected)

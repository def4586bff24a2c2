"""attention_core in Triton and CUDA: on a GPU, else in the interpreter and on the host shim."""

from __future__ import annotations

import pytest
import torch
from accuracy import representable
from conftest import Gpu
from core_cases import check_expanded_gradients, check_rule, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import crossvit_kernels as ck
from crossvit_kernels.modules import ClassAttention, MAPHead
from crossvit_kernels.ops.attention_core import configs, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INF = torch.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_eps", [1e-6, None])
@pytest.mark.parametrize(
    "sizes",
    [(2, 70, 6, 192), (3, 33, 3, 96), (2, 20, 7, 224), (2, 19, 22, 40), (1, 1, 1, 8)],
    ids=str,
)
def test_rule(sizes, norm_eps, dtype, gpu: Gpu) -> None:
    sizes = (*sizes[:3], gpu.width(sizes[3]))
    inputs, mask = make(*sizes, dtype=dtype, extra=sizes[0] == 2, masked=sizes[0] == 3)
    check_rule(inputs, mask, dtype, norm_eps, gpu.name, gpu.device)


@pytest.mark.slow_on_cpu
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(0, 3),
    num_tokens=st.integers(1, 90),
    num_rows=st.integers(1, 33),
    eighths=st.integers(1, 30),
    dtype=st.sampled_from(DTYPES),
    normalized=st.booleans(),
    shared=st.booleans(),
    extra=st.booleans(),
    masked=st.booleans(),
)
def test_fuzz(
    gpu,
    batch,
    num_tokens,
    num_rows,
    eighths,
    dtype,
    normalized,
    shared,
    extra,
    masked,
):
    torch.manual_seed(1)
    channels = gpu.width(8 * eighths)
    inputs, mask = make(
        batch, num_tokens, num_rows, channels, dtype, shared=shared, extra=extra, masked=masked
    )
    check_rule(inputs, mask, dtype, 1e-6 if normalized else None, gpu.name, gpu.device)


@pytest.mark.parametrize("masked", [False, True])
def test_ranges_of_tokens_are_merged(masked: bool, gpu: Gpu) -> None:
    """More tokens than a program handles; a split may be fully masked."""
    split = 1024 if gpu.name == "cuda" else 32
    small = configs.TokenPass(chunk=16, tokens=16, num_warps=4, num_stages=2, split_size=split)
    with configs.FORWARD.only(small), configs.BACKWARD.only(small):
        inputs, mask = make(2, 2 * split + 11, 3, 16, extra=True, masked=masked)
        if mask is not None:
            mask[:, split : 2 * split] = False
        check_rule(inputs, mask, torch.float32, 1e-6, gpu.name, gpu.device)
        if mask is not None:
            inputs, mask = make(2, 2 * split + 11, 3, 16, masked=True)
            mask[1] = False
            check_nothing_attended(inputs, mask, gpu)


def test_many_tokens(gpu: Gpu) -> None:
    inputs, mask = make(1, 1030, 2, 16)
    check_rule(inputs, mask, torch.float32, 1e-6, gpu.name, gpu.device)


@pytest.mark.sanitizer
def test_many_queries(gpu: Gpu) -> None:
    """Many queries need several launches, which add to dx."""
    inputs, mask = make(2, 18, 70, gpu.width(24), extra=True)
    check_rule(inputs, mask, torch.float32, 1e-6, gpu.name, gpu.device)
    check_rule(inputs, mask, torch.float16, 1e-6, gpu.name, gpu.device)


@pytest.mark.parametrize(
    "num_tokens, num_rows", [(18, 70), pytest.param(1100, 3, marks=pytest.mark.slow_on_cpu)]
)
def test_frozen_tokens(num_tokens: int, num_rows: int, gpu: Gpu) -> None:
    """Without dx, the other gradients have the same bits."""
    inputs, _ = make(2, num_tokens, num_rows, 16, extra=True)
    results = []
    for is_frozen in (False, True):
        u, x, extra = leaves = [t.float().to(gpu.device).requires_grad_() for t in inputs]
        x.requires_grad_(not is_frozen)
        m, lse = ck.attention_core(u, x, extra_token=extra, backend=gpu.name)
        results.append(torch.autograd.grad((m.sin().sum() + lse.sum()), leaves[::2]))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean, channels", [(15, 384), (30, 384), (100, 192)])
def test_large_mean_small_spread(mean: float, channels: int, dtype: torch.dtype, gpu: Gpu) -> None:
    """Tokens with spread 1, whose squares CUDA adds up as they are or relative to the mean."""
    inputs, mask = make(2, 40, 4, gpu.width(channels), dtype, mean=mean)
    check_rule(inputs, mask, dtype, 1e-6, gpu.name, gpu.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [[0], [3], [0, 1], [0, 1, 2, 3], [100]], ids=str)
def test_massive_activations(channels: list[int], dtype: torch.dtype, gpu: Gpu) -> None:
    """A few channels far from the others, also those from which deviations are taken."""
    inputs, mask = make(2, 40, 4, 192, dtype)
    inputs[1][..., channels] *= 50
    check_rule(inputs, mask, dtype, 1e-6, gpu.name, gpu.device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [4, 12])
def test_channels_that_outweigh_all_others(num_rows: int, dtype: torch.dtype, gpu: Gpu) -> None:
    """Two channels are far above the others."""
    inputs, mask = make(2, 20, num_rows, gpu.width(384), dtype)
    x = inputs[1]
    assert x is not None
    x.mul_(0.3).add_(0.4)[..., [0, 2]] = 300
    check_rule(inputs, mask, dtype, 1e-6, gpu.name, gpu.device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mean, spread, value", [(200, 3, 3.484375), (30, 1, 0.06), (8, 0.1, 0.3)])
def test_channels_far_below_all_others(
    mean: float, spread: float, value: float, dtype: torch.dtype, gpu: Gpu
) -> None:
    inputs, mask = make(2, 20, 4, gpu.width(192), dtype)
    x = inputs[1]
    assert x is not None
    x.mul_(spread).add_(mean)[..., :2] = value
    inputs[1] = representable(x, dtype)
    check_rule(inputs, mask, dtype, 1e-6, gpu.name, gpu.device)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    "dtype, mean, spread",
    [(torch.float16, 40, 1), (torch.bfloat16, 40, 1), (torch.bfloat16, 5e18, 5e17)],
)
def test_one_token_far_from_zero(dtype: torch.dtype, mean: float, spread: float, gpu: Gpu) -> None:
    """It is right, and so are all others of its image; other images do not change."""
    inputs, mask = make(3, 70, 4, gpu.width(192), dtype)
    u, x, _ = inputs
    assert u is not None and x is not None
    u32, before = u.float().to(gpu.device), x.to(gpu.device, dtype)
    clean = ck.attention_core(u32, before, backend=gpu.name)
    x[1, 68] = x[1, 68] * spread + mean
    inputs[1] = representable(x, dtype)
    moved = ck.attention_core(u32, inputs[1].to(gpu.device, dtype), backend=gpu.name)
    assert all(torch.equal(a[::2], b[::2]) for a, b in zip(moved, clean, strict=True))
    check_rule(inputs, mask, dtype, 1e-6, gpu.name, gpu.device)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_eps(dtype: torch.dtype, gpu: Gpu) -> None:
    """The tokens that a tile is filled up with have no standard deviation to divide by."""
    inputs, _ = make(2, 20, 4, gpu.width(192), dtype)
    check_rule(inputs, None, dtype, 0.0, gpu.name, gpu.device)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("mean, spread", [(5e18, 5e17), (-1e16, 1e15)])
def test_large_bfloat16_tokens(mean: float, spread: float, gpu: Gpu) -> None:
    """Squares from 0 may overflow, those of deviations do not."""
    inputs, mask = make(2, 20, 4, gpu.width(192), torch.bfloat16)
    x = inputs[1]
    assert x is not None
    inputs[1] = representable(x * spread + mean, torch.bfloat16)
    check_rule(inputs, mask, torch.bfloat16, 1e-6, gpu.name, gpu.device)


@pytest.mark.parametrize(
    "dtype, values, outlier",
    [
        (torch.bfloat16, (24.875, -33), 300),
        (torch.bfloat16, (119.5, 94.5), 300),
        (torch.float16, (19.875, -20.875), 300),
        (torch.float16, (126.3125, 93.6875), 300),
        (torch.float16, (-40000, -42976), 60000),
    ],
    ids=str,
)
def test_few_values_beside_outliers(
    dtype: torch.dtype, values: tuple[float, float], outlier: float, gpu: Gpu
) -> None:
    """Tokens whose distances from an outlier are rounded alike, or too large for float16."""
    (u, x, _), _ = make(2, 20, 4, gpu.width(384), dtype)
    assert u is not None and x is not None
    x = torch.where(x > 0, *(torch.tensor(v, dtype=x.dtype) for v in values))
    x[..., [0, 2]] = outlier
    m, _ = ck.attention_core(u.float().to(gpu.device), x.to(gpu.device, dtype), backend=gpu.name)
    exact, _ = reference.attention_core(u, x, 1e-6)
    error = (m.double().cpu() - exact).norm() / exact.norm()
    assert error < torch.finfo(dtype).eps


def test_large_float16_tokens(gpu: Gpu) -> None:
    inputs, mask = make(2, 40, 4, 192, torch.float16)
    inputs[1].copy_((inputs[1].clamp(-2, 2) * 1e4).half())
    check_rule(inputs, mask, torch.float16, 1e-6, gpu.name, gpu.device)


def test_huge_scores_do_not_overflow(gpu: Gpu) -> None:
    (u, x, _), _ = make(2, 40, 3, 64)
    u, x = u.float().to(gpu.device) * 1e4, x.float().to(gpu.device)
    m, lse = ck.attention_core(u, x, backend=gpu.name)
    m_exact, lse_exact = reference.attention_core(u.double(), x.double(), 1e-6)
    assert torch.isfinite(m).all() and torch.isfinite(lse).all()
    torch.testing.assert_close(m.double(), m_exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double(), lse_exact, rtol=1e-6, atol=0)


def check_nothing_attended(inputs, mask, gpu: Gpu) -> None:
    """Image 1 is fully masked."""
    leaves = [t.float().to(gpu.device).requires_grad_() for t in inputs[:2]]
    m, lse = ck.attention_core(*leaves, key_mask=mask.to(gpu.device), backend=gpu.name)
    assert (m[1] == 0).all() and (lse[1] == -torch.inf).all()
    du, dx = torch.autograd.grad(m.sum(), leaves)
    assert torch.isfinite(du).all() and torch.isfinite(dx).all()
    assert (du[1] == 0).all() and (dx[1] == 0).all()


def test_mask_that_leaves_nothing(gpu: Gpu) -> None:
    inputs, _ = make(3, 9, 2, 16)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1] = False
    check_nothing_attended(inputs, mask, gpu)


def test_masked_tokens_reach_nothing(gpu: Gpu) -> None:
    (u, x, _), mask = make(2, 60, 3, 48, masked=True)
    u, x, mask = (t.to(gpu.device) for t in (u.float(), x.float(), mask))
    expected = ck.attention_core(u, x, key_mask=mask, backend=gpu.name)
    x[~mask] = torch.nan
    x.requires_grad_()
    actual = ck.attention_core(u, x, key_mask=mask, backend=gpu.name)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    (dx,) = torch.autograd.grad(actual[0].sum(), x)
    assert (dx[~mask] == 0).all() and torch.isfinite(dx).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [[INF], [-INF], [-INF, INF], [torch.nan]], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_infinite_tokens(values: list[float], dtype: torch.dtype, gpu: Gpu) -> None:
    """They make NaN of their image's results, as in eager code, and nothing of others'."""
    (u, x, _), mask = make(3, 20, 3, gpu.width(192), dtype, masked=True)
    assert u is not None and x is not None and mask is not None
    mask[:, 7], mask[:, 9] = True, False
    u, x, mask = u.float().to(gpu.device), x.to(gpu.device, dtype), mask.to(gpu.device)
    clean = ck.attention_core(u, x, key_mask=mask, backend=gpu.name)
    channels = slice(5, 5 + len(values))
    x[:, 9, channels] = x.new_tensor(values)
    for a, e in zip(ck.attention_core(u, x, key_mask=mask, backend=gpu.name), clean, strict=True):
        assert torch.equal(a, e)
    x[1, 7, channels] = x.new_tensor(values)
    for a, e in zip(ck.attention_core(u, x, key_mask=mask, backend=gpu.name), clean, strict=True):
        assert a[1].isnan().all() and torch.equal(a[::2], e[::2])


@pytest.mark.slow_on_cpu
def test_an_image_depends_on_itself_alone(gpu: Gpu) -> None:
    """Not on its batch, nor on a NaN in another image."""
    (u, x, _), _ = make(4, 45, 5, 64)
    u, x = u.float().to(gpu.device), x.float().to(gpu.device)
    clean_m, clean_lse = ck.attention_core(u, x, backend=gpu.name)
    poisoned = x.clone()
    poisoned[2, 44, 3] = torch.nan
    poisoned.requires_grad_()
    m, lse = ck.attention_core(u, poisoned, backend=gpu.name)
    assert torch.isnan(m[2]).all() and torch.isnan(lse[2]).all()
    others = [0, 1, 3]
    assert torch.equal(m[others], clean_m[others]) and torch.equal(lse[others], clean_lse[others])
    (dx,) = torch.autograd.grad(m[others].sum(), poisoned)
    assert torch.isfinite(dx[others]).all()
    alone = ck.attention_core(u[3:], x[3:], backend=gpu.name)
    assert torch.equal(alone[0], clean_m[3:]) and torch.equal(alone[1], clean_lse[3:])


def layouts(x: torch.Tensor) -> list[torch.Tensor]:
    """The values of x [B, N, C] in other memory layouts: aligned or not, with zero strides."""
    batch, num_tokens, channels = x.shape
    padded = x.new_full((batch, num_tokens + 3, channels + 8), torch.nan)
    inside = padded[:, 2:-1, 8:]
    odd = x.new_full((batch, num_tokens, channels + 5), torch.nan)[:, :, 1 : channels + 1]
    for view in (inside, odd):
        view.copy_(x)
    return [inside, odd, x.transpose(0, 1).contiguous().transpose(0, 1)]


def test_strided_tokens_and_masks(gpu: Gpu) -> None:
    (u, x, extra), _ = make(3, 37, 4, 48, extra=True)
    u, x, extra = (t.float().to(gpu.device) for t in (u, x, extra))
    mask = (torch.rand(37, 3, device=gpu.device) > 0.5).t()
    results = []
    for tokens in (x, *layouts(x)):
        assert torch.equal(tokens, x)
        tokens = tokens.detach().requires_grad_()
        m, lse = ck.attention_core(u, tokens, 1e-6, mask, extra, backend=gpu.name)
        results.append((m, lse, *torch.autograd.grad(m.sum(), tokens)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
    same = x[:1].expand(3, -1, -1)
    m, _ = ck.attention_core(u[:1], same, backend=gpu.name)
    assert torch.equal(m[0], m[1]) and torch.equal(m[0], m[2])


def test_expanded_gradients(gpu: Gpu) -> None:
    check_expanded_gradients(gpu.name, gpu.device)


def test_what_is_declined(gpu: Gpu) -> None:
    u, x = torch.randn(1, 2, 12, device=gpu.device), torch.randn(1, 3, 12, device=gpu.device)
    with pytest.raises(ValueError, match=f"{gpu.name}: 12 channels are no multiple of"):
        ck.attention_core(u, x, backend=gpu.name)
    with pytest.raises(ValueError, match="no code for"):
        ck.attention_core(u.double(), x.double(), backend=gpu.name)
    wide = torch.randn(1, 2, 1600, device=gpu.device)
    with pytest.raises(ValueError, match="1600 channels are more than"):
        ck.attention_core(wide, wide, backend=gpu.name)
    assert ck.attention_core(u, x)[0].shape == u.shape  # another backend runs it


@pytest.mark.parametrize("head", [MAPHead, ClassAttention])
def test_pooling_heads(head: type, gpu: Gpu) -> None:
    """Built on attention_core; outputs and gradients equal the reference's."""
    fused, eager = (head(48, 6, backend=b).to(gpu.device) for b in (gpu.name, "reference"))
    eager.load_state_dict(fused.state_dict())
    x = torch.randn(3, 20, 48, device=gpu.device)
    outputs = fused(x), eager(x)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    gradients = [
        torch.autograd.grad(y.square().sum(), list(module.parameters()))
        for y, module in zip(outputs, (fused, eager), strict=True)
    ]
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("eps", [1e-10, 1e-12, 1e-20])
def test_constant_tokens_in_float16(eps: float, gpu: Gpu) -> None:
    """Their 1 / standard deviation is more than float16 can hold; their xhat is 0."""
    (u, x, extra), _ = make(2, 40, 3, gpu.width(48), dtype=torch.float16, extra=True)
    u, x, extra = u.float(), x.half(), extra.half()
    x[:, 5:9] = 0
    extra[1] = 0
    leaves = [t.to(gpu.device) for t in (u, x, extra)]

    def run(u, x, extra, backend):
        u = u.requires_grad_()
        m, lse = ck.attention_core(u, x, eps, None, extra, backend=backend)
        du = torch.autograd.grad(m.double().square().sum() + lse.double().sum(), u)[0]
        return m, lse, du

    doubled = (t.double() for t in leaves)
    names = "m", "lse", "du"
    for name, a, e in zip(names, run(*leaves, gpu.name), run(*doubled, "reference"), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-2, atol=1e-2, msg=name)


@pytest.mark.parametrize("where", ["u", "x", "extra"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_gpu_s_nan_comes_out(dtype: torch.dtype, where: str, gpu: Gpu) -> None:
    """A GPU's own NaN has all bits set but the sign: 0x7fffffff."""
    sizes = 2, 20, 3, gpu.width(48)
    (u, x, extra), _ = make(*sizes, dtype=dtype, extra=True)
    tensors = {"u": u.float(), "x": x.to(dtype), "extra": extra.to(dtype)}
    if dtype == torch.float32 or where == "u":
        nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    else:
        nan = torch.tensor(0x7FFF, dtype=torch.int16).view(dtype)
    tensors[where].view(-1)[-1] = nan
    u, x, extra = (t.to(gpu.device).requires_grad_() for t in tensors.values())
    for eps in (1e-6, None):
        m, lse = ck.attention_core(u, x, eps, None, extra, backend=gpu.name)
        gradients = torch.autograd.grad(m.float().sum() + lse.sum(), (u, x, extra))
        broken = m[-1, -1] if where == "u" else m[-1]
        assert broken.isnan().all() and m[0].isfinite().all()
        assert all(g[-1].isnan().any() and g[0].isfinite().all() for g in gradients)

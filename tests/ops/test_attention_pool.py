"""attention_pool: absorbed projections against materialised keys and values.

Outputs and gradients of all CASES are compared with the reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_within_rule, eager_dtype, outputs_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_cases import ALL_BIASES, CASES, NAMES, NORMALISED, NORMS, Case
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels.ops.attention_pool import absorbed


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("cpu_backend")
    return request.param


def assert_equal_to_reference(case: Case) -> None:
    """Compare the cpu backend in float64: outputs and the gradients of all tensors."""
    inputs, mask, upstream = case.inputs(), case.key_mask(), case.upstream()
    actual, expected = (
        outputs_and_gradients(case.function(backend, mask), inputs, upstream, torch.float64)
        for backend in ("cpu", "reference")
    )
    for name, a, b in zip(case.result_names(inputs), actual, expected, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str) -> None:
    assert_equal_to_reference(CASES[name])


@st.composite
def fuzzed(draw: st.DrawFn) -> Case:
    heads = draw(st.sampled_from((1, 2, 3, 6, 7, 12)))
    channels = 8 * draw(st.integers(1, 30))
    include_query = draw(st.booleans())
    without = [n for n in (*ALL_BIASES, *NORMS) if draw(st.booleans())]
    if draw(st.booleans()):
        without += ["w_o", "b_o"]
    return Case(
        batch=draw(st.integers(0, 4)),
        queries=draw(st.integers(1, 4)),
        tokens=draw(st.integers(0 if include_query else 1, 40)),
        heads=heads,
        query_width=draw(st.integers(1, 60)),
        width=heads * draw(st.integers(1, 16)),
        channels=channels,
        value_width=heads * draw(st.integers(1, 16)),
        out_width=draw(st.integers(1, 60)),
        per_image=draw(st.booleans()),
        without=tuple(without),
        query_norm=draw(st.booleans()),
        token_norm=draw(st.booleans()),
        mask="random" if draw(st.booleans()) else "",
        include_query=include_query,
        scale=draw(st.sampled_from((None, 0.3))),
        return_weights=draw(st.booleans()),
    )


@pytest.mark.usefixtures("cpu_backend")
@settings(derandomize=True, deadline=None, max_examples=60)
@given(fuzzed(), st.integers(0, 1000))
def test_fuzz(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    if case.tokens < 2:
        case = replace(case, mask="")
    assert_equal_to_reference(case)


def test_reference_is_multi_head_attention() -> None:
    """The reference against torch's own."""
    case = replace(CASES["three queries per image"], value_width=36, out_width=36)
    query, tokens, w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o, *_ = case.inputs()
    mask = replace(case, mask="random").key_mask()

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (case.heads, -1)).transpose(1, 2)

    pooled = F.scaled_dot_product_attention(
        heads(F.linear(query, w_q, b_q)),
        heads(F.linear(tokens, w_k, b_k)),
        heads(F.linear(tokens, w_v, b_v)),
        attn_mask=mask[:, None, None],
    )
    expected = F.linear(pooled.transpose(1, 2).flatten(2), w_o, b_o)
    weights = (w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o)
    actual = ck.attention_pool(
        query, tokens, *weights, num_heads=case.heads, key_mask=mask, backend="reference"
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# Precision

PRECISION_CASES = {
    "plain": Case(batch=4, tokens=50, channels=96, query_width=72),
    "norms": replace(NORMALISED, batch=4, tokens=50, channels=96, per_image=True),
    "three queries included, mask": replace(
        NORMALISED, batch=4, tokens=50, queries=3, include_query=True, mask="random"
    ),
    "no output projection": Case(batch=4, tokens=50, without=("w_o", "b_o", "b_v")),
    "weights": Case(batch=4, tokens=50, channels=96, return_weights=True),
    "weights, norms": replace(
        NORMALISED, batch=4, tokens=50, channels=96, queries=2, return_weights=True
    ),
}


def assert_rule(
    case: Case,
    dtype: torch.dtype,
    stored: torch.dtype,
    around: Callable[[Callable], Callable] = lambda f: f,
) -> None:
    """Check the accuracy rule for results computed in dtype from tensors stored in another."""
    inputs, mask, upstream = case.inputs(stored), case.key_mask(), case.upstream(dtype)
    kernel = around(case.function("cpu", mask))
    eager = around(case.function("reference", mask))
    exact = outputs_and_gradients(case.function("reference", mask), inputs, upstream, torch.float64)
    actual = outputs_and_gradients(kernel, inputs, upstream, stored)
    in_eager = outputs_and_gradients(eager, inputs, upstream, eager_dtype(stored))
    for name, a, e, x in zip(case.result_names(inputs), actual, in_eager, exact, strict=True):
        if name == "d b_k":
            assert not a.any()
            continue
        assert_within_rule(a, e, x, name, dtype)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRECISION_CASES)
def test_error_rule(name: str, dtype: torch.dtype) -> None:
    assert_rule(PRECISION_CASES[name], dtype, stored=dtype)


def under_autocast(function: Callable) -> Callable:
    def call(*inputs: Tensor | None) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*inputs)

    return call


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("name", PRECISION_CASES)
def test_error_rule_under_autocast(name: str) -> None:
    assert_rule(PRECISION_CASES[name], torch.bfloat16, torch.float32, around=under_autocast)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("token_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_dtypes_under_autocast(name: str, token_dtype: torch.dtype) -> None:
    case, mask = CASES[name], CASES[name].key_mask()
    inputs = [None if t is None else t.float() for t in case.inputs()]
    inputs[1] = inputs[1].to(token_dtype)
    actual, expected = (
        under_autocast(case.function(backend, mask))(*inputs) for backend in ("cpu", "reference")
    )
    if not case.return_weights:
        actual, expected = [actual], [expected]
    assert [t.dtype for t in actual] == [t.dtype for t in expected]


# Masks, weights, strides, empty batches


@pytest.mark.parametrize("name", ["empty image", "empty image, no output projection"])
def test_an_image_without_keys_pools_to_zero(name: str, backend: str) -> None:
    case = CASES[name]
    inputs, mask = case.inputs(), case.key_mask()
    out, *grads = outputs_and_gradients(
        case.function(backend, mask), inputs, case.upstream(), torch.float64
    )
    b_o = inputs[NAMES.index("b_o")]
    expected = torch.zeros_like(out[1]) if b_o is None else b_o.expand_as(out[1])
    assert torch.equal(out[1], expected)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert not grads[NAMES.index("tokens")][1].any()


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].mask])
def test_masked_tokens_are_not_read(name: str) -> None:
    case = CASES[name]
    inputs, mask, upstream = case.inputs(), case.key_mask(), case.upstream()
    poisoned = list(inputs)
    poisoned[1] = inputs[1].masked_fill(~mask.unsqueeze(-1), torch.nan)
    clean, actual = (
        outputs_and_gradients(case.function("cpu", mask), tensors, upstream, torch.float64)
        for tensors in (inputs, poisoned)
    )
    results = case.result_names(inputs)
    for result, a, b in zip(results, actual, clean, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-13, atol=1e-13, msg=lambda m, result=result: f"{result}: {m}"
        )
    assert not actual[results.index("d tokens")][~mask].any()


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("weights")])
def test_weights_sum_to_one(name: str, dtype: torch.dtype) -> None:
    case, mask = CASES[name], CASES[name].key_mask()
    inputs = [None if t is None else t.to(dtype) for t in case.inputs()]
    _, weights = case.function("cpu", mask)(*inputs)
    keys = case.tokens + case.queries * case.include_query
    assert weights.shape == (case.batch, case.queries, case.heads, keys)
    assert weights.dtype == dtype
    total = weights.double().sum(dim=-1)
    if case.mask == "one image empty" and not case.include_query:
        assert not total[1].any()
        total[1] = 1
    # Scores are float32 or float64; each weight is then rounded to dtype.
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = torch.finfo(dtype).eps + 100 * torch.finfo(accumulated).eps
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=tolerance)
    if mask is not None:
        attended = F.pad(mask, (keys - case.tokens, 0), value=True)
        assert not weights[~attended[:, None, None].expand_as(weights)].any()


STRIDED = {
    "behind a class token": lambda x: torch.cat([x[:, :1], x], dim=1)[:, 1:],
    "batch second": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "part of wider rows": lambda x: torch.cat([x, x, x], dim=2)[..., 40:80],
    "every other token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "one image for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("include_query", [False, True])
@pytest.mark.parametrize("name", STRIDED)
def test_strided_tokens(name: str, include_query: bool) -> None:
    case = replace(NORMALISED, include_query=include_query)
    inputs, upstream, view = case.inputs(), case.upstream(), STRIDED[name]
    function = case.function("cpu", None)
    assert not view(inputs[1]).is_contiguous()
    actual = outputs_and_gradients(
        lambda query, tokens, *rest: function(query, view(tokens), *rest),
        *(inputs, upstream, torch.float64),
    )
    expected = outputs_and_gradients(
        lambda query, tokens, *rest: function(query, view(tokens).contiguous(), *rest),
        *(inputs, upstream, torch.float64),
    )
    for result, a, b in zip(case.result_names(inputs), actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13, msg=result)


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=0),
        replace(NORMALISED, batch=0, queries=3, include_query=True, per_image=True),
        Case(batch=0, mask="random", include_query=True, return_weights=True),
    ],
)
def test_empty_batch(case: Case, backend: str) -> None:
    inputs = case.inputs()
    results = outputs_and_gradients(
        case.function(backend, case.key_mask()), inputs, case.upstream(), torch.float64
    )
    for name, result in zip(case.result_names(inputs), results, strict=True):
        assert not result.any(), name


# Choice of the backend


def ran_absorbed(monkeypatch: pytest.MonkeyPatch, case: Case, **options: Any) -> bool:
    calls = []
    original = absorbed.attention_pool

    def spy(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(absorbed, "attention_pool", spy)
    case.function(options.pop("backend", None), None, **options)(*case.inputs())
    return bool(calls)


@pytest.mark.usefixtures("cpu_backend")
def test_many_queries_prefer_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = Case(queries=4), Case(queries=5)  # 0.4 of head_dim, 12, lies between
    assert ran_absorbed(monkeypatch, few)
    assert not ran_absorbed(monkeypatch, many)
    assert not ran_absorbed(monkeypatch, many, backend="auto")
    assert ran_absorbed(monkeypatch, many, backend="cpu")
    with ck.use_backend("cpu"):
        assert ran_absorbed(monkeypatch, many)
    with ck.use_backend("reference"):
        assert not ran_absorbed(monkeypatch, few)


def test_dropout_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(without=("b_q",))
    assert not ran_absorbed(monkeypatch, case, dropout_p=0.5)
    inputs = case.inputs()
    dropping = case.function(None, None, dropout_p=0.5)
    assert not torch.equal(dropping(*inputs), dropping(*inputs))
    with pytest.raises(ValueError, match="cpu"):
        case.function("cpu", None, dropout_p=0.5)(*inputs)


@pytest.mark.usefixtures("cpu_backend")
def test_no_graph_without_gradients() -> None:
    case = NORMALISED
    inputs = [None if t is None else t.requires_grad_() for t in case.inputs()]
    with torch.no_grad():
        assert not case.function("cpu", None)(*inputs).requires_grad
    assert case.function("cpu", None)(*inputs).requires_grad


# Arguments

ones = torch.ones
BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"tokens": [1.0]}, TypeError, "tokens: expected a tensor, found list"),
    ({"tokens": ones(3, 13, 40, dtype=torch.int32)}, TypeError, "tokens: .*torch.int32"),
    ({"tokens": ones(13, 40)}, ValueError, r"tokens: expected shape .*, found \[13, 40\]"),
    ({"tokens": ones(3, 0, 40)}, ValueError, "tokens: expected at least one token"),
    ({"tokens": ones(3, 40, 13).mT}, ValueError, "tokens: expected unit stride"),
    ({"tokens": ones(3, 13, 48)}, ValueError, r"w_k: expected shape \[D, 48\]"),
    ({"query": None}, TypeError, "query: expected a tensor"),
    ({"query": ones(1, 24)}, ValueError, r"query: expected shape \[B, Q, C_q\]"),
    ({"query": ones(2, 1, 24)}, ValueError, "query: expected a batch of 1 or 3, found 2"),
    ({"query": ones(1, 0, 24)}, ValueError, "query: expected at least one query"),
    ({"query": ones(1, 1, 25)}, ValueError, r"w_q: expected shape \[36, 25\]"),
    ({"w_q": ones(24, 36)}, ValueError, "w_q: expected shape"),
    ({"w_q": None, "b_q": None}, ValueError, "query: without w_q its width must be 36, found 24"),
    ({"w_q": None, "query": ones(1, 1, 36)}, ValueError, "b_q: given without w_q"),
    ({"b_q": ones(35)}, ValueError, r"b_q: expected shape \[36\], found \[35\]"),
    ({"w_k": None}, TypeError, "w_k: expected a tensor, found NoneType"),
    ({"w_k": ones(36, 41)}, ValueError, "w_k: expected shape"),
    ({"b_k": ones(36, 1)}, ValueError, "b_k: expected shape"),
    ({"w_v": ones(30)}, ValueError, "w_v: expected shape"),
    ({"w_v": "w"}, TypeError, "w_v: expected a tensor, found str"),
    ({"b_v": ones(36)}, ValueError, r"b_v: expected shape \[30\]"),
    ({"w_o": ones(17, 36)}, ValueError, r"w_o: expected shape \[C_out, 30\]"),
    ({"w_o": None}, ValueError, "b_o: given without w_o"),
    ({"b_o": ones(18)}, ValueError, r"b_o: expected shape \[17\]"),
    ({"b_o": ones(17, dtype=torch.bool)}, TypeError, "b_o: expected a floating-point tensor"),
    ({"w_k": ones(36, 40, dtype=torch.float64)}, TypeError, "w_k: is torch.float64, but tokens"),
    ({"query": ones(1, 1, 24).half()}, TypeError, "query: is torch.float16, but tokens"),
    ({"w_v": ones(30, 40, device="meta")}, ValueError, "w_v: is on meta, but tokens is on cpu"),
    ({"num_heads": 3.0}, TypeError, "num_heads: expected an int, found float"),
    ({"num_heads": True}, TypeError, "num_heads: expected an int, found bool"),
    ({"num_heads": 0}, ValueError, "num_heads: expected at least 1"),
    ({"num_heads": 5}, ValueError, "num_heads: 5 does not divide .* 36"),
    ({"num_heads": 9}, ValueError, "num_heads: 9 does not divide .* 30"),
    ({"include_query": True}, ValueError, "include_query: .*24 is not the tokens' 40"),
    ({"key_mask": [True]}, TypeError, "key_mask: expected a tensor"),
    ({"key_mask": ones(3, 13)}, TypeError, "key_mask: expected torch.bool"),
    ({"key_mask": ones(3, 12).bool()}, ValueError, r"key_mask: expected shape \[3, 13\]"),
    ({"key_mask": ones(3, 13, device="meta").bool()}, ValueError, "key_mask: is on meta"),
    ({"query_norm": ones(24)}, TypeError, "query_norm: expected a pair"),
    ({"query_norm": (ones(24),)}, TypeError, "query_norm: expected a pair"),
    ({"query_norm": (ones(40), None)}, ValueError, r"query_norm\[0\]: expected shape \[24\]"),
    ({"query_norm": (1.0, None)}, TypeError, r"query_norm\[0\]: expected a tensor"),
    ({"token_norm": (None, ones(24))}, ValueError, r"token_norm\[1\]: expected shape \[40\]"),
    ({"token_norm": (ones(40).half(), None)}, TypeError, r"token_norm\[0\]: is torch.float16"),
    ({"norm_eps": "small"}, TypeError, "norm_eps: expected a float"),
    ({"norm_eps": -1e-6}, ValueError, "norm_eps: expected a number >= 0"),
    ({"norm_eps": float("nan")}, ValueError, "norm_eps: expected a number >= 0"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p: expected 0 <= p < 1"),
    ({"dropout_p": -0.5}, ValueError, "dropout_p: expected 0 <= p < 1"),
    ({"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
]


@pytest.mark.parametrize(
    ("changed", "error", "message"), BAD_CALLS, ids=[message[:40] for *_, message in BAD_CALLS]
)
def test_arguments_are_checked(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    tensors = [None if t is None else t.float() for t in Case().inputs()]
    arguments: dict[str, Any] = dict(zip(NAMES, tensors, strict=True))
    arguments = {k: v for k, v in arguments.items() if k not in NORMS}
    with pytest.raises(error, match=f"^{message}"):
        ck.attention_pool(**{**arguments, "num_heads": 3, **changed})

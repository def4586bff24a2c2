"""The backend "library", torch's own kernels composed, by the accuracy rule and the contract."""

from __future__ import annotations

import pytest
import torch
from block_cases import check_ffn, check_msa, ffn_weights, msa_weights
from broken_kernels import CASES, assert_close, run
from fusion_cases import IDENTITIES, check_rule, make_weights, without
from operator_checks import check_operators
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels.ops.common import library_attention
from crossvit_kernels.ops.cross_attention.reference import FusionInputs
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs, MsaWeights
from crossvit_kernels.ops.operator import OPERATIONS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPOSED = [name for name in CASES if name != "attention_core"]


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def path(request: pytest.FixtureRequest, monkeypatch) -> None:
    """On a GPU torch chooses the kernel of attention, and backward runs it again."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(library_attention, "_is_cpu", lambda q: False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("path")
def test_accuracy(dtype: torch.dtype) -> None:
    check_msa(64, 2, 3, 20, dtype, scaled=True, with_cls=True, backend="library")
    check_ffn(64, 128, 3, 20, dtype, scaled=True, backend="library")
    check_rule(32, 64, 2, 3, 20, dtype, scaled=True, backend="library")
    check_rule(64, 32, 2, 3, 20, dtype, biases=False, backend="library")


@pytest.mark.parametrize("identity", IDENTITIES)
def test_fusion_without_f_or_g(identity: str) -> None:
    check_rule(32, 32, 2, 3, 20, torch.float32, backend="library", identity=identity)


@pytest.mark.parametrize("keep", ["fast", ""])
def test_operators(keep: str) -> None:
    x, cls = torch.randn(2, 5, 16), torch.randn(2, 16)
    scale = torch.tensor([0.0, 1.4])
    msa = MsaWeights(*(t.float() for t in msa_weights(16)))
    ffn = ck.FfnWeights(*(t.float() for t in ffn_weights(16, 24)))
    check_operators(
        OPERATIONS["layernorm_msa"], MsaInputs(x, msa, 2, scale, cls), 1e-6, "library", keep
    )
    check_operators(OPERATIONS["layernorm_ffn"], FfnInputs(x, ffn, scale), 1e-6, "library", keep)
    for identity in ("", "f", "fg"):
        weights = without(make_weights(16, 16), identity)
        weights = ck.FusionWeights(*(None if w is None else w.float() for w in weights))
        inputs = FusionInputs(cls, x, weights, 2, scale)
        check_operators(OPERATIONS["cross_attention_fusion"], inputs, 1e-6, "library", keep)


@pytest.mark.parametrize("name", COMPOSED)
def test_autocast_second_derivatives_and_no_tokens(name: str) -> None:
    tensors, call = CASES[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = (run(call, tensors, backend) for backend in ("library", "reference"))
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        # k_bias's is rounding errors in the reference, and 0 here.
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1 * float(b.abs().max()) + 1e-3)

    def second(backend: str) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = call(*leaves, backend=backend)
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        loss = sum(g.square().sum() for g in first)
        return list(torch.autograd.grad(loss, leaves, materialize_grads=True))

    for a, b in zip(second("library"), second("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()) + 1e-5)
    index = 1 if name == "cross_attention_fusion" else 0
    tensors[index] = tensors[index][:, :0]
    if name != "layernorm_ffn":
        with pytest.raises(ValueError, match="library: there are no tokens"):
            call(*tensors, backend="library")


def test_it_runs_only_if_named(monkeypatch) -> None:
    for name in COMPOSED:
        tensors, call = CASES[name]()
        backends = OPERATIONS[name].backends
        monkeypatch.setitem(backends, "library", None)  # an error if it is asked
        call(*tensors)
        monkeypatch.undo()
        with ck.use_backend("library"):
            assert_close([call(*tensors)], [call(*tensors, backend="reference")])
    u = torch.randn(1, 2, 8)
    with pytest.raises(ValueError, match="library: no kernels for this operation"):
        ck.attention_core(u, u, backend="library")

"""Inputs of cross_attention_fusion, and checks of a backend by the accuracy rule."""

from __future__ import annotations

import torch
from accuracy import assert_within_rule, eager_dtype, outputs_and_gradients, representable
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels import FusionWeights
from crossvit_kernels.gpu import launcher
from crossvit_kernels.ops.cross_attention.reference import F_FIELDS, G_FIELDS

# (C_cls, C, heads) of both fusions of CrossViT-Ti, S, B, 9, 15 and 18.
NAMED_WIDTHS = [
    (cls_dim, other, heads)
    for small, heads in ((96, 3), (192, 6), (384, 12), (128, 4), (224, 7))
    for cls_dim, other in ((small, 2 * small), (2 * small, small))
]


def make_weights(cls_dim: int, channels: int, biases: bool = True) -> FusionWeights:
    """Make float64 weights of the magnitude of a trained model's."""

    def linear(out: int, inp: int) -> list[Tensor]:
        return [torch.randn(out, inp).double() * inp**-0.5, torch.randn(out).double() * 0.1]

    def norm(width: int) -> list[Tensor]:
        return [1 + 0.2 * torch.randn(width).double(), 0.2 * torch.randn(width).double()]

    attention = [t for _ in range(4) for t in linear(channels, channels)]
    weights = FusionWeights(
        *norm(cls_dim),
        *linear(channels, cls_dim),
        *norm(channels),
        *attention,
        *norm(channels),
        *linear(cls_dim, channels),
    )
    return weights if biases else weights._replace(q_bias=None, k_bias=None, v_bias=None)


#: Which of f and g are the identity.
IDENTITIES = ("f", "g", "fg")


def without(weights: FusionWeights, identity: str) -> FusionWeights:
    """Return the weights without those of f, of g, or of both ("fg")."""
    names = [*F_FIELDS * ("f" in identity), *G_FIELDS * ("g" in identity)]
    return weights._replace(**dict.fromkeys(names))


def fusion_and_gradients(
    cls: Tensor, tokens: Tensor, weights: FusionWeights, num_heads: int, backend: str
) -> tuple[Tensor, ...]:
    """Return the new CLS, and the gradients of cls and tokens."""
    cls, tokens = (t.detach().requires_grad_() for t in (cls, tokens))
    new_cls = ck.cross_attention_fusion(cls, tokens, weights, num_heads, backend=backend)
    return new_cls, *torch.autograd.grad(new_cls.square().sum(), (cls, tokens))


def check_frozen_tokens(backend: str, device: str, num_tokens: int = 21) -> None:
    """Check that without the tokens' gradient the others have the same bits."""
    results = []
    cls, tokens = torch.randn(3, 32, device=device), torch.randn(3, num_tokens, 48, device=device)
    weights = [w.float().to(device).requires_grad_() for w in make_weights(32, 48)]
    for is_frozen in (False, True):
        leaves = [cls.detach().requires_grad_(), *weights]
        x = tokens.detach().requires_grad_(not is_frozen)
        y = ck.cross_attention_fusion(leaves[0], x, FusionWeights(*weights), 3, backend=backend)
        results.append(torch.autograd.grad(y.square().sum(), leaves))
    assert all(map(torch.equal, *results))


def check_rule(
    cls_dim: int,
    channels: int,
    heads: int,
    batch: int,
    num_tokens: int,
    dtype: torch.dtype,
    biases: bool = True,
    scaled: bool = False,
    mean: float = 0.0,
    backend: str = "cpu",
    device: str = "cpu",
    identity: str = "",
) -> None:
    """Check the new CLS and the gradients of the CLS, the tokens and every weight.

    ``identity`` says which of f and g are the identity.
    """
    weights = without(make_weights(cls_dim, channels, biases), identity)
    inputs = [
        torch.randn(batch, channels if "f" in identity else cls_dim).double(),
        mean + torch.randn(batch, num_tokens, channels).double(),
        *weights,
    ]
    inputs = [None if t is None else representable(t, dtype).to(device) for t in inputs]
    new_dim = channels if "g" in identity else cls_dim
    upstream = [representable(torch.randn(batch, new_dim).double(), dtype).to(device)]
    scale = (torch.rand(batch) < 0.7).double().to(device) / 0.7 if scaled else None

    def run(backend: str):
        def fusion(cls: Tensor, tokens: Tensor, *w: Tensor | None) -> Tensor:
            w = iter(w)
            w = FusionWeights(*(None if f is None else next(w) for f in weights))
            return ck.cross_attention_fusion(
                cls, tokens, w, heads, residual_scale=scale, backend=backend
            )

        return fusion

    present = [t for t in inputs if t is not None]
    exact = outputs_and_gradients(run("reference"), present, upstream, torch.float64)
    eager = outputs_and_gradients(run("reference"), present, upstream, eager_dtype(dtype))
    actual = outputs_and_gradients(run(backend), present, upstream, dtype)
    fields = [f for f, w in zip(FusionWeights._fields, weights, strict=True) if w is not None]
    names = ["new_cls", "cls", "tokens", *fields]
    eps = torch.finfo(dtype).eps
    for name, a, e, x in zip(names, actual, eager, exact, strict=True):
        if name == "k_bias":
            assert (a == 0).all()
            continue
        # q and k act through differences of scores: with few tokens these cancel, and
        # what is left is the rounding of terms of about ten.
        floor = 12 * eps * batch**0.5 if num_tokens < 8 else 0.0
        assert_within_rule(a, e, x, name, absolute_floor=floor)


def launches(monkeypatch) -> list[str]:
    """Record the names of launched kernels."""
    names: list[str] = []

    def start(kernel, *args, **kwargs):
        names.append(kernel.__name__)
        return launch(kernel, *args, **kwargs)

    launch = launcher.start
    monkeypatch.setattr(launcher, "start", start)
    return names

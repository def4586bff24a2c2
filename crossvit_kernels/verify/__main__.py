"""``python -m crossvit_kernels.verify``: compare every backend here with the reference.

Runs each operation, forward and backward, at the widths of models, on all usable backends of this
machine's device and the variants of their kernels. Exits with status 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from crossvit_kernels import functional, identity
from crossvit_kernels.backends import backends
from crossvit_kernels.ops.cross_attention.reference import FusionWeights
from crossvit_kernels.ops.layernorm_ffn.reference import FfnWeights
from crossvit_kernels.ops.layernorm_msa.reference import MsaWeights
from crossvit_kernels.ops.operator import OPERATIONS
from crossvit_kernels.verify import state
from crossvit_kernels.verify.compare import tensors_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main(arguments: Sequence[str] | None = None) -> int:
    """Verify, print what was found, and return 1 if anything was retired, else 0."""
    parser = argparse.ArgumentParser(prog="python -m crossvit_kernels.verify", description=__doc__)
    add = parser.add_argument
    add("--channels", type=int, nargs="+", default=[96, 192, 384])
    add("--batch", type=int, nargs="+", default=[1, 64, 256])
    add("--tokens", type=int, default=197)
    add("--backends", nargs="+", help="or variants; by default all that are usable")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usable = backends()
    state.forget()
    with state.verification("first", trust_evidence=False):
        for channels in options.channels:
            for batch in options.batch:
                for dtype in _DTYPES:
                    calls = _calls(batch, options.tokens, channels, dtype, device)
                    for operation, call in calls:
                        for name in OPERATIONS[operation].backends:
                            if usable[name.partition(":")[0]] and _is_asked(name, options.backends):
                                _verify(call, name)
        print(identity.key(device))
        print("\n".join(state.report()))
    return 1 if state.retired else 0


Verified = Callable[[str], Any]


def _calls(
    batch: int, num_tokens: int, channels: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[str, Verified]]:
    heads, generator = max(channels // 64, 1), torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        t = torch.randn(shape, dtype=torch.float32, device=device, generator=generator)
        return (t if len(shape) != 2 else t * shape[1] ** -0.5).to(dtype).requires_grad_()

    c, hidden = channels, 3 * channels
    x, cls, u = random(batch, num_tokens, c), random(batch, c), random(batch, heads, c)
    affine = random(c), random(c)
    msa = MsaWeights(*affine, random(3 * c, c), random(3 * c), random(c, c), random(c))
    ffn = FfnWeights(*affine, random(hidden, c), random(hidden), random(c, hidden), random(c))
    fusion = FusionWeights(
        *(
            random(c, c) if name.endswith("weight") and "norm" not in name else random(c)
            for name in FusionWeights._fields
        )
    )
    ck, scale = functional, random(c)
    options: dict[str, Any] = {"activation": "quick_gelu", "layer_scale": scale}
    return [
        ("attention_core", lambda name: ck.attention_core(u, x, backend=name)),
        (
            "cross_attention_fusion",
            lambda name: ck.cross_attention_fusion(cls, x, fusion, heads, backend=name),
        ),
        ("layernorm_msa", lambda name: ck.layernorm_msa(x, msa, heads, backend=name)),
        (
            "layernorm_msa",
            lambda name: ck.layernorm_msa(x, msa, heads, layer_scale=scale, backend=name),
        ),
        ("layernorm_ffn", lambda name: ck.layernorm_ffn(x, ffn, backend=name)),
        ("layernorm_ffn", lambda name: ck.layernorm_ffn(x, ffn, **options, backend=name)),
    ]


def _is_asked(name: str, asked: Sequence[str] | None) -> bool:
    return not asked or name in asked or name.partition(":")[0] in asked


def _verify(call: Verified, backend: str) -> None:
    try:
        with torch.no_grad():
            call(backend)
        outputs = tensors_of(call(backend))
    except ValueError as error:  # no kernel takes it
        print(f"{backend}: {str(error).splitlines()[0]}", flush=True)
        return
    # Of both signs: sums of thousands of positive ones pass float16's largest number.
    device = outputs[0].device
    generator = torch.Generator(device).manual_seed(1)
    douts = [
        torch.randn(t.shape, dtype=torch.float32, device=device, generator=generator).to(t.dtype)
        for t in outputs
    ]
    torch.autograd.backward(outputs, douts)


if __name__ == "__main__":
    sys.exit(main())

"""Cases of attention_pool: CASES covers every argument that changes the mathematics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accuracy import representable
from torch import Tensor

import crossvit_kernels as ck

WEIGHTS = ("w_q", "b_q", "w_k", "b_k", "w_v", "b_v", "w_o", "b_o")
NORMS = ("query_gamma", "query_beta", "token_gamma", "token_beta")
NAMES = ("query", "tokens", *WEIGHTS, *NORMS)


@dataclass(frozen=True)
class Case:
    """Shapes and options of a call. Widths differ unless an option requires equal ones."""

    batch: int = 3
    queries: int = 1
    tokens: int = 13
    heads: int = 3
    query_width: int = 24  # C_q
    width: int = 36  # D
    channels: int = 40  # C
    value_width: int = 30  # D_v
    out_width: int = 17  # C_out
    per_image: bool = False  # one query per image, not shared
    without: tuple[str, ...] = ()  # parameters that are None
    query_norm: bool = False
    token_norm: bool = False
    mask: str = ""  # "random", or "one image empty"
    include_query: bool = False
    scale: float | None = None
    return_weights: bool = False

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
        """Make float64 tensors, representable in dtype, in the order of NAMES."""
        query_width = self.width if "w_q" in self.without else self.query_width
        query_width = self.channels if self.include_query else query_width
        shapes = {
            "query": (self.batch if self.per_image else 1, self.queries, query_width),
            "tokens": (self.batch, self.tokens, self.channels),
            "w_q": (self.width, query_width),
            "b_q": (self.width,),
            "w_k": (self.width, self.channels),
            "b_k": (self.width,),
            "w_v": (self.value_width, self.channels),
            "b_v": (self.value_width,),
            "w_o": (self.out_width, self.value_width),
            "b_o": (self.out_width,),
            "query_gamma": (query_width,),
            "query_beta": (query_width,),
            "token_gamma": (self.channels,),
            "token_beta": (self.channels,),
        }
        absent = set(self.without)
        absent |= set() if self.query_norm else set(NORMS[:2])
        absent |= set() if self.token_norm else set(NORMS[2:])
        tensors = []
        for name, shape in shapes.items():
            t = torch.randn(shape, dtype=torch.float64)
            if name.startswith("w_"):
                t *= 2 * shape[-1] ** -0.5  # scores of moderate size
            tensors.append(None if name in absent else representable(t, dtype))
        return tensors

    def key_mask(self) -> Tensor | None:
        if not self.mask:
            return None
        mask = torch.rand(self.batch, self.tokens) < 0.6
        mask[:, 1] = True
        if self.mask == "one image empty":
            mask[1] = False
        return mask

    def function(self, backend: str | None, mask: Tensor | None, **options: Any) -> Callable:
        """Return attention_pool as a function of tensors in the order of NAMES."""

        def call(query: Tensor, tokens: Tensor, *parameters: Tensor | None) -> Any:
            weights, norms = parameters[: len(WEIGHTS)], parameters[len(WEIGHTS) :]
            return ck.attention_pool(
                *(query, tokens, *weights),
                num_heads=self.heads,
                scale=self.scale,
                include_query=self.include_query,
                key_mask=mask,
                query_norm=norms[:2] if self.query_norm else None,
                token_norm=norms[2:] if self.token_norm else None,
                return_weights=self.return_weights,
                backend=backend,
                **options,
            )

        return call

    def upstream(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Random gradients of the outputs."""
        out_width = self.value_width if "w_o" in self.without else self.out_width
        shapes = [(self.batch, self.queries, out_width)]
        if self.return_weights:
            keys = self.tokens + self.queries * self.include_query
            shapes.append((self.batch, self.queries, self.heads, keys))
        return [representable(torch.randn(s, dtype=torch.float64), dtype) for s in shapes]

    def result_names(self, inputs: list[Tensor | None]) -> list[str]:
        outputs = ["out", "weights"] if self.return_weights else ["out"]
        return outputs + [f"d {n}" for n, t in zip(NAMES, inputs, strict=True) if t is not None]


ALL_BIASES = ("b_q", "b_k", "b_v", "b_o")
NORMALISED = Case(query_norm=True, token_norm=True)

CASES = {
    "shared query": Case(),
    "query per image": Case(per_image=True),
    "three shared queries": Case(queries=3),
    "three queries per image": Case(queries=3, per_image=True),
    "one image": Case(batch=1, queries=2),
    "one token": Case(tokens=1),
    "one head": Case(heads=1),
    "six heads": Case(heads=6, width=42, value_width=18, queries=2),
    "seven heads": Case(heads=7, width=56, value_width=35, channels=56, query_width=56),
    "equal widths": Case(query_width=24, width=24, channels=24, value_width=24, out_width=24),
    **{f"without {bias}": replace(NORMALISED, without=(bias,)) for bias in ALL_BIASES},
    "without biases": Case(without=ALL_BIASES),
    "projected query": Case(without=("w_q", "b_q")),
    "projected query per image": Case(without=("w_q", "b_q"), queries=2, per_image=True),
    "no output projection": Case(without=("w_o", "b_o")),
    "nothing but w_k and w_v": Case(without=("w_q", "w_o", *ALL_BIASES)),
    "query norm": Case(query_norm=True),
    "token norm": Case(token_norm=True),
    "both norms": NORMALISED,
    "norms without affine": replace(NORMALISED, without=NORMS),
    "norms without weight": replace(NORMALISED, without=("query_gamma", "token_gamma")),
    "norms without bias": replace(NORMALISED, without=("query_beta", "token_beta")),
    "query included": Case(include_query=True),
    "query included, per image, norms": replace(NORMALISED, include_query=True, per_image=True),
    "query included, no other token": Case(include_query=True, tokens=0),
    "three queries included": Case(include_query=True, queries=3),
    "three queries included, norms": replace(
        NORMALISED, include_query=True, queries=3, per_image=True
    ),
    "mask": Case(mask="random"),
    "mask, norms, three queries": replace(NORMALISED, mask="random", queries=3),
    "mask, query included": Case(mask="random", include_query=True),
    "mask, three queries included": Case(mask="random", include_query=True, queries=3),
    "empty image": Case(mask="one image empty"),
    "empty image, norms": replace(NORMALISED, mask="one image empty", queries=2),
    "empty image, no output projection": Case(mask="one image empty", without=("w_o", "b_o")),
    "empty image, query included": replace(
        NORMALISED, mask="one image empty", include_query=True, per_image=True
    ),
    "scale": Case(scale=0.7),
    "scale of zero": Case(scale=0.0),
    "weights": Case(return_weights=True),
    "weights, norms, three queries": replace(NORMALISED, return_weights=True, queries=3),
    "weights, mask": replace(NORMALISED, return_weights=True, mask="random"),
    "weights, empty image": Case(return_weights=True, mask="one image empty", queries=2),
    "weights, query included": Case(return_weights=True, include_query=True, mask="random"),
    "weights, three queries included": replace(
        NORMALISED, return_weights=True, include_query=True, queries=3
    ),
}

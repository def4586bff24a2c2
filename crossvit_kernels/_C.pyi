"""The compiled extension (csrc/bindings/). Addresses are ints; strides count elements."""

from typing import Any

_Problem = tuple[int, int, int, int, bool, float]
_Rows = tuple[int, int, int]
_Tokens = tuple[int, int, int, int, int, int]
_Mask = tuple[int, int, int]
_Parameter = tuple[int, int]
_TokenRows = tuple[int, int, int, int, int, int, int, int]
_Norm = tuple[int, int, float, int, int, int]
_Linear = tuple[int, int]

cuda_architectures: str
cuda: Any  # csrc/bindings/cuda.cpp, where there are cuda_architectures

def attention_core_forward(
    problem: _Problem, x: _Tokens, u: _Rows, mask: _Mask, m: _Rows, lse: int
) -> None: ...
def attention_core_backward(
    problem: _Problem,
    x: _Tokens,
    u: _Rows,
    mask: _Mask,
    m: _Rows,
    lse: int,
    dm: _Rows,
    dlse: int,
    du: _Rows,
    dx: _Tokens,
) -> None: ...
def cross_attention_forward(
    problem: tuple[int, int, int, int, int, float],
    cls: _Parameter,
    tokens: _Tokens,
    weights: list[_Parameter],
    residual_scale: _Parameter,
    vectors: int,
    y0_token: int,
    new_cls: _Parameter,
) -> None: ...
def layernorm_msa_forward(
    x: _TokenRows,
    norm: _Norm,
    qkv: _Linear,
    out: _Linear,
    num_heads: int,
    residual_scale: int,
    layer_scale: int,
    key_mask: int,
    qkv_rows: int,
    heads: int,
    lse: int,
    y: int,
) -> None: ...
def layernorm_ffn_forward(
    x: _TokenRows,
    norm: _Norm,
    fc1: _Linear,
    fc2: _Linear,
    hidden_width: int,
    activation: int,
    residual_scale: int,
    layer_scale: int,
    hidden: int,
    activated: int,
    y: int,
) -> None: ...
def usable_isas() -> list[str]: ...
def active_isa() -> str: ...
def use_isa(name: str) -> None: ...
def cuda_self_check(device: int) -> str: ...

"""Hold the cycle model against kernels whose speed on GPUs is published.

    python bench/model_validation.py [--json FILE]

Compiles a copy, a matrix product and the forward pass of attention over a long sequence, models
them, and prints what was measured elsewhere beside that. Nothing here is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import io
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from crossvit_kernels import supported
from crossvit_kernels.gpu.launcher import Usage
from crossvit_kernels.inspect import machine_code
from crossvit_kernels.inspect.model.estimate import estimate
from crossvit_kernels.inspect.model.gpus import A100, H100, H200, Gpu
from crossvit_kernels.inspect.model.launch import Launch, launch_of

EXPECTED = {
    "*bf16": torch.bfloat16,
}


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """c = a b, [M, K] times [K, N], row by row, as in Triton's tutorial."""
    program = tl.program_id(0)
    columns = tl.cdiv(N, BN)
    group = program // (GROUP * columns)
    row = group * GROUP + program % GROUP
    column = (program % (GROUP * columns)) // GROUP
    rows, cols, ks = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN), tl.arange(0, BK)
    a_at = a_ptr + rows[:, None] * K + ks[None, :]
    b_at = b_ptr + ks[:, None] * N + cols[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, K, BK):
        acc = tl.dot(tl.load(a_at), tl.load(b_at), acc)
        a_at += BK
        b_at += BK * N
    tl.store(c_ptr + rows[:, None] * N + cols[None, :], acc.to(tl.bfloat16))


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, N, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr
):
    """Attention without a mask, [batch * heads, N, D]."""
    base = tl.program_id(1).to(tl.int64) * N * D
    rows, cols, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    q = tl.load(q_ptr + base + rows[:, None] * D + d[None, :])
    k_at = k_ptr + base + cols[None, :] * D + d[:, None]
    v_at = v_ptr + base + cols[:, None] * D + d[None, :]
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for _ in range(0, N, BN):
        scores = tl.dot(q, tl.load(k_at))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(p.to(tl.bfloat16), tl.load(v_at), acc)
        peak = new_peak
        k_at += BN * D
        v_at += BN * D
    acc = acc / total[:, None]
    tl.store(o_ptr + base + rows[:, None] * D + d[None, :], acc.to(tl.bfloat16))

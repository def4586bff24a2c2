"""Whose matrix products a transformer block on a CPU uses: the extension's or torch's."""

from __future__ import annotations

from crossvit_kernels import extension


def widest() -> int:
    """The widest tokens at which the extension's products are the faster ones.

    They copy the weights into panels in each call. From some width on these no longer stay in a
    core's cache, and torch's library is faster at any number of rows, with AVX-512 earlier than
    with AVX2 (``bench/block_bench.py --preset few-rows``). The choice does not follow the batch, so
    that neither does an image's result.
    """
    return 256 if extension.cpu_instruction_set() == "x86-64-v4" else 512

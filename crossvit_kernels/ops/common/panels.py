"""The choice between the extension's and torch's matrix products in blocks on a CPU."""

from __future__ import annotations

from crossvit_kernels import extension


def widest() -> int:
    """Return the largest width at which the extension's products are faster.

    They repack the weights into panels in each call. Beyond some width these no longer fit in a
    core's cache, and torch's library is faster at any number of rows, with AVX-512 sooner than with
    AVX2 (``bench/block_bench.py --preset few-rows``). The choice is independent of the batch, so an
    image's result is too.
    """
    return 256 if extension.cpu_instruction_set() == "x86-64-v4" else 512

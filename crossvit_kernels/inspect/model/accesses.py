"""Count what an access to memory costs: passes of the shared-memory pipe, and sectors of L2.

Shared memory has 32 banks of 4 bytes and serves 128 bytes a cycle: an access of 16 bytes a lane is
done for 8 lanes at a time, one of 8 bytes for 16. Lanes that read several words of one bank take a
pass (wavefront) for each; lanes that read the same word share it. Global memory moves in sectors of
32 bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

#: Tensors lie so far apart in the addresses that kernels are given.
TENSOR_BYTES = 1 << 40

BANKS, BANK_BYTES, SECTOR_BYTES, LINE_BYTES = 32, 4, 32, 128

Array = Any


class Access(NamedTuple):
    """One execution of a load, store or copy by several warps.

    Attributes:
        wavefronts: Passes of the shared-memory pipe, by warp.
        sectors: Sectors of 32 bytes that go to L2, by warp.
        tensor: Number of the tensor in global memory; -1 for none, or one that is not known.
        remote: Bytes to or from the shared memory of the cluster's other blocks, by warp.
        barrier: Address of the mbarrier that is waited for, arrived at or signalled; by warp.
        amount: Of a wait: the parity. Of an initialization: the arrivals of a phase. Of a product:
            its columns. Else bytes of copies: that an arrival announces, or that a copy brings.
        arrivals: At the mbarrier; of a product: its rows; by warp.
    """

    wavefronts: list[int]
    sectors: list[int]
    tensor: int
    remote: list[int] | None = None
    barrier: list[int] | None = None
    amount: list[int] | None = None
    arrivals: list[int] | None = None

    def of(self, row: int) -> tuple[int, ...]:
        """Of one of the warps, without what it has not."""
        step = self.wavefronts[row], self.sectors[row], self.tensor
        if self.remote is None and self.barrier is None:
            return step
        rest = (self.remote, self.barrier, self.amount, self.arrivals)
        return (*step, *(0 if of is None else of[row] for of in rest))


def shared_wavefronts(addresses: Array, access_bytes: int, active: Array) -> Array:
    """Passes that an access to shared memory takes, by warp.

    Args:
        addresses: In bytes, [warps, 32].
        access_bytes: Of a lane: 1 to 16.
        active: The lanes that take part, [warps, 32].
    """
    passes, words = max(access_bytes // 4, 1), max(access_bytes // BANK_BYTES, 1)
    word = addresses[..., None] // BANK_BYTES + np.arange(words)
    word = np.where(active[..., None], word, -1).reshape(len(addresses) * passes, -1)
    word.sort(axis=-1)
    counts = _distinct(word)
    rows, _ = np.nonzero(counts)
    bank = rows * BANKS + word[counts] % BANKS
    by_bank = np.bincount(bank, minlength=len(word) * BANKS).reshape(len(word), BANKS)
    return by_bank.max(axis=1).reshape(-1, passes).sum(axis=1)


def global_wavefronts(addresses: Array, access_bytes: int, active: Array) -> Array:
    """Passes that an access to global memory takes in the L1, by warp: one for each line."""
    passes = max(access_bytes // 4, 1)
    line = np.where(active, addresses // LINE_BYTES, -1).reshape(len(addresses) * passes, -1)
    line.sort(axis=-1)
    return _distinct(line).sum(axis=1).reshape(-1, passes).sum(axis=1)


def sectors(addresses: Array, access_bytes: int, active: Array) -> tuple[Array, Array]:
    """Sectors of global memory [warps, lanes] in order, and which of them are there and distinct.

    A lane's access is aligned, so that it lies in one sector.
    """
    sector = np.where(active, addresses // SECTOR_BYTES, -1)
    sector.sort(axis=-1)
    return sector, _distinct(sector)


def _distinct(ordered: Array) -> Array:
    """In ordered rows, where a new number that is not -1 begins."""
    new = np.ones(ordered.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return new & (ordered >= 0)

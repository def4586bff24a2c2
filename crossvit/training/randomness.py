"""Random numbers as a function of what they are for, so that resuming restores no generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(*path: int) -> int:
    """Return a 64-bit seed for a path such as (seed, epoch, position)."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0])


def seed_all(*path: int) -> None:
    """Seed Python's, NumPy's and torch's generators, on all devices."""
    seed = derive(*path)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


@contextmanager
def seeded(*path: int) -> Iterator[None]:
    """Seed the generators of the CPU for a block, and restore them after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = derive(*path)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])

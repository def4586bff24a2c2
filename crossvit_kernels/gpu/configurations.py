"""Which configurations a pass over tokens, and a fusion around it, may run in.

Nothing is measured on a call's way: there are tables, and gpu/tuned.py goes before them. A table
has the configuration that is preferred; smaller ones follow it for compilers that have no registers
or no shared memory for that (gpu/candidates.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager

from crossvit_kernels.gpu import tuned
from crossvit_kernels.gpu.forms import Forms

#: "one" or "three" kernels for every fusion that can, rather than what its batch suggests.
FORMS = Forms("one", "three")

#: Up to so many tokens of an image, a program of a fusion takes all of them; more would keep it
#: waiting for long, and attention_core splits them.
MANY_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class TokenPass:
    """A pass over the tokens.

    Attributes:
        chunk: Channels that are loaded together.
        tokens: Tokens of a step.
        num_warps: Warps of a program.
        num_stages: Steps whose loads are in flight.
        part: Tokens of a program. It does not follow the batch, so that neither does a result.
    """

    chunk: int
    tokens: int
    num_warps: int
    num_stages: int
    part: int = 1024

    def and_fewer_stages(self) -> tuple[TokenPass, ...]:
        """Itself and what to try where it does not fit; the bits of a result stay."""
        return tuple(dataclasses.replace(self, num_stages=n) for n in range(self.num_stages, 0, -1))

    def and_smaller(self) -> tuple[TokenPass, ...]:
        """The same, then more warps, fewer tokens and channels, with which results are rounded
        otherwise.
        """
        warps, fewer = max(self.num_warps, 8), max(self.tokens // 2, 16)
        return tuple(
            dataclasses.replace(config, num_warps=num_warps, tokens=tokens, chunk=chunk)
            for num_warps, tokens, chunk in (
                (self.num_warps, self.tokens, self.chunk),
                (warps, self.tokens, self.chunk),
                (warps, fewer, self.chunk),
                (warps, fewer, max(self.chunk // 2, 32)),
            )
            for config in self.and_fewer_stages()
        )


# (widest C, configuration), narrowest first.
_Rows = tuple[tuple[int, TokenPass], ...]

# (kernel, bytes of an element): where a chip has no rows of its own.
_TOKEN_PASSES: dict[tuple[str, int], _Rows] = {
    ("forward", 2): (
        (96, TokenPass(32, 64, 4, 3)),
        (128, TokenPass(128, 64, 4, 3)),
        (192, TokenPass(64, 64, 4, 3)),
        (224, TokenPass(32, 64, 4, 3)),
        (256, TokenPass(128, 64, 4, 3)),
        (384, TokenPass(128, 32, 4, 3)),
        (448, TokenPass(64, 32, 4, 3)),
        (768, TokenPass(128, 32, 8, 2)),
        (1536, TokenPass(128, 16, 8, 2)),
    ),
    ("backward", 2): (
        (96, TokenPass(32, 32, 8, 2)),
        (128, TokenPass(128, 32, 8, 2)),
        (192, TokenPass(64, 32, 4, 2)),
        (224, TokenPass(128, 32, 8, 2)),
        (384, TokenPass(128, 32, 8, 2)),
        (448, TokenPass(64, 32, 8, 2)),
        (768, TokenPass(128, 16, 8, 2)),
        (1536, TokenPass(128, 16, 16, 2)),
    ),
    ("fusion forward", 2): (
        (96, TokenPass(32, 64, 8, 2)),
        (128, TokenPass(128, 64, 8, 2)),
        (192, TokenPass(64, 64, 8, 2)),
        (224, TokenPass(32, 64, 8, 2)),
        (256, TokenPass(128, 64, 8, 2)),
        (384, TokenPass(128, 32, 8, 2)),
        (448, TokenPass(64, 32, 8, 2)),
        (768, TokenPass(128, 32, 8, 2)),
        (1536, TokenPass(128, 16, 8, 2)),
    ),
    ("fusion backward", 2): (
        (96, TokenPass(32, 16, 8, 2)),
        (128, TokenPass(128, 32, 8, 2)),
        (192, TokenPass(64, 16, 8, 2)),
        (384, TokenPass(128, 16, 8, 2)),
        (448, TokenPass(64, 16, 8, 2)),
        (768, TokenPass(128, 16, 8, 2)),
        (1536, TokenPass(128, 16, 16, 2)),
    ),
    ("fusion forward", 4): (
        (256, TokenPass(32, 16, 8, 2)),
        (1536, TokenPass(64, 16, 8, 2)),
    ),
    ("fusion backward", 4): (
        (256, TokenPass(32, 16, 8, 2)),
        (1536, TokenPass(64, 16, 8, 2)),
    ),
    ("forward", 4): (
        (256, TokenPass(32, 32, 4, 2)),
        (448, TokenPass(32, 16, 8, 2)),
        (1536, TokenPass(64, 16, 8, 2)),
    ),
    ("backward", 4): (
        (256, TokenPass(32, 16, 4, 2)),
        (448, TokenPass(32, 16, 8, 2)),
        (1536, TokenPass(64, 16, 8, 2)),
    ),
}


# (chip, kernel, bytes of an element): what differs there, by the row's widest. One stage, where two
# of them leave an A100 too few registers.
_ON_CHIP: dict[tuple[int, str, int], dict[int, TokenPass]] = {
    (80, "fusion forward", 2): {
        128: TokenPass(128, 64, 8, 1),
        224: TokenPass(32, 64, 8, 1),
    },
    (80, "fusion backward", 2): {
        96: TokenPass(32, 16, 8, 1),
        128: TokenPass(128, 32, 8, 1),
        192: TokenPass(64, 16, 8, 1),
        384: TokenPass(128, 16, 8, 1),
        448: TokenPass(64, 16, 8, 1),
        1536: TokenPass(128, 16, 8, 2),
    },
}


# The configuration of every pass in a context of `only`.
_only: TokenPass | None = None


@contextmanager
def only(config: TokenPass) -> Iterator[None]:
    """Run every pass in one configuration, whatever tables and measurements say."""
    global _only
    previous, _only = _only, config
    try:
        yield
    finally:
        _only = previous


def candidates(
    kernel: str, device: str, chip: int, channels: int, element_size: int
) -> tuple[tuple[TokenPass, ...], bool]:
    """The configurations of a pass ("forward", "fusion backward", ...) over tokens of a width, and
    whether the first was measured.

    Args:
        kernel: What passes over the tokens.
        device: The device's name, as torch gives it.
        chip: Its compute capability, 90 for 9.0.
        channels: C.
        element_size: Bytes of an element.

    Raises:
        ValueError: The file of measurements cannot be read or holds something else.
    """
    if _only:
        return (_only,), False
    return _measured_or_from_table(kernel, device, chip, channels, element_size)


@functools.cache
def _measured_or_from_table(
    kernel: str, device: str, chip: int, channels: int, element_size: int
) -> tuple[tuple[TokenPass, ...], bool]:
    measured = tuned.configuration(TokenPass, tuned.key(kernel, device, channels, element_size))
    config = from_table(kernel, chip, channels, element_size)
    # A fusion takes one kernel or three by its batch, on which a result's bits must not depend.
    is_fusion = kernel.startswith("fusion")
    table = config.and_fewer_stages() if is_fusion else config.and_smaller()
    if measured is None:
        return table, False
    return (measured, *(dataclasses.replace(c, part=measured.part) for c in table)), True


def from_table(kernel: str, chip: int, channels: int, element_size: int) -> TokenPass:
    """What is preferred where nothing was measured."""
    differs = _ON_CHIP.get((chip, kernel, element_size), {})
    for widest, config in _TOKEN_PASSES[kernel, element_size]:
        if channels <= widest:
            return differs.get(widest, config)
    raise ValueError(f"{channels} channels are more than any configuration takes")


def forget() -> None:
    """Read the file of measurements again when it is next needed."""
    tuned.forget()
    _measured_or_from_table.cache_clear()


@dataclasses.dataclass(frozen=True)
class Fusion:
    """How a fusion's kernels run. Whichever form runs, a result's bits are the same.

    Attributes:
        block_k: Columns of a weight matrix that are loaded together, along the sum.
        block_n: And along the result.
        one_kernel_up_to: The largest batch that one kernel does in all; above it three do.
        programs: Images share a program, and its pass over the weights, once there are more.
        most_images: Of a program: no more than the 16 rows of a tensor-core tile.
    """

    block_k: int = 64
    block_n: int = 64
    one_kernel_up_to: int = 64
    programs: int = 64
    most_images: int = 16

    def images(self, batch: int) -> int:
        """Images of a program: a power of two."""
        return min(self.most_images, next_power_of_2(-(-batch // self.programs)))

    def in_one_kernel(self, batch: int) -> bool:
        """Whether one kernel does it all, as FORMS asks, else by the batch."""
        form = FORMS.asked_for
        if form == "auto" or not self.one_kernel_up_to:
            return batch <= self.one_kernel_up_to
        return form == "one"


# Which form, and from which batch on, is predicted (docs/performance.md), not measured.
_FUSION = Fusion()
# Backward in one kernel runs out of registers, and so do whole rows of 16 images.
_FUSION_IN_THREE = Fusion(one_kernel_up_to=0, most_images=8)


@functools.cache
def fusion(kernel: str, chip: int, channels: int) -> Fusion:
    """The configuration of "fusion forward" or "fusion backward"."""
    if kernel == "fusion backward" and channels > 448:
        return _FUSION_IN_THREE
    if kernel == "fusion backward" and channels > 384 and chip == 80:
        return Fusion(block_n=32)  # an A100 again
    return _FUSION


@functools.cache
def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()

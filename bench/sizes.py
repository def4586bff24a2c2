"""The named models' sizes. Imports nothing, so that the suite can read it before building."""

from __future__ import annotations

from typing import NamedTuple


class Width(NamedTuple):
    """Sizes of the S branch; the L branch has twice the channels."""

    channels: int
    heads: int
    hidden_ratio: int  # hidden units per channel


WIDTHS = {
    "Ti": Width(96, 3, 4),
    "S": Width(192, 6, 4),
    "B": Width(384, 12, 4),
    "9": Width(128, 4, 3),
    "15": Width(192, 6, 3),
    "18": Width(224, 7, 3),
}
#: Tokens of each branch at 240 pixels, including the CLS.
TOKENS = {"S": 401, "L": 197}

"""The tables of attention's Triton kernels; for attention alone the width is the head dimension."""

from __future__ import annotations

from crossvit_kernels.ops.common.configs import RowTable, RowTile
from crossvit_kernels.ops.common.library import Figures, Step

ATTENTION = RowTable(
    "attention",
    {
        2: (
            (32, RowTile(64, 64, 16, 4, 3)),
            (64, RowTile(64, 32, 16, 4, 3)),
            (128, RowTile(128, 64, 16, 8, 2)),
        ),
        4: ((128, RowTile(32, 32, 16, 8, 1)),),
    },
    few={
        2: (
            (64, RowTile(64, 64, 16, 4, 3)),
            (128, RowTile(64, 64, 16, 4, 2)),
        ),
    },
    on_sm={
        (90, 2): {
            32: RowTile(64, 64, 16, 4, 3, 80),
            64: RowTile(64, 32, 16, 4, 3, 80),
        },
    },
)

BACKWARD_QUERIES = RowTable(
    "attention backward queries",
    {
        2: (
            (64, RowTile(64, 32, 16, 4, 3)),
            (128, RowTile(64, 32, 16, 4, 2)),
        ),
        4: ((128, RowTile(32, 32, 16, 8, 1)),),
    },
)

BACKWARD_KEYS = RowTable(
    "attention backward keys",
    {
        2: (
            (64, RowTile(64, 32, 16, 4, 3)),
            (128, RowTile(64, 32, 16, 8, 2)),
        ),
        4: (
            (64, RowTile(32, 32, 16, 4, 1)),
            (128, RowTile(32, 32, 16, 8, 1)),
        ),
    },
)

# Who does a step, and the model's figures as the reason: from bench/library_model.py.
#: LayerNorm, q, k and v.
QKV = Step({192: Figures(85.9, 98.7), 384: Figures(114.5, 122.0)})
#: Of q, k and v.
SELF_ATTENTION = Step({192: Figures(135.0, 182.6), 384: Figures(66.8, 84.3)}, in_float32=False)
#: And the residual.
PROJECTION = Step({192: Figures(32.3, 54.6), 384: Figures(43.6, 60.5)})

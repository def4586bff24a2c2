"""The tables of attention's Triton kernels; for attention alone the width is the head dimension."""

from __future__ import annotations

from crossvit_kernels.ops.common.configs import RowTable, RowTile

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
)

ATTENTION_PROJECTION = RowTable(
    "attention projection",
    {
        2: (
            (96, RowTile(128, 64, 32, 8, 2)),
            (128, RowTile(128, 64, 128, 8, 2)),
            (192, RowTile(128, 64, 64, 8, 2)),
            (224, RowTile(64, 64, 32, 8, 2)),
            (384, RowTile(64, 64, 128, 8, 2)),
            (448, RowTile(64, 64, 64, 8, 2)),
        ),
        4: ((192, RowTile(32, 32, 32, 8, 1)),),
    },
    on_sm={
        (80, 2): {
            192: RowTile(32, 64, 64, 8, 2),
            448: RowTile(32, 64, 64, 8, 2),
        },
    },
    fused_up_to=128,
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
        4: ((128, RowTile(32, 32, 16, 8, 1)),),
    },
)

"""The tables of the feed-forward network's Triton kernels."""

from __future__ import annotations

from crossvit_kernels.gpu.tables import ANY
from crossvit_kernels.ops.common.configs import RowTable, RowTile

FFN = RowTable(
    "ffn",
    {
        2: (
            (96, RowTile(128, 64, 32, 8, 2)),
            (128, RowTile(128, 64, 128, 8, 2)),
            (192, RowTile(128, 64, 64, 8, 3)),
            (224, RowTile(128, 64, 32, 8, 2)),
            (256, RowTile(128, 32, 64, 8, 2)),
            (384, RowTile(128, 32, 32, 8, 2)),
            (448, RowTile(64, 32, 64, 8, 2)),
        ),
        4: ((448, RowTile(32, 16, 32, 8, 1)),),
    },
    on_sm={
        (80, 2): {
            192: RowTile(64, 32, 64, 8, 2),
            224: RowTile(64, 32, 32, 8, 2),
            256: RowTile(32, 64, 64, 8, 2),
            384: RowTile(32, 64, 64, 8, 2),
            448: RowTile(32, 64, 64, 8, 2),
        },
        (100, 2): {
            384: RowTile(64, 32, 64, 8, 2),
        },
    },
    fused_up_to=256,
)

FFN_HIDDEN_BACKWARD = RowTable(
    "ffn hidden backward",
    {
        2: (
            (256, RowTile(64, 64, 32, 4, 3)),
            (ANY, RowTile(64, 128, 32, 8, 3)),
        ),
        4: ((ANY, RowTile(32, 64, 32, 8, 1)),),
    },
)

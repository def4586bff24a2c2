"""The tables of the feed-forward network's Triton kernels."""

from __future__ import annotations

from crossvit_kernels.gpu.tables import ANY
from crossvit_kernels.ops.common.configs import RowTable, RowTile
from crossvit_kernels.ops.common.library import Figures, Step

FFN = RowTable(
    "ffn",
    {
        2: (
            (96, RowTile(64, 32, 32, 4, 3)),
            (128, RowTile(64, 32, 64, 4, 3)),
            (192, RowTile(128, 64, 64, 8, 3)),
            (224, RowTile(128, 64, 32, 8, 3)),
            (256, RowTile(128, 32, 64, 8, 3)),
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
            224: RowTile(64, 64, 32, 8, 3),
            384: RowTile(64, 32, 64, 8, 2),
        },
    },
    fused_up_to=256,
)

FFN_HIDDEN_BACKWARD = RowTable(
    "ffn hidden backward",
    {
        2: (
            (256, RowTile(128, 64, 32, 8, 3)),
            (ANY, RowTile(128, 128, 32, 8, 4)),
        ),
        4: ((ANY, RowTile(32, 64, 32, 8, 1)),),
    },
    few={
        2: (
            (256, RowTile(64, 64, 32, 4, 3)),
            (ANY, RowTile(64, 128, 32, 8, 3)),
        ),
    },
)

# Who does a step, and the model's figures as the reason: from bench/library_model.py.
#: LayerNorm, the first layer and GELU.
FC1 = Step({192: Figures(129.4, 154.7), 384: Figures(134.9, 177.0)})
#: The second layer and the residual.
FC2 = Step({192: Figures(71.0, 89.9), 384: Figures(93.1, 109.9)})
#: Backward: hidden units and their gradient, whose product is ours or cuBLAS's.
HIDDEN_GRADIENT = Step({192: Figures(196.9, 244.7), 384: Figures(334.9, 300.2)})

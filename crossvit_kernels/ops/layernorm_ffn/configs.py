"""The tables of the feed-forward network's Triton kernels."""

from __future__ import annotations

from crossvit_kernels.gpu.tables import ANY
from crossvit_kernels.ops.common.configs import RowTable, RowTile
from crossvit_kernels.ops.common.library import Figures, Step

#: The width up to which forward is one kernel, if rows are many.
ONE_KERNEL_UP_TO = 256

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
    fused_up_to=ONE_KERNEL_UP_TO,
)

#: With both products.
HIDDEN_BACKWARD = RowTable(
    "ffn hidden backward",
    {
        2: (
            (192, RowTile(128, 64, 32, 8, 3)),
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
    on_sm={
        (90, 2): {
            256: RowTile(128, 64, 32, 8, 3, 80),
        },
    },
)

#: With hidden units that forward has kept.
KEPT_HIDDEN_BACKWARD = RowTable(
    "ffn kept hidden backward",
    {
        2: ((ANY, RowTile(128, 128, 64, 8, 3)),),
        4: ((ANY, RowTile(32, 64, 32, 8, 1)),),
    },
    few={2: ((ANY, RowTile(64, 64, 64, 4, 3)),)},
    on_sm={
        (90, 2): {
            ANY: RowTile(128, 128, 64, 8, 3, 128),
        },
    },
)


def keeps_hidden(channels: int, element_size: int) -> bool:
    """Whether forward keeps hidden units if it is to keep what makes backward fast.

    Where forward is one kernel they would cost a pass over memory, and backward, which is bound by
    L2, gains little more.
    """
    return channels > ONE_KERNEL_UP_TO or element_size == 4


# Who does a step, and the model's figures as the reason: from bench/library_model.py.
#: LayerNorm, the first layer and GELU.
FC1 = Step({192: Figures(110.0, 154.7), 384: Figures(127.8, 177.0)})
#: The second layer and the residual.
FC2 = Step({192: Figures(71.0, 89.9), 384: Figures(93.1, 109.9)})
#: Backward: hidden units, computed again, and their gradient, whose product is ours or cuBLAS's.
HIDDEN_GRADIENT = Step({192: Figures(194.5, 270.3), 384: Figures(331.3, 306.4)})
#: The same with hidden units that forward has kept.
KEPT_HIDDEN_GRADIENT = Step({384: Figures(167.6, 215.9)})

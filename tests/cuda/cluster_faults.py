"""A fusion's barriers of clusters: each replaced by barriers of the blocks is a fault."""

from __future__ import annotations

from pathlib import Path

from fault import CLUSTER_BARRIER, Fault, barrier_of_a_block, barriers_of_blocks, race

FUSION_FORWARD, FUSION_BACKWARD = (
    "cross_attention/cuda/forward.cu",
    "cross_attention/cuda/backward.cu",
)
CASE = "fusion, aliased"

# The context of each cluster barrier of a fusion, by what precedes it.
CLUSTER_BARRIERS = {
    FUSION_FORWARD: {
        "m": f"{CLUSTER_BARRIER}\n  linear_of_heads(",
    },
    FUSION_BACKWARD: {
        "dz": f"{CLUSTER_BARRIER}\n\n  const auto run",
        "du": f"{CLUSTER_BARRIER}\n  linear_of_heads(",
        "dq": f"{CLUSTER_BARRIER}\n  // The gradient of LN",
        "dy0": f"{CLUSTER_BARRIER}  // also until",
    },
}
# Those of which a block does something between its arrival and the wait: both contexts.
SPLIT_BARRIERS = {
    FUSION_FORWARD: {
        "y0": ("{}\n  RowNormalization<T, false", "{}\n\n  norm.start("),
        "o": ("{}\n  LinearTiles<T, Share> out(", "{}\n\n  // y = y0"),
        "y": ("{}\n  RowNormalization<T, true, FloatRows>", "{}\n\n  // g"),
        "kt": ("{}\n  if (starts_early)", "images.tokens);\n  {}\n\n  const auto run"),
    },
    FUSION_BACKWARD: {
        "do": ("{}\n  if (starts_early)", "images.tokens);\n  {}\n  // dz_h"),
        "start": ("{}\n\n  // g\n", "blocks to start.\n  {}"),
        "g": ("{}\n\n  // dy of", "[] {{ {} }},\n      [&](int row, int c, float4 dy,"),
        "the query": ("{}\n\n  // dy0 sums", "of_tokens,\n      [] {{ {} }},"),
        "f": ("{}\n  normalize_rows_backward", "return 0; }}, [] {{ {} }},"),
    },
}

FAULTS: dict[str, Fault] = {
    **{
        f"fusion {Path(file).stem}: no cluster sync after {name}": race(
            CASE, barrier_of_a_block(file, context)
        )
        for file, contexts in CLUSTER_BARRIERS.items()
        for name, context in contexts.items()
    },
    **{
        f"fusion {Path(file).stem}: no cluster barrier after {name}": race(
            CASE, *barriers_of_blocks(file, *contexts)
        )
        for file, barriers in SPLIT_BARRIERS.items()
        for name, contexts in barriers.items()
    },
}

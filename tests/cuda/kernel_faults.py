"""Changed copies of the library's CUDA kernels: fewer kernels, with selectable faults.

kernels/run_case.cpp is the program that runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import block_faults
import cluster_faults
import host_build
import host_compiler
from fault import (
    BARRIER,
    CLUSTER_BARRIER,
    WARP_BARRIER,
    Build,
    Change,
    Fault,
    barrier_of_a_block,
    depends_on_batch,
    left_out,
    no_barrier,
    no_warp_barrier,
    overflow,
    race,
    wrong,
)

PLAN, STATISTICS, SCORES, PARTIALS, CHOOSE, WARP_ROWS, FORWARD_PASS, BACKWARD_PASS = (
    f"attention_core/cuda/{name}.h"
    for name in (
        *("plan", "statistics", "scores", "partials", "choose", "warp_rows"),
        *("forward_pass", "backward_pass"),
    )
)
ROW_NORMS, BLOCK, LAYERS, COLUMN_BLOCKS, PASSES, SENT_ROWS = (
    f"cross_attention/cuda/{name}.h"
    for name in ("row_norms", "block", "layers", "column_blocks", "passes", "sent_rows")
)
FUSION_FORWARD, FUSION_BACKWARD = cluster_faults.FUSION_FORWARD, cluster_faults.FUSION_BACKWARD
FRAGMENTS = "common/cuda/fragments.h"
KERNELS = tuple(str(path.relative_to(host_build.CSRC)) for path in host_build.KERNELS)

# One element type and two plans to save compile time; small blocks and splits because fibers are
# slow. Up to 96 channels a warp group is one warp, beyond that several.
REDUCED: list[Change] = [
    ("common/cuda/gpu.h", "#pragma once\n", '#pragma once\n#include "kernels/choice.h"\n'),
    (CHOOSE, "case DType::kFloat32: return run(float{});", ""),
    (CHOOSE, "case DType::kFloat16: return run(half{});", ""),
    (
        CHOOSE,
        "  if constexpr (sizeof(T) == 4) {\n",
        "  if (channels <= 96) return run(Plan<T, 6, 1, 1, 1, 3>(), channels < 96 ? 2 : 4);\n"
        "  return run(Plan<T, 3, 2, 4, 8, 2>(), 1);\n#if 0\n",
    ),
    (CHOOSE, "    return run(PlanOf<T, kWide>(), 1);\n  }\n}\n", "#endif\n}\n"),
    (CHOOSE, "kNarrowGroups[2] = {6, 4}", "kNarrowGroups[2] = {4, 4}"),  # so that both swap
    (
        BLOCK,
        "  if constexpr (sizeof(T) == 4) {\n",
        "  using attention_core::Plan;\n"
        "  if (channels <= 96) return run(Plan<T, 6, 1, 1, 1, 2>());\n"
        "  return run(Plan<T, 6, 2, 2, 4, 1>());\n#if 0\n",
    ),
    (BLOCK, "    return run(PlanOf<T, kWide>());\n  }\n}\n", "#endif\n}\n"),
    (BLOCK, "warp_groups = 8 / P::group_warps(channels);", "warp_groups = 2;"),
    (
        BLOCK,
        "if (bytes() > max_bytes) layout",
        "if (bytes() > max_bytes || ::crossvit::choice::aliased) layout",
    ),
    ("attention_core/cuda/kernels.h", "kSplitTokens = 1024;", "kSplitTokens = 128;"),
    *block_faults.REDUCED,
]

# Names in kernel_cases.CASES.
CORE, CORE_WIDE, CORE_SHARED = "core", "core, wide", "core, shared"
CORE_LARGE = "core, squares that overflow"
CORE_FOUR_GROUPS = "core, not normalized"  # warp groups, which swap their tiles
FUSION, FUSION_ALIASED, FUSION_WIDE, FUSION_SHARED = (
    "fusion",
    "fusion, aliased",
    "fusion, wide",
    "fusion, shared",
)

STORE_PARTIALS = "if (!tiles) store_partials(range);"


def of_a_pass(
    way: str,
    file: str,
    result: str,
    refilled: str,
    overwrites: str,
    row_too_many: tuple[str, str],
) -> dict[str, Fault]:
    """Faults common to forward_pass.h and backward_pass.h."""
    faults = {
        "tile refilled early": race(
            refilled, no_warp_barrier(file, f"{WARP_BARRIER}\n      ring_.copy_next(x, range")
        ),
        "sums overwrite tiles in use": race(
            overwrites, no_barrier(file, f"{BARRIER}\n    {STORE_PARTIALS}")
        ),
        "results read early": race(
            CORE_WIDE, no_barrier(file, f"{STORE_PARTIALS}\n    {BARRIER}\n  }}")
        ),
        "tile not waited for": wrong(CORE, result, left_out(file, "ring_.wait();")),
        "a row of results too many": overflow(CORE_WIDE, (file, *row_too_many)),
        "tiles of other blocks not there": race(
            CORE_SHARED,
            barrier_of_a_block(
                f"attention_core/cuda/{way}.cu", f"{CLUSTER_BARRIER}\n    pass.gather(tiles"
            ),
        ),
        "gathered sums not seen": race(
            CORE_SHARED, no_barrier(file, f"{BARRIER}\n  }}\n\n  // After run() or gather()")
        ),
    }
    return {f"{way}: {name}": fault for name, fault in faults.items()}


GROUP_BARRIER = "barrier_of_warps(1 + warp_group(channels), 32 * group_warps(channels));"

PAIRS = "row < count; row += block_warps()) {\n#pragma unroll 2"

FAULTS: dict[str, Fault] = {
    **of_a_pass(
        "forward",
        FORWARD_PASS,
        "m",
        CORE_WIDE,
        CORE_WIDE,  # else a warp's sums overwrite only its own tiles
        ("if (row + 1 < count)", "if (row + 1 < count + FAULT)"),
    ),
    **of_a_pass(
        "backward",
        BACKWARD_PASS,
        "du",
        CORE,
        CORE,
        (PAIRS, PAIRS.replace("count", "count + FAULT")),
    ),
    "forward: factors not seen": race(
        CORE, no_warp_barrier(FORWARD_PASS, f"{WARP_BARRIER}\n    // A warp has four rows")
    ),
    "forward: sums of rows not seen": race(
        CORE,
        no_barrier(FORWARD_PASS, f"if constexpr (!decltype(scores_)::kSumsOwnRows) {BARRIER}"),
    ),
    "forward: rows not seen": race(
        CORE_WIDE, no_barrier(FORWARD_PASS, f"{BARRIER}\n      scores_.sum_rows();")
    ),
    "backward: sums of rows not seen": race(
        CORE_WIDE, no_barrier(BACKWARD_PASS, f"clear();\n      {BARRIER}")
    ),
    "backward: rows not seen": race(
        CORE_WIDE, no_barrier(BACKWARD_PASS, f"if constexpr (kAlone) {BARRIER}")
    ),
    "fusion backward: rows not seen": race(
        FUSION, no_barrier(BACKWARD_PASS, f"of_warp[row] = sum;\n    }}\n    {BARRIER}")
    ),
    "backward: sums of all rows not seen": race(
        CORE, no_barrier(BACKWARD_PASS, f"{BARRIER}\n    const auto token_of")
    ),
    "backward: weights not seen": race(
        CORE, no_warp_barrier(BACKWARD_PASS, f"{WARP_BARRIER}\n    if (wants_dx) write_dx(")
    ),
    "backward: dx not seen": race(
        CORE, no_warp_barrier(BACKWARD_PASS, f"{WARP_BARRIER}\n      if (extra) copy_extra")
    ),
    "backward: a token of dx too many": overflow(
        CORE, (BACKWARD_PASS, "token + row >= last ||", "token + row >= last + FAULT ||")
    ),
    "a tile too many": wrong(
        CORE_SHARED, "m", (PARTIALS, "&& tile < num_tiles)", "&& tile < num_tiles + FAULT)")
    ),
    # The tiles of tokens and their scores.
    "a token too many": overflow(CORE, (PLAN, "token >= last)", "token >= last + FAULT)")),
    "copies not waited for": Fault(
        [left_out(PLAN, "copy_async_wait<P::kStages - 1>();")], CORE, "wrong result"
    ),
    "copies of other lanes not seen": race(
        CORE, no_warp_barrier(PLAN, f"copy_async_wait<0>();\n    }}\n    {WARP_BARRIER}")
    ),
    "copies of no group": race(CORE, left_out(PLAN, "copy_async_commit();")),
    "extra token not seen": race(
        CORE, no_warp_barrier(PLAN, f"(extra + slice_.first + c);\n    }}\n    {WARP_BARRIER}")
    ),
    "a warp group does not sync": race(CORE_WIDE, left_out(PLAN, GROUP_BARRIER)),
    "warp groups share a barrier": race(
        FUSION_WIDE,
        (
            PLAN,
            "barrier_of_warps(1 + warp_group(channels)",
            "barrier_of_warps(1 + (FAULT ? 0 : warp_group(channels))",
        ),
    ),
    "one buffer of scores": race(
        CORE_WIDE,
        (
            SCORES,
            "(warp * kBuffers + iteration %",
            "(warp * kBuffers + !FAULT * iteration %",
        ),
    ),
    "a sum of a row too many": wrong(
        CORE_WIDE, "du", (SCORES, "(channels_) * kSums;", "(channels_) * kSums + FAULT;")
    ),
    "a sum from another lane": wrong(
        CORE, "m", (STATISTICS, "% 4 * 9 + (i & 1) * 4", "% 4 * 9 + (i & 1) * 4 * !FAULT")
    ),
    "a group of units too many": race(
        CORE,
        (
            FORWARD_PASS,
            "if (kAlone && has_next) load(minimum(first + kCount, last_group), next);",
            "if (kAlone && has_next) load("
            "FAULT ? first + kCount : minimum(first + kCount, last_group), next);",
        ),
    ),
    "m in an order that depends on the block": depends_on_batch(
        CORE_FOUR_GROUPS,
        "m",
        (PARTIALS, "(group ^ range.swap) *", "(group ^ (FAULT ? 0 : range.swap)) *"),
    ),
    "du in an order that depends on the block": depends_on_batch(
        CORE_FOUR_GROUPS,
        "du",
        (
            BACKWARD_PASS,
            "group_sums(range, group ^ range.swap)",
            "group_sums(range, group ^ (FAULT ? 0 : range.swap))",
        ),
    ),
    "half of a full tile left out": wrong(
        FUSION,
        "new_cls",
        (SCORES, "kSkipsSide && attended < 256", "kSkipsSide && (FAULT || attended < 256)"),
    ),
    # The tensor cores' operands.
    "columns of B swapped": wrong(
        CORE,
        "m",
        (
            FRAGMENTS,
            "(pairs, tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);",
            "(pairs, tile + (FAULT ? lane % 16 : lane % 8 + lane / 16 * 8) * pitch + "
            "(FAULT ? lane / 16 : lane / 8 % 2) * 8);",
        ),
    ),
    "columns of dx swapped": wrong(
        CORE,
        "dx",
        (
            FRAGMENTS,
            "lane % 16 * pitch + lane / 16 * 8",
            "lane % 16 * pitch + lane / 16 * 8 * !FAULT",
        ),
    ),
    "squares of another token": wrong(
        CORE, "m", (STATISTICS, "own_column(upper)", "upper[FAULT ? 0 : lane_index() / 4 % 2]")
    ),
    "squares of half the channels": wrong(
        CORE, "m", (STATISTICS, "own_column(lower + 2)", "own_column(lower + 2 * !FAULT)")
    ),
    "the sum of another row": wrong(
        FUSION, "new_cls", (SCORES, "return g % 2 ?", "return g % 2 && !FAULT ?")
    ),
    "a tile of tokens twice": wrong(
        CORE, "m", (PLAN, "tiles - 1 : tile - 1;", "tiles - 1 : tile - !FAULT;")
    ),
    "a row of u too many": overflow(
        CORE, (WARP_ROWS, "row < rows.count_ ?", "row < rows.count_ + FAULT ?")
    ),
    "sum of another token": wrong(
        CORE,
        "m",
        (
            SCORES,
            "own_column(kOnesBesideRows ? products[0][i] + 2",
            "own_column(kOnesBesideRows ? products[0][FAULT ? 0 : i] + 2",
        ),
    ),
    "squares that overflow": wrong(
        CORE_LARGE, "m", (SCORES, "is_owner() && cancels", "is_owner() && cancels && !FAULT")
    ),
    "the mean of another token": wrong(
        CORE_LARGE, "m", (STATISTICS, "of_row, 0x3232", "of_row, FAULT ? 0x1010 : 0x3232")
    ),
    "transposed the wrong way": wrong(
        CORE,
        "m",
        (
            FRAGMENTS,
            "transposed(a.pair, tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8",
            "transposed(a.pair, tile + (FAULT ? lane % 16 : lane % 8 + lane / 16 * 8) * pitch + "
            "(FAULT ? lane / 16 : lane / 8 % 2) * 8",
        ),
    ),
    "rows of A swapped": wrong(
        FUSION,
        "new_cls",
        (
            LAYERS,
            "{upper.pair[i], lower.pair[i],",
            "{(FAULT ? lower : upper).pair[i], lower.pair[i],",
        ),
    ),
    # The fusion's linear layers.
    "columns of a layer too many": overflow(
        FUSION,
        (LAYERS, "columns_.tiles(); tile +=", "columns_.tiles() + FAULT; tile +="),
        (LAYERS, "tile >= columns_.tiles()", "tile >= columns_.tiles() + FAULT"),
    ),
    "columns of a block of columns too many": overflow(
        FUSION,
        (COLUMN_BLOCKS, "i < heads * column_blocks;", "i < heads * column_blocks + FAULT;"),
    ),
    "columns of a head's layer too many": overflow(
        FUSION,
        (
            LAYERS,
            "job < own_.count * column_blocks_;",
            "job < own_.count * column_blocks_ + FAULT;",
        ),
        (LAYERS, "if (i >= own_.count) return;", "if (i >= own_.count + FAULT) return;"),
    ),
    "sums of other warps not seen": race(FUSION, no_barrier(LAYERS, f"{BARRIER}\n      add_up(")),
    "sums in use overwritten": race(
        FUSION, no_barrier(LAYERS, f"write);\n      if (i + 1 < blocks) {BARRIER}")
    ),
    "a part of the depth left out": wrong(
        FUSION,
        "dcls",
        (LAYERS, "part += block_warps()) {\n", "part += block_warps() << FAULT) {\n"),
    ),
    "a head's rows not seen": race(
        FUSION_ALIASED, no_barrier(BLOCK, f"}});\n      {BARRIER}\n    }}\n    linear.run(rows")
    ),
    "a head's rows overwrite others in use": race(
        FUSION_ALIASED,
        no_barrier(BLOCK, f"count, write);\n    if (i + 1 < own.count) {BARRIER}"),
    ),
    "fusion forward: q not seen": race(
        FUSION_ALIASED, no_barrier(FUSION_FORWARD, f"{BARRIER}\n\n  // kt_h")
    ),
    "rows of other blocks not there": race(
        FUSION_ALIASED, barrier_of_a_block(BLOCK, f"{CLUSTER_BARRIER}\n    }}\n  }}\n}};")
    ),
    "rows of other warps not there": race(
        FUSION_SHARED, no_barrier(BLOCK, f"if (are_all) {{\n      {BARRIER}")
    ),
    "a row of another block": wrong(
        FUSION_ALIASED,
        "dcls",
        (BLOCK, "row & (this->ranks - 1)", "(row + FAULT) & (this->ranks - 1)"),
    ),
    "fusion backward: dnew_cls not seen": race(
        FUSION, no_barrier(FUSION_BACKWARD, f"images.tokens);\n  {BARRIER}\n  // For the other")
    ),
    "fusion forward: rows of f not seen": race(
        FUSION, no_barrier(FUSION_FORWARD, f"v.activated));\n  {BARRIER}")
    ),
    "fusion forward: rows of the pass not seen": race(
        FUSION_ALIASED, no_barrier(FUSION_FORWARD, f"u.write(pass.rows());\n      {BARRIER}")
    ),
    "fusion forward: rows of q not seen": race(
        FUSION, no_barrier(FUSION_FORWARD, f"v.normed));\n  {BARRIER}")
    ),
    "fusion forward: rows of g not seen": race(
        FUSION, no_barrier(FUSION_FORWARD, f"v.back_activated));\n  {BARRIER}")
    ),
    "sums of a row not seen": race(
        FUSION_ALIASED, no_barrier(ROW_NORMS, f"make_float2(a, b);\n    {BARRIER}")
    ),
    # Several images per block.
    "fusion: a tile where sums will be": race(
        FUSION,
        (PLAN, "iteration % 2 == 0 ? block_warps()", "iteration % 2 == FAULT ? block_warps()"),
    ),
    "a block of an image left out": wrong(
        FUSION_SHARED,
        "new_cls",
        (
            SENT_ROWS,
            "i < images_.blocks_per_image; i +=",
            "i < images_.blocks_per_image - FAULT; i +=",
        ),
    ),
    "fusion forward: an image overwrites results": race(
        FUSION_ALIASED, no_barrier(FUSION_FORWARD, f"}});\n    {BARRIER}\n  }};")
    ),
    "fusion backward: an image overwrites results": race(
        FUSION_ALIASED, no_barrier(FUSION_BACKWARD, f"}});\n    {BARRIER}\n  }};")
    ),
    "fusion: tiles of other blocks not there": race(
        FUSION_SHARED, barrier_of_a_block(BLOCK, f"return;\n  {CLUSTER_BARRIER}\n#pragma")
    ),
    "fusion forward: gathered sums not seen": race(
        FUSION_SHARED, no_barrier(PASSES, f"gathered.state;\n        }});\n    {BARRIER}")
    ),
    "fusion backward: gathered sums not seen": race(
        FUSION_SHARED, no_barrier(PASSES, f"gathered.mean);\n        }});\n    {BARRIER}")
    ),
    **block_faults.FAULTS,
    **cluster_faults.FAULTS,
}
NUMBERS = {name: number for number, name in enumerate(FAULTS, 1)}


def changes() -> Iterator[Change]:
    yield from REDUCED
    for name, fault in FAULTS.items():
        chosen = f"(::crossvit::choice::fault == {NUMBERS[name]})"
        for file, old, new in fault.changes:
            yield file, old, new.replace("FAULT", chosen)


def changed_files() -> Path:
    """Write the changed kernels and other files of csrc/; return their folder."""
    replacements: dict[str, list[tuple[str, str]]] = {name: [] for name in KERNELS}
    for file, old, new in changes():
        replacements.setdefault(file, []).append((old, new))
    return host_compiler.changed_tree(host_build.CSRC, replacements)


def program(build: Build) -> Path:
    folder = changed_files()
    sources = host_compiler.KERNELS / "run_case.cpp", *(folder / name for name in KERNELS)
    # Quoted includes search this folder before those of -I. With -Og, AddressSanitizer's code
    # compiles in half the time.
    flags = ["-iquote", str(folder)]
    if build.sanitizer == "address":
        flags.append("-Og")
    return host_compiler.program(sources, sanitizer=build.sanitizer, flags=flags)

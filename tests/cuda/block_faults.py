"""Smaller kernels of transformer blocks, and their faults; kernel_faults.py has the others."""

from __future__ import annotations

from fault import (
    BARRIER,
    WARP_BARRIER,
    Change,
    Fault,
    left_out,
    no_barrier,
    no_warp_barrier,
    overflow,
    race,
    wrong,
)

DISPATCH, PIPELINE, TOKEN_ROWS, LINEAR, LAYER_NORM = (
    f"common/cuda/{name}"
    for name in (
        *("dispatch.h", "pipeline.h", "token_rows.h"),
        *("linear.cu", "layer_norm.cu"),
    )
)
ATTENTION, MSA_FORWARD, MSA_BACKWARD = (
    f"layernorm_msa/cuda/{name}" for name in ("attention.h", "forward.cu", "backward.cu")
)
# Names in kernel_cases.CASES.
MSA, MSA_FEW, MSA_OPTIONS = "msa", "msa, few tokens", "msa, options"
FFN, FFN_OPTIONS = "ffn", "ffn, options"

# One element type; smaller tiles, of which small inputs have several.
REDUCED: list[Change] = [
    (DISPATCH, "case DType::kFloat32: return run(float{});", ""),
    (DISPATCH, "case DType::kFloat16: return run(half{});", ""),
    *(
        (file, f"{name}(float)\n{name}(bf16)\n{name}(half)", f"{name}(bf16)")
        for file, name in ((LINEAR, "CROSSVIT_LINEAR"), (LAYER_NORM, "CROSSVIT_LAYER_NORM"))
    ),
    (
        LINEAR,
        "kRows = 128, kColumns = 128, kTerms = 128 / sizeof(T);",
        "kRows = 32, kColumns = 64, kTerms = 32;",
    ),
    (LINEAR, "kThreads = 256, kStages = 3;", "kThreads = 64, kStages = 3;"),
    (LINEAR, "kWarpColumns = 64;", "kWarpColumns = 32;"),
    (LAYER_NORM, "kNormWarps = 8;", "kNormWarps = 2;"),
    (ATTENTION, "kRowsOfBlock = 64;", "kRowsOfBlock = 32;"),
    (MSA_FORWARD, "sizeof(T) == 2 || kHeadDim <= 64 ? 32 : 16, 1>", "16, 1>"),
    (MSA_BACKWARD, "minimum(2048 / kHeadDim, 32), kTiles,", "16, kTiles,"),
    (MSA_BACKWARD, "sizeof(T) == 2 && kHeadDim <= 32 ? 2 : 1>", "1>"),
]

FAULTS: dict[str, Fault] = {
    "a step of a pipeline not seen": race(
        MSA, no_barrier(PIPELINE, f"copy_async_wait<kStages - 2>();\n    {BARRIER}")
    ),
    "a step of a pipeline not waited for": Fault(
        [left_out(PIPELINE, "copy_async_wait<kStages - 2>();")],
        MSA,
        "exits with cp.async copies it has not waited for",
    ),
    "a stage refilled while it is read": race(
        FFN,
        (
            PIPELINE,
            "copy(step + kStages - 1, refilled);",
            "copy(step + kStages - 1, FAULT ? stage : refilled);",
        ),
    ),
    "a row of a tile too many": overflow(
        MSA, (PIPELINE, "row + i * kStep < rows &&", "row + i * kStep < rows + FAULT &&")
    ),
    "a unit of a row too many": overflow(
        MSA, (PIPELINE, "&& column < columns;", "&& column < columns + 8 * FAULT;")
    ),
    "linear: a row too many": overflow(
        FFN,
        (
            LINEAR,
            "if (row + of_warp < a.rows) end.store(",
            "if (row + of_warp < a.rows + FAULT) end.store(",
        ),
    ),
    "linear: a column too many": overflow(
        FFN,
        (
            LINEAR,
            "if (column >= a.columns) return;",
            "if (column >= a.columns + 8 * FAULT) return;",
        ),
    ),
    "linear: stages overwritten that are read": race(
        FFN, no_barrier(LINEAR, f"{BARRIER}\n  const auto result")
    ),
    "linear: results not seen": race(
        FFN, no_warp_barrier(LINEAR, f"{WARP_BARRIER}\n    row += first_row()")
    ),
    "linear: another activation": wrong(
        FFN_OPTIONS,
        "y",
        (LINEAR, "if (a.gate.linear != 0) return", "if (a.gate.linear != 0 && !FAULT) return"),
    ),
    "linear: no LayerScale": wrong(
        FFN_OPTIONS, "y", (LINEAR, "if (a.layer_scale.data)", "if (a.layer_scale.data && !FAULT)")
    ),
    "LayerNorm: a row too many": overflow(
        MSA_FEW, (LAYER_NORM, "if (row >= a.rows) return;", "if (row >= a.rows + FAULT) return;")
    ),
    "LayerNorm: shares not seen": race(MSA, no_barrier(LAYER_NORM, BARRIER)),
    "LayerNorm: another token for the CLS": wrong(
        MSA, "y", (TOKEN_ROWS, "if (cls && token == 0)", "if (cls && token == FAULT)")
    ),
    "attention: a missing key attended to": wrong(
        MSA,
        "y",
        (
            ATTENTION,
            "if (count < 8 * kTiles) exclude",
            "if (!FAULT && count < 8 * kTiles) exclude",
        ),
    ),
    "attention: a masked key attended to": wrong(
        MSA_OPTIONS,
        "y",
        (ATTENTION, "if (!(attended >> bit & 1))", "if (!FAULT && !(attended >> bit & 1))"),
    ),
    "attention: a key of the mask too many": overflow(
        MSA_OPTIONS,
        (ATTENTION, "key < count && mask[key]", "key < count + FAULT && mask[key]"),
    ),
    "masked keys: a row too many": overflow(
        MSA_OPTIONS, (MSA_FORWARD, "if (row >= rows ||", "if (row >= rows + FAULT ||")
    ),
    "attention backward: masked keys with gradients": wrong(
        MSA_OPTIONS,
        "dx",
        (MSA_BACKWARD, "if (params.key_mask) zero", "if (params.key_mask && !FAULT) zero"),
    ),
    "attention: sums not rescaled": wrong(
        MSA,
        "y",
        (
            MSA_FORWARD,
            "const float decay = exp2_approx(",
            "const float decay = FAULT ? 1.0f : exp2_approx(",
        ),
    ),
    "attention: rows overwritten that are read": race(
        MSA_FEW, no_warp_barrier(ATTENTION, f"4 * kPitch + lane_index() % 4 * 2;\n  {WARP_BARRIER}")
    ),
    "attention: results not seen": race(
        MSA, no_warp_barrier(ATTENTION, f"  {WARP_BARRIER}\n  constexpr int kUnitsOfRow")
    ),
    "attention: a token too many": overflow(
        MSA, (ATTENTION, "if (token >= block.rows ||", "if (token >= block.rows + FAULT ||")
    ),
    "attention backward: terms not copied": wrong(
        MSA,
        "dx",
        left_out(MSA_BACKWARD, "if (i < P::kStep) copy_async_16(of_step + i, terms + first + i);"),
    ),
}

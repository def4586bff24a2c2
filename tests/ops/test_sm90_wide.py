"""The linear layer of any width for sm_90 without a GPU: when it runs, and what it compiles to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from block_cases import float_ffn
from test_sm90_linear import COMPILED
from test_triton_launches import run_without_a_device

from crossvit_kernels.gpu import launcher, tables
from crossvit_kernels.inspect.ahead_of_time import DTYPES, empty, empty_weights
from crossvit_kernels.ops.common import hopper, sm90_linear, sm90_wide
from crossvit_kernels.ops.common.configs import FEW_ROWS, VARIANTS
from crossvit_kernels.ops.common.sm90_linear import Recorded
from crossvit_kernels.ops.common.sm90_wide import WideShape
from crossvit_kernels.ops.layernorm_ffn.reference import SHAPES as FFN_SHAPES
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs, FfnWeights
from crossvit_kernels.ops.layernorm_msa.reference import SHAPES as MSA_SHAPES
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs, MsaWeights
from crossvit_kernels.ops.operator import OPERATIONS

WIDE = """
from crossvit_kernels.ops.common.sm90_wide import WideShape
from crossvit_kernels.ops.common.triton_sm90_wide_kernels import sm90_wide_linear as wide

def check_wide(
    channels, columns, residual, dtype=torch.bfloat16, bias=True, scaled=False, transposed=False,
    gelu=False,
):
    x, w, y = (torch.zeros(n, m, dtype=dtype, device="cpu")
               for n, m in ((70, channels), (columns, channels), (70, columns)))
    c = WideShape(channels, columns, residual, transposed, gelu)
    w = w.t().contiguous() if transposed else w
    b, scale = w if bias else None, torch.zeros(7, device="cpu") if scaled else None
    tiles = [tile(t, *t.shape, t.stride(0)) for t in (x, w, y, y)]
    tiles[1] = tile(w, *w.shape, w.stride(0))
    compiled = wide.warmup(*tiles, b, scale, 70, 10, c, num_warps=4, grid=(1,))
    assert wide.warmup(*tiles, b, scale, 64, 1, c, num_warps=4, grid=(2,)) is compiled
    assert compiled.metadata.shared <= machine_code.SHARED_BYTES_OF_PROGRAM[90]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        ((_, stack_bytes),) = machine_code.usage(cubin).values()
    assert stack_bytes == 0, (channels, columns, stack_bytes)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    (code,) = sass.disassemble(compiled.asm["cubin"]).values()
    found = unfinished_loads(code)
    assert not found, found

"""
#: (K, N) of second layers and projections, and a tile: a consumer's rows, columns of sums.
LAYERS = {
    (768, 96): (128, (128,)),
    (512, 128): (128, (128,)),
    (576, 192): (128, (128, 64)),
    (672, 224): (64, (128, 128)),
    (768, 256): (128, (128,)),
    (1152, 384): (128, (128, 64)),
    (1344, 448): (128, (128, 64)),
    (1536, 512): (128, (128, 64)),
    (3072, 768): (128, (128, 64)),
    (64, 64): (128, (64,)),
}
QUICK = ((576, 192), (1152, 384))


@pytest.mark.parametrize("layer", LAYERS)
def test_tiles(layer: tuple[int, int]) -> None:
    """All columns are covered; as many stages as fit beside the mbarriers, in few registers."""
    c = WideShape(*layer)
    assert c.tile == LAYERS[layer]
    assert 0 <= c.tiles * c.tile_columns - c.columns < c.tile_columns
    assert c.halves * c.tile_columns <= 384 and c.stages >= 4
    stage = 2 * 64 * (c.rows + c.tile_columns)
    assert c.stages * stage <= 227 * 1024 - 1024 < (c.stages + 1) * stage
    assert 0 <= 64 * c.steps - c.channels < 64


def test_it_is_chosen_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the GPU and Triton too on which sm90_linear has run: this kernel has not."""
    weight = torch.empty(384, 1152, dtype=torch.bfloat16, device="meta")
    x = torch.empty(1, FEW_ROWS + 1, 1152, dtype=torch.bfloat16, device="meta")
    for device_and_version in sm90_linear.PROVEN:
        monkeypatch.setattr(sm90_linear, "why_no_gluon", lambda x, weight: None)
        monkeypatch.setattr(
            sm90_linear, "device_and_version", lambda device, pair=device_and_version: pair
        )
        for proven in (sm90_linear.is_proven, sm90_wide.is_proven):
            proven.cache_clear()
        assert sm90_linear.is_proven(x.device) and sm90_linear.chosen(x[..., :384], weight[:, :384])
        assert not sm90_wide.is_proven(x.device) and not hopper.is_proven(x.device)
        for variant in VARIANTS.names:
            with VARIANTS.choose(variant):
                assert sm90_wide.chosen(x, weight) == (variant == "gluon")
    for proven in (sm90_linear.is_proven, sm90_wide.is_proven):
        proven.cache_clear()


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is declined if neither of its layers runs; one may be too wide for sm90_linear."""
    x, weights = torch.empty(2, 9, 32), float_ffn()
    with tables.as_if_on(90):
        assert "not on a GPU" in hopper.why_not(SimpleNamespace(x=x, weights=weights))
    monkeypatch.setattr(sm90_linear, "why_no_gluon", lambda x, weight: None)

    def reason(channels: int, hidden: int) -> str | None:
        return hopper.why_not(SimpleNamespace(x=x, weights=float_ffn(channels, hidden)))

    assert reason(64, 128) is None and reason(768, 3072) is None and reason(96, 384) is None
    assert "20 channels" in reason(20, 60)
    assert "8" in sm90_wide.why_not(x, torch.empty(20, 64))


def test_inspect_compiles_what_is_launched() -> None:
    """Launches find it in Triton's cache; of CrossViT-15 all layers are there, each once."""
    pytest.importorskip("triton")
    run_without_a_device(
        COMPILED
        + WIDE
        + """
from crossvit_kernels.inspect import gluon_code
found = gluon_code.forms(["bf16", "fp32"], [(64, 2, 576), (384, 6, 1152)])
assert len(set(found)) == len(found) == 8 + 3 + 10 + 2 and {f.dtype for f in found} == {"bf16"}
assert sum(f.kernel == "sm90_linear" for f in found) == 2 * 5
(form,) = (f for f in found if f.shape.channels == 576 and f.shape.residual and not f.absent)
assert "576 to 64 residual, 256x64; 2 consumers" in form.describe()
report = gluon_code.inspect(form)
assert report.spills == 0 and not report.passed_over and report.tensor_core_instructions == 16
check_wide(576, 64, True, scaled=True)
(other,) = (f for f in found if f.shape.channels == 576 and f.shape.transposed)
check_wide(576, 64, False, bias=False, transposed=True)
launched = {k.hash for cache in wide.device_caches.values() for k in cache[0].values()}
assert launched == {gluon_code.compiled(f).hash for f in (form, other)}
"""
    )


def _tier(layer: tuple[int, int]) -> object:
    """CrossViT-15's second layers, and all others in the exhaustive tier."""
    return pytest.param(layer, marks=pytest.mark.slow if layer in QUICK else pytest.mark.exhaustive)


@pytest.mark.parametrize("layer", [_tier(layer) for layer in LAYERS])
def test_it_spills_nothing(layer: tuple[int, int]) -> None:
    pytest.importorskip("triton")
    run_without_a_device(
        COMPILED
        + WIDE
        + f"check_wide(*{layer}, True, scaled=True)\n"
        + f"check_wide(*{layer}, False, torch.float16, bias=False, transposed=True)\n"
        + ("" if layer in QUICK else f"check_wide(*{layer}, True, torch.float16)\n")
    )


@pytest.mark.slow
def test_first_layers_spill_nothing() -> None:
    """Those of the wider branches of the base model and of CrossViT-18, in the widest tiles."""
    pytest.importorskip("triton")
    run_without_a_device(
        COMPILED
        + WIDE
        + "check_wide(768, 3072, False, gelu=True)\n"
        + "check_wide(448, 1344, False, torch.float16)\n"
    )


def test_layers_too_wide_for_sm90_linear() -> None:
    """A block of 448 channels runs in this family whole, but for attention; LayerNorm is before."""
    pytest.importorskip("triton")
    channels, hidden = 448, 1344
    with recorded() as launches, VARIANTS.choose("gluon"):
        backend = OPERATIONS["layernorm_msa"].backends["triton:gluon"]
        backend.forward(MsaInputs(*of_msa(channels)), 1e-6, "")
        backend = OPERATIONS["layernorm_ffn"].backends["triton:gluon"]
        backend.forward(of_ffn(channels, hidden, "gelu"), 1e-6, "")
    assert names(launches) == [
        *("normalize", "sm90_wide_linear", "attention", "sm90_wide_linear"),
        *("normalize", "sm90_wide_linear", "sm90_wide_linear"),
    ]
    shapes = [launch.arguments[-1] for launch in launches if isinstance(launch, Recorded)]
    assert [(c.columns, c.gelu, c.residual) for c in shapes] == [
        (3 * channels, False, False),
        (channels, False, True),
        (hidden, True, False),
        (channels, False, True),
    ]
    with recorded() as launches, VARIANTS.choose("gluon"):
        backend.forward(of_ffn(channels, hidden, "relu"), 1e-6, "")
        backend.forward(of_ffn(384, 1152, "gelu"), 1e-6, "")
    assert names(launches)[-2:] == ["sm90_linear", "sm90_wide_linear"]
    assert names(launches)[:-2] in (
        ["normalize", "linear", "sm90_wide_linear"],
        ["norm_linear", "sm90_wide_linear"],
    )
    with recorded() as launches:
        backend = OPERATIONS["layernorm_ffn"].backends["triton"]
        backend.forward(of_ffn(channels, hidden, "gelu"), 1e-6, "")
    assert not any(isinstance(launch, Recorded) for launch in launches)


@contextlib.contextmanager
def recorded() -> Iterator[list[Any]]:
    """Record launches on tensors without memory, as on an H100."""
    with tables.as_if_on(90), launcher.recording_launches() as launches:
        yield launches


def names(launches: list[Any]) -> list[str]:
    """Kernels' names."""
    return [
        launch.kernel.__name__
        if isinstance(launch, Recorded)
        else launch.specialization.kernel.__name__
        for launch in launches
    ]


def of_msa(channels: int) -> tuple[Any, ...]:
    """In bfloat16, of enough rows."""
    weights = empty_weights(MSA_SHAPES, {"C": channels}, DTYPES["bf16"])
    x = empty((50, 197, channels), torch.bfloat16)
    return x, MsaWeights(*weights), 7, None, None


def of_ffn(channels: int, hidden: int, activation: str) -> FfnInputs:
    weights = empty_weights(FFN_SHAPES, {"C": channels, "F": hidden}, DTYPES["bf16"])
    x = empty((50, 197, channels), torch.bfloat16)
    return FfnInputs(x, FfnWeights(*weights), None, activation)

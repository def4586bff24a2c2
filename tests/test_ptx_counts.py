"""What the executor of PTX counts is what the cycle model finds in the same launch's code."""

from __future__ import annotations

import json

import ptx_cuda
import pytest
from test_ptx import launch

#: Neither a compiler nor a guess changes these.
_EQUAL = ("tensor-core products", "barriers", "atom", "sectors stored")
#: Of these ptxas leaves out repetitions, at most such a share.
_FEWER = {"shared passes": 0.07, "ldmatrix": 0.15, "stmatrix": 0.0, "shfl": 0.25}
#: Warps empty the L1 behind a cluster's barrier, and the model runs some before others: what all
#: load, as LayerNorm's parameters in forward, then comes from L2 more than once.
_MORE_SECTORS = {"cross_attention_forward": 2.6, "cross_attention_backward": 1.4}


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, cases, options",
    [
        ("triton", ("layernorm_ffn_split",), ("--sm", "80")),
        ("triton", ("layernorm_msa_lean",), ("--sm", "90")),
        ("triton", ("attention_core",), ("--sm", "80", "--dtype", "fp32")),
        ("triton", ("attention_core",), ("--sm", "90")),
        ("cuda", ("attention_core", "layernorm_ffn", "cross_attention_fusion"), ()),
    ],
)
def test_counts_agree(backend: str, cases: tuple[str, ...], options: tuple[str, ...]) -> None:
    if backend == "cuda" and (reason := ptx_cuda.why_not()):
        pytest.skip(reason)
    done = launch(backend, *cases, *options, script="ptx_counts.py")
    assert not done.returncode, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) >= 2
    for row in rows:
        for name in _EQUAL:
            executed, modelled = row.get(name, (0, 0))
            assert executed == modelled, (name, row)
        for name, share in _FEWER.items():
            executed, modelled = row.get(name, (0, 0))
            assert (1 - share) * executed <= modelled <= executed, (name, row)
        executed, modelled = row["sectors from L2"]
        assert executed <= modelled <= _MORE_SECTORS.get(row["kernel"], 1.0) * executed, row
        executed, modelled = row["instructions"]
        assert executed == pytest.approx(modelled, rel=0.3), row
        holds, votes = row["votes"]
        # Branches on values without a vote, as in activations, are guessed as well; votes that lead
        # to a slow path, as where squares cancel, are not, and none holds here.
        assert (row["guessed"] or not holds) and 0 <= holds <= votes

"""The files of a call, as CONTRIBUTING.md lists them: few enough to read in one sitting."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from crossvit_kernels import extension
from crossvit_kernels.gpu import launcher

ROOT = Path(__file__).resolve().parent.parent
MOST_FILES = 12

PROGRAM = r"""
import sys, threading
import torch
import crossvit_kernels as ck
from fusion_cases import make_weights

backend = sys.argv[1]
weights = ck.FusionWeights(*(t.float().requires_grad_() for t in make_weights(32, 48)))
cls, x = (torch.randn(*shape, requires_grad=True) for shape in ((2, 32), (2, 9, 48)))

def call():
    return ck.cross_attention_fusion(cls, x, weights, 3, backend=backend).sum()

def files(run):
    seen = set()
    def profile(frame, event, _):
        path = frame.f_code.co_filename
        if event == "call" and "/crossvit_kernels/" in path:
            seen.add(path.rsplit("/crossvit_kernels/", 1)[1])
    threading.setprofile(profile)  # autograd may run backward in a thread of its own
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return sorted(seen)

call().backward()  # imports, compilation, tables
outputs = []
print(*files(lambda: outputs.append(call())))
print(*files(lambda: outputs[0].backward()))
"""


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.slow_on_cpu)])
def test_a_fusion_runs_few_files(backend):
    reason = extension.missing if backend == "cpu" else _no_triton()
    if reason:
        pytest.skip(reason)
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, backend],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    for way, line in zip(("forward", "backward"), result.stdout.splitlines(), strict=True):
        files = line.split()
        assert len(files) <= MOST_FILES, (way, files)
        names = {path.removesuffix(".py") for path in files}
        assert {name for name in names if not _is_listed(name)} == set(), way


def _no_triton() -> str | None:
    return None if launcher.installed() else "triton is not installed"


def _is_listed(name: str) -> bool:
    """Whether the section names a file, by its path or the end of it."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## The path of a call") : text.index("## Adding an operation")]
    return any(f"/{name}".endswith(f"/{listed}") for listed in re.findall(r"`([\w/]+)`", section))

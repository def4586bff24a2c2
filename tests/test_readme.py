"""The README stays short, and its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import crossvit_kernels as ck

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def readme() -> str:
    path = ROOT / "README.md"
    if not path.exists():
        pytest.skip("an installation without the source tree")
    return path.read_text()


def test_it_is_short(readme: str) -> None:
    lines = readme.splitlines()
    assert len(lines) < 120 and max(map(len, lines)) <= 120


def test_its_example_runs(readme: str, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "reference" in capsys.readouterr().out


def test_its_links_lead_somewhere(readme: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)", readme):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_the_reference_names_every_function_and_program(readme: str) -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    sources = [*(ROOT / "bench").glob("*.py"), *(ROOT / "examples").glob("*.py")]
    programs = {p.name for p in sources if '__name__ == "__main__"' in p.read_text()}
    assert "serving_bench.py" in programs and len(programs) > 10
    names = {name for name in ck.__all__ if not name.startswith("_")} | programs
    assert {name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)} == set()

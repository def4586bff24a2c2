"""The README stays short, and its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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

"""Tested versions of torch and Triton, and warnings about others."""

from __future__ import annotations

import pytest

from crossvit_kernels import __main__, supported


@pytest.mark.parametrize(
    "package, version, tested",
    [
        *(("triton", v, True) for v in ("3.6.0", "3.8.0", "3.9.1", "3.7.0+git1234")),
        *(("triton", v, False) for v in ("3.5.1", "3.10.0", "4.0.0", "main")),
        *(("torch", v, True) for v in ("2.10.0", "2.11.0+cu130", "2.15.0.dev20270101")),
        *(("torch", v, False) for v in ("2.9.1", "2.16.0", "3.0.0")),
    ],
)
def test_what_is_tested(package: str, version: str, tested: bool) -> None:
    assert supported.is_tested(package, version) == tested


def test_the_report_has_the_ranges_and_warns_outside_of_them(monkeypatch) -> None:
    ranges = {"torch": "(tested: 2.10 to 2.15)", "triton": "(tested: 3.6 to 3.9)"}
    lines, _ = __main__.report().split("\n\n", 1)
    rows = dict(line.split(maxsplit=1) for line in lines.splitlines())
    for package, expected in ranges.items():
        assert rows[package].endswith(expected)
    monkeypatch.setattr(supported, "installed_version", {"torch": "2.11.0", "triton": "3.7.0"}.get)
    assert "warning" not in __main__.report()
    monkeypatch.setattr(supported, "installed_version", {"torch": "2.9.0", "triton": "3.10.0"}.get)
    report = __main__.report()
    assert "warning: torch 2.9.0 is untested" in report
    assert "warning: triton 3.10.0 is untested: these kernels were tested with triton 3.6" in report
    monkeypatch.setattr(supported, "installed_version", {"torch": "2.11.0"}.get)
    assert "warning" not in __main__.report()  # Triton is optional


@pytest.mark.parametrize("version, tested", [("3.9.0", True), ("3.10.0", False), (None, False)])
def test_the_installed_triton(version: str | None, tested: bool, monkeypatch) -> None:
    monkeypatch.setattr(supported, "installed_version", lambda package: version)
    supported.triton_is_tested.cache_clear()
    assert supported.triton_is_tested() == tested
    supported.triton_is_tested.cache_clear()

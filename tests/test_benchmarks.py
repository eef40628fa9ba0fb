"""Benchmarks are scripts and not tests; here only that they can be started."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))
SHARED = ("common.py", "one_update.py", "phases.py")  # the others use them
PAGE = "gpu_report.py"  # measures nothing, and always writes the same page


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_script_imports_is_there(name: str) -> None:
    found = runpy.run_path(str(FOLDER / name), run_name="imported")
    assert found["__doc__"]


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in (*SHARED, PAGE)])
def test_a_script_names_its_options(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(FOLDER / name), run_name="imported")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        script["main"]()
    assert end.value.code == 0
    assert "--out" in capsys.readouterr().out
